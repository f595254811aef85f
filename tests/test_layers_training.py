"""Weights, gradients, losses and constraints of the layers."""

import numpy as np
import oracle
import pytest
from compare import assert_close
from layer_cases import (
    CASES,
    PLAIN,
    WEIGHTED,
    Case,
    DeviceArray,
    check_gradients,
    outputs_of,
    second_place,
    with_random_weights,
)  # fmt: skip

from cuconv import layers, ops


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gradients(case):
    check_gradients(with_random_weights(case.make(dtype="float64"), case.shape), case.input())


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_gradients_with_every_regularizer(case):
    words = [name for name in type(case.make()).__signature__.parameters if name.endswith("_regularizer")]
    chosen = dict(zip(words, ("l2", "l1", "l1", "l2"), strict=False)) | {"activity_regularizer": "l2"}
    layer = with_random_weights(case.make(dtype="float64", **chosen), case.shape)
    check_gradients(layer, case.input())
    activity = len(outputs_of(layer(case.input())))
    assert len(layer.losses) == activity + sum(word != "activity_regularizer" for word in words)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_gives_what_a_call_gives_and_the_promised_shape(case):
    layer = with_random_weights(case.make(dtype="float64"), case.shape)
    x = case.input()
    for y, same in zip(outputs_of(layer(x)), outputs_of(layer.forward(x)), strict=True):
        assert_close(y, same, dtype="float64", terms=64)
    if case.note != "glu-halves-the-channels":  # Keras' compute_output_shape does not know either
        shapes = layer.compute_output_shape(case.shape)
        assert [y.shape for y in outputs_of(layer(x))] == (list(shapes) if isinstance(shapes[0], tuple) else [shapes])


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_a_batch_of_nothing(case):
    layer = case.make(activity_regularizer="l2", dtype="float64")
    layer.build(case.shape)
    x = case.input()[:0]
    ys = outputs_of(layer.forward(x))
    assert [y.shape for y in ys] == [(0, *y.shape[1:]) for y in outputs_of(layer(case.input()))]
    layer.forward(x)
    dx = layer.backward(ys if len(ys) > 1 else ys[0])
    assert dx.shape == x.shape
    assert [g.shape for g in layer.gradients] == [w.shape for w in layer.weights]
    assert not any(g.any() for g in layer.gradients)
    assert layer.losses == [0.0]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_an_unbuilt_layer_knows_its_output_shape(case):
    y = outputs_of(case.make()(case.input()))[0]
    assert case.make().compute_output_shape([None, *case.shape[1:]]) == (None, *y.shape[1:])


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (layers.Conv1D(4, 3), (None, None, 2), (None, None, 4)),
        (layers.Conv1D(4, 3, strides=2, padding="same"), (None, None, 2), (None, None, 4)),
        (layers.Conv1D(4, 3), (None, 8, None), (None, 6, 4)),
        (layers.Conv1DTranspose(4, 3), (None, None, None), (None, None, 4)),
        (layers.SeparableConv1D(4, 3), (None, 8, None), (None, 6, 4)),
        (layers.DepthwiseConv1D(3, depth_multiplier=2), (None, None, 3), (None, None, 6)),
        (layers.ConvLSTM1D(4, 3, return_sequences=True), (None, None, None, 3), (None, None, None, 4)),
        (layers.Cropping1D(1), (None, None, 3), (None, None, 3)),
        (layers.UpSampling2D(2), (None, None, 3, None), (None, None, 6, None)),
        (layers.ZeroPadding1D(1), (3, None, None), (3, None, None)),
        (layers.Conv1D(4, 3, activation="glu"), (None, 8, 2), (None, 6, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, layers.Layer) else str(value),
)  # fmt: skip
def test_unknown_sizes_in_compute_output_shape(layer, shape, expected):
    assert layer.compute_output_shape(shape) == expected
    assert not layer.built


# --- Definitions -------------------------------------------------------------------------------------------------


