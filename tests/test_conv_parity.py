"""`ops.conv` and its gradients against the oracle."""

from math import prod

import numpy as np
import oracle
import pytest
from compare import DTYPES, assert_close, assert_finite, is_complex
from hypothesis import assume, example, given
from hypothesis import strategies as st
from parity import assert_adjoint, assert_same_bits, check, unread, with_poison
from strategies import Problem, convolutions, examples

from cuconv import ops

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
wide_dtypes = pytest.mark.parametrize("dtype", ["float64", "complex128"])


def output_grad(problem: Problem, dtype: str, *arrays):
    """dy of the forward pass's shape, in the second layout of the problem."""
    y_shape = oracle.conv(np.zeros(problem.x_shape), np.zeros(problem.w_shape), **problem.options).shape
    *arrays, dy = problem.random(*arrays, y_shape, dtype=dtype)
    return *arrays, dy


def fan_in(problem: Problem) -> int:
    return prod(problem.w_shape[:-1])


@every_dtype
@examples(150)
@given(convolutions())
@example(Problem((2, 7, 3), (3, 3, 4)))
@example(Problem((2, 9, 3), (3, 3, 17), {"strides": 2, "padding": "causal"}, bias=True, workspace=1))
@example(Problem((3, 40, 2), (5, 2, 16), {"padding": "same"}, workspace=512))  # windows in blocks across the ends
@example(Problem((2, 12, 11, 3), (3, 5, 3, 4), {"padding": "same"}, workspace=512))  # tiles in blocks
@example(Problem((2, 12, 11, 4), (3, 2, 2, 6), {"groups": 2, "dilation_rate": (1, 3)}, workspace=512))
@example(Problem((2, 4, 40), (3, 2, 6), {"groups": 2, "data_format": "channels_first", "strides": 2}, workspace=512))
@example(Problem((2, 2, 1), (1, 1, 1), {"strides": 2, "padding": (0, 2)}))  # as long as the input, yet strided
def test_conv(dtype, problem):
    x, w, bias = problem.random(problem.x_shape, problem.w_shape, problem.w_shape[-1:], dtype=dtype)
    activation = None if is_complex(dtype) else problem.activation
    arrays = (x, w, bias) if problem.bias else (x, w)
    check("conv", problem, arrays, dtype=dtype, terms=fan_in(problem), activation=activation)


@every_dtype
@examples(120)
@given(convolutions())
@example(Problem((2, 30, 3), (4, 3, 17), {"strides": 3, "padding": "same"}, workspace=512))
@example(Problem((1, 30, 3), (4, 3, 2), {"padding": "causal", "dilation_rate": 4}, workspace=512))
@example(Problem((2, 3, 9, 8), (2, 3, 3, 2), {"strides": (3, 1), "data_format": "channels_first"}, workspace=512))
def test_conv_input_grad(dtype, problem):
    w, dy = output_grad(problem, dtype, problem.w_shape)
    terms = prod(problem.w_shape[:-2]) * problem.w_shape[-1] // problem.options.get("groups", 1)
    check("conv_input_grad", problem, (dy, w, problem.x_shape), dtype=dtype, terms=terms)


