"""Keras' activations with their exact gradients, for NumPy and CuPy arrays alike.

Every name of Keras is an :class:`Activation` here: ``relu(x)`` is the value and ``relu.gradient(x, dy)`` the gradient,
where x is the array before the activation. float16 and bfloat16 are computed in float32 and rounded once. Complex
numbers have no order, so only ``linear`` takes complex arrays. softmax, log_softmax, sparsemax and glu work on the last
axis. Keras' parameters are keywords: ``leaky_relu(x, negative_slope=0.3)``.

The array code calls NumPy functions only; NumPy hands arrays of other libraries to their own implementation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from cuconv.serialization import Registry, Wrapped

Array = np.ndarray

# Elements a formula of several passes works on at a time, so that its temporaries stay in the cache and take a few MB,
# however large the array.
BLOCK = 1 << 17


class Activation:
    """A function of an array and its gradient.

    Args:
        name: Keras' name.
        value: (x, out, **parameters) -> array; `out` is None or a place of the right shape, maybe x itself.
        slope: (x, **parameters) -> derivative at each x.
        gradient: (x, dy, **parameters) -> dx, instead of `slope` for functions of the whole last axis.
        single_pass: `value` reads x once and needs no temporary.
    """

    def __init__(
        self,
        name: str,
        value: Callable[..., Any],
        slope: Callable[..., Any] = np.ones_like,
        *,
        gradient: Callable[..., Any] | None = None,
        single_pass: bool = False,
    ) -> None:
        self.name = name
        self.pointwise = gradient is None
        self._value = value
        self._gradient = gradient or (lambda x, dy, **parameters: dy * slope(x, **parameters))
        self._direct_size = math.inf if single_pass else BLOCK

    def __call__(self, x: Array, out: Array | None = None, **parameters: Any) -> Array:
        """The activated array, in x's dtype.

        Args:
            x: any shape; at least one axis unless the activation is pointwise.
            out: where to put it, of the result's shape; may be x itself.
            parameters: Keras' parameters of this activation.

        Raises:
            TypeError: the dtype is not a real floating one.
        """
        if out is not None:
            _check_out(out, self._shape(x), x)
        if x.dtype.char in "fd" and x.size <= self._direct_size:
            return self._value(x, out, **parameters)
        wide = self._computed_wide(x)
        if out is None:
            out = np.empty_like(x, shape=self._shape(x))
        for x_block, out_block in self._blocks(x, out):
            if wide:
                _store(self._value(x_block.astype(np.float32), None, **parameters), out_block)
            else:
                self._value(x_block, out_block, **parameters)
        return out

    def gradient(self, x: Array, dy: Array, out: Array | None = None, **parameters: Any) -> Array:
        """The gradient dx of sum(self(x) * dy), in x's dtype.

        Args:
            x: the array before the activation.
            dy: of the shape and dtype of ``self(x)``.
            out: where to put dx; may be dy or x itself.
        """
        if dy.dtype != x.dtype:
            raise TypeError(f"`dy` must have x's dtype. Received: dy.dtype={dy.dtype}, x.dtype={x.dtype}")
        if dy.shape != self._shape(x):
            raise ValueError(f"`dy` must have the shape {self._shape(x)}. Received: dy.shape={dy.shape}")
        if out is not None:
            _check_out(out, x.shape, x)
        if x.dtype.char in "fd" and x.size <= BLOCK:
            return _store(self._gradient(x, dy, **parameters), out)
        wide = self._computed_wide(x)
        if out is None:
            out = np.empty_like(x)
        for x_block, dy_block, out_block in self._blocks(x, dy, out):
            if wide:
                x_block, dy_block = x_block.astype(np.float32), dy_block.astype(np.float32)
            _store(self._gradient(x_block, dy_block, **parameters), out_block)
        return out

    def __repr__(self) -> str:
        return f"<activation {self.name}>"

    def __reduce__(self) -> str:
        return self.name  # a copy of a built-in is the built-in

    def _shape(self, x: Array) -> tuple[int, ...]:
        return x.shape

    def _computed_wide(self, x: Array) -> bool:
        """Whether x is computed in float32 instead of its own dtype."""
        if x.dtype.char in "fd":
            return False
        if x.dtype.name in ("float16", "bfloat16"):
            return True
        raise TypeError(
            f"{self.name} takes float16, bfloat16, float32 and float64, and only linear takes complex arrays. "
            f"Received: x.dtype={x.dtype}"
        )

    def _blocks(self, *arrays: Array) -> Iterator[tuple[Array, ...]]:
        """Views of `arrays` that cover them piece by piece and keep the last axis whole where it must be."""
        first = arrays[0]
        if first.size <= BLOCK or first.ndim <= (not self.pointwise) or not isinstance(first, np.ndarray):
            yield arrays
            return
        step = BLOCK * len(first) // first.size
        if step:
            for i in range(0, len(first), step):
                yield tuple(array[i : i + step] for array in arrays)
        else:
            for items in zip(*arrays, strict=True):
                yield from self._blocks(*items)


class _Linear(Activation):
    """Hands arrays of any dtype through. Without `out` the value is x itself, and the gradient dy itself."""

    def __call__(self, x: Array, out: Array | None = None, **parameters: Any) -> Array:
        if out is not None:
            _check_out(out, x.shape, x)
        return self._value(x, out, **parameters)

    def gradient(self, x: Array, dy: Array, out: Array | None = None, **parameters: Any) -> Array:
        return self(dy, out, **parameters)


class _Glu(Activation):
    """Halves the last axis."""

    def _shape(self, x: Array) -> tuple[int, ...]:
        return (*x.shape[:-1], _half(x))


class _Custom(Activation, Wrapped):
    """A user's callable array -> array. It has a gradient if it has an attribute ``gradient(x, dy)``."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        Activation.__init__(self, getattr(function, "__name__", type(function).__name__), function)
        Wrapped.__init__(self, function)
        self.pointwise = False  # unknown, so it is never applied to a part of an array or in place

    def __call__(self, x: Array, out: Array | None = None, **parameters: Any) -> Array:
        y = self.function(x, **parameters)
        if not hasattr(y, "dtype"):
            raise TypeError(f"`activation` must return an array. Received: {self.name}(x)={y!r}")
        if out is None:
            return y.astype(x.dtype, copy=False)
        _check_out(out, y.shape, x)
        out[...] = y
        return out

    def gradient(self, x: Array, dy: Array, out: Array | None = None, **parameters: Any) -> Array:
        function_gradient = getattr(self.function, "gradient", None)
        if function_gradient is None:
            raise NotImplementedError(
                f"The activation {self.name!r} is a callable without a gradient. Give it an attribute `gradient`, a "
                "function of (x, dy) that returns dx, to train through it."
            )
        dx = function_gradient(x, dy, **parameters)
        if out is None:
            return dx.astype(x.dtype, copy=False)
        out[...] = dx
        return out

    def __reduce__(self) -> Any:
        return _Custom, (self.function,)


