"""conv_narrow: its real PTX on the CPU against the oracle, its traffic, its machine code, its plans.

Cases are chosen around what differs: whether pairs of k are words at every position (PITCH, LEAD, FRONT, COPIES), how
wide x, w and y are accessed, where a tap ends within 16 values of k, and the edges of tiles.
"""

import dataclasses
import itertools
import math
from contextlib import contextmanager, suppress
from unittest import mock

import disassembly
import emulator
import numpy as np
import oracle
import pytest
from compare import assert_close, dtype_of
from disassembly import functions
from emulated import EmulatedRuntime
from planted import WRONG, planted, what_catches
from strategies import uniform

from cuconv import activations
from cuconv.cuda.arrays import alignment
from cuconv.cuda.runtime import kernel_directory
from cuconv.geometry import conv_shape
from cuconv.plan import narrow
from cuconv.plan.devices import DEVICES
from cuconv.plan.narrow import plan_narrow
from cuconv.plan.types import ACTIVATION_CODES, PlanError

emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

LIMITS = DEVICES["H200"]
ONE = dataclasses.replace(LIMITS, name="one multiprocessor", multiprocessors=1)  # its blocks walk over many tiles
ACTIVATIONS = list(ACTIVATION_CODES)
DTYPES = ("float16", "bfloat16", "float32")
ALIGNED = (0, 0, 0)


@contextmanager
def only(sizes, passes):
    """Plans find no other tile than this one."""
    names = {"_TENSOR": (sizes,), "_ORDINARY": (sizes,), "_PASSES": (passes,)}
    plan_narrow.cache_clear()
    try:
        with mock.patch.multiple(narrow, **names):
            yield
    finally:
        plan_narrow.cache_clear()


class Case:
    """A convolution with random arrays, and its output on a runtime."""

    def __init__(self, x_shape, w_shape, dtype="float16", seed=0, **options):
        self.dtype, self.options = dtype, options
        self.shape = conv_shape(x_shape, w_shape, **options)
        rng = np.random.default_rng(seed)
        self.x, self.w, self.bias = (uniform(rng, shape, dtype) for shape in (x_shape, w_shape, w_shape[-1:]))

    def run(self, runtime, activation="linear", bias=True, change=lambda plan: plan, out=None):
        y = runtime.empty(self.shape.y_shape, dtype_of(self.dtype)) if out is None else out
        aligned = alignment(runtime, self.x, self.w, y)
        plan = plan_narrow(self.shape, self.dtype, activation, aligned, runtime.limits)
        runtime.launch(change(plan), (self.x, self.w, self.bias if bias else None, y))
        return y

    def expected(self, activation="linear", bias=True):
        bias = self.bias if bias else None
        known = activation in oracle.ACTIVATIONS
        function = activation if known else activations.get(activation)
        return oracle.conv(self.x, self.w, bias, activation=function, **self.options)

    def check(self, runtime, activation="linear", bias=True, **how):
        expected = self.expected(activation, bias)
        actual = self.run(runtime, activation, bias, **how)
        try:
            assert_close(actual, expected, dtype=self.dtype, terms=math.prod(self.w.shape[:-1]), what="conv_narrow")
        except AssertionError as error:
            error.add_note(f"x {self.x.shape}, w {self.w.shape}, {self.options}; {runtime.launches[-1]}")
            raise
        return actual


def trace(seed=1, limits=LIMITS):
    return EmulatedRuntime(limits, mode="trace", seed=seed)


def constants_of(runtime):
    return dict(runtime.launches[-1].constants)


# --- Every kind of problem ---------------------------------------------------------------------------------------


def sizes_of(rank, length):
    return {1: (length,), 2: (3, length), 3: (2, 3, length)}[rank]


def taps_of(rank, taps):
    return {1: (taps,), 2: (3, taps), 3: (2, 2, taps)}[rank]


def problem(rank, dtype, channels, stride, padding, filters=40, length=71, taps=5, **options):
    """Two items; a length and taps that fit no tile."""
    if padding == "explicit":
        padding = ((1, 0), (2, 1), (3, 4))[-rank:]
    x, w = (2, *sizes_of(rank, length), channels), (*taps_of(rank, taps), channels, filters)
    return Case(x, w, dtype, strides=stride, padding=padding, **options)


