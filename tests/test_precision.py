"""float32 on tensor cores: how exact, with which numbers, and that what the caller asks for is what plans are made for.

Three products of TF32 are measured against sums in float64, beside the ordinary units, in the emulator, whose tensor
cores cut off what they add as those of sm_80 do. TF32 itself is held to float32's error on rounded inputs by the tests
of each kernel, and here to its own bound.
"""

import functools
import inspect

import emulator
import numpy as np
import pytest
import test_kernel_grad_mma as kernel_grads
from emulated import EmulatedRuntime
from planted import planted
from strategies import uniform
from test_conv_kernels import Case, only

from cuconv import ops, reference
from cuconv.cuda.engine import Engine
from cuconv.cuda.tape import Recorder
from cuconv.geometry import conv_shape
from cuconv.plan import mma
from cuconv.plan.conv import plan_conv, plan_kernel_grad
from cuconv.plan.devices import DEVICES
from cuconv.plan.transpose import plan_transpose

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

TENSOR, ORDINARY = (64, 64, 32, 32, 64, 4), (32, 32, 4, 4)  # tiles
A100 = DEVICES["A100"]

# --- Exactness ---------------------------------------------------------------------------------------------------


def over_magnitudes(rng, shape) -> np.ndarray:
    """Numbers of both signs between 1e-6 and 1e6, as many in every decade."""
    return (rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(-6, 6, shape)).astype(np.float32)


NUMBERS = {
    "of both signs": lambda rng, shape: rng.uniform(-1, 1, shape).astype(np.float32),
    "positive": lambda rng, shape: rng.uniform(0, 1, shape).astype(np.float32),
    "of all magnitudes": over_magnitudes,
}


@functools.cache
def errors(numbers: str, depth: int, tile, gradient: bool = False, seeds: int = 4) -> tuple[float, float]:
    """Of sums of `depth` products: the largest error and the root mean square, in 2**-23 of the sum of their sizes."""
    off = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        case = Case((1, depth, 32), (1, 32, 64)) if gradient else Case((1, 64, depth), (1, depth, 32))
        case.workspace = 0  # no parts
        case.x, case.w, case.dy = (NUMBERS[numbers](rng, each.shape) for each in (case.x, case.w, case.dy))
        x, y = (each.astype(np.float64) for each in (case.x[0], case.dy[0] if gradient else case.w[0]))
        x = x.T if gradient else x
        runtime = EmulatedRuntime(A100)
        if gradient and len(tile) == 6:
            with kernel_grads.on_tensor_cores(tile[:4], precision=3):
                actual = case.kernel_grad(runtime)
        else:
            with only("float32", tile):
                actual = case.kernel_grad(runtime) if gradient else case.forward(runtime, bias=False)
        off.append(np.abs(actual[0] - x @ y) / (abs(x) @ abs(y)) * 2**23)
    return float(np.max(off)), float(np.sqrt(np.mean(np.square(off))))


@pytest.mark.parametrize("gradient", [False, True], ids=["conv", "kernel gradient"])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_three_products_are_no_less_exact_than_the_ordinary_units(numbers, gradient, record_property):
    """From the least depth on that plans take them for."""
    for depth in (mma.LEAST_DEPTH, 3 * mma.LEAST_DEPTH + 40):
        three, one = (errors(numbers, depth, tile, gradient) for tile in (TENSOR, ORDINARY))
        record_property(f"{depth}", (three, one))
        assert three[0] <= one[0] and three[1] <= one[1], (depth, three, one)


@pytest.mark.exhaustive
@pytest.mark.parametrize("gradient", [False, True], ids=["conv", "kernel gradient"])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_at_many_depths(numbers, gradient):
    for depth in (300, 512, 1024, 2000, 4096):
        three, one = (errors(numbers, depth, tile, gradient, seeds=2) for tile in (TENSOR, ORDINARY))
        assert three[0] <= one[0] and three[1] <= one[1], (depth, three, one)


def test_few_products_are_what_the_ordinary_units_are_for():
    """Or the least depth could be less: one product that is three is further off than one that is rounded once."""
    assert errors("of all magnitudes", 64, TENSOR)[1] > errors("of all magnitudes", 64, ORDINARY)[1]
    assert errors("of both signs", 8, TENSOR)[0] > errors("of both signs", 8, ORDINARY)[0]


