"""Plans of convolutions to few filters: kernels/conv_taps.cu, which is to take the time that reading x takes.

The model. A launch takes as long as the slowest of these, and longer by the weights' way to shared memory and by the
launch itself:

* memory: every array once from DRAM, as fast as the accesses under way allow; through the L2 cache x again where tiles
  overlap, and the weights once a block.
* instructions: what a warp executes for its inputs and outputs, counted from the kernel; a multiprocessor issues four a
  cycle.
* the products: whole fragments of tensor cores at the share of the peak that `mma.sync` reaches, or multiply-adds.
* shared memory: one wavefront a cycle.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan.cost import L2_FACTOR, LAUNCH_SECONDS
from cuconv.plan.mma import OLDEST, rate_share
from cuconv.plan.narrow import activation_instructions
from cuconv.plan.occupancy import resident
from cuconv.plan.types import (
    ACTIVATION_CODES,
    ELEMENTS,
    MAX_GRID_X,
    REGISTERS_PER_MULTIPROCESSOR,
    VECTOR_BYTES,
    WARP,
    Cost,
    DeviceLimits,
    Element,
    LaunchPlan,
    PlanError,
    index_bytes,
    vector,
)

MOST_FILTERS = 16  # of a group
MOST_COLUMNS = 128  # taps times filters: on tensor cores as many as the memory gives time for, on any device
MOST_REGISTERS = 168  # by the estimate, which is up to 30 too low
MOST_AHEAD = 8  # accesses of 16 bytes that a lane has under way
ISSUE_SHARE = 0.7  # of the issue slots, those that a warp scheduler finds something for
LATENCY_SECONDS = 0.9e-6  # of an access to memory that is busy
LOADING_SHARE = 0.6  # of a warp's time, in which its accesses are under way
FILL_SECONDS = 2e-6  # from a block's start until its weights are in shared memory
# What is added of the time that other bounds take, by BUFFERS: warps wait for each other at every tile.
WAITING = {2: 0.1, 1: 0.3}
CHOICE_FACTOR = 1.02  # a candidate listed earlier is taken unless another one is predicted to be this much faster
# Where columns of zs begin, in words modulo the banks: those that a warp writes together lie in different banks. On
# tensor cores 4 pairs of columns, and three neighbouring filters meet in few when they are read; else 4 columns.
RESIDUE = {2: 12, 4: 8}
BANKS = 32

# Warps, inputs of a warp at a time, passes of a block's warps over a tile.
_SIZES = tuple(itertools.product((8, 4), (32, 16, 64), (1, 2, 4)))
_BUFFERS = (2, 1)  # of sums
_OUTER = (
    1,
    2,
    4,
    6,
    8,
    14,
    16,
)  # positions of an outer axis in a tile; those that fill spans of 8 and 16 with 3 taps, too
_AXES = ("Z", "P", "Q")


@dataclass(frozen=True)
class _Axis:
    """Outputs of one axis in phase order, where those of a phase read inputs `dilation` apart."""

    out: int
    taps: int
    step: int
    phases: int
    dilation: int

    @property
    def length(self) -> int:
        """Outputs of the longest phase."""
        return -(-self.out // self.phases)

    def span(self, tile: int) -> int:
        return self.step * (tile - 1) + self.taps


@dataclass(frozen=True)
class _Candidate:
    """A tile, what it takes of a multiprocessor, and what it costs."""

    warps: int
    wm: int
    tile: tuple[int, ...]
    ahead: int
    pitch: int
    buffers: int
    shared_bytes: int
    registers: int
    min_blocks: int
    parts: tuple[int, ...]
    tiles: int
    walkers: int
    overlap: float
    cost: Cost

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.tile))
        return f"tile of {sizes} outputs, {self.wm} inputs a warp of {self.warps}, {self.overlap:.2f} times x"


@functools.lru_cache(maxsize=4096)
def plan_taps(
    shape: ConvShape, dtype: str, activation: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> LaunchPlan:
    """The launch of kernels/conv_taps.cu, for the arrays (x, w, bias, y).

    Args:
        activation: a name of ACTIVATION_CODES.
        aligned: elements by which x, w and y lie behind a 16-byte boundary.

    Raises:
        PlanError: it does not compute this problem.
    """
    _require(shape, dtype, limits)
    element = ELEMENTS[dtype]
    channels, filters = shape.in_channels // shape.groups, shape.filters // shape.groups
    axes = tuple(map(_axis, shape.out_size, shape.kernel_size, shape.strides, shape.dilation_rate))
    vector_x, vector_y = vector(element.bytes, channels, aligned[0]), vector(element.bytes, filters, aligned[2])
    x_size = shape.batch * math.prod(shape.in_size) * shape.in_channels
    y_size = shape.batch * math.prod(shape.out_size) * shape.filters
    w_size = math.prod(shape.kernel_size) * channels * shape.filters
    least_bytes = (x_size + w_size + y_size + shape.filters) * element.bytes
    found = [
        candidate
        for warps, wm, passes in _SIZES
        for tile in _tiles(axes, warps * wm * passes)
        for buffers in _BUFFERS
        if (
            candidate := _candidate(
                (warps, wm, buffers), tile, axes, shape, element, (vector_x, vector_y), activation, least_bytes, limits
            )
        )
    ]
    if not found:
        columns = math.prod(shape.kernel_size) * filters
        raise PlanError(f"conv_taps: {channels} channels by {columns} taps and filters fit no tile")
    fastest = min(found, key=lambda each: each.cost.seconds)
    best = next(each for each in found if each.cost.seconds <= CHOICE_FACTOR * fastest.cost.seconds)
    others = sorted((each for each in found if each is not best), key=lambda each: each.cost.seconds)
    rejected = tuple(
        f"{each}: {each.cost.seconds * 1e6:.1f} us predicted, bound by {each.cost.bound}" for each in others[:4]
    )

    # Inputs and outputs of a tile behind the last ones, and a tile behind the last one, have indices all the same.
    furthest, behind_x, behind_y = 0, shape.batch, shape.batch
    for axis, tile, n, pad in zip(axes, best.tile, shape.in_size, shape.pad_before, strict=True):
        end = axis.out + (tile + 1) * axis.phases
        reach = (end * axis.step + axis.span(tile)) * axis.dilation + abs(pad)
        behind_x, behind_y = behind_x * n + reach, behind_y * axis.out + end
        furthest = max(furthest, reach)
    padded = (-(-channels // _chunk(element)) + 1) * _chunk(element)
    width = index_bytes(
        (behind_x * shape.groups + 1) * channels + padded,
        behind_y * shape.filters,
        w_size + (MOST_COLUMNS * channels + padded) * shape.filters,
        best.tiles + best.walkers,
        furthest,
    )
    share = 100 * best.cost.least_bytes / limits.bandwidth / best.cost.seconds
    missing = (1,) * (3 - shape.rank)
    per_axis = {
        "B": best.tile,
        "TAPS_": tuple(axis.taps for axis in axes),
        "STEP_": tuple(axis.step for axis in axes),
    }
    constants: tuple[tuple[str, int | str], ...] = (
        ("ELEMENT", element.c_type),
        ("INDEX", "int" if width == 4 else "long long"),
        ("RANK", shape.rank),
        ("ACTIVATION", ACTIVATION_CODES[activation]),
        ("CHANNELS", channels),
        ("FILTERS", filters),
        *(
            (name + axis, value)
            for name, values in per_axis.items()
            for axis, value in zip(_AXES, (*missing, *values), strict=True)
        ),
        ("WARPS", best.warps),
        ("WM", best.wm),
        ("AHEAD", best.ahead),
        ("PITCH", best.pitch),
        ("BUFFERS", best.buffers),
        ("VECX", vector_x),
        ("VECY", vector_y),
        ("MIN_BLOCKS", best.min_blocks),
    )
    return LaunchPlan(
        kernel="conv_taps",
        constants=constants,
        integers=(
            shape.groups,
            best.tiles,
            best.walkers,
            *shape.in_size,
            *shape.out_size,
            *shape.strides,
            *(axis.dilation for axis in axes),
            *shape.pad_before,
            *(axis.phases for axis in axes),
            *best.parts,
        ),
        grid=(best.walkers * shape.groups, 1, 1),
        block=(best.warps * WARP, 1, 1),
        index_bytes=width,
        shared_bytes=best.shared_bytes,
        dynamic_shared_bytes=best.shared_bytes,
        registers=best.registers,
        reason=f"{best}; {share:.0f} % of what memory allows, bound by {best.cost.bound}",
        rejected=rejected,
        cost=best.cost,
    )


def _require(shape: ConvShape, dtype: str, limits: DeviceLimits) -> None:
    """Raises PlanError with the reason for what the kernel does not compute."""
    filters = shape.filters // shape.groups
    columns = math.prod(shape.kernel_size) * filters
    if shape.data_format != CHANNELS_LAST:
        raise PlanError("conv_taps: only channels last, where the channels of an input are neighbours")
    if filters > MOST_FILTERS:
        raise PlanError(f"conv_taps: {filters} filters, at most {MOST_FILTERS}")
    if columns > MOST_COLUMNS:
        raise PlanError(f"conv_taps: {columns} taps and filters, at most {MOST_COLUMNS}")
    if dtype not in ("float16", "bfloat16", "float32"):
        raise PlanError(f"conv_taps: {dtype}, only float16, bfloat16 and float32")
    if ELEMENTS[dtype].bytes == 2 and limits.capability < OLDEST:
        raise PlanError(f"conv_taps: 16-bit products need sm_80, {limits.name} has {limits.arch}")
    if 0 in (shape.batch, *shape.in_size, *shape.out_size, shape.filters, shape.in_channels):
        raise PlanError("conv_taps: an array without elements")


def _axis(out: int, taps: int, stride: int, dilation: int) -> _Axis:
    if taps == 1:  # reads inputs a stride apart, whatever the dilation
        dilation = stride
    common = math.gcd(stride, dilation)
    return _Axis(out, taps, stride // common, dilation // common, dilation)


def _chunk(element: Element) -> int:
    """Channels that 4 lanes read together."""
    return 4 * VECTOR_BYTES // element.bytes


def _tiles(axes: tuple[_Axis, ...], rows: int) -> Iterator[tuple[int, ...]]:
    """Tiles of at most `rows` inputs: outer axes as listed, the innermost one as long as it may be."""
    *outer, inner = axes
    for sizes in itertools.product(*([n for n in _OUTER if n == 1 or n <= axis.length] for axis in outer)):
        spans = math.prod(axis.span(size) for axis, size in zip(outer, sizes, strict=True))
        longest = (rows // spans - inner.taps) // inner.step + 1
        if rows // spans >= inner.taps:
            yield (*sizes, min(longest, inner.length))


def _candidate(
    sizes: tuple[int, int, int],
    tile: tuple[int, ...],
    axes: tuple[_Axis, ...],
    shape: ConvShape,
    element: Element,
    vectors: tuple[int, int],
    activation: str,
    least_bytes: int,
    limits: DeviceLimits,
) -> _Candidate | None:
    """One tile with its cost, or None where it does not fit."""
    warps, wm, buffers = sizes
    vector_x, vector_y = vectors
    tensor, threads, lane = element.bytes == 2, warps * WARP, VECTOR_BYTES // element.bytes
    channels, filters = shape.in_channels // shape.groups, shape.filters // shape.groups
    columns = math.prod(shape.kernel_size) * filters
    chunks, unit = -(-channels // _chunk(element)), 8 if tensor else 4
    groups_n = -(-columns // unit)  # of columns
    rows = math.prod(axis.span(size) for axis, size in zip(axes, tile, strict=True))
    turns = -(-rows // wm)  # of warps over a tile
    if turns <= warps // 2 and warps > 4:
        return None  # warps without work

    # Shared memory and registers.
    pitch = _place(turns * wm, RESIDUE[element.bytes])
    weights = chunks * _chunk(element) * groups_n * unit * element.bytes
    shared = weights + -(-filters // 4) * 16 + buffers * columns * pitch * 4
    if shared > limits.shared_bytes:
        return None
    own = wm // 8  # inputs of a lane
    ahead = max(n for n in range(1, chunks + 1) if chunks % n == 0 and (n == 1 or n * own <= MOST_AHEAD))
    sums = own * groups_n * (2 if tensor else 4)
    registers = -(-(sums + 4 * own * ahead + 2 * own + 26 + 4 * shape.rank) // 8) * 8
    if registers > MOST_REGISTERS:
        return None
    blocks = min(resident(limits, threads, registers, shared))
    if blocks == 0:
        return None

    # Work split.
    parts = tuple(-(-axis.length // size) * axis.phases for axis, size in zip(axes, tile, strict=True))
    tiles = shape.batch * math.prod(parts)
    walkers = min(tiles, max(1, blocks * limits.multiprocessors // shape.groups))
    grid = walkers * shape.groups
    if grid > MAX_GRID_X:
        return None
    imbalance = walkers * -(-tiles // walkers) / tiles  # as if all walked as far as the longest
    spread = max(1.0, limits.multiprocessors / grid)

    # Cost.
    tiles *= shape.groups
    accesses = own * chunks * lane // vector_x  # to x, of a lane and turn
    products = 2 * (wm // 16) * groups_n * chunks if tensor else own * chunks * lane * groups_n * 4
    read = chunks * groups_n * (1 if tensor else lane)  # vectors of weights
    stored = own * groups_n * (2 if tensor else 1)
    exchanged = 0 if tensor else own * groups_n * 3 * 4
    turn = accesses * (1.25 if vector_x == lane else 3) + products + read + 2 * stored + exchanged
    turn += own * (8 + 6 * shape.rank) + 30
    finished = -(-math.prod(tile) * filters // (vector_y * WARP))  # results of a lane, over all warps
    taps = columns // filters
    finish = vector_y * (2 * taps + 2 + activation_instructions(activation)) + 12 + 8 * shape.rank
    instructions = tiles * (turns * turn + finished * finish + warps * (20 + 20 * shape.rank))
    met = 1 if vector_y == filters else 2  # neighbouring filters of neighbouring outputs, in a bank
    wavefronts = tiles * (turns * (read * (4 if tensor else 1) + stored) + finished * vector_y * taps * met)
    cycles = limits.clock * limits.multiprocessors  # a second, of all of them together
    flops = tiles * turns * wm * groups_n * unit * chunks * _chunk(element) * 2
    units = flops / (rate_share(limits) * limits.fp16_rate) if tensor else flops / limits.fp32_rate
    inside = math.prod(
        min(axis.span(size), -(-n // axis.dilation)) for axis, size, n in zip(axes, tile, shape.in_size, strict=True)
    )
    moved = least_bytes + (tiles * inside * channels + grid * weights // element.bytes) * element.bytes
    overlap = tiles * inside * channels / (shape.batch * math.prod(shape.in_size) * shape.in_channels)
    under_way = blocks * warps * WARP * own * ahead * VECTOR_BYTES * LOADING_SHARE  # bytes of a multiprocessor
    needed = limits.bandwidth / limits.multiprocessors * LATENCY_SECONDS
    memory = max(least_bytes / limits.bandwidth, moved / (L2_FACTOR * limits.bandwidth))
    times = {  # of the busiest multiprocessor
        "memory": memory / min(1.0, under_way / needed) * spread,
        "instructions": instructions / (4 * ISSUE_SHARE * cycles) * imbalance * spread,
        "shared memory": wavefronts / cycles * imbalance * spread,
        ("tensor cores" if tensor else "multiply-adds"): units * imbalance * spread,
    }
    bound = max(times, key=lambda each: times[each])
    rest = (sum(times.values()) - times[bound]) / len(times)
    filled = blocks * weights // VECTOR_BYTES / WARP * 12 * lane  # instructions of a multiprocessor
    fill = FILL_SECONDS + filled * limits.multiprocessors / (4 * cycles)
    seconds = times[bound] + WAITING[buffers] * rest + fill + LAUNCH_SECONDS
    positions = shape.batch * math.prod(shape.out_size)
    cost = Cost(flops, 2 * positions * columns * channels * shape.groups, moved, least_bytes, seconds, bound)
    min_blocks = max(1, min(blocks, REGISTERS_PER_MULTIPROCESSOR // (threads * registers)))
    return _Candidate(
        warps,
        wm,
        tile,
        ahead,
        pitch,
        buffers,
        shared,
        registers,
        min_blocks,
        parts,
        tiles // shape.groups,
        walkers,
        overlap,
        cost,
    )


def _place(least: int, residue: int) -> int:
    """The first number from `least` on that is `residue` modulo the banks."""
    return least + (residue - least) % BANKS
