"""Convolution and its kernel gradient on a runtime: plan, allocate, launch."""

from __future__ import annotations

from cuconv import activations
from cuconv.activations import Activation
from cuconv.cuda.arrays import Array, Runtime, alignment, compact, dtype_name, writing
from cuconv.geometry import ConvShape
from cuconv.plan.conv import plan_conv, plan_conv_parts, plan_kernel_grad
from cuconv.plan.types import ACTIVATION_CODES, ELEMENTS


def conv(
    runtime: Runtime,
    shape: ConvShape,
    x: Array,
    w: Array,
    bias: Array | None,
    activation: Activation | None,
    out: Array,
    workspace: int,
    precision: str = "highest",
) -> None:
    """Write ``activation(conv(x, w) + bias)`` to `out`; arguments as :func:`cuconv.reference.conv.conv`.

    The same bits on every call: whether K is split, and weights are packed, depends on the shape, the device and
    `workspace` only.
    """
    if out.size == 0:
        return
    x, w, bias = (compact(runtime, array) for array in (x, w, bias))
    with writing(runtime, out) as y:
        dtype, name, aligned = dtype_name(out.dtype), name_of(activation), alignment(runtime, x, w, y)
        parts = plan_conv_parts(shape, dtype, name, aligned, workspace, runtime.limits, precision)
        if parts is None:
            runtime.launch(plan_conv(shape, dtype, name, aligned, runtime.limits, precision), (x, w, bias, y))
            return
        if parts.pack is not None:
            packed = runtime.empty((parts.packed,), dtype)
            runtime.launch(parts.pack, (w, packed))
            w = packed
        if parts.reduce is None:
            runtime.launch(parts.conv, (x, w, bias, y))
        else:
            partial = runtime.empty((parts.partial,), ELEMENTS[dtype].sum_dtype)
            runtime.launch(parts.conv, (x, w, None, partial))
            runtime.launch(parts.reduce, (partial, bias, y))


def kernel_grad(
    runtime: Runtime,
    shape: ConvShape,
    x: Array,
    dy: Array,
    out: Array,
    workspace: int,
    precision: str = "highest",
) -> None:
    """Write the gradient of the kernel to `out`; arguments as :func:`cuconv.reference.conv.kernel_grad`.

    The same bits on every call: how positions are split depends on the shape, the device and `workspace` only.
    """
    if dy.size == 0 or x.size == 0:
        out[...] = 0
        return
    x, dy = compact(runtime, x), compact(runtime, dy)
    with writing(runtime, out) as dw:
        aligned = alignment(runtime, x, dy, dw)
        plan = plan_kernel_grad(shape, dtype_name(out.dtype), aligned, workspace, runtime.limits, precision)
        if plan.reduce is None:
            runtime.launch(plan.grad, (x, dy, dw))
        else:
            partial = runtime.empty((plan.partial,), ELEMENTS[dtype_name(out.dtype)].sum_dtype)
            runtime.launch(plan.grad, (x, dy, partial))
            runtime.launch(plan.reduce, (partial, dw))


def fuses(activation: Activation) -> bool:
    """Whether the kernels apply `activation` themselves. A user's function may have the name of one of theirs."""
    return activation.name in ACTIVATION_CODES and activation is getattr(activations, activation.name)


def name_of(activation: Activation | None) -> str:
    """The name by which kernels know a fused activation."""
    return "linear" if activation is None else activation.name
