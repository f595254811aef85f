"""Tiles of the matrix products on the ordinary arithmetic units: which there are, which fit, and what each would cost.

The model. A launch takes as long as its busiest multiprocessor, or as the memory, whichever is slower:

* instructions: every step of BK costs a thread TM * TN * BK multiply-adds and what feeds them. A multiprocessor issues
  one instruction a cycle in each of its four quarters, so the share of multiply-adds is the share of the peak;
  with fewer warps than LATENCY_WARPS it waits for its own results.
* memory: every array once from DRAM, and the tiles' operands once a tile from the L2 cache.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cuconv.plan.cost import L2_FACTOR, slowest
from cuconv.plan.occupancy import resident
from cuconv.plan.types import (
    INT32_MAX,
    REGISTERS_PER_THREAD,
    STATIC_SHARED_BYTES,
    VECTOR_BYTES,
    WARP,
    Cost,
    DeviceLimits,
    Element,
    PlanError,
)

BK = 8  # values of k in a step: 8 threads read 32 neighbouring bytes of fp32
WAVES = 4  # blocks a multiprocessor that splitting aims at, so that the last ones to finish matter little
LATENCY_WARPS = 8  # of a multiprocessor, two a quarter; each has TM * TN independent sums, so more change little
MAX_LOADS = 12  # accesses a thread has in flight a step, of both operands; more cost registers that the sums need
CHOICE_FACTOR = 1.02  # a tile listed earlier is taken unless another one is predicted to be this much faster

# Rows, columns of a block's tile, then of a thread's, by the bytes of a sum; from large to small. Large tiles reuse
# what they load, small ones waste less on edges and fill a GPU with a small problem.
TILES: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    4: (
        (128, 128, 8, 8),  # 256 threads; 84 % of the main loop's instructions are multiply-adds
        (128, 64, 8, 8),  # 128 threads
        (64, 128, 8, 8),
        (64, 64, 4, 4),  # 256 threads, few loads each
        (128, 32, 8, 4),  # few columns
        (128, 16, 4, 4),
        (32, 32, 4, 4),  # 64 threads
    ),
    8: (
        (64, 64, 4, 4),  # 256 threads; 8 x 8 doubles would take 128 registers
        (64, 32, 4, 4),
        (128, 16, 4, 4),
        (32, 32, 4, 4),
    ),
    16: (
        (64, 32, 4, 2),  # 256 threads
        (32, 32, 2, 2),
        (64, 8, 2, 2),
    ),
}


@dataclass(frozen=True)
class Product:
    """The matrix product of a launch: `groups` times [m, k] by [k, n]; k may be cut into as many as `most` parts."""

    m: int
    n: int
    k: int
    groups: int
    most: int = 1

    def splits(self, blocks: int, limits: DeviceLimits) -> int:
        """Parts of k for `blocks` tiles: enough to give every multiprocessor WAVES blocks, each a multiple of BK."""
        wanted = min(self.most, max(1, WAVES * limits.multiprocessors // max(1, blocks)))
        return max(1, -(-self.k // self.part(wanted)))

    def part(self, splits: int) -> int:
        """Values of k in a part; the last one may have fewer."""
        return max(1, -(-self.k // (splits * BK))) * BK


@dataclass(frozen=True)
class Tile:
    """One candidate: its constants, how many blocks it makes, and what it costs."""

    bm: int
    bn: int
    tm: int
    tn: int
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
        return self.bm // self.tm * (self.bn // self.tn)

    @property
    def constants(self) -> tuple[tuple[str, int], ...]:
        """The tile as the kernels' constants."""
        return (
            ("BM", self.bm),
            ("BN", self.bn),
            ("BK", BK),
            ("TM", self.tm),
            ("TN", self.tn),
            ("MIN_BLOCKS", self.min_blocks),
        )

    def __str__(self) -> str:
        return f"tile {self.bm}x{self.bn}, {self.tm}x{self.tn} a thread"


