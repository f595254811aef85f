"""SeparableConv1D and SeparableConv2D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from cuconv import geometry, ops
from cuconv.layers.base import Array, Shape
from cuconv.layers.window import WindowLayer, as_count, as_filters


class SeparableConv(WindowLayer):
    """Separable convolution: a depthwise convolution, then a 1x1 convolution that mixes the channels.

    Weights: `depthwise_kernel` [kernel_size..., in_channels, depth_multiplier], `pointwise_kernel`
    [1..., in_channels * depth_multiplier, filters] and `bias` [filters]. Bias and activation come once, at the end.

    Args:
        filters: number of output channels.
        kernel_size: taps; one integer for all spatial axes or one for each, like `strides` and `dilation_rate`.
        strides: input positions from one output to the next.
        padding: "valid" (none) or "same" (output length ceil(input length / stride)).
        data_format: "channels_last" [batch, ..., channels], "channels_first" [batch, channels, ...] or None (last).
        dilation_rate: input positions from one tap to the next.
        depth_multiplier: channels between the two convolutions, for each input channel.
        activation: None, name, callable or config dict.
        use_bias: whether there is a bias.
        depthwise_initializer: name, callable, config dict or array of the kernel's shape; likewise
            `pointwise_initializer` and `bias_initializer`.
        depthwise_regularizer: None, name, callable or config dict; likewise `pointwise_regularizer`,
            `bias_regularizer` and `activity_regularizer`.
        depthwise_constraint: None, name, callable or config dict; likewise `pointwise_constraint`, `bias_constraint`.
        **kwargs: see `Layer`.
    """

    depthwise_kernel: Array
    pointwise_kernel: Array
    _strides_or_dilation = False
    _obsolete: ClassVar[Mapping[str, Any]] = {
        "groups": 1,
        "kernel_initializer": ...,
        "kernel_regularizer": ...,
        "kernel_constraint": ...,
    }

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
        depth_multiplier: int = 1,
        activation: Any = None,
        use_bias: bool = True,
        depthwise_initializer: Any = "glorot_uniform",
        pointwise_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        depthwise_regularizer: Any = None,
        pointwise_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        depthwise_constraint: Any = None,
        pointwise_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.filters = as_filters(filters)
        self.depth_multiplier = as_count(depth_multiplier, "depth_multiplier")
        self._set_window(kernel_size, strides, padding, data_format, dilation_rate, activation, use_bias)
        self._set_options(
            depthwise=(depthwise_initializer, depthwise_regularizer, depthwise_constraint),
            pointwise=(pointwise_initializer, pointwise_regularizer, pointwise_constraint),
            bias=(bias_initializer, bias_regularizer, bias_constraint),
        )

    def _geometry(self, shape: Shape) -> geometry.ConvShape:
        shape = self._assuming(shape, 1)
        kernel = (*self.kernel_size, self._known_channels(shape), self.depth_multiplier)
        return geometry.depthwise_shape(shape, kernel, **self._checked_options())

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Shape:
        """Shape of the output for inputs of `input_shape`, both with the batch axis."""
        return self._with_channels(super().compute_output_shape(input_shape), self._known_filters())

    def _weight_shapes(self, input_shape: Shape) -> dict[str, tuple[int, ...]]:
        channels, filters = self._known_channels(input_shape), self._known_filters()
        middle = self._geometry(input_shape).filters
        kernels = {
            "depthwise_kernel": (*self.kernel_size, channels, self.depth_multiplier),
            "pointwise_kernel": (*(1 for _ in self.kernel_size), middle, filters),
        }
        return self._with_bias(kernels, filters)

    def _kernels(self) -> tuple[Array, Array]:
        return self._in_compute_dtype(self.depthwise_kernel), self._in_compute_dtype(self.pointwise_kernel)

    def _operation(self, x: Array, bias: Array, activation: Any) -> Array:
        return ops.separable_conv(x, *self._kernels(), bias, activation=activation, **self._options)

    def _operation_gradients(self, x: Array, dz: Array) -> tuple[Array, list[Array]]:
        kernels = self._kernels()
        dx = ops.separable_conv_input_grad(dz, *kernels, x.shape, **self._options)
        return dx, list(ops.separable_conv_kernel_grad(x, dz, *kernels, **self._options))


class SeparableConv1D(SeparableConv, rank=1):
    """1-D separable convolution: [batch, steps, channels] -> [batch, new_steps, filters].

    >>> SeparableConv1D(8, 5, strides=2, padding="same").compute_output_shape((None, 100, 3))
    (None, 50, 8)
    """


class SeparableConv2D(SeparableConv, rank=2):
    """2-D separable convolution: [batch, height, width, channels] -> [batch, new_height, new_width, filters].

    >>> SeparableConv2D(8, 3).compute_output_shape((None, 28, 28, 3))
    (None, 26, 26, 8)
    """


SeparableConvolution1D, SeparableConvolution2D = SeparableConv1D, SeparableConv2D
