"""Plans of depthwise convolutions with many taps on the ordinary units: tiles in shared memory.

The model, for one block of kernels/depthwise_tile.cu. It takes as long as the slowest of the multiply-adds, shared
memory (128 bytes a cycle) and the issue of instructions (four a cycle).
"""

from __future__ import annotations

import itertools

from cuconv.plan.depthwise_problem import (
    CARRIED_TAPS,
    CHEAP_ACTIVATIONS,
    NO_AXIS,
    THREADS,
    Axis,
    Problem,
    constants_of,
    conversions_of,
    fastest,
    finishing_of,
)
from cuconv.plan.depthwise_tiles import is_phased, phased, tiled_axes, tiled_launch
from cuconv.plan.types import REGISTERS_PER_MULTIPROCESSOR, WARP, LaunchPlan, PlanError, vector

MOST_TAPS = 64  # of the inner axis; with more, a tile reads most of its inputs again
OUTPUTS = (32, 28, 16, 8)  # of a thread; from the number that suits most
MOST_COSTLY = 16  # with an activation of many instructions, which is written out for each
CHANNELS = (64, 32)  # of a tile
REGISTERS_BESIDE = 40  # sums and weights


def plan_tile(problem: Problem, activation: str, aligned: tuple[int, ...]) -> LaunchPlan:
    """The launch of kernels/depthwise_tile.cu.

    Raises:
        PlanError: it does not compute this problem.
    """
    element, limits = problem.element, problem.limits
    if problem.first:
        raise PlanError("depthwise_tile: only channels last")
    if element.sum_dtype != "float32":
        raise PlanError(f"depthwise_tile: sums of float32, not {element.sum_dtype}")
    axes = outer, inner = tiled_axes(problem, "depthwise_tile")
    orders = (axes, phased(axes)) if outer == NO_AXIS and inner.dilation > 1 else (axes,)
    if inner.taps > MOST_TAPS:
        raise PlanError(f"depthwise_tile: {inner.taps} taps, at most {MOST_TAPS}")
    x, _, y = aligned
    width = min(2, vector(element.bytes, problem.channels, y))
    x_width = vector(element.bytes, problem.channels, x)
    plans, rejected = [], []
    for channels in CHANNELS:
        workers = THREADS // (channels // width)  # for the outputs of a channel
        if channels // width < WARP and channels * element.bytes < 128:
            continue  # the two halves of a warp would read the same banks
        for outputs in OUTPUTS:
            if outputs > MOST_COSTLY and activation not in CHEAP_ACTIVATIONS:
                continue
            for order, rows in itertools.product(orders, (1, 4, 8, 2)):
                if rows > (1 if order[0] == NO_AXIS else workers):
                    continue
                sizes = (channels, width, x_width, outputs, workers // rows, rows)
                plan = _candidate(problem, activation, order, sizes)
                if plan.shared_bytes > limits.shared_bytes:
                    rejected.append(f"depthwise_tile: {plan.shared_bytes} bytes of shared memory for {plan.reason}")
                else:
                    plans.append(plan)
    if not plans:
        raise PlanError(rejected[-1])
    return fastest(plans)


def chunk_of(taps: int) -> int:
    """Taps at a time: as many as wait in registers, so that the fewest chunks have the least rest."""
    chunks = -(-taps // CARRIED_TAPS)
    return -(-taps // chunks)


def _candidate(
    problem: Problem, activation: str, axes: tuple[Axis, Axis], sizes: tuple[int, int, int, int, int, int]
) -> LaunchPlan:
    """The launch with tiles of `channels` by `rows` by `columns` * `outputs`, a thread with `outputs` of `width`."""
    channels, width, x_width, outputs, columns, rows = sizes
    element, limits = problem.element, problem.limits
    outer, inner = axes
    # As in the kernel.
    chunk = chunk_of(inner.taps)
    staged = (rows + outer.taps - 1) * (columns * outputs + inner.taps - 1) * channels
    weights = outer.taps * inner.taps * channels
    shared = weights * element.sum_bytes + staged * element.bytes
    registers = -(-((outputs + chunk) * width + REGISTERS_BESIDE) // 8) * 8
    registers += 0 if activation in CHEAP_ACTIVATIONS else 24
    registers += 24 if limits.capability >= (10, 0) else 0  # whose multiply-adds take registers in pairs
    blocks = min(8, max(1, REGISTERS_PER_MULTIPROCESSOR // (THREADS * registers)))

    # Of a thread, as ptxas makes them for sm_90.
    rest = inner.taps % chunk
    parts = [chunk] * (inner.taps // chunk) + [rest] * (rest > 0)
    reads = sum(outputs + part - 1 for part in parts) * outer.taps
    taps = inner.taps * outer.taps
    products = taps * outputs * width
    instructions = (
        160
        + products
        + reads * (1 + width * conversions_of(element))
        + taps
        + (6 * len(parts) + 8) * outer.taps
        + staged / x_width / THREADS * 18
        + weights / THREADS * 8
        + outputs * (5 + width * finishing_of(activation, element))
    )
    warps = THREADS // WARP
    moved = 2 * staged * element.bytes + warps * WARP * width * (reads * element.bytes + taps * element.sum_bytes)
    clock = limits.clock
    times = {
        "multiply-adds": products * THREADS / limits.fp32_lanes / clock,
        "shared memory": moved / 128 / clock,
        "instructions": warps * instructions / 4 / clock,
    }
    return tiled_launch(
        problem,
        "depthwise_tile",
        constants_of(
            problem,
            activation,
            PHASED=int(is_phased(axes)),
            OUTER=outer.taps,
            K=inner.taps,
            KC=chunk,
            BC=channels,
            VEC=width,
            XV=x_width,
            TP=outputs,
            GW=columns,
            BH=rows,
            BLOCKS=blocks,
        ),
        axes,
        (channels, rows, columns * outputs),
        times,
        registers=registers,
        shared=shared,
        products=products * THREADS,
        instructions=instructions,
        staged=staged,
        reason=f"tiles of {channels} channels and {rows}x{columns * outputs} outputs in shared memory, "
        f"{outputs} of {width} channels a thread, {chunk} taps at a time",
    )
