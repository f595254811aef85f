"""What `cuconv doctor` reports: versions, the place that `cuconv.asarray` chooses and why, the GPUs, and the kernels:
the sources found, whether they compile, and where compiled ones are kept."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import time
from typing import Any

import numpy as np

from cuconv import __version__, ops
from cuconv.cuda import runtime
from cuconv.plan.devices import OLDEST
from cuconv.plan.types import PlanError


def examine() -> dict[str, Any]:
    """Facts about this machine and installation, fit for JSON. `healthy` is whether the installation is whole."""
    found = runtime.probe()
    kernels = _kernels()
    compiling = _compiling(found) if found.nvrtc_version and not kernels["error"] else None
    return {
        "healthy": not kernels["error"] and not (compiling and compiling["problem"]),
        "cuconv": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "numpy": np.__version__,
        "blas": _blas(),
        "ml_dtypes": importlib.metadata.version("ml_dtypes"),
        "rich": importlib.metadata.version("rich"),
        "cupy": found.cupy_version,
        "driver": found.driver_version,
        "nvrtc": found.nvrtc_version,
        "gpus": [
            {
                "index": device.index,
                "name": device.name,
                "compute_capability": device.compute_capability,
                "memory_bytes": device.memory_bytes,
                "limits": dataclasses.asdict(device.limits) if device.limits else None,
                "kernels_as": str(device.target) if device.target else None,
                "problem": device.problem,
            }
            for device in found.devices
        ],
        "arrays": {"library": "CuPy" if found.usable else "NumPy", "reason": found.reason},
        "kernels": kernels,
        "compiling": compiling,
        "compiled": runtime.cubin_cache().summary(),
    }


def device_of(array: Any) -> str:
    """The device that holds `array`, in words."""
    if isinstance(array, np.ndarray):
        return f"CPU (NumPy {np.__version__}, {_blas()}, {os.cpu_count()} cores)"
    names = {device.index: device.name for device in runtime.probe().devices}
    index = array.device.id
    return f"GPU {index} ({names.get(index, 'unknown')}, CuPy {runtime.probe().cupy_version})"


def device_of_model(model: Any) -> str:
    """The device that holds the weights of `model`, which is where it computes."""
    return device_of(next(iter(model.weights), ops.asarray(0.0)))


def _blas() -> str:
    """The library behind `numpy.matmul`, with its version."""
    built: Any = np.show_config(mode="dicts")
    blas = built.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown BLAS')} {blas.get('version', '')}".strip()


def _compiling(found: runtime.Probe) -> dict[str, Any] | None:
    """Whether NVRTC takes the kernels' common header, for the first GPU or the oldest one there could be.

    None where it cannot be asked; `arrays` says why.
    """
    oldest = runtime.Target("sm_{}{}".format(*OLDEST))
    target = next((device.target for device in found.devices if device.target), oldest)
    started, problem = time.perf_counter(), None
    try:
        runtime.compile_check(target)
    except runtime.KernelError as error:
        problem = str(error)
    except PlanError:
        return None
    return {"target": str(target), "seconds": time.perf_counter() - started, "problem": problem}


def _kernels() -> dict[str, Any]:
    try:
        folder = runtime.kernel_directory()
    except FileNotFoundError as error:
        return {"path": None, "files": [], "error": str(error)}
    return {
        "path": str(folder),
        "files": sorted(path.name for path in folder.iterdir() if path.suffix in (".cu", ".cuh")),
        "error": None,
    }