def _check_out(out: Array, shape: tuple[int, ...], x: Array) -> None:
    if out.shape != shape or out.dtype != x.dtype:
        raise ValueError(
            f"`out` must have the shape {shape} and the dtype {x.dtype}. "
            f"Received: out.shape={out.shape}, out.dtype={out.dtype}"
        )


# ---- pieces --------------------------------------------------------------------------------------------------------


def _store(y: Array, out: Array | None) -> Array:
    if out is None or out is y:
        return y
    if out.dtype == y.dtype:
        out[...] = y
    else:
        with np.errstate(over="ignore"):  # float16 ends at 65504
            out[...] = y
    return out


def _positive(x: Array) -> Array:
    """1 for x > 0, 0 for x <= 0, NaN for NaN."""
    return np.maximum(np.sign(x), 0)


def _inside(x: Array, low: float, high: float) -> Array:
    """True strictly between `low` and `high`, and for NaN."""
    return ~((x <= low) | (x >= high))


def _logistic(x: Array, out: Array | None = None) -> Array:
    """1 / (1 + exp(-x)); the overflow of exp(-x) to infinity gives the right answer 0."""
    with np.errstate(over="ignore"):
        e = np.exp(np.multiply(x, -1, out=out), out=out)  # np.negative in place is wrong on strided views (NumPy 2.4)
    return np.reciprocal(np.add(e, 1, out=out), out=out)


