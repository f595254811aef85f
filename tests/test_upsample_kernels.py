"""kernels/upsample.cu and upsample_grad.cu from their real PTX, through plan and launch code, under the detector."""

import re
import struct

import emulated
import emulator
import numpy as np
import oracle
import pytest
from compare import DTYPES, LAYOUTS, assert_close, dtype_of, empty_output, frozen, poisoned
from hypothesis import given
from parity import assert_adjoint
from planted import planted
from strategies import INTERPOLATIONS, examples, uniform, upsamplings

from cuconv import interpolation as tables
from cuconv import reference
from cuconv.cuda.runtime import kernel_directory
from cuconv.cuda.upsample import upsample, upsample_input_grad
from cuconv.plan import cost
from cuconv.plan import upsample as plans
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import ELEMENTS, MAX_GRID_X

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

LAST, FIRST = "channels_last", "channels_first"
TAPS = 12  # of the widest kernel, along one axis


class Runtime(emulated.EmulatedRuntime):
    """Under the detector, in random order."""

    def __init__(self, device="H200", seed=1, **options):
        super().__init__(DEVICES[device], options.pop("mode", "trace"), seed, **options)

    def constant(self, key, make):
        return make()


def random(shape, dtype, seed=0):
    return uniform(np.random.default_rng(seed), shape, dtype)


def large(shape, size, data_format):
    """The enlarged shape."""
    first = 2 if data_format == FIRST else 1
    return tuple(n * size[a - first] if 0 <= a - first < len(size) else n for a, n in enumerate(shape))


def run(shape, size, interpolation, data_format=LAST, dtype="float32", runtime=None):
    """Both passes against the oracle, into poisoned outputs; the launches and both results."""
    runtime = runtime or Runtime()
    options = {"interpolation": interpolation, "data_format": data_format}
    x, dy = random(shape, dtype), random(large(shape, size, data_format), dtype, 1)
    y, dx = poisoned(dy.shape, x.dtype), poisoned(x.shape, x.dtype)
    upsample(runtime, x, size, interpolation, data_format, y)
    upsample_input_grad(runtime, dy, size, interpolation, data_format, dx)
    terms = TAPS ** len(size)
    assert_close(y, oracle.upsample(oracle.wide(x), size, **options), dtype=dtype, terms=terms, what="y")
    expected = oracle.upsample_input_grad(oracle.wide(dy), size, **options)
    assert_close(dx, expected, dtype=dtype, terms=terms * 3 ** len(size), what="dx")
    if interpolation == "nearest":
        assert np.array_equal(y, oracle.upsample(x, size, **options)), "nearest copies"
    return runtime.launches, y, dx


# One row an edge: where axes, vectors, windows and walks begin and end. (shape, size, data_format)
SHAPES = (
    ((1, 1, 1), (1,), LAST),  # nothing to do
    ((1, 1, 1), (3,), LAST),  # one input: both edges at once
    ((2, 9, 3), (2,), LAST),  # channels that no vector divides: along a row
    ((3, 4, 32), (2,), LAST),  # many channels: the axis is walked
    ((2, 3, 5), (4,), FIRST),
    ((2, 4, 5, 4), (2, 3), LAST),
    ((1, 9, 2, 4), (3, 1), LAST),  # an axis that keeps its size, inside
    ((1, 2, 9, 4), (1, 3), LAST),  # and outside
    ((2, 3, 5, 6), (2, 2), FIRST),
    ((1, 2, 2, 3, 4), (2, 2, 2), LAST),
    ((1, 2, 3, 2, 2), (3, 1, 2), LAST),  # and between two others
    ((1, 2, 1, 2, 4), (2, 3, 2), FIRST),
)
NAMES = [f"{'x'.join(map(str, shape))} by {size} {form}" for shape, size, form in SHAPES]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("shape, size, data_format", SHAPES, ids=NAMES)
def test_every_edge(shape, size, data_format, interpolation):
    run(shape, size, interpolation, data_format)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("shape, size, data_format", SHAPES, ids=NAMES)
def test_every_edge_kernel_and_dtype(shape, size, data_format, interpolation, dtype):
    run(shape, size, interpolation, data_format, dtype)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS[2:])
