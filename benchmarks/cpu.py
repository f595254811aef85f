"""cuconv on NumPy against PyTorch and ONNX Runtime on one CPU thread: `python -m benchmarks.cpu`.

Every library gets and returns channels_last arrays and pays for the transpositions it needs. Where a library has
several ways to compute a row, all of them compete and the fastest counts. Every answer is checked before it is timed.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.timing import CLOCKS, Call, Clock, interleaved, machine, one_thread, per_call, pin_to_one_thread

Array = np.ndarray[Any, np.dtype[Any]]


# ---------------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Row:
    """One measured problem; x, w and y are the arrays of the forward operation, also where `op` is a gradient of it."""

    name: str
    op: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    strides: int = 1
    padding: str = "valid"
    dilation_rate: int = 1

    @property
    def transposed(self) -> bool:
        return self.op == "conv_transpose"

    @property
    def depthwise(self) -> bool:
        return self.op == "depthwise_conv"

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return self.w[:-2]

    @property
    def filters(self) -> int:
        return self.w[-2] * self.w[-1] if self.depthwise else self.w[-2] if self.transposed else self.w[-1]

    @property
    def out_size(self) -> tuple[int, ...]:
        if self.transposed:
            return tuple(n * self.strides for n in self.x[1:-1])
        lost = [0 if self.padding == "same" else (k - 1) * self.dilation_rate for k in self.kernel_size]
        return tuple(-(-(n - less) // self.strides) for n, less in zip(self.x[1:-1], lost, strict=True))

    @property
    def y(self) -> tuple[int, ...]:
        return (self.x[0], *self.out_size, self.filters)

    @property
    def pads(self) -> list[tuple[int, int]]:
        """(before, after) per spatial axis: added to x, or cropped from the full product where transposed."""
        if self.padding == "valid":
            return [(0, 0)] * len(self.kernel_size)
        small, large = (self.x, self.y) if self.transposed else (self.y, self.x)
        totals = [
            max((p - 1) * self.strides + (k - 1) * self.dilation_rate + 1 - n, 0)
            for p, n, k in zip(small[1:-1], large[1:-1], self.kernel_size, strict=True)
        ]
        return [(total // 2, total - total // 2) for total in totals]

    @property
    def terms(self) -> int:
        """Products summed into one element of the answer."""
        if self.op == "conv_kernel_grad":
            return math.prod(self.y[:-1])
        return math.prod(self.kernel_size) * (1 if self.depthwise else self.w[-1] if self.op != "conv" else self.w[-2])

    @property
    def flops(self) -> int:
        """Multiplications and additions, counting those that meet padding."""
        positions = math.prod((self.x if self.transposed else self.y)[:-1])
        return 2 * positions * math.prod(self.w)

    @property
    def bytes(self) -> int:
        """Least traffic: two float32 operands read once, the answer written once."""
        return 4 * (math.prod(self.x) + math.prod(self.w) + math.prod(self.y))


ROWS = (
    Row("conv1d k10 9->100", "conv", (32, 128, 9), (10, 9, 100)),
    Row("conv1d k80 s4 1->64", "conv", (8, 16000, 1), (80, 1, 64), strides=4),
    Row("conv1d k3 d1 64->64", "conv", (16, 1024, 64), (3, 64, 64), padding="same"),
    Row("conv1d k3 d8 64->64", "conv", (16, 1024, 64), (3, 64, 64), padding="same", dilation_rate=8),
    Row("conv1d k3 d64 64->64", "conv", (16, 1024, 64), (3, 64, 64), padding="same", dilation_rate=64),
    Row("conv1d k15 128->256", "conv", (8, 4096, 128), (15, 128, 256), padding="same"),
    Row("depthwise1d k4", "depthwise_conv", (8, 2048, 512), (4, 512, 1)),
    Row("depthwise1d k31", "depthwise_conv", (8, 2048, 512), (31, 512, 1), padding="same"),
    Row("pointwise 512->512", "conv", (8, 2048, 512), (1, 512, 512)),
    Row("conv2d 3x3 64->64", "conv", (8, 56, 56, 64), (3, 3, 64, 64), padding="same"),
    Row("conv2d 3x3 s2 128->128", "conv", (8, 28, 28, 128), (3, 3, 128, 128), strides=2, padding="same"),
    Row("depthwise2d k7", "depthwise_conv", (8, 56, 56, 96), (7, 7, 96, 1), padding="same"),
    Row("transpose1d k16 s8 256->128", "conv_transpose", (8, 256, 256), (16, 128, 256), strides=8, padding="same"),
    Row("conv1d k15 input grad", "conv_input_grad", (8, 4096, 128), (15, 128, 256), padding="same"),
    Row("conv1d k15 kernel grad", "conv_kernel_grad", (8, 4096, 128), (15, 128, 256), padding="same"),
    Row("conv2d 3x3 input grad", "conv_input_grad", (8, 56, 56, 64), (3, 3, 64, 64), padding="same"),
    Row("conv2d 3x3 kernel grad", "conv_kernel_grad", (8, 56, 56, 64), (3, 3, 64, 64), padding="same"),
)


@dataclass(frozen=True)
class Operands:
    """Arrays of one row, channels_last and Keras' kernel layout."""

    x: Array
    w: Array
    dy: Array

    @classmethod
    def random(cls, row: Row) -> Operands:
        rng = np.random.default_rng(0)
        return cls(*(rng.standard_normal(shape, dtype=np.float32) for shape in (row.x, row.w, row.y)))


