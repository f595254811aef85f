"""Models: graphs, passes, the summary, prediction and configuration."""

import copy
import json
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from compare import assert_close
from layer_cases import PLAIN, DeviceArray, check_gradients, outputs_of, second_place, with_random_weights
from strategies import uniform

import cuconv
from cuconv import layers
from cuconv.models import Input, Model, Sequential, SymbolicTensor, model_from_json


@pytest.fixture(autouse=True)
def fresh_names():
    layers.reset_names()


def through_json(config):
    return json.loads(json.dumps(config))


def randomize(model):
    rng = np.random.default_rng(4)
    for w in model.weights:
        w[...] = rng.standard_normal(w.shape)
    return model


def example():
    x = Input((128, 9))
    return Model(x, layers.Conv1D(100, 10, activation="relu")(x))


def two_branches(dtype="float64"):
    """Two inputs, a layer used three times, two outputs of which one feeds the other."""
    a, b = Input((6, 2), name="a", dtype=dtype), Input((6, 2), name="b", dtype=dtype)
    shared = layers.Conv1D(2, 3, padding="same", activation="tanh", name="shared", dtype=dtype, kernel_regularizer="l2")
    top = layers.Conv1D(3, 2, name="top", dtype=dtype, activity_regularizer="l2")
    first = shared(shared(a))
    return randomize(Model([a, b], [top(first), first, shared(b)]))


# --- Copies ------------------------------------------------------------------------------------------------------

copies = pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])


def nested():
    inner = Sequential([Input((6, 2)), layers.Conv1D(3, 2, name="first"), layers.Conv1D(2, 1, name="second")])
    x = Input((6, 2))
    y = inner(x)
    return randomize(Model(x, [layers.Conv1D(2, 2, name="own")(y), inner.layers[1](layers.Conv1D(3, 1)(y)), y]))


MODELS = {"chain": example, "branches": two_branches, "nested": nested}


@copies
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_copy_is_the_same_model_with_arrays_of_its_own(copied, make):
    model = make()
    inputs = [uniform(np.random.default_rng(1), (2, *t.shape[1:]), t.dtype) for t in model.inputs]
    expected = outputs_of(model(inputs))
    config, nodes = model.get_config(), [len(layer._nodes) for layer in model.layers]
    twin = copied(model)
    assert twin.get_config() == config == model.get_config()
    assert [len(layer._nodes) for layer in model.layers] == nodes
    assert len(twin.weights) == len(model.weights) and twin.output_shape == model.output_shape
    for weight in model.weights:
        weight[...] = 7
    for y, z in zip(outputs_of(twin(inputs)), expected, strict=True):
        np.testing.assert_array_equal(y, z)
    assert [len(layer._nodes) for layer in twin.layers] == nodes, "the calls of the copied graph and no others"


@copies
def test_a_sequential_model_can_be_copied_at_any_time(copied):
    model = Sequential(name="stack")
    assert copied(model).layers == [] and not copied(model).built
    model.add(layers.Conv1D(3, 2, name="first"))
    twin = copied(model)
    assert [layer.name for layer in twin.layers] == ["first"] and not twin.built
    twin.build((None, 6, 2))
    assert twin.output_shape == (None, 5, 3) and not model.built
    started = copied(Sequential([Input((6, 2))]))
    started.add(layers.Conv1D(3, 2))
    assert started.output_shape == (None, 5, 3)
    twin = copied(twin)
    twin.add(layers.Conv1D(4, 2, name="second"))
    assert twin.output_shape == (None, 4, 4)
    twin.pop()
    assert twin.output_shape == (None, 5, 3) and twin.compute_output_shape((2, 8, 2)) == (2, 7, 3)


@copies
def test_a_model_of_many_layers_can_be_copied(copied):
    model = Sequential([Input((1, 1)), *(layers.Conv1D(1, 1, name=f"at_{i}") for i in range(250))])
    assert len(copied(model).layers) == 250


@copies
def test_a_copy_leaves_behind_what_a_pass_has_left(copied):
    model = example()
    y = model.forward(np.ones((2, 128, 9), "float32"))
    model.backward(np.ones_like(y))
    assert model.gradients and model._context is not None
    twin = copied(model)
    assert not twin.gradients and twin._context is None and len(pickle.dumps(twin)) < 1.5 * 4 * model.count_params()
    model.backward(np.ones_like(y))
    assert twin.count_params() == 9100


# --- Symbolic calls ----------------------------------------------------------------------------------------------


def test_the_example_of_the_readme():
    model = example()
    assert model.output_shape == (None, 119, 100)
    assert model.count_params() == 9100
    x = np.random.default_rng(0).standard_normal((3, 128, 9)).astype("float32")
    assert np.array_equal(model(x), model.layers[1](x))


