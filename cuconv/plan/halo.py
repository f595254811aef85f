"""Plans of kernels/conv_halo.cu: convolutions on tensor cores that load an input once for all taps of the last axis.

Positions of the last axis are taken in strands, ``p = q * strands + r``; the q of one r are a run, whose inputs lie
`unit` apart. Two orders are weighed, with the bytes that each moves and with those of the kernel that loads once a tap:

* ``halo`` -- one strand. A tile of n positions reads ``(n - 1) * s + (k - 1) * d + 1`` neighbouring inputs.
* ``phase`` -- ``d / gcd(s, d)`` strands. Taps are neighbours, so a tile reads ``(n - 1) * s / gcd(s, d) + k`` inputs,
  whatever the dilation; where the axis is no multiple of the strands some positions of the product do not exist.

The model of time is that of :mod:`cuconv.plan.mma`, with the rows of x that a step really loads.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cuconv.geometry import CHANNELS_LAST
from cuconv.plan import mma
from cuconv.plan.occupancy import resident
from cuconv.plan.simt import CHOICE_FACTOR, Operands, Product
from cuconv.plan.types import (
    ELEMENTS,
    INT32_MAX,
    VECTOR_BYTES,
    WARP,
    Cost,
    DeviceLimits,
    Element,
    LaunchPlan,
    PlanError,
    index_bytes,
)

if TYPE_CHECKING:
    from cuconv.plan.conv import Form

MOST_OUTER = 32  # taps of the other axes: a source has a bit for each
MOST_REGISTERS = 248  # no tile needs more, by tests/test_static_gates.py
PITCH_PADDING = 16  # bytes of a row of xs
ALIGNMENT = 8  # rows: runs begin at multiples of it, so that 8 positions in any runs meet no bank twice


@dataclass(frozen=True)
class Order:
    """How the last axis is walked; the integers of the kernel by these names."""

    name: str
    taps: int
    strands: int
    run: int
    unit: int
    rows_p: int
    rows_t: int

    @property
    def gap(self) -> int:
        """Rows of a residue that a run has beyond its positions, filled up so that the next run is aligned."""
        beyond = (self.taps - 1) * self.rows_t // self.rows_p
        return max(1, -(-beyond // ALIGNMENT)) * ALIGNMENT

    def places(self, bm: int) -> int:
        """Rows of one residue in shared memory, for a tile of `bm` positions that may begin anywhere in a run."""
        latest = self.run - math.gcd(bm, self.run)
        return bm + self.gap * ((latest + bm - 1) // self.run + 1)

    def rows(self, runs: int, bm: int) -> int:
        """Rows that the tiles of `runs` runs load, all of them together."""
        positions = runs * self.run
        whole = positions // math.lcm(bm, self.run)  # ends of runs that are ends of tiles
        pieces = -(-positions // bm) + runs - whole - (positions % bm > 0)
        return positions * self.rows_p + pieces * max(0, (self.taps - 1) * self.rows_t + 1 - self.rows_p)


def orders(form: Form) -> list[Order]:
    """The orders of the last axis that differ."""
    shape = form.shape
    taps, stride, dilation = shape.kernel_size[-1], shape.strides[-1], shape.dilation_rate[-1]
    found = []
    for name, strands in (("halo", 1), ("phase", dilation // math.gcd(stride, dilation))):
        if name == "phase" and strands == 1:
            continue
        unit = math.gcd(strands * stride, dilation)
        run = -(-shape.out_size[-1] // strands)
        found.append(Order(name, taps, strands, run, unit, strands * stride // unit, dilation // unit))
    return found


@dataclass(frozen=True)
class _Candidate:
    """An order with a tile, what it takes of a multiprocessor, and what it costs."""

    order: Order
    bm: int
    bn: int
    bk: int
    wm: int
    wn: int
    stages: int
    index_bytes: int
    positions: int
    blocks_m: int
    blocks_n: int
    chunk: int  # panels of a part
    splits: int
    blocks: int
    shared_bytes: int
    registers: int
    min_blocks: int
    cost: Cost

    @property
    def threads(self) -> int:
        return self.bm // self.wm * (self.bn // self.wn) * WARP

    def __str__(self) -> str:
        parts = f", {self.splits} parts of k" if self.splits > 1 else ""
        return f"{self.order.name}, tile {self.bm}x{self.bn}x{self.bk}, {self.wm}x{self.wn} a warp{parts}"


def plan_halo(
    form: Form, dtype: str, aligned: tuple[int, ...], other: LaunchPlan, limits: DeviceLimits, most: int = 1
) -> LaunchPlan:
    """The launch of conv_halo.cu for `form`, with what else it could be in `rejected`.

    Args:
        aligned: elements by which x, w and y lie behind a 16-byte boundary.
        other: the plan of the kernel that loads inputs once a tap; parameters begin as its do.
        most: parts of K, at most; with more than one, sums go to y in their own dtype.

    Raises:
        PlanError: it does not compute this problem on this device, or no input would be loaded once less.
    """
    element = ELEMENTS[dtype]
    _require(form, element, aligned, limits)
    found: list[_Candidate] = []
    too_large = []
    for order in orders(form):
        tiles = [
            candidate
            for sizes in mma.TILES
            for step in mma.STEPS
            if (candidate := _candidate(order, sizes, step, form, element, other, limits, most))
        ]
        found += tiles
        too_large += [] if tiles else [f"{order.name}: the rows of x of no tile fit {limits.name}"]
    if not found:
        raise PlanError("; ".join(too_large))
    least = min(each.cost.seconds for each in found)
    # Of what takes the same time by this model, that which moves the fewest bytes.
    best = min((each for each in found if each.cost.seconds <= CHOICE_FACTOR * least), key=lambda each: each.cost.bytes)
    lost = tuple(
        f"{each}: {each.cost.bytes} bytes, {each.cost.seconds * 1e6:.1f} us predicted"
        for each in found
        if each is not best
    )
    best = dataclasses.replace(best, cost=dataclasses.replace(best.cost, least_flops=2 * form.products))
    order = best.order
    result_bytes, y_aligned = (element.bytes, aligned[2]) if most == 1 else (element.sum_bytes, 0)
    parts = (best.chunk, form.count) if most > 1 else ()
    known = dict(other.constants)
    shape = form.shape
    return dataclasses.replace(
        other,
        kernel="conv_halo",
        constants=(
            ("ELEMENT", element.c_type),
            ("INDEX", "int" if best.index_bytes == 4 else "long long"),
            *((name, known[name]) for name in ("RANK", "CHANNELS_FIRST", "UPSAMPLED", "SPLIT", "ACTIVATION")),
            ("BM", best.bm),
            ("BN", best.bn),
            ("BK", best.bk),
            ("WM", best.wm),
            ("WN", best.wn),
            ("PRECISION", 0),
            ("STAGES", best.stages),
            ("ROWS_P", order.rows_p),
            ("WHOLE", int(shape.in_channels // shape.groups % best.bk == 0)),
            ("MIN_BLOCKS", best.min_blocks),
            ("VECY", math.gcd(VECTOR_BYTES // result_bytes, form.results[1] // shape.groups, y_aligned)),
        ),
        integers=(
            best.positions,
            form.columns,
            form.depth,
            best.blocks_m,
            best.blocks_n,
            shape.groups,
            shape.in_channels // shape.groups,
            form.w_pitch,
            form.w_group,
            *shape.in_size,
            *shape.out_size,
            *shape.strides,
            *shape.dilation_rate,
            *shape.pad_before,
            *form.span,
            *parts,
            order.taps,
            math.prod(shape.kernel_size[:-1]),
            order.strands,
            order.run,
            order.unit,
            order.rows_t,
            order.gap,
            order.places(best.bm),
            *(size for sizes in form.upsampled for size in sizes),
        ),
        grid=(best.blocks, 1, 1),
        block=(best.threads, 1, 1),
        index_bytes=best.index_bytes,
        shared_bytes=best.shared_bytes,
        dynamic_shared_bytes=best.shared_bytes,
        registers=best.registers,
        reason=f"{best}: {best.cost.bytes} bytes to shared memory; {_why(best, limits)}",
        rejected=(*lost, *too_large),
        cost=best.cost,
    )


def _require(form: Form, element: Element, aligned: tuple[int, ...], limits: DeviceLimits) -> None:
    mma.require_16_bits(element, limits)
    shape = form.shape
    channels = shape.in_channels // shape.groups
    vector = VECTOR_BYTES // element.bytes
    if shape.data_format != CHANNELS_LAST:
        raise PlanError("halo: only channels_last")
    if form.depth == 0 or shape.kernel_size[-1] == 1:
        raise PlanError("halo: one tap on the last axis")
    if shape.kernel_size[-1] <= shape.strides[-1] // math.gcd(shape.strides[-1], shape.dilation_rate[-1]):
        raise PlanError("halo: no input has two taps of the last axis")
    if math.prod(shape.kernel_size[:-1]) > MOST_OUTER:
        raise PlanError(f"halo: more than {MOST_OUTER} taps on the other axes")
    if channels % vector or form.columns % vector or form.w_pitch % vector or form.w_group % vector:
        raise PlanError(f"halo: {channels} channels to {form.columns} columns are no whole vectors of {vector}")
    if aligned[0] or aligned[1]:
        raise PlanError("halo: x or w does not begin on a 16-byte boundary")


def _why(best: _Candidate, limits: DeviceLimits) -> str:
    useful = 100 * best.cost.least_flops / max(1, best.cost.flops)
    return f"{useful:.0f} % of its products count, {best.blocks / limits.multiprocessors:.1f} blocks a multiprocessor"


def _candidate(
    order: Order,
    sizes: tuple[int, int, int, int],
    step: tuple[int, int],
    form: Form,
    element: Element,
    other: LaunchPlan,
    limits: DeviceLimits,
    most: int,
) -> _Candidate | None:
    bm, bn, wm, wn = sizes
    bk = step[0] // element.bytes
    # The next rows of x are copied with the weights of a later step, which must not be later than they are needed.
    stages = min(step[1], order.taps + 1)
    shape = form.shape
    channels = shape.in_channels // shape.groups
    threads = bm // wm * (bn // wn) * WARP
    vectors_n, vectors_k = bn * element.bytes // VECTOR_BYTES, bk * element.bytes // VECTOR_BYTES
    if vectors_n > threads or threads % vectors_n or threads % vectors_k:
        return None
    rows = order.rows_p * order.places(bm)
    outer = math.prod(shape.kernel_size[:-1])
    runs = shape.batch * math.prod(shape.out_size[:-1]) * order.strands
    positions = runs * order.run
    index = max(other.index_bytes, index_bytes(positions + 256))
    staged = (
        stages * bk * bn * element.bytes + rows * (2 * (bk * element.bytes + PITCH_PADDING) + 2 * index) + outer * index
    )
    result_bytes = element.bytes if most == 1 else element.sum_bytes
    shared_bytes = max(staged, bm * (bn + mma.RESULT_PADDING) * result_bytes)
    if shared_bytes > limits.shared_bytes:
        return None
    loads = -(-bk * vectors_n // threads)
    registers = -(-(wm * wn // WARP + (wm + wn) // 4 + wm // 16 + 2 * loads + 56) // 8) * 8
    registers = min(registers, MOST_REGISTERS)
    min_blocks = 1
    if threads == 256 and wm * wn == 64 * WARP and index == 4:
        min_blocks, registers = 2, min(registers, 128)

    blocks_m, blocks_n = -(-positions // bm), -(-form.columns // bn)
    panels = outer * -(-channels // bk)
    chunk = -(-panels // most)
    splits = -(-panels // chunk)
    blocks = blocks_m * blocks_n * shape.groups * splits
    held = min(resident(limits, threads, registers, shared_bytes))
    if blocks > INT32_MAX or not held:
        return None
    depth = chunk * order.taps * bk  # of a block; steps of every tap are whole
    rows_step = order.rows(runs, bm) / (max(1, blocks_m) * order.taps)
    least_bytes = other.cost.least_bytes if other.cost else 0
    operands = Operands(VECTOR_BYTES // 2, VECTOR_BYTES // 2, False, False, index, shape.rank, least_bytes)
    product = Product(positions, form.columns, depth, shape.groups)
    cost = mma.cost_of(product, element, operands, limits, (bm, bn, bk, wm, wn), loads, blocks, held, rows=rows_step)
    return _Candidate(
        order,
        bm,
        bn,
        bk,
        wm,
        wn,
        stages,
        index,
        positions,
        blocks_m,
        blocks_n,
        chunk,
        splits,
        blocks,
        shared_bytes,
        registers,
        min_blocks,
        cost,
    )
