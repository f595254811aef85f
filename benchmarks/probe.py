"""What a GPU does that plans and kernels count on, asked of the GPU itself: `python -m benchmarks.probe`.

Each experiment has one question, a few kernels of benchmarks/probe/ and an answer that NumPy computes too. It runs in a
process of its own with a time limit, so one that fails, hangs or breaks the context costs nothing but its own answer.
Answers are printed, and written to ``--json OUT``, as they come; OUT is a complete list at every moment.

`ok` of an answer: true, the machine does what is counted on; false, it does not, or gave no answer; null, nothing was
asked, because this GPU has no such thing or because of ``--dry-run``, which does all but the launches and needs no GPU.
Exit code 1 where an experiment gave no answer, 2 for wrong usage or where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

from cuconv.cuda import cubins, runtime
from cuconv.plan import cost
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import LaunchPlan

FOLDER = Path(__file__).parent / "probe"
MIB = 1 << 20
ANY, HOPPER = (7, 5), (9, 0)

Array = Any  # of the GPU


@dataclass(frozen=True)
class Answer:
    """One answer of an experiment; `figure` in `unit` where there is one."""

    answer: str
    figure: float | None = None
    unit: str = ""
    ok: bool | None = True


# --- Arithmetic of the host --------------------------------------------------------------------------------------

ROW_BYTES = 128  # of a tile under the 128-byte swizzle
NO_SWIZZLE, SWIZZLE_128 = 0, 3  # CUtensorMapSwizzle
BFLOAT16 = 9  # CUtensorMapDataType


def descriptor(stride: int = 8 * ROW_BYTES, leading: int = 16, base_offset: int = 0) -> int:
    """A wgmma operand under the 128-byte swizzle, but for its start address; offsets in bytes.

    Args:
        stride: from 8 rows to the next 8.
        leading: from one 128-byte column of 8-row groups to the next; nothing reads it where there is only one.
        base_offset: of the swizzle pattern, in rows, where it does not start at a multiple of 1024 bytes.
    """
    return leading >> 4 << 16 | stride >> 4 << 32 | base_offset << 49 | 1 << 62


def swizzled(rows: np.ndarray) -> np.ndarray:
    """Rows of 128 bytes as they lie in shared memory: the 16-byte piece p of row r at piece p ^ (r % 8)."""
    pieces = rows.reshape(len(rows), 8, -1)
    order = np.arange(8)[None, :] ^ (np.arange(len(rows)) % 8)[:, None]
    return np.take_along_axis(pieces, order[:, :, None], 1).reshape(rows.shape)


def box_of(x: np.ndarray, start: Sequence[int], box: Sequence[int], steps: Sequence[int] | None = None) -> np.ndarray:
    """The box of a tensor from `start` on, every `steps`-th element of it, zeros outside; axes as NumPy has them.

    `start` may be negative; an axis of `box` elements and a step s brings ceil(box / s) of them.
    """
    steps = steps or (1,) * x.ndim
    chosen, inside = [], []
    for axis, (first, extent, step) in enumerate(zip(start, box, steps, strict=True)):
        at = first + np.arange(0, extent, step)
        inside.append((at >= 0) & (at < x.shape[axis]))
        chosen.append(np.clip(at, 0, x.shape[axis] - 1))
    keep = np.ones(tuple(map(len, chosen)), bool)
    for axis, each in enumerate(inside):
        keep &= each.reshape([-1 if axis == a else 1 for a in range(x.ndim)])
    return np.where(keep, x[np.ix_(*chosen)], np.zeros((), x.dtype))


def whole_numbers(shape: Sequence[int], seed: int) -> np.ndarray:
    """Random bfloat16 of -8 to 8: sums of up to 2^18 of their products are exact in float32."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(ml_dtypes.bfloat16)


def every_word(x: np.ndarray) -> int:
    """Exclusive-or of the 32-bit words."""
    return int(np.bitwise_xor.reduce(x.view(np.uint32).ravel()))


# --- The GPU -----------------------------------------------------------------------------------------------------


class RefusedError(RuntimeError):
    """The driver makes no tensor map of these numbers."""


NO_MAP = np.zeros(128, np.uint8).view("V128")


