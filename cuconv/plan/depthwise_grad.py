"""Plans of the gradients of depthwise convolutions.

Which kernel, from the shape alone:

* ``depthwise_grads``, ``depthwise_grad_rows`` -- all gradients of a sequence of stride 1 in one pass.
* ``depthwise_grad_tile`` -- many taps of stride 1 along channels-last sequences: an input is loaded once for all taps.
* ``depthwise_grad`` -- every other kernel gradient.

Positions are split over blocks, by the shape and the device alone; ``reduce_splits`` adds up what they have.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

from cuconv.geometry import ConvShape
from cuconv.plan.cost import L2_FACTOR, LAUNCH_SECONDS
from cuconv.plan.depthwise_problem import (
    BLOCKS_PER_MULTIPROCESSOR,
    CARRIED_TAPS,
    CHOICE_FACTOR,
    NO_AXIS,
    REGISTERS,
    THREADS,
    Problem,
    checked,
    chunks_of,
    constants_of,
    conversions_of,
    fastest,
    inputs_of,
    launch_of,
    memory_seconds,
    pitches_of,
    predicted,
    problem_of,
    registers_of,
    resident_blocks,
    slots_of,
    walks,
    widths_of,
    words_of,
)
from cuconv.plan.reduce import plan_reduce
from cuconv.plan.types import (
    REGISTERS_PER_MULTIPROCESSOR,
    VECTOR_BYTES,
    WARP,
    DeviceLimits,
    LaunchPlan,
    PlanError,
    vector,
)

# Of kernels/depthwise_grad_tile.cu: threads for the channels of a tile, taps and outputs of a thread at a time.
TILED_LANES, TILED_TAPS, TILED_OUTPUTS = 32, 16, 16
TILED_TURNS = (4, 2, 8, 1)  # times that a thread takes outputs of a unit; from the number that suits most
MOST_TILED_TAPS = 4 * TILED_TAPS


@dataclass(frozen=True)
class GradPlan:
    """A gradient that is split over positions: the launch, and the reductions of its partial sums.

    Attributes:
        launch: for the arrays (x, dy, partial, bias_partial), or (x, w, dy, dx, partial, bias_partial) where the
            gradient of the input comes with it.
        splits: parts of the positions; partial is [splits, weights], bias_partial [splits, filters].
    """

    launch: LaunchPlan
    splits: int
    weights: int
    filters: int
    reduce: LaunchPlan
    reduce_bias: LaunchPlan


@functools.lru_cache(maxsize=4096)
def plan_depthwise_kernel_grad(
    shape: ConvShape, dtype: str, aligned: tuple[int, ...], workspace: int, limits: DeviceLimits
) -> GradPlan:
    """The plan of a kernel gradient and of the bias gradient with it.

    Args:
        aligned: elements by which x, dy, dw and db lie behind a 16-byte boundary.
        workspace: bytes that partial sums may take; one copy of dw and db they always have.
    """
    problem = problem_of(shape, dtype, limits)
    try:
        launch, splits = plan_grad_rows(problem, (aligned[0], aligned[1], 0), workspace, with_input=False)
    except PlanError as error:
        launch, splits = _choose(problem, aligned[:2], workspace)
        launch = dataclasses.replace(launch, rejected=(str(error), *launch.rejected))
    return _grad_plan(problem, launch, splits, aligned[2:])


@functools.lru_cache(maxsize=4096)
def plan_depthwise_grads(
    shape: ConvShape, dtype: str, aligned: tuple[int, ...], workspace: int, limits: DeviceLimits
) -> GradPlan | str:
    """The plan of all gradients in one pass, or the reason why there is none.

    Args:
        aligned: elements by which x, w, dy, dx, dw and db lie behind a 16-byte boundary.
        workspace: as for :func:`plan_depthwise_kernel_grad`.
    """
    problem = problem_of(shape, dtype, limits)
    x, w, dy, dx, *results = aligned
    try:
        if problem.first:
            launch, splits = plan_grad_rows(problem, (x, dy, dx), workspace, with_input=True)
        else:
            launch, splits = plan_grads(problem, (x, w, dy, dx), workspace)
    except PlanError as error:
        return str(error)
    return _grad_plan(problem, launch, splits, tuple(results))


def _grad_plan(problem: Problem, launch: LaunchPlan, splits: int, aligned: tuple[int, ...]) -> GradPlan:
    name, limits = problem.element.dtype, problem.limits
    reduce = plan_reduce(name, splits, problem.weights, aligned[0], limits)
    reduce_bias = plan_reduce(name, splits, problem.filters, aligned[1], limits)
    return GradPlan(checked(launch), splits, problem.weights, problem.filters, reduce, reduce_bias)


def _choose(problem: Problem, aligned: tuple[int, ...], workspace: int) -> tuple[LaunchPlan, int]:
    walked = plan_grad(problem, aligned, workspace)
    try:
        tiled = plan_grad_tile(problem, aligned, workspace)
    except PlanError as error:
        launch, splits = walked
        return dataclasses.replace(launch, rejected=(str(error), *launch.rejected)), splits
    best, other = (tiled, walked) if fastest([walked[0], tiled[0]]) is tiled[0] else (walked, tiled)
    lost = f"{other[0].kernel}: {other[0].seconds * 1e6:.1f} us predicted"
    return dataclasses.replace(best[0], rejected=(lost, *best[0].rejected)), best[1]


def plan_grad_tile(problem: Problem, aligned: tuple[int, ...], workspace: int) -> tuple[LaunchPlan, int]:
    """The launch of kernels/depthwise_grad_tile.cu and its splits.

    Raises:
        PlanError: it does not compute this problem.
    """
    walk, element, limits = problem.walk, problem.element, problem.limits
    if problem.first or problem.outer != (NO_AXIS, NO_AXIS):
        raise PlanError("depthwise_grad_tile: only sequences, channels last")
    if walk.stride != 1 or problem.multiplier != 1:
        raise PlanError("depthwise_grad_tile: only stride 1 without a multiplier")
    if element.sum_dtype != "float32":
        raise PlanError(f"depthwise_grad_tile: sums of float32, not {element.sum_dtype}")
    if walk.taps > MOST_TILED_TAPS:
        raise PlanError(f"depthwise_grad_tile: {walk.taps} taps, at most {MOST_TILED_TAPS}")
    width = min(2, vector(element.bytes, problem.channels))
    channels, conversions = TILED_LANES * width, conversions_of(element)
    lanes = THREADS // TILED_LANES
    groups = next(n for n in (1, 2, 4) if n * TILED_TAPS >= walk.taps)
    chunk = -(-walk.taps // groups)
    parts = lanes // groups
    x_width, y_width = (vector(element.bytes, problem.channels, offset) for offset in aligned)
    registers = -(-((TILED_OUTPUTS + chunk + 2) * width + 48) // 8) * 8
    longest = -(-walk.target // walk.dilation)
    tiles_c = -(-problem.channels // channels)

    def candidate(outputs: int) -> tuple[LaunchPlan, int]:
        columns = outputs + groups * chunk - 1
        shared = (columns + outputs) * channels * element.bytes
        tiles = -(-longest // outputs)
        units = problem.batch * walk.dilation * tiles
        splits, share = _splits(problem, tiles_c, units, 1, workspace, 2)
        blocks = splits * tiles_c
        resident = resident_blocks(limits, registers, max(shared, THREADS * width * 4))
        reads = outputs // parts // TILED_OUTPUTS * (2 * TILED_OUTPUTS + chunk - 1)
        products = outputs // parts * chunk * width
        pieces = (columns / x_width + outputs / y_width) * channels / THREADS
        # Of a thread and a unit, as ptxas makes them for sm_90.
        turn = 80 + products + reads * (1 + width * conversions) + outputs // parts * width + pieces * 14
        read = THREADS * reads * width * element.bytes
        turn_cycles = max(products * THREADS / limits.fp32_lanes, (read + 2 * shared) / 128, THREADS // WARP * turn / 4)
        clock = limits.clock
        again = problem.batch * walk.dilation * (tiles - 1) * (walk.taps - 1) * problem.channels * element.bytes
        dram = problem.least_bytes + again / L2_FACTOR + 2 * splits * problem.weights * 4
        memory = memory_seconds(limits, blocks, resident, dram)
        compute = -(-blocks // limits.multiprocessors) * (share * turn_cycles + (chunk + 1) * 60) / clock
        plan = launch_of(
            problem,
            "depthwise_grad_tile",
            constants_of(
                problem, None, K=walk.taps, BC=channels, VEC=width, XV=x_width, YV=y_width, BP=outputs,
                TP=TILED_OUTPUTS, KC=chunk, TG=groups,
                BLOCKS=min(5, REGISTERS_PER_MULTIPROCESSOR // THREADS // registers),
            ),
            (
                problem.channels, tiles_c, walk.source, walk.target, walk.pad, walk.dilation, tiles, units, share,
            ),
            threads=blocks * THREADS,
            walked=outputs + walk.taps,
            registers=registers,
            shared=max(shared, THREADS * width * 4),
            instructions=share * turn,
            moved=blocks * share * shared,
            dram=dram,
            flops=blocks * share * products * THREADS,
            reason=f"{splits} parts of {share} units of {outputs} outputs of {channels} channels in shared memory, "
            f"{chunk} taps a thread",
            extents=(splits * problem.weights, units + share),
        )  # fmt: skip
        seconds = max(memory, compute) + min(memory, compute) / min(resident, max(1.0, blocks / limits.multiprocessors))
        cost = dataclasses.replace(plan.cost, seconds=seconds + LAUNCH_SECONDS) if plan.cost else None
        return dataclasses.replace(plan, dynamic_shared_bytes=plan.shared_bytes, cost=cost), splits

    plans = [candidate(parts * TILED_OUTPUTS * turns) for turns in TILED_TURNS]
    return _fastest_grad([each for each in plans if each[0].shared_bytes <= limits.shared_bytes], [])


def plan_grad(problem: Problem, aligned: tuple[int, ...], workspace: int) -> tuple[LaunchPlan, int]:
    """The launch of kernels/depthwise_grad.cu, which computes every kernel gradient, and its splits."""
    walk, element = problem.walk, problem.element
    step, words, longest = problem.step, words_of(element), -(-walk.target // problem.phases)
    widest, x_widest = widths_of(problem, (aligned[0], 0, aligned[1]))
    conversions, slots = conversions_of(element), slots_of(problem)
    taps = math.prod(axis.taps for axis in problem.outer)
    rows_of_outputs = math.prod(axis.target for axis in problem.outer)
    rejected: list[str] = []
    candidates = []
    for width, x_width, outputs in walks(widest, x_widest, longest):
        vectors = problem.filters // width
        lanes = 1 if problem.first else min(WARP, 1 << (vectors - 1).bit_length())
        tiles, groups = -(-vectors // lanes), -(-longest // outputs)
        units = problem.batch * problem.phases * groups * rows_of_outputs
        for chunk in chunks_of(walk.taps):
            loads = inputs_of(outputs, chunk, step)
            registers = registers_of(
                "depthwise_grad",
                (outputs + chunk + 1) * width * words,
                0,
                (min(loads, 12) * x_width + outputs * width / 2) * element.bytes / 4,
            )
            if registers > REGISTERS:
                rejected.append(f"{outputs} outputs of {width} channels, {chunk} taps: about {registers} registers")
                continue
            chunks = -(-walk.taps // chunk)
            splits, share = _splits(problem, tiles * chunks * taps, units, THREADS // lanes, workspace)
            blocks = splits * tiles * chunks * taps
            # As ptxas makes it for sm_90: every load has its own test, and 8 more instructions for its address.
            turn = 180 + loads * (12 + 1.5 * x_width * conversions)
            turn += outputs * (6 + width * (1 + conversions + chunk * slots))
            cost: dict[str, Any] = {
                "threads": blocks * THREADS,
                "registers": registers,
                "instructions": 150 + (chunk + 1) * 40 + math.ceil(share / (THREADS // lanes)) * turn,
                "moved": blocks * share * lanes * element.bytes * (loads * x_width + outputs * width),
                # Blocks for other taps read the same again, from the L2 cache if they run together.
                "dram": problem.least_bytes * (1 + (chunks * taps - 1) // 4) + 2 * splits * problem.weights * 4,
                "shared": THREADS * width * element.sum_bytes,
            }
            chosen = (width, x_width, outputs, chunk, lanes, vectors, tiles, chunks, groups, units, splits, share)
            candidates.append((predicted(problem.limits, **cost), chosen, cost))
    # As `fastest`, before the launches are made: there are dozens.
    least = min(seconds for seconds, _, _ in candidates)
    _, chosen, cost = next(each for each in candidates if each[0] <= CHOICE_FACTOR * least)
    width, x_width, outputs, chunk, lanes, vectors, tiles, chunks, groups, units, splits, share = chosen
    plan = launch_of(
        problem,
        "depthwise_grad",
        constants_of(
            problem,
            None,
            CHANNELS_FIRST=int(problem.first),
            VEC=width,
            XV=x_width,
            TX=lanes,
            TP=outputs,
            KC=chunk,
            SG=step,
        ),
        (
            vectors,
            tiles,
            problem.multiplier,
            problem.filters,
            problem.weights,
            chunks,
            units,
            share,
            problem.phases,
            groups,
            *pitches_of(problem),
            *problem.fields,
        ),
        walked=outputs,
        flops=cost["threads"] // THREADS * share * lanes * outputs * chunk * width,
        reason=f"{splits} parts of {share} units of {outputs} outputs of {width} channels, {chunk} taps at a time",
        extents=(splits * problem.weights, units + share),
        **cost,
    )
    return dataclasses.replace(plan, rejected=tuple(rejected[:4])), splits


def plan_grads(problem: Problem, aligned: tuple[int, ...], workspace: int) -> tuple[LaunchPlan, int]:
    """The launch of kernels/depthwise_grads.cu and its splits.

    Raises:
        PlanError: it does not compute this problem.
    """
    walk, element = problem.walk, problem.element
    if problem.first or problem.outer != (NO_AXIS, NO_AXIS):
        raise PlanError("depthwise_grads: only sequences, channels last")
    if walk.stride != 1 or problem.multiplier != 1:
        raise PlanError("depthwise_grads: only stride 1 without a multiplier")
    if walk.taps > CARRIED_TAPS:
        raise PlanError(f"depthwise_grads: {walk.taps} taps, at most {CARRIED_TAPS} have their sums in registers")
    taps, words = walk.taps, words_of(element)
    widest = vector(element.bytes, problem.channels, *aligned)
    longest = -(-max(walk.source + walk.pad, walk.target) // walk.dilation)
    rejected: list[str] = []
    plans = []
    for width, _, outputs in walks(widest, widest, longest):
        inputs = outputs + taps - 1
        registers = registers_of(
            "depthwise_grads", (2 * taps + inputs + 1) * width * words, 0, inputs * width * element.bytes / 4
        )
        if registers > REGISTERS:
            rejected.append(f"{outputs} positions of {width} channels: about {registers} registers")
            continue
        vectors = problem.channels // width
        lanes = min(WARP, 1 << (vectors - 1).bit_length())
        tiles, groups = -(-vectors // lanes), -(-longest // outputs)
        units = problem.batch * walk.dilation * groups
        splits, share = _splits(problem, tiles, units, THREADS // lanes, workspace)
        blocks, turns = splits * tiles, -(-share // (THREADS // lanes))
        instructions = (
            150
            + (taps + 1) * 40
            + turns
            * (
                80
                + inputs * (4 + 2 * width * conversions_of(element))
                + outputs * (2 + width * (1 + conversions_of(element) + 2 * taps * slots_of(problem)))
            )
        )
        data = 2 * problem.source_size + problem.target_size
        plans.append(
            (
                launch_of(
                    problem,
                    "depthwise_grads",
                    constants_of(problem, None, VEC=width, TX=lanes, TP=outputs, K=taps),
                    (
                        vectors, tiles, problem.channels, walk.source, walk.target, walk.dilation, walk.pad,
                        groups, units, share,
                    ),
                    threads=blocks * THREADS,
                    walked=outputs + taps,
                    registers=registers,
                    shared=THREADS * width * element.sum_bytes,
                    instructions=instructions,
                    moved=blocks * share * lanes * element.bytes * width * (2 * inputs + outputs),
                    dram=data * element.bytes + 2 * splits * problem.weights * element.sum_bytes,
                    flops=blocks * share * lanes * outputs * 2 * taps * width,
                    least=(2 * problem.flops, data * element.bytes),
                    reason=f"{splits} parts of {share} units of {outputs} positions of {width} channels",
                    extents=(splits * problem.weights, units + share),
                ),
                splits,
            )
        )  # fmt: skip
    if not plans:
        raise PlanError(f"depthwise_grads: {rejected[0]}")
    return _fastest_grad(plans, rejected)


def plan_grad_rows(
    problem: Problem, aligned: tuple[int, ...], workspace: int, with_input: bool
) -> tuple[LaunchPlan, int]:
    """The launch of kernels/depthwise_grad_rows.cu and its splits.

    Args:
        aligned: elements by which x, dy and dx lie behind a 16-byte boundary.
        with_input: compute the gradient of the input too.

    Raises:
        PlanError: it does not compute this problem.
    """
    axis, element = problem.outer[1], problem.element
    if not problem.first or problem.walk != NO_AXIS or problem.outer[0] != NO_AXIS:
        raise PlanError("depthwise_grad_rows: only sequences, channels first")
    if axis.stride != 1:
        raise PlanError(f"depthwise_grad_rows: stride {axis.stride}, only 1")
    if with_input and (axis.taps > CARRIED_TAPS or problem.multiplier > 1):
        raise PlanError(f"depthwise_grad_rows: only {CARRIED_TAPS} taps without a multiplier together with the input")
    width = VECTOR_BYTES // element.bytes
    chunk = min(axis.taps, CARRIED_TAPS)
    chunks = -(-axis.taps // chunk)
    x_first, y_first = -axis.pad, axis.pad - (axis.taps - 1) * axis.dilation
    x_vec = vector(element.bytes, axis.source, aligned[0], aligned[2])
    y_vec = vector(element.bytes, axis.target, aligned[1])
    longest = max(axis.source, axis.target) if with_input else axis.target
    row_vectors = -(-longest // width)
    units = problem.batch * row_vectors
    splits, share = _splits(problem, problem.filters * chunks, units, THREADS, workspace)
    blocks = splits * problem.filters * chunks
    windows = (chunk + width - 2) // width + 2 if axis.dilation == 1 else 2 * chunk
    passes = 2 if with_input else 1
    per_unit: float = 60 + (windows * passes + 1) * (
        4 + width * (conversions_of(element) + VECTOR_BYTES // element.bytes // x_vec)
    )
    per_unit += passes * chunk * width * slots_of(problem) + 2 * width
    turns = -(-share // THREADS)
    data = passes * problem.source_size + problem.target_size
    launch = launch_of(
        problem,
        "depthwise_grad_rows",
        constants_of(
            problem,
            None,
            XV=x_vec,
            YV=y_vec,
            KC=chunk,
            UNIT=int(axis.dilation == 1),
            DMOD=axis.dilation % width,
            X_PHASE=x_first % width,
            Y_PHASE=y_first % width if with_input else 0,
            WHOLE_ROWS=int(axis.target % width == 0),
            WITH_INPUT=int(with_input),
        ),
        (
            problem.filters,
            problem.multiplier,
            axis.taps,
            chunks,
            axis.source,
            axis.target,
            axis.dilation,
            x_first - x_first % width,
            y_first - y_first % width,
            row_vectors,
            units,
            share,
        ),
        threads=blocks * THREADS,
        walked=2 * width,
        registers=96,
        shared=THREADS * element.sum_bytes,
        instructions=200 + chunk * 60 + turns * per_unit,
        moved=blocks * share * VECTOR_BYTES * (windows * passes + 1),
        dram=(passes * problem.source_size + problem.target_size) * element.bytes * chunks,
        flops=blocks * share * passes * chunk * width,
        least=(passes * problem.flops, data * element.bytes),
        reason=f"{splits} parts of {share} vectors of a channel, {x_vec * element.bytes}-byte accesses",
        extents=(splits * problem.weights, units + share),
    )
    return launch, splits


def _splits(problem: Problem, tiles: int, units: int, workers: int, workspace: int, least: int = 4) -> tuple[int, int]:
    """Parts of the units, and the units of a part, from the shape, the device and the workspace alone.

    Enough blocks for two waves, at least `least` units for each of a block's workers.
    """
    blocks = 2 * BLOCKS_PER_MULTIPROCESSOR * problem.limits.multiprocessors
    room = workspace // ((problem.weights + problem.filters) * problem.element.sum_bytes)
    splits = max(1, min(blocks // tiles, units // (least * workers), room))
    share = -(-units // splits)
    return -(-units // share), share


def _fastest_grad(plans: list[tuple[LaunchPlan, int]], rejected: list[str]) -> tuple[LaunchPlan, int]:
    best = fastest([plan for plan, _ in plans])
    splits = next(splits for plan, splits in plans if plan is best)
    return dataclasses.replace(best, rejected=tuple(rejected[:4])), splits
