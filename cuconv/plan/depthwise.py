"""Plans of depthwise convolutions, their transposes and their gradients.

Which kernel, from the shape alone:

* ``depthwise_carry`` -- channels-last sequences of up to 8 taps whose stride divides the dilation: every input is
  loaded once, its products wait in registers.
* ``depthwise_rows`` -- channels-first sequences of stride 1: rows pass through shared memory, 16 bytes at a time.
* ``depthwise`` -- everything else.
* ``depthwise_grads``, ``depthwise_grad_rows`` -- all gradients of a sequence of stride 1 in one pass.
* ``depthwise_grad`` -- every other kernel gradient.

The model. A launch takes as long as the slowest of three: the memory, with every array once and what walks or tiles
read twice, unless the L2 cache still holds it; the L1 caches, with every access; the instructions. Multiprocessors that
have nothing left at the end wait for the others.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan.reduce import plan_reduce
from cuconv.plan.types import (
    ACTIVATION_CODES,
    ELEMENTS,
    MAX_GRID_X,
    REGISTERS_PER_MULTIPROCESSOR,
    REGISTERS_PER_THREAD,
    STATIC_SHARED_BYTES,
    VECTOR_BYTES,
    WARP,
    Cost,
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
LAUNCH_SECONDS = 3e-6
L2_FACTOR = 2.5  # bandwidth of the L2 cache over that of the memory
CHOICE_FACTOR = 1.05  # a candidate listed earlier is taken unless another is predicted to be this much faster
SPECIAL_FACTOR = 1.1  # the same for a special kernel against depthwise.cu, which reads more from the caches
MAX_PARTIAL_BYTES = 64 << 20  # of the partial sums of a gradient


@dataclass(frozen=True)
class GradPlan:
    """A gradient that is split over positions: the launch, and the reductions of its partial sums.

    Attributes:
        launch: for the arrays (x, dy, partial, bias_partial), or (x, w, dy, dx, partial, bias_partial) if `fused`.
        splits: parts of the positions; partial is [splits, weights], bias_partial [splits, filters].
        fused: whether the launch gives the gradient of the input too.
    """

    launch: LaunchPlan
    splits: int
    weights: int
    filters: int
    fused: bool
    reduce: LaunchPlan
    reduce_bias: LaunchPlan


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

    @property
    def multiplier(self) -> int:
        """Output channels of an input channel."""
        return self.filters // self.channels

    @property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        """All axes; those that the shape does not have are 1 long."""
        return (self.walk, *self.outer)

    @property
    def source_positions(self) -> int:
        """Of a batch item."""
        return math.prod(axis.source for axis in self.axes)

    @property
    def target_positions(self) -> int:
        """Of a batch item."""
        return math.prod(axis.target for axis in self.axes)

    @property
    def source_channels(self) -> int:
        """Channels of the array that is read."""
        return self.filters if self.transposed else self.channels

    @property
    def target_channels(self) -> int:
        """Channels of the array that is written."""
        return self.channels if self.transposed else self.filters

    @property
    def source_size(self) -> int:
        """Elements."""
        return self.batch * self.source_positions * self.source_channels

    @property
    def target_size(self) -> int:
        """Elements."""
        return self.batch * self.target_positions * self.target_channels

    @property
    def weights(self) -> int:
        """Elements of w."""
        return math.prod(axis.taps for axis in self.axes) * self.filters

    @property
    def phases(self) -> int:
        """Phases of the walked axis."""
        walk = self.walk
        return walk.dilation // walk.common * (walk.stride if self.transposed else 1)

    @property
    def step(self) -> int:
        """Source steps from one output of a phase to the next."""
        return 1 if self.transposed else self.walk.stride // self.walk.common

    @property
    def products(self) -> int:
        """Multiply-adds of real or complex numbers; those with padding are counted."""
        positions = self.source_positions if self.transposed else self.target_positions
        return self.batch * positions * self.weights

    @property
    def flops(self) -> int:
        """Operations that the definition needs."""
        return self.products * (8 if self.element.is_complex else 2)

    @property
    def least_bytes(self) -> int:
        """Every array once."""
        return (self.source_size + self.target_size + self.weights) * self.element.bytes

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


# --- Convolution and transpose -----------------------------------------------------------------------------------


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
    found, rejected = [plan_walk(problem, activation, aligned)], []
    try:
        found.insert(0, (plan_rows if problem.first else plan_carry)(problem, activation, aligned))
    except PlanError as error:
        rejected.append(str(error))
    best = _fastest(found, SPECIAL_FACTOR)
    rejected += [f"{other.kernel}: {_seconds(other) * 1e6:.1f} us predicted" for other in found if other is not best]
    return _checked(dataclasses.replace(best, rejected=(*rejected, *best.rejected)))


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
    _require_step_one(problem, "depthwise_carry")
    vec, x_vec = _widths(problem, aligned)
    taps, inputs = walk.taps, CARRIED_INPUTS[walk.taps]
    words = _words(element)
    registers = _registers(
        "depthwise_carry",
        (2 * taps + 1) * vec * words,
        8 if words == 4 else 0,
        0 if activation in CHEAP_ACTIVATIONS else 40,
        min(inputs, 8) * x_vec * element.bytes / 4,
    )
    resident = _resident(limits, registers)
    phases, longest = problem.phases, -(-walk.target // problem.phases)
    vectors = problem.target_channels // vec

    def candidate(steps: int) -> LaunchPlan:
        walks = -(-longest // steps)
        threads = problem.batch * walks * phases * vectors
        again = problem.batch * phases * (walks - 1) * (taps - 1) * problem.source_channels * element.bytes
        loaded = threads * vec * element.bytes * taps + again + problem.least_bytes
        # Walk n+1 begins with what walk n ends with: in the L2 cache, if it holds what is read and written in between.
        between = resident * limits.multiprocessors * THREADS * steps * (vec + x_vec) * element.bytes
        per_output = vec * (taps * _slots(problem) + _conversions(element) + _finishing(activation, element)) + 4
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
            *_first_and_steps(problem),
            *_taps_of(problem),
        )
        return _launch(
            problem,
            "depthwise_carry",
            _common(problem, activation, VEC=vec, XV=x_vec, K=taps, TP=inputs, BLOCKS=resident),
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
    return _fastest(plans)


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
        per_vector: float = windows * (4 + width * _conversions(element)) + axis.taps * (3 + width * _slots(problem))
        per_vector += width * _finishing(activation, element) + 2 * (width // y_vec) + 8
        threads = blocks * THREADS
        return _launch(
            problem,
            "depthwise_rows",
            _common(
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
                *_taps_of(problem),
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
    return _fastest(plans)


def plan_walk(problem: Problem, activation: str, aligned: tuple[int, ...]) -> LaunchPlan:
    """The launch of kernels/depthwise.cu, which computes everything."""
    walk, element = problem.walk, problem.element
    step, words = problem.step, _words(element)
    longest = -(-walk.target // problem.phases)
    summed = problem.multiplier if problem.transposed else 1
    # A position of the transpose meets every stride-th tap; what is left over is taken singly.
    met = max(1, walk.taps // (walk.stride // walk.common)) if problem.transposed else walk.taps
    met_outer = [
        max(1, axis.taps // (axis.stride // axis.common)) if problem.transposed else axis.taps for axis in problem.outer
    ]
    outer = math.prod(met_outer)
    widest, x_widest = _widths(problem, aligned)
    rejected: list[str] = []
    plans = []
    for width, outputs, chunk in _walks(widest, x_widest, longest, met):
        x_width = width * x_widest // widest
        if not x_width:
            continue
        loads = _inputs(outputs, chunk, step)
        # All inputs of a step may be on their way at once, with an address each.
        in_flight = loads * (x_width * element.bytes / 4 + 2)
        registers = _registers("depthwise", (outputs + chunk) * width * words, in_flight)
        if registers > REGISTERS_PER_THREAD - 24:
            rejected.append(f"{outputs} outputs of {width} channels, {chunk} taps: about {registers} registers")
            continue
        resident = 3 if registers <= (REGISTERS if problem.limits.capability < (10, 0) else REGISTERS - 8) else 2
        groups = -(-longest // outputs)
        vectors = problem.target_channels // width
        threads = problem.batch * vectors * problem.phases * groups * math.prod(axis.target for axis in problem.outer)
        whole, single = divmod(met, chunk)
        reads = whole * loads + single * _inputs(outputs, 1, step)
        fetches = (whole * chunk + single) * outer * summed
        products = outputs * fetches * width
        accesses = (reads * outer * summed, fetches, outputs)
        instructions: float = 120 + accesses[0] * (3 + x_width * _conversions(element))
        instructions += fetches * (2 + width * _conversions(element)) + products * _slots(problem)
        instructions += outputs * (3 + width * _finishing(activation, element))
        moved = threads * element.bytes * (accesses[0] * x_width + (fetches + outputs) * width)
        # What several threads read comes from the L2 cache for all but one.
        together = problem.outer[1].target if problem.first else max(1, THREADS // vectors)
        rows = min(together, problem.outer[1].target)  # of outputs in a block, whose inputs overlap in L1
        fresh = _inputs(rows, met_outer[1], 1 if problem.transposed else problem.outer[1].stride) / rows
        passed = threads * _inputs(outputs, met, step) * met_outer[0] * fresh * summed * x_width * element.bytes
        again = max(0.0, passed - problem.source_size * element.bytes)
        plans.append(
            _launch(
                problem,
                "depthwise",
                _common(
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
                    threads,
                    vectors,
                    problem.multiplier,
                    problem.phases,
                    groups,
                    *_pitches(problem),
                    *_fields(problem.axes),
                ),
                threads=threads,
                walked=outputs,
                registers=registers if resident == 3 else REGISTERS_PER_THREAD,
                instructions=instructions,
                moved=moved,
                dram=problem.least_bytes + again / L2_FACTOR,
                flops=max(threads * products, problem.products),
                reason=f"{outputs} outputs of {width} channels a thread, {chunk} taps at a time",
            )
        )
    best = _fastest(plans)
    return dataclasses.replace(best, rejected=tuple(rejected[:4]))


def _walks(widest: int, x_widest: int, longest: int, taps: int) -> Iterator[tuple[int, int, int]]:
    """Candidates: channels and outputs of a thread, taps at a time."""
    width = widest
    while width and width >= widest // 2:
        if width * x_widest % widest == 0:
            for outputs in (8, 4, 16, 2, 1):
                if outputs == 1 or outputs < 2 * longest:
                    for chunk in range(min(CARRIED_TAPS, taps), 0, -1):
                        yield width, outputs, chunk
        width //= 2


# --- Gradients ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def plan_depthwise_kernel_grad(
    shape: ConvShape, dtype: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> GradPlan:
    """The plan of a kernel gradient and of the bias gradient with it.

    Args:
        aligned: elements by which x, dy, dw and db lie behind a 16-byte boundary.
    """
    problem = problem_of(shape, dtype, limits)
    try:
        launch, splits = plan_grad_rows(problem, (aligned[0], aligned[1], 0), with_input=False)
    except PlanError as error:
        launch, splits = plan_grad(problem, aligned[:2])
        launch = dataclasses.replace(launch, rejected=(str(error), *launch.rejected))
    return _grad_plan(problem, launch, splits, aligned[2:], fused=False)


@functools.lru_cache(maxsize=4096)
def plan_depthwise_grads(
    shape: ConvShape, dtype: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> GradPlan | str:
    """The plan of all gradients in one pass, or the reason why there is none.

    Args:
        aligned: elements by which x, w, dy, dx, dw and db lie behind a 16-byte boundary.
    """
    problem = problem_of(shape, dtype, limits)
    x, w, dy, dx, *results = aligned
    try:
        if problem.first:
            launch, splits = plan_grad_rows(problem, (x, dy, dx), with_input=True)
        else:
            launch, splits = plan_grads(problem, (x, w, dy, dx))
    except PlanError as error:
        return str(error)
    return _grad_plan(problem, launch, splits, tuple(results), fused=True)


def _grad_plan(problem: Problem, launch: LaunchPlan, splits: int, aligned: tuple[int, ...], fused: bool) -> GradPlan:
    name, limits = problem.element.dtype, problem.limits
    reduce = plan_reduce(name, splits, problem.weights, aligned[0], limits)
    reduce_bias = plan_reduce(name, splits, problem.filters, aligned[1], limits)
    return GradPlan(_checked(launch), splits, problem.weights, problem.filters, fused, reduce, reduce_bias)


def plan_grad(problem: Problem, aligned: tuple[int, ...]) -> tuple[LaunchPlan, int]:
    """The launch of kernels/depthwise_grad.cu, which computes every kernel gradient, and its splits."""
    walk, element = problem.walk, problem.element
    step, words, longest = problem.step, _words(element), -(-walk.target // problem.phases)
    widest, x_widest = _widths(problem, (aligned[0], 0, aligned[1]))
    rejected: list[str] = []
    plans = []
    for width, outputs, chunk in _walks(widest, x_widest, longest, walk.taps):
        x_width = width * x_widest // widest
        if not x_width:
            continue
        loads = _inputs(outputs, chunk, step)
        registers = _registers(
            "depthwise_grad",
            (outputs + chunk + 1) * width * words,
            0,
            (min(loads, 12) * x_width + outputs * width / 2) * element.bytes / 4,
        )
        if registers > REGISTERS:
            rejected.append(f"{outputs} outputs of {width} channels, {chunk} taps: about {registers} registers")
            continue
        vectors = problem.filters // width
        lanes = 1 if problem.first else min(WARP, 1 << (vectors - 1).bit_length())
        tiles, chunks = -(-vectors // lanes), -(-walk.taps // chunk)
        taps = math.prod(axis.taps for axis in problem.outer)
        groups = -(-longest // outputs)
        units = problem.batch * problem.phases * groups * math.prod(axis.target for axis in problem.outer)
        splits, share = _splits(problem, tiles * chunks * taps, units, THREADS // lanes)
        blocks = splits * tiles * chunks * taps
        turns = -(-share // (THREADS // lanes))
        instructions = (
            150
            + (chunk + 1) * 40
            + turns
            * (
                100
                + loads * (4 + x_width * _conversions(element))
                + outputs * (3 + width * _conversions(element))
                + outputs * chunk * width * _slots(problem)
            )
        )
        moved = blocks * share * lanes * element.bytes * (loads * x_width + outputs * width)
        integers = (
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
            *_pitches(problem),
            *_fields(problem.axes),
        )
        plans.append(
            (
                _launch(
                    problem,
                    "depthwise_grad",
                    _common(
                        problem, None, CHANNELS_FIRST=int(problem.first), VEC=width, XV=x_width, TX=lanes, TP=outputs,
                        KC=chunk, SG=step,
                    ),
                    integers,
                    threads=blocks * THREADS,
                    walked=outputs,
                    registers=registers,
                    shared=THREADS * width * element.sum_bytes,
                    instructions=instructions,
                    moved=moved,
                    # Blocks for other taps read the same again, from the L2 cache if they run together.
                    dram=problem.least_bytes * (1 + (chunks * taps - 1) // 4) + 2 * splits * problem.weights * 4,
                    flops=blocks * share * lanes * outputs * chunk * width,
                    reason=f"{splits} parts of {share} units of {outputs} outputs of {width} channels, "
                    f"{chunk} taps at a time",
                    extents=(splits * problem.weights, units + share),
                ),
                splits,
            )
        )  # fmt: skip
    return _fastest_grad(plans, rejected)


def plan_grads(problem: Problem, aligned: tuple[int, ...]) -> tuple[LaunchPlan, int]:
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
    taps, words = walk.taps, _words(element)
    widest = vector(element.bytes, problem.channels, *aligned)
    longest = -(-max(walk.source + walk.pad, walk.target) // walk.dilation)
    rejected: list[str] = []
    plans = []
    for width, outputs, _ in _walks(widest, widest, longest, 1):
        inputs = outputs + taps - 1
        registers = _registers(
            "depthwise_grads", (2 * taps + inputs + 1) * width * words, 0, inputs * width * element.bytes / 4
        )
        if registers > REGISTERS:
            rejected.append(f"{outputs} positions of {width} channels: about {registers} registers")
            continue
        vectors = problem.channels // width
        lanes = min(WARP, 1 << (vectors - 1).bit_length())
        tiles, groups = -(-vectors // lanes), -(-longest // outputs)
        units = problem.batch * walk.dilation * groups
        splits, share = _splits(problem, tiles, units, THREADS // lanes)
        blocks, turns = splits * tiles, -(-share // (THREADS // lanes))
        instructions = (
            150
            + (taps + 1) * 40
            + turns
            * (
                80
                + inputs * (4 + 2 * width * _conversions(element))
                + outputs * (2 + width * (1 + _conversions(element) + 2 * taps * _slots(problem)))
            )
        )
        data = 2 * problem.source_size + problem.target_size
        plans.append(
            (
                _launch(
                    problem,
                    "depthwise_grads",
                    _common(problem, None, VEC=width, TX=lanes, TP=outputs, K=taps),
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


def plan_grad_rows(problem: Problem, aligned: tuple[int, ...], with_input: bool) -> tuple[LaunchPlan, int]:
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
    splits, share = _splits(problem, problem.filters * chunks, units, THREADS)
    blocks = splits * problem.filters * chunks
    windows = (chunk + width - 2) // width + 2 if axis.dilation == 1 else 2 * chunk
    passes = 2 if with_input else 1
    per_unit: float = 60 + (windows * passes + 1) * (
        4 + width * (_conversions(element) + VECTOR_BYTES // element.bytes // x_vec)
    )
    per_unit += passes * chunk * width * _slots(problem) + 2 * width
    turns = -(-share // THREADS)
    data = passes * problem.source_size + problem.target_size
    launch = _launch(
        problem,
        "depthwise_grad_rows",
        _common(
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


def _splits(problem: Problem, tiles: int, units: int, workers: int) -> tuple[int, int]:
    """Parts of the units, and the units of a part, from the shape and the number of multiprocessors alone.

    Enough blocks for two waves, at least 4 units for each of a block's workers.
    """
    blocks = 2 * BLOCKS_PER_MULTIPROCESSOR * problem.limits.multiprocessors
    room = MAX_PARTIAL_BYTES // (problem.weights * problem.element.sum_bytes)
    splits = max(1, min(blocks // tiles, units // (4 * workers), room))
    share = -(-units // splits)
    return -(-units // share), share


# --- What candidates have in common ------------------------------------------------------------------------------


def _words(element: Element) -> int:
    """Registers of a sum."""
    return element.sum_bytes // 4


def _conversions(element: Element) -> int:
    """Instructions from an element to a sum."""
    return int(element.bytes == 2)


def _finishing(activation: str, element: Element) -> int:
    """Instructions of bias, activation and rounding of one output."""
    return 1 + _conversions(element) + (0 if activation in CHEAP_ACTIVATIONS else 30)


def _slots(problem: Problem) -> float:
    """Issue slots of a multiply-add: of fp32 one; of fp64 as many as the device is slower in it."""
    limits, element = problem.limits, problem.element
    slow = limits.fp32_rate / limits.fp64_rate if element.sum_dtype in ("float64", "complex128") else 1.0
    return slow * (4 if element.is_complex else 1)


def _inputs(outputs: int, taps: int, step: int) -> int:
    """Inputs that `outputs` windows of `taps` read, `step` apart."""
    return outputs * taps if step >= taps else (outputs - 1) * step + taps


def _registers(kernel: str, *parts: float) -> int:
    return min(REGISTERS_PER_THREAD, math.ceil(sum(parts)) + REGISTERS_OF_INDICES[kernel])


def _widths(problem: Problem, aligned: tuple[int, ...]) -> tuple[int, int]:
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


def _require_step_one(problem: Problem, kernel: str) -> None:
    walk = problem.walk
    if problem.transposed and (walk.stride > 1 or problem.multiplier > 1):
        raise PlanError(f"{kernel}: of the transpose only stride 1 without a multiplier")
    if problem.step > 1:
        raise PlanError(f"{kernel}: stride {walk.stride} does not divide dilation {walk.dilation}")


def _first_and_steps(problem: Problem) -> tuple[int, int, int]:
    """Where tap 0 of the first output reads, and by how much that moves with the phase and with the output."""
    walk = problem.walk
    if problem.transposed:
        return walk.pad - (walk.taps - 1) * walk.dilation, 1, walk.dilation
    return -walk.pad, walk.stride, walk.dilation


def _taps_of(problem: Problem) -> tuple[int, int]:
    """Elements of w before tap 0 and from one tap to the next; the transpose takes them from the last on."""
    taps, filters = problem.weights // problem.filters, problem.filters
    return ((taps - 1) * filters, -filters) if problem.transposed else (0, filters)


def _pitches(problem: Problem) -> tuple[int, int, int, int]:
    """Elements of a batch item of source and target, then from one channel of theirs to the next."""
    batches = (problem.source_size // problem.batch, problem.target_size // problem.batch)
    return (*batches, problem.source_positions, problem.target_positions) if problem.first else (*batches, 1, 1)


def _fields(axes: Iterable[Axis]) -> Iterator[int]:
    for axis in axes:
        yield from dataclasses.astuple(axis)


def _common(problem: Problem, activation: str | None, **constants: int) -> tuple[tuple[str, int | str], ...]:
    fused = () if activation is None else (("ACTIVATION", ACTIVATION_CODES[activation]),)
    return (("ELEMENT", problem.element.c_type), *fused, *constants.items())


def _launch(
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
    limits, element = problem.limits, problem.element
    blocks = -(-threads // THREADS)
    width = problem.index_bytes(walked, blocks * THREADS, *extents, *integers)
    resident = _resident(limits, registers, shared)
    blocks_each = blocks / limits.multiprocessors
    # Two blocks, each thread with 8 loads of 16 bytes on their way, keep the memory busy; fewer at the end do not.
    busy = min(resident, 2)
    memory = dram / limits.bandwidth * max(1 + 0.25 * busy / blocks_each, busy / blocks_each)
    issued = limits.fp32_rate / 2  # instructions of a thread a second: one where a fused multiply-add could be
    cores = max(moved / (limits.fp32_rate / 4), blocks * THREADS * instructions / issued)
    seconds = max(memory, cores * math.ceil(blocks_each) / blocks_each)
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
        cost=Cost(flops * (8 if element.is_complex else 2), least_flops, moved, least_bytes, seconds + LAUNCH_SECONDS),
    )


def _resident(limits: DeviceLimits, registers: int, shared: int = 0) -> int:
    """Blocks that a multiprocessor holds."""
    by_registers = REGISTERS_PER_MULTIPROCESSOR // (-(-registers // 8) * 8 * THREADS)
    by_shared = limits.shared_bytes_per_multiprocessor // (shared + 1024)  # 1 KiB of each block belongs to the driver
    return max(1, min(limits.threads_per_multiprocessor // THREADS, by_registers, by_shared))


def _seconds(plan: LaunchPlan) -> float:
    return plan.cost.seconds if plan.cost else math.inf


def _fastest(plans: list[LaunchPlan], factor: float = CHOICE_FACTOR) -> LaunchPlan:
    """The first that is predicted to be about as fast as any, so that small problems share the same few kernels."""
    least = min(map(_seconds, plans))
    return next(plan for plan in plans if _seconds(plan) <= factor * least)


def _fastest_grad(plans: list[tuple[LaunchPlan, int]], rejected: list[str]) -> tuple[LaunchPlan, int]:
    best = _fastest([plan for plan, _ in plans])
    splits = next(splits for plan, splits in plans if plan is best)
    return dataclasses.replace(best, rejected=tuple(rejected[:4])), splits


def _checked(plan: LaunchPlan) -> LaunchPlan:
    if plan.grid[0] > MAX_GRID_X:
        raise PlanError(f"{plan.kernel}: {plan.grid[0]} blocks, at most {MAX_GRID_X}")
    return plan
