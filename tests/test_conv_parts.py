"""Convolutions whose K is split: parts and their end, on the CPU against the oracle, and when they are planned."""

import dataclasses
from contextlib import contextmanager
from unittest import mock

import emulator
import pytest
from emulated import EmulatedRuntime
from planted import WRONG, planted, what_catches
from test_conv_kernels import LIMITS, Case, forget_plans, trace

from cuconv.geometry import conv_shape
from cuconv.plan import conv as conv_plans
from cuconv.plan.conv import plan_conv, plan_conv_parts
from cuconv.plan.devices import DEVICES
from cuconv.plan.transpose import plan_transpose
from cuconv.plan.types import ELEMENTS, PlanError

emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

WORKSPACE = 64 << 20


@contextmanager
def parts(*most):
    """K is split into as many parts as there are steps, at most `most`, whatever that takes, by kernels of warps."""
    with (
        mock.patch.object(conv_plans, "plan_wgmma", side_effect=PlanError("warps alone")),
        mock.patch.object(conv_plans, "PARTS", most),
        mock.patch.object(conv_plans, "_gains", return_value=True),
        mock.patch.object(conv_plans, "_is_better", return_value=True),
    ):
        forget_plans()
        yield
    forget_plans()


def kernels(runtime):
    return [plan.kernel for plan in runtime.launches]


LAST, FIRST = {"padding": "same"}, {"padding": "same", "data_format": "channels_first"}
CASES = [
    # x, w, dtype, options, parts, kernel: the last part is shorter, ends inside a step, inside a tap.
    ((2, 21, 136), (5, 136, 72), "bfloat16", LAST, 2, "conv_halo"),
    ((1, 9, 11, 16), (3, 3, 16, 8), "float16", LAST, 2, "conv_halo"),
    ((2, 21, 20), (5, 20, 12), "bfloat16", LAST, 2, "conv_mma"),
    ((2, 24, 21), (5, 24, 10), "float16", FIRST, 2, "conv_mma"),
    ((1, 128, 21), (3, 128, 40), "float16", FIRST, 2, "conv_mma"),
    ((2, 21, 20), (3, 10, 12), "float32", {**LAST, "groups": 2}, 3, "conv_simt"),
    ((2, 9, 21), (3, 9, 5), "complex64", FIRST, 2, "conv_simt"),
    ((1, 21, 7), (4, 7, 6), "float64", {"strides": 2}, 32, "conv_simt"),
]


def case_of(index):
    """One of each kernel always, the others in the full list."""
    *_, kernel = case = CASES[index]
    marks = [] if index in (0, 2, 5) else [pytest.mark.exhaustive]
    return pytest.param(*case, id=f"{kernel} {case[2]} {index}", marks=marks)


@emulated
@pytest.mark.parametrize("x, w, dtype, options, most, kernel", list(map(case_of, range(len(CASES)))))
def test_parts_and_their_end(x, w, dtype, options, most, kernel):
    """Both passes, with a bias and an activation that come once, behind the sum of all parts."""
    case = Case(x, w, dtype, **options)
    activation = None if ELEMENTS[dtype].is_complex else "relu"
    with parts(most):
        runtime = trace()
        case.check_forward(runtime, activation)
        assert kernels(runtime) == [kernel, "conv_reduce"]
        splits = runtime.launches[1].integers[0]
        assert 1 < splits <= most
        case.check_forward(trace(), activation, bias=False)
        runtime = trace()
        case.check_input_grad(runtime)
        assert "conv_reduce" in kernels(runtime) or case.shape.strides != (1,)


@emulated
def test_sub_pixel_form_in_parts():
    """Columns are phases; outputs that are cropped have no partial sums."""
    case = Case((1, 39, 24), (8, 24, 64), "float16", strides=4, padding=(2, 3))
    with parts(2):
        runtime = trace()
        case.check_input_grad(runtime)
    assert kernels(runtime)[0] == "pack_weights" and kernels(runtime)[2:] == ["conv_reduce"]


@emulated
@pytest.mark.parametrize("workspace, splits", [(1 << 20, 4), (3 * 42 * 8 * 4, 3), (42 * 8 * 4, 1), (0, 1)])
def test_partial_sums_stay_within_the_workspace(workspace, splits):
    case = Case((2, 21, 256), (3, 256, 8), "bfloat16", padding="same")
    case.workspace = workspace
    with parts(2, 3, 4):
        runtime = trace()
        case.check_forward(runtime)
    assert len(runtime.launches) == (1 if splits == 1 else 2)
    if splits > 1:
        assert runtime.launches[1].integers[0] <= splits
        assert runtime.launches[1].integers[0] * runtime.launches[1].integers[1] * 4 <= workspace


@emulated
def test_the_same_bits_in_any_order_of_blocks():
    case = Case((1, 33, 128), (3, 128, 16), "bfloat16", padding="same")
    with parts(6):
        results = {case.forward(EmulatedRuntime(LIMITS, seed=seed)).tobytes() for seed in range(4)}
    assert len(results) == 1


