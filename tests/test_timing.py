"""Samples are taken in turns, on a cold cache, and told by the right numbers."""

from __future__ import annotations

import itertools
import math
import sys
import types
from contextlib import contextmanager
from types import SimpleNamespace

import fake_graphs
import numpy as np
import pytest

from benchmarks import timing as comparison
from cuconv import timing
from cuconv.cuda import runtime
from cuconv.timing import CupyCall, Timing


@pytest.fixture
def gpu(monkeypatch):
    return fake_graphs.install(monkeypatch)


# --- Numbers -----------------------------------------------------------------------------------------------------


def test_percentiles():
    assert timing.summary([3.0]) == Timing(3.0, 3.0, 3.0, 1)
    assert timing.summary([5, 1, 4, 2, 3]) == Timing(3.0, pytest.approx(1.4), pytest.approx(4.6), 5)
    samples = list(range(101))
    np.random.default_rng(0).shuffle(samples)
    assert timing.summary(samples) == Timing(50.0, 10.0, 90.0, 101)


@pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
def test_samples_must_be_finite_numbers(samples):
    with pytest.raises(ValueError, match="`samples` must be finite numbers"):
        timing.summary(samples)


# --- The host's clock --------------------------------------------------------------------------------------------


def test_host_calls_take_turns_and_are_finished():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    times = timing.host_times(calls, samples=3, finish=lambda: order.append("|"))
    assert "".join(order) == "A|B|" * (1 + 3), "one round warms up"
    assert {name: each.count for name, each in times.items()} == {"A": 3, "B": 3}


def test_host_time_is_that_of_call_and_finish(monkeypatch):
    now = [0.0]

    def spend(seconds):
        now[0] += seconds

    monkeypatch.setattr(timing.in_turns, "__defaults__", (lambda: now[0], 0.0, math.inf))
    times = timing.host_times({"A": lambda: spend(2), "B": lambda: spend(5)}, 4, lambda: spend(1))
    assert times == {"A": Timing(3, 3, 3, 4), "B": Timing(6, 6, 6, 4)}


def test_rounds_end_when_the_time_is_up_but_not_before_ten():
    def taken(samples, most):
        clock = itertools.count()  # every call takes 1
        return {
            name: len(each)
            for name, each in timing.in_turns({"A": int, "B": int}, samples, lambda: next(clock), 0, most).items()
        }

    assert taken(50, math.inf) == {"A": 50, "B": 50}
    assert taken(50, 60) == {"A": 30, "B": 30}
    assert taken(50, 4) == {"A": 10, "B": 10}
    assert taken(3, 4) == {"A": 3, "B": 3}


# --- The GPU's clock ---------------------------------------------------------------------------------------------


def kernels(gpu, **seconds):
    return {name: CupyCall(lambda name=name, each=each: gpu.kernel(name, each)) for name, each in seconds.items()}


def replays(gpu):
    """What ran after the graphs were captured, as one letter each: flush ~, event |."""
    marks = {"flush": "~", "event": "|", "wait": ""}
    text = "".join(marks.get(each, each) for each in gpu.log)
    return text[text.index("~") :] if "~" in text else text[text.index("|") :]


def test_graphs_take_turns_and_the_cache_is_flushed_before_each(gpu):
    times = timing.device_times(kernels(gpu, A=2e-6, B=5e-6), samples=3, launches=4)
    assert replays(gpu) == "~|AAAA|~|BBBB|" * 3
    assert gpu.flushed == 6 * (256 << 20)
    assert {name: each.count for name, each in times.items()} == {"A": 3, "B": 3}


def test_device_time_is_that_of_one_launch_without_the_flush(gpu):
    times = timing.device_times(kernels(gpu, A=2e-6, B=5e-6), samples=3, launches=20)
    assert times["A"].median == pytest.approx(2e-6) and times["B"].p90 == pytest.approx(5e-6)


