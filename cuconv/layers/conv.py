"""Conv1D, Conv2D and Conv3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from cuconv import geometry, ops
from cuconv.layers.base import Array, Shape
from cuconv.layers.window import WindowLayer, as_count, as_filters


class Conv(WindowLayer):
    """Convolution (cross-correlation): y = activation(conv(x, kernel) + bias).

    Weights: `kernel` [kernel_size..., in_channels / groups, filters] and `bias` [filters].

    Args:
        filters: number of output channels, a multiple of `groups`.
        kernel_size: taps; one integer for all spatial axes or one for each, like `strides` and `dilation_rate`.
        strides: input positions from one output to the next. Not above 1 together with `dilation_rate`.
        padding: "valid" (none), "same" (output length ceil(input length / stride)) or, in 1-D, "causal" (all in front).
        data_format: "channels_last" [batch, ..., channels], "channels_first" [batch, channels, ...] or None (last).
        dilation_rate: input positions from one tap to the next.
        groups: number of independent blocks of channels; divides the input channels.
        activation: None, name, callable or config dict.
        use_bias: whether there is a bias.
        kernel_initializer: name, callable, config dict or array of the kernel's shape; likewise `bias_initializer`.
        kernel_regularizer: None, name, callable or config dict; likewise `bias_regularizer` and `activity_regularizer`.
        kernel_constraint: None, name, callable or config dict; likewise `bias_constraint`.
        **kwargs: see `Layer`.
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
        groups: int = 1,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.filters = as_filters(filters)
        self.groups = as_count(groups, "groups")
        self._set_window(kernel_size, strides, padding, data_format, dilation_rate, activation, use_bias)
        self._set_options(
            kernel=(kernel_initializer, kernel_regularizer, kernel_constraint),
            bias=(bias_initializer, bias_regularizer, bias_constraint),
        )
        if self.filters is not None and self.filters % self.groups:
            raise ValueError(f"`groups` must divide `filters`. Received: groups={groups}, filters={filters}")
        self._options["groups"] = self.groups

    def _geometry(self, shape: Shape) -> geometry.ConvShape:
        shape = self._assuming(shape, self.groups)
        channels = self._known_channels(shape)
        if channels % self.groups:
            raise ValueError(f"`groups` must divide the channels. Received: groups={self.groups}, inputs.shape={shape}")
        kernel = (*self.kernel_size, channels // self.groups, self._known_filters())
        return geometry.conv_shape(shape, kernel, **self._checked_options())

    def _weight_shapes(self, input_shape: Shape) -> dict[str, tuple[int, ...]]:
        self._known_channels(input_shape)
        window = self._geometry(input_shape)
        return self._with_bias({"kernel": window.w_shape}, window.filters)

    def _operation(self, x: Array, bias: Array, activation: Any) -> Array:
        return ops.conv(x, self._in_compute_dtype(self.kernel), bias, activation=activation, **self._options)

    def _operation_gradients(self, x: Array, dz: Array) -> tuple[Array, list[Array]]:
        kernel = self._in_compute_dtype(self.kernel)
        dx = ops.conv_input_grad(dz, kernel, x.shape, **self._options)
        return dx, [ops.conv_kernel_grad(x, dz, kernel.shape, **self._options)]


class Conv1D(Conv, rank=1):
    """1-D convolution, e.g. over time: [batch, steps, channels] -> [batch, new_steps, filters].

    >>> Conv1D(100, 10, activation="relu").compute_output_shape((None, 128, 9))
    (None, 119, 100)
    """

    _paddings: ClassVar[tuple[str, ...]] = ("valid", "same", "causal")


class Conv2D(Conv, rank=2):
    """2-D convolution, e.g. of images: [batch, height, width, channels] -> [batch, new_height, new_width, filters].

    >>> Conv2D(8, 3, strides=2, padding="same").compute_output_shape((None, 28, 28, 3))
    (None, 14, 14, 8)
    """


class Conv3D(Conv, rank=3):
    """3-D convolution, e.g. of volumes: [batch, depth, height, width, channels] -> the same axes with filters.

    >>> Conv3D(4, (1, 3, 3)).compute_output_shape((None, 5, 9, 9, 1))
    (None, 5, 7, 7, 4)
    """


Convolution1D, Convolution2D, Convolution3D = Conv1D, Conv2D, Conv3D
