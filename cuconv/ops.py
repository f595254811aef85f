"""Convolutions and their gradients on arrays.

The arrays decide the place: NumPy in, NumPy out, on the CPU; CuPy in, CuPy out, on the GPU that holds them, on CuPy's
current stream. Nothing moves between the two by itself. All arrays of one call have one dtype: float16, float32,
float64, bfloat16 (of ml_dtypes), complex64 or complex128; the 16-bit types are summed in float32. Shapes, in
channels_last ("channels_first" has the channels on axis 1; None means channels_last):

====================  ============================  ===============================================
operation             x -> y                        kernel
====================  ============================  ===============================================
conv                  [B, L.., C] -> [B, P.., F]    [taps.., C / groups, F]
conv_transpose        [B, L.., C] -> [B, P.., F]    [taps.., F / groups, C]
depthwise_conv        [B, L.., C] -> [B, P.., C*M]  [taps.., C, M]
separable_conv        [B, L.., C] -> [B, P.., F]    [taps.., C, M] and [1.., C * M, F]
====================  ============================  ===============================================

Arguments that every convolution shares:

* `strides`, `dilation_rate`: an integer >= 1, or one per spatial axis; any with any.
* `padding`: "valid", "same", "causal" (one spatial axis, not transposed), or a (before, after) pair per spatial axis,
  added to the input of a convolution and cropped from the full product of a transposed one.
* `activation`: None, a name of :mod:`cuconv.activations`, or a callable; applied after the bias.
* `precision`: of float32 where a GPU's tensor cores compute. "highest": no less exact than the ordinary units; "high":
  factors are rounded to TF32, 11 significant bits, with a relative error of 2^-11 at most; what is so close to the
  largest float that it would be rounded up from there may become infinite.
* `out`: the array to fill, of the result's shape and dtype, any strides, overlapping no input.
* `workspace`: bytes of scratch memory the call may use; None means 64 MiB. On a GPU, copies of arrays that are not in
  one piece and repacked kernels of transposed convolutions come on top.

Gradients follow the adjoint convention: the gradient of x is computed with the conjugated kernel, that of the kernel
with the conjugated x. They are deterministic: the same bits on every call.

Errors: ValueError for shapes and options, TypeError for dtypes and arrays of an unknown kind, before anything is
written.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import ml_dtypes
import numpy as np

from cuconv import activations, geometry, reference
from cuconv.cuda import runtime
from cuconv.cuda.engine import Engine
from cuconv.cuda.prepared import Known, Prepared
from cuconv.cuda.tape import Outline, Recorder
from cuconv.explain import Explanation, steps_of
from cuconv.geometry import ConvShape, halo
from cuconv.plan.devices import device as device_named
from cuconv.plan.reference import DEFAULT_WORKSPACE
from cuconv.plan.types import DeviceLimits, PlanError

__all__ = [
    "asarray",
    "bias_grad",
    "conv",
    "conv_input_grad",
    "conv_kernel_grad",
    "conv_lstm_step",
    "conv_lstm_step_grad",
    "conv_transpose",
    "conv_transpose_input_grad",
    "conv_transpose_kernel_grad",
    "depthwise_conv",
    "depthwise_conv_grad",
    "depthwise_conv_input_grad",
    "depthwise_conv_kernel_grad",
    "explain",
    "halo",
    "like",
    "prepare",
    "separable_conv",
    "separable_conv_input_grad",
    "separable_conv_kernel_grad",
    "to_numpy",
    "upsample",
    "upsample_input_grad",
]

Array = Any  # numpy.ndarray, or cupy.ndarray where a GPU engine is present
Padding = str | Sequence[int] | Sequence[Sequence[int]]
Sizes = int | Sequence[int]

DTYPES = tuple(map(np.dtype, (np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.complex64, np.complex128)))
_DTYPES = frozenset(DTYPES)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos3", "lanczos5")
PRECISIONS = ("highest", "high")

logger = logging.getLogger("cuconv")


# --- Placing -----------------------------------------------------------------------------------------------------


def asarray(x: Any, dtype: Any = None) -> Array:
    """`x` as an array where cuconv computes: on the GPU where one is usable, else a NumPy array.

    The first call says which it is and why, through the logger "cuconv"; ``cuconv doctor`` says it in full.

    Raises:
        TypeError: `x` does not hold numbers.
    """
    _announce()
    if runtime.is_gpu_array(x):
        return x if dtype is None else x.astype(dtype, copy=False)
    array = np.asarray(x, dtype)
    if array.dtype.kind in "OSUMm":
        raise TypeError(f"`x` must hold numbers. Received: an array of dtype {array.dtype}")
    return runtime.device_array(array) if runtime.probe().usable else array


@functools.lru_cache(maxsize=1)
def _announce() -> None:
    found = runtime.probe()
    # A GPU that is there and not used is worth a warning; on a machine without one, silence.
    level = logging.WARNING if found.devices and not found.usable else logging.INFO
    logger.log(level, "cuconv computes with %s: %s", "CuPy" if found.usable else "NumPy", found.reason)


def like(array: Array, reference: Array) -> Array:
    """`array` where `reference` lives; the same array if it is there already."""
    if isinstance(reference, np.ndarray):
        return to_numpy(array)
    if type(reference) is Outline:
        return reference.recorder.argument(array.shape, array.dtype)
    return runtime.device_array(array, reference.device.id) if isinstance(array, np.ndarray) else array


def to_numpy(array: Array) -> np.ndarray:
    """`array` as a NumPy array; a NumPy array as it is."""
    return array if isinstance(array, np.ndarray) else array.get()


Function = TypeVar("Function", bound=Callable[..., Any])
_OPERATIONS: dict[str, Callable[..., Any]] = {}  # the functions here that compute


def _operation(function: Function) -> Function:
    """A function that computes where its arrays are.

    On a GPU, what it does is written down at the first call and played again at the next ones with such arrays.
    """
    known = Known(function)

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if arguments and type(arguments[0]) is np.ndarray:
            return function(*arguments, **keywords)
        return known(arguments, keywords)

    _OPERATIONS[function.__name__] = call
    return cast(Function, call)


# --- Convolution -------------------------------------------------------------------------------------------------


@_operation
def conv(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    groups: int = 1,
    activation: Any = None,
    precision: str = "highest",
    out: Array | None = None,
    workspace: int | None = None,
) -> Array:
    """The convolution (cross-correlation) of x [B, L.., C] with w [taps.., C / groups, F], [B, P.., F]."""
    engine = _engine(x, w, bias)
    shape = _geometry(geometry.conv_shape, x.shape, w.shape, strides, padding, data_format, dilation_rate, groups)
    run = functools.partial(engine.conv, precision=precision)
    return _forward(
        engine, run, shape, shape.y_shape, shape.filters, x, (w,), bias, activation, precision, out, workspace
    )


@_operation
def conv_input_grad(
    dy: Array,
    w: Array,
    input_shape: Sequence[int],
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    groups: int = 1,
    precision: str = "highest",
    out: Array | None = None,
    workspace: int | None = None,
) -> Array:
    """The gradient of :func:`conv` by x, of `input_shape`, from dy [B, P.., F]."""
    engine = _engine(dy, w)
    shape = _geometry(geometry.conv_shape, input_shape, w.shape, strides, padding, data_format, dilation_rate, groups)
    _expect("dy", dy, shape.y_shape)
    out, bytes_ = _prepare(engine, out, shape.x_shape, dy, precision, workspace, dy, w)
    engine.conv_transpose(shape, dy, w.conj(), None, None, out, bytes_, precision)
    return out


@_operation
def conv_kernel_grad(
    x: Array,
    dy: Array,
    kernel_shape: Sequence[int],
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    groups: int = 1,
    precision: str = "highest",
    out: Array | None = None,
    workspace: int | None = None,
) -> Array:
    """The gradient of :func:`conv` by w, of `kernel_shape`, from dy [B, P.., F]."""
    engine = _engine(x, dy)
    shape = _geometry(geometry.conv_shape, x.shape, kernel_shape, strides, padding, data_format, dilation_rate, groups)
    _expect("dy", dy, shape.y_shape)
    out, bytes_ = _prepare(engine, out, shape.w_shape, x, precision, workspace, x, dy)
    engine.kernel_grad(shape, x, dy, out, bytes_, precision)
    return out


# --- Transposed convolution --------------------------------------------------------------------------------------


@_operation
def conv_transpose(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    output_padding: Sizes | None = None,
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    groups: int = 1,
    activation: Any = None,
    precision: str = "highest",
    out: Array | None = None,
    workspace: int | None = None,
) -> Array:
    """The transposed convolution of x [B, L.., C] with w [taps.., F / groups, C], [B, P.., F].

    The full product ``z[i * stride + r * dilation] += x[i] @ w[r].T`` is cropped to the output length by Keras' rules.
    """
    engine = _engine(x, w, bias)
    shape = _geometry(
        geometry.transpose_shape, x.shape, w.shape, strides, padding, data_format, dilation_rate, groups, output_padding
    )
    run = functools.partial(engine.conv_transpose, precision=precision)
    return _forward(
        engine, run, shape, shape.x_shape, shape.in_channels, x, (w,), bias, activation, precision, out, workspace
    )


@_operation
def conv_transpose_input_grad(
    dy: Array,
    w: Array,
    input_shape: Sequence[int],
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    output_padding: Sizes | None = None,
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    groups: int = 1,
    precision: str = "highest",
    out: Array | None = None,
    workspace: int | None = None,
) -> Array:
    """The gradient of :func:`conv_transpose` by x, of `input_shape`, from dy [B, P.., F]."""
    engine = _engine(dy, w)
    shape = _geometry(
        geometry.transpose_shape,
        input_shape,
        w.shape,
        strides,
        padding,
        data_format,
        dilation_rate,
        groups,
        output_padding,
    )
    _expect("dy", dy, shape.x_shape)
    out, bytes_ = _prepare(engine, out, shape.y_shape, dy, precision, workspace, dy, w)
    engine.conv(shape, dy, w.conj(), None, None, out, bytes_, precision)
    return out


@_operation
def conv_transpose_kernel_grad(
    x: Array,
    dy: Array,
    kernel_shape: Sequence[int],
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    output_padding: Sizes | None = None,
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    groups: int = 1,
    precision: str = "highest",
    out: Array | None = None,
    workspace: int | None = None,
) -> Array:
    """The gradient of :func:`conv_transpose` by w, of `kernel_shape`, from dy [B, P.., F]."""
    engine = _engine(x, dy)
    shape = _geometry(
        geometry.transpose_shape,
        x.shape,
        kernel_shape,
        strides,
        padding,
        data_format,
        dilation_rate,
        groups,
        output_padding,
    )
    _expect("dy", dy, shape.x_shape)
    out, bytes_ = _prepare(engine, out, shape.w_shape, x, precision, workspace, x, dy)
    engine.kernel_grad(shape, dy, x, out, bytes_, precision)
    if out.dtype.kind == "c":  # the roles of input and output are exchanged, and with them what is conjugated
        np.conjugate(out, out=out)
    return out


# --- Depthwise and separable convolution -------------------------------------------------------------------------


@_operation
def depthwise_conv(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    activation: Any = None,
    precision: str = "highest",
    out: Array | None = None,
    workspace: int | None = None,
) -> Array:
    """The depthwise convolution of x [B, L.., C] with w [taps.., C, M], [B, P.., C * M].

    Output channel ``c * M + m`` reads channel c.
    """
    engine = _engine(x, w, bias)
    shape = _geometry(geometry.depthwise_shape, x.shape, w.shape, strides, padding, data_format, dilation_rate)
    run = engine.depthwise_conv
    return _forward(
        engine, run, shape, shape.y_shape, shape.filters, x, (w,), bias, activation, precision, out, workspace
    )


@_operation
def depthwise_conv_input_grad(
    dy: Array,
    w: Array,
    input_shape: Sequence[int],
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    precision: str = "highest",
    out: Array | None = None,
    workspace: int | None = None,
) -> Array:
    """The gradient of :func:`depthwise_conv` by x, of `input_shape`, from dy [B, P.., C * M]."""
    engine = _engine(dy, w)
    shape = _geometry(geometry.depthwise_shape, input_shape, w.shape, strides, padding, data_format, dilation_rate)
    _expect("dy", dy, shape.y_shape)
    out, bytes_ = _prepare(engine, out, shape.x_shape, dy, precision, workspace, dy, w)
    engine.depthwise_transpose(shape, dy, w.conj(), out, bytes_)
    return out


@_operation
def depthwise_conv_kernel_grad(
    x: Array,
    dy: Array,
    kernel_shape: Sequence[int],
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    precision: str = "highest",
    out: Array | None = None,
    workspace: int | None = None,
) -> Array:
    """The gradient of :func:`depthwise_conv` by w, of `kernel_shape`, from dy [B, P.., C * M]."""
    engine = _engine(x, dy)
    shape = _geometry(geometry.depthwise_shape, x.shape, kernel_shape, strides, padding, data_format, dilation_rate)
    _expect("dy", dy, shape.y_shape)
    out, bytes_ = _prepare(engine, out, tuple(kernel_shape), x, precision, workspace, x, dy)
    engine.depthwise_kernel_grad(shape, x, dy, out, bytes_)
    return out


@_operation
def depthwise_conv_grad(
    x: Array,
    w: Array,
    dy: Array,
    *,
    use_bias: bool = True,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    precision: str = "highest",
    workspace: int | None = None,
) -> tuple[Array, Array, Array | None]:
    """The gradients (dx, dw, dbias) of :func:`depthwise_conv` from dy [B, P.., C * M], read once for all three.

    Without `use_bias`, dbias is None.
    """
    engine = _engine(x, w, dy)
    shape = _geometry(geometry.depthwise_shape, x.shape, w.shape, strides, padding, data_format, dilation_rate)
    _expect("dy", dy, shape.y_shape)
    dx, bytes_ = _prepare(engine, None, shape.x_shape, x, precision, workspace)
    dw = engine.empty(w.shape, w.dtype)
    dbias = engine.empty((shape.filters,), w.dtype) if use_bias else None
    engine.depthwise_grads(shape, x, w.conj(), dy, dx, dw, dbias, bytes_)
    return dx, dw, dbias


@_operation
def separable_conv(
    x: Array,
    depthwise_w: Array,
    pointwise_w: Array,
    bias: Array | None = None,
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    activation: Any = None,
    precision: str = "highest",
    out: Array | None = None,
    workspace: int | None = None,
) -> Array:
    """The depthwise convolution of x [B, L.., C] with [taps.., C, M], then the pointwise one with [1.., C * M, F].

    Strides, padding and dilation are those of the depthwise part; bias and activation come once, at the end.
    """
    engine = _engine(x, depthwise_w, pointwise_w, bias)
    shape = _geometry(
        geometry.depthwise_shape, x.shape, depthwise_w.shape, strides, padding, data_format, dilation_rate
    )
    filters = _pointwise_filters(shape, pointwise_w)
    y_shape = geometry.join_shape(shape.batch, shape.out_size, filters, shape.data_format)
    kernels = (depthwise_w, pointwise_w)
    run = functools.partial(engine.separable_conv, precision=precision)
    return _forward(engine, run, shape, y_shape, filters, x, kernels, bias, activation, precision, out, workspace)


@_operation
def separable_conv_input_grad(
    dy: Array,
    depthwise_w: Array,
    pointwise_w: Array,
    input_shape: Sequence[int],
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    precision: str = "highest",
    out: Array | None = None,
    workspace: int | None = None,
) -> Array:
    """The gradient of :func:`separable_conv` by x, of `input_shape`, from dy [B, P.., F]."""
    engine = _engine(dy, depthwise_w, pointwise_w)
    shape = _geometry(
        geometry.depthwise_shape, input_shape, depthwise_w.shape, strides, padding, data_format, dilation_rate
    )
    filters = _pointwise_filters(shape, pointwise_w)
    _expect("dy", dy, geometry.join_shape(shape.batch, shape.out_size, filters, shape.data_format))
    out, bytes_ = _prepare(engine, out, shape.x_shape, dy, precision, workspace, dy, depthwise_w, pointwise_w)
    engine.separable_input_grad(shape, dy, depthwise_w.conj(), pointwise_w.conj(), out, bytes_, precision)
    return out


@_operation
def separable_conv_kernel_grad(
    x: Array,
    dy: Array,
    depthwise_w: Array,
    pointwise_w: Array,
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    precision: str = "highest",
    workspace: int | None = None,
) -> tuple[Array, Array]:
    """The gradients of :func:`separable_conv` by both kernels, from dy [B, P.., F]."""
    engine = _engine(x, dy, depthwise_w, pointwise_w)
    shape = _geometry(
        geometry.depthwise_shape, x.shape, depthwise_w.shape, strides, padding, data_format, dilation_rate
    )
    filters = _pointwise_filters(shape, pointwise_w)
    _expect("dy", dy, geometry.join_shape(shape.batch, shape.out_size, filters, shape.data_format))
    depthwise_out, bytes_ = _prepare(engine, None, depthwise_w.shape, x, precision, workspace)
    pointwise_out, _ = _prepare(engine, None, pointwise_w.shape, x, precision, workspace)
    outs = depthwise_out, pointwise_out
    engine.separable_kernel_grad(shape, x, dy, depthwise_w, pointwise_w, *outs, bytes_, precision)
    return depthwise_out, pointwise_out


@_operation
def bias_grad(
    dy: Array, *, data_format: str | None = None, out: Array | None = None, workspace: int | None = None
) -> Array:
    """The gradient of a bias, [F], from dy [B, P.., F]: its sum over everything but the channels."""
    engine = _engine(dy)
    if dy.ndim < 2:
        raise ValueError(f"`dy` must have at least 2 axes. Received: dy.shape={dy.shape}")
    data_format = geometry.normalize_data_format(data_format)
    _, _, filters = geometry.split_shape(dy.shape, data_format)
    out, bytes_ = _prepare(engine, out, (filters,), dy, "highest", workspace, dy)
    engine.bias_grad(dy, data_format, out, bytes_)
    return out


# --- Upsampling --------------------------------------------------------------------------------------------------


@_operation
def upsample(
    x: Array, size: Sizes, *, interpolation: str = "nearest", data_format: str | None = None, out: Array | None = None
) -> Array:
    """x [B, L.., C] enlarged `size` times per spatial axis, [B, L * size.., C].

    Args:
        interpolation: "nearest" (any dtype), "bilinear", "bicubic" (Keys' kernel, a = -3/4), "lanczos3" or "lanczos5";
        half-pixel
            centres, corners not aligned.
    """
    engine, factors, data_format = _upsampling(x, size, interpolation, data_format)
    out = _output(engine, out, geometry.upsample_shape(x.shape, factors, data_format), x, x)
    if out.size:
        engine.upsample(x, factors, interpolation, data_format, out)
    return out


@_operation
def upsample_input_grad(
    dy: Array, size: Sizes, *, interpolation: str = "nearest", data_format: str | None = None, out: Array | None = None
) -> Array:
    """The gradient of :func:`upsample` by x, [B, L.., C], from dy [B, L * size.., C]."""
    engine, factors, data_format = _upsampling(dy, size, interpolation, data_format)
    batch, sizes, channels = geometry.split_shape(dy.shape, data_format)
    if any(length % factor for length, factor in zip(sizes, factors, strict=True)):
        raise ValueError(
            f"`dy` must have sizes that are multiples of `size` ({factors}). Received: dy.shape={dy.shape}"
        )
    small = tuple(length // factor for length, factor in zip(sizes, factors, strict=True))
    out = _output(engine, out, geometry.join_shape(batch, small, channels, data_format), dy, dy)
    if out.size:
        engine.upsample_input_grad(dy, factors, interpolation, data_format, out)
    return out


# --- Convolutional LSTM ------------------------------------------------------------------------------------------


@_operation
def conv_lstm_step(
    x: Array,
    h: Array,
    c: Array,
    w: Array | None,
    recurrent_w: Array | None,
    bias: Array | None = None,
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    activation: Any = "tanh",
    recurrent_activation: Any = "sigmoid",
) -> tuple[Array, Array]:
    """One step of a convolutional LSTM: the output and cell state (h, c) [B, P.., F] after it.

    Args:
        x: [B, L.., C]; with `w` None the input convolution itself, [B, P.., 4F] with its bias.
        h, c: the states before the step, [B, P.., F].
        w: [taps.., C, 4F], gates i, f, c, o.
        recurrent_w: [taps.., F, 4F]; its convolution is always "same", of stride 1. None: x holds that convolution too.
        bias: [4F].
        strides, padding, dilation_rate: of the input convolution.
    """
    convolution: dict[str, Any] = {"strides": strides, "padding": padding, "dilation_rate": dilation_rate}
    z, cell, recurrent = _lstm_sums(
        x, h, c, w, recurrent_w, bias, convolution, data_format, activation, recurrent_activation
    )
    engine = _engine(z, c)
    new_h, new_c = engine.empty(c.shape, c.dtype), engine.empty(c.shape, c.dtype)
    data_format = geometry.normalize_data_format(data_format)
    _gates_of(engine, cell, recurrent).gates(z, c, cell, recurrent, data_format, new_h, new_c)
    return new_h, new_c


@_operation
def conv_lstm_step_grad(
    x: Array,
    h: Array,
    c: Array,
    w: Array | None,
    recurrent_w: Array | None,
    bias: Array | None,
    dh: Array,
    dc: Array,
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    activation: Any = "tanh",
    recurrent_activation: Any = "sigmoid",
) -> tuple[Array, Array | None, Array, Array | None, Array | None, Array | None]:
    """The gradients (dx, dh, dc, dw, drecurrent_w, dbias) of :func:`conv_lstm_step` from those of its two results.

    Where `w` (or `recurrent_w`) is None, x holds the convolution and dx is the gradient of that; dw and dbias (or dh
    and drecurrent_w) are None.
    """
    convolution: dict[str, Any] = {"strides": strides, "padding": padding, "dilation_rate": dilation_rate}
    z, cell, recurrent = _lstm_sums(
        x, h, c, w, recurrent_w, bias, convolution, data_format, activation, recurrent_activation
    )
    engine = _engine(z, dh, dc)
    _expect("dh", dh, c.shape)
    _expect("dc", dc, c.shape)
    data_format = geometry.normalize_data_format(data_format)
    dz, dc_before = engine.empty(z.shape, z.dtype), engine.empty(c.shape, c.dtype)
    _gates_of(engine, cell, recurrent).gates_grad(z, c, dh, dc, cell, recurrent, data_format, dz, dc_before)
    dx, dh_before, dw, drecurrent_w, dbias = dz, None, None, None, None
    if recurrent_w is not None:
        dh_before = conv_input_grad(dz, recurrent_w, h.shape, padding="same", data_format=data_format)
        drecurrent_w = conv_kernel_grad(h, dz, recurrent_w.shape, padding="same", data_format=data_format)
    if w is not None:
        dx = conv_input_grad(dz, w, x.shape, data_format=data_format, **convolution)
        dw = conv_kernel_grad(x, dz, w.shape, data_format=data_format, **convolution)
        dbias = None if bias is None else bias_grad(dz, data_format=data_format)
    return dx, dh_before, dc_before, dw, drecurrent_w, dbias


def _gates_of(engine: Any, *functions: Any) -> Any:
    """The engine, or where it does not have the activations (softmax, a user's own) their array functions.

    On a GPU those are CuPy's: right, but several times the memory traffic.
    """
    return engine if all(map(engine.fuses, functions)) else reference


def _lstm_sums(
    x: Array,
    h: Array,
    c: Array,
    w: Array | None,
    recurrent_w: Array | None,
    bias: Array | None,
    convolution: dict[str, Any],
    data_format: str | None,
    activation: Any,
    recurrent_activation: Any,
) -> tuple[Array, Any, Any]:
    """The gates' sums z [B, p.., 4F] and both activations, all arguments checked."""
    _engine(x, h, c, w, recurrent_w, bias)
    cell, recurrent = (_activation(given, x.dtype) for given in (activation, recurrent_activation))
    if "glu" in (cell.name, recurrent.name):
        raise ValueError('an activation of a gate must keep its shape, which "glu" does not. Received: "glu"')
    if w is None and bias is not None:
        raise ValueError(
            "`bias` must be None where `w` is None: x holds the convolution with its bias already. Received: an array"
        )
    data_format = geometry.normalize_data_format(data_format)
    z = x if w is None else conv(x, w, bias, data_format=data_format, **convolution)
    batch, sizes, gates = geometry.split_shape(z.shape, data_format)
    filters = gates // 4
    if filters * 4 != gates:
        raise ValueError(f"the input convolution must have 4 * filters channels. Received: {gates}")
    states = geometry.join_shape(batch, sizes, filters, data_format)
    _expect("h", h, states)
    _expect("c", c, states)
    if recurrent_w is not None:
        if recurrent_w.shape[-2:] != (filters, 4 * filters):
            raise ValueError(
                f"`recurrent_w` must have the shape taps + {(filters, 4 * filters)}. "
                f"Received: recurrent_w.shape={recurrent_w.shape}"
            )
        z = z + conv(h, recurrent_w, padding="same", data_format=data_format)
    return z, cell, recurrent


# --- Looking ahead -----------------------------------------------------------------------------------------------


def explain(
    operation: str, *shapes: Any, dtype: Any = "float32", device: str | None = None, **options: Any
) -> Explanation:
    """What a call would do on a GPU, step by step, with its cost and the reasons; needs no GPU and no memory.

        print(explain("conv", (8, 16384, 128), (2, 128, 256), dtype="bfloat16", padding="causal", device="H200"))

    Args:
        operation: name of a function here that computes.
        shapes: its positional arguments, a shape in place of each array; None for a bias that is left out.
        dtype: of all arrays.
        device: a name of :data:`cuconv.plan.devices.DEVICES`; None is the GPU at hand, or "H200" where there is none.
        options: the keywords of the function.
    """
    call, given = _call_on_outlines(operation, shapes, options)
    recorder = Recorder(_limits_of(device))
    dtype = _known_dtype(dtype)
    outlines = [recorder.argument(shape, dtype) for _, shape in given]
    results = call(*outlines)
    several = isinstance(results, tuple)
    found = [each for each in (results if several else (results,)) if each is not None]
    names = [f"result {i}" if several else "result" for i in range(len(found))]
    steps = steps_of(recorder.steps, recorder.limits)
    return Explanation(
        operation=operation,
        dtype=dtype.name,
        device=recorder.limits,
        arrays=(*given, *zip(names, (each.shape for each in found), strict=True)),
        options=options,
        steps=steps,
        flops=sum(step.least_flops for step in steps),
        bytes=sum(each.nbytes for each in (*outlines, *found)),
    )


def prepare(
    operation: str, *shapes: Any, dtype: Any = "float32", device: int | None = None, **options: Any
) -> Prepared:
    """A call with everything decided, compiled and allocated but its arrays: ``prepared(x, w, out=y)``.

    With `out` it allocates nothing and can be captured in a CUDA graph; it is also the fastest way to call. Its scratch
    memory is its own, so one of its calls must have ended on the GPU before another stream starts the next.

    Args:
        operation: name of a function here that computes.
        shapes: its positional arguments, a shape in place of each array; None for a bias that is left out.
        dtype: of all arrays.
        device: number of a GPU; None is CuPy's current one.
        options: the keywords of the function, without `out`.

    Raises:
        PlanError: there is no GPU.
        ValueError: a function of the array library has a part in the call that needs new memory every time.
    """
    call, given = _call_on_outlines(operation, shapes, options)
    return Prepared(runtime.current(device), operation, call, given, _known_dtype(dtype))


def _call_on_outlines(
    operation: str, shapes: Sequence[Any], options: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[tuple[str, tuple[int, ...]], ...]]:
    """The call as a function of its arrays alone, and their names and shapes."""
    if operation not in _OPERATIONS:
        names = ", ".join(f'"{name}"' for name in _OPERATIONS)
        raise ValueError(f"`operation` must be one of {names}. Received: operation={operation!r}")
    function = _OPERATIONS[operation]
    parameters = inspect.signature(function).parameters.values()
    positional = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    needed = [each.name for each in positional if each.default is each.empty]
    if not len(needed) <= len(shapes) <= len(positional) or "out" in options:
        raise ValueError(
            f"`shapes` of {operation} are those of {', '.join(each.name for each in positional)}, "
            f"{len(needed)} of them at least, and `out` is none of its options. Received: shapes={shapes}, "
            f"options={options}"
        )
    given, arguments = [], list(shapes)
    for i, (parameter, shape) in enumerate(zip(positional, shapes, strict=False)):
        if str(parameter.annotation).startswith("Array") and (shape is not None or parameter.name in needed):
            arguments[i] = _an_array
            given.append((parameter.name, _as_shape(shape, parameter.name)))

    def call(*arrays: Array) -> Any:
        waiting = iter(arrays)
        return function(*(next(waiting) if each is _an_array else each for each in arguments), **options)

    return call, tuple(given)


_an_array = object()  # stands where an array goes


def _as_shape(value: Any, name: str) -> tuple[int, ...]:
    sizes = (
        tuple(map(geometry.as_int, value)) if isinstance(value, Sequence) and not isinstance(value, str) else (None,)
    )
    if any(size is None or size < 0 for size in sizes):
        raise ValueError(f"`{name}` must be given as a shape, a tuple of sizes >= 0. Received: {value!r}")
    return cast(tuple[int, ...], sizes)


def _known_dtype(dtype: Any) -> np.dtype:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found not in _DTYPES:
        names = ", ".join(f'"{each.name}"' for each in DTYPES)
        raise TypeError(f"`dtype` must be one of {names}. Received: dtype={dtype!r}")
    return cast(np.dtype, found)


def _limits_of(device: str | None) -> DeviceLimits:
    if device is not None:
        return device_named(device)
    return runtime.current().limits if runtime.probe().usable else device_named("H200")


# --- Checks ------------------------------------------------------------------------------------------------------


def _engine(first: Array, *others: Array | None) -> Any:
    """The engine for arrays of one place and one supported dtype: it has the functions of :mod:`cuconv.reference`."""
    arrays = [array for array in (first, *others) if array is not None]
    engine = _place(arrays)
    dtype = first.dtype
    for array in arrays:
        if array.dtype is not dtype and array.dtype != dtype:
            break
    else:
        if dtype in _DTYPES:
            return engine
    given = ", ".join(str(array.dtype) for array in arrays)
    raise TypeError(f"arrays must have one dtype of {', '.join(each.name for each in DTYPES)}. Received: {given}")


def _place(arrays: Sequence[Array]) -> Any:
    """The engine of the place where all of `arrays` live."""
    for array in arrays:
        if not isinstance(array, np.ndarray):
            break
    else:
        return _host_engine
    if all(type(array) is Outline for array in arrays):
        return arrays[0].recorder.engine
    on_gpu = any(map(runtime.is_gpu_array, arrays))
    if on_gpu and not runtime.probe().usable:
        raise PlanError(
            f"{runtime.probe().reason}, so arrays on a GPU cannot be computed with. Move them first: `cupy.asnumpy(x)`"
        )
    if all(map(runtime.is_device_array, arrays)):
        return _device_engine(runtime.of(arrays))
    kinds = ", ".join(f"{type(array).__module__.partition('.')[0]}.{type(array).__name__}" for array in arrays)
    advice = ""
    if on_gpu:
        advice = "; `cupy.asarray` shares the memory of other GPU arrays, `cuconv.ops.like` moves between CPU and GPU"
    raise TypeError(f"arrays must be NumPy arrays or CuPy arrays, all in one place{advice}. Received: {kinds}")


_host_engine: Any = reference


_device_engine = functools.cache(Engine)


def _geometry(rule: Callable[..., ConvShape], *arguments: Any) -> ConvShape:
    """The geometry by `rule`, remembered where every argument is spelled with plain integers, strings and tuples."""
    if all(map(_plain, arguments)):
        return _remembered(rule, *arguments)
    return _compute(rule, *arguments)


def _plain(value: Any) -> bool:
    kind = type(value)
    return kind in (int, str, type(None)) or (kind is tuple and all(map(_plain, value)))


def _compute(
    rule: Callable[..., ConvShape],
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    strides: Any,
    padding: Any,
    data_format: Any,
    dilation_rate: Any,
    *more: Any,
) -> ConvShape:
    extra = dict(zip(("groups", "output_padding"), more, strict=False))
    shape = rule(
        tuple(x_shape),
        tuple(w_shape),
        strides=strides,
        padding=padding,
        data_format=data_format,
        dilation_rate=dilation_rate,
        **extra,
    )
    if not shape.is_static:
        raise ValueError(f"every size must be known. Received: input shape={tuple(x_shape)}")
    return shape


_remembered = functools.lru_cache(maxsize=4096)(_compute)


def _forward(
    engine: Any,
    run: Callable[..., None],
    shape: ConvShape,
    y_shape: tuple[int, ...],
    filters: int,
    x: Array,
    kernels: tuple[Array, ...],
    bias: Array | None,
    activation: Any,
    precision: str,
    out: Array | None,
    workspace: int | None,
) -> Array:
    """Run one forward pass with bias and activation fused where the activation is pointwise."""
    if bias is not None:
        _expect("bias", bias, (filters,))
    function = None if activation is None else _activation(activation, x.dtype)
    if function is not None and not function.pointwise and out is not None:
        raise ValueError(
            f"`out` needs an activation that works element by element. Received: activation={activation!r}"
        )
    y, bytes_ = _prepare(engine, out, y_shape, x, precision, workspace, x, *kernels, bias)
    fused = function if function is not None and engine.fuses(function) else None
    run(shape, x, *kernels, bias, fused, y, bytes_)
    if function is None or function is fused or function.name == "linear":
        return y
    return function(y, out=y) if function.pointwise else function(y)


def _activation(activation: Any, dtype: np.dtype) -> Any:
    function = activations.get(activation)
    if dtype.kind == "c" and function.pointwise and function.name != "linear":
        raise TypeError(f"complex arrays have no activation but linear. Received: activation={activation!r}")
    return function


def _prepare(
    engine: Any,
    out: Array | None,
    shape: Sequence[int],
    like: Array,
    precision: str,
    workspace: int | None,
    *inputs: Array | None,
) -> tuple[Array, int]:
    """The output array and the bytes of scratch memory, once all options are checked."""
    if precision not in PRECISIONS:
        raise ValueError(f'`precision` must be "highest" or "high". Received: precision={precision!r}')
    if workspace is None:
        workspace = DEFAULT_WORKSPACE
    elif geometry.as_int(workspace) is None or workspace < 0:
        raise ValueError(f"`workspace` must be a number of bytes >= 0, or None. Received: workspace={workspace!r}")
    return _output(engine, out, shape, like, *inputs), workspace


def _output(engine: Any, out: Array | None, shape: Sequence[int], like: Array, *inputs: Array | None) -> Array:
    if out is None:
        return engine.empty(tuple(shape), like.dtype)
    if getattr(out, "dtype", None) != like.dtype or _place([out]) is not engine:
        given = getattr(out, "dtype", type(out).__name__)
        raise TypeError(f"`out` must be an array of dtype {like.dtype}, in the place of the others. Received: {given}")
    _expect("out", out, shape)
    broadcast = out.size > 0 and any(step == 0 and n > 1 for step, n in zip(out.strides, out.shape, strict=True))
    if not getattr(out.flags, "writeable", True) or broadcast:  # CuPy's arrays are all writeable
        raise ValueError(
            "`out` must be writeable, every element in its own place. Received: a read-only or broadcast array"
        )
    if any(array is not None and _overlap(out, array) for array in inputs):
        raise ValueError("`out` must not share memory with an input. Received: overlapping arrays")
    return out


def _overlap(a: Array, b: Array) -> bool:
    try:
        return np.shares_memory(_footprint(a), _footprint(b), max_work=10_000)  # type: ignore[arg-type]  # stubs: -1, 0
    except np.exceptions.TooHardError:  # strides so odd that to be sure would take long
        return True


def _footprint(array: Array) -> np.ndarray:
    """An array of bytes at the addresses that `array` has, wherever they are; only to be compared, never to be read."""
    if isinstance(array, np.ndarray) or array.size == 0:
        return array if isinstance(array, np.ndarray) else np.empty(0)
    if type(array) is Outline:
        return array.layout
    found = array.__cuda_array_interface__
    shape, strides = (*array.shape, array.dtype.itemsize), (*array.strides, 1)
    interface = {"data": found["data"], "shape": shape, "strides": strides, "typestr": "|u1", "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def _expect(name: str, array: Array, shape: Sequence[int | None]) -> None:
    if array.shape != tuple(shape):
        raise ValueError(f"`{name}` must have the shape {tuple(shape)}. Received: {name}.shape={array.shape}")


def _pointwise_filters(shape: ConvShape, pointwise_w: Array) -> int:
    """Filters of a pointwise kernel that fits behind the depthwise `shape`."""
    wanted = (*(1,) * shape.rank, shape.filters)
    if pointwise_w.shape[:-1] != wanted or pointwise_w.shape[-1] < 1:
        raise ValueError(
            f"`pointwise_w` must have the shape {wanted} + (filters,). Received: pointwise_w.shape={pointwise_w.shape}"
        )
    return int(pointwise_w.shape[-1])


def _upsampling(x: Array, size: Any, interpolation: str, data_format: Any) -> tuple[Any, tuple[int, ...], str]:
    data_format = geometry.normalize_data_format(data_format)
    if interpolation not in INTERPOLATIONS:
        names = ", ".join(f'"{name}"' for name in INTERPOLATIONS)
        raise ValueError(f"`interpolation` must be one of {names}. Received: interpolation={interpolation!r}")
    engine = _place([x]) if interpolation == "nearest" else _engine(x)  # nearest copies, so every dtype will do
    if not 3 <= x.ndim <= 2 + geometry.MAX_RANK:
        raise ValueError(f"`x` must have 3 to 5 axes: batch, spatial, channels. Received: x.shape={x.shape}")
    return engine, geometry.normalize_tuple(size, x.ndim - 2, "size"), data_format
