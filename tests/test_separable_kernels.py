"""separable.cu: its real PTX on the CPU against the oracle and against the two kernels it replaces, its traffic, its
machine code, its plans.

Cases are chosen around what differs: how many channels an access has, how outputs are grouped along the innermost axis
(stride, dilation, ends of rows), the multiplier, and the edges of tiles in positions, filters and middle channels.
"""

import math
from contextlib import contextmanager
from unittest import mock

import disassembly
import emulator
import numpy as np
import oracle
import pytest
from compare import assert_close, eps, poisoned
from emulated import EmulatedRuntime
from planted import WRONG, planted, what_catches
from strategies import uniform

from cuconv import activations, ops
from cuconv.cuda.arrays import alignment
from cuconv.cuda.runtime import kernel_directory
from cuconv.cuda.separable import separable_conv
from cuconv.geometry import conv_shape, depthwise_shape, join_shape
from cuconv.plan import separable
from cuconv.plan.conv import plan_conv
from cuconv.plan.depthwise import plan_depthwise
from cuconv.plan.devices import DEVICES
from cuconv.plan.separable import TILES, plan_fused, plan_separable
from cuconv.plan.types import PlanError

emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

LIMITS = DEVICES["H200"]
ALIGNED = (0, 0, 0, 0)
SMALL = (32, 64, 16, 32, 128)  # the least work for the emulator


@contextmanager
def only(tile=SMALL, shares=separable.SHARES, staged=separable.STAGED):
    """Plans find no other tile than this one, and no other shares of threads."""
    names = {"TILES": (tile,), "SHARES": shares, "STAGED": staged}
    plan_separable.cache_clear()
    try:
        with mock.patch.multiple(separable, **names):
            yield
    finally:
        plan_separable.cache_clear()


class Case:
    """A separable convolution with random arrays, and its output on a runtime."""

    def __init__(self, x_shape, w_shape, filters, dtype="float16", seed=0, **options):
        self.dtype, self.options, self.filters = dtype, options, filters
        self.shape = depthwise_shape(x_shape, w_shape, **options)
        self.y_shape = join_shape(self.shape.batch, self.shape.out_size, filters, self.shape.data_format)
        shapes = x_shape, w_shape, (*(1,) * self.shape.rank, self.shape.filters, filters), (filters,)
        rng = np.random.default_rng(seed)
        self.x, self.taps, self.w, self.bias = (uniform(rng, shape, dtype) for shape in shapes)

    def run(self, runtime, activation="linear", bias=True, out=None):
        y = poisoned(self.y_shape, self.dtype) if out is None else out
        aligned = alignment(runtime, self.x, self.taps, self.w, y)
        plan = plan_fused(self.shape, self.filters, self.dtype, activation, aligned, runtime.limits)
        runtime.launch(plan, (self.x, self.taps, self.w, self.bias if bias else None, y))
        return y

    def check(self, runtime, activation="linear", bias=True, **how):
        function = activation if activation in oracle.ACTIVATIONS else activations.get(activation)
        arrays = self.x, self.taps, self.w
        expected = oracle.separable_conv(*arrays, self.bias if bias else None, activation=function, **self.options)
        # What lies between the convolutions is rounded.
        slack = eps(self.dtype) / 2 * oracle.separable_conv(*map(np.abs, arrays), **self.options)
        actual = self.run(runtime, activation, bias, **how)
        try:
            assert_close(actual, expected, dtype=self.dtype, terms=self.taps.size, slack=slack, what="separable")
        except AssertionError as error:
            error.add_note(f"x {self.x.shape}, taps {self.taps.shape}, {self.options}; {runtime.launches[-1]}")
            raise
        return actual


def trace(seed=1, limits=LIMITS):
    return EmulatedRuntime(limits, mode="trace", seed=seed)


def constants_of(runtime):
    return dict(runtime.launches[-1].constants)


# --- Every kind of problem ---------------------------------------------------------------------------------------

