"""A GPU through CuPy: what is there, compiling, launching, host data streamed through it. The only importer of CuPy.

A launch, from the plan on: the first one of a plan finds the kernel (in memory, else its file, else NVRTC makes it, see
:mod:`cuconv.cuda.cubins`); every further one packs pointers before the integers of the plan and calls the driver. There
is no synchronisation anywhere but at the end of :func:`stream_batches`: work goes to CuPy's current stream of the
device that holds the arrays, memory comes from CuPy's current pool.

CuPy's own compile path is not used: it compiles for sm_90 and never for sm_90a, flushes subnormal numbers to zero and
does not see that an included file has changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.resources
import operator
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cuconv.cuda import cubins
from cuconv.plan.devices import DEVICES, OLDEST
from cuconv.plan.types import (
    MAP_ALIGNMENT,
    MAP_BYTES,
    MAX_GRID_X,
    MAX_GRID_YZ,
    MAX_THREADS,
    STATIC_SHARED_BYTES,
    DeviceLimits,
    LaunchPlan,
    PlanError,
    TensorMap,
    compiled_for,
    fp32_lanes,
)

Array = Any  # cupy.ndarray


class DriverError(PlanError):
    """There is no NVIDIA driver, or it shows no GPU."""


class CompilerError(PlanError):
    """NVRTC, which compiles the kernels, is not installed or does not load."""


class ArchitectureError(PlanError):
    """The GPU is older than what cuconv, or the NVRTC at hand, compiles for."""


class KernelError(PlanError):
    """A kernel does not compile, load or start. A mistake of cuconv, unless the GPU has failed."""


# --- What is there -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What NVRTC makes for a GPU: code of its architecture, or PTX, which the driver translates when it loads it."""

    arch: str  # "sm_90", or "compute_120" for a newer GPU than NVRTC knows

    @property
    def suffix(self) -> str:
        """Of the file."""
        return ".cubin" if self.arch.startswith("sm_") else ".ptx"

    def __str__(self) -> str:
        return self.arch if self.suffix == ".cubin" else f"PTX {self.arch}, translated by the driver"


@dataclass(frozen=True)
class Device:
    """One GPU as the driver names it; `limits` and `target` where kernels can be compiled for it, else `problem`."""

    index: int
    name: str
    compute_capability: str
    memory_bytes: int
    limits: DeviceLimits | None = None
    target: Target | None = None
    problem: str | None = None


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
    found: dict[str, Any] = {}
    try:
        cupy = _cupy()
        found["cupy_version"] = str(cupy.__version__)
        found["nvrtc_version"] = _Compiler().version
        found["driver_version"] = _driver_version(cupy)
        found["devices"] = [_device(cupy, index) for index in range(_device_count(cupy))]
    except Exception as error:  # noqa: BLE001  a broken driver or toolkit shows itself in many types
        return Probe(False, str(error), **found)
    usable = [device for device in found["devices"] if device.target]
    if not usable:
        return Probe(False, found["devices"][0].problem, **found)
    return Probe(True, f"GPU {usable[0].name}", **found)


def _device(cupy: Any, index: int) -> Device:
    properties = cupy.cuda.runtime.getDeviceProperties(index)
    capability = (int(properties["major"]), int(properties["minor"]))
    named = (index, properties["name"].decode(), "{}.{}".format(*capability), int(properties["totalGlobalMem"]))
    try:
        target = _Compiler().target(capability)
    except ArchitectureError as error:
        return Device(*named, problem=f"GPU {index}: {error}")
    return Device(*named, limits=_limits(cupy, index), target=target)


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        missing = "CuPy is not installed; `pip install cuconv[cuda12x]` or `[cuda13x]` adds it"
        raise DriverError(missing if error.name == "cupy" else f"CuPy does not import: {error}") from error
    except Exception as error:  # a broken toolkit shows itself in many types
        raise DriverError(f"CuPy does not import: {error}") from error
    return cupy


def _driver_version(cupy: Any) -> str:
    version = cupy.cuda.runtime.driverGetVersion()
    if version == 0:
        raise DriverError(
            "no usable NVIDIA driver: libcuda is not there. Install the driver, or start the container with its GPUs"
        )
    return f"{version // 1000}.{version % 1000 // 10}"


def _device_count(cupy: Any) -> int:
    """The number of GPUs, at least 1."""
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DriverError(f"no usable NVIDIA driver: {error}") from error
    if count == 0:
        raise DriverError("the driver shows no GPU; CUDA_VISIBLE_DEVICES may hide it")
    return count


