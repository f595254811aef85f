"""DepthwiseConv1D and DepthwiseConv2D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from cuconv import geometry, ops
from cuconv.layers.base import Array, Shape
from cuconv.layers.window import WindowLayer, as_count


class DepthwiseConv(WindowLayer):
    """Depthwise convolution: every input channel has `depth_multiplier` kernels of its own.

    Weights: `kernel` [kernel_size..., in_channels, depth_multiplier] and `bias` [in_channels * depth_multiplier].
    Output channel c * depth_multiplier + m comes from input channel c.

    Args:
        kernel_size: taps; one integer for all spatial axes or one for each, like `strides` and `dilation_rate`.
        strides: input positions from one output to the next.
        padding: "valid" (none) or "same" (output length ceil(input length / stride)).
        depth_multiplier: output channels of each input channel.
        data_format: "channels_last" [batch, ..., channels], "channels_first" [batch, channels, ...] or None (last).
        dilation_rate: input positions from one tap to the next.
        activation: None, name, callable or config dict.
        use_bias: whether there is a bias.
        depthwise_initializer: name, callable, config dict or array of the kernel's shape; likewise `bias_initializer`.
        depthwise_regularizer: None, name, callable or config dict; likewise `bias_regularizer`, `activity_regularizer`.
        depthwise_constraint: None, name, callable or config dict; likewise `bias_constraint`.
        **kwargs: see `Layer`.
    """

    _strides_or_dilation = False
    _obsolete: ClassVar[Mapping[str, Any]] = {
        "groups": 1,
        "kernel_initializer": ...,
        "kernel_regularizer": ...,
        "kernel_constraint": ...,
    }

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        depth_multiplier: int = 1,
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = 1,
        activation: Any = None,
        use_bias: bool = True,
        depthwise_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        depthwise_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        depthwise_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.depth_multiplier = as_count(depth_multiplier, "depth_multiplier")
        self._set_window(kernel_size, strides, padding, data_format, dilation_rate, activation, use_bias)
        self._set_options(
            depthwise=(depthwise_initializer, depthwise_regularizer, depthwise_constraint),
            bias=(bias_initializer, bias_regularizer, bias_constraint),
        )

    def _option_name(self, weight: str) -> str:
        return "depthwise" if weight == "kernel" else weight

    def _geometry(self, shape: Shape) -> geometry.ConvShape:
        kernel = (*self.kernel_size, self._known_channels(shape), self.depth_multiplier)
        return geometry.depthwise_shape(shape, kernel, **self._checked_options())

    def _weight_shapes(self, input_shape: Shape) -> dict[str, tuple[int, ...]]:
        window = self._geometry(input_shape)
        kernel = (*self.kernel_size, window.in_channels, self.depth_multiplier)
        return self._with_bias({"kernel": kernel}, window.filters)

    def _operation(self, x: Array, bias: Array, activation: Any) -> Array:
        return ops.depthwise_conv(x, self._in_compute_dtype(self.kernel), bias, activation=activation, **self._options)

    def _gradients(self, x: Array, dz: Array) -> tuple[Array, list[Array]]:
        kernel = self._in_compute_dtype(self.kernel)
        dx, dw, dbias = ops.depthwise_conv_grad(x, kernel, dz, use_bias=self.bias is not None, **self._options)
        return dx, [dw] if dbias is None else [dw, dbias]


class DepthwiseConv1D(DepthwiseConv, rank=1):
    """1-D depthwise convolution: [batch, steps, channels] -> [batch, new_steps, channels * depth_multiplier].

    >>> DepthwiseConv1D(3, depth_multiplier=2).compute_output_shape((None, 10, 4))
    (None, 8, 8)
    """


class DepthwiseConv2D(DepthwiseConv, rank=2):
    """2-D depthwise convolution: [batch, height, width, channels] -> the same axes with channels * depth_multiplier.

    >>> DepthwiseConv2D(3, padding="same").compute_output_shape((None, 28, 28, 16))
    (None, 28, 28, 16)
    """
