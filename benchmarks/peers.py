"""Who is measured on a row beside cuconv: the strongest ways that other libraries have to compute the same.

Every peer gets its operands in the layout it likes best, before any clock starts, and returns its result as it is: a
transposition that a user of that library would not pay for is not counted. Bias and activation are applied by all or by
none. A peer that cannot take part says why.

Two are no competitors but ceilings: a matrix product of the size that the convolution is one in, and a copy of as many
bytes as the row moves at least.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.suite import Row
from benchmarks.truth import SAFETY, TF32_EPS, Array, Operands, bits, dtype_of, finite
from cuconv.timing import Call

Function = Callable[..., Any]

CEILINGS = ("cublas gemm", "copy")
TF32_SUFFIX = " tf32"


class AbsentError(Exception):
    """A peer cannot take part; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A peer ready to compute one row.

    Attributes:
        calls: the row on each set of operands; returns arrays of the peer's own library.
        answers: those in Keras' layout, NumPy or CuPy arrays that share their memory.
        tf32: whether products are rounded to TF32.
        share: of a ceiling, the error of its own result as a share of what is allowed.
    """

    calls: tuple[Call, ...]
    answers: Callable[[Any], tuple[Array, ...]]
    tf32: bool = False
    share: Callable[[Any], float] | None = None


@dataclass(frozen=True)
class Peer:
    """One contender.

    Attributes:
        library: whose streams and graphs it uses, "cupy" or "torch".
        need: raises :class:`AbsentError` where it cannot compute the row; touches no GPU.
        prepare: (row, variant, sets of operands) -> Prepared.
        slow: whether preparing takes longer than measuring.
    """

    name: str
    library: str
    need: Callable[[Row, str], None]
    prepare: Callable[[Row, str, Sequence[Operands]], Prepared]
    slow: bool = False

    def absent(self, row: Row, variant: str) -> str:
        """Why it does not take part; "" where it does."""
        try:
            self.need(row, variant)
        except AbsentError as error:
            return str(error)
        return ""


def competes(row: Row, name: str) -> bool:
    """Whether a contender does what the row asks for: no ceiling, and no TF32 where float32 is to be exact."""
    return name not in (*CEILINGS, "cuconv") and not (row.dtype == "float32" and name.endswith(TF32_SUFFIX))


def needs(*modules: str) -> None:
    """Raises AbsentError unless all import."""
    for problem in map(import_problem, modules):
        if problem:
            raise AbsentError(problem)


@functools.cache
def import_problem(module: str) -> str:
    """Why a module does not import; "" where it does."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  a library built for another CUDA shows it in many types
        return f"{module} does not import: {error}"
    return ""


def library_of(array: Array) -> Any:
    """NumPy or CuPy."""
    if isinstance(array, np.ndarray):
        return np
    import cupy

    return cupy


# --- Between the libraries ---------------------------------------------------------------------------------------


