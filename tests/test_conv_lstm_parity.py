"""`ops.conv_lstm_step` and its gradients against the oracle; the oracle's gradients are complex steps, not formulas."""

from math import prod

import numpy as np
import oracle
import pytest
from compare import REAL_DTYPES, assert_close, eps, is_half
from hypothesis import example, given
from strategies import Step, conv_lstm_steps, examples

from cuconv import ops

every_dtype = pytest.mark.parametrize("dtype", REAL_DTYPES)

# In 16 bits each of the two convolutions, their sum, the cell and the output may be rounded on the way.
ROUNDINGS = 5
NAMES = ("x", "h", "c", "w", "recurrent_w", "bias")


def arrays_of(problem: Step, dtype: str) -> dict:
    """The six array arguments; a kernel is None where its convolution is given instead."""
    first = problem.x_gates_shape if problem.precomputed else problem.x_shape
    shapes = (
        first,
        problem.state_shape,
        problem.state_shape,
        problem.w_shape,
        problem.recurrent_shape,
        problem.w_shape[-1:],
    )
    arrays = dict(zip(NAMES, problem.random(*shapes, dtype=dtype)))
    if problem.precomputed:
        arrays |= {"w": None, "bias": None}
    elif not problem.bias:
        arrays["bias"] = None
    if not problem.recurrent:
        arrays["recurrent_w"] = None
    return arrays


def terms_of(problem: Step) -> int:
    return prod(problem.w_shape[:-1]) + prod(problem.recurrent_shape[:-1])


def half_slack(problem: Step, dtype: str, arrays: dict) -> float:
    """ROUNDINGS units of the largest sum that enters a gate; a gate passes on at most what enters it."""
    if not is_half(dtype) or not arrays["h"].size:
        return 0.0
    sums, (x, h, _, w, recurrent_w, bias) = 0, arrays.values()
    if recurrent_w is not None:
        sums = oracle.conv(h, recurrent_w, padding="same", data_format=problem.data_format)
    inputs = oracle.wide(x) if w is None else oracle.conv(x, w, bias, **problem.options)
    return ROUNDINGS * eps(dtype) * max(1.0, np.abs(inputs + sums).max())


def both(problem: Step) -> dict:
    return {**problem.options, **problem.gates}


@every_dtype
@examples(120)
@given(conv_lstm_steps())
@example(Step((1, 4, 2), (3, 2, 8), {"strides": 2, "padding": "same"}, bias=True))
@example(Step((2, 2, 3, 4), (2, 2, 2, 12), {"data_format": "channels_first"}, precomputed=True))
def test_conv_lstm_step(dtype, problem):
    arrays = arrays_of(problem, dtype)
    actual = ops.conv_lstm_step(**arrays, **both(problem))
    expected = oracle.conv_lstm_step(**arrays, **both(problem))
    for name, ours, theirs in zip(("h", "c"), actual, expected, strict=True):
        assert_close(
            ours, theirs, dtype=dtype, terms=terms_of(problem), slack=half_slack(problem, dtype, arrays), what=name
        )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@examples(40)
@given(conv_lstm_steps())
@example(Step((1, 4, 2), (3, 2, 8), {"strides": 2, "padding": "same"}, bias=True))
@example(
    Step(
        (1, 3, 2), (2, 2, 4), {"padding": "same"}, gates={"activation": "relu", "recurrent_activation": "hard_sigmoid"}
    )
)
@example(Step((1, 2, 2, 3), (2, 2, 2, 4), {"data_format": "channels_first"}, precomputed=True))
def test_conv_lstm_step_grad(dtype, problem):
    arrays = arrays_of(problem, dtype)
    dh, dc = problem.random(problem.state_shape, problem.state_shape, dtype=dtype)
    actual = ops.conv_lstm_step_grad(*arrays.values(), dh, dc, **both(problem))
    given_names = [name for name in NAMES if arrays[name] is not None and (name != "h" or problem.recurrent)]

    def loss(*moved):
        h, c = oracle.conv_lstm_step(**{**arrays, **dict(zip(given_names, moved, strict=True))}, **both(problem))
        return np.sum(h * dh) + np.sum(c * dc)

    expected = dict(zip(given_names, oracle.complex_step(loss, *(arrays[name] for name in given_names)), strict=True))
    assert len(actual) == len(NAMES)
    for name, ours in zip(NAMES, actual, strict=True):
        if name in expected:
            terms = terms_of(problem) * max(1, dh.size)
            assert_close(ours, expected[name], dtype=dtype, terms=terms, what=f"d{name}")
        else:
            assert ours is None, f"d{name} has no argument to be the gradient of"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@examples(25)
