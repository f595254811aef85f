"""depthwise_toeplitz: its real PTX on the CPU against the oracle, its traffic, its machine code, its plans.

Cases are chosen around what differs: one axis or two, channels last or first, how wide x and y are accessed, how far
the first tap lies behind a vector (PHASE), whether the band ends with a step of 16 inputs, and the edges of tiles.
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
from compare import assert_close, dtype_of, poisoned
from disassembly import functions
from emulated import EmulatedRuntime
from planted import WRONG, planted, what_catches
from strategies import uniform

from cuconv import activations
from cuconv.cuda.arrays import alignment
from cuconv.cuda.runtime import kernel_directory
from cuconv.geometry import depthwise_shape
from cuconv.plan import depthwise as plans
from cuconv.plan import depthwise_problem, depthwise_toeplitz
from cuconv.plan.depthwise_problem import problem_of
from cuconv.plan.depthwise_toeplitz import plan_toeplitz
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import PlanError

emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
needs_nvrtc = pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))

LIMITS = DEVICES["H200"]
FIRST = "channels_first"
ALIGNED = (0, 0, 0)


@contextmanager
def only(blocks=5, channels=16):
    """Plans find no other tile than this one."""
    with mock.patch.multiple(depthwise_toeplitz, BLOCKS=(blocks,), CHANNELS=(channels,)):
        yield


def phases_together(module):
    """Plans find no other order than several phases in a tile."""
    return mock.patch.object(
        module, "fastest", lambda plans: next(plan for plan in plans if dict(plan.constants)["PHASED"])
    )


class Case:
    """A depthwise convolution with random arrays; its output, or the gradient of its input, on a runtime."""

    def __init__(self, size, taps, channels=16, dtype="bfloat16", batch=2, transposed=False, seed=0, **options):
        self.dtype, self.options, self.transposed = dtype, options, transposed
        first = options.get("data_format") == FIRST
        x_shape = (batch, channels, *size) if first else (batch, *size, channels)
        self.shape = depthwise_shape(x_shape, (*taps, channels, 1), **options)
        rng = np.random.default_rng(seed)
        shapes = (x_shape, self.shape.y_shape, (*taps, channels, 1), (channels,))
        self.x, self.dy, self.w, self.bias = (uniform(rng, shape, dtype) for shape in shapes)

    def plan(self, limits=LIMITS, activation="linear", aligned=ALIGNED):
        return plan_toeplitz(problem_of(self.shape, self.dtype, limits, self.transposed), activation, aligned)

    def run(self, runtime, activation="linear", bias=True, change=lambda plan: plan, out=None):
        source = self.dy if self.transposed else self.x
        shape = self.shape.x_shape if self.transposed else self.shape.y_shape
        out = poisoned(shape, self.dtype) if out is None else out
        aligned = alignment(runtime, source, self.w, out)
        plan = change(self.plan(runtime.limits, activation, aligned))
        runtime.launch(plan, (source, self.w, self.bias if bias and not self.transposed else None, out))
        return out

    def expected(self, activation="linear", bias=True):
        if self.transposed:
            return oracle.depthwise_conv_input_grad(self.dy, self.w, self.x.shape, **self.options)
        sums = oracle.depthwise_conv(self.x, self.w, self.bias if bias else None, **self.options)
        return activations.get(activation)(sums)

    def check(self, runtime, activation="linear", bias=True, **how):
        expected = self.expected(activation, bias)
        actual = self.run(runtime, activation, bias, **how)
        try:
            assert_close(actual, expected, dtype=self.dtype, terms=math.prod(self.shape.kernel_size), what="toeplitz")
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
    # Each with something of its own.
    "last": Case((700,), (31,), 40, padding="same"),  # two tiles, channels that fill no tile
    "last, dilated": Case((150,), (33,), 24, "float16", padding="causal", dilation_rate=4),
    "last, transposed": Case((90,), (31,), 16, padding="causal", dilation_rate=2, transposed=True),
    "last, many phases": Case((200,), (31,), 16, padding="same", dilation_rate=20, batch=1),
    "last, odd channels": Case((60,), (40,), 13, "float16", padding=((50, 3),)),
    "first": Case((200,), (31,), 17, padding="same", data_format=FIRST),  # PHASE 1
    "first, transposed": Case((90,), (35,), 16, padding="causal", data_format=FIRST, transposed=True),
    "first, odd length": Case((77,), (31,), 5, "float16", padding="valid", data_format=FIRST),
    "last, two axes": Case((20, 50), (7, 7), 16, padding="same"),
    "last, two axes, transposed": Case((18, 9), (5, 9), 8, padding=((0, 4), (7, 1)), transposed=True),
    "last, two axes, dilated": Case((37, 25), (3, 5), 8, padding="same", dilation_rate=(3, 2)),
    "first, two axes": Case((20, 28), (7, 7), 16, padding="same", data_format=FIRST),
    "first, two axes, dilated": Case((37, 24), (3, 11), 4, padding="same", dilation_rate=(5, 1), data_format=FIRST),
}


DEFAULT = ("last", "first, transposed", "last, two axes", "first, two axes")


def some(names, default):
    """Parameters of a test, all but the `default` ones exhaustive."""
    return [pytest.param(name, marks=[] if name in default else pytest.mark.exhaustive) for name in names]


@emulated
@pytest.mark.parametrize("name", some(QUICK, DEFAULT))
def test_problem(name):
    with only():
        QUICK[name].check(trace())


@emulated
def test_many_phases_fill_a_tile():
    many_phases(trace())


# 16 inputs make a step: the band of 9 taps ends with one, that of 10 begins another, as do 41 and 42 in the third.
TAPS = (1, 9, 10, 26, 41, 42, 128)


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("data_format", ["channels_last", FIRST])
@pytest.mark.parametrize("taps", TAPS)
def test_every_number_of_taps(taps, data_format):
    for number, padding in enumerate(("valid", ((3, 9),))):
        transposed, dtype = number % 2 == 1, ("float16", "bfloat16")[number]
        case = Case((136 + number,), (taps,), 8, dtype, 1, transposed, padding=padding, data_format=data_format)
        with only(1):
            case.check(trace(number + 1))


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "blocks, channels",
    [*((n, 32) for n in depthwise_toeplitz.BLOCKS), *((3, n) for n in depthwise_toeplitz.CHANNELS if n != 32)],
)
def test_every_tile(blocks, channels):
    """An output less than a tile, as many, one more; the same of channels, and of rows."""
    beyond = (blocks + channels) % 3 - 1
    for data_format in ("channels_last", FIRST):
        with only(blocks, channels):
            options = {"batch": 1, "padding": "same", "data_format": data_format}
            Case((128 * blocks + beyond,), (31,), channels - beyond, "float16", **options).check(trace())
            Case((16 - beyond, 8 * blocks + beyond), (3, 7), channels, **options).check(trace())


@emulated
def test_most_taps():
    """As many steps as are written out; a tap more is refused."""
    most = depthwise_toeplitz.MOST_STEPS * 16 - 7
    with only(1):
        Case((140,), (most,), 16, padding="same", batch=1).check(trace())
    with pytest.raises(PlanError, match=f"at most {most}"):
        Case((1400,), (most + 1,)).plan()


@emulated
@pytest.mark.parametrize("activation", some(("relu", "gelu", "tanh", "mish"), ("relu",)))
def test_activation(activation):
    case = Case((50,), (31,), batch=1, padding="same")
    case.w = (case.w / 4).astype(case.w.dtype)
    with only(1):
        case.check(trace(), activation)
        case.check(trace(), activation, bias=False)


TINY = {
    "one output": Case((1,), (31,), 1, padding="same"),
    "padding alone": Case((3,), (9,), 2, padding=((30, 20),)),
    "phases of one": Case((40,), (3,), 4, padding="causal", dilation_rate=100),
    "one output of two axes": Case((1, 1), (7, 7), 1, padding="same", data_format=FIRST),
    "one tap": Case((1, 5), (5, 1), 2, padding="same"),
}


@emulated
@pytest.mark.parametrize("name", some(TINY, ("padding alone",)))
def test_tiny(name):
    with only(1):
        TINY[name].check(trace())


@emulated
@pytest.mark.parametrize("data_format", ["channels_last", FIRST])
@pytest.mark.parametrize("offset", some((1, 2, 4), (1,)))
def test_arrays_that_begin_anywhere(offset, data_format):
    """Contiguous views that a 16-byte access could not start at; what lies around them is NaN."""

    def shifted(array):
        base = np.full(array.size + offset + 8, np.nan, array.dtype)
        view = base[offset : offset + array.size].reshape(array.shape)
        view[...] = array
        return view

    case = Case((72,), (31,), 16, batch=1, padding="same", data_format=data_format)
    case.x, case.w, case.bias = shifted(case.x), shifted(case.w), shifted(case.bias)
    out = shifted(np.full(case.shape.y_shape, np.nan, dtype_of(case.dtype)))
    runtime = trace()
    with only(1):
        case.check(runtime, out=out)
    assert constants_of(runtime)["VEC"] == constants_of(runtime)["YV"] == offset
    base = out.base.copy()
    base[offset : offset + out.size] = np.nan
    assert np.isnan(base).all(), "elements outside of y were written"


@emulated
@pytest.mark.parametrize(
    "name, poison",
    [
        ("first, odd length", np.nan),
        ("last, two axes", np.inf),
        pytest.param("last, dilated", np.nan, marks=pytest.mark.exhaustive),
        pytest.param("last, many phases", np.inf, marks=pytest.mark.exhaustive),
    ],
)
def test_a_poisoned_input_reaches_what_reads_it_and_nothing_else(name, poison):
    """Though zeros beside the band meet it."""
    case = QUICK[name]
    first = case.options.get("data_format") == FIRST
    _, reads = oracle.reads(
        case.shape.in_size, case.shape.kernel_size, 1, case.options["padding"], case.options.get("dilation_rate", 1)
    )
    clean = case.expected()
    rng = np.random.default_rng(1)
    for _ in range(3):
        position = tuple(int(rng.integers(n)) for n in case.shape.in_size)
        channel = int(rng.integers(case.shape.in_channels))
        at = (0, channel, *position) if first else (0, *position, channel)
        kept = case.x[at]
        case.x[at] = poison
        with only():
            y = case.run(EmulatedRuntime(LIMITS, seed=1))
        case.x[at] = kept
        reached = np.zeros(clean.shape, bool)
        for p, _, i in reads:
            if i == position:
                reached[(0, channel, *p) if first else (0, *p, channel)] = True
        assert np.array_equal(np.isfinite(y), ~reached), (position, channel)
        y[reached] = clean[reached]
        assert_close(y, clean, dtype=case.dtype, terms=math.prod(case.shape.kernel_size))


@emulated
def test_the_same_bits_in_any_order_of_threads():
    with only():
        case = QUICK["last, two axes"]
        assert len({case.run(EmulatedRuntime(LIMITS, seed=seed)).tobytes() for seed in range(3)}) == 1


@emulated
@pytest.mark.parametrize("device", some(("A100", "RTX 4090", "B200"), ("A100",)))
def test_other_architectures(device):
    Case((80,), (31,), 16, batch=1, padding="same").check(trace(limits=DEVICES[device]))


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["last, many phases", "last, two axes, dilated", "first, two axes"])
def test_wide_indices_give_the_same_bits(monkeypatch, name):
    with only():
        narrow = QUICK[name].run(EmulatedRuntime(LIMITS))
        monkeypatch.setattr(depthwise_problem, "index_bytes", lambda *_: 8)
        runtime = EmulatedRuntime(LIMITS)
        assert QUICK[name].run(runtime).tobytes() == narrow.tobytes()
    assert runtime.launches[0].index_bytes == 8


def end_of_a_large_array(runtime, data_format, bytes_of_index=None):
    """x has more than 2**31 elements; only the last blocks run, on memory that exists where it is touched."""
    length = 2**27 + 72
    first = data_format == FIRST
    shape = depthwise_shape(
        (1, 16, length) if first else (1, length, 16), (31, 16, 1), padding="causal", data_format=data_format
    )
    x, y = (np.zeros(shape.x_shape, np.float16) for _ in range(2))
    w = np.ones((31, 16, 1), np.float16)
    x[(0, slice(None), slice(-40, None)) if first else (0, slice(-40, None))] = 1
    plan = plan_toeplitz(problem_of(shape, "float16", LIMITS), "linear", ALIGNED)
    if bytes_of_index:
        constants = tuple((k, "int" if k == "INDEX" else v) for k, v in plan.constants)
        integers = (*plan.integers[:2], 0, 0, *plan.integers[4:])  # the only item of the batch begins at 0
        plan = dataclasses.replace(plan, index_bytes=bytes_of_index, constants=constants, integers=integers)
    runtime.blocks = lambda plan: [plan.grid[0] - 1]
    runtime.launch(plan, (x, w, None, y))
    last = y[0, -1, -12:] if first else y[0, -12:, -1]
    assert (last[-1], last[0]) == (31, 29)
    return plan


@emulated
@pytest.mark.parametrize("data_format", some(("channels_last", FIRST), ("channels_last",)))
def test_indices_beyond_32_bits(data_format):
    assert end_of_a_large_array(EmulatedRuntime(LIMITS), data_format).index_bytes == 8


# --- Plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x_shape, w_shape, dtype, device, options, reason",
    [
        ((2, 90, 16), (31, 16, 1), "float32", "H200", {}, "16-bit"),
        ((2, 90, 16), (31, 16, 1), "float16", "T4", {}, "sm_80"),
        ((2, 90, 16), (31, 16, 1), "float16", "H200", {"strides": 2}, "only stride 1"),
        ((2, 90, 16), (31, 16, 2), "float16", "H200", {}, "no multiplier"),
        ((2, 9, 9, 9, 16), (3, 3, 3, 16, 1), "float16", "H200", {}, "at most two axes"),
        ((2, 16, 90), (31, 16, 1), "float16", "H200", {"dilation_rate": 2, "data_format": FIRST}, "dilation 2"),
        ((2, 900, 16), (600, 16, 1), "float16", "H200", {}, "at most 521"),
    ],
)
def test_what_it_does_not_compute(x_shape, w_shape, dtype, device, options, reason):
    problem = problem_of(depthwise_shape(x_shape, w_shape, **options), dtype, DEVICES[device])
    with pytest.raises(PlanError, match=reason):
        plan_toeplitz(problem, "linear", ALIGNED)
    if dtype != "float32":
        plan = plans.plan_depthwise(
            depthwise_shape(x_shape, w_shape, **options), dtype, "linear", ALIGNED, DEVICES[device]
        )
        assert any(reason in other for other in plan.rejected), plan.rejected


# The layers this kernel is for, with the least percent of what memory allows that the model may predict on H200, A100
# and RTX 4090.
CONFORMER = depthwise_shape((32, 1000, 512), (31, 512, 1), padding="same")
HYENA = depthwise_shape((2, 8192, 4096), (128, 4096, 1), padding="causal")
CONVNEXT = depthwise_shape((64, 56, 56, 96), (7, 7, 96, 1), padding="same")
LAYERS = {
    "Conformer": (CONFORMER, (65, 75, 85)),
    "Conformer, channels first": (
        depthwise_shape((32, 512, 1000), (31, 512, 1), padding="same", data_format=FIRST),
        (65, 75, 85),
    ),
    "StripedHyena": (HYENA, (75, 75, 75)),
    "ConvNeXt": (CONVNEXT, (55, 55, 65)),
}


@pytest.mark.parametrize("device, column", [("H200", 0), ("A100", 1), ("RTX 4090", 2)])
@pytest.mark.parametrize("name", LAYERS)
def test_predicted_share_of_the_memory(name, device, column):
    shape, least = LAYERS[name]
    plan = plans.plan_depthwise(shape, "bfloat16", "linear", ALIGNED, DEVICES[device])
    share = 100 * plan.cost.least_bytes / DEVICES[device].bandwidth / plan.cost.seconds
    assert least[column] <= share <= 100, plan
    assert plan.kernel == "depthwise_toeplitz" or device == "RTX 4090", plan
    assert any(other.startswith("depthwise") and "us predicted" in other for other in plan.rejected)
    assert plan.cost.flops >= plan.cost.least_flops


def test_dilation_costs_nothing():
    """Phases are walked apart, so 64 of them are as many tiles."""
    plan, dilated = (
        plans.plan_depthwise(
            depthwise_shape((8, 65536, 64), (31, 64, 1), padding="causal", dilation_rate=rate),
            "bfloat16", "linear", ALIGNED, LIMITS,
        )
        for rate in (1, 64)
    )  # fmt: skip
    assert plan.kernel == dilated.kernel == "depthwise_toeplitz"
    assert dilated.cost.seconds <= 1.05 * plan.cost.seconds


# --- Traffic -----------------------------------------------------------------------------------------------------

WHOLE = {
    "last": Case((640,), (31,), 32, batch=1, padding="same"),
    "last, two axes": Case((24, 56), (7, 7), 32, batch=1, padding="same"),
    "first": Case((640,), (31,), 32, batch=1, padding="same", data_format=FIRST),
    "first, two axes": Case((24, 56), (7, 7), 32, batch=1, padding="same", data_format=FIRST),
}


@emulated
@pytest.mark.parametrize("name", some(WHOLE, ("last", "first, two axes")))
def test_no_bank_conflicts_and_no_sector_too_many(name):
    case = WHOLE[name]
    with only(7 if len(case.shape.in_size) == 2 else 5, 32):
        runtime = trace()
        case.check(runtime, bias=False)
    # Of images, channels first: rows, halo included, begin within a sector, and a warp has parts of several.
    slack = 1 if "data_format" not in case.options or len(case.shape.in_size) == 1 else 1.2
    for each in runtime.traffic:
        assert each.space != "shared" or slack > 1 or not each.bank_conflicts, each
        assert each.space != "global" or each.sectors <= slack * each.least_sectors, each
    stores = [each for each in runtime.traffic if each.space == "global" and each.instruction.startswith("st")]
    assert sum(each.bytes for each in stores) == case.dy.nbytes
    assert sum(each.requests for each in stores) <= 1.05 * case.dy.nbytes / 512


# --- Machine code ------------------------------------------------------------------------------------------------


def function_of(plan, arch):
    path = kernel_directory() / "depthwise_toeplitz.cu"
    return functions(emulator.compile_cubin(path, arch, dict(plan.constants)))["depthwise_toeplitz"]


def has_no_stack(plan, arch):
    function = function_of(plan, arch)
    assert function.stack_bytes == 0 and function.spills == 0, f"{function.stack_bytes} bytes of stack, {arch}, {plan}"
    assert function.registers <= (128 if dict(plan.constants)["INDEX"] == "long long" else depthwise_toeplitz.REGISTERS)
    return function


@needs_nvrtc
@pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))
@pytest.mark.parametrize("name", some(("Conformer", "StripedHyena", "ConvNeXt"), ("Conformer", "ConvNeXt")))
def test_machine_code(name):
    shape, _ = LAYERS[name]
    plan = plans.plan_depthwise(shape, "bfloat16", "linear", ALIGNED, LIMITS)
    function, constants = has_no_stack(plan, "sm_90"), dict(plan.constants)
    assert function.count("LDG", "128") >= 8 and function.count("STG") == function.count("STG", "128") > 0
    loop = function.main_loop("HMMA")
    steps = -(-(7 + constants["K"]) // 16)
    assert loop.count("HMMA") == steps * constants["NB"], loop.mix()
    assert loop.count("LDSM") == (constants["NB"] + 1) // 2 + steps - 1, loop.mix()
    assert not loop.count("LDG") and not loop.count("BAR")


@needs_nvrtc
@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_no_variant_takes_a_stack(arch):
    """The most sums, the most steps, two axes, an activation that takes registers, wide indices."""
    for blocks, case, activation in (
        (9, Case((900,), (31,)), "linear"),
        (9, Case((900,), (521,)), "gelu"),
        (9, Case((60, 60), (7, 7), data_format=FIRST), "silu"),
        (5, Case((60, 60), (7, 7), channels=13), "linear"),
    ):
        with only(blocks):
            plan = case.plan(next(each for each in DEVICES.values() if each.arch == arch), activation)
        has_no_stack(plan, arch)
        wide = tuple((k, "long long" if k == "INDEX" else v) for k, v in plan.constants)
        has_no_stack(dataclasses.replace(plan, constants=wide), arch)


# --- Planted bugs ------------------------------------------------------------------------------------------------


def of(name):
    def run(runtime):
        with only():
            QUICK[name].check(runtime)

    return run


def many_phases(runtime):
    with only(1), phases_together(depthwise_toeplitz):
        Case((200,), (31,), 16, padding="same", dilation_rate=20).check(runtime)


def leaking(runtime):
    case = Case((120,), (31,), batch=1, padding="same")
    clean, case.x[0, 60] = case.expected(), np.nan
    with only(1):
        y = case.run(runtime)
    reads = np.abs(np.arange(120) - 60) <= 15
    assert np.isnan(y[0][reads]).all()
    y[0][reads] = clean[0][reads]
    assert_close(y, clean, dtype=case.dtype, terms=31)


last, first, image = of("last"), of("first"), of("last, two axes")
# name, the text, what becomes of it, a run that must fail, what catches it.
PLANTS = [
    ("inputs without zeros", "inside && within(at1, p.inner.source));\n        if", "inside);\n        if", last,
     "bounds"),
    ("second inputs without zeros", "column + 1 < NEEDED && within(at1 + inner.step, p.inner.source)",
     "column + 1 < NEEDED", last, "bounds"),
    ("rows without zeros", "group * CV < channels && within(at0, p.outer.source) &&", "group * CV < channels &&", image,
     "bounds"),
    ("channels of the next item", "piece < PIECES * GROUPS && group * CV < channels &&", "piece < PIECES * GROUPS &&",
     last, "bounds"),
    ("inputs a tile short", "PITCH + READ, 16) * 16;", "PITCH, 16) * 16;", first, "race"),
    ("taps without zeros before them", "exists && within(k, K)", "exists && k < K", last, "bounds"),
    ("taps without zeros behind them", "exists && within(k + 1, K)", "exists && k >= -1", last, "bounds"),
    ("the phase forgotten in the taps", "pair - r * BAND - 7 - PHASE;", "pair - r * BAND - 7;", first, WRONG),
    ("the phase forgotten in the inputs", "tile.inner_source(p, PHASE)", "tile.inner_source(p, 0)", first,
     "alignment"),
    ("the band of the next row", "r * BAND + 7 - strip + column", "r * BAND + 8 - strip + column", last, WRONG),
    ("halves of a fragment exchanged", "{halves[i][0], halves[i][1], halves[i + 1][0], halves[i + 1][1]}",
     "{halves[i][0], halves[i + 1][0], halves[i][1], halves[i + 1][1]}", last, WRONG),
    ("steps of 8 inputs", "const int i = j + 2 * s;", "const int i = j + s;", last, WRONG),
    ("outer taps of the same row", "(x_at(c) + r * PITCH) * sizeof(E)", "x_at(c) * sizeof(E)", image, WRONG),
    ("no barrier before the products", "value(p.bias + c0 + c) : 0.f;\n  __syncthreads();",
     "value(p.bias + c0 + c) : 0.f;", last, "race"),
    ("no barrier before the stores", "    }\n  }\n  __syncthreads();\n\n  // 3.", "    }\n  }\n\n  // 3.", last,
     "race"),
    ("outputs over inputs that are still read", "    __syncwarp();  // nobody", "    // nobody", last, "race"),
    ("leaks are kept", "    if (!finite)\n", "    if (false)\n", leaking, WRONG),
    ("leaks are kept in the second row of a fragment", "if (j == i && acc", "if (j == i && j % 4 < 2 && acc", leaking,
     WRONG),
    ("summed again from another place", "(strip + i % 4 / 2 * 8) * PITCH + i / 4 * 8", "strip * PITCH + i / 4 * 8",
     leaking, WRONG),
    ("an output too many", "if (inside && at1 + inner.step < p.inner.target)", "if (inside)",
     of("last, odd channels"), None),
    ("a row too many", "group * CV < channels && at0 < p.outer.target", "group * CV < channels", image, None),
    ("a phase for another", "return {inner_phase + inner0 * p.inner.step,", "return {inner0 * p.inner.step,",
     of("last, dilated"), None),
    ("phases in the place of one", "+ column * inner.step + (PHASED ? at0 : 0);\n        const bool",
     "+ column * inner.step;\n        const bool", many_phases, WRONG),
    ("taps not reversed", "(r * K + k) * p.tap_step + c0", "(r * K + k) * p.channels + c0", of("last, transposed"),
     None),
    ("the bias of another channel", "const float bias = bs[c];", "const float bias = bs[0];", last, WRONG),
]  # fmt: skip


QUICK_PLANTS = ("no barrier before the products", "leaks are kept")


@emulated
@pytest.mark.parametrize(
    "name, right, wrong, run, caught",
    [
        pytest.param(*plant, id=plant[0], marks=[] if plant[0] in QUICK_PLANTS else [pytest.mark.exhaustive])
        for plant in PLANTS
    ],
)
def test_planted_bug_is_caught(name, right, wrong, run, caught):
    own = right in (kernel_directory() / "depthwise_toeplitz.cu").read_text()
    with planted("depthwise_toeplitz.cu" if own else "depthwise_tiles.cuh", right, wrong):
        found = what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1, timeout=5.0))
    assert caught in found if caught else found, found


@emulated
@pytest.mark.exhaustive
def test_without_a_bug_nothing_is_caught():
    for run in {plant[3] for plant in PLANTS}:
        assert what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1)) == set()


@emulated
@pytest.mark.exhaustive
def test_bank_conflicts_are_seen():
    right, errors = "CHANNELS_FIRST ? 0 : larger(8, 64 / GROUPS)", (AssertionError, emulator.EmulationError)
    with planted("depthwise_toeplitz.cu", right, "0 * GROUPS"), pytest.raises(errors):
        test_no_bank_conflicts_and_no_sector_too_many("last")


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("data_format", ["channels_last", FIRST])
def test_narrow_indices_on_a_large_array_are_caught(data_format):
    assert what_catches(lambda runtime: end_of_a_large_array(runtime, data_format, 4), EmulatedRuntime(LIMITS))
