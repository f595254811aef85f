"""Where the time of a model goes, layer by layer: what `cuconv profile` does.

Every layer has a prediction for a GPU, by the plans' own model, and where it was run also a measured time. The page of
:func:`page` is one file that loads nothing.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import html
import importlib.resources
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cuconv import __version__, doctor, explain, models, parity, timing
from cuconv.cuda import runtime
from cuconv.explain import Step
from cuconv.layers.base import Layer, to_tuple
from cuconv.plan.devices import device as device_named
from cuconv.plan.types import DeviceLimits
from cuconv.timing import Timing

Array = Any
Shape = tuple[int, ...]

PREDICTED_FOR = "H200"  # where no GPU is at hand and none is named
SAMPLES = 50
MOST_SECONDS = 30.0  # of measuring; at least timing.LEAST_SAMPLES samples are taken

# What `explain.peak_rate` calls a layer that has no matrix product; the others are convolutions.
_WITHOUT_PRODUCT = {"DepthwiseConv": "depthwise_conv", "UpSampling": "upsample"}


@dataclass(frozen=True)
class Cost:
    """What one call of a layer does on a GPU by the plans' model, and what it has to do at least.

    Attributes:
        bytes: every input, weight and output once; 0 where the output is a view of the input.
        peak: operations a second of the fastest unit that computes the layer's dtype.
    """

    device: DeviceLimits
    steps: tuple[Step, ...]
    flops: int
    bytes: int
    peak: float

    @property
    def seconds(self) -> float:
        """Predicted for all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def roof_seconds(self) -> float:
        """What the peaks of the device allow."""
        return max(self.flops / self.peak, self.bytes / self.device.bandwidth)

    @property
    def side(self) -> str:
        """Of the roofline: "compute" or "memory"."""
        return "compute" if self.flops / self.peak > self.bytes / self.device.bandwidth else "memory"

    @property
    def kernel(self) -> str:
        """Of the step that takes longest; "" where nothing is launched."""
        return max(self.steps, key=lambda step: step.seconds).kernel if self.steps else ""


@dataclass(frozen=True)
class Row:
    """One call of a layer. `weights` counts numbers; `timing` is None where it was not run."""

    name: str
    kind: str
    dtype: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    weights: int
    cost: Cost
    timing: Timing | None = None

    def seconds(self, measured: bool) -> float:
        """Measured or predicted; nothing for a view that was not timed."""
        if not measured:
            return self.cost.seconds
        return self.timing.median if self.timing else 0.0


# --- Walking -----------------------------------------------------------------------------------------------------

Visit = Callable[[str, Layer, list[Array]], Sequence[Array]]


def walk(model: models.Model, inputs: Sequence[Array], visit: Visit) -> list[Array]:
    """What ``visit(name, layer, arrays)`` makes of `inputs`, called for every layer, those of inner models too.

    A layer of an inner model is named "inner/layer", the second call of a layer "layer (2)".
    """
    calls: Counter[str] = Counter()

    def enter(model: models.Model, arrays: Sequence[Array], prefix: str) -> list[Array]:
        def step(node: Any, values: list[Array]) -> Sequence[Array]:
            path = prefix + node.layer.name
            if isinstance(node.layer, models.Model):
                return enter(node.layer, values, f"{path}/")
            calls[path] += 1
            return visit(path if calls[path] == 1 else f"{path} ({calls[path]})", node.layer, values)

        return model._known_graph().evaluate(model._accept(tuple(arrays)), step)

    return enter(model, inputs, "")


def input_shapes(
    model: models.Model, shapes: Sequence[Shape] | None = None, batch_size: int | None = None
) -> list[Shape]:
    """The shape of every input: as given, or the model's own with `batch_size` samples (default 32).

    Raises:
        ValueError: a shape does not fit, or a size is neither given nor known.
    """
    tensors = model.inputs
    given: Sequence[Sequence[int | None]] = shapes or [(batch_size or t.shape[0] or 32, *t.shape[1:]) for t in tensors]
    if len(given) != len(tensors):
        raise ValueError(f"`shapes` must be one for each of {len(tensors)} inputs. Received: shapes={shapes}")
    for tensor, shape in zip(tensors, given, strict=True):
        if None in shape:
            raise ValueError(
                f"`shapes` must give every size: input {tensor.name!r} of model {model.name!r} has {tensor.shape}, "
                f"None being any size. Received: shapes={shapes}"
            )
        model._check_fit(tuple(shape), tensor)
        if tensor.shape[0] not in (None, shape[0]):
            raise ValueError(
                f"input {tensor.name!r} of model {model.name!r} takes batches of {tensor.shape[0]}. "
                f"Received: shape={shape}"
            )
    return [tuple(size or 0 for size in shape) for shape in given]