def definition(layer, x):
    """The output of a layer as the oracle defines it, from the layer's public attributes."""
    kind = type(layer).__name__
    where = {"data_format": layer.data_format}
    if "UpSampling" in kind:
        return oracle.upsample(x, layer.size, interpolation=layer.interpolation, **where)
    if "Cropping" in kind:
        return oracle.crop(x, layer.cropping, **where)
    if "ZeroPadding" in kind:
        return oracle.pad(x, layer.padding, **where)
    window = {"strides": layer.strides, "padding": layer.padding, "dilation_rate": layer.dilation_rate, **where}
    if "Separable" in kind:
        z = oracle.separable_conv(x, layer.depthwise_kernel, layer.pointwise_kernel, layer.bias, **window)
    elif "Depthwise" in kind:
        z = oracle.depthwise_conv(x, layer.kernel, layer.bias, **window)
    elif "Transpose" in kind:
        z = oracle.conv_transpose(x, layer.kernel, layer.bias, output_padding=layer.output_padding, **window)
    else:
        z = oracle.conv(x, layer.kernel, layer.bias, groups=layer.groups, **window)
    return layer.activation(z)


@pytest.mark.parametrize("case", [case for case in CASES if "LSTM" not in case.layer], ids=lambda case: case.id)
def test_a_layer_computes_its_definition(case):
    layer = with_random_weights(case.make(dtype="float64"), case.shape)
    x = case.input()
    assert_close(layer(x), definition(layer, x), dtype="float64", terms=100)


@pytest.mark.parametrize(
    ("arguments", "lengths"),
    [
        ({"kernel_size": 2, "strides": 3, "padding": "valid"}, [12, 11, 12, 13]),
        ({"kernel_size": 2, "strides": 3, "padding": "same"}, [12, 9, 10, 11]),
        ({"kernel_size": 1, "strides": 2, "padding": "valid"}, [8, 7]),
        ({"kernel_size": 4, "strides": 1, "padding": "same"}, [4, 3]),
    ],
    ids=str,
)
def test_lengths_of_transposed_convolutions(arguments, lengths):
    """Keras' measured lengths for 4 steps with output_padding None, 0, 1, 2 (KERAS.md S6)."""
    x = np.ones((1, 4, 1), "float32")
    for output_padding, length in zip((None, 0, 1, 2), lengths, strict=False):
        layer = layers.Conv1DTranspose(1, output_padding=output_padding, **arguments)
        assert layer.compute_output_shape(x.shape) == layer(x).shape == (1, length, 1)


# --- Weights -----------------------------------------------------------------------------------------------------

SHAPES = {
    "Conv2D": (layers.Conv2D(8, (3, 2), groups=2), (1, 9, 9, 4), {"kernel": (3, 2, 2, 8), "bias": (8,)}),
    "Conv2D-first": (
        layers.Conv2D(8, (3, 2), data_format="channels_first"),
        (1, 4, 9, 9),
        {"kernel": (3, 2, 4, 8), "bias": (8,)},
    ),
    "Conv2DTranspose": (layers.Conv2DTranspose(8, (3, 2)), (1, 9, 9, 4), {"kernel": (3, 2, 8, 4), "bias": (8,)}),
    "SeparableConv2D": (
        layers.SeparableConv2D(8, (3, 2), depth_multiplier=3),
        (1, 9, 9, 4),
        {"depthwise_kernel": (3, 2, 4, 3), "pointwise_kernel": (1, 1, 12, 8), "bias": (8,)},
    ),
    "DepthwiseConv2D": (
        layers.DepthwiseConv2D((3, 2), depth_multiplier=3),
        (1, 9, 9, 4),
        {"kernel": (3, 2, 4, 3), "bias": (12,)},
    ),
    "ConvLSTM2D": (
        layers.ConvLSTM2D(8, (3, 2)),
        (1, 2, 9, 9, 4),
        {"kernel": (3, 2, 4, 32), "recurrent_kernel": (3, 2, 8, 32), "bias": (32,)},
    ),
    "Conv1D-without-bias": (layers.Conv1D(8, 3, use_bias=False), (1, 9, 4), {"kernel": (3, 4, 8)}),
    "Cropping2D": (layers.Cropping2D(1), (1, 9, 9, 4), {}),
}


@pytest.mark.parametrize(("layer", "input_shape", "shapes"), SHAPES.values(), ids=SHAPES)
def test_weight_names_shapes_and_order(layer, input_shape, shapes):
    layer.build(input_shape)
    assert dict(zip(layer.weight_names, [w.shape for w in layer.get_weights()], strict=True)) == shapes
    assert layer.weight_names == list(shapes)
    assert layer.count_params() == sum(int(np.prod(shape)) for shape in shapes.values())
    assert all(getattr(layer, name) is w for name, w in zip(shapes, layer.weights, strict=True))


