"""`ops.upsample` and its gradient against the oracle."""

import numpy as np
import oracle
import pytest
from compare import DTYPES, assert_close, is_complex
from hypothesis import example, given
from parity import assert_adjoint, check
from strategies import INTERPOLATIONS, Upsampling, examples, upsamplings

from cuconv import ops

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
TAPS = 12  # of the widest kernel, along one axis


@every_dtype
@examples(120)
@given(upsamplings())
@example(Upsampling((1, 4, 7, 2), (1, 1, 1, 1), size=(3, 2), interpolation="lanczos5"))
@example(Upsampling((1, 2, 1, 4), (1, 1, 1, 1), {"data_format": "channels_first"}, size=2, interpolation="bicubic"))
def test_upsample(dtype, problem):
    (x,) = problem.random(problem.x_shape, dtype=dtype)
    options = {**problem.options, "interpolation": problem.interpolation}
    y = check("upsample", problem, (x, problem.size), dtype=dtype, terms=TAPS**problem.rank, options=options)
    if problem.interpolation == "nearest":
        assert np.array_equal(y, oracle.upsample(x, problem.size, **problem.options)), "nearest copies"


@every_dtype
@examples(120)
@given(upsamplings())
@example(Upsampling((1, 4, 7, 2), (1, 1, 1, 1), size=(3, 2), interpolation="lanczos5"))
def test_upsample_input_grad(dtype, problem):
    (x,) = problem.random(problem.x_shape, dtype=dtype)
    y_shape = oracle.upsample(x, problem.size, **problem.options).shape
    (dy,) = problem.random(y_shape, dtype=dtype)
    options = {**problem.options, "interpolation": problem.interpolation}
    check(
        "upsample_input_grad",
        problem,
        (dy, problem.size),
        dtype=dtype,
        terms=(3 * TAPS) ** problem.rank,
        options=options,
    )


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@examples(80)
@given(upsamplings())
def test_the_gradient_is_adjoint_to_the_upsampling(dtype, problem):
    (x,) = problem.random(problem.x_shape, dtype=dtype)
    options = {**problem.options, "interpolation": problem.interpolation}
    y = ops.upsample(x, problem.size, **options)
    (dy,) = problem.random(y.shape, dtype=dtype)
    assert_adjoint(dy, y, [(ops.upsample_input_grad(dy, problem.size, **options), x)])


@every_dtype
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_constant_stays_constant(interpolation, dtype):
    x = np.full((1, 3, 4, 2), 0.75 + (0.5j if is_complex(dtype) else 0)).astype(
        dtype if dtype != "bfloat16" else "float32"
    )
    y = ops.upsample(x, (2, 3), interpolation=interpolation)
    assert_close(
        y,
        np.full((1, 6, 12, 2), x[0, 0, 0, 0]).astype(complex if is_complex(dtype) else float),
        dtype=x.dtype.name,
        terms=TAPS,
    )


def test_by_hand():
    """The numbers of KERAS.md, S9."""
    square = np.array([[0.0, 1.0], [2.0, 3.0]]).reshape(1, 2, 2, 1)
    assert ops.upsample(square, 2, interpolation="bilinear")[0, 0, :, 0].tolist() == [0, 0.25, 0.75, 1]
    cubic = ops.upsample(square, 2, interpolation="bicubic")[0, 0, :, 0]
    assert cubic.round(4).tolist() == [-0.3164, 0.0156, 0.5625, 0.8945]


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int64"])
def test_nearest_takes_integers_as_they_are(dtype):
    x = np.arange(6, dtype=dtype).reshape(1, 3, 2)
    y = ops.upsample(x, 2)
    assert y.dtype == x.dtype
    assert y[0, :, 0].tolist() == [0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_an_empty_batch_keeps_its_shape(interpolation):
    assert ops.upsample(np.ones((0, 3, 4, 2)), (2, 3), interpolation=interpolation).shape == (0, 6, 12, 2)
    assert ops.upsample_input_grad(np.ones((0, 6, 12, 2)), (2, 3), interpolation=interpolation).shape == (0, 3, 4, 2)