# ------------------------------------------------------------------------------------------------ what is right


def tap_windows(row: Row, padded: Array, positions: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Each kernel tap with the view [B, P.., channels] of the padded input that it meets."""
    for tap in np.ndindex(*row.kernel_size):
        starts = [r * row.dilation_rate for r in tap]
        reads = [slice(i, i + (p - 1) * row.strides + 1, row.strides) for i, p in zip(starts, positions, strict=True)]
        yield tap, padded[(slice(None), *reads)]


def definition(row: Row, operands: Operands) -> Array:
    """The answer of a row in float64, tap by tap."""
    x, w, dy = (a.astype(np.float64) for a in (operands.x, operands.w, operands.dy))
    widths = [(0, 0), *row.pads, (0, 0)]
    if row.op in ("conv", "depthwise_conv"):
        y = np.zeros(row.y)
        for tap, window in tap_windows(row, np.pad(x, widths), row.out_size):
            y += window * w[tap][:, 0] if row.depthwise else window @ w[tap]
        return y
    if row.op == "conv_kernel_grad":
        dw = np.empty(row.w)
        for tap, window in tap_windows(row, np.pad(x, widths), row.out_size):
            dw[tap] = np.tensordot(window, dy, (range(window.ndim - 1),) * 2)
        return dw
    source, shape = (x, row.y) if row.transposed else (dy, row.x)
    full = np.zeros([n + before + after for n, (before, after) in zip(shape, widths, strict=True)])
    for tap, window in tap_windows(row, full, source.shape[1:-1]):
        window += source @ w[tap].T
    return full[tuple(slice(before, n - after) for n, (before, after) in zip(full.shape, widths, strict=True))]


class WrongAnswerError(Exception):
    """A library's answer to a row is not the one that the definition gives."""


def check(row: Row, who: str, answer: Array, truth: Array) -> None:
    """Raises unless the answer is finite, float32 and right."""
    # Rounding grows like the square root of the number of terms of size one; 8 covers the largest of many elements.
    tolerance = 8 * float(np.finfo(np.float32).eps) * math.sqrt(row.terms) * max(1.0, float(truth.std()))
    if answer.shape != truth.shape or answer.dtype != np.float32:
        raise WrongAnswerError(f"{row.name}: {who} gives {answer.dtype}{answer.shape}, expected float32{truth.shape}")
    error = float(np.abs(answer - truth).max())
    if not error <= tolerance:
        raise WrongAnswerError(f"{row.name}: {who} is off by {error:.3g}, allowed {tolerance:.3g}")


# ------------------------------------------------------------------------------------------------ the competitors


def cuconv_calls(row: Row, operands: Operands) -> dict[str, Call]:
    """cuconv's one way to compute a row."""
    from cuconv import ops

    x, w, dy = operands.x, operands.w, operands.dy
    options = {"strides": row.strides, "padding": row.padding, "dilation_rate": row.dilation_rate}
    gradients: dict[str, tuple[Any, ...]] = {"conv_input_grad": (dy, w, row.x), "conv_kernel_grad": (x, dy, row.w)}
    return {"ops": partial(getattr(ops, row.op), *gradients.get(row.op, (x, w)), **options)}


def on_cache_line(a: Array) -> Array:
    """A copy that starts on a 64-byte line, as PyTorch and ONNX Runtime allocate their own; NumPy does not."""
    memory = np.empty(a.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def torch_calls(row: Row, operands: Operands) -> dict[str, Call]:
    """PyTorch's ways: 1-D as it is, 1-D on contiguous channels first, and as 2-D in its channels_last memory format.

    Kernels are brought to torch's layout before the clock starts.
    """
    import torch
    from torch.nn import functional

    torch.set_num_threads(1)
    rank = len(row.kernel_size)
    x, dy = (torch.from_numpy(on_cache_line(a)) for a in (operands.x, operands.dy))
    w = torch.from_numpy(operands.w).permute(-1, -2, *range(rank)).contiguous()
    if row.depthwise:
        w = w.transpose(0, 1).contiguous()
    groups = row.x[-1] if row.depthwise else 1
    symmetric = all(before == after for before, after in row.pads)
    padding = [before for before, _ in row.pads] if symmetric else [0] * rank
    explicit = [] if symmetric else [n for pair in reversed(row.pads) for n in pair]

    def first(a: Any) -> Any:
        return a.movedim(-1, 1)

    def last(a: Any) -> Any:
        return a.movedim(1, -1).contiguous()

    def compute(x: Any, w: Any, dy: Any, pads: list[int], ones: tuple[int, ...]) -> Any:
        """One call on channels-first tensors; `ones` prefixes the axes that a 1-D row gains as a 2-D one."""
        strides, dilation = [*ones, *[row.strides] * rank], [*ones, *[row.dilation_rate] * rank]
        if explicit and row.op == "conv":
            x = functional.pad(x, explicit)
        if row.op.endswith("grad"):
            mask = [row.op == "conv_input_grad", row.op == "conv_kernel_grad", False]
            grads = torch.ops.aten.convolution_backward(
                dy, x, w, None, strides, pads, dilation, False, [0] * len(pads), groups, mask
            )
            return grads[mask.index(True)]
        return torch.ops.aten.convolution(x, w, None, strides, pads, dilation, row.transposed, [0] * len(pads), groups)

    def finish(a: Any) -> Any:
        return a.movedim(0, -1).movedim(0, -2) if row.op == "conv_kernel_grad" else last(a)

    def plain() -> Any:
        return finish(compute(first(x), w, first(dy), padding, ()))

    def contiguous() -> Any:
        return finish(compute(first(x).contiguous(), w, first(dy).contiguous(), padding, ()))

    def as_2d() -> Any:
        image, image_dy = first(x).unsqueeze(2), first(dy).unsqueeze(2)
        return finish(compute(image, w_2d, image_dy, [0, *padding], (1,)).squeeze(2))

    def channels_last_2d() -> Any:
        return finish(compute(first(x), w_2d, first(dy), padding, ()))

    if rank == 1:
        w_2d = w.unsqueeze(2).to(memory_format=torch.channels_last)
        calls = {"conv1d": plain, "conv1d, copied": contiguous, "conv2d": as_2d}
    else:
        w_2d = w.to(memory_format=torch.channels_last)
        calls = {"conv2d, channels_last": channels_last_2d, "conv2d": plain, "conv2d, copied": contiguous}
    if row.op == "conv" and row.kernel_size == (1,):
        matrix = w[:, :, 0].contiguous()
        calls["linear"] = lambda: functional.linear(x, matrix)
    return {name: partial(torch_without_graph, call) for name, call in calls.items()}


def torch_without_graph(call: Call) -> Array:
    """A torch result as an array that shares its memory."""
    import torch

    with torch.inference_mode():
        return call().numpy()


def onnxruntime_calls(row: Row, operands: Operands) -> dict[str, Call]:
    """ONNX Runtime's ways: transpositions around Conv, and MatMul where the kernel is one tap; no gradients."""
    if row.op.endswith("grad"):
        return {}
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rank = len(row.kernel_size)
    to_first, to_last = [0, rank + 1, *range(1, rank + 1)], [0, *range(2, rank + 2), 1]
    kernel = np.moveaxis(operands.w, (-1, -2), (1, 0) if row.depthwise else (0, 1))
    if row.depthwise:
        kernel = kernel.reshape(row.filters, 1, *row.kernel_size)
    begins, ends = zip(*row.pads, strict=True)
    attributes: dict[str, Any] = {
        "kernel_shape": row.kernel_size,
        "strides": [row.strides] * rank,
        "dilations": [row.dilation_rate] * rank,
        "pads": [*begins, *ends],
        "group": row.x[-1] if row.depthwise else 1,
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["x_first"], perm=to_first),
        helper.make_node("ConvTranspose" if row.transposed else "Conv", ["x_first", "w"], ["y_first"], **attributes),
        helper.make_node("Transpose", ["y_first"], ["y"], perm=to_last),
    ]
    graphs = {"Transpose, Conv, Transpose": (nodes, np.ascontiguousarray(kernel))}
    if row.op == "conv" and row.kernel_size == (1,):
        graphs["MatMul"] = [helper.make_node("MatMul", ["x", "w"], ["y"])], operands.w[0]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    x_aligned = on_cache_line(operands.x)
    calls: dict[str, Call] = {}
    for name, (nodes, weights) in graphs.items():
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, row.x)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, row.y)
        graph = helper.make_graph(nodes, "row", [x], [y], [numpy_helper.from_array(weights, "w")])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        calls[name] = partial(lambda session: session.run(None, {"x": x_aligned})[0], session)
    return calls


