"""What the constructors take: order, defaults, keywords, names, dtypes; and what they refuse, when and how."""

import inspect
import re

import ml_dtypes
import numpy as np
import pytest
from layer_cases import CASES, PLAIN

from cuconv import initializers, layers
from cuconv.layers import base

REQUIRED = inspect.Parameter.empty
USUAL = {case.layer: case.arguments for case in PLAIN}


def ones(rank):
    return 1 if rank == 1 else (1,) * rank


def conv(rank):
    return {
        "filters": REQUIRED, "kernel_size": REQUIRED, "strides": ones(rank), "padding": "valid", "data_format": None,
        "dilation_rate": ones(rank), "groups": 1, "activation": None, "use_bias": True,
        "kernel_initializer": "glorot_uniform", "bias_initializer": "zeros", "kernel_regularizer": None,
        "bias_regularizer": None, "activity_regularizer": None, "kernel_constraint": None, "bias_constraint": None,
    }  # fmt: skip


def transpose(rank):
    between = ["output_padding", "data_format"] if rank < 3 else ["data_format", "output_padding"]
    middle = dict.fromkeys(between)
    rest = {key: value for key, value in conv(rank).items() if key not in ("data_format", "groups")}
    head = {key: rest.pop(key) for key in ("filters", "kernel_size", "strides", "padding")}
    return {**head, **middle, **rest}


def words(*names):
    return {
        **{f"{name}_initializer": "zeros" if name == "bias" else "glorot_uniform" for name in names},
        **{f"{name}_regularizer": None for name in names},
        "activity_regularizer": None,
        **{f"{name}_constraint": None for name in names},
    }


def separable(rank):
    return {
        "filters": REQUIRED, "kernel_size": REQUIRED, "strides": ones(rank), "padding": "valid", "data_format": None,
        "dilation_rate": ones(rank), "depth_multiplier": 1, "activation": None, "use_bias": True,
        **words("depthwise", "pointwise", "bias"),
    }  # fmt: skip


def depthwise(rank):
    return {
        "kernel_size": REQUIRED, "strides": ones(rank), "padding": "valid", "depth_multiplier": 1, "data_format": None,
        "dilation_rate": ones(rank), "activation": None, "use_bias": True, **words("depthwise", "bias"),
    }  # fmt: skip


CONV_LSTM = {
    "filters": REQUIRED, "kernel_size": REQUIRED, "strides": 1, "padding": "valid", "data_format": None,
    "dilation_rate": 1,
    "activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": True, "kernel_initializer": "glorot_uniform",
    "recurrent_initializer": "orthogonal", "bias_initializer": "zeros", "unit_forget_bias": True,
    "kernel_regularizer": None,
    "recurrent_regularizer": None, "bias_regularizer": None, "activity_regularizer": None, "kernel_constraint": None,
    "recurrent_constraint": None, "bias_constraint": None, "dropout": 0.0, "recurrent_dropout": 0.0, "seed": None,
    "return_sequences": False, "return_state": False, "go_backwards": False, "stateful": False,
}  # fmt: skip

SIGNATURES = {
    **{f"Conv{rank}D": conv(rank) for rank in (1, 2, 3)},
    **{f"Conv{rank}DTranspose": transpose(rank) for rank in (1, 2, 3)},
    **{f"SeparableConv{rank}D": separable(rank) for rank in (1, 2)},
    **{f"DepthwiseConv{rank}D": depthwise(rank) for rank in (1, 2)},
    **{f"ConvLSTM{rank}D": CONV_LSTM for rank in (1, 2, 3)},
    "Cropping1D": {"cropping": (1, 1)},
    "Cropping2D": {"cropping": ((0, 0), (0, 0)), "data_format": None},
    "Cropping3D": {"cropping": ((1, 1), (1, 1), (1, 1)), "data_format": None},
    "UpSampling1D": {"size": 2},
    "UpSampling2D": {"size": (2, 2), "data_format": None, "interpolation": "nearest"},
    "UpSampling3D": {"size": (2, 2, 2), "data_format": None},
    "ZeroPadding1D": {"padding": 1, "data_format": None},
    "ZeroPadding2D": {"padding": (1, 1), "data_format": None},
    "ZeroPadding3D": {"padding": ((1, 1), (1, 1), (1, 1)), "data_format": None},
}


