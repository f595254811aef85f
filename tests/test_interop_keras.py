"""The bridge to Keras: models train on our kernels as they train on torch, and layers go over and come back.

Both sides of every comparison are Keras; one of them runs inside `accelerate`, where torch's own convolutions raise.
Layers one by one are asked what keras_harness.py asks, with gradients, on configurations drawn by keras_cases.py.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from unittest import mock

import emulator
import numpy as np
import pytest
from compare import assert_close
from emulated import EmulatedRuntime
from keras_cases import LAYERS, WITH_WEIGHTS, find, random_cases
from keras_harness import (
    OURS,
    THEIRS,
    KerasSide,
    Raised,
    answers,
    as_list,
    as_values,
    chosen_weights,
    differences,
    keras,
    precision_of,
    report,
    torch,
    value_difference,
)

import cuconv
from cuconv import ops as array_ops
from cuconv.cuda.engine import Engine
from cuconv.interop.keras import accelerate, accelerating, from_keras, to_keras

# Keras on torch calls NumPy in ways NumPy 2 warns about.
pytestmark = [
    pytest.mark.bridges,
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`:UserWarning"),
]

K = keras.layers


@pytest.fixture(autouse=True)
def fresh_names():
    keras.backend.clear_session(free_memory=False)
    cuconv.layers.reset_names()


@contextmanager
def policy(name):
    """Layers made inside have this dtype policy; losses and metrics are kept in its variables' dtype."""
    keras.config.set_floatx("float64" if name == "float64" else "float32")
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


@contextmanager
def without_torch():
    """torch's convolutions raise."""

    def refuse(*args, **kwargs):
        raise AssertionError("a convolution of torch")

    names = [f"{name}{rank}d" for name in ("conv", "conv_transpose") for rank in (1, 2, 3)]
    with mock.patch.multiple(torch.nn.functional, **dict.fromkeys(names, refuse)):
        yield


@contextmanager
def ours_alone(model, **options):
    with accelerate(model, **options) as acceleration, without_torch():
        yield acceleration
    assert_given_back(model)


def assert_given_back(model):
    for layer in model._flatten_layers():
        assert "call" not in vars(layer), layer.name


# --- Models ------------------------------------------------------------------------------------------------------


def causal():
    """Conv1D in every dress, one after the other."""
    return keras.Sequential(
        [
            keras.Input((16, 4)),
            K.Conv1D(8, 3, padding="causal", dilation_rate=2, activation="relu"),
            K.Conv1D(8, 4, strides=2, groups=4, padding="same", kernel_regularizer="l2"),
            K.SeparableConv1D(6, 3, depth_multiplier=2, activation="tanh"),
            K.DepthwiseConv1D(2, padding="same", use_bias=False),
            K.Conv1DTranspose(5, 3, strides=2, output_padding=1, activation="gelu"),
            K.Flatten(),
            K.Dense(1),
        ]
    )


def images():
    """A functional model with two branches, a shared layer and both layouts."""
    x = keras.Input((8, 7, 3))
    shared = K.Conv2D(4, 3, padding="same", activation="swish", name="shared", kernel_constraint="max_norm")
    a = shared(K.Conv2D(4, (3, 2), padding="same", activity_regularizer="l2")(x))
    b = shared(K.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x)[..., :4])
    y = K.BatchNormalization()(K.Add()([a, b]))
    y = K.SeparableConv2D(5, 2, strides=2)(y)
    y = K.Conv2DTranspose(3, 3, strides=2, padding="same")(y)
    y = K.Conv2D(2, 2, data_format="channels_first", dilation_rate=2)(K.Permute((3, 1, 2))(y))
    return keras.Model(x, K.Dense(1)(K.Flatten()(y)))


