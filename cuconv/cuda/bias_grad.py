"""The gradient of a bias on the GPU: kernels/bias_grad.cu, once or twice."""

from __future__ import annotations

import math

from cuconv.cuda.arrays import Array, Runtime, alignment, compact, dtype_name, writing
from cuconv.geometry import CHANNELS_LAST, split_shape
from cuconv.plan.bias_grad import plan_bias_grad
from cuconv.plan.types import ELEMENTS


def bias_grad(runtime: Runtime, dy: Array, data_format: str, out: Array, workspace: int) -> None:
    """Write the sum of dy over everything but its channels to `out` [F]."""
    if not dy.size:
        out[...] = 0
        return
    dy = compact(runtime, dy)
    batch, sizes, channels = split_shape(dy.shape, data_format)
    positions = math.prod(sizes)
    if data_format == CHANNELS_LAST:
        batch, positions = batch * positions, 1
    plans, splits = plan_bias_grad(
        batch, channels, positions, dtype_name(dy.dtype), alignment(runtime, dy), workspace, runtime.limits
    )
    with writing(runtime, out) as to:
        for plan in plans:
            sums = (
                to
                if plan is plans[-1]
                else runtime.empty((splits, channels), ELEMENTS[dtype_name(out.dtype)].sum_dtype)
            )
            runtime.launch(plan, (dy, sums))
            dy = sums
