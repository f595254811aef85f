"""A `cupy` without CUDA, for the logic around it: what cuconv/cuda/runtime.py uses of CuPy, on NumPy memory.

    fake = fake_cupy.install(monkeypatch, capabilities=[(9, 0)], seed=3)

It is as treacherous as the real one may be. Work on a stream only runs when something waits for it, or at random
before, and streams overtake each other wherever no event forbids it; freed memory, of the GPU and pinned, is handed out
again at once although streams may still use it; new memory holds NaN. So a missing event or a buffer that is filled too
early gives wrong numbers. `launches` lists the kernels started, `waits` counts how often the host waited for a stream.
"""

import contextlib
import ctypes
import random
import struct
import sys
import threading
import types
import warnings
from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np

STATIC_SHARED_BYTES = 48 << 10


class CUDARuntimeError(RuntimeError):
    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class CUDADriverError(RuntimeError):
    pass


class NVRTCError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


def elf(content: bytes) -> bytes:
    """A file with an ELF header whose tables end where it ends, in a zero byte, as NVRTC's do."""
    body = content + bytes(-len(content) % 8)
    header = struct.pack("<4s28xQQIHHHHHH", b"\x7fELF", 64 + len(body), 64, 0, 64, 56, 1, 64, 0, 0)
    return header + body + bytes(56)


def is_whole(data: bytes) -> bool:
    return data[:4] == b"\x7fELF" and len(data) == struct.unpack_from("<Q", data, 32)[0] + 56


class Fake:
    """The state of the machine, and what happened on it."""

    def __init__(self, capabilities, supported, driver, nvrtc, seed, memory, name):
        self.capabilities, self.supported, self.driver, self.nvrtc_version = capabilities, supported, driver, nvrtc
        self.memory, self.name = memory, name  # bytes one array may have at most
        self.random = random.Random(seed)
        self.launches, self.compiled, self.loaded, self.waits = [], [], [], 0
        self.refuse_to_load = 0  # so many of the next modules
        self.properties = {}
        self.attributes = {13: 1_980_000, 36: 3_201_000, 87: 2}  # kHz twice, and how much slower float64 is
        self.local = threading.local()
        self.queues = defaultdict(deque)  # by stream
        self.reached = defaultdict(int)  # by event: records that were passed
        self.pools, self.pinned = defaultdict(list), defaultdict(list)  # freed memory, by stream and size
        self.modules = {}
        self.cupy = _module(self)

    # --- The current device and stream of a thread ---

    @property
    def device(self):
        return getattr(self.local, "device", 0)

    @device.setter
    def device(self, index):
        self.local.device = index

    @property
    def streams(self):
        if not hasattr(self.local, "streams"):
            self.local.streams = defaultdict(lambda: self.cupy.cuda.Stream.null)
        return self.local.streams

    def stream(self):
        """The queue that work goes to: of the current device."""
        return self.device, self.streams[self.device].number

    # --- Time ---

    def enqueue(self, work, stream=None):
        self.queues[stream or self.stream()].append(work)
        for _ in range(self.random.choice((0, 0, 1, 3))):
            self.step()

    def step(self):
        """Runs the next piece of work of a random stream that is not held up; False where there is none."""
        able = [queue for queue in self.queues.values() if queue and getattr(queue[0], "ready", lambda: True)()]
        if able:
            self.random.choice(able).popleft()()
        return bool(able)

    def run_until(self, done):
        self.waits += 1
        while not done():
            assert self.step(), "the host waits for what never happens"

    def idle(self):
        return not any(self.queues.values())

    # --- Memory ---

    def block(self, nbytes):
        """Bytes of GPU memory for work of the current stream."""
        if nbytes > self.memory:
            raise OutOfMemoryError(f"Out of memory allocating {nbytes:,} bytes.")
        pool = self.pools[self.stream(), nbytes]
        return pool.pop() if pool else np.full(nbytes, 0xFF, np.uint8)  # NaN in every dtype

    def compute(self, function, *arrays):
        """The result of `function` on the arrays' values, computed on the current stream when its turn comes."""
        assert {array.device.id for array in arrays} == {self.device}, "arrays of another GPU"
        sample = function(*(np.zeros(a.shape, a.dtype) for a in arrays))
        out = self.cupy.empty(sample.shape, sample.dtype)
        hosts, target = [a.host for a in arrays], out.host

        def work():
            target[...] = function(*hosts)

        self.enqueue(work)
        return out


