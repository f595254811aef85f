"""What plans are made of: limits of a device, what a launch costs, and the launch itself. Integers and names only."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property


class PlanError(RuntimeError):
    """No kernel of cuconv computes this configuration on this device."""


# Codes of the pointwise activations that kernels apply themselves; mirrored by the ACT_ constants of
# kernels/activations.cuh.
ACTIVATION_CODES = {
    "linear": 0,
    "relu": 1,
    "relu6": 2,
    "leaky_relu": 3,
    "sigmoid": 4,
    "tanh": 5,
    "silu": 6,
    "gelu": 7,
    "elu": 8,
    "selu": 9,
    "softplus": 10,
    "softsign": 11,
    "exponential": 12,
    "hard_sigmoid": 13,
    "hard_silu": 14,
    "celu": 15,
    "mish": 16,
    "squareplus": 17,
    "log_sigmoid": 18,
    "hard_tanh": 19,
    "tanh_shrink": 20,
    "hard_shrink": 21,
    "soft_shrink": 22,
    "sparse_plus": 23,
    "sparse_sigmoid": 24,
}


@dataclass(frozen=True)
class Element:
    """A dtype as kernels see it: its C++ type, its bytes, and the type that sums are taken in."""

    dtype: str
    c_type: str
    bytes: int
    sum_dtype: str
    sum_bytes: int

    @property
    def is_complex(self) -> bool:
        """True for complex64 and complex128."""
        return self.dtype.startswith("complex")


# The types are those of kernels/common.cuh.
ELEMENTS = {
    "float32": Element("float32", "float", 4, "float32", 4),
    "float64": Element("float64", "double", 8, "float64", 8),
    "float16": Element("float16", "half_t", 2, "float32", 4),
    "bfloat16": Element("bfloat16", "bfloat_t", 2, "float32", 4),
    "complex64": Element("complex64", "complex_t<float>", 8, "complex64", 8),
    "complex128": Element("complex128", "complex_t<double>", 16, "complex128", 16),
}

INT32_MAX = 2**31 - 1
WARP = 32  # threads
MAX_THREADS = 1024  # of a block
MAX_GRID_X = INT32_MAX  # blocks
MAX_GRID_YZ = 65535  # blocks
REGISTERS_PER_MULTIPROCESSOR = 65536
REGISTERS_PER_THREAD = 255
STATIC_SHARED_BYTES = 48 << 10  # what a block may have without asking the driver for more
VECTOR_BYTES = 16  # the widest access a thread can make
# Of a tensor map: bytes and their alignment, axes, elements of a box on an axis, the largest step.
MAP_BYTES, MAP_ALIGNMENT = 128, 64
MAP_RANK, MAP_BOX, MAP_STEP = 5, 256, 8


@dataclass(frozen=True)
class DeviceLimits:
    """What a plan must know of a device. Rates are peaks, bytes and operations a second; 0: there is no such unit."""

    name: str
    arch: str  # NVRTC's name, "sm_90"
    multiprocessors: int
    shared_bytes: int  # of a block, at most
    shared_bytes_per_multiprocessor: int
    threads_per_multiprocessor: int
    l2_bytes: int
    bandwidth: float
    fp32_rate: float
    fp64_rate: float
    fp16_rate: float = 0.0  # of the tensor cores, 16-bit products summed in fp32, no sparsity
    tf32_rate: float = 0.0  # of the tensor cores
    dmma_rate: float = 0.0  # of the tensor cores, in fp64; 0 too where they are no faster than other units

    @cached_property
    def fp32_lanes(self) -> int:
        """Multiply-adds of float32 that a multiprocessor starts a cycle."""
        return fp32_lanes(self.capability)

    @cached_property
    def clock(self) -> float:
        """Cycles a second, as the rate of float32 implies them."""
        return self.fp32_rate / (2 * self.fp32_lanes * self.multiprocessors)

    @cached_property
    def capability(self) -> tuple[int, int]:
        """Major and minor compute capability."""
        number = int(self.arch.removeprefix("sm_").rstrip("af"))
        return number // 10, number % 10


def fp32_lanes(capability: tuple[int, int]) -> int:
    """Multiply-adds of float32 that a multiprocessor of that compute capability starts a cycle."""
    return 64 if capability <= (8, 0) else 128


@dataclass(frozen=True)
class Cost:
    """What a launch moves and computes, by the plan's model."""

    flops: int  # operations done, those on padding of the tiles included
    least_flops: int  # operations the definition needs
    bytes: int  # moved between the caches and the multiprocessors
    least_bytes: int  # every array touched once
    seconds: float  # predicted on the device the plan is for
    bound: str = ""  # what most of these seconds go to: a unit, a memory, or the launch


# Kernels with instructions that one architecture alone has: they are compiled for "sm_90a", not for "sm_90".
SPECIFIC_KERNELS = frozenset({"conv_wgmma", "conv_wgmma_first", "kernel_grad_wgmma"})


def compiled_for(kernel: str, arch: str) -> str:
    """The architecture that a kernel is compiled for, to run on GPUs of `arch`."""
    return f"{arch.rstrip('a')}a" if kernel in SPECIFIC_KERNELS else arch


