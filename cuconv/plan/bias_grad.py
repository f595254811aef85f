"""Plan of a bias gradient: how the sum over all positions is cut into items of a block and into splits."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from cuconv.plan.cost import slowest
from cuconv.plan.types import ELEMENTS, DeviceLimits, Element, LaunchPlan, index_bytes, vector

BLOCKS = (256, 512, 128)  # threads of a block; on a tie the first is taken
UNROLLED = 8  # items that a thread loads at a time, as in the kernel
BYTES_UNDER_WAY = 64 << 10  # of a multiprocessor: bandwidth times latency is about half of that on every device
# Items of a block, at least: what folding and writing its sums costs is then less than a tenth of it, and an array that
# a block a tile adds up as quickly as a second launch starts needs none.
LEAST_RUN = 4 * UNROLLED


@dataclass(frozen=True)
class _Tiling:
    """How dy [batch, channels, positions] is cut, in the words of kernels/bias_grad.cu; in elements."""

    threads: int
    width: int
    items: int
    segments: int
    row: int
    step: int
    tile_step: int
    span: int
    shrink: int
    groups: int
    local: int
    length: int
    tiles: int
    vector: int
    kind: str
    rejected: tuple[str, ...] = ()

    @property
    def used(self) -> float:
        """The share of loads that are inside the array."""
        return self.width / (self.threads * self.vector)


@functools.lru_cache(maxsize=4096)
def plan_bias_grad(
    batch: int,
    channels: int,
    positions: int,
    dtype: str,
    aligned: tuple[int, ...],
    workspace: int,
    limits: DeviceLimits,
) -> tuple[tuple[LaunchPlan, ...], int]:
    """The launches that sum dy [batch, channels, positions] over the first and last axis, and how many parts are left
    between the two; if it is a single launch, 1.

    Args:
        positions: 1 for channels_last, whose positions belong to the batch.
        aligned: of dy, see :func:`cuconv.cuda.arrays.alignment`.
        workspace: bytes that the parts may take.
    """
    element = ELEMENTS[dtype]
    tiling = _best(batch, channels, positions, element, aligned)
    blocks = limits.multiprocessors * _resident(tiling, element, limits)
    splits = min(-(-blocks // tiling.tiles), tiling.items // LEAST_RUN, workspace // (channels * element.sum_bytes))
    run = -(-tiling.items // max(1, splits))
    splits = -(-tiling.items // run)
    if splits == 1:
        return (_launch(tiling, batch, channels, positions, run, element, element, limits),), 1
    sums = ELEMENTS[element.sum_dtype]
    last = _best(splits, channels, 1, sums, ())
    return (
        _launch(tiling, batch, channels, positions, run, element, sums, limits),
        _launch(last, splits, channels, 1, last.items, sums, element, limits),
    ), splits


def _launch(
    tiling: _Tiling,
    batch: int,
    channels: int,
    positions: int,
    run: int,
    source: Element,
    target: Element,
    limits: DeviceLimits,
) -> LaunchPlan:
    """One launch, with `run` items a block."""
    splits = -(-tiling.items // run)
    size = batch * channels * positions
    wide = index_bytes(size + tiling.threads * tiling.vector, tiling.items + run)
    least = size * source.bytes + channels * target.bytes
    moved = size * source.bytes + splits * channels * target.bytes
    work = size * (2 if source.is_complex else 1)
    rate = limits.fp64_rate if source.sum_dtype in ("float64", "complex128") else limits.fp32_rate
    # Fewer blocks than multiprocessors leave memory idle as well.
    blocks = tiling.tiles * splits
    bandwidth = limits.bandwidth * min(1, blocks / limits.multiprocessors / _resident(tiling, source, limits))
    return LaunchPlan(
        kernel="bias_grad",
        constants=(
            ("ELEMENT", source.c_type),
            ("OUT", target.c_type),
            ("VECTOR", tiling.vector),
            ("THREADS", tiling.threads),
            ("INDEX", "int" if wide == 4 else "long long"),
        ),
        integers=(
            tiling.items,
            run,
            tiling.segments,
            tiling.row,
            tiling.step,
            tiling.tile_step,
            tiling.span,
            tiling.shrink,
            tiling.width,
            tiling.groups,
            tiling.local,
            tiling.length,
            tiling.tiles,
            channels,
        ),
        grid=(blocks, 1, 1),
        block=(tiling.threads, 1, 1),
        index_bytes=wide,
        shared_bytes=tiling.threads * tiling.vector * source.sum_bytes,
        registers=64,
        reason=f"{splits} parts, {tiling.vector * source.bytes}-byte vectors, an item is {tiling.kind}",
        rejected=tiling.rejected,
        cost=slowest(work, work, moved, least, {"memory": moved / bandwidth, "additions": work / rate}),
    )


def _resident(tiling: _Tiling, element: Element, limits: DeviceLimits) -> int:
    """Blocks of a multiprocessor that keep enough loads under way."""
    block_bytes = tiling.width * UNROLLED * element.bytes
    return max(1, min(-(-BYTES_UNDER_WAY // block_bytes), limits.threads_per_multiprocessor // 2 // tiling.threads))


def _best(batch: int, channels: int, positions: int, element: Element, aligned: tuple[int, ...]) -> _Tiling:
    """The block size that keeps the most bytes under way."""
    tilings = [_tiling(batch, channels, positions, element, aligned, threads) for threads in BLOCKS]
    best = max(tilings, key=lambda each: each.vector * each.used)
    others = tuple(
        f"{each.threads} threads: {each.vector} elements each, {each.used:.0%} of the threads used"
        for each in tilings
        if each is not best
    )
    return replace(best, rejected=others)


def _tiling(
    batch: int, channels: int, positions: int, element: Element, aligned: tuple[int, ...], threads: int
) -> _Tiling:
    """Items as wide as a block, with the widest vectors that all of them can have."""
    item = channels * positions
    size = batch * item
    width = vector(element.bytes, size, *aligned)
    while True:
        room = threads * width
        whole = width // math.gcd(width, item) * item  # the fewest batch items that vectors end with
        if whole <= room:
            groups = room // whole * (whole // item)
            span = groups * item
            return _Tiling(
                threads, span, -(-size // span), -(-size // span), 0, span, 0, size, 0, groups, channels, positions, 1,
                width, f"{groups} batch items",
            )  # fmt: skip
        if positions > room and positions % width == 0:
            segments = -(-positions // room)
            return _Tiling(
                threads, room, batch * segments, segments, item, room, positions, positions, 0, 1, 1, room, channels,
                width, "a piece of a channel",
            )  # fmt: skip
        least = width // math.gcd(width, positions)  # the fewest channels that vectors end with
        if item > room and item % width == 0 and least * positions <= room:
            local = room // (least * positions) * least
            return _Tiling(
                threads, local * positions, batch, 1, item, 0, local * positions, item, local * positions, 1, local,
                positions, -(-channels // local), width, f"{local} channels",
            )  # fmt: skip
        width //= 2
