"""What a call costs on the host before the GPU hears of it: `python -m benchmarks.overhead [--json]`. Needs no GPU.

Everything is ours but the driver, which is stubbed: allocating gives memory that nobody reads, launching does nothing.
Arrays are CuPy's own where CuPy is installed, otherwise a stand-in with attributes as cheap as they can be in Python.

The processor's clock counts, and the shortest of many runs: on a busy machine the rest is other people's work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
import timeit
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.timing import machine

ADDRESS, APART = 1 << 40, 1 << 30  # of memory that nobody reads; bytes from one array to the next
PLACES = 64  # of arrays, used again and again
CUBIN_BYTES = 60_000  # what a kernel of a matrix product takes
PROPERTIES = {
    "name": b"NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multiProcessorCount": 132,
    "sharedMemPerBlockOptin": 227 << 10,
    "sharedMemPerMultiprocessor": 228 << 10,
    "maxThreadsPerMultiProcessor": 2048,
    "l2CacheSize": 60 << 20,
    "totalGlobalMem": 141 << 30,
}


@dataclass(frozen=True)
class Figure:
    """One figure, and the most it should be.

    Attributes:
        calls: of functions, in Python and in C; the same on every machine. Counted for repeated calls.
    """

    name: str
    microseconds: float
    goal: float
    calls: int | None = None

    @property
    def met(self) -> bool:
        return self.microseconds <= self.goal


# ------------------------------------------------------------------------------------------------ the stub


class Device:
    def __init__(self, index: int = 0) -> None:
        self.id = index

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


_places = itertools.cycle(APART * i for i in range(PLACES))


class StandIn:
    """What launch code asks of an array."""

    __slots__ = ("__weakref__", "data", "dtype", "flags", "nbytes", "shape", "size")
    __cuda_array_interface__ = None  # marks the type as a GPU's array
    _flags = types.SimpleNamespace(c_contiguous=True, writeable=True)

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.size = math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize
        self.flags = self._flags
        self.data = types.SimpleNamespace(ptr=ADDRESS + next(_places), device_id=0)

    ndim = property(lambda self: len(self.shape))
    device = property(lambda self: Device(0))

    def __array_function__(self, *_: Any) -> Any:
        return NotImplemented


def arrays_of(cupy: Any) -> tuple[type, Callable[..., Any]]:
    """The type of the arrays, and what makes one without a GPU."""
    if cupy is None:
        return StandIn, StandIn
    memory = cupy.cuda.UnownedMemory(ADDRESS, 1 << 40, None, 0)
    pointers = itertools.cycle([cupy.cuda.MemoryPointer(memory, APART * i) for i in range(PLACES)])
    return cupy.ndarray, lambda shape, dtype: cupy.ndarray(shape, dtype, memptr=next(pointers))


def install() -> tuple[Any, str]:
    """Puts a CuPy without a driver in the place of the real one; a function that makes arrays, and what they are."""
    try:
        import cupy as real
    except ImportError:
        real = None
    kind, empty = arrays_of(real)
    cubin = b"\x7fELF\x02".ljust(32, b"\0") + (CUBIN_BYTES).to_bytes(8, "little")
    cubin = cubin.ljust(CUBIN_BYTES, b"\0")

    stub: Any = types.ModuleType("cupy")
    stub.cuda = types.ModuleType("cupy.cuda")
    stub.cuda.nvrtc = types.ModuleType("cupy.cuda.nvrtc")
    stub.__version__ = real.__version__ if real else "none"
    stub.ndarray, stub.empty = kind, empty
    stub.asarray = lambda array: empty(array.shape, array.dtype)
    stub.RawModule = lambda path: types.SimpleNamespace(
        get_function=lambda name: types.SimpleNamespace(kernel=lambda grid, block, arguments, shared: None)
    )

    stub.cuda.Device = Device
    stub.cuda.Event = lambda **_: types.SimpleNamespace(done=True)
    stub.cuda.get_current_stream = lambda: types.SimpleNamespace(record=lambda event: None)
    stub.cuda.memory = types.SimpleNamespace(OutOfMemoryError=MemoryError)
    stub.cuda.driver = types.SimpleNamespace(CUDADriverError=RuntimeError)
    stub.cuda.runtime = types.SimpleNamespace(
        CUDARuntimeError=RuntimeError,
        cudaDevAttrClockRate=13,
        cudaDevAttrMemoryClockRate=36,
        cudaDevAttrSingleToDoublePrecisionPerfRatio=87,
        deviceGetAttribute=lambda attribute, device: {13: 1_980_000, 36: 3_201_000, 87: 2}[attribute],
        driverGetVersion=lambda: 13000,
        getDevice=lambda: 0,
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda index: PROPERTIES,
    )
    nvrtc = stub.cuda.nvrtc
    nvrtc.NVRTCError = RuntimeError
    nvrtc.getVersion = lambda: (13, 0)
    nvrtc.getSupportedArchs = lambda: [75, 80, 86, 89, 90, 100, 120]
    nvrtc.createProgram = nvrtc.compileProgram = nvrtc.destroyProgram = lambda *_: None
    nvrtc.getCUBIN = lambda program: cubin
    sys.modules |= {"cupy": stub, "cupy.cuda": stub.cuda, "cupy.cuda.nvrtc": nvrtc}
    return empty, f"CuPy {real.__version__} arrays" if real else "stand-ins for arrays: CuPy is not installed"


# ------------------------------------------------------------------------------------------------ the figures


def shortest(call: Callable[[], Any], loops: int, repeats: int) -> float:
    """Microseconds of one call: the shortest mean of `loops` in a row."""
    call()
    return min(timeit.repeat(call, number=loops, repeat=repeats, timer=time.process_time)) / loops * 1e6


def calls_in(call: Callable[[], Any]) -> int:
    """How many functions a call calls, itself left out."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count - 2  # `call`, and the one that ends this


