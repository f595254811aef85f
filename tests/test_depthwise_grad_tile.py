"""depthwise_grad_tile: its real PTX on the CPU against the oracle, its traffic, its machine code, its plans."""

import dataclasses
from contextlib import contextmanager
from unittest import mock

import disassembly
import emulator
import numpy as np
import oracle
import pytest
from compare import assert_close
from emulated import EmulatedRuntime
from planted import WRONG, planted, what_catches
from test_depthwise_kernels import FIRST, ONE, WORKSPACE, Case, forget_plans, needs_nvrtc, trace
from test_depthwise_toeplitz import some

from cuconv.cuda.runtime import kernel_directory
from cuconv.geometry import depthwise_shape
from cuconv.plan import depthwise_grad, depthwise_problem
from cuconv.plan.depthwise_grad import plan_depthwise_kernel_grad, plan_grad_tile
from cuconv.plan.depthwise_problem import problem_of
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import PlanError

emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
KERNEL = "depthwise_grad_tile"


@contextmanager
def only():
    """Kernel gradients of many taps take no other kernel."""
    forget_plans()
    try:
        with mock.patch.object(depthwise_grad, "_choose", plan_grad_tile):
            yield
    finally:
        forget_plans()


QUICK = {
    # Each with something of its own.
    "two groups of taps": Case((2, 70, 40), (31, 40, 1), padding="same"),
    "one group, 16 bit": Case((1, 150, 66), (16, 66, 1), "bfloat16", padding="causal"),
    "four groups, dilated": Case((2, 100, 6), (34, 6, 1), padding="same", dilation_rate=3),
    "odd channels": Case((1, 40, 37), (9, 37, 1), "float16", padding=((20, 3),)),
}


@emulated
@pytest.mark.parametrize("name", some(QUICK, ("two groups of taps", "four groups, dilated")))
def test_problem(name):
    """The gradients of kernel and bias, and of the kernel alone."""
    with only():
        runtime = trace()
        QUICK[name].check(runtime, "all")
        assert KERNEL in {plan.kernel for plan in runtime.launches}
        assert QUICK[name].check(trace(2), "dw") == KERNEL


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("taps", [1, 15, 17, 33, 64])
def test_every_number_of_taps(taps):
    with only():
        for length, padding in ((taps + 3, "valid"), (129, "causal")):
            case = Case((2, length, 64), (taps, 64, 1), padding=padding)
            assert case.check(trace(), "dw") == KERNEL


@emulated
@pytest.mark.exhaustive
def test_every_length_of_a_unit():
    """An output less than a unit, as many, one more."""
    for turns in depthwise_grad.TILED_TURNS:
        with mock.patch.object(depthwise_grad, "TILED_TURNS", (turns,)), only():
            for length in (32 * turns - 1, 32 * turns, 32 * turns + 1):
                runtime = trace()
                Case((1, length, 64), (31, 64, 1), padding="same").check(runtime, "dw")
                assert dict(runtime.launches[0].constants)["BP"] == 32 * turns


@emulated
def test_one_nan_reaches_the_taps_that_meet_it():
    """Though an output that does not exist would meet it with others."""
    for options, length in (({"padding": "valid"}, 45), ({"padding": "causal", "dilation_rate": 2}, 45)):
        for at in (0, 44):
            case = Case((1, length, 4), (12, 4, 1), **options)
            case.x[0, at, 1] = np.nan
            expected = oracle.depthwise_conv_kernel_grad(case.x, case.dy, case.w.shape, **options)
            with only():
                actual = case.dw(EmulatedRuntime(ONE))
            assert np.array_equal(np.isnan(actual), np.isnan(expected)), (options, at)


@emulated
def test_the_same_bits_in_any_order_of_blocks_and_threads():
    limits = dataclasses.replace(ONE, multiprocessors=4)
    with only():
        case = QUICK["two groups of taps"]
        assert len({case.dw(EmulatedRuntime(limits, seed=seed)).tobytes() for seed in range(3)}) == 1


@emulated
@pytest.mark.exhaustive
def test_wide_indices_give_the_same_bits(monkeypatch):
    case = QUICK["four groups, dilated"]
    with only():
        narrow = case.dw(EmulatedRuntime(ONE))
        monkeypatch.setattr(depthwise_problem, "index_bytes", lambda *_: 8)
        forget_plans()
        runtime = EmulatedRuntime(ONE)
        assert case.dw(runtime).tobytes() == narrow.tobytes() and runtime.launches[0].index_bytes == 8


# --- Plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x_shape, w_shape, dtype, options, reason",
    [
        ((2, 9, 9, 16), (3, 3, 16, 1), "float32", {}, "only sequences"),
        ((2, 16, 90), (31, 16, 1), "float32", {"data_format": FIRST}, "channels last"),
        ((2, 90, 16), (31, 16, 1), "float32", {"strides": 2}, "stride 1"),
        ((2, 90, 16), (31, 16, 2), "float32", {}, "multiplier"),
        ((2, 90, 16), (31, 16, 1), "float64", {}, "sums of float32"),
        ((2, 900, 16), (65, 16, 1), "float32", {}, "at most 64"),
    ],
)
def test_what_it_does_not_compute(x_shape, w_shape, dtype, options, reason):
    problem = problem_of(depthwise_shape(x_shape, w_shape, **options), dtype, DEVICES["H200"])
    with pytest.raises(PlanError, match=reason):
        plan_grad_tile(problem, (0, 0), WORKSPACE)


