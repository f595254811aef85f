"""``layer_conv_1d`` of R's keras, version 2, for code that was translated from R or calls through reticulate.

The object comes first and decides what a call does, so that calls chain as R's pipe chains them::

    model = Sequential()
    layer_conv_1d(model, filters=32, kernel_size=3.0, input_shape=[128.0, 9.0])
    layer_conv_1d(model, filters=6, kernel_size=1.0)

R's numbers are doubles, so 3.0 stands for 3; its vectors arrive as lists, one of length one as a number; NULL is None.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from cuconv import layers
from cuconv.layers.base import SymbolicTensor
from cuconv.models import Sequential

__all__ = ["layer_conv_1d"]

NA_INTEGER = -(2**31)  # how R's missing integer arrives


def layer_conv_1d(
    object: Any = None,  # noqa: A002
    filters: Any = None,
    kernel_size: Any = None,
    strides: Any = 1,
    padding: str = "valid",
    data_format: str | None = "channels_last",
    dilation_rate: Any = 1,
    groups: Any = 1,
    activation: Any = None,
    use_bias: bool = True,
    kernel_initializer: Any = "glorot_uniform",
    bias_initializer: Any = "zeros",
    kernel_regularizer: Any = None,
    bias_regularizer: Any = None,
    activity_regularizer: Any = None,
    kernel_constraint: Any = None,
    bias_constraint: Any = None,
    input_shape: Any = None,
    batch_input_shape: Any = None,
    batch_size: Any = None,
    dtype: str | None = None,
    name: str | None = None,
    trainable: bool | None = None,
    weights: Sequence[Any] | None = None,
) -> Any:
    """A 1-D convolution layer, put where `object` says. The other arguments are those of :class:`cuconv.layers.Conv1D`.

    Args:
        object: None for the layer itself; a Sequential model, to which the layer is added and which is returned; an
            array or a symbolic tensor, to which it is applied; or a layer or model with one symbolic output, likewise.
        filters: a whole number, as a double too; likewise `groups`, and `kernel_size`, `strides` and `dilation_rate`,
            which may be vectors of length one.
        input_shape: steps and channels, without the batch; None or NA where they may vary.
        batch_input_shape: the same with the batch in front.
        batch_size: the batch that goes with `input_shape`.
        weights: list of the kernel and the bias, taken over when the layer is built.

    Raises:
        TypeError: `filters` or `kernel_size` is missing, or `object` is none of these.
        ValueError: a number is not whole, or an argument is not allowed. A Sequential model is unchanged then.
    """
    if filters is None or kernel_size is None:
        raise TypeError(
            "layer_conv_1d() needs `filters` and `kernel_size`. "
            f"Received: filters={filters!r}, kernel_size={kernel_size!r}"
        )
    tensors = (Sequential, layers.Layer, SymbolicTensor)
    if not (object is None or isinstance(object, tensors) or hasattr(object, "__array_function__")):
        raise TypeError(
            "`object` must be None, a Sequential model, a layer, a symbolic tensor or an array. "
            f"Received: object={object!r} (of type {type(object).__name__})"
        )
    layer = layers.Conv1D(
        _whole(filters, "filters"),
        _whole(kernel_size, "kernel_size"),
        _whole(strides, "strides"),
        padding,
        data_format,
        _whole(dilation_rate, "dilation_rate"),
        _whole(groups, "groups"),
        activation,
        use_bias,
        kernel_initializer,
        bias_initializer,
        kernel_regularizer,
        bias_regularizer,
        activity_regularizer,
        kernel_constraint,
        bias_constraint,
        input_shape=_shape(input_shape, "input_shape"),
        batch_input_shape=_shape(batch_input_shape, "batch_input_shape"),
        batch_size=None if _missing(batch_size) else _whole(batch_size, "batch_size"),
        dtype=dtype,
        name=name,
        trainable=True if trainable is None else trainable,
        weights=weights,
    )
    if object is None:
        return layer
    if isinstance(object, Sequential):
        object.add(layer)
        return object
    return layer(object.output if isinstance(object, layers.Layer) else object)


def _whole(value: Any, name: str) -> Any:
    """`value` with whole doubles as integers, also inside a vector; other kinds are left to the layer's checks."""
    if isinstance(value, list | tuple):
        return tuple(_whole(each, name) for each in value)
    if not isinstance(value, float | np.floating):
        return value
    if not value.is_integer():
        raise ValueError(f"`{name}` must be a whole number. Received: {name}={value!r}")
    return int(value)


def _missing(value: Any) -> bool:
    """Whether `value` is what arrives for NULL or NA."""
    return value is None or (isinstance(value, numbers.Real) and (math.isnan(value) or value == NA_INTEGER))


def _shape(value: Any, name: str) -> Any:
    """A vector of sizes, one number standing for a vector of length one."""
    if value is None:
        return None
    sizes = [value] if isinstance(value, numbers.Real) else value
    return tuple(None if _missing(size) else _whole(size, name) for size in sizes)
