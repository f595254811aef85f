"""Keras' initializers: ``initializer(shape, dtype)`` gives a NumPy array.

Values are drawn in float64 and rounded to the dtype, so one seed means the same weights in every precision. In complex
dtypes the real part is drawn and the imaginary part is zero. An initializer gives the same values every time it is
called with the same shape: its seed is an argument, or drawn once when the object is made (:mod:`cuconv.seeding`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (teaches np.dtype the name "bfloat16")
import numpy as np
from numpy.typing import DTypeLike

from cuconv.seeding import check_seed, draw_seed
from cuconv.serialization import Configurable, Registry, Wrapped, both_spellings, to_plain

Shape = Sequence[int]

# Standard deviation of a normal distribution with unit variance after it is cut at two standard deviations.
TRUNCATED_STDDEV = 0.87962566103423978


class Initializer(Configurable):
    """Base of all initializers. Subclasses define `values`, or `__call__` itself."""

    def __call__(self, shape: Shape, dtype: DTypeLike = "float32") -> np.ndarray:
        """An array of `shape` and `dtype` (None: float32)."""
        return self.values(tuple(shape)).astype("float32" if dtype is None else dtype, copy=False)

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        """A new array of `shape`, in full precision."""
        raise NotImplementedError(f"{type(self).__name__} must define `values(shape)` or `__call__(shape, dtype)`.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """An initializer with the constructor arguments `config`, but for the dtype that TensorFlow 1 wrote along."""
        return super().from_config({key: value for key, value in config.items() if key != "dtype"})


class Constant(Initializer):
    """One number everywhere, or a copy of a given array of exactly the weight's shape."""

    def __init__(self, value: Any = 0.0) -> None:
        self.value = value

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        if isinstance(self.value, np.ndarray) and self.value.shape != shape:
            raise ValueError(
                f"An array as initializer must have the weight's shape {shape}. Received: shape={self.value.shape}"
            )
        return np.full(shape, self.value)

    def get_config(self) -> dict[str, Any]:
        return {"value": to_plain(self.value)}


class Zeros(Initializer):
    """Zeros."""

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)


class Ones(Initializer):
    """Ones."""

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(shape)


