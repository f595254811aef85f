"""Plans of convolutions of few input channels: kernels/conv_narrow.cu, which is to take the time that storing y takes.

The model. A launch takes as long as the slowest of these, and longer by filling shared memory and by the launch itself:

* memory: every array once from DRAM; through the L2 cache also x once a tile of filters and outer tap, and the weights
  once a block.
* instructions: what a warp executes for its sums, counted from the kernel; a multiprocessor issues four a cycle.
* tensor cores: whole fragments, at the share of the peak that `mma.sync` reaches.
* shared memory: one wavefront a cycle, bank conflicts included.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan.cost import L2_FACTOR, LAUNCH_SECONDS
from cuconv.plan.mma import rate_share
from cuconv.plan.occupancy import resident
from cuconv.plan.types import (
    ACTIVATION_CODES,
    ELEMENTS,
    MAX_GRID_X,
    REGISTERS_PER_MULTIPROCESSOR,
    WARP,
    Cost,
    DeviceLimits,
    Element,
    LaunchPlan,
    PlanError,
    index_bytes,
    vector,
)

MOST_CHANNELS = 16
MOST_PRODUCTS = 1024  # of a sum: beyond, no device is bound by stores, and the compiler has too much to unroll
MOST_REGISTERS = 232  # by the estimate, which is about 20 off at most
BANKS = 32  # of shared memory, a word each
# Of the issue slots those that a warp scheduler finds something for; independent multiply-adds fill more.
ISSUE_SHARE, ISSUE_SHARE_ORDINARY = 0.7, 0.85
FILL_SECONDS = 1.5e-6  # from a block's start until its first tile and its weights are in shared memory
LATENCY_WARPS = 12  # of a multiprocessor, that keep its stores coming
CHOICE_FACTOR = 1.02  # a candidate listed earlier is taken unless another one is predicted to be this much faster

# Warps along positions and filters, positions and filters of a warp at a time, fragments of w in registers.
_WARPS = ((4, 2), (4, 1), (2, 2))
_TENSOR = tuple(
    (*warps, *sums)
    for sums in ((16, 64, 1), (32, 32, 1), (16, 32, 1), (32, 64, 0), (16, 64, 0), (16, 32, 0), (16, 16, 1), (16, 16, 0))
    for warps in _WARPS
)
_ORDINARY = tuple((*warps, *sums, 0) for sums in ((32, 64), (32, 32), (16, 64), (16, 32)) for warps in _WARPS)
_PASSES = (1, 2, 4)  # of a block's warps over a tile
# Instructions of an activation, those on the special units counted as four; others are like the last.
_ACTIVATION = {"linear": 0, "relu": 1, "relu6": 2, "leaky_relu": 3, "hard_tanh": 2, "silu": 14, "sigmoid": 12, "": 36}


@dataclass(frozen=True)
class _Windows:
    """How a tile of x lies in shared memory; the constants of the kernel by these names."""

    pitch: int
    run: int
    taps: int
    beside: int  # of them in a row, `reach` elements apart
    reach: int
    vector_x: int
    lead: int
    front: int
    copies: int
    depth: int  # values of k of a tap

    @property
    def lines(self) -> int:
        """Rows of x that a tile reads."""
        return self.taps // self.beside

    @property
    def steps(self) -> int:
        """Of 16 values of k."""
        return -(-self.taps * self.depth // 16)


@dataclass(frozen=True)
class _Candidate:
    """A tile, what it takes of a multiprocessor, and what it costs."""

    warps_m: int
    warps_n: int
    wm: int
    wn: int
    held: int
    bm: int
    row: int
    copy: int
    vector_y: int
    shared_bytes: int
    registers: int
    min_blocks: int
    walkers: int
    tiles_q: int
    tiles_n: int
    cost: Cost
    windows: _Windows

    @property
    def bn(self) -> int:
        return self.warps_n * self.wn

    @property
    def threads(self) -> int:
        return self.warps_m * self.warps_n * WARP

    def __str__(self) -> str:
        where = "registers" if self.held else "shared memory"
        return f"tile {self.bm}x{self.bn}, {self.wm}x{self.wn} a warp of {self.threads // WARP}, weights in {where}"


def activation_instructions(activation: str) -> int:
    """Of one result, those on the special units counted as four."""
    return _ACTIVATION.get(activation, _ACTIVATION[""])


@functools.lru_cache(maxsize=4096)
def plan_narrow(
    shape: ConvShape, dtype: str, activation: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> LaunchPlan:
    """The launch of kernels/conv_narrow.cu, for the arrays (x, w, bias, y).

    Args:
        activation: a name of ACTIVATION_CODES.
        aligned: elements by which x, w and y lie behind a 16-byte boundary.

    Raises:
        PlanError: it does not compute this problem.
    """
    _require(shape, dtype, limits)
    element = ELEMENTS[dtype]
    x_size = shape.batch * math.prod(shape.in_size) * shape.in_channels
    y_size = shape.batch * math.prod(shape.out_size) * shape.filters
    w_size = math.prod(shape.kernel_size) * shape.in_channels * shape.filters
    least_bytes = (x_size + w_size + y_size + shape.filters) * element.bytes
    found = []
    for windows in _windows(shape, element, aligned[0]):
        for sizes in _TENSOR if element.bytes == 2 else _ORDINARY:
            for passes in _PASSES:
                candidate = _candidate(
                    sizes, passes, shape, windows, element, activation, aligned[2], least_bytes, limits
                )
                if candidate is not None:
                    found.append(candidate)
    if not found:
        products = math.prod(shape.kernel_size) * shape.in_channels
        raise PlanError(f"conv_narrow: {products} products a sum, no tile of weights fits the device")
    fastest = min(found, key=lambda each: each.cost.seconds)
    best = next(each for each in found if each.cost.seconds <= CHOICE_FACTOR * fastest.cost.seconds)
    windows = best.windows
    others = sorted((each for each in found if each is not best), key=lambda each: each.cost.seconds)
    rejected = tuple(
        f"{each}: {each.cost.seconds * 1e6:.1f} us predicted, bound by {each.cost.bound}" for each in others[:4]
    )

    # Behind the last row of a tile, and a tile behind the last one, indices are computed all the same.
    reach = (best.bm + windows.run) * windows.pitch + windows.beside * windows.reach
    ends = (n + p + k for n, p, k in zip(shape.in_size, shape.pad_before, shape.k_eff, strict=True))
    tiles = shape.batch * math.prod(shape.out_size[:-1]) * best.tiles_q
    furthest = max(shape.in_size[-1], shape.out_size[-1] * shape.strides[-1]) + best.bm * shape.strides[-1]
    width = index_bytes(
        2 * x_size + 2 * reach,
        y_size + 2 * best.bm * shape.filters,
        w_size + 64 * shape.filters,
        tiles + best.walkers,
        furthest * shape.in_channels + reach,
        *(end + n * s for end, n, s in zip(ends, shape.out_size, shape.strides, strict=True)),
    )
    share = 100 * best.cost.least_bytes / limits.bandwidth / best.cost.seconds
    constants: tuple[tuple[str, int | str], ...] = (
        ("ELEMENT", element.c_type),
        ("INDEX", "int" if width == 4 else "long long"),
        ("RANK", shape.rank),
        ("ACTIVATION", ACTIVATION_CODES[activation]),
        ("CHANNELS", shape.in_channels),
        ("INNER", windows.run // shape.in_channels),
        ("BESIDE", windows.beside),
        ("REACH", windows.reach),
        ("TAPS", windows.taps),
        ("STRIDE", shape.strides[-1]),
        ("BM", best.bm),
        ("BN", best.bn),
        ("WM", best.wm),
        ("WN", best.wn),
        ("WARPS_M", best.warps_m),
        ("LEAD", windows.lead),
        ("FRONT", windows.front),
        ("KE", windows.depth),
        ("COPIES", windows.copies),
        ("ROW", best.row),
        ("COPY", best.copy),
        ("HELD", best.held),
        ("VECX", windows.vector_x),
        ("VECW", vector(element.bytes, 4, shape.filters, aligned[1])),
        ("VECY", best.vector_y),
        ("MIN_BLOCKS", best.min_blocks),
    )
    return LaunchPlan(
        kernel="conv_narrow",
        constants=constants,
        integers=(
            shape.filters,
            tiles,
            best.tiles_q,
            best.tiles_n,
            best.walkers,
            *shape.in_size,
            *shape.out_size,
            *shape.strides,
            *shape.dilation_rate,
            *shape.pad_before,
            *shape.kernel_size,
        ),
        grid=(best.walkers * best.tiles_n, 1, 1),
        block=(best.threads, 1, 1),
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
    if shape.data_format != CHANNELS_LAST:
        raise PlanError("conv_narrow: only channels last, where the inputs of a window are neighbours")
    if shape.groups != 1:
        raise PlanError(f"conv_narrow: {shape.groups} groups, only 1")
    if shape.in_channels > MOST_CHANNELS:
        raise PlanError(f"conv_narrow: {shape.in_channels} channels, at most {MOST_CHANNELS}")
    if math.prod(shape.kernel_size) * shape.in_channels > MOST_PRODUCTS:
        products = math.prod(shape.kernel_size) * shape.in_channels
        raise PlanError(f"conv_narrow: {products} products a sum, at most {MOST_PRODUCTS}")
    if dtype not in ("float16", "bfloat16", "float32"):
        raise PlanError(f"conv_narrow: {dtype}, only float16, bfloat16 and float32")
    if ELEMENTS[dtype].bytes == 2 and _is_dilated(shape) and shape.dilation_rate[-1] * shape.in_channels % 2:
        apart = shape.dilation_rate[-1] * shape.in_channels
        raise PlanError(f"conv_narrow: taps {apart} elements apart, only even numbers, for pairs of {dtype}")
    if limits.capability < (8, 0):
        raise PlanError(f"conv_narrow: asynchronous copies need sm_80, {limits.name} has {limits.arch}")
    if 0 in (shape.batch, *shape.in_size, *shape.out_size, shape.filters, shape.in_channels):
        raise PlanError("conv_narrow: an array without elements")


def _is_dilated(shape: ConvShape) -> bool:
    """Whether a window of the innermost axis is more than one run."""
    return shape.dilation_rate[-1] != 1 and shape.kernel_size[-1] != 1


def _windows(shape: ConvShape, element: Element, aligned: int) -> tuple[_Windows, ...]:
    """The ways to lay out tiles of x: on tensor cores a tap may have as few k as are even, or a multiple of 8."""
    channels = shape.in_channels
    pitch, run = shape.strides[-1] * channels, shape.kernel_size[-1] * channels
    taps, beside, reach = math.prod(shape.kernel_size[:-1]), 1, 0
    if _is_dilated(shape):
        run, beside, reach = channels, shape.kernel_size[-1], shape.dilation_rate[-1] * channels
        taps *= beside
    vector_x = vector(element.bytes, shape.in_size[-1] * channels, aligned)
    front, copies = 0, 1
    if element.bytes == 2 and pitch % 2:
        vector_x, copies = min(2, vector_x), 2  # two elements are what both copies store without bank conflicts
    lead = -shape.pad_before[-1] * channels % vector_x
    if element.bytes == 2 and copies == 1:
        front = lead % 2
    depths = [run]
    if element.bytes == 2:
        depths = [-(-(front + run) // unit) * unit for unit in ((2, 8) if taps > 1 else (2,))]
    how = (pitch, run, taps, beside, reach, vector_x, lead, front, copies)
    return tuple(_Windows(*how, depth) for depth in dict.fromkeys(depths))


def _candidate(
    sizes: tuple[int, int, int, int, int],
    passes: int,
    shape: ConvShape,
    windows: _Windows,
    element: Element,
    activation: str,
    aligned_y: int,
    least_bytes: int,
    limits: DeviceLimits,
) -> _Candidate | None:
    """One tile with its cost, or None where it does not fit."""
    warps_m, warps_n, wm, wn, held = sizes
    tensor = element.bytes == 2
    bm, bn, threads = warps_m * wm * passes, warps_n * wn, warps_m * warps_n * WARP
    length, filters = shape.out_size[-1], shape.filters
    if bn - wn >= filters or (passes > 1 and bm // 2 >= length):
        return None  # warps, or passes, without work
    steps, depth = windows.steps, windows.depth
    vector_y = min(wn // 4 if tensor else 4, vector(element.bytes, filters, aligned_y))

    # Shared memory and registers.
    span = (bm - 1) * windows.pitch + (windows.beside - 1) * windows.reach + depth
    vectors = -(-(windows.lead - windows.front + span) // windows.vector_x)
    unit = max(windows.vector_x, 4 // element.bytes)
    row = -(-(vectors * windows.vector_x + windows.copies - 1) // unit) * unit
    copy, conflicts = windows.lines * row, 1.0
    if tensor:
        to_row, to_copy, conflicts = _places(windows)
        row = _place(row, to_row) if windows.lines > 1 else row
        copy = _place(windows.lines * row, to_copy) if windows.copies == 2 else windows.lines * row
    weights = steps * 16 * bn * 2 if tensor else windows.taps * windows.run * bn * 4
    shared = weights + bn * 4 + 2 * windows.copies * copy * element.bytes
    if shared > limits.shared_bytes:
        return None
    fragments = (wm // 16) * (wn // 8) if tensor else 0
    pieces = -(-windows.lines * vectors // threads)
    on_the_way = 0 if windows.copies == 1 and windows.vector_x * element.bytes >= 4 else min(pieces, 8)
    if tensor:
        in_use = 4 * fragments + held * steps * (wn // 4) + 4 * (wm // 16) + (0 if held else wn // 4)
    else:
        in_use = wm // 4 * (wn // 8) + wn // 8 + 20
    registers = -(-(in_use + on_the_way + 40 + 6 * shape.rank + (16 if windows.taps > 1 else 0)) // 8) * 8
    if registers > MOST_REGISTERS:
        return None
    blocks = min(resident(limits, threads, registers, shared))
    if blocks == 0:
        return None

    # Work split.
    tiles_q, tiles_n = -(-length // bm), -(-filters // bn)
    rows = shape.batch * math.prod(shape.out_size[:-1])
    tiles = rows * tiles_q
    walkers = min(tiles, max(1, blocks * limits.multiprocessors // tiles_n), max(1, MAX_GRID_X // tiles_n))
    if walkers * tiles_n > MAX_GRID_X:
        return None
    grid = walkers * tiles_n
    busy = grid * -(-tiles // walkers)  # tiles, if all walked as far as the longest
    spread = max(1.0, limits.multiprocessors / grid)

    # Cost.
    turns = rows * (tiles_q - 1) * (bm // wm) + rows * -(-(length - (tiles_q - 1) * bm) // wm)
    turns *= warps_n * tiles_n  # of a warp over its sums
    finishing = activation_instructions(activation)
    stored = wm * wn // WARP // vector_y  # accesses of a lane
    if tensor:
        read = 4 * (wm // 16) * steps
        fetched = 0 if held else steps * (wn // 16)
        instructions = read * 1.5 + fetched + fragments * (steps + 4 + 2 + 4 * finishing) + 3 * stored + 40
        wavefronts = read * conflicts + 4 * fetched + 4 * stored * min(1.0, vector_y / 8)
    else:
        products = windows.taps * windows.run
        each = wm // 4 * (wn // 8)
        fetched = products * (wm // 4 + wn // 32)
        instructions = products * each + fetched + each * (1 + finishing) + 3 * stored + 40
        wavefronts = fetched + products * (wn // 32) + 4 * stored
    staging = threads // WARP * (pieces * (10 + 6 * shape.rank) + 50) * tiles * tiles_n
    cycles = limits.clock * limits.multiprocessors  # a second, of all of them together
    imbalance = busy / (tiles * tiles_n)
    issue = (turns * instructions + staging) / (4 * (ISSUE_SHARE if tensor else ISSUE_SHARE_ORDINARY) * cycles)
    banks = turns * wavefronts / cycles
    flops = turns * 2 * wm * wn * (16 * steps if tensor else windows.taps * windows.run)
    units = flops / (rate_share(limits) * limits.fp16_rate) if tensor else flops / limits.fp32_rate
    moved = least_bytes + (tiles * tiles_n * windows.lines * row * element.bytes) + grid * weights
    warps = blocks * threads / WARP
    memory = max(least_bytes / limits.bandwidth, moved / (L2_FACTOR * limits.bandwidth))
    times = {  # of the busiest multiprocessor
        "memory": memory / min(1.0, warps / LATENCY_WARPS) * max(1.0, spread),
        "instructions": issue * imbalance * spread,
        "shared memory": banks * imbalance * spread,
        ("tensor cores" if tensor else "multiply-adds"): units * imbalance * spread,
    }
    bound = max(times, key=lambda each: times[each])
    fill = FILL_SECONDS + weights / 16 / threads * 12 * threads / WARP * blocks / (4 * cycles / limits.multiprocessors)
    # What bounds least still takes a part: warps wait for each other at every tile.
    rest = (sum(times.values()) - times[bound]) / len(times)
    seconds = times[bound] + 0.1 * rest + fill + LAUNCH_SECONDS
    least_flops = 2 * rows * length * filters * windows.taps * windows.run
    cost = Cost(flops, least_flops, moved, least_bytes, seconds, bound)
    min_blocks = max(1, min(blocks, REGISTERS_PER_MULTIPROCESSOR // (threads * registers)))
    return _Candidate(
        *sizes, bm, row, copy, vector_y, shared, registers, min_blocks, walkers, tiles_q, tiles_n, cost, windows
    )


@functools.lru_cache(maxsize=4096)
def _places(windows: _Windows) -> tuple[int, int, float]:
    """Where rows and copies of xs are to begin, in elements modulo all banks, and the wavefronts of a read then."""
    starts = {first % windows.depth for first in range(0, windows.steps * 16, 8)}
    alone = [start for start in starts if start + 8 <= windows.depth or windows.taps == 1]
    across = [start for start in starts if start not in alone]
    unit, all_banks = max(2, windows.vector_x), 2 * BANKS
    copy = min(range(0, all_banks, unit), key=lambda at: _wavefronts(windows, 0, at, 0)) if windows.copies == 2 else 0
    row, most = 0, 0
    if across:
        rows = range(0, all_banks, unit)
        counts = [sum(_wavefronts(windows, at, copy, start) for start in across) for at in rows]
        most = min(counts)
        row = rows[counts.index(most)]
    return row, copy, (len(alone) * _wavefronts(windows, 0, copy, 0) + most) / len(starts)


def _wavefronts(windows: _Windows, row: int, copy: int, start: int) -> int:
    """Wavefronts in which a warp reads two neighbouring k of 8 positions, from the k `start` of a tap on."""
    banks: dict[int, set[tuple[int, int]]] = {}
    apart = windows.reach if windows.beside > 1 else row  # of two taps
    for lane in range(WARP):
        tap, k = divmod(start + lane % 4 * 2, windows.depth) if windows.taps > 1 else (0, lane % 4 * 2)
        odd = lane // 4 % 2 if windows.copies == 2 else 0
        shift = (windows.lead + odd) % 2 if windows.copies == 2 else 0
        at = shift + windows.lead - windows.front + lane // 4 * windows.pitch + k
        banks.setdefault((odd * copy + tap * apart + at) // 2 % BANKS, set()).add((2 * tap + odd, at // 2))
    return max(map(len, banks.values()))


def _place(least: int, residue: int) -> int:
    """The first number from `least` on that is `residue` modulo all banks, in elements."""
    return least + (residue - least) % (2 * BANKS)
