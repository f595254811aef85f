"""conv_taps: its real PTX on the CPU against the oracle, its traffic, its machine code, its plans.

Cases are chosen around what differs: how wide x and y are accessed, where channels end within a chunk and columns
within a fragment, strides and dilations with and without a common factor, and the edges of tiles.
"""

import dataclasses
import math
from contextlib import contextmanager
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
from cuconv.plan import taps
from cuconv.plan.conv import plan_conv
from cuconv.plan.devices import DEVICES
from cuconv.plan.taps import plan_taps
from cuconv.plan.types import PlanError

emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

LIMITS = DEVICES["H200"]
ONE = dataclasses.replace(LIMITS, name="one multiprocessor", multiprocessors=1)  # its blocks walk over many tiles
ALIGNED = (0, 0, 0)


@contextmanager
def only(*sizes, buffers=2):
    """Plans find no other size than this one: warps, inputs of a warp, passes."""
    plan_taps.cache_clear()
    try:
        with mock.patch.multiple(taps, _SIZES=(sizes,), _BUFFERS=(buffers,)):
            yield
    finally:
        plan_taps.cache_clear()


class Case:
    """A convolution with random arrays, and its output on a runtime."""

    def __init__(self, x_shape, w_shape, dtype="float16", seed=0, **options):
        self.dtype, self.options = dtype, options
        self.shape = conv_shape(x_shape, w_shape, **options)
        rng = np.random.default_rng(seed)
        self.x, self.w, self.bias = (uniform(rng, shape, dtype) for shape in (x_shape, w_shape, w_shape[-1:]))

    def run(self, runtime, activation="linear", bias=True, out=None):
        y = runtime.empty(self.shape.y_shape, dtype_of(self.dtype)) if out is None else out
        plan = plan_taps(self.shape, self.dtype, activation, alignment(runtime, self.x, self.w, y), runtime.limits)
        runtime.launch(plan, (self.x, self.w, self.bias if bias else None, y))
        return y

    def check(self, runtime, activation="linear", bias=True, **how):
        function = activation if activation in oracle.ACTIVATIONS else activations.get(activation)
        expected = oracle.conv(self.x, self.w, self.bias if bias else None, activation=function, **self.options)
        actual = self.run(runtime, activation, bias, **how)
        try:
            assert_close(actual, expected, dtype=self.dtype, terms=math.prod(self.w.shape[:-1]), what="conv_taps")
        except AssertionError as error:
            error.add_note(f"x {self.x.shape}, w {self.w.shape}, {self.options}; {runtime.launches[-1]}")
            raise
        return actual


def trace(seed=1, limits=LIMITS):
    return EmulatedRuntime(limits, mode="trace", seed=seed)


def constants_of(runtime):
    return dict(runtime.launches[-1].constants)


# --- Every kind of problem ---------------------------------------------------------------------------------------

QUICK = {
    "vocoder": ((2, 300, 32), (7, 32, 1), "bfloat16", {"padding": "same"}),
    "heads": ((1, 13, 21, 40), (3, 3, 40, 3), "float16", {"padding": "same"}),
    "phases": ((2, 131, 12), (4, 12, 2), "float32", {"padding": (2, 9), "strides": 4, "dilation_rate": 6}),
    "groups": ((2, 2, 5, 23, 36), (2, 3, 2, 18, 8), "bfloat16", {"padding": "same", "groups": 2, "strides": (1, 2, 1)}),
}
EVERY = {
    # 16-bit: accesses of 16, 8, 4 and 2 bytes to x, and of 1, 2, 4 and 8 filters to y.
    "512 to 2": ((3, 50, 512), (1, 512, 2), "bfloat16", {}),
    "wide y": ((2, 70, 72), (3, 72, 16), "float16", {"padding": "causal", "dilation_rate": 9}),
    "odd": ((2, 70, 33), (5, 33, 5), "bfloat16", {"padding": "same", "strides": 2}),
    "two bytes of a chunk": ((2, 70, 1), (3, 1, 1), "float16", {}),
    "most columns": ((1, 90, 20), (8, 20, 16), "bfloat16", {"padding": "same"}),
    "most taps": ((1, 300, 2), (128, 2, 1), "float16", {"padding": "same"}),
    "dilated image": ((1, 17, 19, 24), (3, 3, 24, 4), "bfloat16", {"padding": "same", "dilation_rate": (2, 3)}),
    "strided image": ((2, 17, 30, 6), (3, 2, 6, 7), "float16", {"padding": ((3, 0), (1, 4)), "strides": (3, 2)}),
    "stride beyond the taps": ((2, 90, 16), (2, 16, 3), "float16", {"strides": 5}),
    "volume": ((1, 5, 6, 19, 10), (3, 3, 3, 10, 2), "bfloat16", {"padding": "same"}),
    # float: one lane has 4 channels.
    "float vocoder": ((2, 300, 32), (7, 32, 1), "float32", {"padding": "same"}),
    "float heads": ((1, 13, 21, 33), (3, 3, 33, 3), "float32", {"padding": "same"}),
    "float groups": ((2, 60, 60), (3, 20, 24), "float32", {"groups": 3, "strides": 2, "dilation_rate": 2}),
    "float volume": ((1, 3, 4, 9, 6), (2, 1, 3, 6, 5), "float32", {"padding": "same", "dilation_rate": (1, 1, 2)}),
    "float many columns": ((1, 60, 17), (7, 17, 8), "float32", {"padding": "same"}),
}