def test_tf32_is_off_by_its_rounding():
    """Both factors by 2**-11 of themselves at most, and far more than float32 is."""
    case = Case((1, 64, 96), (1, 96, 32))
    case.precision = "high"
    with only("float32", TENSOR):
        actual = case.forward(EmulatedRuntime(A100), bias=False)
    x, w = case.x[0].astype(np.float64), case.w[0].astype(np.float64)
    off = np.abs(actual[0] - x @ w) / (abs(x) @ abs(w))
    assert 2.0**-16 < off.max() < 2 * 2.0**-11 + 2.0**-22 + 96 * 2.0**-23


# --- All numbers -------------------------------------------------------------------------------------------------

LARGEST = float(np.finfo(np.float32).max)
LEAST = 2.0**-149
ROUNDS_UP = float(np.float32(2.0**128 - 2.0**116))  # what is nearer to infinity than to the largest TF32

# One factor of x, one of w, and what their product and sums with others are.
SINGLE = {
    "largest": (LARGEST, 0.5),
    "least that would round to infinity": (ROUNDS_UP, 0.25),
    "largest, negative": (-LARGEST, 1.0),
    "subnormal": (2.0**-130 + 2.0**-140, 1.0),
    "least": (LEAST, 1.0),
    "least, of a large one": (LEAST, 2.0**100),
    "small and large": (2.0**-140, 2.0**126),
    "infinity": (np.inf, 0.3),
    "infinity, of all 24 bits": (np.inf, 1 / 3),
    "infinity, of a large one": (np.inf, -1e30),
    "two infinities": (np.inf, -np.inf),
    "NaN": (np.nan, 0.3),
    "infinity times zero": (np.inf, 0.0),
    "a product beyond all": (3e30 / 7, -1e20 / 3),
    "a product just beyond": (-(2.0**64) / 3, 2.0**66 / 3),
}


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("precision", ["high", "highest"])
def test_every_number(precision, kind):
    """One product among sums of others: finite, infinite and NaN where float32's is, and only there."""
    a, b = (float(np.float32(each)) for each in SINGLE[kind])
    case = Case((1, 40, 48), (1, 48, 36))
    case.precision = precision
    case.x, case.w = case.x * np.float32(2.0**-20), case.w * np.float32(2.0**-20)
    case.x[0, 7], case.w[0, :, 9] = 0, 0
    case.x[0, 7, 21], case.w[0, 21, 9] = a, b
    with only("float32", TENSOR):
        actual = case.forward(EmulatedRuntime(A100, mode="trace", seed=1), bias=False)[0]
    with np.errstate(all="ignore"):
        expected = np.float32(a) * np.float32(b)
        plain = case.x[0].astype(np.float64) @ case.w[0].astype(np.float64)
    got = actual[7, 9]
    if np.isnan(expected):
        assert np.isnan(got)
    elif np.isinf(expected):
        assert got == expected
    else:
        relative = 2.0**-10 if precision == "high" else 2.0**-20
        # What is left of a number, and a subnormal TF32, has few bits.
        assert abs(got - float(expected)) <= relative * abs(float(expected)) + 2.0**-136 * max(1.0, abs(b))
    rest = np.ones((40, 36), bool)
    rest[7], rest[:, 9] = False, False
    allowed = (2.0**-10 if precision == "high" else 2.0**-20) * 48 * 2.0**-40
    assert np.abs(actual[rest] - plain[rest]).max() < allowed
    if not np.isfinite(a):  # x meets all columns, and what they hold is not zero
        assert (np.isnan(actual[7]) if np.isnan(a) else np.isinf(actual[7]))[np.arange(36) != 9].all()


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_every_number_in_a_kernel_gradient(data_format):
    axes = "channels_last" if data_format == "channels_last" else "channels_first"
    for a, b in SINGLE.values():
        case = Case((1, 48, 24) if axes == "channels_last" else (1, 24, 48), (1, 24, 40), data_format=data_format)
        x, dy = (each if axes == "channels_last" else each.swapaxes(1, 2) for each in (case.x, case.dy))
        x[0, :, 5], dy[0, :, 9] = 0, 0
        x[0, 21, 5], dy[0, 21, 9] = a, b
        with kernel_grads.on_tensor_cores(kernel_grads.TILES[-1], precision=3):
            got = case.kernel_grad(EmulatedRuntime(A100))[0, 5, 9]
        with np.errstate(all="ignore"):
            expected = float(np.float32(a) * np.float32(b))
        off = 2.0**-20 * abs(expected) + 2.0**-136 * max(1.0, abs(b))
        same = np.isnan(got) if np.isnan(expected) else got == expected or abs(got - expected) <= off
        assert same, (a, b, got, expected)