@pytest.mark.parametrize(
    ("arguments", "shape", "dtype"),
    [
        ({"shape": (128, 9)}, (None, 128, 9), "float32"),
        ({"shape": [None, 128]}, (None, None, 128), "float32"),
        ({"shape": (128, 9), "batch_size": 4, "dtype": "float16"}, (4, 128, 9), "float16"),
        ({"batch_shape": (4, None, 9), "dtype": np.float64}, (4, None, 9), "float64"),
        ({"shape": (4, 4), "dtype": "bfloat16"}, (None, 4, 4), "bfloat16"),
        ({"shape": (4, 4), "dtype": "uint8"}, (None, 4, 4), "uint8"),
    ],
    ids=str,
)
def test_input(arguments, shape, dtype):
    x = Input(**arguments)
    assert isinstance(x, SymbolicTensor)
    assert (x.shape, x.dtype, x.name) == (shape, dtype, "input_layer")
    assert Input((1, 1), name="mine").name == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"shape": (1, 2), "batch_shape": (1, 1, 2)},
        {"shape": (1, 2), "dtype": "float31"},
        {"shape": (-1, 2)},
        {"shape": "12"},
    ],
    ids=str,
)
def test_impossible_input(arguments):
    with pytest.raises(ValueError, match="Received"):
        Input(**arguments)


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_symbolic_call_builds_and_knows_the_output(case):
    layer = case.make()
    y = layer(Input(case.shape[1:]))
    assert layer.built
    assert y.shape == (None, *outputs_of(layer(case.input()))[0].shape[1:])
    assert y.dtype == "float32"
    assert (layer.output, layer.input.shape) == (y, (None, *case.shape[1:]))


def test_symbolic_dtypes():
    x = Input((8, 2), dtype="int32")
    assert layers.Cropping1D()(x).dtype == "int32"
    assert layers.Conv1D(2, 2, dtype="mixed_float16")(x).dtype == "float16"


def test_variable_length():
    x = Input((None, 128))
    model = Model(x, layers.Conv1D(4, 3, strides=2)(layers.Conv1D(8, 3, padding="causal", dilation_rate=4)(x)))
    assert model.output_shape == (None, None, 4)
    for length in (3, 50, 51):
        assert model(np.ones((2, length, 128), "f")).shape == (2, (length - 3) // 2 + 1, 4)


def test_symbolic_and_array_inputs_do_not_mix():
    layer = layers.ConvLSTM1D(2, 3, padding="same")
    with pytest.raises(ValueError, match="mixed"):
        layer(Input((2, 4, 1)), initial_state=[np.zeros((1, 4, 2)), np.zeros((1, 4, 2))])


def test_shape_errors_show_at_the_symbolic_call():
    with pytest.raises(ValueError, match="zero or negative"):
        layers.Conv1D(2, 5)(Input((4, 2)))
    layer = layers.Conv1D(2, 3)
    layer(Input((4, 2)))
    with pytest.raises(ValueError, match="built for 2 channels"):
        layer(Input((4, 3)))


def test_a_layer_called_twice_has_no_single_output():
    layer = layers.Conv1D(2, 3)
    with pytest.raises(AttributeError, match="0 calls"):
        _ = layer.output
    layer(Input((4, 2))), layer(Input((5, 2)))
    with pytest.raises(AttributeError, match="2 calls"):
        _ = layer.output


# --- Graphs ------------------------------------------------------------------------------------------------------


def test_layers_stand_in_keras_order():
    model = two_branches()
    assert [layer.name for layer in model.layers] == ["a", "shared", "b", "top"]
    assert model.get_layer("top") is model.get_layer(index=3) is model.layers[3]
    assert model.weight_names == ["shared/kernel", "shared/bias", "top/kernel", "top/bias"]
    for wrong in ({"name": "middle"}, {"index": 9}, {}, {"name": "top", "index": 3}):
        with pytest.raises(ValueError, match="Received"):
            model.get_layer(**wrong)


def test_a_layer_at_two_depths_stands_at_the_deeper_one():
    """Keras' order for this graph."""
    x = Input((9, 2), name="x")
    u, v, w = (layers.Conv1D(2, 3, padding="same", name=name) for name in "uvw")
    middle = v(u(x))
    model = Model(x, [v(x), u(w(middle))])
    assert [layer.name for layer in model.layers] == ["x", "u", "v", "w"]


def test_several_inputs_and_outputs():
    model = two_branches()
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 6, 2))
    shared, top = model.get_layer("shared"), model.get_layer("top")
    expected = [top(shared(shared(a))), shared(shared(a)), shared(b)]
    for given in ([a, b], (a, b), {"a": a, "b": b}):
        for y, want in zip(model(given), expected, strict=True):
            assert_close(y, want, dtype="float64", terms=10)
    assert model.input_shape == ((None, 6, 2), (None, 6, 2))
    assert model.output_shape == ((None, 5, 3), (None, 6, 2), (None, 6, 2))
    assert model.compute_output_shape([(7, 6, 2), (7, 6, 2)]) == ((7, 5, 3), (7, 6, 2), (7, 6, 2))