@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 2, 4), (1, 5, 4), (1, 26, 4)])
def test_windows_wider_and_much_shorter_than_the_axis(shape, interpolation):
    run(shape, (2,), interpolation)
    run(shape, (3,), interpolation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
def test_every_dtype(dtype, interpolation):
    run((2, 3, 2, 16), (2, 2), interpolation, dtype=dtype)
    run((2, 3, 3, 4), (2, 2), interpolation, FIRST, dtype=dtype)


@pytest.mark.parametrize("device", ["T4", "A100", "B200", "RTX 5090"])
def test_other_architectures(device):
    run((2, 3, 3, 8), (2, 3), "bilinear", dtype="bfloat16", runtime=Runtime(device))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES)
@examples(60)
@given(upsamplings())
def test_drawn(dtype, problem):
    """As tests/test_upsample_parity.py draws them, memory layouts included."""
    if 0 in problem.x_shape:
        return
    runtime, options = Runtime(), {"interpolation": problem.interpolation, **problem.options}
    size = oracle.one_per_axis(problem.size, problem.rank)
    (x,) = problem.random(problem.x_shape, dtype=dtype)
    (dy,) = problem.random(large(problem.x_shape, size, problem.data_format), dtype=dtype)
    for function, argument, result, more in (
        (upsample, x, dy, 1),
        (upsample_input_grad, dy, x, 3),
    ):
        out = empty_output(result.shape, x.dtype, problem.out_layout or "contiguous")
        function(runtime, argument, size, problem.interpolation, problem.data_format, out.view)
        if problem.out_layout:
            out.assert_surroundings_untouched()
        expected = getattr(oracle, function.__name__)(argument, size, **options)
        assert_close(out.view, expected, dtype=dtype, terms=(more * TAPS) ** problem.rank)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_give_what_arrays_give(layout):
    x, dy = random((1, 3, 2, 4), "float32"), random((1, 6, 4, 4), "float32", 1)
    for function, argument, result in ((upsample, x, dy), (upsample_input_grad, dy, x)):
        plain = poisoned(result.shape, "float32")
        function(Runtime(), argument, (2, 2), "bilinear", LAST, plain)
        out = empty_output(result.shape, "float32", layout)
        function(Runtime(), frozen(argument, layout), (2, 2), "bilinear", LAST, out.view)
        assert np.array_equal(out.view, plain)
        out.assert_surroundings_untouched()


def test_a_misaligned_array_has_narrower_vectors():
    for skip, width in ((0, 4), (1, 1), (2, 2)):
        x, y = random((12 * 4 + skip,), "float32")[skip:].reshape(1, 12, 4), poisoned((1, 24, 4), "float32")
        runtime = Runtime()
        upsample(runtime, x, (2,), "bilinear", LAST, y)
        (plan,) = runtime.launches
        constants = dict(plan.constants)
        assert (constants["VECTOR"] if not constants["ROWWISE"] else 1) == width
        assert_close(y, oracle.upsample(x, 2, interpolation="bilinear"), dtype="float32", terms=TAPS)


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", "float16", "int32", "float32", "int64", "complex128"]
)
@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_nearest_copies_bits(dtype, channels):
    """Random bytes, NaN with every payload among them."""
    bits = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, 2 * 3 * channels * 16, np.uint8)
    x = bits.view(dtype)[: 2 * 3 * channels]
    for data_format, shape in ((LAST, (2, 3, channels)), (FIRST, (2, channels, 3))):
        source = x.reshape(shape)
        out = np.zeros(large(shape, (2,), data_format), dtype)
        upsample(Runtime(), source, (2,), "nearest", data_format, out)
        axis = 1 if data_format == LAST else 2
        assert out.tobytes() == np.repeat(source, 2, axis).tobytes()


@pytest.mark.parametrize("mode", INTERPOLATIONS[1:])
def test_nan_reaches_what_reads_it_and_nothing_else(mode):
    x, dy = random((1, 13, 13, 4), "float32"), random((1, 26, 39, 4), "float32")
    x[0, 6, 5, 1] = dy[0, 12, 20, 2] = np.nan
    for function, argument, shape in ((upsample, x, dy.shape), (upsample_input_grad, dy, x.shape)):
        ours, theirs = poisoned(shape, "float32"), poisoned(shape, "float32")
        function(Runtime(), argument, (2, 3), mode, LAST, ours)
        getattr(reference, function.__name__)(argument, (2, 3), mode, LAST, theirs)
        reached = np.isnan(theirs)
        assert reached.any() and not reached.all()
        assert np.array_equal(np.isnan(ours), reached)


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic"])
def test_the_same_bits_in_every_order(interpolation):
    results = [run((2, 9, 3, 6), (2, 2), interpolation, runtime=Runtime(seed=seed))[1:] for seed in (0, 1, 2, 3)]
    assert all(a.tobytes() == b.tobytes() for result in results for a, b in zip(result, results[0]))


