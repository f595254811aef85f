"""sigpy's own code for the GPU on our functions: its convolutions, operators and an app, against SciPy and itself.

A `cupy` that is NumPy underneath stands in for CuPy 14, so that the whole way is walked without a GPU.
"""

import importlib
import importlib.util
import pickle
import subprocess
import sys
import types
from types import SimpleNamespace

import emulator
import numpy as np
import posing_cupy
import pytest
from compare import assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, uniform
from test_engine import OnDevice, device  # noqa: F401  a fixture

from cuconv.compat import cudnn
from cuconv.cuda import runtime

pytestmark = [
    pytest.mark.bridges,
    pytest.mark.skipif(importlib.util.find_spec("sigpy") is None, reason="sigpy is not installed"),
]

BRIDGE = "cuconv.compat.sigpy"
FUNCTIONS = ("convolution_forward", "convolution_backward_data", "convolution_backward_filter")
COMPLEX = ("directly", "with four real ones")


def on_cpu(array):
    return np.asarray(array.get() if hasattr(array, "get") else array)


def enabled(cupy, how=COMPLEX[0]):
    """sigpy after `enable`, imported anew: at work on arrays of `cupy`."""
    bridge = importlib.import_module(BRIDGE)
    sigpy = importlib.import_module("sigpy")
    importlib.import_module("sigpy.mri.app")
    assert not sigpy.config.cudnn_enabled, "as with CuPy 14"
    assert bridge.enable() is True
    if how != COMPLEX[0]:
        with bridge._lent("cupy.cudnn", cudnn):
            importlib.reload(sigpy.conv)
        assert sigpy.conv._complex is not bridge._complex
    return SimpleNamespace(sigpy=sigpy, bridge=bridge, how=how)


@pytest.fixture(scope="module", params=COMPLEX)
def gpu(request):
    cupy = posing_cupy.module()
    with posing_cupy.installed(cupy, "sigpy", BRIDGE), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "is_device_array", lambda array: False)  # they are NumPy's to us
        yield enabled(cupy, request.param)


@pytest.fixture
def cupy14(monkeypatch):
    """Nothing of sigpy imported, and a CuPy without cuDNN."""
    cupy = posing_cupy.module()
    monkeypatch.setattr(runtime, "is_device_array", lambda array: False)
    with posing_cupy.installed(cupy, "sigpy", BRIDGE):
        yield cupy


def compare(gpu, data, filt, terms, dtype, mode, strides, multi_channel, kind=posing_cupy.Posing):
    """The three functions on arrays of both kinds; the adjoints on a random output."""
    sp = gpu.sigpy
    far, near = data.view(kind), filt.view(kind)
    options = {"mode": mode, "strides": strides, "multi_channel": multi_channel}
    found = sp.convolve(far, near, **options)
    assert isinstance(found, kind)
    expected = sp.convolve(data, filt, **options)
    close = {"dtype": dtype, "terms": terms, "roundings": 4}
    assert_close(on_cpu(found), expected, what="convolve", **close)
    output = uniform(np.random.default_rng(1), expected.shape, dtype)
    found = sp.convolve_data_adjoint(output.view(kind), near, data.shape, **options)
    expected = sp.convolve_data_adjoint(output, filt, data.shape, **options)
    assert_close(on_cpu(found), expected, what="convolve_data_adjoint", **close)
    found = sp.convolve_filter_adjoint(output.view(kind), far, filt.shape, **options)
    expected = sp.convolve_filter_adjoint(output, data, filt.shape, **options)
    assert_close(on_cpu(found), expected, what="convolve_filter_adjoint", **close)


def arrays(dtype, batch, sizes, taps, channels, seed=0):
    rng = np.random.default_rng(seed)
    c, f = channels or ((), ())
    return uniform(rng, (*batch, *c, *sizes), dtype), uniform(rng, (*f, *c, *taps), dtype)


# --- Against SciPy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("mode", ["full", "valid"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_answers_are_scipys(gpu, rank, mode, dtype):
    sizes, taps, strides = (9, 7, 6)[:rank], (3, 2, 4)[:rank], (2, 1, 3)[:rank]
    for channels, batch, steps in (
        (None, (), None),
        (None, (2, 2), strides),
        (((3,), (2,)), (2,), None),
        (((3,), (2,)), (), strides),
    ):
        data, filt = arrays(dtype, batch, sizes, taps, channels)
        compare(gpu, data, filt, 500, dtype, mode, steps, channels is not None)


@st.composite
def problems(draw):
    rank = draw(st.sampled_from((1, 2, 3)))
    taps = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    sizes = tuple(k + draw(st.integers(0, 5)) for k in taps)
    strides = draw(st.none() | st.tuples(*[st.integers(1, 3)] * rank))
    channels = draw(st.none() | st.tuples(*[st.tuples(st.integers(1, 3))] * 2))
    batch = draw(st.sampled_from(((), (1,), (3,), (2, 2))))
    mode = draw(st.sampled_from(("full", "valid")))
    return arrays("complex128", batch, sizes, taps, channels, draw(st.integers(0, 99))), mode, strides, channels


