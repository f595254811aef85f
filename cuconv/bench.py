"""Times a layer or a model of the user's where cuconv computes: what `cuconv bench` does.

Before anything is timed, the result is compared with the same computation in double precision. On a GPU there are two
times: the device's, and that of the whole Python call until its result is there. On the CPU there is the latter, of the
NumPy path, and beside it what :mod:`cuconv.explain` predicts for a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cuconv import __version__, activations, doctor, geometry, layers, models, ops, parity, profiling, timing
from cuconv.cuda import runtime
from cuconv.explain import Explanation
from cuconv.layers.base import Layer, to_tuple
from cuconv.parity import Case, Outcome, Place
from cuconv.plan.types import DeviceLimits
from cuconv.timing import Timing

Shape = tuple[int, ...]

# Layer -> function of cuconv.ops and number of spatial axes.
LAYERS = {
    **{f"conv{rank}d": ("conv", rank) for rank in (1, 2, 3)},
    **{f"conv{rank}d_transpose": ("conv_transpose", rank) for rank in (1, 2, 3)},
    **{f"depthwise_conv{rank}d": ("depthwise_conv", rank) for rank in (1, 2)},
    **{f"separable_conv{rank}d": ("separable_conv", rank) for rank in (1, 2)},
}
PASSES = ("forward", "input_grad", "kernel_grad")

SAMPLES = 50
MOST_SECONDS = 30.0  # of measuring one time; at least timing.LEAST_SAMPLES samples are taken
FORMAT = "cuconv bench 1"
# Activations that jump: a sum that is rounded may lie on the other side, so they are compared without.
JUMPS = ("hard_shrink", "threshold")


# --- A layer as a call -------------------------------------------------------------------------------------------


def layer_case(
    layer: str,
    shape: Shape,
    kernel_size: Shape,
    *,
    filters: int | None = None,
    depth_multiplier: int = 1,
    groups: int = 1,
    strides: int | Shape = 1,
    padding: str | Sequence[tuple[int, int]] = "valid",
    dilation_rate: int | Shape = 1,
    data_format: str = geometry.CHANNELS_LAST,
    activation: str | None = None,
    use_bias: bool = True,
    dtype: str = "float32",
    direction: str = "forward",
) -> Case:
    """The call of :mod:`cuconv.ops` that a layer makes in one pass, with the arrays it takes.

    Args:
        layer: one of :data:`LAYERS`.
        shape: of the input, with the batch axis.
        kernel_size: taps, one number for all spatial axes or one for each.
        direction: one of :data:`PASSES`. Gradients have neither bias nor activation.

    Raises:
        ValueError: an argument is out of range, does not belong to this layer, or the shapes do not fit.
    """
    operation, rank = LAYERS[layer]
    depthwise, transposed = operation in ("depthwise_conv", "separable_conv"), operation == "conv_transpose"
    if len(shape) != rank + 2:
        raise ValueError(f"`shape` must have {rank + 2} sizes, the batch first, for {layer}. Received: shape={shape}")
    if (filters is None) != (operation == "depthwise_conv"):
        verb = "must not be given" if filters else "must be given"
        hint = "; `depth_multiplier` sets its output channels" if filters else ""
        raise ValueError(f"`filters` {verb} for {layer}{hint}. Received: filters={filters}")
    for name, value, allowed in (("groups", groups, not depthwise), ("depth_multiplier", depth_multiplier, depthwise)):
        if value != 1 and not allowed:
            raise ValueError(f"`{name}` must not be given for {layer}. Received: {name}={value}")
    options: dict[str, Any] = {"strides": strides, "padding": padding, "dilation_rate": dilation_rate}
    options = {name: value for name, value in options.items() if value not in (1, "valid")}
    options |= {"groups": groups} if groups != 1 else {}
    options |= {"data_format": data_format} if data_format != geometry.CHANNELS_LAST else {}
    taps = kernel_size * rank if len(kernel_size) == 1 else kernel_size
    _, _, channels = geometry.split_shape(shape, data_format)
    count = int(filters or int(channels or 0) * depth_multiplier)
    kernels, y, terms = _arrays(operation, shape, taps, int(channels or 0), count, depth_multiplier, options)
    positions = math.prod(y) // max(1, count)
    if direction == "forward":
        options |= {"activation": activation} if activation not in (None, "linear") else {}
        arrays: tuple[Shape | None, ...] = (shape, *kernels, (count,) if use_bias else None)
        return Case(operation, dtype, arrays, options, terms, scale=1 / math.sqrt(max(1, terms)))
    if activation not in (None, "linear"):
        raise ValueError(f"`activation` must not be given for a gradient. Received: activation={activation!r}")
    if direction == "input_grad":
        terms = max(1, terms * count // max(1, int(channels or 0)))
        return Case(f"{operation}_input_grad", dtype, (y, *kernels), options, terms, (shape,))
    inputs = math.prod(shape) // max(1, int(channels or 0))
    terms = inputs if transposed else positions * (count if operation == "separable_conv" else 1)
    if operation == "separable_conv":
        return Case("separable_conv_kernel_grad", dtype, (shape, y, *kernels), options, terms)
    return Case(f"{operation}_kernel_grad", dtype, (shape, y), options, terms, kernels)


def _arrays(
    operation: str, shape: Shape, taps: Shape, channels: int, filters: int, multiplier: int, options: dict[str, Any]
) -> tuple[tuple[Shape, ...], Shape, int]:
    """The shapes of the kernels and of the output, and the products in one element of it."""
    groups, data_format = options.get("groups", 1), options.get("data_format", geometry.CHANNELS_LAST)
    if operation == "conv":
        w = (*taps, channels // groups, filters)
        return (w,), _known(geometry.conv_shape(shape, w, **options).y_shape), math.prod(w[:-1])
    if operation == "conv_transpose":
        w = (*taps, filters // groups, channels)
        terms = math.prod(taps) * channels // groups
        return (w,), _known(geometry.transpose_shape(shape, w, **options).x_shape), terms
    w = (*taps, channels, multiplier)
    found = geometry.depthwise_shape(shape, w, **options)
    if operation == "depthwise_conv":
        return (w,), _known(found.y_shape), math.prod(taps)
    pointwise = (*(1 for _ in taps), channels * multiplier, filters)
    y = geometry.join_shape(shape[0], found.out_size, filters, data_format)
    return (w, pointwise), _known(y), math.prod(w)


def _known(shape: Sequence[int | None]) -> Shape:
    return tuple(int(size or 0) for size in shape)


def explain(case: Case, device: str | None = None) -> Explanation:
    """What the call costs on a GPU and why."""
    return ops.explain(case.operation, *case.shapes, *case.more, dtype=case.dtype, device=device, **case.options)


# --- What is timed -----------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What the plans' model says of some work on a device; `seconds` is predicted."""

    device: DeviceLimits
    seconds: float
    roof_seconds: float
    flops: int
    bytes: int
    side: str
    algorithm: str


