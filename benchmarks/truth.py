"""What the right answer of a suite row is: float64, by definition, at sampled places; and how far off another one is.

The arrays of most rows are too large to compute an answer for in full. So an answer must be finite everywhere and right
at places drawn anew for every run, corners and edges among them, where padding is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.suite import Row

Array = Any  # numpy.ndarray or cupy.ndarray

SAMPLES = 64  # positions, and channels at each of them
GATHERED = 1 << 22  # elements of an operand brought to the host at a time, about
SAFETY = 4.0  # rounding errors of n terms grow like sqrt(n); this covers the largest of many
ROUNDINGS = 4  # to the dtype: after the sum, the bias, the activation, and one to spare
TF32_EPS = 2.0**-10

BITS = {2: np.uint16, 4: np.uint32}
EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}  # all set: infinity or NaN


def dtype_of(row: Row) -> np.dtype[Any]:
    """The NumPy dtype of a row's arrays."""
    return np.dtype(ml_dtypes.bfloat16 if row.array_dtype == "bfloat16" else row.array_dtype)


# --- Operands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """The arrays of one row in Keras' layout, channels last; those that the operation does not take are None."""

    x: Array = None
    kernels: tuple[Array, ...] = ()
    bias: Array = None
    dy: Array = None

    @classmethod
    def random(cls, row: Row, library: Any, seed: int) -> Operands:
        """Normal numbers, made where `library`, NumPy or CuPy, computes; kernels scaled so that answers are near 1."""
        generator = library.random.default_rng(seed)
        dtype = dtype_of(row)

        def normal(shape: Sequence[int], scale: float = 1.0) -> Array:
            numbers = generator.standard_normal(tuple(shape), dtype=np.float32)
            if scale != 1:
                numbers *= np.float32(scale)
            return numbers.astype(dtype, copy=False)

        taps = math.prod(row.kernel_size)
        dense = not row.depthwise and row.op != "separable_conv"
        terms = [taps * (row.kernels[0][-1 if row.op in ("conv_transpose", "conv_input_grad") else -2] if dense else 1)]
        if row.op in ("conv_transpose", "conv_input_grad"):  # of the taps, one in `strides` meets an input
            terms = [max(1, terms[0] // math.prod(row.strides))]
        if row.op == "separable_conv":
            terms.append(row.kernels[1][-2])
        takes = {
            "conv_input_grad": ("kernels", "dy"),
            "conv_kernel_grad": ("x", "dy"),
            "depthwise_conv_grad": ("x", "kernels", "dy"),
        }.get(row.op, ("x", "kernels", "bias"))
        scaled = zip(row.kernels, terms, strict=True)
        return cls(
            x=normal(row.x) if "x" in takes else None,
            kernels=tuple(normal(shape, n**-0.5) for shape, n in scaled) if "kernels" in takes else (),
            bias=normal((row.filters,)) if "bias" in takes else None,
            dy=normal(row.y) if "dy" in takes else None,
        )

    def arguments(self, row: Row, variant: str) -> tuple[Any, ...]:
        """What the function of :mod:`cuconv.ops` takes by position."""
        if row.op == "conv_input_grad":
            return self.dy, self.kernels[0], row.x
        if row.op == "conv_kernel_grad":
            return self.x, self.dy, row.kernels[0]
        if row.op == "depthwise_conv_grad":
            return self.x, self.kernels[0], self.dy
        return (self.x, *self.kernels, *([self.bias] if variant == "fused" else []))


def bits(array: Array) -> Array:
    """The same memory as unsigned integers, which every array library copies and compares in every way."""
    return array.view(BITS[array.dtype.itemsize])


def poison(array: Array) -> None:
    """Fills an array with NaN."""
    bits(array)[...] = np.iinfo(BITS[array.dtype.itemsize]).max


def finite(array: Array) -> bool:
    """Whether no element is infinite or NaN."""
    exponent = BITS[array.dtype.itemsize](EXPONENTS[array.dtype.name])
    return not bool(((bits(array) & exponent) == exponent).any())


def gathered(array: Array, index: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    """The selected elements in float64, on the host; an index holds arrays, slices and `...`."""
    if isinstance(array, np.ndarray):
        return array[index].astype(np.float64)
    import cupy

    on_device = tuple(cupy.asarray(each) if isinstance(each, np.ndarray) else each for each in index)
    return bits(array)[on_device].get().view(array.dtype).astype(np.float64)


# --- The definition at a few places ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The right values of one output at an index of it."""

    index: tuple[Any, ...]
    values: np.ndarray[Any, Any]
    terms: int  # products summed into one element


@dataclass(frozen=True)
class Truth:
    """The right answer of one row and variant on given operands, sampled with the places that `seed` draws."""

    row: Row
    variant: str
    operands: Operands
    seed: int
    positions: int = SAMPLES
    _random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_random", np.random.default_rng(self.seed))

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """One for each output."""
        row, operands = self.row, self.operands
        if row.op == "conv_kernel_grad":
            return (self._kernel_gradient(),)
        if row.op == "conv_input_grad":
            return (self._scattered(operands.dy, row.x),)
        if row.op == "depthwise_conv_grad":
            return self._scattered(operands.dy, row.x), self._kernel_gradient(), self._bias_gradient()
        sample = self._scattered(operands.x, row.y) if row.op == "conv_transpose" else self._windowed()
        if self.variant == "fused":
            sums = sample.values + gathered(operands.bias, (sample.index[-1],))
            sample = Sample(sample.index, ACTIVATIONS[row.activation](sums), sample.terms)
        return (sample,)

    def share(self, answers: Sequence[Array], tf32: bool = False) -> float:
        """The largest error of an answer, one array for each output, as a share of what is allowed; above 1 is wrong.

        Raises:
            WrongAnswerError: another shape or dtype than it should be, or a number that is not finite.
        """
        row, dtype = self.row, dtype_of(self.row)
        if len(answers) != len(row.outputs):
            raise WrongAnswerError(f"{len(answers)} arrays where {len(row.outputs)} are expected")
        worst = 0.0
        for answer, shape, sample in zip(answers, row.outputs, self.samples, strict=True):
            if answer.shape != shape or answer.dtype != dtype:
                raise WrongAnswerError(f"{answer.dtype}{answer.shape} where {dtype}{shape} is expected")
            if not finite(answer):
                raise WrongAnswerError("it holds numbers that are not finite")
            off = np.abs(gathered(answer, sample.index) - sample.values)
            worst = max(worst, float((off / self._allowed(sample, tf32 or row.dtype == "tf32")).max()))
        return worst

    def _allowed(self, sample: Sample, tf32: bool) -> np.ndarray[Any, Any]:
        """How far each sampled value may be off."""
        sizes = np.abs(sample.values)
        spread = max(1e-30, float(np.sqrt(np.mean(sample.values**2))), 1.0 if self.variant == "fused" else 0.0)
        roundings = ROUNDINGS * (2 if self.row.op == "separable_conv" else 1)  # its intermediate is rounded, too
        eps = float(ml_dtypes.finfo(dtype_of(self.row)).eps)
        allowed = roundings * eps / 2 * (sizes + spread)
        allowed += SAFETY * float(np.finfo(np.float32).eps) * math.sqrt(sample.terms) * max(spread, float(sizes.max()))
        return allowed + SAFETY * TF32_EPS * (sizes + 2 * spread) if tf32 else allowed

    # --- Places ---

    def _chosen(self, count: int, at_most: int) -> np.ndarray[Any, Any]:
        """Some of `count` indices in order, the first and the last among them."""
        if count <= at_most:
            return np.arange(count)
        inner = self._random.choice(count - 2, at_most - 2, replace=False) + 1 if at_most > 2 else []
        return np.unique([0, count - 1, *inner]) if at_most > 1 else self._random.integers(count, size=1)

    def _places(self, shape: tuple[int, ...], count: int) -> tuple[np.ndarray[Any, Any], ...]:
        """Batch and spatial indices of `count` positions; every coordinate lies at an edge as often as within."""
        every = math.prod(shape[:-1])
        if every <= count:
            return np.unravel_index(np.arange(every), shape[:-1])
        places = []
        for axis, n in enumerate(shape[:-1]):
            within = self._random.integers(n, size=count)
            edges = self._random.choice((0, n - 1), size=count)
            at_edge = self._random.random(count) < (0.5 if axis else 0.0)
            places.append(np.where(at_edge, edges, within))
        return tuple(places)

    def _count(self, terms: int) -> int:
        return max(8, min(self.positions, GATHERED // max(1, terms)))

    # --- Operations ---

    def _taps(self) -> tuple[np.ndarray[Any, Any], ...]:
        """The offset of every tap from the first one, per axis, [taps, 1]."""
        taps = np.unravel_index(np.arange(math.prod(self.row.kernel_size)), self.row.kernel_size)
        return tuple(r[:, None] * d for r, d in zip(taps, self.row.dilation_rate, strict=True))

    def _windowed(self) -> Sample:
        """y[p, f]: the inputs p * stride + tap * dilation - pad through every tap."""
        row, shape = self.row, self.row.geometry
        by_channel = row.depthwise or row.op == "separable_conv"
        taps = math.prod(row.kernel_size)
        batch, *places = self._places(row.y, self._count(taps * (SAMPLES if row.depthwise else row.x[-1])))
        filters = self._chosen(row.filters, SAMPLES)
        reads, valid = [], np.ones((taps, len(batch)), bool)
        for p, offset, s, pad, n in zip(
            places, self._taps(), row.strides, shape.pad_before, shape.in_size, strict=True
        ):
            i = p * s + offset - pad
            valid &= (i >= 0) & (i < n)
            reads.append(np.clip(i, 0, n - 1))
        index = (batch[:, None], *(p[:, None] for p in places), filters)
        kernel = self.operands.kernels[0]
        if not by_channel:
            window = gathered(self.operands.x, (batch, *reads)) * valid[..., None]  # [taps, positions, C]
            weights = gathered(kernel, (..., filters)).reshape(taps, row.x[-1], len(filters))
            return Sample(index, np.einsum("rnc,rcf->nf", window, weights, optimize=True), taps * row.x[-1])
        multiplier = kernel.shape[-1]
        channels = filters // multiplier if row.depthwise else np.arange(row.x[-1])
        window = gathered(self.operands.x, (batch[:, None], *(i[..., None] for i in reads), channels))
        weights = gathered(kernel, (..., channels, filters % multiplier if row.depthwise else np.zeros_like(channels)))
        values = np.einsum("rnc,rc->nc", window * valid[..., None], weights.reshape(taps, len(channels)))
        if row.depthwise:
            return Sample(index, values, taps)
        mixing = gathered(self.operands.kernels[1], (..., filters)).reshape(row.x[-1], len(filters))
        return Sample(index, values @ mixing, taps + row.x[-1])

    def _scattered(self, source: Array, target: tuple[int, ...]) -> Sample:
        """The transposed form, `source` on the y side and `target` on the x side of the convolution: what lies at i
        comes from every tap and position with position * stride + tap * dilation - pad = i."""
        row, shape = self.row, self.row.geometry
        taps = math.prod(row.kernel_size)
        batch, *places = self._places(target, self._count(taps * (SAMPLES if row.depthwise else source.shape[-1])))
        channels = self._chosen(target[-1], SAMPLES)
        reads, valid = [], np.ones((taps, len(batch)), bool)
        for i, offset, s, pad, n in zip(
            places, self._taps(), row.strides, shape.pad_before, shape.out_size, strict=True
        ):
            p = i + pad - offset
            valid &= (p % s == 0) & (p >= 0) & (p // s < n)
            reads.append(np.clip(p // s, 0, n - 1))
        index = (batch[:, None], *(i[:, None] for i in places), channels)
        kernel = self.operands.kernels[0]
        if row.depthwise:  # one filter a channel
            found = gathered(source, (batch[:, None], *(p[..., None] for p in reads), channels)) * valid[..., None]
            weights = gathered(kernel, (..., channels, np.zeros_like(channels))).reshape(taps, len(channels))
            return Sample(index, np.einsum("rnc,rc->nc", found, weights), taps)
        found = gathered(source, (batch, *reads)) * valid[..., None]
        weights = gathered(kernel, (..., channels, slice(None))).reshape(taps, len(channels), -1)
        return Sample(index, np.einsum("rnf,rcf->nc", found, weights, optimize=True), taps * source.shape[-1])

    def _kernel_gradient(self) -> Sample:
        """dw[r, c, f]: the sum over all positions, for a few taps, channels and filters."""
        row, shape = self.row, self.row.geometry
        x, dy = self.operands.x, self.operands.dy
        channels = self._chosen(x.shape[-1], max(1, min(8, 4 * GATHERED // math.prod(x.shape[:-1]))))
        filters = (
            channels
            if row.depthwise
            else self._chosen(dy.shape[-1], max(1, min(8, 4 * GATHERED // math.prod(dy.shape[:-1]))))
        )
        inputs, gradients = gathered(x, (..., channels)), gathered(dy, (..., filters))
        after = [
            max(0, (m - 1) * s + k - n - pad)
            for m, s, k, n, pad in zip(
                shape.out_size, row.strides, shape.k_eff, shape.in_size, shape.pad_before, strict=True
            )
        ]
        padded = np.pad(inputs, [(0, 0), *zip(shape.pad_before, after, strict=True), (0, 0)])
        taps = np.unravel_index(self._chosen(math.prod(row.kernel_size), 4), row.kernel_size)
        values = []
        for tap in zip(*taps, strict=True):
            reads = tuple(
                slice(r * d, r * d + (m - 1) * s + 1, s)
                for r, d, m, s in zip(tap, row.dilation_rate, shape.out_size, row.strides, strict=True)
            )
            window = padded[(slice(None), *reads)].reshape(-1, len(channels))
            flat = gradients.reshape(-1, len(filters))
            values.append(np.einsum("nc,nc->c", window, flat)[:, None] if row.depthwise else window.T @ flat)
        at = tuple(r[:, None, None] for r in taps)
        columns = np.zeros(1, int) if row.depthwise else filters
        index = (*at, channels[:, None], columns)
        return Sample(index, np.stack(values), math.prod(dy.shape[:-1]))

    def _bias_gradient(self) -> Sample:
        dy = self.operands.dy
        filters = self._chosen(dy.shape[-1], max(1, min(8, 4 * GATHERED // math.prod(dy.shape[:-1]))))
        values = gathered(dy, (..., filters)).reshape(-1, len(filters)).sum(axis=0)
        return Sample((filters,), values, math.prod(dy.shape[:-1]))


ACTIVATIONS = {
    "relu": lambda z: np.maximum(z, 0),
    "silu": lambda z: z / (1 + np.exp(-z)),
}


class WrongAnswerError(Exception):
    """An answer is not the one that the definition gives."""
