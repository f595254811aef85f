"""Separable convolution on NumPy arrays: depthwise, then pointwise, a slab of positions at a time.

The array between the two is never whole in memory: each slab of outputs is a convolution of its own, of fewer positions
and shifted padding, and its intermediate fits the workspace.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from cuconv.activations import Activation
from cuconv.geometry import CHANNELS_LAST, ConvShape, Halo
from cuconv.plan.reference import fit_block
from cuconv.reference.blocks import Array, blocks, compute_dtype
from cuconv.reference.conv import conv, kernel_grad
from cuconv.reference.depthwise import depthwise_conv, depthwise_kernel_grad, depthwise_transpose
from cuconv.reference.transpose import conv_transpose


def separable_conv(
    shape: ConvShape,
    x: Array,
    depthwise_w: Array,
    pointwise_w: Array,
    bias: Array | None,
    activation: Activation | None,
    out: Array,
    workspace: int,
    precision: str = "highest",
) -> None:
    """Write ``activation(pointwise(depthwise(x)) + bias)`` to `out`; `shape` is that of the depthwise part."""
    for part, items, rows in _slabs(shape, workspace):
        middle = _middle(part, x[items], depthwise_w, workspace)
        target = _axis(out, shape, rows)[items]
        conv(
            pointwise_shape(part, target.shape, pointwise_w),
            middle,
            pointwise_w,
            bias,
            activation,
            target,
            workspace // 2,
        )


def separable_input_grad(
    shape: ConvShape,
    dy: Array,
    depthwise_w: Array,
    pointwise_w: Array,
    out: Array,
    workspace: int,
    precision: str = "highest",
) -> None:
    """Write the gradient of x to `out`; `shape` is that of the depthwise part, the kernels are conjugated already."""
    stride, pad = shape.strides[0], shape.pad_before[0]
    reach = Halo(stride, shape.k_eff[0], pad)
    sizes = (shape.batch, shape.in_size[0])
    for items, rows in blocks(sizes, _slab_block(shape, sizes, workspace)):
        begin, end = reach.output_range(rows.start, rows.stop)
        begin, end = max(begin, 0), max(begin, 0, min(end, shape.out_size[0]))
        part = dataclasses.replace(
            shape,
            batch=items.stop - items.start,
            in_size=(rows.stop - rows.start, *shape.in_size[1:]),
            out_size=(end - begin, *shape.out_size[1:]),
            pad_before=(pad + rows.start - begin * stride, *shape.pad_before[1:]),
        )
        source = _axis(dy, shape, slice(begin, end))[items]
        middle = np.empty(part.y_shape, dy.dtype)
        pointwise = pointwise_shape(part, source.shape, pointwise_w)
        conv_transpose(pointwise, source, pointwise_w, None, None, middle, workspace // 4)
        depthwise_transpose(part, middle, depthwise_w, _axis(out, shape, rows)[items], workspace // 4)


def separable_kernel_grad(
    shape: ConvShape,
    x: Array,
    dy: Array,
    depthwise_w: Array,
    pointwise_w: Array,
    depthwise_out: Array,
    pointwise_out: Array,
    workspace: int,
    precision: str = "highest",
) -> None:
    """Write the gradients of both kernels; `shape` is that of the depthwise part."""
    dtype = compute_dtype(x.dtype)
    totals = [np.zeros(out.shape, dtype) for out in (depthwise_out, pointwise_out)]
    parts = [np.empty_like(total) for total in totals]
    adjoint = pointwise_w.conj()
    for part, items, rows in _slabs(shape, workspace):
        source = _axis(dy, shape, rows)[items]
        pointwise = pointwise_shape(part, source.shape, pointwise_w)
        kernel_grad(pointwise, _middle(part, x[items], depthwise_w, workspace), source, parts[1], workspace // 4)
        middle = np.empty(part.y_shape, dy.dtype)
        conv_transpose(pointwise, source, adjoint, None, None, middle, workspace // 4)
        depthwise_kernel_grad(part, x[items], middle, parts[0], workspace // 4)
        for total, piece in zip(totals, parts, strict=True):
            total += piece
    depthwise_out[...], pointwise_out[...] = totals


def pointwise_shape(shape: ConvShape, y_shape: tuple[int, ...], pointwise_w: Array) -> ConvShape:
    """The pointwise convolution behind the depthwise `shape`, for outputs of `y_shape`."""
    ones, none = (1,) * shape.rank, (0,) * shape.rank
    channels, filters = pointwise_w.shape[-2:]
    sizes = shape.out_size
    return ConvShape(y_shape[0], sizes, sizes, channels, filters, ones, ones, ones, none, 1, shape.data_format)


def _slabs(shape: ConvShape, workspace: int) -> Iterator[tuple[ConvShape, slice, slice]]:
    """The depthwise convolution cut along batch and first axis: its parts, with the items and output rows they are."""
    sizes = (shape.batch, shape.out_size[0])
    for items, rows in blocks(sizes, _slab_block(shape, sizes, workspace)):
        yield (
            dataclasses.replace(
                shape,
                batch=items.stop - items.start,
                out_size=(rows.stop - rows.start, *shape.out_size[1:]),
                pad_before=(shape.pad_before[0] - rows.start * shape.strides[0], *shape.pad_before[1:]),
            ),
            items,
            rows,
        )


def _slab_block(shape: ConvShape, sizes: tuple[int, int], workspace: int) -> tuple[int, ...]:
    row = math.prod(shape.out_size[1:]) * shape.filters * 8  # 8: bytes of the widest real type
    return fit_block(sizes, min(4 << 20, workspace // 4) // max(1, row))


def _middle(part: ConvShape, x: Array, depthwise_w: Array, workspace: int) -> Array:
    middle = np.empty(part.y_shape, x.dtype)
    depthwise_conv(part, x, depthwise_w, None, None, middle, workspace // 4)
    return middle


def _axis(array: Array, shape: ConvShape, rows: slice) -> Array:
    """`array` in its own layout, cut to `rows` of the first spatial axis."""
    return array[:, rows] if shape.data_format == CHANNELS_LAST else array[:, :, rows]
