"""Which way the NumPy path goes: strategy and block sizes, from sizes alone.

Everything is a matrix product of BLAS over blocks of output positions that fit the cache. What differs is how the
operand comes to be; the measured rows are those of ``python -m benchmarks.cpu``.

Convolution and kernel gradient, with ``rows`` = positions and ``depth`` = taps x channels:

* ``windows`` -- no copy. In a channels-last sequence the k * C inputs of one output are one run; every ceil(k / s)-th
  output starts behind the run of the one before, so those rows are a matrix with a legal leading dimension: ceil(k / s)
  products.
* ``tile`` -- the window matrix is copied out of a padded tile, in runs of k * C elements where the dilation is 1.
* ``taps`` -- the window matrix is copied out of x tap by tap: for groups, for channels_first (where a row of positions
  is the long run) and for taps so far apart that a tile would be mostly gap.

Depthwise convolution and its kernel gradient, a sum over windows of a padded tile:

* ``channels``, ``positions`` -- which of the two lies innermost in the tile, whatever it does in x: the longer loop
  wins.
* ``taps`` -- no tile, one slice of x a tap. For taps so far apart that a tile would be mostly gap.

Transposed convolution and input gradient:

* ``gather`` -- stride 1: a convolution with the flipped kernel.
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
# Bytes of a block. Smaller ones make products too small, larger ones leave the cache. Rows "conv2d 3x3 64->64" and
# "conv1d k16 s8 transposed" take 1.15 and 1.2 times as long with 1 MiB, and the same with 8 MiB.
BLOCK_BYTES = 4 << 20
CACHE_LINE = 16  # elements of a cache line in float32
# Rows of each of the ceil(k / s) products over windows. With fewer the product is bound by reading the kernel: row
# "conv1d k15" takes 3 times as long with 16.
PHASE_ROWS = 256
# A product with fewer columns is bound by reading its rows, and those of overlapping windows lie far apart: a k3 128->8
# takes 8.5 ms as windows and 5.8 ms copied.
FEW_FILTERS = 16


@dataclass(frozen=True)
class HostPlan:
    """One decision for the NumPy path.

    Attributes:
        strategy: one of the names in the module's text.
        block: batch items, then positions per spatial axis, that are worked on at a time.
        reason: why, in words.
    """

    strategy: str
    block: tuple[int, ...]
    reason: str


@functools.lru_cache(maxsize=4096)
def plan_conv(shape: ConvShape, itemsize: int, workspace: int) -> HostPlan:
    """The plan of a convolution; `itemsize` in bytes is that of the dtype sums are taken in."""
    narrow = shape.filters < FEW_FILTERS and shape.in_channels >= CACHE_LINE
    undilated = shape.rank == 1 and shape.k_eff == shape.kernel_size
    if undilated and shape.data_format == CHANNELS_LAST and shape.groups == 1 and not narrow:
        row_bytes = itemsize * (shape.strides[0] * shape.in_channels + shape.filters)
        phases = -(-shape.kernel_size[0] // shape.strides[0])
        rows = min(max(BLOCK_BYTES // row_bytes, PHASE_ROWS * phases), workspace // 2 // row_bytes)
        block = fit_block(_positions(shape), rows)
        return HostPlan("windows", block, "overlapping windows are a legal matrix, nothing is copied")
    return plan_columns(shape, itemsize, workspace)


@functools.lru_cache(maxsize=4096)
def plan_columns(shape: ConvShape, itemsize: int, workspace: int) -> HostPlan:
    """The plan of a window matrix that is copied: a kernel gradient's, or a convolution's."""
    taps = math.prod(shape.kernel_size)
    row_bytes = itemsize * (taps * shape.in_channels + shape.filters)
    block = fit_block(_positions(shape), min(BLOCK_BYTES, workspace // 2) // row_bytes)
    spans = [(m - 1) * s + k_eff for m, s, k_eff in zip(block[1:], shape.strides, shape.k_eff, strict=True)]
    tile_bytes = block[0] * math.prod(spans) * shape.in_channels * itemsize
    compact = tile_bytes <= min(2 * BLOCK_BYTES, workspace // 4)
    if shape.data_format == CHANNELS_LAST and shape.groups == 1 and compact:
        return HostPlan("tile", block, "windows are copied out of a padded tile in the longest runs there are")
    return HostPlan("taps", block, "windows are copied tap by tap")


@functools.lru_cache(maxsize=4096)
def plan_transpose(shape: ConvShape, itemsize: int, workspace: int) -> HostPlan:
    """The plan of a transposed convolution or input gradient; the block counts positions of ``shape.y_shape``."""
    taps = math.prod(shape.kernel_size)
    row_bytes = itemsize * (taps * shape.in_channels + shape.filters)
    block = fit_block(_positions(shape), min(BLOCK_BYTES, workspace // 4) // row_bytes)
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
    if shape.in_channels >= min(4 * CACHE_LINE, positions):
        return HostPlan("channels", block, "the inner loop runs over channels")
    return HostPlan("positions", block, "few channels: the inner loop runs over positions")


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
