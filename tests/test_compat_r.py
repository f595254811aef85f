"""layer_conv_1d of R: the object first, doubles for integers, and the arguments of Keras 2."""

import inspect

import numpy as np
import oracle
import pytest
from compare import assert_close

from cuconv import constraints, layers, models, regularizers
from cuconv.compat import r

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 11, 3))  # R's numbers are doubles
KERNEL, BIAS = RNG.standard_normal((3, 3, 4)), RNG.standard_normal(4)


def test_the_signature_is_that_of_r():
    parameters = inspect.signature(r.layer_conv_1d).parameters
    arguments = (
        "object filters kernel_size strides padding data_format dilation_rate groups activation use_bias "
        "kernel_initializer bias_initializer kernel_regularizer bias_regularizer activity_regularizer "
        "kernel_constraint bias_constraint input_shape batch_input_shape batch_size dtype name trainable weights"
    )
    assert list(parameters) == arguments.split()
    special = {"strides": 1, "padding": "valid", "data_format": "channels_last", "dilation_rate": 1, "groups": 1}
    special |= {"use_bias": True, "kernel_initializer": "glorot_uniform", "bias_initializer": "zeros"}
    assert {key: each.default for key, each in parameters.items()} == dict.fromkeys(parameters) | special


def test_without_an_object_the_layer_comes_back():
    for layer in (r.layer_conv_1d(filters=4, kernel_size=3), r.layer_conv_1d(None, 4, 3)):
        assert type(layer) is layers.Conv1D and not layer.built
        assert (layer.filters, layer.kernel_size, layer.data_format) == (4, (3,), "channels_last")


def test_a_sequential_model_comes_back_with_the_layer():
    model = models.Sequential()
    assert r.layer_conv_1d(model, 4.0, 3.0, input_shape=[11.0, 3.0]) is model
    assert r.layer_conv_1d(model, 2, 1, name="last") is model
    assert model.output_shape == (None, 9, 2) and model.layers[-1].name == "last"


def test_tensors_arrays_and_layers_are_gone_through():
    x = models.Input((11, 3))
    y = r.layer_conv_1d(x, 4, 3)
    assert y.shape == (None, 9, 4)
    layer = layers.Conv1D(5, 2)
    layer(y)
    assert r.layer_conv_1d(layer, 2, 1).shape == (None, 8, 2)
    assert r.layer_conv_1d(models.Model(x, y), 2, 1).shape == (None, 9, 2)
    y = r.layer_conv_1d(X, 4, 3, weights=[KERNEL, BIAS])
    assert_close(y, oracle.conv(X.astype("float32"), KERNEL, BIAS), dtype="float32", terms=10)


def test_numbers_of_r_are_integers_where_they_are_whole():
    layer = r.layer_conv_1d(
        filters=4.0, kernel_size=[3.0], strides=[2.0], dilation_rate=1.0, groups=np.float64(2), batch_size=5.0,
        input_shape=(float("nan"), r.NA_INTEGER),
    )  # fmt: skip
    assert (layer.filters, layer.kernel_size, layer.strides, layer.dilation_rate) == (4, (3,), (2,), (1,))
    assert layer.groups == 2 and type(layer.groups) is int is type(layer.kernel_size[0])
    assert layer._batch_input_shape == (5, None, None)
    layer = r.layer_conv_1d(filters=4, kernel_size=3, batch_input_shape=[None, 11.0, 3.0])
    assert layer._batch_input_shape == (None, 11, 3)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"filters": 2.5}, ValueError, r"`filters` must be a whole number. Received: filters=2.5"),
        ({"kernel_size": [1.5]}, ValueError, r"`kernel_size` must be a whole number"),
        ({"strides": float("inf")}, ValueError, "strides"),
        ({"dilation_rate": float("nan")}, ValueError, "dilation_rate"),
        ({"input_shape": [11.0, 2.5]}, ValueError, "input_shape"),
        ({"batch_size": 0.5}, ValueError, "batch_size"),
        ({"filters": "4"}, TypeError, "filters"),
        ({"filters": None}, TypeError, "needs `filters` and `kernel_size`"),
        ({"kernel_size": None}, TypeError, "needs `filters` and `kernel_size`"),
        ({"kernel_size": [3.0, 3.0]}, ValueError, "kernel_size"),
        ({"trainable": 1.0}, ValueError, "trainable"),
        ({"object": "model"}, TypeError, "`object` must be"),
        ({"object": [X]}, TypeError, "`object` must be"),
        ({"padding": "full"}, ValueError, "padding"),
    ],
)
def test_what_is_refused(arguments, error, message):
    model = models.Sequential([models.Input((11, 3)), layers.Conv1D(3, 1)])
    with pytest.raises(error, match=message):
        r.layer_conv_1d(**({"object": model, "filters": 4, "kernel_size": 3} | arguments))
    assert len(model.layers) == 1


def test_the_arguments_of_keras_2():
    layer = r.layer_conv_1d(
        None, 4, 3, 1, "causal", None, 2, 1, "relu", False, dtype="float64", name="mine", trainable=False,
        weights=[KERNEL], batch_input_shape=[2, 11, 3],
    )  # fmt: skip
    model = models.Sequential([layer])
    assert model.input_shape == (2, 11, 3) and not layer.trainable_weights and layer.name == "mine"
    np.testing.assert_array_equal(layer.get_weights()[0], KERNEL)
    expected = np.maximum(oracle.conv(X, KERNEL, padding="causal", dilation_rate=2), 0)
    assert_close(model(X), expected, dtype="float64", terms=9)


def test_every_argument_reaches_its_place():
    arguments = {
        "filters": 4, "kernel_size": 3, "strides": 2, "padding": "same", "data_format": "channels_first",
        "dilation_rate": 1, "groups": 2, "activation": "tanh", "use_bias": True, "kernel_initializer": "he_normal",
        "bias_initializer": "ones", "kernel_regularizer": regularizers.L2(1.0),
        "bias_regularizer": regularizers.L2(2.0), "activity_regularizer": regularizers.L2(3.0),
        "kernel_constraint": constraints.MaxNorm(4.0),
        "bias_constraint": constraints.MaxNorm(5.0),
    }  # fmt: skip
    expected = layers.Conv1D(**arguments, dtype="float16", name="c").get_config()
    for layer in (
        r.layer_conv_1d(None, *arguments.values(), dtype="float16", name="c"),
        r.layer_conv_1d(**arguments, dtype="float16", name="c"),
    ):
        config = layer.get_config()
        for key in ("kernel_initializer", "bias_initializer"):
            config[key]["config"] = expected[key]["config"]  # a seed of its own
        assert config == expected


def test_weights_that_do_not_fit_are_refused_when_the_layer_is_built():
    layer = r.layer_conv_1d(filters=4, kernel_size=3, weights=[KERNEL])
    with pytest.raises(ValueError, match="2 weights"):
        layer(X)
