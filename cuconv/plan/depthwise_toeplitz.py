"""Plans of depthwise convolutions on tensor cores: 16-bit elements, stride 1, many taps.

The model, for one block of kernels/depthwise_toeplitz.cu. Its multiprocessor is busy for as long as the slowest of the
tensor cores, shared memory (a wavefront a cycle) and the issue of instructions (four a cycle). While a block computes,
the others load: what memory and multiprocessors take hides behind one another, but for the part of one block.
"""

from __future__ import annotations

import dataclasses

from cuconv.plan.cost import L2_FACTOR, LAUNCH_SECONDS
from cuconv.plan.depthwise_problem import (
    NO_AXIS,
    THREADS,
    Axis,
    Problem,
    constants_of,
    fastest,
    finishing_of,
    launch_of,
    pitches_of,
    resident_blocks,
    taps_of,
)
from cuconv.plan.mma import RATE_SHARE, require
from cuconv.plan.types import LaunchPlan, PlanError, vector

STRIPS = 16  # rows of a fragment
MOST_STEPS = 33  # of 16 inputs, 512 taps; they are written out
BLOCKS = (5, 7, 3, 9, 1)  # of 8 outputs, of a strip; from the number that suits most
CHANNELS = (32, 64, 16)  # of a tile; 16 are half of what the memory is read in
REGISTERS = 96  # for five blocks of a multiprocessor