def _softplus(x: Array, out: Array | None = None) -> Array:
    """log(1 + exp(x)) without overflow."""
    return np.add(np.log1p(np.exp(-np.abs(x))), np.maximum(x, 0), out=out)


# Scaled tail of the normal distribution, f(a) = exp(a^2 / 2) * P(normal > a) for a >= 0, as a Chebyshev series in
# t = (a - 4) / (a + 4), which maps [0, infinity) to [-1, 1): c_j = 2/n * sum_k f(t_k) * cos(j * (k + 1/2) * pi / n),
# half of that for j = 0, at the n = 60 Chebyshev points t_k, in 60 digits. The first term left out is 6e-18.
_TAIL_SERIES = (
    0.1682882016232327, -0.22915709990540908, 0.07778835509065742, -0.020384686418274105,
    0.003918137045458075, -0.0004666606283379171, 6.287520132139339e-06, 8.58398579912788e-06,
    -1.0167576108636199e-06, -1.397526759521329e-07, 3.669280791486882e-08, 2.8041788924924713e-09,
    -1.2584224132220847e-09, -8.950222407260244e-11, 4.536086530984231e-11, 4.474287656506267e-12,
    -1.671687905185684e-12, -2.683781469553837e-13, 5.721760333130976e-14, 1.621048267715444e-14,
    -1.3744940820337785e-15, -9.10143893328047e-16, -2.2734886306808515e-17, 4.421463813334421e-17,
)  # fmt: skip
_TAIL_TERMS = {4: 11, 8: 24}  # by the dtype's bytes; the first term float32 leaves out is 3e-9


@functools.cache
def _tail_polynomial(itemsize: int) -> tuple[float, ...]:
    """The series as coefficients of 1, t, t^2, ...; all are below 0.25, so nothing cancels in Horner's scheme."""
    return tuple(np.polynomial.chebyshev.cheb2poly(_TAIL_SERIES[: _TAIL_TERMS[itemsize]]).tolist())


def _normal(x: Array) -> tuple[Array, Array, Array]:
    """(a, P(normal > a), density at a) of the standard normal distribution, a = min(|x|, 40); both are 0 at 40.

    The tail is the error function in a form that keeps small values: P(normal > a) = erfc(a / sqrt(2)) / 2.
    """
    a = np.minimum(np.abs(x), 40)
    t = (a - 4) / (a + 4)
    *rest, series = _tail_polynomial(x.dtype.itemsize)
    tail = np.full_like(t, series)
    for coefficient in reversed(rest):
        tail *= t
        tail += coefficient
    bell = np.exp(np.square(a) * -0.5)
    return a, tail * bell, bell * (1 / math.sqrt(2 * math.pi))


# ---- values and slopes that need more than a line ------------------------------------------------------------------


def _relu(
    x: Array, out: Array | None, negative_slope: float = 0.0, max_value: float | None = None, threshold: float = 0.0
) -> Array:
    if not negative_slope and max_value is None and not threshold:
        return np.maximum(x, 0, out=out)
    above = x if max_value is None else np.clip(x, 0, max_value)
    below = (x - threshold) * negative_slope if negative_slope else np.zeros_like(x)
    return _store(np.where(x <= threshold, below, above), out)