class Gpu:
    """The GPU at hand, through CuPy."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.runtime = runtime.current()
        self.limits = self.runtime.limits
        self.capability = self.limits.capability
        self._kernels: dict[Any, Any] = {}

    def array(self, host: np.ndarray) -> Array:
        """A copy on the GPU, as bytes in C order. No kernel of CuPy's own is needed here, for it might not compile."""
        return self.cupy.asarray(np.ascontiguousarray(host).reshape(-1).view(np.uint8))

    def poison(self, nbytes: int) -> Array:
        """New memory, every bit set: NaN in every float type."""
        array = self.cupy.empty(nbytes, np.uint8)
        array.data.memset(0xFF, nbytes)
        return array

    def random(self, nbytes: int) -> Array:
        """New memory that repeats 16 MiB of random bits; equal bits can cost less power and run faster."""
        piece = self.array(np.random.default_rng(0).integers(0, 256, min(nbytes, 16 * MIB), np.uint8))
        array = self.cupy.empty(nbytes, np.uint8)
        for start in range(0, nbytes, piece.size):
            array[start:].data.copy_from_device_async(piece.data, min(piece.size, nbytes - start))
        return array

    def host(self, array: Array, dtype: Any = np.uint8) -> np.ndarray:
        """The values; waits for the kernels that write them."""
        return self.cupy.asnumpy(array).view(dtype)

    def tensor_map(
        self,
        array: Array,
        sizes: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        steps: Sequence[int] | None = None,
        swizzle: int = NO_SWIZZLE,
    ) -> np.ndarray:
        """A tensor of bfloat16 for the copy engine, as a by-value argument; axes innermost first, as it has them.

        `strides` in bytes, of all axes but the innermost.

        Raises:
            RefusedError: by the driver.
        """
        return encode(ctypes.CDLL("libcuda.so.1"), array.data.ptr, sizes, strides, box, steps, swizzle)

    def kernel(self, name: str, arch: str | None = None, **constants: int) -> Any:
        """The entry point `name` of ``probe/<name>.cu``, by cuconv's own way from source to cubin to RawModule."""
        key = (name, arch, tuple(constants.items()))
        if key not in self._kernels:
            compiler = runtime._Compiler()
            target = runtime.Target(arch) if arch else compiler.target(self.capability)
            recipe = compiler.recipe(name, cubins.expanded(FOLDER, f"{name}.cu"), key[2], target)
            path = runtime.cubin_cache().obtain(recipe, partial(compiler.compile, recipe))
            self._kernels[key] = self.cupy.RawModule(path=str(path)).get_function(name)
        return self._kernels[key]

    def launch(
        self,
        name: str,
        grid: int,
        block: int,
        arguments: Sequence[Any],
        shared_bytes: int = 0,
        arch: str | None = None,
        **constants: int,
    ) -> None:
        """Starts a kernel; what it needs in shared memory beyond 48 KiB is asked of the driver."""
        kernel = self.kernel(name, arch, **constants)
        if shared_bytes > kernel.max_dynamic_shared_size_bytes:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
        kernel((grid,), (block,), tuple(arguments), shared_mem=shared_bytes)

    def seconds(self, call: Callable[[], Any], calls: int = 20, samples: int = 7) -> float:
        """Of the GPU for one call: the median over `samples` of `calls` between two events."""
        first, last = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        call()
        self.finish()
        times = []
        for _ in range(samples):
            first.record()
            for _ in range(calls):
                call()
            last.record()
            last.synchronize()
            times.append(self.cupy.cuda.get_elapsed_time(first, last) / 1e3 / calls)
        return statistics.median(times)

    def graph(self, call: Callable[[], Any], calls: int) -> Callable[[], Any]:
        """A graph of that many calls, one after the other, as a function that starts it on the current stream."""
        call()  # compiled and loaded before the capture
        self.finish()
        stream = self.cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            for _ in range(calls):
                call()
            graph = stream.end_capture()
        return lambda: graph.launch(self.cupy.cuda.get_current_stream())

    def finish(self) -> None:
        """Waits for all that was started."""
        self.cupy.cuda.get_current_stream().synchronize()

    def copier(self, to: Array, source: Array) -> Callable[[], Any]:
        """The driver's own copy."""
        return lambda: to.data.copy_from_device_async(source.data, source.nbytes)

    def matmul_seconds(self, dtype: str, n: int) -> float | None:
        """Of a product of two n x n matrices of random numbers through torch, else CuPy; None where neither has it.

        "tf32" is float32 on the tensor cores.
        """
        calls = max(1, min(20, round(2e13 / n**3)))
        try:
            import torch
        except ImportError:
            if dtype not in ("float32", "float16"):
                return None
            normal = np.random.default_rng(0).normal(size=(2, n, n)).astype(dtype)
            a, b = (self.cupy.asarray(each) for each in normal)
            out = self.cupy.empty((n, n), dtype)
            return self.seconds(lambda: self.cupy.matmul(a, b, out=out), calls, 5)
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        a, b = (torch.randn(n, n, device="cuda", dtype=kind) for _ in range(2))
        out = torch.empty_like(a)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(6):
            first.record()
            for _ in range(calls):
                torch.matmul(a, b, out=out)
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3 / calls)
        return statistics.median(times[1:])

    def launcher(self, plan: LaunchPlan, arrays: Sequence[Array]) -> Callable[[], Any]:
        """cuconv's own launch, of a kernel of this folder."""
        with mock.patch.object(runtime, "kernel_directory", return_value=FOLDER):
            self.runtime.launch(plan, arrays)
        return lambda: self.runtime.launch(plan, arrays)

    def host_seconds(self, call: Callable[[], Any], calls: int = 200, samples: int = 25, wait: bool = False) -> float:
        """Of the host for one call, the median: until it is started, or with `wait` until the GPU is done with it."""
        call()
        times = []
        for _ in range(samples):
            self.finish()
            started = time.perf_counter()
            for _ in range(calls):
                call()
                if wait:
                    self.finish()
            times.append((time.perf_counter() - started) / calls)
        return statistics.median(times)