def volumes():
    """A nested model of three-dimensional layers; one is frozen."""
    inner = keras.Sequential([keras.Input((5, 5, 4, 2)), K.Conv3D(3, 2, activation="elu")], name="inner")
    x = keras.Input((5, 5, 4, 2))
    y = K.Conv3DTranspose(2, 2, padding="same")(inner(x))
    y = K.Conv3D(2, 2, strides=(1, 2, 1), trainable=False)(y)
    return keras.Model(x, K.Dense(1)(K.Flatten()(y)))


def recurrent():
    """ConvLSTMs with dropout, backwards and inside wrappers."""
    return keras.Sequential(
        [
            keras.Input((4, 9, 2)),
            K.ConvLSTM1D(3, 3, return_sequences=True, dropout=0.25, recurrent_dropout=0.25, seed=7),
            K.TimeDistributed(K.Conv1D(4, 2, padding="causal", activation="tanh")),
            K.Reshape((4, 7, 2, 2)),
            K.ConvLSTM2D(2, 2, go_backwards=True, padding="same", unit_forget_bias=False),
            K.Flatten(),
            K.Dense(1),
        ]
    )


class Residual(keras.Model):
    """A subclassed model, whose layers are built by the first batch."""

    def __init__(self):
        super().__init__()
        self.blocks = [K.Conv1D(4, 3, padding="causal", dilation_rate=2**i, activation="relu") for i in range(3)]
        self.first, self.head = {"conv": K.Conv1D(4, 1)}, K.Dense(1)

    def call(self, x, training=False):
        y = self.first["conv"](x)
        for block in self.blocks:
            y = y + block(y)
        return self.head(y[:, -1])  # Keras' mean would round to float32


MODELS = {  # maker, input shape, layers that cuconv computes, their calls for one batch
    "causal": (causal, (16, 4), 5, 5),
    "images": (images, (8, 7, 3), 6, 7),
    "volumes": (volumes, (5, 5, 4, 2), 3, 3),
    "recurrent": (recurrent, (4, 9, 2), 3, 5 + 4 + 5),  # Keras' loop computes the first step twice
    "residual": (Residual, (12, 3), 4, 4),
}
CLOSE = {"float64": 1e-12, "float32": 1e-5, "mixed_float16": 0.02, "mixed_bfloat16": 0.1}


def data(shape, count=12):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, *shape)).astype("float32")
    return x, np.tanh(3 * x.mean(axis=tuple(range(1, x.ndim)))).astype("float32")[:, None]


def trained(name, inside, dtype="float32", **options):
    """Everything that a training leaves: history, predictions, scores and weights; and what `inside` gave."""
    keras.backend.clear_session(free_memory=False)  # the names of the weights start again
    make, shape, *_ = MODELS[name]
    with policy(dtype):
        keras.utils.set_random_seed(3)
        model = make()
        return trained_model(model, data(shape), inside, **options)


def trained_model(model, samples, inside, **options):
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, "mse", metrics=["mae"])
    x, y = samples
    with inside(model) as acceleration, torch.backends.mkldnn.flags(enabled=False):
        history = model.fit(x, y, batch_size=4, epochs=2, validation_split=0.34, verbose=0, **options).history
        found = {
            **{f"history of {key}": np.array(values) for key, values in history.items()},
            "predictions": model.predict(x, batch_size=12, verbose=0),
            "scores": np.array(model.evaluate(x, y, batch_size=12, verbose=0)),
        }
    found |= {f"weight {w.path}": keras.ops.convert_to_numpy(w.value) for w in model.weights}
    return found, acceleration


@contextmanager
def untouched(model):
    yield None