@given(problem=problems())
@examples(60)
def test_any_shape(gpu, problem):
    (data, filt), mode, strides, channels = problem
    compare(gpu, data, filt, 500, "complex128", mode, strides, channels is not None)


def test_a_filter_longer_than_the_data(gpu):
    data, filt = arrays("complex64", (2,), (3, 4), (5, 7), None)
    compare(gpu, data, filt, 100, "complex64", "full", (1, 2), False)


@pytest.mark.parametrize("dtype, factor", [("complex64", "float32"), ("complex128", "float64")])
def test_a_real_filter_of_complex_data(gpu, dtype, factor):
    data, filt = arrays(dtype, (2,), (8, 7), (3, 3), None)[0], arrays(factor, (), (8, 7), (3, 3), None)[1]
    compare(gpu, data, filt, 100, dtype, "valid", None, False)


def test_a_wavelet_of_one_dimension_with_a_stride(gpu):
    """mikgroup/sigpy#119: it worked on NumPy arrays and failed in cuDNN."""
    signal = np.zeros((1, 32), np.float32)
    signal[:, 15:24] = 1
    haar = np.array([[[1, 1]], [[1, -1]]], np.float32).view(posing_cupy.Posing)
    wavelet = gpu.sigpy.linop.ConvolveData((1, 32), haar, strides=(2,), multi_channel=True, mode="valid")
    found = on_cpu(wavelet * signal.view(posing_cupy.Posing))
    pairs = signal.reshape(16, 2).astype(float)
    np.testing.assert_array_equal(found, [pairs[:, 0] + pairs[:, 1], pairs[:, 1] - pairs[:, 0]])


# --- Operators and an app ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "valid"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_adjoint_operators_are_adjoint(gpu, rank, mode):
    sizes, taps, strides = (9, 7, 6)[:rank], (3, 2, 4)[:rank], (2, 1, 3)[:rank]
    data, filt = (each.view(posing_cupy.Posing) for each in arrays("complex128", (2,), sizes, taps, ((3,), (2,))))
    options = {"mode": mode, "strides": strides, "multi_channel": True}
    for operator, x in (
        (gpu.sigpy.linop.ConvolveData(data.shape, filt, **options), data),
        (gpu.sigpy.linop.ConvolveFilter(filt.shape, data, **options), filt),
    ):
        y = uniform(np.random.default_rng(2), operator.oshape, "complex128").view(posing_cupy.Posing)
        forward, back = on_cpu(operator * x), on_cpu(operator.H * y)
        inner = np.vdot(on_cpu(y), forward)
        assert abs(inner.imag) > 0.1
        np.testing.assert_allclose(np.vdot(back, on_cpu(x)), inner, rtol=1e-10)
        np.testing.assert_allclose(on_cpu(operator.H.H * x), forward, rtol=1e-12)


def test_complex_arrays_take_one_convolution(gpu, monkeypatch):
    """Or sigpy's four."""
    calls = noted(monkeypatch)
    data, filt = (each.view(posing_cupy.Posing) for each in arrays("complex64", (2,), (8, 7), (3, 3), None))
    output = gpu.sigpy.convolve(data, filt)
    gpu.sigpy.convolve_data_adjoint(output, filt, data.shape)
    gpu.sigpy.convolve_filter_adjoint(output, data, filt.shape)
    times = 1 if gpu.how == COMPLEX[0] else 4
    assert calls == [name for name in FUNCTIONS for _ in range(times)]


def noted(monkeypatch):
    """The names of our functions, as they are called from now on."""
    calls = []

    def noting(name):
        function = getattr(cudnn, name)
        return lambda *given, **keywords: calls.append(name) or function(*given, **keywords)

    for name in FUNCTIONS:
        monkeypatch.setattr(cudnn, name, noting(name))
    return calls


def test_an_app_recovers_the_same_maps(gpu, monkeypatch):
    """JSENSE, the app of mikgroup/sigpy#151: convolutions in every step, and their adjoints."""
    app, calls = importlib.import_module("sigpy.mri.app"), noted(monkeypatch)
    kspace = uniform(np.random.default_rng(3), (3, 16, 12), "complex64")
    options = {"mps_ker_width": 4, "ksp_calib_width": 8, "max_iter": 3, "max_inner_iter": 4, "show_pbar": False}
    expected = app.JsenseRecon(kspace, **options).run()
    assert not calls
    found = app.JsenseRecon(kspace.view(posing_cupy.Posing), device=gpu.sigpy.Device(0), **options).run()
    assert set(calls) == set(FUNCTIONS)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(on_cpu(found), expected, atol=2e-4)


# --- What `enable` changes, and what not ---------------------------------------------------------------------------


def test_without_it_cupy_14_has_no_convolution(cupy14):
    sigpy = importlib.import_module("sigpy")
    data, filt = np.ones((4, 8, 8), np.float32).view(posing_cupy.Posing), np.ones((3, 3), np.float32)
    for call in (
        lambda: sigpy.convolve(data, filt),
        lambda: sigpy.convolve_data_adjoint(data, filt, (4, 6, 6)),
        lambda: sigpy.convolve_filter_adjoint(data, data[:, :6, :6], (3, 3)),
    ):
        with pytest.raises(RuntimeError, match="cudnn must be installed"):
            call()


