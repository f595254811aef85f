"""kernels/bias_grad.cu from its real PTX, through plan and launch code, under the detector."""

import emulator
import numpy as np
import oracle
import pytest
from compare import DTYPES, LAYOUTS, assert_close, dtype_of, empty_output, frozen, poisoned
from emulated import EmulatedRuntime
from planted import planted
from strategies import uniform

from cuconv.cuda.bias_grad import bias_grad
from cuconv.plan.bias_grad import plan_bias_grad
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import ELEMENTS, MAX_GRID_X

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

LAST, FIRST = "channels_last", "channels_first"
WORKSPACE = 64 << 20


def run(shape, data_format=LAST, dtype="float32", runtime=None, workspace=WORKSPACE):
    """Against the oracle, into a poisoned output; the plans that ran and the result."""
    runtime = runtime or EmulatedRuntime(mode="trace", seed=1)
    dy = uniform(np.random.default_rng(0), shape, dtype)
    expected = oracle.bias_grad(dy, data_format=data_format)
    out = poisoned(expected.shape, dy.dtype)
    bias_grad(runtime, dy, data_format, out, workspace)
    assert_close(out, expected, dtype=dtype, terms=dy.size // len(expected))
    return runtime, out


# One row a way to cut an array into items, in one launch and in two. (shape, data_format, what an item is, launches)
CASES = (
    ((1, 1), LAST, "batch items", 1),
    ((5, 3), LAST, "batch items", 1),
    ((2, 341, 3), LAST, "batch items", 1),  # one item and a bit
    ((3, 5000, 8), LAST, "batch items", 2),
    ((70000, 1), LAST, "batch items", 2),
    ((9, 2, 1025), LAST, "channels", 1),  # no vector divides them
    ((70, 2052), LAST, "channels", 2),  # nor the tile
    ((5, 3, 7), FIRST, "batch items", 1),
    ((900, 5, 3, 7), FIRST, "batch items", 2),
    ((3, 70, 7, 7), FIRST, "channels", 1),
    ((70, 45, 7, 12), FIRST, "channels", 2),
    ((2, 3, 1100), FIRST, "a piece of a channel", 1),
    ((40, 2, 45, 46), FIRST, "a piece of a channel", 2),
    ((1, 2, 2, 99, 500), FIRST, "a piece of a channel", 2),
)


@pytest.mark.parametrize("shape, data_format, item, launches", CASES)
def test_every_way_to_cut(shape, data_format, item, launches):
    runtime, _ = run(shape, data_format)
    assert item in runtime.launches[0].reason and len(runtime.launches) == launches


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype):
    run((3, 1500, 8), LAST, dtype)
    run((40, 2, 20, 101), FIRST, dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["T4", "L4", "B200"])
@pytest.mark.parametrize("shape, data_format, item, launches", CASES)
def test_every_way_to_cut_on_other_devices(shape, data_format, item, launches, device, dtype):
    run(shape, data_format, dtype, EmulatedRuntime(DEVICES[device], "trace", 1))


