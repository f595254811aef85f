"""Does the engine at hand compute what it should? A list of calls, each against the NumPy path in double precision.

Every operation and gradient, 1 to 3 spatial axes, both data formats, every dtype, strides, dilations, groups and
paddings, views that are strided or misaligned, little scratch memory. Inputs are random and rounded to the dtype before
they are given to both; the allowance follows from the arithmetic: half a unit in the last place for every rounding of
the result, and for a sum of n products 4 * eps * sqrt(n) of the largest value. A shifted pixel or a missing tap is off
by hundreds of times as much.

The CPU can be checked as well (`place` the identity): against itself in double precision, so the dtypes that are
double precision already are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from cuconv import geometry, ops
from cuconv.plan.types import ACTIVATION_CODES

Array = Any
Place = Callable[[np.ndarray], Array]
Shape = tuple[int, ...]

DTYPES = {dtype.name: dtype for dtype in ops.DTYPES}
REAL = ("float16", "bfloat16", "float32", "float64")
SAFETY = 4.0  # rounding errors of a sum grow like sqrt(terms); the tail over the elements of one array
LSTM_ROUNDINGS = 5  # of a step in 16 bits: two convolutions, their sum, the cell, the output
LAYOUTS = ("contiguous", "strided", "offset")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: `ops.<operation>(*arrays of these shapes, *more, **options)`, None for an array left out."""

    operation: str
    dtype: str
    shapes: tuple[Shape | None, ...]
    options: dict[str, Any]
    terms: int  # products in the longest sum
    more: tuple[Any, ...] = ()
    layout: str = "contiguous"
    scale: float = 1.0  # of the first array

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, shape)) if shape else "-" for shape in self.shapes)
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        layout = "" if self.layout == "contiguous" else f" {self.layout}"
        return f"{self.operation} {self.dtype} {shapes}{options}{layout}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a case went. `share` is the largest error as a part of what is allowed; inf where there is no answer."""

    case: Case
    share: float
    problem: str | None
    seconds: float

    @property
    def passed(self) -> bool:
        """True where every element is within what is allowed."""
        return self.problem is None


# --- The list ----------------------------------------------------------------------------------------------------

SIZES: dict[int, Shape] = {1: (37,), 2: (11, 13), 3: (7, 6, 9)}
TAPS: dict[int, Shape] = {1: (5,), 2: (3, 4), 3: (2, 3, 3)}

# Channels, filters, and options. The first is what quick runs use.
CONVOLUTIONS: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (5, 7, {"padding": "same"}),
    (16, 32, {"strides": 2}),
    (6, 8, {"dilation_rate": 3, "padding": "same", "groups": 2}),
    (8, 3, {"strides": 2, "dilation_rate": 2, "padding": (1, 3)}),
    (8, 16, {"groups": 8, "padding": "same"}),
    (64, 72, {"padding": "same", "strides": 3}),
)
TRANSPOSED: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (5, 7, {"strides": 2, "padding": "same"}),
    (16, 32, {}),
    (6, 8, {"strides": 3, "groups": 2}),
    (8, 3, {"strides": 2, "dilation_rate": 2, "padding": (1, 1)}),
    (4, 4, {"strides": 2, "output_padding": 1, "padding": "same"}),
    (48, 40, {"dilation_rate": 2, "padding": "same"}),
)
# Channels, multiplier, options.
DEPTHWISE: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (5, 2, {"padding": "same"}),
    (16, 1, {}),
    (8, 3, {"strides": 2, "padding": "same"}),
    (32, 1, {"dilation_rate": 3, "padding": "same"}),
    (3, 1, {"strides": 3, "dilation_rate": 2, "padding": (2, 4)}),
)
CAUSAL = {"padding": "causal", "dilation_rate": 4}


# What quick runs look at in other dtypes than float32: spatial axes and data format.
GLANCE = ((1, geometry.CHANNELS_LAST), (2, geometry.CHANNELS_FIRST))


def cases(quick: bool = False, without: Sequence[str] = ()) -> list[Case]:
    """The list; `without` some dtypes.

    Quick: a quarter of the kernels. Every variant in float32 with one spatial axis, and one variant of the rest.
    """
    found: list[Case] = []
    for dtype in DTYPES:
        if dtype not in without:
            thorough = not quick or dtype == "float32"
            for rank in SIZES:
                for data_format in geometry.DATA_FORMATS:
                    if thorough or (rank, data_format) in GLANCE:
                        found += _of_rank(dtype, rank, data_format, not quick or (thorough and rank == 1))
            if thorough:
                found += [*_activations(dtype), *_layouts(dtype)]
    return found


