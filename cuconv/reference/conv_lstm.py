"""The gates of a convolutional LSTM step on NumPy arrays, and their gradients.

z [B, p.., 4F] holds the sums of both convolutions, the gates i, f, c, o side by side; r and a are the recurrent and the
output activation:

    c' = r(z_f) * c + r(z_i) * a(z_c)        h' = r(z_o) * a(c')

No array changes its layout here: an activation of a whole axis, such as softmax, works on the last one in memory.
"""

from __future__ import annotations

import numpy as np

from cuconv.activations import Activation
from cuconv.geometry import CHANNELS_LAST
from cuconv.reference.blocks import Array, compute_dtype


def gates(
    z: Array,
    c: Array,
    activation: Activation,
    recurrent_activation: Activation,
    data_format: str,
    h_out: Array,
    c_out: Array,
) -> None:
    """Write h' and c' to `h_out` and `c_out`."""
    dtype = compute_dtype(z.dtype)
    i, f, candidate, o = _split(z.astype(dtype, copy=False), data_format)
    new_c = recurrent_activation(f) * c.astype(dtype, copy=False) + recurrent_activation(i) * activation(candidate)
    c_out[...] = new_c
    h_out[...] = recurrent_activation(o) * activation(new_c)


def gates_grad(
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
    z, c, dh, dc = (array.astype(compute_dtype(array.dtype), copy=False) for array in (z, c, dh, dc))
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


def _split(z: Array, data_format: str) -> list[Array]:
    """Views of the four gates of z."""
    return np.split(z, 4, axis=-1 if data_format == CHANNELS_LAST else 1)