def assert_alike(found, expected, close):
    """Relative to the largest element of each array; NaN never passes."""
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        have, want = found[key].astype("float64"), want.astype("float64")
        assert np.isfinite(want).all() and np.isfinite(have).all(), key
        assert have.shape == want.shape, key
        allowed = max(close, 1e-6) if key.startswith(("history", "scores")) else close  # Keras sums those in float32
        assert np.abs(have - want).max(initial=0) <= allowed * max(np.abs(want).max(initial=0), 0.1), key


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", MODELS)
def test_fit_gives_what_it_gives_without_us(name, dtype):
    expected, _ = trained(name, untouched, dtype)
    found, acceleration = trained(name, ours_alone, dtype)
    assert_alike(found, expected, CLOSE[dtype])
    _, _, layers, calls = MODELS[name]
    assert (len(acceleration.accelerated), acceleration.left) == (layers, ())
    # Two epochs of two batches and two of validation, a prediction and an evaluation of one batch each. In mixed
    # precision Keras learns the shapes of a functional model by running it once more.
    batches = 2 * (2 + 2) + 1 + 1 + (dtype.startswith("mixed") and name != "residual")
    assert acceleration.calls == calls * batches
    assert any(np.abs(np.diff(values)).max() > 1e-3 for key, values in found.items() if "history" in key), "no training"


def test_callbacks_see_the_same_model(tmp_path):
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append("call" in vars(self.model.layers[0]))

    def callbacks(folder):
        return [
            Look(),
            keras.callbacks.ModelCheckpoint(str(tmp_path / f"{folder}.keras")),
            keras.callbacks.EarlyStopping("val_loss", patience=0, restore_best_weights=True),
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / (1 + epoch)),
        ]

    expected, _ = trained("causal", untouched, callbacks=callbacks("theirs"))
    found, _ = trained("causal", ours_alone, callbacks=callbacks("ours"))
    assert_alike(found, expected, CLOSE["float32"])
    assert seen == [False] * (len(seen) // 2) + [True] * (len(seen) // 2) != []
    x, _ = data((16, 4))
    saved = [keras.models.load_model(tmp_path / f"{name}.keras") for name in ("theirs", "ours")]
    assert_alike({"y": saved[1].predict(x, verbose=0)}, {"y": saved[0].predict(x, verbose=0)}, CLOSE["float32"])
    for model in saved:
        assert_given_back(model)


# --- One layer after the other -----------------------------------------------------------------------------------


class Accelerated(KerasSide):
    """Keras' layers, computed by us."""

    def call(self, layer, x):
        with ours_alone(layer) as acceleration:
            found = super().call(layer, x)
        assert acceleration.calls > 0
        return found

    def train(self, layer, x, cotangent):
        with ours_alone(layer) as acceleration:
            found = super().train(layer, x, cotangent)
        assert acceleration.calls > 0
        return found


DRAWN = [case for layer in LAYERS for case in list(random_cases(layer))[: 8 if layer in WITH_WEIGHTS else 4]]


@pytest.mark.parametrize("case", [case for case in DRAWN if case.layer in WITH_WEIGHTS], ids=lambda each: each.id)
def test_every_layer_answers_as_before(case):
    theirs = answers(THEIRS, case)
    assert not any(isinstance(fact, Raised) for name, fact in theirs.items() if name.endswith("_facts"))
    found = differences(theirs, answers(Accelerated(), case), precision_of(case))
    assert not found, report(case, found)


def test_damage_is_noticed():
    """The comparison above can fail: a convolution that is off by a thousandth, and a gradient that is missing."""
    case = find(DRAWN[0].id)
    theirs = answers(THEIRS, case)
    right = accelerating.ops.conv
    for wrong in (
        lambda x, w, bias=None, **options: right(x, w, bias, **options) * 1.001,
        lambda x, w, bias=None, **options: right(x, w.detach(), bias, **options),
        lambda x, w, bias=None, **options: right(x, w, None if bias is None else bias.detach(), **options),
    ):
        with mock.patch.object(accelerating.ops, "conv", wrong):
            assert differences(theirs, answers(Accelerated(), case), precision_of(case))


def test_a_stateful_layer_keeps_its_states():
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 2)).astype("float32")
    made = []
    for inside in (untouched, ours_alone):
        keras.utils.set_random_seed(0)
        layer = K.ConvLSTM1D(3, 2, stateful=True, return_state=True)
        layer.build(x.shape)
        with inside(layer), torch.no_grad():
            made.append([keras.ops.convert_to_numpy(y) for _ in range(2) for y in layer(torch.from_numpy(x))])
    for want, have in zip(*made, strict=True):
        assert_close(have, want.astype("float64"), dtype="float32", terms=30)


