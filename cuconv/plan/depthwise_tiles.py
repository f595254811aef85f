"""What the plans of kernels share that take tiles through shared memory, kernels/depthwise_tiles.cuh.

The model. A multiprocessor is busy for as long as the plan says of a block. While a block computes, the others load:
what memory and multiprocessors take hides behind one another, but for the part of one block.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cuconv.plan.cost import L2_FACTOR, LAUNCH_SECONDS
from cuconv.plan.depthwise_problem import (
    NO_AXIS,
    THREADS,
    Axis,
    Problem,
    launch_of,
    memory_seconds,
    pitches_of,
    resident_blocks,
    taps_of,
)
from cuconv.plan.types import LaunchPlan, PlanError


def tiled_axes(problem: Problem, kernel: str) -> tuple[Axis, Axis]:
    """The last axis and the one before it.

    Raises:
        PlanError: there is a third one, or a stride, or a multiplier.
    """
    depth, outer, inner = (problem.outer[0], *(problem.walk, problem.outer[1])[:: 1 if problem.first else -1])
    if depth != NO_AXIS:
        raise PlanError(f"{kernel}: at most two axes")
    if (inner.stride, outer.stride) != (1, 1):
        raise PlanError(f"{kernel}: only stride 1")
    if problem.multiplier > 1:
        raise PlanError(f"{kernel}: no multiplier")
    return outer, inner


def phased(axes: tuple[Axis, Axis]) -> tuple[Axis, Axis]:
    """A sequence with its phases as an outer axis: many short phases fill a tile together."""
    phases = axes[1].dilation
    return dataclasses.replace(NO_AXIS, source=phases, target=phases), axes[1]


def is_phased(axes: tuple[Axis, Axis]) -> bool:
    """Whether the outer axis is that of :func:`phased`."""
    outer, inner = axes
    return outer.source > 1 and outer == phased(axes)[0] and inner.dilation > 1


def first_of(problem: Problem, axis: Axis) -> int:
    """What the first tap of output 0 reads."""
    return axis.pad - (axis.taps - 1) * axis.dilation if problem.transposed else -axis.pad


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def tiled_launch(
    problem: Problem,
    kernel: str,
    constants: tuple[tuple[str, int | str], ...],
    axes: tuple[Axis, Axis],
    tile: tuple[int, int, int],
    times: dict[str, float],
    **cost: Any,
) -> LaunchPlan:
    """The launch of a kernel of depthwise_tiles.cuh.

    Args:
        axes: outer and inner; `tile`: channels, and outputs along each.
        times: seconds that a block keeps each part of a multiprocessor busy for, by its name.
        cost: registers, shared, products (multiply-adds of a block), instructions (of a thread), staged (elements of a
            block) and reason.
    """
    limits, element = problem.limits, problem.element
    outer, inner = axes
    channels, *outputs = tile
    tiles = [ceil_div(ceil_div(axis.target, axis.dilation), each) for axis, each in zip(axes, outputs, strict=True)]
    tiles_c = -(-problem.channels // channels)
    phases = 1 if is_phased(axes) else inner.dilation
    launched = problem.batch * tiles_c * tiles[0] * tiles[1] * phases * outer.dilation
    # What tiles read twice comes from the L2 cache for all but one.
    fresh = 1.0
    for axis, each in zip(axes, outputs, strict=True):
        source, target = ceil_div(axis.source, axis.dilation), ceil_div(axis.target, axis.dilation)
        fresh *= max(1.0, min(each + axis.taps - 1, source) / min(each, target))
    again = max(0.0, min(fresh, 8.0) - 1) * problem.source_size * element.bytes
    dram = problem.least_bytes + again / L2_FACTOR
    written = channels * outputs[0] * outputs[1]
    plan = launch_of(
        problem,
        kernel,
        constants,
        (
            problem.channels,
            tiles_c,
            *pitches_of(problem),
            *taps_of(problem),
            *_fields(problem, inner, tiles[1], phases),
            *_fields(problem, outer, tiles[0], outer.dilation),
        ),
        threads=launched * THREADS,
        walked=max(outputs),
        registers=cost["registers"],
        shared=cost["shared"],
        instructions=cost["instructions"],
        moved=launched * (cost["staged"] + written) * element.bytes,
        dram=dram,
        flops=launched * cost["products"],
        extents=tuple(_reach(problem, axis, each) for axis, each in zip(axes, outputs, strict=True)),
        reason=cost["reason"],
    )
    resident = resident_blocks(limits, cost["registers"], cost["shared"])
    memory = memory_seconds(limits, launched, resident, dram)
    busiest = max(times, key=lambda part: times[part])
    compute = ceil_div(launched, limits.multiprocessors) * times[busiest]
    others = min(resident, max(1.0, launched / limits.multiprocessors))
    seconds = max(memory, compute) + min(memory, compute) / others + LAUNCH_SECONDS
    bound = "memory" if memory >= compute else busiest
    return dataclasses.replace(
        plan,
        dynamic_shared_bytes=cost["shared"],
        cost=dataclasses.replace(plan.cost, seconds=seconds, bound=bound) if plan.cost else None,
    )


def _reach(problem: Problem, axis: Axis, tile: int) -> int:
    """Elements up to where a tile that begins at the end of an axis may point."""
    beyond = (2 * tile + axis.taps) * axis.dilation * max(axis.source_pitch, axis.target_pitch)
    channels = 64 * (problem.source_positions + problem.target_positions if problem.first else 1)
    return max(problem.source_size, problem.target_size) + beyond + channels


def _fields(problem: Problem, axis: Axis, tiles: int, phases: int) -> tuple[int, ...]:
    """struct TiledAxis of the kernels."""
    return (
        axis.source,
        axis.target,
        tiles,
        phases,
        axis.dilation,
        first_of(problem, axis),
        axis.source_pitch,
        axis.target_pitch,
    )
