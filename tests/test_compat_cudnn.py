"""The convolutions of cupy.cudnn: what they compute, where they put it, and what they refuse."""

import contextlib
import inspect
from dataclasses import dataclass

import emulator
import numpy as np
import oracle
import pytest
from compare import DTYPES, LAYOUTS, assert_close, empty_output, frozen, poisoned
from hypothesis import given
from hypothesis import strategies as st
from strategies import BATCHES, GROUPS, PER_GROUP, RANKS, examples, uniform
from test_engine import OnDevice, device, knowns  # noqa: F401  a fixture

from cuconv import ops
from cuconv.compat import cudnn
from cuconv.cuda import runtime

NCHW, NHWC = cudnn.CUDNN_TENSOR_NCHW, cudnn.CUDNN_TENSOR_NHWC
FORWARD = {"auto_tune": True, "tensor_core": "auto"}
BACKWARD = {**FORWARD, "deterministic": False}


# --- Calls and what comes out --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """The arguments of one convolution, and how its arrays lie in memory."""

    batch: int
    sizes: tuple[int, ...]
    taps: tuple[int, ...]
    pad: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    depth: int = 1  # channels of a group
    width: int = 1  # filters of a group
    bias: bool = False
    d_layout: int = NCHW
    w_layout: int = NCHW
    memory: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")  # two operands, the result
    seed: int = 0

    @property
    def arguments(self):
        return self.pad, self.stride, self.dilation, self.groups

    @property
    def layouts(self):
        return {"d_layout": self.d_layout, "w_layout": self.w_layout}

    @property
    def options(self):
        """What the oracle calls them."""
        return {
            "padding": tuple((p, p) for p in self.pad),
            "strides": self.stride,
            "dilation_rate": self.dilation,
            "groups": self.groups,
            "data_format": "channels_first" if self.d_layout == NCHW else "channels_last",
        }

    def arrays(self, dtype):
        """Image, kernel and product, and a bias for the product and one for the image."""
        rng = np.random.default_rng(self.seed)
        channels, filters = self.groups * self.depth, self.groups * self.width
        out = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, p, s, d in zip(self.sizes, self.taps, self.pad, self.stride, self.dilation)
        ]

        def shape(first, second, spatial, layout):
            return (first, second, *spatial) if layout == NCHW else (first, *spatial, second)

        shapes = (
            shape(self.batch, channels, self.sizes, self.d_layout),
            shape(filters, self.depth, self.taps, self.w_layout),
            shape(self.batch, filters, out, self.d_layout),
            (filters,),
            (channels,),
        )
        return [uniform(rng, each, dtype) for each in shapes]


def from_keras(w, layout):
    """A kernel [taps.., depth, filters] as cuDNN's [filters, depth, taps..] or [filters, taps.., depth]."""
    return np.moveaxis(w, (-1, -2), (0, 1)) if layout == NCHW else np.moveaxis(w, -1, 0)


def to_keras(w, layout):
    return np.moveaxis(w, (0, 1), (-1, -2)) if layout == NCHW else np.moveaxis(w, 0, -1)


@st.composite
def calls(draw):
    rank = draw(RANKS)
    taps, dilation, pad, sizes, stride = [], [], [], [], []
    for _ in range(rank):
        k, d, p = draw(st.integers(1, (4, 3, 2)[rank - 1])), draw(st.integers(1, 3)), draw(st.integers(0, 3))
        taps.append(k)
        dilation.append(d)
        pad.append(p)
        stride.append(draw(st.integers(1, 3)))
        sizes.append(max(1, (k - 1) * d + 1 - 2 * p) + draw(st.integers(0, (9, 4, 2)[rank - 1])))
    layout = st.sampled_from((NCHW, NHWC))
    return Call(
        draw(BATCHES),
        tuple(sizes),
        tuple(taps),
        tuple(pad),
        tuple(stride),
        tuple(dilation),
        draw(GROUPS),
        draw(PER_GROUP),
        draw(PER_GROUP),
        draw(st.booleans()),
        draw(layout),
        draw(layout),
        tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(3)),
        draw(st.integers(0, 2**16)),
    )