def to_torch(array: Array) -> Any:
    """The same memory as a torch tensor. DLPack knows bfloat16, but not every version of NumPy and CuPy does."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def from_torch(tensor: Any) -> Array:
    """The same memory as a NumPy array, or of a tensor on a GPU as a CuPy array."""
    import torch

    library: Any = np
    if tensor.is_cuda:
        import cupy

        library = cupy
    if tensor.dtype == torch.bfloat16:
        return library.from_dlpack(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
    return library.from_dlpack(tensor)


def several(result: Any) -> tuple[Any, ...]:
    """One result or several, as a tuple."""
    return result if isinstance(result, tuple) else (result,)


# --- cuconv ------------------------------------------------------------------------------------------------------


def cuconv(row: Row, variant: str, sets: Sequence[Operands]) -> Prepared:
    """The function of :mod:`cuconv.ops` as anyone calls it."""
    from cuconv import ops

    call, options = getattr(ops, row.op), row.options(variant)
    return Prepared(tuple(partial(call, *each.arguments(row, variant), **options) for each in sets), several)


# --- PyTorch -----------------------------------------------------------------------------------------------------


@dataclass
class TorchRow:
    """A row in torch's terms, on tensors [B, C, L..] of one of three forms.

    Attributes:
        form: "contiguous"; "channels_last", torch's memory format of that name; "2d", which gives a row of one axis a
            first axis of length 1 and then that memory format, which torch has for images only.
    """

    row: Row
    variant: str
    form: str
    before: list[int] = field(init=False)
    after: list[int] = field(init=False)

    def __post_init__(self) -> None:
        row, shape = self.row, self.row.geometry
        self.before = list(shape.pad_before)
        self.after = [
            (m - 1) * s + k - n - pad
            for m, s, k, n, pad in zip(
                shape.out_size, row.strides, shape.k_eff, shape.in_size, shape.pad_before, strict=True
            )
        ]
        if self.row.op != "conv_transpose":
            self.after = [max(0, n) for n in self.after]

    @property
    def rank(self) -> int:
        """Spatial axes that torch sees."""
        return len(self.row.kernel_size) + (self.form == "2d")

    def axes(self, values: Sequence[int], first: int) -> list[int]:
        """One value for every axis that torch sees."""
        return [first, *values] if self.form == "2d" else list(values)

    # --- Layout ---

    def formed(self, tensor: Any) -> Any:
        """A tensor [., ., L..] in the row's form."""
        import torch

        if self.form == "contiguous":
            return tensor.contiguous()
        if self.form == "2d":
            tensor = tensor.unsqueeze(2)
        formats = {2: torch.channels_last, 3: torch.channels_last_3d}
        return tensor.contiguous(memory_format=formats[self.rank])

    def image(self, array: Array | None) -> Any:
        """Keras' [B, L.., C] as [B, C, L..]."""
        return None if array is None else self.formed(to_torch(array).movedim(-1, 1))

    def weight(self, array: Array, depthwise: bool) -> Any:
        """Keras' [taps.., C, F] as [F, C, taps..], a depthwise kernel [taps.., C, 1] as [C, 1, taps..]; a transposed
        one, [taps.., F, C], becomes [C, F, taps..] by the first rule."""
        tensor = to_torch(array)
        taps = range(tensor.ndim - 2)
        return self.formed(tensor.permute(-2, -1, *taps) if depthwise else tensor.permute(-1, -2, *taps))

    def keras_image(self, tensor: Any) -> Array:
        """What `image` did, undone."""
        return from_torch((tensor.squeeze(2) if self.form == "2d" else tensor).movedim(1, -1))

    def keras_weight(self, tensor: Any) -> Array:
        """What `weight` did, undone."""
        tensor = tensor.squeeze(2) if self.form == "2d" else tensor
        taps = range(2, tensor.ndim)
        return from_torch(tensor.permute(*taps, 0, 1) if self.row.depthwise else tensor.permute(*taps, 1, 0))

    def answers(self, result: Any) -> tuple[Array, ...]:
        """What the call returns, in Keras' layout."""
        op = self.row.op
        if op == "conv_kernel_grad":
            return (self.keras_weight(result),)
        if op == "depthwise_conv_grad":
            dx, dw, db = result
            return self.keras_image(dx), self.keras_weight(dw), from_torch(db)
        return (self.keras_image(result),)

    # --- Computing ---

    def activated(self, y: Any) -> Any:
        """The activation, in place."""
        from torch.nn import functional

        if self.variant == "plain":
            return y
        return {"relu": functional.relu, "silu": functional.silu}[self.row.activation](y, inplace=True)

    def convolution(self, groups: int) -> Function:
        """The forward convolution (x, weight, bias) -> y.

        torch pads both ends alike. What is padded more in front, "causal" above all, is padded so at both ends and the
        surplus outputs cut off without a copy; only what is padded more behind costs a padded copy.
        """
        from torch.nn import functional

        function = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[self.rank]
        strides, dilation = self.axes(self.row.strides, 1), self.axes(self.row.dilation_rate, 1)
        padding, explicit = self.axes(self.before, 0), self.explicit
        copied = any(a > b for b, a in zip(self.before, self.after, strict=True))
        cut = (..., *(slice(n) for n in self.axes(self.row.geometry.out_size, 1)))
        uneven = not copied and self.before != self.after
        if copied:
            padding = [0] * self.rank

        def run(x: Any, weight: Any, bias: Any) -> Any:
            if copied:
                x = functional.pad(x, explicit)
            y = function(x, weight, bias, strides, padding, dilation, groups)
            return y[cut] if uneven else y

        return run

    def transposed(self) -> Function:
        """The transposed convolution (x, weight, bias) -> y: cropped alike at both ends by torch, then what is too long
        is cut off without a copy, what is too short added by its output_padding."""
        from torch.nn import functional

        function = {
            1: functional.conv_transpose1d,
            2: functional.conv_transpose2d,
            3: functional.conv_transpose3d,
        }[self.rank]
        strides, dilation = self.axes(self.row.strides, 1), self.axes(self.row.dilation_rate, 1)
        # Of the full product, `before` and `after` are cropped; a negative `after` is zeros behind it.
        extra = self.axes([max(0, b - a) for b, a in zip(self.before, self.after, strict=True)], 0)
        if any(e and e >= max(s, d) for e, s, d in zip(extra, strides, dilation, strict=True)):
            raise AbsentError("torch extends a transposed convolution by less than its stride")
        padding = self.axes(self.before, 0)
        cut = (..., *(slice(n) for n in self.axes(self.row.geometry.in_size, 1)))
        longer = any(a > b for b, a in zip(self.before, self.after, strict=True))

        def run(x: Any, weight: Any, bias: Any) -> Any:
            y = function(x, weight, bias, strides, padding, extra, 1, dilation)
            return y[cut] if longer else y

        return run

    def gradient(self) -> Function:
        """What torch.autograd calls for a convolution, (dy, x, weight) -> gradients."""
        import torch

        row, shape = self.row, self.row.geometry
        mask = (row.op != "conv_kernel_grad", row.op != "conv_input_grad", row.op == "depthwise_conv_grad")
        sizes, groups = ([row.filters] if mask[2] else None), shape.groups
        uneven = self.before != self.after
        padding = [0] * self.rank if uneven else self.axes(self.before, 0)
        strides, dilation = self.axes(row.strides, 1), self.axes(row.dilation_rate, 1)
        starts, lengths = self.axes(self.before, 0), self.axes(shape.in_size, 1)
        cut = (..., *(slice(start, start + n) for start, n in zip(starts, lengths, strict=True)))
        none = [0] * self.rank

        def run(dy: Any, x: Any, weight: Any) -> Any:
            dx, dw, db = torch.ops.aten.convolution_backward(
                dy, x, weight, sizes, strides, padding, dilation, False, none, groups, mask
            )
            if uneven and mask[0]:
                dx = dx[cut]
            return (dx, dw, db) if mask[2] else dx if mask[0] else dw

        return run

    @property
    def explicit(self) -> list[int]:
        """The padding as torch.nn.functional.pad takes it, last axis first."""
        pairs = zip(reversed(self.before), reversed(self.after), strict=True)
        return [n for pair in pairs for n in pair]

    def function(self) -> Function:
        """The row as a function of `tensors`."""
        row, activated = self.row, self.activated
        if row.op.endswith("grad"):
            return self.gradient()
        if row.op == "separable_conv":
            from torch.nn import functional

            depthwise = self.convolution(row.geometry.groups)
            mix = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[self.rank]
            return lambda x, taps, mixing, bias: activated(mix(depthwise(x, taps, None), mixing, bias))
        forward = self.transposed() if row.op == "conv_transpose" else self.convolution(row.geometry.groups)
        return lambda x, weight, bias: activated(forward(x, weight, bias))

    def tensors(self, operands: Operands) -> tuple[Any, ...]:
        """What `function` takes.

        Gradients get an x that the forward pass has padded already where torch itself cannot, so that this copy is not
        counted; and where only the shape of an operand matters, one of no particular values.
        """
        row, shape = self.row, self.row.geometry
        kernels = operands.kernels  # the first of two is the depthwise one
        weights = [self.weight(w, row.depthwise or (i == 0 and len(kernels) == 2)) for i, w in enumerate(kernels)]
        if not row.op.endswith("grad"):
            return self.image(operands.x), *weights, to_torch(operands.bias) if self.variant == "fused" else None
        from torch.nn import functional

        dy, x = self.image(operands.dy), self.image(operands.x)
        if not weights:
            weights = [self.formed(to_torch(operands.dy).new_empty((row.filters, row.x[-1], *row.kernel_size)))]
        if x is None:
            x = self.formed(to_torch(operands.dy).new_empty((shape.batch, shape.in_channels, *shape.in_size)))
        if self.before != self.after:
            x = functional.pad(x, self.explicit)
        return dy, x, weights[0]