def test_there_are_22_layers():
    assert len(SIGNATURES) == 22
    assert {case.layer for case in PLAIN} == set(SIGNATURES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_has_keras_order_and_defaults(name):
    parameters = inspect.signature(getattr(layers, name)).parameters
    shown = {
        key: parameter.default for key, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD
    }
    assert list(shown.items()) == list(SIGNATURES[name].items())
    assert list(parameters.values())[-1].kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize("name", SIGNATURES)
def test_positional_arguments_go_where_the_signature_says(name):
    """Every argument by position, with a value that differs from its neighbours'."""
    telling = {
        "filters": 6, "kernel_size": 3, "strides": 1, "padding": "same", "data_format": "channels_first",
        "dilation_rate": 2,
        "groups": 2, "depth_multiplier": 3, "output_padding": 0, "activation": "relu", "recurrent_activation": "elu",
        "use_bias": False, "unit_forget_bias": False, "dropout": 0.25, "recurrent_dropout": 0.5, "seed": 7, "size": 3,
        "return_sequences": True, "return_state": True, "go_backwards": True, "stateful": True, "cropping": 2,
        "interpolation": "bilinear", "kernel_initializer": "ones", "depthwise_initializer": "he_normal",
        "pointwise_initializer": "he_uniform", "recurrent_initializer": "lecun_normal",
        "bias_initializer": "random_normal",
        "kernel_regularizer": "l1", "depthwise_regularizer": "l1", "pointwise_regularizer": "l2",
        "recurrent_regularizer": "l2", "bias_regularizer": "l1l2", "activity_regularizer": "orthogonal_regularizer",
        "kernel_constraint": "non_neg", "depthwise_constraint": "non_neg", "pointwise_constraint": "unit_norm",
        "recurrent_constraint": "unit_norm", "bias_constraint": "max_norm",
    }  # fmt: skip
    cls, names = getattr(layers, name), list(SIGNATURES[name])
    values = {key: telling[key] if key != "padding" or "Zero" not in name else 2 for key in names}
    by_position, by_name = cls(*values.values(), name="a").get_config(), cls(**values, name="a").get_config()
    for config in (by_position, by_name):  # each random initializer draws a seed of its own
        for value in config.values():
            if isinstance(value, dict) and "seed" in value["config"]:
                value["config"]["seed"] = None
    assert by_position == by_name


@pytest.mark.parametrize(
    ("alias", "name"),
    [(f"Convolution{rank}D{kind}", f"Conv{rank}D{kind}") for rank in (1, 2, 3) for kind in ("", "Transpose")]
    + [(f"SeparableConvolution{rank}D", f"SeparableConv{rank}D") for rank in (1, 2)],
)
def test_alias_is_the_layer(alias, name):
    assert getattr(layers, alias) is getattr(layers, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_docstring_shows_example_and_arguments(name):
    text = inspect.getdoc(getattr(layers, name))
    assert ">>>" in text
    for argument in SIGNATURES[name]:
        word = argument.rpartition("_")[2]
        assert re.search(rf"\b{argument}\b", text) or word in ("initializer", "regularizer", "constraint"), argument


def test_the_constructor_is_written_once_per_family():
    for name in ("Conv1D", "Conv2D", "Conv3D", "SeparableConv2D", "DepthwiseConv1D", "ConvLSTM3D", "DepthwiseConv2D"):
        assert "__init__" not in vars(getattr(layers, name)), name


def test_a_subclass_shows_its_own_signature():
    class Half(layers.Conv1D):
        def __init__(self, width, **kwargs):
            super().__init__(width // 2, **kwargs)

    assert list(inspect.signature(Half).parameters) == ["width", "kwargs"]
    layer = Half(8, kernel_size=3)
    assert layer.filters == 4
    with pytest.raises(NotImplementedError, match="`width`"):
        layer.get_config()


# --- Names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "Conv1D": "conv1d", "Conv2DTranspose": "conv2d_transpose", "SeparableConv1D": "separable_conv1d",
        "DepthwiseConv2D": "depthwise_conv2d", "ConvLSTM2D": "conv_lstm2d", "UpSampling3D": "up_sampling3d",
        "ZeroPadding1D": "zero_padding1d", "Cropping2D": "cropping2d", "InputLayer": "input_layer",
        "Functional": "functional", "MyHTTPLayer": "my_http_layer",
    }.items(),
)  # fmt: skip
def test_automatic_name(name, expected):
    layers.reset_names()
    assert [base.auto_name(name) for _ in range(3)] == [expected, f"{expected}_1", f"{expected}_2"]


def test_automatic_names_are_counted_per_class_and_reset():
    layers.reset_names()
    made = [
        layers.Conv1D(1, 1),
        layers.Conv2D(1, 1),
        layers.Conv1D(1, 1),
        layers.Conv1D(1, 1, name="mine"),
        layers.Conv1D(1, 1),
    ]
    assert [layer.name for layer in made] == ["conv1d", "conv2d", "conv1d_1", "mine", "conv1d_2"]
    layers.reset_names()
    assert layers.Conv1D(1, 1).name == "conv1d"


# --- Dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "compute", "variable"),
    [
        (None, "float32", "float32"),
        ("float64", "float64", "float64"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("mixed_float16", "float16", "float32"),
        ("mixed_bfloat16", "bfloat16", "float32"),
        ("complex64", "complex64", "complex64"),
        (np.float16, "float16", "float16"),
        (np.dtype("complex128"), "complex128", "complex128"),
        (ml_dtypes.bfloat16, "bfloat16", "bfloat16"),
        (layers.DTypePolicy("mixed_float16"), "float16", "float32"),
        ({"module": "keras", "class_name": "DTypePolicy", "config": {"name": "float64"}}, "float64", "float64"),
        ({"class_name": "Policy", "config": {"name": "mixed_bfloat16"}}, "bfloat16", "float32"),
    ],
    ids=str,
)
def test_dtype_policy(given, compute, variable):
    layer = layers.Conv1D(2, 2, dtype=given)
    assert (layer.compute_dtype, layer.variable_dtype, layer.dtype) == (compute, variable, variable)
    y = layer(np.ones((1, 4, 2), "float32"))
    assert y.dtype == np.dtype(compute)
    assert {w.dtype for w in layer.weights} == {np.dtype(variable)}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_float_inputs_are_cast_and_the_answer_is_that_of_the_cast_input(dtype):
    x = np.random.default_rng(0).standard_normal((2, 9, 3)).astype(dtype)
    layer = layers.Conv1D(2, 3)
    y = layer(x)
    assert y.dtype == np.float32
    assert np.array_equal(y, layer(x.astype("float32")))


def test_autocast_off_leaves_the_input_alone():
    with pytest.raises(TypeError, match="float64"):
        layers.Conv1D(2, 3, autocast=False)(np.ones((1, 4, 2)))
    layer = layers.Conv1D(2, 3, autocast=False, dtype="mixed_float16")
    assert layer(np.ones((1, 4, 2), "float32")).dtype == np.float32


@pytest.mark.parametrize("name", ["Cropping1D", "UpSampling1D", "ZeroPadding1D"])
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_reshaping_layers_keep_integers(name, dtype):
    y = getattr(layers, name)()(np.ones((1, 4, 2), dtype))
    assert y.dtype == dtype


@pytest.mark.parametrize("name", ["Conv1D", "Cropping1D", "UpSampling1D", "ZeroPadding1D"])
def test_complex_into_a_real_layer_is_refused(name):
    layer = getattr(layers, name)(**USUAL[name])
    with pytest.raises(TypeError, match='dtype="complex128"'):
        layer(np.ones((1, 6, 2), "complex128"))


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_integers_into_a_convolution_are_refused_before_it_is_built(dtype):
    layer = layers.Conv1D(2, 3)
    with pytest.raises(TypeError, match=f"Received: inputs.dtype={dtype}"):
        layer(np.ones((1, 4, 2), dtype))
    assert not layer.built


def test_complex_input_needs_a_complex_layer():
    x = (np.ones((1, 4, 2)) * 1j).astype("complex64")
    with pytest.raises(TypeError, match='dtype="complex64"'):
        layers.Conv1D(2, 3)(x)
    layer = layers.Conv1D(2, 3, dtype="complex64")
    assert layer(x).dtype == np.complex64
    assert layer(x.real).dtype == np.complex64


# --- Keywords of Keras 2 and R -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "shape"),
    [
        ({"input_shape": (128, 9)}, (None, 128, 9)),
        ({"input_shape": [None, 9]}, (None, None, 9)),
        ({"input_shape": (128, 9), "batch_size": 4}, (4, 128, 9)),
        ({"batch_input_shape": (4, 128, 9)}, (4, 128, 9)),
        ({"input_dim": 9}, (None, None, 9)),
        ({"input_dim": 9, "input_length": 128}, (None, 128, 9)),
        ({"input_length": 128}, None),
        ({}, None),
    ],
    ids=str,
)
def test_input_shape_keywords(keywords, shape):
    assert layers.Conv1D(2, 3, **keywords)._batch_input_shape == shape


