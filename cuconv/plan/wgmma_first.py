"""channels_first convolutions on the tensor cores of sm_90: conv_wgmma_first.cu, its tiles and strips, and their cost.

A tile has filters as rows and positions as columns. Positions come in strips: 64, 32 or 16 neighbours of the last axis,
which one line of the swizzle holds. Short rows take short strips, so that little of a strip lies behind their end.
The model of time is that of :mod:`cuconv.plan.wgmma`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan import wgmma
from cuconv.plan.simt import CHOICE_FACTOR
from cuconv.plan.types import (
    ACTIVATION_CODES,
    ELEMENTS,
    MAP_BOX,
    VECTOR_BYTES,
    DeviceLimits,
    Element,
    LaunchPlan,
    PlanError,
    TensorMap,
    index_bytes,
    vector,
)

if TYPE_CHECKING:
    from cuconv.plan.conv import Form

# Filters, positions of a block's tile, then of a warpgroup's; from large to small. 32 to 128 sums a thread.
TILES: tuple[tuple[int, int, int, int], ...] = (
    (128, 256, 64, 256),
    (256, 128, 128, 128),
    (128, 192, 64, 192),
    (192, 128, 192, 64),
    (128, 128, 64, 128),
    (128, 128, 128, 128),
    (64, 256, 64, 256),
    (64, 256, 64, 128),
    (64, 128, 64, 128),
    (64, 128, 64, 64),
)
STEPS = (64, 32, 16)  # channels of a step; the smaller ones where fewer are zeros then
SPANS = (64, 32, 16)  # positions of a strip


@dataclass(frozen=True)
class Strips:
    """Positions of a tile: `spans` strips of `span` on the last axis, of `sizes` on the others and of `items` items."""

    span: int
    spans: int
    sizes: tuple[int, ...]
    items: int
    tiles: int  # that cover all positions

    @property
    def beside(self) -> int:
        """Strips that come in one copy."""
        return self.items * math.prod(self.sizes)

    @property
    def box(self) -> tuple[int, ...]:
        """Positions on each axis."""
        return (*self.sizes, self.spans * self.span)


@functools.lru_cache(maxsize=4096)
def choose_strips(batch: int, out_size: tuple[int, ...], strides: tuple[int, ...], columns: int) -> Strips:
    """Strips of at most `columns` positions, of which the fewest tiles cover all and the fewest copies bring them."""
    found = []
    for span in SPANS:
        most = columns // span
        on_last = wgmma.even_sizes(-(-out_size[-1] // span), most)
        others = zip(out_size[:-1], strides[:-1], strict=True)
        choices = (wgmma.even_sizes(n, min(most, MAP_BOX // stride)) for n, stride in others)
        for spans, *sizes in itertools.product(on_last, *choices):
            if (beside := most // (spans * math.prod(sizes))) > 0:
                items = wgmma.balanced(batch, min(beside, MAP_BOX))
                counts = zip((*out_size, batch), (*sizes, spans * span, items), strict=True)
                tiles = math.prod(-(-n // size) for n, size in counts)
                found.append(Strips(span, spans, tuple(sizes), items, tiles))
    return min(found, key=lambda strips: (strips.tiles, strips.spans, -strips.span))


@functools.lru_cache(maxsize=4096)
def plan_wgmma_first(
    form: Form, dtype: str, activation: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> LaunchPlan:
    """The launch of conv_wgmma_first.cu for `form`; arguments as :func:`cuconv.plan.conv.plan_form`.

    Raises:
        PlanError: it does not compute this, or not on this device.
    """
    _require(form, ELEMENTS[dtype], aligned, limits)
    channels = form.shape.in_channels // form.shape.groups
    steps = [bk for bk in STEPS if all(-channels % bk < -channels % larger for larger in STEPS if larger > bk)]
    found = [_candidate(form, dtype, activation, aligned, limits, *tile, bk) for tile in TILES for bk in steps]
    plans = [plan for plan in found if isinstance(plan, LaunchPlan)]
    if not plans:
        raise PlanError("; ".join(map(str, found)))
    # Of those that are about as fast, the one that does least; where the memory is slow, they all are.
    least = min(plan.seconds for plan in plans)
    near = (plan for plan in plans if plan.seconds <= CHOICE_FACTOR * least)
    best = min(near, key=lambda plan: plan.cost.flops if plan.cost else 0)
    lost = (plan if isinstance(plan, str) else plan.prediction for plan in found if plan is not best)
    return dataclasses.replace(best, rejected=tuple(lost))


def _require(form: Form, element: Element, aligned: tuple[int, ...], limits: DeviceLimits) -> None:
    shape = form.shape
    filters = form.results[1] // shape.groups
    if shape.data_format == CHANNELS_LAST:
        raise PlanError("warpgroups: only channels_first")
    wgmma.require_device(form, limits)
    if element.bytes != 2:
        raise PlanError(f"warpgroups: only 16-bit elements, not {element.dtype}")
    if shape.in_size[-1] % 8 or form.w_pitch % 8:
        raise PlanError(
            f"warpgroups: rows of {shape.in_size[-1]} inputs and {form.w_pitch} filters are not multiples of 8"
        )
    if aligned[0] or aligned[1]:
        raise PlanError("warpgroups: an array does not begin on a 16-byte boundary")
    if shape.strides[-1] > 1 or (form.upsampled and form.upsampled[1][-1] > 1):
        raise PlanError("warpgroups: in channels_first only stride 1 on the last axis")
    if form.upsampled and (form.upsampled[2][-1] > 1 or form.upsampled[3][-1] % 8):
        raise PlanError("warpgroups: results of the last axis are moved by no multiple of 8")
    if shape.groups > 1 and (shape.in_channels // shape.groups % STEPS[-1] or filters % 8):
        raise PlanError(
            f"warpgroups: {STEPS[-1]} channels are copied at once, and a group of {shape.in_channels // shape.groups} "
            "is no multiple"
        )


def _candidate(
    form: Form,
    dtype: str,
    activation: str,
    aligned: tuple[int, ...],
    limits: DeviceLimits,
    bm: int,
    bn: int,
    gm: int,
    gn: int,
    bk: int,
) -> LaunchPlan | str:
    """The plan with one tile, or why it cannot be taken."""
    shape, element, filters = form.shape, ELEMENTS[dtype], form.columns
    name = f"warpgroups, tile {bm}x{bn}x{bk}"
    channels = shape.in_channels // shape.groups
    if shape.groups > 1 and channels % bk:
        return f"{name}: a group has {channels} channels"
    taps = math.prod(shape.kernel_size)
    stage = (bm + bn) * bk * element.bytes
    tile = bm, bn, gm, gn, bk
    result = wgmma.RESULT_ROWS * (wgmma.RESULT_BYTES + wgmma.RESULT_PADDING * element.bytes)
    result += wgmma.BARRIER_BYTES * wgmma.in_turns(tile)
    stages = min(wgmma.MOST_STAGES, (limits.shared_bytes - result) // (stage + wgmma.BARRIER_BYTES))
    if stages < 2:
        return f"{name}: {limits.name} has no shared memory for two stages"
    shared_bytes = stages * (stage + wgmma.BARRIER_BYTES) + result

    strips = choose_strips(shape.batch, shape.out_size, shape.strides, bn)
    maps = (_map_of_x(shape, dtype, strips, bk), wgmma.map_of_w(form, dtype, bm, bk))
    for each in maps:
        if problem := each.problem():
            return f"{name}: no tensor map, {problem}"
    tiles_m = -(-filters // bm)
    tiles = strips.tiles * tiles_m * shape.groups
    steps = taps * -(-channels // bk)
    blocks = min(tiles, limits.multiprocessors)
    # Blocks that run together take about as many different rows as columns, so that they share both in the L2 cache.
    band = min(tiles_m, max(1, math.isqrt(limits.multiprocessors * bn // bm)))
    sizes, shift = (form.upsampled[0], form.upsampled[3][-1]) if form.upsampled else (shape.out_size, 0)
    width = index_bytes(2 * form.count, tiles + blocks, steps)
    work = 2 * bm * bn * bk * steps * tiles, 2 * form.products
    copied = (bm + strips.spans * strips.beside * strips.span) * bk * element.bytes * steps
    rounds = -(-tiles // limits.multiprocessors)
    cost = wgmma.cost_of(form, element, limits, tile, (rounds, steps, 1), copied, work, tiles * copied)
    return LaunchPlan(
        kernel="conv_wgmma_first",
        constants=(
            ("ELEMENT", element.c_type),
            ("INDEX", "int" if width == 4 else "long long"),
            ("RANK", shape.rank),
            ("CHANNELS_FIRST", 1),
            ("UPSAMPLED", int(bool(form.upsampled))),
            ("SPLIT", 0),
            ("ACTIVATION", ACTIVATION_CODES[activation]),
            ("BM", bm),
            ("BN", bn),
            ("BK", bk),
            ("GM", gm),
            ("GN", gn),
            ("SPAN", strips.span),
            ("STAGES", stages),
            (
                "VECY",
                vector(element.bytes, VECTOR_BYTES // element.bytes, shape.out_size[-1], sizes[-1], shift, aligned[2]),
            ),
        ),
        integers=(
            *(tiles, tiles_m, strips.tiles, band),
            *(shape.groups, channels, filters),
            *((filters, 0) if form.w_group == filters else (0, taps)),
            *(taps, steps, shape.batch, strips.items, strips.spans, strips.beside),
            *strips.box,
            *(-(-n // size) for n, size in zip(shape.out_size, strips.box, strict=True)),
            *shape.out_size,
            *shape.kernel_size,
            *shape.strides,
            *shape.dilation_rate,
            *shape.pad_before,
            *(size for each in form.upsampled for size in each),
        ),
        grid=(blocks, 1, 1),
        block=(wgmma.THREADS, 1, 1),
        index_bytes=width,
        shared_bytes=shared_bytes,
        dynamic_shared_bytes=shared_bytes,
        registers=wgmma.REGISTERS,
        reason=(
            f"{name}, {stages} stages{', in turns' * wgmma.in_turns(tile)}; "
            f"{strips.spans} x {strips.beside} strips of {strips.span} positions; "
            f"{100 * cost.least_flops / max(1, cost.flops):.0f} % of its products count, "
            f"{tiles / limits.multiprocessors:.1f} tiles a multiprocessor"
        ),
        cost=cost,
        maps=maps,
    )


def _map_of_x(shape: ConvShape, dtype: str, strips: Strips, bk: int) -> TensorMap:
    """Of boxes of `span` positions of the last axis, `bk` channels, and what the strips beside each other have."""
    volume = math.prod(shape.in_size)
    others, steps = tuple(reversed(shape.in_size[:-1])), tuple(reversed(shape.strides[:-1]))
    within_channel = itertools.accumulate((shape.in_size[-1], *others[:-1]), int.__mul__) if others else ()
    strides = (volume, *within_channel, volume * shape.in_channels)
    spans = zip((*reversed(strips.sizes), strips.items), (*steps, 1), strict=True)
    return TensorMap(
        0,
        dtype,
        (shape.in_size[-1], shape.in_channels, *others, shape.batch),
        tuple(stride * ELEMENTS[dtype].bytes for stride in strides),
        (strips.span, bk, *(span * step for span, step in spans)),
        (1, 1, *steps, 1),
        strips.span * ELEMENTS[dtype].bytes,
    )