def with_tf32(call: Call, allowed: bool) -> Call:
    """A call with torch's switches of TF32 set; half a microsecond of it is theirs."""
    import torch

    def run() -> Any:
        torch.backends.cudnn.allow_tf32 = allowed
        torch.backends.cuda.matmul.allow_tf32 = allowed
        return call()

    return run


def without_autograd(call: Call) -> Call:
    """A call that records nothing for gradients."""
    import torch

    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def torch_peer(form: str, tf32: bool, compiled: bool, row: Row, variant: str, sets: Sequence[Operands]) -> Prepared:
    """torch's eager mode, with cuDNN's search for the fastest algorithm; or torch.compile at its most thorough, without
    CUDA graphs of its own: those of the clock hold its launches."""
    import torch

    torch.backends.cudnn.benchmark = True
    problem = TorchRow(row, variant, form)
    function = problem.function()
    if compiled:
        torch._dynamo.reset()  # or what earlier rows compiled counts against this one
        function = torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    calls: list[Call] = [partial(function, *problem.tensors(each)) for each in sets]
    if row.array_dtype == "float32":
        calls = [with_tf32(call, tf32) for call in calls]
    return Prepared(tuple(calls), problem.answers, tf32=tf32)


# --- The cuDNN frontend ------------------------------------------------------------------------------------------

