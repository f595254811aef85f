"""Which arrays the operations take, from where, and what they return."""

import contextlib
import logging
from functools import partial
from typing import ClassVar

import numpy as np
import oracle
import pytest
from compare import DTYPES, assert_close, dtype_of

import cuconv
from cuconv import activations, ops


def test_asarray_makes_arrays_of_anything():
    assert cuconv.asarray is ops.asarray
    for given in ([1.0, 2.0], (1.0, 2.0), np.array([1.0, 2.0])):
        assert ops.to_numpy(ops.asarray(given)).tolist() == [1, 2]
    for dtype in DTYPES:
        assert ops.asarray([1.0], dtype_of(dtype)).dtype == dtype_of(dtype)


def test_asarray_copies_only_where_it_must():
    x = np.ones(3)
    if isinstance(ops.asarray(x), np.ndarray):
        assert ops.asarray(x) is x
        assert ops.like(x, x) is x
    assert ops.to_numpy(x) is x


def test_asarray_says_once_where_and_why(caplog):
    ops._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="cuconv"):
        ops.asarray([1.0])
        ops.asarray([2.0])
    (record,) = caplog.records
    assert "cuconv computes with" in record.message


def test_operands_may_be_broadcast():
    """A gradient of ones is often one number seen many times."""
    x, w = np.broadcast_to(np.arange(5.0)[:, None], (2, 5, 3)), np.broadcast_to(0.5, (2, 3, 4))
    dy = np.broadcast_to(1.0, (2, 4, 4))
    assert_close(ops.conv(x, w), oracle.conv(x, w), dtype="float64", terms=6)
    dx, dw = ops.conv_input_grad(dy, w, x.shape), ops.conv_kernel_grad(x, dy, w.shape)
    assert_close(dx, oracle.conv_input_grad(dy, w, x.shape), dtype="float64", terms=8)
    assert_close(dw, oracle.conv_kernel_grad(x, dy, w.shape), dtype="float64", terms=8)
    assert_close(ops.upsample(x, 2), oracle.upsample(x, 2), dtype="float64", terms=1)


@pytest.mark.parametrize("shape", [(2, 6, 3), [2, 6, 3], np.array([2, 6, 3])], ids=["tuple", "list", "array"])
def test_shapes_may_be_any_sequence(shape):
    dy, w = np.ones((2, 5, 4)), np.ones((2, 3, 4))
    assert ops.conv_input_grad(dy, w, shape).shape == (2, 6, 3)
    assert ops.conv_kernel_grad(
        np.ones((2, 6, 3)), dy, type(shape)((2, 3, 4)) if isinstance(shape, list) else (2, 3, 4)
    ).shape


def test_results_are_new_contiguous_arrays():
    x, w = np.ones((2, 6, 3)), np.ones((1, 3, 3))
    functions = [partial(ops.conv, x, w), partial(ops.conv_transpose, x, w), partial(ops.upsample, x, 1)]
    for function in functions:
        y = function()
        assert y.flags.c_contiguous and y.flags.owndata and not np.may_share_memory(x, y)


def test_nothing_is_printed(capsys):
    ops.conv(np.ones((1, 3, 1)), np.ones((2, 1, 1)))
    assert capsys.readouterr() == ("", "")


def test_calls_happen_on_the_gpu_of_their_arrays(monkeypatch):
    """CuPy's own functions, which help out between kernels, compute on the GPU that is current."""
    entered = []

    class Gpu(contextlib.AbstractContextManager):
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *error):
            entered.append("out")

    class Elsewhere:
        __cuda_array_interface__: ClassVar = {}
        device = Gpu()

    monkeypatch.setattr(ops, "_place", lambda arrays: entered.append("computing") or 1 / 0)
    for call in (lambda: ops.conv(Elsewhere(), None), lambda: ops.conv(w=None, x=Elsewhere())):
        entered.clear()
        with pytest.raises(ZeroDivisionError):
            call()
        assert entered == ["in", "computing", "out"]


def test_halo_is_that_of_geometry():
    (axis,) = ops.halo(3, 1, 4, "causal")
    assert axis.input_range(10, 12) == (2, 12)


POINTWISE = {a.name for a in vars(activations).values() if isinstance(a, activations.Activation) and a.pointwise}
POINTWISE -= {"threshold"}  # needs arguments


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", sorted(POINTWISE))
def test_activations_in_place_on_strided_arrays(name, dtype):
    """Fused activations work in place on parts of arrays; NumPy's own negative(v, out=v) fails for some strides."""
    function = activations.get(name)
    x = np.linspace(-4, 4, 9).astype(dtype)
    expected = function(x).astype(np.float64)
    for step in (*range(1, 18), 32, 64, -1, -2, -4, -8):
        part = np.full(9 * abs(step), np.nan, dtype)[::step][:9]
        part[...] = x
        assert function(part, out=part) is part
        assert_close(part, expected, dtype=dtype, terms=1, what=f"every {step} elements")


def ones(*shape):
    return np.ones(shape)


# Each sums 4096 ones: in a 16-bit accumulator the sum would stop growing at 2048 (float16) or 256 (bfloat16).
LONG_SUMS = {
    "conv": (ops.conv, (ones(1, 64, 64), ones(64, 64, 1))),
    "conv_input_grad": (ops.conv_input_grad, (ones(1, 1, 4096), ones(1, 1, 4096), (1, 1, 1))),
    "conv_kernel_grad": (ops.conv_kernel_grad, (ones(1, 4096, 1), ones(1, 4096, 1), (1, 1, 1))),
    "conv_transpose": (ops.conv_transpose, (ones(1, 1, 4096), ones(1, 1, 4096))),
    "conv_transpose_kernel_grad": (ops.conv_transpose_kernel_grad, (ones(1, 4096, 1), ones(1, 4096, 1), (1, 1, 1))),
    "depthwise_conv": (ops.depthwise_conv, (ones(1, 64, 64, 1), ones(64, 64, 1, 1))),
    "depthwise_conv_kernel_grad": (ops.depthwise_conv_kernel_grad, (ones(1, 4096, 1), ones(1, 4096, 1), (1, 1, 1))),
    "separable_conv": (ops.separable_conv, (ones(1, 1, 4096), ones(1, 4096, 1), ones(1, 4096, 1))),
    "upsample_input_grad": (ops.upsample_input_grad, (ones(1, 64, 64, 1), 64)),
    "bias_grad": (ops.bias_grad, (ones(4096, 1, 1),)),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", LONG_SUMS)
def test_16_bit_types_are_summed_in_32(name, dtype):
    function, arguments = LONG_SUMS[name]
    y = function(*(a.astype(dtype_of(dtype)) if isinstance(a, np.ndarray) else a for a in arguments))
    assert set(np.unique(y.astype(float))) == {4096.0}


@pytest.mark.parametrize("name", ["conv", "depthwise_conv"])
def test_float16_sums_may_pass_through_what_float16_cannot_hold(name):
    """60000 + 60000 - 60000."""
    x, w = np.full((1, 3, 1), 60000, "float16"), np.array([1, 1, -1], "float16").reshape(3, 1, 1)
    assert getattr(ops, name)(x, w).item() == 60000