def repeated(name: str, call: Callable[[], Any], goal: float, repeats: int) -> Figure:
    return Figure(name, shortest(call, 2000, repeats), goal, calls_in(call))


def measure(repeats: int) -> tuple[list[Figure], str]:
    empty, arrays = install()
    from cuconv import layers, ops
    from cuconv.cuda import cubins, runtime

    folder = tempfile.TemporaryDirectory(prefix="cuconv-overhead-")
    cache = cubins.Cubins(Path(folder.name))
    runtime._runtimes[0] = runtime.CudaRuntime(0, cache)
    x, w, bias, y = (empty(shape, "float32") for shape in ((8, 1024, 64), (3, 64, 64), (64,), (8, 1024, 64)))
    options: dict[str, Any] = {"padding": "same", "activation": "relu"}
    layer = layers.Conv1D(64, 3, **options)
    layer(np.zeros((1, 8, 64), np.float32))
    # A layer's weights follow its first input; here they are put on the GPU by hand.
    layer.kernel, layer.bias, layer._home = w, bias, type(x)

    def first(call: Callable[[int], Any]) -> float:
        """Microseconds of a call with a length nobody asked for, in a process that has loaded no kernel; the median."""
        taken = []
        for number in range(-1, 10 * repeats):  # at -1 modules are loaded and kernels compiled
            runtime._runtimes[0] = runtime.CudaRuntime(0, cubins.Cubins(Path(folder.name)))
            ops._device_engine.cache_clear()
            start = time.process_time()
            call(1000 + number)
            taken.append(time.process_time() - start)
        return float(np.median(taken[1:])) * 1e6

    def conv(length: int) -> Any:
        return ops.conv(empty((8, length, 64), "float32"), w, bias, **options)

    def transpose(length: int) -> Any:
        return ops.conv_transpose(empty((8, length, 64), "float32"), up, strides=8, padding="same")

    def depthwise(length: int) -> Any:
        x = empty((8, length, 64), "float32")
        return ops.depthwise_conv_grad(x, taps, x, padding="same")

    up, taps = empty((16, 32, 64), "float32"), empty((31, 64, 1), "float32")
    prepared = ops.prepare("conv", x.shape, w.shape, bias.shape, **options)
    figures = [
        repeated("ops.conv, a shape seen before", lambda: ops.conv(x, w, bias, **options), 6, repeats),
        repeated("layers.Conv1D, a shape seen before", lambda: layer(x), 12, repeats),
        repeated("prepared, with out", lambda: prepared(x, w, bias, out=y), 2, repeats),
        Figure("conv, first of its shape, compiled before", first(conv), 1000),
        Figure("conv_transpose k16 s8, first of its shape", first(transpose), 1000),
        Figure("depthwise_conv_grad k31, first of its shape", first(depthwise), 1000),
    ]
    folder.cleanup()
    return figures, arrays


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--repeats", type=int, default=15, help="runs, of which the shortest counts")
    options = parser.parse_args()
    figures, arrays = measure(options.repeats)
    report = {
        "arrays": arrays,
        "figures": [{**asdict(figure), "met": figure.met} for figure in figures],
        "machine": machine(),
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    table = Table(title=f"Time of the host for one call, the driver's left out ({arrays})")
    table.add_column("call")
    for column in ("microseconds", "goal", "functions called"):
        table.add_column(column, justify="right")
    table.add_column("")
    for figure in figures:
        called = "-" if figure.calls is None else str(figure.calls)
        took = f"{figure.microseconds:.{0 if figure.microseconds > 100 else 2}f}"
        table.add_row(figure.name, took, f"{figure.goal:g}", called, "met" if figure.met else "missed")
    Console().print(table)


if __name__ == "__main__":
    main()
