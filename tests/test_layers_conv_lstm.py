"""ConvLSTM layers: time, states, dropout (KERAS.md S8)."""

import numpy as np
import oracle
import pytest
from compare import assert_close
from layer_cases import check_gradients, with_random_weights

from cuconv import layers, ops
from cuconv.layers import conv_lstm

RANKS = {"ConvLSTM1D": (2, 3, 5, 2), "ConvLSTM2D": (2, 3, 4, 3, 2), "ConvLSTM3D": (1, 2, 3, 3, 3, 2)}


def make(name="ConvLSTM1D", shape=None, **arguments):
    shape = shape or RANKS[name]
    layer = getattr(layers, name)(**{"filters": 2, "kernel_size": 2, "dtype": "float64", **arguments})
    x = np.random.default_rng(0).standard_normal(shape)
    if layer.data_format == "channels_first":
        x = np.moveaxis(x, -1, 2).copy()
    return with_random_weights(layer, x.shape), x


def steps_of(layer, x, h=None, c=None):
    """Every (h, c), step by step, with the oracle."""
    states = []
    for t in range(x.shape[1]):
        if h is None:
            z = oracle.conv(
                x[:, t], layer.kernel, strides=layer.strides, padding=layer.padding, data_format=layer.data_format,
                dilation_rate=layer.dilation_rate,
            )  # fmt: skip
            h = c = np.split(np.zeros_like(z), 4, axis=layer._channel_axis)[0]
        h, c = oracle.conv_lstm_step(
            x[:, t], h, c, layer.kernel, layer.recurrent_kernel, layer.bias, strides=layer.strides,
            padding=layer.padding,
            data_format=layer.data_format, dilation_rate=layer.dilation_rate, activation=layer.activation.name,
            recurrent_activation=layer.recurrent_activation.name,
        )  # fmt: skip
        states.append((h, c))
    return states


def same(actual, expected):
    assert_close(actual, expected, dtype="float64", terms=100)


OPTIONS = [
    {},
    {"padding": "same", "strides": 2},
    {"padding": "valid", "dilation_rate": 2},
    {"data_format": "channels_first", "padding": "same"},
    {"use_bias": False, "activation": "relu", "recurrent_activation": "hard_sigmoid"},
]


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_are_those_of_the_definition(name, options):
    layer, x = make(name, return_sequences=True, return_state=True, **options)
    y, h, c = layer(x)
    states = steps_of(layer, x)
    same(y, np.stack([h for h, _ in states], axis=1))
    same(h, states[-1][0])
    same(c, states[-1][1])
    assert (y.shape, h.shape, c.shape) == layer.compute_output_shape(x.shape)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_returning_the_last_step_only(options):
    layer, x = make(**options)
    same(layer(x), steps_of(layer, x)[-1][0])


def test_going_backwards_leaves_the_outputs_in_the_order_of_processing():
    forwards, x = make(return_sequences=True)
    backwards, _ = make(return_sequences=True, go_backwards=True)
    backwards.set_weights(forwards.get_weights())
    same(backwards(x), forwards(x[:, ::-1]))


def test_many_steps_are_convolved_in_blocks(monkeypatch):
    layer, x = make(shape=(2, 7, 5, 2), return_sequences=True)
    whole = layer(x)
    step_bytes = 4 * 2 * 4 * 2 * 8  # gates, batch, positions, filters, bytes
    monkeypatch.setattr(conv_lstm, "BLOCK_BYTES", 3 * step_bytes)
    seen = []
    plain = ops.conv
    monkeypatch.setattr(ops, "conv", lambda x, *rest, **options: seen.append(len(x)) or plain(x, *rest, **options))
    same(layer(x), whole)
    assert seen[:7:1].count(3 * 2) == 2 and 1 * 2 in seen, "3 + 3 + 1 steps of 2 samples"


# --- States ------------------------------------------------------------------------------------------------------


def test_initial_state_is_where_it_starts():
    layer, x = make(return_sequences=True, return_state=True)
    whole, h, c = layer(x)
    first, h1, c1 = layer(x[:, :1])
    rest, h2, c2 = layer(x[:, 1:], initial_state=[h1, c1])
    same(np.concatenate([first, rest], axis=1), whole)
    same(h2, h)
    same(c2, c)