def compare(call, dtype, asarray=lambda array: array):
    """The three functions against the definition; results are poisoned first, and nothing around them is written."""
    first, second, last = call.memory
    x, w, gy, b, c = call.arrays(dtype)
    keras, positions, taps = to_keras(w, call.w_layout), gy.size // (call.groups * call.width), np.prod(call.taps)

    def check(function, expected, terms, *given, **keywords):
        out = empty_output(expected.shape, dtype, last)
        result = asarray(out.view)
        assert function(*given, result, *call.arguments, **keywords, **call.layouts) is None
        found = result.get() if hasattr(result, "get") else result.view(np.ndarray)
        assert_close(found, expected, dtype=dtype, terms=int(terms), what=function.__name__)
        if np.may_share_memory(found, out.view):
            out.assert_surroundings_untouched()

    def operands(one, other, bias):
        yield asarray(frozen(one, first))
        yield asarray(frozen(other, second))
        yield asarray(frozen(bias)) if call.bias else None

    expected = oracle.conv(x, keras, b if call.bias else None, **call.options)
    check(cudnn.convolution_forward, expected, taps * call.depth + 1, *operands(x, w, b), **FORWARD)
    expected = oracle.conv_input_grad(gy, keras, x.shape, **call.options)
    if call.bias:
        expected = expected + oracle.wide(c).reshape(-1, *(1,) * len(call.taps) if call.d_layout == NCHW else ())
    check(cudnn.convolution_backward_data, expected, taps * call.width + 1, *operands(w, gy, c), **BACKWARD)
    expected = from_keras(oracle.conv_kernel_grad(x, gy, keras.shape, **call.options), call.w_layout)
    check(cudnn.convolution_backward_filter, expected, positions, *[*operands(x, gy, b)][:2], **BACKWARD)


@pytest.mark.parametrize("dtype", DTYPES)
@given(call=calls())
@examples(40)
def test_the_definition(call, dtype):
    compare(call, dtype)


@pytest.mark.parametrize("d_layout, w_layout", [(NCHW, NCHW), (NHWC, NHWC), (NCHW, NHWC), (NHWC, NCHW)])
def test_every_axis_has_options_of_its_own(d_layout, w_layout):
    """An exchange of two axes, or of two options, shows in this one; so does one of channels and taps."""
    call = Call(2, (9, 7, 8), (3, 2, 4), (2, 0, 1), (1, 3, 2), (3, 1, 2), 2, 3, 5, True, d_layout, w_layout)
    compare(call, "float64")


def test_numbers_that_a_hand_can_check():
    x, w = np.array([[[1.0, 2, 3, 4]]]), np.array([[[1.0, 10, 100]], [[0, 1, 0]]])
    y = poisoned((1, 2, 3), "float64")
    cudnn.convolution_forward(x, w, np.array([0.5, 0]), y, (2,), (2,), (1,), 1, **FORWARD)
    assert y.tolist() == [[[100.5, 321.5, 43.5], [0, 2, 4]]], "windows 0 0 1, 1 2 3, 3 4 0: not flipped"
    gx, gw = poisoned(x.shape, "float64"), poisoned(w.shape, "float64")
    gy = np.array([[[1.0, 2, 3], [0, 0, 1]]])
    cudnn.convolution_backward_data(w, gy, None, gx, (2,), (2,), (1,), 1, **BACKWARD)
    assert gx.tolist() == [[[102, 20, 203, 31]]]
    cudnn.convolution_backward_filter(x, gy, gw, (2,), (2,), (1,), 1, **BACKWARD)
    assert gw.tolist() == [[[11, 16, 7]], [[3, 4, 0]]]


@pytest.mark.parametrize("d_layout, w_layout", [(NCHW, NCHW), (NHWC, NHWC)])
def test_gradients_of_complex_arrays_are_adjoint(d_layout, w_layout):
    call = Call(2, (7, 6), (3, 2), (1, 2), (2, 1), (1, 2), 2, 2, 3, False, d_layout, w_layout)
    x, w, gy, _, _ = call.arrays("complex128")
    y, gx, gw = np.empty_like(gy), np.empty_like(x), np.empty_like(w)
    cudnn.convolution_forward(x, w, None, y, *call.arguments, **FORWARD, **call.layouts)
    cudnn.convolution_backward_data(w, gy, None, gx, *call.arguments, **BACKWARD, **call.layouts)
    cudnn.convolution_backward_filter(x, gy, gw, *call.arguments, **BACKWARD, **call.layouts)
    inner = np.vdot(gy, y)
    assert abs(inner) > 1 and abs(inner.imag) > 0.1
    np.testing.assert_allclose(np.vdot(gx, x), inner, rtol=1e-12)
    np.testing.assert_allclose(np.vdot(gw, w), inner, rtol=1e-12)