def encode(
    driver: Any,
    address: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    steps: Sequence[int] | None = None,
    swizzle: int = NO_SWIZZLE,
) -> np.ndarray:
    """See :meth:`Gpu.tensor_map`; `driver` is libcuda."""
    room = np.zeros(128 + 127, np.uint8)
    start = -room.ctypes.data % 128  # the driver asks for a multiple of 64
    place = room[start : start + 128]
    rank = len(sizes)
    many, few = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
    interleave, l2_promotion, fill = 0, 3, 0  # none; 256 bytes; zeros outside
    status = driver.cuTensorMapEncodeTiled(
        ctypes.c_void_p(place.ctypes.data),
        ctypes.c_int(BFLOAT16),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        many(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        few(*box),
        few(*(steps or (1,) * rank)),
        ctypes.c_int(interleave),
        ctypes.c_int(swizzle),
        ctypes.c_int(l2_promotion),
        ctypes.c_int(fill),
    )
    if status:
        raise RefusedError(f"the driver's error {status}")
    return place.view("V128")


class DryGpu(Gpu):
    """All but the GPU: memory is NumPy's, a launch only looks at its arguments, nothing takes time."""

    def __init__(self) -> None:
        self.limits = DEVICES["H200"]
        self.capability = self.limits.capability

    def array(self, host: np.ndarray) -> Array:
        return np.ascontiguousarray(host).reshape(-1).view(np.uint8).copy()

    def poison(self, nbytes: int) -> Array:
        return np.broadcast_to(np.uint8(0xFF), nbytes) if nbytes > 64 * MIB else np.full(nbytes, 0xFF, np.uint8)

    random = poison

    def host(self, array: Array, dtype: Any = np.uint8) -> np.ndarray:
        return np.ascontiguousarray(array).view(dtype)

    def tensor_map(
        self,
        array: Array,
        sizes: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        steps: Sequence[int] | None = None,
        swizzle: int = NO_SWIZZLE,
    ) -> np.ndarray:
        driver = mock.Mock()
        driver.cuTensorMapEncodeTiled.return_value = 0
        return encode(driver, 0, sizes, strides, box, steps, swizzle)

    def kernel(self, name: str, arch: str | None = None, **constants: int) -> Any:
        assert f" {name}(" in cubins.expanded(FOLDER, f"{name}.cu")
        cubins.definitions(tuple(constants.items()))
        return self._look

    def _look(
        self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared_mem: int = 0
    ) -> None:
        assert all(0 < n < 2**31 for n in grid) and 0 < math.prod(block) <= 1024, (grid, block)
        assert 0 <= shared_mem <= self.limits.shared_bytes
        assert all(isinstance(each, (np.ndarray, np.generic)) for each in arguments), "numbers have NumPy's types"

    def launch(
        self,
        name: str,
        grid: int,
        block: int,
        arguments: Sequence[Any],
        shared_bytes: int = 0,
        arch: str | None = None,
        **constants: int,
    ) -> None:
        self.kernel(name, arch, **constants)((grid,), (block,), tuple(arguments), shared_bytes)

    def seconds(self, call: Callable[[], Any], calls: int = 20, samples: int = 7) -> float:
        call()
        return math.nan

    def host_seconds(self, call: Callable[[], Any], calls: int = 200, samples: int = 25, wait: bool = False) -> float:
        call()
        return math.nan

    def graph(self, call: Callable[[], Any], calls: int) -> Callable[[], Any]:
        call()
        return lambda: None

    def finish(self) -> None:
        pass

    def copier(self, to: Array, source: Array) -> Callable[[], Any]:
        assert to.nbytes == source.nbytes
        return lambda: None

    def matmul_seconds(self, dtype: str, n: int) -> float | None:
        return math.nan

    def launcher(self, plan: LaunchPlan, arrays: Sequence[Array]) -> Callable[[], Any]:
        plan.parameters(tuple(0 for _ in arrays))
        self.kernel(plan.kernel)
        return lambda: None


# --- Bandwidth and rates -----------------------------------------------------------------------------------------


def machine(gpu: Gpu) -> Iterator[Answer]:
    limits = gpu.limits
    yield Answer(f"{limits.name}, {limits.arch}", limits.multiprocessors, "multiprocessors")
    for name, unit in (
        ("shared_bytes", "B"),
        ("shared_bytes_per_multiprocessor", "B"),
        ("l2_bytes", "B"),
        ("bandwidth", "B/s"),
        ("fp32_rate", "FLOP/s"),
        ("fp64_rate", "FLOP/s"),
    ):
        value = getattr(limits, name)
        yield Answer(f"{name.replace('_', ' ')}, as plans have it", value, unit, value > 0)


COPY_MIB = (16, 64, 256, 1024, 4096)


def copy(gpu: Gpu) -> Iterator[Answer]:
    vectors = 4
    for mib in COPY_MIB:
        nbytes = mib * MIB
        x, y = gpu.random(nbytes), gpu.poison(nbytes)
        per_block = 256 * vectors * 16
        arguments = (x, y, np.int64(nbytes // 16))
        run = partial(gpu.launch, "copy", -(-nbytes // per_block), 256, arguments, VECTORS=vectors)
        seconds = gpu.seconds(run)
        # 16 MiB of the middle, the beginning and the end: x repeats after that many bytes.
        pieces = (slice(0, 16 * MIB), slice(nbytes // 2, nbytes // 2 + 16 * MIB), slice(nbytes - 16 * MIB, nbytes))
        same = all(np.array_equal(gpu.host(x[piece]), gpu.host(y[piece])) for piece in pieces)
        where = "in the L2 cache" if 2 * nbytes <= gpu.limits.l2_bytes else "from memory to memory"
        yield Answer(f"{mib} MiB by a kernel of ours, {where}", 2 * nbytes / seconds, "B/s", same)
        if mib >= 1024:
            yield Answer(f"{mib} MiB by the driver", 2 * nbytes / gpu.seconds(gpu.copier(y, x)), "B/s")
        del x, y, arguments, run


L2_MIB = (4, 8, 16, 24, 32, 48, 96, 512, 2048)  # the last one is memory
L2_CHECKED_MIB = 64  # more takes the host too long


def l2(gpu: Gpu) -> Iterator[Answer]:
    blocks, threads = 2 * gpu.limits.multiprocessors, 512
    rates = {}
    sums = gpu.poison(4 * blocks * threads)
    for mib in L2_MIB:
        nbytes = mib * MIB
        x = gpu.random(nbytes)
        passes = max(1, L2_MIB[-1] // mib) | 1  # odd, so that the sums say whether all was read
        run = partial(gpu.launch, "read", blocks, threads, (x, sums, np.int64(nbytes // 16), np.int32(passes)))
        rates[mib] = passes * nbytes / gpu.seconds(run, 5)
        ok = mib > L2_CHECKED_MIB or every_word(gpu.host(sums)) == every_word(gpu.host(x))
        yield Answer(f"reading {mib} MiB, {passes} times", rates[mib], "B/s", ok)
        del x, run
    cached = max(rate for mib, rate in rates.items() if 2 * mib * MIB <= gpu.limits.l2_bytes)
    said = f"L2 over memory; the model of plans takes {cost.L2_FACTOR}"
    yield Answer(said, cached / rates[L2_MIB[-1]], "", 0.5 < cached / rates[L2_MIB[-1]] / cost.L2_FACTOR < 2)


STAGING_MIB = {16: 65, 1024: 1}  # and how often: in the L2 cache, and from memory


def staging(gpu: Gpu) -> Iterator[Answer]:
    multiprocessors, threads = gpu.limits.multiprocessors, 256
    for mib, passes in STAGING_MIB.items():
        nbytes = mib * MIB
        x = gpu.random(nbytes)
        where = "the L2 cache" if passes > 1 else "memory"
        for stages, resident in ((2, 8), (4, 8), (4, 4), (8, 4)):
            blocks = multiprocessors * resident
            sums = gpu.poison(4 * blocks * threads)
            arguments = (x, sums, np.int64(nbytes // 16), np.int32(passes))
            run = partial(gpu.launch, "stage", blocks, threads, arguments, STAGES=stages)
            rate = passes * nbytes / gpu.seconds(run, 5)
            ok = passes == 1 or every_word(gpu.host(sums)) == every_word(gpu.host(x))
            yield Answer(f"cp.async from {where}, {stages} stages, {resident} blocks of {threads}", rate, "B/s", ok)
        if gpu.capability >= HOPPER:
            rate, ok = _stream(gpu, x, (64, nbytes // ROW_BYTES, 1), (ROW_BYTES, nbytes), (64, 128, 1), passes=passes)
            yield Answer(f"the copy engine from {where}, boxes of 128 rows of 128 bytes", rate, "B/s", ok)


STREAM_STAGES = 6  # of 16 KiB: two blocks fit a multiprocessor


def _stream(
    gpu: Gpu,
    x: Array,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    steps: Sequence[int] | None = None,
    boxes: Sequence[int] | None = None,
    passes: int = 1,
) -> tuple[float, bool]:
    """Bytes a second that the copy engine brings in such boxes, and whether it brought them all."""
    steps = steps or (1, 1, 1)
    tensor = gpu.tensor_map(x, sizes, strides, box, steps, SWIZZLE_128)
    nbytes = 2 * math.prod(-(-extent // step) for extent, step in zip(box, steps, strict=True))
    boxes = boxes or tuple(size // extent for size, extent in zip(sizes, box, strict=True))
    blocks = 2 * gpu.limits.multiprocessors
    sums = gpu.poison(4 * blocks)
    numbers = tuple(map(np.int32, (*boxes, *box, passes)))
    shared = STREAM_STAGES * nbytes + 1024
    arguments = (tensor, sums, *numbers)
    run = partial(gpu.launch, "stream", blocks, 64, arguments, shared, STAGES=STREAM_STAGES, BOX_BYTES=nbytes)
    rate = passes * math.prod(boxes) * nbytes / gpu.seconds(run, 5)
    return rate, int(gpu.host(sums, np.uint32).sum()) == passes * math.prod(boxes)


def gemm(gpu: Gpu) -> Iterator[Answer]:
    for dtype, n in (("float32", 8192), ("tf32", 8192), ("float16", 8192), ("bfloat16", 8192), ("bfloat16", 4096)):
        seconds = gpu.matmul_seconds(dtype, n)
        if seconds is None:
            yield Answer(f"{dtype}: torch is not installed, and CuPy has no such product", ok=None)
        else:
            yield Answer(f"{dtype}, {n} x {n} x {n}, random numbers", 2 * n**3 / seconds, "FLOP/s")


def launch(gpu: Gpu) -> Iterator[Answer]:
    arrays = [gpu.poison(256) for _ in range(3)]
    plan = LaunchPlan("empty", (), (1,) * 8, (1, 1, 1), (32, 1, 1))
    kernel, raw = gpu.launcher(plan, arrays), gpu.kernel("empty")
    parameters = np.frombuffer(plan.parameters((0, 0, 0)), "V56")
    plain = partial(raw, (1,), (32,), (parameters,))
    for call, name in ((kernel, "cuconv's launch"), (plain, "CuPy's RawKernel")):
        yield Answer(f"{name}: the host, until it is started", gpu.host_seconds(call), "s")
        yield Answer(f"{name}: the host, until it is done", gpu.host_seconds(call, wait=True), "s")
        yield Answer(f"{name}: from one to the next, started one by one", gpu.seconds(call, 500), "s")
    calls = 100
    replay = gpu.graph(kernel, calls)
    yield Answer(f"a graph of {calls}: the host, until it is started", gpu.host_seconds(replay, 1), "s")
    between = gpu.seconds(replay, 5) / calls
    said = f"from one to the next, in a graph; the model of plans takes {cost.LAUNCH_SECONDS * 1e6:g} us"
    yield Answer(said, between, "s", 0.3 < between / cost.LAUNCH_SECONDS < 3)


# --- The copy engine ---------------------------------------------------------------------------------------------

# Positions, rows and columns of a box of a tensor (2, 200, 128), as NumPy has the axes; outside on every side.
BOXES = ((0, 0, 0), (1, 136, 64), (0, -5, 0), (1, 170, 64), (0, 300, 0), (2, 0, 0), (-1, 0, 0), (0, 0, -8), (1, 0, 120))


def tensor(gpu: Gpu) -> Iterator[Answer]:
    x = whole_numbers((2, 200, 128), 1)
    placed = gpu.array(x)
    for swizzle, name in ((NO_SWIZZLE, "no swizzle"), (SWIZZLE_128, "128-byte swizzle")):
        given = gpu.tensor_map(placed, (128, 200, 2), (256, 200 * 256), (64, 64, 1), None, swizzle)
        wrong = []
        for start in BOXES:
            expected = box_of(x, start, (1, 64, 64))[0]
            got = _box(gpu, given, start[::-1], expected.nbytes, 3).reshape(64, -1)
            if not np.array_equal(got, swizzled(expected.view(np.uint8)) if swizzle else expected.view(np.uint8)):
                wrong.append(start)
        yield Answer(f"{name}: boxes, zeros outside, {_all_but(wrong, len(BOXES))}", ok=not wrong)


def _box(gpu: Gpu, given: np.ndarray, start: Sequence[int], nbytes: int, rank: int) -> np.ndarray:
    """The bytes that a box has in shared memory; `start` innermost first."""
    out = gpu.poison(nbytes)
    numbers = (*map(np.int32, start), *(np.int32(0),) * (3 - len(start)))
    gpu.launch("box", 1, 128, (given, out, *numbers), RANK=rank, BOX_BYTES=nbytes)
    return gpu.host(out)


def _all_but(wrong: Sequence[Any], count: int) -> str:
    if not wrong:
        return f"all {count} right"
    return f"{len(wrong)} of {count} wrong: {' '.join(map(str, wrong[:12]))}"


STRIDE_MIB = 1024


def stride(gpu: Gpu) -> Iterator[Answer]:
    x = whole_numbers((200, 64), 2)
    placed = gpu.array(x)
    for step, rows in ((2, 128), (2, 127), (3, 96), (8, 256)):
        given = gpu.tensor_map(placed, (64, 200), (ROW_BYTES,), (64, rows), (1, step), SWIZZLE_128)
        wrong = []
        starts = (0, 1, 7, -3, -4, 150)
        for start in starts:
            expected = box_of(x, (start, 0), (rows, 64), (step, 1))
            got = _box(gpu, given, (0, start), expected.nbytes, 2).reshape(len(expected), -1)
            if not np.array_equal(got, swizzled(expected.view(np.uint8))):
                wrong.append(start)
        yield Answer(f"every {step}. of {rows} rows from {starts}: {_all_but(wrong, len(starts))}", ok=not wrong)
    nbytes = STRIDE_MIB * MIB
    rows, big = nbytes // ROW_BYTES, gpu.random(nbytes)
    ways = {
        "all rows, boxes of 128": ((64, rows, 1), (ROW_BYTES, nbytes), (64, 128, 1), None, None),
        "every second row by elementStrides": ((64, rows, 1), (ROW_BYTES, nbytes), (64, 256, 1), (1, 2, 1), None),
        "every second row as a phase of its own axis": (
            (64, 2, rows // 2),
            (ROW_BYTES, 2 * ROW_BYTES),
            (64, 1, 128),
            None,
            (1, 1, rows // 256),
        ),
    }
    for name, way in ways.items():
        rate, ok = _stream(gpu, big, *way)
        yield Answer(f"{name}, brought", rate, "B/s", ok)


def overlap(gpu: Gpu) -> Iterator[Answer]:
    x = whole_numbers((8192,), 3)
    placed = gpu.array(x)
    for pitch in (16, 48, 112, 8, 24):  # bytes; the last two are no multiples of 16
        legal = pitch % 16 == 0
        try:
            given = gpu.tensor_map(placed, (64, 60), (pitch,), (64, 32), None, SWIZZLE_128)
        except RefusedError as error:
            yield Answer(f"rows of 128 bytes every {pitch} bytes: refused, {error}", ok=not legal)
            continue
        view = np.lib.stride_tricks.as_strided(x, (60, 64), (pitch, 2))
        wrong = []
        for start in (0, 5, -3, 40):
            expected = box_of(view, (start, 0), (32, 64))
            if not np.array_equal(
                _box(gpu, given, (0, start), 4096, 2).reshape(32, -1), swizzled(expected.view(np.uint8))
            ):
                wrong.append(start)
        yield Answer(f"rows of 128 bytes every {pitch} bytes: taken, {_all_but(wrong, 4)}", ok=legal and not wrong)
    rows = x.reshape(128, 64)
    phases = rows.reshape(32, 4, 64)
    for name, sizes, strides, box, view in (
        ("phase, then row", (64, 4, 32), (ROW_BYTES, 4 * ROW_BYTES), (64, 1, 16), phases),
        ("row, then phase", (64, 32, 4), (4 * ROW_BYTES, ROW_BYTES), (64, 16, 1), phases.transpose(1, 0, 2)),
    ):
        try:
            given = gpu.tensor_map(placed, sizes, strides, box, None, SWIZZLE_128)
        except RefusedError as error:
            yield Answer(f"rows l = 4 q + r as axes, {name}: refused, {error}", ok=False)
            continue
        lost = []
        for q, r in ((0, 0), (3, 2), (-2, 1), (25, 3), (8, -1), (8, 4)):
            at = (r, q, 0) if "row, then" in name else (q, r, 0)
            expected = box_of(view, at, box[::-1]).reshape(16, 64)
            got = _box(gpu, given, at[::-1], expected.nbytes, 3).reshape(16, -1)
            if not np.array_equal(got, swizzled(expected.view(np.uint8))):
                lost.append((q, r))
        yield Answer(f"rows l = 4 q + r as axes, {name}: {_all_but(lost, 6)}", ok=not lost)


# --- Products of a warpgroup -------------------------------------------------------------------------------------

ROWS = 128  # of A in shared memory, 64 of them in a product


def _product(
    gpu: Gpu,
    a: Array,
    b: Array,
    transposed_a: bool,
    transposed_b: bool,
    skip: int = 0,
    base_offset: int = 0,
    tensor: np.ndarray | None = None,
    row: int = 0,
) -> np.ndarray:
    """The 64 x 64 product that the GPU makes; `a` and `b` on the GPU, or A from `row` on of `tensor`."""
    out = gpu.poison(64 * 64 * 4)
    given = NO_MAP if tensor is None else tensor
    fixed = (np.uint64(descriptor(base_offset=base_offset)), np.uint64(descriptor()))
    arguments = (given, a, b, out, *fixed, np.int32(skip), np.int32(row))
    gpu.launch(
        "product",
        1,
        128,
        arguments,
        arch="sm_90a",
        ROWS=ROWS,
        TRANSPOSED_A=int(transposed_a),
        TRANSPOSED_B=int(transposed_b),
        FROM_MAP=int(tensor is not None),
        STAGE_ONLY=0,
    )
    return gpu.host(out, np.float32).reshape(64, 64)


def expected_product(a: np.ndarray, b: np.ndarray, transposed_a: bool, transposed_b: bool, skip: int = 0) -> np.ndarray:
    """The same of rows in memory, from row `skip` of A on."""
    left, right = (each.astype(np.float64) for each in (a[skip : skip + 64], b))
    return (left.T if transposed_a else left) @ (right if transposed_b else right.T)


LIES = {False: "along the sum", True: "along the result"}


def product(gpu: Gpu) -> Iterator[Answer]:
    a, b = whole_numbers((ROWS, 64), 4), whole_numbers((64, 64), 5)
    on_gpu = gpu.array(a), gpu.array(b)
    for kind in ((False, False), (False, True), (True, False), (True, True)):
        got = _product(gpu, *on_gpu, *kind)
        ok = np.array_equal(got, expected_product(a, b, *kind))
        said = f"A contiguous {LIES[kind[0]]}, B {LIES[kind[1]]}: {'right' if ok else 'wrong'}"
        yield Answer(said, ok=ok)


def shift(gpu: Gpu) -> Iterator[Answer]:
    a, b = whole_numbers((ROWS, 64), 6), whole_numbers((64, 64), 7)
    on_gpu = gpu.array(a), gpu.array(b)
    shifts = range(ROWS - 64 + 1)
    offsets = {"0": lambda t: 0, "shift % 8": lambda t: t % 8, "-shift % 8": lambda t: -t % 8}
    for transposed in (False, True):
        for name, offset in offsets.items():
            wrong = [
                t
                for t in shifts
                if not np.array_equal(
                    _product(gpu, *on_gpu, transposed, False, t, offset(t)),
                    expected_product(a, b, transposed, False, t),
                )
            ]
            said = f"A contiguous {LIES[transposed]}, base offset {name}: shifts of 0 to 64 rows, "
            # Only the first is counted on; the others say what else would do.
            yield Answer(said + _all_but(wrong, len(shifts)), ok=not wrong if name == "0" else None)


def halo(gpu: Gpu) -> Iterator[Answer]:
    x, b = whole_numbers((200, 64), 8), whole_numbers((64, 64), 9)
    placed = gpu.array(x)
    given = gpu.tensor_map(placed, (64, 200), (ROW_BYTES,), (64, ROWS), None, SWIZZLE_128)
    for transposed in (False, True):
        wrong = []
        cases = [(row, t) for row in (-3, 0, 5, 100, 190) for t in (0, 1, 2, 5, 7, 8, 9, 16, 33, 64)]
        for row, t in cases:
            tile = box_of(x, (row, 0), (ROWS, 64))
            got = _product(gpu, placed, gpu.array(b), transposed, False, t, 0, given, row)
            if not np.array_equal(got, expected_product(tile, b, transposed, False, t)):
                wrong.append((row, t))
        said = f"A contiguous {LIES[transposed]}, (first row, shift): {_all_but(wrong, len(cases))}"
        yield Answer(said, ok=not wrong)


# --- Clusters and registers --------------------------------------------------------------------------------------


def cluster(gpu: Gpu) -> Iterator[Answer]:
    x = whole_numbers((1, 64, 64), 10)
    placed = gpu.array(x)  # a map keeps no memory alive
    given = gpu.tensor_map(placed, (64, 64, 1), (ROW_BYTES, x.nbytes), (64, 64, 1), None, SWIZZLE_128)
    expected = swizzled(x[0].view(np.uint8)).reshape(-1)
    blocks = 8
    for shared_bytes in (x.nbytes + 1024, 200 << 10):
        seen, out = gpu.poison(4 * blocks), gpu.poison(blocks * x.nbytes)
        gpu.launch("cluster", blocks, 128, (given, seen, out), shared_bytes, BOX_BYTES=x.nbytes)
        neighbours = np.array_equal(gpu.host(seen, np.uint32), 1000 + (np.arange(blocks) ^ 1))
        copies = np.array_equal(gpu.host(out).reshape(blocks, -1), np.broadcast_to(expected, (blocks, expected.size)))
        said = f"2 blocks with {shared_bytes >> 10} KiB of shared memory each: "
        yield Answer(said + f"the neighbour's memory {_right(neighbours)}", ok=neighbours)
        yield Answer(said + f"one box brought to both {_right(copies)}", ok=copies)


def _right(ok: bool) -> str:
    return "right" if ok else "wrong"


def registers(gpu: Gpu) -> Iterator[Answer]:
    rounds, count, blocks = 64, 192, gpu.limits.multiprocessors
    x = np.random.default_rng(11).normal(size=(rounds, 256)).astype(np.float32)
    out = gpu.poison(4 * 256 * blocks)
    gpu.launch("registers", blocks, 384, (gpu.array(x), out, np.int32(rounds)), arch="sm_90a")
    factors = np.add.outer(np.arange(rounds), np.arange(count)).sum(1)
    expected = factors @ x.astype(np.float64)
    error = np.abs(gpu.host(out, np.float32).reshape(blocks, 256) - expected).max()
    allowed = 1e-4 * float((factors @ np.abs(x)).max())
    ok = bool(error <= allowed)  # false for NaN
    yield Answer(f"24 registers for one warpgroup, 240 for two others, {count} sums alive: {_right(ok)}", ok=ok)


# --- Asking ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """`ask` yields the answers; `seconds` is its time limit; other GPUs than of `capability` (or newer) are not asked.

    `only`: no newer ones either, for instructions that one architecture alone has.
    """

    question: str
    ask: Callable[[Gpu], Iterator[Answer]]
    seconds: float = 30.0
    capability: tuple[int, int] = ANY
    only: bool = False


# In order of value: what may not be reached comes last.
EXPERIMENTS = {
    "machine": Experiment("What do plans take this GPU for?", machine),
    "copy": Experiment("How fast does memory copy, bytes read and written?", copy),
    "launch": Experiment("What does a launch cost?", launch, 40),
    "tensor": Experiment("Does a tensor map reach a kernel by value through CuPy?", tensor, capability=HOPPER),
    "product": Experiment("Does wgmma run from a cubin for sm_90a?", product, capability=HOPPER, only=True),
    "shift": Experiment("May an operand under the 128-byte swizzle start at any row?", shift, 40, HOPPER, True),
    "halo": Experiment("And what the copy engine brought, with zeros outside?", halo, 40, HOPPER, True),
    "gemm": Experiment("How fast are large matrix products?", gemm, 60),
    "l2": Experiment("How much faster than memory is the L2 cache?", l2),
    "stride": Experiment("Do element strides work, and at what speed?", stride, 40, HOPPER),
    "overlap": Experiment("Which strides may a tensor map have?", overlap, 30, HOPPER),
    "cluster": Experiment("Does an ordinary launch start clusters?", cluster, 30, HOPPER),
    "registers": Experiment("Do warpgroups trade registers?", registers, 30, HOPPER, True),
    "staging": Experiment("How fast does shared memory fill?", staging, 40, (8, 0)),
}


def answers(name: str, gpu: Gpu, dry: bool = False) -> Iterator[dict[str, Any]]:
    """The records of an experiment, as they come."""
    experiment = EXPERIMENTS[name]
    if gpu.capability < experiment.capability or (experiment.only and gpu.capability[0] != experiment.capability[0]):
        has, needs = ("{}.{}".format(*each) for each in (gpu.capability, experiment.capability))
        yield record(
            name, Answer(f"not on this GPU: it has compute capability {has}, and this is for {needs}", ok=None)
        )
        return
    started = time.perf_counter()
    for given in experiment.ask(gpu):
        seconds, started = time.perf_counter() - started, time.perf_counter()
        yield record(name, Answer("dry run", ok=None) if dry else given, seconds)


def record(name: str, answer: Answer, seconds: float = 0.0) -> dict[str, Any]:
    """An answer, fit for JSON."""
    figure = answer.figure if answer.figure is not None and math.isfinite(answer.figure) else None
    return {
        "name": name,
        "question": EXPERIMENTS[name].question,
        "answer": answer.answer,
        "figure": figure,
        "unit": answer.unit,
        "ok": answer.ok if figure is not None or answer.figure is None else False,
        "seconds": round(seconds, 4),
    }


def command(name: str, dry: bool) -> list[str]:
    """What asks one experiment in a process of its own."""
    return [sys.executable, "-m", "benchmarks.probe", "--here", "--only", name, *(["--dry-run"] if dry else [])]


def ask_apart(name: str, dry: bool) -> list[dict[str, Any]]:
    """The records of an experiment in a process of its own; the last one says so where it did not come to its end."""
    experiment = EXPERIMENTS[name]
    root = Path(__file__).parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    started = time.perf_counter()
    with subprocess.Popen(
        command(name, dry), cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, messages = process.communicate(timeout=experiment.seconds)
            problem = None if process.returncode == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            out, messages = process.communicate()
            problem = f"nothing more after {experiment.seconds:g} s"
    records = []
    for line in out.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # half a line of one that was killed
            records.append(json.loads(line))
    if problem or not records:
        last = messages.strip().splitlines()[-1:] or ["no message"]
        said = f"no answer: {problem or 'nothing printed'}; {last[0]}"
        records.append(record(name, Answer(said, ok=False), time.perf_counter() - started))
    return records


def write(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """All records so far, in place of those that were there; a reader never sees half of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    unfinished.replace(path)


UNITS = {"B/s": (1e9, "GB/s"), "FLOP/s": (1e12, "TFLOP/s"), "s": (1e-6, "us"), "B": (1024, "KiB")}


def line_of(found: Mapping[str, Any]) -> str:
    """A record as it is printed."""
    scale, unit = UNITS.get(found["unit"], (1, found["unit"]))
    figure = "" if found["figure"] is None else f"{found['figure'] / scale:,.4g} {unit}"
    mark = {True: "yes", False: "NO", None: "-"}[found["ok"]]
    return f"{found['name']:10} {mark:3} {figure:>16}  {found['answer']}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.probe", description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="all but the launches; needs no GPU")
    parser.add_argument("--only", nargs="+", choices=tuple(EXPERIMENTS), metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the records there as they come")
    parser.add_argument("--here", action="store_true", help="in this process, a JSON record a line")
    options = parser.parse_args(arguments)
    names = options.only or list(EXPERIMENTS)
    if not options.dry_run and not options.here and not runtime.probe().usable:
        print(f"benchmarks.probe: error: {runtime.probe().reason}; --dry-run needs no GPU", file=sys.stderr)
        return 2
    if options.here:
        gpu = DryGpu() if options.dry_run else Gpu()
        for name in names:
            for each in answers(name, gpu, options.dry_run):
                print(json.dumps(each), flush=True)
        return 0
    records: list[dict[str, Any]] = []
    for name in names:
        print(f"{name}: {EXPERIMENTS[name].question}", flush=True)
        found = ask_apart(name, options.dry_run)
        records += found
        for each in found:
            print("  " + line_of(each), flush=True)
        if options.json:
            write(records, options.json)
    broken = sorted({each["name"] for each in records if each["answer"].startswith("no answer")})
    if broken:
        print(f"benchmarks.probe: no answer from {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