QUICK = (
    # rank, dtype, channels, stride, padding, filters: each with something of its own.
    (1, "float16", 1, 5, "valid", 64),  # wav2vec2: an odd pitch
    (1, "bfloat16", 1, 2, "explicit", 40),  # an even pitch, runs that begin at odd elements
    (1, "bfloat16", 4, 1, "same", 96),  # Enformer, ChromBPNet
    (1, "float32", 9, 1, "valid", 100),  # HAR
    (1, "float16", 9, 1, "same", 100),
    (1, "float16", 13, 1, "causal", 7),  # y element by element
    (1, "float32", 13, 1, "same", 7),
    (1, "bfloat16", 16, 2, "same", 24),
    (2, "bfloat16", 3, 2, "explicit", 64),  # ResNet
    (2, "float16", 3, 1, "same", 33),
    (2, "float32", 2, 2, "same", 34),
    (2, "float16", 5, 1, "explicit", 20),
    (3, "float16", 1, 1, "same", 16),
    (3, "bfloat16", 2, (1, 2, 2), "explicit", 12),
    (3, "float32", 3, 1, "same", 65),
)


@emulated
@pytest.mark.parametrize("rank, dtype, channels, stride, padding, filters", QUICK)
def test_problem(rank, dtype, channels, stride, padding, filters):
    case = problem(rank, dtype, channels, stride, padding, filters)
    case.check(trace())
    case.check(trace(2, ONE), bias=False)