@pytest.mark.parametrize("given", [[1], {"a": 1}, {"a": 1, "c": 1}, [1, 2, 3]], ids=str)
def test_wrong_number_or_names_of_inputs(given):
    with pytest.raises(ValueError, match="Received"):
        two_branches()(given)


def test_gradients_of_a_shared_layer_are_summed():
    model = two_branches()
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 2, 6, 2))
    for index, x in enumerate((a, b)):

        def forward(x, index=index):
            return tuple(model.forward([x, b] if index == 0 else [a, x]))

        layer = OneInput(model, index)
        check_gradients(layer, x, forward=forward)
    assert len(model.losses) == 2, "one activity loss, one kernel: a shared layer is regularized once"


class OneInput:
    """A model seen as a function of one of its inputs."""

    def __init__(self, model, index):
        self.model, self.index = model, index

    def backward(self, dys):
        return self.model.backward(list(dys))[self.index]

    def __getattr__(self, name):
        return getattr(self.model, name)


def test_activity_losses_of_every_call_of_a_shared_layer():
    x = Input((4, 2))
    layer = layers.Conv1D(2, 1, activity_regularizer="l2")
    model = Model(x, layer(layer(x)))
    model(np.ones((1, 4, 2), "f"))
    model(np.ones((1, 4, 2), "f"))
    assert len(model.losses) == 2
    assert model.losses[0] != model.losses[1]


def test_outputs_without_a_gradient():
    model = two_branches()
    top_layer = model.get_layer("top")
    a, b = np.random.default_rng(0).standard_normal((2, 2, 6, 2))
    top, _, other = model.forward([a, b])
    da, db = model.backward([np.ones_like(top), None, None])
    assert da.any() and not db.any() and db.shape == b.shape
    model.backward([None, None, np.ones_like(other)])
    assert all(g.any() for g in model.gradients), "the activity loss has a gradient of its own"
    top_layer.activity_regularizer = None
    model.forward([a, b])
    model.backward([None, None, np.ones_like(other)])
    assert [bool(g.any()) for g in model.gradients] == [True, True, False, False]
    assert [g.shape for g in model.gradients] == [w.shape for w in model.weights]
    with pytest.raises(ValueError, match="3 outputs"):
        model.backward([np.ones_like(top)])


def test_activity_losses_alone_have_a_gradient_inside_models_too():
    x = Input((6, 2), dtype="float64")
    inner = Model(x, layers.Conv1D(3, 2, dtype="float64", activity_regularizer="l2")(x))
    outer = Model(x, [inner(x), layers.Conv1D(1, 1, dtype="float64")(x)])
    data = np.random.default_rng(0).standard_normal((2, 6, 2))
    y, z = outer.forward(data)
    dx = outer.backward([np.zeros_like(y), np.zeros_like(z)])
    assert dx.any()
    assert np.array_equal(outer.backward([None, np.zeros_like(z)]), dx)


def test_deep_chain_of_a_thousand_layers():
    x = y = Input((3, 1))
    for _ in range(1000):
        y = layers.ZeroPadding1D((0, 0))(y)
    model = Model(x, y)
    assert len(model.layers) == 1001
    assert model(np.ones((1, 3, 1), "f")).sum() == 3


def test_intermediate_arrays_are_given_up_as_soon_as_possible():
    made, alive = [], []

    class Watched(layers.Layer):
        def _record(self, *inputs, training):
            alive.append(sum(each() is not None for each in made))
            y = inputs[0].copy()
            made.append(weakref.ref(y))
            return y, None

        def compute_output_shape(self, input_shape):
            return tuple(input_shape)

    x = y = Input((3, 1))
    for _ in range(6):
        y = Watched()(y)
    Model(x, y)(np.ones((1, 3, 1), "f"))
    assert alive == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda x, y, z: Model(x, y(z)), "depend on 'input_layer_1'"),
        (lambda x, y, z: Model([x, x], y(x)), "differ"),
        (lambda x, y, z: Model(np.ones(3), y(x)), "symbolic"),
        (lambda x, y, z: Model(x, []), "symbolic"),
        (lambda x, y, z: Model(x, layers.Conv1D(2, 1, name="y")(y(x))), "different names"),
    ],
    ids=["disconnected", "same-input-twice", "array", "nothing", "same-name-twice"],
)
def test_impossible_model(build, message):
    with pytest.raises(ValueError, match=message):
        build(Input((4, 2)), layers.Conv1D(2, 1, name="y"), Input((4, 2)))


