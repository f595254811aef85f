"""Cropping1D to Cropping3D and ZeroPadding1D to ZeroPadding3D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cuconv import geometry
from cuconv.layers.base import Array, Shape
from cuconv.layers.window import SpatialLayer, as_sizes


class _Margins(SpatialLayer):
    """Base of the layers that take away or add (before, after) positions of each spatial axis. No weights."""

    _takes_integers = True
    _argument: str

    def _set_margins(self, value: Any, data_format: Any = None) -> None:
        """Sets the pairs, and the argument as Keras shows it: pairs, in 1-D the one pair."""
        if self.rank == 1 or isinstance(value, np.generic):
            value = (as_sizes(value, 2, self._argument, allow_zero=True),)
        self._pairs = geometry.normalize_pairs(value, self.rank or 0, self._argument)
        setattr(self, self._argument, self._pairs[0] if self.rank == 1 else self._pairs)
        self.data_format = geometry.normalize_data_format(data_format)

    def _inner(self, shape: Sequence[Any]) -> tuple[slice, ...]:
        """The positions of an array of the larger `shape` that are also in the smaller one."""
        sizes: Any = geometry.split_shape(shape, self.data_format)[1]
        inner = tuple(slice(before, size - after) for size, (before, after) in zip(sizes, self._pairs, strict=True))
        every = slice(None)
        return (every, *inner, every) if self.data_format == geometry.CHANNELS_LAST else (every, every, *inner)

    def _padded(self, x: Array) -> Array:
        shape: Any = geometry.pad_shape(x.shape, self._pairs, self.data_format)
        y = np.zeros_like(x, shape=shape)
        y[self._inner(y.shape)] = x
        return y

    def _cropped(self, x: Array) -> Array:
        return x[self._inner(x.shape)].copy()


class Cropping(_Margins):
    """Takes away positions at both ends of every spatial axis; at least one must remain. No weights.

    Args:
        cropping: one integer, one for each spatial axis, or one pair (before, after) for each (Cropping1D: one pair).
        data_format: "channels_last" [batch, ..., channels], "channels_first" [batch, channels, ...] or None (last).
            Cropping1D has none and works on axis 1.
        **kwargs: see `Layer`.
    """

    _argument = "cropping"

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Shape:
        """Shape of the output for inputs of `input_shape`, both with the batch axis."""
        return geometry.crop_shape(self._spatial_shape(input_shape), self._pairs, self.data_format)

    def _record(self, *inputs: Array, training: bool) -> tuple[Array, None]:
        self.compute_output_shape(inputs[0].shape)
        return self._cropped(inputs[0]), None

    def _propagate(self, saved: None, dy: Array) -> tuple[Array, list[Array]]:
        return self._padded(dy), []


class Cropping1D(Cropping, rank=1):
    """1-D cropping: [batch, steps, channels] -> [batch, steps - cropped, channels].

    >>> Cropping1D((1, 2)).compute_output_shape((None, 10, 4))
    (None, 7, 4)
    """

    def __init__(self, cropping: Any = (1, 1), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_margins(cropping)


class Cropping2D(Cropping, rank=2):
    """2-D cropping: [batch, height, width, channels] with fewer rows and columns.

    >>> Cropping2D((1, (2, 3))).compute_output_shape((None, 10, 10, 4))
    (None, 8, 5, 4)
    """

    def __init__(self, cropping: Any = ((0, 0), (0, 0)), data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_margins(cropping, data_format)


class Cropping3D(Cropping, rank=3):
    """3-D cropping: [batch, depth, height, width, channels] with fewer positions.

    >>> Cropping3D(1).compute_output_shape((None, 3, 4, 5, 2))
    (None, 1, 2, 3, 2)
    """

    def __init__(self, cropping: Any = ((1, 1), (1, 1), (1, 1)), data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_margins(cropping, data_format)


class ZeroPadding(_Margins):
    """Adds zeros at both ends of every spatial axis. No weights.

    Args:
        padding: one integer, one for each spatial axis, or one pair (before, after) for each (ZeroPadding1D: one pair).
        data_format: "channels_last" [batch, ..., channels], "channels_first" [batch, channels, ...] or None (last).
        **kwargs: see `Layer`.
    """

    _argument = "padding"

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Shape:
        """Shape of the output for inputs of `input_shape`, both with the batch axis."""
        return geometry.pad_shape(self._spatial_shape(input_shape), self._pairs, self.data_format)

    def _record(self, *inputs: Array, training: bool) -> tuple[Array, None]:
        return self._padded(inputs[0]), None

    def _propagate(self, saved: None, dy: Array) -> tuple[Array, list[Array]]:
        return self._cropped(dy), []


class ZeroPadding1D(ZeroPadding, rank=1):
    """1-D zero padding: [batch, steps, channels] -> [batch, steps + added, channels].

    >>> ZeroPadding1D((1, 2)).compute_output_shape((None, 10, 4))
    (None, 13, 4)
    """

    def __init__(self, padding: Any = 1, data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_margins(padding, data_format)


class ZeroPadding2D(ZeroPadding, rank=2):
    """2-D zero padding: [batch, height, width, channels] with more rows and columns.

    >>> ZeroPadding2D(((1, 2), 3)).compute_output_shape((None, 10, 10, 4))
    (None, 13, 16, 4)
    """

    def __init__(self, padding: Any = (1, 1), data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_margins(padding, data_format)


class ZeroPadding3D(ZeroPadding, rank=3):
    """3-D zero padding: [batch, depth, height, width, channels] with more positions.

    >>> ZeroPadding3D().compute_output_shape((None, 1, 2, 3, 4))
    (None, 3, 4, 5, 4)
    """

    def __init__(self, padding: Any = ((1, 1), (1, 1), (1, 1)), data_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_margins(padding, data_format)