LIBRARIES: dict[str, Callable[[Row, Operands], dict[str, Call]]] = {
    "cuconv": cuconv_calls,
    "torch": torch_calls,
    "onnxruntime": onnxruntime_calls,
}
PEERS = ("torch", "onnxruntime")


# ------------------------------------------------------------------------------------------------ measuring

SECONDS_PER_ROW = 1.0  # short calls are repeated more often than asked for, until this much has been measured


@dataclass(frozen=True)
class Measurement:
    """Shortest time of every library on one row, with the variant that reached it; or why a library is absent."""

    row: Row
    seconds: dict[str, float]
    variant: dict[str, str]
    absent: dict[str, str]

    def ratio(self, peer: str) -> float | None:
        """Time of cuconv over that of the peer: below 1 where cuconv is faster."""
        return self.seconds["cuconv"] / self.seconds[peer] if peer in self.seconds else None

    def record(self) -> dict[str, Any]:
        """One flat line for JSON and CSV; None where a library is absent."""
        row = self.row
        return {
            "name": row.name,
            "op": row.op,
            "x": "x".join(map(str, row.x)),
            "w": "x".join(map(str, row.w)),
            "strides": row.strides,
            "padding": row.padding,
            "dilation_rate": row.dilation_rate,
            "gflop": row.flops / 1e9,
            "minimal_mb": row.bytes / 1e6,
            **{f"{name}_ms": self.seconds[name] * 1e3 if name in self.seconds else None for name in LIBRARIES},
            "cuconv_gflops": row.flops / self.seconds["cuconv"] / 1e9,
            **{f"ratio_{name}": self.ratio(name) for name in PEERS},
            **{f"{name}_variant": self.variant.get(name) or self.absent[name] for name in PEERS},
        }