def test_functions_imported_before_it_work_after_it(cupy14):
    from sigpy import convolve

    kept = vars(importlib.import_module("sigpy")).copy()
    data, filt = (np.ones(shape, np.float32).view(posing_cupy.Posing) for shape in ((4, 8, 8), (3, 3)))
    enabled(cupy14)
    assert convolve(data, filt).shape == (4, 10, 10)
    sigpy = sys.modules["sigpy"]
    assert all(value is getattr(sigpy, name) for name, value in kept.items())
    for name in sigpy.conv.__all__:
        function = getattr(sigpy, name)
        assert function is getattr(sigpy.conv, name) is pickle.loads(pickle.dumps(function))


def test_no_other_library_finds_a_cudnn(cupy14):
    enabled(cupy14)
    assert "cupy.cudnn" not in sys.modules and not hasattr(cupy14, "cudnn")
    assert importlib.util.find_spec("cupy.cuda.cudnn") is None
    with pytest.raises(ImportError):
        from cupy import cudnn  # noqa: F401


def test_it_may_be_called_again(cupy14):
    found = enabled(cupy14)
    before = found.sigpy.conv.convolve
    assert found.bridge.enable() is True and found.sigpy.conv.convolve is before
    data, filt = arrays("complex64", (), (5,), (2,), None)
    compare(found, data, filt, 10, "complex64", "full", None, False)


def test_numpy_arrays_go_where_they_went(gpu, monkeypatch):
    def unwanted(*_, **__):
        raise AssertionError("an array of NumPy")

    for name in FUNCTIONS:
        monkeypatch.setattr(cudnn, name, unwanted)
    assert type(gpu.sigpy.convolve(np.ones(4), np.ones(2))) is np.ndarray
    with pytest.raises(AssertionError, match="an array of NumPy"):
        gpu.sigpy.convolve(np.ones(4).view(posing_cupy.Posing), np.ones(2).view(posing_cupy.Posing))


def test_where_cupy_13_has_one_ours_is_used(cupy14):
    theirs = types.ModuleType("cupy.cudnn")
    cupy14.cudnn = sys.modules["cupy.cudnn"] = theirs
    found = enabled(cupy14)
    assert found.sigpy.conv.cudnn is cudnn and sys.modules["cupy.cudnn"] is theirs is cupy14.cudnn


def test_without_cupy_there_is_nothing_to_do():
    code = (
        "import sys; sys.modules['cupy'] = None\n"
        "from cuconv.compat.sigpy import conv, config, enable\n"
        "before = vars(conv).copy()\n"
        "print(enable(), vars(conv) == before, config.cudnn_enabled)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("False True False\n", 0), done.stderr


def test_arrays_of_two_dtypes_are_refused(gpu):
    data, filt = np.ones(4, np.float32).view(posing_cupy.Posing), np.ones(2).view(posing_cupy.Posing)
    with pytest.raises(TypeError, match=r"x.dtype=float32, W.dtype=float64"):
        gpu.sigpy.convolve(data, filt)


# --- Through the kernels -------------------------------------------------------------------------------------------


@pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
@pytest.mark.parametrize("dtype, rank", [("complex64", 1), ("float32", 2)])
def test_the_kernels_compute_it(dtype, rank, device, monkeypatch):  # noqa: F811
    monkeypatch.setattr(OnDevice, "get", lambda self: np.array(self), raising=False)
    cupy = posing_cupy.module(OnDevice)
    sizes, taps, strides = (9, 7)[:rank], (3, 2)[:rank], (2, 1)[:rank]
    with posing_cupy.installed(cupy, "sigpy", BRIDGE):
        data, filt = arrays(dtype, (2,), sizes, taps, ((3,), (2,)))
        compare(enabled(cupy), data, filt, 100, dtype, "full", strides, True, OnDevice)
    assert len(device.runtime.launches) >= 3


@pytest.mark.gpu
@pytest.mark.skipif(not runtime.probe().usable, reason=runtime.probe().reason)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_answers_on_a_gpu_are_scipys(rank, dtype):
    sigpy = importlib.import_module("sigpy")
    assert importlib.import_module(BRIDGE).enable() is True
    data, filt = arrays(dtype, (2,), (9, 7, 6)[:rank], (3, 2, 4)[:rank], ((3,), (2,)))
    options = {"strides": (2, 1, 3)[:rank], "multi_channel": True}
    output = uniform(np.random.default_rng(1), sigpy.convolve(data, filt, **options).shape, dtype)
    for function, *given_ in (
        (sigpy.convolve, data, filt),
        (sigpy.convolve_data_adjoint, output, filt, data.shape),
        (sigpy.convolve_filter_adjoint, output, data, filt.shape),
    ):
        there = [runtime.device_array(each) if isinstance(each, np.ndarray) else each for each in given_]
        found = function(*there, **options).get()
        assert_close(found, function(*given_, **options), dtype=dtype, terms=500, roundings=4)
