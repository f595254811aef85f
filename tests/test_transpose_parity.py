"""`ops.conv_transpose` and its gradients against the oracle."""

from math import prod

import numpy as np
import oracle
import pytest
from compare import DTYPES, assert_close, is_complex
from hypothesis import assume, example, given
from parity import assert_adjoint, assert_same_bits, check, unread, with_poison
from strategies import Problem, examples, transposed_convolutions

from cuconv import ops

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
wide_dtypes = pytest.mark.parametrize("dtype", ["float64", "complex128"])


def y_shape_of(problem: Problem) -> tuple[int, ...]:
    return oracle.conv_transpose(np.zeros(problem.x_shape), np.zeros(problem.w_shape), **problem.options).shape


def terms_of(problem: Problem) -> int:
    """At most every tap meets every channel of a group."""
    return prod(problem.w_shape[:-2]) * problem.w_shape[-1]


@every_dtype
@examples(150)
@given(transposed_convolutions())
@example(Problem((2, 9, 3), (5, 4, 3), {"strides": 2, "padding": "same"}, bias=True, workspace=1))
@example(Problem((2, 30, 3), (6, 2, 3), {"strides": 4, "padding": "same", "output_padding": 1}, workspace=512))
@example(Problem((2, 9, 8, 3), (3, 4, 2, 3), {"strides": (1, 3), "dilation_rate": (2, 1)}, workspace=512))
@example(
    Problem((2, 4, 9, 8), (3, 2, 3, 4), {"strides": 2, "groups": 2, "data_format": "channels_first"}, workspace=512)
)
@example(Problem((1, 3, 2), (1, 2, 2), {"strides": 3}, bias=True, activation="sigmoid"))  # gaps hold act(bias)
def test_conv_transpose(dtype, problem):
    bias_shape = (problem.w_shape[-2] * problem.options.get("groups", 1),)
    x, w, bias = problem.random(problem.x_shape, problem.w_shape, bias_shape, dtype=dtype)
    activation = None if is_complex(dtype) else problem.activation
    if activation == "softmax":
        assume(0 not in y_shape_of(problem)[1:])
    arrays = (x, w, bias) if problem.bias else (x, w)
    check("conv_transpose", problem, arrays, dtype=dtype, terms=terms_of(problem), activation=activation)


@every_dtype
@examples(120)
@given(transposed_convolutions())
@example(Problem((2, 30, 3), (6, 2, 3), {"strides": 4, "padding": "same"}, workspace=512))
@example(Problem((2, 3, 9, 8), (3, 2, 2, 3), {"strides": (2, 1), "data_format": "channels_first"}, workspace=512))
@example(Problem((2, 2, 1), (1, 1, 1), {"strides": 2, "padding": (0, 1)}))  # as long as the output, yet strided
def test_conv_transpose_input_grad(dtype, problem):
    w, dy = problem.random(problem.w_shape, y_shape_of(problem), dtype=dtype)
    terms = prod(problem.w_shape[:-1])
    check("conv_transpose_input_grad", problem, (dy, w, problem.x_shape), dtype=dtype, terms=terms)


