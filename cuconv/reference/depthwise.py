"""Depthwise convolution, its transpose and its kernel gradient on NumPy arrays.

A depthwise kernel is w [taps.., C, M]; output channel ``c * M + m`` reads input channel c. BLAS has nothing for it; the
sum over windows is one ``einsum`` on a strided view of a tile, whose inner loop is long and contiguous.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from cuconv.activations import Activation
from cuconv.geometry import ConvShape
from cuconv.plan.reference import HostPlan, fit_block, plan_depthwise, plan_transpose
from cuconv.reference.bias_grad import bias_grad
from cuconv.reference.blocks import (
    Array,
    blocks,
    channels_last,
    compute_dtype,
    conjugated,
    lengths,
    read_padded,
    reads,
    strided,
)
from cuconv.reference.transpose import flipped_shape, scatter, slab_corner, tap_offset

SUM_LENGTH = 4096  # positions of one running sum; its relative rounding error grows with their number
TAPS, POSITIONS = "ijk", "pqr"  # einsum subscripts of up to three axes; b and c are batch and channel


def depthwise_conv(
    shape: ConvShape, x: Array, w: Array, bias: Array | None, activation: Activation | None, out: Array, workspace: int
) -> None:
    """Write ``activation(depthwise_conv(x, w) + bias)`` to `out`; arguments as :func:`cuconv.reference.conv.conv`."""
    if out.size == 0:
        return
    dtype = compute_dtype(x.dtype)
    plan = plan_depthwise(shape, dtype.itemsize, workspace)
    channels, multiplier = shape.in_channels, shape.depth_multiplier
    w = w.astype(dtype, copy=False).reshape(*shape.kernel_size, channels, multiplier)
    x, out = channels_last(x, shape.data_format), channels_last(out, shape.data_format)
    kernels = np.moveaxis(w, -1, 0)
    repeated = np.tile(kernels, plan.run)
    direct = multiplier == 1 and out.dtype == dtype
    for at in blocks(out.shape[:-1], plan.block):
        source = x[at[0]]
        windows = None if plan.strategy == "taps" else _windows(shape, plan, source, at[1:], dtype)
        for m, kernel in enumerate(kernels):
            target = out[at][..., m::multiplier]
            acc = target if direct else _empty(target.shape, dtype, plan)
            if windows is None:
                _sum_taps(shape, source, kernel, acc, at[1:])
            else:
                _sum_windows(shape, windows, kernel, repeated[m], acc)
            if bias is not None:
                acc += bias[m::multiplier]
            if activation is not None:
                activation(acc, out=acc)
            if not direct:
                target[...] = acc


def depthwise_kernel_grad(shape: ConvShape, x: Array, dy: Array, out: Array, workspace: int) -> None:
    """Write the gradient of the depthwise kernel, ``sum over positions of conj(x) * dy``, to `out` [taps.., C, M].

    Blocks are added in a fixed order, so the result is the same bits on every call.
    """
    dtype = compute_dtype(x.dtype)
    channels, multiplier = shape.in_channels, shape.depth_multiplier
    total = np.zeros((multiplier, *shape.kernel_size, channels), dtype)
    if dy.size and x.size:
        plan = plan_depthwise(shape, dtype.itemsize, workspace)
        x, dy = channels_last(x, shape.data_format), channels_last(dy, shape.data_format)
        taps, positions = TAPS[: shape.rank], POSITIONS[: shape.rank]
        # einsum adds position after position, so sums are kept short and added up in turn.
        for at in blocks(dy.shape[:-1], fit_block(plan.block, SUM_LENGTH)):
            source = x[at[0]]
            windows = None if plan.strategy == "taps" else _windows(shape, plan, source, at[1:], dtype)
            for m in range(multiplier):
                part = _empty((*lengths(at), channels), dtype, plan)
                part[...] = conjugated(dy[at][..., m::multiplier])
                if windows is not None:
                    subscripts = f"{taps}b{positions}c,b{positions}c->{taps}c"
                    total[m] += np.einsum(subscripts, windows, part)
                    continue
                for tap, inside, reached in _tap_reads(shape, at[1:]):
                    product = np.multiply(source[reached], part[inside], dtype=dtype)
                    total[(m, *tap)] += product.sum(axis=tuple(range(shape.rank + 1)))
    out[...] = conjugated(np.moveaxis(total, 0, -1).reshape(out.shape))


def depthwise_transpose(shape: ConvShape, y: Array, w: Array, out: Array, workspace: int) -> None:
    """Write the transposed depthwise convolution of `y` (``shape.y_shape``) to `out` (``shape.x_shape``)."""
    if out.size == 0:
        return
    dtype = compute_dtype(y.dtype)
    w = w.astype(dtype, copy=False).reshape(*shape.kernel_size, shape.in_channels, shape.depth_multiplier)
    if max(shape.strides) == 1 and shape.depth_multiplier == 1:
        flipped = np.flip(w, axis=tuple(range(shape.rank)))
        depthwise_conv(flipped_shape(shape), y, flipped, None, None, out, workspace)
    else:
        block = plan_transpose(shape, dtype.itemsize, workspace).block
        scatter(_add_taps, shape, block, y, w, None, None, out, workspace)


def depthwise_grads(
    shape: ConvShape, x: Array, w: Array, dy: Array, dx: Array, dw: Array, db: Array | None, workspace: int
) -> None:
    """Write all gradients of a depthwise convolution; `w` is conjugated already, `db` [C*M] may be None."""
    depthwise_transpose(shape, dy, w, dx, workspace)
    depthwise_kernel_grad(shape, x, dy, dw, workspace)
    if db is not None:
        bias_grad(dy, shape.data_format, db, workspace)


def _empty(shape: Sequence[int], dtype: np.dtype, plan: HostPlan) -> Array:
    """A new channels-last [b, p.., c] array whose innermost axis in memory is the one `plan` names."""
    if plan.strategy != "positions":
        return np.empty(shape, dtype)
    return np.moveaxis(np.empty((shape[0], shape[-1], *shape[1:-1]), dtype), 1, -1)


def _windows(shape: ConvShape, plan: HostPlan, x: Array, at: tuple[slice, ...], dtype: np.dtype) -> Array:
    """The windows [taps.., b, p.., C] of the outputs `at`, a view of a padded tile copied from x [b, L.., C]."""
    spans = [
        (part.start * s - pad, (part.stop - 1) * s - pad + k_eff)
        for part, s, pad, k_eff in zip(at, shape.strides, shape.pad_before, shape.k_eff, strict=True)
    ]
    inside = all(first >= 0 and last <= n for (first, last), n in zip(spans, x.shape[1:-1], strict=True))
    inner = x.strides[-2 if plan.strategy == "positions" else -1]
    if inside and x.dtype == dtype and inner == x.itemsize:
        tile = x[(slice(None), *(slice(first, last) for first, last in spans))]
    else:
        tile = _empty((x.shape[0], *(last - first for first, last in spans), x.shape[-1]), dtype, plan)
        read_padded(x, spans, tile)
    batch, *steps, channel = tile.strides
    taps = [step * d for step, d in zip(steps, shape.dilation_rate, strict=True)]
    moves = [step * s for step, s in zip(steps, shape.strides, strict=True)]
    shown = (*shape.kernel_size, x.shape[0], *lengths(at), x.shape[-1])
    return np.lib.stride_tricks.as_strided(tile, shown, (*taps, batch, *moves, channel), writeable=False)


def _sum_windows(shape: ConvShape, windows: Array, w: Array, repeated: Array, acc: Array) -> None:
    """Write the sum over taps of `windows` [taps.., b, p.., C] times w [taps.., C] to `acc` [b, p.., C].

    Args:
        repeated: w for a run of positions, [taps.., run * C]: where these lie side by side, the inner loop is longer.
    """
    taps, positions = TAPS[: shape.rank], POSITIONS[: shape.rank]
    subscripts = f"{taps}b{positions}c,{taps}c->b{positions}c"
    count, channels = acc.shape[-2:]
    run = repeated.shape[-1] // channels
    side_by_side = windows.strides[-2:] == acc.strides[-2:] == (channels * acc.itemsize, acc.itemsize)
    whole = count - count % run if run > 1 and side_by_side else 0
    if whole:
        np.einsum(subscripts, _runs(windows[..., :whole, :], run), repeated, out=_runs(acc[..., :whole, :], run))
    if whole < count:
        np.einsum(subscripts, windows[..., whole:, :], w, out=acc[..., whole:, :])


def _runs(array: Array, run: int) -> Array:
    """A view of `array` [.., p, C], whose positions lie side by side, as [.., p / run, run * C]."""
    count, channels = array.shape[-2:]
    shape = (*array.shape[:-2], count // run, run * channels)
    strides = (*array.strides[:-2], run * channels * array.itemsize, array.itemsize)
    return np.lib.stride_tricks.as_strided(array, shape, strides)


def _sum_taps(shape: ConvShape, x: Array, w: Array, acc: Array, at: tuple[slice, ...]) -> None:
    acc[...] = 0
    for tap, inside, reached in _tap_reads(shape, at):
        acc[inside] += np.multiply(x[reached], w[tap], dtype=acc.dtype)


def _tap_reads(shape: ConvShape, at: tuple[slice, ...]) -> list[tuple[tuple[int, ...], tuple, tuple]]:
    """For every tap its index, the part of the block `at` whose input lies inside x, and that input."""
    found = []
    for tap in itertools.product(*map(range, shape.kernel_size)):
        offsets = [t * d - pad for t, d, pad in zip(tap, shape.dilation_rate, shape.pad_before, strict=True)]
        pairs = [reads(*axis) for axis in zip(at, shape.in_size, shape.strides, offsets, strict=True)]
        inside, reached = zip(*pairs, strict=True)
        found.append((tap, (slice(None), *inside), (slice(None), *reached)))
    return found


def _add_taps(shape: ConvShape, y: Array, w: Array, slab: Array, at: tuple[slice, ...], origin: Sequence[int]) -> None:
    """Add the contributions of y [b, p.., C*M], the block `at`, to `slab` [b, u.., C]; p = 0 is u = `origin`."""
    corner, moves = slab_corner(shape, slab, at, origin)
    shown = (*y.shape[:-1], shape.in_channels)
    parts = np.moveaxis(y.reshape(*shown, shape.depth_multiplier), -1, 0).astype(slab.dtype)
    for tap in itertools.product(*map(range, shape.kernel_size)):
        target = strided(slab, shown, (*moves, 1), corner + tap_offset(shape, slab, tap))
        for m, part in enumerate(parts):
            target += part * w[tap][:, m]
