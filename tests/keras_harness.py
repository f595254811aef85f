"""What a layer answers, asked in the same words of Keras and of cuconv, and the differences between two such answers.

`answers(side, case)` collects named facts about one case; `differences(theirs, ours, precision)` compares two
collections. Both are meant to be doubted: test_keras_differential.py damages answers and expects every damage to be
reported.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from keras_cases import CONV_LSTM, Case, Obj, rank_of, weight_names
from live_keras import live_keras

keras = live_keras()
torch = pytest.importorskip("torch")

import cuconv  # noqa: E402  (after the skips: without Keras there is nothing to compare)

torch.set_num_threads(1)
torch.utils.deterministic.fill_uninitialized_memory = True
keras.config.set_image_data_format("channels_last")
keras.config.set_floatx("float32")

# Relative to the largest element of an array. In 16 bits the libraries round at different places: 8 half units, and 20
# where every step rounds what the one before has rounded. Keras keeps the factors of regularizers and constraints in
# float32, whatever a layer computes in.
RELATIVE = {
    "float64": 1e-10,
    "float64 with float32 factors": 1e-7,
    "float32": 2e-5,
    "float16": 8 * 2.0**-11,
    "bfloat16": 8 * 2.0**-8,
    "float16 step by step": 20 * 2.0**-11,
    "bfloat16 step by step": 20 * 2.0**-8,
}
SMALLEST_SCALE = 0.1  # inputs, weights and cotangents are of order 1: below this, a sum is what cancellation left


@dataclass(frozen=True)
class Values:
    """An array as a fact: its dtype's name, its elements in float64 or as integers, the terms an element sums."""

    dtype: str
    array: np.ndarray
    terms: int = 1


@dataclass(frozen=True)
class Raised:
    """An exception as a fact. Only its type is compared."""

    kind: str
    text: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Raised) and self.kind == other.kind


# --- the two sides ---------------------------------------------------------------------------------------------------


def as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def as_values(array: Any, terms: int = 1) -> Values:
    """The fact about a NumPy array, a torch tensor or a Keras variable."""
    if isinstance(array, keras.Variable):
        array = array.value
    if isinstance(array, torch.Tensor):
        array = array.detach()
        name = str(array.dtype).removeprefix("torch.")
        return Values(name, (array.double() if array.is_floating_point() else array).numpy().copy(), terms)
    kept = array.copy() if array.dtype.kind in "iub" else array.astype(np.float64)
    return Values(str(array.dtype), kept, terms)


class KerasSide:
    """Keras on torch, its gradients by autograd."""

    library = keras

    @staticmethod
    @contextmanager
    def guard() -> Iterator[None]:
        """Without warnings, and without oneDNN, some of whose convolutions are wrong; NaN in what torch allocates."""
        torch.use_deterministic_algorithms(True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.backends.mkldnn.flags(enabled=False):
                    yield
        finally:
            torch.use_deterministic_algorithms(False)

    def weights(self, layer: Any) -> list[tuple[str, Any]]:
        return [(variable.name, variable) for variable in layer.weights]

    def call(self, layer: Any, x: np.ndarray) -> list:
        with torch.no_grad():
            return as_list(layer(torch.from_numpy(x.copy())))

    def train(
        self, layer: Any, x: np.ndarray, cotangent: Callable[[tuple[int, ...]], np.ndarray]
    ) -> tuple[list, Any, list]:
        """Outputs, input gradient, gradients of the trainable weights; the layer's losses count with weight one."""
        x = torch.from_numpy(x.copy()).requires_grad_()
        outputs = as_list(layer(x))
        roots = [(y, torch.from_numpy(cotangent(tuple(y.shape))).to(y.dtype)) for y in outputs]
        roots += [
            (loss, torch.ones_like(loss))
            for loss in layer.losses
            if isinstance(loss, torch.Tensor) and loss.requires_grad
        ]
        leaves = [x, *(variable.value for variable in layer.trainable_weights)]
        found = torch.autograd.grad(
            [root for root, _ in roots], leaves, [seed for _, seed in roots], allow_unused=True, materialize_grads=True
        )
        return outputs, found[0], list(found[1:])

    def constrain(self, layer: Any) -> None:
        for variable in layer.trainable_weights:
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))