# x, taps, filters, options: each with something of its own.
PROBLEMS = (
    ((2, 41, 72), (3, 72, 1), 40, {"padding": "causal"}),  # two steps, the second with one vector
    ((1, 50, 8), (4, 8, 2), 72, {"strides": 2, "padding": "same"}),  # two tiles of filters
    ((2, 37, 3), (3, 3, 1), 5, {"dilation_rate": 3, "padding": "causal"}),  # element by element, in phase order
    ((2, 9, 13, 8), (3, 3, 8, 1), 16, {"padding": "same"}),
    ((1, 30, 8), (13, 8, 1), 8, {"padding": "same"}),  # windows in registers
    ((1, 44, 6), (3, 6, 3), 9, {"dilation_rate": 4, "strides": 2}),  # phases and a step; a multiplier of 3
    ((2, 29, 4), (1, 4, 8), 8, {"strides": 3}),  # one tap; channels of z that share one of x
    ((1, 11, 9, 10), (3, 2, 10, 1), 16, {"padding": ((1, 0), (2, 1)), "strides": (2, 1), "dilation_rate": (1, 2)}),
    ((2, 4, 5, 6, 4), (2, 3, 2, 4, 2), 8, {"padding": "same", "strides": (1, 2, 1)}),
    ((2, 3, 6, 5, 8), (2, 2, 2, 8, 1), 8, {"padding": "same"}),
    ((1, 10, 30, 8), (2, 13, 8, 1), 8, {"padding": "same", "dilation_rate": (3, 2)}),  # windows in registers
    ((1, 60, 8), (13, 8, 1), 8, {"strides": 2}),  # taps several times, and what is left over
    ((1, 12, 8), (3, 8, 1), 8, {"dilation_rate": 20, "padding": "same"}),  # more phases than outputs
)


def check_problem(x, taps, filters, options, dtype, staged):
    with only(staged=(staged, False)):
        runtime = trace()
        Case(x, taps, filters, dtype, **options).check(runtime)
    return constants_of(runtime)


@emulated
@pytest.mark.parametrize("x, taps, filters, options", PROBLEMS[:5])
def test_problem(x, taps, filters, options):
    constants = check_problem(x, taps, filters, options, "float16", True)
    assert constants["STAGED"] == (len(x) == 4 or x[-1] == 72 or taps[0] == 13)
    assert constants["ROLLING"] == (taps[0] == 13)


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(PROBLEMS)))
def test_every_problem(number):
    check_problem(*PROBLEMS[number], "bfloat16", staged=number in (9, 10))


