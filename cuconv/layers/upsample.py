"""UpSampling1D, UpSampling2D and UpSampling3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cuconv import geometry, ops
from cuconv.layers.base import Array, Shape
from cuconv.layers.window import SpatialLayer, as_sizes


class UpSampling(SpatialLayer):
    """Repeats or interpolates every position `size` times along its axis. No weights.

    Args:
        size: factor; one integer for all spatial axes or one for each (UpSampling1D: one integer).
        data_format: "channels_last" [batch, ..., channels], "channels_first" [batch, channels, ...] or None (last).
            UpSampling1D has none and works on axis 1.
        interpolation: of UpSampling2D: "nearest", "bilinear", "bicubic", "lanczos3" or "lanczos5", half-pixel centres.
        **kwargs: see `Layer`.
    """

    _takes_integers = True
    interpolation: str = "nearest"

    def _set_size(self, size: Any, data_format: Any = None) -> None:
        """Sets the factors, and the argument as Keras shows it: a tuple, in 1-D the one integer."""
        self._factors = as_sizes(size, self.rank or 0, "size")
        self.size = self._factors[0] if self.rank == 1 else self._factors
        self.data_format = geometry.normalize_data_format(data_format)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Shape:
        """Shape of the output for inputs of `input_shape`, both with the batch axis."""
        return geometry.upsample_shape(self._spatial_shape(input_shape), self._factors, self.data_format)

    def _record(self, *inputs: Array, training: bool) -> tuple[Array, None]:
        y = ops.upsample(inputs[0], self._factors, interpolation=self.interpolation, data_format=self.data_format)
        return y, None

    def _propagate(self, saved: None, dy: Array) -> tuple[Array, list[Array]]:
        dx = ops.upsample_input_grad(dy, self._factors, interpolation=self.interpolation, data_format=self.data_format)
        return dx, []


class UpSampling1D(UpSampling, rank=1):
    """1-D upsampling: [batch, steps, channels] -> [batch, steps * size, channels].

    >>> UpSampling1D(3).compute_output_shape((None, 10, 4))
    (None, 30, 4)
    """

    def __init__(self, size: int = 2, **kwargs: Any) -> None:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"`size` must be an integer >= 1. Received: size={size!r}")
        super().__init__(**kwargs)
        self._set_size(size)


class UpSampling2D(UpSampling, rank=2):
    """2-D upsampling: [batch, height, width, channels] -> [batch, height * size[0], width * size[1], channels].

    >>> UpSampling2D((2, 3), interpolation="bilinear").compute_output_shape((None, 4, 4, 1))
    (None, 8, 12, 1)
    """

    def __init__(
        self, size: Any = (2, 2), data_format: str | None = None, interpolation: str = "nearest", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._set_size(size, data_format)
        if not isinstance(interpolation, str):
            raise ValueError(f"`interpolation` must be a name. Received: interpolation={interpolation!r}")
        self.interpolation = interpolation.lower()  # an unknown name is refused by the first call, as in Keras


class UpSampling3D(UpSampling, rank=3):
    """3-D upsampling: [batch, depth, height, width, channels] -> the same axes, each spatial one times its factor.

    >>> UpSampling3D().compute_output_shape((None, 2, 3, 4, 1))
    (None, 4, 6, 8, 1)
    """

    def __init__(self, size: Any = (2, 2, 2), data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_size(size, data_format)
