"""Plans of kernel gradients on tensor cores: tiles, splits and accesses of kernels/kernel_grad_mma.cu."""

from __future__ import annotations

import dataclasses
import math

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan import mma
from cuconv.plan.occupancy import resident
from cuconv.plan.simt import CHOICE_FACTOR, Operands, Product
from cuconv.plan.types import MAX_GRID_X, WARP, DeviceLimits, Element, LaunchPlan, PlanError, vector

# Rows, columns of a block's tile, then of a warp's; from large to small.
TILES = (
    (128, 256, 64, 64),  # 256 threads, 128 sums each: for copies of two elements at least, others spill
    (128, 128, 64, 32),  # 256 threads, 64 sums each
    (128, 64, 64, 32),  # 128 threads: narrow, and as many sums a thread
    (64, 64, 32, 32),  # 128 threads, more blocks
    (64, 32, 32, 16),  # few filters
)
STEP_BYTES = 64  # of the positions of one step
MOST_TAPS = 4  # rows of a thread whose taps fit its registers


def plan_on_tensor_cores(
    shape: ConvShape,
    element: Element,
    aligned: tuple[int, ...],
    most: int,
    simt: LaunchPlan,
    limits: DeviceLimits,
) -> tuple[LaunchPlan, int]:
    """The launch with the lowest predicted time, and its splits.

    Args:
        aligned: elements by which x, dy and dw lie behind a 16-byte boundary.
        most: splits, at most.
        simt: the plan on the ordinary units; parameters are the same.

    Raises:
        PlanError: there are no such instructions for this device or dtype.
    """
    mma.require(element, limits)
    found = [each for tile in TILES if (each := _candidate(tile, shape, element, aligned, most, simt, limits))]
    if not found:
        raise PlanError("tensor cores: no tile fits")
    least = min(seconds(plan) for plan, _ in found)
    best = next(each for each in found if seconds(each[0]) <= CHOICE_FACTOR * least)
    lost = tuple(f"{plan.reason}: {seconds(plan) * 1e6:.1f} us predicted" for plan, _ in found if plan is not best[0])
    return dataclasses.replace(best[0], rejected=lost), best[1]


def seconds(plan: LaunchPlan) -> float:
    """Predicted."""
    return plan.cost.seconds if plan.cost else math.inf