def test_infinities_are_as_quiet_as_in_torch():
    layer = K.Conv1D(1, 1, dtype="float16", kernel_initializer="ones", use_bias=False)
    layer.build((None, 6, 2))
    with ours_alone(layer):
        y = layer(torch.full((1, 6, 2), 6e4, dtype=torch.float16))
        y.sum().backward()
    assert torch.isinf(y).all() and torch.isinf(layer.trainable_weights[0].value.grad).all()


def test_lora_is_trained_through():
    made = []
    for inside in (untouched, ours_alone):
        keras.utils.set_random_seed(0)
        layer = K.Conv1D(4, 3)
        layer.build((None, 9, 2))
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
        x = torch.ones(1, 9, 2)
        with inside(layer):
            (layer(x) ** 2).sum().backward()
        made.append([w.value.grad.numpy() for w in layer.trainable_weights])
    assert len(made[0]) == 3
    for want, have in zip(*made, strict=True):
        assert_close(have, want.astype("float64"), dtype="float32", terms=100)


# --- Our kernels -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
def test_fit_by_our_kernels(monkeypatch):
    """The emulator runs them in the place of the NumPy path, on the memory of Keras' tensors."""
    results = []
    for inside in (untouched, ours_alone):
        keras.utils.set_random_seed(3)
        stack = [K.Conv1D(4, 3, padding="causal", dilation_rate=2, activation="relu"), K.DepthwiseConv1D(3)]
        model = keras.Sequential([keras.Input((9, 3)), *stack, K.Flatten(), K.Dense(1)])
        model.compile(keras.optimizers.SGD(0.05), "mse")
        x, y = data((9, 3), count=4)
        runtime = EmulatedRuntime()
        if inside is ours_alone:
            monkeypatch.setattr(array_ops, "_host_engine", Engine(runtime))
        with inside(model), torch.backends.mkldnn.flags(enabled=False):
            history = model.fit(x, y, batch_size=2, epochs=2, verbose=0).history
        results.append({str(index): w for index, w in enumerate([*model.get_weights(), np.array(history["loss"])])})
    # In each of four batches two forward passes, two kernel gradients and an input gradient, that of the second layer.
    assert len(runtime.launches) >= 4 * 5
    assert_alike(results[1], results[0], CLOSE["float32"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_layers_on_a_gpu_stay_there():
    cupy = pytest.importorskip("cupy")
    layer, x = K.Conv1D(8, 3, padding="causal"), torch.randn(2, 40, 16, device="cuda")
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        want = layer(x)
        with accelerate(layer) as acceleration:
            have = layer(x)
    assert acceleration.calls == 1 and have.is_cuda
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    ours = from_keras(layer)
    assert isinstance(ours.kernel, cupy.ndarray)
    np.testing.assert_allclose(cupy.asnumpy(ours(cupy.from_dlpack(x))), want.cpu().numpy(), rtol=1e-4, atol=1e-4)


# --- Opening and closing -----------------------------------------------------------------------------------------


def small(filters=2):
    return keras.Sequential([keras.Input((6, 2)), K.Conv1D(filters, 3)])


X = np.random.default_rng(1).standard_normal((2, 6, 2)).astype("float32")


def is_ours(layer):
    return "call" in vars(layer)


def test_other_models_are_untouched():
    model, other = small(), small()
    with accelerate(model) as acceleration:
        other.predict(X, verbose=0)
        assert acceleration.calls == 0 and not is_ours(other.layers[0])
        model.predict(X, verbose=0)
        assert acceleration.calls == 1 and is_ours(model.layers[0])


def test_an_exception_gives_the_model_back():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyError("enough")

    model = small()
    model.compile("sgd", "mse")
    before = vars(model.layers[0]).keys()
    with pytest.raises(KeyError, match="enough"), accelerate(model):
        model.fit(X, X[:, :4], verbose=0, callbacks=[Stop()])
    assert_given_back(model)
    assert vars(model.layers[0]).keys() == before
    model.fit(X, X[:, :4], verbose=0)


def test_openings_can_be_nested_and_overlap():
    model = small()
    layer = model.layers[0]
    first, second = accelerate(model), accelerate(layer)
    with first, first, second:
        model.predict(X, verbose=0)
        assert first.calls == second.calls == 1
    assert_given_back(model)
    with first:
        model.predict(X, verbose=0)
        with first:
            model.predict(X, verbose=0)
        assert is_ours(layer) and first.calls == 2
    assert_given_back(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_ours(layer)
    model.predict(X, verbose=0)
    assert (first.calls, second.calls) == (0, 1)  # counted from when it was opened
    second.__exit__(None, None, None)
    assert_given_back(model)


def test_models_that_share_layers_do_not_take_them_from_each_other():
    shared = K.Conv1D(2, 3, padding="same")
    one, other = (keras.Sequential([keras.Input((6, 2)), shared]) for _ in range(2))
    with accelerate(one):
        with accelerate(other):
            pass
        assert is_ours(shared)
    assert_given_back(one)


def test_a_call_that_someone_kept_is_keras_again():
    model = small()
    layer = model.layers[0]
    with accelerate(model) as acceleration:
        kept = layer.call
    layer.call = kept
    model.predict(X, verbose=0)
    assert acceleration.calls == 0


def in_threads(*works):
    failures = []

    def run(work):
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_threads_train_models_of_their_own():
    x, target = X.astype("float64"), X[:, :4].astype("float64")
    results = {}

    def work(key, inside):
        def run():
            model = models[key]
            with inside(model):
                for _ in range(8):
                    model.fit(x, target, batch_size=1, verbose=0, shuffle=False)
            results[key] = model.get_weights()

        return run

    with policy("float64"):
        models = {}
        for key in ("ours a", "ours b", "theirs"):
            keras.utils.set_random_seed(5)
            models[key] = small()
            models[key].compile(keras.optimizers.SGD(0.1), "mse")
        in_threads(work("ours a", accelerate), work("ours b", accelerate), work("theirs", untouched))
    for key in ("ours a", "ours b"):
        assert_given_back(models[key])
        for have, want in zip(results[key], results["theirs"], strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-11, atol=1e-13)


def test_threads_open_one_model_at_once():
    model = small()
    x = torch.from_numpy(X)
    with torch.no_grad():
        want = model(x).numpy().astype("float64")

    def work():
        for _ in range(30):
            with accelerate(model) as acceleration, torch.no_grad():
                y = model(x)
            assert acceleration.calls >= 1
            assert_close(y.numpy(), want, dtype="float32", terms=6)

    in_threads(*[work] * 4)
    assert_given_back(model)


def test_threads_open_and_close_at_any_moment(monkeypatch):
    layer, wraps = K.Conv1D(2, 3), functools.wraps

    def slow(original):
        time.sleep(1e-3)  # so that another thread comes in between
        return wraps(original)

    def work(seed):
        def run():
            rng = np.random.default_rng(seed)
            for _ in range(40):
                with accelerate(layer):
                    time.sleep(rng.uniform(0, 3e-3))
                    assert is_ours(layer)
                time.sleep(rng.uniform(0, 3e-3))

        return run

    monkeypatch.setattr(accelerating.functools, "wraps", slow)
    in_threads(*map(work, range(4)))
    assert_given_back(layer)


def test_models_can_be_made_inside():
    layer = K.Conv1D(2, 3)
    with accelerate(layer) as acceleration:
        model = keras.Sequential([keras.Input((6, 2)), layer])
        assert model.output_shape == (None, 4, 2)
        model.predict(X, verbose=0)
        assert acceleration.calls >= 1
        keras.models.clone_model(model).predict(X, verbose=0)
    assert_given_back(model)


# --- What is left, and what is told ------------------------------------------------------------------------------


class Doubled(K.Conv1D):
    def call(self, inputs):
        return 2 * super().call(inputs)


class Standardized(K.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - keras.ops.mean(kernel))


class Named(K.Conv1D):
    """A subclass that only configures."""

    def __init__(self, **kwargs):
        super().__init__(2, 3, padding="causal", **kwargs)


def test_what_is_left_and_why():
    assigned = K.Conv1D(2, 1, name="assigned")
    assigned.call = lambda inputs: inputs
    quantized = K.DepthwiseConv1D(1, name="quantized", dtype="int8_from_float32")
    wrapped = K.TorchModuleWrapper(torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1)), name="wrapped")
    parts = [Doubled(2, 1, name="doubled"), Standardized(2, 1, name="standardized"), assigned, quantized, wrapped]
    parts += [Named(name="named"), K.Dense(2), K.UpSampling1D(2), K.TorchModuleWrapper(torch.nn.Linear(2, 2))]
    model = keras.Sequential(parts)
    with accelerate(model) as acceleration:
        assert [use.name for use in acceleration.accelerated] == ["named"]
        assert {use.name: use.reason for use in acceleration.left} == {
            "doubled": "Doubled has a `call` of its own",
            "standardized": "Standardized has a `convolution_op` of its own",
            "assigned": "its `call` was assigned to the object",
            "quantized": "quantized to int8",
            "wrapped": "a module of torch: cuconv.interop.torch.replace takes it",
        }
    assert vars(assigned)["call"] is assigned.call and not is_ours(parts[0])
    printed = str(acceleration)
    assert "1 accelerated, 5 left" in printed and "Standardized has a `convolution_op` of its own" in printed


def test_a_left_layer_still_computes():
    model = keras.Sequential([keras.Input((6, 2)), Doubled(2, 3), Named()])
    expected = model.predict(X, verbose=0)
    with accelerate(model) as acceleration:
        found = model.predict(X, verbose=0)
    assert_close(found, expected.astype("float64"), dtype="float32", terms=12)
    assert acceleration.calls == 1


def test_devices_and_dtypes_that_we_do_not_have_are_left(monkeypatch):
    layer = K.Conv1D(2, 3)
    layer.build((None, 6, 2))
    monkeypatch.setattr(accelerating, "DTYPES", (torch.float64,))
    assert [use.reason for use in accelerate(layer).left] == ["cuconv has no float32"]
    monkeypatch.undo()
    monkeypatch.setattr(accelerating, "DEVICES", ("cuda",))
    assert [use.reason for use in accelerate(layer).left] == ["cuconv does not compute on cpu"]


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_precision_reaches_every_family(precision):
    asked = []

    def recording(function):
        return lambda *args, **options: (asked.append(options["precision"]), function(*args, **options))[1]

    names = ("conv", "conv_transpose", "depthwise_conv", "separable_conv")
    spies = {name: recording(getattr(accelerating.ops, name)) for name in names}
    stack = [K.Conv1D(2, 1), K.Conv1DTranspose(2, 1), K.DepthwiseConv1D(1), K.SeparableConv1D(2, 1)]
    model = keras.Sequential([keras.Input((6, 2)), *stack, K.Reshape((2, 3, 2)), K.ConvLSTM1D(2, 1)])
    with mock.patch.multiple(accelerating.ops, **spies), accelerate(model, precision=precision):
        model.predict(X, verbose=0)
    assert asked == [precision] * (4 + 2 * (1 + 2))  # Keras' loop computes the first step twice


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"`model` must be a model or layer of Keras. Received: Conv1D"):
        accelerate(cuconv.layers.Conv1D(1, 1))
    with pytest.raises(ValueError, match=r"`precision` must be"):
        accelerate(small(), precision="low")


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "tensorflow")
    with pytest.raises(RuntimeError, match=r"KERAS_BACKEND=torch.*Received: backend='tensorflow'"):
        accelerate(small())


