"""Tiles of the matrix products on tensor cores: which there are, which fit, and what each would cost.

The model, for one block and step. It takes as long as the slowest of

* the tensor cores: the tile's products, at the rate of mma.sync;
* shared memory: every warp reads its rows and columns, every copy writes once, 128 bytes a cycle;
* instructions: four a cycle, of mma, their fragments, and the copies with their addresses;

and a launch as long as its busiest multiprocessor, or as the memory and the L2 cache, whichever is slower.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from cuconv.plan.cost import L2_FACTOR, LAUNCH_SECONDS
from cuconv.plan.occupancy import resident
from cuconv.plan.simt import CHOICE_FACTOR, Operands, Product
from cuconv.plan.types import (
    INT32_MAX,
    REGISTERS_PER_THREAD,
    VECTOR_BYTES,
    WARP,
    Cost,
    DeviceLimits,
    Element,
    PlanError,
)

OLDEST = (8, 0)  # compute capability
RESULT_PADDING = 8  # elements in a row of the tile of y, as in conv_mma.cu
LATENCY_WARPS = 8  # of a multiprocessor; with fewer it waits for its own results
START_STEPS = 2  # of a block, until the first copies have arrived
# Of the tensor cores' rate, that mma.sync reaches: from sm_90 on the rest needs instructions of their own.
RATE_SHARE = {(8, 0): 0.9, (9, 0): 0.62, (10, 0): 0.5, (12, 0): 0.9}
SHARED_BYTES_A_CYCLE = 128

# Rows, columns of a block's tile, then of a warp's; from large to small.
TILES: tuple[tuple[int, int, int, int], ...] = (
    (128, 256, 64, 64),  # 8 warps, 128 sums a thread
    (128, 128, 64, 32),  # 8 warps
    (256, 64, 64, 32),
    (128, 64, 32, 32),
    (64, 128, 32, 32),
    (64, 64, 32, 32),  # 4 warps
    (128, 32, 32, 32),
    (32, 64, 16, 32),
    (32, 32, 16, 16),
)
# Bytes of a step in a row of x, and steps that are staged.
STEPS = ((128, 3), (64, 4))


@dataclass(frozen=True)
class Tile:
    """One candidate: its constants, how many blocks it makes, and what it costs."""

    bm: int
    bn: int
    bk: int
    wm: int
    wn: int
    stages: int
    vector_x: int  # elements of an access to the operand with rows m
    vector_w: int  # and to the operand with columns n
    blocks_m: int
    blocks_n: int
    splits: int
    blocks: int
    shared_bytes: int
    registers: int
    min_blocks: int  # of a multiprocessor, for the compiler; 1 leaves it free
    cost: Cost

    @property
    def threads(self) -> int:
        return self.bm // self.wm * (self.bn // self.wn) * WARP

    @property
    def constants(self) -> tuple[tuple[str, int], ...]:
        """The tile as the kernels' constants."""
        return (
            ("BM", self.bm),
            ("BN", self.bn),
            ("BK", self.bk),
            ("WM", self.wm),
            ("WN", self.wn),
            ("PRECISION", 0),
            ("STAGES", self.stages),
            ("MIN_BLOCKS", self.min_blocks),
        )

    def __str__(self) -> str:
        return f"tensor cores, tile {self.bm}x{self.bn}x{self.bk}, {self.wm}x{self.wn} a warp, {self.stages} stages"


@functools.lru_cache(maxsize=4096)
def choose_tile(
    product: Product, element: Element, operands: Operands, limits: DeviceLimits
) -> tuple[Tile, tuple[str, ...]]:
    """The tile with the lowest predicted time, and why the others lost.

    Raises:
        PlanError: the device or the dtype has no such instructions, or no tile fits.
    """
    require(element, limits)
    best: Tile | None = None
    lost = []
    for sizes in TILES:
        for step_bytes, stages in STEPS:
            tile = _candidate(product, element, operands, limits, *sizes, step_bytes, stages)
            if isinstance(tile, str):
                lost.append(tile)
            elif best is None or tile.cost.seconds * CHOICE_FACTOR < best.cost.seconds:
                lost += [] if best is None else [_slower(best)]
                best = tile
            else:
                lost.append(_slower(tile))
    if best is None:
        raise PlanError(f"tensor cores: no tile fits {limits.name}: " + "; ".join(lost))
    return best, tuple(lost)


def require(element: Element, limits: DeviceLimits) -> None:
    """Refuses what tensor cores do not compute here.

    Raises:
        PlanError: the device or the dtype has no such instructions.
    """
    if limits.capability < OLDEST:
        raise PlanError(f"tensor cores: mma.sync as it is used here begins with sm_80, {limits.name} is {limits.arch}")
    if element.bytes != 2:
        raise PlanError(f"tensor cores: only 16-bit elements, not {element.dtype}")


def _slower(loser: Tile) -> str:
    return f"{loser}: {loser.cost.seconds * 1e6:.1f} us predicted"