def test_the_gradient_is_adjoint():
    x, dy = random((2, 5, 3, 2, 2), "float64"), random((2, 10, 9, 4, 2), "float64", 1)
    y, dx = np.empty_like(dy), np.empty_like(x)
    upsample(Runtime(), x, (2, 3, 2), "lanczos3", LAST, y)
    upsample_input_grad(Runtime(), dy, (2, 3, 2), "lanczos3", LAST, dx)
    assert_adjoint(dy, y, [(dx, x)])


def test_empty_arrays_launch_nothing():
    runtime = Runtime()
    upsample(runtime, np.ones((0, 3, 2)), (2,), "bilinear", LAST, np.ones((0, 6, 2)))
    upsample_input_grad(runtime, np.ones((0, 6, 2)), (2,), "bilinear", LAST, np.ones((0, 3, 2)))
    assert not runtime.launches


@pytest.fixture
def cheap_launches(monkeypatch):
    """Plans that take every axis by itself."""
    monkeypatch.setattr(cost, "LAUNCH_SECONDS", -1.0)
    caches = plans.plan_upsample, plans.plan_upsample_grad
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128"])
@pytest.mark.parametrize("shape, size, launches", [((1, 3, 4, 2, 4), (2, 3, 2), 3), ((2, 3, 2, 4), (2, 1, 2), 2)])
def test_axis_after_axis(cheap_launches, shape, size, launches, dtype):
    """Sums on the way are not rounded to 16 bits. Without channels_last, size has an axis for every one of x."""
    plans_run, _, _ = run(shape if len(shape) == 5 else (*shape, 4), size, "bicubic", dtype=dtype)
    assert len(plans_run) == 2 * launches


# --- What moves ------------------------------------------------------------------------------------------------------


def source_line(place):
    """The line of a kernel that a counter belongs to, for instance ``common.cuh:124 (inlined at upsample.cu:107)``."""
    file, line = re.findall(r"(\w+\.cuh?):(\d+)", place)[-1]
    return (kernel_directory() / file).read_text().splitlines()[int(line) - 1]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_16_bytes_an_access_and_no_sector_twice(interpolation, dtype):
    runtime = Runtime()
    x, y = random((1, 8, 16, 32), dtype), poisoned((1, 16, 32, 32), dtype_of(dtype))
    for function, source, target in ((upsample, x, y), (upsample_input_grad, y, x)):
        function(runtime, source, (2, 2), interpolation, LAST, target)
        moved = [each for each in runtime.traffic if each.space == "global"]
        stores = [each for each in moved if each.instruction.startswith("st")]
        loads = [each for each in moved if re.search(r"load<(N|VECTOR)>\(", source_line(each.place))]  # not weights
        assert sum(each.bytes for each in stores) == target.nbytes
        assert all(each.bytes == 512 * each.requests for each in stores), "16 bytes a lane"
        assert loads and all(".v4.u32" in each.instruction for each in loads)
        assert all(each.sectors == each.least_sectors for each in stores + loads)


def test_rows_of_few_channels_are_written_in_16_bytes():
    runtime = Runtime()
    upsample(runtime, random((1, 1, 4, 64), "float32"), (2, 2), "bilinear", FIRST, poisoned((1, 1, 8, 128), "float32"))
    (store,) = (each for each in runtime.traffic if each.instruction.startswith("st"))
    assert store.bytes == 512 * store.requests and store.sectors == store.least_sectors