def test_gradients_reach_the_initial_state():
    layer, x = make(return_state=True, activity_regularizer="l2")
    rng = np.random.default_rng(5)
    h, c = rng.standard_normal((2, 2, 4, 2))
    layer.forward(x, initial_state=[h, c])
    dys = [rng.standard_normal(h.shape) for _ in range(3)]
    _, dh, dc = layer.backward(dys)

    def objective():
        outputs = layer(x, initial_state=[h, c])
        return sum(float(np.sum(y * dy)) for y, dy in zip(outputs, dys, strict=True)) + sum(layer.losses)

    for array, gradient in ((h, dh), (c, dc)):
        direction = rng.standard_normal(array.shape)
        kept = array.copy()
        array[...] = kept + 1e-6 * direction
        above = objective()
        array[...] = kept - 1e-6 * direction
        below = objective()
        array[...] = kept
        assert (above - below) / 2e-6 == pytest.approx(float(np.sum(gradient * direction)), abs=1e-7)


def test_outputs_without_a_gradient_count_as_zero():
    layer, x = make(return_state=True)
    y, h, c = layer.forward(x)
    dy = np.ones_like(y)
    dx = layer.backward((dy, None, None))
    layer.forward(x)
    same(layer.backward((dy, np.zeros_like(h), np.zeros_like(c))), dx)
    layer.forward(x)
    same(layer.backward((None, dy, None)), dx)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([np.zeros((2, 4, 2))], "must be"),
        ([np.zeros((2, 4, 2))] * 3, "must be"),
        ([np.zeros((2, 3, 2))] * 2, "have shape"),
        ([np.zeros((1, 4, 2))] * 2, "have shape"),
    ],
    ids=["one", "three", "positions", "batch"],
)  # fmt: skip
def test_initial_state_that_does_not_fit(states, message):
    layer, x = make()
    with pytest.raises(ValueError, match=f"{message}.*Received"):
        layer(x, initial_state=states)


def test_stateful_layers_go_on_where_they_stopped():
    plain, x = make(return_sequences=True)
    stateful, _ = make(return_sequences=True, stateful=True)
    stateful.set_weights(plain.get_weights())
    whole = plain(x)
    same(np.concatenate([stateful(x[:, :2]), stateful(x[:, 2:])], axis=1), whole)
    same(stateful.states[0], whole[:, -1])
    assert len(stateful.get_weights()) == 3, "states are no weights"
    stateful.reset_states()
    same(stateful(x), whole)
    stateful.reset_state()
    same(stateful.forward(x), whole)
    assert not np.allclose(stateful.forward(x), whole), "forward moves the states too"


def test_an_initial_state_goes_before_the_kept_one():
    plain, x = make()
    stateful, _ = make(stateful=True)
    stateful.set_weights(plain.get_weights())
    stateful(x)
    states = list(np.random.default_rng(2).standard_normal((2, 2, 4, 2)))
    same(stateful(x, initial_state=states), plain(x, initial_state=states))


def test_no_steps():
    layer, x = make()
    with pytest.raises(IndexError, match="at least one time step"):
        layer(x[:, :0])


def test_stateful_batch_is_fixed_and_outputs_are_not_the_states():
    layer, x = make(stateful=True)
    y = layer(x)
    kept = layer.states[0].copy()
    y[...] = 0
    same(layer.states[0], kept)
    with pytest.raises(ValueError, match="stateful"):
        layer(x[:1])


def test_time_and_batch_may_vary_but_not_space():
    layer, x = make()
    assert layer(x[:1, :2]).shape == (1, 4, 2)
    with pytest.raises(ValueError, match="built for steps of shape"):
        layer(x[:, :, :4])


def test_returned_states_are_copies():
    layer, x = make(return_state=True, stateful=True)
    y, h, c = layer(x)
    assert not np.shares_memory(y, h)
    kept = [state.copy() for state in layer.states]
    y[...] = h[...] = c[...] = 0
    assert all(np.array_equal(a, b) for a, b in zip(kept, layer.states, strict=True))


