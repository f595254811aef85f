"""The gates of a convolutional LSTM step on the GPU: kernels/conv_lstm.cu and kernels/conv_lstm_grad.cu.

Both take the activations that kernels fuse only, see :func:`cuconv.cuda.conv.fuses`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cuconv.activations import Activation
from cuconv.cuda.arrays import Array, Runtime, alignment, compact, dtype_name, writing
from cuconv.geometry import CHANNELS_LAST, split_shape
from cuconv.plan.conv_lstm import plan_gates, plan_gates_grad


def gates(
    runtime: Runtime,
    z: Array,
    c: Array,
    activation: Activation,
    recurrent_activation: Activation,
    data_format: str,
    h_out: Array,
    c_out: Array,
) -> None:
    """Write h' and c' to `h_out` and `c_out`."""
    if not c.size:
        return
    z, c = compact(runtime, z), compact(runtime, c)
    with writing(runtime, h_out) as new_h, writing(runtime, c_out) as new_c:
        arrays = z, c, new_h, new_c
        names = activation.name, recurrent_activation.name
        aligned = alignment(runtime, *arrays)
        plan = plan_gates(*_extents(c.shape, data_format), *names, dtype_name(z.dtype), aligned, runtime.limits)
        runtime.launch(plan, arrays)


def gates_grad(
    runtime: Runtime,
    z: Array,
    c: Array,
    dh: Array,
    dc: Array,
    activation: Activation,
    recurrent_activation: Activation,
    data_format: str,
    dz_out: Array,
    dc_out: Array,
) -> None:
    """Write the gradients of z and of the cell state before the step, from those of h' and c'."""
    if not c.size:
        return
    inputs = [compact(runtime, array) for array in (z, c, dh, dc)]
    with writing(runtime, dz_out) as dz, writing(runtime, dc_out) as dc_before:
        arrays = *inputs, dz, dc_before
        names = activation.name, recurrent_activation.name
        aligned = alignment(runtime, *arrays)
        plan = plan_gates_grad(*_extents(c.shape, data_format), *names, dtype_name(z.dtype), aligned, runtime.limits)
        runtime.launch(plan, arrays)


def _extents(shape: Sequence[int], data_format: str) -> tuple[int, int]:
    """How many runs of neighbouring states there are for each gate, and their length."""
    batch, sizes, filters = split_shape(shape, data_format)
    positions = math.prod(sizes)
    return (batch * positions, filters) if data_format == CHANNELS_LAST else (batch, filters * positions)
