"""Regularizers against sums written out, their gradients against finite differences, and against Keras."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from fake_device import DeviceArray
from live_keras import against_keras, live_keras

from cuconv import regularizers
from cuconv.regularizers import L1, L1L2, L2, OrthogonalRegularizer

REGULARIZERS = {
    "l1": L1(0.3),
    "l2": L2(0.2),
    "l1l2": L1L2(0.3, 0.2),
    "rows": OrthogonalRegularizer(0.4),
    "columns": OrthogonalRegularizer(0.4, "columns"),
}


def weights(seed=0, shape=(4, 5)):
    return np.random.default_rng(seed).normal(size=shape)


def orthogonality(w, factor):
    """The definition of OrthogonalRegularizer over rows, pair by pair."""
    pairs = [(i, j) for i in range(len(w)) for j in range(i)]
    cosines = [abs(np.dot(w[i], w[j])) / math.sqrt(np.dot(w[i], w[i]) * np.dot(w[j], w[j])) for i, j in pairs]
    return factor * sum(cosines) / len(pairs)


FORMULAS = {
    "l1": lambda w: 0.3 * math.fsum(map(abs, w.ravel())),
    "l2": lambda w: 0.2 * math.fsum(abs(v) ** 2 for v in w.ravel()),
    "l1l2": lambda w: math.fsum(0.3 * abs(v) + 0.2 * abs(v) ** 2 for v in w.ravel()),
    # Keras divides half the sum over both orders of a pair by the number of pairs: the mean over pairs.
    "rows": lambda w: orthogonality(w, 0.4),
    "columns": lambda w: orthogonality(w.T, 0.4),
}


# ---- values ----------------------------------------------------------------------------------------------------------


def test_hand_values():
    w = np.array([[1.0, -2.0], [0.0, 3.0]], np.float32)
    assert L1(0.5)(w) == 3.0
    assert L2(0.5)(w) == 7.0
    assert L1L2(0.5, 0.25)(w) == 6.5
    assert OrthogonalRegularizer(2.0)(w) == pytest.approx(2 * 2 / math.sqrt(5))
    assert L1()(w) == pytest.approx(0.06)
    assert L2()(w) == pytest.approx(0.14)
    assert L1L2()(w) == 0.0


@pytest.mark.parametrize("name", REGULARIZERS)
def test_value_is_the_formula(name):
    w = weights()
    penalty = REGULARIZERS[name](w)
    assert type(penalty) is float
    assert penalty == pytest.approx(FORMULAS[name](w), rel=1e-13)
    assert REGULARIZERS[name](w.astype(np.float32)) == pytest.approx(penalty, rel=1e-6)


@pytest.mark.parametrize("name", ["l1", "l2", "l1l2"])
def test_complex_values(name):
    w = weights(1) + 1j * weights(2)
    assert REGULARIZERS[name](w) == pytest.approx(FORMULAS[name](w), rel=1e-13)


def test_sixteen_bits_do_not_overflow_or_stall():
    assert L2(1.0)(np.full(100, 300, np.float16)) == 9e6  # 300^2 is beyond float16
    assert L1(1.0)(np.ones(5000, ml_dtypes.bfloat16)) == 5000  # in bfloat16, 256 + 1 = 256


def test_nan_shows():
    w = np.array([[1.0, np.nan], [1.0, 2.0]])
    for regularizer in REGULARIZERS.values():
        assert math.isnan(regularizer(w))
        assert np.isnan(regularizer.gradient(w)).any()


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGULARIZERS)
def test_gradient_is_the_finite_difference(name):
    w = weights(3)
    expected = np.zeros_like(w)
    for i in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[i] = 1e-6
        expected[i] = (FORMULAS[name](w + step) - FORMULAS[name](w - step)) / 2e-6
    np.testing.assert_allclose(REGULARIZERS[name].gradient(w), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["l1", "l2", "l1l2"])
def test_complex_gradient_points_along_both_parts(name):
    w = weights(4, (3,)) + 1j * weights(5, (3,))
    expected = np.zeros_like(w)
    for i in range(3):
        for direction in (1, 1j):
            step = np.zeros_like(w)
            step[i] = direction * 1e-6
            expected[i] += direction * (FORMULAS[name](w + step) - FORMULAS[name](w - step)) / 2e-6
    np.testing.assert_allclose(REGULARIZERS[name].gradient(w), expected, rtol=1e-7, atol=1e-9)


def test_the_gradient_is_zero_at_the_kink_of_l1():
    for dtype in ("float32", "complex64"):
        np.testing.assert_array_equal(L1(0.5).gradient(np.array([0, 2], dtype)), [0, 0.5])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_gradient_keeps_the_dtype_and_the_weights(name, dtype):
    w = weights(6).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    before = w.copy()
    gradient = REGULARIZERS[name].gradient(w)
    assert gradient.dtype == w.dtype
    expected = REGULARIZERS[name].gradient(w.astype(np.float64))
    eps = float(ml_dtypes.finfo(w.dtype).eps)
    np.testing.assert_allclose(gradient.astype(np.float64), expected, rtol=eps, atol=eps)
    gradient[...] = 1
    np.testing.assert_array_equal(w, before)


def test_a_single_row_has_no_pairs():
    w = np.ones((1, 3))
    assert OrthogonalRegularizer()(w) == 0
    np.testing.assert_array_equal(OrthogonalRegularizer().gradient(w), np.zeros((1, 3)))


def test_a_zero_row_is_finite():
    w = np.array([[0.0, 0.0], [1.0, 2.0], [1.0, 0.0]])
    assert np.isfinite(OrthogonalRegularizer()(w))
    assert np.all(np.isfinite(OrthogonalRegularizer().gradient(w)))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_arrays_of_another_library_go_through_the_protocols(name):
    w = weights(7).astype(np.float32)
    assert REGULARIZERS[name](DeviceArray(w)) == pytest.approx(REGULARIZERS[name](w), rel=1e-6)
    gradient = REGULARIZERS[name].gradient(DeviceArray(w))
    np.testing.assert_allclose(gradient.host, REGULARIZERS[name].gradient(w), rtol=1e-6)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "0.1", [0.1]], ids=repr)
@pytest.mark.parametrize("make", [L1, L2, L1L2, OrthogonalRegularizer])
def test_factors(make, value):
    with pytest.raises(ValueError, match=r"`(l1|l2|factor)` must be a finite number >= 0. Received: "):
        make(value)


def test_none_is_the_default_factor():
    assert (L1(None).l1, L2(None).l2, L1L2(None, None).l1) == (0.01, 0.01, 0.0)


def test_orthogonal_regularizer_errors():
    with pytest.raises(ValueError, match="`mode` must be 'rows' or 'columns'. Received: mode='diagonal'"):
        OrthogonalRegularizer(mode="diagonal")
    with pytest.raises(ValueError, match=r"needs a matrix; .*Received: w.shape=\(3, 3, 2\)"):
        OrthogonalRegularizer()(np.ones((3, 3, 2)))
    with pytest.raises(ValueError, match="needs a matrix"):
        OrthogonalRegularizer().gradient(np.ones(3))
    with pytest.raises(TypeError, match="needs real weights. Received: w.dtype=complex128"):
        OrthogonalRegularizer()(np.ones((3, 3), complex))


# ---- identifiers and configs -----------------------------------------------------------------------------------------

NAMES = {
    "l1": L1, "L1": L1, "l2": L2, "L2": L2, "l1l2": L1L2, "L1L2": L1L2,
    "orthogonal_regularizer": OrthogonalRegularizer, "OrthogonalRegularizer": OrthogonalRegularizer,
}  # fmt: skip


def smooth(w):
    return np.float32(np.sum(w**4))


class Cap:
    """A custom regularizer with a gradient and a config, without our base class."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, w):
        return self.factor * np.sum(w)

    def gradient(self, w):
        return np.full_like(w, self.factor)

    def get_config(self):
        return {"factor": self.factor}


