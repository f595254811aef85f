"""kernels/conv_lstm.cu and conv_lstm_grad.cu from their real PTX, through plan and launch code, under the detector."""

import emulator
import numpy as np
import pytest
from compare import LAYOUTS, REAL_DTYPES, assert_close, empty_output, frozen, is_complex, poisoned
from emulated import EmulatedRuntime
from planted import planted
from strategies import uniform

from cuconv import activations, ops, reference
from cuconv.cuda.conv_lstm import gates, gates_grad
from cuconv.cuda.engine import Engine
from cuconv.plan.conv_lstm import plan_gates, plan_gates_grad
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import ACTIVATION_CODES, MAX_GRID_X

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

LAST, FIRST = "channels_last", "channels_first"
NAMES = ("h", "c", "dz", "dc")


def shapes_of(shape, data_format):
    """Of z, and of c four times: c, dh, dc and their gradient are alike."""
    axis = 1 if data_format == FIRST else -1
    z = list(shape)
    z[axis] *= 4
    return tuple(z), shape


def problem(shape, data_format, dtype, reach=6):
    """z, c, dh, dc; z from -reach to reach: 6 is where every activation bends."""
    rng = np.random.default_rng(0)
    z_shape, c_shape = shapes_of(shape, data_format)
    z = (reach * uniform(rng, z_shape, "complex128" if is_complex(dtype) else "float64")).astype(
        uniform(rng, (), dtype).dtype
    )
    return z, *(uniform(rng, c_shape, dtype) for _ in range(3))


def outputs(arrays, make):
    z, c, _, _ = arrays
    return make(c.shape, c.dtype), make(c.shape, c.dtype), make(z.shape, z.dtype), make(c.shape, c.dtype)


def both(engine, arrays, functions, data_format, results):
    """Both passes of an engine into `results`."""
    z, c, dh, dc = arrays
    engine[0](z, c, *functions, data_format, *results[:2])
    engine[1](z, c, dh, dc, *functions, data_format, *results[2:])
    return results


def on(runtime):
    return tuple(lambda *arguments, f=f: f(runtime, *arguments) for f in (gates, gates_grad))


def expected(arrays, functions, data_format):
    """The NumPy path in double precision, which tests/test_conv_lstm_parity.py holds to the oracle."""
    wide = [a.astype(np.complex128 if a.dtype.kind == "c" else np.float64) for a in arrays]
    return both((reference.gates, reference.gates_grad), wide, functions, data_format, outputs(wide, np.empty))


def run(shape, data_format=LAST, dtype="float32", names=("tanh", "sigmoid"), runtime=None, reach=6):
    """Both passes against the NumPy path, into poisoned outputs."""
    runtime = runtime or EmulatedRuntime(mode="trace", seed=1)
    functions = [activations.get(name) for name in names]
    arrays = problem(shape, data_format, dtype, reach)
    results = both(on(runtime), arrays, functions, data_format, outputs(arrays, poisoned))
    for what, ours, theirs in zip(NAMES, results, expected(arrays, functions, data_format)):
        assert_close(ours, theirs, dtype=dtype, terms=8, what=what)
    return runtime, results


# A vector has 4 float32: runs of gates that it divides and does not, one block of 128 threads, less and more.
@pytest.mark.parametrize("filters", [1, 3, 4, 8])
@pytest.mark.parametrize("positions", [(1,), (2, 3), (16, 9), (2, 3, 2)])
@pytest.mark.parametrize("data_format", [LAST, FIRST])
def test_every_edge(positions, filters, data_format):
    shape = (2, filters, *positions) if data_format == FIRST else (2, *positions, filters)
    run(shape, data_format)


@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize("names", [("tanh", "sigmoid"), ("relu", "hard_sigmoid")])
def test_every_dtype(dtype, names):
    run((2, 5, 16), LAST, dtype, names)
    run((2, 3, 5), FIRST, dtype, names)


