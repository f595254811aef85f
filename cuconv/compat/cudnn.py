"""The three convolutions of CuPy 13's `cupy.cudnn` (and `cupyx.cudnn`), which CuPy 14 no longer has.

One line changes, and a second one where the layouts are named::

    from cuconv.compat import cudnn               # from cupy import cudnn
    from cuconv.compat import cudnn as libcudnn   # from cupy.cuda import cudnn as libcudnn

    cudnn.convolution_forward(x, W, b, y, (1, 1), (2, 2), (1, 1), 1, auto_tune=True, tensor_core="auto")

Names, order and required keywords of the arguments are CuPy's. The result is written into the array given for it, and
None is returned. sigpy, which imports `cupy.cudnn` itself, is served by :mod:`cuconv.compat.sigpy`.

===========================  =====================================  =======================================
array                        CUDNN_TENSOR_NCHW                      CUDNN_TENSOR_NHWC
===========================  =====================================  =======================================
image, by `d_layout`         [N, C, L..]                            [N, L.., C]
product, by `d_layout`       [N, F, P..]                            [N, P.., F]
kernel, by `w_layout`        [F, C / groups, taps..]                [F, taps.., C / groups]
===========================  =====================================  =======================================

The product is the cross-correlation of the image with the kernel (the kernel is not flipped), of
``P = (L + 2 * pad - dilation * (taps - 1) - 1) // stride + 1`` positions an axis. `pad`, `stride` and `dilation` hold
one integer per spatial axis; `dilation` may be None for ones.

What is more than CuPy had:

* one spatial axis, where cuDNN failed, two and three; all in both layouts, with any groups, strides and dilation;
* NumPy arrays, all of one call in one place, and bfloat16;
* complex64 and complex128. The forward pass multiplies by W as it is; the gradients are the adjoint of it, so
  `convolution_backward_data` multiplies by conj(W) and `convolution_backward_filter` by conj(x), for which nobody
  conjugates beforehand. With real factors conj changes nothing;
* results of any strides, and batches of no image: a gradient of W is zero then.

Weak points:

* `auto_tune` and `deterministic` change nothing: a plan follows from the sizes alone, and the gradients give the same
  bits on every call. `tensor_core` is checked and changes nothing either: float16 is summed in float32 whatever it
  says, and float32 is never rounded to TF32, which cuDNN 8 and later may do.
* kernels are copied into [taps.., C / groups, F] order at every call, a gradient of W back from it, and on a GPU so are
  images and products that are not C-contiguous. Images and products that are contiguous are not copied.
* complex arrays are computed on the ordinary units of a GPU, never on its tensor cores.
* `b` and all arrays of a call have one dtype; a `b` of one element is not spread over the channels.
* the rest of `cupy.cudnn` is not offered: activations, softmax, dropout, pooling, batch normalization, recurrent nets,
  CTC, descriptors and handles raise an AttributeError that says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from cuconv import geometry, ops
from cuconv.cuda import runtime
from cuconv.plan.reference import DEFAULT_WORKSPACE

__all__ = [
    "CUDNN_TENSOR_NCHW",
    "CUDNN_TENSOR_NHWC",
    "convolution_backward_data",
    "convolution_backward_filter",
    "convolution_forward",
    "get_max_workspace_size",
    "set_max_workspace_size",
]

Array = Any  # numpy.ndarray or cupy.ndarray
Named = tuple[str, Array]  # an argument and its name

CUDNN_TENSOR_NCHW = 0
CUDNN_TENSOR_NHWC = 1

_DATA_FORMATS = {CUDNN_TENSOR_NCHW: geometry.CHANNELS_FIRST, CUDNN_TENSOR_NHWC: geometry.CHANNELS_LAST}
_TENSOR_CORE = ("always", "auto", "never")

_max_workspace_size = DEFAULT_WORKSPACE


def get_max_workspace_size() -> int:
    """Bytes of scratch memory that a call may use; see :mod:`cuconv.ops` for what comes on top."""
    return _max_workspace_size


def set_max_workspace_size(size: int) -> None:
    """Sets the bytes of scratch memory that a call may use, for all threads.

    Raises:
        ValueError: `size` is not an integer >= 0.
    """
    global _max_workspace_size
    bytes_ = geometry.as_int(size)
    if bytes_ is None or bytes_ < 0:
        raise ValueError(f"`size` must be a number of bytes >= 0. Received: size={size!r}")
    _max_workspace_size = bytes_


def convolution_forward(
    x: Array,
    W: Array,
    b: Array | None,
    y: Array,
    pad: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] | None,
    groups: int,
    *,
    auto_tune: bool,
    tensor_core: str,
    d_layout: int = CUDNN_TENSOR_NCHW,
    w_layout: int = CUDNN_TENSOR_NCHW,
) -> None:
    """Writes the convolution of the image x with the kernel W, plus b along the channels, into y.

    Args:
        b: F elements in any shape, or None.

    Raises:
        TypeError: the arrays are of several dtypes, of one that has no convolution, or of several places.
        ValueError: shapes or options do not fit. Nothing is written then, as with a TypeError.
    """
    shape, w, options = _convolution(
        ("x", x), ("W", W), ("y", y), b, pad, stride, dilation, groups, tensor_core, d_layout, w_layout
    )
    bias = _bias(b, shape.filters)
    with _place(x):
        ops.conv(x, _in_one_piece(w), bias, out=y, **options)


def convolution_backward_filter(
    x: Array,
    gy: Array,
    gW: Array,
    pad: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] | None,
    groups: int,
    *,
    deterministic: bool,
    auto_tune: bool,
    tensor_core: str,
    d_layout: int = CUDNN_TENSOR_NCHW,
    w_layout: int = CUDNN_TENSOR_NCHW,
) -> None:
    """Writes the gradient by the kernel into gW, from the image x and the gradient gy of the product.

    Raises:
        TypeError, ValueError: as :func:`convolution_forward`.
    """
    shape, gw, options = _convolution(
        ("x", x), ("gW", gW), ("gy", gy), None, pad, stride, dilation, groups, tensor_core, d_layout, w_layout
    )
    with _place(x):
        gw[...] = ops.conv_kernel_grad(x, gy, shape.w_shape, **options)


def convolution_backward_data(
    W: Array,
    x: Array,
    b: Array | None,
    y: Array,
    pad: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] | None,
    groups: int,
    *,
    deterministic: bool,
    auto_tune: bool,
    tensor_core: str,
    d_layout: int = CUDNN_TENSOR_NCHW,
    w_layout: int = CUDNN_TENSOR_NCHW,
) -> None:
    """Writes the gradient by the image into y, plus b along its channels, from the gradient x of the product.

    It is the transposed convolution of x, whose names it has: y is the image [N, C, L..], x the product [N, F, P..].

    Args:
        b: C elements in any shape, or None.

    Raises:
        TypeError, ValueError: as :func:`convolution_forward`.
    """
    shape, w, options = _convolution(
        ("y", y), ("W", W), ("x", x), b, pad, stride, dilation, groups, tensor_core, d_layout, w_layout
    )
    spans = zip(shape.in_size, options["padding"], shape.k_eff, shape.strides, strict=True)
    unread = tuple((n + before + after - k) % s for n, (before, after), k, s in spans)  # behind the last window
    bias = _bias(b, shape.in_channels)
    with _place(x):
        ops.conv_transpose(x, _in_one_piece(w).conj(), bias, output_padding=unread, out=y, **options)


def _convolution(
    image: Named,
    kernel: Named,
    product: Named,
    b: Array | None,
    pad: Any,
    stride: Any,
    dilation: Any,
    groups: int,
    tensor_core: str,
    d_layout: int,
    w_layout: int,
) -> tuple[geometry.ConvShape, Array, dict[str, Any]]:
    """The convolution that the arguments describe, a view of its kernel as [taps.., C / groups, F], and keywords."""
    (x_name, x), (w_name, w), (y_name, y) = image, kernel, product
    _check_arrays(image, kernel, product, *([] if b is None else [("b", b)]))
    shapes = f"{x_name}.shape={x.shape}, {w_name}.shape={w.shape}, {y_name}.shape={y.shape}"
    rank = w.ndim - 2
    if not 1 <= rank <= geometry.MAX_RANK or not x.ndim == w.ndim == y.ndim:
        raise ValueError(
            f"`{x_name}`, `{w_name}` and `{y_name}` must have 3 to {geometry.MAX_RANK + 2} axes, all the same number. "
            f"Received: {shapes}"
        )
    if tensor_core not in _TENSOR_CORE:
        raise ValueError(f'`tensor_core` must be "always", "auto" or "never". Received: tensor_core={tensor_core!r}')
    data_format = _data_format(d_layout, "d_layout")
    channels_first = _data_format(w_layout, "w_layout") == geometry.CHANNELS_FIRST
    w = w.transpose(*range(2, w.ndim), 1, 0) if channels_first else w.transpose(*range(1, w.ndim), 0)
    depth, filters = w.shape[-2:]
    pads = geometry.normalize_tuple(pad, rank, "pad", allow_zero=True)
    count = geometry.as_int(groups)
    if count is None or count < 1 or filters % count:
        raise ValueError(
            f"`groups` must be an integer >= 1 that divides the filters, axis 0 of `{w_name}`. "
            f"Received: groups={groups!r}, {shapes}"
        )
    channels = geometry.split_shape(x.shape, data_format)[2]
    if channels != depth * count:
        raise ValueError(
            f"`{x_name}` must have {depth * count} channels: {depth} of `{w_name}` times {count} groups. "
            f"Received: {channels} channels, {shapes}, d_layout={d_layout}, w_layout={w_layout}"
        )
    options: dict[str, Any] = {
        "strides": geometry.normalize_tuple(stride, rank, "stride"),
        "padding": tuple((amount, amount) for amount in pads),
        "data_format": data_format,
        "dilation_rate": geometry.normalize_tuple(1 if dilation is None else dilation, rank, "dilation"),
        "groups": count,
    }
    shape = geometry.conv_shape(x.shape, w.shape, **options)
    if y.shape != shape.y_shape:
        raise ValueError(f"`{y_name}` must have the shape {shape.y_shape}. Received: {shapes}")
    return shape, w, {**options, "workspace": _max_workspace_size}


def _check_arrays(*arrays: Named) -> None:
    for name, array in arrays:
        if not isinstance(array, np.ndarray) and not runtime.is_device_array(array):
            kind = type(array)
            raise TypeError(
                f"`{name}` must be a NumPy or a CuPy array. Received: a {kind.__module__}.{kind.__qualname__}"
            )
    if len({array.dtype for _, array in arrays}) > 1:
        given = ", ".join(f"{name}.dtype={array.dtype}" for name, array in arrays)
        raise TypeError(f"all arrays must have one dtype. Received: {given}")


def _data_format(layout: int, name: str) -> str:
    if geometry.as_int(layout) not in _DATA_FORMATS:
        raise ValueError(
            f"`{name}` must be CUDNN_TENSOR_NCHW (0) or CUDNN_TENSOR_NHWC (1). Received: {name}={layout!r}"
        )
    return _DATA_FORMATS[layout]


def _place(array: Array) -> AbstractContextManager[Any]:
    """Makes the GPU of `array` the current one: CuPy's own functions compute there."""
    return array.device if runtime.is_gpu_array(array) else contextlib.nullcontext()


def _in_one_piece(w: Array) -> Array:
    """A copy of w where it needs one: calls with arrays in one piece are remembered on a GPU, and played again."""
    return w if w.flags.c_contiguous else w.copy()


def _bias(b: Array | None, channels: int) -> Array | None:
    if b is not None and b.size != channels:
        raise ValueError(f"`b` must have one element for each of {channels} channels. Received: b.shape={b.shape}")
    return None if b is None else b.reshape(-1)


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"{__name__} has no {name}: of cupy.cudnn it has convolution_forward, convolution_backward_data and "
        "convolution_backward_filter"
    )
