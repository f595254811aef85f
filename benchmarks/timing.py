"""Timing of competing calls in turns, and the machine the numbers belong to."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

Call = Callable[[], Any]
Clock = Callable[[], float]
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
    """Shortest time in seconds of each call, taken in turns: A B C A B C ... for at least `seconds` in all.

    Turns spread a busy moment of the machine over all competitors, and the minimum drops it. One round warms up.
    """
    best = {name: float("inf") for name in calls}
    for call in calls.values():
        call()
    rounds, spent = 0, 0.0
    while rounds < repeats or spent < seconds:
        for name, call in calls.items():
            start = clock()
            call()
            taken = clock() - start
            best[name] = min(best[name], taken)
            spent += taken
        rounds += 1
    return best


def per_call(
    calls: Mapping[Name, Call], repeats: int, clock: Clock = time.perf_counter, loops: int = 1000
) -> dict[Name, float]:
    """Shortest mean time in seconds of one call out of `loops` in a row, for calls of a few microseconds."""
    runs = {name: partial(timeit.Timer(call).timeit, loops) for name, call in calls.items()}
    return {name: seconds / loops for name, seconds in interleaved(runs, repeats, clock).items()}


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
        "date": date.today().isoformat(),
    }


def processor() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def installed(package: str) -> str:
    """The version of an installed package, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def commit() -> str:
    """The checked-out commit, marked where files differ from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
