"""Which way the NumPy path goes: strategy and block sizes, from sizes alone.

Everything is a matrix product of BLAS over blocks of output positions that fit the cache. What differs is how the
operand comes to be; the measured rows are those of ``python -m benchmarks.cpu``.

Convolution and kernel gradient, with ``rows`` = positions and ``depth`` = taps x channels:

* ``windows`` -- no copy. In a channels-last sequence the k * C inputs of one output are one run, and every
  ceil(k / s)-th output starts behind the run of the one before: those rows are a matrix as BLAS takes it, and
  ceil(k / s) products do it all. Rows "conv1d k10", "k80 s4" and "k3 d1" take 0.88, 0.93 and 0.93 of the time of
  ``tile``.
* ``tile`` -- the window matrix is copied out of x, or of a padded tile of it, in runs of k * C elements where the
  dilation is 1. The copy costs 5 to 10 % of a product with 64 filters.
* ``taps`` -- the window matrix is copied out of x tap by tap: for groups, for channels_first (where a row of positions
  is the long run) and for taps so far apart that a tile would be mostly gap.

Depthwise convolution and its kernel gradient, a sum over windows of a padded tile:

* ``channels``, ``positions`` -- which of the two lies innermost in the tile. With few channels and stride 1,
  neighbouring positions are summed as one run.
* ``taps`` -- no tile, one slice of x a tap. For taps so far apart that a tile would be mostly gap.

Transposed convolution and input gradient:

* ``gather`` -- stride 1: a convolution with the flipped kernel.
* ``subpixel`` -- rank 1: the s outputs of one stride are s * C columns of a convolution of stride 1 with k / s taps,
  written where they belong. Row "transpose1d k16 s8" takes 0.9 of the time of ``scatter``.
* ``scatter`` -- one product gives every tap's contribution, and the taps are added where they belong. No zero is
  inserted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cuconv.geometry import CHANNELS_LAST, ConvShape

DEFAULT_WORKSPACE = 64 << 20  # bytes of scratch memory a call may use
# Bytes of a window matrix. Row "conv2d 3x3 64->64" takes as long with 1 to 3.5 MB and 1.16 times as long with 7 MB, row
# "conv1d k10 9->100" 1.2 times as long with less than 1 MB.
COLUMN_BYTES = 2 << 20
# Bytes of a block of other kinds. A transposed k16 s8 that adds its taps takes 1.2 times as long with 1 MiB, the
# same with 8 MiB.
BLOCK_BYTES = 4 << 20
# Rows of each of the ceil(k / s) products over windows. With fewer the product is bound by reading the kernel: row
# "conv1d k15" takes 1.1 times as long with 64 and 1.5 times with 16.
PHASE_ROWS = 256
# A product with fewer columns is bound by reading its rows, and those of overlapping windows lie far apart: k3 128->8
# takes 8.5 ms as windows and 5.8 ms copied.
FEW_FILTERS = 16
# Elements of the inner loop of a depthwise sum. Row "depthwise2d k7" takes 1.2 times as long with 256, row
# "depthwise1d k4" with 1024.
INNER_LOOP = 768


@dataclass(frozen=True)
class HostPlan:
    """One decision for the NumPy path.

    Attributes:
        strategy: one of the names in the module's text.
        block: batch items, then positions per spatial axis, that are worked on at a time.
        reason: why, in words.
        run: neighbouring positions of a depthwise sum that are one run of its inner loop.
    """

    strategy: str
    block: tuple[int, ...]
    reason: str
    run: int = 1


@functools.lru_cache(maxsize=4096)
def plan_conv(shape: ConvShape, itemsize: int, workspace: int) -> HostPlan:
    """The plan of a convolution; `itemsize` in bytes is that of the dtype sums are taken in."""
    taps, stride = shape.kernel_size[0], shape.strides[0]
    sequence = shape.rank == 1 and shape.data_format == CHANNELS_LAST and shape.groups == 1
    if sequence and shape.k_eff[0] == taps > stride and shape.filters >= FEW_FILTERS:
        row_bytes = itemsize * (stride * shape.in_channels + shape.filters)
        rows = max(BLOCK_BYTES // row_bytes, PHASE_ROWS * -(-taps // stride))
        block = fit_block(_positions(shape), min(rows, workspace // 2 // row_bytes))
        return HostPlan("windows", block, "overlapping windows are matrices as they lie, nothing is copied")
    return plan_columns(shape, itemsize, workspace)


@functools.lru_cache(maxsize=4096)
def plan_columns(shape: ConvShape, itemsize: int, workspace: int) -> HostPlan:
    """The plan of a window matrix that is copied: a kernel gradient's, or a convolution's."""
    taps = math.prod(shape.kernel_size)
    row_bytes = itemsize * (taps * shape.in_channels + shape.filters)
    block = fit_block(_positions(shape), min(COLUMN_BYTES, workspace // 2) // row_bytes)
    spans = [(m - 1) * s + k_eff for m, s, k_eff in zip(block[1:], shape.strides, shape.k_eff, strict=True)]
    tile_bytes = block[0] * math.prod(spans) * shape.in_channels * itemsize
    compact = tile_bytes <= min(2 * BLOCK_BYTES, workspace // 4)
    if shape.data_format == CHANNELS_LAST and shape.groups == 1 and compact:
        return HostPlan("tile", block, "windows are copied out of a padded tile in the longest runs there are")
    return HostPlan("taps", block, "windows are copied tap by tap")


@functools.lru_cache(maxsize=4096)
def plan_transpose(shape: ConvShape, itemsize: int, workspace: int) -> HostPlan:
    """The plan of a transposed convolution or input gradient; the block counts positions of ``shape.y_shape``."""
    taps, (*_, s) = math.prod(shape.kernel_size), shape.strides
    row_bytes = itemsize * (taps * shape.in_channels + shape.filters)
    block = fit_block(_positions(shape), min(BLOCK_BYTES, workspace // 4) // row_bytes)
    sequence = shape.rank == 1 and shape.data_format == CHANNELS_LAST and shape.groups == 1
    # Whole strides only: taps filled up with zeros would carry NaN to outputs that do not read it.
    if sequence and s > 1 and shape.k_eff[0] == taps and taps % s == 0 and shape.in_size[0] % s == 0:
        return HostPlan("subpixel", block, "the outputs of one stride are columns of one product")
    if max(shape.strides) == 1 and shape.filters <= 2 * shape.in_channels:
        return HostPlan(
            "gather", block, "stride 1: a convolution with the flipped kernel copies no more than it would add"
        )
    reason = (
        "each tap's product is added once" if max(shape.strides) > 1 else "fewer values to add than windows to copy"
    )
    return HostPlan("scatter", block, reason)


@functools.lru_cache(maxsize=4096)
def plan_depthwise(shape: ConvShape, itemsize: int, workspace: int) -> HostPlan:
    """The plan of a depthwise convolution or its kernel gradient."""
    positions = shape.out_size[-1]
    halo = math.prod(max(0, k_eff - s) + 1 for k_eff, s in zip(shape.k_eff, shape.strides, strict=True))
    # A tile holds what one block reads and, beside it, its outputs and one more copy of them.
    row_bytes = itemsize * (math.prod(shape.strides) * shape.in_channels + 2 * shape.filters)
    block = fit_block(_positions(shape), min(2 * BLOCK_BYTES, workspace // 2) // row_bytes)
    if halo * shape.in_channels * itemsize > min(16 * BLOCK_BYTES, workspace // 2):
        return HostPlan("taps", block, "taps lie too far apart for one tile")
    if shape.data_format == CHANNELS_LAST or shape.in_channels >= positions:
        kernel_bytes = math.prod(shape.kernel_size) * shape.in_channels * itemsize
        run = min(INNER_LOOP // shape.in_channels, workspace // 16 // kernel_bytes) if shape.strides[-1] == 1 else 1
        return HostPlan("channels", block, "the inner loop runs over channels, and positions side by side", max(1, run))
    return HostPlan("positions", block, "the inner loop runs over positions, as they lie in x")


@functools.lru_cache(maxsize=4096)
def plan_slab(shape: ConvShape, itemsize: int, workspace: int) -> tuple[int, ...]:
    """Batch items and positions of ``shape.x_shape`` whose sums a scatter completes at a time.

    A slab reads one kernel length of its neighbours' inputs again, so it is made several kernels long where memory
    allows.
    """
    sizes = (shape.batch, *shape.in_size)
    row_bytes = max(1, math.prod(sizes[2:]) * shape.in_channels * itemsize)
    room = min(max(2 * BLOCK_BYTES, 8 * shape.k_eff[0] * row_bytes), workspace // 4)
    return fit_block(sizes, room // (shape.in_channels * itemsize))


def fit_block(sizes: Sequence[int], positions: int) -> tuple[int, ...]:
    """A block of at most `positions` (at least 1) positions: as much of the last axes as fits, evenly cut."""
    block, room = [], max(1, positions)
    for size in reversed(sizes):
        size = max(1, size)
        pieces = -(-size // room)
        step = -(-size // pieces)
        block.append(step)
        room = max(1, room // step) if step == size else 1
    return tuple(reversed(block))


def _positions(shape: ConvShape) -> tuple[int, ...]:
    """Batch and output sizes of a static shape."""
    return (shape.batch, *shape.out_size)