def _of_rank(dtype: str, rank: int, data_format: str, everything: bool) -> Iterator[Case]:
    kind = {"data_format": data_format}
    causal = [(6, 4, CAUSAL)] if rank == 1 and everything else []
    chosen = slice(None) if everything else slice(1)
    for channels, filters, options in [*CONVOLUTIONS[chosen], *causal]:
        yield from _conv(dtype, rank, channels, filters, {**_spelled(options, rank), **kind})
    for channels, filters, options in TRANSPOSED[chosen]:
        yield from _transpose(dtype, rank, channels, filters, {**_spelled(options, rank), **kind})
    for channels, multiplier, options in [*DEPTHWISE[chosen], *causal]:
        yield from _depthwise(dtype, rank, channels, multiplier, {**_spelled(options, rank), **kind})
    for channels, multiplier, options in [*DEPTHWISE[chosen], *causal]:
        yield from _separable(dtype, rank, channels, multiplier, {**_spelled(options, rank), **kind})
    yield from _upsample(dtype, rank, kind, everything)
    if dtype in REAL:
        yield from _lstm(dtype, rank, kind, everything)
    positions = geometry.join_shape(3, SIZES[rank], 9, data_format)
    yield Case("bias_grad", dtype, (positions,), kind, math.prod(positions) // 9)


def _spelled(options: dict[str, Any], rank: int) -> dict[str, Any]:
    padding = options.get("padding")
    return {**options, "padding": (padding,) * rank} if isinstance(padding, tuple) else options


def _conv(dtype: str, rank: int, channels: int, filters: int, options: dict[str, Any]) -> Iterator[Case]:
    x = geometry.join_shape(2, SIZES[rank], channels, options["data_format"])
    groups = options.get("groups", 1)
    w = (*TAPS[rank], channels // groups, filters)
    y = geometry.conv_shape(x, w, **options).y_shape
    fan_in = math.prod(w[:-1])
    yield Case("conv", dtype, (x, w, (filters,)), options, fan_in)
    yield Case("conv_input_grad", dtype, (y, w), options, math.prod(w[:-2]) * filters // groups, (x,))
    yield Case("conv_kernel_grad", dtype, (x, y), options, math.prod(y) // filters, (w,))
    yield Case("conv", dtype, (x, w, None), {**options, "workspace": 2048}, fan_in)


def _transpose(dtype: str, rank: int, channels: int, filters: int, options: dict[str, Any]) -> Iterator[Case]:
    x = geometry.join_shape(2, SIZES[rank], channels, options["data_format"])
    groups = options.get("groups", 1)
    w = (*TAPS[rank], filters // groups, channels)
    y = geometry.transpose_shape(x, w, **options).x_shape
    fan_in = math.prod(w[:-2]) * channels // groups
    yield Case("conv_transpose", dtype, (x, w, (filters,)), options, fan_in)
    yield Case("conv_transpose_input_grad", dtype, (y, w), options, math.prod(w[:-1]), (x,))
    yield Case("conv_transpose_kernel_grad", dtype, (x, y), options, math.prod(x) // channels, (w,))


def _depthwise(dtype: str, rank: int, channels: int, multiplier: int, options: dict[str, Any]) -> Iterator[Case]:
    x = geometry.join_shape(2, SIZES[rank], channels, options["data_format"])
    w = (*TAPS[rank], channels, multiplier)
    taps, filters = math.prod(w[:-2]), channels * multiplier
    y = geometry.depthwise_shape(x, w, **options).y_shape
    positions = math.prod(y) // filters
    yield Case("depthwise_conv", dtype, (x, w, (filters,)), options, taps)
    yield Case("depthwise_conv_input_grad", dtype, (y, w), options, taps * multiplier, (x,))
    yield Case("depthwise_conv_kernel_grad", dtype, (x, y), options, positions, (w,))
    if hasattr(ops, "depthwise_conv_grad"):
        yield Case("depthwise_conv_grad", dtype, (x, w, y), options, max(positions, taps * multiplier))


def _separable(dtype: str, rank: int, channels: int, multiplier: int, options: dict[str, Any]) -> Iterator[Case]:
    filters = 6
    x = geometry.join_shape(2, SIZES[rank], channels, options["data_format"])
    w, pointwise = (*TAPS[rank], channels, multiplier), (*(1,) * rank, channels * multiplier, filters)
    shape = geometry.depthwise_shape(x, w, **options)
    y = geometry.join_shape(2, shape.out_size, filters, options["data_format"])
    terms = math.prod(w)
    yield Case("separable_conv", dtype, (x, w, pointwise, (filters,)), options, terms)
    yield Case("separable_conv_input_grad", dtype, (y, w, pointwise), options, filters * terms, (x,))
    yield Case("separable_conv_kernel_grad", dtype, (x, y, w, pointwise), options, math.prod(y) * terms // filters)


def _upsample(dtype: str, rank: int, kind: dict[str, Any], everything: bool) -> Iterator[Case]:
    small = tuple(size // 2 for size in SIZES[rank])
    factors = (2, 3, 2)[:rank]
    large = tuple(size * factor for size, factor in zip(small, factors, strict=True))
    x, y = (geometry.join_shape(2, sizes, 5, kind["data_format"]) for sizes in (small, large))
    for interpolation in ops.INTERPOLATIONS if everything else ops.INTERPOLATIONS[:2]:
        options = {**kind, "interpolation": interpolation}
        yield Case("upsample", dtype, (x,), options, 12**rank, (factors,))
        yield Case("upsample_input_grad", dtype, (y,), options, 36**rank, (factors,))


def _lstm(dtype: str, rank: int, kind: dict[str, Any], everything: bool) -> Iterator[Case]:
    channels, filters = 3, 5
    sizes = tuple(size // 2 for size in SIZES[rank])
    x = geometry.join_shape(2, sizes, channels, kind["data_format"])
    state = geometry.join_shape(2, sizes, filters, kind["data_format"])
    w, recurrent = ((*TAPS[rank], c, 4 * filters) for c in (channels, filters))
    terms = math.prod(w[:-1]) + math.prod(recurrent[:-1])
    shapes = (x, state, state, w, recurrent, (4 * filters,))
    options = {**kind, "padding": "same"}
    kinked = {**options, "activation": "relu", "recurrent_activation": "hard_sigmoid"}
    yield Case("conv_lstm_step", dtype, shapes, options, terms)
    yield Case("conv_lstm_step_grad", dtype, (*shapes, state, state), options, terms * math.prod(state))
    if everything:  # forward only: at a kink the gradient jumps, and a sum that is rounded may lie on its other side
        yield Case("conv_lstm_step", dtype, shapes, kinked, terms)


def _activations(dtype: str) -> Iterator[Case]:
    for name in ACTIVATION_CODES if dtype in REAL else ():
        options = {"activation": name}
        # Sums of about 1: the exponential of a sum of 12 is too large for float16.
        yield Case("conv", dtype, ((2, 37, 6), (3, 6, 8), (8,)), options, 18, scale=0.25)
        yield Case("depthwise_conv", dtype, ((2, 37, 8), (3, 8, 1), (8,)), options, 3, scale=0.5)


def _layouts(dtype: str) -> Iterator[Case]:
    for layout in LAYOUTS[1:]:
        for rank in (1, 2):
            for data_format in geometry.DATA_FORMATS:
                kind = {"data_format": data_format}
                made = [
                    *_conv(dtype, rank, 16, 8, {**kind, "padding": "same"}),
                    *_transpose(dtype, rank, 8, 16, {**kind, "strides": 2}),
                    *_depthwise(dtype, rank, 16, 1, {**kind, "padding": "same"}),
                    *_separable(dtype, rank, 8, 1, kind),
                    *_upsample(dtype, rank, kind, False),
                ]
                yield from (dataclasses.replace(case, layout=layout) for case in made)


def run(listed: Sequence[Case], place: Place) -> Iterator[Outcome]:
    """The outcome of each case."""
    for number, case in enumerate(listed):
        yield check(case, place, number)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts and largest shares by operation and dtype, and every failure; fit for JSON."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for outcome in outcomes:
        row = table.setdefault(outcome.case.operation, {})
        cell = row.setdefault(outcome.case.dtype, {"cases": 0, "failed": 0, "share": 0.0})
        cell["cases"] += 1
        if outcome.passed:
            cell["share"] = max(cell["share"], outcome.share)
        else:
            cell["failed"] += 1
    failures = [{"case": str(each.case), "problem": each.problem} for each in outcomes if not each.passed]
    return {"cases": len(outcomes), "failed": len(failures), "operations": table, "failures": failures}


# --- One case ----------------------------------------------------------------------------------------------------


def check(case: Case, place: Place, number: int = 0) -> Outcome:
    """Calls the operation on arrays brought to the engine's place by `place`; `number` seeds them.

    Whatever the call raises is the outcome's problem.
    """
    started = time.perf_counter()
    try:
        share, problem = _compare(case, place, number)
    except Exception as error:  # noqa: BLE001  an engine can fail in any way, and the next case is still of interest
        share, problem = math.inf, f"{type(error).__name__}: {error}"
    return Outcome(case, share, problem, time.perf_counter() - started)


def _compare(case: Case, place: Place, number: int) -> tuple[float, str | None]:
    rng = np.random.default_rng(number)
    dtype = DTYPES[case.dtype]
    scales = [case.scale] + [1.0] * (len(case.shapes) - 1)
    arrays = [
        None if shape is None else random(rng, shape, dtype, scale)
        for shape, scale in zip(case.shapes, scales, strict=True)
    ]
    wide = [None if array is None else array.astype(wide_dtype(dtype)) for array in arrays]
    operation: Callable[..., Any] = getattr(ops, case.operation)
    expected = _all(operation(*wide, *case.more, **case.options))
    keywords = dict(case.options)
    if len(expected) == 1 and "out" in inspect.signature(operation).parameters and number % 2:
        keywords["out"] = place(np.full(expected[0].shape, np.nan, dtype))  # what is not written shows
    placed = [None if array is None else _placed(array, case.layout, place) for array in arrays]
    actual = _all(operation(*placed, *case.more, **keywords))
    slack = _slack(case, wide, expected)
    worst, problem = 0.0, None
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        if theirs is None:
            continue
        share, wrong = difference(case, ours, theirs, slack[index])
        worst, problem = max(worst, share), problem or wrong
    return worst, problem


def _all(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def wide_dtype(dtype: np.dtype) -> np.dtype:
    """Double precision, complex where `dtype` is."""
    return np.dtype(np.complex128 if dtype.kind == "c" else np.float64)


def random(rng: np.random.Generator, shape: Shape, dtype: np.dtype, scale: float) -> np.ndarray:
    """Numbers of a normal distribution, `scale` wide, rounded to `dtype`."""
    values = rng.normal(0, scale, shape)
    if dtype.kind == "c":
        values = values + 1j * rng.normal(0, scale, shape)
    return values.astype(dtype)


def _placed(array: np.ndarray, layout: str, place: Place) -> Array:
    """`array` at the engine's place, every second element of the last axis of a larger one, or one element into it."""
    if layout == "strided":
        spread = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
        spread[..., ::2] = array
        return place(spread)[..., ::2]
    if layout == "offset":
        return place(np.concatenate([np.full(1, np.nan, array.dtype), array.ravel()]))[1:].reshape(array.shape)
    return place(array)


@functools.cache
def eps(dtype: str) -> float:
    """From 1 to the next larger number."""
    return float(ml_dtypes.finfo(DTYPES[dtype]).eps)


def _slack(case: Case, wide: Sequence[np.ndarray | None], expected: Sequence[Any]) -> Sequence[Any]:
    """For each output what roundings on the way may move, where 16-bit arrays stand between two kernels."""
    if DTYPES[case.dtype].itemsize > 2:
        return [0.0] * len(expected)
    if case.operation.startswith("separable"):  # half a unit of each value between the two convolutions
        sizes = [None if array is None else np.abs(array) for array in wide]
        moved = _all(getattr(ops, case.operation)(*sizes, *case.more, **case.options))
        return [eps(case.dtype) / 2 * size for size in moved]
    if case.operation == "conv_lstm_step":  # a gate passes on at most what enters it
        x, h, _, w, recurrent, bias = wide
        kind = {"data_format": case.options["data_format"], "padding": "same"}
        sums = ops.conv(x, w, bias, **kind) + ops.conv(h, recurrent, **kind)
        return [LSTM_ROUNDINGS * eps(case.dtype) * max(1.0, np.abs(sums).max())] * len(expected)
    if case.operation == "conv_lstm_step_grad":
        largest = [0.0 if each is None else max(1.0, float(np.abs(each).max())) for each in expected]
        return [LSTM_ROUNDINGS * eps(case.dtype) * each for each in largest]
    return [0.0] * len(expected)


def difference(case: Case, ours: Array, expected: np.ndarray, slack: Any) -> tuple[float, str | None]:
    """The largest error as a part of what is allowed, and what is wrong or None."""
    dtype = DTYPES[case.dtype]
    if ours.dtype != dtype or ours.shape != expected.shape:
        return math.inf, f"{ours.dtype} {tuple(ours.shape)} instead of {dtype} {expected.shape}"
    actual = ops.to_numpy(ours).astype(expected.dtype)
    if not np.all(np.isfinite(expected)):
        return math.inf, "the expected values are not finite"
    lost = np.count_nonzero(~np.isfinite(actual))
    if lost:
        return math.inf, f"{lost} of {actual.size} elements are not finite"
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    summed = eps("float32") if dtype.itemsize == 2 else eps(case.dtype)
    # Twice rounded: as a sum, and when it is stored.
    allowed = eps(case.dtype) * np.abs(expected) + SAFETY * summed * math.sqrt(max(1, case.terms)) * scale + slack
    shares = np.abs(actual - expected) / allowed
    worst = float(shares.max(initial=0.0))
    if worst <= 1:
        return worst, None
    at = tuple(map(int, np.unravel_index(np.argmax(shares), shares.shape)))
    count = np.count_nonzero(shares > 1)
    return worst, f"{count} of {shares.size} elements differ; at {at} {actual[at]} instead of {expected[at]}"
