"""Keras' weight constraints: ``constraint(w)`` is w changed to satisfy the constraint, in w's shape and dtype.

`axis` names the axes a norm sums over. The default 0 is the first *spatial* axis of a convolution kernel; the norm of
each filter is over all axes but the last: ``axis=[0, 1]`` for Conv1D, ``[0, 1, 2]`` for Conv2D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cuconv.serialization import Configurable, Registry, both_spellings

EPSILON = 1e-7  # added to norms, so that a zero vector stays zero


class Constraint(Configurable):
    """Base of all constraints."""

    def __call__(self, w: np.ndarray) -> np.ndarray:
        """An array like `w` that satisfies the constraint."""
        raise NotImplementedError(f"{type(self).__name__} must define `__call__(w)`.")


class NonNeg(Constraint):
    """Negative weights become 0."""

    def __call__(self, w: np.ndarray) -> np.ndarray:
        if w.dtype.kind == "c":
            raise TypeError(f"NonNeg needs real weights. Received: w.dtype={w.dtype}")
        return np.maximum(w, 0)


class _NormConstraint(Constraint):
    """Scales w so that its norms over `axis` become `wanted(norms)`."""

    axis: int | Sequence[int] | None

    def wanted(self, norms: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def __call__(self, w: np.ndarray) -> np.ndarray:
        wide = w.astype(np.float32) if w.dtype.itemsize == 2 else w
        axis = tuple(self.axis) if isinstance(self.axis, Sequence) else self.axis
        norms = np.sqrt(np.sum(np.square(np.abs(wide)), axis=axis, keepdims=True))
        return (wide * (self.wanted(norms) / (norms + EPSILON))).astype(w.dtype, copy=False)


class MaxNorm(_NormConstraint):
    """Norms are at most `max_value`."""

    def __init__(self, max_value: float = 2, axis: int | Sequence[int] | None = 0) -> None:
        self.max_value = max_value
        self.axis = axis

    def wanted(self, norms: np.ndarray) -> np.ndarray:
        return np.clip(norms, 0, self.max_value)

    def get_config(self) -> dict[str, Any]:
        return {"max_value": self.max_value, "axis": self.axis}


class MinMaxNorm(_NormConstraint):
    """Norms move into [min_value, max_value]: all the way with rate 1, by that share of the distance with less."""

    def __init__(
        self,
        min_value: float = 0.0,
        max_value: float = 1.0,
        rate: float = 1.0,
        axis: int | Sequence[int] | None = 0,
    ) -> None:
        self.min_value = min_value
        self.max_value = max_value
        self.rate = rate
        self.axis = axis

    def wanted(self, norms: np.ndarray) -> np.ndarray:
        return self.rate * np.clip(norms, self.min_value, self.max_value) + (1 - self.rate) * norms

    def get_config(self) -> dict[str, Any]:
        return {"min_value": self.min_value, "max_value": self.max_value, "rate": self.rate, "axis": self.axis}


class UnitNorm(_NormConstraint):
    """Norms are 1."""

    def __init__(self, axis: int | Sequence[int] | None = 0) -> None:
        self.axis = axis

    def wanted(self, norms: np.ndarray) -> np.ndarray:
        return np.ones_like(norms)

    def get_config(self) -> dict[str, Any]:
        return {"axis": self.axis}


_REGISTRY = Registry(
    "constraint",
    "keras.constraints",
    both_spellings((MaxNorm, MinMaxNorm, NonNeg, UnitNorm)),
    lambda function: function,
    refused={
        "maxnorm": "'maxnorm' is an old name; write 'max_norm' or 'MaxNorm'.",
        "nonneg": "'nonneg' is an old name; write 'non_neg' or 'NonNeg'.",
        "unitnorm": "'unitnorm' is an old name; write 'unit_norm' or 'UnitNorm'.",
    },
)

max_norm, min_max_norm, non_neg, unit_norm = MaxNorm, MinMaxNorm, NonNeg, UnitNorm


def get(identifier: Any, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """The constraint meant by a name, instance, class, config dict or callable array -> array; None stays None.

    Raises:
        ValueError: the name is not known, or the identifier is none of these.
    """
    return _REGISTRY.get(identifier, custom_objects)


def serialize(constraint: Any) -> dict[str, Any] | None:
    """Keras 3's config dict of a constraint."""
    return _REGISTRY.serialize(constraint)