@functools.cache
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


# --- Limits of a device ------------------------------------------------------------------------------------------


def _limits(cupy: Any, index: int) -> DeviceLimits:
    """What the driver says; a data sheet's rates where it does not tell the clocks."""
    properties = cupy.cuda.runtime.getDeviceProperties(index)
    capability = (properties["major"], properties["minor"])
    name, multiprocessors = properties["name"].decode(), int(properties["multiProcessorCount"])
    # Hz, from kHz. CUDA 13 has the clocks among the attributes only.
    api = cupy.cuda.runtime
    clock = 1e3 * (properties.get("clockRate") or api.deviceGetAttribute(api.cudaDevAttrClockRate, index))
    memory_clock = 1e3 * (
        properties.get("memoryClockRate") or api.deviceGetAttribute(api.cudaDevAttrMemoryClockRate, index)
    )
    fp32 = 2 * fp32_lanes(capability) * multiprocessors * clock
    ratio = api.deviceGetAttribute(api.cudaDevAttrSingleToDoublePrecisionPerfRatio, index)
    sheet = _data_sheet(name, "sm_{}{}".format(*capability))
    return DeviceLimits(
        name=name,
        arch="sm_{}{}".format(*capability),
        multiprocessors=multiprocessors,
        shared_bytes=int(properties["sharedMemPerBlockOptin"]),
        shared_bytes_per_multiprocessor=int(properties["sharedMemPerMultiprocessor"]),
        threads_per_multiprocessor=int(properties["maxThreadsPerMultiProcessor"]),
        l2_bytes=int(properties["l2CacheSize"]),
        # Two transfers a cycle on every wire of the bus.
        bandwidth=2 * memory_clock * properties.get("memoryBusWidth", 0) / 8 or sheet.bandwidth,
        fp32_rate=fp32 or sheet.fp32_rate,
        fp64_rate=fp32 / max(1, ratio) or sheet.fp64_rate,
        # The driver tells nothing of tensor cores; per multiplier of float32 the data sheet's GPU has as many.
        fp16_rate=sheet.fp16_rate * (fp32 / sheet.fp32_rate or 1),
        tf32_rate=sheet.tf32_rate * (fp32 / sheet.fp32_rate or 1),
        dmma_rate=sheet.dmma_rate * (fp32 / sheet.fp32_rate or 1),
    )


def _data_sheet(name: str, arch: str) -> DeviceLimits:
    """The known GPU of that name, or the one most like it."""
    words = name.replace("-", " ").split()
    named = [limits for known, limits in DEVICES.items() if set(known.split()) <= set(words)]
    alike = [limits for limits in DEVICES.values() if limits.arch == arch]
    older = [limits for limits in DEVICES.values() if int(limits.arch[3:]) <= int(arch[3:])]
    return (named or alike or older)[-1]


# --- Compiling ---------------------------------------------------------------------------------------------------


class _Compiler:
    """NVRTC through CuPy's binding, which needs no driver."""

    def __init__(self) -> None:
        try:
            from cupy.cuda import nvrtc

            major, minor = nvrtc.getVersion()
        except Exception as error:  # a missing library shows itself in many types
            raise CompilerError(
                f"NVRTC does not load: {error}. `pip install cuconv[cuda12x]` or `[cuda13x]` brings it along"
            ) from error
        self._nvrtc = nvrtc
        self.version = f"{major}.{minor}"

    def target(self, capability: tuple[int, int]) -> Target:
        """What to compile for a GPU.

        Raises:
            ArchitectureError: nothing would run on it.
        """
        number = 10 * capability[0] + capability[1]
        shown, oldest = "{}.{}".format(*capability), "{}.{}".format(*OLDEST)
        if capability < OLDEST:
            raise ArchitectureError(
                f"compute capability {oldest} is the oldest that cuconv has kernels for. Received: {shown}"
            )
        known = [arch for arch in self._nvrtc.getSupportedArchs() if arch <= number]
        if not known:
            raise ArchitectureError(
                f"NVRTC {self.version} compiles for newer GPUs only; install CuPy for an older CUDA. Received: {shown}"
            )
        return Target(f"sm_{number}" if number in known else f"compute_{max(known)}")

    def recipe(self, kernel: str, source: str, constants: cubins.Constants, target: Target) -> cubins.Recipe:
        """All that `compile` depends on."""
        arch = compiled_for(kernel, target.arch)
        fixed = (f"-arch={arch}", "--std=c++17", "-lineinfo", "-default-device")
        return cubins.Recipe(
            kernel, source, fixed + cubins.definitions(constants), f"NVRTC {self.version}", target.suffix
        )

    def compile(self, recipe: cubins.Recipe) -> bytes:
        """The file's content.

        Raises:
            KernelError: the source is refused.
        """
        nvrtc = self._nvrtc
        program = nvrtc.createProgram(recipe.source, f"{recipe.kernel}.cu", [], [])
        try:
            nvrtc.compileProgram(program, recipe.options)
            if recipe.suffix == ".ptx":
                return bytes(nvrtc.getPTX(program))
            return _whole_elf(nvrtc.getCUBIN(program))
        except nvrtc.NVRTCError as error:
            raise KernelError(
                f"kernel {recipe.kernel} does not compile with {' '.join(recipe.options)}: {error}\n"
                f"{nvrtc.getProgramLog(program)}"
            ) from error
        finally:
            nvrtc.destroyProgram(program)