WORDS = [
    (case, word)
    for case in PLAIN
    for word in type(case.make()).__signature__.parameters
    if word.endswith("_initializer")
]


@pytest.mark.parametrize(
    ("case", "word"), WORDS, ids=[f"{case.id}-{word.removesuffix('_initializer')}" for case, word in WORDS]
)
def test_initializer_regularizer_and_constraint_reach_their_own_weight(case, word):
    """`<word>_...` goes to `<word>_kernel`, `<word>` or, in depthwise layers, `kernel`."""
    word = word.removesuffix("_initializer")
    others = {each.removesuffix("_initializer") for _, each in WORDS} - {word}
    arguments = {f"{word}_initializer": "ones", f"{word}_regularizer": "l1", f"{word}_constraint": "non_neg"}
    known = type(case.make()).__signature__.parameters
    arguments |= {f"{each}_initializer": "zeros" for each in others if f"{each}_initializer" in known}
    if "LSTM" in case.layer:
        arguments["unit_forget_bias"] = False
    layer = case.make(**arguments)
    layer.build(case.shape)
    (name,) = {word, f"{word}_kernel", "kernel" if "Depthwise" in case.layer and word == "depthwise" else word} & set(
        layer.weight_names
    )
    for each, w in zip(layer.weight_names, layer.weights, strict=True):
        assert np.all(w == (each == name)), each
    assert layer.losses == pytest.approx([0.01 * getattr(layer, name).size])
    for w in layer.weights:
        w -= 2
    layer.apply_constraints()
    for each, w in zip(layer.weight_names, layer.weights, strict=True):
        assert np.all(w == (0 if each == name else -2)), each


@pytest.mark.parametrize(
    ("layer", "shape", "limit"),
    [
        (layers.DepthwiseConv2D(5), (1, 9, 9, 64), 0.0608),
        (layers.Conv2DTranspose(7, 3), (1, 9, 9, 50), 0.1081),
        (layers.Conv2D(8, 3, groups=4), (1, 9, 9, 64), 0.1667),
    ],
    ids=["depthwise", "transposed", "grouped"],
)
def test_fans_are_those_of_the_stored_shape(layer, shape, limit):
    """Keras' measured limits of glorot_uniform, 4 digits (KERAS.md I1)."""
    layer.build(shape)
    largest = float(np.abs(layer.kernel).max())
    assert 0.98 * limit < largest <= limit + 5e-5


@pytest.mark.parametrize("case", WEIGHTED, ids=lambda case: case.id)
def test_weights_are_live_and_get_weights_copies(case):
    layer = with_random_weights(case.make(dtype="float64"), case.shape)
    before, copies = outputs_of(layer(case.input()))[0].copy(), layer.get_weights()
    for w in layer.weights:
        w += 1
    after = outputs_of(layer(case.input()))[0]
    assert not np.allclose(before, after)
    layer.set_weights(copies)
    assert np.array_equal(outputs_of(layer(case.input()))[0], before)
    for copy in copies:
        copy[...] = np.nan
    assert np.array_equal(outputs_of(layer(case.input()))[0], before)


def test_set_weights_casts_and_refuses():
    layer = layers.Conv1D(2, 3)
    with pytest.raises(ValueError, match="not built"):
        layer.set_weights([np.zeros(3)])
    layer.set_weights([])
    layer.build((None, 5, 2))
    before = layer.get_weights()
    for wrong in ([np.zeros((3, 2, 2))], [np.zeros((3, 2, 2)), np.zeros(3)], [np.zeros((3, 2, 1)), np.zeros(2)]):
        with pytest.raises(ValueError, match="Received: "):
            layer.set_weights(wrong)
    with pytest.raises(TypeError, match="real"):
        layer.set_weights([np.zeros((3, 2, 2)), np.zeros(2) * 1j])
    assert all(np.array_equal(a, b) for a, b in zip(before, layer.get_weights(), strict=True))
    kernel = layer.kernel
    layer.set_weights([np.arange(12).reshape(3, 2, 2), [1, 2]])
    assert layer.kernel is kernel and kernel.dtype == np.float32 and kernel[2, 1, 1] == 11


