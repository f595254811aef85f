"""Every peer computes the row it is asked for: layouts, paddings and gradients against the oracle, on the CPU."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from suite_rows import ALL, DIFFERENT, small

from benchmarks import peers, suite
from benchmarks.truth import Operands, Truth, dtype_of

ROW = suite.ROWS[1]


@pytest.fixture(autouse=True)
def without_onednn(request):
    """oneDNN, which torch uses on a CPU, does not return from a bfloat16 depthwise convolution of 31 taps."""
    if "keras" not in request.keywords:
        yield
        return
    torch = pytest.importorskip("torch")
    torch.backends.mkldnn.set_flags(False)
    yield
    torch.backends.mkldnn.set_flags(True)


def names(row):
    return [peer.name for peer in peers.contenders(row)]


def peer_of(row, name):
    (found,) = (peer for peer in peers.contenders(row) if peer.name == name)
    return found


def torch_cases():
    """Every way of torch on one of every kind of row, and on the kinds of padding that the suite does not have."""
    for param in DIFFERENT:
        row = small(param.values[0])
        for name in names(row):
            if name.startswith("torch conv"):
                for variant in row.variants:
                    yield pytest.param(row, name, variant, id=f"{row.number} {row.op} {name} {variant}")


UNEVEN = [
    replace(small(suite.ROWS[1]), x=(2, 15, 3), strides=(2,), padding="same"),  # more behind than in front
    replace(small(suite.ROWS[33]), x=(2, 12, 9, 3), strides=(2, 2), padding="same"),
    replace(small(suite.ROWS[33]), padding=((0, 2), (1, 0))),
    replace(small(suite.ROWS[33]), padding=((2, 0), (1, 0)), strides=(2, 1)),
    replace(small(suite.ROWS[41]), kernel_size=(5,), strides=(2,)),
    replace(small(suite.ROWS[41]), kernel_size=(4,), strides=(3,)),
    replace(small(suite.ROWS[41]), kernel_size=(3,), strides=(2,), padding=((0, 1),)),
    replace(small(suite.ROWS[41]), kernel_size=(3,), strides=(2,), padding="valid"),
    replace(small(suite.ROWS[45]), kernel_size=(3, 2), strides=(2, 2), padding=((0, 1), (1, 0))),
    replace(small(suite.ROWS[54]), x=(2, 12, 9, 3), strides=(2, 2), padding="same"),
    replace(small(suite.ROWS[50]), x=(2, 16, 3), strides=(2,), padding="same"),
    replace(small(suite.ROWS[50]), padding="causal", strides=(3,)),
]


def share_of(row, variant, prepared, operands, seed=1):
    result = prepared.calls[0]()
    if prepared.share:
        return prepared.share(result)
    return Truth(row, variant, operands, seed).share(prepared.answers(result), prepared.tf32)


@pytest.mark.keras
@pytest.mark.parametrize("row, name, variant", list(torch_cases()))
def test_torch_is_right(row, name, variant):
    operands = Operands.random(row, np, seed=row.number)
    peer = peer_of(row, name)
    assert peer.absent(row, variant) == ""
    assert share_of(row, variant, peer.prepare(row, variant, [operands]), operands) < 1


@pytest.mark.keras
@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.op} {row.padding} {row.strides}") for row in UNEVEN])
def test_torch_is_right_where_the_two_ends_differ(row):
    row = replace(row, dtype="float32")
    operands = Operands.random(row, np, seed=2)
    checked = 0
    for peer in peers.contenders(row):
        if peer.name.startswith("torch conv") and not peer.name.endswith("tf32"):
            assert share_of(row, "plain", peer.prepare(row, "plain", [operands]), operands) < 1, peer.name
            checked += 1
    assert checked == 2


@pytest.mark.keras
@pytest.mark.parametrize("row", DIFFERENT)
def test_torch_compile_computes_the_same_function(row, monkeypatch):
    """Compiled by nobody: what is asked of torch.compile, and that the function it gets is right."""
    import torch

    asked = []

    def compile_(function, **options):
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    row = small(row)
    sets = [Operands.random(row, np, seed=seed) for seed in (3, 4)]
    (peer,) = (each for each in peers.contenders(row) if each.name.startswith("torch.compile"))
    prepared = peer.prepare(row, row.variants[-1], sets)
    assert asked == [{"mode": "max-autotune-no-cudagraphs", "dynamic": False}], "compiled once for all sets"
    for operands, call in zip(sets, prepared.calls, strict=True):
        truth = Truth(row, row.variants[-1], operands, seed=5)
        assert truth.share(prepared.answers(call()), prepared.tf32) < 1


@pytest.mark.keras
def test_every_set_of_operands_has_its_call():
    for name in names(small(ROW)):
        peer = peer_of(ROW, name)
        if peer.absent(ROW, "plain"):
            continue
        row = small(ROW)
        sets = [Operands.random(row, np, seed=seed) for seed in (6, 7, 8)]
        prepared = peer.prepare(row, "plain", sets)
        assert len(prepared.calls) == 3, name
        if name not in peers.CEILINGS:
            for operands, call in zip(sets, prepared.calls, strict=True):
                assert Truth(row, "plain", operands, seed=9).share(prepared.answers(call()), prepared.tf32) < 1, name


@pytest.mark.keras
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_memory_is_shared_with_torch(dtype):
    torch = pytest.importorskip("torch")
    a = np.arange(24, dtype=np.float32).astype(dtype_of(replace(ROW, dtype=dtype))).reshape(2, 3, 4)
    tensor = peers.to_torch(a)
    assert tensor.dtype == getattr(torch, dtype)
    tensor[0, 0, 0] = 7
    assert a[0, 0, 0] == 7
    back = peers.from_torch(tensor.movedim(-1, 1))
    assert back.dtype == a.dtype and back.shape == (2, 4, 3)
    np.testing.assert_array_equal(back, np.moveaxis(a, -1, 1))
    assert np.shares_memory(back, a)


@pytest.mark.keras
def test_channels_last_costs_no_copy_and_is_seen_as_such():
    torch = pytest.importorskip("torch")
    row = small(suite.ROWS[33])
    operands = Operands.random(row, np, seed=10)
    x, weight, _ = peers.TorchRow(row, "plain", "channels_last").tensors(operands)
    assert x.is_contiguous(memory_format=torch.channels_last) and weight.is_contiguous(
        memory_format=torch.channels_last
    )
    assert np.shares_memory(peers.from_torch(x), operands.x)
    x, weight, _ = peers.TorchRow(row, "plain", "contiguous").tensors(operands)
    assert x.is_contiguous() and weight.is_contiguous()
    row = small(ROW)
    x, weight, _ = peers.TorchRow(row, "plain", "2d").tensors(Operands.random(row, np, seed=10))
    assert x.shape[2] == weight.shape[2] == 1 and x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.keras
def test_tf32_is_switched_per_call_in_float32_rows_only():
    torch = pytest.importorskip("torch")
    row = small(ROW, "float32")
    operands = Operands.random(row, np, seed=11)
    for suffix, allowed in (("", False), (" tf32", True)):
        prepared = peer_of(row, f"torch conv1d{suffix}").prepare(row, "plain", [operands])
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not allowed
        prepared.calls[0]()
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed
        assert prepared.tf32 == allowed
    assert torch.backends.cudnn.benchmark
    assert not any("tf32" in name for name in names(ROW))


@pytest.mark.parametrize("row", DIFFERENT)
def test_cuconv_is_right(row):
    row = small(row, "float32")
    operands = Operands.random(row, np, seed=12)
    for variant in row.variants:
        prepared = peer_of(row, "cuconv").prepare(row, variant, [operands])
        assert share_of(row, variant, prepared, operands) < 1


# --- Ceilings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ALL)
def test_the_matrix_product_has_the_rows_operations(row):
    if peer_of(row, "cublas gemm").absent(row, "plain").startswith("a depthwise"):
        assert row.depthwise
        return
    m, n, k = peers.gemm_sizes(row)
    if row.op == "separable_conv":
        assert 2 * m * n * k == 2 * row.y[0] * np.prod(row.y[1:-1]) * row.x[-1] * row.filters
    else:
        assert 2 * m * n * k == pytest.approx(row.flops, rel=1e-3)
    if row.op != "conv_kernel_grad":
        assert m * n == np.prod(row.outputs[0]), "one element of the product for each of the output"


@pytest.mark.keras
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "tf32"])
def test_the_matrix_product_is_checked(dtype):
    torch = pytest.importorskip("torch")
    row = small(ROW, dtype)
    prepared = peer_of(row, "cublas gemm").prepare(row, "plain", [Operands.random(row, np, seed=13)])
    result = prepared.calls[0]()
    assert tuple(result.shape) == peers.gemm_sizes(row)[:2]
    assert prepared.share(result) < 1
    assert prepared.share(result * 1.2) > 1
    result[-1, -1] = torch.nan
    assert prepared.share(result) > 1


def test_the_copy_moves_the_rows_bytes_and_is_checked():
    row = small(ROW)
    sets = [Operands.random(row, np, seed=seed) for seed in (1, 2)]
    prepared = peer_of(row, "copy").prepare(row, "plain", sets)
    first, second = (call() for call in prepared.calls)
    assert row.bytes - 8 < 2 * first.nbytes <= row.bytes
    assert prepared.share(first) == 0 and prepared.share(second) > 1, "each has a source of its own"
    first[-1] = np.nan
    assert prepared.share(first) > 1


def test_ceilings_and_tf32_do_not_compete():
    float32, tf32 = suite.ROWS[4], suite.ROWS[3]
    assert not any(peers.competes(float32, name) for name in ("copy", "cublas gemm", "cuconv", "torch conv1d tf32"))
    assert peers.competes(tf32, "torch conv1d tf32") and peers.competes(float32, "torch conv1d")


# --- Who takes part ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_libraries(monkeypatch):
    for name in ("torch", "triton", "cudnn", "cudnn.ops", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, name, None)
    peers.import_problem.cache_clear()
    yield
    peers.import_problem.cache_clear()


@pytest.mark.usefixtures("no_libraries")
@pytest.mark.parametrize("row", ALL)
def test_absent_peers_say_why(row):
    for peer in peers.contenders(row):
        why = peer.absent(row, "plain")
        if peer.name in ("cuconv", "copy"):
            assert why == ""
        else:
            assert why, peer.name
    assert "torch" in peer_of(row, names(row)[1]).absent(row, "plain")


def test_a_library_that_breaks_on_import_is_absent(monkeypatch, tmp_path):
    (tmp_path / "broken_peer.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(peers.AbsentError, match="broken_peer does not import: libcudart"):
        peers.needs("broken_peer")
    peers.import_problem.cache_clear()


def test_peers_without_the_operation_say_so():
    def why(number, name, variant="plain"):
        row = suite.ROWS[number - 1]
        return peer_of(row, name).absent(row, variant)

    assert why(1, "causal_conv1d") == "computes depthwise convolutions only"
    assert why(23, "causal_conv1d") == "computes causal convolutions of stride and dilation 1 only"
    assert why(26, "causal_conv1d") == "has widths 2, 3 and 4 only"
    assert why(21, "causal_conv1d", "fused") == "fuses SiLU only"
    assert why(20, "cublas gemm") == "a depthwise convolution is no matrix product"
    assert "plain variant" in why(1, "copy", "fused") and "plain variant" in why(1, "cublas gemm", "fused")


def test_names_of_contenders():
    assert names(ROW) == [
        "cuconv",
        "torch conv1d",
        "torch conv2d channels_last",
        "torch.compile",
        "cudnn frontend",
        "causal_conv1d",
        "causal_conv1d channels_last",
        "cudnn causal_conv1d",
        "cublas gemm",
        "copy",
    ]
    assert names(suite.ROWS[3])[1:7] == [
        "torch conv1d",
        "torch conv1d tf32",
        "torch conv2d channels_last",
        "torch conv2d channels_last tf32",
        "torch.compile tf32",
        "cudnn frontend tf32",
    ]
    assert names(suite.ROWS[46])[1:3] == ["torch conv3d", "torch conv3d channels_last"]


# --- Libraries that are not there: what they are asked for, computed by torch ------------------------------------


class CudnnTensor:
    def __init__(self, compute, dim=None):
        self.compute, self.dim, self.stride, self.output = compute, dim, None, False

    def set_output(self, output):
        self.output = output
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self


class CudnnGraph:
    """What the frontend's graph means, in float32."""

    def __init__(self, *, handle, io_data_type, intermediate_data_type, compute_data_type):
        assert intermediate_data_type == compute_data_type == "FLOAT"
        self.io, self.built = io_data_type, None

    def tensor(self, *, dim, stride, data_type):
        assert (data_type == self.io and stride[1] == 1) or dim[1] == 1 or dim[2:] == [1] * (len(dim) - 2)
        made = CudnnTensor(None, dim)
        made.compute = lambda given: given[made].float()
        return made

    def _padded(self, x, pre, post):
        import torch

        return torch.nn.functional.pad(x, [n for pair in zip(reversed(pre), reversed(post)) for n in pair])

    def conv_fprop(self, *, image, weight, pre_padding, post_padding, stride, dilation):
        import torch

        def compute(given):
            x, w = image.compute(given), weight.compute(given)
            groups = x.shape[1] // w.shape[1]
            nothing = [0] * len(stride)
            x = self._padded(x, pre_padding, post_padding)
            return torch.convolution(x, w, None, stride, nothing, dilation, False, nothing, groups)

        return CudnnTensor(compute)

    def _backward(self, x, w, dy, pre, post, stride, dilation, which):
        import torch

        nothing = [0] * len(stride)
        mask = [which == 0, which == 1, False]
        x = self._padded(x, pre, post)
        groups = x.shape[1] // w.shape[1]
        found = torch.ops.aten.convolution_backward(
            dy, x, w, None, stride, nothing, dilation, False, nothing, groups, mask
        )
        return found[which]

    def conv_dgrad(self, *, loss, filter, pre_padding, post_padding, stride, dilation):  # noqa: A002
        def compute(given):
            dy, w = loss.compute(given), filter.compute(given)
            x = dy.new_zeros(out.dim)
            dx = self._backward(x, w, dy, pre_padding, post_padding, stride, dilation, 0)
            return dx[(..., *(slice(b, b + n) for b, n in zip(pre_padding, out.dim[2:])))]

        out = CudnnTensor(compute)
        return out

    def conv_wgrad(self, *, image, loss, pre_padding, post_padding, stride, dilation):
        def compute(given):
            x, dy = image.compute(given), loss.compute(given)
            return self._backward(x, x.new_zeros(out.dim), dy, pre_padding, post_padding, stride, dilation, 1)

        out = CudnnTensor(compute)
        return out

    def bias(self, *, input, bias):  # noqa: A002
        return CudnnTensor(lambda given: input.compute(given) + bias.compute(given))

    def relu(self, *, input):  # noqa: A002
        return CudnnTensor(lambda given: input.compute(given).relu())

    def swish(self, *, input):  # noqa: A002
        import torch

        return CudnnTensor(lambda given: torch.nn.functional.silu(input.compute(given)))

    def build(self, modes):
        assert modes == ["A", "FALLBACK"]
        self.built = True

    def get_workspace_size(self):
        return 0

    def execute(self, tensors, workspace, handle):
        assert self.built and handle == "handle" and workspace.numel() > 0
        (output,) = (each for each in tensors if each.output)
        target = tensors[output]
        assert list(target.shape) == output.dim and list(target.stride()) == output.stride
        target.copy_(output.compute(tensors))


