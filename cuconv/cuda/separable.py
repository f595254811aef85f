"""Separable convolution on a runtime: in one launch where that is faster, otherwise depthwise, then pointwise.

The array between two launches goes through memory. Where it is larger than the workspace, batch items are taken a slab
at a time; the kernel gradient, a sum over all items, always has it whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from cuconv.activations import Activation
from cuconv.cuda.arrays import Array, Runtime, alignment, compact, dtype_name, writing
from cuconv.cuda.conv import conv, kernel_grad, name_of
from cuconv.cuda.depthwise import depthwise_conv, depthwise_kernel_grad, depthwise_transpose
from cuconv.cuda.transpose import conv_transpose
from cuconv.geometry import ConvShape
from cuconv.plan.separable import plan_separable, pointwise_shape


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
    if out.size == 0:
        return
    filters, name = pointwise_w.shape[-1], name_of(activation)
    x, depthwise_w, mixing, bias = (compact(runtime, array) for array in (x, depthwise_w, pointwise_w, bias))
    with writing(runtime, out) as y:
        aligned = alignment(runtime, x, depthwise_w, mixing, y)
        plan = plan_separable(shape, filters, dtype_name(out.dtype), name, aligned, runtime.limits)
        if plan.fused is not None:
            runtime.launch(plan.fused, (x, depthwise_w, mixing, bias, y))
            return
        for part, items in _slabs(shape, out.dtype.itemsize, workspace):
            middle, source = runtime.empty(part.y_shape, out.dtype), None if x is None else x[items]
            aligned = alignment(runtime, source, depthwise_w, mixing, y[items])
            plan = plan_separable(part, filters, dtype_name(out.dtype), name, aligned, runtime.limits)
            runtime.launch(plan.depthwise, (source, depthwise_w, None, middle))
            pointwise = pointwise_shape(part, filters)
            conv(runtime, pointwise, middle, mixing, bias, activation, y[items], workspace, precision)


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
        pointwise = pointwise_shape(part, pointwise_w.shape[-1])
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
    pointwise = pointwise_shape(shape, pointwise_w.shape[-1])
    middle = runtime.empty(shape.y_shape, x.dtype)
    depthwise_conv(runtime, shape, x, depthwise_w, None, None, middle, workspace)
    kernel_grad(runtime, pointwise, middle, dy, pointwise_out, workspace, precision)
    conv_transpose(runtime, pointwise, dy, pointwise_w.conj(), None, None, middle, workspace, precision)
    depthwise_kernel_grad(runtime, shape, x, middle, depthwise_out, workspace)


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