@pytest.mark.parametrize(("name", "cls"), NAMES.items())
def test_every_name(name, cls):
    for spelling in (name, cls, {"class_name": name, "config": {}}):
        assert type(regularizers.get(spelling)) is cls
    instance = cls()
    assert regularizers.get(instance) is instance


def test_lower_case_classes():
    assert (regularizers.l1, regularizers.l2, regularizers.l1_l2) == (L1, L2, L1L2)
    assert regularizers.orthogonal_regularizer is OrthogonalRegularizer


def test_none_is_none():
    assert regularizers.get(None) is None
    assert regularizers.serialize(None) is None


@pytest.mark.parametrize(
    ("identifier", "message"),
    [
        ("l1_l2", r"write `cuconv.regularizers.L1L2\(0.01, 0.01\)`.* Received: regularizer='l1_l2'"),
        ("orthogonalregularizer", "Did you mean '(orthogonal_r|OrthogonalR)egularizer'"),
        ("L3", "Names: L1, L1L2, L2"),
        (0.01, "`regularizer` must be None.*Received: regularizer=0.01"),
        ({"class_name": "L2", "config": {}, "module": "mine"}, "not part of cuconv"),
    ],
    ids=str,
)
def test_unknown_identifiers(identifier, message):
    with pytest.raises(ValueError, match=message):
        regularizers.get(identifier)