def fastest_ways(times: dict[tuple[str, str], float]) -> tuple[dict[str, str], dict[str, float]]:
    """For every library its fastest variant, and the seconds it took."""
    variant = dict(sorted(times, key=times.__getitem__, reverse=True))
    return variant, {library: times[library, way] for library, way in variant.items()}


def measure(row: Row, repeats: int, clock: Clock) -> Measurement:
    """Every library on one row, checked and then timed in turns."""
    operands = Operands.random(row)
    truth = definition(row, operands)
    calls: dict[tuple[str, str], Call] = {}
    absent: dict[str, str] = {}
    for library, prepare in LIBRARIES.items():
        try:
            ways = prepare(row, operands)
        except ImportError as error:
            if library == "cuconv":
                raise
            absent[library] = f"absent: {error}"
            continue
        if not ways:
            absent[library] = "absent: has no such operation"
        for variant, call in ways.items():
            check(row, f"{library} ({variant})", call(), truth)
            calls[library, variant] = call
    trial = interleaved(calls, 2, clock)
    leaders = fastest_ways(trial)[1]
    contenders = {way: call for way, call in calls.items() if trial[way] <= 1.5 * leaders[way[0]]}
    best, seconds = fastest_ways(interleaved(contenders, repeats, clock, SECONDS_PER_ROW))
    return Measurement(row, seconds, best, absent)


