"""Activations against scalar formulas in Python's math, gradients against finite differences, both against Keras."""

import copy
import math
import pickle
import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import pytest
from fake_device import DeviceArray
from live_keras import against_keras, live_keras

from cuconv import activations
from cuconv.activations import BLOCK

LAST_AXIS = ("softmax", "log_softmax", "sparsemax", "glu")
DTYPES = ("float16", "bfloat16", "float32", "float64")
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def eps(dtype):
    return float(ml_dtypes.finfo(dtype).eps)


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def exp(x):
    return math.exp(x) if x < 709 else math.inf


# Every pointwise activation for one Python float, written as in its definition.
FORMULAS = {
    "celu": lambda x: x if x > 0 else math.expm1(x),
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "exponential": exp,
    "gelu": lambda x: x * math.erfc(-x / math.sqrt(2)) / 2,
    "hard_shrink": lambda x: x if abs(x) > 0.5 else 0.0,
    "hard_sigmoid": lambda x: min(max(x + 3, 0), 6) / 6,
    "hard_silu": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "hard_tanh": lambda x: min(max(x, -1.0), 1.0),
    "leaky_relu": lambda x: x if x > 0 else 0.2 * x,
    "linear": lambda x: x,
    "log_sigmoid": lambda x: -softplus(-x),
    "mish": lambda x: x * math.tanh(softplus(x)),
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "selu": lambda x: SELU_SCALE * (x if x > 0 else SELU_ALPHA * math.expm1(x)),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "soft_shrink": lambda x: math.copysign(max(abs(x) - 0.5, 0.0), x),
    "softplus": softplus,
    "softsign": lambda x: x / (1 + abs(x)),
    "sparse_plus": lambda x: 0.0 if x <= -1 else x if x >= 1 else (x + 1) ** 2 / 4,
    "sparse_sigmoid": lambda x: 0.0 if x <= -1 else 1.0 if x >= 1 else (x + 1) / 2,
    "squareplus": lambda x: (x + math.hypot(x, 2)) / 2 if x > 0 else 2 / (math.hypot(x, 2) - x),
    "tanh": math.tanh,
    "tanh_shrink": lambda x: x - math.tanh(x),
}
# Where they are not twice differentiable, and the slope torch and so Keras take there.
KINKS = {
    "celu": {0.0: 1.0},
    "elu": {0.0: 1.0},
    "selu": {0.0: SELU_SCALE * SELU_ALPHA},
    "hard_shrink": {-0.5: 0.0, 0.5: 0.0},
    "soft_shrink": {-0.5: 0.0, 0.5: 0.0},
    "hard_sigmoid": {-3.0: 0.0, 3.0: 0.0},
    "hard_silu": {-3.0: 0.0, 3.0: 1.0},
    "hard_tanh": {-1.0: 0.0, 1.0: 0.0},
    "leaky_relu": {0.0: 0.2},
    "relu": {0.0: 0.0},
    "relu6": {0.0: 0.0, 6.0: 0.0},
    "softsign": {0.0: 1.0},
    "sparse_plus": {-1.0: 0.0, 1.0: 1.0},
    "sparse_sigmoid": {-1.0: 0.0, 1.0: 0.0},
}
POINTWISE = sorted(FORMULAS)
EVERY_NAME = sorted([*FORMULAS, *LAST_AXIS, "hard_swish", "swish", "threshold"])

EXTREMES = [-1e4, -700.0, -89.0, -30.0, -1e-3, -1e-6, -0.0, 1e-6, 1e-3, 17.0, 30.0, 89.0, 700.0, 1e4]
POINTS = np.concatenate(
    [
        np.linspace(-12, 12, 193),
        EXTREMES,
    ]
)


def rows(seed=0, shape=(3, 4, 8), scale=2.0):
    return np.random.default_rng(seed).normal(scale=scale, size=shape)


def sample(name, dtype="float64"):
    """An input that suits the activation."""
    return (POINTS if name in FORMULAS else rows()).astype(dtype_of(dtype))


