"""`ops.depthwise_conv` and its gradients against the oracle."""

from math import prod

import numpy as np
import oracle
import pytest
from compare import DTYPES, assert_close, is_complex
from hypothesis import assume, example, given
from parity import assert_adjoint, assert_same_bits, check, unread, with_poison
from strategies import Problem, depthwise_convolutions, examples

from cuconv import ops

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
wide_dtypes = pytest.mark.parametrize("dtype", ["float64", "complex128"])


def y_shape_of(problem: Problem) -> tuple[int, ...]:
    return oracle.depthwise_conv(np.zeros(problem.x_shape), np.zeros(problem.w_shape), **problem.options).shape


@every_dtype
@examples(150)
@given(depthwise_convolutions())
@example(Problem((2, 30, 17), (5, 17, 1), {"padding": "causal", "dilation_rate": 3}, bias=True, workspace=512))
@example(Problem((2, 3, 9, 8), (3, 2, 3, 2), {"strides": 2, "data_format": "channels_first"}, bias=True, workspace=512))
@example(Problem((1, 9, 2), (3, 2, 1), {"strides": 2, "dilation_rate": 2}))
@example(Problem((2, 40, 3), (31, 3, 1), {"padding": "same"}))
@example(
    Problem((1, 2, 2, 2), (1, 1, 2, 1), {"data_format": "channels_first"}, activation="sigmoid", workspace=1)
)  # activates sums that lie four elements apart
def test_depthwise_conv(dtype, problem):
    bias_shape = (prod(problem.w_shape[-2:]),)
    x, w, bias = problem.random(problem.x_shape, problem.w_shape, bias_shape, dtype=dtype)
    activation = None if is_complex(dtype) else problem.activation
    arrays = (x, w, bias) if problem.bias else (x, w)
    check("depthwise_conv", problem, arrays, dtype=dtype, terms=problem.taps, activation=activation)


@every_dtype
@examples(120)
@given(depthwise_convolutions())
@example(Problem((2, 30, 17), (5, 17, 2), {"strides": 3, "padding": "same"}, workspace=512))
@example(Problem((2, 3, 9, 8), (3, 2, 3, 2), {"strides": 2, "data_format": "channels_first"}, workspace=512))
def test_depthwise_conv_input_grad(dtype, problem):
    w, dy = problem.random(problem.w_shape, y_shape_of(problem), dtype=dtype)
    terms = problem.taps * problem.w_shape[-1]
    check("depthwise_conv_input_grad", problem, (dy, w, problem.x_shape), dtype=dtype, terms=terms)