class CuconvSide:
    """Our layers on NumPy arrays."""

    library = cuconv

    @staticmethod
    @contextmanager
    def guard() -> Iterator[None]:
        """Fills what NumPy allocates with NaN."""
        originals = np.empty, np.empty_like

        def poison(array: np.ndarray) -> np.ndarray:
            if array.dtype.kind not in "iubOSU":
                array.fill(np.nan)
            return array

        np.empty = lambda *args, **kwargs: poison(originals[0](*args, **kwargs))
        np.empty_like = lambda *args, **kwargs: poison(originals[1](*args, **kwargs))
        try:
            yield
        finally:
            np.empty, np.empty_like = originals

    def weights(self, layer: Any) -> list[tuple[str, Any]]:
        return list(zip(layer.weight_names, layer.weights, strict=True))

    def call(self, layer: Any, x: np.ndarray) -> list:
        return as_list(layer(x))

    def train(
        self, layer: Any, x: np.ndarray, cotangent: Callable[[tuple[int, ...]], np.ndarray]
    ) -> tuple[list, Any, list]:
        outputs = as_list(layer.forward(x, training=False))
        cotangents = [cotangent(y.shape).astype(y.dtype) for y in outputs]
        dx = layer.backward(cotangents if len(cotangents) > 1 else cotangents[0])
        return outputs, dx, list(layer.gradients) if layer.trainable_weights else []

    def constrain(self, layer: Any) -> None:
        layer.apply_constraints()


THEIRS, OURS = KerasSide(), CuconvSide()


# --- the questions ---------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Tuples as lists and NumPy scalars as Python's, so that configurations of both libraries compare."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


def without_counter(config: dict[str, Any], case: Case) -> dict[str, Any]:
    """A configuration whose automatic name has lost its number ("conv1d_7"), which depends on what was made before."""
    if "name" in case.options:
        return config
    stem, _, number = config["name"].rpartition("_")
    return config | {"name": stem if number.isdigit() else config["name"]}


def config_facts(side: Any, case: Case) -> Iterator[tuple[str, Any]]:
    layer = case.construct(side.library)
    config = layer.get_config()
    yield "config", plain(without_counter(config, case))
    again = type(layer).from_config(config)
    yield "config after from_config", plain(without_counter(again.get_config(), case))
    again = type(layer).from_config(json.loads(json.dumps(config)))
    yield "config after JSON", plain(without_counter(again.get_config(), case))


def open_shapes(case: Case) -> Iterator[tuple[int | None, ...]]:
    """The input shape, then with the batch unknown, the first or all spatial sizes unknown, and the time unknown."""
    shape: tuple[int | None, ...] = case.shape
    first = (
        case.options.get("data_format", "").lower() == "channels_first" if case.options.get("data_format") else False
    )
    start = len(shape) - rank_of(case.layer) - (not first)
    rank = rank_of(case.layer)
    yield shape
    yield (None, *shape[1:])
    yield (*shape[:start], None, *shape[start + 1 :])
    yield (None, *shape[1:start], *(None,) * rank, *shape[start + rank :])
    if case.layer in CONV_LSTM:
        yield (shape[0], None, *shape[2:])


def shape_facts(side: Any, case: Case) -> Iterator[tuple[str, Any]]:
    for shape in open_shapes(case):
        layer = case.construct(side.library)
        try:
            yield f"compute_output_shape({shape})", plain(layer.compute_output_shape(shape))
        except Exception as error:
            yield f"compute_output_shape({shape})", Raised(type(error).__name__, str(error))


def built(side: Any, case: Case) -> Any:
    layer = case.construct(side.library)
    layer.build(case.shape)
    return layer


def known_from_the_start(case: Case, weight: str) -> bool:
    """Whether a weight's initial values do not come from a random generator."""
    prefix = {"recurrent_kernel": "recurrent", "depthwise_kernel": "depthwise", "pointwise_kernel": "pointwise"}.get(
        weight, weight
    )
    if prefix not in weight_names(case.layer):
        prefix = weight_names(case.layer)[0]
    initializer = case.options.get(f"{prefix}_initializer", "zeros" if prefix == "bias" else "glorot_uniform")
    return initializer in ("zeros", "ones") or (isinstance(initializer, Obj) and initializer.name == "Constant")