def _whole_elf(data: bytes) -> bytes:
    """A cubin with the zero byte at its end that CuPy cuts off as if it ended a string."""
    header = struct.unpack_from("<QQIHHHHH", data, 32)  # of a 64-bit ELF file
    programs, sections, _, _, program_bytes, program_count, section_bytes, section_count = header
    end = max(programs + program_bytes * program_count, sections + section_bytes * section_count)
    return data.ljust(end, b"\0")


def compile_check(target: Target) -> None:
    """Compiles common.cuh, with what it includes, into an empty kernel; keeps nothing.

    Raises:
        PlanError: it fails, or there is no NVRTC.
    """
    _cupy()
    compiler = _Compiler()
    source = cubins.expanded(kernel_directory(), "common.cuh") + 'extern "C" __global__ void check() {}\n'
    compiler.compile(compiler.recipe("check", source, (), target))


@functools.lru_cache(maxsize=1)
def cubin_cache() -> cubins.Cubins:
    """The compiled kernels of this process and its devices."""
    return cubins.Cubins()


# --- Launching ---------------------------------------------------------------------------------------------------

REMEMBERED_PLANS = 8192  # of a device; then they are forgotten together, and cost a few microseconds each to find again


class CudaRuntime:
    """One GPU, as :class:`cuconv.cuda.arrays.Runtime` describes it. Any thread may use it, on any stream."""

    def __init__(self, device: int, cache: cubins.Cubins | None = None) -> None:
        """The GPU of that number.

        Raises:
            DriverError, ArchitectureError: it cannot be computed with.
        """
        self._cupy = cupy = _cupy()
        _driver_version(cupy)
        count = _device_count(cupy)
        if not 0 <= device < count:
            raise ValueError(f"`device` must be one of the {count} GPUs, 0 to {count - 1}. Received: device={device}")
        properties = cupy.cuda.runtime.getDeviceProperties(device)
        self._capability = (int(properties["major"]), int(properties["minor"]))
        if self._capability < OLDEST:
            raise ArchitectureError(
                "compute capability {}.{} is the oldest that cuconv has kernels for. ".format(*OLDEST)
                + "Received: GPU {}, {}, of {}.{}".format(device, properties["name"].decode(), *self._capability)
            )
        self.device = device
        self.limits: DeviceLimits = _limits(cupy, device)
        self._cache = cubin_cache() if cache is None else cache
        self._lock = threading.Lock()
        self._current_device: Callable[[], int] = cupy.cuda.runtime.getDevice
        # CuPy makes an object of all flags to answer; the attribute behind it takes a fifth of the time.
        quick = hasattr(cupy.ndarray, "_c_contiguous")
        self.in_one_piece: Callable[[Array], bool] = operator.attrgetter(
            "_c_contiguous" if quick else "flags.c_contiguous"
        )
        self._constants: dict[Hashable, list[Any]] = {}  # key -> array, the event after its copy until it has passed
        self._borrowed: dict[int, Any] = {}  # streams of other libraries, by their handles
        self._kernels: dict[tuple[str, cubins.Constants], Any] = {}
        self._dynamic_bytes: dict[tuple[str, cubins.Constants], int] = {}
        # By identity: to hash a plan takes longer than all the rest. The entry holds the plan, so no other one gets its
        # identity.
        self._starters: dict[int, tuple[LaunchPlan, Callable[[Sequence[int]], None]]] = {}

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        """A new array of this GPU, not initialised."""
        try:
            if self._current_device() == self.device:
                return self._cupy.empty(shape, dtype)
            with self._cupy.cuda.Device(self.device):
                return self._cupy.empty(shape, dtype)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            error.args = (
                f"{error} cuconv asked for an array {tuple(shape)} of {np.dtype(dtype)} on GPU {self.device}. "
                "A smaller batch, a smaller `workspace`, or cupy.get_default_memory_pool().free_all_blocks() make room",
            )
            raise

    def constant(self, key: Hashable, make: Callable[[], np.ndarray]) -> Array:
        """What `make` returns, on this GPU, where it is kept for later calls with the same key; never written to."""
        kept = self._constants.get(key)
        if kept is None:
            with self._lock, self._cupy.cuda.Device(self.device):
                kept = self._constants.get(key)
                if kept is None:
                    array, copied = self._cupy.asarray(make()), self._cupy.cuda.Event(disable_timing=True)
                    self._cupy.cuda.get_current_stream().record(copied)
                    kept = self._constants[key] = [array, copied]
        array, copied = kept
        if copied is not None:  # it may have been copied on another stream than the one that needs it now
            if copied.done:
                kept[1] = None
            else:
                with self._cupy.cuda.Device(self.device):
                    self._cupy.cuda.get_current_stream().wait_event(copied)
        return array

    @contextlib.contextmanager
    def borrowing(
        self, stream: int, allocate: Callable[[int, int], int], free: Callable[[int, int], None]
    ) -> Generator[None, None, None]:
        """While this is open, CuPy works on a stream of another library, in memory of that library's pool.

        Args:
            stream: the driver's handle; 0 is the default stream.
            allocate: bytes, device -> address.
            free: address, device.
        """
        cuda = self._cupy.cuda
        borrowed = self._borrowed.get(stream)
        if borrowed is None:
            with warnings.catch_warnings():
                # CuPy 14 would have Stream.from_external in its place, whose streams destroy what they borrowed.
                warnings.simplefilter("ignore", DeprecationWarning)
                borrowed = self._borrowed.setdefault(stream, cuda.ExternalStream(stream, self.device))
        pool = cuda.PythonFunctionAllocator(allocate, free)
        with cuda.Device(self.device), borrowed, cuda.using_allocator(pool.malloc):
            yield

    def address(self, array: Array) -> int:
        """Where the first element lies.

        Raises:
            ValueError: on another GPU.
        """
        memory = array.data
        if memory.device_id != self.device:
            raise ValueError(
                f"arrays must lie on GPU {self.device}, for which this call was made. Received: an array on GPU "
                f"{memory.device_id}"
            )
        pointer: int = memory.ptr
        return pointer

    def launch(self, plan: LaunchPlan, arrays: Sequence[Array | None]) -> None:
        """Starts `plan` on the current stream of this GPU and returns at once.

        Raises:
            PlanError: the kernel cannot be compiled, loaded or started.
        """
        _, start = self._starters.get(id(plan)) or (plan, self.starter(plan, len(arrays)))
        start([0 if array is None else array.data.ptr for array in arrays])

    def starter(self, plan: LaunchPlan, pointers: int) -> Callable[[Sequence[int]], None]:
        """What starts `plan` with so many pointers before its integers, 0 for an array that is left out.

        Raises:
            PlanError: the kernel cannot be compiled or loaded; from what is returned: it cannot be started.
        """
        limits, (x, y, z) = self.limits, plan.grid
        if not (0 < x <= MAX_GRID_X and 0 < y <= MAX_GRID_YZ and 0 < z <= MAX_GRID_YZ and plan.threads <= MAX_THREADS):
            raise PlanError(f"no GPU starts a grid {plan.grid} of blocks {plan.block}. Received: {plan}")
        if max(plan.shared_bytes, plan.dynamic_shared_bytes) > limits.shared_bytes:
            raise PlanError(f"{limits.name} has {limits.shared_bytes} bytes of shared memory a block. Received: {plan}")
        maps = MAP_BYTES * len(plan.maps)
        integers = plan.parameters((0,) * pointers, (bytes(MAP_BYTES),) * len(plan.maps))[maps + 8 * pointers :]
        pack = struct.Struct(f"<{pointers}Q{len(integers)}s").pack
        if plan.maps:
            pack = _with_maps(plan.maps, pack)
        kind = np.dtype(("V", maps + 8 * pointers + len(integers)))
        function, grid, block, shared_bytes = self._function(plan), plan.grid, plan.block, plan.dynamic_shared_bytes
        here, current_device, read = self.device, self._current_device, np.frombuffer
        cuda = self._cupy.cuda

        def start(addresses: Sequence[int]) -> None:
            # An array of one element goes to the kernel by value; the driver copies it before the call returns.
            parameters = (read(pack(*addresses, integers), kind),)
            try:
                if current_device() == here:
                    function(grid, block, parameters, shared_bytes)
                else:
                    with cuda.Device(here):
                        function(grid, block, parameters, shared_bytes)
            except cuda.driver.CUDADriverError as error:
                raise KernelError(f"GPU {here} does not start {plan}\n{error}") from error

        if len(self._starters) >= REMEMBERED_PLANS:
            self._starters.clear()
        self._starters[id(plan)] = plan, start
        return start

    def _function(self, plan: LaunchPlan) -> Any:
        """The driver's function, allowed the shared memory that the plan asks for."""
        key = (plan.kernel, plan.constants)
        kernel = self._kernels.get(key)
        if kernel is None:  # two threads may both load it; it is compiled once
            kernel = self._kernels.setdefault(key, self._load(plan.kernel, plan.constants))
        if max(plan.shared_bytes, plan.dynamic_shared_bytes) > STATIC_SHARED_BYTES and plan.dynamic_shared_bytes:
            with self._lock, self._cupy.cuda.Device(self.device):
                if plan.dynamic_shared_bytes > self._dynamic_bytes.get(key, 0):  # another plan may need more of it
                    kernel.max_dynamic_shared_size_bytes = plan.dynamic_shared_bytes
                    self._dynamic_bytes[key] = plan.dynamic_shared_bytes
        with self._cupy.cuda.Device(self.device):
            return kernel.kernel  # without the layer that looks it up by device at every call

    def _load(self, kernel: str, constants: cubins.Constants) -> Any:
        compiler = _Compiler()
        source = cubins.expanded(kernel_directory(), f"{kernel}.cu")
        recipe = compiler.recipe(kernel, source, constants, compiler.target(self._capability))
        build = functools.partial(compiler.compile, recipe)
        error_type = self._cupy.cuda.driver.CUDADriverError
        with self._cupy.cuda.Device(self.device):
            path = self._cache.obtain(recipe, build)
            try:
                return self._cupy.RawModule(path=str(path)).get_function(kernel)
            except error_type:  # the file was removed since, or cut off under way to the driver
                path = self._cache.rebuild(recipe, path, build)
            try:
                return self._cupy.RawModule(path=str(path)).get_function(kernel)
            except error_type as error:
                options = " ".join(recipe.options)
                raise KernelError(f"GPU {self.device} does not load kernel {kernel} ({options}): {error}") from error