def _candidate(
    tile: tuple[int, int, int, int],
    shape: ConvShape,
    element: Element,
    aligned: tuple[int, ...],
    most: int,
    simt: LaunchPlan,
    limits: DeviceLimits,
) -> tuple[LaunchPlan, int] | None:
    bm, bn, wm, wn = tile
    last = shape.data_format == CHANNELS_LAST
    bk, threads = STEP_BYTES // element.bytes, bm // wm * (bn // wn) * WARP
    channels, columns = shape.in_channels // shape.groups, shape.filters // shape.groups
    rows, positions = math.prod(shape.kernel_size) * channels, shape.batch * math.prod(shape.out_size)
    # Where taps and padding move nothing, all axes are one.
    in_size, out_size = shape.in_size, shape.out_size
    if max(shape.kernel_size) == 1 and max(shape.strides) == 1 and in_size == out_size:
        in_size = out_size = (*(1 for _ in in_size[1:]), math.prod(in_size))
    if last:
        vector_x = vector(element.bytes, channels, aligned[0])
        vector_d = vector(element.bytes, columns, aligned[1])
    else:
        # Neighbouring positions are one access where taps, padding and rows keep it whole and on its boundary.
        shift = shape.dilation_rate[-1] if shape.kernel_size[-1] > 1 else 0
        vector_x = vector(element.bytes, in_size[-1], out_size[-1], shape.pad_before[-1], shift, aligned[0])
        vector_x = vector_x if shape.strides[-1] == 1 else 1
        vector_d = vector(element.bytes, math.prod(out_size), aligned[1])
    large = wm * wn > 64 * WARP
    if large and (simt.index_bytes == 8 or min(vector_x, vector_d) < 2):
        return None  # it would spill

    blocks_m, blocks_n = -(-rows // bm), -(-columns // bn)
    tiles = blocks_m * blocks_n * shape.groups
    splits = Product(rows, columns, positions, shape.groups, most).splits(tiles, limits)
    chunk = -(-positions // (splits * bk)) * bk
    splits = -(-positions // chunk)
    if tiles * splits > MAX_GRID_X:
        return None
    target_bytes, target_aligned = (element.sum_bytes, 0) if splits > 1 else (element.bytes, aligned[2])

    one_tap = channels % bm == 0
    thread_rows = bm * bk // (vector_x * threads)
    table = 0
    if not one_tap and thread_rows > MOST_TAPS:
        table = bm // (vector_x if last else 1) * simt.index_bytes * (2 if shape.rank == 1 else 4)
    stage = bk * (bm + bn) * element.bytes
    stages = 4 if 2 * (4 * stage + table + 1024) <= limits.shared_bytes_per_multiprocessor else 3
    shared_bytes = stages * stage + table
    # With 128 registers two blocks of 256 threads are resident; copies of whole vectors leave that many.
    wide = last and simt.index_bytes == 4 and min(vector_x, vector_d) >= 4
    min_blocks = 2 if threads == 256 and wide and not large else 1
    copies = thread_rows + bn * bk // (vector_d * threads)
    registers = 128 if min_blocks == 2 else min(248, wm * wn // WARP + (wm + wn) // 4 + 4 * copies * shape.rank + 52)
    held = min(resident(limits, threads, registers, shared_bytes))
    if not held or shared_bytes > limits.shared_bytes:
        return None

    dw = rows * shape.filters
    least_bytes = (shape.batch * math.prod(shape.in_size) * shape.in_channels + positions * shape.filters + dw) * 2
    partial = 2 * splits * dw * element.sum_bytes if splits > 1 else 0
    operands = Operands(vector_x, vector_d, not last, True, simt.index_bytes, shape.rank, least_bytes + partial)
    sizes = (bm, bn, bk, wm, wn)
    part = Product(rows, columns, chunk, shape.groups)
    cost = mma.cost_of(part, element, operands, limits, sizes, copies, tiles * splits, held)
    known = dict(simt.constants)
    plan = LaunchPlan(
        kernel="kernel_grad_mma",
        constants=(
            *((name, known[name]) for name in ("ELEMENT", "INDEX", "RANK", "CHANNELS_FIRST")),
            ("SPLIT", int(splits > 1)),
            ("ONE_TAP", int(one_tap)),
            ("BM", bm),
            ("BN", bn),
            ("BK", bk),
            ("WM", wm),
            ("WN", wn),
            ("PRECISION", 0),
            ("STAGES", stages),
            ("VECX", vector_x),
            ("VECD", vector_d),
            ("VECW", vector(target_bytes, columns, target_aligned)),
            ("MIN_BLOCKS", min_blocks),
        ),
        integers=(
            positions,
            chunk,
            rows,
            columns,
            blocks_m,
            blocks_n,
            shape.groups,
            channels,
            *in_size,
            *out_size,
            *shape.kernel_size,
            *shape.strides,
            *shape.dilation_rate,
            *shape.pad_before,
        ),
        grid=(tiles * splits, 1, 1),
        block=(threads, 1, 1),
        index_bytes=simt.index_bytes,
        shared_bytes=shared_bytes,
        dynamic_shared_bytes=shared_bytes,
        registers=registers,
        reason=f"tensor cores, tile {bm}x{bn}x{bk}, {wm}x{wn} a warp; {splits} parts of {chunk} positions",
        cost=dataclasses.replace(cost, least_flops=2 * positions * dw, least_bytes=least_bytes),
    )
    return plan, splits
