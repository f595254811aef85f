"""Transposed convolution, which is the input gradient of a convolution with its kernel conjugated, on a runtime."""

from __future__ import annotations

from cuconv.activations import Activation
from cuconv.cuda.arrays import Array, Runtime, alignment, compact, dtype_name, writing
from cuconv.cuda.conv import name_of
from cuconv.geometry import ConvShape
from cuconv.plan.transpose import plan_transpose
from cuconv.plan.types import ELEMENTS


def conv_transpose(
    runtime: Runtime,
    shape: ConvShape,
    y: Array,
    w: Array,
    bias: Array | None,
    activation: Activation | None,
    out: Array,
    workspace: int,
    precision: str = "highest",
) -> None:
    """Write the transposed convolution of `y` to `out`; as :func:`cuconv.reference.transpose.conv_transpose`.

    Repacked weights are allocated on top of `workspace`: they are as large as `w`, or as the phases of one stride that
    stand side by side.
    """
    if out.size == 0:
        return
    y, w, bias = (compact(runtime, array) for array in (y, w, bias))
    with writing(runtime, out) as target:
        aligned = alignment(runtime, y, w, target)
        dtype, name = dtype_name(out.dtype), name_of(activation)
        plan = plan_transpose(shape, dtype, name, aligned, runtime.limits, precision, workspace)
        packed = runtime.empty((plan.packed,), out.dtype) if plan.packed else None
        for part in plan.parts:
            if part.pack is not None:
                runtime.launch(part.pack, (w, packed))
            if part.reduce is None:
                runtime.launch(part.conv, (y, packed, bias, target))
            else:
                partial = runtime.empty((plan.partial,), ELEMENTS[dtype].sum_dtype)
                runtime.launch(part.conv, (y, packed, None, partial))
                runtime.launch(part.reduce, (partial, bias, target))