def _relu_slope(x: Array, negative_slope: float = 0.0, max_value: float | None = None, threshold: float = 0.0) -> Array:
    rising = ~(x <= threshold)
    if max_value is not None:
        rising &= ~(x >= max_value)
    if not negative_slope:
        return rising
    return np.where(x <= threshold, np.full_like(x, negative_slope), rising)


def _elu(x: Array, out: Array | None, alpha: float = 1.0) -> Array:
    return np.add(np.expm1(np.minimum(x, 0)) * alpha, np.maximum(x, 0), out=out)


def _elu_slope(x: Array, alpha: float = 1.0) -> Array:
    above = _positive(x)
    return above + (1 - above) * (np.exp(np.minimum(x, 0)) * alpha)


def _celu(x: Array, out: Array | None, alpha: float = 1.0) -> Array:
    return np.add(np.expm1(np.minimum(x, 0) / alpha) * alpha, np.maximum(x, 0), out=out)


# Fixed point of mean 0 and variance 1 (Klambauer et al., 2017).
_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


def _leaky_relu(x: Array, out: Array | None, negative_slope: float = 0.2) -> Array:
    larger = np.maximum if negative_slope <= 1 else np.minimum
    return larger(x, x * negative_slope, out=out)


def _leaky_relu_slope(x: Array, negative_slope: float = 0.2) -> Array:
    above = _positive(x)
    return above + (1 - above) * negative_slope


def _silu_slope(x: Array) -> Array:
    s = _logistic(x)
    return s * (x * (1 - s) + 1)


def _hard_silu_slope(x: Array) -> Array:
    t = np.clip(x, -3, 3)
    return (t + 3) / 6 + t * _inside(x, -3, 3) / 6


_TANH_GELU = 2 * math.sqrt(2 / math.pi)  # (1 + tanh(u)) / 2 = logistic(2 u)


def _gelu(x: Array, out: Array | None, approximate: bool = False) -> Array:
    if approximate:
        return np.multiply(x, _logistic((np.square(x) * 0.044715 + 1) * x * _TANH_GELU), out=out)
    a, tail, _ = _normal(x)
    return np.subtract(np.maximum(x, 0), a * tail, out=out)


def _gelu_slope(x: Array, approximate: bool = False) -> Array:
    if approximate:
        square = np.square(x)
        s = _logistic((square * 0.044715 + 1) * x * _TANH_GELU)
        return s + x * s * (1 - s) * (square * (3 * 0.044715) + 1) * _TANH_GELU
    a, tail, density = _normal(x)
    above = _positive(x)
    return above + (1 - 2 * above) * (tail - a * density)


def _mish_parts(x: Array) -> tuple[Array, Array, Array]:
    """(t, e, n) with tanh(softplus(x)) = n / (n + 2), e = exp(t); t = min(x, 20), from where on it is 1 in float64."""
    t = np.minimum(x, 20)
    e = np.exp(t)
    return t, e, e * (e + 2)


def _mish(x: Array, out: Array | None) -> Array:
    _, _, n = _mish_parts(x)
    return np.multiply(x, n / (n + 2), out=out)


def _mish_slope(x: Array) -> Array:
    t, e, n = _mish_parts(x)
    return (n + 4 * t * e * (e + 1) / (n + 2)) / (n + 2)


def _squareplus(x: Array, out: Array | None, b: float = 4.0) -> Array:
    """(x + sqrt(x^2 + b)) / 2, with the difference of a negative x and the root turned into a quotient."""
    total = np.sqrt(np.square(x) + b) + np.abs(x)
    return np.multiply(np.where(x < 0, b / total, total), 0.5, out=out)


def _sparse_plus(x: Array, out: Array | None) -> Array:
    return _store(np.where(x < 1, np.square(np.maximum(x, -1) + 1) / 4, x), out)