def check_problem(x_shape, w_shape, dtype, options):
    case = Case(x_shape, w_shape, dtype, **options)
    case.check(trace())
    case.check(trace(2, ONE), "relu", bias=False)


@emulated
@pytest.mark.parametrize("name", QUICK)
def test_problem(name):
    check_problem(*QUICK[name])


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", EVERY)
def test_every_problem(name):
    check_problem(*EVERY[name])


def check_sizes(dtype, warps, wm, passes, buffers):
    """The edges of a tile: outputs that fill it, one more; with several chunks of channels and a part of one."""
    filters = 1 if dtype == "float32" else 3  # float has more sums a column
    with only(warps, wm, passes, buffers=buffers):
        tile = warps * wm * passes - 2  # outputs of 3 taps
        for seed, length in enumerate((tile, 2 * tile + 1)):
            runtime = trace(seed + 1, ONE)
            Case((1, length, 72), (3, 72, filters), dtype, padding="same").check(runtime)
            assert [constants_of(runtime)[name] for name in ("WARPS", "WM", "BQ", "BUFFERS")] == [
                warps, wm, tile, buffers
            ]  # fmt: skip


@emulated
@pytest.mark.parametrize("dtype, warps, wm, passes, buffers", [("bfloat16", 4, 16, 2, 1), ("float32", 4, 16, 1, 2)])
def test_sizes(dtype, warps, wm, passes, buffers):
    check_sizes(dtype, warps, wm, passes, buffers)


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("number, sizes", list(enumerate(taps._SIZES)), ids=str)
def test_every_size(number, sizes, dtype):
    check_sizes(dtype, *sizes, 1 + number % 2)


@emulated
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tiny(dtype):
    for x, w, options in (
        ((1, 2, 1), (7, 1, 2), {"padding": "causal"}),
        ((1, 3, 1), (2, 1, 2), {"padding": (9, 8), "strides": 3}),  # outputs that read padding alone
        ((1, 9, 2), (1, 2, 4), {"dilation_rate": 3, "strides": 2}),  # one tap: inputs a stride apart
    ):
        Case(x, w, dtype, **options).check(trace())


@emulated
@pytest.mark.parametrize("offset", [1, 4])
def test_arrays_that_begin_anywhere(offset):
    """Contiguous views that a 16-byte access could not start at; what lies around them is NaN."""

    def shifted(array):
        base = np.full(array.size + offset + 8, np.nan, array.dtype)
        view = base[offset : offset + array.size].reshape(array.shape)
        view[...] = array
        return view

    case = Case((2, 40, 40), (3, 40, 8), padding="same")
    case.x, case.w, case.bias = shifted(case.x), shifted(case.w), shifted(case.bias)
    out = shifted(np.full(case.shape.y_shape, np.nan, np.float16))
    runtime = trace()
    case.check(runtime, out=out)
    assert constants_of(runtime)["VECX"] == constants_of(runtime)["VECY"] == offset
    base = out.base.copy()
    base[offset : offset + out.size] = np.nan
    assert np.isnan(base).all(), "elements outside of y were written"


