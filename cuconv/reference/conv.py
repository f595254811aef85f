"""Convolution and its kernel gradient on NumPy arrays; strategies and sizes come from :mod:`cuconv.plan.reference`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuconv.activations import Activation
from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan.reference import HostPlan, plan_columns, plan_conv
from cuconv.reference.blocks import (
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
    zero_outside,
)


def conv(
    shape: ConvShape,
    x: Array,
    w: Array,
    bias: Array | None,
    activation: Activation | None,
    out: Array,
    workspace: int,
    precision: str = "highest",
) -> None:
    """Write ``activation(conv(x, w) + bias)`` to `out`.

    Args:
        x: ``shape.x_shape``.
        w: ``shape.w_shape``.
        bias: [F] or None.
        activation: a pointwise function with an ``out=`` argument, or None.
        out: ``shape.y_shape``, of any strides, not overlapping the other arrays.
        workspace: bytes of scratch memory.
        precision: "highest", or "high", of which only tensor cores make less.
    """
    if out.size == 0:
        return
    shape, x, out = _without_taps(shape, x, out)
    dtype = compute_dtype(x.dtype)
    plan = plan_conv(shape, dtype.itemsize, workspace)
    run = _conv_windows if plan.strategy == "windows" else _conv_columns
    run(shape, plan, x, w.astype(dtype, copy=False), bias, activation, out)


def kernel_grad(shape: ConvShape, x: Array, dy: Array, out: Array, workspace: int, precision: str = "highest") -> None:
    """Write ``dw[r,c,f] = sum over b,p of conj(x[b, p*stride + r*dilation - pad_before, c]) * dy[b,p,f]`` to `out`.

    Blocks are added in a fixed order, so the result is the same bits on every call.
    """
    if dy.size == 0 or x.size == 0:
        out[...] = 0
        return
    shape, x, dy = _without_taps(shape, x, dy)
    dtype = compute_dtype(x.dtype)
    plan = plan_columns(shape, dtype.itemsize, workspace)
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
        source = dy_last[at]
        rhs, stored = _matrices(source, shape, dtype)
        if stored is not source:
            stored[...] = source
        # The sum of conj(x) * dy is the conjugate of the sum of x * conj(dy), and dy is the smaller to conjugate.
        rhs = conjugated(rhs)
        if first:
            matrix, rhs = matrix[0], rhs[0]
        np.matmul(matrix.swapaxes(-1, -2), rhs, out=part)
        total += part
    out[...] = conjugated(total.transpose(1, 0, 2).reshape(out.shape))


def fuses(activation: Activation) -> bool:
    """Whether the forward functions of this engine apply `activation` themselves."""
    return activation.pointwise and activation.name != "linear"


def _without_taps(shape: ConvShape, x: Array, out: Array) -> tuple[ConvShape, Array, Array]:
    """A convolution of one tap, stride 1 and no padding as one sequence: all positions are rows of one matrix."""
    plain = shape.data_format == CHANNELS_LAST and shape.groups == 1 and shape.in_size == shape.out_size
    single = max(*shape.kernel_size, *shape.strides) == 1 and not any(shape.pad_before)
    if not (plain and single) or (shape.rank == 1 and shape.batch == 1):
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
    in_place = x.dtype == w.dtype and x.flags.c_contiguous
    # Rows of y may lie apart, but BLAS wants each in one piece and behind the one before.
    direct = y.dtype == w.dtype and y.strides[-1] == y.itemsize and y.strides[-2] >= shape.filters * y.itemsize
    # Outputs [inner, outer) read nothing of the padding; only the others need a padded copy of what they read.
    inner = min(max(0, -(-pad // stride)), y.shape[1]) if in_place else 0
    outer = max(inner, min(y.shape[1], (x.shape[1] + pad - taps) // stride + 1)) if in_place else inner
    for start, stop, padded in ((0, inner, True), (inner, outer, False), (outer, y.shape[1], True)):
        for items, piece in blocks((y.shape[0], stop - start), plan.block):
            positions = slice(start + piece.start, start + piece.stop)
            count, rows = lengths((items, positions))
            first = positions.start * stride - pad
            span = (rows - 1) * stride + taps
            if padded:
                source, origin, pitch = np.empty((count, span, channels), w.dtype), 0, span * channels
                read_padded(x[items], ((first, first + span),), source)
            else:
                pitch = x.shape[1] * channels
                source, origin = x, items.start * pitch + first * channels
            acc = y[items, positions] if direct else np.empty((count, rows, shape.filters), w.dtype)
            for phase in range(min(phases, rows)):
                shown = (count, -(-(rows - phase) // phases), depth)
                steps = (pitch, phases * stride * channels, 1)
                window = strided(source, shown, steps, origin + phase * stride * channels)
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
        acc, stored = _matrices(target, shape, w.dtype)
        np.matmul(columns.fill(x, at), w, out=acc)
        if bias is not None:
            acc += bias
        if activation is not None:
            activation(acc, out=acc)
        if stored is not target:
            target[...] = stored


def _stored(shape: Sequence[int], data_format: str) -> tuple[int, ...]:
    """A channels-last shape in the order of memory of `data_format`."""
    return tuple(shape) if data_format == CHANNELS_LAST else (shape[0], shape[-1], *shape[1:-1])


def _matrices(block: Array, shape: ConvShape, dtype: np.dtype) -> tuple[Array, Array]:
    """A channels-last block [b, p.., F] as matrices of one group in `dtype`, and the block they are views of.

    That is `block` itself where its memory allows, otherwise a new one of the same shape, not filled.
    """
    if block.dtype == dtype:
        try:
            return _grouped(block, shape), block
        except ValueError:
            pass
    scratch = channels_last(np.empty(_stored(block.shape, shape.data_format), dtype), shape.data_format)
    return _grouped(scratch, shape), scratch


def _grouped(block: Array, shape: ConvShape) -> Array:
    """Views [G, b*p, F/G] of channels-last memory; of channels-first memory [b, G, p, F/G], stored transposed.

    Raises:
        ValueError: the axes of `block` cannot be merged, or a row is not in one piece as BLAS needs it.
    """
    count, filters, groups = block.shape[0], block.shape[-1], shape.groups
    rows = math.prod(block.shape[1:-1])
    if shape.data_format == CHANNELS_LAST:
        flat = block.reshape((count * rows, groups, filters // groups), copy=False)
        views = flat.transpose(1, 0, 2)
    else:
        flat = np.moveaxis(block, -1, 1).reshape((count, groups, filters // groups, rows), copy=False)
        views = flat.swapaxes(-1, -2)
    if flat.strides[-1] != flat.itemsize:
        raise ValueError("a row is not in one piece")
    return views


class Columns:
    """The window matrix of one block of outputs after another.

    It is [G, b*p, taps*C/G], in channels_first [b, G, p, taps*C/G].

    Its buffer is allocated once; in channels_first the matrices are stored transposed, so that a row of memory is a row
    of positions, which x has in one piece too.
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
                return buffer.reshape(groups, count * rows, self.taps * depth)
            return self._windows(x, at[1:], buffer)
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
        every: tuple[Any, ...] = (slice(None),)
        for tap in itertools.product(*(range(k) for k in shape.kernel_size)):
            inside, source = zip(*(axes[axis][index] for axis, index in enumerate(tap)), strict=True)
            target = windows[every * (1 + shape.rank) + tap]
            zero_outside(target, inside)
            target[every + inside] = x[every + source]

    def _windows(self, x: Array, at: tuple[slice, ...], buffer: Array) -> Array:
        """The window matrix [1, b*p, taps*C] of x [b, L.., C], one group, in `buffer` unless x holds it as it is."""
        shape = self.shape
        spans = [
            (block.start * s - pad, (block.stop - 1) * s - pad + k_eff)
            for block, s, k_eff, pad in zip(at, shape.strides, shape.k_eff, shape.pad_before, strict=True)
        ]
        inside = all(first >= 0 and last <= n for (first, last), n in zip(spans, shape.in_size, strict=True))
        if inside and x.dtype == buffer.dtype and x.flags.c_contiguous:
            tile, corner = x, [first for first, _ in spans]
        else:
            sizes = [last - first for first, last in spans]
            tile, corner = np.empty((x.shape[0], *sizes, shape.in_channels), buffer.dtype), [0] * shape.rank
            read_padded(x, spans, tile)
        batch, *steps, _ = (step // tile.itemsize for step in tile.strides)
        origin = sum(first * step for first, step in zip(corner, steps, strict=True))
        moves = [step * s for step, s in zip(steps, shape.strides, strict=True)]
        depth = self.taps * shape.in_channels
        if shape.rank == 1 and x.shape[0] == 1 and shape.k_eff[0] == self.taps <= shape.strides[0]:
            # Windows that do not overlap are the rows of a matrix.
            return strided(tile, (1, *lengths(at), depth), (0, *moves, 1), origin)
        taps = [step * d for step, d in zip(steps, shape.dilation_rate, strict=True)]
        shown = (x.shape[0], *lengths(at), *shape.kernel_size, shape.in_channels)
        # With dilation 1 the last two axes are one run in both arrays, which the copy finds out by itself.
        np.copyto(buffer.reshape(shown), strided(tile, shown, (batch, *moves, *taps, 1), origin))
        return buffer.reshape(1, -1, depth)