# --- Bias and dropout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "initializer", "expected"),
    [(True, "zeros", [0, 0, 1, 1, 0, 0, 0, 0]), (False, "zeros", [0] * 8), (True, "ones", [1] * 8)],
    ids=["unit", "plain", "unit-of-ones"],
)
def test_unit_forget_bias(unit, initializer, expected):
    layer = layers.ConvLSTM1D(2, 2, unit_forget_bias=unit, bias_initializer=initializer)
    layer.build((None, 2, 4, 1))
    assert layer.bias.tolist() == expected


@pytest.mark.parametrize("option", ["dropout", "recurrent_dropout"])
def test_dropout_needs_training_and_a_rate_between_0_and_1(option):
    plain, x = make()
    for rate in (0.0, 0.5, 1.0):
        layer, _ = make(**{option: rate})
        layer.set_weights(plain.get_weights())
        same(layer(x), plain(x))
        assert np.allclose(layer(x, training=True), plain(x)) == (rate != 0.5)
        assert np.allclose(layer.forward(x), plain(x)) == (rate != 0.5)
        same(layer.forward(x, training=False), plain(x))


def test_masks_are_drawn_anew_at_each_call_and_repeat_with_the_seed():
    runs = []
    for seed in (3, 3, 4, None):
        layer, x = make(dropout=0.5, recurrent_dropout=0.5, seed=seed)
        runs.append([layer(x, training=True) for _ in range(2)])
    assert np.array_equal(runs[0], runs[1])
    for other in (runs[2], runs[3]):
        assert not np.allclose(runs[0][0], other[0])
    assert not np.allclose(runs[0][0], runs[0][1])


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_each_gate_has_one_mask_for_all_steps(data_format):
    """A step written out with the masks, gate by gate."""
    layer, x = make(
        dropout=0.4, recurrent_dropout=0.3, seed=1, data_format=data_format, return_sequences=True, padding="same"
    )
    layer._masks = Recorded(1)
    y = layer(x, training=True)
    axis = layer._channel_axis
    (mask, recurrent_mask), rates = layer._masks.drawn, (0.4, 0.3)
    mask, recurrent_mask = (
        np.split((m >= r) / (1 - r), 4, axis=axis) for m, r in zip((mask, recurrent_mask), rates, strict=True)
    )
    assert {round(float(v), 6) for v in np.unique(mask)} == {0.0, round(1 / 0.6, 6)}
    kernels, recurrent = np.split(layer.kernel, 4, axis=-1), np.split(layer.recurrent_kernel, 4, axis=-1)
    biases = np.split(layer.bias, 4)
    h = c = np.zeros_like(np.split(np.repeat(x[:, 0], 4, axis=axis), 4, axis=axis)[0])
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    for t in range(x.shape[1]):
        z = [
            oracle.conv(x[:, t] * mask[g], kernels[g], biases[g], padding="same", data_format=data_format)
            + oracle.conv(h * recurrent_mask[g], recurrent[g], padding="same", data_format=data_format)
            for g in range(4)
        ]
        c = sigmoid(z[1]) * c + sigmoid(z[0]) * np.tanh(z[2])
        h = sigmoid(z[3]) * np.tanh(c)
        same(y[:, t], h)


class Recorded:
    """A generator that keeps what it drew, in float64 so that the rates compare alike."""

    def __init__(self, seed):
        self.drawn = []
        self.generator = np.random.default_rng(seed)

    def random(self, shape, dtype):
        self.drawn.append(self.generator.random(shape, dtype))
        return self.drawn[-1]


@pytest.mark.parametrize(
    "options", [{"dropout": 0.4}, {"recurrent_dropout": 0.4}, {"dropout": 0.4, "recurrent_dropout": 0.3}], ids=str
)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_gradients_through_dropout(options, data_format):
    layer, x = make(seed=1, data_format=data_format, return_sequences=True, **options)

    def forward(x):
        layer._masks = np.random.default_rng(9)
        return layer.forward(x)

    check_gradients(layer, x, forward=forward)


def test_activations_by_callable_and_over_the_last_axis():
    layer, x = make(activation="softmax", padding="same", data_format="channels_first")
    assert layer(x).shape == (2, 2, 5)
    custom, _ = make(activation=lambda x: np.tanh(x))
    plain, _ = make()
    custom.set_weights(plain.get_weights())
    same(custom(x.swapaxes(2, 3).copy()), plain(x.swapaxes(2, 3).copy()))
