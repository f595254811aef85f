"""What every NumPy path shares: channels-last views, blocks of positions, padded reads, the epilogue.

All paths are written for channels-last views. A channels-first array is viewed, not copied, so its memory order shows
only in strides; the strategies in :mod:`cuconv.plan.reference` choose a block layout that suits it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

from cuconv.geometry import CHANNELS_LAST

Array = np.ndarray

HALF_TYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype sums are taken in: float32 for the 16-bit types, otherwise the dtype itself."""
    return np.dtype(np.float32) if dtype in HALF_TYPES else dtype


def conjugated(array: Array) -> Array:
    """The complex conjugate; a real array as it is, without a copy."""
    return array.conj() if array.dtype.kind == "c" else array


def channels_last(array: Array, data_format: str) -> Array:
    """A view of `array` with the channels on the last axis."""
    return array if data_format == CHANNELS_LAST else np.moveaxis(array, 1, -1)


def blocks(sizes: Sequence[int], block: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Slices that cover `sizes` in pieces of at most `block`, the last axis fastest."""
    starts = [range(0, size, step) for size, step in zip(sizes, block, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(at, min(at + step, size)) for at, step, size in zip(corner, block, sizes, strict=True))


def lengths(block: Sequence[slice]) -> tuple[int, ...]:
    """Number of positions of each slice."""
    return tuple(part.stop - part.start for part in block)


def strided(array: Array, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> Array:
    """A view of contiguous `array` with `strides` and `offset` counted in elements."""
    size = array.itemsize
    return np.ndarray(shape, array.dtype, array, offset * size, [step * size for step in strides])


def merged(array: Array, shape: Sequence[int]) -> Array | None:
    """`array` with its axes merged to `shape`, as a view; None where that needs a copy."""
    try:
        return np.reshape(array, shape, copy=False)
    except ValueError:
        return None


def reads(block: slice, n: int, stride: int, offset: int) -> tuple[slice, slice]:
    """Where a block of outputs p reads ``l = p * stride + offset`` inside [0, n).

    Returns:
        The part of the block (counted from its start) with l inside, and the slice of the input it reads; both may be
        empty.
    """
    first = max(block.start, -(offset // stride))
    last = min(block.stop, (n - 1 - offset) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    start = first * stride + offset
    return slice(first - block.start, last - block.start), slice(start, (last - 1) * stride + offset + 1, stride)


def zero_outside(block: Array, inside: Sequence[slice]) -> None:
    """Set `block` [b, p.., ...] to zero where a position lies outside of the slices `inside`."""
    for axis, part in enumerate(inside, start=1):
        before = (slice(None),) * axis
        if part.start > 0:
            block[(*before, slice(0, part.start))] = 0
        if part.stop < block.shape[axis]:
            block[(*before, slice(part.stop, None))] = 0


def read_padded(x: Array, spans: Sequence[tuple[int, int]], out: Array) -> None:
    """Copy positions ``spans`` of channels-last `x` [b, L.., C] into `out`, zeros where they lie outside of x."""
    inside = [reads(slice(first, last), n, 1, 0) for (first, last), n in zip(spans, x.shape[1:-1], strict=True)]
    zero_outside(out, [at for at, _ in inside])
    out[(slice(None), *(at for at, _ in inside))] = x[(slice(None), *(source for _, source in inside))]
