"""How long calls take, on the host's clock and on the GPU's: samples taken in turns, told by median and tenths.

Device time is what CUDA events say around replays of a graph that holds many launches, so the host has no part in it. A
replay finds none of its arrays in the L2 cache; the second launch of one graph does, unless its buffers rotate
(:class:`CupyCall`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from cuconv.cuda import runtime

Call = Callable[[], Any]
Clock = Callable[[], float]
Name = TypeVar("Name")

FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
NOISE = 0.03  # as a part: two medians that are closer are the same
LEAST_SAMPLES = 10  # taken even where they last longer than they should


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the samples, and what a tenth of them stays below and above."""

    median: float
    p10: float
    p90: float
    count: int


def summary(samples: Sequence[float]) -> Timing:
    """The samples of one call in four numbers; between two samples, percentiles lie on the line.

    Raises:
        ValueError: there is no sample, or one is not finite.
    """
    if not len(samples) or not all(map(math.isfinite, samples)):
        raise ValueError(f"`samples` must be finite numbers, at least one. Received: samples={list(samples)}")
    p10, median, p90 = np.percentile(samples, (10, 50, 90)).tolist()
    return Timing(median, p10, p90, len(samples))


def verdict(before: Timing, now: Timing) -> str:
    """ "slower", "faster", or "same": a change where neither range from 10 % to 90 % of the samples reaches into the
    other, and the larger median is more than NOISE above the smaller."""
    for word, less, more in (("slower", before, now), ("faster", now, before)):
        if more.p10 > less.p90 and more.median > less.median * (1 + NOISE):
            return word
    return "same"


# --- On the host's clock -----------------------------------------------------------------------------------------


def in_turns(
    calls: Mapping[Name, Call],
    samples: int,
    clock: Clock = time.perf_counter,
    least_seconds: float = 0.0,
    most_seconds: float = math.inf,
) -> dict[Name, list[float]]:
    """Seconds of each call, taken in turns A B C A B C ..., which spreads a busy moment over all competitors.

    One round warms up. Then come `samples` rounds and more until `least_seconds` are measured; fewer, but at least
    `LEAST_SAMPLES`, where they would take more than `most_seconds`.
    """
    taken: dict[Name, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    rounds, spent = 0, 0.0
    while (rounds < samples or spent < least_seconds) and (rounds < LEAST_SAMPLES or spent < most_seconds):
        for name, call in calls.items():
            start = clock()
            call()
            seconds = clock() - start
            taken[name].append(seconds)
            spent += seconds
        rounds += 1
    return taken


def host_times(
    calls: Mapping[Name, Call], samples: int = 50, finish: Call = lambda: None, seconds: float = math.inf
) -> dict[Name, Timing]:
    """Wall time of each call and `finish` after it, in turns.

    Args:
        finish: waits for the device, so that the time is that from the call to its result.
        seconds: what all samples together may take; at least `LEAST_SAMPLES` are taken.
    """

    def finished(call: Call) -> Call:
        def whole() -> None:
            call()
            finish()

        return whole

    whole = {name: finished(call) for name, call in calls.items()}
    return {name: summary(taken) for name, taken in in_turns(whole, samples, most_seconds=seconds).items()}


# --- On the GPU's clock ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replay:
    """A captured graph: a call starts it on the stream of its capture.

    Attributes:
        results: what the launches return, which every replay fills anew.
        keeps: what must live as long as the graph.
    """

    start: Call
    launches: int
    results: list[Any]
    keeps: Any = field(default=None, repr=False)

    def __call__(self) -> None:
        self.start()


class DeviceCall(Protocol):
    """Work on a GPU that can be captured in a CUDA graph."""

    def capture(self, launches: int) -> Replay:
        """A graph of `launches` calls in a row, captured on CuPy's current stream, which is not the default one."""


class CupyCall:
    """A call whose work goes to CuPy's current stream.

    Given several calls of the same work on different arrays, the launches of a graph take them in rotation: with more
    bytes in all than the L2 cache has, every launch finds its inputs in memory.
    """

    def __init__(self, *calls: Call) -> None:
        if not calls:
            raise ValueError("`calls` must be at least one. Received: none")
        self.calls = calls

    def capture(self, launches: int) -> Replay:
        """See :class:`DeviceCall`. The graph's memory is a pool of its own: nobody else gets what it writes to."""
        cupy = runtime.library()
        stream = cupy.cuda.get_current_stream()
        for call in self.calls:  # whatever compiles, uploads or asks for memory by itself does it now
            call()
        stream.synchronize()
        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            try:
                results = rotated(self.calls, launches)
            except BaseException:
                with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):  # the first error is the one to tell
                    stream.end_capture()
                raise
            graph = stream.end_capture()
        return Replay(lambda: graph.launch(stream), launches, results, keeps=pool)


