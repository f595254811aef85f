"""The gates of a convolutional LSTM step on NumPy arrays, and their gradients.

z [B, p.., 4F] holds the sums of both convolutions, the gates i, f, c, o side by side; r and a are the recurrent and the output
activation:

    c' = r(z_f) * c + r(z_i) * a(z_c)        h' = r(z_o) * a(c')
"""

from __future__ import annotations

import numpy as np

from cuconv.reference.blocks import Activation, Array, channels_last, compute_dtype


def gates(
    z: Array, c: Array, activation: Activation, recurrent_activation: Activation, data_format: str, h_out: Array, c_out: Array
) -> None:
    """Write h' and c' to `h_out` and `c_out`."""
    i, f, candidate, o = _split(z, data_format)
    dtype = i.dtype
    c = channels_last(c, data_format).astype(dtype, copy=False)
    new_c = recurrent_activation(f) * c + recurrent_activation(i) * activation(candidate)
    channels_last(c_out, data_format)[...] = new_c
    channels_last(h_out, data_format)[...] = recurrent_activation(o) * activation(new_c)


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
    i, f, candidate, o = _split(z, data_format)
    c, dh, dc = (channels_last(array, data_format).astype(i.dtype, copy=False) for array in (c, dh, dc))
    gate_i, gate_f, value = recurrent_activation(i), recurrent_activation(f), activation(candidate)
    new_c = gate_f * c + gate_i * value
    dc = dc + activation.gradient(new_c, dh * recurrent_activation(o))
    dz = _split(dz_out, data_format, copy=False)
    dz[0][...] = recurrent_activation.gradient(i, dc * value)
    dz[1][...] = recurrent_activation.gradient(f, dc * c)
    dz[2][...] = activation.gradient(candidate, dc * gate_i)
    dz[3][...] = recurrent_activation.gradient(o, dh * activation(new_c))
    channels_last(dc_out, data_format)[...] = dc * gate_f


def _split(z: Array, data_format: str, *, copy: bool = True) -> list[Array]:
    """The four gates of z, channels last; with `copy` in the dtype sums are taken in."""
    z = channels_last(z, data_format)
    return np.split(z.astype(compute_dtype(z.dtype), copy=False) if copy else z, 4, axis=-1)