def test_model_from_intermediate_tensors_shares_the_layers():
    x = Input((6, 2))
    first, second = layers.Conv1D(3, 2), layers.Conv1D(4, 2)
    middle = first(x)
    whole = Model(x, second(middle))
    head, tail = Model(whole.input, first.output), Model(middle, whole.output)
    assert tail.input_shape == (None, 5, 3)
    assert tail.layers[1] is second
    data = np.random.default_rng(0).standard_normal((2, 6, 2)).astype("f")
    assert np.array_equal(tail(head(data)), whole(data))
    again = Model.from_config(through_json(tail.get_config()))
    assert again.output_shape == tail.output_shape


def test_input_data_is_checked_and_cast():
    model = example()
    for wrong in (np.ones((1, 127, 9)), np.ones((128, 9)), np.ones((1, 128, 9, 1))):
        with pytest.raises(ValueError, match="Received: inputs.shape="):
            model(wrong)
    with pytest.raises(ValueError, match="list"):
        model([[[1.0]]])
    with pytest.raises(TypeError, match="complex"):
        model(np.ones((1, 128, 9)) * 1j)
    sound = np.random.default_rng(0).integers(-99, 99, (1, 128, 9))
    assert np.array_equal(model(sound), model(sound.astype("float32")))


# --- Models in models --------------------------------------------------------------------------------------------


def nested():
    a = Input((6, 2), dtype="float64")
    shared = layers.Conv1D(2, 3, padding="same", name="c", dtype="float64", activation="tanh", bias_regularizer="l2")
    inner = Model(a, shared(a), name="inner")
    stack = Sequential([layers.Conv1D(2, 2, dtype="float64"), layers.UpSampling1D(2, dtype="float64")], name="stack")
    x = Input((6, 2), dtype="float64")
    return randomize(Model(x, stack(shared(inner(inner(x))))))


def test_a_model_is_a_layer():
    model = nested()
    x = np.random.default_rng(0).standard_normal((2, 6, 2))
    inner, stack, shared = model.get_layer("inner"), model.get_layer("stack"), model.get_layer("c")
    assert_close(model(x), stack(shared(inner(inner(x)))), dtype="float64", terms=10)
    assert model.weight_names == ["inner/c/kernel", "inner/c/bias", "stack/conv1d/kernel", "stack/conv1d/bias"]
    assert model.count_params() == 14 + 10
    check_gradients(model, x)
    assert len(model.losses) == 1, "the layer that stands inside and outside is regularized once"


def test_ends_in_a_nested_model_are_counted_from_one_as_in_keras():
    a, x = Input((6, 2)), Input((6, 2))
    inner = Model(a, layers.Conv1D(2, 3)(a), name="inner")
    config = Model(x, inner(x)).get_config()
    assert config["output_layers"] == ["inner", 1, 0]
    assert Model.from_config(through_json(config)).output_shape == (None, 4, 2)


@pytest.mark.parametrize("make", [example, two_branches, nested], ids=lambda make: make.__name__)
def test_functional_config_round_trip(make):
    model = make()
    config = through_json(model.get_config())
    again = Model.from_config(config)
    assert through_json(again.get_config()) == config
    if make is not nested:  # the layer used inside and outside becomes two
        again.set_weights(model.get_weights())
        inputs = [np.random.default_rng(0).standard_normal((2, *t.shape[1:])) for t in model.inputs]
        for y, same in zip(outputs_of(again(inputs)), outputs_of(model(inputs)), strict=True):
            assert np.array_equal(y, same)
    assert model_from_json(model.to_json()).get_config() == again.get_config()


def test_conv_lstm_with_states_in_a_graph():
    x, h, c = Input((3, 4, 2)), Input((4, 2)), Input((4, 2))
    lstm = layers.ConvLSTM1D(2, 3, padding="same", return_state=True)
    y, _, c1 = lstm(x, initial_state=[h, c])
    model = Model([x, h, c], [layers.Conv1D(1, 1)(y), c1])
    names = ["input_layer", "input_layer_1", "input_layer_2", "conv_lstm1d", "conv1d"]
    assert [layer.name for layer in model.layers] == names
    rng = np.random.default_rng(0)
    data = [rng.standard_normal((2, *t.shape[1:])).astype("f") for t in (x, h, c)]
    expected = lstm(data[0], initial_state=data[1:])
    y0, c0 = model(data)
    assert np.array_equal(c0, expected[2])
    forward = model.forward(data)
    gradients = model.backward([np.ones_like(forward[0]), None])
    assert [g.shape for g in gradients] == [d.shape for d in data]
    config = through_json(model.get_config())
    again = Model.from_config(config)
    assert through_json(again.get_config()) == config
    again.set_weights(model.get_weights())
    assert np.array_equal(again(data)[0], y0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("input_layers"),
        lambda c: c["layers"][1].update(class_name="Dense"),
        lambda c: c["layers"][1]["inbound_nodes"][0]["args"][0]["config"].update(keras_history=["conv1d", 0, 0]),
    ],
    ids=["no-inputs", "unknown-layer", "a-loop"],
)
def test_damaged_functional_config(damage):
    config = through_json(example().get_config())
    damage(config)
    with pytest.raises(ValueError, match="Received"):
        Model.from_config(config)


