"""Conv1DTranspose, Conv2DTranspose and Conv3DTranspose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from cuconv import geometry, ops
from cuconv.layers.base import Array, Shape
from cuconv.layers.window import WindowLayer, as_filters, as_sizes


class ConvTranspose(WindowLayer):
    """Transposed convolution: each input position adds one kernel to the output, `strides` apart.

    Weights: `kernel` [kernel_size..., filters, in_channels] and `bias` [filters].

    Args:
        filters: number of output channels.
        kernel_size: taps; one integer for all spatial axes or one for each, like `strides` and `dilation_rate`.
        strides: output positions from one input to the next. Not above 1 together with `dilation_rate`.
        padding: "valid" (the whole product) or "same" (output length input length * stride).
        output_padding: None, or what is added to the shortest output of that padding: below the stride, on every axis.
        data_format: "channels_last" [batch, ..., channels], "channels_first" [batch, channels, ...] or None (last).
        dilation_rate: output positions from one tap to the next.
        activation: None, name, callable or config dict.
        use_bias: whether there is a bias.
        kernel_initializer: name, callable, config dict or array of the kernel's shape; likewise `bias_initializer`.
        kernel_regularizer: None, name, callable or config dict; likewise `bias_regularizer` and `activity_regularizer`.
        kernel_constraint: None, name, callable or config dict; likewise `bias_constraint`.
        **kwargs: see `Layer`.
    """

    _unknown_channels = ValueError
    _obsolete: ClassVar[Mapping[str, Any]] = {"groups": 1}

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        output_padding: int | Sequence[int] | None = None,
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
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
        self._set_window(kernel_size, strides, padding, data_format, dilation_rate, activation, use_bias)
        if output_padding is not None:
            output_padding = as_sizes(output_padding, len(self.strides), "output_padding", allow_zero=True)
        self.output_padding = geometry.normalize_output_padding(output_padding, self.strides)
        self._set_options(
            kernel=(kernel_initializer, kernel_regularizer, kernel_constraint),
            bias=(bias_initializer, bias_regularizer, bias_constraint),
        )
        self._options["output_padding"] = self.output_padding

    def _geometry(self, shape: Shape) -> geometry.ConvShape:
        shape = self._assuming(shape, 1)
        kernel = (*self.kernel_size, self._known_filters(), self._known_channels(shape))
        return geometry.transpose_shape(shape, kernel, **self._checked_options())

    def _weight_shapes(self, input_shape: Shape) -> dict[str, tuple[int, ...]]:
        self._known_channels(input_shape)
        window = self._geometry(input_shape)  # the convolution this transposes, so its input channels are our filters
        return self._with_bias({"kernel": window.w_shape}, window.in_channels)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Shape:
        """Shape of the output for inputs of `input_shape`, both with the batch axis."""
        return self._geometry(self._spatial_shape(input_shape)).x_shape

    def _operation(self, x: Array, bias: Array, activation: Any) -> Array:
        return ops.conv_transpose(x, self._in_compute_dtype(self.kernel), bias, activation=activation, **self._options)

    def _operation_gradients(self, x: Array, dz: Array) -> tuple[Array, list[Array]]:
        kernel = self._in_compute_dtype(self.kernel)
        dx = ops.conv_transpose_input_grad(dz, kernel, x.shape, **self._options)
        return dx, [ops.conv_transpose_kernel_grad(x, dz, kernel.shape, **self._options)]


class Conv1DTranspose(ConvTranspose, rank=1):
    """1-D transposed convolution, e.g. of a decoder over time: [batch, steps, channels] -> [batch, new_steps, filters].

    >>> Conv1DTranspose(8, 16, strides=8, padding="same").compute_output_shape((None, 256, 4))
    (None, 2048, 8)
    """


class Conv2DTranspose(ConvTranspose, rank=2):
    """2-D transposed convolution: [batch, height, width, channels] -> [batch, new_height, new_width, filters].

    >>> Conv2DTranspose(3, 4, strides=2).compute_output_shape((None, 7, 7, 8))
    (None, 16, 16, 3)
    """


class Conv3DTranspose(ConvTranspose, rank=3):
    """3-D transposed convolution. Its `data_format` stands before `output_padding`, as in Keras.

    >>> Conv3DTranspose(2, 2, strides=(1, 2, 2)).compute_output_shape((None, 3, 4, 4, 5))
    (None, 4, 8, 8, 2)
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        data_format: str | None = None,
        output_padding: int | Sequence[int] | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(filters, kernel_size, strides, padding, output_padding, data_format, *rest, **kwargs)


Convolution1DTranspose, Convolution2DTranspose, Convolution3DTranspose = (
    Conv1DTranspose,
    Conv2DTranspose,
    Conv3DTranspose,
)