CONFORMER = depthwise_shape((32, 1000, 512), (31, 512, 1), padding="same")


@pytest.mark.parametrize("device, least", [("H200", 40), ("A100", 65)])
def test_predicted_share_of_the_roof(device, least):
    limits = DEVICES[device]
    launch = plan_depthwise_kernel_grad(CONFORMER, "bfloat16", (0,) * 4, WORKSPACE, limits).launch
    assert launch.kernel == KERNEL
    assert any(other.startswith("depthwise_grad: ") and "us predicted" in other for other in launch.rejected)
    roof = max(launch.cost.least_bytes / limits.bandwidth, launch.cost.least_flops / limits.fp32_rate)
    assert least <= 100 * roof / launch.cost.seconds <= 100, launch


# --- Traffic and machine code ------------------------------------------------------------------------------------


@emulated
def test_no_bank_conflicts_and_no_sector_too_many():
    case = Case((1, 256, 64), (31, 64, 1), padding="same")
    with only():
        runtime = EmulatedRuntime(ONE, mode="trace", seed=1)
        case.check(runtime, "dw")
    for each in runtime.results[0].traffic:
        assert each.space != "shared" or not each.bank_conflicts, each
        assert each.space != "global" or each.sectors == each.least_sectors, each


@needs_nvrtc
@pytest.mark.parametrize("arch", [pytest.param(a, marks=pytest.mark.exhaustive) for a in ("sm_75", "sm_90", "sm_120")])
def test_machine_code(arch):
    limits = next(each for each in DEVICES.values() if each.arch == arch)
    for dtype, least in (("float32", 0.8), ("bfloat16", 0.7)):
        plan, _ = plan_grad_tile(problem_of(CONFORMER, dtype, limits), (0, 0), WORKSPACE)
        path = kernel_directory() / f"{KERNEL}.cu"
        for index in ("int", "long long"):
            constants = {**dict(plan.constants), "INDEX": index}
            function = disassembly.functions(emulator.compile_cubin(path, arch, constants))[KERNEL]
            assert function.stack_bytes == 0 and function.spills == 0, (plan, index)
        if disassembly.missing():
            pytest.skip(disassembly.missing())
        loop = max((each for each in function.loops if each.innermost), key=lambda each: each.count("FFMA"))
        assert loop.share("FFMA", "FFMA2") >= least, loop.mix()
        assert not loop.count("LDG")


# --- Planted bugs ------------------------------------------------------------------------------------------------


def of(name):
    def run(runtime):
        with only():
            QUICK[name].check(runtime, "all")

    return run


def ignores(runtime):
    case = Case((1, 45, 4), (12, 4, 1))
    expected = oracle.depthwise_conv_kernel_grad(case.x, case.dy, case.w.shape)
    case.x[0, 44, 1] = np.nan
    with only():
        actual = case.dw(runtime)
    actual[-1], expected[-1] = 0, 0  # the tap that meets it
    assert_close(actual, expected, dtype="float32", terms=34)


two, four = of("two groups of taps"), of("four groups, dilated")
PLANTS = [
    ("inputs without zeros", "c < some && within(position, size)", "c < some", two, "bounds"),
    ("channels of the next tile", "c < some && within(position, size)", "within(position, size)", two, None),
    ("no barrier before a unit", "    __syncthreads();  // the unit before has been read\n", "", two, "race"),
    ("no barrier behind the stage", "p.channels, channels);\n    __syncthreads();\n", "p.channels, channels);\n", two,
     "race"),
    ("outputs that do not exist", "(WHOLE || i - r < outputs)", "true", ignores, WRONG),
    ("taps of another group", "(part * EACH + group * KC) * BC + c", "part * EACH * BC + c", two, WRONG),
    ("outputs of another part", "ys + part * EACH * BC + c", "ys + c", two, WRONG),
    ("a tap for its neighbour", "add_products(dw[r], input", "add_products(dw[KC - 1 - r], input", two, WRONG),
    ("a phase for another", "const Index at = phase + p0", "const Index at = p0", four, WRONG),
    ("taps beyond the last", "if (writes && tap < K)", "if (writes)", two, None),
    ("the bias of no group", "if (writes && group == 0)", "if (writes && group == 4)", two, None),
    ("the last unit of a split left out", "unit < end; ++unit", "unit < end - 1; ++unit", two, WRONG),
]  # fmt: skip
QUICK_PLANTS = ("outputs that do not exist",)


@emulated
@pytest.mark.parametrize(
    "name, right, wrong, run, caught",
    [
        pytest.param(*plant, id=plant[0], marks=[] if plant[0] in QUICK_PLANTS else [pytest.mark.exhaustive])
        for plant in PLANTS
    ],
)
def test_planted_bug_is_caught(name, right, wrong, run, caught):
    with planted(f"{KERNEL}.cu", right, wrong):
        found = what_catches(run, EmulatedRuntime(ONE, mode="trace", seed=1, timeout=5.0))
    assert caught in found if caught else found, found


@emulated
@pytest.mark.exhaustive
def test_without_a_bug_nothing_is_caught():
    for run in {plant[3] for plant in PLANTS}:
        assert what_catches(run, EmulatedRuntime(ONE, mode="trace", seed=1)) == set()
