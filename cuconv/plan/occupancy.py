"""How many blocks of a launch a multiprocessor holds at once, and what keeps it from holding more."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cuconv.plan.types import REGISTERS_PER_MULTIPROCESSOR, WARP, DeviceLimits

REGISTER_UNIT = 8  # registers are given to the threads of a warp in multiples of this
DRIVER_SHARED_BYTES = 1024  # of shared memory a block, from sm_80 on
LIMITERS = ("threads", "registers", "shared memory", "blocks")
# Blocks of a multiprocessor at most, by compute capability, from the CUDA guide; later ones are like the last.
_MOST_BLOCKS = {(7, 5): 16, (8, 0): 32, (8, 6): 16, (8, 9): 24, (9, 0): 32, (12, 0): 24}


@dataclass(frozen=True)
class Occupancy:
    """Blocks that a multiprocessor holds (0: it cannot hold one), their share of its warps, and what limits them."""

    blocks: int
    share: float
    limiter: str  # one of LIMITERS


def resident(limits: DeviceLimits, threads: int, registers: int, shared_bytes: int) -> tuple[int, int, int, int]:
    """Blocks that a multiprocessor has room for: of threads, registers, shared memory, and in number."""
    threads = -(-threads // WARP) * WARP
    registers = -(-max(1, registers) // REGISTER_UNIT) * REGISTER_UNIT
    driver = DRIVER_SHARED_BYTES if limits.capability >= (8, 0) else 0
    return (
        limits.threads_per_multiprocessor // threads,
        REGISTERS_PER_MULTIPROCESSOR // (registers * threads),
        limits.shared_bytes_per_multiprocessor // max(1, shared_bytes + driver),
        _most_blocks(limits.capability),
    )


def occupancy(limits: DeviceLimits, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """The occupancy of blocks of `threads`, with `registers` a thread and `shared_bytes` a block."""
    rooms = resident(limits, threads, registers, shared_bytes)
    blocks = min(rooms)
    share = blocks * -(-threads // WARP) * WARP / limits.threads_per_multiprocessor
    return Occupancy(blocks, share, LIMITERS[rooms.index(blocks)])


@functools.cache
def _most_blocks(capability: tuple[int, int]) -> int:
    return next(most for known, most in reversed(_MOST_BLOCKS.items()) if known <= capability)