@emulated
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_input_reaches_what_reads_it_and_nothing_else(dtype, poison):
    """Channels that end within a lane's and within a chunk, strides and padding."""
    x_shape, w_shape, options = (1, 9, 18, 22), (3, 2, 22, 3), {"strides": (2, 3), "padding": ((1, 2), (0, 3))}
    case = Case(x_shape, w_shape, dtype, **options)
    size = x_shape[1:-1]
    _, reads = oracle.reads(size, w_shape[:-2], options["strides"], options["padding"], 1)
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
    case = Case((1, 300, 40), (5, 40, 3), dtype, padding="same")
    assert len({case.run(EmulatedRuntime(ONE, seed=seed)).tobytes() for seed in range(4)}) == 1


@emulated
@pytest.mark.parametrize("device, dtype", [("A100", "bfloat16"), ("T4", "float32")])
def test_other_architectures(device, dtype):
    Case((1, 60, 24), (5, 24, 3), dtype, padding="same").check(trace(limits=DEVICES[device]))


@emulated
def test_indices_beyond_32_bits():
    """x has more than 2**31 elements; only the last block runs, on memory that exists where it is touched."""
    length = 2**26 + 77
    shape = conv_shape((1, length, 32), (3, 32, 1), padding="same")
    x, y = np.zeros(shape.x_shape, np.float16), np.zeros(shape.y_shape, np.float16)
    w = np.ones(shape.w_shape, np.float16)
    x[0, -40:] = 1

    def run():
        plan_taps.cache_clear()
        plan = plan_taps(shape, "float16", "linear", ALIGNED, LIMITS)
        tiles = plan.integers[1]
        # A walker for each tile: the last block has the last tile, and no other.
        plan = dataclasses.replace(plan, integers=(*plan.integers[:2], tiles, *plan.integers[3:]), grid=(tiles, 1, 1))
        EmulatedRuntime(LIMITS, blocks=lambda plan: [plan.grid[0] - 1]).launch(plan, (x, w, None, y))
        return plan

    assert run().index_bytes == 8
    assert (y[0, -30:-1] == 96).all() and (y[0, -1] == 64).all()
    with mock.patch.object(taps, "index_bytes", return_value=4), pytest.raises(emulator.EmulationError) as caught:
        run()
    plan_taps.cache_clear()
    assert {report.kind for report in caught.value.reports} == {"bounds"}


# --- Plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x_shape, w_shape, dtype, options, reason",
    [
        ((2, 4, 50), (3, 4, 8), "float16", {"data_format": "channels_first"}, "channels last"),
        ((2, 50, 4), (3, 4, 17), "float16", {}, "17 filters"),
        ((2, 50, 4), (33, 4, 4), "float16", {}, "132 taps and filters"),
        ((2, 50, 4), (3, 4, 8), "float64", {}, "float64"),
        ((0, 50, 4), (3, 4, 8), "float16", {}, "without elements"),
        ((2, 0, 4), (3, 4, 8), "float16", {"padding": (2, 2)}, "without elements"),
        ((2, 50, 60000), (3, 60000, 8), "float16", {}, "fit no tile"),
        ((2, 50, 40), (8, 40, 16), "float32", {}, "fit no tile"),
    ],
)
def test_what_it_does_not_compute(x_shape, w_shape, dtype, options, reason):
    with pytest.raises(PlanError, match=reason):
        plan_taps(conv_shape(x_shape, w_shape, **options), dtype, "linear", ALIGNED, LIMITS)


def test_no_tensor_cores():
    with pytest.raises(PlanError, match="sm_75"):
        plan_taps(conv_shape((2, 50, 4), (3, 4, 8)), "float16", "linear", ALIGNED, DEVICES["T4"])


