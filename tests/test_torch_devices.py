"""The bridge to torch on GPUs: on a CuPy without CUDA (tests/fake_cupy.py), in the emulator, and on a real one.

A tensor of the first part lies in the memory of the CPU and says that it is on GPU 1. What is shown is where work goes
and what memory it takes. In the second part our kernels compute, on tensors of the CPU; the third part needs a GPU.
"""

import copy
import sys

import fake_cupy
import numpy as np
import pytest
from emulated import EmulatedRuntime
from torch_cases import torch

import cuconv.interop.torch as bridge
from cuconv import ops as array_ops
from cuconv.cuda import cubins, prepared
from cuconv.cuda.engine import Engine
from cuconv.interop.torch import arrays, ops
from cuconv.plan.types import PlanError

pytestmark = pytest.mark.bridges
STREAM = 0x77000

# --- Without a GPU -----------------------------------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A tensor on GPU 1, as far as the bridge asks."""

    is_cuda = property(lambda self: True)

    def get_device(self):
        return 1


class Pool:
    """torch's allocator: what it gave and has not got back."""

    def __init__(self):
        self.blocks, self.given = {}, []

    def allocate(self, nbytes, device):
        block = np.full(nbytes, 0xFF, np.uint8)
        self.blocks[block.ctypes.data] = block
        self.given.append((nbytes, device))
        return block.ctypes.data

    def free(self, address):
        del self.blocks[address]


@pytest.fixture
def pool(monkeypatch):
    pool = Pool()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": STREAM}))
    monkeypatch.setattr(torch.cuda, "caching_allocator_alloc", pool.allocate)
    monkeypatch.setattr(torch.cuda, "caching_allocator_delete", pool.free)
    return pool


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv(cubins.FOLDER_VARIABLE, str(tmp_path))

    def forget():
        prepared._in_one_piece.clear()
        array_ops._device_engine.cache_clear()
        for operation in array_ops._OPERATIONS.values():
            for cell in operation.__closure__:
                if isinstance(cell.cell_contents, prepared.Known):
                    cell.cell_contents._tapes.clear()

    forget()
    yield fake_cupy.install(monkeypatch, capabilities=[(9, 0), (8, 0)])
    fake_cupy.forget()
    forget()


def on_gpu(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)


