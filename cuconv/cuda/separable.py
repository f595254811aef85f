"""Separable convolution on a runtime: depthwise, then pointwise.

The array between the two goes through memory. Where it is larger than the workspace, batch items are taken a slab at a
time; the kernel gradient, a sum over all items, always has it whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from cuconv.activations import Activation
from cuconv.cuda.arrays import Array, Runtime
from cuconv.cuda.conv import conv, kernel_grad
from cuconv.cuda.depthwise import depthwise_conv, depthwise_kernel_grad, depthwise_transpose
from cuconv.cuda.transpose import conv_transpose
from cuconv.geometry import ConvShape


def separable_conv(
    runtime: Runtime,
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
    for part, items in _slabs(shape, x.dtype.itemsize, workspace):
        middle = runtime.empty(part.y_shape, x.dtype)
        depthwise_conv(runtime, part, x[items], depthwise_w, None, None, middle, workspace)
        pointwise = _pointwise(part, pointwise_w)
        conv(runtime, pointwise, middle, pointwise_w, bias, activation, out[items], workspace, precision)


def separable_input_grad(
    runtime: Runtime,
    shape: ConvShape,
    dy: Array,
    depthwise_w: Array,
    pointwise_w: Array,
    out: Array,
    workspace: int,
    precision: str = "highest",
) -> None:
    """Write the gradient of x to `out`; `shape` is that of the depthwise part, the kernels are conjugated already."""
    for part, items in _slabs(shape, dy.dtype.itemsize, workspace):
        middle = runtime.empty(part.y_shape, dy.dtype)
        pointwise = _pointwise(part, pointwise_w)
        conv_transpose(runtime, pointwise, dy[items], pointwise_w, None, None, middle, workspace, precision)
        depthwise_transpose(runtime, part, middle, depthwise_w, out[items], workspace)


def separable_kernel_grad(
    runtime: Runtime,
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
    pointwise = _pointwise(shape, pointwise_w)
    middle = runtime.empty(shape.y_shape, x.dtype)
    depthwise_conv(runtime, shape, x, depthwise_w, None, None, middle, workspace)
    kernel_grad(runtime, pointwise, middle, dy, pointwise_out, workspace, precision)
    conv_transpose(runtime, pointwise, dy, pointwise_w.conj(), None, None, middle, workspace, precision)
    depthwise_kernel_grad(runtime, shape, x, middle, depthwise_out, workspace)


def _pointwise(shape: ConvShape, pointwise_w: Array) -> ConvShape:
    """The pointwise convolution behind the depthwise `shape`."""
    ones, none = (1,) * shape.rank, (0,) * shape.rank
    channels, filters = pointwise_w.shape[-2:]
    sizes = shape.out_size
    return ConvShape(shape.batch, sizes, sizes, channels, filters, ones, ones, ones, none, 1, shape.data_format)


def _slabs(shape: ConvShape, itemsize: int, workspace: int) -> Iterator[tuple[ConvShape, slice]]:
    """The depthwise convolution cut along the batch: its parts, with the items they are."""
    if not shape.batch:
        return
    item = max(1, math.prod(shape.out_size) * shape.filters * itemsize)
    count = -(-shape.batch // max(1, workspace // item))
    size = -(-shape.batch // count)
    for start in range(0, shape.batch, size):
        items = slice(start, min(start + size, shape.batch))
        yield dataclasses.replace(shape, batch=items.stop - items.start), items