def test_a_batch_of_no_image():
    x, w, y, gw = np.empty((0, 4, 5)), np.ones((2, 4, 3)), np.empty((0, 2, 3)), poisoned((2, 4, 3), "float64")
    cudnn.convolution_forward(x, w, None, y, (0,), (1,), (1,), 1, **FORWARD)
    cudnn.convolution_backward_data(w, y, None, x, (0,), (1,), (1,), 1, **BACKWARD)
    cudnn.convolution_backward_filter(x, y, gw, (0,), (1,), (1,), 1, **BACKWARD)
    assert np.all(gw == 0)


def test_an_image_of_padding_alone():
    x, w, y, gw = (
        np.empty((2, 3, 0)),
        np.ones((4, 3, 2)),
        poisoned((2, 4, 3), "float64"),
        poisoned((4, 3, 2), "float64"),
    )
    cudnn.convolution_forward(x, w, np.arange(4.0), y, (2,), (1,), (1,), 1, **FORWARD)
    cudnn.convolution_backward_filter(x, y, gw, (2,), (1,), (1,), 1, **BACKWARD)
    assert np.all(y == np.arange(4.0)[:, None]) and np.all(gw == 0)


# --- What is ignored, and what may be spelled in more than one way -------------------------------------------------


def results(bias=lambda b: b, **changed):
    """The bytes of the three results, with some arguments changed."""
    x, w, gy, b, c = Call(2, (7, 6), (3, 3), (1, 1), (2, 2), (1, 1), 1, 3, 4).arrays("float32")
    y, gx, gw = (poisoned(each.shape, "float32") for each in (gy, x, w))
    arguments = {"pad": (1, 1), "stride": (2, 2), "dilation": (1, 1), "groups": 1, **BACKWARD, **changed}
    cudnn.convolution_backward_data(w, gy, bias(c), gx, **arguments)
    cudnn.convolution_backward_filter(x, gy, gw, **arguments)
    del arguments["deterministic"]
    cudnn.convolution_forward(x, w, bias(b), y, **arguments)
    return bytes(y), bytes(gx), bytes(gw)


@pytest.mark.parametrize("changed", [
    {"auto_tune": False},
    {"deterministic": True},
    {"tensor_core": "always"},
    {"tensor_core": "never"},
    {"dilation": None},
    {"dilation": [1, 1]},
    {"pad": np.array([1, 1]), "stride": np.int64(2), "groups": np.int8(1)},
    {"bias": lambda b: b.reshape(1, -1, 1, 1)},
    {"bias": lambda b: np.repeat(b, 2)[::2]},
], ids=" ".join)  # fmt: skip
def test_the_same_is_computed(changed):
    assert results(**changed) == results()


@pytest.mark.parametrize("layout", [NCHW, NHWC])
def test_only_kernels_are_copied(layout, monkeypatch):
    """And they are in one piece, as calls are remembered on a GPU only then."""
    seen = []

    def noting(function):
        return lambda *given, **keywords: seen.append((*given, keywords.get("out"))) or function(*given, **keywords)

    for name in ("conv", "conv_transpose", "conv_kernel_grad"):
        monkeypatch.setattr(ops, name, noting(getattr(ops, name)))
    call = Call(2, (5, 4), (3, 2), (0, 0), (1, 1), (1, 1), 1, 2, 3, False, layout, layout)
    x, w, gy, *_ = call.arrays("float32")
    cudnn.convolution_forward(x, w, None, gy, *call.arguments, **FORWARD, **call.layouts)
    cudnn.convolution_backward_data(w, gy, None, x, *call.arguments, **BACKWARD, **call.layouts)
    cudnn.convolution_backward_filter(x, gy, w, *call.arguments, **BACKWARD, **call.layouts)
    (x1, w1, _, gy1), (gy2, w2, _, x2), (x3, gy3, _, none) = seen
    assert x1 is x2 is x3 is x and gy1 is gy2 is gy3 is gy and none is None
    assert w1.flags.c_contiguous and w2.flags.c_contiguous and w1.shape == w2.shape == (3, 2, 2, 3)