def limits_of(name: str | None = None) -> DeviceLimits:
    """The GPU of that name; None: the first usable one here, else the one named `PREDICTED_FOR`.

    Raises:
        PlanError: no such name.
    """
    here = next((each.limits for each in runtime.probe().devices if each.target and each.limits), None)
    return here if here is not None and name is None else device_named(name or PREDICTED_FOR)


def fingerprint(model: models.Model) -> str:
    """Equal for models of equal configuration."""
    return hashlib.sha256(model.to_json().encode()).hexdigest()[:16]


# --- Predicting and measuring ------------------------------------------------------------------------------------


def predicted(model: models.Model, shapes: Sequence[Shape], limits: DeviceLimits) -> list[Row]:
    """A row for every call of a layer, in the order of computing; nothing is computed, and no memory is needed.

    Raises:
        PlanError: cuconv has no kernel for a layer on this device.
    """
    rows: list[Row] = []

    def visit(name: str, layer: Layer, arrays: list[Array]) -> Sequence[Array]:
        kinds = [(array.shape, array.dtype) for array in arrays]

        with explain.weightless(layer):
            steps, outputs = explain.of_call(functools.partial(layer._run, training=False), kinds, limits)
        rows.append(_row(name, layer, kinds, to_tuple(outputs), steps, limits))
        return to_tuple(outputs)

    kinds = [(shape, parity.DTYPES[tensor.dtype]) for shape, tensor in zip(shapes, model.inputs, strict=True)]
    explain.of_call(lambda *outlines: walk(model, outlines, visit), kinds, limits)
    return rows


def _row(
    name: str,
    layer: Layer,
    inputs: Sequence[tuple[Shape, np.dtype]],
    outputs: Sequence[Array],
    steps: tuple[Step, ...],
    limits: DeviceLimits,
) -> Row:
    kind = type(layer).__name__
    dtype, size = layer.compute_dtype, parity.DTYPES[layer.compute_dtype].itemsize
    elements = sum(int(np.prod(shape)) for shape, _ in inputs) + sum(int(np.prod(y.shape)) for y in outputs)
    weights = layer.count_params() if layer.built else 0
    operation = next((named for start, named in _WITHOUT_PRODUCT.items() if kind.startswith(start)), "conv")
    cost = Cost(
        limits,
        steps,
        sum(step.least_flops for step in steps),
        (elements + weights) * size if steps else 0,
        explain.peak_rate(limits, dtype, "highest", operation),
    )
    given = tuple(tuple(shape) for shape, _ in inputs)
    return Row(name, kind, dtype, given, tuple(tuple(y.shape) for y in outputs), weights, cost)


