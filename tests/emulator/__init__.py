"""Runs CUDA kernels on the processor: the PTX that NVRTC makes of them, on NumPy arrays, under a detector.

    module = Module(compile_ptx(Path("kernel.cu"), "sm_80", {"BP": 64}))
    module.launch("kernel", (4,), (128,), (x, y, np.int32(n)), mode="trace", seed=1)

Mode "plain" computes and checks bounds, barriers and time. Mode "trace" also finds races within and between blocks,
uninitialised reads and reads of copies that are still under way, and counts memory transactions. A launch that has
something to report raises. See ptx.py (grammar), opcodes.py (instructions), runtime.cpp (scheduling, detector); for
sm_90 tensor_map.py and tensor_copies.cpp (the copy engine), warpgroup.cpp (wgmma), lint.py (what only the text shows).

Not there, and an error: textures, clusters along y and z, boxes in im2col order, products of 8-bit numbers.
Flags passed between threads through memory, without a barrier, order nothing for the detector.
"""

import ctypes
import math
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from . import build, cache, nvrtc
from .nvrtc import CompileError, compile_cubin, compile_ptx
from .opcodes import UnsupportedError
from .ptx import PtxError
from .tensor_map import Swizzle, TensorMapError, encode
from .translate import KernelInfo, translated

__all__ = [
    "CompileError",
    "EmulationError",
    "Launch",
    "Module",
    "PtxError",
    "Report",
    "Structure",
    "Swizzle",
    "TensorMapError",
    "Traffic",
    "UnsupportedError",
    "cache",
    "compile_cubin",
    "compile_ptx",
    "map_of",
    "missing",
]

MOST_SHOWN = 10  # reports in a message
GUARD = 4096  # bytes between arrays, so that one index too many hits nothing
ALIGNMENT = 512  # bytes, what device allocators give
IN_PLACE = 1 << 28  # bytes from which an array is not copied; sparse arrays can be larger than memory
POISON = 0xFF  # every byte of memory that nobody has written: NaN in every float type

# What a launch finds in an array, mirrored by runtime.h: nothing yet, numbers, numbers where it is not poison.
NEVER, ALWAYS, IF_NOT_POISON = 0, 1, 2

_one_launch = threading.Lock()  # a library has one set of fibers


def missing() -> str | None:
    """Why the emulator cannot work here, or None."""
    return nvrtc.missing() or build.missing()


@dataclass(frozen=True)
class Structure:
    """A structure passed by value: the arrays that it points to, and its bytes given their addresses (0 for None)."""

    arrays: Sequence[np.ndarray | None]
    pack: Callable[[tuple[int, ...]], bytes]


def map_of(array: np.ndarray, *terms, **more) -> Structure:
    """A tensor map of an array, for a launch; further arguments as :func:`tensor_map.encode`."""
    return Structure((array,), lambda addresses: encode(*addresses, *terms, **more))


@dataclass(frozen=True)
class Report:
    """Something wrong, at its first occurrence."""

    # race bounds uninitialised pending fence divergence deadlock hang alignment read-only barrier copy registers trap
    # launch
    kind: str
    place: str
    text: str
    count: int

    def __str__(self) -> str:
        return f"{self.kind} at {self.place}: {self.text}" + (f" ({self.count} times)" if self.count > 1 else "")


@dataclass(frozen=True)
class Traffic:
    """What one instruction moved, and the fewest 32-byte sectors or shared-memory wavefronts it could have taken.

    Lanes form a request by how often each has executed the instruction since the last barrier of the block.
    """

    place: str
    line: int | None
    instruction: str
    space: str
    requests: int
    bytes: int
    sectors: int
    least_sectors: int
    wavefronts: int
    least_wavefronts: int

    @property
    def bank_conflicts(self) -> int:
        """Wavefronts more than needed."""
        return self.wavefronts - self.least_wavefronts


@dataclass(frozen=True)
class Launch:
    """What a launch reported and, in mode "trace", what each instruction moved.

    `touched`: bytes of global memory that were read or written, each counted once.
    """

    reports: list[Report] = field(default_factory=list)
    traffic: list[Traffic] = field(default_factory=list)
    touched: int = 0


class EmulationError(RuntimeError):
    """A launch had something to report."""

    def __init__(self, kernel: str, launch: Launch):
        shown = [str(report) for report in launch.reports[:MOST_SHOWN]]
        super().__init__("\n".join([f"{kernel}: {len(launch.reports)} reports", *shown]))
        self.reports = launch.reports


class _Extent(ctypes.Structure):
    """Mirrors Extent of runtime.h."""

    _fields_ = (
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("shadow", ctypes.c_uint64),
        ("argument", ctypes.c_int),
        ("writable", ctypes.c_uint8),
        ("initialised", ctypes.c_uint8),
    )


