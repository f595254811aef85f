"""Convolutions on the tensor cores of sm_90, by warpgroups: conv_wgmma.cu, its modes and tiles, and what each costs.

A tile's rows are the positions of a box, so that the copy engine brings them for a tap in one piece. What a box has
fewer than the tile has rows is multiplied in vain. The modes differ in what is copied how often:

* ``reload`` -- every tap has a box of x of its own;
* ``halo`` -- a box that is longer on one axis serves all of its taps. The other axes and batch items lie innermost, so
  that a tap is 8 rows behind the one before, or a multiple of 8: after 8 rows the swizzle of shared memory repeats, and
  operands may begin there. Whether they may begin at any row, which a single sequence would need, is what `shift` of
  benchmarks/probe.py asks; no GPU has told yet;
* ``phase`` -- the same in strands of positions `dilation` apart, whose taps are neighbours;
* ``weight-stationary``, with each of them -- a block's tiles all have the same columns, whose weights stay.

float32 is for whoever takes TF32: the copy engine rounds it, and products need weights whose sum runs along memory,
which are packed. With few tiles, K is cut into parts, whose sums are added up by another launch.

Bytes are what copies fetch, not the zeros that they write for what lies outside of an array. The model takes as long
as the slower of

* the tensor cores, at the share of their rate that large products reach;
* shared memory: each warpgroup reads its operands, every copy writes once, 128 bytes a cycle;

and a launch as long as its busiest multiprocessor, or as the memory, or as the L2 cache, from which all bytes come.
"""

from __future__ import annotations

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
    MAP_RANK,
    MAP_STEP,
    VECTOR_BYTES,
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
# Rows, columns of a tile, then of a warpgroup's share; from large to small. 16 to 128 sums a thread. Where a warpgroup
# has all of it, the two of a block take turns: one stores its results while the other multiplies.
TILES: tuple[tuple[int, int, int, int], ...] = (
    (128, 256, 64, 256),
    (256, 128, 128, 128),
    (128, 192, 64, 192),
    (256, 96, 128, 96),
    (128, 160, 64, 160),
    (128, 128, 64, 128),
    (128, 128, 128, 128),
    (64, 256, 64, 256),
    (256, 64, 128, 64),
    (64, 256, 64, 128),
    (128, 64, 128, 64),
    (256, 32, 128, 32),
    (128, 64, 64, 64),
)
STEPS = (64, 32)  # channels of a step, of 16 bits, else as many bytes; the second where fewer are zeros then
SLICE, SLICE_BYTES = 64, 128  # columns that a row of w has in shared memory, and what they take
THREADS = 384  # two warpgroups that multiply, one that asks for copies
REGISTERS = 168  # of a thread at first
MOST_STAGES = 6
RESULT_ROWS, RESULT_BYTES, RESULT_PADDING = 8 * 16, 128, 8  # of y in shared memory; the last in elements
BARRIER_BYTES = 2 * 8  # of a stage; or of the turns of two warpgroups

RATE_SHARE = 0.8  # of the tensor cores' rate, that large products reach
SHARED_BYTES_A_CYCLE = 128
# Of a multiprocessor, from sums to y: 1279 instructions of each of two warps a quarter of it, for 128 x 256 of them.
CYCLES_A_SUM = 0.08
LEAST_CYCLES = 150  # of a step: barriers and descriptors
START_STEPS = 2  # of a block, until the first copies have arrived
LITTLE_WASTE = 1.03  # rows of all tiles over positions: the copy engine takes long rows faster than short ones
SIZES = 8  # of a box on a long axis that are looked at
REPEAT = 8  # rows, after which the swizzle repeats: a tap may begin at a multiple of them
# Of a box of a halo: sizes of the axes besides the first that are looked at, and how many rows all these have at most:
# the more, the more rows a tap is from the next.
ACROSS, MOST_ACROSS = (1, 2, 4, 8, 16, 32), 64