REMEMBERED_MAPS = 256  # addresses of an array in a plan; of others the driver makes a map anew, in two microseconds
# As cuTensorMapEncodeTiled has them.
MAP_TYPES = {"float16": 6, "float32": 7, "float64": 8, "bfloat16": 9, "tf32": 11}
MAP_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_NO_INTERLEAVE, _PROMOTE_256_BYTES, _ZEROS_OUTSIDE = 0, 3, 0


def _with_maps(maps: Sequence[TensorMap], pack: Callable[..., bytes]) -> Callable[..., bytes]:
    """`pack`, whose first arguments are the addresses of all arrays, with the tensor maps of some of them in front."""
    known = [(each.array, functools.lru_cache(REMEMBERED_MAPS)(functools.partial(tensor_map, each))) for each in maps]
    return lambda *given: b"".join([encoded(given[array]) for array, encoded in known]) + pack(*given)


def tensor_map(given: TensorMap, address: int) -> bytes:
    """A tensor map of the array at `address`, as a kernel takes it by value.

    Raises:
        KernelError: the driver refuses it.
    """
    rank = len(given.sizes)
    many, few = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
    room = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
    skipped = -ctypes.addressof(room) % MAP_ALIGNMENT
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(room) + skipped),
        ctypes.c_int(MAP_TYPES[given.kind]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        many(*given.sizes),
        many(*given.strides),
        few(*given.box),
        few(*given.steps),
        *map(ctypes.c_int, (_NO_INTERLEAVE, MAP_SWIZZLES[given.swizzle], _PROMOTE_256_BYTES, _ZEROS_OUTSIDE)),
    )
    if status:
        raise KernelError(f"the driver makes no tensor map, error {status}. Received: {given} at {address:#x}")
    return room.raw[skipped : skipped + MAP_BYTES]


