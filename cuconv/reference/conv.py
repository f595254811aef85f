"""Convolution and its kernel gradient on NumPy arrays; strategies and sizes come from :mod:`cuconv.plan.reference`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan.reference import HostPlan, plan_conv
from cuconv.reference.blocks import (
    Activation,
    Array,
    blocks,
    channels_last,
    compute_dtype,
    conjugated,
    lengths,
    merged,
    read_padded,
    reads,
    strided,
)


def conv(
    shape: ConvShape, x: Array, w: Array, bias: Array | None, activation: Activation | None, out: Array, workspace: int
) -> None:
    """Write ``activation(conv(x, w) + bias)`` to `out`.

    Args:
        x: ``shape.x_shape``.
        w: ``shape.w_shape``.
        bias: [F] or None.
        activation: a pointwise function with an ``out=`` argument, or None.
        out: ``shape.y_shape``, of any strides, not overlapping the other arrays.
        workspace: bytes of scratch memory.
    """
    if out.size == 0:
        return
    shape, x, out = _without_taps(shape, x, out)
    dtype = compute_dtype(x.dtype)
    plan = plan_conv(shape, dtype.itemsize, workspace)
    run = _conv_windows if plan.strategy == "windows" else _conv_columns
    run(shape, plan, x, w.astype(dtype, copy=False), bias, activation, out)


def kernel_grad(shape: ConvShape, x: Array, dy: Array, out: Array, workspace: int) -> None:
    """Write ``dw[r,c,f] = sum over b,p of conj(x[b, p*stride + r*dilation - pad_before, c]) * dy[b,p,f]`` to `out`.

    Blocks are added in a fixed order, so the result is the same bits on every call.
    """
    if dy.size == 0 or x.size == 0:
        out[...] = 0
        return
    shape, x, dy = _without_taps(shape, x, dy)
    dtype = compute_dtype(x.dtype)
    plan = plan_conv(shape, dtype.itemsize, workspace)
    first = shape.data_format != CHANNELS_LAST
    taps, groups = math.prod(shape.kernel_size), shape.groups
    depth, filters = taps * shape.in_channels // groups, shape.filters // groups
    total = np.zeros((groups, depth, filters), dtype)
    part = np.empty_like(total)
    columns = Columns(shape, plan, dtype)
    dy_last = channels_last(dy, shape.data_format)
    # One item at a time in channels_first, where items do not merge to one matrix.
    block = (1, *plan.block[1:]) if first else plan.block
    for at in blocks(dy_last.shape[:-1], block):
        matrix = columns.fill(x, at)
        # The sum of conj(x) * dy is the conjugate of the sum of x * conj(dy), and dy is the smaller to conjugate.
        rhs = conjugated(_rows(dy_last[at], shape, dtype))
        if first:
            matrix, rhs = matrix[0], rhs[0]
        np.matmul(matrix.swapaxes(-1, -2), rhs, out=part)
        total += part
    out[...] = conjugated(total.transpose(1, 0, 2).reshape(out.shape))


def _without_taps(shape: ConvShape, x: Array, out: Array) -> tuple[ConvShape, Array, Array]:
    """A convolution of one tap, stride 1 and no padding as one sequence: all positions are rows of one matrix."""
    if shape.rank == 1 and shape.batch == 1 or max(shape.kernel_size) > 1 or shape.in_size != shape.out_size:
        return shape, x, out
    if shape.data_format != CHANNELS_LAST or shape.groups > 1 or max(shape.pad_before) > 0:
        return shape, x, out
    rows = out.size // shape.filters
    flat_x, flat_out = merged(x, (1, rows, shape.in_channels)), merged(out, (1, rows, shape.filters))
    if flat_x is None or flat_out is None:
        return shape, x, out
    flat = ConvShape(1, (rows,), (rows,), shape.in_channels, shape.filters, (1,), (1,), (1,), (0,), 1, CHANNELS_LAST)
    return flat, flat_x, flat_out


def _conv_windows(
    shape: ConvShape, plan: HostPlan, x: Array, w: Array, bias: Array | None, activation: Activation | None, y: Array
) -> None:
    """Products of overlapping windows as they lie in memory: rank 1, channels last, dilation 1, one group."""
    (taps,), (stride,), (pad,) = shape.kernel_size, shape.strides, shape.pad_before
    channels, depth = shape.in_channels, taps * shape.in_channels
    w = w.reshape(depth, shape.filters)
    phases = -(-taps // stride)
    padded = pad > 0 or (shape.out_size[0] - 1) * stride - pad + taps > shape.in_size[0]
    copied = padded or x.dtype != w.dtype or not x.flags.c_contiguous
    direct = y.dtype == w.dtype and y.flags.c_contiguous
    for items, positions in blocks(y.shape[:2], plan.block):
        count, rows = lengths((items, positions))
        span = (positions.start * stride - pad, (positions.stop - 1) * stride - pad + taps)
        if copied:
            source, origin, pitch = np.empty((count, span[1] - span[0], channels), w.dtype), 0, (span[1] - span[0]) * channels
            read_padded(x[items], (span,), source)
        else:
            pitch = x.shape[1] * channels
            source, origin = x, items.start * pitch + span[0] * channels
        acc = y[items, positions] if direct else np.empty((count, rows, shape.filters), w.dtype)
        for phase in range(min(phases, rows)):
            shown = (count, -(-(rows - phase) // phases), depth)
            window = strided(source, shown, (pitch, phases * stride * channels, 1), origin + phase * stride * channels)
            np.matmul(window, w, out=acc[:, phase::phases])
        if bias is not None:
            acc += bias
        if activation is not None:
            activation(acc, out=acc)
        if not direct:
            y[items, positions] = acc


def _conv_columns(
    shape: ConvShape, plan: HostPlan, x: Array, w: Array, bias: Array | None, activation: Activation | None, y: Array
) -> None:
    """Products of window matrices that are copied block by block."""
    groups = shape.groups
    filters = shape.filters // groups
    w = w.reshape(-1, groups, filters).transpose(1, 0, 2)
    bias = None if bias is None else bias.reshape(groups, 1, filters)
    columns = Columns(shape, plan, w.dtype)
    y = channels_last(y, shape.data_format)
    for at in blocks(y.shape[:-1], plan.block):
        target = y[at]
        acc = _rows_view(target, shape) if y.dtype == w.dtype else None
        direct = acc is not None
        if acc is None:
            scratch = np.empty(_stored(target.shape, shape.data_format), w.dtype)
            acc = _rows_view(channels_last(scratch, shape.data_format), shape)
        np.matmul(columns.fill(x, at), w, out=acc)
        if bias is not None:
            acc += bias
        if activation is not None:
            activation(acc, out=acc)
        if not direct:
            target[...] = channels_last(scratch, shape.data_format)


def _stored(shape: Sequence[int], data_format: str) -> tuple[int, ...]:
    """A channels-last shape in the order of memory of `data_format`."""
    return tuple(shape) if data_format == CHANNELS_LAST else (shape[0], shape[-1], *shape[1:-1])


def _rows_view(block: Array, shape: ConvShape) -> Array | None:
    """A channels-last block [b, p.., F] as matrices of one group, or None where that needs a copy.

    Channels-last memory gives [G, b*p, F/G]; channels-first memory [b, G, p, F/G], whose matrices are stored transposed.
    """
    count, filters = block.shape[0], block.shape[-1]
    groups = shape.groups
    rows = math.prod(block.shape[1:-1])
    if shape.data_format == CHANNELS_LAST:
        flat = merged(block, (count * rows, groups, filters // groups))
        # A row stride below the row length would make BLAS refuse the matrix.
        return None if flat is None or flat.strides[-1] != flat.itemsize else flat.transpose(1, 0, 2)
    flat = merged(np.moveaxis(block, -1, 1), (count, groups, filters // groups, rows))
    return None if flat is None or flat.strides[-1] != flat.itemsize else flat.swapaxes(-1, -2)


def _rows(block: Array, shape: ConvShape, dtype: np.dtype) -> Array:
    """As :func:`_rows_view` in `dtype`, copied where it must be."""
    view = _rows_view(block, shape) if block.dtype == dtype else None
    if view is not None:
        return view
    scratch = np.empty(_stored(block.shape, shape.data_format), dtype)
    channels_last(scratch, shape.data_format)[...] = block
    return _rows_view(channels_last(scratch, shape.data_format), shape)


class Columns:
    """The window matrix of one block of outputs after another: [G, b*p, taps*C/G], or [b, G, p, taps*C/G] in channels_first.

    Its buffer is allocated once; in channels_first the matrices are stored transposed, so that a row of memory is a row of
    positions, which x has in one piece too.
    """

    def __init__(self, shape: ConvShape, plan: HostPlan, dtype: np.dtype) -> None:
        self.shape, self.plan = shape, plan
        self.taps = math.prod(shape.kernel_size)
        self.buffer = np.empty(math.prod(plan.block) * self.taps * shape.in_channels, dtype)

    def fill(self, x: Array, at: tuple[slice, ...]) -> Array:
        """The window matrix of the outputs `at` (batch, then positions), valid until the next call."""
        shape, groups = self.shape, self.shape.groups
        count, *sizes = lengths(at)
        rows, depth = math.prod(sizes), shape.in_channels // groups
        buffer = self.buffer[: count * rows * self.taps * shape.in_channels]
        x = channels_last(x, shape.data_format)[at[0]]
        if shape.data_format == CHANNELS_LAST:
            if self.plan.strategy == "taps":
                stored = buffer.reshape(groups, count, *sizes, *shape.kernel_size, depth)
                self._copy_taps(x, at[1:], np.moveaxis(stored, 0, -2))
            else:
                self._copy_tile(x, at[1:], buffer)
            return buffer.reshape(groups, count * rows, self.taps * depth)
        stored = buffer.reshape(count, groups, *shape.kernel_size, depth, *sizes)
        rank = shape.rank
        order = (0, *range(rank + 3, 2 * rank + 3), *range(2, rank + 2), 1, rank + 2)
        self._copy_taps(x, at[1:], stored.transpose(order))
        return buffer.reshape(count, groups, self.taps * depth, rows).swapaxes(-1, -2)

    def _copy_taps(self, x: Array, at: tuple[slice, ...], windows: Array) -> None:
        """Fill `windows` [b, p.., taps.., G, C/G] from x [b, L.., C], one slice of x a tap."""
        shape = self.shape
        x = x.reshape(*x.shape[:-1], shape.groups, shape.in_channels // shape.groups)
        axes = [
            [reads(block, n, s, tap * d - pad) for tap in range(k)]
            for block, n, k, s, d, pad in zip(
                at, shape.in_size, shape.kernel_size, shape.strides, shape.dilation_rate, shape.pad_before, strict=True
            )
        ]
        sizes = lengths(at)
        every = (slice(None),)
        for tap in itertools.product(*(range(k) for k in shape.kernel_size)):
            inside, source = zip(*(axes[axis][index] for axis, index in enumerate(tap)), strict=True)
            target = windows[(*every, *(slice(None),) * shape.rank, *tap)]
            if lengths(inside) != sizes:
                target[...] = 0
            target[every + inside] = x[every + source]

    def _copy_tile(self, x: Array, at: tuple[slice, ...], buffer: Array) -> None:
        """Fill `buffer` [b, p.., taps * C] from x [b, L.., C] in runs of a kernel row: dilation 1, one group."""
        shape = self.shape
        spans = [
            (block.start * s - pad, (block.stop - 1) * s - pad + k)
            for block, s, k, pad in zip(at, shape.strides, shape.kernel_size, shape.pad_before, strict=True)
        ]
        tile = np.empty((x.shape[0], *(last - first for first, last in spans), shape.in_channels), buffer.dtype)
        read_padded(x, spans, tile)
        steps = [step // tile.itemsize for step in tile.strides]
        outer, run = shape.kernel_size[:-1], shape.kernel_size[-1] * shape.in_channels
        shown = (x.shape[0], *lengths(at), *outer, run)
        moves = [step * s for step, s in zip(steps[1:-1], shape.strides, strict=True)]
        np.copyto(buffer.reshape(shown), strided(tile, shown, (steps[0], *moves, *steps[1 : shape.rank], 1)))