@every_dtype
@examples(120)
@given(convolutions())
@example(Problem((2, 30, 3), (4, 3, 17), {"strides": 3, "padding": "same"}, workspace=512))
@example(Problem((3, 9, 8, 4), (2, 3, 2, 6), {"padding": "same", "groups": 2}, workspace=512))
@example(Problem((3, 4, 9, 8), (2, 3, 2, 6), {"groups": 2, "data_format": "channels_first"}, workspace=512))
def test_conv_kernel_grad(dtype, problem):
    x, dy = output_grad(problem, dtype, problem.x_shape)
    terms = max(1, dy.size // problem.w_shape[-1])
    check("conv_kernel_grad", problem, (x, dy, problem.w_shape), dtype=dtype, terms=terms)


@every_dtype
@examples(40)
@given(convolutions())
def test_bias_grad(dtype, problem):
    (dy,) = output_grad(problem, dtype)
    data_format = problem.options.get("data_format")
    actual = ops.bias_grad(dy, data_format=data_format)
    expected = oracle.bias_grad(dy, data_format=data_format)
    assert_close(actual, expected, dtype=dtype, terms=max(1, dy.size // expected.size))


# --- Checks that need no oracle ----------------------------------------------------------------------------------


@wide_dtypes
@examples(80)
@given(convolutions())
def test_gradients_are_adjoint_to_the_convolution(dtype, problem):
    x, w, dy = output_grad(problem, dtype, problem.x_shape, problem.w_shape)
    y = ops.conv(x, w, **problem.options)
    dx = ops.conv_input_grad(dy, w, problem.x_shape, **problem.options)
    dw = ops.conv_kernel_grad(x, dy, problem.w_shape, **problem.options)
    assert_adjoint(dy, y, [(dx, x), (dw, w)])


@examples(40)
@given(convolutions())
def test_gradients_are_finite_differences(problem):
    """d/dh of sum(dy * conv(x + h*u, w + h*v)), which central differences give exactly: it is quadratic in h."""
    x, w, u, v, dy = output_grad(problem, "float64", *[problem.x_shape, problem.w_shape] * 2)

    def loss(h):
        return np.sum(dy * ops.conv(x + h * u, w + h * v, **problem.options))

    slope = loss(0.5) - loss(-0.5)
    dx = ops.conv_input_grad(dy, w, problem.x_shape, **problem.options)
    dw = ops.conv_kernel_grad(x, dy, problem.w_shape, **problem.options)
    along = np.sum(dx * u) + np.sum(dw * v)
    assert np.isfinite(along) and abs(slope - along) < 1e-12 * (1 + np.abs(dy).sum() * fan_in(problem))


@examples(120)
@given(convolutions())
@example(Problem((2, 9, 3), (1, 3, 16), {"strides": 3}))
@example(Problem((2, 9, 3), (2, 3, 16), {"strides": 3, "padding": "same"}))
@example(Problem((2, 9, 3), (2, 3, 4), {"dilation_rate": 3}))
@example(Problem((2, 9, 5, 3), (1, 2, 3, 4), {"strides": (3, 1)}))
def test_inputs_that_no_output_reads_do_not_matter(problem):
    """Positions between strided or dilated windows, and behind the last one, may hold NaN."""
    x, w, dy = output_grad(problem, "float32", problem.x_shape, problem.w_shape)
    sizes = oracle.spatial(problem.x_shape, problem.data_format)
    rules = {"strides": 1, "padding": "valid", "dilation_rate": 1, **problem.options}
    _, found = oracle.reads(sizes, problem.w_shape[:-2], *(rules[k] for k in ("strides", "padding", "dilation_rate")))
    never = unread(problem.x_shape, {i for _, _, i in found}, problem.data_format)
    assume(never.any())
    x = with_poison(x, never)
    check("conv", problem, (x, w), dtype="float32", terms=fan_in(problem))
    check("conv_kernel_grad", problem, (x, dy, problem.w_shape), dtype="float32", terms=dy.size // problem.w_shape[-1])


@examples(80)
@given(convolutions())
def test_one_nan_reaches_exactly_the_outputs_that_read_it(problem):
    x, w = problem.random(problem.x_shape, problem.w_shape, dtype="float32")
    assume(x.size)
    spot = np.unravel_index(problem.seed % x.size, x.shape)
    where = np.zeros(x.shape, bool)
    where[spot] = True
    x = with_poison(x, where)
    options = problem.options if problem.workspace is None else {**problem.options, "workspace": problem.workspace}
    assert np.array_equal(np.isnan(ops.conv(x, w, **options)), np.isnan(oracle.conv(x, w, **problem.options)))


@examples(80)
@given(convolutions(ranks=st.just(1), paddings=("causal",)))
def test_causal_outputs_do_not_see_the_future(problem):
    x, w = problem.random(problem.x_shape, problem.w_shape, dtype="float32")
    stride = problem.options["strides"]
    stride = stride if isinstance(stride, int) else stride[0]
    axis = 2 if problem.data_format == "channels_first" else 1
    now = problem.seed % x.shape[axis]
    future = np.zeros(x.shape, bool)
    np.moveaxis(future, axis, 0)[now + 1 :] = True
    y = np.moveaxis(ops.conv(with_poison(x, future), w, **problem.options), axis, 0)
    assert_finite(y[: now // stride + 1])
    assert not y.size or np.isnan(y[now // stride + 1 :]).all()


@every_dtype
@examples(25)
@given(convolutions())
def test_gradients_are_the_same_bits_every_time(dtype, problem):
    x, w, dy = output_grad(problem, dtype, problem.x_shape, problem.w_shape)
    assert_same_bits("conv_input_grad", (dy, w, problem.x_shape), problem.options)
    assert_same_bits("conv_kernel_grad", (x, dy, problem.w_shape), problem.options)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_empty_batch_keeps_its_shape(rank, data_format):
    x_shape = (0, *(5,) * rank, 2) if data_format == "channels_last" else (0, 2, *(5,) * rank)
    y_shape = (0, *(3,) * rank, 4) if data_format == "channels_last" else (0, 4, *(3,) * rank)
    x, w, dy = np.ones(x_shape), np.ones((3,) * rank + (2, 4)), np.ones(y_shape)
    assert ops.conv(x, w, np.ones(4), data_format=data_format, activation="relu").shape == y_shape
    assert ops.conv_input_grad(dy, w, x_shape, data_format=data_format).shape == x_shape
    dw = ops.conv_kernel_grad(x, dy, w.shape, data_format=data_format)
    assert dw.shape == w.shape and not dw.any()
    assert not ops.bias_grad(dy, data_format=data_format).any()


def test_the_defaults_are_those_of_keras():
    """strides 1, valid, channels last, dilation 1, one group, no bias, no activation."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 6, 3)), rng.standard_normal((3, 3, 4))
    spelled = ops.conv(
        x,
        w,
        None,
        strides=1,
        padding="valid",
        data_format="channels_last",
        dilation_rate=1,
        groups=1,
        activation=None,
        precision="highest",
        out=None,
        workspace=None,
    )
    assert np.array_equal(ops.conv(x, w), spelled)
    assert_close(spelled, oracle.conv(x, w), dtype="float64", terms=9)


def test_an_activation_may_be_any_callable():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 6, 3)), rng.standard_normal((3, 3, 4))
    expected = np.cos(oracle.conv(x, w))
    assert_close(ops.conv(x, w, activation=np.cos), expected, dtype="float64", terms=9)