def test_keras_2_functional_config():
    shared = {"name": "c", "filters": 2, "kernel_size": [3], "padding": "same"}
    config = {
        "name": "model",
        "layers": [
            {"class_name": "InputLayer", "config": {"batch_input_shape": [None, 6, 2], "name": "x"}, "name": "x",
            "inbound_nodes": []},
            {"class_name": "Conv1D", "config": shared, "name": "c", "inbound_nodes": [[["x", 0, 0, {}]], [["c", 0, 0,
            {}]]]},
        ],
        "input_layers": [["x", 0, 0]],
        "output_layers": [["c", 1, 0]],
    }  # fmt: skip
    model = model_from_json(json.dumps({"class_name": "Model", "config": config, "keras_version": "2.2.4"}))
    assert model.output_shape == (None, 6, 2) and model.count_params() == 14
    x = np.random.default_rng(0).standard_normal((1, 6, 2)).astype("f")
    layer = model.get_layer("c")
    assert np.array_equal(model(x), layer(layer(x)))


# --- Sequential --------------------------------------------------------------------------------------------------


def test_sequential_grows_and_shrinks():
    model = Sequential()
    model.add(Input((8, 2)))
    model.add(layers.Conv1D(4, 3))
    assert (model.output_shape, model.count_params()) == ((None, 6, 4), 28)
    model.add(layers.Conv1D(3, 3))
    assert model.output_shape == (None, 4, 3)
    removed = model.pop()
    assert removed.filters == 3 and model.output_shape == (None, 6, 4)
    with pytest.raises(ValueError, match="zero or negative"):
        model.add(layers.Conv1D(3, 9))
    assert [layer.name for layer in model.layers] == ["conv1d"]
    model.pop()
    assert model.layers == [] and not model.built
    with pytest.raises(ValueError, match="no layers"):
        model.pop()


@pytest.mark.parametrize(
    "first",
    [
        {"input_shape": (8, 2)},
        {"batch_input_shape": (None, 8, 2)},
        {"input_dim": 2, "input_length": 8},
    ],
    ids=lambda first: next(iter(first)),
)
def test_first_layer_may_know_the_input_shape(first):
    model = Sequential([layers.Conv1D(4, 3, **first), layers.Cropping1D(1)])
    assert (model.input_shape, model.output_shape) == ((None, 8, 2), (None, 4, 4))


def test_deferred_build():
    model = Sequential([layers.Conv1D(4, 3), layers.Conv1D(2, 3)])
    assert not model.built and model.weights == []
    with pytest.raises(ValueError, match="no input shape"):
        _ = model.output_shape
    with pytest.raises(ValueError, match="zero or negative"):
        model.build((None, 4, 2))
    assert not any(layer.built for layer in model.layers), "nothing is built before everything fits"
    assert model.compute_output_shape((None, 9, 2)) == (None, 5, 2)
    y = model(np.ones((3, 9, 2), "f"))
    assert y.shape == (3, 5, 2) and model.input_shape == (None, 9, 2)
    assert model(np.ones((1, 9, 2), "f")).shape == (1, 5, 2)
    with pytest.raises(ValueError, match="already has the input shape"):
        model.build((None, 10, 2))


def test_deferred_model_called_symbolically_takes_the_whole_shape():
    model = Sequential([layers.Conv1D(2, 3)])
    y = model(Input((8, 1), batch_size=4))
    assert (y.shape, model.input_shape) == ((4, 6, 2), (4, 8, 1))


def test_deferred_stateful_model_takes_its_batch_from_the_data():
    model = Sequential([layers.ConvLSTM1D(2, 3, stateful=True)])
    first = model(np.ones((3, 2, 8, 1), "f"))
    assert model.input_shape == (3, 2, 8, 1)
    assert not np.array_equal(model(np.ones((3, 2, 8, 1), "f")), first)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda model: model.add("conv"), "made of layers"),
        (lambda model: model.add(layers.Conv1D(2, 1, name="conv1d")), "different names"),
        (lambda model: model.add(Input((8, 2))), "first"),
        (lambda model: model.add(layers.ConvLSTM1D(2, 1, return_state=True)), "takes inputs with 4 axes"),
        (lambda model: Sequential([Input((2, 8, 1)), layers.ConvLSTM1D(2, 1, return_state=True)]), "3 outputs"),
        (lambda model: Sequential().build((None, 2, 3)), "no layers"),
    ],
    ids=["no-layer", "name-twice", "late-input", "rank", "several-outputs", "empty"],
)
def test_what_a_sequential_model_refuses(add, message):
    model = Sequential([layers.Conv1D(2, 1, name="conv1d", input_shape=(8, 2))])
    with pytest.raises(ValueError, match=message):
        add(model)
    assert len(model.layers) == 1


