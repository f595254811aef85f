"""Depthwise convolution, its transpose and its gradients on a runtime: plan, allocate, launch."""

from __future__ import annotations

from contextlib import ExitStack

from cuconv.activations import Activation
from cuconv.cuda.arrays import Array, Runtime, alignment, compact, dtype_name, writing
from cuconv.cuda.bias_grad import bias_grad
from cuconv.cuda.conv import name_of
from cuconv.geometry import ConvShape
from cuconv.plan.depthwise import plan_depthwise, plan_depthwise_transpose
from cuconv.plan.depthwise_grad import GradPlan, plan_depthwise_grads, plan_depthwise_kernel_grad
from cuconv.plan.types import ELEMENTS


def depthwise_conv(
    runtime: Runtime,
    shape: ConvShape,
    x: Array,
    w: Array,
    bias: Array | None,
    activation: Activation | None,
    out: Array,
    workspace: int,
) -> None:
    """Write ``activation(depthwise_conv(x, w) + bias)`` to `out`.

    As :func:`cuconv.reference.depthwise.depthwise_conv`.
    """
    if out.size == 0:
        return
    x, w, bias = (compact(runtime, array) for array in (x, w, bias))
    with writing(runtime, out) as y:
        aligned = alignment(runtime, x, w, y)
        plan = plan_depthwise(shape, dtype_name(out.dtype), name_of(activation), aligned, runtime.limits)
        runtime.launch(plan, (x, w, bias, y))


def depthwise_transpose(runtime: Runtime, shape: ConvShape, y: Array, w: Array, out: Array, workspace: int) -> None:
    """Write the transposed depthwise convolution of `y` to `out`, which is the gradient of the input.

    As :func:`cuconv.reference.depthwise.depthwise_transpose`; for a gradient `w` is conjugated already.
    """
    if out.size == 0:
        return
    if y.size == 0:
        out[...] = 0
        return
    y, w = compact(runtime, y), compact(runtime, w)
    with writing(runtime, out) as x:
        plan = plan_depthwise_transpose(shape, dtype_name(out.dtype), alignment(runtime, y, w, x), runtime.limits)
        runtime.launch(plan, (y, w, None, x))


def depthwise_kernel_grad(runtime: Runtime, shape: ConvShape, x: Array, dy: Array, out: Array, workspace: int) -> None:
    """Write the gradient of the kernel to `out`; as :func:`cuconv.reference.depthwise.depthwise_kernel_grad`.

    The same bits on every call: how positions are split depends on the shape, the device and `workspace` only.
    """
    _kernel_and_bias_grad(runtime, shape, x, dy, out, None, workspace)


def depthwise_grads(
    runtime: Runtime,
    shape: ConvShape,
    x: Array,
    w: Array,
    dy: Array,
    dx: Array | None,
    dw: Array | None,
    db: Array | None,
    workspace: int,
) -> None:
    """Write the gradients of input, kernel and bias to `dx`, `dw` and `db`; None leaves one out.

    Sequences of stride 1 with few taps and no multiplier take one pass over x and dy for all of them. The same bits on
    every call.

    Args:
        w: conjugated already, as for :func:`depthwise_transpose`.
    """
    if dw is None or dx is None or not (x.size and dy.size):
        if dx is not None:
            depthwise_transpose(runtime, shape, dy, w, dx, workspace)
        if dw is not None:
            _kernel_and_bias_grad(runtime, shape, x, dy, dw, db, workspace)
        elif db is not None:
            bias_grad(runtime, dy, shape.data_format, db, workspace)
        return
    x, w, dy = (compact(runtime, array) for array in (x, w, dy))
    with ExitStack() as stack:
        targets = [None if out is None else stack.enter_context(writing(runtime, out)) for out in (dx, dw, db)]
        aligned = alignment(runtime, x, w, dy, *targets)
        plan = plan_depthwise_grads(shape, dtype_name(dw.dtype), aligned, workspace, runtime.limits)
        if isinstance(plan, GradPlan):
            _launch(runtime, plan, (x, w, dy, targets[0]), targets[1], targets[2])
        else:
            depthwise_transpose(runtime, shape, dy, w, targets[0], workspace)
            _kernel_and_bias_grad(runtime, shape, x, dy, targets[1], targets[2], workspace)


def _kernel_and_bias_grad(
    runtime: Runtime, shape: ConvShape, x: Array, dy: Array, dw: Array, db: Array | None, workspace: int
) -> None:
    if dy.size == 0 or x.size == 0:
        for out in (dw, db):
            if out is not None:
                out[...] = 0
        return
    x, dy = compact(runtime, x), compact(runtime, dy)
    with ExitStack() as stack:
        targets = [None if out is None else stack.enter_context(writing(runtime, out)) for out in (dw, db)]
        aligned = alignment(runtime, x, dy, *targets)
        plan = plan_depthwise_kernel_grad(shape, dtype_name(dw.dtype), aligned, workspace, runtime.limits)
        arrays = (x, None, dy, None) if plan.launch.kernel == "depthwise_grad_rows" else (x, dy)
        _launch(runtime, plan, arrays, *targets)


def _launch(runtime: Runtime, plan: GradPlan, arrays: tuple[Array | None, ...], dw: Array, db: Array | None) -> None:
    sums = ELEMENTS[dtype_name(dw.dtype)].sum_dtype
    partial = runtime.empty((plan.splits, plan.weights), sums)
    bias_partial = None if db is None else runtime.empty((plan.splits, plan.filters), sums)
    runtime.launch(plan.launch, (*arrays, partial, bias_partial))
    runtime.launch(plan.reduce, (partial, dw))
    if db is not None:
        runtime.launch(plan.reduce_bias, (bias_partial, db))