@dataclass(frozen=True)
class Operands:
    """How a kernel reads and what it moves.

    Attributes:
        vector_x, vector_w: elements of the widest accesses that alignment and channels allow.
        transposed: the operand with rows m is staged row by row of positions (channels_first).
        gradient: the kernel gradient's way of loading: BK positions, shared by all threads.
        index_bytes, rank: of the kernel's indices, and spatial axes: both cost registers.
        least_bytes: every array of the call once.
    """

    vector_x: int
    vector_w: int
    transposed: bool
    gradient: bool
    index_bytes: int
    rank: int
    least_bytes: int


@functools.lru_cache(maxsize=4096)  # the phases of a transposed convolution differ little
def choose_tile(
    product: Product, element: Element, operands: Operands, limits: DeviceLimits
) -> tuple[Tile, tuple[str, ...]]:
    """The tile with the lowest predicted time, and why the others lost.

    Raises:
        PlanError: no tile fits the device, or there would be more blocks than a grid has.
    """
    best: Tile | None = None
    lost = []
    for sizes in TILES[element.sum_bytes]:
        tile = _candidate(product, element, operands, limits, *sizes)
        if isinstance(tile, str):
            lost.append(f"tile {sizes[0]}x{sizes[1]}: {tile}")
        elif best is None or tile.cost.seconds * CHOICE_FACTOR < best.cost.seconds:
            lost += [] if best is None else [_slower(best, tile)]
            best = tile
        else:
            lost.append(_slower(tile, best))
    if best is None:
        raise PlanError(f"no tile fits {limits.name}: " + "; ".join(lost))
    return best, tuple(lost)


def _slower(loser: Tile, winner: Tile) -> str:
    return f"{loser}: {loser.cost.seconds * 1e6:.1f} us predicted, {winner} {winner.cost.seconds * 1e6:.1f} us"


