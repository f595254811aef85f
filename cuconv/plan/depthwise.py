"""Plans of depthwise convolutions and their transposes.

Which kernel, from the shape alone:

* ``depthwise_carry`` -- channels-last sequences of up to 8 taps whose stride divides the dilation: every input is
  loaded once, its products wait in registers.
* ``depthwise_rows`` -- channels-first sequences of stride 1: rows pass through shared memory, 16 bytes at a time.
* ``depthwise_tile`` -- many taps of stride 1, channels last: tiles pass through shared memory.
* ``depthwise_toeplitz`` -- many taps of stride 1 in 16 bits, either layout: on tensor cores.
* ``depthwise`` -- everything else.

Where several of them compute a problem, the one with the least predicted time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from cuconv.geometry import ConvShape
from cuconv.plan.cost import L2_FACTOR
from cuconv.plan.depthwise_problem import (
    CARRIED_INPUTS,
    CARRIED_TAPS,
    CHEAP_ACTIVATIONS,
    CHOICE_FACTOR,
    NO_AXIS,
    REGISTERS,
    SPECIAL_FACTOR,
    THREADS,
    Problem,
    checked,
    chunks_of,
    constants_of,
    conversions_of,
    fastest,
    finishing_of,
    first_and_steps,
    inputs_of,
    launch_of,
    pitches_of,
    predicted,
    problem_of,
    registers_of,
    require_step_one,
    resident_blocks,
    slots_of,
    taps_of,
    walks,
    widths_of,
    words_of,
)
from cuconv.plan.depthwise_tile import plan_tile
from cuconv.plan.depthwise_toeplitz import plan_toeplitz
from cuconv.plan.types import (
    REGISTERS_PER_THREAD,
    STATIC_SHARED_BYTES,
    VECTOR_BYTES,
    DeviceLimits,
    LaunchPlan,
    PlanError,
    vector,
)


@functools.lru_cache(maxsize=4096)
def plan_depthwise(
    shape: ConvShape, dtype: str, activation: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> LaunchPlan:
    """The plan of a depthwise convolution, for the arrays (x, w, bias, y).

    Args:
        activation: a name of ACTIVATION_CODES.
        aligned: elements by which x, w and y lie behind a 16-byte boundary.
    """
    return _choose(problem_of(shape, dtype, limits), activation, aligned)


@functools.lru_cache(maxsize=4096)
def plan_depthwise_transpose(
    shape: ConvShape, dtype: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> LaunchPlan:
    """The plan of the transposed depthwise convolution, for the arrays (y, w, None, x).

    Args:
        shape: the convolution this is the transpose of.
        aligned: elements by which y, w and x lie behind a 16-byte boundary.
    """
    return _choose(problem_of(shape, dtype, limits, transposed=True), "linear", aligned)


def _choose(problem: Problem, activation: str, aligned: tuple[int, ...]) -> LaunchPlan:
    planners = (plan_rows if problem.first else plan_carry, plan_walk, plan_tile, plan_toeplitz)
    answers = [_attempt(planner, problem, activation, aligned) for planner in planners]
    found = [answer for answer in answers if isinstance(answer, LaunchPlan)]
    best = fastest(found, SPECIAL_FACTOR if isinstance(answers[0], LaunchPlan) else CHOICE_FACTOR)
    rejected = [answer for answer in answers if isinstance(answer, str)]
    rejected += [f"{other.kernel}: {other.seconds * 1e6:.1f} us predicted" for other in found if other is not best]
    return checked(dataclasses.replace(best, rejected=(*rejected, *best.rejected)))


def _attempt(
    planner: Callable[[Problem, str, tuple[int, ...]], LaunchPlan],
    problem: Problem,
    activation: str,
    aligned: tuple[int, ...],
) -> LaunchPlan | str:
    """The plan, or why there is none."""
    try:
        return planner(problem, activation, aligned)
    except PlanError as error:
        return str(error)


def plan_carry(problem: Problem, activation: str, aligned: tuple[int, ...]) -> LaunchPlan:
    """The launch of kernels/depthwise_carry.cu.

    Raises:
        PlanError: it does not compute this problem.
    """
    walk, element, limits = problem.walk, problem.element, problem.limits
    if problem.first or problem.outer != (NO_AXIS, NO_AXIS):
        raise PlanError("depthwise_carry: only sequences, channels last")
    if walk.taps > CARRIED_TAPS:
        raise PlanError(f"depthwise_carry: {walk.taps} taps, at most {CARRIED_TAPS} sums wait in registers")
    require_step_one(problem, "depthwise_carry")
    vec, x_vec = widths_of(problem, aligned)
    taps, inputs = walk.taps, CARRIED_INPUTS[walk.taps]
    words = words_of(element)
    registers = registers_of(
        "depthwise_carry",
        (2 * taps + 1) * vec * words,
        8 if words == 4 else 0,
        0 if activation in CHEAP_ACTIVATIONS else 40,
        min(inputs, 8) * x_vec * element.bytes / 4,
    )
    resident = resident_blocks(limits, registers)
    phases, longest = problem.phases, -(-walk.target // problem.phases)
    vectors = problem.target_channels // vec

    def candidate(steps: int) -> LaunchPlan:
        walks = -(-longest // steps)
        threads = problem.batch * walks * phases * vectors
        again = problem.batch * phases * (walks - 1) * (taps - 1) * problem.source_channels * element.bytes
        loaded = threads * vec * element.bytes * taps + again + problem.least_bytes
        # Walk n+1 begins with what walk n ends with: in the L2 cache, if it holds what is read and written in between.
        between = resident * limits.multiprocessors * THREADS * steps * (vec + x_vec) * element.bytes
        per_output = vec * (taps * slots_of(problem) + conversions_of(element) + finishing_of(activation, element)) + 4
        integers = (
            threads,
            vectors,
            1 if problem.transposed else problem.multiplier,
            problem.source_channels,
            problem.target_channels,
            phases,
            walks,
            steps,
            walk.source,
            walk.target,
            *first_and_steps(problem),
            *taps_of(problem),
        )
        return launch_of(
            problem,
            "depthwise_carry",
            constants_of(problem, activation, VEC=vec, XV=x_vec, K=taps, TP=inputs, BLOCKS=resident),
            integers,
            threads=threads,
            walked=steps + inputs,
            registers=registers,
            instructions=100 + taps * vec + (steps + taps - 1) * per_output,
            moved=loaded,
            dram=problem.least_bytes + again / (1 if 2 * between > limits.l2_bytes else L2_FACTOR),
            flops=threads * (steps + taps - 1) * taps * vec,
            reason=f"{vec * element.bytes}-byte vectors of channels, walks of {steps} outputs, each input loaded once",
        )

    turns = (8, 12, 6, 16, 4, 24, 3, 2, 1, 32, 64)  # of the loop; from the length that suits most
    lengths = [n * inputs - (taps - 1) for n in turns if taps <= n * inputs < longest + taps - 1]
    # A quarter of the inputs, at most, is read twice, unless that leaves multiprocessors idle.
    plans = [candidate(steps) for steps in lengths if steps >= 4 * (taps - 1)]
    whole = -(-(longest + taps - 1) // inputs)
    if whole <= max(turns):
        plans.append(candidate(whole * inputs - (taps - 1)))
    if max(plan.grid[0] for plan in plans) < resident * limits.multiprocessors:
        plans += [candidate(steps) for steps in lengths if steps < 4 * (taps - 1)]
    return fastest(plans)


def plan_rows(problem: Problem, activation: str, aligned: tuple[int, ...]) -> LaunchPlan:
    """The launch of kernels/depthwise_rows.cu.

    Raises:
        PlanError: it does not compute this problem.
    """
    axis, element = problem.outer[1], problem.element
    if not problem.first or problem.walk != NO_AXIS or problem.outer[0] != NO_AXIS:
        raise PlanError("depthwise_rows: only sequences, channels first")
    if axis.stride != 1:
        raise PlanError(f"depthwise_rows: stride {axis.stride}, only 1")
    if problem.transposed and problem.multiplier > 1:
        raise PlanError("depthwise_rows: the transpose sums over the multiplier")
    width = VECTOR_BYTES // element.bytes
    first = axis.pad - (axis.taps - 1) * axis.dilation if problem.transposed else -axis.pad
    phase = first % width
    reach = phase + (axis.taps - 1) * axis.dilation
    halo = -(-reach // width)
    if halo > 4:  # a variant of the kernel for every few vectors only
        halo = -(-halo // 4) * 4 if halo < 32 else -(-halo // 32) * 32
    chunk, left = (axis.taps, 0) if axis.taps <= CARRIED_TAPS else (CARRIED_TAPS, axis.taps % CARRIED_TAPS)
    x_vec, y_vec = vector(element.bytes, axis.source, aligned[0]), vector(element.bytes, axis.target, aligned[2])
    before = max(0, phase - first) // x_vec
    rows = problem.batch * problem.channels
    vectors = -(-axis.target // width)
    windows = (reach // width + 2) if axis.dilation == 1 else 2 * axis.taps

    def candidate(lanes: int, each: int) -> LaunchPlan:
        span = lanes * each + halo
        tiles = -(-vectors // (lanes * each))
        blocks = -(-rows // (THREADS // lanes)) * tiles
        again = rows * (tiles - 1) * min(reach, axis.source) * element.bytes
        staged = -(-span // lanes) * (width // x_vec)
        per_vector: float = windows * (4 + width * conversions_of(element)) + axis.taps * (
            3 + width * slots_of(problem)
        )
        per_vector += width * finishing_of(activation, element) + 2 * (width // y_vec) + 8
        threads = blocks * THREADS
        return launch_of(
            problem,
            "depthwise_rows",
            constants_of(
                problem,
                activation,
                XV=x_vec,
                YV=y_vec,
                PHASE=phase,
                UNIT=int(axis.dilation == 1),
                DMOD=axis.dilation % width,
                KC=chunk,
                MANY=int(axis.taps > chunk),
                KT=left,
                TR=lanes,
                TV=each,
                HALO=halo,
            ),
            (
                rows,
                problem.channels,
                problem.multiplier,
                tiles,
                axis.source,
                axis.target,
                first - phase,
                axis.dilation,
                before if before < span * (width // x_vec) else 0,
                axis.taps // chunk,
                *taps_of(problem),
            ),
            threads=threads,
            walked=THREADS * 8 * width * lanes,
            registers=48 if axis.taps == chunk else 64,
            shared=(THREADS // lanes) * span * VECTOR_BYTES,
            instructions=40 + 8 * staged + each * problem.multiplier * per_vector,
            moved=problem.least_bytes + again + blocks * axis.taps * element.bytes,
            dram=problem.least_bytes + again,
            flops=threads * each * problem.multiplier * width * axis.taps,
            reason=f"tiles of {lanes * each * width} outputs through shared memory, "
            f"{x_vec * element.bytes}-byte loads, {y_vec * element.bytes}-byte stores",
        )

    plans = [
        candidate(lanes, each)
        for lanes in (32, 64, 16, 128, 8, 4, 2, 1)
        for each in (4, 2, 1, 8)
        if (THREADS // lanes) * (lanes * each + halo) * VECTOR_BYTES <= STATIC_SHARED_BYTES
    ]
    if not plans:
        raise PlanError(f"depthwise_rows: {halo} vectors beyond a tile do not fit shared memory")
    return fastest(plans)


def plan_walk(problem: Problem, activation: str, aligned: tuple[int, ...]) -> LaunchPlan:
    """The launch of kernels/depthwise.cu, which computes everything."""
    walk, element = problem.walk, problem.element
    step, words = problem.step, words_of(element)
    longest = -(-walk.target // problem.phases)
    summed = problem.multiplier if problem.transposed else 1
    # A position of the transpose meets every stride-th tap; what is left over is taken singly.
    met = max(1, walk.taps // (walk.stride // walk.common)) if problem.transposed else walk.taps
    met_outer = [
        max(1, axis.taps // (axis.stride // axis.common)) if problem.transposed else axis.taps for axis in problem.outer
    ]
    outer = math.prod(met_outer)
    widest, x_widest = widths_of(problem, aligned)
    conversions, slots, finishing = conversions_of(element), slots_of(problem), finishing_of(activation, element)
    rows_of_outputs = math.prod(axis.target for axis in problem.outer)
    most_registers = REGISTERS if problem.limits.capability < (10, 0) else REGISTERS - 8
    rejected: list[str] = []
    candidates = []
    fetches = met * outer * summed
    for width, x_width, outputs in walks(widest, x_widest, longest):
        groups = -(-longest // outputs)
        vectors = problem.target_channels // width
        threads = problem.batch * vectors * problem.phases * groups * rows_of_outputs
        products = outputs * fetches * width
        beside_reads: float = 120 + fetches * (2 + width * conversions) + products * slots
        beside_reads += outputs * (3 + width * finishing)
        # What several threads read comes from the L2 cache for all but one.
        together = problem.outer[1].target if problem.first else max(1, THREADS // vectors)
        rows = min(together, problem.outer[1].target)  # of outputs in a block, whose inputs overlap in L1
        fresh = inputs_of(rows, met_outer[1], 1 if problem.transposed else problem.outer[1].stride) / rows
        passed = threads * inputs_of(outputs, met, step) * met_outer[0] * fresh * summed * x_width * element.bytes
        again = max(0.0, passed - problem.source_size * element.bytes)
        for chunk in chunks_of(met):
            loads = inputs_of(outputs, chunk, step)
            # All inputs of a step may be on their way at once, with an address each.
            in_flight = loads * (x_width * element.bytes / 4 + 2)
            registers = registers_of("depthwise", (outputs + chunk) * width * words, in_flight)
            if registers > REGISTERS_PER_THREAD - 24:
                rejected.append(f"{outputs} outputs of {width} channels, {chunk} taps: about {registers} registers")
                continue
            resident = 3 if registers <= most_registers else 2
            reads = (met // chunk * loads + met % chunk * inputs_of(outputs, 1, step)) * outer * summed
            cost: dict[str, Any] = {
                "threads": threads,
                "registers": registers if resident == 3 else REGISTERS_PER_THREAD,
                "instructions": beside_reads + reads * (3 + x_width * conversions),
                "moved": threads * element.bytes * (reads * x_width + (fetches + outputs) * width),
                "dram": problem.least_bytes + again / L2_FACTOR,
            }
            chosen = (width, x_width, outputs, chunk, resident, vectors, groups, products)
            candidates.append((predicted(problem.limits, **cost), chosen, cost))
    # As `fastest`, before the launches are made: there are dozens.
    least = min(seconds for seconds, _, _ in candidates)
    _, chosen, cost = next(each for each in candidates if each[0] <= CHOICE_FACTOR * least)
    width, x_width, outputs, chunk, resident, vectors, groups, products = chosen
    plan = launch_of(
        problem,
        "depthwise",
        constants_of(
            problem,
            activation,
            CHANNELS_FIRST=int(problem.first),
            TRANSPOSED=int(problem.transposed),
            VEC=width,
            XV=x_width,
            TP=outputs,
            KC=chunk,
            SG=step,
            BLOCKS=resident,
        ),
        (
            cost["threads"],
            vectors,
            problem.multiplier,
            problem.phases,
            groups,
            *pitches_of(problem),
            *problem.fields,
        ),
        walked=outputs,
        flops=max(cost["threads"] * products, problem.products),
        reason=f"{outputs} outputs of {width} channels a thread, {chunk} taps at a time",
        **cost,
    )
    return dataclasses.replace(plan, rejected=tuple(rejected[:4]))
