"""Convolutions on the tensor cores of sm_90, by warpgroups: conv_wgmma.cu, its tiles, boxes, and what each would cost.

A tile's rows are the positions of a box, so that the copy engine brings them for a tap in one piece. A box can lie
across several batch items; what it has fewer than the tile has rows is multiplied in vain. The model, for one block and
step. It takes as long as the slower of

* the tensor cores, at the share of their rate that large products reach;
* shared memory: each warpgroup reads its operands, every copy writes once, 128 bytes a cycle;

and a launch as long as its busiest multiprocessor, or as the memory, or as the L2 cache, from which every step comes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan.cost import L2_FACTOR, slowest
from cuconv.plan.simt import CHOICE_FACTOR
from cuconv.plan.types import (
    ACTIVATION_CODES,
    ELEMENTS,
    INT32_MAX,
    MAP_BOX,
    MAP_STEP,
    Cost,
    DeviceLimits,
    Element,
    LaunchPlan,
    PlanError,
    TensorMap,
    index_bytes,
)

if TYPE_CHECKING:
    from cuconv.plan.conv import Form

ONLY = (9, 0)  # compute capability; later ones have other instructions
# Rows, columns of a block's tile, then of a warpgroup's; from large to small. 16 to 128 sums a thread.
TILES: tuple[tuple[int, int, int, int], ...] = (
    (128, 256, 64, 256),
    (256, 128, 128, 128),
    (128, 192, 64, 192),
    (256, 96, 128, 96),
    (128, 160, 64, 160),
    (128, 128, 64, 128),
    (256, 64, 128, 64),
    (64, 256, 64, 128),
    (256, 32, 128, 32),
    (128, 64, 64, 64),
)
STEPS = (64, 32)  # channels of a step; the second where fewer are zeros then
SLICE, SLICE_BYTES = 64, 128  # columns that a row of w has in shared memory, and what they take
THREADS = 384  # two warpgroups that multiply, one that asks for copies
REGISTERS = 168  # of a thread at first
MOST_STAGES = 6
RESULT_BYTES = 8 * 16 * (64 + 8) * 2  # of y in shared memory, as in conv_wgmma.cu
BARRIER_BYTES = 2 * 8  # of a stage

RATE_SHARE = 0.8  # of the tensor cores' rate, that large products reach
SHARED_BYTES_A_CYCLE = 128
CYCLES_A_SUM = 0.03  # of a multiprocessor, from sums to y
LEAST_CYCLES = 150  # of a step: barriers and descriptors
START_STEPS = 2  # of a block, until the first copies have arrived
LITTLE_WASTE = 1.03  # rows of all tiles over positions: the copy engine takes long rows faster than short ones
SIZES = 8  # of a box on a long axis that are looked at


@dataclass(frozen=True)
class Box:
    """Positions of a tile: `sizes` of them on each axis, of `items` batch items; `tiles` of them cover all."""

    items: int
    sizes: tuple[int, ...]
    tiles: int

    @property
    def rows(self) -> int:
        """Positions in the box."""
        return self.items * math.prod(self.sizes)


@functools.lru_cache(maxsize=4096)
def choose_box(batch: int, out_size: tuple[int, ...], strides: tuple[int, ...], rows: int) -> Box:
    """The box of at most `rows` positions that is longest on the last axis and wastes little, else wastes least."""
    best: Box | None = None
    choices = [_sizes(size, min(rows, MAP_BOX // stride)) for size, stride in zip(out_size, strides, strict=True)]
    for sizes in _within(choices, rows):
        items = _balanced(batch, min(rows // math.prod(sizes), MAP_BOX))
        tiles = -(-batch // items) * math.prod(-(-n // size) for n, size in zip(out_size, sizes, strict=True))
        if best is None or tiles < best.tiles:
            best = Box(items, sizes, tiles)
            if tiles * rows <= LITTLE_WASTE * batch * math.prod(out_size):
                break
    if best is None:
        raise PlanError(f"warpgroups: no box for strides {strides}")
    return best


def _within(choices: Sequence[Sequence[int]], rows: int) -> Iterator[tuple[int, ...]]:
    """One of each of `choices`, their product at most `rows`; those that are first on the last axis come first."""
    if not choices:
        yield ()
        return
    for last in choices[-1]:
        if last <= rows:
            yield from ((*sizes, last) for sizes in _within(choices[:-1], rows // last))


def _sizes(count: int, most: int) -> list[int]:
    """Sizes of a box on an axis of `count` positions that divide it evenly, the largest first."""
    parts = -(-count // most)
    last = count if count <= MAP_BOX else parts + SIZES
    return sorted({-(-count // each) for each in range(parts, max(parts, last) + 1)}, reverse=True)


def _balanced(count: int, most: int) -> int:
    """The least size, at most `most`, of which as few cover `count`."""
    return -(-count // -(-count // most))


@functools.lru_cache(maxsize=4096)
def plan_wgmma(form: Form, dtype: str, activation: str, aligned: tuple[int, ...], limits: DeviceLimits) -> LaunchPlan:
    """The launch of conv_wgmma.cu for `form`; arguments as :func:`cuconv.plan.conv.plan_form`.

    Raises:
        PlanError: it does not compute this, or not on this device.
    """
    element = ELEMENTS[dtype]
    require(form, element, aligned, limits)
    channels = form.shape.in_channels // form.shape.groups
    steps = [bk for bk in STEPS if bk == STEPS[0] or -channels % bk < -channels % STEPS[0]]
    found = [_candidate(form, dtype, activation, limits, *sizes, bk) for sizes in TILES for bk in steps]
    plans = [plan for plan in found if isinstance(plan, LaunchPlan)]
    if not plans:
        raise PlanError("; ".join(map(str, found)))
    # Of those that are about as fast, the one that does least; where the memory is slow, they all are.
    least = min(plan.seconds for plan in plans)
    best = min(
        (plan for plan in plans if plan.seconds <= CHOICE_FACTOR * least),
        key=lambda plan: plan.cost.flops if plan.cost else 0,
    )
    lost = [plan if isinstance(plan, str) else _slower(plan) for plan in found if plan is not best]
    return dataclasses.replace(best, rejected=tuple(lost))


def require(form: Form, element: Element, aligned: tuple[int, ...], limits: DeviceLimits) -> None:
    """Refuses what the kernel does not compute, or not here.

    Raises:
        PlanError: with the reason.
    """
    shape = form.shape
    channels, filters = shape.in_channels // shape.groups, _filters(form)
    if limits.capability != ONLY:
        raise PlanError(f"warpgroups: wgmma is of compute capability 9.0 alone, {limits.name} is {limits.arch}")
    if element.bytes != 2:
        raise PlanError(f"warpgroups: only 16-bit elements, not {element.dtype}")
    if shape.data_format != CHANNELS_LAST:
        raise PlanError("warpgroups: only channels_last")
    if channels % 8 or filters % 8:
        raise PlanError(f"warpgroups: {channels} channels and {filters} filters of a group are not multiples of 8")
    if not form.depth:
        raise PlanError("warpgroups: there are no products")
    if shape.groups > 1 and channels % STEPS[-1]:
        raise PlanError(
            f"warpgroups: {STEPS[-1]} channels are copied at once, and a group of {channels} is no multiple"
        )
    if any(aligned):
        raise PlanError("warpgroups: an array does not begin on a 16-byte boundary")
    if max(shape.strides) > MAP_STEP:
        raise PlanError(f"warpgroups: the copy engine takes strides up to {MAP_STEP}, not {shape.strides}")
    if _furthest(shape) > INT32_MAX:
        raise PlanError("warpgroups: coordinates of the copy engine have 32 bits")


def _filters(form: Form) -> int:
    """Of a group of y."""
    return form.columns // (math.prod(form.upsampled[2]) if form.upsampled else 1)


def _candidate(
    form: Form, dtype: str, activation: str, limits: DeviceLimits, bm: int, bn: int, gm: int, gn: int, bk: int
) -> LaunchPlan | str:
    """The plan with one tile, or why it cannot be taken."""
    shape, element, columns = form.shape, ELEMENTS[dtype], form.columns
    name = f"warpgroups, tile {bm}x{bn}x{bk}"
    channels = shape.in_channels // shape.groups
    if shape.groups > 1 and channels % bk:
        return f"{name}: a group has {channels} channels"
    taps = math.prod(shape.kernel_size)
    stage = (bm + -(-bn // SLICE) * SLICE) * bk * element.bytes
    stages = min(MOST_STAGES, (limits.shared_bytes - RESULT_BYTES) // (stage + BARRIER_BYTES))
    if stages < 2:
        return f"{name}: {limits.name} has no shared memory for two stages"
    shared_bytes = stages * (stage + BARRIER_BYTES) + RESULT_BYTES

    box = choose_box(shape.batch, shape.out_size, shape.strides, bm)
    maps = (_map_of_x(shape, dtype, box, bk), _map_of_w(form, dtype, bk))
    for each in maps:
        if problem := each.problem():
            return f"{name}: no tensor map, {problem}"
    tiles_n = -(-columns // bn)
    tiles = box.tiles * tiles_n * shape.groups
    steps = taps * -(-channels // bk)
    blocks = min(tiles, limits.multiprocessors)
    # Blocks that run together take about as many different rows as columns, so that they share both in the L2 cache.
    band = min(tiles_n, max(1, math.isqrt(limits.multiprocessors * bm // bn)))
    sizes = form.upsampled[0] if form.upsampled else shape.out_size
    y_size = shape.batch * math.prod(sizes) * _filters(form) * shape.groups
    width = index_bytes(2 * y_size, tiles + blocks, steps)
    x_size = shape.batch * math.prod(shape.in_size) * shape.in_channels
    least_bytes = (x_size + form.depth * columns * shape.groups + y_size) * element.bytes
    work = 2 * bm * bn * bk * steps * tiles, 2 * form.products
    cost = _cost(limits, (bm, bn, gm, gn, bk), box.rows, tiles, steps, work, least_bytes)
    return LaunchPlan(
        kernel="conv_wgmma",
        constants=(
            ("ELEMENT", element.c_type),
            ("INDEX", "int" if width == 4 else "long long"),
            ("RANK", shape.rank),
            ("CHANNELS_FIRST", 0),
            ("UPSAMPLED", int(bool(form.upsampled))),
            ("SPLIT", 0),
            ("ACTIVATION", ACTIVATION_CODES[activation]),
            ("BM", bm),
            ("BN", bn),
            ("BK", bk),
            ("GM", gm),
            ("GN", gn),
            ("STAGES", stages),
        ),
        integers=(
            *(tiles, box.tiles, tiles_n, band),
            *(shape.groups, channels, columns),
            *((columns, 0) if form.w_group == columns else (0, taps)),
            *(taps, steps, shape.batch, box.items, box.rows),
            *box.sizes,
            *(-(-n // size) for n, size in zip(shape.out_size, box.sizes, strict=True)),
            *shape.out_size,
            *shape.kernel_size,
            *shape.strides,
            *shape.dilation_rate,
            *shape.pad_before,
            *(size for sizes in form.upsampled for size in sizes),
        ),
        grid=(blocks, 1, 1),
        block=(THREADS, 1, 1),
        index_bytes=width,
        shared_bytes=shared_bytes,
        dynamic_shared_bytes=shared_bytes,
        registers=REGISTERS,
        reason=_reason((bm, bn, bk), stages, box, tiles, cost, limits),
        cost=cost,
        maps=maps,
    )


def _map_of_x(shape: ConvShape, dtype: str, box: Box, bk: int) -> TensorMap:
    """Of boxes of `bk` channels at the inputs that the positions of `box` read for one tap."""
    sizes = (shape.in_channels, *reversed(shape.in_size), shape.batch)
    strides = tuple(ELEMENTS[dtype].bytes * each for each in itertools.accumulate(sizes[:-1], int.__mul__))
    steps = (1, *reversed(shape.strides), 1)
    spans = (bk, *reversed(box.sizes), box.items)
    extents = tuple(span * step for span, step in zip(spans, steps, strict=True))
    return TensorMap(0, dtype, sizes, strides, extents, steps, bk * ELEMENTS[dtype].bytes)


def _map_of_w(form: Form, dtype: str, bk: int) -> TensorMap:
    """Of boxes of 64 columns and `bk` channels of one tap; groups lie side by side, or behind each other."""
    shape = form.shape
    channels, taps = shape.in_channels // shape.groups, math.prod(shape.kernel_size)
    row = form.w_pitch * ELEMENTS[dtype].bytes
    sizes = (form.w_pitch, channels, taps if form.w_group == form.columns else taps * shape.groups)
    return TensorMap(1, dtype, sizes, (row, row * channels), (SLICE, bk, 1), (1, 1, 1), SLICE_BYTES)


def _furthest(shape: ConvShape) -> int:
    """The largest coordinate that a box comes to, or more."""
    taps = math.prod(shape.kernel_size)
    axes = zip(shape.out_size, shape.strides, shape.k_eff, shape.pad_before, shape.in_size, strict=True)
    each = (2 * (out + MAP_BOX) * stride + k_eff + abs(pad) + size for out, stride, k_eff, pad, size in axes)
    return int(
        max(*each, shape.in_channels + STEPS[0], shape.filters + MAP_BOX, shape.groups * taps, shape.batch + MAP_BOX)
    )


def _cost(
    limits: DeviceLimits,
    sizes: tuple[int, int, int, int, int],
    rows: int,
    tiles: int,
    steps: int,
    work: tuple[int, int],
    least_bytes: int,
) -> Cost:
    """The model above; `work`: operations done and needed."""
    bm, bn, gm, gn, bk = sizes
    row_bytes = 2 * bk
    clock = limits.clock
    tensor = 2 * bm * bn * bk / (limits.fp16_rate * RATE_SHARE / limits.multiprocessors)
    copied = (rows + -(-bn // SLICE) * SLICE) * row_bytes
    # A product of 64 rows reads them, and all columns of the warpgroup.
    read = bm // gm * (bn // gn) * (gm // 64) * (64 + gn) * row_bytes
    shared = (read + copied) / SHARED_BYTES_A_CYCLE / clock
    rounds = -(-tiles // limits.multiprocessors)
    step = max(tensor, shared, LEAST_CYCLES / clock)
    busy = (rounds * steps + START_STEPS) * step + rounds * bm * bn * CYCLES_A_SUM / clock
    moved = tiles * steps * copied
    times = {
        "tensor cores" if tensor >= shared else "shared memory": busy,
        "L2 cache": moved / (L2_FACTOR * limits.bandwidth),
        "memory": least_bytes / limits.bandwidth,
    }
    return slowest(*work, moved, least_bytes, times)


def _reason(tile: tuple[int, int, int], stages: int, box: Box, tiles: int, cost: Cost, limits: DeviceLimits) -> str:
    useful = 100 * cost.least_flops / max(1, cost.flops)
    name, sizes = "x".join(map(str, tile)), "x".join(map(str, box.sizes))
    return (
        f"warpgroups, tile {name}, {stages} stages; boxes of {sizes} positions of {box.items} items; "
        f"{useful:.0f} % of its products count, {tiles / limits.multiprocessors:.1f} tiles a multiprocessor"
    )


def _slower(plan: LaunchPlan) -> str:
    return f"{plan.reason.partition(';')[0]}: {plan.seconds * 1e6:.1f} us predicted"