def _half_step(x: Array, out: Array | None = None) -> Array:
    """Slope of sparse_plus: 0 below -1, 1 above 1, straight between."""
    return np.multiply(np.clip(x, -1, 1) + 1, 0.5, out=out)


def _threshold(x: Array, out: Array | None, *, threshold: float, default_value: float) -> Array:
    return _store(np.where(x <= threshold, np.full_like(x, default_value), x), out)


def _exponential(x: Array, out: Array | None = None) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(x, out=out)


def _softmax(x: Array, out: Array | None = None) -> Array:
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return np.divide(e, np.sum(e, axis=-1, keepdims=True), out=out)


def _softmax_gradient(x: Array, dy: Array) -> Array:
    y = _softmax(x)
    return y * (dy - np.sum(y * dy, axis=-1, keepdims=True))


def _log_softmax(x: Array, out: Array | None) -> Array:
    shifted = x - np.max(x, axis=-1, keepdims=True)
    return np.subtract(shifted, np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True)), out=out)


def _log_softmax_gradient(x: Array, dy: Array) -> Array:
    return dy - _softmax(x) * np.sum(dy, axis=-1, keepdims=True)


def _sparsemax(x: Array, out: Array | None = None) -> Array:
    """The probability vector nearest to x: max(x - tau, 0), where tau makes the sum 1 (Martins and Astudillo, 2016).

    Of the sorted values z, those stay positive whose rank r has z_r > (z_1 + .. + z_r - 1) / r.
    """
    shifted = x - np.max(x, axis=-1, keepdims=True)
    z = -np.sort(-shifted, axis=-1)
    rank = np.cumsum(np.ones_like(z), axis=-1)
    kept = rank * z > np.cumsum(z, axis=-1) - 1
    count = np.sum(kept, axis=-1, keepdims=True, dtype=z.dtype)
    with np.errstate(divide="ignore"):  # a row with NaN keeps nothing: -1 / 0
        tau = (np.sum(np.where(kept, z, 0), axis=-1, keepdims=True) - 1) / count
    return np.maximum(shifted - tau, 0, out=out)


def _sparsemax_gradient(x: Array, dy: Array) -> Array:
    kept = np.sign(_sparsemax(x))
    mean = np.sum(dy * kept, axis=-1, keepdims=True) / np.sum(kept, axis=-1, keepdims=True)
    return (dy - mean) * kept


def _half(x: Array) -> int:
    """Half the length of the last axis."""
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"glu halves the last axis, so its length must be even. Received: x.shape={x.shape}")
    return x.shape[-1] // 2


def _glu(x: Array, out: Array | None) -> Array:
    half = _half(x)
    return np.multiply(x[..., :half], _logistic(x[..., half:]), out=out)


def _glu_gradient(x: Array, dy: Array) -> Array:
    half = _half(x)
    s = _logistic(x[..., half:])
    return np.concatenate([dy * s, dy * x[..., :half] * s * (1 - s)], axis=-1)


# ---- the activations, in Keras' spelling ---------------------------------------------------------------------------

linear = _Linear("linear", _store)

relu = Activation("relu", _relu, _relu_slope, single_pass=True)
relu6 = Activation("relu6", lambda x, out: np.clip(x, 0, 6, out=out), lambda x: _inside(x, 0, 6), single_pass=True)
leaky_relu = Activation("leaky_relu", _leaky_relu, _leaky_relu_slope)
elu = Activation("elu", _elu, _elu_slope)
selu = Activation(
    "selu",
    lambda x, out: np.multiply(_elu(x, None, _SELU_ALPHA), _SELU_SCALE, out=out),
    lambda x: _elu_slope(x, _SELU_ALPHA) * _SELU_SCALE,
)
celu = Activation("celu", _celu, lambda x, alpha=1.0: np.exp(np.minimum(x, 0) / alpha))
exponential = Activation("exponential", _exponential, _exponential, single_pass=True)