KINDS = {"16-bit": ("float16", "bfloat16"), "float": ("float32", "float32")}


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("channels", [1, 4, 9])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_problem(rank, kind, channels):
    """A third of strides and paddings, so that each meets all channels over the ranks, and all ranks over the channels.

    The 16-bit types in turn: nothing but the conversion of their elements differs. Of float half as many: it has no
    pairs of k, for which strides and paddings matter.
    """
    paddings = ("valid", "same", "explicit") + (("causal",) if rank == 1 else ())
    every = list(enumerate(itertools.product((1, 2, 5), paddings)))
    for number, (stride, padding) in every[(rank + channels // 4) % 3 :: 3 if kind == "16-bit" else 6]:
        dtype = KINDS[kind][number // 3 % 2]
        filters = (8, 33, 64, 100, 18)[(number + channels) % 5]
        activation = ACTIVATIONS[(7 * number + channels) % len(ACTIVATIONS)]
        case = problem(rank, dtype, channels, stride, padding, filters, length=37 + number)
        case.w = (case.w / 4).astype(case.w.dtype)  # exp of the sums is within float16
        try:
            case.check(trace(number + 1, (LIMITS, ONE)[number // 3 % 2]), activation)
        except (AssertionError, emulator.EmulationError) as error:
            error.add_note(f"{rank=} {dtype=} {channels=} {stride=} {padding=} {filters=} {activation=}")
            raise


TILES = {"float16": narrow._TENSOR, "bfloat16": narrow._TENSOR, "float32": narrow._ORDINARY}


def check_tile(dtype, sizes, passes):
    """The edges of a tile: a position less, as many, one more; filters that fill it, and a few of the next."""
    warps_m, warps_n, wm, wn, _ = sizes
    bm, bn = warps_m * wm * passes, warps_n * wn
    with only(sizes, passes):
        for seed, (length, filters) in enumerate(((bm - 1, bn + 8), (bm, bn), (2 * bm + 1, bn), (bm + 5, bn))):
            Case((2, length, 3), (4, 3, filters), dtype, padding="same").check(trace(seed + 1, ONE))


@emulated
@pytest.mark.parametrize("sizes", narrow._TENSOR[::4], ids=str)
def test_tile(sizes):
    check_tile("float16", sizes, 2)


@emulated
@pytest.mark.parametrize("sizes", narrow._ORDINARY[::5], ids=str)
def test_ordinary_tile(sizes):
    check_tile("float32", sizes, 2)


EVERY_TILE = [(dtype, sizes) for dtype in DTYPES[1:] for sizes in TILES[dtype]]


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(EVERY_TILE)), ids=lambda number: str(EVERY_TILE[number]))
def test_every_tile(number):
    """In one, two and four passes by turns: tiles that differ in their passes alone share all of their code."""
    check_tile(*EVERY_TILE[number], narrow._PASSES[number % 3])


@emulated
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_activation(activation):
    for dtype in ("bfloat16", "float32"):
        problem(1, dtype, 4, 1, "same").check(trace(), activation)
        problem(1, dtype, 4, 1, "same").check(trace(), activation, bias=False)


@emulated
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tiny(dtype):
    for x, w, options in (
        ((1, 1, 1), (1, 1, 1), {}),
        ((1, 1, 2), (3, 2, 3), {"padding": "same"}),
        ((3, 2, 1), (7, 1, 2), {"padding": "causal"}),
        ((1, 3, 1), (2, 1, 2), {"padding": (9, 8), "strides": 3}),  # outputs that read padding alone
        ((1, 1, 1, 1), (1, 1, 1, 5), {}),
        ((2, 1, 2, 1, 16), (1, 3, 1, 16, 1), {"padding": "same"}),
        ((1, 9, 2), (1, 2, 4), {"dilation_rate": 3}),  # one tap: a run whatever the dilation
    ):
        Case(x, w, dtype, **options).check(trace())


@emulated
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dilation_of_outer_axes(dtype):
    Case((2, 13, 21, 3), (3, 4, 3, 24), dtype, padding="same", dilation_rate=(4, 1)).check(trace())
    case = Case((1, 7, 9, 21, 2), (2, 3, 2, 2, 8), dtype, padding="same", dilation_rate=(3, 2, 1), strides=1)
    case.check(trace())


DILATED = {
    "line": ((2, 70, 4), (5, 4, 40), "bfloat16", {"padding": "same", "dilation_rate": 3}),
    "odd": ((2, 70, 3), (4, 3, 24), "float16", {"padding": "causal", "dilation_rate": 6}),
    "float": ((2, 70, 3), (4, 3, 24), "float32", {"padding": "same", "dilation_rate": 3}),
    "image": ((1, 9, 33, 2), (3, 3, 2, 16), "float16", {"padding": "same", "dilation_rate": (1, 2)}),
}
EVERY_DILATED = {
    "strided": ((2, 90, 5), (3, 5, 18), "bfloat16", {"padding": "same", "dilation_rate": 2, "strides": 3}),
    "one channel": ((2, 90, 1), (7, 1, 33), "float16", {"padding": (5, 4), "dilation_rate": 4}),
    "volume": ((1, 3, 4, 30, 6), (2, 1, 3, 6, 8), "bfloat16", {"padding": "same", "dilation_rate": (1, 1, 5)}),
    "float image": ((1, 9, 33, 5), (3, 3, 5, 20), "float32", {"padding": "same", "dilation_rate": (2, 3)}),
}


def check_dilated(x_shape, w_shape, dtype, options):
    case = Case(x_shape, w_shape, dtype, **options)
    runtime = trace()
    case.check(runtime)
    assert constants_of(runtime)["BESIDE"] == w_shape[-3]
    case.check(trace(2, ONE), bias=False)


@emulated
@pytest.mark.parametrize("name", DILATED)
def test_dilation_of_the_innermost_axis(name):
    check_dilated(*DILATED[name])


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", EVERY_DILATED)
def test_every_dilation_of_the_innermost_axis(name):
    check_dilated(*EVERY_DILATED[name])


@emulated
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_many_products(dtype):
    """More steps than are unrolled, and a row of x in more pieces than wait in registers."""
    Case((1, 150, 16), (40, 16, 24), dtype, padding="same").check(trace())
    Case((1, 12, 45, 7), (7, 7, 7, 24), dtype, padding="same").check(trace(2))


@emulated
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_arrays_that_begin_anywhere(dtype, offset):
    """Contiguous views that a 16-byte access could not start at; what lies around them is NaN."""

    def shifted(array):
        base = np.full(array.size + offset + 8, np.nan, array.dtype)
        view = base[offset : offset + array.size].reshape(array.shape)
        view[...] = array
        return view

    for channels, stride in ((4, 1), (3, 1), (3, 2)):
        case = Case((2, 40, channels), (6, channels, 32), dtype, padding="same", strides=stride)
        case.x, case.w, case.bias = shifted(case.x), shifted(case.w), shifted(case.bias)
        out = shifted(np.full(case.shape.y_shape, np.nan, dtype_of(dtype)))
        runtime = trace()
        case.check(runtime, out=out)
        assert constants_of(runtime)["VECY"] == math.gcd(offset, 16 // out.itemsize)
        base = out.base.copy()
        base[offset : offset + out.size] = np.nan
        assert np.isnan(base).all(), "elements outside of y were written"


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(
    "x_shape, w_shape, options",
    [
        ((1, 40, 1), (10, 1, 16), {"strides": 5}),
        ((1, 40, 3), (3, 3, 16), {"padding": "same", "dilation_rate": 2}),
        ((1, 40, 1), (4, 1, 16), {"strides": 2, "padding": (3, 0)}),
        ((1, 7, 18, 3), (3, 7, 3, 16), {"strides": 2, "padding": ((3, 3), (3, 3))}),
    ],
)
def test_a_poisoned_input_reaches_what_reads_it_and_nothing_else(dtype, poison, x_shape, w_shape, options):
    case = Case(x_shape, w_shape, dtype, **options)
    size = x_shape[1:-1]
    stride, padding = options.get("strides", 1), options.get("padding", "valid")
    _, reads = oracle.reads(size, w_shape[:-2], stride, padding, options.get("dilation_rate", 1))
    clean = case.check(trace())
    rng = np.random.default_rng(1)
    for place in rng.permutation(math.prod(size))[:6]:
        position = tuple(map(int, np.unravel_index(place, size)))
        channel = int(rng.integers(x_shape[-1]))
        kept = case.x[(0, *position, channel)]
        case.x[(0, *position, channel)] = poison
        y = case.run(EmulatedRuntime(LIMITS, seed=1))
        case.x[(0, *position, channel)] = kept
        reached = np.zeros(case.shape.out_size, bool)
        for p, _, i in reads:
            reached[p] |= i == position
        assert np.array_equal(np.isfinite(y[0]), np.broadcast_to(~reached[..., None], y[0].shape)), (position, channel)
        assert np.array_equal(y[0][~reached], clean[0][~reached])


@emulated
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_same_bits_in_any_order_of_threads(dtype):
    case = problem(2, dtype, 3, 1, "same")
    assert len({case.run(EmulatedRuntime(ONE, seed=seed)).tobytes() for seed in range(4)}) == 1


@emulated
@pytest.mark.parametrize("device", ["A100", "RTX 4090", "B200"])
def test_other_architectures(device):
    problem(1, "bfloat16", 3, 1, "same").check(trace(limits=DEVICES[device]))


@emulated
def test_indices_beyond_32_bits():
    """y has more than 2**31 elements; only the last block runs, on memory that exists where it is touched."""
    length = 2**26 + 77
    shape = conv_shape((1, length, 2), (3, 2, 32), padding="same")
    x, y = np.zeros(shape.x_shape, np.float16), np.zeros(shape.y_shape, np.float16)
    w = np.ones(shape.w_shape, np.float16)
    x[0, -40:] = 1
    plan = plan_narrow(shape, "float16", "linear", ALIGNED, LIMITS)
    assert plan.index_bytes == 8
    tiles = plan.integers[1]
    # A walker for each tile: the last block has the last tile, and no other.
    integers = (*plan.integers[:4], tiles, *plan.integers[5:])
    plan = dataclasses.replace(plan, integers=integers, grid=(tiles * plan.integers[3], 1, 1))
    EmulatedRuntime(LIMITS, blocks=lambda plan: [plan.grid[0] - 1]).launch(plan, (x, w, None, y))
    assert (y[0, -30:-1] == 6).all() and (y[0, -1] == 4).all()


# --- Plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x_shape, w_shape, dtype, options, reason",
    [
        ((2, 4, 50), (3, 4, 8), "float16", {"data_format": "channels_first"}, "channels last"),
        ((2, 50, 4), (3, 2, 8), "float16", {"groups": 2}, "2 groups"),
        ((2, 50, 17), (3, 17, 8), "float16", {}, "17 channels"),
        ((2, 50, 3), (3, 3, 8), "float16", {"dilation_rate": 3}, "9 elements apart"),
        ((2, 500, 8), (130, 8, 8), "float16", {}, "1040 products"),
        ((2, 50, 4), (3, 4, 8), "float64", {}, "float64"),
        ((0, 50, 4), (3, 4, 8), "float16", {}, "without elements"),
        ((2, 0, 4), (3, 4, 8), "float16", {"padding": (2, 2)}, "without elements"),
    ],
)
def test_what_it_does_not_compute(x_shape, w_shape, dtype, options, reason):
    with pytest.raises(PlanError, match=reason):
        plan_narrow(conv_shape(x_shape, w_shape, **options), dtype, "linear", ALIGNED, LIMITS)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_asynchronous_copies(dtype):
    with pytest.raises(PlanError, match="sm_75"):
        plan_narrow(conv_shape((2, 50, 4), (3, 4, 8)), dtype, "linear", ALIGNED, DEVICES["T4"])


# The layers this kernel is for, with the least percent of what memory allows that the model may predict on H200, A100
# and RTX 4090.
IMAGES = conv_shape((64, 224, 224, 3), (7, 7, 3, 64), strides=2, padding=((3, 3), (3, 3)))
STEMS = {
    "wav2vec2": (conv_shape((8, 256000, 1), (10, 1, 512), strides=5), "bfloat16", (90, 90, 90)),
    "Enformer": (conv_shape((2, 196608, 4), (15, 4, 768), padding="same"), "bfloat16", (90, 90, 90)),
    "ChromBPNet": (conv_shape((64, 2114, 4), (21, 4, 512)), "bfloat16", (80, 85, 90)),
    "ResNet": (IMAGES, "bfloat16", (60, 80, 90)),
    # 180 FLOP a stored float: the units for floats are what bounds it.
    "HAR": (conv_shape((256, 128, 9), (10, 9, 100)), "float32", (8, 8, 40)),
}


@pytest.mark.parametrize("device, column", [("H200", 0), ("A100", 1), ("RTX 4090", 2)])
@pytest.mark.parametrize("name", STEMS)
def test_predicted_share_of_the_memory(name, device, column):
    shape, dtype, least = STEMS[name]
    plan = plan_narrow(shape, dtype, "linear", ALIGNED, DEVICES[device])
    share = 100 * plan.cost.least_bytes / DEVICES[device].bandwidth / plan.cost.seconds
    assert least[column] <= share <= 100, plan
    assert plan.reason and len(plan.rejected) >= 2
    assert plan.cost.flops >= plan.cost.least_flops and plan.cost.bytes >= plan.cost.least_bytes


def test_plans_are_functions_of_integers():
    for shape, dtype, _ in STEMS.values():
        plan = plan_narrow(shape, dtype, "linear", ALIGNED, LIMITS)
        plan_narrow.cache_clear()
        assert plan == plan_narrow(shape, dtype, "linear", ALIGNED, LIMITS)


# --- Traffic -----------------------------------------------------------------------------------------------------


def traffic_of(case, limits=ONE):
    runtime = trace(0, limits)
    case.check(runtime)
    return runtime


@emulated
@pytest.mark.parametrize(
    "channels, stride, filters, dtype",
    [(1, 5, 128, "bfloat16"), (4, 1, 64, "float16"), (3, 2, 64, "bfloat16"), (9, 1, 32, "float32")],
)
def test_y_is_stored_once_in_whole_sectors(channels, stride, filters, dtype):
    case = Case((2, 200, channels), (7, channels, filters), dtype, strides=stride)
    runtime = traffic_of(case)
    stores = [each for each in runtime.traffic if each.space == "global" and each.instruction.startswith("st")]
    y = math.prod(case.shape.y_shape) * dtype_of(dtype).itemsize
    assert sum(each.bytes for each in stores) == y
    assert sum(each.sectors for each in stores) == sum(each.least_sectors for each in stores) == y // 32


def fragment_conflicts(case):
    """Wavefronts of a read of xs, on average over the launch."""
    runtime = traffic_of(case)
    lines = (kernel_directory() / "conv_narrow.cu").read_text().splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if "a[i][e] = *reinterpret_cast" in text)
    reads = [each for each in runtime.traffic if each.space == "shared" and each.line in (line, line + 1)]
    assert reads
    return sum(each.wavefronts for each in reads) / sum(each.requests for each in reads)


# Wavefronts of a read of fragments: 4 words at each of 8 positions that lie PITCH elements apart, by channels and
# stride. Where PITCH is odd and large, the rows of both copies meet in the banks; where 8 * PITCH is more than all of
# them hold, those of one.
CONFLICTS = {
    (1, 1): 1, (1, 2): 1, (1, 5): 2, (3, 1): 1, (3, 2): 1, (3, 5): 2, (4, 1): 1, (4, 2): 1, (4, 5): 2, (8, 1): 1,
    (9, 1): 2, (9, 2): 2, (9, 5): 2, (16, 1): 2, (16, 2): 4,
}  # fmt: skip


@emulated
@pytest.mark.parametrize("channels, stride", CONFLICTS)
def test_bank_conflicts_of_fragments(channels, stride):
    case = Case((1, 100 * stride + 8, channels), (8, channels, 32), "float16", strides=stride)
    assert fragment_conflicts(case) == CONFLICTS[channels, stride]


@emulated
@pytest.mark.parametrize("channels, stride", [(4, 1), (1, 5), (3, 2)])
def test_no_other_bank_conflicts(channels, stride):
    case = Case((1, 100 * stride + 8, channels), (8, channels, 64), "bfloat16", strides=stride)
    runtime = traffic_of(case)
    lines = (kernel_directory() / "conv_narrow.cu").read_text().splitlines()
    for each in runtime.traffic:
        if each.space == "shared" and each.bank_conflicts:
            assert "a[i][e]" in lines[each.line - 1] + lines[each.line - 2], (each, lines[each.line - 1])


# --- Machine code ------------------------------------------------------------------------------------------------


def function_of(plan, arch):
    path = kernel_directory() / "conv_narrow.cu"
    return functions(emulator.compile_cubin(path, arch, dict(plan.constants)))["conv_narrow"]


def has_no_stack(plan, arch):
    function = function_of(plan, arch)
    assert function.stack_bytes == 0 and function.spills == 0, f"{function.stack_bytes} bytes of stack, {arch}, {plan}"
    assert function.shared_bytes == 0
    assert function.registers * plan.threads <= 65536
    return function


@pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))
@pytest.mark.parametrize("device", ["A100", "H200"])
@pytest.mark.parametrize("name", STEMS)
def test_machine_code(name, device):
    limits = DEVICES[device]
    shape, dtype, _ = STEMS[name]
    plan = plan_narrow(shape, dtype, "linear", ALIGNED, limits)
    function = has_no_stack(plan, limits.arch)
    if disassembly.missing():
        pytest.skip(disassembly.missing())
    assert function.count("STG") == function.count("STG", "128") > 0, "stores of y must have 16 bytes"
    unit = "HMMA" if dtype != "float32" else "FFMA"
    loop = function.main_loop(unit)
    assert loop.count("LDS") and not loop.count("LDG") and not loop.count("BAR")
    if unit == "FFMA":
        assert loop.share("FFMA") > 0.6, loop.mix()
    else:
        constants = dict(plan.constants)
        steps = -(-constants["TAPS"] * constants["KE"] // 16)
        fragments = constants["WM"] // 16 * constants["WN"] // 8
        assert loop.count("HMMA") == steps * fragments, loop.mix()
        # A store of 16 sums must cost less than the memory takes for it: 48 cycles of a warp scheduler on H200.
        assert len(loop.instructions) <= 48 * fragments, loop.mix()
    if constants_copied(plan):
        assert function.count("LDGSTS")


def constants_copied(plan):
    constants = dict(plan.constants)
    return constants["COPIES"] == 1 and constants["VECX"] * (4 if constants["ELEMENT"] == "float" else 2) >= 4


@pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))
@pytest.mark.parametrize("activation", ["gelu", "silu", "mish"])
def test_activations_take_no_stack(activation):
    for name in ("wav2vec2", "ResNet", "HAR"):
        shape, dtype, _ = STEMS[name]
        has_no_stack(plan_narrow(shape, dtype, activation, ALIGNED, LIMITS), LIMITS.arch)


