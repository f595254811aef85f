"""Keras' own answers (golden/, committed with the script that made them) against the oracle and against the layers."""

import json
import re
from itertools import groupby
from math import prod
from pathlib import Path

import numpy as np
import oracle
import pytest
from compare import assert_close

from cuconv import layers

GOLDEN = Path(__file__).parent / "golden"

TERMS = 128  # products in the longest sum of any case


class Case:
    """One row of the .json with its arrays from the .npz."""

    def __init__(self, row: dict, values: np.ndarray):
        self.layer, self.config, self.calls = row["layer"], row["config"], row["calls"]
        self.id, self.input_shape, self.computed = row["id"], tuple(row["input_shape"]), row["computed"]
        self.weight_names, shapes = list(row["weights"]), row["output_shapes"]
        per_call = shapes[: len(shapes) // self.calls]
        weight_shapes = list(row["weights"].values())
        arrays = iter(np.split(values, np.cumsum([prod(s) for s in self.shapes(row)])[:-1]))

        def take(wanted):
            return [next(arrays).reshape(shape) for shape in wanted]

        self.inputs = take([self.input_shape] * self.calls)
        self.weights = take(weight_shapes)
        self.outputs = take(shapes)
        self.output_grads, self.input_grad, self.weight_grads = [], None, []
        if row["gradients"]:
            self.output_grads = take(per_call)
            (self.input_grad,) = take([self.input_shape])
            self.weight_grads = take(weight_shapes)

    @staticmethod
    def shapes(row: dict) -> list:
        """The shapes of the arrays of a row, in the order in which golden/make_golden.py writes them."""
        weights = list(row["weights"].values())
        gradients = [*row["output_shapes"], row["input_shape"], *weights] if row["gradients"] else []
        return [row["input_shape"]] * row["calls"] + weights + row["output_shapes"] + gradients


def load(backend: str) -> tuple[list[Case], list[dict]]:
    content = json.loads((GOLDEN / f"{backend}.json").read_text())
    with np.load(GOLDEN / f"{backend}.npz", allow_pickle=False) as file:
        values = file["values"]
    cases, start = [], 0
    for row in content["cases"]:
        stop = start + sum(map(prod, Case.shapes(row)))
        cases.append(Case(row, values[start:stop]))
        start = stop
    assert start == values.size
    return cases, content["refused"]


TORCH_CASES, REFUSED = load("torch")
CASES = TORCH_CASES + load("jax")[0]
WITH_GRADIENTS = [c for c in CASES if c.output_grads]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
every_gradient = pytest.mark.parametrize("case", WITH_GRADIENTS, ids=lambda c: c.id)


# --- The oracle's answer -----------------------------------------------------------------------------------------

FAMILIES = {
    "Conv": (oracle.conv, ("kernel",)),
    "Transpose": (oracle.conv_transpose, ("kernel",)),
    "DepthwiseConv": (oracle.depthwise_conv, ("kernel",)),
    "SeparableConv": (oracle.separable_conv, ("depthwise_kernel", "pointwise_kernel")),
}
OPTIONS = ("strides", "padding", "output_padding", "data_format", "dilation_rate", "groups", "activation")
DEFAULT_PAIRS = {
    "Cropping1D": 1,
    "Cropping2D": 0,
    "Cropping3D": 1,
    "ZeroPadding1D": 1,
    "ZeroPadding2D": 1,
    "ZeroPadding3D": 1,
}


def family(layer: str) -> str:
    """Conv2DTranspose -> Transpose, SeparableConv1D -> SeparableConv."""
    return "Transpose" if layer.endswith("Transpose") else layer[:-2]


def oracle_answer(case: Case, inputs: list, weights: list) -> list:
    """The oracle's outputs of every call of the case, in the order of `case.outputs`."""
    config, rank = case.config, int(re.search(r"(\d)D", case.layer)[1])
    named = dict(zip(case.weight_names, weights, strict=True))
    options = {name: freeze(config[name]) for name in OPTIONS if name in config}
    if case.layer.startswith("ConvLSTM"):
        return conv_lstm_answer(case, inputs, named)
    if family(case.layer) in FAMILIES:
        function, kernels = FAMILIES[family(case.layer)]
        return [function(x, *(named[k] for k in kernels), named.get("bias"), **options) for x in inputs]
    data_format = config.get("data_format")
    if case.layer.startswith("UpSampling"):
        size = freeze(config.get("size", 2))
        return [
            oracle.upsample(x, size, interpolation=config.get("interpolation", "nearest"), data_format=data_format)
            for x in inputs
        ]
    amounts = config.get("cropping", config.get("padding", DEFAULT_PAIRS[case.layer]))
    function = oracle.crop if case.layer.startswith("Cropping") else oracle.pad
    return [function(x, pairs(amounts, rank), data_format) for x in inputs]


def freeze(value):
    return tuple(map(freeze, value)) if isinstance(value, list) else value


def pairs(amounts, rank: int) -> tuple:
    """An integer, integers or pairs as one (before, after) pair per axis; a bare pair of integers at rank 1 is one."""
    amounts = [amounts] * rank if isinstance(amounts, int) else amounts
    if rank == 1 and len(amounts) == 2:
        return (tuple(amounts),)
    return tuple((a, a) if isinstance(a, int) else tuple(a) for a in amounts)


def conv_lstm_answer(case: Case, inputs: list, named: dict) -> list:
    config = case.config
    options = {name: freeze(config[name]) for name in (*OPTIONS, "recurrent_activation") if name in config}
    kernel, recurrent, bias = named["kernel"], named["recurrent_kernel"], named.get("bias")
    state, outputs = None, []
    for x in inputs:
        if state is None or not config.get("stateful"):
            state = [np.zeros(of_state(case), complex if np.iscomplexobj(x) else float)] * 2
        frames = np.moveaxis(x, 1, 0)
        sequence = []
        for frame in frames[::-1] if config.get("go_backwards") else frames:
            state = oracle.conv_lstm_step(frame, *state, kernel, recurrent, bias, **options)
            sequence.append(state[0])
        outputs.append(np.stack(sequence, axis=1) if config.get("return_sequences") else state[0])
        outputs += list(state) if config.get("return_state") else []
    return outputs


def of_state(case: Case) -> tuple:
    """Shape of h and c."""
    shape = case.outputs[0].shape
    return (shape[0], *shape[2:]) if case.config.get("return_sequences") else shape


@every_case
def test_the_oracle_gives_keras_outputs(case):
    for ours, theirs in zip(oracle_answer(case, case.inputs, case.weights), case.outputs, strict=True):
        assert_close(theirs, ours, dtype="float32", terms=TERMS, what=case.id)


@every_gradient
def test_the_oracle_gives_keras_gradients(case):
    """The derivative of sum(output * output_grad), by complex step, along random directions of every array."""
    rng = np.random.default_rng(0)
    arrays = [*case.inputs, *case.weights]
    gradients = [case.input_grad, *case.weight_grads]

    def loss(inputs_and_weights):
        outputs = oracle_answer(case, inputs_and_weights[:1], inputs_and_weights[1:])
        return sum(np.sum(y * dy) for y, dy in zip(outputs, case.output_grads, strict=True))

    for position, gradient in enumerate(gradients):
        for _ in range(3):
            direction = rng.standard_normal(gradient.shape)
            moved = [array + 1e-30j * direction if p == position else array for p, array in enumerate(arrays)]
            along = np.array(loss(moved).imag / 1e-30)
            size = np.sum(np.abs(gradient * direction))
            assert_close(
                np.float32(np.sum(gradient * direction)),
                along,
                dtype="float32",
                terms=gradient.size + TERMS,
                scale=1.0 + size,
                what=f"{case.id}, array {position}",
            )


# --- The layers --------------------------------------------------------------------------------------------------


def keras_layer(case: Case):
    """Our layer with Keras' configuration and weights."""
    layer = getattr(layers, case.layer)(**case.config)
    layer.build(case.input_shape)
    layer.set_weights(case.weights)
    return layer


def as_list(outputs) -> list:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


@every_case
def test_the_layers_give_keras_outputs(case):
    layer = keras_layer(case)
    outputs = [y for x in case.inputs for y in as_list(layer(x))]
    for ours, theirs in zip(outputs, case.outputs, strict=True):
        assert_close(ours, theirs.astype(np.float64), dtype="float32", terms=TERMS, what=case.id)


@every_case
def test_the_layers_compute_keras_shapes(case):
    layer = getattr(layers, case.layer)(**case.config)
    computed = layer.compute_output_shape(case.input_shape)
    computed = [computed] if isinstance(computed[0], int) else computed
    assert [list(shape) for shape in computed] == case.computed


@every_case
def test_the_layers_name_and_shape_their_weights_like_keras(case):
    layer = getattr(layers, case.layer)(**case.config)
    layer.build(case.input_shape)
    assert [w.shape for w in layer.get_weights()] == [w.shape for w in case.weights]
    assert [name.split("/")[-1] for name in layer.weight_names] == case.weight_names


@every_gradient
def test_the_layers_give_keras_gradients(case):
    layer = keras_layer(case)
    layer.forward(case.inputs[0])
    dy = case.output_grads if len(case.output_grads) > 1 else case.output_grads[0]
    names = ["input", *case.weight_names]
    theirs = [case.input_grad, *case.weight_grads]
    ours = [layer.backward(dy), *layer.gradients]
    for name, actual, expected in zip(names, ours, theirs, strict=True):
        assert_close(actual, expected.astype(np.float64), dtype="float32", terms=TERMS, what=f"{case.id}, {name}")


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row["id"])
def test_the_layers_refuse_what_keras_refuses(row):
    error = {"ValueError": ValueError, "TypeError": TypeError}[row["error"]]
    with pytest.raises(error, match="Received"):
        getattr(layers, row["layer"])(**row["config"])(np.zeros(row["input_shape"], np.float32))


# --- The data ----------------------------------------------------------------------------------------------------


def test_the_data_covers_every_layer():
    """22 layers, each with gradients and, but for the few that need no second look, several cases."""
    counted = {
        layer: len(list(group)) for layer, group in groupby(sorted(CASES, key=lambda c: c.layer), lambda c: c.layer)
    }
    assert len(counted) == 22
    assert {c.layer for c in WITH_GRADIENTS} == set(counted)


def test_the_data_is_finite_and_not_trivial():
    for case in CASES:
        arrays = [*case.inputs, *case.weights, *case.outputs, *case.output_grads]
        assert all(np.isfinite(a).all() for a in arrays), case.id
        assert all(np.any(a) for a in case.outputs if a.size), case.id