def test_trainable():
    layer = layers.Conv1D(2, 3, kernel_regularizer="l2", kernel_constraint="non_neg", activity_regularizer="l2")
    x = np.ones((1, 5, 2), "f")
    layer(x)
    assert len(layer.trainable_weights) == 2 and layer.non_trainable_weights == [] and len(layer.losses) == 2
    layer.trainable = False
    assert layer.trainable_weights == [] and len(layer.non_trainable_weights) == len(layer.weights) == 2
    assert len(layer.losses) == 1, "the activity loss stays"
    layer.kernel[...] = -1
    layer.apply_constraints()
    assert np.all(layer.kernel == -1)
    layer.forward(x)
    layer.backward(np.zeros((1, 3, 2), "f"))
    frozen = layer.gradients
    assert layer.trainable_gradients == []
    layer.trainable = True
    layer.backward(np.zeros((1, 3, 2), "f"))
    assert np.allclose(layer.gradients[0] - frozen[0], 0.02 * layer.kernel), (
        "the regularizer counts only where trainable"
    )
    assert len(layer.trainable_gradients) == 2
    layer.apply_constraints()
    assert np.all(layer.kernel == 0)


def test_constraints_are_applied_in_place_and_only_on_demand():
    layer = layers.SeparableConv1D(
        2, 2, depthwise_constraint="non_neg", pointwise_constraint="unit_norm", bias_constraint="max_norm"
    )
    layer(np.ones((1, 4, 3), "f"))
    values = [np.full(w.shape, -4.0) for w in layer.weights]
    layer.set_weights(values)
    layer(np.ones((1, 4, 3), "f"))
    assert all(np.all(w == -4) for w in layer.weights)
    kept = layer.weights
    layer.apply_constraints()
    assert all(a is b for a, b in zip(kept, layer.weights, strict=True))
    assert np.all(layer.depthwise_kernel == 0)
    assert np.allclose(layer.pointwise_kernel, -1)
    assert np.allclose(np.linalg.norm(layer.bias), 2)


# --- Activity regularization -------------------------------------------------------------------------------------


def test_activity_loss_is_divided_by_the_batch():
    """KERAS.md section 1: 10.8 over a batch of 5 is 2.16."""
    layer = layers.Activation("linear", activity_regularizer="l2")
    x = np.full((5, 6, 6), np.sqrt(6), "float64")
    layer(x)
    assert layer.losses == pytest.approx([10.8 / 5])
    layer(x)
    assert len(layer.losses) == 1, "each call starts anew"


def test_activity_regularizer_alone_reaches_the_weights():
    layer = with_random_weights(layers.Conv1D(2, 3, activity_regularizer="l2", dtype="float64"), (3, 6, 2))
    x = np.random.default_rng(0).standard_normal((3, 6, 2))
    y = layer.forward(x)
    layer.backward(np.zeros_like(y))
    expected = ops.conv_kernel_grad(x, 0.02 * y / 3, layer.kernel.shape)
    assert_close(layer.gradients[0], expected, dtype="float64", terms=64)


# --- Dtypes and misuse -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("case", [case for case in WEIGHTED if not case.note], ids=lambda case: case.id)
def test_mixed_precision_keeps_weights_and_gradients_in_float32(case, policy):
    layer = case.make(dtype=policy)
    x = case.input(dtype="float32")
    y = outputs_of(layer.forward(x))[0]
    assert y.dtype.name == policy.removeprefix("mixed_")
    dx = layer.backward(y.astype("float32"))
    assert dx.dtype == np.float32
    assert {a.dtype for a in (*layer.weights, *layer.gradients)} == {np.dtype("float32")}
    exact = case.make(weights=layer.get_weights())
    exact.forward(x)
    exact.backward(y.astype("float32"))
    size = 2**-7 if policy == "mixed_bfloat16" else 2**-9
    for mixed, single in zip(layer.gradients, exact.gradients, strict=True):
        assert np.abs(mixed - single).max() < 8 * size * max(1, np.abs(single).max())