@pytest.mark.exhaustive
@pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))
@pytest.mark.parametrize("device", ["A100", "H200"])
@pytest.mark.parametrize("number", range(len(EVERY_TILE)), ids=lambda number: str(EVERY_TILE[number]))
def test_no_tile_takes_a_stack(number, device):
    """Every tile for the first layer of its dtype that has it, beginning with another one each time."""
    dtype, sizes = EVERY_TILE[number]
    shapes = [shape for shape, of, _ in STEMS.values() if of == dtype]
    for shape in shapes[number % len(shapes) :] + shapes[: number % len(shapes)]:
        with only(sizes, 1), suppress(PlanError):
            plan = plan_narrow(shape, dtype, "linear", ALIGNED, DEVICES[device])
            has_no_stack(plan, DEVICES[device].arch)
            return
    pytest.fail(f"{sizes} is a tile of no layer")


# --- Planted bugs ------------------------------------------------------------------------------------------------


def odd(runtime):
    Case((2, 300, 1), (10, 1, 64), strides=5).check(runtime)


def copied(runtime):
    Case((2, 300, 4), (6, 4, 64), padding="same").check(runtime)


def image(runtime):
    Case((1, 15, 40, 3), (7, 7, 3, 32), strides=2, padding=((3, 3), (3, 3))).check(runtime)


