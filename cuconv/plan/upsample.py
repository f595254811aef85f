"""Plans of upsampling and its gradient: which axes are done in one launch, and how a launch is split.

Interpolation is separable. One launch for several axes reads and writes memory once, but reads every input of a window
from the caches, up to taps ** 2 times for three axes; a launch an axis writes what lies between. The model weighs the
two. The kernels know three axes, of which they walk the first; what the user calls channels, batch and axes is sorted
into these by :func:`merged` and :func:`_slots`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cuconv.plan.cost import slowest
from cuconv.plan.types import ELEMENTS, Cost, DeviceLimits, Element, LaunchPlan, index_bytes, vector

THREADS = 128  # of a block; as in both kernels
WAVES = 8  # blocks a multiprocessor computes one after the other, so that the last ones leave little of it idle
LONG_WALK = 4  # windows of axis 0; the rows read to fill the first one are then at most a quarter more
REGISTER_WORDS = 80  # of a thread in windows, weights and vectors, beside about 50 for places and addresses
CHANNEL_RUN = 128  # bytes of neighbouring channels, from which on a warp needs no second axis to access whole lines
CACHE_RATE = 5  # bytes from a multiprocessor's own cache, 128 a cycle, for each byte from memory; 4 to 8 on all devices

Axis = tuple[int, int, int]  # inputs, factor, taps

# Types of common.cuh of each size, for elements that are copied bit by bit.
COPIED = {2: "half_t", 4: "float", 8: "double"}


@dataclass(frozen=True)
class Stage:
    """One launch, and what it needs beside its input.

    Attributes:
        tables: inputs and factor of each of the kernel's axes that has a table of weights, None for the others.
        elements: how many the launch writes.
    """

    plan: LaunchPlan
    tables: tuple[tuple[int, int] | None, ...]
    elements: int


@dataclass(frozen=True)
class _Launch:
    """An array [batch, axes.., channels] that one launch enlarges, or the gradient of one."""

    batch: int
    axes: tuple[Axis, Axis, Axis]
    channels: int

    @property
    def small(self) -> int:
        """Elements before the axes are enlarged."""
        return self.batch * self.channels * math.prod(n for n, _, _ in self.axes)

    @property
    def large(self) -> int:
        """Elements after that."""
        return self.small * math.prod(s for _, s, _ in self.axes)


_Maker = Callable[[_Launch, Element, Element, tuple[int, int], DeviceLimits], Stage]


def merged(
    batch: int, sizes: Sequence[int], channels: int, factors: Sequence[int]
) -> tuple[int, tuple[tuple[int, int], ...], int]:
    """Batch, axes (inputs, factor) and channels, with outer axes that keep their size in the batch, inner ones in the
    channels.

    >>> merged(2, (5, 6, 7), 3, (1, 2, 1))
    (10, ((6, 2),), 21)
    """
    axes = list(zip(sizes, factors, strict=True))
    while axes and axes[0][1] == 1:
        batch *= axes.pop(0)[0]
    while axes and axes[-1][1] == 1:
        channels *= axes.pop()[0]
    return batch, tuple(axes), channels


@functools.lru_cache(maxsize=4096)
def plan_upsample(
    batch: int,
    sizes: tuple[int, ...],
    channels: int,
    factors: tuple[int, ...],
    reach: int,
    element: Element,
    aligned: tuple[int, int],
    limits: DeviceLimits,
) -> tuple[Stage, ...]:
    """The launches that enlarge [batch, sizes.., channels]; at least one factor must be above 1.

    Args:
        reach: inputs that interpolation reaches to either side; 0 is the nearest one, which copies.
        element: a real one; for copies only its size matters.
        aligned: of what is read and of what is written, see :func:`cuconv.cuda.arrays.alignment`.
    """
    return _best(_forward, batch, sizes, channels, factors, reach, element, aligned, limits)


@functools.lru_cache(maxsize=4096)
def plan_upsample_grad(
    batch: int,
    sizes: tuple[int, ...],
    channels: int,
    factors: tuple[int, ...],
    reach: int,
    element: Element,
    aligned: tuple[int, int],
    limits: DeviceLimits,
) -> tuple[Stage, ...]:
    """The launches of the gradient by [batch, sizes.., channels]; arguments as :func:`plan_upsample`."""
    return _best(_gradient, batch, sizes, channels, factors, reach, element, aligned, limits)


def _best(
    one: _Maker,
    batch: int,
    sizes: tuple[int, ...],
    channels: int,
    factors: tuple[int, ...],
    reach: int,
    element: Element,
    aligned: tuple[int, int],
    limits: DeviceLimits,
) -> tuple[Stage, ...]:
    """The quickest way to cut the axes into launches, innermost axes first."""
    batch, axes, channels = merged(batch, sizes, channels, factors)
    wide = ELEMENTS[element.sum_dtype] if reach else element
    candidates: dict[str, tuple[Stage, ...]] = {}
    for cut in _cuts(axes) if reach else [[range(len(axes))]]:
        stages = []
        done: set[int] = set()
        for number, group in enumerate(cut):
            now = [n if (axis in done) == (one is _gradient) else n * s for axis, (n, s) in enumerate(axes)]
            now = [axes[axis][0] if axis in group else now[axis] for axis in range(len(axes))]
            steps = [s if axis in group else 1 for axis, (_, s) in enumerate(axes)]
            launch = _slots(*merged(batch, now, channels, steps), 2 * reach or 1, element.bytes)
            first, last = number == 0, number == len(cut) - 1
            stages.append(
                one(
                    launch,
                    element if first else wide,
                    element if last else wide,
                    (aligned[0] if first else 0, aligned[1] if last else 0),
                    limits,
                )
            )
            done |= set(group)
        name = "all axes at once" if len(cut) == 1 else f"{len(cut)} launches"
        candidates[f"{name} (axes {', then '.join('+'.join(map(str, group)) for group in cut)})"] = tuple(stages)
    seconds = {name: _seconds(stages) for name, stages in candidates.items()}
    name = min(seconds, key=lambda each: seconds[each])
    others = tuple(f"{each}: {time * 1e6:.1f} us predicted" for each, time in seconds.items() if each != name)
    return tuple(
        replace(stage, plan=replace(stage.plan, reason=f"{name}; {stage.plan.reason}", rejected=others))
        for stage in candidates[name]
    )


def _seconds(stages: Sequence[Stage]) -> float:
    """Predicted for all launches of a candidate."""
    return sum(stage.plan.cost.seconds for stage in stages if stage.plan.cost)


def _cuts(axes: Sequence[tuple[int, int]]) -> list[list[range]]:
    """Every way to cut the axes into runs, last run first; each run enlarges something."""
    cuts = []
    for cut in itertools.product((False, True), repeat=len(axes) - 1):
        edges = [0, *itertools.compress(range(1, len(axes)), cut), len(axes)]
        runs = [range(a, b) for a, b in itertools.pairwise(edges)][::-1]
        if all(any(axes[axis][1] > 1 for axis in run) for run in runs):
            cuts.append(runs)
    return cuts


def _slots(batch: int, axes: tuple[tuple[int, int], ...], channels: int, taps: int, itemsize: int) -> _Launch:
    """The axes as a kernel takes them: three, the first walked by each thread, the others spread over threads."""
    given: list[Axis] = [(n, s, taps if s > 1 else 1) for n, s in axes]
    none: Axis = (1, 1, 1)
    if len(given) == 3:
        return _Launch(batch, (given[0], given[1], given[2]), channels)
    if len(given) == 2:
        return _Launch(batch, (given[0], none, given[1]), channels)
    if channels * itemsize >= CHANNEL_RUN:
        return _Launch(batch, (given[0], none, none), channels)
    return _Launch(1, ((batch, 1, 1), none, given[0]), channels)  # walks the batch, and keeps its weights


def _walk(columns: int, n0: int, taps: int, limits: DeviceLimits) -> int:
    """Inputs of axis 0 that a thread walks, so that `columns` threads and more fill the device."""
    capacity = limits.multiprocessors * limits.threads_per_multiprocessor // 2
    segments = 1
    for waves, least in ((WAVES, LONG_WALK * taps), (1, taps)):
        if segments * columns < capacity:
            segments = max(segments, min(-(-waves * capacity // columns), n0 // least))
    return -(-n0 // segments)


def _forward(
    launch: _Launch, source: Element, target: Element, aligned: tuple[int, int], limits: DeviceLimits
) -> Stage:
    """One launch of kernels/upsample.cu."""
    (n0, s0, taps0), (n1, s1, taps1), (n2, s2, taps2) = launch.axes
    itemsize = max(source.bytes, target.bytes)
    words = -(-source.sum_bytes // 4)
    row = n2 * s2 * launch.channels
    copies = taps0 == taps1 == taps2 == 1

    width, rowwise = vector(itemsize, launch.channels, *aligned), 0
    along = vector(itemsize, row, aligned[1])
    wide = index_bytes(max(launch.small, launch.large) + THREADS)
    if width * itemsize < 8 and along > width:
        width, rowwise = along, 1
    while width > 1 and _window_words(width, rowwise, taps0, taps2, words, wide) > REGISTER_WORDS:
        width //= 2
    rowwise = rowwise if width > 1 else 0

    columns = launch.batch * n1 * s1 * row // width
    run = _walk(columns, n0, taps0, limits)
    segments = -(-n0 // run)
    threads = columns * segments
    gathered = threads * (run + taps0 - 1) * taps1 * taps2 * width  # elements read from the caches
    stored = launch.large
    flops = 0 if copies else 2 * gathered + 2 * taps0 * stored
    least_flops = 0 if copies else 2 * max(taps0, taps1, taps2) * stored
    moved = (gathered * source.bytes + stored * target.bytes) + (0 if copies else stored // width * taps0 * words * 4)
    least = launch.small * source.bytes + stored * target.bytes
    plan = LaunchPlan(
        kernel="upsample",
        constants=(
            ("FROM", COPIED[source.bytes] if copies else source.c_type),
            ("TO", COPIED[target.bytes] if copies else target.c_type),
            ("TAPS0", taps0),
            ("TAPS1", taps1),
            ("TAPS2", taps2),
            ("VECTOR", width),
            ("ROWWISE", rowwise),
            ("INDEX", "int" if wide == 4 else "long long"),
        ),
        integers=(n0, n1, n2, s0, s1, s2, launch.channels, run, segments, threads),
        grid=(-(-threads // THREADS), 1, 1),
        block=(THREADS, 1, 1),
        index_bytes=wide,
        registers=48 + _window_words(width, rowwise, taps0, taps2, words, wide),
        reason=f"{width * target.bytes}-byte vectors {'along a row' if rowwise else 'of channels'}, "
        f"{run} inputs a thread",
        cost=_cost(flops, least_flops, moved, least, source, limits),
    )
    return Stage(plan, tuple((n, s) if taps > 1 else None for n, s, taps in launch.axes), stored)


def _window_words(width: int, rowwise: int, taps0: int, taps2: int, words: int, wide: int) -> int:
    """Registers a thread of upsample.cu fills: window and two vectors; along axis 2 weights, offsets and inputs."""
    columns = width if rowwise else 1
    return width * (taps0 + 2) * words + columns * taps2 * (2 * words + wide // 4)


def _gradient(
    launch: _Launch, source: Element, target: Element, aligned: tuple[int, int], limits: DeviceLimits
) -> Stage:
    """One launch of kernels/upsample_grad.cu."""
    (n0, s0, taps0), (n1, s1, taps1), (n2, s2, taps2) = launch.axes
    words = -(-source.sum_bytes // 4)
    width = vector(max(source.bytes, target.bytes), launch.channels, *aligned)
    while width > 1 and width * (taps0 + 3) * words > REGISTER_WORDS:
        width //= 2

    columns = launch.batch * n1 * n2 * launch.channels // width
    run = _walk(columns, n0, taps0, limits)
    segments = -(-n0 // run)
    threads = columns * segments
    rows = threads * (run + taps0 - 1) * s0
    gathered = rows * taps1 * s1 * taps2 * s2 * width
    stored = launch.small
    flops = 2 * gathered + 2 * rows * width * taps0
    moved = gathered * source.bytes + stored * target.bytes
    if taps2 > 1:
        moved += gathered // width * words * 4
    least = launch.large * source.bytes + stored * target.bytes
    wide = index_bytes(launch.large, stored, threads + THREADS)
    plan = LaunchPlan(
        kernel="upsample_grad",
        constants=(
            ("FROM", source.c_type),
            ("TO", target.c_type),
            ("TAPS0", taps0),
            ("TAPS1", taps1),
            ("TAPS2", taps2),
            ("VECTOR", width),
            ("INDEX", "int" if wide == 4 else "long long"),
        ),
        integers=(n0, n1, n2, s0, s1, s2, launch.channels, run, segments, threads),
        grid=(-(-threads // THREADS), 1, 1),
        block=(THREADS, 1, 1),
        index_bytes=wide,
        registers=48 + width * (taps0 + 3) * words,
        reason=f"{width * source.bytes}-byte vectors of channels, {run} inputs a thread",
        cost=_cost(flops, 2 * max(taps0, taps1, taps2) * launch.large, moved, least, source, limits),
    )
    return Stage(plan, tuple((n, s) if taps > 1 else None for n, s, taps in launch.axes), stored)


def _cost(flops: int, least_flops: int, moved: int, least: int, element: Element, limits: DeviceLimits) -> Cost:
    """Whatever takes longest: memory, caches, or arithmetic."""
    rate = limits.fp64_rate if element.sum_bytes > 4 else limits.fp32_rate
    times = {
        "memory": least / limits.bandwidth,
        "L2 cache": moved / (CACHE_RATE * limits.bandwidth),
        "multiply-adds": flops / rate,
    }
    return slowest(flops, least_flops, moved, least, times)
