"""Tiles of the matrix products on tensor cores: which there are, which fit, and what each would cost.

The model, for one block and step. It takes as long as the slowest of

* the tensor cores: the tile's products, at the rate of mma.sync;
* shared memory: every warp reads its rows and columns, every copy writes once, 128 bytes a cycle;
* instructions: four a cycle, of mma, their fragments and what makes TF32 of them, and the copies with their addresses;

and a launch as long as its busiest multiprocessor, or as the memory and the L2 cache, whichever is slower.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from cuconv.plan.cost import L2_FACTOR, slowest
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
# Of the tensor cores' rate, that mma.sync reaches: from sm_90 on the rest needs instructions of their own, which there
# are none of for float64.
RATE_SHARE = {(8, 0): 0.9, (9, 0): 0.62, (10, 0): 0.5, (12, 0): 0.9}
RATE_SHARE_FLOAT64 = 0.9
SHARED_BYTES_A_CYCLE = 128

# PRECISION of the kernels, and what computes then.
UNITS = {0: "tensor cores", 1: "tensor cores in TF32", 3: "tensor cores in 3xTF32"}

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
# One product of float32 as three of TF32 (mma.cuh) is further off than one that is not rounded at all, but sums of them
# are rounded less often than those of the ordinary units. From here on they are off by less, of any kind of numbers.
LEAST_DEPTH = 256


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
    precision: int  # of the kernels
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
            ("PRECISION", self.precision),
            ("STAGES", self.stages),
            ("MIN_BLOCKS", self.min_blocks),
        )

    def __str__(self) -> str:
        tile = f"tile {self.bm}x{self.bn}x{self.bk}, {self.wm}x{self.wn} a warp, {self.stages} stages"
        return f"{UNITS[self.precision]}, {tile}"


@functools.lru_cache(maxsize=4096)
def choose_tile(
    product: Product, element: Element, operands: Operands, limits: DeviceLimits, precision: str = "highest"
) -> tuple[Tile, tuple[str, ...]]:
    """The tile with the lowest predicted time, and why the others lost.

    Raises:
        PlanError: the device has no such instructions for the dtype, they would be less exact, or no tile fits.
    """
    require(element, limits)
    products = products_of(element, precision)
    if products == 3 and 0 < product.k < LEAST_DEPTH:
        raise PlanError(less_exact(product.k))
    best: Tile | None = None
    lost = []
    for sizes in TILES:
        for step_bytes, stages in STEPS:
            tile = _candidate(product, element, operands, limits, products, *sizes, step_bytes, stages)
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
    if element.is_complex:
        raise PlanError(f"tensor cores: only real elements, not {element.dtype}")
    if not _rate(element, limits):
        raise PlanError(f"tensor cores: those of {limits.name} have no products of {element.dtype}")


def require_16_bits(element: Element, limits: DeviceLimits) -> None:
    """Refuses the same, and elements of more than 16 bits.

    Raises:
        PlanError: the device or the dtype has no such instructions.
    """
    if element.bytes != 2:
        raise PlanError(f"tensor cores: this kernel has only 16-bit elements, not {element.dtype}")
    require(element, limits)


def products_of(element: Element, precision: str) -> int:
    """Products of tensor cores that make one of elements."""
    return 3 if element.dtype == "float32" and precision == "highest" else 1


def less_exact(depth: int) -> str:
    """Why three products of TF32 are not taken for sums of `depth` products."""
    return f"{UNITS[3]}: less exact than the ordinary units for sums of {depth} products, not from {LEAST_DEPTH} on"


def precision_of(element: Element, products: int) -> int:
    """PRECISION of the kernels."""
    return products if element.dtype == "float32" else 0


def rate_share(limits: DeviceLimits) -> float:
    """Of the tensor cores' rate, that mma.sync reaches on a device with it."""
    return next(share for known, share in reversed(RATE_SHARE.items()) if known <= limits.capability)


def _rate(element: Element, limits: DeviceLimits) -> float:
    """Operations a second of products of these elements, or of their TF32, with mma.sync."""
    if element.bytes == 8:
        return limits.dmma_rate * RATE_SHARE_FLOAT64
    return rate_share(limits) * (limits.tf32_rate if element.bytes == 4 else limits.fp16_rate)


def _slower(loser: Tile) -> str:
    return f"{loser}: {loser.cost.seconds * 1e6:.1f} us predicted"