def _candidate(
    product: Product, element: Element, operands: Operands, limits: DeviceLimits, bm: int, bn: int, tm: int, tn: int
) -> Tile | str:
    """The tile, or why it cannot be taken."""
    threads = bm // tm * (bn // tn)
    if threads < BK * WARP and operands.transposed and not operands.gradient and BK * WARP % threads:
        return "its threads do not share a step's loads evenly"
    share = threads // BK if operands.gradient else threads
    room = bm if operands.gradient else bm * BK
    vector_x = _largest(operands.vector_x, room // share)
    vector_w = _largest(operands.vector_w, bn)
    loads_x = -(-bm * BK // (vector_x * threads))
    loads_w = -(-bn * BK // (vector_w * threads))
    if loads_x + loads_w > MAX_LOADS:
        return f"{loads_x + loads_w} accesses a thread and step leave its sums too few registers"
    shared_bytes = 2 * BK * (bm + bn + _padding(element, operands, threads, vector_x, vector_w)) * element.sum_bytes
    if shared_bytes > min(limits.shared_bytes, STATIC_SHARED_BYTES):
        return f"{shared_bytes} bytes of shared memory are more than {limits.name} gives a block"
    registers = _registers(element, operands, tm, tn, loads_x, loads_w)
    if registers > REGISTERS_PER_THREAD:
        return f"about {registers} registers a thread would be needed"
    blocks_m, blocks_n = -(-product.m // bm), -(-product.n // bn)
    splits = product.splits(blocks_m * blocks_n * product.groups, limits)
    blocks = blocks_m * blocks_n * product.groups * splits
    if blocks > INT32_MAX:
        return f"{blocks} blocks are more than a grid has"
    min_blocks = 1
    if _fits_in_128(element, operands, limits, threads, tm * tn, loads_x + loads_w):
        min_blocks, registers = 2, min(registers, 128)
    cost = _cost(product, element, operands, limits, (bm, bn, tm, tn), blocks, splits, registers, shared_bytes)
    return Tile(
        bm,
        bn,
        tm,
        tn,
        vector_x,
        vector_w,
        blocks_m,
        blocks_n,
        splits,
        blocks,
        shared_bytes,
        registers,
        min_blocks,
        cost,
    )


def _fits_in_128(
    element: Element, operands: Operands, limits: DeviceLimits, threads: int, sums: int, loads: int
) -> bool:
    """Whether the compiler manages with 128 registers and no spill, so that two blocks of 256 threads are resident.

    That it does is checked for every architecture by tests/test_static_gates.py. It takes one register too many for
    three axes on sm_100 and newer, and for two on sm_75.
    """
    axes = operands.rank == 1 or (8, 0) <= limits.capability < (10, 0)
    wide = element.bytes == 4 and operands.index_bytes == 4 and loads == 2
    return threads == 256 and sums == 64 and wide and axes and not operands.gradient


def _padding(element: Element, operands: Operands, threads: int, vector_x: int, vector_w: int) -> int:
    """Elements of padding in a row of both staged operands, as the kernels define it."""
    block = VECTOR_BYTES // element.sum_bytes
    if not operands.gradient:
        return block
    if operands.transposed:
        return 2 * block
    stored = (threads // BK * vector for vector in (vector_x, vector_w))
    return sum(count if count < 8 * block else 0 for count in stored)


def _largest(vector: int, room: int) -> int:
    """The widest vector, a power of two, that is no wider than `room`."""
    while vector > max(1, room):
        vector //= 2
    return vector


def _registers(element: Element, operands: Operands, tm: int, tn: int, loads_x: int, loads_w: int) -> int:
    """Registers a thread, estimated: sums, fragments of one k, what is in flight, positions, and the rest.

    The rest is what fits ptxas' reports for the suite on seven architectures best: 6 off on average.
    """
    words = element.sum_bytes // 4
    sums = words * (tm * tn + tm + tn)
    flight = -(-(loads_x * operands.vector_x + loads_w * operands.vector_w) * element.bytes // 4)
    positions = (operands.rank + 1) * (loads_x + 1) * operands.index_bytes // 4
    rest = (34 if sums >= 64 else 44) + (8 if operands.gradient else 0)
    return min(256, -(-(sums + flight + positions + rest) // 8) * 8)


def _cost(
    product: Product,
    element: Element,
    operands: Operands,
    limits: DeviceLimits,
    sizes: tuple[int, int, int, int],
    blocks: int,
    splits: int,
    registers: int,
    shared_bytes: int,
) -> Cost:
    bm, bn, tm, tn = sizes
    threads = bm // tm * (bn // tn)
    steps = product.part(splits) // BK
    real = 4 if element.is_complex else 1  # multiply-adds of real numbers in one of elements
    done = 2 * real * bm * bn * steps * BK * blocks
    least = 2 * real * product.m * product.n * product.k * product.groups
    double = element.sum_dtype in ("float64", "complex128")
    rate = (limits.fp64_rate if double else limits.fp32_rate) / limits.multiprocessors
    multiplies = real * tm * tn * BK
    reads = BK * (tm + tn) * element.sum_bytes // VECTOR_BYTES
    loads = bm * BK // (operands.vector_x * threads) + bn * BK // (operands.vector_w * threads)
    share = multiplies / (multiplies + reads + 12 * loads + 24)
    held = min(resident(limits, threads, registers, shared_bytes))
    busiest = -(-blocks // limits.multiprocessors)
    warps = min(busiest, max(1, held)) * threads / WARP
    compute = busiest * done / max(1, blocks) / (rate * share * min(1.0, warps / LATENCY_WARPS))
    moved = blocks * steps * BK * (bm + bn) * element.bytes
    partial = 2 * product.m * product.n * product.groups * splits * element.sum_bytes
    stored = operands.least_bytes + (partial if splits > 1 else 0)
    times = {
        "instructions": compute,
        "memory": stored / limits.bandwidth,
        "L2 cache": moved / (L2_FACTOR * limits.bandwidth),
    }
    return slowest(done, least, moved, operands.least_bytes, times)
