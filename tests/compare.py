"""Comparison that can fail: finite values, exact shapes and dtypes, a tolerance derived from the arithmetic; and arrays
whose memory is poisoned wherever the code under test has no business."""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

# Rounding errors of n additions grow like sqrt(n) partial sums of random sign; 4 covers the tail over the few thousand
# elements of one comparison. A missing tap or a shifted pixel is off by 0.1 and more, four orders above it in float32.
SAFETY = 4.0

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
REAL_DTYPES = DTYPES[:4]


def dtype_of(name) -> np.dtype:
    """The NumPy dtype, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def is_complex(dtype) -> bool:
    return dtype_of(dtype).kind == "c"


def is_half(dtype) -> bool:
    """True for the 16-bit types, which are summed in float32."""
    return dtype_of(dtype).itemsize == 2


def eps(dtype) -> float:
    """Distance from 1 to the next number of a dtype."""
    return float(ml_dtypes.finfo(dtype_of(dtype)).eps)


def tolerance(expected, *, dtype, terms: int, scale: float | None = None, roundings: int = 2, slack=0.0):
    """How far each element may be off.

    `roundings` half units in the last place of the element itself, for storing it; SAFETY * eps * sqrt(terms) * scale
    for summing `terms` products, in float32 for the 16-bit types; and `slack`.
    """
    accumulator = eps("float32") if is_half(dtype) else eps(dtype)
    if scale is None:
        scale = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    sums = SAFETY * accumulator * math.sqrt(max(terms, 1)) * scale
    return roundings * eps(dtype) / 2 * np.abs(expected) + sums + slack


def assert_close(actual, expected, *, dtype, terms: int, what: str = "", **allowance):
    """Fails unless `actual` has the dtype and the shape and is close to `expected`, element by element.

    Args:
        expected: the answer in float64 or complex128.
        terms: how many products one element sums.
        what: what is compared, for the message.
        allowance: scale, the size of the largest sum on the way (by default the largest expected value, at least 1);
            roundings, the times an element was rounded to `dtype` (2); slack, for roundings on the way (0).
    """
    what = what or "result"
    expected = np.asarray(expected)
    assert actual.dtype == dtype_of(dtype), f"{what}: dtype {actual.dtype}, expected {dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert np.all(np.isfinite(expected)), f"{what}: the expected values are not finite, nothing can be compared"
    actual = np.asarray(actual).astype(np.complex128 if is_complex(dtype) else np.float64)
    assert_finite(actual, what)
    off = np.abs(actual - expected)
    excess = off - tolerance(expected, dtype=dtype, terms=terms, **allowance)
    if excess.size and excess.max() > 0:
        index = tuple(map(int, np.unravel_index(np.argmax(excess), excess.shape)))
        allowed = off[index] - excess[index]
        raise AssertionError(
            f"{what}: {np.count_nonzero(excess > 0)} of {excess.size} elements differ; the worst is at {index}: "
            f"{actual[index]!r} instead of {expected[index]!r}, off by {off[index]:.3g} where {allowed:.3g} is allowed"
        )


def assert_finite(x, what: str = "result") -> None:
    """Fails on the first NaN or infinity, naming its place."""
    wrong = np.argwhere(~np.isfinite(np.asarray(x)))
    if len(wrong):
        index = tuple(map(int, wrong[0]))
        raise AssertionError(
            f"{what}: {len(wrong)} of {np.size(x)} elements are not finite; first at {index}: {x[index]!r}"
        )


# --- Poisoned memory ---------------------------------------------------------------------------------------------

POISON = np.nan


def poisoned(shape, dtype) -> np.ndarray:
    """An array of NaN: an element that is not written, or read before it is, shows."""
    return np.full(shape, POISON, dtype_of(dtype))


LAYOUTS = ("contiguous", "sliced", "reversed", "fortran", "offset", "unaligned")


@dataclass
class Embedded:
    """An array that lives inside a larger poisoned one."""

    view: np.ndarray
    base: np.ndarray

    def assert_surroundings_untouched(self) -> None:
        """Fails when something outside the view was written."""
        kept, self.view[...] = self.view.copy(), POISON
        written = np.count_nonzero(~np.isnan(self.base))
        self.view[...] = kept
        assert written == 0, f"{written} elements outside of the output were written"


def embed(values: np.ndarray, layout: str) -> Embedded:
    """`values` as a view with the strides of `layout`, everything around it poisoned.

    contiguous: nothing around it; sliced: every second element of every axis, from the second on; reversed: the same
    with negative strides; fortran: first axis fastest; offset: a block inside a larger one, rows longer than the view;
    unaligned: contiguous, but one byte off every address the processor likes.
    """
    shape = values.shape
    if layout == "contiguous":
        base = poisoned(shape, values.dtype)
        view = base
    elif layout == "fortran":
        base = poisoned(shape[::-1], values.dtype)
        view = base.T
    elif layout == "unaligned":
        base = view = np.zeros(values.nbytes + 1, np.uint8)[1:].view(values.dtype).reshape(shape)
    elif layout == "offset":
        base = poisoned([n + 3 for n in shape], values.dtype)
        view = base[tuple(slice(1, 1 + n) for n in shape)]
    else:
        base = poisoned([2 * n + 1 for n in shape], values.dtype)
        view = base[tuple(slice(1, 2 * n, 2) for n in shape)]
        if layout == "reversed":
            view = view[tuple(slice(None, None, -1) for _ in shape)]
    view[...] = values
    return Embedded(view, base)


def frozen(values: np.ndarray, layout: str = "contiguous") -> np.ndarray:
    """`values` in the memory layout asked for, read-only, so that whoever writes into an input is told."""
    view = embed(values, layout).view
    view.flags.writeable = False
    return view


def empty_output(shape, dtype, layout: str) -> Embedded:
    """A poisoned array to pass as `out`."""
    return embed(poisoned(shape, dtype), layout)
