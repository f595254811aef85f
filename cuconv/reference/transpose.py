"""Transposed convolution on NumPy arrays, which is the input gradient of a convolution with its kernel conjugated."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from cuconv.activations import Activation
from cuconv.geometry import ConvShape, Halo
from cuconv.plan.reference import plan_slab, plan_transpose
from cuconv.reference.blocks import Array, blocks, channels_last, compute_dtype, strided
from cuconv.reference.conv import conv

AddTaps = Callable[[ConvShape, Array, Array, Array, tuple[slice, ...], Sequence[int]], None]


def conv_transpose(
    shape: ConvShape,
    y: Array,
    w: Array,
    bias: Array | None,
    activation: Activation | None,
    out: Array,
    workspace: int,
    precision: str = "highest",
) -> None:
    """Write ``activation(bias[c] + sum over p,r,f of y[b,p,f] * w[r,c,f])`` to `out`.

    The sum at position u is over the p and r with ``p*stride + r*dilation - pad_before = u``.

    Args:
        shape: the convolution this is the transpose of; `y` is ``shape.y_shape``, `out` is ``shape.x_shape``.
        w: ``shape.w_shape``.
        bias: [C] or None.
        activation: a pointwise function with an ``out=`` argument, or None.
        workspace: bytes of scratch memory.
        precision: as of :func:`cuconv.reference.conv.conv`.
    """
    if out.size == 0:
        return
    dtype = compute_dtype(y.dtype)
    plan = plan_transpose(shape, dtype.itemsize, workspace)
    if plan.strategy == "gather":
        conv(flipped_shape(shape), y, _flipped_kernel(shape, w), bias, activation, out, workspace)
    elif plan.strategy == "subpixel" and out.flags.c_contiguous:
        _subpixel(shape, y, w, bias, activation, out, workspace)
    else:
        scatter(_add_taps, shape, plan.block, y, w.astype(dtype, copy=False), bias, activation, out, workspace)


def flipped_shape(shape: ConvShape) -> ConvShape:
    """The convolution that gathers what `shape`, of stride 1, would scatter."""
    pads = zip(shape.k_eff, shape.pad_before, strict=True)
    return dataclasses.replace(
        shape,
        in_size=shape.out_size,
        out_size=shape.in_size,
        in_channels=shape.filters,
        filters=shape.in_channels,
        pad_before=tuple(k_eff - 1 - pad for k_eff, pad in pads),
    )


def _flipped_kernel(shape: ConvShape, w: Array) -> Array:
    """w [taps.., C/G, F] with its taps reversed and, in every group, its channels exchanged: [taps.., F/G, C]."""
    depth = shape.in_channels // shape.groups
    split = np.flip(w, axis=tuple(range(shape.rank))).reshape(
        *shape.kernel_size, depth, shape.groups, shape.depth_multiplier
    )
    return np.moveaxis(split, -1, -3).swapaxes(-1, -2).reshape(*shape.kernel_size, -1, shape.in_channels)


def _subpixel(
    shape: ConvShape, y: Array, w: Array, bias: Array | None, activation: Activation | None, out: Array, workspace: int
) -> None:
    """Convolutions of stride 1 that fill `out` [b, q * s, C] as [b, q, s * C]: rank 1, dilation 1.

    Output ``q*s + r`` is position ``(q + shift)*s + rho`` of the uncropped result, and that is, with t = k / s,
    the sum over a < t of ``y[q + shift - a] * w[a*s + rho]``. The residues r of one shift are one convolution.
    `out` is contiguous.
    """
    (stride,), (pad,), (size,) = shape.strides, shape.pad_before, shape.in_size
    channels, windows = shape.in_channels, shape.kernel_size[0] // stride
    flipped = w.reshape(windows, stride, channels, shape.filters)[::-1]
    columns = out.reshape(out.shape[0], size // stride, stride * channels)
    turn = stride - pad % stride  # the first residue of the second shift
    for residues, shift in ((slice(0, turn), pad // stride), (slice(turn, stride), pad // stride + 1)):
        count = residues.stop - residues.start
        if count == 0:
            continue
        first = (residues.start + pad) % stride
        kernel = flipped[:, first : first + count].reshape(windows, count * channels, shape.filters).swapaxes(1, 2)
        part = dataclasses.replace(
            shape,
            in_size=shape.out_size,
            out_size=(size // stride,),
            in_channels=shape.filters,
            filters=count * channels,
            kernel_size=(windows,),
            strides=(1,),
            pad_before=(windows - 1 - shift,),
        )
        target = columns[:, :, residues.start * channels : residues.stop * channels]
        part_bias = None if bias is None else np.tile(bias, count)
        conv(part, y, np.ascontiguousarray(kernel), part_bias, activation, target, workspace // 2)


def scatter(
    add_taps: AddTaps,
    shape: ConvShape,
    block: tuple[int, ...],
    y: Array,
    w: Array,
    bias: Array | None,
    activation: Activation | None,
    out: Array,
    workspace: int,
) -> None:
    """Add every tap's product into slabs of the uncropped result, each complete before it is stored.

    Args:
        add_taps: adds the contributions of one block of `y`, see :func:`_add_taps`.
        block: batch items and positions of `y` that one call of `add_taps` gets.
    """
    y, out = channels_last(y, shape.data_format), channels_last(out, shape.data_format)
    reaches = [Halo(s, k_eff, pad) for s, k_eff, pad in zip(shape.strides, shape.k_eff, shape.pad_before, strict=True)]
    for items, *positions in blocks(out.shape[:-1], plan_slab(shape, w.itemsize, workspace)):
        spans = [_Span.of(*axis) for axis in zip(reaches, positions, y.shape[1:-1], strict=True)]
        count = items.stop - items.start
        slab = np.zeros((count, *(span.stop - span.start for span in spans), shape.in_channels), w.dtype)
        part = y[(items, *(span.read for span in spans))]
        origin = [span.read.start * s - span.start for span, s in zip(spans, shape.strides, strict=True)]
        for at in blocks(part.shape[:-1], block):
            add_taps(shape, part[at], w, slab, at, origin)
        acc = slab[(slice(None), *(span.crop for span in spans))]
        if bias is not None:
            acc += bias
        if activation is not None:
            activation(acc, out=acc)
        out[(items, *positions)] = acc


@dataclasses.dataclass(frozen=True)
class _Span:
    """One axis of a slab: [start, stop) of the uncropped result, from the inputs `read`; `crop` is kept."""

    start: int
    stop: int
    read: slice
    crop: slice

    @classmethod
    def of(cls, reach: Halo, kept: slice, n: int) -> _Span:
        begin, end = reach.output_range(kept.start, kept.stop)
        begin, end = max(begin, 0), min(end, n)
        start, stop = kept.start + reach.before, kept.stop + reach.before
        first, last = start, stop
        if begin < end:
            first, last = min(start, begin * reach.stride), max(stop, (end - 1) * reach.stride + reach.extent)
        return cls(first, last, slice(begin, max(begin, end)), slice(start - first, stop - first))


def slab_corner(shape: ConvShape, slab: Array, at: tuple[slice, ...], origin: Sequence[int]) -> tuple[int, list[int]]:
    """Where the first tap of the block `at` of y lies in `slab`, and the steps to the next item and positions.

    Both count elements.
    """
    batch, *steps = (step // slab.itemsize for step in slab.strides[:-1])
    corner = at[0].start * batch
    for part, first, s, step in zip(at[1:], origin, shape.strides, steps, strict=True):
        corner += (first + part.start * s) * step
    return corner, [batch, *(s * step for s, step in zip(shape.strides, steps, strict=True))]


def tap_offset(shape: ConvShape, slab: Array, tap: Sequence[int]) -> int:
    """Elements from the first tap to `tap` in `slab` [b, u.., C]."""
    steps = slab.strides[1:-1]
    return sum(t * d * step for t, d, step in zip(tap, shape.dilation_rate, steps, strict=True)) // slab.itemsize


def _add_taps(shape: ConvShape, y: Array, w: Array, slab: Array, at: tuple[slice, ...], origin: Sequence[int]) -> None:
    """Add the contributions of y [b, p.., F], the block `at`, to `slab` [b, u.., C]; p = 0 is u = `origin`."""
    groups, channels = shape.groups, shape.in_channels
    depth, filters = channels // groups, shape.filters // groups
    count, *sizes = y.shape[:-1]
    rows, taps = count * math.prod(sizes), math.prod(shape.kernel_size)
    y = np.ascontiguousarray(y, w.dtype).reshape(rows, groups, filters).transpose(1, 0, 2)
    products = np.matmul(y, w.reshape(taps * depth, groups, filters).transpose(1, 2, 0))
    products = products.reshape(groups, count, *sizes, taps, depth)
    corner, moves = slab_corner(shape, slab, at, origin)
    # Taps of one stride touch different outputs that lie side by side: with dilation 1 they are added as one run.
    run = shape.strides[-1] if groups == 1 and shape.dilation_rate[-1] == 1 else 1
    *outer, last = shape.kernel_size
    for index, tap in enumerate(itertools.product(*map(range, outer), range(0, last, run))):
        width = min(run, last - tap[-1])
        flat = index // -(-last // run) * last + tap[-1]  # number of this run's first tap
        target = strided(slab, (count, *sizes, width * channels), (*moves, 1), corner + tap_offset(shape, slab, tap))
        if groups == 1:
            target += products[0, ..., flat : flat + width, :].reshape(target.shape)
        else:
            target.reshape(count, *sizes, groups, depth)[...] += np.moveaxis(products[..., flat, :], 0, -2)