def test_median_and_tenths_are_those_of_all_replays_but_the_first(gpu):
    durations = iter([1e6, 0, 5, 10])

    def work():
        gpu.kernel("A", 0)

    call = CupyCall(work)
    capture = call.capture

    def varying(launches):
        replay = capture(launches)
        start = replay.start
        object.__setattr__(replay, "start", lambda: (gpu.execute("+", 4e-6 * next(durations)), start()))
        return replay

    call.capture = varying
    times = timing.device_times({"A": call}, samples=3, launches=4)
    assert times["A"] == Timing(pytest.approx(5e-6), pytest.approx(1e-6), pytest.approx(9e-6), 3)


def test_nothing_is_flushed_where_buffers_rotate(gpu):
    calls = [lambda name=name: gpu.kernel(name, 1e-6) for name in "123"]
    call = CupyCall(*calls)
    timing.device_times({"A": call}, samples=2, launches=7, flush_bytes=0)
    assert replays(gpu) == "|1231231||1231231|"
    assert gpu.flushed == 0


def test_a_graph_has_memory_of_its_own_as_long_as_it_lives(gpu):
    allocators = []

    def work():
        allocators.append(gpu.allocator and gpu.allocator.__self__)
        gpu.kernel("A", 1e-6)
        return object()

    with timing.timing_stream():
        replay = CupyCall(work).capture(3)
        assert allocators[0] is None, "the warm-up is not in it"
        assert set(allocators[1:]) == set(gpu.live) and len(gpu.live) == 1 and len(allocators) == 4
        allocators.clear()
        assert len(replay.results) == len(gpu.live) == 1
        del replay
    assert not gpu.live


def test_results_of_rotating_calls_are_kept_and_the_memory_of_earlier_ones_is_free(gpu):
    alive = fake_graphs.weakref.WeakSet()
    most = []

    class Result:
        pass

    def work(name):
        made = Result()
        made.name = name
        alive.add(made)
        most.append(len(alive))
        return made

    with timing.timing_stream():
        replay = CupyCall(lambda: work("x"), lambda: work("y")).capture(5)
    assert [each.name for each in replay.results] == ["x", "y"]
    assert max(most) == 2, "a launch has the memory of the launch before that used the same operands"


def test_what_waits_does_so_before_the_capture(gpu):
    """The first call may compile and wait for the GPU; a capture must not see that."""
    first = []

    def work():
        if not first:
            gpu.stream.synchronize()
            first.append(True)
        gpu.kernel("A", 1e-6)

    timing.device_times({"A": CupyCall(work)}, samples=1, launches=2)
    assert replays(gpu) == "~|AA|"


def test_an_error_in_a_capture_is_told_and_ends_it(gpu):
    calls = []

    def work():
        calls.append(1)
        if len(calls) > 1:
            gpu.kernel("forbidden", 0)  # then ending the capture is an error, too
            raise ValueError("the reason")

    with timing.timing_stream():
        with pytest.raises(ValueError, match="the reason"):
            CupyCall(work).capture(2)
        assert gpu.capturing is None and gpu.allocator is None


def test_long_calls_get_fewer_launches_then_fewer_samples(gpu):
    def launched(seconds, **calls):
        gpu.log.clear()
        times = timing.device_times(kernels(gpu, **calls), samples=50, launches=20, seconds=seconds)
        last = replays(gpu).split("~")[-1].strip("|")
        return {name: (last.count(name) or None, each.count) for name, each in times.items()}

    assert launched(math.inf, A=1.0) == {"A": (20, 50)}
    assert launched(2.0, A=1e-6) == {"A": (20, 50)}
    assert launched(2.0, A=7.9e-3) == {"A": (5, 50)}
    assert launched(2.0, A=0.11) == {"A": (1, 19)}
    assert launched(2.0, A=10.0) == {"A": (1, 10)}


def test_calls_must_be_given():
    with pytest.raises(ValueError, match="`calls` must be at least one"):
        CupyCall()


def test_without_cupy_the_reason_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(runtime.DriverError, match="CuPy"):
        timing.device_times({"A": CupyCall(int)})


# --- PyTorch on the same stream ----------------------------------------------------------------------------------