CUDNN_TYPES = {"bfloat16": "BFLOAT16", "float16": "HALF", "float32": "FLOAT"}


def cudnn_need(row: Row, variant: str) -> None:
    """Whether one graph of it can hold the row."""
    needs("torch", "cudnn")
    if row.op == "separable_conv":
        raise AbsentError("a cuDNN graph holds one convolution")
    if row.op == "depthwise_conv_grad":
        raise AbsentError("a cuDNN graph holds one gradient")


def cudnn_graph(row: Row, variant: str, sets: Sequence[Operands]) -> Prepared:
    """One fused graph of convolution, bias and activation, channels last; a sequence is an image of height 1. cuDNN
    pads the two ends differently where need be, and takes TF32 where the arrays are float32."""
    import cudnn
    import torch

    problem = TorchRow(row, variant, "2d" if len(row.kernel_size) == 1 else "channels_last")
    shape, kind = row.geometry, getattr(cudnn.data_type, CUDNN_TYPES[row.array_dtype])
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        handle=handle,
        io_data_type=kind,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )

    def tensor(like: Any) -> Any:
        return graph.tensor(dim=list(like.shape), stride=list(like.stride()), data_type=kind)

    options = {
        "pre_padding": problem.axes(problem.before, 0),
        "post_padding": problem.axes([max(0, n) for n in problem.after], 0),
        "stride": problem.axes(row.strides, 1),
        "dilation": problem.axes(row.dilation_rate, 1),
    }

    def tensors(operands: Operands) -> dict[str, Any]:
        """What the graph reads, by name."""
        found = {"x": problem.image(operands.x), "dy": problem.image(operands.dy)}
        if operands.kernels:
            found["w"] = problem.weight(operands.kernels[0], row.depthwise)
        if variant == "fused":
            found["bias"] = to_torch(operands.bias).reshape(1, -1, *(1,) * problem.rank)
        return {name: each for name, each in found.items() if each is not None}

    inputs = [tensors(each) for each in sets]
    named = {name: tensor(each) for name, each in inputs[0].items()}
    if row.op == "conv_kernel_grad":
        result = graph.conv_wgrad(image=named["x"], loss=named["dy"], **options)
        like = problem.formed(inputs[0]["x"].new_empty((row.filters, row.x[-1], *row.kernel_size)))
    elif row.op in ("conv_input_grad", "conv_transpose"):
        loss = "dy" if row.op == "conv_input_grad" else "x"
        result = graph.conv_dgrad(loss=named[loss], filter=named["w"], **options)
        like = problem.formed(inputs[0][loss].new_empty((shape.batch, shape.in_channels, *shape.in_size)))
    else:
        result = graph.conv_fprop(image=named["x"], weight=named["w"], **options)
        like = problem.formed(inputs[0]["x"].new_empty((shape.batch, shape.filters, *shape.out_size)))
    last = result
    if variant == "fused":
        if row.op == "conv_transpose":
            result.set_dim(list(like.shape)).set_stride(list(like.stride()))
        last = graph.bias(input=result, bias=named["bias"])
        last = {"relu": graph.relu, "silu": graph.swish}[row.activation](input=last)
    last.set_output(True).set_dim(list(like.shape)).set_stride(list(like.stride()))
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=like.device)

    def call(given: dict[str, Any]) -> Call:
        variables = {named[name]: each for name, each in given.items()}

        def run() -> Any:
            out = torch.empty_like(like)
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            graph.execute({**variables, last: out}, workspace, handle=handle)
            return out

        return run

    return Prepared(tuple(map(call, inputs)), problem.answers, tf32=row.array_dtype == "float32")


