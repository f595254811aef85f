"""Plans of separable convolutions: kernels/separable.cu, or two launches with an array between them.

The model. A step of a block has two halves, the product of one step and the depthwise sums of the next, which different
warps compute at the same time. It takes as long as the slowest of

* the tensor cores: the tile's products, at the rate of mma.sync;
* multiply-adds of the depthwise sums, which are done again for every tile of filters;
* instructions: four a cycle, counted from the kernel;
* shared memory and L1: fragments, copies, and every vector of x and of the taps, 128 bytes a cycle;

of all blocks that a multiprocessor holds, or as long as one block alone: its warps compute what they have loaded. Before
the first step and behind the last one a block has nothing that overlaps. A launch takes as long as its busiest
multiprocessor, or as the memory or the L2 cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan.conv import plan_conv
from cuconv.plan.cost import L2_FACTOR, LAUNCH_SECONDS
from cuconv.plan.depthwise import plan_depthwise
from cuconv.plan.depthwise_problem import CHEAP_ACTIVATIONS, inputs_of
from cuconv.plan.mma import OLDEST, RATE_SHARE, RESULT_PADDING, SHARED_BYTES_A_CYCLE
from cuconv.plan.occupancy import resident
from cuconv.plan.types import (
    ACTIVATION_CODES,
    ELEMENTS,
    INT32_MAX,
    REGISTERS_PER_THREAD,
    WARP,
    Cost,
    DeviceLimits,
    Element,
    LaunchPlan,
    PlanError,
    index_bytes,
    vector,
)

# Rows, columns of a block's tile, then of a warp's, bytes of a step in a row; from large to small. Tiles of 256 filters
# do the depthwise sums of as many only once; their warps of 64 x 64 read the least from shared memory.
TILES: tuple[tuple[int, int, int, int, int], ...] = (
    (128, 256, 64, 64, 128),  # 8 warps, 128 sums a thread
    (64, 256, 64, 64, 128),  # 4 warps
    (128, 256, 64, 64, 64),
    (64, 256, 64, 64, 64),
    (64, 256, 32, 64, 128),  # 8 warps, 64 sums a thread
    (128, 128, 64, 32, 128),
    (64, 128, 32, 32, 128),
    (32, 256, 32, 64, 64),  # 4 warps
    (64, 64, 32, 32, 128),
    (128, 32, 32, 32, 64),
    (32, 64, 16, 32, 128),
)
OUTPUTS = (4, 8, 2, 1)  # of a group
MOST_TAPS = 5  # at a time, whose weights wait in registers
REGISTERS_OF_INDICES = 44  # beside sums, weights, fragments and loads; ptxas reports at most this many
ISSUE_SHARE = 0.85  # of the issue slots those that a warp scheduler finds something for
MEMORY_CYCLES = 700  # from a load to its value
CHOICE_FACTOR = 1.02  # a tile listed earlier is taken unless another one is predicted to be this much faster


@dataclass(frozen=True)
class SeparablePlan:
    """`fused`, one launch for the arrays (x, depthwise_w, pointwise_w, bias, y), where that is predicted to be faster.

    Attributes:
        depthwise: otherwise the first of two, for the arrays (x, depthwise_w, None, middle); why stands in `rejected`.
    """

    fused: LaunchPlan | None
    depthwise: LaunchPlan


@functools.lru_cache(maxsize=4096)
def plan_separable(
    shape: ConvShape, filters: int, dtype: str, activation: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> SeparablePlan:
    """The faster of one launch and two.

    Args:
        shape: of the depthwise part.
        filters: of the pointwise part.
        activation: a name of ACTIVATION_CODES.
        aligned: elements by which x, both kernels and y lie behind a 16-byte boundary.
    """
    depthwise = plan_depthwise(shape, dtype, "linear", (aligned[0], aligned[1], 0), limits)
    mixing = plan_conv(pointwise_shape(shape, filters), dtype, activation, (0, aligned[2], aligned[3]), limits)
    pair = _seconds(depthwise) + _seconds(mixing)
    try:
        fused = plan_fused(shape, filters, dtype, activation, aligned, limits)
    except PlanError as error:
        return SeparablePlan(None, _rejecting(depthwise, str(error)))
    if _seconds(fused) < pair:
        return SeparablePlan(_rejecting(fused, f"two launches: {pair * 1e6:.1f} us predicted"), depthwise)
    return SeparablePlan(None, _rejecting(depthwise, f"separable: {_seconds(fused) * 1e6:.1f} us predicted"))


def pointwise_shape(shape: ConvShape, filters: int) -> ConvShape:
    """The pointwise convolution behind the depthwise `shape`."""
    ones, none, sizes = (1,) * shape.rank, (0,) * shape.rank, shape.out_size
    return ConvShape(shape.batch, sizes, sizes, shape.filters, filters, ones, ones, ones, none, 1, shape.data_format)


@dataclass(frozen=True)
class _Candidate:
    """A tile and a group that fit, and what they cost."""

    bm: int
    bn: int
    wm: int
    wn: int
    bk: int
    outputs: int  # of a group
    vec: int  # channels of z that a thread has
    taps: int  # at a time
    row_groups: int
    phases: int
    groups: int
    blocks: int
    tiles_n: int
    registers: int
    min_blocks: int
    shared_bytes: int
    cost: Cost
    bound: str

    @property
    def threads(self) -> int:
        return self.bm // self.wm * (self.bn // self.wn) * WARP

    def __str__(self) -> str:
        tile = f"tile {self.bm}x{self.bn}x{self.bk}, {self.wm}x{self.wn} a warp"
        return f"separable, {tile}, {self.outputs} outputs of {self.vec} channels a thread, {self.taps} taps at a time"


def plan_fused(
    shape: ConvShape, filters: int, dtype: str, activation: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> LaunchPlan:
    """The launch of kernels/separable.cu; arguments as :func:`plan_separable`.

    Raises:
        PlanError: it does not compute this problem.
    """
    _require(shape, filters, dtype, limits)
    element = ELEMENTS[dtype]
    rank, multiplier, middle = shape.rank, shape.depth_multiplier, shape.filters
    widest = vector(element.bytes, middle, aligned[1])
    vector_w = vector(element.bytes, filters, aligned[2])
    found = []
    for tile in TILES:
        for outputs in OUTPUTS:
            for vec in (widest, widest // 2):
                if vec and _source_width(vec, multiplier, aligned[0]):
                    found.append(
                        _candidate(
                            tile, outputs, vec, vector_w, shape, filters, element, activation, aligned[0], limits
                        )
                    )
    fitting = [each for each in found if each is not None]
    if not fitting:
        raise PlanError(f"separable: no tile fits {limits.name}")
    least = min(each.cost.seconds for each in fitting)
    best = next(each for each in fitting if each.cost.seconds <= CHOICE_FACTOR * least)
    others = sorted((each for each in fitting if each is not best), key=lambda each: each.cost.seconds)

    inner = shape.kernel_size[-1]
    x_size = shape.batch * math.prod(shape.in_size) * shape.in_channels
    y_size = shape.batch * math.prod(shape.out_size) * filters
    # Behind the last output of a group, group of a tile and channel of a step, indices are computed all the same.
    ahead = best.outputs * best.phases
    ends = [
        (n + (p + ahead) * s + 2 * k_eff + pad) * d
        for n, p, s, k_eff, pad, d in zip(
            shape.in_size,
            shape.out_size,
            shape.strides,
            shape.k_eff,
            shape.pad_before,
            shape.dilation_rate,
            strict=True,
        )
    ]
    rows = math.prod(shape.in_size[1:]) * max(ends) * shape.in_channels
    width = index_bytes(
        2 * (x_size + rows),
        2 * y_size + ahead * filters,
        (math.prod(shape.kernel_size) + inner) * middle,
        (middle + 2 * best.bk) * filters + best.bn,
        best.groups + best.bm,
        *(4 * end for end in ends),
    )
    constants: tuple[tuple[str, int | str], ...] = (
        ("ELEMENT", element.c_type),
        ("INDEX", "int" if width == 4 else "long long"),
        ("RANK", rank),
        ("ACTIVATION", ACTIVATION_CODES[activation]),
        ("MULTIPLIER", multiplier),
        ("BM", best.bm),
        ("BN", best.bn),
        ("BK", best.bk),
        ("WM", best.wm),
        ("WN", best.wn),
        ("PRECISION", 0),
        ("MIN_BLOCKS", best.min_blocks),
        ("VEC", best.vec),
        ("XV", _source_width(best.vec, multiplier, aligned[0])),
        ("TP", best.outputs),
        ("SG", _step(shape) if best.outputs > 1 else 1),
        ("KC", best.taps),
        ("KT", inner % best.taps),
        ("VECW", vector_w),
        ("VECY", vector(element.bytes, filters, aligned[3])),
    )
    useful = 100 * best.cost.least_flops / max(1, best.cost.flops)
    return LaunchPlan(
        kernel="separable",
        constants=constants,
        integers=(
            best.groups,
            best.tiles_n,
            shape.in_channels,
            middle,
            filters,
            best.phases,
            best.row_groups,
            math.prod(shape.kernel_size[:-1]),
            inner // best.taps,
            *shape.in_size,
            *shape.out_size,
            *shape.strides,
            *shape.dilation_rate,
            *shape.pad_before,
            *(k * d for k, d in zip(shape.kernel_size, shape.dilation_rate, strict=True)),
        ),
        grid=(best.blocks, 1, 1),
        block=(best.threads, 1, 1),
        index_bytes=width,
        shared_bytes=best.shared_bytes,
        dynamic_shared_bytes=best.shared_bytes,
        registers=best.registers,
        reason=f"{best}; {useful:.0f} % of its operations count, depthwise sums {best.tiles_n} times, {best.bound}",
        rejected=tuple(f"{each}: {each.cost.seconds * 1e6:.1f} us predicted, {each.bound}" for each in others[:4]),
        cost=best.cost,
    )


def _require(shape: ConvShape, filters: int, dtype: str, limits: DeviceLimits) -> None:
    """Raises PlanError with the reason for what the kernel does not compute."""
    if dtype not in ("float16", "bfloat16"):
        raise PlanError(f"separable: only 16-bit elements, which tensor cores multiply as they are, not {dtype}")
    if shape.data_format != CHANNELS_LAST:
        raise PlanError("separable: only channels last, where a step has neighbouring channels")
    if limits.capability < OLDEST:
        raise PlanError(f"separable: mma.sync as it is used here begins with sm_80, {limits.name} is {limits.arch}")
    if 0 in (shape.batch, *shape.in_size, *shape.out_size, shape.filters, filters):
        raise PlanError("separable: an array without elements")


def _source_width(vec: int, multiplier: int, aligned: int) -> int:
    """Channels of x that `vec` channels of z read, as one access; 0 where that cannot be."""
    if multiplier % vec == 0:
        return 1
    width, odd = divmod(vec, multiplier)
    return 0 if odd or aligned % width else width


def _step(shape: ConvShape) -> int:
    """Inputs from one output of a group to the next, in units of the dilation; 1 tap has no second to be away from."""
    if shape.kernel_size[-1] == 1:
        return shape.strides[-1]
    return shape.strides[-1] // math.gcd(shape.strides[-1], shape.dilation_rate[-1])


def _candidate(
    tile: tuple[int, int, int, int, int],
    outputs: int,
    vec: int,
    vector_w: int,
    shape: ConvShape,
    filters: int,
    element: Element,
    activation: str,
    aligned: int,
    limits: DeviceLimits,
) -> _Candidate | None:
    """One tile and group with its cost, or None where they do not fit."""
    bm, bn, wm, wn, step_bytes = tile
    bk = step_bytes // element.bytes
    warps = bm // wm * (bn // wn)
    threads = warps * WARP
    inner, outer = shape.kernel_size[-1], math.prod(shape.kernel_size[:-1])
    step = _step(shape) if outputs > 1 else 1
    if bn // vector_w > threads or bm * bk < outputs * vec * threads or (step >= inner and outputs > 2):
        return None

    # Groups.
    length, dilation = shape.out_size[-1], shape.dilation_rate[-1] if inner > 1 else 1
    phases = 1 if outputs == 1 else min(length, dilation // math.gcd(shape.strides[-1], dilation))
    row_groups = phases * -(-(-(-length // phases)) // outputs)
    groups = shape.batch * math.prod(shape.out_size[:-1]) * row_groups
    tiles_n = -(-filters // bn)
    blocks = -(-groups * outputs // bm) * tiles_n
    if blocks > INT32_MAX:
        return None

    # Shared memory and registers; fewer taps at a time where those do not suffice.
    place = (shape.rank + 3) * 8
    shared = max(2 * (bm + bn) * bk, bm * (bn + RESULT_PADDING)) * element.bytes + bm // outputs * place
    if shared > limits.shared_bytes:
        return None
    x_vec = _source_width(vec, shape.depth_multiplier, aligned)
    sums, fragments = wm * wn // WARP, (wm // 16) * 4 + (wn // 8) * 2
    for taps in range(min(MOST_TAPS, inner), 0, -1):
        loads = -(-x_vec * element.bytes // 4) * min(6, inputs_of(outputs, taps, step))
        beside = max(fragments, (outputs + taps) * vec + loads)
        registers = -(-(sums + beside + REGISTERS_OF_INDICES) // 8) * 8
        if registers <= REGISTERS_PER_THREAD - 7:
            break
    else:
        return None
    held = min(resident(limits, threads, registers, shared))
    if not held:
        return None

    # A step, in cycles of a multiprocessor.
    share = next(share for known, share in reversed(RATE_SHARE.items()) if known <= limits.capability)
    clock = limits.fp32_rate / (2 * limits.fp32_lanes * limits.multiprocessors)
    tensor = 2 * bm * bn * bk / (limits.fp16_rate * share / limits.multiprocessors) * clock
    items = bm * bk // (outputs * vec)
    pieces = [(taps, inner // taps), *([(inner % taps, 1)] if inner % taps else [])]
    x_loads = outer * sum(count * inputs_of(outputs, n, step) for n, count in pieces)
    sum_instructions = x_loads * (3 + x_vec) + outer * inner * vec * (outputs + 1) + outer * (12 * len(pieces) + 20)
    sum_instructions += outer * inner * 2 + outputs * (2 * vec + 3) + 40
    products = wm // 16 * (wn // 8) * (bk // 16)
    fragment_loads = (wm // 16 + wn // 16) * (bk // 16)
    copies = bk * bn // (vector_w * WARP)
    issue = (items / WARP * sum_instructions + warps * (products + fragment_loads + 30) + 4 * copies) / 4 / ISSUE_SHARE
    adds = items * outputs * vec * outer * inner / limits.fp32_lanes
    read = items / WARP * (x_loads * x_vec * vec * WARP / vec + outer * inner * bk) * element.bytes
    banks = (warps * (wm + wn) + 2 * bm + bn) * bk * element.bytes
    shared_cycles = (read + banks) / SHARED_BYTES_A_CYCLE
    times = {
        "bound by tensor cores": tensor,
        "bound by multiply-adds": adds,
        "bound by instructions": issue,
        "bound by shared memory": shared_cycles,
    }
    bound = max(times, key=lambda each: times[each])
    summing = max(items / WARP * sum_instructions / 4 / ISSUE_SHARE, adds)
    alone = max(times[bound], 2 * summing) + MEMORY_CYCLES

    # A block, a launch.
    steps = -(-shape.filters // bk)
    busiest = -(-blocks // limits.multiprocessors)
    finish = 2 if activation in CHEAP_ACTIVATIONS else 30
    store = max(2 * bm * bn * element.bytes / SHARED_BYTES_A_CYCLE, bm * bn / WARP * (finish + 2) / 4)
    ends = 2 * MEMORY_CYCLES + summing + tensor + store
    busy, waiting = steps * times[bound] + store, ((steps - 1) * alone + ends) / min(held, busiest)
    if busy < waiting:
        bound = "bound by latency"
    compute = busiest * max(busy, waiting) / clock
    positions = shape.batch * math.prod(shape.out_size)
    reach = sum((k_eff - 1) * math.prod(shape.in_size[a + 1 :]) for a, k_eff in enumerate(shape.k_eff))
    in_positions = shape.batch * math.prod(shape.in_size)
    inputs = min(bm * inner * outer, bm * in_positions // positions + reach)
    moved = blocks * (inputs * shape.in_channels + (bn + outer * inner) * shape.filters) * element.bytes
    moved += positions * filters * element.bytes
    arrays = in_positions * shape.in_channels + (outer * inner + filters) * shape.filters + positions * filters
    least_bytes = (arrays + filters) * element.bytes
    memory = max(least_bytes / limits.bandwidth, moved / (L2_FACTOR * limits.bandwidth))
    if memory > compute:
        bound = "bound by memory"
    least_flops = 2 * positions * shape.filters * (outer * inner + filters)
    flops = 2 * blocks * bm * steps * bk * (outer * inner + bn)
    cost = Cost(flops, least_flops, moved, least_bytes, max(compute, memory) + LAUNCH_SECONDS)
    return _Candidate(
        bm,
        bn,
        wm,
        wn,
        bk,
        outputs,
        vec,
        taps,
        row_groups,
        phases,
        groups,
        blocks,
        tiles_n,
        registers,
        1,
        shared,
        cost,
        bound,
    )


def _seconds(plan: LaunchPlan) -> float:
    return plan.cost.seconds if plan.cost else math.inf


def _rejecting(plan: LaunchPlan, *words: str) -> LaunchPlan:
    return dataclasses.replace(plan, rejected=(*plan.rejected, *words))