# What is wrong in mma.cuh, and the test that fails by it.
PLANTS = {
    "rounded to infinity": ("< LEAST ? x + 0x1000 : x", "< 2 * LEAST ? x + 0x1000 : x", "largest"),
    "all numbers taken for ordinary": ("__all_sync(~0u, largest < ORDINARY)", "true", "largest"),
    "small products that say NaN": (
        "sum[e] = fminf(fmaxf(sum[e], -LARGEST), LARGEST)",
        "sum[e] += 0",
        "infinity, of all 24 bits",
    ),
    "half of them that say infinity": (
        "fminf(fmaxf(sum[e], -LARGEST), LARGEST)",
        "fmaxf(sum[e], -LARGEST)",
        "a product beyond all",
    ),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_of_numbers_is_caught(plant):
    right, wrong, kind = PLANTS[plant]
    with planted("mma.cuh", right, wrong), pytest.raises(AssertionError):
        test_every_number("highest", kind)


SUMS = {
    "no small products": ("ptx::multiply_tf32(sum, rest_a[q][i], b[q][j]);", "", "of all magnitudes"),
    "cut off, not rounded": ("(ALL_ORDINARY ? x[i] + 0x1000 : nearest_tf32(x[i]))", "x[i]", "of all magnitudes"),
    "one sum for all": (
        "float sum[4] = {};",
        "float sum[4]; for (int e = 0; e < 4; ++e) sum[e] = acc[i][j][e], acc[i][j][e] = 0;",
        "positive",
    ),
}


@pytest.mark.parametrize("plant", SUMS)
def test_a_planted_bug_of_exactness_is_caught(plant):
    right, wrong, numbers = SUMS[plant]
    with planted("mma.cuh", right, wrong):
        found = errors.__wrapped__(numbers, mma.LEAST_DEPTH, TENSOR, seeds=1)
    assert found[1] > errors(numbers, mma.LEAST_DEPTH, ORDINARY)[1]


# --- What plans are made for -------------------------------------------------------------------------------------

# Every operation that has a product of matrices, with a depth and a size for which tensor cores are chosen.
B, L, C, F = 8, 4096, 256, 256
CALLS = {
    "conv": ((B, L, C), (3, C, F)),
    "conv_input_grad": ((B, L - 2, F), (3, C, F), (B, L, C)),
    "conv_kernel_grad": ((B, L, C), (B, L - 2, F), (3, C, F)),
    "conv_transpose": ((B, L, C), (3, F, C)),
    "conv_transpose_input_grad": ((B, L + 2, F), (3, F, C), (B, L, C)),
    "conv_transpose_kernel_grad": ((B, L, C), (B, L + 2, F), (3, F, C)),
    "separable_conv": ((B, L, C), (3, C, 1), (1, C, F)),
    "separable_conv_input_grad": ((B, L - 2, F), (3, C, 1), (1, C, F), (B, L, C)),
    "separable_conv_kernel_grad": ((B, L, C), (B, L - 2, F), (3, C, 1), (1, C, F)),
}


def precisions(plans) -> list[int]:
    """PRECISION of every product of matrices; 32 stands for one on the ordinary units. conv_wgmma has TF32 alone."""
    kernels = ("conv_simt", "conv_mma", "conv_narrow", "conv_wgmma", "kernel_grad_simt", "kernel_grad_mma")
    found = [(plan.kernel, dict(plan.constants)) for plan in plans if plan.kernel in kernels]
    return [1 if kernel == "conv_wgmma" else constants.get("PRECISION", 32) for kernel, constants in found]


def test_every_operation_is_listed():
    taken = {each for each, call in ops._OPERATIONS.items() if "precision" in inspect.signature(call).parameters}
    assert taken - {each for each in taken if each.startswith("depthwise")} == set(CALLS)


@pytest.mark.parametrize("operation", CALLS)
def test_what_is_asked_for_reaches_every_plan(operation):
    """In any order of calls: whatever is kept of one must not be taken for the other."""
    for precision in ("highest", "high", "highest"):
        steps = ops.explain(operation, *CALLS[operation], device="H200", precision=precision).steps
        found = precisions(step.plan for step in steps if step.plan)
        assert found and set(found) == {1 if precision == "high" else 3}, (precision, found)
    default = ops.explain(operation, *CALLS[operation], device="H200").steps
    assert set(precisions(step.plan for step in default if step.plan)) == {3}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "complex64", "complex128"])