@pytest.mark.parametrize("built", [True, False], ids=["built", "deferred"])
def test_sequential_config_round_trip(built):
    model = Sequential([layers.Conv1D(4, 3, dtype="float64"), layers.ZeroPadding1D(2)], name="s")
    if built:
        model.build((None, 9, 2))
    config = through_json(model.get_config())
    kinds = [layer["class_name"] for layer in config["layers"]]
    assert kinds == (["InputLayer"] if built else []) + ["Conv1D", "ZeroPadding1D"]
    assert config.get("build_input_shape") == ([None, 9, 2] if built else None)
    again = Sequential.from_config(config)
    assert through_json(again.get_config()) == config and again.built == built


def test_keras_2_sequential_configs():
    described = [
        {
            "class_name": "Conv1D",
            "config": {"name": "c", "batch_input_shape": [None, 9, 2], "filters": 4, "kernel_size": [3]},
        },
        {"class_name": "ZeroPadding1D", "config": {"name": "z", "padding": [1, 0]}},
    ]
    for config in (described, {"name": "s", "layers": described}):
        assert model_from_json(json.dumps({"class_name": "Sequential", "config": config})).output_shape == (None, 8, 4)


def test_frozen_parts_stay_frozen():
    model = Sequential([Input((9, 2)), layers.Conv1D(4, 3, trainable=False), layers.Conv1D(4, 3)])
    assert len(model.trainable_weights) == 2
    assert len(Sequential.from_config(through_json(model.get_config())).trainable_weights) == 2
    model.trainable = False
    assert model.trainable_weights == [] and len(model.non_trainable_weights) == 4
    assert Sequential.from_config(through_json(model.get_config())).trainable_weights == []
    assert Sequential.from_config(through_json(model.get_config())).trainable is False
    model.trainable = True
    assert len(model.trainable_weights) == 4
    assert Sequential([Input((9, 2)), layers.Conv1D(4, 3)], trainable=False).trainable_weights == []
    x = Input((9, 2))
    assert Model(x, layers.Conv1D(4, 3)(x), trainable=False).trainable_weights == []


def test_a_step_of_training_lowers_the_loss():
    rng = np.random.default_rng(0)
    model = Sequential([Input((16, 3)), layers.Conv1D(8, 5, padding="causal", activation="relu"), layers.Conv1D(1, 1)])
    x = rng.standard_normal((32, 16, 3)).astype("f")
    target = np.cumsum(x, axis=1)[..., :1] / 4
    losses = []
    for _ in range(60):
        difference = model.forward(x) - target
        losses.append(float(np.mean(difference**2)))
        model.backward(2 * difference / difference.size)
        for w, g in zip(model.trainable_weights, model.trainable_gradients, strict=True):
            w -= 0.2 * g
        model.apply_constraints()
    assert losses[-1] < 0.6 * losses[0]


def test_constraints_of_all_layers():
    model = Sequential(
        [
            Input((9, 2)),
            layers.Conv1D(4, 3, kernel_constraint="non_neg"),
            layers.Conv1D(4, 3, bias_constraint="non_neg"),
        ]
    )
    for w in model.weights:
        w[...] = -1
    model.apply_constraints()
    assert [bool(np.all(w == 0)) for w in model.weights] == [True, False, False, True]


# --- Prediction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 70])
@pytest.mark.parametrize("batch_size", [None, 1, 7, 100])
def test_predict_is_the_model_batch_by_batch(count, batch_size):
    model = Sequential([Input((8, 2)), layers.Conv1D(4, 3)])
    x = np.random.default_rng(0).standard_normal((count, 8, 2)).astype("f")
    y = model.predict(x, batch_size=batch_size, verbose=0)
    assert y.shape == (count, 6, 4) and y.dtype == np.float32
    if count:
        assert_close(y, model(x).astype("float64"), dtype="float32", terms=6)


def test_predict_sends_batches_of_the_size_asked_for(monkeypatch):
    model = Sequential([Input((8, 2)), layers.Conv1D(4, 3)])
    sizes = []
    plain = model._run
    monkeypatch.setattr(
        model, "_run", lambda *inputs, training: sizes.append(len(inputs[0])) or plain(*inputs, training=training)
    )
    model.predict(np.ones((70, 8, 2), "f"))
    assert sizes == [32, 32, 6]