def assert_near(actual, expected, *, dtype, ulps, floor=0.0):
    """Each element within `ulps` units in the last place of the expected value, or of `floor` if that is larger."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    same = actual == expected  # infinities
    with np.errstate(invalid="ignore"):
        off = np.abs(actual - expected)
    allowed = ulps * eps(dtype) * np.maximum(np.abs(expected), floor)
    wrong = ~(same | (off <= allowed))  # NaN is wrong
    assert not wrong.any(), list(
        zip(np.argwhere(wrong)[:5].tolist(), actual[wrong][:5], expected[wrong][:5], strict=True)
    )


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POINTWISE)
def test_value_is_the_formula(name, dtype):
    x = POINTS.astype(dtype_of(dtype))
    y = activations.get(name)(x)
    assert y.dtype == x.dtype
    with np.errstate(over="ignore"):
        expected = np.array([FORMULAS[name](v) for v in map(float, x)]).astype(x.dtype)
    # exp(89) is infinite in float32, so what would be 1e-37 is 0. exp(-x^2 / 2) is off by x^2 / 2 ulps, and
    # tanh_shrink cancels: absolute accuracy for those.
    negligible = {"float16": 0.0, "float64": 1e-305}.get(dtype, 1e-36)
    floor = max(negligible / eps(x.dtype), {"gelu": 0.01, "tanh_shrink": 1.0}.get(name, 0.0))
    assert_near(y, expected, dtype=x.dtype, ulps=1 if x.dtype.itemsize == 2 else 8, floor=floor)


SPOTS = {
    ("hard_sigmoid", -1.0): 1 / 3,
    ("hard_silu", -1.0): -1 / 3,
    ("selu", -1.0): -1.1113307,
    ("gelu", -1.0): -0.1586553,
    ("mish", -1.0): -0.3034015,
    ("squareplus", -1.0): 0.6180340,
    ("sparse_plus", -1.0): 0.0,
    ("sparse_sigmoid", -1.0): 0.0,
    ("sparse_plus", 0.5): 0.5625,
    ("sparse_sigmoid", 0.5): 0.75,
    ("hard_shrink", 0.5): 0.0,
    ("soft_shrink", 0.75): 0.25,
    ("leaky_relu", -1.0): -0.2,
}


@pytest.mark.parametrize(("name", "x"), SPOTS, ids=lambda value: str(value))
def test_spot_values(name, x):
    assert activations.get(name)(np.array([x]))[0] == pytest.approx(SPOTS[name, x], abs=5e-8)


def test_gelu_keeps_the_relative_accuracy_of_its_tail():
    x = -np.linspace(0, 5, 501)
    expected = [v * math.erfc(-v / math.sqrt(2)) / 2 for v in x]
    assert_near(activations.gelu(x), expected, dtype="float64", ulps=24)
    assert_near(activations.gelu(x.astype("float32")), expected, dtype="float32", ulps=32)


def simplex_projection(x):
    """sparsemax of one row by bisection for the threshold at which the row sums to 1."""
    low, high = max(x) - 1, max(x)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(max(v - middle, 0) for v in x) > 1:
            low = middle
        else:
            high = middle
    return [max(v - low, 0) for v in x]


def softmax(x):
    e = [math.exp(v - max(x)) for v in x]
    return [v / math.fsum(e) for v in e]


ROW_FORMULAS = {
    "softmax": softmax,
    "log_softmax": lambda x: [v - max(x) - math.log(math.fsum(math.exp(u - max(x)) for u in x)) for v in x],
    "sparsemax": simplex_projection,
    "glu": lambda x: [a * sigmoid(b) for a, b in zip(x[: len(x) // 2], x[len(x) // 2 :], strict=True)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4], ids="scale{}".format)
@pytest.mark.parametrize("name", LAST_AXIS)
def test_last_axis_value_is_the_formula(name, scale, dtype):
    x = rows(scale=scale).clip(-6e4, 6e4).astype(dtype_of(dtype))
    y = activations.get(name)(x)
    assert y.dtype == x.dtype
    expected = np.apply_along_axis(lambda row: ROW_FORMULAS[name](row.tolist()), -1, x.astype(np.float64))
    assert_near(y, expected, dtype=x.dtype, ulps=16, floor=1.0)


def test_sparsemax_sums_to_one_and_is_sparse():
    y = activations.sparsemax(np.array([[0.0, 0.5, 1.0], [0.1, 0.2, 5.0]]))
    np.testing.assert_allclose(y, [[0, 0.25, 0.75], [0, 0, 1]], rtol=0, atol=1e-15)


PARAMETERS = {
    "relu-slope": ("relu", {"negative_slope": 0.5}, [-1.0, 0.0, 1.0, 8.0], [-0.5, 0.0, 1.0, 8.0]),
    "relu-max": ("relu", {"max_value": 6}, [-1.0, 0.0, 1.0, 8.0], [0.0, 0.0, 1.0, 6.0]),
    "relu-threshold": ("relu", {"threshold": 1.0, "negative_slope": 0.5}, [-1.0, 0.5, 2.0], [-1.0, -0.25, 2.0]),
    "relu-all": (
        "relu",
        {"threshold": 1.0, "negative_slope": 0.5, "max_value": 3.0},
        [-1.0, 0.5, 2.0, 4.0],
        [-1.0, -0.25, 2.0, 3.0],
    ),
    "leaky_relu-steep": ("leaky_relu", {"negative_slope": 2.0}, [-1.0, 3.0], [-2.0, 3.0]),
    "leaky_relu-reversed": ("leaky_relu", {"negative_slope": -1.0}, [-1.0, 3.0], [1.0, 3.0]),
    "elu": ("elu", {"alpha": 2.0}, [-1.0, 3.0], [2 * math.expm1(-1), 3.0]),
    "celu": ("celu", {"alpha": 2.0}, [-1.0, 3.0], [2 * math.expm1(-0.5), 3.0]),
    "gelu-tanh": (
        "gelu",
        {"approximate": True},
        [-1.0, 2.0],
        [v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in (-1.0, 2.0)],
    ),
    "squareplus": ("squareplus", {"b": 9.0}, [-4.0, 4.0], [0.5, 4.5]),
    "hard_shrink": ("hard_shrink", {"threshold": 1.0}, [-2.0, 0.7], [-2.0, 0.0]),
    "soft_shrink": ("soft_shrink", {"threshold": 1.0}, [-2.0, 0.7], [-1.0, 0.0]),
    "threshold": ("threshold", {"threshold": 1.0, "default_value": -7.0}, [0.5, 1.0, 1.5], [-7.0, -7.0, 1.5]),
}


@pytest.mark.parametrize(("name", "parameters", "x", "expected"), PARAMETERS.values(), ids=PARAMETERS)
def test_keras_parameters(name, parameters, x, expected):
    activation, x = activations.get(name), np.array(x)
    np.testing.assert_allclose(activation(x, **parameters), expected, rtol=1e-14)
    h = 1e-6
    slope = (activation(x + h, **parameters) - activation(x - h, **parameters)) / (2 * h)
    smooth = ~np.isin(x, [parameters.get("threshold", 0.0)])
    np.testing.assert_allclose(
        activation.gradient(x, np.full_like(x, 3.0), **parameters)[smooth], 3 * slope[smooth], rtol=1e-8, atol=1e-8
    )


# ---- gradients -----------------------------------------------------------------------------------------------------


def finite_difference(formula, x):
    """Slope at x from central differences at two distances, so that the error is of fourth order."""
    h = 2e-4 * max(1.0, abs(x))
    coarse, fine = ((formula(x + d) - formula(x - d)) / (2 * d) for d in (h, h / 2))
    return (4 * fine - coarse) / 3


@pytest.mark.parametrize("name", POINTWISE)
def test_gradient_is_the_slope_of_the_formula(name):
    kinks = KINKS.get(name, {})
    x = np.array([v for v in POINTS if all(abs(v - kink) > 0.01 for kink in kinks)])
    if name == "exponential":
        x = x[x < 600]
    dy = np.random.default_rng(0).normal(size=x.shape)
    dx = activations.get(name).gradient(x, dy)
    expected = np.array([finite_difference(FORMULAS[name], v) for v in x.tolist()]) * dy
    np.testing.assert_allclose(dx, expected, rtol=1e-8, atol=2e-9)


@pytest.mark.parametrize("name", KINKS)
def test_gradient_at_a_kink(name):
    x, slopes = np.array(list(KINKS[name])), np.array(list(KINKS[name].values()))
    np.testing.assert_allclose(activations.get(name).gradient(x, np.full_like(x, 2.0)), 2 * slopes, rtol=1e-15)


def test_threshold_gradient_at_its_threshold():
    x = np.array([0.9, 1.0, 1.1])
    np.testing.assert_array_equal(activations.threshold.gradient(x, x, threshold=1.0, default_value=5.0), [0, 0, 1.1])


@pytest.mark.parametrize("name", LAST_AXIS)
def test_last_axis_gradient_is_the_finite_difference(name):
    x = rows(1, (3, 6), 0.8)
    activation = activations.get(name)
    dy = rows(2, activation(x).shape)
    expected = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = 1e-6
        expected[i] = np.sum((activation(x + step) - activation(x - step)) * dy) / 2e-6
    if name == "sparsemax":
        assert np.all(np.isin(np.count_nonzero(activation(x), axis=-1), [2, 3, 4, 5])), "keep several, drop some"
    np.testing.assert_allclose(activation.gradient(x, dy), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
@pytest.mark.parametrize("name", [*POINTWISE, *LAST_AXIS])
def test_gradient_in_other_dtypes(name, dtype):
    activation = activations.get(name)
    x = np.clip(sample(name), -9, 9).astype(dtype_of(dtype))
    dy = rows(3, activation(x).shape, 1.0).astype(x.dtype)
    dx = activation.gradient(x, dy)
    assert dx.dtype == x.dtype
    expected = activation.gradient(x.astype(np.float64), dy.astype(np.float64))
    assert_near(dx, expected, dtype=x.dtype, ulps=2 if x.dtype.itemsize == 2 else 16, floor=1.0)


# ---- extreme inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*POINTWISE, *LAST_AXIS])
def test_extreme_inputs_are_finite_and_silent(name, dtype):
    activation = activations.get(name)
    x = np.array([[-1e4, 1e4, -89.0, 89.0], [1e4, 1e4, 0.0, -0.0]]).astype(dtype_of(dtype))
    if name == "exponential":
        x = np.minimum(x, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = activation(x)
        dx = activation.gradient(x, np.ones_like(y))
    assert np.all(np.isfinite(y.astype(np.float64)))
    assert np.all(np.isfinite(dx.astype(np.float64)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gelu_beyond_the_range_of_its_tail(dtype):
    x = np.array([-np.inf, -1e30, 41.0, 1e30, np.inf], dtype)
    np.testing.assert_array_equal(activations.gelu(x), [0, 0, *x[2:]])
    np.testing.assert_array_equal(activations.gelu.gradient(x, np.ones_like(x)), [0, 0, 1, 1, 1])


def test_exponential_overflows_silently():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert activations.exponential(np.array([1e4])) == np.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POINTWISE)
def test_nan_stays_where_it_is(name, dtype):
    activation = activations.get(name)
    x = np.array([-2.0, np.nan, 0.25, 7.0, np.nan]).astype(dtype_of(dtype))
    np.testing.assert_array_equal(np.isnan(activation(x)), np.isnan(x))
    assert not np.any(activation.gradient(x, np.ones_like(x))[np.isnan(x)] == 0), "a NaN became a clean zero"
    clean = np.array([-2.0, 0.25, 7.0]).astype(x.dtype)
    assert np.all(np.isnan(activation.gradient(clean, np.full_like(clean, np.nan))))


@pytest.mark.parametrize("name", LAST_AXIS)
def test_nan_fills_its_row_only(name):
    activation = activations.get(name)
    x = rows(4, (3, 6))
    x[1, 1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = activation(x)
        dx = activation.gradient(x, np.ones_like(y))
    assert np.all(np.isnan(y[1])) if name != "glu" else np.isnan(y[1, 1])
    assert np.isnan(dx[1]).any()
    assert np.all(np.isfinite(y[[0, 2]])) and np.all(np.isfinite(dx[[0, 2]]))


# ---- memory --------------------------------------------------------------------------------------------------------


VIEWS = {
    "contiguous": lambda base: base,
    "strided": lambda base: base[::2, 1::2],
    "transposed": lambda base: base.T,
    # The channels of one position of a channels_first array: NumPy 2.4 negates such a view wrongly in place.
    "position": lambda base: np.moveaxis(base.reshape(1, 12, 2, 2), 1, -1)[:, :1, :1],
}


@pytest.mark.parametrize("layout", VIEWS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [*POINTWISE, "softmax", "log_softmax", "sparsemax"])
def test_in_place(name, dtype, layout):
    activation = activations.get(name)
    base = np.clip(rows(5, (6, 8)), -5, 5).astype(dtype_of(dtype))
    view = VIEWS[layout](base)
    expected, outside = activation(view.copy()), base.copy()
    assert activation(view, view) is view
    np.testing.assert_array_equal(view, expected)
    VIEWS[layout](outside)[...] = expected
    np.testing.assert_array_equal(base, outside)


@pytest.mark.parametrize("which", ["x", "dy"])
@pytest.mark.parametrize("name", [*POINTWISE, "softmax", "log_softmax", "sparsemax"])
def test_gradient_in_place(name, which):
    activation = activations.get(name)
    x, dy = np.clip(rows(6), -5, 5), rows(7)
    expected = activation.gradient(x, dy).copy()
    out = {"x": x, "dy": dy}[which]
    assert activation.gradient(x, dy, out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", [*POINTWISE, *LAST_AXIS])
def test_inputs_are_left_alone(name):
    activation = activations.get(name)
    x = sample(name)
    dy = np.ones_like(activation(x))
    before = x.copy()
    activation(x, out=np.empty_like(dy))
    activation.gradient(x, dy)
    np.testing.assert_array_equal(x, before)
    assert np.all(dy == 1)


LARGE = {
    "flat": (BLOCK + 3,),
    "batch": (5, BLOCK // 4, 2),
    "one-long-item": (1, BLOCK // 2 + 1, 4),
    "long-rows": (2, BLOCK + 2),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("name", ["relu", "silu", "hard_shrink", "softmax", "glu"])
def test_large_arrays_are_small_arrays_side_by_side(name, shape, dtype):
    activation = activations.get(name)
    if shape[-1] % 2:
        shape = (*shape[:-1], shape[-1] + 1)
    x = np.random.default_rng(8).normal(size=shape).astype(dtype_of(dtype))
    y = activation(x)
    dy = np.random.default_rng(9).normal(size=y.shape).astype(x.dtype)
    dx = activation.gradient(x, dy)
    at = (
        (slice(0, 1), slice(-7, None))
        if x.ndim > 2
        else (slice(-1, None), slice(None))
        if x.ndim > 1
        else slice(-8, None)
    )
    part = x[at] if x.ndim > 1 or activation.pointwise else x
    if part.size < x.size:
        np.testing.assert_array_equal(y[at], activation(part))
        np.testing.assert_array_equal(dx[at], activation.gradient(part, dy[at]))
    again = np.full_like(y, np.nan)
    assert activation(x, out=again) is again
    np.testing.assert_array_equal(again, y)


@pytest.mark.parametrize("name", ["gelu", "softmax"])
def test_temporaries_do_not_grow_with_the_array(name):
    activation, x = activations.get(name), np.ones((64, 256, 128), np.float32)  # 8 MB
    dy, out = np.ones_like(x), np.empty_like(x)
    tracemalloc.start()
    activation(x, out=out)
    activation.gradient(x, dy, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 2


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)], ids=str)
@pytest.mark.parametrize("name", [*POINTWISE, *LAST_AXIS])
def test_empty_batches_keep_their_shape(name, shape):
    activation = activations.get(name)
    x = np.zeros(shape, np.float32)
    y = activation(x)
    assert y.shape == ((*shape[:-1], 2) if name == "glu" else shape)
    assert activation.gradient(x, np.zeros_like(y)).shape == shape


@pytest.mark.parametrize("name", [*POINTWISE, *LAST_AXIS])
def test_arrays_of_another_library_go_through_the_protocols(name):
    activation = activations.get(name)
    x = np.clip(sample(name, "float32"), -80, 80)
    expected = activation(x)
    dy = np.random.default_rng(10).normal(size=expected.shape).astype(np.float32)
    y = activation(DeviceArray(x))
    assert isinstance(y, DeviceArray)
    np.testing.assert_array_equal(y.host, expected)
    out = DeviceArray(np.zeros_like(expected))
    assert activation(DeviceArray(x), out=out) is out
    np.testing.assert_array_equal(out.host, expected)
    np.testing.assert_array_equal(activation.gradient(DeviceArray(x), DeviceArray(dy)).host, activation.gradient(x, dy))
    half = activation(DeviceArray(x.astype(np.float16)))
    np.testing.assert_array_equal(half.host, activation(x.astype(np.float16)))


@pytest.mark.parametrize(("name", "parameters", "x", "expected"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_go_through_the_protocols(name, parameters, x, expected):
    activation, x = activations.get(name), np.array(x, np.float32)
    y = activation(DeviceArray(x), **parameters)
    np.testing.assert_array_equal(y.host, activation(x, **parameters))
    assert y.dtype == np.float32
    dx = activation.gradient(DeviceArray(x), DeviceArray(x), **parameters)
    np.testing.assert_array_equal(dx.host, activation.gradient(x, x, **parameters))
    assert dx.dtype == np.float32


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "int32", "bool"])
@pytest.mark.parametrize("name", [name for name in [*POINTWISE, *LAST_AXIS] if name != "linear"])
def test_dtypes_without_meaning(name, dtype):
    x = np.zeros((2, 4), dtype)
    with pytest.raises(TypeError, match=rf"{name} takes float16.* Received: x.dtype={dtype}"):
        activations.get(name)(x)
    with pytest.raises(TypeError, match="Received"):
        activations.get(name).gradient(x, x[..., :2] if name == "glu" else x)


def test_linear_takes_complex_arrays_and_hands_them_through():
    x, dy = np.array([1 + 2j]), np.array([3 - 1j])
    assert activations.linear(x) is x
    assert activations.linear.gradient(x, dy) is dy
    out = np.zeros_like(x)
    assert activations.linear(x, out=out) is out
    assert out[0] == 1 + 2j


def test_wrong_out():
    x = np.zeros((2, 3), np.float32)
    for name in ("relu", "linear", "softmax"):
        with pytest.raises(ValueError, match=r"`out` must have the shape \(2, 3\).*Received: out.shape=\(3,\)"):
            activations.get(name)(x, out=np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="`out`.*Received.*out.dtype=float64"):
            activations.get(name)(x, out=np.zeros((2, 3)))


def test_wrong_dy():
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match=r"`dy` must have the shape \(2, 2\). Received: dy.shape=\(2, 4\)"):
        activations.glu.gradient(x, x)
    with pytest.raises(TypeError, match="`dy` must have x's dtype. Received: dy.dtype=float64"):
        activations.relu.gradient(x, np.zeros((2, 4)))


def test_glu_needs_an_even_axis():
    with pytest.raises(ValueError, match=r"glu halves the last axis.*Received: x.shape=\(2, 3\)"):
        activations.glu(np.zeros((2, 3)))


def test_threshold_by_name_needs_arguments():
    activation, x = activations.get("threshold"), np.zeros(3)
    with pytest.raises(TypeError, match="threshold"):
        activation(x)
    with pytest.raises(TypeError, match="threshold"):
        activation.gradient(x, x)


@pytest.mark.parametrize("name", [name for name in POINTWISE if name != "linear"] + list(LAST_AXIS))
def test_unknown_parameters(name):
    with pytest.raises(TypeError, match="colour"):
        activations.get(name)(np.zeros((2, 4)), colour=1)


# ---- names and configs ---------------------------------------------------------------------------------------------


def doubled(x):
    return 2 * x


class Power:
    """A custom activation with a gradient and a config."""

    def __init__(self, exponent=2):
        self.exponent = exponent

    def __call__(self, x):
        return x**self.exponent

    def gradient(self, x, dy):
        return dy * self.exponent * x ** (self.exponent - 1)

    def get_config(self):
        return {"exponent": self.exponent}


@pytest.mark.parametrize("name", EVERY_NAME)
def test_every_name(name):
    activation = activations.get(name)
    assert activation is getattr(activations, name)
    expected = {"swish": "silu", "hard_swish": "hard_silu"}.get(name, name)
    assert activation.name == expected
    assert activations.serialize(activation) == activations.serialize(name) == expected
    assert activation.pointwise == (name not in LAST_AXIS)
    for config in (
        {"module": "keras.activations", "class_name": "function", "config": name, "registered_name": name},
        {"module": "builtins", "class_name": "function", "config": name, "registered_name": "function"},
        {"class_name": "function", "config": name},
        {"class_name": name, "config": {}},
    ):
        assert activations.get(config) is activation


def test_there_are_no_other_names():
    assert (
        sorted(name for name, value in vars(activations).items() if isinstance(value, activations.Activation))
        == EVERY_NAME
    )


def test_none_is_linear():
    assert activations.get(None) is activations.linear
    assert activations.serialize(None) == "linear"


@pytest.mark.parametrize(
    ("identifier", "message"),
    [
        ("ReLU", "Did you mean 'relu'.*Received: activation='ReLU'"),
        ("leakyrelu", "Did you mean 'leaky_relu'"),
        ("sigmiod", "Did you mean 'sigmoid'"),
        ("zzz", "Names: celu, .*Received: activation='zzz'"),
        (5, "`activation` must be None, a name.*Received: activation=5"),
        ({"class_name": "Swoosh", "config": {}, "module": "mine"}, "pass `custom_objects={'Swoosh'"),
        ({"class_name": "Power", "config": {}, "module": None}, "pass `custom_objects={'Power'"),
        ({"class_name": "relu", "config": {}, "module": "mine"}, "pass `custom_objects={'relu'"),
        ({"config": "relu"}, "must hold a string `class_name`"),
        ({"class_name": "function", "config": {}}, "must hold a string `class_name`"),
    ],
    ids=str,
)
def test_unknown_identifiers(identifier, message):
    with pytest.raises(ValueError, match=message):
        activations.get(identifier)


def test_a_custom_function():
    activation = activations.get(doubled)
    x = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(activation(x), 2 * x)
    assert activation(x, out=x) is x
    np.testing.assert_array_equal(x, [0, 2, 4])
    assert not activation.pointwise
    with pytest.raises(NotImplementedError, match="'doubled' is a callable without a gradient"):
        activation.gradient(x, x)
    assert activations.get(activation) is activation
    config = activations.serialize(activation)
    assert config == {
        "module": "builtins",
        "class_name": "function",
        "config": "doubled",
        "registered_name": "function",
    }
    assert activations.get(config, custom_objects={"doubled": doubled}).function is doubled
    assert activations.get("doubled", custom_objects={"doubled": doubled}).function is doubled
    with pytest.raises(ValueError, match="custom_objects"):
        activations.get(config)


def test_a_custom_object():
    activation = activations.get(Power(3))
    x, dy = np.array([1.0, 2.0]), np.array([1.0, 0.5])
    np.testing.assert_array_equal(activation(x), [1, 8])
    np.testing.assert_array_equal(activation.gradient(x, dy), [3, 6])
    config = activations.serialize(activation)
    assert config == {"module": __name__, "class_name": "Power", "config": {"exponent": 3}, "registered_name": "Power"}
    for spelling in (config, {"class_name": "mine>Power", "config": {"exponent": 3}, "registered_name": "mine>Power"}):
        assert activations.get(spelling, custom_objects={"Power": Power}).function.exponent == 3
    elsewhere = {"module": "mine", "class_name": "P", "config": {"exponent": 4}, "registered_name": "mine>Power"}
    assert activations.get(elsewhere, custom_objects={"mine>Power": Power}).function.exponent == 4
    assert activations.get(Power).function.exponent == 2


def test_a_custom_object_of_a_script_has_no_module():
    script = type("Script", (Power,), {"__module__": "__main__"})
    assert activations.serialize(script())["module"] is None


def test_a_custom_result_is_brought_to_the_inputs_dtype():
    x = np.ones(2, np.float32)
    assert activations.get(lambda x: x.astype(np.float64))(x).dtype == np.float32
    with pytest.raises(TypeError, match="`activation` must return an array. Received: "):
        activations.get(lambda x: 1.0)(x)


def test_a_lambda_cannot_be_saved():
    with pytest.raises(ValueError, match="named function"):
        activations.serialize(lambda x: x)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "deep", "pickle"]
)
def test_a_copy_of_a_built_in_is_the_built_in(copied):
    assert copied(activations.gelu) is activations.gelu
    assert copied(activations.get("swish")) is activations.silu
    assert copied(activations.get(doubled)).function is doubled


# ---- against Keras -------------------------------------------------------------------------------------------------


@against_keras
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in EVERY_NAME if name != "threshold"])
def test_value_and_gradient_are_keras(name, dtype):
    keras = live_keras()
    import torch

    x = sample(name, dtype)
    if name == "sparsemax":
        x = (
            x * 0 + np.eye(8, dtype=dtype)[:4] * 3
        )  # Keras 3.15.1 is wrong where more than one element is kept (its #23469)
    if name == "exponential":
        x = np.minimum(x, 80)
    theirs_x = torch.tensor(x, requires_grad=True)
    theirs = keras.activations.get(name)(theirs_x)
    dy = np.random.default_rng(11).normal(size=tuple(theirs.shape)).astype(dtype)
    theirs.backward(torch.tensor(dy))
    activation = activations.get(name)
    # torch rounds hard_sigmoid's 1/6 to float32, loses squareplus' negative tail, and cuts softplus at 20.
    unit = "float32" if name in ("hard_sigmoid", "log_sigmoid", "softplus") else dtype
    floor = 2e4 if name == "squareplus" else 1.0
    assert_near(activation(x), theirs.detach().numpy(), dtype=unit, ulps=8, floor=floor)
    assert_near(activation.gradient(x, dy), theirs_x.grad.numpy(), dtype=unit, ulps=16, floor=floor)


@against_keras
def test_names_are_keras():
    keras = live_keras()
    from keras.src import activations as source

    assert sorted(source.ALL_OBJECTS_DICT) == EVERY_NAME
    for name in EVERY_NAME:
        assert activations.serialize(activations.get(name)) == keras.activations.serialize(keras.activations.get(name))
    assert activations.serialize(doubled) == keras.activations.serialize(doubled)


@against_keras
@pytest.mark.parametrize("case", [case for case in PARAMETERS if case != "relu-all"])
def test_parameters_are_keras(case):
    keras = live_keras()
    name, parameters, x, _ = PARAMETERS[case]
    x = np.array([*x, -3.0, -0.4, 0.0, 0.4, 3.0])
    theirs = getattr(keras.activations, name)(keras.ops.convert_to_tensor(x), **parameters)
    np.testing.assert_allclose(activations.get(name)(x, **parameters), keras.ops.convert_to_numpy(theirs), rtol=1e-6)
