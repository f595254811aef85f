"""Upsampling by whole factors on NumPy arrays, one spatial axis after the other."""

from __future__ import annotations

import functools

import numpy as np

from cuconv.interpolation import taps
from cuconv.plan.reference import BLOCK_BYTES, fit_block
from cuconv.reference.blocks import Array, blocks, channels_last, compute_dtype


def upsample(x: Array, size: tuple[int, ...], interpolation: str, data_format: str, out: Array) -> None:
    """Write x, enlarged `size` times, to `out`; nearest takes any dtype."""
    x, out = channels_last(x, data_format), channels_last(out, data_format)
    if interpolation == "nearest":
        _split(out, size)[...] = x[_between(len(size))]
        return
    _apply([taps(n, factor, interpolation) for n, factor in zip(x.shape[1:-1], size, strict=True)], x, out)


def upsample_input_grad(dy: Array, size: tuple[int, ...], interpolation: str, data_format: str, out: Array) -> None:
    """Write the gradient of the input to `out`: each input collects its share of every output, in a fixed order."""
    dy, out = channels_last(dy, data_format), channels_last(out, data_format)
    if interpolation == "nearest":
        axes = tuple(range(2, 2 + 2 * len(size), 2))
        out[...] = _split(dy, size).sum(axis=axes, dtype=compute_dtype(dy.dtype))
        return
    _apply([_collected(n, factor, interpolation) for n, factor in zip(out.shape[1:-1], size, strict=True)], dy, out)


def _split(array: Array, size: tuple[int, ...]) -> Array:
    """A view [b, n, size, n, size, .., C] of an enlarged array."""
    shape = [array.shape[0]]
    for length, factor in zip(array.shape[1:-1], size, strict=True):
        shape += [length // factor, factor]
    return array.reshape(*shape, array.shape[-1], copy=False)


def _between(rank: int) -> tuple[slice | None, ...]:
    """An index that puts a new axis behind every spatial one."""
    return (slice(None), *(slice(None), None) * rank)


def _apply(tables: list[tuple[Array, Array]], x: Array, out: Array) -> None:
    """Write ``sum over t of weight[p, t] * x[index[p, t]]`` along every spatial axis, a block of outputs at a time."""
    dtype = compute_dtype(x.dtype)
    block = fit_block(out.shape[:-1], BLOCK_BYTES // max(1, out.shape[-1] * dtype.itemsize))
    for items, *at in blocks(out.shape[:-1], block):
        cut = [(index[part], weight[part]) for (index, weight), part in zip(tables, at, strict=True)]
        spans = [slice(int(index.min()), int(index.max()) + 1) for index, _ in cut]
        values = x[(items, *spans)].astype(dtype, copy=False)
        for axis, ((index, weight), span) in enumerate(zip(cut, spans, strict=True), start=1):
            index, weight = index - span.start, weight.astype(dtype)
            column = (-1,) + (1,) * (values.ndim - 1 - axis)
            shares = (
                values.take(index[:, tap], axis=axis) * weight[:, tap].reshape(column) for tap in range(index.shape[1])
            )
            values = functools.reduce(np.add, shares)
        out[(items, *at)] = values


@functools.lru_cache(maxsize=64)
def _collected(n: int, size: int, interpolation: str) -> tuple[Array, Array]:
    """The same table read the other way: the outputs that hold a share of each input, [n, shares], and the weights."""
    index, weight = taps(n, size, interpolation)
    outputs = np.broadcast_to(np.arange(n * size)[:, None], index.shape)
    order = np.argsort(index, axis=None, kind="stable")
    inputs = index.ravel()[order]
    place = np.arange(inputs.size) - np.searchsorted(inputs, inputs)  # number of this share within its input
    table = np.zeros((n, int(place.max(initial=0)) + 1), np.intp)
    shares = np.zeros(table.shape)
    table[inputs, place] = outputs.ravel()[order]
    shares[inputs, place] = weight.ravel()[order]
    return table, shares
