"""The gradient of a bias on NumPy arrays."""

from __future__ import annotations

import math

from cuconv.geometry import CHANNELS_LAST
from cuconv.reference.blocks import Array, compute_dtype


def bias_grad(dy: Array, data_format: str, out: Array, workspace: int) -> None:
    """Write the sum of `dy` over everything but the channels to `out`."""
    wide = compute_dtype(dy.dtype)
    if data_format != CHANNELS_LAST:
        out[...] = dy.sum(axis=(0, *range(2, dy.ndim)), dtype=wide)
        return
    rows = dy.reshape(-1, dy.shape[-1])
    # NumPy adds rows one after the other, and rounding errors with them: sums of sums are as good as pairwise ones.
    step = max(1, math.isqrt(len(rows)))
    whole = len(rows) // step * step
    parts = rows[:whole].reshape(-1, step, dy.shape[-1]).sum(axis=1, dtype=wide)
    out[...] = parts.sum(axis=0) + rows[whole:].sum(axis=0, dtype=wide)
