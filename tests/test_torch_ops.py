"""The bridge to torch: its functions against torch.nn.functional, its operators against torch's own checks."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from compare import assert_close, is_half
from hypothesis import given
from hypothesis import strategies as st
from strategies import convolutions, depthwise_convolutions, examples, transposed_convolutions
from torch_cases import FAMILIES, MEMORY, Case, array, cases, laid, poisoned, random_tensor, torch, wide  # noqa: F401

from cuconv import ops as array_ops
from cuconv import reference
from cuconv.interop.torch import functional as ours
from cuconv.interop.torch import ops
from cuconv.interop.torch.arrays import view

theirs = torch.nn.functional
pytestmark = [
    pytest.mark.bridges,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]


# --- Against torch.nn.functional ---------------------------------------------------------------------------------


def torch_answer(case, x, kernels, bias):
    """The same by torch, in whatever dtype the tensors have."""
    if case.family == "conv_transpose":
        return getattr(theirs, f"conv_transpose{case.rank}d")(x, *kernels, bias, **case.options)
    conv = getattr(theirs, f"conv{case.rank}d")
    if case.family == "separable_conv":
        return conv(conv(x, kernels[0], groups=x.shape[1], **case.options), kernels[1], bias)
    return conv(x, *kernels, bias, **case.options)


def our_answer(case, x, kernels, bias):
    """By the function of the same name, (N, C, L..) whatever the layout asked for."""
    name = {"conv_transpose": "conv_transpose", "separable_conv": "separable_conv"}.get(case.family, "conv")
    last = {"data_format": "channels_last"} if case.memory == "channels_last" else {}
    y = getattr(ours, f"{name}{case.rank}d")(laid(x, case.memory), *kernels, bias, **case.options, **last)
    if case.memory == "channels_first":
        assert y.is_contiguous()
    if case.memory == "channels_last":
        assert y.is_contiguous()
        y = y.movedim(-1, 1)
    return y


def compare_with_torch(case, dtype):
    """The result and the gradients by every tensor."""
    x, kernels, bias = case.tensors(dtype)
    given = [each for each in (x, *kernels, bias) if each is not None]
    exact = [wide(each) for each in given]
    expected = torch_answer(case, exact[0], exact[1 : 1 + len(kernels)], exact[-1] if case.bias else None)
    y = our_answer(case, x, kernels, bias)
    dy = random_tensor(np.random.default_rng(case.seed + 1), y.shape, dtype, grad=False)
    gradients = torch.autograd.grad(y, given, dy)
    exact_gradients = torch.autograd.grad(expected, exact, dy.to(expected.dtype))
    terms = max(math.prod(case.w_shapes[0]), y.numel())  # the first is more than y and dx sum, the second than dw
    slacks = roundings_between(case, exact, kernels, dy) if is_half(dtype) else itertools.repeat(0.0)
    names = ("y", "dx", *("dw" for _ in kernels), "dbias")
    for name, actual, wanted, slack in zip(names, (y, *gradients), (expected, *exact_gradients), slacks):
        assert_close(array(actual), array(wanted), dtype=dtype, terms=terms, slack=slack, what=f"{name} of {case}")


def roundings_between(case, exact, kernels, dy):
    """What half a unit of every value between the two steps of a separable convolution moves, in each answer."""
    if case.family != "separable_conv":
        return itertools.repeat(0.0)
    sizes = [each.detach().abs().requires_grad_() for each in exact]
    bias = torch.zeros(case.bias, dtype=torch.float64, requires_grad=True) if case.bias else None
    y = torch_answer(case, sizes[0], sizes[1 : 1 + len(kernels)], bias)
    gradients = torch.autograd.grad(y, sizes[: 1 + len(kernels)], dy.abs().to(torch.float64))
    unit = float(torch.finfo(dy.dtype).eps) / 2
    return (unit * array(each) for each in (y, *gradients, *([torch.zeros(())] if case.bias else [])))


@given(cases())
@examples(300)
def test_results_and_gradients_in_float64(case):
    compare_with_torch(case, "float64")


@given(cases())
@examples(150)
def test_results_and_gradients_in_float32(case):
    compare_with_torch(case, "float32")


@given(cases())
@examples(100)
def test_results_and_gradients_in_float16(case):
    compare_with_torch(case, "float16")


@given(cases())
@examples(100)
def test_results_and_gradients_in_bfloat16(case):
    compare_with_torch(case, "bfloat16")


@given(cases())
@examples(100)
def test_results_and_gradients_in_complex128(case):
    compare_with_torch(case, "complex128")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "complex64", "complex128"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_ways_that_depend_on_channels(rank, memory, dtype):
    """A filter a channel, several, and one group, with and without a bias, of every family."""
    taps, sizes = (3, 2, 2)[:rank], (6, 5, 4)[:rank]
    for groups, filters, bias in itertools.product((1, 3), (1, 2), (False, True)):
        options = {"stride": 2, "padding": 1, "groups": groups}
        shapes = {
            "conv": ((groups * filters, 3 // groups, *taps), options),
            "conv_transpose": ((3, filters, *taps), {**options, "output_padding": 1}),
            "separable_conv": ((3 * filters, 1, *taps), {"stride": 2, "padding": 1}),
        }
        for family, (shape, keywords) in shapes.items():
            two = ((4, 3 * filters, *(1,) * rank),) if family == "separable_conv" else ()
            width = 4 if two else groups * filters
            case = Case(family, (2, 3, *sizes), (shape, *two), keywords, width * bias, memory)
            compare_with_torch(case, dtype)


# --- Against cuconv.ops ------------------------------------------------------------------------------------------


PROBLEMS = (
    st.tuples(st.just("conv"), convolutions())
    | st.tuples(st.just("conv_transpose"), transposed_convolutions())
    | st.tuples(st.just("depthwise_conv"), depthwise_convolutions())
    | st.tuples(st.just("separable_conv"), depthwise_convolutions())
)


@given(PROBLEMS)
@examples(250)
def test_layouts_and_names_of_keras_give_the_bits_of_arrays(drawn):
    name, problem = drawn
    groups, (*_, depth, last) = problem.options.get("groups", 1), problem.w_shape
    filters = {"conv": last, "conv_transpose": depth * groups, "depthwise_conv": depth * last, "separable_conv": 2}[
        name
    ]
    pointwise = [(*(1,) * problem.rank, depth * last, 2)] if name == "separable_conv" else []
    shapes = (problem.x_shape, problem.w_shape, *pointwise, *([(filters,)] if problem.bias else []))
    arrays = [each.copy() for each in problem.random(*shapes, dtype="float32")]
    expected = getattr(array_ops, name)(*arrays, **problem.options)
    actual = getattr(ops, name)(*map(torch.tensor, arrays), **problem.options)
    # The kernel of a transposed convolution with a filter a channel takes another way.
    if name == "conv_transpose" and depth == 1 < groups == last:
        assert_close(actual.numpy(), expected, dtype="float32", terms=problem.taps)
    else:
        np.testing.assert_array_equal(actual.numpy(), expected)


# --- torch's own checks ------------------------------------------------------------------------------------------

WINDOWS = (  # strides, padding, dilation, groups
    (1, (0, 0), 1, 1),
    (2, (1, 0), 1, 2),
    (1, (2, 1), 2, 1),
    (2, (1, 2), 3, 2),
)
GRID = list(itertools.product(FAMILIES, (1, 2, 3), ("channels_last", "channels_first"), range(len(WINDOWS))))
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def operator_arguments(family, rank, data_format, window, dtype=torch.float64):
    """Of the forward operator, and how many of them are tensors."""
    stride, pads, dilation, groups = WINDOWS[window]
    generator = torch.Generator().manual_seed(window)

    def tensor(*shape):
        return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()

    taps, sizes = (2, 3, 1)[:rank], (7, 6, 5)[:rank]
    if family == "conv_transpose":
        sizes = (2, 3, 4)[:rank]
    x = tensor(2, *sizes, 2) if data_format == "channels_last" else tensor(2, 2, *sizes)
    kernels = {
        "conv": [tensor(*taps, 2 // groups, 2)],
        "conv_transpose": [tensor(*taps, 4 // groups, 2)],
        "depthwise_conv": [tensor(*taps, 2, groups)],
        "separable_conv": [tensor(*taps, 2, groups), tensor(*(1,) * rank, 2 * groups, 3)],
    }[family]
    bias = tensor({"conv": 2, "conv_transpose": 4, "depthwise_conv": 2 * groups, "separable_conv": 3}[family])
    options = [[stride] * rank, [*pads] * rank, data_format, [dilation] * rank]
    if family == "conv_transpose":
        options.insert(2, [stride - 1] * rank)
    if family in ("conv", "conv_transpose"):
        options.append(groups)
    return [x, *kernels, bias], [*options, "highest"]


def operators_of(family):
    return [getattr(torch.ops.cuconv, family + suffix) for suffix in ("", "_input_grad", "_kernel_grad")]


@pytest.mark.parametrize("family, rank, data_format, window", GRID)
def test_operators_pass_torchs_checks(family, rank, data_format, window):
    """opcheck of the three operators; gradcheck; gradgradcheck, which differentiates the two others."""
    tensors, options = operator_arguments(family, rank, data_format, window)
    forward, input_grad, kernel_grad = operators_of(family)
    x, *kernels, _ = tensors
    dy = torch.randn_like(forward(*tensors, *options)).requires_grad_()
    shape = [] if family == "separable_conv" else [list(kernels[0].shape)]
    both = kernels if family == "separable_conv" else []
    for operator, arguments in (
        (forward, tensors),
        (forward, [x, *kernels, None]),
        (input_grad, [dy, *kernels, list(x.shape)]),
        (kernel_grad, [x, dy, *both, *shape]),
    ):
        # The last one compiles, so it is made once a family, rank and layout.
        checks = CHECKS if window == len(WINDOWS) - 1 else CHECKS[:-1]
        done = torch.library.opcheck(operator, (*arguments, *options), test_utils=checks)
        assert done == dict.fromkeys(checks, "SUCCESS")
    assert torch.autograd.gradcheck(lambda *given: forward(*given, *options), tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *given: forward(*given, *options), tensors, fast_mode=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gradients_of_gradients_element_by_element(family, dtype):
    tensors, options = operator_arguments(family, 1, "channels_first", 3, dtype)
    forward = operators_of(family)[0]
    assert torch.autograd.gradcheck(lambda *given: forward(*given, *options), tensors)
    assert torch.autograd.gradgradcheck(lambda *given: forward(*given, *options), tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_third_derivatives(family):
    tensors, options = operator_arguments(family, 1, "channels_last", 0)
    forward = operators_of(family)[0]

    def second(*given):
        first = torch.autograd.grad(forward(*given, *options).square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), given, create_graph=True)

    assert torch.autograd.gradcheck(second, tensors, fast_mode=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", [{0}, {1}, {0, 1}], ids=["x", "w", "x, w"])
def test_only_what_is_asked_for_is_computed_and_kept(family, frozen, monkeypatch):
    tensors, options = operator_arguments(family, 1, "channels_last", 1)
    for index in frozen:
        tensors[index].requires_grad_(False)
    y = operators_of(family)[0](*tensors, *options)
    saved = [each for each in y.grad_fn.saved_tensors if each is not None]
    if family != "separable_conv":
        assert len(saved) == 2 - len(frozen)
    y.sum().backward()
    for index, tensor in enumerate(tensors):
        assert (tensor.grad is None) == (index in frozen)


# --- Memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
def test_arrays_share_the_memory_of_tensors(dtype):
    for memory in MEMORY:
        x = laid(random_tensor(np.random.default_rng(0), (2, 3, 4, 5), dtype), memory)
        shown = view(x)
        assert shown.ctypes.data == x.data_ptr()
        assert shown.shape == tuple(x.shape) and shown.dtype.name == dtype
        assert shown.strides == tuple(step * x.element_size() for step in x.stride())
        np.testing.assert_array_equal(shown, array(x))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_neither_copied_nor_transposed(rank, memory, dtype, monkeypatch):
    seen = []

    def spy(shape, x, w, bias, activation, out, workspace, precision="highest"):
        seen.append((shape.data_format, x.ctypes.data, out.ctypes.data, w.flags.c_contiguous, out.flags.c_contiguous))
        return engine(shape, x, w, bias, activation, out, workspace, precision)

    engine = reference.conv
    monkeypatch.setattr(reference, "conv", spy)
    rng = np.random.default_rng(0)
    x = laid(random_tensor(rng, (2, 3, *(5, 6, 4)[:rank]), dtype, grad=False), memory)
    w = random_tensor(rng, (4, 3, *(2, 3, 2)[:rank]), dtype)
    last = {"data_format": "channels_last"} if memory == "channels_last" else {}
    y = getattr(ours, f"conv{rank}d")(x, w, **last)
    ((data_format, x_address, y_address, whole_w, whole_y),) = seen
    assert data_format == ("channels_last" if memory.startswith("channels_last") else "channels_first")
    assert (x_address, y_address) == (x.data_ptr(), y.data_ptr())
    assert whole_w and whole_y
    if memory == "channels_last in memory":
        assert y.movedim(1, -1).is_contiguous()
        if rank > 1:
            names = {2: torch.channels_last, 3: torch.channels_last_3d}
            assert y.is_contiguous(memory_format=names[rank])


def test_gradients_lie_like_what_they_are_gradients_of():
    x = torch.randn(2, 3, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(4, 3, 2, 2).requires_grad_()
    ours.conv2d(x, w).square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert w.grad.shape == w.shape


def test_a_single_signal_needs_no_batch():
    x, w = torch.randn(3, 9), torch.randn(4, 3, 2)
    assert torch.equal(ours.conv1d(x, w), ours.conv1d(x[None], w)[0])
    assert torch.equal(
        ours.conv1d(x.T.contiguous(), w, data_format="channels_last"),
        ours.conv1d(x.T[None], w, data_format="channels_last")[0],
    )


def test_causal_padding_is_zeros_in_front():
    x, w = torch.randn(2, 3, 11), torch.randn(4, 3, 3)
    expected = theirs.conv1d(theirs.pad(x, (4, 0)), w, stride=2, dilation=2)
    torch.testing.assert_close(ours.conv1d(x, w, stride=2, dilation=2, padding="causal"), expected)


def test_conjugated_tensors_are_read_as_their_values():
    x, w = torch.randn(1, 2, 7, dtype=torch.complex128), torch.randn(3, 2, 2, dtype=torch.complex128)
    assert x.conj().is_conj()
    torch.testing.assert_close(ours.conv1d(x.conj(), w.conj()), theirs.conv1d(x.conj(), w.conj()))
    torch.testing.assert_close(ours.conv1d(x.conj().imag, w.real), theirs.conv1d(x.conj().imag, w.real))


# --- Compiled, in lower precision, and by others -----------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_are_one_graph(backend, dynamic, dynamo):
    dynamo.clear()

    def net(x, w, v, u, d, p):
        y = ours.conv2d(x, w, padding="same").relu()
        y = ours.conv_transpose2d(ours.conv2d(y, v, stride=2, groups=4), u, stride=2, padding=1, output_padding=1)
        return ours.separable_conv2d(y, d, p, padding=1)

    weights = [torch.randn(shape) for shape in ((4, 3, 3, 3), (8, 1, 3, 3), (8, 4, 2, 2), (4, 1, 3, 3), (2, 4, 1, 1))]
    compiled = torch.compile(net, backend=backend, dynamic=dynamic, fullgraph=True)
    for size in (9, 12):
        for memory in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 3, size, size + 1).to(memory_format=memory).requires_grad_()
            expected, actual = net(x, *weights), compiled(x, *weights)
            torch.testing.assert_close(actual, expected)
            assert actual.stride() == expected.stride()
            torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)))
    # One graph a layout where sizes are symbols, else one a size too.
    assert dynamo["stats"]["unique_graphs"] == (2 if dynamic else 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_what_it_lowers_in_torch(dtype):
    x, w, b = torch.randn(2, 3, 9, requires_grad=True), torch.randn(4, 3, 2, requires_grad=True), torch.randn(4)
    with torch.autocast("cpu", dtype=dtype):
        y = ours.conv1d(x, w, b)
        assert y.dtype == theirs.conv1d(x, w, b).dtype == dtype
        assert ours.conv1d(x.double(), w.double()).dtype == torch.float64
        assert ours.conv1d(x.to(torch.complex64), w.to(torch.complex64)).dtype == torch.complex64
    y.sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32
    assert ours.conv1d(x, w).dtype == torch.float32
    torch.testing.assert_close(
        y.double(), theirs.conv1d(*(t.to(dtype).double() for t in (x, w, b))), rtol=1e-2, atol=1e-2
    )


def test_the_meta_device_computes_shapes():
    x, w = torch.empty(2, 3, 9, device="meta"), torch.empty(4, 3, 2, device="meta")
    assert ours.conv1d(x, w, stride=2).shape == (2, 4, 4)
    assert ours.conv_transpose1d(x, w.transpose(0, 1), stride=2).shape == (2, 4, 18)


# --- Errors ------------------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 3, 9), torch.zeros(4, 3, 2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: ours.conv1d(X, W.double()), TypeError, "one dtype of .*Received: float32, float64"),
        (lambda: ours.conv1d(X.int(), W.int()), TypeError, "one dtype of float16, .*Received: int32, int32"),
        (lambda: ours.conv1d(X, W.to("meta")), ValueError, "on one CPU or CUDA device. Received: cpu, meta"),
        (lambda: ours.conv1d(X.numpy(), W), TypeError, "must be tensors. Received: ndarray"),
        (lambda: ours.conv1d(X[:, :2], W), ValueError, "must have 3 channels"),
        (lambda: ours.conv1d(X, W[None]), ValueError, "`weight` must have 3 axes. Received: weight.shape=.1, 4, 3, 2."),
        (lambda: ours.conv1d(X[None], W), ValueError, "`input` must have 3 axes, or 2 without a batch"),
        (lambda: ours.conv1d(X, W, torch.zeros(3)), ValueError, "`bias` must have the shape .4,.. Received"),
        (lambda: ours.conv1d(X, W, stride=0), ValueError, "`strides` must be an integer >= 1. Received: strides=0"),
        (lambda: ours.conv1d(X, W, padding=-1), ValueError, "`padding` must be an integer >= 0. Received: padding=-1"),
        (
            lambda: ours.conv1d(X, W, stride=2, padding="same"),
            ValueError,
            "stride of 1, as in torch. Received: stride=2",
        ),
        (lambda: ours.conv1d(X, W, padding="full"), ValueError, "`padding` must be one of"),
        (lambda: ours.conv1d(X, W, dilation=9), ValueError, "an output size would be zero or negative"),
        (lambda: ours.conv1d(X, W, groups=2), ValueError, "must have 6 channels"),
        (lambda: ours.conv1d(X, W, groups="2"), ValueError, "`groups` must be an integer >= 1. Received: groups='2'"),
        (
            lambda: ours.conv_transpose1d(X, W, groups=0),
            ValueError,
            "`groups` must be an integer >= 1. Received: groups=0",
        ),
        (lambda: ours.conv1d(X, W, groups=3), ValueError, "`groups` must divide the filters"),
        (
            lambda: ours.conv1d(X, W, data_format="NLC"),
            ValueError,
            "`data_format` must be .*Received: data_format='NLC'",
        ),
        (lambda: ours.conv1d(X, W, precision="tf32"), ValueError, "`precision` must be .*Received: precision='tf32'"),
        (
            lambda: ours.conv_transpose1d(X, W.mT, output_padding=1),
            ValueError,
            "smaller than the stride or the dilation",
        ),
        (lambda: ours.conv_transpose1d(X, W, stride=2), ValueError, "must have 4 channels"),
        (lambda: ours.separable_conv1d(X, W, W), ValueError, "`depthwise_weight` must have the shape"),
        (lambda: ours.separable_conv1d(X, W[:, :1], W), ValueError, "multiple of the input's channels"),
        (lambda: ours.separable_conv1d(X, W[:3, :1], W), ValueError, "`pointwise_w` must have the shape .1, 3."),
        (lambda: ops.conv(X, W, padding="causal", data_format="last"), ValueError, "`data_format` must be"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_without_torch_the_error_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; import cuconv.interop.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'ImportError: cuconv.interop.torch needs PyTorch: pip install "cuconv[torch]"' in done.stderr