@dataclass(frozen=True)
class TensorMap:
    """An array of a launch as the copy engine takes boxes of it, from sm_90 on. Axes stand innermost first.

    Attributes:
        array: its number among the arrays of the launch.
        dtype: of its elements, a name of ELEMENTS.
        sizes: elements of each axis. What a box has outside of them reads as zero.
        strides: bytes from one element of an axis to the next, of all axes but the innermost.
        box: elements that a box spans of each axis.
        steps: of which it takes one in so many; 1 on the innermost axis.
        swizzle: bytes of a row in shared memory within which pieces of 16 bytes change places; 0: none do.
        rounds: float32 becomes the nearest TF32 on its way.
    """

    array: int
    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    swizzle: int = 128
    rounds: bool = False

    @property
    def kind(self) -> str:
        """What the driver takes the elements for."""
        return "tf32" if self.rounds else self.dtype

    @property
    def box_bytes(self) -> int:
        """What a box has in shared memory."""
        taken = (-(-extent // step) for extent, step in zip(self.box, self.steps, strict=True))
        return math.prod(taken) * ELEMENTS[self.dtype].bytes

    def problem(self) -> str:
        """What the driver would refuse the map for, or ""."""
        row_bytes = self.box[0] * ELEMENTS[self.dtype].bytes
        if not 1 <= len(self.sizes) <= MAP_RANK:
            return f"it has {len(self.sizes)} axes, {MAP_RANK} are the most"
        if not all(0 < size <= 1 << 32 for size in self.sizes):
            return f"its sizes {self.sizes} are not all from 1 to 2**32"
        if not all(0 < stride < 1 << 40 and stride % VECTOR_BYTES == 0 for stride in self.strides):
            return f"its strides of {self.strides} bytes are not all multiples of {VECTOR_BYTES}, less than 2**40"
        if not all(0 < extent <= MAP_BOX for extent in self.box):
            return f"its box {self.box} has not from 1 to {MAP_BOX} elements on each axis"
        if not all(0 < step <= MAP_STEP for step in self.steps) or self.steps[0] != 1:
            return f"its steps {self.steps} are not all from 1 to {MAP_STEP}, the first one 1"
        if row_bytes % VECTOR_BYTES or (self.swizzle and row_bytes > self.swizzle):
            return f"a row of its box has {row_bytes} bytes, no multiple of {VECTOR_BYTES} or more than {self.swizzle}"
        return ""


@dataclass(frozen=True)
class LaunchPlan:
    """One kernel launch, complete but for its arrays.

    Attributes:
        kernel: names the file ``kernels/<kernel>.cu`` and the entry point in it.
        constants: what the file is compiled with, name and value; a value is an integer or a type of common.cuh.
        integers: what follows the array pointers in the kernel's parameter struct, in its order.
        maps: what stands before the array pointers there.
        index_bytes: bytes of each of those integers, 4 or 8; the kernel's `Index` type.
        shared_bytes: shared memory of a block, static and dynamic together.
        dynamic_shared_bytes: the part of it that is asked for at the launch.
        registers: an estimate a thread, from which occupancy is predicted.
        reason: why this plan, in words; `rejected`: what else was weighed, and why it lost.
    """

    kernel: str
    constants: tuple[tuple[str, int | str], ...]
    integers: tuple[int, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    index_bytes: int = 4
    shared_bytes: int = 0
    dynamic_shared_bytes: int = 0
    registers: int = 0
    reason: str = ""
    rejected: tuple[str, ...] = ()
    cost: Cost | None = field(default=None, compare=False)
    maps: tuple[TensorMap, ...] = ()

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return math.prod(self.block)

    @property
    def seconds(self) -> float:
        """Predicted; infinite where no model tells."""
        return self.cost.seconds if self.cost else math.inf

    @property
    def prediction(self) -> str:
        """Why this plan and how long it would take, for the `rejected` of another."""
        return f"{self.reason}: {self.seconds * 1e6:.1f} us predicted"

    def rejecting(self, *words: str) -> LaunchPlan:
        """The same plan, with more that was weighed and lost."""
        return replace(self, rejected=(*self.rejected, *words))

    @property
    def tile(self) -> str:
        """Of a matrix product, "128x128x8, 8x8 a thread"; else ""."""
        constants = dict(self.constants)
        if "BM" not in constants:
            return ""
        text = "x".join(str(constants[name]) for name in ("BM", "BN", "BK") if name in constants)
        for first, second, whose in (("TM", "TN", "thread"), ("WM", "WN", "warp"), ("GM", "GN", "warpgroup")):
            if first in constants and second in constants:
                text += f", {constants[first]}x{constants[second]} a {whose}"
        return text

    @cached_property
    def packed_integers(self) -> bytes:
        """The integers as they stand in the parameter struct."""
        return struct.pack(f"<{len(self.integers)}{'q' if self.index_bytes == 8 else 'i'}", *self.integers)

    def parameters(self, addresses: Sequence[int], maps: Sequence[bytes] = ()) -> bytes:
        """The kernel's by-value parameter struct: maps, as a driver encodes them, pointers, then integers.

        It is filled up to a multiple of 8 bytes, with maps to one of what they are aligned to.
        """
        data = b"".join(maps) + struct.pack(f"<{len(addresses)}Q", *addresses) + self.packed_integers
        unit = MAP_ALIGNMENT if maps else 8
        return data.ljust(-(-len(data) // unit) * unit, b"\0")

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants)
        blocks = math.prod(self.grid)
        return f"{self.kernel}: {blocks} blocks of {self.threads} threads, {constants}. {self.reason}"


def index_bytes(*extents: int) -> int:
    """4 where every extent, the largest value an index of its kind takes, fits 32 bits; else 8."""
    return 4 if max(extents) <= INT32_MAX else 8


def vector(itemsize: int, *multiples: int) -> int:
    """Elements of the widest access, at most 16 bytes, that divides every one of `multiples` (in elements)."""
    return math.gcd(VECTOR_BYTES // itemsize, *multiples)