def rotated(calls: Sequence[Call], launches: int) -> list[Any]:
    """Makes `launches` calls, one of `calls` after the other; the last result of each that was called."""
    results: list[Any] = [None] * min(len(calls), launches)
    for number in range(launches):
        results[number % len(calls)] = None  # before the call: it may have that memory
        results[number % len(calls)] = calls[number % len(calls)]()
    return results


@contextlib.contextmanager
def timing_stream() -> Iterator[Any]:
    """A stream, current in CuPy, that starts when all work on the device is done."""
    cupy = runtime.library()
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        yield stream
        stream.synchronize()


def replay_times(
    replays: Mapping[Name, Replay],
    samples: int = 50,
    flush_bytes: int = FLUSH_BYTES,
    seconds: float = math.inf,
) -> dict[Name, Timing]:
    """Device time of one launch of each graph, in turns, the L2 cache flushed before every replay.

    Called within :func:`timing_stream`, where the graphs were captured.
    """
    cupy = runtime.library()
    stream = cupy.cuda.get_current_stream()
    flush = _flush(cupy, stream, flush_bytes)
    events = {name: (cupy.cuda.Event(), cupy.cuda.Event()) for name in replays}
    taken: dict[Name, list[float]] = {name: [] for name in replays}
    for replay in replays.values():  # the first one also brings the graph to the GPU
        replay()
    rounds, spent = 0, 0.0
    while rounds < samples and (rounds < LEAST_SAMPLES or spent < seconds):
        for name, replay in replays.items():
            start, end = events[name]
            flush()  # before the first event: while the GPU writes, the host brings the graph on its way
            start.record(stream)
            replay()
            end.record(stream)
        stream.synchronize()
        for name, (start, end) in events.items():
            elapsed = cupy.cuda.get_elapsed_time(start, end) / 1e3  # from milliseconds
            taken[name].append(elapsed / replays[name].launches)
            spent += elapsed
        rounds += 1
    return {name: summary(each) for name, each in taken.items()}


def _flush(cupy: Any, stream: Any, count: int) -> Call:
    """Writes `count` bytes on the stream."""
    if not count:
        return lambda: None
    memory = cupy.empty(count, np.uint8)
    return lambda: memory.data.memset_async(0, count, stream)


def launches_within(call: DeviceCall, samples: int, launches: int, seconds: float) -> int:
    """How many launches, `launches` at most, a graph may have for `samples` replays to take `seconds`."""
    if math.isinf(seconds):
        return launches
    once = replay_times({"": call.capture(1)}, samples=3)[""].median
    return launches if once * samples * launches <= seconds else max(1, int(seconds / (once * samples)))


def device_times(
    calls: Mapping[Name, DeviceCall],
    samples: int = 50,
    launches: int = 20,
    flush_bytes: int = FLUSH_BYTES,
    seconds: float = math.inf,
) -> dict[Name, Timing]:
    """Device time of each call: CUDA events around replays of a graph of `launches` calls, in turns A B C A B C ...

    Args:
        flush_bytes: written before every replay, so that it starts with a cold L2 cache. 0 where buffers rotate; then
            the time it takes the host to start a graph is in it.
        seconds: what all samples together may take. Long calls get fewer launches a graph, then fewer samples.

    Raises:
        DriverError: CuPy is not there.
    """
    with timing_stream():
        share = seconds / max(1, len(calls))
        counts = {name: launches_within(call, samples, launches, share) for name, call in calls.items()}
        replays = {name: call.capture(counts[name]) for name, call in calls.items()}
        return replay_times(replays, samples, flush_bytes, seconds)
