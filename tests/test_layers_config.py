"""get_config, from_config, and the configs that Keras 3 and Keras 2 wrote."""

import json

import numpy as np
import pytest
from layer_cases import CASES, PLAIN

from cuconv import constraints, initializers, layers, regularizers


def through_json(config):
    return json.loads(json.dumps(config))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_round_trip(case):
    config = case.make(name="a", dtype="mixed_bfloat16", trainable=False).get_config()
    again = type(case.make()).from_config(through_json(config))
    assert again.get_config() == config
    assert layers.deserialize(through_json(layers.serialize(again))).get_config() == config
    assert "build_config" not in layers.serialize(again)
    again.build(case.shape)
    assert layers.serialize(again)["build_config"] == {"input_shape": case.shape}


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_keys_are_name_trainable_dtype_and_the_arguments(case):
    config = case.make().get_config()
    cls = type(case.make())
    own = [name for name in cls.__signature__.parameters if name != "kwargs"]
    more = ["unroll", "zero_output_for_mask"] if "LSTM" in case.layer else []
    assert sorted(config) == sorted(["name", "trainable", "dtype", *own, *more])
    assert config["dtype"] == {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": "float32"},
        "registered_name": None,
    }


def test_values_are_keras_spelling():
    config = layers.Conv2D(
        3,
        (3, 2),
        data_format=None,
        padding="SAME",
        activation="swish",
        kernel_regularizer="l2",
        bias_constraint="non_neg",
        kernel_initializer=initializers.Constant(0.5),
    ).get_config()
    assert {
        key: config[key] for key in ("filters", "kernel_size", "strides", "padding", "data_format", "dilation_rate")
    } == {
        "filters": 3,
        "kernel_size": (3, 2),
        "strides": (1, 1),
        "padding": "same",
        "data_format": "channels_last",
        "dilation_rate": (1, 1),
    }
    assert (config["groups"], config["activation"], config["use_bias"]) == (1, "silu", True)
    assert config["kernel_initializer"] == {
        "module": "keras.initializers",
        "class_name": "Constant",
        "config": {"value": 0.5},
        "registered_name": None,
    }
    assert config["kernel_regularizer"]["config"] == {"l2": 0.01}
    assert config["bias_constraint"]["class_name"] == "NonNeg"
    assert layers.Conv1D(3, 3).get_config()["activation"] == "linear"


@pytest.mark.parametrize(
    ("layer", "key", "value"),
    [
        (layers.Cropping1D(2), "cropping", (2, 2)),
        (layers.Cropping2D(2), "cropping", ((2, 2), (2, 2))),
        (layers.Cropping2D((1, (2, 3))), "cropping", ((1, 1), (2, 3))),
        (layers.ZeroPadding1D((1, 2)), "padding", (1, 2)),
        (layers.ZeroPadding3D((1, 2, 3)), "padding", ((1, 1), (2, 2), (3, 3))),
        (layers.UpSampling1D(3), "size", 3),
        (layers.UpSampling2D(3, interpolation="BILINEAR"), "size", (3, 3)),
        (layers.UpSampling2D(3, interpolation="BILINEAR"), "interpolation", "bilinear"),
        (layers.Conv2DTranspose(2, 3, strides=2, output_padding=1), "output_padding", (1, 1)),
        (layers.Conv2DTranspose(2, 3), "output_padding", None),
        (layers.ConvLSTM1D(2, 3, dropout=1.5, recurrent_dropout=-1), "dropout", 1.0),
        (layers.ConvLSTM1D(2, 3, dropout=1.5, recurrent_dropout=-1), "recurrent_dropout", 0.0),
        (layers.ConvLSTM1D(2, 3, unroll=True), "unroll", True),
        (layers.Conv1D(2, 3, data_format="Channels_First"), "data_format", "channels_first"),
    ],
    ids=lambda value: str(value) if not isinstance(value, layers.Layer) else type(value).__name__,
)
def test_arguments_are_stored_as_keras_stores_them(layer, key, value):
    assert layer.get_config()[key] == value
    assert getattr(layer, key) == value