@pytest.fixture
def fake_cudnn(monkeypatch):
    torch = pytest.importorskip("torch")
    streams = []
    cudnn = types.ModuleType("cudnn")
    cudnn.create_handle = lambda: "handle"
    cudnn.set_stream = lambda handle, stream: streams.append(stream)
    cudnn.data_type = types.SimpleNamespace(FLOAT="FLOAT", HALF="HALF", BFLOAT16="BFLOAT16")
    cudnn.heur_mode = types.SimpleNamespace(A="A", FALLBACK="FALLBACK")
    cudnn.pygraph = CudnnGraph
    ops = types.ModuleType("cudnn.ops")

    def causal_conv1d(x, weight, bias=None, activation="identity"):
        assert x.is_contiguous() and weight.is_contiguous()
        return causal(x, weight, bias, activation == "silu")

    ops.causal_conv1d = causal_conv1d
    cudnn.ops = ops
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    monkeypatch.setitem(sys.modules, "cudnn.ops", ops)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=1234))
    peers.import_problem.cache_clear()
    yield streams
    peers.import_problem.cache_clear()


def causal(x, weight, bias, silu):
    """What both libraries for it compute, x [B, C, L], weight [C, taps]."""
    import torch

    padded = torch.nn.functional.pad(x.float(), (weight.shape[1] - 1, 0))
    y = torch.nn.functional.conv1d(padded, weight.float()[:, None], None, groups=x.shape[1])
    y = y if bias is None else y + bias.float()[:, None]
    return (torch.nn.functional.silu(y) if silu else y).to(x.dtype)