def ordinary(runtime):
    Case((2, 300, 3), (5, 3, 40), "float32", padding="same").check(runtime)


def dilated(runtime):
    Case((2, 300, 4), (3, 4, 32), padding="same", dilation_rate=5).check(runtime)


def poisoned_neighbour(runtime):
    case = Case((1, 40, 3), (3, 3, 16), padding="same")
    case.x[0, 20] = np.nan
    y = case.run(runtime)
    assert np.isnan(y[0]).any(axis=-1).sum() == 3
    case = Case((1, 40, 1), (4, 1, 16), strides=2, padding=(3, 0))  # runs that begin an element early
    case.x[0, 20] = np.nan
    y = case.run(runtime)
    assert np.isnan(y[0]).any(axis=-1).sum() == 2


# name, the text, what becomes of it, a run that must fail, what catches it.
PLANTS = [
    ("weights not padded with zeros", "(w + from, weight && f < filters)", "(w + from, f < filters)", copied, "bounds"),
    ("inputs behind a run not masked", "const unsigned low = within(k - FRONT, RUN) ? 0xffff : 0, high",
     "const unsigned low = 0xffff, high", poisoned_neighbour, WRONG),
    ("an input too many in a run", "high = within(k + 1 - FRONT, RUN)", "high = within(k - FRONT, RUN)",
     poisoned_neighbour, WRONG),
    ("span a vector short", "if (at < LINES * VECTORS)\n", "if (at < LINES * VECTORS - 1)\n", copied, "uninitialised"),
    ("span an element short", "for (int e = 0; e < VECX; ++e) to[e + 1]",
     "for (int e = 0; e < VECX - 1; ++e) to[e + 1]", odd, "uninitialised"),
    ("no barrier in the loop", "    ptx::copy_async_wait<0>();\n    __syncthreads();\n",
     "    ptx::copy_async_wait<0>();\n", copied, "race"),
    ("no barrier before the loop", "  ptx::copy_async_wait<0>();\n  __syncthreads();\n  Sums",
     "  ptx::copy_async_wait<0>();\n  Sums", copied, "race"),
    ("no wait for a copy", "    ptx::copy_async_wait<0>();\n    __syncthreads();\n", "    __syncthreads();\n", copied,
     "pending"),
    ("a wait that waits for too little", "    ptx::copy_async_wait<0>();\n    __syncthreads();\n",
     "    ptx::copy_async_wait<1>();\n    __syncthreads();\n", copied, "pending"),
    ("one buffer for both tiles", "E* ahead = xs + (stage ^ STAGE);", "E* ahead = xs + stage;", copied, "race"),
    ("padding not zeroed", "bool inside = at < LINES * VECTORS && within(corner[RANK - 1] + along, row);",
     "bool inside = at < LINES * VECTORS;", copied, "bounds"),
    ("padding of an outer axis not zeroed", "inside = inside && within(corner[a] + reach, p.in[a]);", "", image,
     "bounds"),
    ("wrong pitch of rows", "LEAD - FRONT + (m + lane / 4) * PITCH", "LEAD - FRONT + (m + lane / 4) * (PITCH - 2)",
     copied, WRONG),
    ("the wrong copy", "const int copy = COPIES == 2 ? lane / 4 % 2 : 0;", "const int copy = 0;", odd, "alignment"),
    ("a shift that is forgotten", "return COPIES == 2 ? (LEAD + copy) & 1 : 0;", "return 0;", odd, "alignment"),
    ("a run that begins too early", "const int tap = 2 * pair / KE, k = 2 * pair % KE - FRONT;",
     "const int tap = 2 * pair / KE, k = 2 * pair % KE;", image, WRONG),
    ("filters in the fragments' order", "return n + group * 4 * P + lane % 4 * P;",
     "return n + group * 4 * P + lane % 4 * 2;", copied, "alignment"),
    ("weights in the wrong bank", "const int turned = u ^ (q & 3);", "const int turned = u;", copied, None),
    ("a position too many", "if (row < left && n0", "if (row <= left && n0", copied, "race"),
    ("a filter too many", "n0 + f + v < p.filters) store", "n0 + f + v <= p.filters) store", ordinary, "bounds"),
    ("a tile without its carry", "at[a] += step.at[a] + carry;", "at[a] += step.at[a];", lambda runtime: Case(
        (1, 9, 300, 3), (3, 3, 3, 64)).check(runtime), "race"),
    ("the bias of another filter", "widen(p.bias[n0 + f])", "widen(p.bias[f])", lambda runtime: Case(
        (1, 40, 3), (3, 3, 300), padding="same").check(runtime), WRONG),
    ("taps not advanced", "own = run + place_of(tap);", "own = run;", lambda runtime: Case(
        (1, 9, 20, 3), (3, 3, 3, 32), "float32").check(runtime), WRONG),
    ("dilated taps side by side", "tap % BESIDE * REACH; }", "tap % BESIDE * CHANNELS; }", dilated, WRONG),
    ("a row without its last run", "(BM - 1) * PITCH + (BESIDE - 1) * REACH + KE", "(BM - 1) * PITCH + KE", dilated,
     "uninitialised"),
    ("weights not held", "      for (int step = 0; step < STEPS; ++step) fragments(held[step], ws, step);",
     "      for (int step = 0; step < STEPS; ++step) fragments(held[step], ws, 0);", copied, WRONG),
]  # fmt: skip


@emulated
@pytest.mark.parametrize("name, right, wrong, run, caught", PLANTS, ids=[plant[0] for plant in PLANTS])
def test_planted_bug_is_caught(name, right, wrong, run, caught):
    with planted("conv_narrow.cu", right, wrong):
        runtime = EmulatedRuntime(ONE, mode="trace", seed=1, timeout=5.0)
        found = what_catches(run, runtime)
    if caught is None:  # what only the counters show
        stores = [each for each in runtime.traffic if each.space == "shared" and each.instruction.startswith("st")]
        assert sum(each.bank_conflicts for each in stores), "conflicts expected"
    else:
        assert caught in found, found


@emulated
def test_without_a_bug_nothing_is_caught():
    for run in {plant[3] for plant in PLANTS}:
        assert what_catches(run, EmulatedRuntime(ONE, mode="trace", seed=1)) == set()