# The layers this kernel is for, with the least percent of what memory allows that the model may predict on H200, A100
# and RTX 4090.
LAYERS = {
    "vocoder": (conv_shape((16, 65536, 32), (7, 32, 1), padding="same"), "bfloat16", (70, 80, 90)),
    "512 to 2": (conv_shape((64, 2048, 512), (1, 512, 2)), "bfloat16", (80, 90, 90)),
    "heads": (conv_shape((16, 256, 256, 64), (3, 3, 64, 3), padding="same"), "bfloat16", (80, 85, 90)),
    "float vocoder": (conv_shape((16, 65536, 32), (7, 32, 1), padding="same"), "float32", (75, 85, 90)),
    # 54 multiply-adds an input, one and a half times: more than the units for floats have time for.
    "float heads": (conv_shape((16, 256, 256, 64), (3, 3, 64, 3), padding="same"), "float32", (30, 45, 80)),
}


@pytest.mark.parametrize("device, column", [("H200", 0), ("A100", 1), ("RTX 4090", 2)])
@pytest.mark.parametrize("name", LAYERS)
def test_predicted_share_of_the_memory(name, device, column):
    shape, dtype, least = LAYERS[name]
    plan = plan_conv(shape, dtype, "linear", ALIGNED, DEVICES[device])
    assert plan.kernel == "conv_taps"
    share = 100 * plan.cost.least_bytes / DEVICES[device].bandwidth / plan.cost.seconds
    assert least[column] <= share <= 100, plan
    assert plan.reason and len(plan.rejected) >= 2
    assert plan.cost.flops >= plan.cost.least_flops and plan.cost.bytes >= plan.cost.least_bytes


def test_plans_are_functions_of_integers():
    for shape, dtype, _ in LAYERS.values():
        plan = plan_taps(shape, dtype, "linear", ALIGNED, LIMITS)
        plan_taps.cache_clear()
        assert plan == plan_taps(shape, dtype, "linear", ALIGNED, LIMITS)


@pytest.mark.parametrize("stride, dilation", [(1, 1), (1, 6), (2, 1), (2, 2), (4, 6), (3, 2), (7, 1)])
def test_tiles_have_every_output_once(stride, dilation):
    """The kernel's walk through tiles and phases, in Python: outputs, and the inputs that lie in a tile."""
    for kernel in (1, 3):
        shape = conv_shape((1, 90, 8), (kernel, 8, 1), strides=stride, dilation_rate=dilation, padding=(3, 2))
        plan = plan_taps(shape, "float32", "linear", ALIGNED, LIMITS)
        constants = dict(plan.constants)
        tile, step = constants["BQ"], constants["STEP_Q"]
        _, _, _, _, out, moved, apart, pad, phases, parts = plan.integers
        found = []
        for number in range(parts):
            first = number // phases * tile * phases + number % phases
            for place in range(tile):
                output = first + place * phases
                if output < out:
                    found.append(output)
                for tap in range(kernel):
                    row = place * step + tap
                    assert row < step * (tile - 1) + kernel
                    assert first * moved - pad + row * apart == output * stride + tap * dilation - 3
        assert sorted(found) == list(range(out))


# --- Traffic -----------------------------------------------------------------------------------------------------