OPTIONS = ([1], [0, 0], "channels_last", [1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_start_on_torchs_stream_and_device_with_its_memory(fake, pool, dtype):
    x, w, bias = on_gpu(2, 50, 16, dtype=dtype), on_gpu(3, 16, 24, dtype=dtype), on_gpu(24, dtype=dtype)
    for _ in range(2):  # the second call is played from a tape
        del fake.launches[:]
        y = ops._conv._init_fn(x, w, bias, *OPTIONS, 1, "highest")
        assert type(y) is OnGpu and tuple(y.shape) == (2, 48, 24) and y.dtype == dtype
        assert {(launch.device, launch.stream.ptr) for launch in fake.launches} == {(1, STREAM)}
        pointers = {word for launch in fake.launches for word in np.frombuffer(launch.parameters[:64], np.uint64)}
        assert {x.data_ptr(), w.data_ptr(), bias.data_ptr(), y.data_ptr()} <= pointers
        assert not pool.blocks


def test_scratch_memory_is_torchs_and_goes_back(fake, pool):
    x, w = on_gpu(2, 50, 16), on_gpu(3, 24, 16)
    for calls in (1, 2):
        ops._conv_transpose._init_fn(x, w, None, [2], [0, 0], [0], "channels_last", [1], 1, "highest")
        assert len(pool.given) == calls and not pool.blocks
    assert all(device == 1 and nbytes >= 4 * w.numel() for nbytes, device in pool.given), "the repacked kernel"


def test_cupy_works_afterwards_where_it_worked_before(fake, pool):
    before = fake.device, fake.streams[0], fake.streams[1]
    tensor = on_gpu(2, 3)
    with arrays.placed(tensor):
        assert (fake.device, fake.stream()) == (1, (1, STREAM))
        kept = fake.cupy.empty((4,), "float32")
    assert (fake.device, fake.streams[0], fake.streams[1]) == before
    assert pool.given == [(16, 1)] and len(pool.blocks) == 1
    own = fake.cupy.empty((4,), "float32")
    assert pool.given == [(16, 1)], "memory outside of a call is CuPy's own"
    del kept, own
    assert not pool.blocks


def test_tensors_of_a_gpu_are_viewed_by_dlpack(fake):
    x = torch.arange(24.0).reshape(2, 3, 4).movedim(1, -1)
    shown = arrays.view(x.as_subclass(OnGpu))
    assert shown.data.ptr == x.data_ptr() and shown.shape == (2, 4, 3) and shown.strides == (48, 4, 16)
    x[0, 1, 2] = -5
    assert shown.host[0, 1, 2] == -5


def test_a_gpu_without_cupy_says_what_to_install(monkeypatch, pool):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(PlanError, match=r"`pip install cuconv\[cuda12x\]` or `\[cuda13x\]`"):
        ops._conv._init_fn(on_gpu(2, 50, 16), on_gpu(3, 16, 24), None, *OPTIONS, 1, "highest")


# --- The kernels themselves, on the processor --------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("name", ["Conv1d", "ConvTranspose1d", "depthwise", "SeparableConv1d"])
def test_a_training_step_by_our_kernels(name, layout, monkeypatch):
    """The emulator runs them in the place of the NumPy path, on the memory of tensors of the CPU."""
    torch.manual_seed(0)
    groups = {"groups": 4} if name == "depthwise" else {}
    make = bridge.Conv1d if name == "depthwise" else getattr(bridge, name)
    layer = make(4, 8, 3, stride=2, padding=1, data_format=layout, **groups)
    x = torch.randn(2, 4, 9) if layout == "channels_first" else torch.randn(2, 9, 4)
    expected = answers(copy.deepcopy(layer).double(), x.double())
    runtime = EmulatedRuntime()
    monkeypatch.setattr(array_ops, "_host_engine", Engine(runtime))
    actual = answers(layer, x)
    assert len(runtime.launches) >= 3
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


# --- On a GPU ----------------------------------------------------------------------------------------------------


def needs_cuda(test):
    """Marks a test for `make test-gpu`; benchmarks/gpu.sh, whose time is short, leaves it out."""
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
    return pytest.mark.gpu(without(test))


MODULES = (
    lambda **options: bridge.Conv1d(16, 24, 3, stride=2, padding=1, **options),
    lambda **options: bridge.Conv2d(16, 24, 3, dilation=2, groups=2, **options),
    lambda **options: bridge.Conv3d(4, 8, 2, padding=1, **options),
    lambda **options: bridge.ConvTranspose1d(16, 8, 4, stride=2, padding=1, **options),
    lambda **options: bridge.ConvTranspose2d(16, 16, 3, stride=2, groups=16, output_padding=1, **options),
    lambda **options: bridge.Conv1d(16, 16, 7, padding="causal", groups=16, **options),
    lambda **options: bridge.SeparableConv2d(16, 8, 3, padding="same", **options),
)


def answers(module, x):
    x = x.detach().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


@needs_cuda
@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_a_gpu_gives_the_answers_of_the_cpu(make, dtype, layout):
    torch.manual_seed(0)
    module = make(dtype=torch.float64, data_format=layout)
    rank = {"1": 1, "2": 2, "3": 3}[type(module).__name__[-2]]
    channels = 4 if rank == 3 else 16
    sizes = (9, 8, 7)[:rank]
    x = torch.randn(2, channels, *sizes) if layout == "channels_first" else torch.randn(2, *sizes, channels)
    module, x = module.to(dtype), x.to(dtype)
    expected = answers(module.double(), x.double())
    actual = answers(module.to("cuda", dtype), x.cuda())
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for ours, theirs in zip(actual, expected):
        assert ours.is_cuda and ours.dtype == dtype
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=tolerance, atol=tolerance * scale)


@needs_cuda
def test_streams_of_torch_wait_for_nothing_else():
    """Long work on another stream, and a result that is needed on that stream only."""
    layer, x = bridge.Conv1d(64, 64, 9, device="cuda"), torch.randn(8, 64, 4096, device="cuda")
    expected = layer(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = x.clone()
        for _ in range(50):
            late = late * 1.0
        actual = layer(late)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(actual, expected)


@needs_cuda
def test_a_cuda_graph_of_torch_holds_our_kernels():
    layer, x = bridge.ConvTranspose1d(16, 8, 4, stride=2, device="cuda"), torch.randn(2, 16, 64, device="cuda")
    with torch.no_grad():
        layer(x)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.normal_()
        graph.replay()
        assert torch.equal(y, layer(x))