def test_predict_several_inputs_and_outputs_and_mapped_data(tmp_path):
    model = two_branches()
    a, b = np.random.default_rng(0).standard_normal((2, 5, 6, 2))
    np.save(tmp_path / "a.npy", a)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    outputs = model.predict([mapped, b], batch_size=2)
    assert isinstance(outputs, list)
    for y, want in zip(outputs, model([a, b]), strict=True):
        assert type(y) is np.ndarray
        assert_close(y, want, dtype="float64", terms=10)
    assert np.array_equal(model.predict({"b": b, "a": a}, batch_size=2)[0], outputs[0])


def test_predict_computes_where_the_weights_are_unless_told_otherwise(monkeypatch):
    model = Sequential([Input((8, 2)), layers.Conv1D(4, 3)])
    layer = model.layers[0]
    x = np.random.default_rng(0).standard_normal((40, 8, 2)).astype("f")
    y = model(x)
    second_place(monkeypatch)
    for device, place in ((None, np.ndarray), ("gpu", DeviceArray), (None, DeviceArray), ("cpu", np.ndarray)):
        predicted = model.predict(x, device=device)
        assert type(predicted) is np.ndarray and np.allclose(predicted, y, atol=1e-6)
        assert type(layer.kernel) is type(layer.bias) is place
        if place is DeviceArray:
            with pytest.raises(ValueError, match="do not move silently"):
                model(x)


def test_predict_of_fresh_weights_goes_where_asarray_goes(monkeypatch):
    model = Sequential([Input((8, 2)), layers.Conv1D(4, 3)])
    second_place(monkeypatch)
    assert type(model.predict(np.ones((3, 8, 2), "f"))) is np.ndarray
    assert type(model.layers[0].kernel) is DeviceArray


def test_predict_of_a_model_whose_output_shape_it_does_not_know():
    model = Sequential([Input((None, 4)), layers.Conv1D(4, 3, activation="glu")])
    assert model.predict(np.ones((40, 9, 4), "f")).shape == (40, 7, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"device": "tpu"}, "device"),
        ({"device": "gpu"}, "no usable GPU"),
    ],
    ids=str,
)
def test_wrong_arguments_of_predict(arguments, message):
    if "usable" in message and not isinstance(cuconv.asarray(np.ones(1)), np.ndarray):
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=message):
        Sequential([Input((8, 2)), layers.Conv1D(4, 3)]).predict(np.ones((3, 8, 2), "f"), **arguments)
    with pytest.raises(ValueError, match="same number of samples"):
        two_branches().predict([np.ones((3, 6, 2)), np.ones((4, 6, 2))])


def test_progress_is_shown_on_request_only(capsys):
    model = Sequential([Input((8, 2)), layers.Conv1D(4, 3)], name="mine")
    x = np.ones((70, 8, 2), "f")
    model.predict(x)
    model.predict(x, verbose=0)
    assert capsys.readouterr().out == "", "no bar where the output is no terminal"
    model.predict(x, verbose=1)
    shown = capsys.readouterr().out
    assert "mine" in shown and "100%" in shown


# --- The summary -------------------------------------------------------------------------------------------------

FUNCTIONAL_SUMMARY = """\
Model: "functional"
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━┓
┃ Layer (type)                    ┃ Output Shape           ┃       Param # ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━┩
│ input_layer (InputLayer)        │ (None, 128, 9)         │             0 │
├─────────────────────────────────┼────────────────────────┼───────────────┤
│ conv1d (Conv1D)                 │ (None, 119, 100)       │         9,100 │
└─────────────────────────────────┴────────────────────────┴───────────────┘
 Total params: 9,100 (35.55 KB)
 Trainable params: 9,100 (35.55 KB)
 Non-trainable params: 0 (0.00 B)
"""

SHARED_SUMMARY = """\
Model: "functional"
┏━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━┓
┃ Layer (type)        ┃ Output Shape      ┃    Param # ┃ Connected to      ┃
┡━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━┩
│ a (InputLayer)      │ (None, 6, 2)      │          0 │ -                 │
├─────────────────────┼───────────────────┼────────────┼───────────────────┤
│ shared (Conv1D)     │ (None, 6, 2)      │         14 │ a[0][0],          │
│                     │                   │            │ shared[0][0],     │
│                     │                   │            │ b[0][0]           │
├─────────────────────┼───────────────────┼────────────┼───────────────────┤
│ b (InputLayer)      │ (None, 6, 2)      │          0 │ -                 │
├─────────────────────┼───────────────────┼────────────┼───────────────────┤
│ top (Conv1D)        │ (None, 5, 3)      │         15 │ shared[1][0]      │
└─────────────────────┴───────────────────┴────────────┴───────────────────┘
 Total params: 29 (232.00 B)
 Trainable params: 29 (232.00 B)
 Non-trainable params: 0 (0.00 B)
"""

