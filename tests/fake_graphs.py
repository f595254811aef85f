"""A GPU with graphs, events and a clock of its own, for whoever times: what cuconv/timing.py uses of CuPy.

    gpu = fake_graphs.install(monkeypatch)
    gpu.kernel("conv", 2e-6)  # what a call does: work on the current stream, or in the graph that is being captured

Work takes the time it says, and the host none; `log` lists what ran. Work outside of any capture and of the timing
stream runs, too, but is not in `log`. `live` holds the pools that have not been given back.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np

from cuconv.cuda import runtime


class CUDARuntimeError(RuntimeError):
    pass


class Gpu:
    def __init__(self):
        self.log, self.now, self.stream, self.allocator, self.capturing = [], 0.0, None, None, None
        self.live, self.synchronized, self.flushed = weakref.WeakSet(), 0, 0
        self.cupy = self._cupy()

    def kernel(self, name, seconds):
        if self.capturing is not None:
            self.capturing.append((name, seconds))
        else:
            self.execute(name, seconds)

    def execute(self, name, seconds):
        self.now += seconds
        if self.stream is not None:
            self.log.append(name)

    def _cupy(self):
        gpu = self

        class Stream:
            ptr = 0x5EED

            def __init__(self, non_blocking=False):
                assert non_blocking, "the default stream would wait for it"

            def __enter__(self):
                assert gpu.synchronized, "what made the operands may still run"
                gpu.stream = self
                return self

            def __exit__(self, *_):
                gpu.stream = None

            def synchronize(self):
                assert gpu.capturing is None, "a stream that captures cannot be waited for"
                gpu.log.append("wait")

            def begin_capture(self):
                gpu.capturing = []

            def end_capture(self):
                nodes, gpu.capturing = gpu.capturing, None
                if any(name == "forbidden" for name, _ in nodes):
                    raise CUDARuntimeError("capture was invalidated")
                return Graph(nodes)

        class Graph:
            def __init__(self, nodes):
                self.nodes = nodes

            def launch(self, stream):
                assert stream is gpu.stream
                for node in self.nodes:
                    gpu.execute(*node)

        class Event:
            def record(self, stream):
                assert stream is gpu.stream
                gpu.log.append("event")
                self.time = gpu.now

        class MemoryPool:
            def __init__(self):
                gpu.live.add(self)

            def malloc(self, count):
                raise AssertionError

        class using_allocator:  # noqa: N801
            def __init__(self, allocator):
                self.allocator = allocator

            def __enter__(self):
                gpu.allocator = self.allocator

            def __exit__(self, *_):
                gpu.allocator = None

        def empty(count, dtype):
            def memset_async(value, size, stream):
                assert stream is gpu.stream and size == count
                gpu.flushed += size
                gpu.execute("flush", 1e-4)

            return SimpleNamespace(data=SimpleNamespace(memset_async=memset_async), dtype=np.dtype(dtype))

        def device_synchronize():
            gpu.synchronized += 1

        return SimpleNamespace(
            empty=empty,
            cuda=SimpleNamespace(
                Stream=Stream,
                Event=Event,
                MemoryPool=MemoryPool,
                using_allocator=using_allocator,
                get_current_stream=lambda: gpu.stream,
                get_elapsed_time=lambda start, end: (end.time - start.time) * 1e3,
                runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError, deviceSynchronize=device_synchronize),
            ),
        )


def install(monkeypatch):
    """Puts it in CuPy's place for cuconv.timing."""
    gpu = Gpu()
    monkeypatch.setattr(runtime, "library", lambda: gpu.cupy)
    return gpu