def causal_gradient(x, weight, bias, dy):
    import torch

    leaves = [each.float().clone().requires_grad_() for each in (x, weight, bias)]
    with torch.enable_grad():
        y = causal(*leaves, False)
    return tuple(each.to(x.dtype) for each in torch.autograd.grad(y, leaves, dy.float()))


@pytest.mark.keras
@pytest.mark.parametrize(
    "row", [param for param in DIFFERENT if param.values[0].op not in ("separable_conv", "depthwise_conv_grad")]
)
def test_the_cudnn_graph_is_right(row, fake_cudnn):
    row = small(row)
    for variant in row.variants:
        (peer,) = (each for each in peers.contenders(row) if each.name.startswith("cudnn frontend"))
        assert peer.absent(row, variant) == ""
        operands = Operands.random(row, np, seed=14)
        assert share_of(row, variant, peer.prepare(row, variant, [operands]), operands) < 1
    assert set(fake_cudnn) == {1234}, "torch's current stream"
    assert peer.name.endswith("tf32") == (row.array_dtype == "float32")


@pytest.mark.keras
def test_causal_libraries_are_right(fake_cudnn, monkeypatch):
    torch = pytest.importorskip("torch")
    package, functions = types.ModuleType("causal_conv1d"), types.ModuleType("causal_conv1d.cpp_functions")
    layouts = []

    def causal_conv1d_fn(x, weight, bias=None, activation=None):
        layouts.append(x.is_contiguous())
        assert weight.is_contiguous() and activation in (None, "silu")
        return causal(x, weight, bias, activation == "silu")

    def backward(x, weight, bias, dy, seq_idx, initial, dfinal, dx, want_initial, silu):
        assert seq_idx is initial is dfinal is dx is None and not want_initial and not silu
        return (*causal_gradient(x, weight, bias, dy), None)

    package.causal_conv1d_fn, functions.causal_conv1d_bwd_function = causal_conv1d_fn, backward
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    monkeypatch.setitem(sys.modules, "causal_conv1d.cpp_functions", functions)
    primitive = lambda dy, x, w, b, activation: list(causal_gradient(x, w, b, dy))  # noqa: E731
    monkeypatch.setattr(torch.ops, "cudnn", types.SimpleNamespace(causal_conv1d_bwd_primitive=primitive), raising=False)
    for number in (20, 57):
        row = small(suite.ROWS[number - 1])
        for variant in row.variants:
            operands = Operands.random(row, np, seed=15)
            for name in ("causal_conv1d", "causal_conv1d channels_last", "cudnn causal_conv1d"):
                peer = peer_of(row, name)
                assert peer.absent(row, variant) == ""
                assert share_of(row, variant, peer.prepare(row, variant, [operands]), operands) < 1, name
    assert layouts == [True, False] * 2