UNBUILT_SUMMARY = """\
Model: "sequential"
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━┓
┃ Layer (type)                    ┃ Output Shape           ┃       Param # ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━┩
│ conv1d (Conv1D)                 │ ?                      │   0 (unbuilt) │
├─────────────────────────────────┼────────────────────────┼───────────────┤
│ conv1d_1 (Conv1D)               │ ?                      │   0 (unbuilt) │
└─────────────────────────────────┴────────────────────────┴───────────────┘
 Total params: 0 (0.00 B)
 Trainable params: 0 (0.00 B)
 Non-trainable params: 0 (0.00 B)
"""

STATES_SUMMARY = """\
Model: "functional"
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━┓
┃ Layer (type)                    ┃ Output Shape           ┃       Param # ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━┩
│ input_layer (InputLayer)        │ (None, 5, 8, 8, 2)     │             0 │
├─────────────────────────────────┼────────────────────────┼───────────────┤
│ conv_lstm2d (ConvLSTM2D)        │ [(None, 6, 6, 3),      │           552 │
│                                 │ (None, 6, 6, 3),       │               │
│                                 │ (None, 6, 6, 3)]       │               │
└─────────────────────────────────┴────────────────────────┴───────────────┘
 Total params: 552 (2.16 KB)
 Trainable params: 0 (0.00 B)
 Non-trainable params: 552 (2.16 KB)
"""


def states():
    x = Input((5, 8, 8, 2))
    return Model(x, layers.ConvLSTM2D(3, 3, return_state=True, trainable=False)(x))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (example, FUNCTIONAL_SUMMARY),
        (two_branches, SHARED_SUMMARY),
        (lambda: Sequential([layers.Conv1D(100, 10), layers.Conv1D(6, 1)]), UNBUILT_SUMMARY),
        (states, STATES_SUMMARY),
    ],
    ids=["functional", "shared", "unbuilt", "states"],
)
def test_summary_is_keras_table(make, text, capsys, monkeypatch):
    """The tables are those that Keras 3.15.1 prints for the same models, 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")
    model = make()
    assert model.summary() is None
    assert capsys.readouterr().out == text
    parts = []
    assert model.summary(print_fn=parts.append) is None
    assert parts == [text] and capsys.readouterr().out == ""


def test_sequential_summary_has_no_input_row(capsys):
    Sequential([Input((128, 9)), layers.Conv1D(100, 10)]).summary()
    shown = capsys.readouterr().out
    assert "InputLayer" not in shown and "(None, 119, 100)" in shown and "9,100" in shown


@pytest.mark.parametrize(("columns", "width"), [("200", 88), ("60", 56), ("20", 40)])
def test_summary_width(columns, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    model = Sequential(
        [Input((128, 9)), layers.Conv1D(100, 10, name="a_name_[that]_is_longer_than_the_column_it_stands_in")]
    )
    model.summary()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == width
    model.summary(line_length=100)
    assert max(map(len, capsys.readouterr().out.splitlines())) == 100


@pytest.mark.parametrize(
    ("count", "size"), [(255, "1020.00 B"), (256, "1.00 KB"), (262143, "1024.00 KB"), (262144, "1.00 MB")]
)
def test_sizes_in_the_summary(count, size, capsys):
    Sequential([Input((1, 1)), layers.Conv1D(count, 1, use_bias=False)]).summary()
    assert f"Total params: {count:,} ({size})" in capsys.readouterr().out


def test_names_that_look_like_markup(capsys):
    a, b = Input((4, 2), name="[bold]a"), Input((4, 2), name="[b]")
    layer = layers.Conv1D(2, 1, name="[red]")
    Model([a, b], [layer(a), layer(b)], name="[link]").summary(line_length=160)
    shown = capsys.readouterr().out
    for text in (
        '"[link]"',
        "[bold]a (Input",
        "[b] (Input",
        "[red] (Conv1D)",
        "[bold]a[0][0]",
        "[b][0][0]",
    ):
        assert text in shown


def test_summary_into_a_pipe():
    """No terminal, no colour, no rewrapping, whatever the encoding of the pipe's reader is."""
    code = (
        "from cuconv import layers, models as m; x = m.Input((128, 9)); m.Model(x, layers.Conv1D(100, 10)(x)).summary()"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("COLUMNS", None)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert run.stdout.decode() == FUNCTIONAL_SUMMARY


def test_random_weights_helper_is_used_by_layers_of_models():
    layer = with_random_weights(layers.Conv1D(2, 3, dtype="float64"), (None, 5, 2))
    assert layer(Input((5, 2))).shape == (None, 3, 2)