def install(
    monkeypatch,
    capabilities=((9, 0),),
    supported=(75, 80, 86, 89, 90, 100, 120),
    driver=13000,
    nvrtc=(13, 0),
    seed=0,
    memory=1 << 30,
    name="NVIDIA Test",
) -> Fake:
    """Puts the fake in CuPy's place, as a process that has not used cuconv.cuda.runtime before finds it.

    Args:
        capabilities: one pair a GPU.
        supported: architectures NVRTC knows; None: it does not load.
        driver: CUDA version of the driver; 0: there is none.
    """
    from cuconv.cuda import runtime

    fake = Fake(list(capabilities), supported, driver, nvrtc, seed, memory, name)
    monkeypatch.setitem(sys.modules, "cupy", fake.cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", fake.cupy.cuda)
    monkeypatch.setattr(runtime, "_runtimes", {})
    for cached in (runtime.probe, runtime.cubin_cache):
        cached.cache_clear()
    return fake


def forget():
    """Lets the next test find out anew what this machine has."""
    from cuconv.cuda import runtime

    runtime.probe.cache_clear()
    runtime.cubin_cache.cache_clear()


def _module(fake):
    cupy, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")

    # --- Arrays ---

    class Block:
        def __init__(self, data, home):
            self.data, self.home = data, home

        def __del__(self):
            fake.pools[self.home].append(self.data)

    class ndarray:  # noqa: N801
        def __init__(self, host, block, device):
            self.host, self.block, self._device = host, block, device

        shape = property(lambda self: self.host.shape)
        dtype = property(lambda self: self.host.dtype)
        ndim = property(lambda self: self.host.ndim)
        size = property(lambda self: self.host.size)
        nbytes = property(lambda self: self.host.nbytes)
        flags = property(lambda self: SimpleNamespace(c_contiguous=self.host.flags.c_contiguous))
        data = property(lambda self: SimpleNamespace(ptr=self.host.ctypes.data, device_id=self._device))
        device = property(lambda self: Device(self._device))
        strides = property(lambda self: self.host.strides)
        __cuda_array_interface__ = property(lambda self: self.host.__array_interface__)

        def __len__(self):
            return len(self.host)

        def __array__(self, *args, **kwargs):
            raise TypeError("Implicit conversion to a NumPy array is not allowed.")

        def __getitem__(self, index):
            return ndarray(self.host[index], self.block, self._device)

        def __array_function__(self, function, types, args, keywords):
            return NotImplemented

        def astype(self, dtype, copy=True):
            return self if self.dtype == dtype and not copy else fake.compute(lambda x: x.astype(dtype), self)

        def view(self, dtype):
            return ndarray(self.host.view(dtype), self.block, self._device)

        def conj(self):
            return fake.compute(np.conjugate, self) if self.dtype.kind == "c" else self

        def copy(self, order="C"):
            return fake.compute(lambda x: x.copy(order), self)

        def set(self, values, stream=None):
            if type(values) is not np.ndarray or values.dtype != self.dtype or values.shape != self.shape:
                raise TypeError("an array of another kind cannot be set")
            host = self.host
            fake.enqueue(lambda: np.copyto(host, values), stream and stream.key)

        def get(self, stream=None, out=None, blocking=True):
            key = stream.key if stream else fake.stream()
            target = np.empty(self.shape, self.dtype) if out is None else out
            if target.shape != self.shape or target.dtype != self.dtype or not self.host.flags.c_contiguous:
                raise ValueError("Shape mismatch")
            host = self.host
            fake.enqueue(lambda: np.copyto(target, host), key)
            if blocking:
                fake.run_until(lambda: not fake.queues[key])
            return target

    def empty(shape, dtype=float):
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        borrowed = getattr(fake.local, "allocator", None)
        block = borrowed(nbytes) if borrowed else Block(fake.block(nbytes), (fake.stream(), nbytes))
        return ndarray(block.data.view(dtype).reshape(shape), block, fake.device)

    class PythonFunctionAllocator:
        def __init__(self, malloc_func, free_func):
            self.functions = malloc_func, free_func

        def malloc(self, nbytes):
            malloc, free = self.functions
            device, address = fake.device, malloc(nbytes, fake.device)
            data = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)
            return type("Memory", (), {"data": data, "__del__": lambda self: free(address, device)})()

    @contextlib.contextmanager
    def using_allocator(allocator):
        previous, fake.local.allocator = getattr(fake.local, "allocator", None), allocator
        try:
            yield
        finally:
            fake.local.allocator = previous

    def from_dlpack(array):
        host = np.from_dlpack(array)
        return ndarray(host, host, fake.device)

    def asarray(values):
        if isinstance(values, ndarray):
            return values
        values = np.array(values, order="C")  # a copy: CuPy stages what it uploads
        array = empty(values.shape, values.dtype)
        host = array.host
        fake.enqueue(lambda: np.copyto(host, values))
        return array

    cupy.ndarray, cupy.empty, cupy.asarray, cupy.from_dlpack = ndarray, empty, asarray, from_dlpack
    cuda.PythonFunctionAllocator, cuda.using_allocator = PythonFunctionAllocator, using_allocator
    cupy.ascontiguousarray = lambda x: x if x.host.flags.c_contiguous else x.copy()
    cupy.asnumpy = lambda x: x.get()

    # --- Devices, streams, events ---

    class Device:
        def __init__(self, index=None):
            self.id = fake.device if index is None else index

        def __enter__(self):
            if not 0 <= self.id < len(fake.capabilities):
                raise CUDARuntimeError(101, "cudaErrorInvalidDevice: invalid device ordinal")
            fake.local.__dict__.setdefault("devices", []).append(fake.device)
            fake.device = self.id
            return self

        def __exit__(self, *_):
            fake.device = fake.local.devices.pop()

    class Stream:
        count = 0

        def __init__(self, null=False, non_blocking=False):
            Stream.count += not null
            self.number = 0 if null else Stream.count
            self.ptr = 0x1000 * self.number
            self._device = None if null else fake.device

        @property
        def key(self):
            return (fake.device if self._device is None else self._device), self.number

        def __enter__(self):
            if self._device not in (None, fake.device):
                raise RuntimeError("The device that the stream is created on does not match with the current device")
            fake.local.__dict__.setdefault("previous", []).append((fake.device, fake.streams[fake.device]))
            fake.streams[fake.device] = self
            return self

        def __exit__(self, *_):
            device, stream = fake.local.previous.pop()
            fake.streams[device] = stream

        def record(self, event):
            event.records += 1
            number = event.records

            def work():
                fake.reached[event] = max(fake.reached[event], number)

            fake.enqueue(work, self.key)

        def wait_event(self, event):
            number = event.records

            def work():
                pass

            work.ready = lambda: fake.reached[event] >= number
            fake.enqueue(work, self.key)

        def synchronize(self):
            key = self.key
            fake.run_until(lambda: not fake.queues[key])

    class ExternalStream(Stream):
        def __init__(self, ptr, device_id=-1):
            warnings.warn("ExternalStream is deprecated.", DeprecationWarning, stacklevel=2)
            self.number, self.ptr, self._device = ptr, ptr, None if device_id < 0 else device_id

    Stream.null = Stream(null=True)

    class Event:
        def __init__(self, disable_timing=False):
            self.records = 0

        @property
        def done(self):
            return fake.reached[self] >= self.records

        def synchronize(self):
            number = self.records
            fake.run_until(lambda: fake.reached[self] >= number)

    cuda.Device, cuda.Stream, cuda.ExternalStream, cuda.Event = Device, Stream, ExternalStream, Event
    cuda.get_current_stream = lambda: fake.streams[fake.device]
    cuda.memory = SimpleNamespace(OutOfMemoryError=OutOfMemoryError)

    def alloc_pinned_memory(nbytes):
        size = -(-nbytes // 512) * 512
        owned = fake.pinned[size].pop() if fake.pinned[size] else np.full(size, 0xFF, np.uint8)
        # Not an array: an array of it would keep the memory alive and not the object that gives it back.
        body = {"__del__": lambda self: fake.pinned[size].append(owned)}
        return type("Pinned", (ctypes.c_uint8 * size,), body).from_buffer(owned)

    cuda.alloc_pinned_memory = alloc_pinned_memory

    # --- The runtime API ---

    def get_device_count():
        if fake.driver == 0:
            raise CUDARuntimeError(35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient")
        return len(fake.capabilities)

    def get_device_properties(index):
        major, minor = fake.capabilities[index]
        return {
            "name": fake.name.encode(),
            "major": major,
            "minor": minor,
            "totalGlobalMem": 80 << 30,
            "multiProcessorCount": 132,
            "sharedMemPerBlockOptin": 227 << 10,
            "sharedMemPerMultiprocessor": 228 << 10,
            "maxThreadsPerMultiProcessor": 2048,
            "l2CacheSize": 50 << 20,
            "clockRate": 1_980_000,
            "memoryClockRate": 3_201_000,
            "memoryBusWidth": 6144,
            **fake.properties,
        }

    cuda.runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        driverGetVersion=lambda: fake.driver,
        getDeviceCount=get_device_count,
        getDeviceProperties=get_device_properties,
        getDevice=lambda: fake.device,
        cudaDevAttrClockRate=13,
        cudaDevAttrMemoryClockRate=36,
        cudaDevAttrSingleToDoublePrecisionPerfRatio=87,
        deviceGetAttribute=lambda attribute, device: fake.attributes[attribute],
    )

    # --- NVRTC ---

    programs = {}

    def create_program(source, name, headers, include_names):
        assert not headers and not include_names, "headers are expanded"
        programs[len(programs) + 1] = (source, name)
        return len(programs)

    def compile_program(program, options):
        source, name = programs[program]
        fake.compiled.append((name, options))
        if "#error" in source:
            raise NVRTCError("NVRTC_ERROR_COMPILATION (6)")
        programs[program] = (source, name, options)

    def get_version():
        if fake.supported is None:
            raise RuntimeError("CuPy failed to load libnvrtc.so.13: cannot open shared object file")
        return fake.nvrtc_version

    cuda.nvrtc = SimpleNamespace(
        NVRTCError=NVRTCError,
        getVersion=get_version,
        getSupportedArchs=lambda: fake.supported,
        createProgram=create_program,
        compileProgram=compile_program,
        getProgramLog=lambda program: f"{programs[program][1]}(7): error: #error",
        getCUBIN=lambda program: elf(repr(programs[program]).encode())[:-1],  # CuPy cuts off the last byte
        getPTX=lambda program: b"//\n.version 8.8\n" + repr(programs[program]).encode(),
        destroyProgram=lambda program: programs.__setitem__(program, None),
    )

    # --- Modules and kernels ---

    class Function:
        def __init__(self, kernel, device):
            self.kernel, self.device = kernel, device

        def __call__(self, grid, block, args, shared_mem=0):
            assert type(grid) is tuple and type(block) is tuple
            (parameters,) = args
            assert type(parameters) is np.ndarray and parameters.size == 1, "passed by value"
            if self.device != fake.device:
                raise CUDADriverError("CUDA_ERROR_INVALID_HANDLE: invalid resource handle")
            if shared_mem > self.kernel.allowed.get(self.device, STATIC_SHARED_BYTES):
                raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
            fake.launches.append(
                SimpleNamespace(
                    kernel=self.kernel.name,
                    path=self.kernel.path,
                    grid=grid,
                    block=block,
                    parameters=parameters.tobytes(),
                    shared_bytes=shared_mem,
                    device=fake.device,
                    stream=fake.streams[fake.device],
                )
            )

    class RawKernel:
        def __init__(self, name, path):
            self.name, self.path, self.allowed, self.settings = name, path, {}, []

        @property
        def kernel(self):
            return Function(self, fake.device)

        @property
        def max_dynamic_shared_size_bytes(self):
            return self.allowed.get(fake.device, STATIC_SHARED_BYTES)

        @max_dynamic_shared_size_bytes.setter
        def max_dynamic_shared_size_bytes(self, nbytes):
            self.settings.append(nbytes)
            self.allowed[fake.device] = nbytes

    class RawModule:
        def __init__(self, *, path):
            self.path = path

        def get_function(self, name):
            key = (self.path, fake.device)
            if key not in fake.modules:  # CuPy remembers modules by their path
                with open(self.path, "rb") as stream:
                    data = stream.read()
                if fake.refuse_to_load or not (is_whole(data) or self.path.endswith(".ptx")):
                    fake.refuse_to_load = max(0, fake.refuse_to_load - 1)
                    raise CUDADriverError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")
                fake.modules[key] = data
                fake.loaded.append(self.path)
            return RawKernel(name, self.path)

    cuda.driver = SimpleNamespace(CUDADriverError=CUDADriverError)
    cupy.RawModule = RawModule
    cupy.cuda = cuda
    cupy.__version__ = "14.2.0"
    return cupy
