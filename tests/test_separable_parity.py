"""`ops.separable_conv` and its gradients against the oracle."""

from math import prod

import numpy as np
import oracle
import pytest
from compare import DTYPES, assert_close, eps, is_complex, is_half
from hypothesis import example, given
from hypothesis import strategies as st
from parity import assert_adjoint, assert_same_bits, check
from strategies import PER_GROUP, Problem, depthwise_convolutions, examples

from cuconv import ops

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
wide_dtypes = pytest.mark.parametrize("dtype", ["float64", "complex128"])


def half_slack(dtype: str, magnitudes):
    """In 16 bits the array between the two convolutions may be rounded too, by half a unit of each of its values.

    Args:
        magnitudes: the answer for absolute values of everything: what a relative error of 1 in the middle could move.
    """
    return eps(dtype) / 2 * magnitudes if is_half(dtype) else 0.0


def pointwise_shape(problem: Problem, filters: int) -> tuple[int, ...]:
    return (*(1,) * problem.rank, prod(problem.w_shape[-2:]), filters)


def y_shape_of(problem: Problem, filters: int) -> tuple[int, ...]:
    zeros = np.zeros(problem.x_shape), np.zeros(problem.w_shape), np.zeros(pointwise_shape(problem, filters))
    return oracle.separable_conv(*zeros, **problem.options).shape


def terms_of(problem: Problem) -> int:
    return prod(problem.w_shape)


@every_dtype
@examples(120)
@given(depthwise_convolutions(), PER_GROUP)
@example(Problem((2, 30, 17), (5, 17, 1), {"padding": "causal", "dilation_rate": 3}, bias=True, workspace=512), 16)
@example(
    Problem((2, 3, 9, 8), (3, 2, 3, 2), {"strides": 2, "data_format": "channels_first"}, bias=True, workspace=512), 2
)
def test_separable_conv(dtype, problem, filters):
    shapes = problem.x_shape, problem.w_shape, pointwise_shape(problem, filters), (filters,)
    x, a, b, bias = problem.random(*shapes, dtype=dtype)
    activation = None if is_complex(dtype) else problem.activation
    arrays = (x, a, b, bias) if problem.bias else (x, a, b)
    slack = half_slack(dtype, oracle.separable_conv(*map(np.abs, (x, a, b)), **problem.options))
    check("separable_conv", problem, arrays, dtype=dtype, terms=terms_of(problem), activation=activation, slack=slack)


@every_dtype
@examples(80)
@given(depthwise_convolutions(), PER_GROUP)
def test_separable_conv_input_grad(dtype, problem, filters):
    shapes = problem.w_shape, pointwise_shape(problem, filters), y_shape_of(problem, filters)
    a, b, dy = problem.random(*shapes, dtype=dtype)
    terms = filters * terms_of(problem)
    magnitudes = oracle.separable_conv_input_grad(*map(np.abs, (dy, a, b)), problem.x_shape, **problem.options)
    slack = half_slack(dtype, magnitudes)
    check("separable_conv_input_grad", problem, (dy, a, b, problem.x_shape), dtype=dtype, terms=terms, slack=slack)


@every_dtype
@examples(80)
@given(depthwise_convolutions(), PER_GROUP)
def test_separable_conv_kernel_grad(dtype, problem, filters):
    shapes = problem.x_shape, problem.w_shape, pointwise_shape(problem, filters), y_shape_of(problem, filters)
    x, a, b, dy = problem.random(*shapes, dtype=dtype)
    actual = ops.separable_conv_kernel_grad(x, dy, a, b, workspace=problem.workspace, **problem.options)
    expected = oracle.separable_conv_kernel_grad(x, dy, a, b, **problem.options)
    terms = max(1, dy.size * terms_of(problem) // filters)
    magnitudes = oracle.separable_conv_kernel_grad(*map(np.abs, (x, dy, a, b)), **problem.options)
    for name, ours, theirs, size in zip(("depthwise", "pointwise"), actual, expected, magnitudes, strict=True):
        assert_close(ours, theirs, dtype=dtype, terms=terms, slack=half_slack(dtype, size), what=name)


# --- Checks that need no oracle ----------------------------------------------------------------------------------


@wide_dtypes
@examples(80)
@given(depthwise_convolutions(), PER_GROUP)
def test_gradients_are_adjoint_to_the_separable_convolution(dtype, problem, filters):
    shapes = problem.x_shape, problem.w_shape, pointwise_shape(problem, filters), y_shape_of(problem, filters)
    x, a, b, dy = problem.random(*shapes, dtype=dtype)
    y = ops.separable_conv(x, a, b, **problem.options)
    dx = ops.separable_conv_input_grad(dy, a, b, problem.x_shape, **problem.options)
    da, db = ops.separable_conv_kernel_grad(x, dy, a, b, **problem.options)
    assert_adjoint(dy, y, [(dx, x), (da, a), (db, b)])


@wide_dtypes
@examples(60)
@given(depthwise_convolutions(), st.integers(1, 4))
def test_a_separable_convolution_is_two(dtype, problem, filters):
    """Depthwise, then 1x1; bias and activation after both."""
    shapes = problem.x_shape, problem.w_shape, pointwise_shape(problem, filters), (filters,)
    x, a, b, bias = problem.random(*shapes, dtype=dtype)
    middle = ops.depthwise_conv(x, a, **problem.options)
    activation = None if is_complex(dtype) else "tanh"
    expected = ops.conv(middle, b, bias, data_format=problem.options.get("data_format"), activation=activation)
    actual = ops.separable_conv(x, a, b, bias, activation=activation, **problem.options)
    assert_close(actual, expected, dtype=dtype, terms=terms_of(problem))


@every_dtype
@examples(20)
@given(depthwise_convolutions(), PER_GROUP)
def test_gradients_are_the_same_bits_every_time(dtype, problem, filters):
    shapes = problem.x_shape, problem.w_shape, pointwise_shape(problem, filters), y_shape_of(problem, filters)
    x, a, b, dy = problem.random(*shapes, dtype=dtype)
    assert_same_bits("separable_conv_input_grad", (dy, a, b, problem.x_shape), problem.options)
    assert_same_bits("separable_conv_kernel_grad", (x, dy, a, b), problem.options)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_empty_batch_keeps_its_shape(rank):
    x, a, b = np.ones((0, *(5,) * rank, 2)), np.ones((3,) * rank + (2, 3)), np.ones((1,) * rank + (6, 4))
    dy = np.ones((0, *(3,) * rank, 4))
    assert ops.separable_conv(x, a, b, np.ones(4), activation="relu").shape == dy.shape
    assert ops.separable_conv_input_grad(dy, a, b, x.shape).shape == x.shape
    da, db = ops.separable_conv_kernel_grad(x, dy, a, b)
    assert (da.shape, db.shape) == (a.shape, b.shape) and not da.any() and not db.any()