@pytest.mark.parametrize(
    "keywords",
    [{"input_shape": "128"}, {"input_shape": 128}, {"batch_input_shape": (1, -2)}, {"input_shape": (2.5, 1)}],
    ids=str,
)
def test_impossible_input_shape(keywords):
    with pytest.raises(ValueError, match="Received"):
        layers.Conv1D(2, 3, **keywords)


def test_weights_keyword_sets_the_weights_at_build():
    kernel, bias = np.arange(12.0).reshape(3, 2, 2), np.array([5, 6])
    layer = layers.Conv1D(2, 3, weights=[kernel, bias])
    layer.build((None, 5, 2))
    assert np.array_equal(layer.kernel, kernel) and np.array_equal(layer.bias, bias)
    assert layer.kernel.dtype == np.float32
    kernel[...] = 0
    assert layer.kernel.any(), "the layer must own its weights"


@pytest.mark.parametrize(
    "given", [[np.ones((3, 2, 2))], [np.ones((3, 2, 3)), np.ones(2)], []], ids=["count", "shape", "none"]
)
def test_weights_that_do_not_fit_are_refused_at_build(given):
    layer = layers.Conv1D(2, 3, weights=given)
    with pytest.raises(ValueError, match="Received"):
        layer.build((None, 5, 2))
    assert not layer.built and layer.weights == []