def check_tile(tile, staged, dtype="float16"):
    """A position less than a tile has, as many, one more; filters that fill it, and a few of the next; two steps."""
    bm, bn = tile[:2]
    channels = tile[4] // 2 + 8
    with only(tile, staged=(staged,)):
        for seed, (length, filters) in enumerate(((bm // 2 - 1, bn + 8), (bm // 2, bn), (bm + 3, bn))):
            Case((2, length, channels), (3, channels, 1), filters, dtype, padding="same").check(trace(seed + 1))


@emulated
def test_tile():
    check_tile((64, 64, 32, 32, 128), True)


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(TILES)), ids=lambda number: str(TILES[number]))
def test_every_tile(number):
    tile = TILES[number]
    check_tile(tile, number % 2 == 0 and tile[4] == 128, ("float16", "bfloat16")[number % 2])


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("share", separable.SHARES, ids=str)
def test_every_share(share):
    with only((64, 64, 32, 32, 128), shares=(share,)):
        Case((2, 43, 16), (5, 16, 1), 24, padding="same").check(trace())
        Case((2, 43, 16), (5, 16, 1), 24, padding="causal").check(trace(2))


@emulated
@pytest.mark.exhaustive
def test_activation():
    with only():
        case = Case((1, 30, 8), (3, 8, 1), 16, "bfloat16", padding="same")
        case.check(trace(), "gelu")
        case.check(trace(), "gelu", bias=False)


@emulated
@pytest.mark.exhaustive
def test_tiny():
    with only():
        for x, taps, filters, options in (
            ((1, 1, 1), (1, 1, 1), 1, {}),
            ((3, 2, 1), (7, 1, 1), 2, {"padding": "causal"}),
            ((1, 3, 2), (2, 2, 1), 3, {"padding": (9, 8), "strides": 3}),  # outputs that read padding alone
            ((1, 1, 1, 1), (2, 2, 1, 3), 1, {"padding": "same"}),
        ):
            Case(x, taps, filters, **options).check(trace())


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("offset", [1, 2])
def test_arrays_that_begin_anywhere(offset):
    """Contiguous views that a 16-byte access could not start at; what lies around them is NaN."""

    def shifted(array):
        base = np.full(array.size + offset + 8, np.nan, array.dtype)
        view = base[offset : offset + array.size].reshape(array.shape)
        view[...] = array
        return view

    case = Case((2, 40, 8), (3, 8, 1), 24, padding="same")
    case.x, case.taps, case.w, case.bias = (shifted(each) for each in (case.x, case.taps, case.w, case.bias))
    out = shifted(np.full(case.y_shape, np.nan, np.float16))
    runtime = trace()
    with only():
        case.check(runtime, out=out)
    assert constants_of(runtime)["VECY"] == constants_of(runtime)["VECW"] == offset
    base = out.base.copy()
    base[offset : offset + out.size] = np.nan
    assert np.isnan(base).all(), "elements outside of y were written"


def check_poison(x_shape, taps, options, staged, poison=np.nan):
    """What an input reaches is what reads it: of an item, of all filters, and nothing else."""
    case = Case(x_shape, taps, 16, **options)
    size = x_shape[1:-1]
    _, reads = oracle.reads(size, taps[:-2], options.get("strides", 1), options.get("padding", "valid"), 1)
    with only(staged=(staged, False)):
        clean = case.check(trace())
        for place in np.random.default_rng(1).permutation(math.prod(size))[:6]:
            position = tuple(map(int, np.unravel_index(place, size)))
            kept = case.x[(1, *position, 3)]
            case.x[(1, *position, 3)] = poison
            y = case.run(EmulatedRuntime(LIMITS, seed=1))
            case.x[(1, *position, 3)] = kept
            reached = np.zeros(case.shape.out_size, bool)
            for p, _, i in reads:
                reached[p] |= i == position
            assert np.array_equal(y[0], clean[0])
            assert np.array_equal(np.isfinite(y[1]), np.broadcast_to(~reached[..., None], y[1].shape)), position
            assert np.array_equal(y[1][~reached], clean[1][~reached])


@emulated
@pytest.mark.parametrize("staged", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_a_poisoned_input_reaches_what_reads_it_and_nothing_else(staged):
    check_poison((2, 5, 7, 8), (3, 3, 8, 1), {"padding": "same"}, staged)


@emulated
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.exhaustive)])
def test_the_same_bits_as_two_launches(dtype):
    """The sums of both parts are taken in the same order, and what lies between is rounded in the same way."""
    case = Case((2, 45, 40), (3, 40, 1), 32, dtype, padding="same")
    runtime = EmulatedRuntime(LIMITS, seed=1)
    y = poisoned(case.y_shape, dtype)
    with only(), mock.patch.object(separable, "plan_fused", side_effect=PlanError("two launches")):
        separable_conv(runtime, case.shape, case.x, case.taps, case.w, case.bias, None, y, 1 << 20)
    depthwise, mixing = runtime.launches
    assert mixing.kernel == "conv_mma" and depthwise.rejected[-1] == "two launches"
    with only():
        assert case.run(runtime).tobytes() == y.tobytes()
        assert len({case.run(EmulatedRuntime(LIMITS, seed=seed)).tobytes() for seed in range(4)}) == 1


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("device", ["A100", "RTX 4090", "B200"])
def test_other_architectures(device):
    with only():
        Case((2, 41, 72), (3, 72, 1), 40, padding="causal").check(trace(limits=DEVICES[device]))


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("staged", [False, True])
def test_indices_beyond_32_bits(staged):
    """x and y have more than 2**31 elements; only the last block runs, on memory that exists where it is touched."""
    length, channels = 2**28 + 77, 8
    shape = depthwise_shape((1, length, channels), (3, channels, 1), padding="same")
    x, y = np.zeros(shape.x_shape, np.float16), np.zeros(shape.y_shape, np.float16)
    x[0, -40:] = 1
    taps, w = np.ones((3, channels, 1), np.float16), np.ones((1, channels, channels), np.float16)
    with only(staged=(staged,)):
        plan = plan_fused(shape, channels, "float16", "linear", ALIGNED, LIMITS)
    assert plan.index_bytes == 8
    EmulatedRuntime(LIMITS, blocks=lambda plan: [plan.grid[0] - 1]).launch(plan, (x, taps, w, None, y))
    assert (y[0, -10:-1] == 24).all() and (y[0, -1] == 16).all()