def _candidate(
    product: Product,
    element: Element,
    operands: Operands,
    limits: DeviceLimits,
    bm: int,
    bn: int,
    wm: int,
    wn: int,
    step_bytes: int,
    stages: int,
) -> Tile | str:
    """The tile, or why it cannot be taken."""
    bk = step_bytes // element.bytes
    name = f"tensor cores, tile {bm}x{bn}x{bk}"
    threads = bm // wm * (bn // wn) * WARP
    vectors_n = bn // operands.vector_w
    if vectors_n > threads or threads % vectors_n:
        return f"{name}: its threads do not share the copies of w evenly"
    vectors_k = bk // operands.vector_x
    if operands.transposed and (bk * WARP % threads or bm % WARP):
        return f"{name}: its threads do not share the copies of x evenly"
    if not operands.transposed and (bm * vectors_k % threads or threads % vectors_k):
        return f"{name}: its threads do not share the copies of x evenly"
    stage = (bm + bn) * bk * element.bytes
    chunk = -(-product.k // (product.most * bk)) * bk  # values of k of a part
    splits = max(1, -(-product.k // max(1, chunk)))
    result_bytes = element.bytes if product.most == 1 else element.sum_bytes
    rows, columns = (bn, bm) if operands.transposed else (bm, bn)
    shared_bytes = max(stages * stage, rows * (columns + RESULT_PADDING) * result_bytes)
    if shared_bytes > limits.shared_bytes:
        return f"{name}: {shared_bytes} bytes of shared memory are more than {limits.name} gives a block"
    loads_x = bm * bk // (operands.vector_x * threads)
    loads_w = -(-bk * vectors_n // threads)
    registers = _registers(element, operands, wm, wn, loads_x, loads_w)
    if registers > REGISTERS_PER_THREAD - 16:
        return f"{name}: about {registers} registers a thread would be needed"
    min_blocks = 1
    if _fits_in_128(element, operands, threads, wm * wn):
        min_blocks, registers = 2, min(registers, 128)
    blocks_m, blocks_n = -(-product.m // bm), -(-product.n // bn)
    blocks = blocks_m * blocks_n * product.groups * splits
    if blocks > INT32_MAX:
        return f"{name}: {blocks} blocks are more than a grid has"
    held = min(resident(limits, threads, registers, shared_bytes))
    if not held:
        return f"{name}: a multiprocessor of {limits.name} does not hold a block"
    part = dataclasses.replace(product, k=min(product.k, chunk))
    cost = cost_of(part, element, operands, limits, (bm, bn, bk, wm, wn), loads_x + loads_w, blocks, held)
    return Tile(
        bm,
        bn,
        bk,
        wm,
        wn,
        stages,
        operands.vector_x,
        operands.vector_w,
        blocks_m,
        blocks_n,
        splits,
        blocks,
        shared_bytes,
        registers,
        min_blocks,
        cost,
    )


def _fits_in_128(element: Element, operands: Operands, threads: int, sums: int) -> bool:
    """Whether the compiler manages with 128 registers and no spill, so that two blocks of 256 threads are resident.

    That it does is checked for every architecture by tests/test_static_gates.py.
    """
    wide = min(operands.vector_x, operands.vector_w) * element.bytes == VECTOR_BYTES and not operands.transposed
    return threads == 256 and sums == 64 * WARP and wide and operands.index_bytes == 4 and operands.rank <= 2


def _registers(element: Element, operands: Operands, wm: int, wn: int, loads_x: int, loads_w: int) -> int:
    """Registers a thread, estimated: sums, fragments of one k, positions, what is held for a store, and the rest."""
    sums = wm * wn // WARP
    fragments = (wm + wn) // 4
    positions = loads_x * (operands.rank + 1) * operands.index_bytes // 4
    held = sum(
        -(-loads * vector * element.bytes // 4)
        for loads, vector in ((loads_x, operands.vector_x), (loads_w, operands.vector_w))
        if vector * element.bytes < 4
    )
    return -(-(sums + fragments + positions + held + 36) // 8) * 8


def cost_of(
    product: Product,
    element: Element,
    operands: Operands,
    limits: DeviceLimits,
    sizes: tuple[int, int, int, int, int],
    loads: int,
    blocks: int,
    held: int,
    rows: float | None = None,
) -> Cost:
    """The model above.

    Args:
        loads: of a thread and step.
        held: blocks that a multiprocessor holds.
        rows: of x that a step copies, where that is not `bm`.
    """
    bm, bn, bk, wm, wn = sizes
    warps = bm // wm * (bn // wn)
    rows = bm if rows is None else rows
    steps = max(1, -(-product.k // bk))
    done = 2 * bm * bn * bk * steps * blocks
    share = next(share for known, share in reversed(RATE_SHARE.items()) if known <= limits.capability)
    clock = limits.fp32_rate / (2 * limits.fp32_lanes * limits.multiprocessors)
    tensor = 2 * bm * bn * bk / (limits.fp16_rate * share / limits.multiprocessors)
    shared = (warps * (wm + wn) + rows + bn) * bk * element.bytes / SHARED_BYTES_A_CYCLE / clock
    products = wm // 16 * (wn // 8) * (bk // 16)
    fragments = (wm // 16 + wn // 16) * (bk // 16)
    issued = warps * (products + fragments + 10 * loads + 40) / 4 / clock
    step = max(tensor, shared, issued)
    busiest = -(-blocks // limits.multiprocessors)
    waiting = min(1.0, min(busiest, held) * warps / LATENCY_WARPS)
    compute = busiest * (steps + START_STEPS) * step / waiting
    moved = round(blocks * steps * (rows + bn) * bk * element.bytes)
    memory = max(operands.least_bytes / limits.bandwidth, moved / (L2_FACTOR * limits.bandwidth))
    least = 2 * product.m * product.n * product.k * product.groups
    return Cost(done, least, moved, operands.least_bytes, max(compute, memory) + LAUNCH_SECONDS)