def random_inputs(model: models.Model, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """Normally distributed numbers in the dtypes of the model's inputs."""
    rng = np.random.default_rng(0)
    return [
        parity.random(rng, shape, parity.DTYPES[tensor.dtype], 1.0)
        for shape, tensor in zip(shapes, model.inputs, strict=True)
    ]


def measured(
    model: models.Model,
    shapes: Sequence[Shape],
    rows: Sequence[Row],
    gpu: runtime.Device | None,
    samples: int = SAMPLES,
    advance: Callable[[], Any] = lambda: None,
) -> tuple[list[Row], Timing]:
    """`rows` with times of the GPU or else the CPU, and that of the whole call from Python until its result is there.

    Args:
        advance: called after each timed call from Python.
    """
    current: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    place: parity.Place = np.asarray
    if gpu is not None:
        place, current = runtime.device_array, runtime.on(gpu.index)
    with current:
        inputs = [place(array) for array in random_inputs(model, shapes)]
        calls: list[Callable[[], Any]] = []

        def visit(name: str, layer: Layer, arrays: list[Array]) -> Sequence[Array]:
            calls.append(functools.partial(layer._run, *arrays, training=False))
            return to_tuple(calls[-1]())

        walk(model, inputs, visit)
        work = {i: call for i, (call, row) in enumerate(zip(calls, rows, strict=True)) if row.cost.steps}
        whole = {-1: functools.partial(model, inputs if len(inputs) > 1 else inputs[0])}
        if gpu is None:
            found = timing.host_times(work | whole, samples, advance, MOST_SECONDS)
        else:
            synchronize = runtime.library().cuda.runtime.deviceSynchronize

            def finish() -> None:
                synchronize()
                advance()

            found = timing.host_times(whole, samples, finish, MOST_SECONDS / 2)
            with runtime.time_range(f"cuconv.profile[{model.name}]"):
                on_device = {i: timing.CupyCall(call) for i, call in work.items()}
                found |= timing.device_times(on_device, samples, seconds=MOST_SECONDS / 2)
    return [replace(row, timing=found.get(i)) for i, row in enumerate(rows)], found[-1]


def profile(
    model: models.Model,
    shapes: Sequence[Shape],
    limits: DeviceLimits,
    where: runtime.Device | str | None = None,
    samples: int = SAMPLES,
    advance: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Everything about a model's layers, fit for JSON and for :func:`page`; times in seconds.

    Args:
        limits: the GPU to predict for.
        where: the GPU to measure on, "cpu", or None: nothing is run, and the times are the predicted ones.
    """
    rows, whole = predicted(model, shapes, limits), None
    gpu = where if isinstance(where, runtime.Device) else None
    if where is not None:
        rows, whole = measured(model, shapes, rows, gpu, samples, advance)
    total = sum(row.seconds(where is not None) for row in rows)
    on_gpu = where is None or gpu is not None
    device = limits.name
    if where is not None:
        device = f"GPU {gpu.index} ({gpu.name})" if gpu else doctor.device_of(np.zeros(1))
    return {
        "model": model.name,
        "inputs": [
            {"name": tensor.name, "shape": list(shape), "dtype": tensor.dtype}
            for tensor, shape in zip(model.inputs, shapes, strict=True)
        ],
        "batch": shapes[0][0],
        "parameters": model.count_params(),
        "timing": "predicted" if where is None else "measured",
        "device": device,
        "on_gpu": on_gpu,  # whether `seconds` belong to the GPU whose roofs are told
        "roof": {"name": limits.name, "bandwidth": limits.bandwidth, "rates": _rates(rows)},
        "seconds": total,
        "predicted_seconds": sum(row.cost.seconds for row in rows),
        "call_seconds": whole and whole.median,
        "layers": [_layer(i, row, total, where is not None, on_gpu) for i, row in enumerate(rows, 1)],
        "cuconv": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _rates(rows: Sequence[Row]) -> dict[str, float]:
    """Name -> FLOP/s of each ceiling that bounds a layer."""
    names: dict[float, list[str]] = {}
    for row in rows:
        known = names.setdefault(row.cost.peak, [])
        name, fp32 = row.dtype, row.cost.device.fp32_rate
        if row.cost.peak > fp32:
            name += " on tensor cores"
        elif parity.DTYPES[row.dtype].itemsize == 2:
            name += " without tensor cores"
        if row.cost.flops and name not in known:
            known.append(name)
    return {", ".join(known): peak for peak, known in sorted(names.items()) if known}


def _layer(number: int, row: Row, total: float, was_measured: bool, on_gpu: bool) -> dict[str, Any]:
    seconds, cost = row.seconds(was_measured), row.cost
    return {
        "number": number,
        "name": row.name,
        "kind": row.kind,
        "dtype": row.dtype,
        "inputs": [list(shape) for shape in row.inputs],
        "outputs": [list(shape) for shape in row.outputs],
        "weights": row.weights,
        "seconds": seconds,
        "p10": row.timing.p10 if row.timing else None,
        "p90": row.timing.p90 if row.timing else None,
        "share": seconds / total if total else 0.0,
        "predicted_seconds": cost.seconds,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "intensity": cost.flops / cost.bytes if cost.bytes else 0.0,
        "side": cost.side,
        "roof_seconds": cost.roof_seconds,
        "share_of_roof": cost.roof_seconds / seconds if on_gpu and seconds else None,
        "kernel": cost.kernel,
        "steps": [step.to_dict() for step in cost.steps],
    }


# --- The page ----------------------------------------------------------------------------------------------------


def page(report: dict[str, Any]) -> str:
    """A report of :func:`profile` as one HTML file that loads nothing and may run nothing but its own script."""
    template = importlib.resources.files("cuconv").joinpath("page.html").read_text(encoding="utf-8")
    (style,) = re.findall(r"<style>(.*?)</style>", template, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "@POLICY@": policy,
        "@TITLE@": html.escape(f"{report['model']}: {report['timing']} for {report['device']}, cuconv profile"),
        # In a script element nothing ends the data but "</script", and "<!--" would hide its end: no "<" at all.
        "@DATA@": json.dumps(report, allow_nan=False).replace("<", r"\u003c"),
    }
    return re.sub("|".join(parts), lambda found: parts[found.group()], template)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