def layer_overhead(repeats: int, clock: Clock) -> dict[str, float | None]:
    """Microseconds of one call of a tiny Conv1D layer, (1, 16, 4) k3 -> 8, and of torch's on its own layout."""
    from cuconv import layers

    x = np.ones((1, 16, 4), np.float32)
    calls: dict[str, Call] = {"cuconv": partial(layers.Conv1D(8, 3), x)}
    try:
        import torch
    except ImportError:
        pass
    else:
        torch.set_num_threads(1)
        calls["torch"] = partial(torch.nn.Conv1d(4, 8, 3).requires_grad_(False), torch.ones(1, 4, 16))
    times = per_call(calls, repeats, clock)
    return {name: times[name] * 1e6 if name in times else None for name in ("cuconv", "torch")}


# ------------------------------------------------------------------------------------------------ memory

MEMORY_BOUND = 64 * 2**20  # bytes of workspace, whatever the input
MEMORY_SLACK = 16 * 2**20  # bytes: packing buffers inside BLAS, allocator rounding
LONG = 4_000_000  # positions of 128 float32 channels: 2 GB

MEMORY_ROWS = (
    Row("conv k3", "conv", (1, LONG, 128), (3, 128, 8), padding="same"),
    Row("conv k9", "conv", (1, LONG, 128), (9, 128, 8), padding="same"),
    Row("conv k3 d64", "conv", (1, LONG, 128), (3, 128, 8), padding="same", dilation_rate=64),
    Row("conv2d 3x3", "conv", (1, 8000, 500, 128), (3, 3, 128, 8), padding="same"),
    Row("depthwise k31", "depthwise_conv", (1, LONG, 128), (31, 128, 1), padding="same"),
    Row("transpose k4 s2", "conv_transpose", (1, LONG, 128), (4, 8, 128), strides=2, padding="same"),
    Row("conv k3 input grad", "conv_input_grad", (1, LONG, 128), (3, 128, 8), padding="same"),
    Row("conv k3 kernel grad", "conv_kernel_grad", (1, LONG, 128), (3, 128, 8), padding="same"),
)


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    try:
        # Not getrusage: on Linux its ru_maxrss starts at the size of the parent process.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) * 1024


def repeated(shape: tuple[int, ...], seed: int) -> Array:
    """A float32 array of any size, filled without a second one: one random megabyte over and over."""
    # A prime period: no block of positions meets the same values as another one.
    noise = np.random.default_rng(seed).standard_normal(262_139, dtype=np.float32)
    a = np.empty(shape, np.float32)
    flat = a.reshape(-1)
    for start in range(0, flat.size, noise.size):
        flat[start : start + noise.size] = noise[: flat.size - start]
    return a