@every_dtype
@examples(120)
@given(depthwise_convolutions())
@example(Problem((2, 30, 17), (5, 17, 2), {"strides": 3, "padding": "same"}, workspace=512))
@example(Problem((2, 3, 9, 8), (3, 2, 3, 2), {"strides": 2, "data_format": "channels_first"}, workspace=512))
def test_depthwise_conv_kernel_grad(dtype, problem):
    x, dy = problem.random(problem.x_shape, y_shape_of(problem), dtype=dtype)
    terms = max(1, dy.size // prod(problem.w_shape[-2:]))
    check("depthwise_conv_kernel_grad", problem, (x, dy, problem.w_shape), dtype=dtype, terms=terms)


# --- Checks that need no oracle ----------------------------------------------------------------------------------


@wide_dtypes
@examples(80)
@given(depthwise_convolutions())
def test_gradients_are_adjoint_to_the_depthwise_convolution(dtype, problem):
    x, w, dy = problem.random(problem.x_shape, problem.w_shape, y_shape_of(problem), dtype=dtype)
    y = ops.depthwise_conv(x, w, **problem.options)
    dx = ops.depthwise_conv_input_grad(dy, w, problem.x_shape, **problem.options)
    dw = ops.depthwise_conv_kernel_grad(x, dy, problem.w_shape, **problem.options)
    assert_adjoint(dy, y, [(dx, x), (dw, w)])


@wide_dtypes
@examples(60)
@given(depthwise_convolutions())
def test_a_depthwise_convolution_is_a_grouped_one(dtype, problem):
    """With one group per channel and its filters side by side."""
    x, w, dy = problem.random(problem.x_shape, problem.w_shape, y_shape_of(problem), dtype=dtype)
    channels, multiplier = w.shape[-2:]
    grouped = w.reshape(*w.shape[:-2], 1, channels * multiplier)
    options = {**problem.options, "groups": channels}
    y = ops.conv(x, grouped, **options)
    terms = max(1, dy.size)
    assert_close(ops.depthwise_conv(x, w, **problem.options), y, dtype=dtype, terms=problem.taps)
    assert_close(
        ops.depthwise_conv_kernel_grad(x, dy, w.shape, **problem.options),
        ops.conv_kernel_grad(x, dy, grouped.shape, **options).reshape(w.shape),
        dtype=dtype,
        terms=terms,
    )
    assert_close(
        ops.depthwise_conv_input_grad(dy, w, x.shape, **problem.options),
        ops.conv_input_grad(dy, grouped, x.shape, **options),
        dtype=dtype,
        terms=terms,
    )


@examples(120)
@given(depthwise_convolutions())
@example(Problem((2, 9, 3), (1, 3, 1), {"strides": 3}))
@example(Problem((2, 9, 3), (2, 3, 2), {"dilation_rate": 3}))
def test_inputs_that_no_output_reads_do_not_matter(problem):
    x, w, dy = problem.random(problem.x_shape, problem.w_shape, y_shape_of(problem), dtype="float32")
    sizes = oracle.spatial(problem.x_shape, problem.data_format)
    rules = {"strides": 1, "padding": "valid", "dilation_rate": 1, **problem.options}
    _, found = oracle.reads(sizes, w.shape[:-2], *(rules[k] for k in ("strides", "padding", "dilation_rate")))
    never = unread(x.shape, {i for _, _, i in found}, problem.data_format)
    assume(never.any())
    x = with_poison(x, never)
    check("depthwise_conv", problem, (x, w), dtype="float32", terms=problem.taps)
    terms = max(1, dy.size // prod(w.shape[-2:]))
    check("depthwise_conv_kernel_grad", problem, (x, dy, w.shape), dtype="float32", terms=terms)


@examples(80)
@given(depthwise_convolutions())
def test_one_nan_reaches_exactly_the_outputs_that_read_it(problem):
    x, w = problem.random(problem.x_shape, problem.w_shape, dtype="float32")
    assume(x.size)
    where = np.zeros(x.shape, bool)
    where[np.unravel_index(problem.seed % x.size, x.shape)] = True
    x = with_poison(x, where)
    options = problem.options if problem.workspace is None else {**problem.options, "workspace": problem.workspace}
    actual, expected = ops.depthwise_conv(x, w, **options), oracle.depthwise_conv(x, w, **problem.options)
    assert np.array_equal(np.isnan(actual), np.isnan(expected))


@every_dtype
@examples(25)
@given(depthwise_convolutions())
def test_gradients_are_the_same_bits_every_time(dtype, problem):
    x, w, dy = problem.random(problem.x_shape, problem.w_shape, y_shape_of(problem), dtype=dtype)
    assert_same_bits("depthwise_conv_input_grad", (dy, w, problem.x_shape), problem.options)
    assert_same_bits("depthwise_conv_kernel_grad", (x, dy, problem.w_shape), problem.options)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_empty_batch_keeps_its_shape(rank):
    x, w, dy = np.ones((0, *(5,) * rank, 2)), np.ones((3,) * rank + (2, 3)), np.ones((0, *(3,) * rank, 6))
    assert ops.depthwise_conv(x, w, np.ones(6), activation="relu").shape == dy.shape
    assert ops.depthwise_conv_input_grad(dy, w, x.shape).shape == x.shape
    dw = ops.depthwise_conv_kernel_grad(x, dy, w.shape)
    assert dw.shape == w.shape and not dw.any()
