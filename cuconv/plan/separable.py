"""Plans of separable convolutions: kernels/separable.cu, or two launches with an array between them.

The model. A step of a block has two halves, the product of one step and the depthwise sums of the next, which different
warps compute at the same time. It takes as long as the slowest of

* the tensor cores: the tile's products, at the rate of mma.sync;
* multiply-adds of the depthwise sums, which are done again for every tile of filters;
* instructions: four a cycle, counted from the kernel;
* shared memory and L1: fragments, copies, and every vector of x and of the taps, 128 bytes a cycle;

of all blocks that a multiprocessor holds, or as long as one block alone: its warps compute what they have loaded.
Before the first step and behind the last one a block has nothing that overlaps. A launch takes as long as its busiest
multiprocessor, or as the memory or the L2 cache.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import cached_property

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan.conv import plan_conv
from cuconv.plan.cost import L2_FACTOR, LAUNCH_SECONDS
from cuconv.plan.depthwise import plan_depthwise
from cuconv.plan.depthwise_problem import CHEAP_ACTIVATIONS, inputs_of
from cuconv.plan.mma import OLDEST, RESULT_PADDING, SHARED_BYTES_A_CYCLE, rate_share
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

# Rows, columns of a block's tile, then of a warp's, bytes of a step in a row; from large to small. Tiles of as many
# filters as there are do the depthwise sums once; warps of 64 x 64 read the least from shared memory.
TILES: tuple[tuple[int, int, int, int, int], ...] = (
    (128, 256, 64, 64, 128),  # 8 warps, 128 sums a thread
    (64, 256, 64, 64, 128),  # 4 warps
    (64, 512, 64, 64, 128),  # 8 warps
    (64, 256, 64, 64, 64),
    (64, 256, 32, 64, 128),  # 8 warps, 64 sums a thread
    (128, 128, 64, 32, 128),
    (64, 128, 32, 32, 128),
    (32, 256, 32, 64, 128),  # 4 warps, 64 sums a thread
    (64, 64, 32, 32, 128),
    (128, 32, 32, 32, 64),
    (32, 64, 16, 32, 128),
)
# Outputs of a group and channels of z that a thread has at most.
SHARES = ((8, 4), (4, 8), (4, 4), (2, 8), (1, 8))
STAGED = (True, False)  # whether inputs pass through shared memory
STAGED_BYTES = 128  # of a step in a row, of tiles that stage x: rows of xs then fill the banks
MOST_TAPS = 5  # at a time, whose weights wait in registers; of more taps a window of inputs does, where it fits
REGISTERS_OF_INDICES = {True: 31, False: 38}  # beside sums, weights, fragments and loads; by whether x is staged
ISSUE_SHARE = 0.85  # of the issue slots those that a warp scheduler finds something for
MEMORY_CYCLES, SHARED_CYCLES = 700, 100  # from a load to its value, and a barrier
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
    try:
        fused = plan_fused(shape, filters, dtype, activation, aligned, limits)
    except PlanError as error:
        return SeparablePlan(None, depthwise.rejecting(str(error)))
    pointwise = plan_conv(pointwise_shape(shape, filters), dtype, activation, (0, *aligned[2:]), limits)
    pair = depthwise.seconds + pointwise.seconds
    if fused.seconds < pair:
        return SeparablePlan(fused.rejecting(f"two launches: {pair * 1e6:.1f} us predicted"), depthwise)
    return SeparablePlan(None, depthwise.rejecting(fused.prediction))


def pointwise_shape(shape: ConvShape, filters: int) -> ConvShape:
    """The pointwise convolution behind the depthwise `shape`."""
    ones, none, sizes = (1,) * shape.rank, (0,) * shape.rank, shape.out_size
    return ConvShape(shape.batch, sizes, sizes, shape.filters, filters, ones, ones, ones, none, 1, shape.data_format)


def plan_fused(
    shape: ConvShape, filters: int, dtype: str, activation: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> LaunchPlan:
    """The launch of kernels/separable.cu; arguments as :func:`plan_separable`.

    Raises:
        PlanError: it does not compute this problem.
    """
    _require(shape, filters, dtype, limits)
    problem = _Problem(shape, filters, ELEMENTS[dtype], activation, aligned, limits)
    found = [
        candidate
        for tile in TILES
        for outputs, vec in problem.shares
        for staged in STAGED
        if (candidate := _candidate(problem, tile, outputs, vec, staged)) is not None
    ]
    if not found:
        raise PlanError(f"separable: no tile fits {limits.name}")
    least = min(each.cost.seconds for each in found)
    best = next(each for each in found if each.cost.seconds <= CHOICE_FACTOR * least)
    others = sorted((each for each in found if each is not best), key=lambda each: each.cost.seconds)
    useful = 100 * best.cost.least_flops / max(1, best.cost.flops)
    times = "once" if best.tiles_n == 1 else f"{best.tiles_n} times"
    return LaunchPlan(
        kernel="separable",
        constants=(
            ("ELEMENT", problem.element.c_type),
            ("INDEX", "int" if problem.index_bytes == 4 else "long long"),
            ("RANK", shape.rank),
            ("ACTIVATION", ACTIVATION_CODES[activation]),
            ("MULTIPLIER", problem.multiplier),
            ("BM", best.bm),
            ("BN", best.bn),
            ("BK", best.bk),
            ("WM", best.wm),
            ("WN", best.wn),
            ("PRECISION", 0),
            ("UNIT", int(shape.dilation_rate[-1] == 1)),
            ("VEC", best.vec),
            ("XV", problem.source_width(best.vec)),
            ("TP", best.outputs),
            ("SG", problem.step(best.outputs)),
            ("KC", best.taps),
            ("KT", problem.inner % best.taps),
            ("ROLLING", int(best.rolling)),
            ("STAGED", int(best.rows > 0)),
            ("VECX", problem.vector_x if best.rows else 1),
            ("VECW", problem.vector_w),
            ("VECY", vector(problem.element.bytes, filters, aligned[3])),
        ),
        integers=(
            best.groups,
            best.tiles_n,
            problem.inputs,
            best.rows,
            shape.in_channels,
            shape.filters,
            filters,
            best.phases,
            best.row_groups,
            problem.outer,
            problem.inner // best.taps,
            *shape.in_size,
            *shape.out_size,
            *shape.strides,
            *shape.dilation_rate,
            *shape.pad_before,
            *(k * d for k, d in zip(shape.kernel_size, shape.dilation_rate, strict=True)),
        ),
        grid=(best.blocks, 1, 1),
        block=(best.threads, 1, 1),
        index_bytes=problem.index_bytes,
        shared_bytes=best.shared_bytes,
        dynamic_shared_bytes=best.shared_bytes,
        registers=best.registers,
        reason=f"{best}; {useful:.0f} % of its operations count, depthwise sums {times}, bound by {best.cost.bound}",
        rejected=tuple(
            f"{each}: {each.cost.seconds * 1e6:.1f} us predicted, bound by {each.cost.bound}" for each in others[:4]
        ),
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


@dataclass(frozen=True)
class _Problem:
    """A separable convolution as the kernel sees it."""

    shape: ConvShape
    filters: int
    element: Element
    activation: str
    aligned: tuple[int, ...]
    limits: DeviceLimits

    @cached_property
    def inner(self) -> int:
        """Taps of the innermost axis."""
        return self.shape.kernel_size[-1]

    @cached_property
    def outer(self) -> int:
        """Taps of the other axes together."""
        return math.prod(self.shape.kernel_size[:-1])

    @cached_property
    def multiplier(self) -> int:
        """Channels of z that an input channel makes."""
        return self.shape.depth_multiplier

    @cached_property
    def inputs(self) -> int:
        """Positions of x, of all items."""
        return math.prod((self.shape.batch, *self.shape.in_size))

    @cached_property
    def positions(self) -> int:
        """Positions of y, of all items."""
        return math.prod((self.shape.batch, *self.shape.out_size))

    @cached_property
    def reach(self) -> int:
        """Positions of x from the first to the last that an output reads."""
        shape = self.shape
        return sum((k_eff - 1) * math.prod(shape.in_size[a + 1 :]) for a, k_eff in enumerate(shape.k_eff))

    @cached_property
    def vector_x(self) -> int:
        """Elements of a copy of x."""
        return vector(self.element.bytes, self.shape.in_channels, self.aligned[0])

    @cached_property
    def vector_w(self) -> int:
        """Elements of a copy of w."""
        return vector(self.element.bytes, self.filters, self.aligned[2])

    @cached_property
    def shares(self) -> tuple[tuple[int, int], ...]:
        """SHARES, with as many channels as x and the taps can be accessed by."""
        widest = vector(self.element.bytes, self.shape.filters, self.aligned[1])
        while not self.source_width(widest):
            widest //= 2
        return tuple(dict.fromkeys((outputs, min(vec, widest)) for outputs, vec in SHARES))

    def source_width(self, vec: int) -> int:
        """Channels of x that `vec` channels of z read, as one access; 0 where that cannot be."""
        if self.multiplier % vec == 0:
            return 1
        width, odd = divmod(vec, self.multiplier)
        return 0 if odd or self.aligned[0] % width else width

    def step(self, outputs: int) -> int:
        """Inputs from one output of a group to the next, in units of the dilation."""
        stride, dilation = self.shape.strides[-1], self.shape.dilation_rate[-1]
        if outputs == 1:
            return 1
        return stride if self.inner == 1 else stride // math.gcd(stride, dilation)

    def phases(self, outputs: int) -> int:
        """Phases of the innermost axis."""
        if outputs == 1 or self.inner == 1:
            return 1
        dilation = self.shape.dilation_rate[-1]
        return int(min(self.shape.out_size[-1], dilation // math.gcd(self.shape.strides[-1], dilation)))

    def rows(self, outputs: int, groups: int, row_groups: int) -> int:
        """Positions of x from the first to the last that `groups` groups read; 0 where those are not in order."""
        shape = self.shape
        steps = [s * math.prod(shape.in_size[a + 1 :]) for a, s in enumerate(shape.strides)]
        rows = (groups * outputs - 1) * steps[-1] + self.reach + 1
        for a in range(shape.rank):
            # From the last output of the axes from `a` on to the first of the next row, plane or item.
            ends = sum((n - 1) * step for n, step in zip(shape.out_size[a:], steps[a:], strict=True))
            jump = (steps[a - 1] if a else math.prod(shape.in_size)) - ends
            if jump < 0:
                return 0
            jumps = -(-(groups - 1) // (row_groups * math.prod(shape.out_size[a:-1])))
            rows += jumps * max(0, jump - steps[-1])
        return rows

    @cached_property
    def index_bytes(self) -> int:
        """Of the kernel's Index. Behind the last output, group and channel indices are computed all the same."""
        shape, most = self.shape, max(tile[0] for tile in TILES)
        ahead = max(outputs * self.phases(outputs) for outputs, _ in SHARES)
        axes = zip(shape.in_size, shape.out_size, shape.strides, shape.k_eff, shape.dilation_rate, strict=True)
        ends = [n + (p + ahead) * s + 2 * k_eff + MOST_TAPS * d for n, p, s, k_eff, d in axes]
        behind = max(pad + end for pad, end in zip(shape.pad_before, ends, strict=True))
        items = -(-most // (math.prod(shape.out_size))) + shape.batch
        return index_bytes(
            2 * (items * math.prod(shape.in_size) + behind * math.prod(shape.in_size[1:])) * shape.in_channels,
            2 * (items * math.prod(shape.out_size) + ahead) * self.filters,
            math.prod(shape.kernel_size) * 2 * shape.filters,
            (shape.filters + 4 * most) * self.filters,
            2 * behind,
        )


@dataclass(frozen=True)
class _Candidate:
    """A tile and a group that fit, and what they cost."""

    bm: int
    bn: int
    bk: int
    wm: int
    wn: int
    outputs: int  # of a group
    vec: int  # channels of z that a thread has
    taps: int  # at a time
    rolling: bool  # a window of inputs waits in registers
    phases: int
    row_groups: int
    groups: int
    tiles_n: int
    blocks: int
    rows: int  # positions of x that are staged for a tile; 0: none are
    registers: int
    shared_bytes: int
    cost: Cost

    @property
    def threads(self) -> int:
        return self.bm // self.wm * (self.bn // self.wn) * WARP

    def __str__(self) -> str:
        tile = f"tile {self.bm}x{self.bn}x{self.bk}, {self.wm}x{self.wn} a warp"
        each = f"{self.outputs} outputs of {self.vec} channels a thread, "
        each += "windows in registers" if self.rolling else f"{self.taps} taps at a time"
        return f"separable, {tile}, {each}, inputs {f'of {self.rows} positions staged' if self.rows else 'not staged'}"


def _candidate(
    problem: _Problem, tile: tuple[int, int, int, int, int], outputs: int, vec: int, staged: bool
) -> _Candidate | None:
    """One tile and group with its cost, or None where they do not fit."""
    bm, bn, wm, wn, step_bytes = tile
    shape, filters, limits, bytes_ = problem.shape, problem.filters, problem.limits, problem.element.bytes
    inner, outer, step = problem.inner, problem.outer, problem.step(outputs)
    bk = step_bytes // bytes_
    warps = bm // wm * (bn // wn)
    threads = warps * WARP
    if bn // problem.vector_w > threads or (bn - wn >= filters and tile != TILES[-1]):
        return None  # copies of w are not shared evenly, or warps have nothing to do
    if bm * bk < outputs * vec * threads or (step >= inner and outputs > 2):
        return None  # threads have nothing to do, or neighbours share no inputs

    # Groups.
    phases = problem.phases(outputs)
    row_groups = phases * math.ceil(math.ceil(shape.out_size[-1] / phases) / outputs)
    groups = shape.batch * math.prod(shape.out_size[:-1]) * row_groups
    tiles_n = -(-filters // bn)
    blocks = -(-groups * outputs // bm) * tiles_n
    if blocks > INT32_MAX:
        return None

    # Shared memory and registers; fewer taps at a time where those do not suffice.
    place = (shape.rank + 3) * problem.index_bytes
    shared = max(2 * (bm + bn) * step_bytes, bm * (bn + RESULT_PADDING) * bytes_) + bm // outputs * place
    rows = 0
    if staged:
        if step_bytes != STAGED_BYTES or problem.multiplier > 1 or problem.vector_x == 1 or phases > 1:
            return None
        rows = problem.rows(outputs, bm // outputs, row_groups)
        if not rows:
            return None
        shared = -(-shared // STAGED_BYTES) * STAGED_BYTES + 2 * rows * step_bytes
    if shared > limits.shared_bytes:
        return None
    x_vec = problem.source_width(vec)
    sums, fragments = wm * wn // WARP, (wm // 16) * 4 + (wn // 8) * 2
    ways = [(outputs, True)] if inner > MOST_TAPS and step == 1 and outputs > 1 else []
    for taps, rolling in (*ways, *((taps, False) for taps in range(min(MOST_TAPS, inner), 0, -1))):
        in_flight = -(-x_vec * bytes_ // 4) * min(12, inputs_of(outputs, taps, step))
        waiting = 2 * vec + outputs * x_vec + 16 if rolling else taps * vec + in_flight
        beside = max(fragments, outputs * vec + waiting)
        registers = -(-(sums + beside + REGISTERS_OF_INDICES[staged]) // 8) * 8
        registers += 8 if limits.capability >= (10, 0) else 0  # whose multiply-adds take registers in pairs
        if registers <= REGISTERS_PER_THREAD - 7:
            break
    else:
        return None
    held = min(resident(limits, threads, registers, shared))
    if not held:
        return None

    # A step, in cycles of a multiprocessor.
    clock = limits.clock
    tensor = 2 * bm * bn * bk / (limits.fp16_rate * rate_share(limits) / limits.multiprocessors) * clock
    items = bm * bk // (outputs * vec)
    pieces = [(taps, inner // taps), *([(inner % taps, 1)] if inner % taps else [])]
    x_loads = outer * sum(count * (each if rolling else inputs_of(outputs, each, step)) for each, count in pieces)
    x_loads += outer * (outputs - 1) * rolling
    summed = x_loads * (x_vec + (2 if staged else 4)) + outer * inner * (3 + vec * (outputs + 1))
    summed += outer * (10 * len(pieces) + 20) + outputs * (vec + 3) + 50
    products = wm // 16 * (wn // 8) * (bk // 16)
    fragment_loads = (wm // 16 + wn // 16) * (bk // 16)
    copies = 4 * bk * bn // (problem.vector_w * WARP) + 8 * rows * bk // (problem.vector_x * WARP)
    issue = (items / WARP * summed + warps * (products + fragment_loads + 30) + copies) / 4 / ISSUE_SHARE
    adds = items * outputs * vec * outer * inner / limits.fp32_lanes
    read = items * (x_loads * x_vec + outer * inner * bk / WARP) + warps * (wm + wn) * bk
    times = {
        "tensor cores": tensor,
        "multiply-adds": adds,
        "instructions": issue,
        "shared memory": (read + (bm + bn + rows) * bk) * bytes_ / SHARED_BYTES_A_CYCLE,
    }
    bound = max(times, key=lambda each: times[each])
    summing = max(items / WARP * summed / 4 / ISSUE_SHARE, adds)
    alone = max(times[bound], 2 * summing) + (SHARED_CYCLES if staged else MEMORY_CYCLES)

    # A block, a launch.
    steps = -(-shape.filters // bk)
    busiest = -(-blocks // limits.multiprocessors)
    finish = 2 if problem.activation in CHEAP_ACTIVATIONS else 30
    store = max(2 * bm * bn * bytes_ / SHARED_BYTES_A_CYCLE, bm * bn / WARP * (finish + 2) / 4)
    ends = 2 * MEMORY_CYCLES + summing + tensor + store
    busy, latency = steps * times[bound] + store, ((steps - 1) * alone + ends) / min(held, busiest)
    if busy < latency:
        bound = "latency"
    compute = busiest * max(busy, latency) / clock
    read_inputs = min(bm * inner * outer, bm * problem.inputs // problem.positions + problem.reach)
    moved = blocks * (read_inputs * shape.in_channels + (bn + outer * inner) * shape.filters) * bytes_
    moved += problem.positions * filters * bytes_
    arrays = problem.inputs * shape.in_channels + problem.positions * filters
    least_bytes = (arrays + (outer * inner + filters) * shape.filters + filters) * bytes_
    memory = max(least_bytes / limits.bandwidth, moved / (L2_FACTOR * limits.bandwidth))
    if memory > compute:
        bound = "memory"
    least_flops = 2 * problem.positions * shape.filters * (outer * inner + filters)
    flops = 2 * blocks * bm * steps * bk * (outer * inner + bn)
    cost = Cost(flops, least_flops, moved, least_bytes, max(compute, memory) + LAUNCH_SECONDS, bound)
    return _Candidate(
        bm,
        bn,
        bk,
        wm,
        wn,
        outputs,
        vec,
        taps,
        rolling,
        phases,
        row_groups,
        groups,
        tiles_n,
        blocks,
        rows,
        registers,
        shared,
        cost,
    )