def test_keras_2_is_refused():
    code = "import sys, types; old = sys.modules['keras'] = types.ModuleType('keras'); old.__version__ = '2.15.0'"
    ran = subprocess.run([sys.executable, "-c", f"{code}; import cuconv.interop.keras"], capture_output=True, text=True)
    assert ran.returncode == 1 and "needs Keras 3" in ran.stderr and "Received: keras 2.15.0" in ran.stderr


@pytest.mark.parametrize(
    "hidden, message", [("keras", 'needs Keras 3: pip install "cuconv[keras]"'), ("torch", "KERAS_BACKEND=torch")]
)
def test_what_is_missing_is_named(hidden, message):
    code = f"import sys; sys.modules[{hidden!r}] = None; import cuconv.interop.keras"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 1 and message in ran.stderr.splitlines()[-1]


# --- Conversion --------------------------------------------------------------------------------------------------


def built_by_keras(case):
    layer = case.construct(keras)
    layer.build(case.shape)
    layer.set_weights(chosen_weights(case, layer))
    return layer


def plain(config):
    """As JSON, without the seeds that were drawn and without what only one library writes."""
    idle = {"seed", "input_axes", "output_axes", "build_config", "compile_config", "mask"}

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(each) for key, each in value.items() if key not in idle}
        return [strip(each) for each in value] if isinstance(value, list) else value

    return strip(json.loads(json.dumps(config)))