class Identity(Initializer):
    """`gain` on the diagonal of a matrix, zeros elsewhere."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) != 2:
            raise ValueError(f"Identity makes matrices only: `shape` must have two axes. Received: shape={shape}")
        return self.gain * np.eye(*shape)

    def get_config(self) -> dict[str, Any]:
        return {} if self.gain == 1 else {"gain": self.gain}  # Keras writes no gain at all and so loses it


# Coefficients of 1, cos t, cos 2t, .. for t in [-pi, pi].
COSINE_WINDOWS = {
    "boxcar": (1.0,),
    "hann": (0.5, 0.5),
    "hamming": (0.54, 0.46),
    "blackman": (0.42, 0.5, 0.08),
    "nuttall": (0.3635819, 0.4891775, 0.1365995, 0.0106411),
    "blackmanharris": (0.35875, 0.48829, 0.14128, 0.01168),
    "flattop": (0.21557895, 0.41663158, 0.277263158, 0.083578947, 0.006947368),
}


def cosine_window(name: str, length: int, periodic: bool) -> np.ndarray:
    """The window [length]; a periodic one is the first `length` points of one that is a point longer."""
    if length < 2:
        return np.ones(length)
    t = np.linspace(-math.pi, math.pi, length + periodic)[:length]
    return np.sum([c * np.cos(k * t) for k, c in enumerate(COSINE_WINDOWS[name])], axis=0)


class STFT(Initializer):
    """The kernel [frame, 1, bins] of a short-time Fourier transform as a convolution.

    Element (t, 0, b) is the window at t times cos (or sin) of ``-2 pi t b / (2 (bins - 1))``, divided by the window's
    scale.

    Args:
        side: "real" (cos) or "imag" (sin).
        window: one of COSINE_WINDOWS, an array [frame], or None.
        scaling: "density" divides by the window's Euclidean norm, "spectrum" by the sum of its absolute values.
        periodic: the window continues periodically instead of being symmetric.
    """

    def __init__(
        self, side: str = "real", window: Any = "hann", scaling: str | None = "density", periodic: bool = False
    ) -> None:
        _check_option("side", side, ("real", "imag"))
        _check_option("scaling", scaling, ("density", "spectrum", None))
        if window is None or isinstance(window, str):
            _check_option("window", window, (*COSINE_WINDOWS, None))
        self.side = side
        self.window = window
        self.scaling = scaling
        self.periodic = periodic

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) != 3 or shape[1] != 1:
            raise ValueError(f"STFT makes kernels (frame, 1, bins) only. Received: shape={shape}")
        frame, _, bins = shape
        wave = np.cos if self.side == "real" else np.sin
        turns = np.outer(np.arange(frame), np.arange(bins)) / max(2 * (bins - 1), 1)
        return (wave(-2 * math.pi * turns) * self._scaled_window(frame)[:, np.newaxis]).reshape(shape)

    def _scaled_window(self, frame: int) -> np.ndarray:
        if self.window is None:
            return np.ones(frame)
        if isinstance(self.window, str):
            window = cosine_window(self.window, frame, self.periodic)
        else:
            window = np.asarray(self.window, dtype=np.float64)
            if window.shape != (frame,):
                raise ValueError(f"`window` must have the shape {(frame,)}. Received: window.shape={window.shape}")
        if self.scaling == "density":
            return window / np.sqrt(np.sum(np.square(window)))
        return window / np.sum(np.abs(window)) if self.scaling == "spectrum" else window

    def get_config(self) -> dict[str, Any]:
        return {
            "side": self.side,
            "window": to_plain(self.window),
            "periodic": self.periodic,
            "scaling": self.scaling,
        }


class RandomInitializer(Initializer):
    """Base of the random initializers.

    Args:
        seed: an integer >= 0; None draws one now.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.given_seed = None if seed is None else check_seed(seed)
        self.seed = draw_seed() if self.given_seed is None else self.given_seed

    def generator(self) -> np.random.Generator:
        """A generator at the start of this initializer's sequence."""
        return np.random.default_rng(self.seed)

    def truncated_normal(self, shape: tuple[int, ...], mean: float, stddev: float) -> np.ndarray:
        """Normal values, those further than two standard deviations from the mean drawn again."""
        generator = self.generator()
        values = generator.standard_normal(shape)
        far = np.abs(values) > 2
        while far.any():
            values[far] = generator.standard_normal(np.count_nonzero(far))
            far = np.abs(values) > 2
        return mean + stddev * values

    def get_config(self) -> dict[str, Any]:
        return {"seed": self.given_seed}


class RandomNormal(RandomInitializer):
    """Normally distributed values."""

    def __init__(self, mean: float = 0.0, stddev: float = 0.05, seed: int | None = None) -> None:
        self.mean = mean
        self.stddev = stddev
        super().__init__(seed)

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.generator().normal(self.mean, self.stddev, shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "mean": self.mean, "stddev": self.stddev}


class TruncatedNormal(RandomNormal):
    """Normally distributed values within two standard deviations of the mean."""

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.truncated_normal(shape, self.mean, self.stddev)


class RandomUniform(RandomInitializer):
    """Values spread evenly over [minval, maxval)."""

    def __init__(self, minval: float = -0.05, maxval: float = 0.05, seed: int | None = None) -> None:
        self.minval = minval
        self.maxval = maxval
        super().__init__(seed)

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.generator().uniform(self.minval, self.maxval, shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "minval": self.minval, "maxval": self.maxval}


