"""What this machine offers: CuPy, a driver, GPUs, and cuconv's own kernel sources. The only importer of CuPy."""

from __future__ import annotations

import functools
import importlib.resources
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Operations that a kernel in kernels/ computes. `cuconv.asarray` uses a GPU only when there are some: arrays that no
# operation takes would be of no use to anybody.
OPERATIONS: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Device:
    """One GPU as the driver names it."""

    index: int
    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Probe:
    """Whether arrays can be computed on a GPU here, and why not."""

    usable: bool
    reason: str
    devices: list[Device] = field(default_factory=list)
    cupy_version: str | None = None
    driver_version: str | None = None
    nvrtc_version: str | None = None


@functools.lru_cache(maxsize=1)
def probe() -> Probe:
    """What was found, asked once a process. Never raises: whatever is broken is the reason."""
    try:
        import cupy
    except ImportError as error:
        missing = "CuPy is not installed; `pip install cuconv[cuda12x]` or `[cuda13x]` adds it"
        return Probe(False, missing if error.name == "cupy" else f"CuPy does not import: {error}")
    except Exception as error:  # noqa: BLE001  a broken driver or toolkit shows itself in many types
        return Probe(False, f"CuPy does not import: {error}")
    found: dict[str, Any] = {"cupy_version": cupy.__version__}
    try:
        found["nvrtc_version"] = "{}.{}".format(*cupy.cuda.nvrtc.getVersion())
    except Exception as error:  # noqa: BLE001
        return Probe(False, f"NVRTC does not load: {error}", **found)
    try:
        version = cupy.cuda.runtime.driverGetVersion()
        found["driver_version"] = f"{version // 1000}.{version % 1000 // 10}"
        found["devices"] = [_device(cupy, index) for index in range(cupy.cuda.runtime.getDeviceCount())]
    except Exception as error:  # noqa: BLE001
        return Probe(False, f"no usable NVIDIA driver: {error}", **found)
    if not found["devices"]:
        return Probe(False, "the driver shows no GPU", **found)
    if not OPERATIONS:
        return Probe(False, "this version of cuconv has no CUDA kernels yet", **found)
    return Probe(True, f"GPU {found['devices'][0].name}", **found)


def _device(cupy: Any, index: int) -> Device:
    properties = cupy.cuda.runtime.getDeviceProperties(index)
    capability = f"{properties['major']}.{properties['minor']}"
    return Device(index, properties["name"].decode(), capability, int(properties["totalGlobalMem"]))


def device_array(array: Any) -> Any:
    """`array` on the current GPU."""
    import cupy

    return cupy.asarray(array)


def kernel_directory() -> Path:
    """The folder of the CUDA sources: beside the installed package, or in the checkout.

    Raises:
        FileNotFoundError: there is none; the installation is damaged.
    """
    package = Path(str(importlib.resources.files("cuconv")))
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "common.cuh").is_file():
            return folder
    raise FileNotFoundError(
        f"cuconv's kernel sources are missing. Looked in {package / 'kernels'} and beside {package}."
    )
