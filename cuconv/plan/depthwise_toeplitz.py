"""Plans of depthwise convolutions on tensor cores: 16-bit elements, stride 1, many taps.

The model, for one block of kernels/depthwise_toeplitz.cu. It takes as long as the slowest of the tensor cores, shared
memory (a wavefront a cycle) and the issue of instructions (four a cycle).
"""

from __future__ import annotations

import itertools

from cuconv.plan.depthwise_problem import NO_AXIS, THREADS, Axis, Problem, constants_of, fastest, finishing_of
from cuconv.plan.depthwise_tiles import first_of, is_phased, phased, tiled_axes, tiled_launch
from cuconv.plan.mma import rate_share, require_16_bits
from cuconv.plan.types import WARP, LaunchPlan, PlanError, vector

STRIPS = 16  # rows of a fragment
MOST_STEPS = 33  # of 16 inputs; they are written out
BLOCKS = (5, 7, 3, 9, 1)  # of 8 outputs, of a strip; from the number that suits most
CHANNELS = (32, 64, 16)  # of a tile; 16 are half of what the memory is read in
REGISTERS = 96  # for five blocks of a multiprocessor


def plan_toeplitz(problem: Problem, activation: str, aligned: tuple[int, ...]) -> LaunchPlan:
    """The launch of kernels/depthwise_toeplitz.cu.

    Raises:
        PlanError: it does not compute this problem, or not on this device.
    """
    element, limits, first = problem.element, problem.limits, problem.first
    require_16_bits(element, limits)
    outer, inner = axes = tiled_axes(problem, "depthwise_toeplitz")
    orders = (axes, phased(axes)) if outer == NO_AXIS and inner.dilation > 1 else (axes,)
    if first and inner.dilation > 1:
        raise PlanError(f"depthwise_toeplitz: dilation {inner.dilation} of neighbouring positions, channels first")
    x, w, y = aligned
    if first:
        y_width = vector(element.bytes, inner.target, y)
        widest = vector(element.bytes, inner.source, x)
        widths = (widest, widest // 2) if widest > 1 else (1,)  # a narrower access needs less room for alignment
    else:
        y_width = vector(element.bytes, problem.channels, x, w, y)
        widths = (y_width,)
    plans, rejected = [], []
    for width in widths:
        phase = first_of(problem, inner) % width if first else 0
        steps = -(-(phase + 7 + inner.taps) // 16)
        if steps > MOST_STEPS:
            rejected.append(f"depthwise_toeplitz: {inner.taps} taps, at most {MOST_STEPS * 16 - 7}")
            continue
        for axes, channels, blocks in itertools.product(orders, CHANNELS, BLOCKS):
            plan = _candidate(problem, activation, axes, width, y_width, phase, steps, blocks, channels)
            if plan.shared_bytes > limits.shared_bytes:
                rejected.append(f"depthwise_toeplitz: {plan.shared_bytes} bytes of shared memory for {plan.reason}")
            else:
                plans.append(plan)
    if not plans:
        raise PlanError(rejected[0])
    return fastest(plans)


def _candidate(
    problem: Problem,
    activation: str,
    axes: tuple[Axis, Axis],
    width: int,
    y_width: int,
    phase: int,
    steps: int,
    blocks: int,
    channels: int,
) -> LaunchPlan:
    """The launch with accesses of `width` elements, tiles of `channels`, and strips of `blocks` * 8 outputs."""
    element, limits, first = problem.element, problem.limits, problem.first
    outer, inner = axes
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
    clock = limits.clock
    rate = limits.fp16_rate * rate_share(limits)
    tensor = channels * products * 4096 / (rate / limits.multiprocessors)
    return tiled_launch(
        problem,
        "depthwise_toeplitz",
        constants_of(
            problem,
            activation,
            CHANNELS_FIRST=int(first),
            SEQUENCE=int(sequence),
            PHASED=int(is_phased(axes)),
            OUTER=outer.taps,
            K=inner.taps,
            PHASE=phase,
            BC=channels,
            NB=blocks,
            VEC=width,
            YV=y_width,
        ),
        axes,
        (channels, *((1, STRIPS * outputs) if sequence else (STRIPS, outputs))),
        {"tensor cores": tensor, "shared memory": wavefronts / clock, "instructions": instructions / 4 / clock},
        registers=REGISTERS,
        shared=shared,
        products=channels * products * 2048,
        instructions=instructions * WARP / THREADS,
        staged=channels * count,
        reason=f"tensor cores, tiles of {channels} channels and {STRIPS} strips of {outputs} outputs, "
        f"{steps * outer.taps} products for {inner.taps * outer.taps} taps",
    )
