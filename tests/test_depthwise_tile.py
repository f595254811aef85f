"""depthwise_tile: its real PTX on the CPU against the oracle, its traffic, its machine code, its plans."""

import dataclasses
import math
from contextlib import contextmanager
from unittest import mock

import disassembly
import emulator
import numpy as np
import oracle
import pytest
import test_depthwise_toeplitz as toeplitz
from compare import assert_close
from emulated import EmulatedRuntime
from planted import WRONG, planted, what_catches
from test_depthwise_toeplitz import ALIGNED, FIRST, needs_nvrtc, phases_together, some, trace

from cuconv.cuda.runtime import kernel_directory
from cuconv.geometry import depthwise_shape
from cuconv.plan import depthwise as plans
from cuconv.plan import depthwise_problem, depthwise_tile
from cuconv.plan.depthwise_problem import problem_of
from cuconv.plan.depthwise_tile import plan_tile
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import PlanError

emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
LIMITS = DEVICES["H200"]


@contextmanager
def only(outputs=8, channels=32):
    """Plans find no other tile than this one."""
    with mock.patch.multiple(depthwise_tile, OUTPUTS=(outputs,), CHANNELS=(channels,)):
        yield


class Case(toeplitz.Case):
    """As of depthwise_toeplitz, in float32 where nothing else is said."""

    def __init__(self, size, taps, channels=32, dtype="float32", **options):
        super().__init__(size, taps, channels, dtype, **options)

    def plan(self, limits=LIMITS, activation="linear", aligned=ALIGNED):
        return plan_tile(problem_of(self.shape, self.dtype, limits, self.transposed), activation, aligned)


QUICK = {
    # Each with something of its own.
    "one axis": Case((150,), (31,), 40, padding="same"),  # two tiles, channels that fill no tile, a rest of taps
    "dilated": Case((70,), (16,), padding="causal", dilation_rate=3),
    "many phases": Case((90,), (11,), padding="causal", dilation_rate=10, transposed=True, batch=1),
    "transposed": Case((60,), (9,), padding="causal", dilation_rate=2, transposed=True),
    "odd channels": Case((40,), (11,), 13, padding=((50, 3),)),
    "two axes": Case((11, 38), (7, 7), padding="same", batch=1),
    "two axes, dilated": Case((17, 25), (3, 5), 8, padding="same", dilation_rate=(3, 2), transposed=True),
}


@emulated
@pytest.mark.parametrize("name", some(QUICK, ("one axis", "two axes")))
def test_problem(name):
    with only():
        QUICK[name].check(trace())


@emulated
def test_many_phases_fill_a_tile():
    with only(), phases_together(depthwise_tile):
        QUICK["many phases"].check(trace())
        Case((37,), (5,), 34, padding="same", dilation_rate=3, batch=1).check(trace(2))


@emulated
def test_16_bit():
    with only(8, 64):
        Case((70,), (12,), 66, "bfloat16", padding="same", batch=1).check(trace(), "relu")


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("channels", depthwise_tile.CHANNELS)
@pytest.mark.parametrize("outputs", depthwise_tile.OUTPUTS)
def test_every_tile(outputs, channels):
    """An output less than a tile, as many, one more, of one axis and of two; channels less, as many, more."""
    with only(outputs, channels):
        beyond = outputs // 4 % 3 - 1
        dtype = "float16" if channels == 64 and beyond >= 0 else "float32"
        tile = outputs * 128 * (1 if beyond < 0 else 2) // channels
        Case((tile + beyond,), (13,), channels + 2 * beyond, dtype, padding="same", batch=1).check(trace())
        Case((5, outputs + 1), (3, 9), channels, padding="same", batch=1).check(trace())


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("taps", [1, 8, 9, 17, 64])
def test_every_number_of_taps(taps):
    for padding, transposed in (("causal", True), (((3, 9),), False)):
        with only():
            Case((70 + taps,), (taps,), batch=1, padding=padding, transposed=transposed).check(trace())


@emulated
def test_tiny():
    with only():
        Case((3,), (9,), 2, padding=((30, 20),)).check(trace())  # outputs that read padding alone
        Case((1, 5), (5, 1), 3, padding="same").check(trace())


@emulated
@pytest.mark.parametrize("offset", some((1, 2), (1,)))
def test_arrays_that_begin_anywhere(offset):
    case = Case((40,), (9,), batch=1, padding="same")
    for name in ("x", "w", "bias"):
        array = getattr(case, name)
        view = np.full(array.size + 4, np.nan, array.dtype)[offset : offset + array.size].reshape(array.shape)
        view[...] = array
        setattr(case, name, view)
    runtime = trace()
    with only():
        case.check(runtime)
    assert dict(runtime.launches[0].constants)["XV"] == offset