def plan_toeplitz(problem: Problem, activation: str, aligned: tuple[int, ...]) -> LaunchPlan:
    """The launch of kernels/depthwise_toeplitz.cu.

    Raises:
        PlanError: it does not compute this problem, or not on this device.
    """
    element, limits, first = problem.element, problem.limits, problem.first
    require(element, limits)
    depth, outer, inner = (problem.outer[0], *(problem.walk, problem.outer[1])[:: 1 if first else -1])
    if depth != NO_AXIS:
        raise PlanError("depthwise_toeplitz: at most two axes")
    if (inner.stride, outer.stride) != (1, 1):
        raise PlanError("depthwise_toeplitz: only stride 1")
    if problem.multiplier > 1:
        raise PlanError("depthwise_toeplitz: no multiplier")
    if first and inner.dilation > 1:
        raise PlanError(f"depthwise_toeplitz: dilation {inner.dilation} of neighbouring positions, channels first")
    x, w, y = aligned
    if first:
        y_vec = vector(element.bytes, inner.target, y)
        widths = [1 << n for n in range(vector(element.bytes, inner.source, x).bit_length())][::-1]
    else:
        y_vec = vector(element.bytes, problem.channels, x, w, y)
        widths = [y_vec]
    plans, rejected = [], []
    for width in widths[:2]:  # a narrower access needs less room for alignment
        phase = _first(problem, inner) % width if first else 0
        steps = -(-(phase + 7 + inner.taps) // 16)
        if steps > MOST_STEPS:
            rejected.append(f"depthwise_toeplitz: {inner.taps} taps, at most {MOST_STEPS * 16 - 7}")
            continue
        for channels in CHANNELS:
            for blocks in BLOCKS:
                plan = _candidate(problem, activation, outer, inner, (width, y_vec, phase, steps, blocks, channels))
                if plan.shared_bytes > limits.shared_bytes:
                    rejected.append(f"depthwise_toeplitz: {plan.shared_bytes} bytes of shared memory for {plan.reason}")
                else:
                    plans.append(plan)
    if not plans:
        raise PlanError(rejected[0])
    return fastest(plans)


def _first(problem: Problem, axis: Axis) -> int:
    """What the first tap of output 0 reads."""
    return axis.pad - (axis.taps - 1) * axis.dilation if problem.transposed else -axis.pad


def _candidate(
    problem: Problem,
    activation: str,
    outer: Axis,
    inner: Axis,
    sizes: tuple[int, int, int, int, int, int],
) -> LaunchPlan:
    """The launch with accesses of `width` elements, tiles of `channels`, and strips of `blocks` * 8 outputs."""
    width, y_width, phase, steps, blocks, channels = sizes
    element, limits, first = problem.element, problem.limits, problem.first
    sequence = outer == NO_AXIS
    # As in the kernel.
    outputs, read = blocks * 8, (blocks - 1) * 8 + steps * 16
    pitch = outputs if sequence else read + 8
    rows = STRIPS if sequence else STRIPS + outer.taps - 1
    count = -(-((rows - 1) * pitch + read) // 16) * 16
    groups = channels if first else channels // width
    pairs = outer.taps * (steps * 16 + 8) + 1
    skew = 0 if first else max(8, 64 // groups)
    shared = (channels * count + groups * skew) * element.bytes + channels * (pairs + 1) * 4

    tile = STRIPS * outputs if sequence else outputs
    along, across = -(-inner.target // inner.dilation), -(-outer.target // outer.dilation)
    tiles_inner, tiles_outer = -(-along // tile), 1 if sequence else -(-across // STRIPS)
    tiles_c = -(-problem.channels // channels)
    launched = problem.batch * tiles_c * tiles_inner * tiles_outer * inner.dilation * outer.dilation

    # Of a block: fragments, wavefronts of shared memory, and instructions of its warps as ptxas makes them for sm_90.
    fragments = outer.taps * ((blocks + 1) // 2 + steps - 1)
    products = outer.taps * steps * blocks
    words, done = (count if sequence else rows * read) / 64, STRIPS * outputs / 64  # a lane, of a channel
    wavefronts = channels * (2 * words + 4 * fragments + 2 * outer.taps * steps + 2 * blocks + done + pairs / 32)
    copied = (52 / width, 48 / y_width) if first else (2 + 45 / width, 2 + 27 / width)  # of a word
    instructions = channels * (
        words * copied[0]
        + done * copied[1]
        + pairs / 32 * (39 if first else 2 + 40 / width)
        + 45
        + outer.taps * (2 * steps + (13 if outer.taps > 1 else 0))
        + fragments
        + 3 * products
        + blocks * (12 + 4 * finishing_of(activation, element))
    )
    clock = limits.fp32_rate / (2 * limits.fp32_lanes * limits.multiprocessors)
    rate = limits.fp16_rate * next(share for known, share in reversed(RATE_SHARE.items()) if known <= limits.capability)
    tensor = channels * products * 4096 / (rate / limits.multiprocessors)
    block_seconds = max(tensor, wavefronts / clock, instructions / 4 / clock)

    # What tiles read twice comes from the L2 cache for all but one.
    fresh = (tile + inner.taps - 1) / tile * (1 if sequence else (STRIPS + outer.taps - 1) / STRIPS)
    again = (min(fresh, 4) - 1) * problem.source_size * element.bytes
    registers = REGISTERS
    plan = launch_of(
        problem,
        "depthwise_toeplitz",
        constants_of(
            problem,
            activation,
            CHANNELS_FIRST=int(first),
            SEQUENCE=int(sequence),
            OUTER=outer.taps,
            K=inner.taps,
            PHASE=phase,
            BC=channels,
            NB=blocks,
            VEC=width,
            YV=y_width,
        ),
        (
            problem.channels,
            tiles_c,
            *pitches_of(problem),
            *taps_of(problem),
            *_axis(problem, inner, tiles_inner),
            *_axis(problem, outer, tiles_outer),
        ),
        threads=launched * THREADS,
        walked=tile,
        registers=registers,
        shared=shared,
        instructions=instructions / (THREADS // 32),
        moved=int(launched * channels * (count + STRIPS * outputs) * element.bytes),
        dram=problem.least_bytes + again / L2_FACTOR,
        flops=launched * channels * products * 2048,
        extents=(*_reach(problem, outer, STRIPS), *_reach(problem, inner, tile)),
        reason=f"tensor cores, tiles of {channels} channels and {STRIPS} strips of {outputs} outputs, "
        f"{steps * outer.taps} products for {inner.taps * outer.taps} taps",
    )
    resident = resident_blocks(limits, registers, shared)
    memory = (problem.least_bytes + again / L2_FACTOR) / limits.bandwidth
    busiest = -(-launched // limits.multiprocessors)
    compute = busiest * block_seconds
    hidden = min(resident, max(1.0, launched / limits.multiprocessors))
    seconds = max(memory, compute) + min(memory, compute) / hidden + LAUNCH_SECONDS
    return dataclasses.replace(
        plan,
        dynamic_shared_bytes=shared,
        cost=dataclasses.replace(plan.cost, seconds=seconds) if plan.cost else None,
    )


def _reach(problem: Problem, axis: Axis, tile: int) -> tuple[int, int]:
    """Elements of source and target up to where a tile that begins at the end of an axis may point."""
    beyond = (2 * tile + axis.taps) * axis.dilation
    channels = max(CHANNELS) * (problem.source_positions + problem.target_positions if problem.first else 1)
    return (
        problem.source_size + beyond * axis.source_pitch + channels,
        problem.target_size + beyond * axis.target_pitch + channels,
    )


def _axis(problem: Problem, axis: Axis, tiles: int) -> tuple[int, ...]:
    """struct Params::Axis of the kernel."""
    return (
        axis.source,
        axis.target,
        tiles,
        axis.dilation,
        _first(problem, axis),
        axis.source_pitch,
        axis.target_pitch,
    )
