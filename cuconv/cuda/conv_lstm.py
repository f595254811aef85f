"""The gates of a convolutional LSTM step on the GPU: kernels/conv_lstm.cu and kernels/conv_lstm_grad.cu.

Activations that the kernels do not fuse, such as softmax and a user's own, are array functions. Then the whole step is
an expression of such functions, with an array for everything between: right, but several times the memory traffic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cuconv import activations
from cuconv.activations import Activation
from cuconv.cuda.arrays import Array, Runtime, alignment, compact, writing
from cuconv.geometry import CHANNELS_LAST, split_shape
from cuconv.plan.conv_lstm import plan_gates, plan_gates_grad
from cuconv.plan.types import ACTIVATION_CODES


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
    if not _fused(activation, recurrent_activation):
        _composed_gates(z, c, activation, recurrent_activation, data_format, h_out, c_out)
        return
    z, c = compact(runtime, z), compact(runtime, c)
    with writing(runtime, h_out) as new_h, writing(runtime, c_out) as new_c:
        arrays = z, c, new_h, new_c
        names = activation.name, recurrent_activation.name
        aligned = alignment(runtime, *arrays)
        plan = plan_gates(*_extents(c.shape, data_format), *names, z.dtype.name, aligned, runtime.limits)
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
    if not _fused(activation, recurrent_activation):
        _composed_gates_grad(z, c, dh, dc, activation, recurrent_activation, data_format, dz_out, dc_out)
        return
    inputs = [compact(runtime, array) for array in (z, c, dh, dc)]
    with writing(runtime, dz_out) as dz, writing(runtime, dc_out) as dc_before:
        arrays = *inputs, dz, dc_before
        names = activation.name, recurrent_activation.name
        aligned = alignment(runtime, *arrays)
        plan = plan_gates_grad(*_extents(c.shape, data_format), *names, z.dtype.name, aligned, runtime.limits)
        runtime.launch(plan, arrays)


def _fused(*functions: Activation) -> bool:
    """Whether the kernels have these; a user's function may have the name of one of theirs."""
    return all(f.name in ACTIVATION_CODES and f is getattr(activations, f.name) for f in functions)


def _extents(shape: Sequence[int], data_format: str) -> tuple[int, int]:
    """How many runs of neighbouring states there are for each gate, and their length."""
    batch, sizes, filters = split_shape(shape, data_format)
    positions = math.prod(sizes)
    return (batch * positions, filters) if data_format == CHANNELS_LAST else (batch, filters * positions)


def _composed_gates(
    z: Array,
    c: Array,
    activation: Activation,
    recurrent_activation: Activation,
    data_format: str,
    h_out: Array,
    c_out: Array,
) -> None:
    i, f, candidate, o = _split(_wide(z), data_format)
    new_c = recurrent_activation(f) * _wide(c) + recurrent_activation(i) * activation(candidate)
    c_out[...] = new_c
    h_out[...] = recurrent_activation(o) * activation(new_c)


def _composed_gates_grad(
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
    z, c, dh, dc = (_wide(array) for array in (z, c, dh, dc))
    i, f, candidate, o = _split(z, data_format)
    gate_i, gate_f, value = recurrent_activation(i), recurrent_activation(f), activation(candidate)
    new_c = gate_f * c + gate_i * value
    dc = dc + activation.gradient(new_c, dh * recurrent_activation(o))
    di, df, dcandidate, do = _split(dz_out, data_format)
    di[...] = recurrent_activation.gradient(i, dc * value)
    df[...] = recurrent_activation.gradient(f, dc * c)
    dcandidate[...] = activation.gradient(candidate, dc * gate_i)
    do[...] = recurrent_activation.gradient(o, dh * activation(new_c))
    dc_out[...] = dc * gate_f


def _wide(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def _split(z: Array, data_format: str) -> list[Array]:
    """Views of the four gates of z."""
    return np.split(z, 4, axis=-1 if data_format == CHANNELS_LAST else 1)