sigmoid = Activation("sigmoid", _logistic, lambda x: _logistic(x) * _logistic(-x))
log_sigmoid = Activation("log_sigmoid", lambda x, out: np.negative(_softplus(-x), out=out), lambda x: _logistic(-x))
softplus = Activation("softplus", _softplus, _logistic)
softsign = Activation(
    "softsign", lambda x, out: np.divide(x, np.abs(x) + 1, out=out), lambda x: np.square(1 / (np.abs(x) + 1))
)
tanh = Activation("tanh", lambda x, out: np.tanh(x, out=out), lambda x: 1 - np.square(np.tanh(x)), single_pass=True)
tanh_shrink = Activation(
    "tanh_shrink", lambda x, out: np.subtract(x, np.tanh(x), out=out), lambda x: np.square(np.tanh(x))
)
silu = swish = Activation("silu", lambda x, out: np.multiply(x, _logistic(x), out=out), _silu_slope)
gelu = Activation("gelu", _gelu, _gelu_slope)
mish = Activation("mish", _mish, _mish_slope)
squareplus = Activation("squareplus", _squareplus, lambda x, b=4.0: _squareplus(x, None, b) / np.sqrt(np.square(x) + b))

hard_sigmoid = Activation(
    "hard_sigmoid",
    lambda x, out: np.divide(np.clip(x + 3, 0, 6), 6, out=out),
    lambda x: np.multiply(_inside(x, -3, 3), 1 / 6, dtype=x.dtype),
)
hard_silu = hard_swish = Activation(
    "hard_silu", lambda x, out: np.multiply(x, np.clip(x + 3, 0, 6) / 6, out=out), _hard_silu_slope
)
hard_tanh = Activation(
    "hard_tanh", lambda x, out: np.clip(x, -1, 1, out=out), lambda x: _inside(x, -1, 1), single_pass=True
)
hard_shrink = Activation(
    "hard_shrink",
    lambda x, out, threshold=0.5: np.multiply(x, ~(np.abs(x) <= threshold), out=out),
    lambda x, threshold=0.5: ~(np.abs(x) <= threshold),
)
soft_shrink = Activation(
    "soft_shrink",
    lambda x, out, threshold=0.5: np.subtract(x, np.clip(x, -threshold, threshold), out=out),
    lambda x, threshold=0.5: ~(np.abs(x) <= threshold),
)
sparse_plus = Activation("sparse_plus", _sparse_plus, _half_step)
sparse_sigmoid = Activation("sparse_sigmoid", _half_step, lambda x: np.multiply(_inside(x, -1, 1), 0.5, dtype=x.dtype))
threshold = Activation("threshold", _threshold, lambda x, *, threshold, default_value: ~(x <= threshold))

softmax = Activation("softmax", _softmax, gradient=_softmax_gradient)
log_softmax = Activation("log_softmax", _log_softmax, gradient=_log_softmax_gradient)
sparsemax = Activation("sparsemax", _sparsemax, gradient=_sparsemax_gradient)
glu = _Glu("glu", _glu, gradient=_glu_gradient)


def _wrap(function: Any) -> Activation:
    return function if isinstance(function, Activation) else _Custom(function)


_REGISTRY = Registry(
    "activation",
    "keras.activations",
    {name: value for name, value in globals().items() if isinstance(value, Activation)},
    _wrap,
)


def get(identifier: Any, custom_objects: Mapping[str, Any] | None = None) -> Activation:
    """The activation meant by None (linear), a name, an Activation, a callable array -> array, or a config dict.

    Raises:
        ValueError: the name is not known.
    """
    return linear if identifier is None else _REGISTRY.get(identifier, custom_objects)


def serialize(activation: Any) -> str | dict[str, Any]:
    """Keras' name of a built-in activation ("linear" for None), or Keras 3's config dict of a custom one."""
    activation = get(activation)
    if isinstance(activation, _Custom):
        config = _REGISTRY.serialize(activation)
        return {} if config is None else config
    return activation.name