@dataclasses.dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
        name: for people.
        operation: "conv"; "model".
        facts: two works with equal facts are the same; fit for JSON.
        check: place -> the outcome of a comparison with double precision.
        call: place -> the call to time, on arrays that lie there.
        predict: name of a GPU -> the prediction for it; None: the GPU at hand, else an H200.
    """

    name: str
    operation: str
    facts: dict[str, Any]
    check: Callable[[Place], Outcome]
    call: Callable[[Place], Callable[[], Any]]
    predict: Callable[[str | None], Prediction]


def layer_work(name: str, case: Case) -> Work:
    """One call of an operation."""

    def call(place: Place) -> Callable[[], Any]:
        rng = np.random.default_rng(0)
        dtype = parity.DTYPES[case.dtype]
        # The values that the comparison has seen: what takes time does not depend on them, but NaN would be slow.
        scales = [case.scale] + [1.0] * (len(case.shapes) - 1)
        arrays = [
            None if shape is None else place(parity.random(rng, shape, dtype, scale))
            for shape, scale in zip(case.shapes, scales, strict=True)
        ]
        return functools.partial(getattr(ops, case.operation), *arrays, *case.more, **case.options)

    def predict(device: str | None) -> Prediction:
        found = explain(case, device)
        figures = (found.seconds, found.roof_seconds, found.flops, found.bytes, found.side, found.algorithm)
        return Prediction(found.device, *figures)

    facts = {
        "operation": case.operation,
        "dtype": case.dtype,
        "shapes": [shape and list(shape) for shape in (*case.shapes, *case.more)],
        "options": _plain(case.options),
    }
    options = {key: value for key, value in case.options.items() if value not in JUMPS}
    check = functools.partial(parity.check, dataclasses.replace(case, options=options))
    return Work(name, case.operation, facts, check, call, predict)


def model_work(name: str, model: models.Model, shapes: Sequence[Shape]) -> Work:
    """One call of a model, without training, on inputs of these shapes."""
    samples = profiling.random_inputs(model, shapes)

    def call(place: Place) -> Callable[[], Any]:
        arrays = [place(sample) for sample in samples]
        return functools.partial(model, arrays if len(arrays) > 1 else arrays[0])

    def predict(device: str | None) -> Prediction:
        limits = profiling.limits_of(device)
        found = profiling.predicted(model, shapes, limits)
        costs = [row.cost for row in found]
        kernels: dict[str, float] = {}
        for step in (step for cost in costs for step in cost.steps):
            kernels[step.kernel] = kernels.get(step.kernel, 0.0) + step.seconds
        by_side = {
            side: sum(cost.roof_seconds for cost in costs if cost.side == side) for side in ("compute", "memory")
        }
        return Prediction(
            limits,
            sum(cost.seconds for cost in costs),
            sum(cost.roof_seconds for cost in costs),
            sum(cost.flops for cost in costs),
            sum(cost.bytes for cost in costs),
            max(by_side, key=lambda side: by_side[side]),
            max(kernels, key=lambda kernel: kernels[kernel], default=""),
        )

    facts = {
        "operation": "model",
        "dtype": ", ".join(dict.fromkeys(tensor.dtype for tensor in model.inputs)),
        "shapes": [list(shape) for shape in shapes],
        "options": {"model": model.name, "layers": profiling.fingerprint(model)},
    }
    return Work(name, "model", facts, lambda place: check_model(model, samples, place), call, predict)


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


# --- A model against double precision ----------------------------------------------------------------------------


def check_model(model: models.Model, inputs: Sequence[np.ndarray], place: Place) -> Outcome:
    """Compares every layer with itself in double precision, given the same inputs; the worst of them is the outcome.

    Layer by layer, because the errors of many layers in a row add up in ways that no bound knows.
    """
    started = time.perf_counter()
    worst: tuple[float, str | None, Case | None] = (0.0, None, None)
    doubles: dict[Layer, Layer] = {}

    def visit(path: str, layer: Layer, arrays: list[Any]) -> Sequence[Any]:
        nonlocal worst
        double = doubles.get(layer) or doubles.setdefault(layer, _in_double_precision(layer))
        wide = parity.wide_dtype(parity.DTYPES[layer.compute_dtype])
        given = [ops.to_numpy(array).astype(layer.compute_dtype).astype(wide) for array in arrays]
        with _without_jump(layer) as jump, _without_jump(double):
            outputs = to_tuple(layer._run(*arrays, training=False))
            expected = to_tuple(double._run(*given, training=False))
        case = _case_of(layer, given)
        for ours, theirs in zip(outputs, expected, strict=True):
            largest = float(np.abs(theirs).max(initial=0.0))
            share, wrong = parity.difference(case, ours, theirs, _roundings(layer, given) * max(1.0, largest))
            if (wrong and not worst[1]) or (bool(wrong) == bool(worst[1]) and share > worst[0]):
                worst = (share, wrong and f"layer {path}: {wrong}", case)
        return tuple(map(jump, outputs)) if jump else outputs

    try:
        profiling.walk(model, [place(array) for array in inputs], visit)
    except Exception as error:  # noqa: BLE001  an engine can fail in any way, and that is the outcome
        worst = (math.inf, f"{type(error).__name__}: {error}", None)
    share, problem, case = worst
    return Outcome(case or Case("model", "float32", (), {}, 1), share, problem, time.perf_counter() - started)


@contextlib.contextmanager
def _without_jump(layer: Any) -> Iterator[Any]:
    """Takes an activation that jumps away from a layer that sums products, and gives it, or None."""
    activation = getattr(layer, "activation", None)
    if getattr(activation, "name", None) not in JUMPS or isinstance(layer, layers.Activation):
        yield None
        return
    layer.activation = activations.linear
    try:
        yield activation
    finally:
        layer.activation = activation


def _case_of(layer: Layer, arrays: Sequence[np.ndarray]) -> Case:
    """What the allowance depends on: the dtype, and the products in the longest sum."""
    terms = max((math.prod(weight.shape) for weight in layer.weights if weight.ndim > 1), default=12**3)
    return Case(type(layer).__name__, layer.compute_dtype, tuple(array.shape for array in arrays), {}, terms)


def _roundings(layer: Layer, arrays: Sequence[np.ndarray]) -> float:
    """What roundings between the kernels of one layer may move, as a part of the largest value."""
    eps = parity.eps(layer.compute_dtype)
    if isinstance(layer, layers.ConvLSTM1D | layers.ConvLSTM2D | layers.ConvLSTM3D):
        return parity.LSTM_ROUNDINGS * arrays[0].shape[1] * eps  # in every step, and the state carries them on
    several = isinstance(layer, layers.SeparableConv1D | layers.SeparableConv2D | layers.Activation)
    several |= not getattr(getattr(layer, "activation", None), "pointwise", True)  # softmax and the like
    return 4 * eps if several and parity.DTYPES[layer.compute_dtype].itemsize == 2 else 0.0


def _in_double_precision(layer: Layer) -> Layer:
    """A copy of a layer that computes in double precision with the weights as this one rounds them."""
    compute = parity.DTYPES[layer.compute_dtype]
    wide = parity.wide_dtype(compute)
    config = {**layer.get_config(), "dtype": wide.name}
    double = type(layer).from_config(config)
    if layer._build_shape is not None and layer.weights:
        double.build(layer._build_shape)
        double.set_weights([weight.astype(compute).astype(wide) for weight in layer.get_weights()])
    return double


# --- Measuring ---------------------------------------------------------------------------------------------------

# (what is done, how often or None) -> called after each time.
Phase = Callable[[str, int | None], Callable[[], Any]]


def _silent(what: str, count: int | None) -> Callable[[], Any]:
    return lambda: None


def measure(
    work: Work, gpu: runtime.Device | None, predict: str | None = None, samples: int = SAMPLES, phase: Phase = _silent
) -> dict[str, Any]:
    """Compares `work` with double precision, times it, and predicts it; fit for JSON, times in seconds.

    Args:
        gpu: where; None: the CPU.
        predict: the GPU to predict for; None: `gpu`, or an H200.

    Raises:
        ValueError, TypeError: the operation does not take these arrays or options.
        ArithmeticError: the result is wrong; nothing was timed.
    """
    place: Place = np.asarray
    current: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if gpu is not None:
        place, current = runtime.device_array, runtime.on(gpu.index)
    with current:
        prediction = work.predict(predict)  # first: it is quick, and finds what does not fit
        here = None if gpu is None else work.predict(None)
        phase("comparing with double precision", None)
        outcome = work.check(place)
        if not outcome.passed:
            raise ArithmeticError(f"not timed, because the comparison with double precision fails: {outcome.problem}")
        call = work.call(place)
        timings = _timings(call, here and f"cuconv.{work.operation}[{here.algorithm}]", samples, phase)
    main = timings["device" if gpu is not None else "call"]
    in_double = outcome.case.dtype in ("float64", "complex128") and gpu is None
    return {
        "format": FORMAT,
        "name": work.name,
        "work": work.facts,
        "machine": machine(gpu),
        "measured_on": f"GPU {gpu.index} ({gpu.name})" if gpu else doctor.device_of(np.zeros(1)),
        "check": {
            "error": None if in_double else outcome.share,  # as a part of what is allowed
            "against": None if in_double else "the same in double precision on the CPU",
        },
        "timings": {name: dataclasses.asdict(each) for name, each in timings.items()},
        "flops": prediction.flops,
        "bytes": prediction.bytes,
        "flops_per_second": prediction.flops / main.median,
        "bytes_per_second": prediction.bytes / main.median,
        "share_of_roof": here and here.roof_seconds / main.median,
        "predicted": {
            "device": prediction.device.name,
            "seconds": prediction.seconds,
            "roof_seconds": prediction.roof_seconds,
            "side": prediction.side,
            "algorithm": prediction.algorithm,
        },
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _timings(call: Callable[[], Any], name: str | None, samples: int, phase: Phase) -> dict[str, Timing]:
    """By "call", from Python until the result is there, and on a GPU, where the call has a name, by "device"."""
    if name is None:
        advance = phase("timing the NumPy path", samples + 1)
        return timing.host_times({"call": call}, samples, advance, MOST_SECONDS)
    advance = phase("timing the call from Python", samples + 1)
    synchronize = runtime.library().cuda.runtime.deviceSynchronize

    def finish() -> None:
        synchronize()
        advance()

    with runtime.time_range(name):  # seen by NVIDIA's profilers
        found = timing.host_times({"call": call}, samples, finish, MOST_SECONDS)
    phase("timing the device", None)
    with runtime.time_range(name):
        return found | timing.device_times({"device": timing.CupyCall(call)}, samples, seconds=MOST_SECONDS)


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def machine(gpu: runtime.Device | None) -> dict[str, Any]:
    """What must be equal for two times to be compared."""
    if gpu is not None:
        return {"gpu": gpu.name}
    return {"cpu": processor(), "cores": os.cpu_count(), "threads": {name: os.environ.get(name) for name in THREADS}}


def processor() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """What else a time may depend on."""
    found = runtime.probe()
    return {
        "cuconv": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cupy": found.cupy_version,
        "driver": found.driver_version,
        "nvrtc": found.nvrtc_version,
    }


# --- Two reports -------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """One time of two reports; `verdict` is "slower", "faster" or "same"."""

    timing: str
    before: float
    now: float
    verdict: str


def check_base(base: Any, work: Work, here: Mapping[str, Any]) -> None:
    """Raises ValueError where `base`, read from a file, is no report of `work` on this machine."""
    try:
        known, facts, place = base["format"] == FORMAT, dict(base["work"]), dict(base["machine"])
        times = {name: Timing(**each) for name, each in base["timings"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        known = False
    if not known or not times:
        raise ValueError("was not written by `cuconv bench --save` of this version")
    for word, theirs, ours in (("work", facts, work.facts), ("machine", place, here)):
        differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if differing:
            told = ", ".join(f"{key} {theirs.get(key)!r} instead of {ours.get(key)!r}" for key in differing)
            raise ValueError(f"is of another {word}: {told}")


def compare(base: Mapping[str, Any], report: Mapping[str, Any]) -> list[Change]:
    """Each time of both reports, and whether it has changed, see :func:`cuconv.timing.verdict`."""
    found = []
    for name, ours in report["timings"].items():
        before, now = Timing(**base["timings"][name]), Timing(**ours)
        found.append(Change(name, before.median, now.median, timing.verdict(before, now)))
    return found