def compute_fans(
    shape: Shape, input_axes: Sequence[int] | None = None, output_axes: Sequence[int] | None = None
) -> tuple[int, int]:
    """(fan_in, fan_out): how many inputs one output of a weight of this shape has, and how many outputs one input.

    Without axes the last two count as input and output channels and all before as the receptive field, as the shape is
    stored. So a transposed kernel swaps its fans, and a grouped one counts a group's inputs but all outputs.
    """
    if input_axes is not None and output_axes is not None:
        return math.prod(shape[axis] for axis in input_axes), math.prod(shape[axis] for axis in output_axes)
    if len(shape) < 2:
        return (math.prod(shape),) * 2
    receptive = math.prod(shape[:-2])
    return shape[-2] * receptive, shape[-1] * receptive


class VarianceScaling(RandomInitializer):
    """Values of variance scale / fan.

    Args:
        scale: positive.
        mode: which fan: "fan_in", "fan_out", or their average "fan_avg".
        distribution: "truncated_normal" (or "normal", the same), "untruncated_normal", "uniform".
        input_axes: with `output_axes`, the axes whose product is fan_in; by default see :func:`compute_fans`.
        output_axes: the axes whose product is fan_out.
    """

    def __init__(
        self,
        scale: float = 1.0,
        mode: str = "fan_in",
        distribution: str = "truncated_normal",
        seed: int | None = None,
        input_axes: Sequence[int] | None = None,
        output_axes: Sequence[int] | None = None,
    ) -> None:
        if not scale > 0:
            raise ValueError(f"`scale` must be positive. Received: scale={scale}")
        distribution = distribution.lower()
        _check_option("mode", mode, ("fan_in", "fan_out", "fan_avg"))
        _check_option("distribution", distribution, ("truncated_normal", "untruncated_normal", "uniform", "normal"))
        self.scale = scale
        self.mode = mode
        self.distribution = "truncated_normal" if distribution == "normal" else distribution
        self.input_axes = input_axes
        self.output_axes = output_axes
        super().__init__(seed)

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        fan_in, fan_out = compute_fans(shape, self.input_axes, self.output_axes)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        stddev = math.sqrt(self.scale / max(1.0, fan))
        if self.distribution == "truncated_normal":
            return self.truncated_normal(shape, 0.0, stddev / TRUNCATED_STDDEV)
        if self.distribution == "untruncated_normal":
            return self.generator().normal(0.0, stddev, shape)
        limit = math.sqrt(3) * stddev
        return self.generator().uniform(-limit, limit, shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "scale": self.scale,
            "mode": self.mode,
            "distribution": self.distribution,
            "input_axes": self.input_axes,
            "output_axes": self.output_axes,
        }