def test_activity_regularizer_is_in_the_config_of_layers_without_the_argument():
    layer = layers.Cropping1D(1, activity_regularizer="l1")
    assert layer.get_config()["activity_regularizer"]["class_name"] == "L1"
    assert isinstance(layers.Cropping1D.from_config(layer.get_config()).activity_regularizer, regularizers.L1)


def swishy(x):
    return x * 0.5


class Cube(regularizers.Regularizer):
    def __call__(self, w):
        return float(np.sum(np.abs(w) ** 3))

    def gradient(self, w):
        return 3 * w * np.abs(w)


def test_custom_objects_come_from_the_caller_only():
    layer = layers.Conv1D(2, 3, activation=swishy, kernel_regularizer=Cube(), name="a")
    config = through_json(layer.get_config())
    with pytest.raises(ValueError, match="Unknown activation"):
        layers.Conv1D.from_config(config)
    again = layers.Conv1D.from_config(config, custom_objects={"swishy": swishy, "Cube": Cube})
    assert isinstance(again.kernel_regularizer, Cube)
    assert again.activation(np.ones(1)) == 0.5
    assert again.get_config() == layer.get_config()


class Doubled(layers.Conv1D):
    def __init__(self, filters, factor=2, **kwargs):
        super().__init__(filters, **kwargs)
        self.factor = factor


def test_custom_layer_class():
    config = through_json(layers.serialize(Doubled(2, 5, kernel_size=3)))
    assert config["registered_name"] == "Doubled"
    with pytest.raises(ValueError, match="Unknown layer.*Received: class_name='Doubled'"):
        layers.deserialize(config)
    again = layers.deserialize(config, custom_objects={"Doubled": Doubled})
    assert type(again) is Doubled and again.factor == 5


@pytest.mark.parametrize(
    "config",
    [{}, {"class_name": "Conv1D"}, {"class_name": 3, "config": {}}, "Conv1D", None, {"class_name": "os", "config": {}}],
    ids=str,
)
def test_what_is_no_layer_config(config):
    with pytest.raises(ValueError, match="Received: "):
        layers.deserialize(config)


# --- Keras 2 -----------------------------------------------------------------------------------------------------

KERAS2_GLOROT = {"class_name": "GlorotUniform", "config": {"seed": None}}
KERAS2_ZEROS = {"class_name": "Zeros", "config": {}}