def weight_facts(side: Any, case: Case) -> Iterator[tuple[str, Any]]:
    layer = built(side, case)
    yield "built", layer.built
    weights = [(name, as_values(weight)) for name, weight in side.weights(layer)]
    yield "weights", [(name, values.array.shape, values.dtype) for name, values in weights]
    yield "get_weights", [(values.shape, str(values.dtype)) for values in layer.get_weights()]
    yield "trainable and not", (len(layer.trainable_weights), len(layer.non_trainable_weights))
    yield "count_params", layer.count_params()
    for name, values in weights:
        if known_from_the_start(case, name):
            yield f"initial {name}", values
    layer.set_weights(chosen_weights(case, layer))
    yield "losses before a call", loss_values(layer)
    for (name, _), values in zip(weights, layer.get_weights(), strict=True):
        yield f"{name} after set_weights", as_values(values)


def chosen_weights(case: Case, layer: Any) -> list[np.ndarray]:
    """Random weights that are nowhere zero and keep the output of order one."""
    rng = np.random.default_rng(case.seed + 1)
    chosen = []
    for weight in layer.get_weights():
        taps = math.prod(weight.shape[:-1]) if weight.ndim > 1 else 1
        values = rng.uniform(0.25, 1.0, weight.shape) * rng.choice([-1.0, 1.0], weight.shape) / math.sqrt(taps)
        chosen.append(values.astype(weight.dtype))
    return chosen


def ready(side: Any, case: Case) -> Any:
    layer = built(side, case)
    layer.set_weights(chosen_weights(case, layer))
    return layer


def loss_values(layer: Any) -> list[Values]:
    return [
        Values("number", np.float64(float(as_values(loss).array) if hasattr(loss, "dtype") else loss))
        for loss in layer.losses
    ]


def call_facts(side: Any, case: Case) -> Iterator[tuple[str, Any]]:
    layer = ready(side, case)
    for number, x in enumerate(case.inputs()):
        outputs = side.call(layer, x)
        yield f"call {number}: outputs", [as_values(y) for y in outputs]
        yield f"call {number}: losses", loss_values(layer)
    if case.options.get("stateful"):
        layer.reset_state()
    else:
        x = np.concatenate([x, x[:1]])
    yield "another call, of a fresh state or of a larger batch", [as_values(y) for y in side.call(layer, x)]
    yield "losses of another call", loss_values(layer)


def training_facts(side: Any, case: Case) -> Iterator[tuple[str, Any]]:
    if np.dtype(case.input_dtype).kind != "f":
        return
    layer = ready(side, case)
    names = [name for name, _ in side.weights(layer)]
    rng = np.random.default_rng(case.seed + 2)

    def cotangent(shape: tuple[int, ...]) -> np.ndarray:
        return ((rng.integers(-64, 64, shape) + 0.5) / 64).astype(np.float32)

    for number, x in enumerate(case.inputs()):
        outputs, dx, gradients = side.train(layer, x, cotangent)
        yield f"forward {number}: outputs", [as_values(y) for y in outputs]
        yield f"forward {number}: losses", loss_values(layer)
        terms = max(1, math.prod(outputs[0].shape))
        yield f"input gradient {number}", as_values(dx)
        yield f"number of gradients {number}", len(gradients)
        for name, gradient in zip(names, gradients, strict=False):
            yield f"gradient {number}: {name}", as_values(gradient, terms)
    side.constrain(layer)
    for name, weight in side.weights(layer):
        yield f"{name} after constraints", as_values(weight)


QUESTIONS = (config_facts, shape_facts, weight_facts, call_facts, training_facts)


def answers(side: Any, case: Case) -> dict[str, Any]:
    """Everything the case's layer says. A question that breaks off leaves what it raised under its own name."""
    facts: dict[str, Any] = {}
    for question in QUESTIONS:
        try:
            with side.guard():
                facts.update(question(side, case))
        except Exception as error:
            facts[question.__name__] = Raised(type(error).__name__, str(error))
    return facts


# --- the differences -------------------------------------------------------------------------------------------------