@emulated
def test_indices_beyond_32_bits_are_planned():
    """So many partial sums that they need wide indices, though y does not."""
    shape = conv_shape((1, 2**27, 16), (3, 16, 8), padding="same")
    form = conv_plans.Form(shape, 8, 48, 8, 8, (3,), 1)
    assert conv_plans.plan_form(form, "bfloat16", "linear", (0, 0, 0), LIMITS).index_bytes == 8
    small = dataclasses.replace(shape, in_size=(2**25,), out_size=(2**25,))
    form = dataclasses.replace(form, shape=small)
    assert conv_plans.plan_form(form, "bfloat16", "linear", (0, 0, 0), LIMITS).index_bytes == 4
    assert conv_plans.plan_by_warps(form, "bfloat16", "linear", (0, 0, 0), LIMITS, most=12).index_bytes == 8


# --- When --------------------------------------------------------------------------------------------------------


def test_a_full_device_is_left_alone():
    shape = conv_shape((64, 2048, 128), (3, 128, 128), padding="same")
    assert plan_conv_parts(shape, "bfloat16", "relu", (0, 0, 0), WORKSPACE, LIMITS) is None


@pytest.mark.parametrize("device", ["T4", "A100", "RTX 4090", "H200", "B200"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_sequence_of_many_channels_is_split(dtype, device):
    """Predicted to be faster with both launches and their bytes counted, and said so."""
    shape = conv_shape((1, 256, 2048), (3, 2048, 512), padding="same")
    limits = DEVICES[device]
    whole = plan_conv(shape, dtype, "relu", (0, 0, 0), limits)
    split = plan_conv_parts(shape, dtype, "relu", (0, 0, 0), WORKSPACE, limits)
    assert whole.grid[0] < 2 * limits.multiprocessors and split is not None
    splits, count = split.reduce.integers[:2]
    assert split.partial == splits * count == splits * 256 * 512
    assert split.seconds < whole.cost.seconds
    assert f"{splits} parts of k" in split.conv.reason and "in one part" in " ".join(split.conv.rejected)
    assert plan_conv_parts(shape, dtype, "relu", (0, 0, 0), 0, limits) is None


def test_transposed_convolutions_are_split_where_one_launch_makes_all_outputs():
    merged = conv_shape((1, 512, 64), (8, 64, 2048), strides=4, padding="same")
    assert plan_transpose(merged, "bfloat16", "linear", (0, 0, 0), LIMITS, workspace=WORKSPACE).partial
    assert not plan_transpose(merged, "bfloat16", "linear", (0, 0, 0), LIMITS).partial
    phases = conv_shape((1, 512, 64), (8, 64, 2048), strides=4, dilation_rate=3, padding="same")
    plan = plan_transpose(phases, "bfloat16", "linear", (0, 0, 0), LIMITS, workspace=WORKSPACE)
    assert len(plan.parts) > 1 and not plan.partial


# --- Planted -----------------------------------------------------------------------------------------------------


def ended(runtime):
    with parts(3):
        Case((2, 21, 136), (5, 136, 24), "bfloat16", padding="same").check_forward(runtime, "relu")


def first(runtime):
    with parts(3):
        Case((2, 24, 21), (5, 24, 10), "float16", padding="same", data_format="channels_first").check_forward(runtime)


def ordinary(runtime):
    with parts(3):
        Case((2, 21, 20), (3, 20, 12), "float32", padding="same").check_forward(runtime)


PLANTS = [
    ("parts.cuh", "s * count + i", "s * count", ended, WRONG),
    ("conv_reduce.cu", "if (i >= p.count) return;", "", first, "bounds"),
    ("conv_reduce.cu", "[(i + v) / p.inner % p.filters]", "[i / p.inner % p.filters]", ended, WRONG),
    ("conv_reduce.cu", "[(i + v) / p.inner % p.filters]", "[(i + v) % p.filters]", first, WRONG),
    ("conv_mma.cuh", "  y += part * p.total;\n", "", ended, "race"),
    ("conv_halo.cu", "  first = part * p.chunk;\n", "", ended, WRONG),
    ("conv_mma.cu", "  first = part * p.chunk;\n", "", first, WRONG),
    ("conv_mma.cu", "(first + w_row) * p.w_pitch", "w_row * p.w_pitch", first, WRONG),
    ("conv_simt.cu", "  k0 = part * p.chunk;\n", "", ordinary, WRONG),
    ("conv_simt.cu", "  y += part * p.total;\n", "", ordinary, "race"),
]  # fmt: skip


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("file, right, wrong, run, caught", PLANTS)
def test_planted_bug_is_caught(file, right, wrong, run, caught):
    with planted(file, right, wrong):
        found = what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1, timeout=10.0))
    assert caught in found, found


@emulated
@pytest.mark.exhaustive
def test_without_a_bug_nothing_is_caught():
    for run in (ended, first, ordinary):
        assert what_catches(run, trace()) == set()
