"""Depthwise convolutions as their kernels see them, and the model by which candidates are compared.

The model. A launch takes as long as the slowest of three: the memory, with every array once and what walks or tiles
read twice, unless the L2 cache still holds it; the L1 caches, with every access; the instructions. Multiprocessors that
have nothing left at the end wait for the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan.cost import LAUNCH_SECONDS, slowest
from cuconv.plan.occupancy import resident
from cuconv.plan.types import (
    ACTIVATION_CODES,
    ELEMENTS,
    MAX_GRID_X,
    REGISTERS_PER_THREAD,
    DeviceLimits,
    Element,
    LaunchPlan,
    PlanError,
    index_bytes,
    vector,
)

THREADS = 128  # of a block, as in the kernels
CARRIED_TAPS = 8  # of depthwise_carry; with 8 taps of 8 channels 128 registers hold sums and weights
# Activations of a few instructions; the others take registers of their own, and about 30 instructions an output.
CHEAP_ACTIVATIONS = frozenset(
    ("linear", "relu", "relu6", "leaky_relu", "hard_sigmoid", "hard_silu", "hard_tanh", "hard_shrink", "soft_shrink")
)
# Inputs that depthwise_carry loads at once, a multiple of the taps: 8 loads of 16 bytes a thread keep the memory busy.
CARRIED_INPUTS = {1: 8, 2: 8, 3: 9, 4: 8, 5: 10, 6: 6, 7: 7, 8: 8}
BLOCKS_PER_MULTIPROCESSOR = 3  # that the gradients are compiled for
REGISTERS = 168  # that ptxas may then give a thread; from sm_100 on it spills a few when it needs them all
# Registers beside sums, weights and loads. ptxas reports at most this many over all variants and architectures.
REGISTERS_OF_INDICES = {"depthwise_carry": 24, "depthwise": 20, "depthwise_grad": 56, "depthwise_grads": 56}
CHOICE_FACTOR = 1.05  # a candidate listed earlier is taken unless another is predicted to be this much faster
SPECIAL_FACTOR = 1.1  # the same for a special kernel against depthwise.cu, which reads more from the caches


@dataclass(frozen=True)
class Axis:
    """One spatial axis, as struct Axis of kernels/depthwise.cuh; the source is read and the target written."""

    source: int
    target: int
    stride: int
    dilation: int
    pad: int
    taps: int
    common: int
    inverse: int
    source_pitch: int
    target_pitch: int
    tap_pitch: int


NO_AXIS = Axis(1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0)


@dataclass(frozen=True)
class Problem:
    """A depthwise convolution, or its transpose, as the kernels see it.

    Attributes:
        channels, filters: C and C * M.
        walk: the axis along which a thread takes several outputs; `outer`: the others.
    """

    batch: int
    channels: int
    filters: int
    first: bool  # channels_first
    transposed: bool
    walk: Axis
    outer: tuple[Axis, Axis]
    element: Element
    limits: DeviceLimits

    @cached_property
    def multiplier(self) -> int:
        """Output channels of an input channel."""
        return self.filters // self.channels

    @cached_property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        """All axes; those that the shape does not have are 1 long."""
        return (self.walk, *self.outer)

    @cached_property
    def source_positions(self) -> int:
        """Of a batch item."""
        return math.prod(axis.source for axis in self.axes)

    @cached_property
    def target_positions(self) -> int:
        """Of a batch item."""
        return math.prod(axis.target for axis in self.axes)

    @cached_property
    def source_channels(self) -> int:
        """Channels of the array that is read."""
        return self.filters if self.transposed else self.channels

    @cached_property
    def target_channels(self) -> int:
        """Channels of the array that is written."""
        return self.channels if self.transposed else self.filters

    @cached_property
    def source_size(self) -> int:
        """Elements."""
        return self.batch * self.source_positions * self.source_channels

    @cached_property
    def target_size(self) -> int:
        """Elements."""
        return self.batch * self.target_positions * self.target_channels

    @cached_property
    def weights(self) -> int:
        """Elements of w."""
        return math.prod(axis.taps for axis in self.axes) * self.filters

    @cached_property
    def phases(self) -> int:
        """Phases of the walked axis."""
        walk = self.walk
        return walk.dilation // walk.common * (walk.stride if self.transposed else 1)

    @cached_property
    def step(self) -> int:
        """Source steps from one output of a phase to the next."""
        return 1 if self.transposed else self.walk.stride // self.walk.common

    @cached_property
    def products(self) -> int:
        """Multiply-adds of real or complex numbers; those with padding are counted."""
        positions = self.source_positions if self.transposed else self.target_positions
        return self.batch * positions * self.weights

    @cached_property
    def flops(self) -> int:
        """Operations that the definition needs."""
        return self.products * (8 if self.element.is_complex else 2)

    @cached_property
    def least_bytes(self) -> int:
        """Every array once."""
        return (self.source_size + self.target_size + self.weights) * self.element.bytes

    @cached_property
    def fields(self) -> tuple[int, ...]:
        """The integers of struct Axis of every axis, one after the other."""
        return tuple(value for axis in self.axes for value in vars(axis).values())

    def index_bytes(self, walked: int, *others: int) -> int:
        """Of the kernel's Index; a thread takes `walked` outputs, whose last may lie behind the end."""
        items = max(0, self.batch - 1)
        inner = [self.source_positions, self.target_positions] if self.first else [1, 1]
        source = (items * self.source_positions + inner[0]) * self.source_channels
        target = (items * self.target_positions + inner[1]) * self.target_channels
        for axis, rounded in zip(self.axes, (walked * self.phases, 1, 1), strict=True):
            positions = axis.target + rounded
            reach = positions // axis.stride + 1 if self.transposed else positions * axis.stride
            source += (reach + axis.pad + (axis.taps + CARRIED_TAPS) * axis.dilation) * max(1, axis.source_pitch)
            target += positions * max(1, axis.target_pitch)
        return index_bytes(source, target, self.source_size, self.target_size, self.weights, *others)