# --- Launches ----------------------------------------------------------------------------------------------------


@emulated
def test_one_launch_where_it_is_faster():
    """Through the engine's function, into a view that is not in one piece."""
    case = Case((2, 41, 72), (3, 72, 1), 40, padding="causal")
    out = np.full((2, 41, 80), np.nan, np.float16)[..., ::2]
    runtime = trace()
    with only():
        separable_conv(runtime, case.shape, case.x, case.taps, case.w, case.bias, None, out, 1)
        assert np.array_equal(out, case.run(trace()))
    assert runtime.launches[0].kernel == "separable" and "two launches" in runtime.launches[0].rejected[-1]


@emulated
@pytest.mark.exhaustive
def test_empty_arrays():
    """Outputs that read padding alone, from an array of no positions, are the bias; no items need no launch."""
    case = Case((2, 0, 8), (3, 8, 1), 16, padding=((3, 0),))
    y = poisoned(case.y_shape, "float16")
    runtime = trace()
    separable_conv(runtime, case.shape, case.x, case.taps, case.w, case.bias, None, y, 1 << 20)
    assert len(runtime.launches) == 2 and np.array_equal(y, np.broadcast_to(case.bias, y.shape))
    case = Case((0, 9, 8), (3, 8, 1), 16)
    runtime = trace()
    y = poisoned(case.y_shape, "float16")
    separable_conv(runtime, case.shape, case.x, case.taps, case.w, case.bias, None, y, 1 << 20)
    assert not runtime.launches


@pytest.mark.parametrize(
    "dtype, device, options, reason",
    [
        ("float32", "H200", {}, "only 16-bit elements"),
        ("bfloat16", "H200", {"data_format": "channels_first"}, "only channels last"),
        ("float16", "T4", {}, "sm_80"),
        ("bfloat16", "H200", {"padding": (3, 0)}, "without elements"),
    ],
)
def test_what_it_does_not_compute(dtype, device, options, reason):
    """The first of the two launches says why there is not one."""
    x = (2, 0, 8) if "padding" in options else (2, 8, 40) if options else (2, 40, 8)
    shape = depthwise_shape(x, (3, 8, 1), **options)
    plan = plan_separable(shape, 16, dtype, "linear", ALIGNED, DEVICES[device])
    assert plan.fused is None and reason in plan.depthwise.rejected[-1]
    with pytest.raises(PlanError, match=reason):
        plan_fused(shape, 16, dtype, "linear", ALIGNED, DEVICES[device])


# --- Plans -------------------------------------------------------------------------------------------------------