def value_difference(theirs: Values, ours: Values, precision: str) -> str | None:
    """What is wrong with an array, or None. Values that are not finite are always wrong."""
    if ours.array.shape != theirs.array.shape:
        return f"shape {ours.array.shape} instead of {theirs.array.shape}"
    if ours.dtype != theirs.dtype:
        return f"dtype {ours.dtype} instead of {theirs.dtype}"
    for whose, values in (("Keras'", theirs), ("our", ours)):
        if not np.all(np.isfinite(values.array)):
            return f"{whose} values are not all finite"
    off = np.abs(ours.array.astype(np.float64) - theirs.array.astype(np.float64))
    scale = max(np.abs(theirs.array).max(initial=0), SMALLEST_SCALE * math.sqrt(theirs.terms))
    allowed = RELATIVE[precision] * scale if theirs.array.dtype.kind == "f" else 0
    if off.max(initial=0) <= allowed:
        return None
    index = tuple(map(int, np.unravel_index(off.argmax(), off.shape)))
    count = f"{np.count_nonzero(off > allowed)} of {off.size} elements differ"
    values = f"{ours.array[index]:.9g} instead of {theirs.array[index]:.9g}"
    return f"{count}, at {list(index)} {values}, off by {off[index]:.2g} with {allowed:.2g} allowed"


def fact_difference(theirs: Any, ours: Any, precision: str) -> str | None:
    """What is wrong with one fact, or None."""
    if isinstance(theirs, Values) and isinstance(ours, Values):
        return value_difference(theirs, ours, precision)
    if isinstance(theirs, Raised) or isinstance(ours, Raised):
        return None if theirs == ours else f"{ours} instead of {theirs}"
    arrays = isinstance(theirs, list) and any(isinstance(entry, Values) for entry in [*theirs, *as_list(ours)])
    if not arrays:
        return plain_difference(theirs, ours)
    if len(theirs) != len(as_list(ours)):
        return f"{len(as_list(ours))} instead of {len(theirs)}"
    found = [(index, fact_difference(*pair, precision)) for index, pair in enumerate(zip(theirs, ours, strict=True))]
    return "; ".join(f"[{index}] {text}" for index, text in found if text) or None


def plain_difference(theirs: Any, ours: Any, path: str = "") -> str | None:
    """Where two nested plain values part, or None. Floats may differ by one rounding to float32."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if theirs.keys() != ours.keys():
            missing, extra = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
            return f"{path or 'keys'}: missing {missing}, extra {extra}"
        pairs = [(f"{path}[{key!r}]", theirs[key], ours[key]) for key in theirs]
    elif isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)) and len(theirs) == len(ours):
        pairs = [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(theirs, ours, strict=True))]
    else:
        close = isinstance(theirs, float) and isinstance(ours, float) and math.isclose(theirs, ours, rel_tol=1e-7)
        same = type(theirs) is type(ours) and theirs == ours
        return None if close or same else f"{path} {ours!r} instead of {theirs!r}".strip()
    return next((found for found in (plain_difference(a, b, where) for where, a, b in pairs) if found), None)


def precision_of(case: Case) -> str:
    """What limits the precision of the case: a key of RELATIVE."""
    dtype = case.options.get("dtype", "float32").removeprefix("mixed_")
    if case.input_dtype == "float16":
        dtype = "float16"  # the gradient of the input comes in the dtype of the input
    if dtype.endswith("float16"):
        return f"{dtype} step by step" if case.layer in CONV_LSTM else dtype
    with_factors = any("regularizer" in key or "constraint" in key for key in case.options)
    return "float64 with float32 factors" if dtype == "float64" and with_factors else dtype


def differences(theirs: dict[str, Any], ours: dict[str, Any], precision: str) -> list[str]:
    """One line for each fact on which the two collections part; facts that only one of them has are differences."""
    broken = [question.__name__ for question in QUESTIONS if question.__name__ in ours]
    found = [f"{name} broke off with {ours[name].kind}: {ours[name].text}" for name in broken]
    for name in [*theirs, *(name for name in ours if name not in theirs and name not in broken)]:
        if name in ours and name in theirs:
            difference = fact_difference(theirs[name], ours[name], precision)
            found += [f"{name}: {difference}"] if difference else []
        elif not broken:
            found.append(f"{name}: only {'Keras' if name in theirs else 'cuconv'} has it")
    return found


def report(case: Case, found: list[str]) -> str:
    """The differences, and what to type to see them."""
    lines = [f"{case.id}: {len(found)} differences", *(f"  {line}" for line in found[:12])]
    lines += [f"  theirs: {case.call_text('keras')}", f"  ours:   {case.call_text('cuconv')}"]
    lines += [f"  input:  shape {case.shape}, {case.input_dtype}; arrays: keras_cases.find({case.id!r}).inputs()"]
    return "\n".join(lines)