@every_dtype
@examples(120)
@given(transposed_convolutions())
@example(Problem((2, 30, 3), (6, 2, 3), {"strides": 4, "padding": "same"}, workspace=512))
@example(Problem((2, 3, 9, 8), (3, 2, 2, 3), {"strides": (2, 1), "data_format": "channels_first"}, workspace=512))
def test_conv_transpose_kernel_grad(dtype, problem):
    x, dy = problem.random(problem.x_shape, y_shape_of(problem), dtype=dtype)
    terms = max(1, x.size // problem.w_shape[-1])
    check("conv_transpose_kernel_grad", problem, (x, dy, problem.w_shape), dtype=dtype, terms=terms)


# --- Checks that need no oracle ----------------------------------------------------------------------------------


@wide_dtypes
@examples(80)
@given(transposed_convolutions())
def test_gradients_are_adjoint_to_the_transposed_convolution(dtype, problem):
    x, w, dy = problem.random(problem.x_shape, problem.w_shape, y_shape_of(problem), dtype=dtype)
    y = ops.conv_transpose(x, w, **problem.options)
    dx = ops.conv_transpose_input_grad(dy, w, problem.x_shape, **problem.options)
    dw = ops.conv_transpose_kernel_grad(x, dy, problem.w_shape, **problem.options)
    assert_adjoint(dy, y, [(dx, x), (dw, w)])


@examples(40)
@given(transposed_convolutions())
def test_gradients_are_finite_differences(problem):
    """d/dh of sum(dy * conv_transpose(x + h*u, w + h*v)): quadratic in h, so central differences are exact."""
    shapes = [problem.x_shape, problem.w_shape]
    x, w, u, v, dy = problem.random(*shapes, *shapes, y_shape_of(problem), dtype="float64")

    def loss(h):
        return np.sum(dy * ops.conv_transpose(x + h * u, w + h * v, **problem.options))

    slope = loss(0.5) - loss(-0.5)
    dx = ops.conv_transpose_input_grad(dy, w, problem.x_shape, **problem.options)
    dw = ops.conv_transpose_kernel_grad(x, dy, problem.w_shape, **problem.options)
    along = np.sum(dx * u) + np.sum(dw * v)
    assert np.isfinite(along) and abs(slope - along) < 1e-12 * (1 + np.abs(dy).sum() * terms_of(problem))


@pytest.mark.parametrize("padding", ["valid", "same", (1, 0)], ids=str)
@pytest.mark.parametrize("strides", [1, 2, 3])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_a_transposed_convolution_is_an_input_gradient(data_format, strides, padding):
    """Of the convolution with the same options that leads back to the input's size."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 5, 4)), rng.standard_normal((3, 2, 4 if data_format == "channels_last" else 5))
    options = {"strides": strides, "padding": padding, "data_format": data_format}
    y = ops.conv_transpose(x, w, **options)
    assert_close(y, ops.conv_input_grad(x, w, y.shape, **options), dtype="float64", terms=15)


@examples(120)
@given(transposed_convolutions())
@example(Problem((2, 3, 3), (1, 4, 3), {"strides": 3}))
@example(Problem((2, 9, 3), (2, 4, 3), {"padding": ((3, 4),)}))
def test_positions_of_dy_that_no_input_reached_do_not_matter(problem):
    """The gaps of a stride beyond the kernel may hold NaN in dy."""
    x, w, dy = problem.random(problem.x_shape, problem.w_shape, y_shape_of(problem), dtype="float32")
    sizes = oracle.spatial(problem.x_shape, problem.data_format)
    rules = {"strides": 1, "padding": "valid", "output_padding": None, "dilation_rate": 1, **problem.options}
    options = (rules[k] for k in ("strides", "padding", "output_padding", "dilation_rate"))
    never = unread(
        dy.shape, {p for _, _, p in oracle.transpose_writes(sizes, w.shape[:-2], *options)}, problem.data_format
    )
    assume(never.any())
    dy = with_poison(dy, never)
    check("conv_transpose_input_grad", problem, (dy, w, x.shape), dtype="float32", terms=prod(w.shape[:-1]))
    check("conv_transpose_kernel_grad", problem, (x, dy, w.shape), dtype="float32", terms=max(1, x.size // w.shape[-1]))


@examples(80)
@given(transposed_convolutions())
def test_one_nan_reaches_exactly_the_outputs_it_is_added_to(problem):
    x, w = problem.random(problem.x_shape, problem.w_shape, dtype="float32")
    assume(x.size)
    where = np.zeros(x.shape, bool)
    where[np.unravel_index(problem.seed % x.size, x.shape)] = True
    x = with_poison(x, where)
    options = problem.options if problem.workspace is None else {**problem.options, "workspace": problem.workspace}
    actual, expected = ops.conv_transpose(x, w, **options), oracle.conv_transpose(x, w, **problem.options)
    assert np.array_equal(np.isnan(actual), np.isnan(expected))


@every_dtype
@examples(25)
@given(transposed_convolutions())
def test_gradients_are_the_same_bits_every_time(dtype, problem):
    x, w, dy = problem.random(problem.x_shape, problem.w_shape, y_shape_of(problem), dtype=dtype)
    assert_same_bits("conv_transpose", (x, w), problem.options)
    assert_same_bits("conv_transpose_input_grad", (dy, w, problem.x_shape), problem.options)
    assert_same_bits("conv_transpose_kernel_grad", (x, dy, problem.w_shape), problem.options)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_empty_batch_keeps_its_shape(rank):
    x, w, dy = np.ones((0, *(3,) * rank, 2)), np.ones((3,) * rank + (4, 2)), np.ones((0, *(5,) * rank, 4))
    assert ops.conv_transpose(x, w, np.ones(4), activation="relu").shape == dy.shape
    assert ops.conv_transpose_input_grad(dy, w, x.shape).shape == x.shape
    dw = ops.conv_transpose_kernel_grad(x, dy, w.shape)
    assert dw.shape == w.shape and not dw.any()


def test_the_defaults_are_those_of_keras():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 4, 3))
    spelled = ops.conv_transpose(
        x,
        w,
        None,
        strides=1,
        padding="valid",
        output_padding=None,
        data_format="channels_last",
        dilation_rate=1,
        groups=1,
        activation=None,
        precision="highest",
        out=None,
        workspace=None,
    )
    assert np.array_equal(ops.conv_transpose(x, w), spelled)
    assert_close(spelled, oracle.conv_transpose(x, w), dtype="float64", terms=6)