@pytest.mark.parametrize("case", DRAWN, ids=lambda each: each.id)
def test_layers_go_over_and_come_back(case):
    theirs = built_by_keras(case)
    ours = from_keras(theirs)
    assert type(ours) is getattr(cuconv.layers, case.layer)
    assert plain(ours.get_config()) == plain(theirs.get_config())
    back = to_keras(ours)
    assert type(back) is type(theirs) and plain(back.get_config()) == plain(theirs.get_config())
    for one, two, three in zip(theirs.get_weights(), ours.get_weights(), back.get_weights(), strict=True):
        assert one.dtype == two.dtype == three.dtype
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    x = case.inputs()[0]
    with THEIRS.guard():
        answers_of = [as_list(THEIRS.call(theirs, x)), as_list(OURS.call(ours, x)), as_list(THEIRS.call(back, x))]
    for want, have, again in zip(*answers_of, strict=True):
        for each in (have, again):
            assert value_difference(as_values(want), as_values(each), precision_of(case)) is None


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_that_are_not_built_go_over(layer):
    case = next(random_cases(layer))
    theirs = case.construct(keras)
    ours = from_keras(theirs)
    assert not ours.weights and plain(ours.get_config()) == plain(theirs.get_config())
    assert plain(to_keras(ours).get_config()) == plain(theirs.get_config())