@given(conv_lstm_steps())
def test_conv_lstm_step_grad_in_16_bits(dtype, problem):
    """Against its own answer in double precision, which the test above holds to the oracle."""
    arrays = arrays_of(problem, dtype)
    dh, dc = problem.random(problem.state_shape, problem.state_shape, dtype=dtype)
    wide = [None if a is None else a.astype(np.float64) for a in (*arrays.values(), dh, dc)]
    actual = ops.conv_lstm_step_grad(*arrays.values(), dh, dc, **both(problem))
    expected = ops.conv_lstm_step_grad(*wide, **both(problem))
    for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
        if theirs is not None:
            slack = ROUNDINGS * eps(dtype) * max(1.0, np.abs(theirs).max(initial=0))
            assert_close(ours, theirs, dtype=dtype, terms=terms_of(problem), slack=slack, what=f"d{name}")


@examples(40)
@given(conv_lstm_steps(activations=("tanh",), recurrent=("sigmoid",)))
def test_gradients_are_finite_differences(problem):
    arrays = arrays_of(problem, "float64")
    dh, dc = problem.random(problem.state_shape, problem.state_shape, dtype="float64")
    rng = np.random.default_rng(problem.seed)
    gradients = dict(zip(NAMES, ops.conv_lstm_step_grad(*arrays.values(), dh, dc, **both(problem)), strict=True))
    directions = {name: rng.standard_normal(g.shape) for name, g in gradients.items() if g is not None}

    def loss(step):
        moved = {name: a + step * directions[name] if name in directions else a for name, a in arrays.items()}
        h, c = ops.conv_lstm_step(**moved, **both(problem))
        return np.sum(h * dh) + np.sum(c * dc)

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    along = sum(np.sum(gradients[name] * direction) for name, direction in directions.items())
    size = sum(np.sum(np.abs(gradients[name] * direction)) for name, direction in directions.items())
    assert np.isfinite(along) and abs(slope - along) < 1e-6 * (1 + size)


def test_a_precomputed_input_convolution_gives_the_same_step():
    rng = np.random.default_rng(0)
    x, h, c = rng.standard_normal((2, 6, 3)), rng.standard_normal((2, 3, 2)), rng.standard_normal((2, 3, 2))
    w, recurrent, bias = rng.standard_normal((3, 3, 8)), rng.standard_normal((3, 2, 8)), rng.standard_normal(8)
    whole = ops.conv_lstm_step(x, h, c, w, recurrent, bias, strides=2, padding="same")
    gates = ops.conv(x, w, bias, strides=2, padding="same")
    halves = ops.conv_lstm_step(gates, h, c, None, recurrent)
    for one, other in zip(whole, halves, strict=True):
        assert_close(one, other, dtype="float64", terms=27)


def test_an_empty_batch_keeps_its_shape():
    x, h, w, recurrent = np.ones((0, 6, 3)), np.ones((0, 4, 2)), np.ones((3, 3, 8)), np.ones((3, 2, 8))
    assert [a.shape for a in ops.conv_lstm_step(x, h, h, w, recurrent)] == [(0, 4, 2)] * 2
    gradients = ops.conv_lstm_step_grad(x, h, h, w, recurrent, np.ones(8), h, h)
    assert [g.shape for g in gradients] == [(0, 6, 3), (0, 4, 2), (0, 4, 2), (3, 3, 8), (3, 2, 8), (8,)]
    assert not any(g.any() for g in gradients)