# --- Errors (KERAS.md section 5) ---------------------------------------------------------------------------------

SIZES = {
    "0": 0, "negative": -1, "too-long": (1, 1, 1, 1), "None": None, "float": 2.5, "float-element": (2.5,),
    "None-element": (None,),
    "numpy-scalar": np.int64(2), "bool": True,
}  # fmt: skip

INIT_ERRORS = [
    *[
        ("Conv1D", {argument: value}, ValueError, f"{argument}-{what}")
        for argument in ("kernel_size", "strides", "dilation_rate")
        for what, value in SIZES.items()
    ],
    ("Conv1D", {"kernel_size": "3"}, TypeError, "kernel_size-string"),
    ("Conv2D", {"kernel_size": "3"}, ValueError, "kernel_size-short-string"),
    ("Conv1D", {"filters": 0}, ValueError, "filters-0"),
    ("Conv2DTranspose", {"filters": -1}, ValueError, "filters-negative"),
    ("SeparableConv1D", {"filters": "8"}, TypeError, "filters-string"),
    ("Conv1D", {"filters": (2,)}, TypeError, "filters-tuple"),
    ("Conv3D", {"filters": 2.5}, ValueError, "filters-float"),
    ("Conv1D", {"filters": True}, ValueError, "filters-bool"),
    ("Conv1D", {"groups": 0}, ValueError, "groups-0"),
    ("Conv1D", {"groups": -2}, ValueError, "groups-negative"),
    ("Conv1D", {"filters": 6, "groups": 4}, ValueError, "groups-not-dividing-filters"),
    ("Conv2D", {"groups": None}, TypeError, "groups-None"),
    ("Conv2D", {"strides": 2, "dilation_rate": 2}, ValueError, "strides-and-dilation"),
    ("Conv2D", {"strides": (2, 1), "dilation_rate": (1, 2)}, ValueError, "strides-and-dilation-on-other-axes"),
    ("Conv2DTranspose", {"strides": 2, "dilation_rate": 2}, ValueError, "strides-and-dilation"),
    ("ConvLSTM1D", {"strides": 2, "dilation_rate": 2}, ValueError, "strides-and-dilation"),
    ("Conv1D", {"padding": "full"}, ValueError, "padding-unknown"),
    ("Conv2D", {"padding": "causal"}, ValueError, "padding-causal-in-2d"),
    ("SeparableConv1D", {"padding": "causal"}, ValueError, "padding-causal"),
    ("DepthwiseConv1D", {"padding": "causal"}, ValueError, "padding-causal"),
    ("Conv1DTranspose", {"padding": "causal"}, ValueError, "padding-causal"),
    ("Conv1D", {"padding": None}, ValueError, "padding-None"),
    ("Conv1D", {"padding": 1}, ValueError, "padding-int"),
    ("Conv1D", {"data_format": "channels_middle"}, ValueError, "data_format"),
    ("Conv1D", {"activation": "relux"}, ValueError, "activation"),
    ("Conv1D", {"kernel_initializer": "nothing"}, ValueError, "kernel_initializer"),
    ("Conv1D", {"kernel_regularizer": "l1_l2"}, ValueError, "kernel_regularizer"),
    ("Conv1D", {"bias_constraint": "maxnorm"}, ValueError, "bias_constraint"),
    ("Conv1D", {"activity_regularizer": 0.1}, ValueError, "activity_regularizer-number"),
    ("Conv1D", {"use_bias": None}, ValueError, "use_bias-None"),
    ("Conv1DTranspose", {"strides": 2, "output_padding": -1}, ValueError, "output_padding-negative"),
    ("Conv1DTranspose", {"strides": 2, "output_padding": (0, 0)}, ValueError, "output_padding-too-long"),
    ("Conv1DTranspose", {"strides": 2, "output_padding": 2}, ValueError, "output_padding-of-the-stride"),
    ("Conv1DTranspose", {"strides": 1, "output_padding": 1}, ValueError, "output_padding-without-stride"),
    ("SeparableConv2D", {"depth_multiplier": 0}, ValueError, "depth_multiplier-0"),
    ("DepthwiseConv1D", {"depth_multiplier": -1}, ValueError, "depth_multiplier-negative"),
    ("Conv1D", {"kernel": 3}, ValueError, "unknown-keyword"),
    ("Cropping1D", {"data_format": "channels_last"}, ValueError, "no-data_format"),
    ("UpSampling1D", {"interpolation": "nearest"}, ValueError, "no-interpolation"),
    ("Conv1D", {"name": 3}, ValueError, "name-number"),
    ("Conv1D", {"name": "a/b"}, ValueError, "name-slash"),
    ("Conv1D", {"trainable": 1}, ValueError, "trainable-number"),
    ("Conv1D", {"dtype": "float31"}, ValueError, "dtype-unknown"),
    ("Conv1D", {"dtype": "int32"}, ValueError, "dtype-integer"),
    ("Conv1D", {"dtype": 32}, ValueError, "dtype-number"),
    ("ConvLSTM1D", {"seed": "x"}, ValueError, "seed"),
    ("ConvLSTM1D", {"unroll": "yes"}, ValueError, "unroll"),
    ("Cropping1D", {"cropping": -1}, ValueError, "negative"),
    ("Cropping1D", {"cropping": (1.5, 1)}, ValueError, "float"),
    ("Cropping1D", {"cropping": (1, 1, 1)}, ValueError, "too-long"),
    ("Cropping1D", {"cropping": ((1, 1),)}, ValueError, "pair-of-pairs"),
    ("Cropping2D", {"cropping": (1, 2, 3)}, ValueError, "too-long"),
    ("Cropping2D", {"cropping": "ab"}, ValueError, "string"),
    ("Cropping3D", {"cropping": ((1, -1), 1, 1)}, ValueError, "negative-in-a-pair"),
    ("UpSampling1D", {"size": (2,)}, TypeError, "tuple"),
    ("UpSampling1D", {"size": 2.0}, TypeError, "float"),
    ("UpSampling1D", {"size": True}, TypeError, "bool"),
    ("UpSampling1D", {"size": np.int64(2)}, TypeError, "numpy-scalar"),
    ("UpSampling1D", {"size": 0}, ValueError, "0"),
    ("UpSampling2D", {"size": (2, 0)}, ValueError, "0-in-tuple"),
    ("UpSampling2D", {"interpolation": None}, ValueError, "interpolation-None"),
    ("ZeroPadding1D", {"padding": -1}, ValueError, "negative"),
    ("ZeroPadding2D", {"padding": -1}, ValueError, "negative"),
    ("ZeroPadding2D", {"padding": ((1, -1), 1)}, ValueError, "negative-in-a-pair"),
    ("ZeroPadding3D", {"padding": 1.5}, ValueError, "float"),
    ("ZeroPadding3D", {"padding": (1, 1)}, ValueError, "too-short"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "wrong", "error"), [row[:3] for row in INIT_ERRORS], ids=[f"{row[0]}-{row[3]}" for row in INIT_ERRORS]
)
def test_wrong_argument_at_construction(layer, wrong, error):
    with pytest.raises(error, match="Received: ") as caught:
        getattr(layers, layer)(**{**USUAL[layer], **wrong})
    assert type(caught.value) is error