@pytest.mark.parametrize("device", ["T4", "A100", "B200", "RTX 5090"])
def test_other_architectures(device):
    run((2, 5, 8), LAST, "bfloat16", runtime=EmulatedRuntime(DEVICES[device], "trace", 1))


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_numbers_have_linear_gates(dtype):
    run((2, 5, 4), LAST, dtype, ("linear", "linear"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", REAL_DTYPES)
@pytest.mark.parametrize("name", ACTIVATION_CODES)
def test_every_activation(name, dtype):
    reach = 1 if name == "exponential" else 6  # that of an exponential leaves float16 soon
    run((2, 3, 16), LAST, dtype, (name, "hard_sigmoid"), reach=reach)
    run((2, 3, 16), LAST, dtype, ("softsign", name), reach=reach)


def test_activations_that_are_not_fused_are_array_functions(monkeypatch):
    """Softmax works on the last axis in memory, whatever the layout; a user's function has the name of one of ours."""

    def relu(x):
        return x * 3

    engine = Engine(EmulatedRuntime())
    assert engine.fuses(activations.tanh) and not engine.fuses(activations.get(relu))
    z, c = (uniform(np.random.default_rng(0), shape, "float32") for shape in ((2, 3, 16), (2, 3, 4)))
    for names in (("tanh", "softmax"), ("softmax", "sigmoid"), (relu, "hard_tanh")):
        functions = {"activation": names[0], "recurrent_activation": names[1]}
        expected = ops.conv_lstm_step(z, c, c, None, None, **functions)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "_host_engine", engine)
            actual = ops.conv_lstm_step(z, c, c, None, None, **functions)
        assert all(map(np.array_equal, actual, expected))
    assert not engine.runtime.launches


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_give_what_arrays_give(layout):
    functions = activations.tanh, activations.sigmoid
    arrays = problem((2, 3, 4), LAST, "float32")
    plain = both(on(EmulatedRuntime(mode="trace")), arrays, functions, LAST, outputs(arrays, poisoned))
    views = outputs(arrays, lambda shape, dtype: empty_output(shape, dtype.name, layout))
    strange = [frozen(array, layout) for array in arrays]
    both(on(EmulatedRuntime(mode="trace")), strange, functions, LAST, [each.view for each in views])
    for ours, theirs in zip(views, plain):
        assert np.array_equal(ours.view, theirs)
        ours.assert_surroundings_untouched()


def test_a_misaligned_array_has_narrower_vectors():
    arrays = [
        np.concatenate([np.zeros(2, a.dtype), a.ravel()])[2:].reshape(a.shape)
        for a in problem((2, 3, 4), LAST, "float32")
    ]
    runtime = EmulatedRuntime(mode="trace", seed=1)
    functions = activations.tanh, activations.sigmoid
    results = both(on(runtime), arrays, functions, LAST, outputs(arrays, poisoned))
    assert [dict(plan.constants)["VECTOR"] for plan in runtime.launches] == [2, 2]
    for ours, theirs in zip(results, expected(arrays, functions, LAST)):
        assert_close(ours, theirs, dtype="float32", terms=8)


def test_the_same_bits_in_every_order():
    results = [run((2, 9, 20), runtime=EmulatedRuntime(mode="trace", seed=seed))[1] for seed in (0, 1, 2, 3)]
    assert all(a.tobytes() == b.tobytes() for result in results for a, b in zip(result, results[0]))


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_16_bytes_an_access_and_every_array_once(dtype):
    runtime, _ = run((4, 32, 16), LAST, dtype)
    size = 4 * 32 * 16 * np.dtype(problem((1, 1), LAST, dtype)[0].dtype).itemsize
    for result, reads, writes in zip(runtime.results, (5, 7), (2, 5)):
        moved = [each for each in result.traffic if each.space == "global"]
        assert all(each.bytes == 512 * each.requests and each.sectors == each.least_sectors for each in moved)
        assert sum(each.bytes for each in moved if each.instruction.startswith("ld")) == reads * size
        assert sum(each.bytes for each in moved if each.instruction.startswith("st")) == writes * size


@pytest.mark.parametrize("plan", [plan_gates, plan_gates_grad])
@pytest.mark.parametrize("device", DEVICES)
def test_plans_on_every_device(device, plan):
    for outer, inner, dtype, bytes_, width in (
        (1, 1, "float32", 4, 1),
        (32 * 64 * 64, 64, "float16", 4, 8),
        (8, 256 * 56 * 56, "float64", 4, 2),
        (2**17, 2**12, "bfloat16", 8, 8),  # z has 2^31 elements
        (2**17 - 1, 2**12, "bfloat16", 4, 8),
        (2**22, 3, "float32", 4, 1),
    ):
        made = plan(outer, inner, "tanh", "sigmoid", dtype, (0,) * 6, DEVICES[device])
        constants = dict(made.constants)
        assert made.grid[0] <= MAX_GRID_X and made.grid[1:] == (1, 1)
        assert made.integers == (inner, outer * inner // width) and constants["VECTOR"] == width
        assert 0 <= made.grid[0] * made.threads * width - outer * inner < made.threads * width
        assert made.index_bytes == bytes_ and constants["INDEX"] == ("int" if bytes_ == 4 else "long long")
        assert made.cost.seconds > 0 and made.cost.bytes == made.cost.least_bytes and "one pass" in str(made)


def test_empty_arrays_launch_nothing():
    runtime = EmulatedRuntime()
    z, c = np.ones((0, 3, 8), np.float32), np.ones((0, 3, 2), np.float32)
    functions = activations.tanh, activations.sigmoid
    gates(runtime, z, c, *functions, LAST, c.copy(), c.copy())
    gates_grad(runtime, z, c, c, c, *functions, LAST, z.copy(), c.copy())
    assert not runtime.launches


# --- Bugs that were planted, and what sees them ----------------------------------------------------------------------

BUGS = (
    ("gate of another kind", "conv_lstm.cu", "load<VECTOR>(z + 2 * p.inner)", "load<VECTOR>(z + p.inner)", "differ"),
    ("h from a(z)", "conv_lstm.cu", "activate<ACTIVATION>(c));", "c);", "h: .* differ"),
    ("threads beyond the end", "conv_lstm.cu", "if (id >= p.vectors) return;", "", "bounds"),
    ("place in z", "conv_lstm_grad.cu", "at / p.inner * 3 * p.inner + at", "at * 4", "bounds|differ"),
    ("slope at the wrong place", "conv_lstm_grad.cu", "back<ACTIVATION>(after, ", "back<ACTIVATION>(c, ", "differ"),
    ("dz_o from the whole", "conv_lstm_grad.cu", "times(dy, activate<A", "times(total, activate<A", "dz: .* differ"),
    ("slope of relu6", "activations.cuh", "v <= R(0) || v >= R(6) ? R(0)", "v <= R(0) ? R(0)", "dz: .* differ"),
)  # fmt: skip


@pytest.mark.parametrize("file, right, wrong, seen", [bug[1:] for bug in BUGS], ids=[bug[0] for bug in BUGS])
def test_planted_bugs_are_seen(file, right, wrong, seen):
    with planted(file, right, wrong), pytest.raises((AssertionError, emulator.EmulationError), match=seen):
        run((2, 5, 4), LAST, "float64", ("relu6", "hard_sigmoid"))