def _candidate(
    product: Product,
    element: Element,
    operands: Operands,
    limits: DeviceLimits,
    products: int,
    bm: int,
    bn: int,
    wm: int,
    wn: int,
    step_bytes: int,
    stages: int,
) -> Tile | str:
    """The tile, or why it cannot be taken."""
    bk = step_bytes // element.bytes
    precision = precision_of(element, products)
    name = f"{UNITS[precision]}, tile {bm}x{bn}x{bk}"
    if element.bytes == 8 and step_bytes < 128:
        return f"{name}: its rows are too short to be read without conflicts"
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
    if products == 3 and splits > 1 and chunk < LEAST_DEPTH:
        return f"{name}: {less_exact(chunk)}"
    result_bytes = element.bytes if product.most == 1 else element.sum_bytes
    rows, columns = (bn, bm) if operands.transposed else (bm, bn)
    shared_bytes = max(stages * stage, rows * (columns + RESULT_PADDING) * result_bytes)
    if shared_bytes > limits.shared_bytes:
        return f"{name}: {shared_bytes} bytes of shared memory are more than {limits.name} gives a block"
    loads_x = bm * bk // (operands.vector_x * threads)
    loads_w = -(-bk * vectors_n // threads)
    registers = _registers(element, operands, products, wm, wn, loads_x, loads_w)
    if registers > REGISTERS_PER_THREAD - 16:
        return f"{name}: about {registers} registers a thread would be needed"
    min_blocks = 1
    if _fits_in_128(element, operands, products, threads, wm * wn):
        min_blocks, registers = 2, min(registers, 128)
    blocks_m, blocks_n = -(-product.m // bm), -(-product.n // bn)
    blocks = blocks_m * blocks_n * product.groups * splits
    if blocks > INT32_MAX:
        return f"{name}: {blocks} blocks are more than a grid has"
    held = min(resident(limits, threads, registers, shared_bytes))
    if not held:
        return f"{name}: a multiprocessor of {limits.name} does not hold a block"
    part = product if splits == 1 else dataclasses.replace(product, k=chunk)
    sizes = (bm, bn, bk, wm, wn)
    cost = cost_of(part, element, operands, limits, sizes, loads_x + loads_w, blocks, held, products)
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
        precision,
        cost,
    )


def _fits_in_128(element: Element, operands: Operands, products: int, threads: int, sums: int) -> bool:
    """Whether the compiler manages with 128 registers and no spill, so that two blocks of 256 threads are resident.

    That it does is checked for every architecture by tests/test_static_gates.py.
    """
    one = element.bytes == 2 and products == 1 and operands.index_bytes == 4 and operands.rank <= 2
    wide = min(operands.vector_x, operands.vector_w) * element.bytes == VECTOR_BYTES and not operands.transposed
    return one and wide and threads == 256 and sums == 64 * WARP


def _registers(
    element: Element, operands: Operands, products: int, wm: int, wn: int, loads_x: int, loads_w: int
) -> int:
    """Registers a thread, estimated: sums, fragments of one k, positions, what is held for a store, and the rest."""
    sums = wm * wn // WARP * element.sum_bytes // 4
    fragments = (wm + wn) // 4 * (element.bytes // 4 or 1)
    if products == 3:
        fragments = 3 * (2 * wm + wn) // 4  # of two k, and what rounding leaves of the rows
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
    products: int = 1,
    rows: float | None = None,
) -> Cost:
    """The model above.

    Args:
        loads: of a thread and step.
        held: blocks that a multiprocessor holds.
        products: of tensor cores, that make one of elements.
        rows: of x that a step copies, where that is not `bm`.
    """
    bm, bn, bk, wm, wn = sizes
    warps = bm // wm * (bn // wn)
    rows = bm if rows is None else rows
    steps = max(1, -(-product.k // bk))
    done = 2 * bm * bn * bk * steps * blocks
    clock = limits.clock
    tensor = 2 * bm * bn * bk * products / (_rate(element, limits) / limits.multiprocessors)
    shared = (warps * (wm + wn) + rows + bn) * bk * element.bytes / SHARED_BYTES_A_CYCLE / clock
    issued = warps * (_instructions(element, products, wm, wn, bk) + 10 * loads + 40) / 4 / clock
    busiest = -(-blocks // limits.multiprocessors)
    waiting = min(1.0, min(busiest, held) * warps / LATENCY_WARPS)
    passes = busiest * (steps + START_STEPS) / waiting
    moved = round(blocks * steps * (rows + bn) * bk * element.bytes)
    least = 2 * product.m * product.n * product.k * product.groups
    times = {
        "tensor cores": passes * tensor,
        "shared memory": passes * shared,
        "instructions": passes * issued,
        "memory": operands.least_bytes / limits.bandwidth,
        "L2 cache": moved / (L2_FACTOR * limits.bandwidth),
    }
    return slowest(done, least, moved, operands.least_bytes, times)


def _instructions(element: Element, products: int, wm: int, wn: int, bk: int) -> int:
    """Of a warp for the products of one step, and for their fragments."""
    rows, columns = wm // 16, wn // 8  # mma
    if element.bytes == 2:
        return bk // 16 * (rows * columns + rows + columns // 2)
    read = (rows if element.bytes == 4 else 4 * rows) + 2 * columns
    if element.bytes == 8:
        return bk // 8 * (rows * columns + read)
    # What a lane has of a fragment is rounded, and split; a sum of 16 products is made finite and added.
    rounded = (4 * rows + 2 * columns) * (5 if products == 3 else 3)
    added = rows * columns * 6 if products == 3 else 0
    return bk // 8 * (products * rows * columns + read + rounded + added)