# --- Tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS[1:])
def test_short_tables_hold_every_weight(interpolation, size):
    """The weights of an axis, put together from the tables as kernels read them, are the oracle's."""
    reach = tables.KERNELS[interpolation][1]
    for n in (1, 2, 3, 2 * reach, 2 * reach + 1, 2 * reach + 2, 4 * reach + 1, 4 * reach + 2, 4 * reach + 5):
        expected = np.zeros((n * size, n))
        for p in range(n * size):
            for i, weight in oracle.interpolation_row(p, n, size, interpolation).items():
                expected[p, i] = weight
        windows, shares = np.zeros_like(expected), np.zeros_like(expected)
        short = min(n, 2 * reach + 1)
        table = tables.window_weights(short, size, interpolation)
        for p in range(n * size):
            i, k = divmod(p, size)
            row = (i - np.clip(i - reach, 0, n - short)) * size + k
            for t, j in enumerate(range(i - reach + (k >= size // 2), i + reach + (k >= size // 2))):
                if 0 <= j < n:
                    windows[p, j] = table[row, t]
                else:
                    assert table[row, t] == 0
        short = min(n, 4 * reach + 1)
        table = tables.share_weights(short, size, interpolation)
        for i in range(n):
            for k, weight in enumerate(table[i - np.clip(i - 2 * reach, 0, n - short)]):
                p = (i - reach) * size + size // 2 + k
                if 0 <= p < n * size:
                    shares[p, i] = weight
                else:
                    assert weight == 0
        np.testing.assert_allclose(windows, expected, atol=1e-14)
        np.testing.assert_allclose(shares, expected, atol=1e-14)


def test_a_long_axis_needs_no_long_table():
    kept = {}

    class Keeping(Runtime):
        def constant(self, key, make):
            return kept.setdefault(key, make())

    upsample(Keeping(), random((1, 5000, 1), "float32"), (2,), "lanczos5", LAST, poisoned((1, 10000, 1), "float32"))
    assert [table.shape for table in kept.values()] == [(22, 10)]


# --- Plans -----------------------------------------------------------------------------------------------------------

BIG = (
    (32, (224, 224), 3, (2, 2)),
    (1, (1 << 20,), 1, (4,)),
    (8, (64, 64, 64), 64, (2, 2, 2)),
    (1, (2048, 2048, 2), 512, (2, 2, 1)),
    (4096, (1,), 1, (7,)),
)


@pytest.mark.parametrize("plan", [plans.plan_upsample, plans.plan_upsample_grad])
@pytest.mark.parametrize("device", DEVICES)
def test_plans_on_every_device(device, plan):
    for batch, sizes, channels, factors in BIG:
        for reach in (0, 1, 2, 3, 5):
            for dtype in ("float32", "float64", "bfloat16"):
                stages = plan(batch, sizes, channels, factors, reach, ELEMENTS[dtype], (0, 0), DEVICES[device])
                for stage in stages:
                    check_plan(stage.plan, stage)
                assert stages[-1].elements == batch * channels * np.prod(sizes) * (
                    np.prod(factors) if plan is plans.plan_upsample else 1
                )


def check_plan(plan, stage):
    n0, n1, n2, _, _, s2, channels, run, segments, threads = plan.integers
    constants = dict(plan.constants)
    assert plan.grid[0] <= MAX_GRID_X and plan.grid[1:] == (1, 1) and 0 <= plan.grid[0] * plan.threads - threads < 128
    assert (segments - 1) * run < n0 <= segments * run
    assert plan.registers <= 160 and str(plan) and plan.reason
    assert constants["VECTOR"] * {"double": 8, "float": 4}.get(constants["TO"], 2) <= 16
    row = n2 * s2 * channels if plan.kernel == "upsample" else n2 * channels
    assert row % constants["VECTOR"] == 0
    assert channels % constants["VECTOR"] == 0 or constants["ROWWISE"]
    assert plan.cost.seconds > 0 and plan.cost.bytes >= 0.5 * plan.cost.least_bytes
    assert plan.cost.flops >= 0.4 * plan.cost.least_flops
    biggest = max(stage.elements, n0 * n1 * n2 * channels)
    assert plan.index_bytes == 8 or biggest < 2**31
    assert constants["INDEX"] == ("int" if plan.index_bytes == 4 else "long long")
    for taps, table in zip((constants[f"TAPS{a}"] for a in range(3)), stage.tables):
        assert (taps > 1) == (table is not None)


def test_indices_of_64_bits_where_32_do_not_suffice():
    def index(n):
        (stage,) = plans.plan_upsample(1, (n,), 1, (2,), 1, ELEMENTS["float16"], (0, 0), DEVICES["H200"])
        return stage.plan.index_bytes

    assert index(2**29) == 4 and index(2**30) == 8


def test_many_taps_are_cut_into_launches_and_few_are_not():
    def launches(plan, reach):
        return len(plan(1, (128,) * 3, 32, (2, 2, 2), reach, ELEMENTS["float32"], (0, 0), DEVICES["H200"]))

    assert launches(plans.plan_upsample, 1) == 1 and launches(plans.plan_upsample, 5) > 1
    assert launches(plans.plan_upsample_grad, 1) == 1 and launches(plans.plan_upsample_grad, 5) > 1
    stages = plans.plan_upsample(1, (128,) * 3, 32, (2, 2, 2), 5, ELEMENTS["float32"], (0, 0), DEVICES["H200"])
    assert any("predicted" in other for other in stages[0].plan.rejected)


def test_merged():
    assert plans.merged(2, (5, 6, 7), 3, (1, 2, 1)) == (10, ((6, 2),), 21)
    assert plans.merged(2, (5, 6, 7), 3, (2, 1, 3)) == (2, ((5, 2), (6, 1), (7, 3)), 3)


def beyond_4_gib():
    """On memory that is never touched but at its end: what the last block writes, and what it should."""
    shape = (1, 4, 2**14, 2**15 + 1)
    x = np.zeros(shape, np.float16)
    x[0, -1, -3:] = random((3, shape[-1]), "float16")
    y = np.zeros(large(shape, (1, 2), FIRST), np.float16)
    assert y.size > 2**32
    runtime = Runtime(mode="plain", blocks=lambda plan: [plan.grid[0] - 1])
    upsample(runtime, x, (1, 2), "nearest", FIRST, y)
    return y[0, -1, -1, -64:], np.repeat(x[0, -1, -1, -32:], 2)


def test_beyond_4_gib_the_last_block_writes_where_it_should():
    written, expected = beyond_4_gib()
    assert np.array_equal(written, expected)


def test_indices_of_32_bits_are_seen_beyond_4_gib(monkeypatch):
    monkeypatch.setattr(plans, "index_bytes", lambda *_: 4)
    plans.plan_upsample.cache_clear()
    try:
        with pytest.raises((emulator.EmulationError, struct.error)):
            beyond_4_gib()
    finally:
        plans.plan_upsample.cache_clear()


# --- Bugs that were planted, and what sees them ----------------------------------------------------------------------

END = "const Index end = middle + p.s0"
BUGS = (
    ("clip", "upsample.cu", "return i < 0 ? 0 : i < n ? i : n - 1;", "return i;", "bounds"),
    ("beyond the walk", "upsample.cu", f"{END} < out_end ? middle + p.s0 : out_end;", f"{END};", "race|bounds"),
    ("half of the factor", "upsample.cu", "p.s0 / 2 : 0;", "(p.s0 + 1) / 2 : 0;", "differ"),
    ("threads beyond the end", "upsample.cu", "if (id >= p.threads) return;", "", "race|bounds"),
    ("row of the table", "upsample.cuh", "middle < n - shortened ? middle : n - shortened", "n - shortened", "bounds"),
    (
        "vector of another position",
        "upsample.cu",
        "channel = v + column",
        "channel = v",
        "bounds",
    ),
    (
        "first share",
        "upsample_grad.cu",
        "first = TAPS > 1 ? (i - TAPS / 2) * s + s / 2",
        "first = TAPS > 1 ? (i - TAPS / 2) * s + (s + 1) / 2",
        "bounds|differ",
    ),
    ("weight of the first share", "upsample_grad.cu", "* count + (begin - first);", "* count;", "differ"),
    ("windows before the walk", "upsample_grad.cu", "i = i_begin - TAPS0 / 2;", "i = i_begin;", "differ|not finite"),
    ("rows beyond dy", "upsample_grad.cu", f"{END} < p.n0 * p.s0 ? middle + p.s0 : p.n0 * p.s0;", f"{END};", "bounds"),
    ("missing zeros", "upsample_grad.cu", ": Weight(0);", ": acc[t][e];", "differ"),
)


@pytest.mark.parametrize("file, right, wrong, seen", [bug[1:] for bug in BUGS], ids=[bug[0] for bug in BUGS])
def test_planted_bugs_are_seen(file, right, wrong, seen):
    with planted(file, right, wrong), pytest.raises((AssertionError, emulator.EmulationError), match=seen):
        run((1, 27, 4, 3), (3, 3), "bilinear")