@pytest.mark.parametrize("name", [name for name, arguments in SIGNATURES.items() if REQUIRED in arguments.values()])
def test_missing_required_argument(name):
    with pytest.raises(TypeError, match="missing"):
        getattr(layers, name)()


BUILD_ERRORS = [
    ("Conv1D", {"filters": None}, (None, 8, 2), ValueError, "filters-None"),
    ("Conv1D", {"filters": 6, "groups": 3}, (None, 8, 4), ValueError, "groups-not-dividing-channels"),
    ("Conv1D", {"padding": (1, 1)}, (None, 8, 2), ValueError, "padding-pair"),
    ("Conv2DTranspose", {"padding": [1, 1]}, (None, 8, 8, 2), ValueError, "padding-list"),
    ("Conv1D", {}, (None, 2, 2), ValueError, "kernel-longer-than-input"),
    ("DepthwiseConv1D", {}, (None, 2, 2), ValueError, "kernel-longer-than-input"),
    ("SeparableConv1D", {}, (None, 2, 2), ValueError, "kernel-longer-than-input"),
    ("ConvLSTM1D", {}, (None, 4, 2, 2), ValueError, "kernel-longer-than-input"),
    ("Conv1D", {}, (None, 8), ValueError, "rank-too-small"),
    ("Conv1D", {}, (4, 7, 10, 128), ValueError, "rank-too-large"),
    ("ConvLSTM2D", {}, (None, 8, 8, 2), ValueError, "rank-too-small"),
    ("Cropping2D", {}, (None, 8, 8), ValueError, "rank-too-small"),
    ("Cropping2D", {}, (None, 8, 8, 8, 8), ValueError, "rank-too-large"),
    ("UpSampling1D", {}, (None, 8, 8, 8), ValueError, "rank-too-large"),
    ("Conv1DTranspose", {}, (None, 8, 8, 8), ValueError, "rank-too-large"),
    ("Conv1D", {}, (None, 8, None), TypeError, "channels-None"),
    ("SeparableConv1D", {}, (None, 8, None), TypeError, "channels-None"),
    ("DepthwiseConv1D", {}, (None, 8, None), TypeError, "channels-None"),
    ("Conv1DTranspose", {}, (None, 8, None), ValueError, "channels-None"),
    ("ConvLSTM1D", {}, (None, 4, 8, None), ValueError, "channels-None"),
    ("Conv1D", {}, (None, 8, 0), ValueError, "channels-0"),
    ("ConvLSTM1D", {}, (None, 4, None, 2), ValueError, "spatial-None"),
    ("ConvLSTM1D", {"filters": 0}, (None, 4, 8, 2), ValueError, "filters-0"),
    ("ConvLSTM1D", {"filters": "2"}, (None, 4, 8, 2), ValueError, "filters-string"),
    ("ConvLSTM1D", {"strides": 0}, (None, 4, 8, 2), ValueError, "strides-0"),
    ("ConvLSTM1D", {"stateful": True}, (None, 4, 8, 2), ValueError, "stateful-batch-None"),
    ("Conv1D", {}, "128", ValueError, "shape-string"),
    ("Conv1D", {}, (None, -3, 2), ValueError, "shape-negative"),
]