@dataclass(frozen=True)
class View:
    """How the positions of y are walked: its axes stand outermost first.

    Attributes:
        mode: "reload", "halo" or "phase".
        axis: of y, whose taps share a box; it is the first here. -1 in mode "reload", where batch items are.
        counts, sizes: positions of each axis, and inputs.
        taps: of each axis, that have boxes of their own; `pitches`: taps of w from one of these to the next.
        strides, dilations, pads: of each axis, as of a convolution.
        shared: taps of that axis, of which every `taps[0]`-th share a box.
        spread: positions from one of those to the next.
        strands, offset, ragged: position p is ``q * strands + r - offset``, of strand r, the last axis here; the first
            `ragged` strands of x have one input more than `sizes` tells. 0 but in mode "phase".
    """

    mode: str
    axis: int
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    taps: tuple[int, ...]
    pitches: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    shared: int = 1
    spread: int = 0
    strands: int = 0
    offset: int = 0
    ragged: int = 0

    def __str__(self) -> str:
        return f"warpgroups, {self.mode}{f' of axis {self.axis}' if self.axis >= 0 else ''}"

    @functools.cached_property
    def beyond(self) -> int:
        """Positions of the first axis that a box has for taps, besides those of the tile."""
        return (-(-self.shared // self.taps[0]) - 1) * self.spread

    def boxes(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Boxes of `sizes` that cover all positions, by axis. Strands of different lengths do not meet in one."""
        *most, last = (-(-n // size) for n, size in zip(self.counts, sizes, strict=True))
        if self.strands:
            last = sum(-(-n // sizes[-1]) for n in (self.ragged, self.strands - self.ragged))
        return (*most, last)


def views(shape: ConvShape) -> list[View]:
    """The ways to walk `shape`: one without, and those in which the taps of an axis share inputs."""
    pitches = [math.prod(shape.kernel_size[a + 1 :]) for a in range(shape.rank)]
    of_taps = (shape.kernel_size, pitches, shape.strides, shape.dilation_rate, shape.pad_before)
    whole = [*zip(shape.out_size, shape.in_size, *of_taps, strict=True)]
    items = (shape.batch, shape.batch, 1, 0, 1, 0, 0)

    def view(mode: str, axis: int, *axes: tuple[int, ...], order: Sequence[int] = ()) -> View:
        counts, sizes, taps, steps_of_w, strides, dilations, pads = zip(*axes, strict=True)
        return View(mode, axis, counts, sizes, taps, steps_of_w, strides, dilations, pads, *order)

    found = [view("reload", -1, items, *whole)]
    for axis, (out_size, size, taps, pitch, stride, dilation, pad) in enumerate(whole):
        together = math.gcd(stride, dilation)
        classes = stride // together
        if taps <= classes:
            continue
        others = (items, *whole[:axis], *whole[axis + 1 :])
        first = (out_size, size, classes, pitch, stride, dilation, pad)
        found.append(view("halo", axis, first, *others, order=(taps, dilation // together)))
        if stride == 1 and 1 < dilation <= size and shape.rank + 3 <= MAP_RANK:
            # Positions p whose first input, p - pad, is the q-th of its strand, from the lowest q on.
            lowest = -pad // dilation
            count = (out_size - 1 - pad) // dilation - lowest + 1
            first = (count, size // dilation, 1, pitch, 1, 1, -lowest)
            strands = (dilation, dilation, 1, 0, 1, 0, 0)
            order = (taps, 1, dilation, -lowest * dilation - pad, size % dilation)
            found.append(view("phase", axis, first, *others, strands, order=order))
    return found


@dataclass(frozen=True)
class Box:
    """Positions of a tile: `sizes` of them on each axis of a view; `tiles` of them cover all."""

    sizes: tuple[int, ...]
    tiles: int

    @functools.cached_property
    def rows(self) -> int:
        """Positions in the box."""
        return math.prod(self.sizes)

    @functools.cached_property
    def across(self) -> int:
        """Of these, those at one place on the first axis."""
        return math.prod(self.sizes[1:])


@functools.lru_cache(maxsize=4096)
def choose_box(batch: int, out_size: tuple[int, ...], strides: tuple[int, ...], rows: int) -> Box:
    """The box of at most `rows` positions that is longest on the last axis and wastes little, else wastes least."""
    best: Box | None = None
    little = LITTLE_WASTE * batch * math.prod(out_size) / rows
    choices = [
        [(size, -(-count // size)) for size in even_sizes(count, min(rows, MAP_BOX // stride))]
        for count, stride in zip(out_size, strides, strict=True)
    ]
    for sizes, width, count in _within(choices, rows):
        items = balanced(batch, min(rows // width, MAP_BOX))
        tiles = -(-batch // items) * count
        if best is None or tiles < best.tiles:
            best = Box((items, *sizes), tiles)
            if tiles <= little:
                break
    if best is None:
        raise PlanError(f"warpgroups: no box for strides {strides}")
    return best


def choose_long_boxes(view: View, rows: int) -> tuple[Box, ...]:
    """Of a halo, at most `rows` positions: the box that copies least of all, and least of those that waste little."""
    found = []
    for width, (count, across) in _across(view).items():
        if width <= rows:
            size = balanced(view.counts[0], rows // width)
            tiles = -(-view.counts[0] // size) * count
            found.append((tiles * (size + view.beyond) * width, tiles, (size, *across)))
    if not found:
        return ()
    most = LITTLE_WASTE * min(tiles for _, tiles, _ in found)
    best = (min(found), min(each for each in found if each[1] <= most))
    return tuple(Box(sizes, tiles) for _, tiles, sizes in dict.fromkeys(best))


@functools.lru_cache(maxsize=4096)
def _across(view: View) -> dict[int, tuple[int, tuple[int, ...]]]:
    """Sizes of a halo's box on the axes besides the first, that few boxes have to cover, by their product."""
    choices = []
    for most, stride in zip(view.counts[1:], view.strides[1:], strict=True):
        limit = min(most, MOST_ACROSS, MAP_BOX // stride)
        choices.append([(size, -(-most // size)) for size in sorted({*ACROSS, most}, reverse=True) if size <= limit])
    if view.strands:  # those of different lengths do not meet in a box
        short = view.strands - view.ragged
        choices[-1] = [(size, -(-view.ragged // size) - (-short // size)) for size, _ in choices[-1]]
    found: dict[int, tuple[int, tuple[int, ...]]] = {}
    for sizes, width, count in _within(choices, MOST_ACROSS):
        if view.spread * width % REPEAT == 0 and (width not in found or count < found[width][0]):
            found[width] = count, sizes
    return found


def _within(choices: Sequence[Sequence[tuple[int, int]]], rows: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """One size of each of `choices`, their product, at most `rows`, and that of the counts that stand beside them.

    Those that are first on the last axis come first.
    """
    if not choices:
        yield (), 1, 1
        return
    for size, count in choices[-1]:
        if size <= rows:
            for sizes, width, counts in _within(choices[:-1], rows // size):
                yield (*sizes, size), width * size, counts * count


def even_sizes(count: int, most: int) -> list[int]:
    """Sizes of a box on an axis of `count` positions that divide it evenly, the largest first; of a long one, some."""
    parts = -(-count // most)
    last, short = (count, ()) if count <= MAP_BOX else (parts + SIZES, ACROSS)
    even = {-(-count // each) for each in range(parts, max(parts, last) + 1)}
    return sorted(even | {size for size in short if size <= most}, reverse=True)


def balanced(count: int, most: int) -> int:
    """The least size, at most `most`, of which as few cover `count`."""
    return -(-count // -(-count // most))


@functools.lru_cache(maxsize=4096)
def plan_wgmma(
    form: Form,
    dtype: str,
    activation: str,
    aligned: tuple[int, ...],
    limits: DeviceLimits,
    precision: str = "highest",
    most: int = 1,
) -> LaunchPlan:
    """The launch of conv_wgmma.cu for `form`; arguments as :func:`cuconv.plan.conv.plan_form`.

    With `most` above one, K is cut into as many parts at most, as :func:`cuconv.plan.conv.plan_by_warps` does.

    Raises:
        PlanError: it does not compute this, or not on this device.
    """
    element = ELEMENTS[dtype]
    require(form, element, aligned, limits, precision)
    channels = form.shape.in_channels // form.shape.groups
    widest, *narrower = _steps(element)
    steps = [widest, *(bk for bk in narrower if -channels % bk < -channels % widest)]
    found: list[_Candidate] = []
    lost: list[str] = []
    if form.shape.rank + 3 > MAP_RANK and max(form.shape.dilation_rate) > 1:
        lost.append(f"warpgroups, phase: strands make {form.shape.rank + 3} axes of x, a tensor map has {MAP_RANK}")
    for view in views(form.shape):
        by_rows = {rows: _boxes(view, rows) for rows in {sizes[0] for sizes in TILES}}
        boxes = [(box, sizes) for sizes in TILES for box in by_rows[sizes[0]]]
        if not boxes:
            lost.append(f"{view}: no box whose taps are a multiple of {REPEAT} rows apart, where operands may begin")
            continue
        if view.mode == "reload":
            # What a driver refuses is the same in every view and for all boxes, which keep to its limits.
            for map_ in _maps(form, dtype, view, boxes[0][0], SLICE, widest):
                if problem := map_.problem():
                    raise PlanError(f"warpgroups: no tensor map, {problem}")
        fastest = [math.inf, math.inf]  # with weights that are streamed, and that stay
        for bk, (box, sizes) in itertools.product(steps, boxes):
            found += _candidates(form, element, limits, view, box, (*sizes, bk), most, fastest)
        if math.isinf(fastest[False]):
            lost.append(f"{view}: no tile has two stages in the shared memory of {limits.name}")
        elif math.isinf(fastest[True]) and most == 1:
            lost.append(f"{view}, weight-stationary: they do not fit, or no block has two tiles of the same columns")
    if not found:
        raise PlanError("; ".join(lost))
    # Of those that are about as fast, the one that moves least; where the memory is slow, they all are.
    least = min(each.cost.seconds for each in found)
    best = min(
        (each for each in found if each.cost.seconds <= CHOICE_FACTOR * least),
        key=lambda each: (each.cost.bytes, each.cost.flops),
    )
    modes: dict[str, _Candidate] = {}
    for each in sorted(found, key=lambda each: each.cost.seconds):
        modes.setdefault(each.mode, each)
    others = [
        f"{each}, {each.cost.seconds * 1e6:.1f} us predicted" for each in modes.values() if each.mode != best.mode
    ]
    return _launch(form, dtype, activation, limits, best, (*others, *lost))


def _steps(element: Element) -> tuple[int, ...]:
    """Channels of a step."""
    return tuple(2 * bk // element.bytes for bk in STEPS)


def sums_along_memory(plan: LaunchPlan) -> bool:
    """Whether a launch takes weights [G, taps.., columns, channels], not [G, taps.., channels, columns]."""
    return plan.kernel == "conv_wgmma" and dict(plan.constants)["ELEMENT"] == ELEMENTS["float32"].c_type


def tiles_of(plan: LaunchPlan) -> int:
    """Of a convolution by any kernel, in all parts of K."""
    return plan.integers[0] if plan.kernel in ("conv_wgmma", "conv_wgmma_first") else math.prod(plan.grid)


def parts_of(plan: LaunchPlan, groups: int) -> int:
    """Into how many parts a launch cuts K: its tiles, over tiles in m and n of all groups."""
    tiles_m, tiles_n = plan.integers[1:3] if plan.kernel == "conv_wgmma" else plan.integers[3:5]
    return tiles_of(plan) // (tiles_m * tiles_n * groups)


def require(
    form: Form, element: Element, aligned: tuple[int, ...], limits: DeviceLimits, precision: str = "highest"
) -> None:
    """Refuses what the kernel does not compute, or not here.

    Raises:
        PlanError: with the reason.
    """
    shape = form.shape
    channels, filters = shape.in_channels // shape.groups, _filters(form)
    require_device(form, limits)
    tf32 = element.dtype == "float32" and precision == "high"
    if element.bytes != 2 and not tf32:
        raise PlanError(f"warpgroups: only 16-bit elements, and float32 as TF32, not {element.dtype}")
    if shape.data_format != CHANNELS_LAST:
        raise PlanError("warpgroups: only channels_last")
    unit = VECTOR_BYTES // element.bytes
    if channels % unit or filters % unit:
        raise PlanError(f"warpgroups: {channels} channels and {filters} filters of a group are not multiples of {unit}")
    if shape.groups > 1 and channels % _steps(element)[-1]:
        raise PlanError(
            f"warpgroups: {_steps(element)[-1]} channels are copied at once, and a group of {channels} is no multiple"
        )
    if any(aligned):
        raise PlanError("warpgroups: an array does not begin on a 16-byte boundary")
    if tf32 and form.w_group == form.columns:
        raise PlanError("warpgroups: products of TF32 need packed weights, which take a launch of their own")


def require_device(form: Form, limits: DeviceLimits) -> None:
    """Refuses what no kernel of warpgroups computes, or not here.

    Raises:
        PlanError: with the reason.
    """
    shape = form.shape
    if limits.capability != ONLY:
        raise PlanError(f"warpgroups: wgmma is of compute capability 9.0 alone, {limits.name} is {limits.arch}")
    if not form.products:
        raise PlanError("warpgroups: there are no products")
    if max(shape.strides) > MAP_STEP:
        raise PlanError(f"warpgroups: the copy engine takes strides up to {MAP_STEP}, not {shape.strides}")
    if furthest(shape) > INT32_MAX:
        raise PlanError("warpgroups: coordinates of the copy engine have 32 bits")


def _filters(form: Form) -> int:
    """Of a group of y."""
    return form.columns // (math.prod(form.upsampled[2]) if form.upsampled else 1)


def _boxes(view: View, rows: int) -> Sequence[Box]:
    """Those that are weighed, of at most `rows` positions."""
    if view.mode != "reload":
        return choose_long_boxes(view, rows)
    return (choose_box(view.counts[0], view.counts[1:], view.strides[1:], rows),)


@dataclass(frozen=True)
class _Candidate:
    """A box of a view with a tile, what it takes of a multiprocessor, and what it costs.

    Attributes:
        stays: the weights do.
        stages, w_stages, stage_rows: as in the kernel.
        parts: of K; `part_loads`: stages of x in each but the last.
        blocks: of the grid.
    """

    view: View
    box: Box
    tile: tuple[int, int, int, int, int]
    stays: bool
    stages: int
    w_stages: int
    stage_rows: int
    parts: int
    part_loads: int
    blocks: int
    cost: Cost

    @property
    def mode(self) -> str:
        """In words."""
        return f"{self.view}, weight-stationary" if self.stays else f"{self.view}"

    def __str__(self) -> str:
        bm, bn, *_, bk = self.tile
        stages = f"{self.stages} and {'all' if self.stays else self.w_stages} stages"
        parts = f", {self.parts} parts of k" if self.parts > 1 else ", in turns" if in_turns(self.tile) else ""
        return f"{self.mode}, tile {bm}x{bn}x{bk}, {stages}{parts}: {self.cost.bytes} bytes to shared memory"


def _candidates(
    form: Form,
    element: Element,
    limits: DeviceLimits,
    view: View,
    box: Box,
    tile: tuple[int, int, int, int, int],
    most: int,
    fastest: list[float],
) -> Iterator[_Candidate]:
    """Those of a box and a tile: with weights that are streamed, and unless K is cut with weights that stay.

    Only those that fit, and that may be faster than `fastest` of their kind, which is kept.
    """
    bm, bn, _, _, bk = tile
    shape = form.shape
    channels = shape.in_channels // shape.groups
    if (shape.groups > 1 and channels % bk) or (most > 1 and in_turns(tile)):
        return
    chunks, columns = -(-channels // bk), -(-form.columns // bn) * shape.groups
    steps, loads, tiles = math.prod(shape.kernel_size) * chunks, math.prod(view.taps) * chunks, box.tiles * columns
    part_loads = -(-loads // most)
    parts = -(-loads // part_loads)
    done, steps = 2 * bm * bn * bk * steps * tiles, -(-steps * part_loads // loads)
    tiles *= parts
    processors = limits.multiprocessors
    of_columns = min(box.tiles, max(1, processors // columns))  # blocks, if weights stay
    all_of_w = steps * (_w_bytes(element, bn, bk) + BARRIER_BYTES)
    for stays in (False, True):
        if stays and (of_columns == box.tiles or most > 1 or all_of_w > limits.shared_bytes):
            continue
        blocks = columns * of_columns if stays else min(tiles, processors)
        rounds = -(-box.tiles // of_columns) * -(-blocks // processors) if stays else -(-tiles // processors)
        if _busy(element, limits, tile, rounds, steps, 0) > CHOICE_FACTOR * fastest[stays]:
            continue
        pieces, _, piece_rows = _pieces(view, box)
        stage_rows = max(bm + view.beyond * box.across, pieces * piece_rows)
        stages, w_stages = _stages(element, limits, view, tile, stage_rows, steps if stays else 0, most)
        if stages < 2:
            continue
        of_w = (blocks / tiles if stays else 1) * steps * _w_bytes(element, bn, bk)
        copied = part_loads * pieces * piece_rows * bk * element.bytes + of_w
        # Of w, a block whose weights stay reads what one tile does.
        moved = element.bytes * channels * columns * _inputs(view, box)
        moved += _weights(form, element, bn) * (of_columns if stays else box.tiles)
        work = done, 2 * form.products
        cost = cost_of(form, element, limits, tile, (rounds, steps, parts), copied, work, moved)
        fastest[stays] = min(fastest[stays], cost.seconds)
        yield _Candidate(view, box, tile, stays, stages, w_stages, stage_rows, parts, part_loads, blocks, cost)


@functools.lru_cache(maxsize=4096)
def _inputs(view: View, box: Box) -> int:
    """Inputs that the tiles of a view read for all taps, those apart that lie outside of x."""
    pieces, piece, _ = _pieces(view, box)
    spans = (pieces * piece, *box.sizes[1:])
    of_axes = list(zip(view.counts, view.sizes, view.taps, view.strides, view.dilations, view.pads, strict=True))
    if not view.strands:
        return math.prod(_read(*axis, size, span) for axis, size, span in zip(of_axes, box.sizes, spans, strict=True))
    (count, inputs, *rest), *others, _ = of_axes
    across = math.prod(_read(*axis, size, size) for axis, size in zip(others, box.sizes[1:-1], strict=True))
    lengths = ((inputs + 1, view.ragged), (inputs, view.strands - view.ragged))
    return across * sum(_read(count, n, *rest, box.sizes[0], spans[0]) * strands for n, strands in lengths)


@functools.lru_cache(maxsize=4096)
def _read(count: int, inputs: int, taps: int, stride: int, dilation: int, pad: int, size: int, span: int) -> int:
    """Inputs that boxes of `size` of `count` positions read for all taps on an axis, `span` each, if they exist."""
    boxes, found = -(-count // size), 0
    for tap in range(taps):
        first = tap * dilation - pad
        low, high = -(first // stride), -((first - inputs) // stride)
        found += _overlap(high, boxes, size, span) - _overlap(low, boxes, size, span)
    return found


def _overlap(end: int, boxes: int, size: int, span: int) -> int:
    """How much of boxes that begin `size` apart, `span` long, lies before `end`."""
    if end <= 0:
        return 0
    whole = min(boxes, max(0, (end - span) // size + 1))
    begun = max(whole, min(boxes, -(-end // size)))
    return whole * span + (begun - whole) * end - size * (whole + begun - 1) * (begun - whole) // 2


def _weights(form: Form, element: Element, bn: int) -> int:
    """Bytes of w that tiles of all columns and groups read once."""
    groups, tiles, wide = form.shape.groups, -(-form.columns // bn), _w_columns(element, bn)
    starts = range(0, form.w_pitch, form.columns) if form.w_group == form.columns else [0] * groups
    return element.bytes * form.depth * sum(_overlap(form.w_pitch - start, tiles, bn, wide) for start in starts)


def _w_columns(element: Element, bn: int) -> int:
    """Columns of w in a stage: whole slices, but of TF32, whose columns are rows there."""
    return bn if element.bytes == 4 else -(-bn // SLICE) * SLICE


def _w_bytes(element: Element, bn: int, bk: int) -> int:
    """Of w in a stage."""
    return _w_columns(element, bn) * bk * element.bytes


def _result_bytes(element: Element, most: int) -> int:
    """Of results in shared memory; parts of K have those of sums."""
    return RESULT_ROWS * (RESULT_BYTES + RESULT_PADDING * (element.bytes if most == 1 else element.sum_bytes))


def _stages(
    element: Element,
    limits: DeviceLimits,
    view: View,
    tile: tuple[int, int, int, int, int],
    stage_rows: int,
    all_of_w: int,
    most_parts: int,
) -> tuple[int, int]:
    """Stages of x and of w that fit shared memory, of w `all_of_w` if that is not 0."""
    _, bn, _, _, bk = tile
    room = limits.shared_bytes - _result_bytes(element, most_parts) - BARRIER_BYTES * in_turns(tile)
    x, w = stage_rows * bk * element.bytes + BARRIER_BYTES, _w_bytes(element, bn, bk) + BARRIER_BYTES
    if all_of_w:
        return min(MOST_STAGES, (room - all_of_w * w) // x), all_of_w
    # Those that hold the most steps ahead, where a stage of x serves some.
    served = -(-view.shared // view.taps[0])
    most = min(MOST_STAGES, (room - 2 * w) // x)
    held = ((min(n * served, (room - n * x) // w, MOST_STAGES), n) for n in range(2, most + 1))
    _, stages = max(held, default=(0, 0))
    return stages, min(MOST_STAGES, (room - stages * x) // w)


def _pieces(view: View, box: Box) -> tuple[int, int, int]:
    """Boxes that bring a stage of x, positions on the first axis of each, and their rows."""
    width, positions, most = box.across, box.sizes[0] + view.beyond, MAP_BOX // view.strides[0]
    if positions <= most:
        return 1, positions, positions * width
    unit = REPEAT // math.gcd(REPEAT, width)  # every piece begins where the swizzle does
    count = -(-positions // (most // unit * unit))
    piece = -(-positions // (count * unit)) * unit
    return count, piece, piece * width


def _launch(
    form: Form, dtype: str, activation: str, limits: DeviceLimits, chosen: _Candidate, rejected: tuple[str, ...]
) -> LaunchPlan:
    """The launch of a candidate."""
    shape, element, columns = form.shape, ELEMENTS[dtype], form.columns
    view, box, (bm, bn, gm, gn, bk) = chosen.view, chosen.box, chosen.tile
    channels, taps = shape.in_channels // shape.groups, math.prod(shape.kernel_size)
    tiles_n = -(-columns // bn)
    part_tiles = box.tiles * tiles_n * shape.groups
    tiles = part_tiles * chosen.parts
    # Blocks that run together take about as many different rows as columns, so that they share both in the L2 cache.
    band = min(tiles_n, max(1, math.isqrt(limits.multiprocessors * bm // bn)))
    chunks = -(-channels // bk)
    furthest = (view.counts[0] + MAP_BOX) * max(1, view.strands)
    width = index_bytes(max(2, chosen.parts) * form.count, tiles + chosen.blocks, taps * chunks, furthest)
    stages_bytes = chosen.stages * chosen.stage_rows * bk * element.bytes
    stages_bytes += chosen.w_stages * _w_bytes(element, bn, bk) + (chosen.stages + chosen.w_stages) * BARRIER_BYTES
    shared_bytes = stages_bytes + _result_bytes(element, chosen.parts) + BARRIER_BYTES * in_turns(chosen.tile)
    boxes = view.boxes(box.sizes)
    strands: tuple[int, ...] = ()
    if view.strands:
        strands = (view.strands, view.offset, view.ragged, -(-view.ragged // box.sizes[-1]))
    useful = 100 * chosen.cost.least_flops / max(1, chosen.cost.flops)
    return LaunchPlan(
        kernel="conv_wgmma",
        constants=(
            ("ELEMENT", element.c_type),
            ("INDEX", "int" if width == 4 else "long long"),
            ("RANK", shape.rank),
            ("CHANNELS_FIRST", 0),
            ("UPSAMPLED", int(bool(form.upsampled))),
            ("SPLIT", int(chosen.parts > 1)),
            ("ACTIVATION", ACTIVATION_CODES[activation] if chosen.parts == 1 else 0),
            ("BM", bm),
            ("BN", bn),
            ("BK", bk),
            ("GM", gm),
            ("GN", gn),
            ("HALO", view.axis + 1),
            ("PHASE", int(view.strands > 0)),
            ("STATIONARY", int(chosen.stays)),
        ),
        integers=(
            *(tiles, box.tiles, tiles_n, band),
            *(shape.groups, channels, columns),
            *((columns, 0) if form.w_group == columns else (0, taps)),
            *(chosen.stages, chosen.w_stages, chosen.stage_rows),
            *_pieces(view, box),
            *(chunks, math.prod(view.taps[1:]) * chunks),
            *(chosen.part_loads, part_tiles, form.count),
            *(view.shared, view.spread * box.across),
            *(shape.batch, box.rows),
            *shape.out_size,
            *box.sizes,
            *(boxes if view.axis < 0 else (boxes[1], boxes[0], *boxes[2:])),
            *view.taps,
            *view.pitches,
            *view.strides,
            *view.dilations,
            *view.pads,
            *strands,
            *(size for sizes in form.upsampled for size in sizes),
        ),
        grid=(chosen.blocks, 1, 1),
        block=(THREADS, 1, 1),
        index_bytes=width,
        shared_bytes=shared_bytes,
        dynamic_shared_bytes=shared_bytes,
        registers=REGISTERS,
        reason=(
            f"{chosen}; boxes of {'x'.join(map(str, box.sizes))} positions, {useful:.0f} % of its products count, "
            f"{tiles / limits.multiprocessors:.1f} tiles a multiprocessor"
        ),
        rejected=rejected,
        cost=chosen.cost,
        maps=_maps(form, dtype, view, box, bn, bk),
    )


def _maps(form: Form, dtype: str, view: View, box: Box, bn: int, bk: int) -> tuple[TensorMap, ...]:
    """Of boxes of `bk` channels at what the positions of `box` read, one for each kind of strands, and of weights.

    Strides stand in the order of the view and need not grow from axis to axis. The manual asks for multiples of 16
    bytes, though its example has some that do; `overlap` of benchmarks/probe.py asks a GPU.
    """
    shape, element_bytes = form.shape, ELEMENTS[dtype].bytes
    item = math.prod(shape.in_size) * shape.in_channels  # elements
    pitches = [math.prod((*shape.in_size[a + 1 :], shape.in_channels)) for a in range(shape.rank)]
    axis, strands = view.axis, view.strands
    if axis < 0:
        pitches = [item, *pitches]
    else:
        first, others = pitches[axis], (*pitches[:axis], *pitches[axis + 1 :])
        pitches = [first * max(1, strands), item, *others, *([first] if strands else [])]
    kinds = [view.sizes]
    if strands:
        ragged = (view.sizes[0] + 1, *view.sizes[1:-1], view.ragged)
        kinds = [ragged if view.ragged else view.sizes, view.sizes]
    strides = tuple(pitch * element_bytes for pitch in reversed(pitches))
    steps = (1, *reversed(view.strides))
    spans = (bk, *reversed((_pieces(view, box)[1], *box.sizes[1:])))
    extents = tuple(span * step for span, step in zip(spans, steps, strict=True))
    maps = [
        TensorMap(
            0,
            dtype,
            (shape.in_channels, *reversed(sizes)),
            strides,
            extents,
            steps,
            bk * element_bytes,
            rounds=element_bytes == 4,
        )
        for sizes in kinds
    ]
    return *maps, map_of_w(form, dtype, bn, bk)


def map_of_w(form: Form, dtype: str, bn: int, bk: int) -> TensorMap:
    """Of boxes of 64 columns and `bk` channels of one tap; groups lie side by side, or behind each other.

    Of TF32 a box has all `bn` columns, channels are innermost, and groups behind each other.
    """
    shape, element_bytes = form.shape, ELEMENTS[dtype].bytes
    channels, taps = shape.in_channels // shape.groups, math.prod(shape.kernel_size)
    if element_bytes == 4:
        row, sizes = channels * element_bytes, (channels, form.columns, taps * shape.groups)
        return TensorMap(
            1, dtype, sizes, (row, row * form.columns), (bk, bn, 1), (1, 1, 1), bk * element_bytes, rounds=True
        )
    row = form.w_pitch * element_bytes
    sizes = (form.w_pitch, channels, taps if form.w_group == form.columns else taps * shape.groups)
    return TensorMap(1, dtype, sizes, (row, row * channels), (SLICE, bk, 1), (1, 1, 1), SLICE_BYTES)


def furthest(shape: ConvShape) -> int:
    """The largest coordinate that a box comes to, or more."""
    taps = math.prod(shape.kernel_size)
    axes = zip(shape.out_size, shape.strides, shape.k_eff, shape.pad_before, shape.in_size, strict=True)
    each = (2 * (out + MAP_BOX) * stride + k_eff + abs(pad) + size for out, stride, k_eff, pad, size in axes)
    return int(
        max(*each, shape.in_channels + STEPS[0], shape.filters + MAP_BOX, shape.groups * taps, shape.batch + MAP_BOX)
    )


def cost_of(
    form: Form,
    element: Element,
    limits: DeviceLimits,
    tile: tuple[int, int, int, int, int],
    counts: tuple[int, int, int],
    copied: float,
    work: tuple[int, int],
    moved: int,
) -> Cost:
    """The model above.

    Args:
        counts: rounds of tiles, steps of a tile, parts of K.
        copied: bytes a tile, with zeros.
        work: operations done and needed.
        moved: bytes from the L2 cache.
    """
    bm, bn, gm, gn, bk = tile
    rounds, steps, parts = counts
    # A product of 64 rows reads them, and all columns of the warpgroup.
    read = bm // gm * (bn // gn) * (gm // 64) * (64 + gn) * bk * element.bytes
    shared = (read + copied / steps) / SHARED_BYTES_A_CYCLE / limits.clock
    shape = form.shape
    inputs = shape.batch * math.prod(shape.in_size) * shape.in_channels + form.depth * form.columns * shape.groups
    results = form.count * (element.bytes if parts == 1 else parts * element.sum_bytes)
    least_bytes = inputs * element.bytes + results
    unit = "tensor cores" if _product(element, limits, tile) >= shared else "shared memory"
    times = {
        unit: _busy(element, limits, tile, rounds, steps, shared),
        "L2 cache": moved / (L2_FACTOR * limits.bandwidth),
        "memory": least_bytes / limits.bandwidth,
    }
    return slowest(*work, moved, least_bytes, times)


def _product(element: Element, limits: DeviceLimits, tile: tuple[int, int, int, int, int]) -> float:
    """Seconds of the tensor cores for a step."""
    bm, bn, _, _, bk = tile
    rate = limits.tf32_rate if element.bytes == 4 else limits.fp16_rate
    return 2 * bm * bn * bk / (rate * RATE_SHARE / limits.multiprocessors)


def in_turns(tile: Sequence[int]) -> bool:
    """Whether the warpgroups of a block have tiles of their own."""
    return tile[0] == tile[2] and tile[1] == tile[3]


def _busy(
    element: Element,
    limits: DeviceLimits,
    tile: tuple[int, int, int, int, int],
    rounds: int,
    steps: int,
    shared: float,
) -> float:
    """Seconds of the busiest multiprocessor, whose shared memory takes `shared` of them for a step."""
    bm, bn, *_ = tile
    step = max(_product(element, limits, tile), shared, LEAST_CYCLES / limits.clock)
    stored = bm * bn * CYCLES_A_SUM / limits.clock  # a tile
    if in_turns(tile):  # all tiles are multiplied one after the other, and those of a warpgroup are stored in between
        return START_STEPS * step + stored + max(rounds * steps * step, rounds / 2 * (steps * step + stored))
    return (rounds * steps + START_STEPS) * step + rounds * stored