def problem_of(shape: ConvShape, dtype: str, limits: DeviceLimits, transposed: bool = False) -> Problem:
    """`shape` with its axes in the roles that the kernels give them."""
    first = shape.data_format != CHANNELS_LAST
    channels, filters = shape.in_channels, shape.filters
    sizes = [shape.in_size, shape.out_size]
    pitches = []
    for size, depth in zip(sizes, (channels, filters), strict=True):
        inner = 1 if first else depth
        pitches.append([inner * math.prod(size[a + 1 :]) for a in range(shape.rank)])
    if transposed:
        sizes.reverse()
        pitches.reverse()
    axes = []
    for a in range(shape.rank):
        taps, stride = shape.kernel_size[a], shape.strides[a]
        # One tap has no second to be away from; a dilation like the stride makes it a walk of step 1.
        dilation = shape.dilation_rate[a] if taps > 1 else stride
        common = math.gcd(stride, dilation)
        every = stride // common
        axes.append(
            Axis(
                source=sizes[0][a],
                target=sizes[1][a],
                stride=stride,
                dilation=dilation,
                pad=shape.pad_before[a],
                taps=taps,
                common=common,
                inverse=pow(dilation // common, -1, every) if every > 1 else 0,
                source_pitch=pitches[0][a],
                target_pitch=pitches[1][a],
                tap_pitch=math.prod(shape.kernel_size[a + 1 :]) * filters,
            )
        )
    axes = [NO_AXIS] * (3 - shape.rank) + axes
    walk = axes.pop(1 if first else 2)
    return Problem(shape.batch, channels, filters, first, transposed, walk, (axes[0], axes[1]), ELEMENTS[dtype], limits)


# --- What candidates have in common ------------------------------------------------------------------------------


def words_of(element: Element) -> int:
    """Registers of a sum."""
    return element.sum_bytes // 4


def conversions_of(element: Element) -> int:
    """Instructions from an element to a sum."""
    return int(element.bytes == 2)


def finishing_of(activation: str, element: Element) -> int:
    """Instructions of bias, activation and rounding of one output."""
    return 1 + conversions_of(element) + (0 if activation in CHEAP_ACTIVATIONS else 30)


def slots_of(problem: Problem) -> float:
    """Issue slots of a multiply-add: of fp32 one; of fp64 as many as the device is slower in it."""
    limits, element = problem.limits, problem.element
    slow = limits.fp32_rate / limits.fp64_rate if element.sum_dtype in ("float64", "complex128") else 1.0
    return slow * (4 if element.is_complex else 1)


def inputs_of(outputs: int, taps: int, step: int) -> int:
    """Inputs that `outputs` windows of `taps` read, `step` apart."""
    return outputs * taps if step >= taps else (outputs - 1) * step + taps


def registers_of(kernel: str, *parts: float) -> int:
    """Registers of a thread: `parts`, and what the kernel's indices take."""
    return min(REGISTERS_PER_THREAD, math.ceil(sum(parts)) + REGISTERS_OF_INDICES[kernel])


def widths_of(problem: Problem, aligned: tuple[int, ...]) -> tuple[int, int]:
    """Channels of the target that a thread owns, and those of the source that they meet; `aligned` of x, w and y."""
    element, multiplier = problem.element, problem.multiplier
    x, w, y = aligned
    if problem.first or (problem.transposed and multiplier > 1):
        return 1, 1
    width = vector(element.bytes, problem.filters, w, y)
    while width > 1:
        if width % multiplier == 0 and x % (width // multiplier) == 0:
            return width, width // multiplier
        if multiplier % width == 0:
            return width, 1
        width //= 2
    return 1, 1


def require_step_one(problem: Problem, kernel: str) -> None:
    """Refuses problems whose outputs of a phase are more than one source step apart.

    Raises:
        PlanError: `problem` is one.
    """
    walk = problem.walk
    if problem.transposed and (walk.stride > 1 or problem.multiplier > 1):
        raise PlanError(f"{kernel}: of the transpose only stride 1 without a multiplier")
    if problem.step > 1:
        raise PlanError(f"{kernel}: stride {walk.stride} does not divide dilation {walk.dilation}")


def first_and_steps(problem: Problem) -> tuple[int, int, int]:
    """Where tap 0 of the first output reads, and by how much that moves with the phase and with the output."""
    walk = problem.walk
    if problem.transposed:
        return walk.pad - (walk.taps - 1) * walk.dilation, 1, walk.dilation
    return -walk.pad, walk.stride, walk.dilation


def taps_of(problem: Problem) -> tuple[int, int]:
    """Elements of w before tap 0 and from one tap to the next; the transpose takes them from the last on."""
    taps, filters = problem.weights // problem.filters, problem.filters
    return ((taps - 1) * filters, -filters) if problem.transposed else (0, filters)


def pitches_of(problem: Problem) -> tuple[int, int, int, int]:
    """Elements of a batch item of source and target, then from one channel of theirs to the next."""
    batches = (problem.source_size // problem.batch, problem.target_size // problem.batch)
    return (*batches, problem.source_positions, problem.target_positions) if problem.first else (*batches, 1, 1)


def constants_of(problem: Problem, activation: str | None, **constants: int) -> tuple[tuple[str, int | str], ...]:
    """The constants that every kernel has, and `constants`."""
    fused = () if activation is None else (("ACTIVATION", ACTIVATION_CODES[activation]),)
    return (("ELEMENT", problem.element.c_type), *fused, *constants.items())


def launch_of(
    problem: Problem,
    kernel: str,
    constants: tuple[tuple[str, int | str], ...],
    integers: tuple[int, ...],
    *,
    threads: int,
    walked: int,
    registers: int,
    instructions: float,
    moved: int,
    dram: float,
    flops: int,
    reason: str,
    shared: int = 0,
    least: tuple[int, int] | None = None,
    extents: tuple[int, ...] = (),
) -> LaunchPlan:
    """A launch and what it costs.

    Args:
        threads: of the whole launch; the last block may have more.
        walked: outputs that indices may run beyond the end by.
        instructions: of a thread.
        moved: bytes through the L1 caches; `dram`: through the memory.
        flops: multiply-adds of real or complex numbers that are done.
    """
    element = problem.element
    blocks = -(-threads // THREADS)
    width = problem.index_bytes(walked, blocks * THREADS, *extents, *integers)
    times = times_of(problem.limits, threads, registers, instructions, moved, dram, shared)
    least_flops, least_bytes = least or (problem.flops, problem.least_bytes)
    return LaunchPlan(
        kernel=kernel,
        constants=(*constants, ("INDEX", "int" if width == 4 else "long long")),
        integers=integers,
        grid=(blocks, 1, 1),
        block=(THREADS, 1, 1),
        index_bytes=width,
        shared_bytes=shared,
        registers=registers,
        reason=reason,
        cost=slowest(flops * (8 if element.is_complex else 2), least_flops, moved, least_bytes, times),
    )


def predicted(limits: DeviceLimits, **cost: Any) -> float:
    """Seconds of a launch; arguments as :func:`launch_of`."""
    return max(times_of(limits, **cost).values()) + LAUNCH_SECONDS


def times_of(
    limits: DeviceLimits,
    threads: int,
    registers: int,
    instructions: float,
    moved: int,
    dram: float,
    shared: int = 0,
) -> dict[str, float]:
    """Seconds of what happens in a launch, by its name; arguments as :func:`launch_of`."""
    blocks = -(-threads // THREADS)
    blocks_each = blocks / limits.multiprocessors
    memory = memory_seconds(limits, blocks, resident_blocks(limits, registers, shared), dram)
    issued = limits.fp32_rate / 2  # instructions of a thread a second: one where a fused multiply-add could be
    rounds = math.ceil(blocks_each) / blocks_each
    return {
        "memory": memory,
        "L1 cache": moved / (limits.fp32_rate / 4) * rounds,
        "instructions": blocks * THREADS * instructions / issued * rounds,
    }


def memory_seconds(limits: DeviceLimits, blocks: int, resident_at_once: int, dram: float) -> float:
    """Seconds that the memory takes for `dram` bytes."""
    # Two blocks, each thread with 8 loads of 16 bytes on their way, keep the memory busy; fewer at the end do not.
    busy = min(resident_at_once, 2) / (blocks / limits.multiprocessors)
    return dram / limits.bandwidth * max(1 + 0.25 * busy, busy)


def resident_blocks(limits: DeviceLimits, registers: int, shared: int = 0) -> int:
    """Blocks that a multiprocessor holds, at least one."""
    return max(1, min(resident(limits, THREADS, registers, shared)))


def fastest(plans: list[LaunchPlan], factor: float = CHOICE_FACTOR) -> LaunchPlan:
    """The first that is predicted to be about as fast as any, so that small problems share the same few kernels."""
    least = min(plan.seconds for plan in plans)
    return next(plan for plan in plans if plan.seconds <= factor * least)


def walks(widest: int, x_widest: int, longest: int) -> Iterator[tuple[int, int, int]]:
    """Candidates: channels of the target and of the source that a thread has, and its outputs."""
    for width in (widest, widest // 2):
        x_width, odd = divmod(width * x_widest, widest)
        if x_width and not odd:
            for outputs in (8, 4, 16, 2, 1):
                if outputs == 1 or outputs < 2 * longest:
                    yield width, x_width, outputs


def chunks_of(taps: int) -> range:
    """Candidates: taps at a time."""
    return range(min(CARRIED_TAPS, taps), 0, -1)


def checked(plan: LaunchPlan) -> LaunchPlan:
    """`plan`, if a grid can have so many blocks.

    Raises:
        PlanError: it cannot.
    """
    if plan.grid[0] > MAX_GRID_X:
        raise PlanError(f"{plan.kernel}: {plan.grid[0]} blocks, at most {MAX_GRID_X}")
    return plan