@pytest.mark.parametrize(
    ("layer", "arguments", "shape", "error"),
    [row[:4] for row in BUILD_ERRORS],
    ids=[f"{row[0]}-{row[4]}" for row in BUILD_ERRORS],
)
def test_wrong_argument_or_shape_at_build_allocates_nothing(layer, arguments, shape, error):
    made = getattr(layers, layer)(**{**USUAL[layer], **arguments})
    with pytest.raises(error, match="Received: "):
        made.build(shape)
    assert not made.built and made.weights == []


@pytest.mark.parametrize("case", [case for case in PLAIN if "kernel_size" in case.arguments], ids=lambda case: case.id)
def test_a_layer_with_weights_is_built_once(case):
    layer = case.make()
    layer.build(case.shape)
    with pytest.raises(ValueError, match="already built"):
        layer.build(case.shape)


@pytest.mark.parametrize(
    ("layer", "x", "error"),
    [
        (layers.Conv1D(2, 3), [[1.0, 2.0]], ValueError),
        (layers.Conv1D(2, 3), np.ones((2, 8), "f"), ValueError),
        (layers.Conv1D(2, 3), np.ones((2, 8, 3, 3), "f"), ValueError),
        (layers.Conv1D(2, 3), np.ones((2, 2, 3), "f"), ValueError),
        (layers.Cropping1D(4), np.ones((1, 8, 2), "f"), ValueError),
        (layers.Cropping2D(2), np.ones((1, 8, 3, 2), "f"), ValueError),
        (layers.UpSampling2D(2, interpolation="cubic"), np.ones((1, 8, 3, 2), "f"), ValueError),
        (layers.ConvLSTM1D(2, 3), np.ones((1, 0, 8, 2), "f"), IndexError),
        (layers.Conv1D(2, 3, activation="threshold"), np.ones((1, 8, 2), "f"), TypeError),
    ],
    ids=["list", "rank-too-small", "rank-too-large", "too-short", "crop-all", "crop-too-much", "interpolation",
    "no-steps", "threshold"],
)  # fmt: skip
def test_wrong_input(layer, x, error):
    with pytest.raises(error):
        layer(x)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_channels_may_not_change_after_build(data_format):
    layer = layers.Conv2D(2, 2, data_format=data_format)
    layer(np.ones((1, 5, 6, 5), "f"))
    with pytest.raises(ValueError, match="built for 5 channels"):
        layer(np.ones((1, 4, 6, 4), "f"))
    other = (1, 3, 4, 5) if data_format == "channels_last" else (1, 5, 4, 3)
    assert layer(np.ones(other, "f")).shape[0] == 1