@functools.lru_cache(maxsize=1)
def _driver() -> Any:
    """The driver's own library, for what CuPy does not offer of it."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise DriverError(f"no usable NVIDIA driver: {error}") from error


def library() -> Any:
    """CuPy itself, for whoever times or captures work.

    Raises:
        DriverError: it does not import.
    """
    return _cupy()


def time_range(name: str) -> AbstractContextManager[Any]:
    """A range with a name in the profiles of NVIDIA's tools (NVTX)."""
    _cupy()
    from cupyx import profiler

    manager: AbstractContextManager[Any] = profiler.time_range(name)
    return manager


_runtimes: dict[int, CudaRuntime] = {}
_runtimes_lock = threading.Lock()


def current(device: int | None = None) -> CudaRuntime:
    """The runtime of a GPU; None: the one that is current in CuPy.

    Raises:
        DriverError, ArchitectureError: it cannot be computed with.
    """
    if device is None:
        cupy = _cupy()
        _driver_version(cupy)
        _device_count(cupy)
        device = int(cupy.cuda.runtime.getDevice())
    runtime = _runtimes.get(device)
    if runtime is None:
        with _runtimes_lock:
            runtime = _runtimes.get(device)
            if runtime is None:
                runtime = _runtimes[device] = CudaRuntime(device)
    return runtime


