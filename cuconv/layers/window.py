"""What the layers with spatial axes share: the layout of their inputs, and the window that moves over them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from cuconv import activations, geometry, ops
from cuconv.layers.base import Array, Layer, Shape, as_flag, as_shape


def as_sizes(value: Any, rank: int, name: str, *, allow_zero: bool = False) -> tuple[int, ...]:
    """`value` as one integer for each of `rank` axes. NumPy scalars and strings are refused as Keras refuses them."""
    if isinstance(value, np.generic | str):
        kind = TypeError if isinstance(value, str) and len(value) == rank else ValueError
        raise kind(f"`{name}` must be a Python integer or a tuple of {rank} integers. Received: {name}={value!r}")
    return geometry.normalize_tuple(value, rank, name, allow_zero=allow_zero)


def as_count(value: Any, name: str) -> int:
    """`value` as an integer >= 1. What is no number at all is a TypeError, as in Keras."""
    count = geometry.as_int(value)
    if count is None or count < 1:
        kind = ValueError if isinstance(value, numbers.Number) else TypeError
        raise kind(f"`{name}` must be an integer >= 1. Received: {name}={value!r}")
    return count


def as_filters(value: Any) -> int | None:
    """`value` as an integer >= 1. None is refused by `build`, as in Keras."""
    return None if value is None else as_count(value, "filters")


class SpatialLayer(Layer):
    """Base of the layers with `rank` spatial axes and one of channels."""

    _time_axes: ClassVar[int] = 0  # axes between batch and the rest
    data_format: str = geometry.CHANNELS_LAST

    def _channels(self, shape: Sequence[int | None]) -> int | None:
        return shape[-1 if self.data_format == geometry.CHANNELS_LAST else 1 + self._time_axes]

    def _with_channels(self, shape: Shape, channels: int) -> Shape:
        batch, sizes, _ = geometry.split_shape(shape, self.data_format)
        return geometry.join_shape(batch, sizes, channels, self.data_format)

    def _assuming(self, shape: Shape, channels: int) -> Shape:
        """`shape`, with `channels` where they are unknown."""
        return shape if self._channels(shape) is not None else self._with_channels(shape, channels)

    def _check_shape(self, shape: Shape) -> None:
        rank, axes = self.rank or 0, (self.rank or 0) + 2 + self._time_axes
        if len(shape) != axes:
            order = (
                f"{rank} spatial, channels"
                if self.data_format == geometry.CHANNELS_LAST
                else f"channels, {rank} spatial"
            )
            raise ValueError(
                f"{type(self).__name__} takes inputs with {axes} axes (batch, {'time, ' * self._time_axes}{order}). "
                f"Received: inputs.shape={tuple(shape)}"
            )
        if (
            self._weights
            and self._build_shape is not None
            and self._channels(shape) != self._channels(self._build_shape)
        ):
            raise ValueError(
                f"layer {self.name!r} was built for {self._channels(self._build_shape)} channels ({self.data_format}). "
                f"Received: inputs.shape={tuple(shape)}"
            )

    def _spatial_shape(self, input_shape: Sequence[int | None]) -> Shape:
        """`input_shape` as a tuple with the right number of axes."""
        shape = as_shape(input_shape, "input_shape")
        self._check_shape(shape)
        return shape


class WindowLayer(SpatialLayer):
    """Base of the layers that move a kernel over the input, add a bias and apply an activation."""

    _per_axis: ClassVar[tuple[str, ...]] = ("strides", "dilation_rate")
    _paddings: ClassVar[tuple[str, ...]] = ("valid", "same")
    _strides_or_dilation: ClassVar[bool] = True  # Keras refuses both above 1 in these layers
    _unknown_channels: ClassVar[type[Exception]] = TypeError  # what Keras' build raises for channels None
    filters: Any
    kernel: Array
    bias: Array = None

    def _set_window(
        self,
        kernel_size: Any,
        strides: Any,
        padding: Any,
        data_format: Any,
        dilation_rate: Any,
        activation: Any,
        use_bias: Any,
        *,
        allow_zero_strides: bool = False,
    ) -> None:
        """Checks and sets the attributes of those names."""
        rank = self.rank or 0
        self.kernel_size = as_sizes(kernel_size, rank, "kernel_size")
        self.strides = as_sizes(strides, rank, "strides", allow_zero=allow_zero_strides)
        self.padding = self._padding_name(padding)
        self.data_format = geometry.normalize_data_format(data_format)
        self.dilation_rate = as_sizes(dilation_rate, rank, "dilation_rate")
        self.activation = activations.get(activation)
        self.use_bias = as_flag(use_bias, "use_bias")
        self._options: dict[str, Any] = {  # what every operation of this layer is told
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation_rate,
        }
        if self._strides_or_dilation and max(self.strides) > 1 and max(self.dilation_rate) > 1:
            raise ValueError(
                f"`strides` above 1 and `dilation_rate` above 1 cannot be combined in {type(self).__name__}; "
                f"cuconv.ops can. Received: strides={self.strides}, dilation_rate={self.dilation_rate}"
            )

    def _padding_name(self, padding: Any) -> Any:
        if isinstance(padding, str) and padding.lower() in self._paddings:
            return padding.lower()
        if isinstance(padding, list | tuple):
            return padding  # Keras takes a sequence here and refuses it once the layer is built
        names = ", ".join(f'"{name}"' for name in self._paddings)
        raise ValueError(f"`padding` must be one of {names}. Received: padding={padding!r}")

    def _checked_options(self) -> dict[str, Any]:
        if not isinstance(self.padding, str):
            raise ValueError(
                f"`padding` of a layer must be a name; cuconv.ops take (before, after) pairs. "
                f"Received: padding={self.padding!r}"
            )
        return self._options

    def _known_filters(self) -> int:
        if self.filters is None:
            raise ValueError("`filters` must be an integer >= 1. Received: filters=None")
        return self.filters

    def _known_channels(self, shape: Shape) -> int:
        channels = self._channels(shape)
        if channels is None:
            raise self._unknown_channels(f"the channels of the inputs must be known. Received: inputs.shape={shape}")
        return channels

    def _with_bias(self, kernels: dict[str, tuple[int, ...]], size: int) -> dict[str, tuple[int, ...]]:
        return {**kernels, "bias": (size,)} if self.use_bias else kernels

    def _geometry(self, shape: Shape) -> geometry.ConvShape:
        """The convolution of inputs of `shape`, whose channels may be None where the output does not depend on them."""
        raise NotImplementedError

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Shape:
        """Shape of the output for inputs of `input_shape`, both with the batch axis."""
        return self._geometry(self._spatial_shape(input_shape)).y_shape

    def _operation(self, x: Array, bias: Array, activation: Any) -> Array:
        """The convolution of x, with `bias` and `activation` where they are not None."""
        raise NotImplementedError

    def _operation_gradients(self, x: Array, dz: Array) -> tuple[Array, list[Array]]:
        """Gradients of x and of each kernel, given that of the convolution."""
        raise NotImplementedError

    def _operation_bias(self) -> Array:
        return None if self.bias is None else self._in_compute_dtype(self.bias)

    def _infer(self, *inputs: Array, training: bool) -> Array:
        return self._operation(inputs[0], self._operation_bias(), self.activation)

    def _record(self, *inputs: Array, training: bool) -> tuple[Array, Any]:
        x = inputs[0]
        z = self._operation(x, self._operation_bias(), None)
        if self.activation is activations.linear:
            return z, (x, None)
        return self.activation(z), (x, z)

    def _propagate(self, saved: Any, dy: Array) -> tuple[Array, list[Array]]:
        x, z = saved
        return self._gradients(x, dy if z is None else self.activation.gradient(z, dy))

    def _gradients(self, x: Array, dz: Array) -> tuple[Array, list[Array]]:
        """Gradients of x and of each weight, given that of the convolution and its bias."""
        dx, gradients = self._operation_gradients(x, dz)
        if self.bias is not None:
            gradients.append(ops.bias_grad(dz, data_format=self.data_format))
        return dx, gradients