def test_it_matters_to_float32_only(dtype):
    for operation, shapes in CALLS.items():
        told = [
            [step.plan for step in ops.explain(operation, *shapes, dtype=dtype, device="H200", precision=each).steps]
            for each in ("high", "highest")
        ]
        assert told[0] == told[1]


@pytest.mark.parametrize("function", [each for each in reference.__all__ if each != "empty"])
def test_both_places_take_the_same_arguments(function):
    engine = Engine(Recorder(A100))
    ours, theirs = (
        {each.name: each.default for each in inspect.signature(getattr(place, function)).parameters.values()}
        for place in (engine, reference)
    )
    assert ours == theirs


def test_the_cpu_takes_every_precision_and_computes_the_same():
    rng = np.random.default_rng(0)
    arrays = {
        "conv": ((1, 20, 5), (3, 5, 4)),
        "conv_transpose": ((1, 20, 5), (3, 4, 5)),
        "separable_conv": ((1, 20, 5), (3, 5, 1), (1, 5, 4)),
    }
    for operation, shapes in arrays.items():
        given = [uniform(rng, shape, "float32") for shape in shapes]
        low, high = (getattr(ops, operation)(*given, precision=each) for each in ("high", "highest"))
        assert np.array_equal(low, high)
        with pytest.raises(ValueError, match="`precision` must be"):
            getattr(ops, operation)(*given, precision="low")


def conv_of(depth, **options):
    return conv_shape((8, 4096, depth), (1, depth, 256), **options)


@pytest.mark.parametrize("device", DEVICES)
def test_three_products_where_they_are_exact_and_fast(device):
    limits = DEVICES[device]
    three, one = 3 * mma.LEAST_DEPTH, mma.LEAST_DEPTH - 1
    plan = plan_conv(conv_of(three), "float32", "linear", (0, 0, 0), limits)
    fast = limits.tf32_rate > 4 * limits.fp32_rate
    assert precisions([plan]) == [3 if fast else 32]
    if not fast:
        assert any("tensor cores" in each for each in plan.rejected)
    plan = plan_conv(conv_of(one), "float32", "linear", (0, 0, 0), limits)
    assert precisions([plan]) == [32]
    told = f"less exact than the ordinary units for sums of {one} products, not from {mma.LEAST_DEPTH} on"
    assert any(told in each for each in plan.rejected) == bool(limits.tf32_rate)
    high = plan_conv(conv_of(one), "float32", "linear", (0, 0, 0), limits, "high")
    assert precisions([high]) == [1] or not fast
    double = plan_conv(conv_of(one), "float64", "linear", (0, 0, 0), limits)
    assert (double.kernel == "conv_mma") == (limits.dmma_rate > 0)


def test_parts_of_kernel_gradients_are_as_deep():
    """A part is a sum of its own, and that of the ordinary units may be a short one."""
    for positions in (mma.LEAST_DEPTH - 8, mma.LEAST_DEPTH, 20000, 200000):
        shape = conv_shape((1, positions, 256), (1, 256, 256))
        grad = plan_kernel_grad(shape, "float32", (0, 0, 0), 1 << 30, DEVICES["H200"]).grad
        assert precisions([grad]) in ([3], [32])
        if precisions([grad]) == [3]:
            assert min(grad.integers[:2]) >= mma.LEAST_DEPTH
    assert precisions([grad]) == [3]
    shape = conv_shape((1, mma.LEAST_DEPTH - 8, 512), (1, 512, 512))
    grad = plan_kernel_grad(shape, "float32", (0, 0, 0), 1 << 30, DEVICES["H200"]).grad
    assert any("less exact" in each for each in grad.rejected)


def test_phases_of_a_transposed_convolution_have_depths_of_their_own():
    shape = conv_shape((4, 4096, 256), (4, 256, 128), strides=2, padding="same")
    plans = [part.conv for part in plan_transpose(shape, "float32", "linear", (0, 0, 0), DEVICES["H200"]).parts]
    assert set(precisions(plans)) == {3}  # 2 taps of 128 filters
    shape = conv_shape((4, 4096, 256), (4, 256, 127), strides=2, padding="same")
    plans = [part.conv for part in plan_transpose(shape, "float32", "linear", (0, 0, 0), DEVICES["H200"]).parts]
    assert set(precisions(plans)) == {32}
