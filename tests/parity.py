"""One call of an operation and the oracle's answer to the same: what every parity test does."""

from functools import partial

import numpy as np
import oracle
from compare import assert_close, empty_output, eps, is_half, poisoned
from strategies import Problem

from cuconv import ops


def check(
    name: str,
    problem: Problem,
    arrays,
    *,
    dtype: str,
    terms: int,
    options: dict | None = None,
    activation=None,
    slack=0.0,
):
    """Calls `ops.<name>` as the problem says, into a poisoned `out` where it draws one, and compares with the oracle.

    Args:
        arrays: positional arguments, shapes included.
        terms: products in the longest sum of the answer.
        options: keywords of both; by default the problem's.
        activation: fused into a forward pass.
        slack: allowance for roundings on the way.
    """
    answer = partial(getattr(oracle, name), *arrays, **(problem.options if options is None else options))
    keywords = dict(answer.keywords)
    if problem.workspace is not None and "upsample" not in name:
        keywords["workspace"] = problem.workspace
    expected = answer()
    if activation is not None:
        if activation == "softmax" and is_half(dtype):
            # Softmax needs whole rows, so it reads sums that were rounded: exp(z(1 + e)) / exp(z) is 1 + z*e.
            slack = eps(dtype) * np.max(np.abs(expected), initial=0.0)
        expected = answer(activation=activation)
        keywords["activation"] = activation
    if problem.out_layout is None or activation == "softmax":
        actual = getattr(ops, name)(*arrays, **keywords)
    else:
        out = empty_output(expected.shape, dtype, problem.out_layout)
        actual = getattr(ops, name)(*arrays, out=out.view, **keywords)
        assert actual is out.view, f"{name} returns another array than `out`"
        out.assert_surroundings_untouched()
    assert_close(actual, expected, dtype=dtype, terms=terms, slack=slack, what=name)
    return actual


def inner(a, b) -> complex:
    """The inner product, conjugating the first, in double precision."""
    return complex(np.sum(oracle.wide(a).conj() * oracle.wide(b)))


def assert_adjoint(dy, y, pairs, *, tolerance: float = 1e-11):
    """<dy, A(x)> = <A*(dy), x> for every pair (gradient, argument)."""
    left = inner(dy, y)
    size = np.linalg.norm(oracle.wide(dy)) * np.linalg.norm(oracle.wide(y)) + 1
    for gradient, argument in pairs:
        right = inner(gradient, argument)
        assert np.isfinite(right) and abs(left - right) <= tolerance * size, f"{left} is not {right}"


def assert_same_bits(name: str, arrays, options: dict):
    """Two calls give the same bits."""
    first, second = (getattr(ops, name)(*arrays, **options) for _ in range(2))
    first, second = (a if isinstance(a, tuple) else (a,) for a in (first, second))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def unread(shape, positions, data_format: str | None) -> np.ndarray:
    """True at every element of an array of `shape` whose spatial position is not among `positions`."""
    never = np.ones(shape, bool)
    view = np.moveaxis(never, 1, -1) if data_format == "channels_first" else never
    for position in positions:
        view[oracle.at(position)] = False
    return never


def with_poison(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """A copy of `values` with NaN where told."""
    values = values.copy()
    values[where] = poisoned((), values.dtype)
    return values
