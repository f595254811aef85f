"""Plans of kernel gradients on the tensor cores of sm_90, by warpgroups: kernels/kernel_grad_wgmma.cu.

A step is a box of positions, which the copy engine brings once for dy. Of x it brings either a box for each tap
("reload"), or a longer one from which several taps read (a "halo"). A tap has to begin a multiple of 8 rows behind
another one in the same box. So a box has either 8 strands of positions innermost, whose taps are the same, or there are
none and the dilation is a multiple of 8. Strands are neighbours on any axis: batch items, positions of another axis, or
residues of the dilation, if it divides all sizes. The order of positions does not matter to their sum, as long as x and
dy have the same.

A box may reach behind the last position, where dy is zero. A number of x that meets these zeros must not be a NaN that
nobody reads, so there are no boxes that bring such. One that some tap reads can reach the other taps of its channel.

The model, for one block and step. It takes as long as the slower of

* the tensor cores, at the share of their rate that large products reach;
* shared memory: each product reads both of its operands, every copy writes once, 128 bytes a cycle;

and a launch as long as its busiest multiprocessor, or as the memory, or as the L2 cache, from which every step comes.
Sums are stored by all blocks at the end, when nothing else happens.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan.cost import L2_FACTOR, slowest
from cuconv.plan.reduce import plan_reduce
from cuconv.plan.simt import CHOICE_FACTOR
from cuconv.plan.types import (
    ELEMENTS,
    INT32_MAX,
    MAP_BOX,
    MAP_RANK,
    MAP_STEP,
    MAX_GRID_X,
    Cost,
    DeviceLimits,
    Element,
    LaunchPlan,
    PlanError,
    TensorMap,
    index_bytes,
)
from cuconv.plan.wgmma import (
    BARRIER_BYTES,
    LEAST_CYCLES,
    ONLY,
    RATE_SHARE,
    REGISTERS,
    SHARED_BYTES_A_CYCLE,
    SLICE,
    SLICE_BYTES,
    START_STEPS,
    THREADS,
)

# What the two warpgroups of a block share, by the codes of the kernel.
SHARED = {"channels": 0, "filters": 1, "taps": 2}
# Slices of 64 channels and filters of a block, and what its warpgroups share; from large to small.
TILES: tuple[tuple[int, int, str], ...] = (
    (2, 256, "channels"),
    (1, 256, "filters"),
    (2, 192, "channels"),
    (2, 128, "channels"),
    (1, 256, "taps"),
    (1, 128, "filters"),
    (2, 96, "channels"),
    (1, 128, "taps"),
    (2, 64, "channels"),
    (1, 64, "taps"),
)
MOST_SUMS = 192  # of a thread
STRANDS = 8  # rows until the swizzle repeats
STEP = 16  # positions of a product
ROWS = (256, 192, 128, 96, 64, 32, 16)  # positions of a step, at most; longer ones have fewer barriers and less halo
SIZES = 8  # of a box on the axis of the halo that are looked at
ENOUGH_STAGES, MOST_STAGES = 3, 6
LEAST_SPLIT = 4  # steps of a split, or its start and end cost more than they save
STORE_CYCLES = 0.03  # of a multiprocessor, from a sum to memory


@dataclass(frozen=True)
class Axis:
    """An axis of positions, as both maps have it.

    Attributes:
        sizes: of x, and of dy.
        pitches: elements from one place to the next, of x and of dy.
        tap_pitch: from one tap of this axis to the next, among all.
    """

    sizes: tuple[int, int]
    pitches: tuple[int, int]
    taps: int = 1
    stride: int = 1
    dilation: int = 1
    pad: int = 0
    tap_pitch: int = 0

    @property
    def read(self) -> int:
        """Places of x up to the last one that is read. What lies behind reads as zero."""
        last = (self.sizes[1] - 1) * self.stride + (self.taps - 1) * self.dilation - self.pad
        return min(self.sizes[0], last + 1)

    def reads(self, at: int) -> bool:
        """Whether some position reads place `at` of x."""
        starts = (at + self.pad - tap * self.dilation for tap in range(self.taps))
        return any(start % self.stride == 0 and 0 <= start // self.stride < self.sizes[1] for start in starts)

    def keeps_out(self, box: int) -> bool:
        """Whether boxes of `box` positions bring no place that no position reads.

        The last one may reach behind the last position, where dy is zero. What nobody reads can be a NaN all the same.
        """
        behind = range(self.sizes[1], -(-self.sizes[1] // box) * box)
        taps = range(self.taps)
        places = {at * self.stride + tap * self.dilation - self.pad for at in behind for tap in taps}
        return all(self.reads(at) for at in places if 0 <= at < self.read)


@dataclass(frozen=True)
class View:
    """An order of the axes of positions, innermost first; taps of a block are those of axis `halo`."""

    name: str
    axes: tuple[Axis, ...]
    halo: int  # 0: without strands

    @property
    def strands(self) -> int:
        return STRANDS if self.halo else 1


@dataclass(frozen=True)
class Reach:
    """How the taps of a block read boxes of x: a tap begins `shifts` positions into box number `boxes` of its slice."""

    boxes: tuple[int, ...]
    shifts: tuple[int, ...]
    starts: tuple[int, ...]  # of each box, behind the first tap's first place
    span: int  # positions that a box has more than dy's

    @property
    def is_halo(self) -> bool:
        return len(self.starts) < len(self.boxes)


@dataclass(frozen=True)
class Box:
    """Positions of a step on each axis of a view, and how many boxes cover an axis."""

    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def rows(self) -> int:
        return math.prod(self.sizes)

    @property
    def steps(self) -> int:
        return math.prod(self.counts)


@dataclass(frozen=True)
class Candidate:
    """A launch with one tile and mode, and the seconds that it takes with its reduction."""

    plan: LaunchPlan
    splits: int
    seconds: float
    mode: str
    tile: tuple[int, int, int, str]  # slices, taps, filters, and what warpgroups share


def plan_on_warpgroups(
    shape: ConvShape, dtype: str, aligned: tuple[int, ...], most: int, limits: DeviceLimits
) -> tuple[LaunchPlan, int]:
    """The launch with the lowest predicted time, the reduction's included, and its splits.

    Args:
        aligned: elements by which x, dy and dw lie behind a 16-byte boundary.
        most: splits, at most.

    Raises:
        PlanError: it does not compute this, or not on this device.
    """
    element = ELEMENTS[dtype]
    require(shape, element, aligned, limits)
    found: list[Candidate] = []
    refused: dict[str, None] = {}
    for view in views(shape):
        for slices, bn, shared in TILES:
            for taps in tap_counts(view.axes[view.halo].taps, slices, bn, shared):
                for reach in reaches(view, taps):
                    tile = slices, taps, bn, shared
                    each = _candidate(shape, dtype, aligned, most, limits, view, reach, tile)
                    if isinstance(each, str):
                        refused[each] = None
                    else:
                        found.append(each)
    if not found:
        raise PlanError("; ".join(refused) or "warpgroups: no order of positions")
    least = min(each.seconds for each in found)
    # Of those that are about as fast, the one that moves least.
    best = min(
        (each for each in found if each.seconds <= CHOICE_FACTOR * least),
        key=lambda each: each.plan.cost.bytes if each.plan.cost else 0,
    )
    return best.plan.rejecting(*_others(found, best), *refused), best.splits


def _others(found: Sequence[Candidate], best: Candidate) -> Iterator[str]:
    """The fastest with every other tile in the mode that is taken, and of every other mode."""
    kept: dict[object, Candidate] = {}
    for each in sorted(found, key=lambda each: each.seconds):
        if (each.mode, each.tile) != (best.mode, best.tile):
            kept.setdefault(each.tile if each.mode == best.mode else each.mode, each)
    for each in kept.values():
        yield f"{each.plan.reason.partition(';')[0]}: {each.seconds * 1e6:.1f} us predicted"


def require(shape: ConvShape, element: Element, aligned: tuple[int, ...], limits: DeviceLimits) -> None:
    """Refuses what the kernel does not compute, or not here.

    Raises:
        PlanError: with the reason.
    """
    channels, columns = shape.in_channels // shape.groups, shape.filters // shape.groups
    if limits.capability != ONLY:
        raise PlanError(f"warpgroups: wgmma is of compute capability 9.0 alone, {limits.name} is {limits.arch}")
    if element.bytes != 2:
        raise PlanError(f"warpgroups: only 16-bit elements, not {element.dtype}")
    if shape.data_format != CHANNELS_LAST:
        raise PlanError("warpgroups: only channels_last")
    if channels % 8 or columns % 8:
        raise PlanError(f"warpgroups: {channels} channels and {columns} filters of a group are not multiples of 8")
    if any(aligned):
        raise PlanError("warpgroups: an array does not begin on a 16-byte boundary")
    if max(shape.strides) > MAP_STEP:
        raise PlanError(f"warpgroups: the copy engine takes strides up to {MAP_STEP}, not {shape.strides}")
    if _furthest(shape) > INT32_MAX:
        raise PlanError("warpgroups: coordinates of the copy engine have 32 bits")
    if any(axis.read <= 0 for axis in _axes(shape)):
        raise PlanError("warpgroups: all taps of an axis meet padding")


def _furthest(shape: ConvShape) -> int:
    """The largest coordinate that a box comes to, or more."""
    axes = zip(shape.out_size, shape.strides, shape.k_eff, shape.pad_before, shape.in_size, strict=True)
    each = [(out + MAP_BOX) * stride + 2 * k_eff + abs(pad) + size for out, stride, k_eff, pad, size in axes]
    positions = shape.batch * math.prod(shape.in_size) if _is_product(shape) else 0
    return int(
        max(*each, positions, shape.in_channels + 2 * MAP_BOX, shape.filters + 2 * MAP_BOX, shape.batch + MAP_BOX)
    )


def _is_product(shape: ConvShape) -> bool:
    """Whether taps and padding move nothing."""
    plain = max(shape.kernel_size) == 1 and max(shape.strides) == 1
    return plain and shape.in_size == shape.out_size and not any(shape.pad_before)


def _axes(shape: ConvShape) -> tuple[Axis, ...]:
    """Batch, then the spatial axes."""
    x_pitch, d_pitch, taps = shape.in_channels, shape.filters, 1
    found = []
    for a in reversed(range(shape.rank)):
        sizes, pitches = (shape.in_size[a], shape.out_size[a]), (x_pitch, d_pitch)
        kernel, pad = shape.kernel_size[a], shape.pad_before[a]
        found.append(Axis(sizes, pitches, kernel, shape.strides[a], shape.dilation_rate[a], pad, taps))
        x_pitch, d_pitch, taps = x_pitch * sizes[0], d_pitch * sizes[1], taps * kernel
    found.append(Axis((shape.batch, shape.batch), (x_pitch, d_pitch)))
    return tuple(reversed(found))


def views(shape: ConvShape) -> Iterator[View]:
    """Orders of the axes that boxes are looked for in."""
    batch, *others, last = _axes(shape)
    others = others[::-1]
    if _is_product(shape):
        positions = shape.batch * math.prod(shape.in_size)
        beyond = Axis((1, 1), (positions * shape.in_channels, positions * shape.filters))
        yield View("positions", (Axis((positions, positions), last.pitches), beyond), 0)
        return
    yield View("rows", (last, *others, batch), 0)
    if shape.batch >= STRANDS:
        yield View("items", (batch, last, *others), 1)
    for number, axis in enumerate(others):
        if axis.sizes[1] >= STRANDS:
            rest = others[:number] + others[number + 1 :]
            yield View(f"places of axis {shape.rank - 2 - number}", (axis, last, *rest, batch), 1)
    d = last.dilation
    apart = d > 1 and last.taps > 1 and last.stride == 1
    if apart and not any(n % d for n in (*last.sizes, last.pad)) and len(others) + 4 <= MAP_RANK:
        residues = Axis((d, d), last.pitches)
        sizes, pitches = (last.sizes[0] // d, last.sizes[1] // d), (d * last.pitches[0], d * last.pitches[1])
        along = Axis(sizes, pitches, last.taps, pad=last.pad // d, tap_pitch=last.tap_pitch)
        yield View("residues", (residues, along, *others, batch), 1)


def tap_counts(taps: int, slices: int, bn: int, shared: str) -> list[int]:
    """Taps of a block that divide all `taps` of an axis evenly, the most first."""
    half = MOST_SUMS // (slices * bn // 2)
    most = 2 * half if shared == "taps" else MOST_SUMS // (slices * bn // 4)
    found = dict.fromkeys(-(-taps // parts) for parts in range(max(1, -(-taps // max(1, most))), taps + 1))
    return [each for each in found if each <= most and (shared != "taps" or each > 1)][:3]


def reaches(view: View, taps: int) -> Iterator[Reach]:
    """The ways of `taps` taps to read boxes of x: a halo, where it is possible, and a box each."""
    axis = view.axes[view.halo]
    places = [tap * axis.dilation for tap in range(taps)]
    if taps > 1:
        starts = sorted({place % axis.stride: place for place in reversed(places)}.values())
        box_of = {start % axis.stride: number for number, start in enumerate(starts)}
        boxes = tuple(box_of[place % axis.stride] for place in places)
        shifts = tuple((place - starts[box]) // axis.stride for place, box in zip(places, boxes, strict=True))
        if len(starts) < taps and all(shift * view.strands % STRANDS == 0 for shift in shifts):
            yield Reach(boxes, shifts, tuple(starts), max(shifts))
    yield Reach(tuple(range(taps)), (0,) * taps, tuple(places), 0)


@functools.lru_cache(maxsize=4096)
def choose_box(view: View, span: int, rows: int) -> Box | None:
    """The box of at most `rows` positions that has the fewest in vain, else the longest on the axis of the halo."""
    halo, strands = view.axes[view.halo], view.strands
    rest = [axis for number, axis in enumerate(view.axes) if number > view.halo]
    best: tuple[int, int, Box] | None = None
    # Where a box has several lines, each must be whole products.
    unit = STEP // strands
    for size in _sizes(halo.sizes[1], min(rows // strands, MAP_BOX // halo.stride - span), unit):
        left, others = rows // (strands * size), []
        for axis in rest:
            other = _balanced(axis.sizes[1], min(left, MAP_BOX // axis.stride))
            others.append(other)
            left //= other
        sizes = (*((STRANDS,) if view.halo else ()), size, *others)
        if not all(axis.keeps_out(each) for axis, each in zip(view.axes, sizes, strict=True)):
            continue
        counts = tuple(-(-axis.sizes[1] // each) for axis, each in zip(view.axes, sizes, strict=True))
        box = Box(sizes, counts)
        moved = box.steps * strands * (size + span) * math.prod(others)
        if best is None or (box.rows * box.steps + moved, box.steps) < best[:2]:
            best = box.rows * box.steps + moved, box.steps, box
    return best[2] if best else None


def _sizes(count: int, most: int, unit: int) -> list[int]:
    """Multiples of `unit` that divide an axis of `count` places about evenly, the largest first."""
    most -= most % unit
    if most <= 0:
        return []
    parts = -(-count // most)
    return sorted({-(-count // (each * unit)) * unit for each in range(parts, parts + SIZES)}, reverse=True)


def _balanced(count: int, most: int) -> int:
    """The least size, at most `most`, of which as few cover `count`."""
    most = max(1, most)
    return -(-count // -(-count // most))


def _candidate(
    shape: ConvShape,
    dtype: str,
    aligned: tuple[int, ...],
    most: int,
    limits: DeviceLimits,
    view: View,
    reach: Reach,
    tile: tuple[int, int, int, str],
) -> Candidate | str:
    """The plan with one tile and mode, or why it cannot be taken."""
    slices, taps, bn, shared = tile
    element = ELEMENTS[dtype]
    mode = f"{'halo' if reach.is_halo else 'reload'} of {view.name}"
    name = f"warpgroups, {mode}"
    slices_d = -(-bn // SLICE)
    chosen: tuple[Box, int, int] | None = None
    for rows in ROWS:
        box = choose_box(view, reach.span, rows)
        if box is None or (chosen and box == chosen[0]):
            continue
        x_rows = box.rows // box.sizes[view.halo] * (box.sizes[view.halo] + reach.span)
        stage = (slices * len(reach.starts) * x_rows + slices_d * box.rows) * SLICE_BYTES
        stages = min(MOST_STAGES, limits.shared_bytes // (stage + BARRIER_BYTES))
        if stages >= 2 and (chosen is None or chosen[2] < ENOUGH_STAGES):
            chosen = box, x_rows, stages
        if stages >= ENOUGH_STAGES:
            break
    if chosen is None:
        return f"{name}: no box of positions has room for two stages, or none leaves out what nobody reads"
    box, x_rows, stages = chosen
    stage = (slices * len(reach.starts) * x_rows + slices_d * box.rows) * SLICE_BYTES
    shared_bytes = stages * (stage + BARRIER_BYTES)

    maps = (
        _map(0, dtype, view, shape.in_channels, box, reach.span),
        _map(1, dtype, view, shape.filters, box, 0),
    )
    for each in maps:
        if problem := each.problem():
            return f"{name}: no tensor map, {problem}"

    channels, columns = shape.in_channels // shape.groups, shape.filters // shape.groups
    tiles_c, tiles_n = -(-channels // (slices * SLICE)), -(-columns // bn)
    parts = [axis.taps for axis in view.axes]
    parts[view.halo] = -(-parts[view.halo] // taps)
    tiles = tiles_c * tiles_n * shape.groups * math.prod(parts)
    count = math.prod(shape.kernel_size) * channels * shape.filters
    x_size = shape.batch * math.prod(shape.in_size) * shape.in_channels
    d_size = shape.batch * math.prod(shape.out_size) * shape.filters
    least_bytes = (x_size + d_size + count) * element.bytes
    products = 2 * shape.batch * math.prod(shape.out_size) * count

    copied = _copied(shape, view, reach, box, slices, taps, bn)

    best: tuple[float, Cost, int, int] | None = None
    for wanted in _splits(tiles, box.steps, most, limits):
        chunk = -(-box.steps // wanted)
        splits = -(-box.steps // chunk)
        if tiles * splits > MAX_GRID_X:
            continue
        stored = splits * count * element.sum_bytes if splits > 1 else count * element.bytes
        work = (slices, taps, bn, shared, box.rows, stage, chunk)
        moved = (copied * element.bytes, stored, least_bytes)
        cost = _cost(limits, work, tiles * splits, box.steps * tiles, moved, products)
        seconds = cost.seconds
        if splits > 1:
            seconds += plan_reduce(dtype, splits, count, aligned[2], limits).seconds
        if best is None or seconds * CHOICE_FACTOR < best[0]:
            best = seconds, cost, splits, chunk
    if best is None:
        return f"{name}: more blocks than a grid has"
    seconds, cost, splits, chunk = best

    # Lines of the axis of the halo have what it brings more between them; without one, all positions are a line.
    lines = box.rows // (view.strands * box.sizes[view.halo]) if reach.span else 1
    line_rows = box.rows // lines
    gap = (x_rows // lines - line_rows + STEP) * SLICE_BYTES // 16
    box_bytes = x_rows * SLICE_BYTES
    tap_from = (
        (number * box_bytes + shift * view.strands * SLICE_BYTES) // 16
        for number, shift in zip(reach.boxes, reach.shifts, strict=True)
    )
    on_halo = [0] * len(parts)
    on_halo[view.halo] = 1
    steps_x = [size * axis.stride for size, axis in zip(box.sizes, view.axes, strict=True)]
    part_step = [axis.dilation * (taps if own else 1) for axis, own in zip(view.axes, on_halo, strict=True)]
    part_taps = [axis.tap_pitch * (taps if own else 1) for axis, own in zip(view.axes, on_halo, strict=True)]
    width = index_bytes((splits + 1) * count, tiles * splits + box.steps)
    plan = LaunchPlan(
        kernel="kernel_grad_wgmma",
        constants=(
            ("ELEMENT", element.c_type),
            ("INDEX", "int" if width == 4 else "long long"),
            ("RANK", len(view.axes)),
            ("HALO", view.halo),
            ("SPLIT", int(splits > 1)),
            ("BM", slices * SLICE),
            ("BN", bn),
            ("BK", box.rows),
            ("TAPS", taps),
            ("SHARED", SHARED[shared]),
            ("BOXES", len(reach.starts)),
            ("STAGES", stages),
        ),
        integers=(
            *(box.steps, chunk, tiles_c, tiles_n),
            *(shape.groups, channels, columns, shape.filters),
            *(view.axes[view.halo].taps, count),
            *(line_rows // STEP, gap),
            *(stage, box_bytes),
            *parts,
            *part_step,
            *part_taps,
            *box.counts,
            *steps_x,
            *(-axis.pad for axis in view.axes),
            *box.sizes,
            *reach.starts,
            *tap_from,
        ),
        grid=(tiles * splits, 1, 1),
        block=(THREADS, 1, 1),
        index_bytes=width,
        shared_bytes=shared_bytes,
        dynamic_shared_bytes=shared_bytes,
        registers=REGISTERS,
        reason=(
            f"{name}, tile {slices * SLICE}x{bn} of {taps} taps, {shared} shared, {stages} stages; boxes of "
            f"{'x'.join(map(str, box.sizes))} positions; {splits} parts of {chunk} boxes; {cost.bytes} bytes from and "
            f"to the L2 cache; {100 * cost.least_flops / cost.flops:.0f} % of its products count"
        ),
        cost=cost,
        maps=maps,
    )
    return Candidate(plan, splits, seconds, mode, tile)


def _splits(tiles: int, steps: int, most: int, limits: DeviceLimits) -> Iterator[int]:
    """Parts that give every multiprocessor one block, two, or more."""
    most = max(1, min(most, steps // LEAST_SPLIT))
    found = {1}
    for rounds in range(1, 5):
        found.add(max(1, min(most, rounds * limits.multiprocessors // tiles)))
    yield from sorted(found)


def _map(array: int, dtype: str, view: View, channels: int, box: Box, span: int) -> TensorMap:
    """Of x or dy: boxes of 64 channels or filters at the positions of `box`, `span` more on the axis of the halo."""
    size = ELEMENTS[dtype].bytes
    steps = [axis.stride if array == 0 else 1 for axis in view.axes]
    extents = list(box.sizes)
    extents[view.halo] += span
    return TensorMap(
        array,
        dtype,
        (channels, *(axis.read if array == 0 else axis.sizes[1] for axis in view.axes)),
        tuple(axis.pitches[array] * size for axis in view.axes),
        (SLICE, *itertools.starmap(int.__mul__, zip(extents, steps, strict=True))),
        (1, *steps),
        SLICE_BYTES,
    )


def _copied(shape: ConvShape, view: View, reach: Reach, box: Box, slices: int, taps: int, bn: int) -> int:
    """Elements that all blocks copy to shared memory; zeros outside of x and dy are not read."""
    channels, columns = shape.in_channels // shape.groups, shape.filters // shape.groups
    tiles_c, tiles_n = -(-channels // (slices * SLICE)), -(-columns // bn)
    x_places = d_places = 1
    for number, (axis, size, count) in enumerate(zip(view.axes, box.sizes, box.counts, strict=True)):
        starts, span, parts = [0], 0, axis.taps
        if number == view.halo:
            starts, span, parts = list(reach.starts), reach.span, -(-axis.taps // taps)
        step = size * axis.stride
        found = 0
        for part, start in itertools.product(range(parts), starts):
            first = part * axis.dilation * (taps if number == view.halo else 1) + start - axis.pad
            found += _inside(first, axis.stride, count * size, axis.read)
            found += sum(_inside(first + step + i * axis.stride, step, count, axis.read) for i in range(span))
        x_places *= found
        d_places *= parts * axis.sizes[1]
    x_width = _width(shape.in_channels, channels, shape.groups, tiles_c * slices)
    d_width = _width(shape.filters, columns, shape.groups, tiles_n * -(-bn // SLICE))
    return x_places * x_width * tiles_n + d_places * d_width * tiles_c


def _inside(first: int, step: int, count: int, size: int) -> int:
    """Of the places first, first + step, ..., `count` of them, those from 0 to size - 1."""
    return max(0, min(count, -(-(size - first) // step)) - max(0, -(first // step)))


def _width(all_channels: int, of_group: int, groups: int, slices: int) -> int:
    """Channels of all slices of all groups. What a slice has behind its group is copied, what is behind all is not."""
    starts = (group * of_group + number * SLICE for group in range(groups) for number in range(slices))
    return sum(max(0, min(SLICE, all_channels - start)) for start in starts)


def _cost(
    limits: DeviceLimits,
    work: tuple[int, int, int, str, int, int, int],
    blocks: int,
    steps: int,
    bytes_: tuple[int, int, int],
    products: int,
) -> Cost:
    """The model above; `steps`: of all blocks, `bytes_`: copied, stored, and of every array once."""
    slices, taps, bn, shared, rows, stage, chunk = work
    copied, stored, least_bytes = bytes_
    clock = limits.clock
    gn = bn // 2 if shared == "filters" else bn
    # Of both warpgroups, with a tap too many where they do not share taps evenly.
    made = slices * (taps + taps % 2 if shared == "taps" else taps) * (2 if shared == "filters" else 1)
    flops = 2 * SLICE * gn * rows * made
    tensor = flops / (limits.fp16_rate * RATE_SHARE / limits.multiprocessors)
    read = made * (SLICE + gn) * rows * 2
    shared_seconds = (read + stage) / SHARED_BYTES_A_CYCLE / clock
    step = max(tensor, shared_seconds, LEAST_CYCLES / clock)
    rounds = -(-blocks // limits.multiprocessors)
    busy = rounds * ((chunk + START_STEPS) * step + made * SLICE * gn * STORE_CYCLES / clock)
    moved = copied + stored
    times = {
        "tensor cores" if tensor >= shared_seconds else "shared memory": busy,
        "L2 cache": moved / (L2_FACTOR * limits.bandwidth),
        "memory": (least_bytes + stored) / limits.bandwidth,
    }
    return slowest(flops * steps, products, moved, least_bytes, times)