def check_ends(row: Row, operands: Operands, answer: Array, positions: int = 32) -> None:
    """Raises unless the answer is finite everywhere and right at its first and last positions."""
    if not np.isfinite(answer).all():
        raise WrongAnswerError(f"{row.name}: the answer is not finite")
    if row.op == "conv_kernel_grad":  # every element sums over all positions
        return
    length = positions + row.kernel_size[0] * row.dilation_rate
    short = replace(row, x=(1, length, *row.x[2:]))
    for kept, compared in ((np.s_[:, :length], np.s_[:, :positions]), (np.s_[:, -length:], np.s_[:, -positions:])):
        truth = definition(short, Operands(operands.x[kept], operands.w, operands.dy[kept]))
        check(row, "cuconv", answer[compared], truth[compared])


def workspace_bytes(row: Row) -> int:
    """Bytes that cuconv took at its peak beyond operands and answer; only meaningful in a process of its own."""
    (small,) = cuconv_calls(short := replace(row, x=(1, 64, *row.x[2:])), Operands.random(short)).values()
    small()  # loads the modules and BLAS's own buffers
    used = {"conv_input_grad": ("w", "dy"), "conv_kernel_grad": ("x", "dy")}.get(row.op, ("x", "w"))
    shapes = {"x": row.x, "w": row.w, "dy": row.y}
    arrays = {
        name: repeated(shape, seed) if name in used else np.broadcast_to(np.float32(0), shape)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    operands = Operands(**arrays)
    (call,) = cuconv_calls(row, operands).values()
    before = peak_bytes()
    answer = call()
    taken = peak_bytes() - before - answer.nbytes
    check_ends(row, operands, answer)
    return taken


def measure_memory(row: Row) -> dict[str, Any]:
    """The workspace of one row in a fresh process, beside the size of what it works on."""
    code = f"from benchmarks import cpu; print(cpu.workspace_bytes(cpu.{row!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one_thread())
    taken = int(done.stdout)
    return {
        "name": row.name,
        "operands_and_answer_mb": row.bytes / 2**20,
        "workspace_mb": taken / 2**20,
        "met": taken <= MEMORY_BOUND + MEMORY_SLACK,
    }


# ------------------------------------------------------------------------------------------------ reporting


@dataclass(frozen=True)
class Goal:
    """One number of the summary with the most it may be; None where the rows it needs were not measured."""

    name: str
    value: float | None
    limit: float
    unit: str = ""

    def record(self) -> dict[str, Any]:
        met = None if self.value is None else self.value <= self.limit
        return {"goal": self.name, "value": self.value, "limit": self.limit, "unit": self.unit, "met": met}


def goals(measurements: list[Measurement], overhead: float | None) -> list[Goal]:
    """The summary: ratios to torch and the cost of one tiny call."""

    def of(select: Callable[[Row], bool], reduce: Callable[[list[float]], float]) -> float | None:
        ratios = [ratio for m in measurements if select(m.row) and (ratio := m.ratio("torch")) is not None]
        return reduce(ratios) if ratios else None

    return [
        Goal("median ratio to torch", of(lambda row: True, statistics.median), 1.2),
        Goal("worst dense ratio to torch", of(lambda row: not row.depthwise, max), 2.0),
        Goal("depthwise2d ratio to torch", of(lambda row: row.depthwise and len(row.kernel_size) == 2, max), 8.0),
        Goal("overhead of a tiny layer call", overhead, 40.0, " us"),
    ]


MET = {True: "yes", False: "NO", None: "-"}


def ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def row_table(measurements: list[Measurement]) -> Table:
    table = Table(title="one CPU thread, float32, channels_last; milliseconds", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("row", no_wrap=True)
    for heading in ("cuconv", "GFLOP/s", "torch", "ORT", "/torch", "/ORT"):
        table.add_column(heading, justify="right", no_wrap=True)
    for m in measurements:
        r = m.record()
        peers = [f"{r[f'{peer}_ms']:.2f}" if peer in m.seconds else "absent" for peer in PEERS]
        ratios = [ratio_text(m.ratio(peer)) for peer in PEERS]
        table.add_row(m.row.name, f"{r['cuconv_ms']:.2f}", f"{r['cuconv_gflops']:.1f}", *peers, *ratios)
    table.caption = "\n".join(sorted({f"{name} {why}" for m in measurements for name, why in m.absent.items()}))
    return table


def goal_table(records: list[dict[str, Any]]) -> Table:
    table = Table(title="goals", box=box.SIMPLE)
    table.add_column("goal")
    for heading in ("measured", "at most", "met"):
        table.add_column(heading, justify="right")
    for r in records:
        value = "not measured" if r["value"] is None else f"{r['value']:.2f}{r['unit']}"
        table.add_row(r["goal"], value, f"{r['limit']:g}{r['unit']}", MET[r["met"]])
    return table


def memory_table(records: list[dict[str, Any]]) -> Table:
    table = Table(title=f"peak memory beyond operands and answer; bound {MEMORY_BOUND >> 20} MB", box=box.SIMPLE)
    table.add_column("row")
    for heading in ("operands and answer, MB", "workspace, MB", "met"):
        table.add_column(heading, justify="right")
    for r in records:
        sizes = f"{r['operands_and_answer_mb']:.0f}", f"{r['workspace_mb']:.1f}"
        table.add_row(r["name"], *sizes, MET[r["met"]])
    return table


def write_csv(path: Path, report: dict[str, Any]) -> None:
    """Writes the rows of a report, each with the machine and the versions it was measured on."""
    rounded = [{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in record.items()} for record in report["rows"]]
    lines = [record | report["machine"] for record in rounded]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def selected(rows: tuple[Row, ...], pattern: str) -> list[Row]:
    chosen = [row for row in rows if fnmatch.fnmatch(row.name, pattern)]
    if not chosen:
        names = ", ".join(row.name for row in rows)
        raise SystemExit(f"`--rows` must match one of: {names}. Received: rows={pattern!r}")
    return chosen


def time_report(
    rows: list[Row], repeats: int, clock: str, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Table]]:
    """What `--json` prints and the tables that show it."""
    measurements = []
    for row in rows:
        say(row.name)
        measurements.append(measure(row, repeats, CLOCKS[clock]))
    overhead = layer_overhead(repeats, CLOCKS[clock])
    summary = [goal.record() for goal in goals(measurements, overhead["cuconv"])]
    records = [m.record() for m in measurements]
    report = {"machine": machine() | {"clock": clock}, "rows": records, "overhead_us": overhead, "summary": summary}
    return report, [row_table(measurements), goal_table(summary)]


def memory_report(rows: list[Row], say: Callable[[str], None]) -> tuple[dict[str, Any], list[Table]]:
    """The same for `--memory`."""
    records = []
    for row in rows:
        say(row.name)
        records.append(measure_memory(row))
    return {"machine": machine(), "rows": records}, [memory_table(records)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--rows", default="*", metavar="PATTERN", help="only rows whose name matches, e.g. 'conv2d*'")
    parser.add_argument("--repeats", type=int, default=20, help="timings of each library, of which the shortest counts")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: leave out what other processes took")
    parser.add_argument("--csv", type=Path, help="also write the rows, with machine and versions, to this file")
    parser.add_argument("--memory", action="store_true", help="measure peak memory on a 2 GB array instead of time")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"`--repeats` must be at least 1. Received: repeats={options.repeats}")

    with Console(stderr=True).status("") as status:
        if options.memory:
            report, tables = memory_report(selected(MEMORY_ROWS, options.rows), status.update)
        else:
            rows = selected(ROWS, options.rows)
            report, tables = time_report(rows, options.repeats, options.clock, status.update)
    if options.csv:
        write_csv(options.csv, report)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        Console().print(*tables)


if __name__ == "__main__":
    pin_to_one_thread("benchmarks.cpu")
    main()