class _Preset(VarianceScaling):
    """VarianceScaling with scale, mode and distribution fixed."""

    preset: tuple[float, str, str]

    def __init__(
        self,
        seed: int | None = None,
        input_axes: Sequence[int] | None = None,
        output_axes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(*self.preset, seed, input_axes, output_axes)

    def get_config(self) -> dict[str, Any]:
        return {"seed": self.given_seed, "input_axes": self.input_axes, "output_axes": self.output_axes}


class GlorotUniform(_Preset):
    """Uniform within +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""

    preset = (1.0, "fan_avg", "uniform")


class GlorotNormal(_Preset):
    """Truncated normal of variance 2 / (fan_in + fan_out) (Glorot and Bengio, 2010)."""

    preset = (1.0, "fan_avg", "truncated_normal")


class HeUniform(_Preset):
    """Uniform within +-sqrt(6 / fan_in) (He et al., 2015)."""

    preset = (2.0, "fan_in", "uniform")


class HeNormal(_Preset):
    """Truncated normal of variance 2 / fan_in (He et al., 2015)."""

    preset = (2.0, "fan_in", "truncated_normal")


class LecunUniform(_Preset):
    """Uniform within +-sqrt(3 / fan_in) (LeCun et al., 1998)."""

    preset = (1.0, "fan_in", "uniform")


class LecunNormal(_Preset):
    """Truncated normal of variance 1 / fan_in (LeCun et al., 1998)."""

    preset = (1.0, "fan_in", "truncated_normal")


class Orthogonal(RandomInitializer):
    """`gain` times a random matrix [product of all but the last axis, last axis] with orthonormal rows or columns,
    whichever are fewer (Saxe et al., 2014)."""

    def __init__(self, gain: float = 1.0, seed: int | None = None) -> None:
        self.gain = gain
        super().__init__(seed)

    def values(self, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) < 2:
            raise ValueError(f"Orthogonal needs a `shape` of at least two axes. Received: shape={shape}")
        rows, columns = math.prod(shape[:-1]), shape[-1]
        q, r = np.linalg.qr(self.generator().standard_normal((max(rows, columns), min(rows, columns))))
        q *= np.where(np.diag(r) < 0, -1, 1)  # without this QR prefers some matrices to others
        return (self.gain * (q if rows >= columns else q.T)).reshape(shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "gain": self.gain}


class _Custom(Initializer, Wrapped):
    """A user's callable (shape, dtype) -> array."""

    def __call__(self, shape: Shape, dtype: DTypeLike = "float32") -> np.ndarray:
        resolved = np.dtype("float32" if dtype is None else dtype)
        values = np.asarray(self.function(tuple(shape), dtype=resolved.name))
        if values.shape != tuple(shape):
            raise ValueError(
                f"The initializer {self.function!r} must return an array of shape {tuple(shape)}. "
                f"Received: shape={values.shape}"
            )
        return values.astype(resolved, copy=False)


def _check_option(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}. Received: {name}={value!r}")


def _wrap(function: Callable[..., Any]) -> Initializer:
    return function if isinstance(function, Initializer) else _Custom(function)


constant, identity, ones, zeros, stft = Constant, Identity, Ones, Zeros, STFT
glorot_normal, he_normal, lecun_normal = GlorotNormal, HeNormal, LecunNormal
glorot_uniform, he_uniform, lecun_uniform = GlorotUniform, HeUniform, LecunUniform
random_normal, random_uniform, truncated_normal = RandomNormal, RandomUniform, TruncatedNormal
orthogonal, variance_scaling = Orthogonal, VarianceScaling

_CLASSES = (
    Constant, GlorotNormal, GlorotUniform, HeNormal, HeUniform, Identity, LecunNormal, LecunUniform, Ones, Orthogonal,
    RandomNormal, RandomUniform, STFT, TruncatedNormal, VarianceScaling, Zeros,
)  # fmt: skip
_ALIASES = {
    "IdentityInitializer": Identity,
    "OrthogonalInitializer": Orthogonal,
    "STFTInitializer": STFT,
    "normal": RandomNormal,
    "uniform": RandomUniform,
    "one": Ones,
    "zero": Zeros,
}
_NO_VALUE = "A constant initializer needs its value: write `cuconv.initializers.Constant(value)`."
_REGISTRY = Registry(
    "initializer",
    "keras.initializers",
    both_spellings(_CLASSES) | _ALIASES,
    _wrap,
    refused={"constant": _NO_VALUE, "Constant": _NO_VALUE},
)


def get(identifier: Any, fallback: Any = None, custom_objects: Mapping[str, Any] | None = None) -> Initializer | None:
    """The initializer meant by a name, instance, class, config dict, callable (shape, dtype) -> array, or an array of
    exactly the weight's shape.

    Args:
        identifier: see above; None means `fallback`.
        fallback: another identifier.

    Raises:
        ValueError: the name is not known, or it is "constant", which lacks a value.
    """
    if identifier is None:
        return None if fallback is None else get(fallback, custom_objects=custom_objects)
    if isinstance(identifier, np.ndarray):
        return Constant(identifier)
    return _REGISTRY.get(identifier, custom_objects)


def serialize(initializer: Any) -> dict[str, Any] | None:
    """Keras 3's config dict of an initializer. A given array is written out as a Constant."""
    return _REGISTRY.serialize(initializer)