# --- Causal depthwise convolutions -------------------------------------------------------------------------------


def causal_need(row: Row, variant: str) -> None:
    """What all libraries for causal depthwise convolutions of sequences ask for."""
    if not row.depthwise:
        raise AbsentError("computes depthwise convolutions only")
    if row.padding != "causal" or row.strides != (1,) or row.dilation_rate != (1,):
        raise AbsentError("computes causal convolutions of stride and dilation 1 only")
    if variant == "fused" and row.activation != "silu":
        raise AbsentError("fuses SiLU only")


def causal_conv1d_need(row: Row, variant: str) -> None:
    """The library of Dao-AILab."""
    causal_need(row, variant)
    if not 2 <= row.kernel_size[0] <= 4:
        raise AbsentError("has widths 2, 3 and 4 only")
    needs("causal_conv1d")


def cudnn_causal_need(row: Row, variant: str) -> None:
    """cuDNN's operation of the same name."""
    causal_need(row, variant)
    needs("torch", "cudnn", "cudnn.ops")


def causal_peer(library: str, form: str, row: Row, variant: str, sets: Sequence[Operands]) -> Prepared:
    """A fused causal depthwise convolution of x [B, C, L] with w [C, taps], or all its gradients."""
    problem = TorchRow(row, variant, "contiguous")
    silu = variant == "fused"

    def call(operands: Operands) -> Call:
        def sequence(array: Array) -> Any:
            tensor = to_torch(array).movedim(-1, 1)
            return tensor.contiguous() if form == "contiguous" else tensor

        x = sequence(operands.x)
        weight = to_torch(operands.kernels[0])[..., 0].T.contiguous()
        bias = to_torch(operands.bias) if silu else None
        if row.op == "depthwise_conv_grad":
            return causal_gradient(library, x, weight, sequence(operands.dy))
        if library == "cudnn":
            from cudnn.ops import causal_conv1d

            return partial(causal_conv1d, x, weight, bias, "silu" if silu else "identity")
        from causal_conv1d import causal_conv1d_fn

        return partial(causal_conv1d_fn, x, weight, bias, activation="silu" if silu else None)

    def answers(result: Any) -> tuple[Array, ...]:
        if row.op == "depthwise_conv_grad":
            dx, dw, db = result
            return problem.keras_image(dx), problem.keras_weight(dw.unsqueeze(1)), from_torch(db)
        return (problem.keras_image(result),)

    return Prepared(tuple(map(without_autograd, map(call, sets))), answers)


def causal_gradient(library: str, x: Any, weight: Any, dy: Any) -> Call:
    """The gradients of x, weight and bias without an activation."""
    import torch

    bias = x.new_zeros(x.shape[1])
    if library == "cudnn":
        return lambda: tuple(torch.ops.cudnn.causal_conv1d_bwd_primitive(dy, x, weight, bias, "identity"))
    from causal_conv1d.cpp_functions import causal_conv1d_bwd_function

    return lambda: causal_conv1d_bwd_function(x, weight, bias, dy, None, None, None, None, False, False)[:3]


# --- Ceilings ----------------------------------------------------------------------------------------------------


def gemm_sizes(row: Row) -> tuple[int, int, int]:
    """M, N, K of the matrix product that the row is; of a separable convolution, of its pointwise half."""
    taps, shape = math.prod(row.kernel_size), row.geometry
    positions = math.prod((shape.batch, *shape.out_size))
    if row.op == "separable_conv":
        return positions, row.filters, row.x[-1]
    if row.op == "conv_kernel_grad":
        return taps * row.x[-1], row.filters, positions
    if row.op == "conv":
        return positions, row.filters, taps * row.x[-1]
    (target,) = row.outputs  # every one of its positions meets one tap in `strides`
    m, n = math.prod(target[:-1]), target[-1]
    return m, n, max(1, round(row.flops / (2 * m * n)))


def gemm_need(row: Row, variant: str) -> None:
    if row.depthwise:
        raise AbsentError("a depthwise convolution is no matrix product")
    if variant == "fused":
        raise AbsentError("a ceiling of the plain variant")
    needs("torch")