def test_x_is_read_once_in_whole_sectors():
    """But for what two tiles share: 6 inputs between neighbours."""
    if emulator.missing():
        pytest.skip(emulator.missing())
    case = Case((2, 700, 64), (7, 64, 1), "bfloat16", padding="same")
    runtime = trace(0, ONE)
    case.check(runtime)
    tile = constants_of(runtime)["BQ"]
    between = 2 * (-(-700 // tile) - 1)
    reads = [each for each in runtime.traffic if each.instruction.startswith("ld.global.nc.v4")]
    assert sum(each.bytes for each in reads) == case.x.nbytes + between * 6 * 64 * 2
    assert sum(each.sectors for each in reads) == sum(each.least_sectors for each in reads)
    assert 32 * sum(each.sectors for each in reads) == sum(each.bytes for each in reads)


@emulated
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("filters", [1, 2])
def test_no_bank_conflicts(dtype, filters):
    case = Case((1, 600, 40), (7, 40, filters), dtype, padding="same")
    runtime = trace(0, ONE)
    case.check(runtime)
    assert not [each for each in runtime.traffic if each.space == "shared" and each.bank_conflicts]


@emulated
def test_bank_conflicts_of_three_filters():
    """What is read of zs by the lanes of neighbouring filters meets in a bank, at most two; nothing else does."""
    case = Case((1, 9, 64, 24), (3, 3, 24, 3), padding="same")
    runtime = trace(0, ONE)
    case.check(runtime)
    for each in runtime.traffic:
        if each.space == "shared" and each.bank_conflicts:
            assert each.instruction.startswith("ld.shared.f32") and each.wavefronts <= 2.1 * each.least_wavefronts, each


# --- Machine code ------------------------------------------------------------------------------------------------


def compiled(plan, arch):
    path = kernel_directory() / "conv_taps.cu"
    return functions(emulator.compile_cubin(path, arch, dict(plan.constants)))["conv_taps"]


def has_no_stack(plan, arch):
    function = compiled(plan, arch)
    assert function.stack_bytes == 0 and function.spills == 0, f"{function.stack_bytes} bytes of stack, {arch}, {plan}"
    assert function.shared_bytes == 0
    assert function.registers * plan.threads <= 65536
    return function


def check_machine_code(name, device):
    limits = DEVICES[device]
    shape, dtype, _ = LAYERS[name]
    plan = plan_taps(shape, dtype, "linear", ALIGNED, limits)
    function = has_no_stack(plan, limits.arch)
    if disassembly.missing():
        pytest.skip(disassembly.missing())
    constants = dict(plan.constants)
    tensor = dtype != "float32"
    loop = function.main_loop("HMMA" if tensor else "FFMA")
    own = constants["WM"] // 8 * constants["AHEAD"]
    assert loop.count("LDG", "128") == loop.count("LDG") == own, loop.mix()
    # From sm_100 on the loop over tiles begins with that over inputs.
    assert not loop.count("BAR") or limits.capability >= (10, 0)
    if tensor:
        columns = math.prod(shape.kernel_size) * shape.filters
        assert loop.count("HMMA") == own * -(-columns // 8), loop.mix()
        # 64 bytes of each input must be done with before the memory has them: 13 cycles of a warp scheduler on H200.
        assert len(loop.instructions) <= 13 * 8 * own, loop.mix()
    else:
        assert loop.share("FFMA") > 0.3, loop.mix()


@pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))
@pytest.mark.parametrize("name", LAYERS)
def test_machine_code(name):
    check_machine_code(name, "H200")


@pytest.mark.exhaustive
@pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))
@pytest.mark.parametrize("device", ["A100", "RTX 3090", "RTX 4090", "B200", "RTX 5090"])
@pytest.mark.parametrize("name", LAYERS)
def test_machine_code_everywhere(name, device):
    check_machine_code(name, device)


@pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))
def test_activations_take_no_stack():
    for name in ("heads", "float heads"):
        shape, dtype, _ = LAYERS[name]
        has_no_stack(plan_taps(shape, dtype, "mish", ALIGNED, LIMITS), LIMITS.arch)


@pytest.mark.exhaustive
@pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("name", EVERY)
def test_no_problem_takes_a_stack(name, arch):
    x_shape, w_shape, dtype, options = EVERY[name]
    limits = next(each for each in DEVICES.values() if each.arch == arch)
    shape = conv_shape((64, *x_shape[1:]), w_shape, **options)
    has_no_stack(plan_taps(shape, dtype, "linear", ALIGNED, limits), arch)


# --- Planted bugs ------------------------------------------------------------------------------------------------


def line(runtime):
    Case((2, 300, 40), (5, 40, 3), padding="same").check(runtime)


def one_buffer(runtime):
    with only(4, 16, 1, buffers=1):
        Case((2, 300, 40), (5, 40, 3), padding="same").check(runtime)


def image(runtime):
    Case((2, 9, 14, 12), (3, 2, 6, 10), groups=2, padding="same", dilation_rate=(2, 1)).check(runtime)


def ordinary(runtime):
    Case((2, 90, 20), (3, 20, 2), "float32", padding="same", dilation_rate=4).check(runtime)


