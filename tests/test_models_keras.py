"""Whole models against Keras 3 on torch: each library reads what the other wrote, and prints the same table."""

import json

import numpy as np
import pytest
from compare import assert_close
from keras_harness import keras, torch

from cuconv import layers, models

# Keras on torch calls NumPy in ways NumPy 2 warns about.
pytestmark = [pytest.mark.keras, pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")]


@pytest.fixture(autouse=True)
def fresh_names():
    keras.backend.clear_session()
    layers.reset_names()


class Ours:
    layers, Input, Model, Sequential = layers, models.Input, models.Model, models.Sequential


def chain(k):
    x = k.Input((32, 3))
    y = k.layers.Conv1D(8, 5, padding="causal", dilation_rate=2, activation="relu", kernel_regularizer="l2")(x)
    y = k.layers.DepthwiseConv1D(3, depth_multiplier=2, strides=2, activation="gelu")(y)
    return k.Model(x, k.layers.UpSampling1D(2)(k.layers.SeparableConv1D(4, 3, padding="same")(y)))


def branches(k):
    a, b = k.Input((6, 6, 2), name="a"), k.Input((6, 6, 2), name="b")
    shared = k.layers.Conv2D(2, 3, padding="same", activation="tanh", name="shared")
    first = shared(shared(a))
    top = k.layers.Conv2DTranspose(3, 2, strides=2, output_padding=1)(first)
    return k.Model([a, b], [top, first, k.layers.ZeroPadding2D(1)(shared(b))])


def diamond(k):
    """A layer at two depths, branches of unequal length, an output in the middle."""
    x = k.Input((9, 2))
    u = k.layers.Conv1D(2, 3, padding="same", name="u")
    v = k.layers.Conv1D(2, 3, padding="same", name="v")
    w = k.layers.Conv1D(2, 1, name="w")
    middle = v(u(x))
    return k.Model(x, [v(x), middle, u(w(middle))])


def states(k):
    x, h, c = k.Input((3, 5, 2)), k.Input((5, 4)), k.Input((5, 4))
    lstm = k.layers.ConvLSTM1D(4, 3, padding="same", return_state=True, go_backwards=True)
    y, _, c1 = lstm(x, initial_state=[h, c])
    return k.Model([x, h, c], [k.layers.Conv1D(2, 1)(y), c1])


def nested(k):
    a = k.Input((8, 2))
    inner = k.Model(a, k.layers.Conv1D(2, 3, padding="same", name="c")(a), name="inner")
    stack = k.Sequential([k.Input((8, 2)), k.layers.Conv1D(3, 2), k.layers.Cropping1D(1)], name="stack")
    x = k.Input((8, 2))
    return k.Model(x, [stack(inner(inner(x))), inner(x)], name="outer")


def sequence(k):
    return k.Sequential([k.Input((None, 3)), k.layers.Conv1D(4, 3), k.layers.ZeroPadding1D(2), k.layers.Conv1D(2, 2)])


def deferred(k):
    return k.Sequential([k.layers.Conv1D(4, 3), k.layers.ZeroPadding1D(2)])


MAKERS = [chain, branches, diamond, states, nested, sequence]
each_model = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def plain(config):
    """A config as JSON, without the seeds that were drawn and without what only Keras knows."""
    return strip(json.loads(json.dumps(config)))


def strip(value):
    if isinstance(value, list):
        return [strip(each) for each in value]
    if isinstance(value, dict):
        idle = {"compile_config", "build_config", "mask", "seed", "input_axes", "output_axes"}
        return {key: strip(each) for key, each in value.items() if key not in idle}
    return value


def run(model, inputs, k):
    if k is keras:
        with torch.no_grad():
            given = [torch.from_numpy(x) for x in inputs]
            outputs = model(given if len(given) > 1 else given[0])
        outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
        return [y.numpy() for y in outputs]
    outputs = model(inputs)
    return outputs if isinstance(outputs, list) else [outputs]


def data_for(model):
    rng = np.random.default_rng(0)
    return [rng.standard_normal([n or 11 for n in (2, *t.shape[1:])]).astype("float32") for t in model.inputs]


def compare_outputs(ours, theirs):
    assert [tuple(w.shape) for w in ours.weights] == [tuple(w.shape) for w in theirs.weights]
    ours.set_weights(theirs.get_weights())
    inputs = data_for(ours)
    for y, want in zip(run(ours, inputs, Ours), run(theirs, inputs, keras), strict=True):
        assert_close(y, want.astype("float64"), dtype="float32", terms=1000)


@each_model
def test_same_model_same_answer_same_layers(make):
    ours, theirs = make(Ours), make(keras)
    assert [layer.name for layer in ours.layers] == [layer.name for layer in theirs.layers]
    assert ours.count_params() == theirs.count_params()
    compare_outputs(ours, theirs)


@each_model
def test_configs_are_equal(make):
    assert plain(make(Ours).get_config()) == plain(make(keras).get_config())


@each_model
def test_we_read_keras(make):
    theirs = make(keras)
    compare_outputs(models.model_from_json(theirs.to_json()), theirs)


@each_model
def test_keras_reads_us(make):
    ours = make(Ours)
    theirs = keras.models.model_from_json(ours.to_json())
    compare_outputs(ours, theirs)


def summary_of(model):
    parts = []
    model.summary(print_fn=lambda text, **_: parts.append(text))
    return "".join(parts).replace("(Functional)", "(Model)     ")


@pytest.mark.parametrize("make", [*MAKERS, deferred], ids=lambda make: make.__name__)
@pytest.mark.parametrize("columns", [80, 120])
def test_summaries_are_equal(make, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    ours, theirs = make(Ours), make(keras)
    assert summary_of(ours) == summary_of(theirs)