def of(arrays: Sequence[Array | None]) -> CudaRuntime:
    """The runtime of the GPU that holds all of `arrays`, CuPy arrays of which at least one is not None.

    Raises:
        ValueError: they lie on several GPUs.
    """
    device = -1
    for array in arrays:
        if array is not None:
            found = array.data.device_id
            if device < 0:
                device = found
            elif found != device:
                places = ", ".join(str(each.data.device_id) for each in arrays if each is not None)
                raise ValueError(f"all arrays of one call must lie on one GPU. Received: arrays on GPUs {places}")
    return _runtimes.get(device) or current(device)


# --- Moving ------------------------------------------------------------------------------------------------------


def is_gpu_array(array: Any) -> bool:
    """True for arrays of any library that lie on a GPU. The type is asked: the interface itself takes a microsecond."""
    return hasattr(type(array), "__cuda_array_interface__")


def is_device_array(array: Any) -> bool:
    """True for CuPy's arrays."""
    cupy = sys.modules.get("cupy")  # whoever has such an array has imported it
    return cupy is not None and isinstance(array, getattr(cupy, "ndarray", ()))


def on(device: int) -> AbstractContextManager[Any]:
    """Makes a GPU the current one of CuPy."""
    manager: AbstractContextManager[Any] = _cupy().cuda.Device(device)
    return manager


def from_dlpack(array: Any) -> Array:
    """A CuPy array on the memory of another library's array."""
    return _cupy().from_dlpack(array)


def device_array(array: Any, device: int | None = None) -> Any:
    """`array` on a GPU: `device`, or else the current one, or else the first that cuconv has kernels for."""
    cupy = _cupy()
    if device is None:
        here = int(cupy.cuda.runtime.getDevice())
        usable = [each.index for each in probe().devices if each.target] or [here]
        device = here if here in usable else usable[0]
    with cupy.cuda.Device(device):
        return cupy.asarray(array)