@emulated
@pytest.mark.parametrize("name", some(("dilated", "two axes"), ("two axes",)))
def test_one_nan_reaches_exactly_what_reads_it(name):
    case = QUICK[name]
    clean, kept = case.expected(), case.x.copy()
    for at in ((0, *(n // 2 for n in case.shape.in_size), 5), (0, *(n - 1 for n in case.shape.in_size), 0)):
        case.x[at] = np.nan
        with only():
            y = case.run(EmulatedRuntime(LIMITS, seed=1))
        read = np.isnan(oracle.depthwise_conv(case.x, case.w, case.bias, **case.options))
        case.x[...] = kept
        assert np.array_equal(np.isnan(y), read)
        y[read] = clean[read]
        assert_close(y, clean, dtype="float32", terms=math.prod(case.shape.kernel_size))


@emulated
def test_the_same_bits_in_any_order_of_threads():
    with only():
        assert len({QUICK["two axes"].run(EmulatedRuntime(LIMITS, seed=seed)).tobytes() for seed in range(3)}) == 1


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["many phases", "two axes, dilated"])
def test_wide_indices_give_the_same_bits(monkeypatch, name):
    with only():
        narrow = QUICK[name].run(EmulatedRuntime(LIMITS))
        monkeypatch.setattr(depthwise_problem, "index_bytes", lambda *_: 8)
        runtime = EmulatedRuntime(LIMITS)
        assert QUICK[name].run(runtime).tobytes() == narrow.tobytes()
    assert runtime.launches[0].index_bytes == 8


@emulated
@pytest.mark.parametrize("device", ["T4", *(pytest.param(d, marks=pytest.mark.exhaustive) for d in ("A100", "B200"))])
def test_other_architectures(device):
    with only():
        Case((70,), (11,), batch=1, padding="same").check(trace(limits=DEVICES[device]))


@emulated
@pytest.mark.exhaustive
def test_indices_beyond_32_bits():
    """x has more than 2**31 elements; only the last block runs, on memory that exists where it is touched."""
    length = 2**26 + 72
    shape = depthwise_shape((1, length, 32), (11, 32, 1), padding="causal")
    x, y = (np.zeros(shape.x_shape, np.float32) for _ in range(2))
    x[0, -40:] = 1
    plan = plan_tile(problem_of(shape, "float32", LIMITS), "linear", ALIGNED)
    assert plan.index_bytes == 8
    runtime = EmulatedRuntime(LIMITS, blocks=lambda plan: [plan.grid[0] - 1])
    runtime.launch(plan, (x, np.ones((11, 32, 1), np.float32), None, y))
    assert (y[0, -20:, -1] == 11).all()


# --- Plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x_shape, w_shape, dtype, options, reason",
    [
        ((2, 16, 90), (31, 16, 1), "float32", {"data_format": FIRST}, "channels last"),
        ((2, 90, 16), (31, 16, 1), "float64", {}, "sums of float32"),
        ((2, 90, 16), (31, 16, 1), "float32", {"strides": 2}, "only stride 1"),
        ((2, 90, 16), (31, 16, 2), "float32", {}, "no multiplier"),
        ((2, 9, 9, 9, 16), (3, 3, 3, 16, 1), "float32", {}, "at most two axes"),
        ((2, 900, 16), (65, 16, 1), "float32", {}, "at most 64"),
    ],
)
def test_what_it_does_not_compute(x_shape, w_shape, dtype, options, reason):
    shape = depthwise_shape(x_shape, w_shape, **options)
    with pytest.raises(PlanError, match=reason):
        plan_tile(problem_of(shape, dtype, LIMITS), "linear", ALIGNED)
    plan = plans.plan_depthwise(shape, dtype, "linear", ALIGNED, LIMITS)
    assert any(reason in other for other in plan.rejected), plan.rejected


# With the least percent of the roof, of memory and multiply-adds, that the model may predict on H200, A100, RTX 4090.
CONFORMER = depthwise_shape((32, 1000, 512), (31, 512, 1), padding="same")
CONVNEXT = depthwise_shape((64, 56, 56, 96), (7, 7, 96, 1), padding="same")
LAYERS = {"Conformer": (CONFORMER, (70, 75, 80)), "ConvNeXt": (CONVNEXT, (50, 55, 65))}


@pytest.mark.parametrize("device, column", [("H200", 0), ("A100", 1), ("RTX 4090", 2)])
@pytest.mark.parametrize("name", LAYERS)
def test_predicted_share_of_the_roof(name, device, column):
    shape, least = LAYERS[name]
    limits = DEVICES[device]
    plan = plans.plan_depthwise(shape, "float32", "linear", ALIGNED, limits)
    roof = max(plan.cost.least_bytes / limits.bandwidth, plan.cost.least_flops / limits.fp32_rate)
    assert plan.kernel == "depthwise_tile"
    assert least[column] <= 100 * roof / plan.cost.seconds <= 100, plan
    assert any(other.startswith("depthwise: ") and "us predicted" in other for other in plan.rejected)


def test_dilation_costs_nothing():
    plan, dilated = (
        plan_tile(
            problem_of(
                depthwise_shape((8, 65536, 64), (31, 64, 1), padding="causal", dilation_rate=rate), "float32", LIMITS
            ),
            "linear",
            ALIGNED,
        )
        for rate in (1, 64)
    )
    assert dilated.cost.seconds <= 1.05 * plan.cost.seconds


# --- Traffic and machine code ------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("size, taps", [((256,), (16,)), pytest.param((16, 28), (7, 7), marks=pytest.mark.exhaustive)])
def test_no_bank_conflicts_and_no_sector_too_many(size, taps):
    case = Case(size, taps, 32, batch=1, padding="same")
    runtime = trace()
    with only(28 if len(size) == 2 else 16, 32):
        case.check(runtime, bias=False)
    for each in runtime.traffic:
        assert each.space != "shared" or not each.bank_conflicts, each
        assert each.space != "global" or each.sectors == each.least_sectors, each
    stores = [each for each in runtime.traffic if each.space == "global" and each.instruction.startswith("st")]
    assert sum(each.bytes for each in stores) == case.dy.nbytes


def function_of(plan, arch):
    path = kernel_directory() / "depthwise_tile.cu"
    return disassembly.functions(emulator.compile_cubin(path, arch, dict(plan.constants)))["depthwise_tile"]


@needs_nvrtc
@pytest.mark.parametrize(
    "arch",
    ["sm_90", *(pytest.param(a, marks=pytest.mark.exhaustive) for a in ("sm_75", "sm_120"))],
)
def test_machine_code(arch):
    limits = next(each for each in DEVICES.values() if each.arch == arch)
    for shape, outputs, least in ((CONFORMER, 32, 0.85), (CONVNEXT, 16, 0.8))[: 1 if arch == "sm_90" else 2]:
        with only(outputs, 32):
            plan = plan_tile(problem_of(shape, "float32", limits), "relu", ALIGNED)
        function = function_of(plan, arch)
        assert function.stack_bytes == 0 and function.spills == 0, plan
        if disassembly.missing():
            pytest.skip(disassembly.missing())
        loop = function.main_loop("FFMA", "FFMA2")
        assert loop.share("FFMA", "FFMA2") >= least, loop.mix()
        assert not loop.count("LDG") and loop.count("LDS", "64")


@needs_nvrtc
@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_no_variant_takes_a_stack(arch):
    """The most sums, wide indices, and an activation that takes registers."""
    limits = next(each for each in DEVICES.values() if each.arch == arch)
    for shape, dtype, activation in ((CONFORMER, "float32", "relu"), (CONFORMER, "float16", "mish")):
        plan = plan_tile(problem_of(shape, dtype, limits), activation, ALIGNED)
        for index in ("int", "long long"):
            constants = tuple((k, index if k == "INDEX" else v) for k, v in plan.constants)
            function = function_of(dataclasses.replace(plan, constants=constants), arch)
            assert function.stack_bytes == 0 and function.spills == 0, (index, plan)


# --- Planted bugs ------------------------------------------------------------------------------------------------


def of(name):
    def run(runtime):
        with only():
            QUICK[name].check(runtime)

    return run


one, two = of("one axis"), of("two axes")
PLANTS = [
    ("inputs without zeros", "within(at0, p.outer.source) && within(at1, p.inner.source);",
     "within(at0, p.outer.source);", one, "bounds"),
    ("rows without zeros", "within(at0, p.outer.source) && within(at1", "within(at1", two, "bounds"),
    ("channels of the next tile", "row < ROWS && c < tile.channels &&", "row < ROWS &&", one, None),
    ("a tile a column short", "COLUMNS = GW * TP + K - 1,", "COLUMNS = GW * TP + K - 2,", one, None),
    ("no barrier", "  __syncthreads();\n", "", one, "race"),
    ("the rest of the taps left out", "if constexpr (K % KC > 0) {", "if constexpr (false) {", of("odd channels"),
     WRONG),
    ("taps of the same row", "((row + r) * COLUMNS + column)", "(row * COLUMNS + column)", two, WRONG),
    ("a tap for its neighbour", "add_products(acc[i - r], xr, wr[r]);", "add_products(acc[i - r], xr, wr[N - 1 - r]);",
     one, WRONG),
    ("taps not reversed", "i / BC * p.tap_step", "i / BC * p.channels", of("transposed"), None),
    ("an output too many", "if (at1 >= p.inner.target) break;", "", of("odd channels"), None),
    ("a row too many", "|| at0 >= p.outer.target", "", two, "bounds"),
    ("channels too many", "if (c >= tile.channels ||", "if (", one, None),
    ("the bias of another channel", "value(p.bias + tile.c0 + c + v)", "value(p.bias + tile.c0 + c)", one, WRONG),
]  # fmt: skip
QUICK_PLANTS = ("no barrier",)


@emulated
@pytest.mark.parametrize(
    "name, right, wrong, run, caught",
    [
        pytest.param(*plant, id=plant[0], marks=[] if plant[0] in QUICK_PLANTS else [pytest.mark.exhaustive])
        for plant in PLANTS
    ],
)
def test_planted_bug_is_caught(name, right, wrong, run, caught):
    with planted("depthwise_tile.cu", right, wrong):
        found = what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1, timeout=5.0))
    assert caught in found if caught else found, found


@emulated
@pytest.mark.exhaustive
def test_without_a_bug_nothing_is_caught():
    for run in {plant[3] for plant in PLANTS}:
        assert what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1)) == set()