# name, the text, what becomes of it, a run that must fail, what catches it.
PLANTS = [
    ("no barrier behind the weights", "0.f;\n  __syncthreads();\n", "0.f;\n", line, "race"),
    ("no barrier behind the sums", "ws, group, p, lane);\n    __syncthreads();\n", "ws, group, p, lane);\n", line,
     "race"),
    ("no barrier behind the outputs", "if (BUFFERS == 1) __syncthreads();", "", one_buffer, "race"),
    ("one buffer for both tiles", "buffer = (BUFFERS - 1) * COLUMNS * PITCH - buffer;", "", line, "race"),
    ("channels of the next input", "c + lane % 4 * LANE < CHANNELS;", "true;", line, "bounds"),
    ("weights of no channel", "n < COLUMNS && c < CHANNELS", "n < COLUMNS", line, "bounds"),
    ("weights of no tap", "n < COLUMNS && c < CHANNELS", "c < CHANNELS", line, "bounds"),
    ("padding not zeroed", "inside[i] = inside[i] && within(l, p.in[a]);", "", line, "bounds"),
    ("an output too many", "exists = exists && l < p.out[a];", "exists = exists && l <= p.out[a];", line, "race"),
    ("inputs of another group", "(origin[i] * p.groups + group) * CHANNELS", "origin[i] * p.groups * CHANNELS", image,
     WRONG),
    ("weights of another group", "filters + group * FILTERS + n % FILTERS", "filters + n % FILTERS", image, WRONG),
    ("outputs of another group", "(index * p.groups + group) * FILTERS", "index * p.groups * FILTERS", image, "race"),
    ("the bias of another group", "widen(p.bias[group * FILTERS + f])", "widen(p.bias[f])", image, WRONG),
    ("taps of the wrong axis", "      reach += rest % taps_of(a) * pitch;\n      rest /= taps_of(a);\n",
     "      reach += rest % taps_of(RANK - 1 - a) * pitch;\n      rest /= taps_of(RANK - 1 - a);\n", image, WRONG),
    ("inputs that are neighbours", "at[a] * p.dilation[a]", "at[a]", ordinary, WRONG),
    ("phases one after the other", " + first[a] % p.phases[a];", ";", ordinary, "race"),
    ("outputs that are neighbours", "place[a] * p.phases[a]", "place[a]", ordinary, "race"),
    ("halves of a fragment exchanged", "{{b.x, b.y}, {b.z, b.w}}", "{{b.z, b.w}, {b.x, b.y}}", line, WRONG),
    ("rows of a fragment exchanged", "memcpy(words[0], &x[2 * i], 16);", "memcpy(words[0], &x[2 * i + 1], 16);", line,
     WRONG),
    ("a lane gives what it should keep", "kept = lane & bit ? odd : even", "kept = lane & bit ? even : odd", ordinary,
     WRONG),
    ("channels of another lane", "+ lane % 4 * LANE;\n  }", "+ lane % 4;\n  }", ordinary, "alignment"),
    ("sums of the last columns", "if (n < COLUMNS) zs[n * PITCH + i * 16", "if (n < COLUMNS - 1) zs[n * PITCH + i * 16",
     line, "uninitialised"),
]  # fmt: skip


def every_second_one_exhaustive():
    for number, plant in enumerate(PLANTS):
        yield pytest.param(*plant, id=plant[0], marks=[pytest.mark.exhaustive] if number % 2 else [])


@emulated
@pytest.mark.parametrize("name, right, wrong, run, caught", list(every_second_one_exhaustive()))
def test_planted_bug_is_caught(name, right, wrong, run, caught):
    with planted("conv_taps.cu", right, wrong):
        found = what_catches(run, EmulatedRuntime(ONE, mode="trace", seed=1, timeout=5.0))
    assert caught in found, found


@emulated
def test_without_a_bug_nothing_is_caught():
    for run in {plant[3] for plant in PLANTS}:
        assert what_catches(run, EmulatedRuntime(ONE, mode="trace", seed=1)) == set()


@emulated
def test_a_pitch_whose_columns_meet_in_a_bank():
    """Only the counters show it."""
    taps_residue = dict.fromkeys(taps.RESIDUE, 0)
    plan_taps.cache_clear()
    with mock.patch.object(taps, "RESIDUE", taps_residue):
        runtime = trace(0, ONE)
        Case((1, 200, 40), (7, 40, 1), padding="same").check(runtime)
    plan_taps.cache_clear()
    assert sum(each.bank_conflicts for each in runtime.traffic if each.space == "shared")