class _Slot:
    """One of the two batches under way: its pinned host memory, its arrays on the GPU, how far it has come."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self.staged: list[np.ndarray] = []  # pinned, as large as the largest batch so far
        self.inputs: list[Array] = []
        self.results: list[np.ndarray] = []  # pinned
        self.outputs: list[Array] = []  # kept until they are downloaded
        self.computed, self.uploaded, self.downloaded = (cupy.cuda.Event(disable_timing=True) for _ in range(3))

    def fill(self, batch: Sequence[np.ndarray], dtypes: Sequence[np.dtype], compute: Any) -> None:
        """Copies a batch of host arrays into pinned memory, in `dtypes`."""
        kinds = [(array.shape, dtype) for array, dtype in zip(batch, dtypes, strict=True)]
        if not _fit(self.staged, kinds):
            self.staged = [self.pinned(shape, dtype) for shape, dtype in kinds]
            self.inputs = [self._cupy.empty(shape, dtype) for shape, dtype in kinds]
            compute.record(self.computed)  # what held this memory before may still run; the upload waits for it
        for staged, array in zip(self.staged, batch, strict=True):
            np.copyto(staged[: len(array)], array, casting="unsafe")

    def make_room(self) -> None:
        """Pinned memory for the outputs."""
        kinds = [(y.shape, y.dtype) for y in self.outputs]
        if not _fit(self.results, kinds):
            self.results = [self.pinned(shape, dtype) for shape, dtype in kinds]

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A host array that the GPU reads and writes by itself."""
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = self._cupy.cuda.alloc_pinned_memory(max(count, 1))
        return np.frombuffer(memory, np.uint8, count).view(dtype).reshape(shape)


def _fit(arrays: list[np.ndarray], kinds: list[tuple[tuple[int, ...], np.dtype]]) -> bool:
    """Whether arrays of these shapes and dtypes are the first rows of `arrays`."""
    return len(arrays) == len(kinds) and all(
        array.dtype == dtype and array.shape[1:] == shape[1:] and len(array) >= shape[0]
        for array, (shape, dtype) in zip(arrays, kinds, strict=True)
    )


def stream_batches(
    run: Callable[[tuple[Array, ...]], Sequence[Array]],
    batches: Iterable[Sequence[np.ndarray]],
    dtypes: Sequence[np.dtype],
    device: int | None = None,
) -> Generator[list[np.ndarray], None, None]:
    """The outputs of `run` for each batch of host arrays, as host arrays, in order; each is valid until the next.

    While the GPU computes one batch, the next one is copied into pinned memory and uploaded, and the one before is
    downloaded, each on a stream of its own::

        upload    | 0 | 1 |   | 2 |   | 3
        compute       | 0     | 1     | 2
        download              | 0 |   | 1 |

    Computing stays on the current stream, so `run` may make and keep arrays there. Whatever ends the loop, an error or
    a caller who closes it, nothing is under way any more when it has ended.

    Args:
        run: arrays on the GPU -> arrays on the GPU; asynchronous. What it returns may share memory with its arguments.
        batches: tuples of arrays in any layout, memory-mapped ones too.
        dtypes: what each array of a batch is uploaded as; converted on the way into pinned memory.
        device: number of the GPU; None: the current one.
    """
    cupy = _cupy()
    if device is None:
        device = int(cupy.cuda.runtime.getDevice())
    with cupy.cuda.Device(device):
        compute = cupy.cuda.get_current_stream()
        upload, download = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    slots: list[_Slot] = []
    waiting: list[_Slot] = []  # with a batch under way, the oldest first
    finished = False
    try:
        for number, batch in enumerate(batches):
            if len(waiting) == 2:
                yield _collected(waiting.pop(0))
            # Entered for every batch: a generator must not keep a device current while its caller goes on.
            with cupy.cuda.Device(device), compute:
                if len(slots) < 2:
                    slots.append(_Slot(cupy))
                slot = slots[number % 2]
                slot.fill(batch, dtypes, compute)
                upload.wait_event(slot.computed)
                arrays = []
                for staged, array, rows in zip(slot.staged, slot.inputs, map(len, batch), strict=True):
                    array[:rows].set(staged[:rows], stream=upload)
                    arrays.append(array[:rows])
                upload.record(slot.uploaded)
                compute.wait_event(slot.uploaded)
                slot.outputs = [cupy.ascontiguousarray(y) for y in run(tuple(arrays))]
                compute.record(slot.computed)
                slot.make_room()
                download.wait_event(slot.computed)
                for y, result in zip(slot.outputs, slot.results, strict=True):
                    y.get(stream=download, out=result[: len(y)], blocking=False)
                download.record(slot.downloaded)
            waiting.append(slot)
        while waiting:
            yield _collected(waiting.pop(0))
        finished = True
    finally:
        if not finished:
            for stream in (upload, compute, download):
                # The first error is the one to tell.
                with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError), cupy.cuda.Device(device):
                    stream.synchronize()


def _collected(slot: _Slot) -> list[np.ndarray]:
    """The outputs of a batch, once they are on the host."""
    slot.downloaded.synchronize()
    results = [result[: len(y)] for y, result in zip(slot.outputs, slot.results, strict=True)]
    slot.outputs = []
    return results
