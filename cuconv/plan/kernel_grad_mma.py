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
    (128, 256, 64, 64),  # 256 threads, 128 sums each: for 16-bit copies of pairs at least, others spill
    (128, 128, 64, 32),  # 256 threads, 64 sums each
    (128, 64, 64, 32),  # 128 threads: narrow, and as many sums a thread
    (64, 64, 32, 32),  # 128 threads, more blocks
    (64, 32, 32, 16),  # few filters
)
STEP_BYTES = {2: 64, 4: 64, 8: 128}  # of the positions of one step, by the bytes of an element
MOST_TAPS = 4  # rows of a thread whose taps fit its registers


def plan_on_tensor_cores(
    shape: ConvShape,
    element: Element,
    aligned: tuple[int, ...],
    most: int,
    simt: LaunchPlan,
    limits: DeviceLimits,
    precision: str = "highest",
) -> tuple[LaunchPlan, int]:
    """The launch with the lowest predicted time, and its splits.

    Args:
        aligned: elements by which x, dy and dw lie behind a 16-byte boundary.
        most: splits, at most.
        simt: the plan on the ordinary units; parameters are the same.
        precision: as of :func:`cuconv.plan.conv.plan_conv`.

    Raises:
        PlanError: there are no such instructions for this device or dtype, or they would be less exact.
    """
    mma.require(element, limits)
    products = mma.products_of(element, precision)
    # Parts are sums of their own. Those of the ordinary units are the shorter ones.
    if products == 3 and (depth := min(simt.integers[:2])) < mma.LEAST_DEPTH:
        raise PlanError(mma.less_exact(depth))
    found = [
        each for tile in TILES if (each := _candidate(tile, shape, element, aligned, most, simt, limits, products))
    ]
    if not found:
        raise PlanError("tensor cores: no tile fits")
    least = min(plan.seconds for plan, _ in found)
    best = next(each for each in found if each[0].seconds <= CHOICE_FACTOR * least)
    lost = tuple(plan.prediction for plan, _ in found if plan is not best[0])
    return dataclasses.replace(best[0], rejected=lost), best[1]


def _candidate(
    tile: tuple[int, int, int, int],
    shape: ConvShape,
    element: Element,
    aligned: tuple[int, ...],
    most: int,
    simt: LaunchPlan,
    limits: DeviceLimits,
    products: int,
) -> tuple[LaunchPlan, int] | None:
    bm, bn, wm, wn = tile
    precision = mma.precision_of(element, products)
    last = shape.data_format == CHANNELS_LAST
    bk, threads = STEP_BYTES[element.bytes] // element.bytes, bm // wm * (bn // wn) * WARP
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
    if large and (element.bytes != 2 or simt.index_bytes == 8 or min(vector_x, vector_d) < 2):
        return None  # it would spill

    blocks_m, blocks_n = -(-rows // bm), -(-columns // bn)
    tiles = blocks_m * blocks_n * shape.groups
    if products == 3:
        most = max(1, min(most, positions // mma.LEAST_DEPTH))
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
    # With 128 registers two blocks of 256 threads are resident; 16-bit copies of whole vectors leave that many.
    wide = last and element.bytes == 2 and simt.index_bytes == 4 and min(vector_x, vector_d) >= 4
    min_blocks = 2 if threads == 256 and wide and not large else 1
    copies = thread_rows + bn * bk // (vector_d * threads)
    fragments = (wm + wn) // 4 if products == 1 else 3 * (2 * wm + wn - 32) // 4
    held_words = (wm * wn // WARP + fragments) * element.sum_bytes // 4
    registers = 128 if min_blocks == 2 else min(248, held_words + 4 * copies * shape.rank + 52)
    held = min(resident(limits, threads, registers, shared_bytes))
    if not held or shared_bytes > limits.shared_bytes:
        return None

    dw = rows * shape.filters
    least_bytes = shape.batch * math.prod(shape.in_size) * shape.in_channels + positions * shape.filters + dw
    least_bytes *= element.bytes
    partial = 2 * splits * dw * element.sum_bytes if splits > 1 else 0
    operands = Operands(vector_x, vector_d, not last, True, simt.index_bytes, shape.rank, least_bytes + partial)
    sizes = (bm, bn, bk, wm, wn)
    part = Product(rows, columns, chunk, shape.groups)
    cost = mma.cost_of(part, element, operands, limits, sizes, copies, tiles * splits, held, products)
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
            ("PRECISION", precision),
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
        reason=f"{mma.UNITS[precision]}, tile {bm}x{bn}x{bk}, {wm}x{wn} a warp; {splits} parts of {chunk} positions",
        cost=dataclasses.replace(cost, least_flops=2 * positions * dw, least_bytes=least_bytes),
    )
    return plan, splits