@pytest.mark.parametrize("crop", [4, (3, 5)], ids=str)
def test_cropping_everything_is_refused_in_compute_output_shape_too(crop):
    with pytest.raises(ValueError, match="cropping"):
        layers.Cropping1D(crop).compute_output_shape((None, 8, 2))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_size_beside_the_last_call_is_checked_again(case):
    """The quick path after the first call must not let another rank through."""
    layer = case.make()
    layer(case.input())
    with pytest.raises(ValueError):
        layer(case.input()[..., None])


def test_channels_that_the_groups_do_not_divide_are_named():
    with pytest.raises(ValueError, match="`groups` must divide the channels"):
        layers.Conv1D(4, 3, groups=4).build((None, 8, 2))


def test_initializer_of_the_wrong_shape_is_refused():
    layer = layers.Conv1D(2, 3, kernel_initializer=lambda shape, dtype=None: np.ones((2, 2)))
    with pytest.raises(ValueError, match="shape"):
        layer.build((None, 8, 2))


def test_initializer_may_be_an_array_a_callable_or_an_instance():
    given = np.arange(12.0).reshape(3, 2, 2)
    assert np.array_equal(
        layers.Conv1D(2, 3, kernel_initializer=given, weights=None)(np.ones((1, 3, 2)))[0, 0], given.sum((0, 1))
    )
    layer = layers.Conv1D(
        2, 3, kernel_initializer=lambda shape, dtype=None: np.full(shape, 3), bias_initializer=initializers.Constant(2)
    )
    assert layer(np.ones((1, 3, 2))).tolist() == [[[20, 20]]]
    layer = layers.Conv1D(2, 3, kernel_initializer=None, bias_initializer=None)
    layer.build((None, 3, 2))
    assert layer.kernel.any() and layer.bias.any(), "None means glorot_uniform, for the bias too"