@pytest.fixture
def torch(monkeypatch, gpu):
    """A torch that knows streams and graphs, on the fake GPU."""
    module = types.ModuleType("torch")
    module.current = []

    class ExternalStream:
        def __init__(self, pointer):
            assert pointer == gpu.stream.ptr
            self.pointer = pointer

        def synchronize(self):
            gpu.stream.synchronize()

    class CUDAGraph:
        def replay(self):
            assert module.current[-1].pointer == gpu.stream.ptr, "replayed where the events are"
            for node in self.nodes:
                gpu.execute(*node)

    @contextmanager
    def stream(which):
        module.current.append(which)
        yield
        module.current.pop()

    @contextmanager
    def graph(which, stream, capture_error_mode):
        assert capture_error_mode == "thread_local" and stream.pointer == gpu.stream.ptr
        gpu.capturing = []
        try:
            yield
        finally:
            which.nodes, gpu.capturing = gpu.capturing, None
            if any(name == "forbidden" for name, _ in which.nodes):
                raise RuntimeError("capture was invalidated")

    module.cuda = SimpleNamespace(ExternalStream=ExternalStream, CUDAGraph=CUDAGraph, stream=stream, graph=graph)
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setitem(sys.modules, "cupy", gpu.cupy)
    return module


@pytest.mark.usefixtures("torch")
def test_torch_and_cupy_share_the_stream_and_take_turns(gpu):
    calls = kernels(gpu, A=2e-6)
    calls["B"] = comparison.TorchCall(*(lambda name=name: gpu.kernel(name, 3e-6) for name in "xy"))
    times = timing.device_times(calls, samples=2, launches=3)
    assert replays(gpu) == "~|AAA|~|xyx|" * 2
    assert times["B"].median == pytest.approx(3e-6)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("error, told", [(ValueError("the reason"), "the reason"), (None, "capture was invalidated")])
def test_an_error_in_a_capture_of_torch_is_told(gpu, error, told):
    calls = []

    def work():
        calls.append(1)
        if len(calls) > 1:
            gpu.kernel("forbidden", 0)
            if error:
                raise error

    with timing.timing_stream(), pytest.raises(Exception, match=told):
        comparison.TorchCall(work).capture(2)


# --- The machine -------------------------------------------------------------------------------------------------


class Nvml:
    """NVIDIA's management library: one GPU at one bus."""

    def nvmlSystemGetDriverVersion(self, text, size):  # noqa: N802
        text.value = b"580.65.06"
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus, handle):  # noqa: N802
        return 0 if bus == b"0000:0F:00.0" else 6

    def nvmlDeviceGetClockInfo(self, handle, kind, value):  # noqa: N802
        value._obj.value = {1: 1980, 2: 3201}[kind]
        return 0


@pytest.fixture
def driver(monkeypatch):
    runtime_api = SimpleNamespace(
        getDeviceProperties=lambda device: {"name": b"NVIDIA H200"},
        runtimeGetVersion=lambda: 13020,
        deviceGetPCIBusId=lambda device: "0000:0F:00.0",
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime_api)))
    monkeypatch.setattr(comparison, "_nvml", Nvml)
    return runtime_api


@pytest.mark.usefixtures("driver")
def test_facts_of_a_gpu():
    facts = comparison.gpu()
    assert facts["gpu"] == "NVIDIA H200" and facts["driver"] == "580.65.06" and facts["cuda"] == "13.2"
    assert set(facts) == {"gpu", "driver", "cuda", "commit", "date"} and facts["commit"]
    assert comparison.clocks() == {"sm_clock_mhz": "1980", "memory_clock_mhz": "3201"}


def test_what_the_driver_does_not_tell_is_empty(driver, monkeypatch):
    driver.deviceGetPCIBusId = lambda device: "elsewhere"
    assert comparison.clocks() == {"sm_clock_mhz": "", "memory_clock_mhz": ""}
    monkeypatch.setattr(comparison, "_nvml", lambda: None)
    assert comparison.driver() == "" and comparison.clocks()["sm_clock_mhz"] == ""


def test_the_commit_of_a_copy_is_what_the_environment_says(monkeypatch):
    def no_git(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(comparison.subprocess, "run", no_git)
    assert comparison.commit() == "unknown"
    monkeypatch.setenv("CUCONV_COMMIT", "1234567")
    assert comparison.commit() == "1234567"