# The suite's rows, and the least percent of the roof that is predicted on H200, A100 and RTX 4090.
ROWS = {
    "SepConv1D": (depthwise_shape((32, 4096, 256), (5, 256, 1), padding="same"), 256, (70, 75, 95)),
    "QuartzNet": (depthwise_shape((32, 800, 256), (33, 256, 1), padding="same"), 256, (23, 34, 65)),
    "Xception": (depthwise_shape((64, 19, 19, 728), (3, 3, 728, 1), padding="same"), 728, (32, 58, 60)),
    "MobileNetV1": (depthwise_shape((128, 14, 14, 512), (3, 3, 512, 1), padding="same"), 512, (33, 57, 62)),
}


@pytest.mark.parametrize("device, column", [("H200", 0), ("A100", 1), ("RTX 4090", 2)])
@pytest.mark.parametrize("name", ROWS)
def test_predicted_share_of_the_roof(name, device, column):
    shape, filters, least = ROWS[name]
    limits = DEVICES[device]
    plan = plan_fused(shape, filters, "bfloat16", "relu", ALIGNED, limits)
    roof = max(plan.cost.least_flops / limits.fp16_rate, plan.cost.least_bytes / limits.bandwidth)
    assert least[column] <= 100 * roof / plan.cost.seconds <= 100, plan
    assert plan.cost.flops >= plan.cost.least_flops and plan.cost.bytes >= plan.cost.least_bytes
    assert "bound by" in plan.reason and len(plan.rejected) >= 2


@pytest.mark.parametrize("device", ["H200", "A100", "RTX 4090"])
@pytest.mark.parametrize("name", ROWS)
def test_the_faster_is_chosen(name, device):
    shape, filters, _ = ROWS[name]
    limits = DEVICES[device]
    mixing = conv_shape((shape.batch, *shape.out_size, shape.filters), (*(1,) * shape.rank, shape.filters, filters))
    plans = (
        plan_depthwise(shape, "bfloat16", "linear", (0, 0, 0), limits),
        plan_conv(mixing, "bfloat16", "relu", (0, 0, 0), limits),
    )
    pair = sum(plan.cost.seconds for plan in plans)
    fused = plan_fused(shape, filters, "bfloat16", "relu", ALIGNED, limits).cost.seconds
    plan = plan_separable(shape, filters, "bfloat16", "relu", ALIGNED, limits)
    assert (plan.fused is not None) == (fused < pair)
    if plan.fused is None:
        assert f"{fused * 1e6:.1f} us predicted" in plan.depthwise.rejected[-1]
    else:
        assert plan.fused.rejected[-1] == f"two launches: {pair * 1e6:.1f} us predicted"


def test_two_launches_where_those_are_faster():
    """Very many filters, for every tile of which the sums of many taps would be taken again."""
    shape = depthwise_shape((32, 800, 256), (63, 256, 1), padding="same")
    plan = plan_separable(shape, 2048, "bfloat16", "linear", ALIGNED, LIMITS)
    assert plan.fused is None and "depthwise sums" in plan.depthwise.rejected[-1]


def test_plans_are_functions_of_integers():
    for shape, filters, _ in ROWS.values():
        plan = plan_separable(shape, filters, "bfloat16", "linear", ALIGNED, LIMITS)
        plan_separable.cache_clear()
        assert plan == plan_separable(shape, filters, "bfloat16", "linear", ALIGNED, LIMITS)


def test_a_call_is_explained():
    shapes = (8, 4096, 256), (5, 256, 1), (1, 256, 256)
    found = ops.explain("separable_conv", *shapes, dtype="bfloat16", device="RTX 4090")
    (step,) = found.steps
    assert step.kernel == "separable" and step.tile and "two launches" in str(found)
    found = ops.explain("separable_conv", *shapes, dtype="float32", device="RTX 4090")
    assert len(found.steps) == 2 and "only 16-bit elements" in str(found)