@pytest.mark.parametrize("workspace", [0, 1, 64, 1000])
def test_the_workspace_limits_the_parts(workspace):
    runtime, _ = run((3, 5000, 8), workspace=workspace)
    first = runtime.launches[0]
    assert first.grid[0] == 1 or first.grid[0] * 8 * 4 <= workspace
    assert (first.grid[0] == 1) == (workspace < 64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_give_what_arrays_give(layout):
    dy = uniform(np.random.default_rng(0), (2, 31, 8), "float32")
    plain, out = poisoned((8,), "float32"), empty_output((8,), "float32", layout)
    bias_grad(EmulatedRuntime(mode="trace"), dy, LAST, plain, WORKSPACE)
    bias_grad(EmulatedRuntime(mode="trace"), frozen(dy, layout), LAST, out.view, WORKSPACE)
    assert np.array_equal(out.view, plain)
    out.assert_surroundings_untouched()


def test_a_misaligned_array_has_narrower_vectors():
    dy = uniform(np.random.default_rng(0), (2 * 31 * 8 + 1,), "float32")[1:].reshape(2, 31, 8)
    runtime, out = EmulatedRuntime(mode="trace"), poisoned((8,), "float32")
    bias_grad(runtime, dy, LAST, out, WORKSPACE)
    assert dict(runtime.launches[0].constants)["VECTOR"] == 1
    assert_close(out, oracle.bias_grad(dy), dtype="float32", terms=62)


@pytest.mark.parametrize("shape, data_format", [((3, 5000, 8), LAST), ((40, 2, 45, 46), FIRST)])
def test_the_same_bits_in_every_order(shape, data_format):
    runs = [run(shape, data_format, runtime=EmulatedRuntime(mode="trace", seed=seed)) for seed in (0, 1, 2, 3)]
    assert len({out.tobytes() for _, out in runs}) == 1


def test_16_bits_are_summed_in_32():
    """65536 ones: a 16-bit sum stops at 256 (bfloat16) or 2048."""
    for dtype in ("float16", "bfloat16"):
        dy, out = np.full((4096, 3, 2), 0.25, dtype_of(dtype)), poisoned((2,), dtype)
        bias_grad(EmulatedRuntime(mode="trace"), dy, LAST, out, WORKSPACE)
        assert out.tolist() == [3072, 3072]


def test_nothing_is_the_sum_of_nothing():
    runtime, out = EmulatedRuntime(), poisoned((3,), "float32")
    bias_grad(runtime, np.ones((0, 5, 3), np.float32), LAST, out, WORKSPACE)
    assert not out.any() and not runtime.launches


@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bytes_an_access_and_every_element_once(dtype):
    runtime, _ = run((64, 40, 32), LAST, dtype)
    loads = [
        each for each in runtime.results[0].traffic if each.space == "global" and each.instruction.startswith("ld")
    ]
    size = 64 * 40 * 32 * dtype_of(dtype).itemsize
    assert sum(each.bytes for each in loads) == size
    assert all(".v4." in each.instruction and each.sectors == each.least_sectors for each in loads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_plans_on_every_device(device, dtype):
    limits, element = DEVICES[device], ELEMENTS[dtype]
    for batch, channels, positions in (
        (1, 1, 1),
        (32 * 224 * 224, 64, 1),
        (1 << 24, 256, 1),
        (3, 100_000, 1),
        (64, 512, 49),
        (1, 3, 1 << 24),
        (512, 2048, 1031),
        (1000, 701, 1),
        (7, 1, 1 << 29),
    ):
        plans, splits = plan_bias_grad(batch, channels, positions, dtype, (0,), WORKSPACE, limits)
        assert len(plans) == (1 if splits == 1 else 2)
        assert splits * channels * element.sum_bytes <= WORKSPACE or splits == 1
        for plan in plans:
            items, run_, segments, row, step, tile_step, span, shrink, width, groups, local, length, tiles, f = (
                plan.integers
            )
            constants = dict(plan.constants)
            room = constants["VECTOR"] * constants["THREADS"]
            assert plan.threads == constants["THREADS"] and plan.grid[0] <= MAX_GRID_X
            assert groups * local * length == width <= room and tiles * local >= f == channels
            assert all(n % constants["VECTOR"] == 0 for n in (row, step, tile_step, width, span, shrink))
            assert (items - 1) // segments * row + (items - 1) % segments * step < batch * channels * positions
            assert plan.grid[0] == tiles * -(-items // run_)
            assert plan.shared_bytes <= 48 << 10 and plan.registers <= 255
            assert plan.cost.seconds > 0 and plan.cost.bytes >= plan.cost.least_bytes - element.bytes * channels
            assert "parts" in str(plan)
        big = batch * channels * positions >= 2**31
        assert plans[0].index_bytes == (8 if big else plans[0].index_bytes)
        assert dict(plans[0].constants)["INDEX"] == ("int" if plans[0].index_bytes == 4 else "long long")


# --- Bugs that were planted, and what sees them ----------------------------------------------------------------------

BUGS = (
    ("no barrier after the sums are staged", "}\n  __syncthreads();\n  fold", "}\n  fold", "race|uninitialised"),
    ("no barrier between halves", "    __syncthreads();\n    left = half;", "    left = half;", "race"),
    ("half rounded down", "const int half = (left + 1) / 2", "const int half = left / 2", "differ|race"),
    ("columns beyond the item", "left = column < p.width ? ", "left = true ? ", "bounds"),
    ("rows beyond the array", "left > segment * step", "true", "bounds|differ"),
    ("last split too long", "begin + p.run < p.items ? begin + p.run : p.items", "begin + p.run", "bounds|differ"),
    ("never to the next row", "dy += p.row - p.segments * p.step;", "dy += p.row;", "bounds|differ"),
    ("groups left out", "fold(sums, 1, int(p.groups), int(p.local * p.length));", "", "differ"),
    ("channels beyond the last", "f < p.local && tile * p.local + f < p.channels", "f < p.local", "race|bounds"),
)  # fmt: skip


@pytest.mark.parametrize("right, wrong, seen", [bug[1:] for bug in BUGS], ids=[bug[0] for bug in BUGS])
def test_planted_bugs_are_seen(right, wrong, seen):
    def every_way():
        run((2, 341, 3))
        run((3, 70, 7, 7), FIRST)
        run((40, 3, 1100), FIRST)
        run((3, 5000, 8))
        run((9, 2, 1025))

    with planted("bias_grad.cu", right, wrong), pytest.raises((AssertionError, emulator.EmulationError), match=seen):
        every_way()


def test_an_order_that_changes_is_seen(monkeypatch):
    """What the test of equal bits is for: parts that are added up as they arrive."""
    shape = (3, 5000, 8)
    dy = uniform(np.random.default_rng(0), shape, "float32")
    sums = [np.cumsum(np.random.default_rng(seed).permutation(dy.reshape(-1, 8)), 0)[-1].tobytes() for seed in (1, 2)]
    assert sums[0] != sums[1]