def decoder():
    inner = keras.Sequential([keras.Input((6, 3)), K.Conv1D(3, 2, name="a"), K.ZeroPadding1D((1, 0))], name="inner")
    x = keras.Input((6, 2), name="x")
    shared = K.Conv1D(3, 3, padding="same", activation="relu", name="shared")
    y = inner(shared(x))
    y = K.Conv1DTranspose(2, 2, strides=2, trainable=False)(inner(y))
    return keras.Model(x, [K.UpSampling1D(2)(y), K.SeparableConv1D(2, 2)(shared(x))])


def test_models_go_over_and_come_back():
    theirs = decoder()
    ours = from_keras(theirs)
    back = to_keras(ours)
    assert plain(ours.get_config()) == plain(theirs.get_config()) == plain(back.get_config())
    with torch.no_grad():
        want = [y.numpy() for y in theirs(torch.from_numpy(X))]
        again = [y.numpy() for y in back(torch.from_numpy(X))]
    for one, two, three in zip(want, ours(X), again, strict=True):
        assert_close(two, one.astype("float64"), dtype="float32", terms=60)
        np.testing.assert_array_equal(one, three)
    assert [w.shape for w in ours.trainable_weights] == [tuple(w.shape) for w in theirs.trainable_weights]


def test_neither_side_sees_later_changes():
    theirs = small()
    ours = from_keras(theirs)
    back = to_keras(ours)
    kept = theirs.get_weights()
    for weight in ours.weights:
        weight[...] = 7
    for model in (theirs, back):
        for have, want in zip(model.get_weights(), kept, strict=True):
            np.testing.assert_array_equal(have, want)