def test_staged_positions():
    """All inputs that a tile reads, by the definition, are within `rows` of its first."""
    for x, taps, options in (
        ((2, 50, 8), (5, 8, 1), {"padding": "same"}),
        ((3, 21, 8), (3, 8, 1), {"strides": 3}),
        ((2, 9, 13, 8), (3, 3, 8, 1), {"padding": "same", "strides": 2}),
        ((2, 4, 9, 11, 8), (3, 2, 3, 8, 1), {"strides": (1, 2, 1), "dilation_rate": (1, 1, 2)}),
        ((2, 6, 8), (3, 8, 1), {"padding": (7, 9)}),
    ):
        shape = depthwise_shape(x, taps, **options)
        problem = separable._Problem(shape, 8, separable.ELEMENTS["float16"], "linear", ALIGNED, LIMITS)
        most, first = 0, []
        for outputs, groups in ((4, 8), (2, 4), (1, 16)):
            row_groups = -(-shape.out_size[-1] // outputs)
            rows = problem.rows(outputs, groups, row_groups)
            assert (rows == 0) == (options.get("padding") == (7, 9))
            if not rows:
                continue
            steps = [s * math.prod(shape.in_size[a + 1 :]) for a, s in enumerate(shape.strides)]
            first = [
                b * math.prod(shape.in_size) + sum(q * s for q, s in zip((*outer, group * outputs), steps, strict=True))
                for b, *outer, group in np.ndindex(shape.batch, *shape.out_size[:-1], row_groups)
            ]
            within = [first[min(at + groups, len(first)) - 1] - first[at] for at in range(len(first))]
            most = max(within) + (outputs - 1) * steps[-1] + problem.reach + 1
            assert most <= rows <= 4 * most, (x, outputs, groups)


# --- Traffic -----------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("staged", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_traffic(staged):
    """Whole sectors, y once, x once where it is staged, and no bank conflict at all."""
    case = Case((1, 128, 128), (3, 128, 1), 64, padding="same")
    runtime = trace(0)
    with only((64, 64, 32, 32, 128), staged=(staged,)):
        case.check(runtime)
    assert not [each for each in runtime.traffic if each.space == "shared" and each.bank_conflicts]
    stores = [each for each in runtime.traffic if each.space == "global" and each.instruction.startswith("st")]
    y = math.prod(case.y_shape) * 2
    assert sum(each.bytes for each in stores) == y
    assert sum(each.sectors for each in stores) == sum(each.least_sectors for each in stores) == y // 32
    copies = [each for each in runtime.traffic if each.space == "global" and each.instruction.startswith("cp.async")]
    assert all(each.sectors == each.least_sectors for each in copies)
    if staged:  # by two blocks, each of which reads a neighbour's input too
        assert sum(each.bytes for each in copies) == case.x.nbytes + 2 * (128 * 2 + case.w.nbytes)


# --- Machine code ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))
@pytest.mark.parametrize(
    "device, name",
    [
        ("A100", "Xception"),
        ("H200", "SepConv1D"),
        *(
            pytest.param(device, name, marks=pytest.mark.exhaustive)
            for number, device in enumerate(("A100", "RTX 3090", "RTX 4090", "H200", "B200", "RTX 5090"))
            for name in ("QuartzNet", ("SepConv1D", "Xception", "MobileNetV1")[number % 3])
        ),
    ],
)
def test_machine_code(device, name):
    shape, filters, _ = ROWS[name]
    limits = DEVICES[device]
    plan = plan_fused(shape, filters, "bfloat16", "linear", ALIGNED, limits)
    cubin = emulator.compile_cubin(kernel_directory() / "separable.cu", limits.arch, dict(plan.constants))
    function = disassembly.functions(cubin)["separable"]
    assert function.stack_bytes == 0 and function.spills == 0 and function.shared_bytes == 0, plan
    assert function.registers * plan.threads <= 65536
    if disassembly.missing():
        pytest.skip(disassembly.missing())
    assert function.count("STG") == function.count("STG", "128") > 0, "stores of y must have 16 bytes"
    assert function.count("LDGSTS") == function.count("LDGSTS", "128") > 0
    c = dict(plan.constants)
    loop = function.main_loop("HMMA")
    assert loop.count("HMMA") == c["WM"] // 16 * c["WN"] // 8 * c["BK"] // 16, loop.mix()
    assert loop.count("LDSM") == (c["WM"] // 16 + c["WN"] // 16) * c["BK"] // 16, loop.mix()
    # Sums of z, with and without padding, taps and what is left over; calls hide a loop's end from the disassembly.
    assert function.count("FFMA") == 2 * c["TP"] * c["VEC"] * (c["KC"] + c["KT"])
    sums = function.main_loop("FFMA")
    assert function.count("CALL") or sums.share("FFMA") > (0.6 if device == "H200" and c["ROLLING"] else 0.35), (
        sums.mix()
    )


# --- Planted bugs ------------------------------------------------------------------------------------------------

PLANTED = {"shares": ((2, 4),)}  # what compiles fastest


def sequence(runtime):
    with only(staged=(True,), **PLANTED):
        Case((2, 41, 72), (3, 72, 1), 40, padding="causal").check(runtime)


def direct(runtime):
    with only(staged=(False,), **PLANTED):
        Case((2, 41, 72), (3, 72, 1), 40, padding="causal").check(runtime)


def image(runtime):
    with only(staged=(True,), **PLANTED):
        Case((2, 5, 9, 8), (3, 3, 8, 1), 16, padding="same").check(runtime)


def dilated(runtime):
    with only(staged=(False,), **PLANTED):
        Case((1, 44, 8), (3, 8, 1), 8, dilation_rate=4).check(runtime)


def many(runtime):
    with only(staged=(False,), **PLANTED):
        Case((1, 30, 8), (13, 8, 1), 8, padding="same").check(runtime)


def multiplied(runtime):
    with only(**PLANTED):
        Case((1, 30, 8), (3, 8, 2), 72, padding="same").check(runtime)


def rounded(runtime):
    """Against two launches, bit by bit."""
    case = Case((1, 40, 8), (3, 8, 1), 32, "bfloat16", padding="same")
    y = poisoned(case.y_shape, "bfloat16")
    with only(**PLANTED):
        actual = case.run(runtime)
        with mock.patch.object(separable, "plan_fused", side_effect=PlanError("two launches")):
            separable_conv(runtime, case.shape, case.x, case.taps, case.w, case.bias, None, y, 1 << 20)
    assert actual.tobytes() == y.tobytes()


# name, the text, what becomes of it, a run that must fail, what catches it.
PLANTS = [
    (
        "no barrier in the loop",
        "    ptx::copy_async_wait<0>();\n    __syncthreads();\n",
        "    ptx::copy_async_wait<0>();\n",
        sequence,
        "race",
    ),
    (
        "no wait for a copy",
        "    ptx::copy_async_wait<0>();\n    __syncthreads();\n",
        "    __syncthreads();\n",
        sequence,
        "pending",
    ),
    (
        "no barrier behind the places",
        "place_of(group0 + g, p);\n  __syncthreads();",
        "place_of(group0 + g, p);",
        sequence,
        "race",
    ),
    ("z over what is multiplied", "fill(memory + ahead,", "fill(memory + (STAGE_BYTES - ahead),", sequence, "race"),
    ("inputs over what is summed", "fetch_x(xs + (x_stage - x_at),", "fetch_x(xs + x_at,", sequence, "race"),
    ("w over what is multiplied", "fetch_w(ahead, k);", "fetch_w(STAGE_BYTES - ahead, k);", sequence, "race"),
    (
        "padding not zeroed",
        "widen_vector(x, input<WHOLE>(from, within(at, p.in[RANK - 1])));",
        "widen_vector(x, input<WHOLE>(from, true));",
        direct,
        "bounds",
    ),
    (
        "padding of an outer axis not zeroed",
        "inside = inside && within(place.at[a] + reach[a], p.in[a]);",
        ";",
        image,
        WRONG,
    ),
    (
        "taps in reverse",
        "widen_vector(w[r], load<VEC>(taps + r * p.middle));",
        "widen_vector(w[r], load<VEC>(taps + (N - 1 - r) * p.middle));",
        sequence,
        WRONG,
    ),
    ("the window of the first tap", "window[(r + j) % TP], w);", "window[j], w);", many, WRONG),
    (
        "a window without padding",
        "widen_vector(window[j], input<false>(from, within(at, p.in[RANK - 1])));",
        "widen_vector(window[j], input<true>(from, true));",
        many,
        "bounds",
    ),
    ("taps of the first row", "        taps += (p.chunks * KC + KT) * p.middle;\n", "", image, WRONG),
    ("channels behind the last", "    if (k < p.middle) {\n", "    {\n", sequence, "bounds"),
    (
        "rows of w behind the last",
        "const bool inside = i * W_STEP < left;",
        "const bool inside = true;",
        sequence,
        "bounds",
    ),
    (
        "columns of w behind the last",
        "n0 + w_column < p.filters ? p.middle - (k + w_row) : 0;",
        "p.middle - (k + w_row);",
        sequence,
        "bounds",
    ),
    (
        "positions of x behind the last",
        "within(at, p.inputs) && channel < p.channels",
        "channel < p.channels",
        sequence,
        "bounds",
    ),
    (
        "channels of x behind the last",
        "within(at, p.inputs) && channel < p.channels",
        "within(at, p.inputs)",
        sequence,
        "bounds",
    ),
    ("a position too few", "row < p.rows; row +=", "row < p.rows - 1; row +=", sequence, "uninitialised"),
    ("the last step left out", "    if (!more) break;\n", "    if (k + BK >= p.middle) break;\n", sequence, WRONG),
    (
        "the channels of the first step",
        "fill(memory + ahead, xs + x_at, places, k, p);",
        "fill(memory + ahead, xs + x_at, places, 0, p);",
        sequence,
        WRONG,
    ),
    ("not in phase order", "phase + q * TP * p.phases", "phase + q * TP", dilated, "race"),
    (
        "outputs of a phase side by side",
        "place.to + j * p.phases * p.filters",
        "place.to + j * p.filters",
        dilated,
        "race",
    ),
    ("the multiplier forgotten", "k / MULTIPLIER", "k", multiplied, "bounds"),
    (
        "rounded towards zero",
        "z.at[v] = narrow<E>(acc[j][v]);",
        "z.at[v] = E{(unsigned short)(__float_as_uint(acc[j][v]) >> 16)};",
        rounded,
        WRONG,
    ),
    ("outputs in the order of groups", "swizzle<X_ROW>(j * GROUPS + g,", "swizzle<X_ROW>(g * TP + j,", sequence, WRONG),
    (
        "outputs behind the end of a row",
        "if (j < place.outputs && f < p.filters)",
        "if (f < p.filters)",
        sequence,
        "race",
    ),
    ("filters behind the last", "if (j < place.outputs && f < p.filters)", "if (j < place.outputs)", sequence, "race"),
    ("the bias of another filter", "widen(p.bias[f])", "widen(p.bias[f - n0])", multiplied, WRONG),
    ("y over what is still read", "vectors of y.\n  __syncthreads();\n", "vectors of y.\n", image, "race"),
    (
        "y before it is there",
        "  __syncthreads();\n  for (int at = thread * VECY",
        "  for (int at = thread * VECY",
        sequence,
        "race",
    ),
]


@emulated
@pytest.mark.parametrize(
    "name, right, wrong, run, caught",
    [
        pytest.param(*plant, id=plant[0], marks=[pytest.mark.exhaustive] * (number > 1))
        for number, plant in enumerate(PLANTS)
    ],
)
def test_planted_bug_is_caught(name, right, wrong, run, caught):
    with planted("separable.cu", right, wrong):
        found = what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1, timeout=5.0))
    assert caught in found, found


@emulated
@pytest.mark.exhaustive
def test_without_a_bug_nothing_is_caught():
    for run in dict.fromkeys(plant[3] for plant in PLANTS):
        assert what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1)) == set(), run
