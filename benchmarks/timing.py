"""What the comparisons add to :mod:`cuconv.timing`, and the machine that their numbers belong to."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import time
import timeit
from collections.abc import Mapping
from datetime import date
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from cuconv.bench import processor
from cuconv.timing import Call, Clock, Replay, in_turns, rotated

Name = TypeVar("Name")

# On a machine that others use too, the processor's clock leaves out what they took from one thread.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def one_thread() -> dict[str, str]:
    """The environment of a process whose BLAS and OpenMP use one thread."""
    return os.environ | dict.fromkeys(THREAD_VARIABLES, "1")


def pin_to_one_thread(module: str) -> None:
    """Restarts `python -m module` with every BLAS limited to one thread, unless it already is.

    BLAS and OpenMP read these variables once, when they are loaded: setting them after `import numpy` has no effect.
    """
    if os.environ != one_thread():
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], one_thread())


def interleaved(
    calls: Mapping[Name, Call], repeats: int, clock: Clock = time.perf_counter, seconds: float = 0.0
) -> dict[Name, float]:
    """Shortest time in seconds of each call, taken in turns for at least `seconds` in all.

    Turns spread a busy moment of the machine over all competitors, and the minimum drops it.
    """
    return {name: min(taken) for name, taken in in_turns(calls, repeats, clock, seconds).items()}


def per_call(
    calls: Mapping[Name, Call], repeats: int, clock: Clock = time.perf_counter, loops: int = 1000
) -> dict[Name, float]:
    """Shortest mean time in seconds of one call out of `loops` in a row, for calls of a few microseconds."""
    runs = {name: partial(timeit.Timer(call).timeit, loops) for name, call in calls.items()}
    return {name: seconds / loops for name, seconds in interleaved(runs, repeats, clock).items()}


# --- PyTorch on a GPU --------------------------------------------------------------------------------------------


class TorchCall:
    """A :class:`cuconv.timing.DeviceCall` of torch: its graph is captured and replayed on CuPy's current stream, so
    that the events of one library tell the time of both.

    Given several calls of the same work on different arrays, the launches of a graph take them in rotation.
    """

    def __init__(self, *calls: Call) -> None:
        self.calls = calls

    def capture(self, launches: int) -> Replay:
        import cupy
        import torch

        stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)
        with torch.cuda.stream(stream):  # searches for algorithms, and compiles, now
            for call in self.calls:
                call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        reasons: list[BaseException] = []
        try:
            # thread_local: threads that compile may ask for memory meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                try:
                    results = rotated(self.calls, launches)
                except BaseException as error:
                    reasons.append(error)
                    raise
        except RuntimeError as ended:  # a capture that has failed does not end well either
            raise (reasons or [ended])[0] from None  # the first error is the one to tell

        def start() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return Replay(start, launches, results, keeps=graph)


# --- The machine -------------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What a measured number depends on: processor, versions, commit and date."""
    import numpy as np

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "cpu": processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
        **{package: installed(package) for package in ("torch", "onnxruntime")},
        "commit": commit(),
        "date": today(),
    }


def installed(package: str) -> str:
    """The version of an installed package, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def today() -> str:
    """The date, 2026-12-31."""
    return date.today().isoformat()


def commit() -> str:
    """The checked-out commit, marked where files differ from it; in a copy without git, what CUCONV_COMMIT says."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CUCONV_COMMIT", "unknown")


NVML_SM_CLOCK, NVML_MEMORY_CLOCK = 1, 2


def gpu(device: int = 0) -> dict[str, str]:
    """What a number measured on a GPU depends on; what cannot be found out is empty. Nothing is set."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
    toolkit = cupy.cuda.runtime.runtimeGetVersion()
    return {
        "gpu": name,
        "driver": driver(),
        "cuda": f"{toolkit // 1000}.{toolkit % 1000 // 10}",
        "commit": commit(),
        "date": today(),
    }


def driver() -> str:
    """The version of the NVIDIA driver."""
    text = ctypes.create_string_buffer(80)
    library = _nvml()
    if library is None or library.nvmlSystemGetDriverVersion(text, len(text)):
        return ""
    return text.value.decode()


def clocks(device: int = 0) -> dict[str, str]:
    """The clocks of a GPU at this moment, in MHz."""
    import cupy

    found = {"sm_clock_mhz": "", "memory_clock_mhz": ""}
    library, handle = _nvml(), ctypes.c_void_p()
    # By bus, not by number: CUDA_VISIBLE_DEVICES renumbers for CUDA only.
    bus = cupy.cuda.runtime.deviceGetPCIBusId(device).encode()
    if library is None or library.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(handle)):
        return found
    for name, kind in zip(found, (NVML_SM_CLOCK, NVML_MEMORY_CLOCK), strict=True):
        value = ctypes.c_uint()
        if not library.nvmlDeviceGetClockInfo(handle, kind, ctypes.byref(value)):
            found[name] = str(value.value)
    return found


@lru_cache(maxsize=1)
def _nvml() -> Any:
    """NVIDIA's management library, which comes with the driver; None where it is not there."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library
