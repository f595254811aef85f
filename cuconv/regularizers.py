"""Keras' weight penalties: ``regularizer(w)`` is a float, ``regularizer.gradient(w)`` its gradient.

Gradients are d/d(re w) + i d/d(im w), so ``l2 * sum |w|^2`` has the gradient ``2 * l2 * w`` for real and complex
weights alike. Where L1 has a kink, at 0, the gradient is 0.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from cuconv.serialization import Configurable, Registry, Wrapped, both_spellings

EPSILON = 1e-7  # Keras' smallest norm


class Regularizer(Configurable):
    """Base of all regularizers."""

    def __call__(self, w: np.ndarray) -> float:
        """The penalty of the array `w`."""
        raise NotImplementedError(f"{type(self).__name__} must define `__call__(w)`.")

    def gradient(self, w: np.ndarray) -> np.ndarray:
        """The penalty's gradient, in w's shape and dtype."""
        raise NotImplementedError(f"{type(self).__name__} must define `gradient(w)` to take part in training.")


class L1L2(Regularizer):
    """l1 * sum |w| + l2 * sum |w|^2. None counts as the default."""

    def __init__(self, l1: float | None = 0.0, l2: float | None = 0.0) -> None:
        self.l1 = _factor("l1", l1, 0.0)
        self.l2 = _factor("l2", l2, 0.0)

    def __call__(self, w: np.ndarray) -> float:
        size = np.abs(_wide(w))
        penalty = 0.0
        if self.l1:
            penalty += self.l1 * float(np.sum(size))
        if self.l2:
            penalty += self.l2 * float(np.sum(np.square(size)))
        return penalty

    def gradient(self, w: np.ndarray) -> np.ndarray:
        wide = _wide(w)
        slope = wide * (2 * self.l2)
        if self.l1:
            slope += _sign(wide) * self.l1
        return slope.astype(w.dtype, copy=False)

    def get_config(self) -> dict[str, Any]:
        return {"l1": self.l1, "l2": self.l2}


class L1(L1L2):
    """l1 * sum |w|. None counts as the default."""

    def __init__(self, l1: float | None = 0.01) -> None:
        super().__init__(l1=_factor("l1", l1, 0.01))

    def get_config(self) -> dict[str, Any]:
        return {"l1": self.l1}


class L2(L1L2):
    """l2 * sum |w|^2, without a half. None counts as the default."""

    def __init__(self, l2: float | None = 0.01) -> None:
        super().__init__(l2=_factor("l2", l2, 0.01))

    def get_config(self) -> dict[str, Any]:
        return {"l2": self.l2}


class OrthogonalRegularizer(Regularizer):
    """`factor` times the mean |cosine| between two different rows (or columns) of a real matrix."""

    def __init__(self, factor: float = 0.01, mode: str = "rows") -> None:
        if mode not in ("rows", "columns"):
            raise ValueError(f"`mode` must be 'rows' or 'columns'. Received: mode={mode!r}")
        self.factor = _factor("factor", factor)
        self.mode = mode

    def __call__(self, w: np.ndarray) -> float:
        _, _, cosines, per_cosine = self._cosines(w)
        return per_cosine * float(np.sum(np.abs(cosines)))

    def gradient(self, w: np.ndarray) -> np.ndarray:
        unit, norm, cosines, per_cosine = self._cosines(w)
        slope = np.sign(cosines) @ unit * (2 * per_cosine)  # each pair stands twice in the symmetric matrix
        along = np.sum(slope * unit, axis=1, keepdims=True) * unit  # a longer row has the same cosines
        slope = (slope - along) / norm
        return (slope if self.mode == "rows" else slope.T).astype(w.dtype, copy=False)

    def _cosines(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Unit rows [n, m], their norms [n, 1], the cosines [n, n] without diagonal, the penalty of one cosine."""
        if w.ndim != 2:
            raise ValueError(
                f"OrthogonalRegularizer needs a matrix; convolution kernels have more axes. Received: w.shape={w.shape}"
            )
        if w.dtype.kind == "c":
            raise TypeError(f"OrthogonalRegularizer needs real weights. Received: w.dtype={w.dtype}")
        rows = _wide(w) if self.mode == "rows" else _wide(w).T
        norm = np.maximum(np.sqrt(np.sum(np.square(rows), axis=1, keepdims=True)), EPSILON)
        unit = rows / norm
        cosines = unit @ unit.T
        np.fill_diagonal(cosines, 0)
        cosines_in_all = len(rows) * (len(rows) - 1)
        return unit, norm, cosines, self.factor / cosines_in_all if cosines_in_all else 0.0

    def get_config(self) -> dict[str, Any]:
        return {"factor": self.factor, "mode": self.mode}


class _Custom(Regularizer, Wrapped):
    """A user's callable array -> number. It has a gradient if it has an attribute ``gradient(w)``."""

    def __call__(self, w: np.ndarray) -> float:
        return float(self.function(w))

    def gradient(self, w: np.ndarray) -> np.ndarray:
        function_gradient = getattr(self.function, "gradient", None)
        if function_gradient is None:
            raise NotImplementedError(
                f"The regularizer {self.function!r} is a callable without a gradient. Give it an attribute `gradient`, "
                "a function of w that returns an array like w, to train with it."
            )
        return function_gradient(w)


def _factor(name: str, value: Any, default: float | None = None) -> float:
    value = default if value is None else value
    if not isinstance(value, numbers.Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"`{name}` must be a finite number >= 0. Received: {name}={value!r}")
    return float(value)


def _wide(w: np.ndarray) -> np.ndarray:
    """`w`, the 16-bit types in float32."""
    return w.astype(np.float32) if w.dtype.itemsize == 2 else w


def _sign(w: np.ndarray) -> np.ndarray:
    """w / |w|, 0 at 0."""
    if w.dtype.kind != "c":
        return np.sign(w)
    size = np.abs(w)
    return w / (size + (size == 0))


_REGISTRY = Registry(
    "regularizer",
    "keras.regularizers",
    both_spellings((L1, L2, L1L2, OrthogonalRegularizer)),
    lambda function: function if isinstance(function, Regularizer) else _Custom(function),
    refused={
        "l1_l2": "'l1_l2' is a name of Keras 2, for the factors 0.01: write `cuconv.regularizers.L1L2(0.01, 0.01)`. "
        "The name 'l1l2' means the factors 0."
    },
)

l1, l2, l1_l2, orthogonal_regularizer = L1, L2, L1L2, OrthogonalRegularizer


def get(identifier: Any, custom_objects: Mapping[str, Any] | None = None) -> Regularizer | None:
    """The regularizer meant by a name, instance, class, config dict or callable array -> number; None stays None.

    Raises:
        ValueError: the name is not known, or the identifier is none of these.
    """
    return _REGISTRY.get(identifier, custom_objects)


def serialize(regularizer: Any) -> dict[str, Any] | None:
    """Keras 3's config dict of a regularizer."""
    return _REGISTRY.serialize(regularizer)