def test_the_workspace_is_a_bound_for_all_calls(monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "conv", lambda *_, workspace, **__: asked.append(workspace))
    before = cudnn.get_max_workspace_size()
    x, w, y = np.ones((1, 1, 4)), np.ones((1, 1, 3)), np.ones((1, 1, 2))
    try:
        for size in (1 << 20, np.int64(0)):
            cudnn.set_max_workspace_size(size)
            assert cudnn.get_max_workspace_size() == size
            cudnn.convolution_forward(x, w, None, y, (0,), (1,), (1,), 1, **FORWARD)
        for wrong in (-1, 1.5, None, "8"):
            with pytest.raises(ValueError, match=r"`size` .* Received: size="):
                cudnn.set_max_workspace_size(wrong)
        assert cudnn.get_max_workspace_size() == 0
    finally:
        cudnn.set_max_workspace_size(before)
    assert asked == [1 << 20, 0] and before == 64 << 20


# --- What it looks like --------------------------------------------------------------------------------------------

# As in CuPy 13.6, cupyx/cudnn.pyx.
SIGNATURES = {
    "convolution_forward": ("x W b y pad stride dilation groups * auto_tune tensor_core d_layout=0 w_layout=0"),
    "convolution_backward_filter": (
        "x gy gW pad stride dilation groups * deterministic auto_tune tensor_core d_layout=0 w_layout=0"
    ),
    "convolution_backward_data": (
        "W x b y pad stride dilation groups * deterministic auto_tune tensor_core d_layout=0 w_layout=0"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_cupys(name):
    found = []
    for each in inspect.signature(getattr(cudnn, name)).parameters.values():
        if each.kind is each.KEYWORD_ONLY and "*" not in found:
            found.append("*")
        found.append(each.name if each.default is each.empty else f"{each.name}={each.default}")
    assert " ".join(found) == SIGNATURES[name]
    assert (cudnn.CUDNN_TENSOR_NCHW, cudnn.CUDNN_TENSOR_NHWC) == (0, 1)


@pytest.mark.parametrize(
    "name", ["activation_forward", "softmax_forward", "pooling_forward", "DropoutStates", "CUDNN_RNN_RELU"]
)
def test_the_rest_of_cupys_module_says_that_it_is_not_there(name):
    with pytest.raises(AttributeError, match=rf"has no {name}: of cupy.cudnn it has convolution_forward, "):
        getattr(cudnn, name)
    assert not hasattr(cudnn, name)


# --- What is refused -----------------------------------------------------------------------------------------------


def mistake(function, text, kind=ValueError, **changed):
    return pytest.param(function, text, kind, changed, id=f"{function}-{'-'.join(changed)}-{text[:24]}")


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


FORWARD_MISTAKES = [
    ("`pad` must be an integer >= 0 or a tuple of 2 such integers. Received: pad=(1,)", {"pad": (1,)}),
    ("`pad` must be", {"pad": (1, -1)}),
    ("`pad` must be", {"pad": ((1, 1), (1, 1))}),
    ("`pad` must be", {"pad": "same"}),
    ("`stride` must be", {"stride": (2, 0)}),
    ("`stride` must be", {"stride": (2, 2, 2)}),
    ("`dilation` must be", {"dilation": (1.5, 1)}),
    ("`groups` must be an integer >= 1 that divides the filters", {"groups": 3}),
    ("`groups` must be", {"groups": 0}),
    ("`groups` must be", {"groups": None}),
    ("must have 4 channels: 2 of", {"groups": 2}),
    ("`tensor_core` must be", {"tensor_core": "sometimes"}),
    ("`d_layout` must be CUDNN_TENSOR_NCHW (0) or CUDNN_TENSOR_NHWC (1). Received: d_layout=2", {"d_layout": 2}),
    ("`w_layout` must be", {"w_layout": "NCHW"}),
    ("`w_layout` must be", {"w_layout": True}),
    ("channels", {"d_layout": NHWC}),
    ("an output size would be zero or negative", {"dilation": (9, 9)}),
]
SHAPE_MISTAKES = {
    "convolution_forward": [
        ("`y` must have the shape (2, 4, 4, 3). Received:", {"y": zeros(2, 4, 4, 4)}),
        ("`y` must have the shape", {"y": zeros(1, 4, 4, 3)}),
        ("`y` must have the shape", {"y": zeros(2, 4, 3, 4)}),
        ("`x`, `W` and `y` must have 3 to 5 axes, all the same number. Received: x.shape=", {"x": zeros(2, 2, 7)}),
        ("must have 3 to 5 axes", {"W": zeros(4, 2)}),
        ("`x` must have 2 channels", {"x": zeros(2, 3, 7, 6)}),
        ("at least 1", {"W": zeros(4, 2, 3, 0)}),
        ("`b` must have one element for each of 4 channels. Received: b.shape=(2,)", {"b": zeros(2)}),
        ("`b` must have", {"b": zeros(1)}),
    ],
    "convolution_backward_data": [
        ("`x` must have the shape (2, 4, 4, 3)", {"x": zeros(2, 4, 4, 4)}),
        ("`y` must have 2 channels", {"y": zeros(2, 3, 7, 6)}),
        ("`y`, `W` and `x` must have 3 to 5 axes", {"W": zeros(4, 2, 3)}),
        ("`b` must have one element for each of 2 channels. Received: b.shape=(4,)", {"b": zeros(4)}),
    ],
    "convolution_backward_filter": [
        ("`gy` must have the shape (2, 4, 4, 3)", {"gy": zeros(2, 4, 4, 4)}),
        ("`x` must have 5 channels: 5 of `gW` times 1 groups", {"gW": zeros(4, 5, 3, 3)}),
        ("`x`, `gW` and `gy` must have 3 to 5 axes", {"gW": zeros(4, 2, 3)}),
    ],
}
TYPE_MISTAKES = {
    "convolution_forward": [
        ("`x` must be a NumPy or a CuPy array. Received: a builtins.list", {"x": [[[[0.0]]]]}),
        ("`W` must be a NumPy or a CuPy array. Received: a builtins.NoneType", {"W": None}),
        ("x.dtype=float32, W.dtype=float64, y.dtype=float32", {"W": zeros(4, 2, 3, 3, dtype="float64")}),
        ("b.dtype=float64", {"b": zeros(4, dtype="float64")}),
        ("y.dtype=complex64", {"y": zeros(2, 4, 4, 3, dtype="complex64")}),
        ("arrays must have one dtype of float16", {
            name: zeros(*shape, dtype="int32")
            for name, shape in {"x": (2, 2, 7, 6), "W": (4, 2, 3, 3), "y": (2, 4, 4, 3)}.items()
        }),
    ],
    "convolution_backward_data": [("`y` must be a NumPy or a CuPy array", {"y": None})],
    "convolution_backward_filter": [("gW.dtype=float64", {"gW": zeros(4, 2, 3, 3, dtype="float64")})],
}  # fmt: skip


@pytest.mark.parametrize("function, text, kind, changed", [
    *(mistake(name, text, **changed) for name in SIGNATURES for text, changed in FORWARD_MISTAKES),
    *(mistake(name, text, **changed) for name, rows in SHAPE_MISTAKES.items() for text, changed in rows),
    *(mistake(name, text, TypeError, **changed) for name, rows in TYPE_MISTAKES.items() for text, changed in rows),
])  # fmt: skip
def test_mistakes_are_named_before_anything_is_written(function, text, kind, changed):
    image, kernel, product = (2, 2, 7, 6), (4, 2, 3, 3), (2, 4, 4, 3)
    arguments = {
        "convolution_forward": {"x": zeros(*image), "W": zeros(*kernel), "b": None, "y": zeros(*product)},
        "convolution_backward_data": {"W": zeros(*kernel), "x": zeros(*product), "b": None, "y": zeros(*image)},
        "convolution_backward_filter": {"x": zeros(*image), "gy": zeros(*product), "gW": zeros(*kernel)},
    }[function]
    keywords = FORWARD if function == "convolution_forward" else BACKWARD
    arguments |= {"pad": (1, 1), "stride": (2, 2), "dilation": (1, 1), "groups": 1, **keywords}
    getattr(cudnn, function)(**arguments)
    arguments |= changed
    out = arguments["gW" if function == "convolution_backward_filter" else "y"]
    if out is not None:
        out[...] = 7
    with pytest.raises(kind) as error:
        getattr(cudnn, function)(**arguments)
    assert text in str(error.value) and "Received: " in str(error.value)
    assert out is None or np.all(out == 7)


@pytest.mark.parametrize("y, text", [
    (lambda x: x[:, :, 1:-1, 1:-1], "share memory"),
    (lambda x: np.broadcast_to(np.float32(0), (2, 2, 5, 4)), "writeable"),
], ids=["overlap", "broadcast"])  # fmt: skip
def test_results_have_memory_of_their_own(y, text):
    x = np.ones((2, 2, 7, 6), np.float32)
    with pytest.raises(ValueError, match=text):
        cudnn.convolution_forward(x, zeros(2, 2, 3, 3), None, y(x), (0, 0), (1, 1), (1, 1), 1, **FORWARD)
    assert np.all(x == 1)


def test_a_gradient_that_cannot_be_written():
    gw = np.full((2, 1, 3), 7.0)
    gw.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        cudnn.convolution_backward_filter(np.ones((1, 1, 4)), np.ones((1, 2, 2)), gw, (0,), (1,), (1,), 1, **BACKWARD)
    assert np.all(gw == 7)


# --- On a GPU ------------------------------------------------------------------------------------------------------

# Ranks, layouts, groups, dtypes and strides of arrays, each more than once; the first two run always.
EMULATED = [
    ("float32", Call(2, (17,), (3,), (2,), (2,), (2,), 1, 3, 5, True)),
    ("complex64", Call(1, (11, 1), (4, 1), (3, 0), (2, 1), (1, 1), 1, 2, 3)),
    (
        "float32",
        Call(2, (9, 7), (3, 2), (1, 0), (2, 1), (1, 2), 2, 2, 3, True, NHWC, NHWC, ("sliced", "fortran", "offset")),
    ),
    ("float16", Call(2, (9, 7), (3, 3), (1, 1), (1, 2), (1, 1), 1, 8, 8, True, NHWC, NCHW)),
    (
        "complex64",
        Call(2, (4, 3, 5), (2, 1, 3), (1, 0, 1), (1, 1, 2), (1, 1, 1), 1, 2, 2, True, memory=("reversed",) * 3),
    ),
]
EMULATED = [
    pytest.param(*each, id=f"{number}-{each[0]}", marks=[pytest.mark.exhaustive] * (number > 1))
    for number, each in enumerate(EMULATED)
]


@pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
@pytest.mark.parametrize("dtype, call", EMULATED)
def test_the_kernels_compute_it(dtype, call, device):  # noqa: F811
    compare(call, dtype, lambda array: array.view(OnDevice))
    assert len(device.runtime.launches) >= 3
    if set(call.memory) == {"contiguous"}:
        tapes = [tape for known in knowns() for tape in known._tapes.values()]
        assert len(tapes) == 3 and None not in tapes, "what is remembered is played at the next call"


@pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
def test_what_cupy_does_it_does_on_the_gpu_of_the_arrays(device, monkeypatch):  # noqa: F811
    """A copy that CuPy makes lies on the GPU that is current."""
    current = []

    class Gpu(contextlib.AbstractContextManager):
        def __enter__(self):
            current.append(self)

        def __exit__(self, *error):
            current.pop()

    class Careful(OnDevice):
        def copy(self):
            assert current
            return super().copy()

        def conj(self):
            assert current
            return super().conj()

        def __setitem__(self, *given):
            assert current
            super().__setitem__(*given)

    monkeypatch.setattr(OnDevice, "device", Gpu())
    call = Call(1, (5,), (2,), (1,), (1,), (1,), 1, 2, 2)
    x, w, gy, *_ = (each.view(Careful) for each in call.arrays("complex64"))
    cudnn.convolution_forward(x, w, None, gy, *call.arguments, **FORWARD)
    cudnn.convolution_backward_data(w, gy, None, x, *call.arguments, **BACKWARD)
    cudnn.convolution_backward_filter(x, gy, w, *call.arguments, **BACKWARD)
    assert not current


@pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
def test_arrays_of_two_places_are_refused(device):  # noqa: F811
    x, w, y = zeros(2, 2, 7, 6), zeros(4, 2, 3, 3), poisoned((2, 4, 5, 4), "float32")
    for number in range(3):
        given = [each.view(OnDevice) if i == number else each for i, each in enumerate((x, w, y))]
        with pytest.raises((AssertionError, TypeError), match="place"):
            cudnn.convolution_forward(*given[:2], None, given[2], (0, 0), (1, 1), (1, 1), 1, **FORWARD)
    assert np.all(np.isnan(y)) and not device.runtime.launches


@pytest.mark.gpu
@pytest.mark.skipif(not runtime.probe().usable, reason=runtime.probe().reason)
@pytest.mark.parametrize("dtype", [each for each in DTYPES if each != "bfloat16"])
@given(call=calls())
@examples(15)
def test_the_definition_on_a_gpu(call, dtype):
    def asarray(array):
        base = runtime.device_array(np.ascontiguousarray(array))
        return base.transpose().copy().transpose() if call.memory[0] == "fortran" else base

    compare(call, dtype, asarray)