KERAS2 = {
    "Conv1D-without-groups": (
        "Conv1D",
        {
            "name": "conv1d", "trainable": True, "batch_input_shape": [None, 128, 9], "dtype": "float32",
            "filters": 100,
            "kernel_size": [10], "strides": [1], "padding": "valid", "data_format": "channels_last",
            "dilation_rate": [1],
            "activation": "relu", "use_bias": True,
            "kernel_initializer": {"class_name": "VarianceScaling", "config": {"scale": 1.0, "mode": "fan_avg",
            "distribution": "uniform", "seed": None}},
            "bias_initializer": KERAS2_ZEROS, "kernel_regularizer": {"class_name": "L1L2", "config": {"l1": 0.0,
            "l2": 0.01}},
            "bias_regularizer": None, "activity_regularizer": None,
            "kernel_constraint": {"class_name": "MaxNorm", "config": {"max_value": 2, "axis": 0}},
            "bias_constraint": None,
        },
        {"filters": 100, "groups": 1, "kernel_size": (10,)},
    ),
    "DepthwiseConv2D-with-groups-and-kernel-keys": (
        "DepthwiseConv2D",
        {
            "name": "depthwise_conv2d", "trainable": True, "dtype": "float32", "kernel_size": [3, 3], "strides": [2, 2],
            "padding": "same", "data_format": "channels_last", "dilation_rate": [1, 1], "groups": 1,
            "activation": "linear",
            "use_bias": False, "bias_initializer": KERAS2_ZEROS, "bias_regularizer": None, "activity_regularizer": None,
            "bias_constraint": None, "depth_multiplier": 2, "depthwise_initializer": KERAS2_GLOROT,
            "depthwise_regularizer": None,
            "depthwise_constraint": None, "kernel_initializer": KERAS2_GLOROT, "kernel_regularizer": None,
            "kernel_constraint": None,
        },
        {"depth_multiplier": 2, "use_bias": False, "strides": (2, 2)},
    ),
    "SeparableConv1D-with-kernel-keys": (
        "SeparableConv1D",
        {
            "name": "s", "trainable": False, "dtype": {"class_name": "Policy", "config": {"name": "mixed_float16"}},
            "filters": 4,
            "kernel_size": [3], "strides": [1], "padding": "valid", "data_format": "channels_last",
            "dilation_rate": [1],
            "groups": 1, "activation": "relu", "use_bias": True, "bias_initializer": KERAS2_ZEROS,
            "depth_multiplier": 1,
            "kernel_initializer": KERAS2_GLOROT, "kernel_regularizer": None, "kernel_constraint": None,
            "depthwise_initializer": KERAS2_GLOROT, "pointwise_initializer": KERAS2_GLOROT,
        },
        {"trainable": False, "compute_dtype": "float16"},
    ),
    "Conv2DTranspose-with-groups": (
        "Conv2DTranspose",
        {"name": "t", "filters": 4, "kernel_size": [3, 3], "strides": [2, 2], "groups": 1, "output_padding": None},
        {"output_padding": None},
    ),
    "ConvLSTM2D-with-time_major": (
        "ConvLSTM2D",
        {
            "name": "l", "trainable": True, "dtype": "float32", "return_sequences": True, "return_state": False,
            "go_backwards": False, "stateful": False, "unroll": False, "time_major": False, "filters": 2,
            "kernel_size": [3, 3],
            "strides": [1, 1], "padding": "same", "data_format": "channels_last", "dilation_rate": [1, 1],
            "activation": "tanh",
            "recurrent_activation": "hard_sigmoid", "use_bias": True, "kernel_initializer": KERAS2_GLOROT,
            "recurrent_initializer": {"class_name": "Orthogonal", "config": {"gain": 1.0, "seed": None}},
            "bias_initializer": KERAS2_ZEROS, "unit_forget_bias": True, "dropout": 0.0, "recurrent_dropout": 0.0,
        },
        {"return_sequences": True},
    ),
    "ZeroPadding2D": (
        "ZeroPadding2D",
        {"name": "z", "trainable": True, "dtype": "float32", "padding": [[1, 1], [0, 2]],
        "data_format": "channels_last"},
        {"padding": ((1, 1), (0, 2))},
    ),
    "InputLayer": (
        "InputLayer",
        {"batch_input_shape": [None, 128, 9], "dtype": "float32", "sparse": False, "ragged": False, "name": "input_1"},
        {"batch_shape": (None, 128, 9), "name": "input_1"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "config", "facts"), KERAS2.values(), ids=KERAS2)
def test_keras_2_config(layer, config, facts):
    made = layers.deserialize({"class_name": layer, "config": config})
    assert {key: getattr(made, key) for key in facts} == facts
    again = type(made).from_config(through_json(made.get_config()))
    assert again.get_config() == made.get_config()


def test_keras_2_objects_are_understood():
    made = layers.deserialize({"class_name": "Conv1D", "config": KERAS2["Conv1D-without-groups"][1]})
    assert made._batch_input_shape == (None, 128, 9)
    assert isinstance(made.kernel_initializer, initializers.VarianceScaling)
    assert isinstance(made.kernel_regularizer, regularizers.L1L2) and made.kernel_regularizer.l2 == 0.01
    assert isinstance(made.kernel_constraint, constraints.MaxNorm)


@pytest.mark.parametrize(
    ("layer", "change"),
    [("DepthwiseConv2D", {"groups": 2}), ("Conv2DTranspose", {"groups": 4}), ("ConvLSTM2D", {"time_major": True})],
    ids=lambda value: str(value),
)
def test_keras_2_keys_that_would_mean_something_are_refused(layer, change):
    config = next(config for name, config, _ in KERAS2.values() if name == layer)
    with pytest.raises(ValueError, match=f"Received: {next(iter(change))}="):
        layers.deserialize({"class_name": layer, "config": {**config, **change}})