@pytest.mark.parametrize("name", ["Conv1D", "Conv1DTranspose", "SeparableConv1D", "DepthwiseConv1D"])
def test_complex_layer_and_its_adjoint(name):
    """<y, A x> == <A^H y, x> holds for the input gradient, and the kernel gradient is that of Re <dy, y>."""
    case = next(case for case in PLAIN if case.layer == name)
    layer = case.make(dtype="complex128", bias_initializer="ones")
    rng = np.random.default_rng(3)
    x = rng.standard_normal(case.shape) + 1j * rng.standard_normal(case.shape)
    layer.build(case.shape)
    for w in layer.weights[:-1]:
        w[...] = rng.standard_normal(w.shape) + 1j * rng.standard_normal(w.shape)
    layer.bias[...] = 0
    y = layer.forward(x)
    dy = rng.standard_normal(y.shape) + 1j * rng.standard_normal(y.shape)
    dx = layer.backward(dy)
    assert np.vdot(dy, y) == pytest.approx(np.vdot(dx, x), rel=1e-12)
    kernel, gradient = layer.weights[0], layer.gradients[0]
    direction = rng.standard_normal(kernel.shape) + 1j * rng.standard_normal(kernel.shape)
    kernel += 1e-6 * direction
    change = (np.vdot(dy, layer(x) - y)).real / 1e-6
    assert change == pytest.approx(np.vdot(gradient, direction).real, rel=1e-5)


def test_backward_needs_a_forward_and_the_right_shape():
    layer = layers.Conv1D(2, 3)
    x = np.ones((1, 5, 2), "f")
    layer(x)
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(np.ones((1, 3, 2), "f"))
    layer.forward(x)
    for wrong in (np.ones((1, 1, 2), "f"), np.float32(1), None):
        with pytest.raises(ValueError, match="Received: dy"):
            layer.backward(wrong)


def test_forward_keeps_nothing_before_a_linear_activation():
    layer = layers.Conv1D(2, 3)
    x = np.ones((1, 5, 2), "f")
    layer.forward(x)
    kept, before_activation = layer._context.saved
    assert kept is x and before_activation is None and layer._context.outputs == ()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_inputs_are_left_alone(case):
    layer = with_random_weights(case.make(dtype="float64"), case.shape)
    x = case.input()
    x.flags.writeable = False
    ys = outputs_of(layer.forward(x))
    for y in ys:
        assert not np.shares_memory(x, y)
        y.flags.writeable = False
    layer.backward(ys if len(ys) > 1 else ys[0])


@pytest.mark.parametrize(
    "case", [Case("Conv1D", {"filters": 2, "kernel_size": 3}, (2, 8, 3)), *PLAIN[3:6]], ids=lambda case: case.id
)
def test_strided_and_mapped_inputs(case, tmp_path):
    layer = case.make()
    x = case.input(dtype="float32")
    y = layer(x)
    wide = np.zeros((*case.shape[:-1], 2 * case.shape[-1]), "float32")
    wide[..., ::2] = x
    assert np.allclose(layer(wide[..., ::2]), y, atol=1e-6)
    assert np.allclose(layer(x.astype(">f4")), y, atol=1e-6)
    np.save(tmp_path / "x.npy", x)
    mapped = layer(np.load(tmp_path / "x.npy", mmap_mode="r"))
    assert type(mapped) is np.ndarray and np.allclose(mapped, y, atol=1e-6)


# --- Where weights live ------------------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch):
    return second_place(monkeypatch)


def test_weights_follow_the_first_input_once(device):
    layer = layers.Conv1D(2, 3)
    x = np.ones((1, 5, 2), "float32")
    layer.build(x.shape)
    expected = ops.conv(x, layer.kernel, layer.bias)
    y = layer(DeviceArray(x))
    assert isinstance(y, DeviceArray) and np.array_equal(y.host, expected)
    layer(DeviceArray(x))
    assert device == [(3, 2, 2), (2,)]
    assert all(isinstance(w, DeviceArray) for w in layer.weights)
    assert all(type(w) is np.ndarray for w in layer.get_weights())
    with pytest.raises(ValueError, match="do not move silently"):
        layer(x)


def test_weights_that_met_numpy_stay_there(device):
    layer = layers.Conv1D(2, 3)
    layer(np.ones((1, 5, 2), "float32"))
    with pytest.raises(ValueError, match="do not move silently"):
        layer(DeviceArray(np.ones((1, 5, 2), "float32")))
    assert device == []