def gemm(row: Row, variant: str, sets: Sequence[Operands]) -> Prepared:
    """torch.matmul of the row's sizes, which is cuBLAS on a GPU."""
    import torch

    m, n, k = gemm_sizes(row)
    present = next(array for array in (sets[0].x, sets[0].dy) if array is not None)
    like = to_torch(present)
    tf32 = row.dtype == "tf32"

    def operands() -> tuple[Any, Any]:
        def normal(*shape: int) -> Any:
            return torch.randn(shape, dtype=like.dtype, device=like.device)

        return normal(m, k), normal(k, n)

    pairs = [operands() for _ in sets]
    calls: list[Call] = [partial(torch.matmul, *pair) for pair in pairs]
    if row.array_dtype == "float32":
        calls = [with_tf32(call, tf32) for call in calls]

    def share(result: Any) -> float:
        rows, columns = torch.arange(0, m, max(1, m // 16)), torch.arange(0, n, max(1, n // 16))
        a, b = pairs[0]
        truth = a[rows.to(a.device)].double() @ b[:, columns.to(b.device)].double()
        off = (result[rows.to(a.device)][:, columns.to(b.device)].double() - truth).abs()
        eps = TF32_EPS if tf32 else float(ml_dtypes.finfo(dtype_of(row)).eps)
        allowed = 4 * eps * (truth.abs() + k**0.5) + SAFETY * float(np.finfo(np.float32).eps) * k
        return float((off / allowed).max()) if finite(from_torch(result)) else math.inf

    return Prepared(tuple(calls), lambda result: (from_torch(result),), tf32, share)


def copy_need(row: Row, variant: str) -> None:
    if variant == "fused":
        raise AbsentError("a ceiling of the plain variant")


def copy(row: Row, variant: str, sets: Sequence[Operands]) -> Prepared:
    """Half the row's bytes read and as many written."""
    present = next(array for array in (sets[0].x, sets[0].dy) if array is not None)
    library = library_of(present)
    count = row.bytes // 8  # words of 4 bytes, half of them read

    def pair(number: int) -> tuple[Array, Array]:
        source = library.arange(count, dtype=np.uint32) + np.uint32(number)
        return source.view(np.float32), library.empty(count, np.float32)

    pairs = [pair(number) for number in range(len(sets))]

    def call(source: Array, target: Array) -> Call:
        def run() -> Array:
            library.copyto(target, source)
            return target

        return run

    def share(result: Array) -> float:
        return 0.0 if bool((bits(result) == bits(pairs[0][0])).all()) else math.inf

    return Prepared(tuple(call(*each) for each in pairs), several, share=share)


# --- All of them -------------------------------------------------------------------------------------------------


def nothing(row: Row, variant: str) -> None:
    """Needs nothing."""


def torch_need(row: Row, variant: str) -> None:
    needs("torch")


def compiled_need(row: Row, variant: str) -> None:
    needs("torch", "triton")


def contenders(row: Row) -> list[Peer]:
    """Everyone who is asked to compute a row; cuconv first, ceilings last."""
    rank = len(row.kernel_size)
    forms = {"contiguous": f"torch conv{rank}d"}
    forms |= (
        {"2d": "torch conv2d channels_last"} if rank == 1 else {"channels_last": f"torch conv{rank}d channels_last"}
    )
    best = list(forms)[-1]
    modes = {False: "", True: TF32_SUFFIX} if row.array_dtype == "float32" else {False: ""}
    wanted = row.dtype == "tf32"
    precision = TF32_SUFFIX if wanted else ""
    eager = [
        Peer(name + suffix, "torch", torch_need, partial(torch_peer, form, tf32, False))
        for form, name in forms.items()
        for tf32, suffix in modes.items()
    ]
    compiled = Peer(
        f"torch.compile{precision}", "torch", compiled_need, partial(torch_peer, best, wanted, True), slow=True
    )
    fused = "cudnn frontend" + (TF32_SUFFIX if row.array_dtype == "float32" else "")
    causal = [
        Peer("causal_conv1d", "torch", causal_conv1d_need, partial(causal_peer, "dao", "contiguous")),
        Peer("causal_conv1d channels_last", "torch", causal_conv1d_need, partial(causal_peer, "dao", "channels_last")),
        Peer("cudnn causal_conv1d", "torch", cudnn_causal_need, partial(causal_peer, "cudnn", "contiguous")),
    ]
    return [
        Peer("cuconv", "cupy", nothing, cuconv),
        *eager,
        compiled,
        Peer(fused, "torch", cudnn_need, cudnn_graph),
        *causal,
        Peer("cublas gemm", "torch", gemm_need, gemm),
        Peer("copy", "cupy", copy_need, copy),
    ]