def test_sequential_models_without_an_input_go_over():
    theirs = keras.Sequential([K.Conv1D(2, 3), K.Cropping1D(1)], name="s")
    ours = from_keras(theirs)
    assert type(ours) is cuconv.Sequential and not ours.built
    assert plain(to_keras(ours).get_config()) == plain(theirs.get_config())
    theirs.predict(X, verbose=0)
    assert_close(from_keras(theirs)(X), theirs.predict(X, verbose=0).astype("float64"), dtype="float32", terms=6)


@pytest.mark.parametrize("use_bias", [True, False])
def test_lora_is_merged(use_bias):
    layer = K.Conv1D(4, 3, use_bias=use_bias)
    layer.build((None, 6, 2))
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(np.ones(layer.lora_kernel_b.shape))
    with torch.no_grad():
        want = layer(torch.from_numpy(X)).numpy()
    assert_close(from_keras(layer)(X), want.astype("float64"), dtype="float32", terms=30)


def bend(x):
    return x * 2


def test_custom_objects_are_handed_on():
    theirs = K.Conv1D(2, 3, activation=bend)
    with pytest.raises(ValueError, match="bend"):
        from_keras(theirs)
    ours = from_keras(theirs, {"bend": bend})
    assert_close(ours(X), 2 * cuconv.ops.conv(X, ours.kernel, ours.bias).astype("float64"), dtype="float32", terms=6)
    assert to_keras(ours, {"bend": bend}).activation is bend


def test_every_unknown_layer_is_named():
    inner = keras.Sequential([keras.Input((6, 2)), K.Dense(2, name="deep")], name="inner")
    model = keras.Sequential([keras.Input((6, 2)), K.Conv1D(2, 1), inner, Doubled(2, 1, name="own"), K.Flatten()])
    with pytest.raises(ValueError, match=r"layers 'deep' \(Dense\), 'own' \(.*Doubled\), 'flatten.*' \(Flatten\)$"):
        from_keras(model)
    with pytest.raises(ValueError, match=r"Residual$"):
        from_keras(Residual())
    with pytest.raises(TypeError, match="must be a layer or model of Keras. Received: Conv1D"):
        from_keras(cuconv.layers.Conv1D(1, 1))

    class Own(cuconv.layers.Conv1D):
        pass

    theirs = Doubled(2, 1)
    theirs.build((None, 6, 2))
    mine = from_keras(theirs, {"Doubled": Own})
    assert type(mine) is Own and np.array_equal(mine.get_weights()[0], theirs.get_weights()[0])
    assert type(to_keras(mine, {"Own": Doubled})) is Doubled
    ours = cuconv.Sequential([Own(2, 1, name="own"), cuconv.layers.Conv1D(2, 1, dtype="complex64", name="complex")])
    with pytest.raises(ValueError, match=r"layers 'own' \(Own, float32\), 'complex' \(Conv1D, complex64\)$"):
        to_keras(ours)
    for convert, library in ((from_keras, K), (to_keras, cuconv.layers)):
        with pytest.raises(ValueError, match=r"does not have the layers 'mine' \(.*Conv1D"):
            convert(type("Conv1D", (library.Conv1D,), {})(2, 1, name="mine"))
    with pytest.raises(TypeError, match="must be a layer or model of cuconv"):
        to_keras(K.Conv1D(1, 1))