@pytest.mark.parametrize("regularizer", REGULARIZERS.values(), ids=REGULARIZERS)
def test_config_round_trip(regularizer):
    config = regularizers.serialize(regularizer)
    again = regularizers.get(json.loads(json.dumps(config)))
    assert type(again) is type(regularizer)
    assert regularizers.serialize(again) == config
    keras_2 = {"class_name": config["class_name"], "config": config["config"]}
    assert regularizers.serialize(regularizers.get(keras_2)) == config


def test_custom_callables():
    regularizer = regularizers.get(smooth)
    assert regularizer(np.full(2, 2.0)) == 32.0 and type(regularizer(np.ones(2))) is float
    with pytest.raises(NotImplementedError, match="callable without a gradient"):
        regularizer.gradient(np.ones(2))
    config = regularizers.serialize(regularizer)
    assert config == {"module": "builtins", "class_name": "function", "config": "smooth", "registered_name": "function"}
    assert regularizers.get(config, custom_objects={"smooth": smooth})(np.ones(2)) == 2
    cap = regularizers.get(Cap(2.0))
    np.testing.assert_array_equal(cap.gradient(np.ones(2)), [2, 2])
    config = regularizers.serialize(cap)
    assert config == {"module": __name__, "class_name": "Cap", "config": {"factor": 2.0}, "registered_name": "Cap"}
    assert regularizers.get(config, custom_objects={"Cap": Cap})(np.ones(2)) == 4


def test_a_subclass_without_a_gradient_says_so():
    class Mine(regularizers.Regularizer):
        def __call__(self, w):
            return 1.0

    with pytest.raises(NotImplementedError, match=r"Mine must define `gradient\(w\)`"):
        regularizers.get(Mine).gradient(np.ones(2))


# ---- against Keras ---------------------------------------------------------------------------------------------------


@against_keras
@pytest.mark.parametrize("name", REGULARIZERS)
def test_value_and_gradient_are_keras(name):
    keras = live_keras()
    import torch

    regularizer = REGULARIZERS[name]
    theirs = keras.regularizers.get(regularizers.serialize(regularizer))
    w = weights(8).astype(np.float32)
    w[0, 0] = 0
    theirs_w = torch.tensor(w, requires_grad=True)
    penalty = theirs(theirs_w)
    penalty.backward()
    assert regularizer(w) == pytest.approx(float(penalty.detach()), rel=1e-6)
    np.testing.assert_allclose(regularizer.gradient(w), theirs_w.grad.numpy(), rtol=1e-5, atol=1e-7)


@against_keras
def test_names_and_configs_are_keras():
    keras = live_keras()
    from keras.src import regularizers as source

    assert set(NAMES) == set(source.ALL_OBJECTS_DICT) - {"Regularizer", "regularizer"}
    for name in NAMES:
        theirs = keras.regularizers.serialize(keras.regularizers.get(name))
        assert type(regularizers.get(theirs)) is NAMES[name]
        ours = regularizers.serialize(regularizers.get(name))
        for key, value in theirs.pop("config").items():  # Keras rounds some factors to float32
            assert ours["config"].pop(key) == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value)
        assert ours.pop("config") == {}
        assert ours == theirs
    theirs = keras.regularizers.OrthogonalRegularizer(0.5).get_config()
    assert OrthogonalRegularizer(0.5).get_config() == theirs
