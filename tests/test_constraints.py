"""Constraints against slices scaled one by one, and against Keras."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from fake_device import DeviceArray
from live_keras import against_keras, live_keras

from cuconv import constraints
from cuconv.constraints import MaxNorm, MinMaxNorm, NonNeg, UnitNorm

WANTED = {
    "max_norm": (MaxNorm, {"max_value": 1.5}, lambda norm: min(norm, 1.5)),
    "min_max_norm": (MinMaxNorm, {"min_value": 0.8, "max_value": 1.6}, lambda norm: min(max(norm, 0.8), 1.6)),
    "min_max_norm-half": (
        MinMaxNorm,
        {"min_value": 0.8, "max_value": 1.6, "rate": 0.5},
        lambda norm: (norm + min(max(norm, 0.8), 1.6)) / 2,
    ),
    "unit_norm": (UnitNorm, {}, lambda norm: 1.0),
}
AXES = {"first-spatial": 0, "last": -1, "per-filter-list": [0, 1, 2], "per-filter-tuple": (0, 1, 2), "all": None}


def weights(seed=0, shape=(2, 3, 2, 5)):
    return np.random.default_rng(seed).normal(size=shape)


def scaled_slice_by_slice(w, axis, wanted):
    """`w` with the norm of each slice along `axis` set to `wanted(norm)`, 1e-7 added to the divisor."""
    axes = (
        range(w.ndim) if axis is None else [a % w.ndim for a in (axis if isinstance(axis, (list, tuple)) else [axis])]
    )
    kept = [a for a in range(w.ndim) if a not in axes]
    result = w.copy()
    for index in np.ndindex(*[w.shape[a] for a in kept]):
        at = [slice(None)] * w.ndim
        for a, i in zip(kept, index, strict=True):
            at[a] = i
        norm = math.sqrt(math.fsum(abs(v) ** 2 for v in np.ravel(w[tuple(at)])))
        result[tuple(at)] = w[tuple(at)] * wanted(norm) / (norm + 1e-7)
    return result


# ---- values ----------------------------------------------------------------------------------------------------------


def test_hand_values():
    w = np.array([[3.0, 0.3], [4.0, 0.4]])
    np.testing.assert_allclose(MaxNorm(2)(w), [[1.2, 0.3], [1.6, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(
        MaxNorm(2, axis=1)(w)[0], [2 * 3 / math.hypot(3, 0.3), 2 * 0.3 / math.hypot(3, 0.3)], rtol=1e-6
    )
    np.testing.assert_allclose(UnitNorm()(w), [[0.6, 0.6], [0.8, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(MinMaxNorm(1, 2)(w), [[1.2, 0.6], [1.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(NonNeg()(np.array([-1.0, 0.0, 2.0])), [0, 0, 2])


@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
@pytest.mark.parametrize(("make", "arguments", "wanted"), WANTED.values(), ids=WANTED)
def test_each_slice_is_scaled(make, arguments, wanted, axis):
    w = weights()
    before = w.copy()
    result = make(**arguments, axis=axis)(w)
    np.testing.assert_allclose(result, scaled_slice_by_slice(w, axis, wanted), rtol=1e-13)
    np.testing.assert_array_equal(w, before)


def test_the_default_axis_is_the_first_spatial_one():
    w = weights()
    np.testing.assert_array_equal(MaxNorm(0.5)(w), MaxNorm(0.5, axis=0)(w))
    assert np.all(np.sqrt(np.sum(MaxNorm(0.5)(w) ** 2, axis=0)) <= 0.5)


@pytest.mark.parametrize(("make", "arguments", "wanted"), WANTED.values(), ids=WANTED)
def test_complex_norms(make, arguments, wanted):
    w = weights(1) + 1j * weights(2)
    np.testing.assert_allclose(make(**arguments)(w), scaled_slice_by_slice(w, 0, wanted), rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("make", [MaxNorm, MinMaxNorm, UnitNorm, NonNeg])
def test_dtypes(make, dtype):
    w = weights(3).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    result = make()(w)
    assert result.dtype == w.dtype
    eps = float(ml_dtypes.finfo(w.dtype).eps)
    np.testing.assert_allclose(result.astype(np.float64), make()(w.astype(np.float64)), rtol=2 * eps)


def test_float16_norms_do_not_overflow():
    w = np.full((4, 1), 300, np.float16)  # 300^2 is beyond float16
    np.testing.assert_allclose(UnitNorm()(w).astype(float), 0.5, rtol=1e-3)


@pytest.mark.parametrize("make", [MaxNorm, MinMaxNorm, UnitNorm, NonNeg])
def test_zeros_stay_zeros_and_nan_shows(make):
    np.testing.assert_array_equal(make()(np.zeros((2, 2))), np.zeros((2, 2)))
    assert np.isnan(make()(np.array([[1.0, np.nan], [2.0, 1.0]]))[0, 1])


def test_nonneg_has_no_meaning_for_complex_weights():
    with pytest.raises(TypeError, match="NonNeg needs real weights. Received: w.dtype=complex64"):
        NonNeg()(np.ones(2, np.complex64))


@pytest.mark.parametrize("make", [MaxNorm, MinMaxNorm, UnitNorm, NonNeg])
def test_arrays_of_another_library_go_through_the_protocols(make):
    w = weights(4).astype(np.float32)
    np.testing.assert_array_equal(make()(DeviceArray(w)).host, make()(w))


# ---- identifiers and configs -----------------------------------------------------------------------------------------

NAMES = {
    "max_norm": MaxNorm, "MaxNorm": MaxNorm, "min_max_norm": MinMaxNorm, "MinMaxNorm": MinMaxNorm,
    "non_neg": NonNeg, "NonNeg": NonNeg, "unit_norm": UnitNorm, "UnitNorm": UnitNorm,
}  # fmt: skip
INSTANCES = {
    "max_norm": MaxNorm(),
    "max_norm-axes": MaxNorm(3.0, axis=[0, 1]),
    "min_max_norm": MinMaxNorm(0.5, 2.0, 0.9, axis=1),
    "non_neg": NonNeg(),
    "unit_norm": UnitNorm(axis=[0, 1, 2]),
}


def clipped(w):
    return np.clip(w, -1, 1)


@pytest.mark.parametrize(("name", "cls"), NAMES.items())
def test_every_name(name, cls):
    for spelling in (name, cls, {"class_name": name, "config": {}}):
        assert type(constraints.get(spelling)) is cls
    instance = cls()
    assert constraints.get(instance) is instance


def test_lower_case_classes():
    assert (constraints.max_norm, constraints.min_max_norm) == (MaxNorm, MinMaxNorm)
    assert (constraints.non_neg, constraints.unit_norm) == (NonNeg, UnitNorm)


def test_none_is_none():
    assert constraints.get(None) is None
    assert constraints.serialize(None) is None


@pytest.mark.parametrize(
    ("identifier", "message"),
    [
        ("maxnorm", "write 'max_norm' or 'MaxNorm'.* Received: constraint='maxnorm'"),
        ("nonneg", "write 'non_neg' or 'NonNeg'.* Received: constraint='nonneg'"),
        ("unitnorm", "write 'unit_norm' or 'UnitNorm'.* Received: constraint='unitnorm'"),
        ("max-norm", "Did you mean '(max_norm|MaxNorm)'"),
        (3, "`constraint` must be None.*Received: constraint=3"),
    ],
    ids=str,
)
def test_unknown_identifiers(identifier, message):
    with pytest.raises(ValueError, match=message):
        constraints.get(identifier)


@pytest.mark.parametrize("constraint", INSTANCES.values(), ids=INSTANCES)
def test_config_round_trip(constraint):
    config = constraints.serialize(constraint)
    again = constraints.get(json.loads(json.dumps(config)))
    assert type(again) is type(constraint)
    assert constraints.serialize(again) == config
    keras_2 = {"class_name": config["class_name"], "config": config["config"]}
    assert constraints.serialize(constraints.get(keras_2)) == config
    np.testing.assert_array_equal(again(weights()), constraint(weights()))


def test_custom_callables():
    assert constraints.get(clipped) is clipped
    config = constraints.serialize(clipped)
    assert config == {
        "module": "builtins",
        "class_name": "function",
        "config": "clipped",
        "registered_name": "function",
    }
    assert constraints.get(config, custom_objects={"clipped": clipped}) is clipped
    with pytest.raises(ValueError, match="custom_objects"):
        constraints.get(config)


def test_a_repr_shows_the_arguments():
    assert repr(MaxNorm(3.0, axis=[0, 1])) == "MaxNorm(max_value=3.0, axis=[0, 1])"


# ---- against Keras ---------------------------------------------------------------------------------------------------


@against_keras
@pytest.mark.parametrize("constraint", INSTANCES.values(), ids=INSTANCES)
def test_values_and_configs_are_keras(constraint):
    keras = live_keras()
    config = constraints.serialize(constraint)
    theirs = keras.constraints.get(json.loads(json.dumps(config)))
    assert keras.constraints.serialize(theirs) == config
    w = weights(5).astype(np.float32)
    w[0, 0, 0, :2] = 0
    np.testing.assert_allclose(constraint(w), keras.ops.convert_to_numpy(theirs(w)), rtol=1e-6)


@against_keras
def test_names_and_defaults_are_keras():
    keras = live_keras()
    from keras.src import constraints as source

    assert set(NAMES) == set(source.ALL_OBJECTS_DICT) - {"Constraint", "constraint"}
    for name in NAMES:
        theirs = keras.constraints.serialize(keras.constraints.get(name))
        assert constraints.serialize(constraints.get(name)) == theirs