class _Request(ctypes.Structure):
    """Mirrors Request of runtime.cpp."""

    _fields_ = (
        ("kernel", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("parameters", ctypes.c_void_p),
        ("parameter_bytes", ctypes.c_uint64),
        ("extents", ctypes.POINTER(_Extent)),
        ("extent_count", ctypes.c_uint64),
        ("shadow_cells", ctypes.c_uint64),
        ("blocks", ctypes.POINTER(ctypes.c_uint64)),
        ("block_count", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("timeout", ctypes.c_double),
    )


def root(array: np.ndarray) -> np.ndarray:
    """The array that owns the memory that `array` is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def device_address(array: np.ndarray, start: int) -> int:
    """The address that an array has in a launch, if its owner is placed at `start`; its own if it is used in place."""
    low, high = np.lib.array_utils.byte_bounds(root(array))
    return array.ctypes.data + (start - low if high - low < IN_PLACE else 0)


class _Memory:
    """The global memory of one launch: copies of the argument arrays with guards between them.

    Arrays that share memory are copied as the one array that they are views of, so they share it here too.
    """

    def __init__(
        self, arrays: dict[int, list[np.ndarray]], uninitialised: Sequence[int], poisoned: Callable, cell: int
    ):
        spans = {}  # address of the array that owns memory -> (bytes, offset in the arena or None, first shadow cell)
        size = cells = 0
        for array in (array for group in arrays.values() for array in group):
            low, high = np.lib.array_utils.byte_bounds(root(array))
            if low in spans:
                continue
            copied = high - low < IN_PLACE
            spans[low] = (high - low, size + GUARD if copied else None, cells)
            if copied:
                size = math.ceil((size + GUARD + high - low) / ALIGNMENT) * ALIGNMENT
            cells += (high - low) // cell + 1
        self.cells = cells
        self.spans = spans
        self.arena = ctypes.create_string_buffer(size + GUARD + ALIGNMENT)
        self.base = math.ceil(ctypes.addressof(self.arena) / ALIGNMENT) * ALIGNMENT
        self.written = set()
        extents = []
        for argument, group in arrays.items():
            for array in group:
                low, high = np.lib.array_utils.byte_bounds(array)
                start = np.lib.array_utils.byte_bounds(root(array))[0]
                move = self._move(start)
                shadow = spans[start][2] + (low - start) // cell
                initialised = NEVER if argument in uninitialised else IF_NOT_POISON if poisoned(array) else ALWAYS
                extents.append(_Extent(low + move, high + move, shadow, argument, array.flags.writeable, initialised))
                if array.flags.writeable:
                    self.written.add(start)
        self.extents = (_Extent * len(extents))(*extents)
        for start, (length, offset, _) in spans.items():
            if offset is not None:
                ctypes.memmove(self.base + offset, start, length)

    def _move(self, start: int) -> int:
        offset = self.spans[start][1]
        return 0 if offset is None else self.base + offset - start

    def address(self, array: np.ndarray) -> int:
        """Where the first element of an array is during the launch."""
        return array.ctypes.data + self._move(np.lib.array_utils.byte_bounds(root(array))[0])

    def copy_back(self) -> None:
        """Brings what the kernel wrote to the arrays."""
        for start in self.written:
            length, offset, _ = self.spans[start]
            if offset is not None:
                ctypes.memmove(start, self.base + offset, length)


def _arrays(value: Any) -> list[np.ndarray]:
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, Structure):
        return [array for array in value.arrays if array is not None]
    return [array for item in value for array in _arrays(item)] if isinstance(value, tuple) else []


def _pack(value: Any, memory: _Memory) -> tuple[bytes, int]:
    """Bytes and alignment of an argument; a tuple is a structure of its items, laid out as in C."""
    if isinstance(value, np.ndarray):
        return struct.pack("<Q", memory.address(value)), 8
    if value is None:
        return bytes(8), 8
    if isinstance(value, Structure):
        return value.pack(tuple(0 if array is None else memory.address(array) for array in value.arrays)), 8
    if isinstance(value, np.void):
        return value.tobytes(), 1
    if isinstance(value, np.generic):
        return value.tobytes(), value.nbytes
    if isinstance(value, ctypes.Structure):
        return bytes(value), ctypes.alignment(type(value))
    if isinstance(value, tuple):
        data, alignment = b"", 1
        for item in value:
            part, align = _pack(item, memory)
            data = data.ljust(math.ceil(len(data) / align) * align, b"\0") + part
            alignment = max(alignment, align)
        return data.ljust(math.ceil(len(data) / alignment) * alignment, b"\0"), alignment
    raise TypeError(f"an argument is an array, a NumPy scalar, a structure, a tuple or None. Received: {value!r}")


class Module:
    """The kernels of a PTX text."""

    def __init__(self, ptx: str):
        self.translation = translated(ptx)
        self._libraries: dict[str, ctypes.CDLL] = {}

    @property
    def kernels(self) -> dict[str, KernelInfo]:
        """What the text says of each kernel."""
        return self.translation.kernels

    def _library(self, mode: str) -> ctypes.CDLL:
        if mode not in build.MODES:
            raise ValueError(f"`mode` must be one of {', '.join(build.MODES)}. Received: mode={mode!r}")
        if mode not in self._libraries:
            library = ctypes.CDLL(str(build.library(self.translation.code, mode)))
            library.emulator_launch.restype = ctypes.c_char_p
            self._libraries[mode] = library
        return self._libraries[mode]

    def launch(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        mode: str = "plain",
        seed: int = 0,
        *,
        timeout: float = 60.0,
        uninitialised: Sequence[int] = (),
        poisoned: Callable[[np.ndarray], bool] = lambda _: False,
        blocks: Sequence[int] | None = None,
        check: bool = True,
    ) -> Launch:
        """Reports and counters of one launch; arrays are written in place.

        Args:
            args: arrays (passed as pointers, any strides), NumPy scalars, None for a null pointer, and for structures
                passed by value a tuple of these, a `Structure` (:func:`map_of` makes one of a tensor map), a `np.void`
                or a `ctypes.Structure`.
            shared_bytes: dynamic shared memory.
            seed: order of blocks, warps and lanes, and the moment asynchronous copies land; 0 is ascending and latest.
            timeout: seconds until the watchdog ends the launch.
            uninitialised: indices of the arguments that must be written before they are read.
            poisoned: tells of an array whether its words of all ones have never been written, and must be before they
                are read.
            blocks: the blocks to run, as indices into the grid with x fastest; all by default. A grid of 2^31 blocks
                takes no memory, only time. Of a cluster all blocks run.
            check: raise when there is something to report.

        Raises:
            EmulationError: with the reports, unless `check` is false.
        """
        grid, block = (tuple(map(int, size)) + (1,) * (3 - len(size)) for size in (grid, block))
        if not (0 < math.prod(block) <= 1024 and block[2] <= 64):
            raise ValueError(f"`block` must have 1 to 1024 threads, at most 64 on z. Received: block={block}")
        if not (0 < grid[0] < 2**31 and 0 < grid[1] < 2**16 and 0 < grid[2] < 2**16):
            raise ValueError(f"`grid` must be within 2147483647 x 65535 x 65535. Received: grid={grid}")
        if name not in self.kernels:
            names = ", ".join(self.kernels)
            raise ValueError(f"`name` must be a kernel of the module: {names}. Received: name={name!r}")
        count, cluster = math.prod(grid), self.kernels[name].cluster
        if grid[0] % cluster:
            raise ValueError(f"`grid` must be clusters of {cluster} blocks along x. Received: grid={grid}")
        if blocks is not None and not all(0 <= block < count for block in blocks):
            raise ValueError(f"`blocks` must lie in the grid of {count}. Received: blocks={list(blocks)}")
        cell = self.translation.cell_bytes
        memory = _Memory({i: _arrays(value) for i, value in enumerate(args)}, uninitialised, poisoned, cell)
        clusters = list(dict.fromkeys(block // cluster for block in blocks or ()))
        chosen = (ctypes.c_uint64 * len(clusters))(*clusters)
        request = _Request(
            list(self.kernels).index(name),
            grid,
            block,
            shared_bytes,
            None,
            0,
            memory.extents,
            len(memory.extents),
            memory.cells,
            None if blocks is None else chosen,
            len(chosen) if blocks is not None else count // cluster,
            seed,
            timeout,
        )
        parameters = self._parameters(name, args, memory)
        request.parameters = ctypes.addressof(parameters)
        request.parameter_bytes = len(parameters)
        library = self._library(mode)
        with _one_launch:
            text = library.emulator_launch(ctypes.byref(request)).decode()
        memory.copy_back()
        launch = self._read(text)
        launch.reports.extend(self._report(kind, site, message) for kind, site, message in self.kernels[name].findings)
        if check and launch.reports:
            raise EmulationError(name, launch)
        return launch

    def _parameters(self, name: str, args: Sequence[Any], memory: _Memory) -> ctypes.Array:
        expected = self.kernels[name].parameters
        if len(args) != len(expected):
            raise TypeError(f"{name} takes {len(expected)} arguments. Received: {len(args)}")
        end = expected[-1].offset + expected[-1].size if expected else 1
        data = bytearray(end)
        for index, (value, parameter) in enumerate(zip(args, expected)):
            packed, _ = _pack(value, memory)
            if len(packed) != parameter.size:
                raise TypeError(f"argument {index} of {name} has {parameter.size} bytes. Received: {len(packed)} bytes")
            data[parameter.offset : parameter.offset + parameter.size] = packed
        return ctypes.create_string_buffer(bytes(data), end)

    def _report(self, kind: str, site: int, message: str, count: int = 1) -> Report:
        return Report(kind, self.translation.sites[site].place if site >= 0 else "launch", message, count)

    def _read(self, text: str) -> Launch:
        launch = Launch()
        for line in text.splitlines():
            row, *fields = line.split("\t")
            if row == "report":
                kind, site, count, message = fields
                launch.reports.append(self._report(kind, int(site), message, int(count)))
            elif row == "touched":
                launch = replace(launch, touched=int(fields[0]))
            else:
                spot, numbers = self.translation.sites[int(fields[0])], map(int, fields[2:])
                launch.traffic.append(Traffic(spot.place, spot.line, spot.instruction, fields[1], *numbers))
        return launch
