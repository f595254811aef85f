"""Initializers: fans and limits by hand, distributions by their moments, seeds, configs, and against Keras."""

import copy
import json
import math

import ml_dtypes
import numpy as np
import pytest
from live_keras import against_keras, live_keras

from cuconv import initializers, seeding

SNAKE_CASE = (
    "glorot_normal", "glorot_uniform", "he_normal", "he_uniform", "identity", "lecun_normal", "lecun_uniform", "ones",
    "orthogonal", "random_normal", "random_uniform", "stft", "truncated_normal", "variance_scaling", "zeros",
)  # fmt: skip
ALIASES = {"one": "Ones", "zero": "Zeros", "normal": "RandomNormal", "uniform": "RandomUniform"}
COMPATIBLE = {"IdentityInitializer": "Identity", "OrthogonalInitializer": "Orthogonal", "STFTInitializer": "STFT"}
RANDOM = tuple(name for name in SNAKE_CASE if name not in ("identity", "ones", "zeros", "stft"))
LARGE = (40, 50, 60)  # 120 000 values: moments are known to about 1 %


def camel_case(name):
    return {"stft": "STFT"}.get(name, name.title().replace("_", ""))


def shape_for(name):
    return {"identity": (3, 3), "stft": (8, 1, 5)}.get(name, (3, 4, 5))


# ---- values --------------------------------------------------------------------------------------------------------


FANS = {
    "scalar": ((), (1, 1)),
    "bias": ((7,), (7, 7)),
    "matrix": ((3, 5), (3, 5)),
    "conv1d": ((10, 9, 100), (90, 1000)),
    "conv2d-groups-4": ((3, 3, 16, 8), (144, 72)),
    "conv2d-transpose": ((3, 3, 7, 50), (63, 450)),
    "depthwise2d": ((5, 5, 64, 1), (1600, 25)),
    "conv3d": ((2, 3, 4, 5, 6), (120, 144)),
}


@pytest.mark.parametrize(("shape", "fans"), FANS.values(), ids=FANS)
def test_fans_come_from_the_stored_shape(shape, fans):
    assert initializers.compute_fans(shape) == fans


def test_fans_of_given_axes():
    assert initializers.compute_fans((2, 3, 4), input_axes=(0, 1), output_axes=(2,)) == (6, 4)
    assert initializers.compute_fans((2, 3, 4), input_axes=(0, 1)) == (6, 8)


GLOROT_LIMITS = {
    "DepthwiseConv2D(5), 64 channels": ((5, 5, 64, 1), 0.0608),
    "Conv2DTranspose(7, 3), 50 channels": ((3, 3, 7, 50), 0.1081),
    "Conv2D(8, 3, groups=4), 64 channels": ((3, 3, 16, 8), 0.1667),
}


@pytest.mark.parametrize(("shape", "limit"), GLOROT_LIMITS.values(), ids=GLOROT_LIMITS)
def test_glorot_uniform_limits(shape, limit):
    w = initializers.GlorotUniform(seed=1)(shape)
    assert np.abs(w).max() <= limit + 5e-5
    assert np.abs(w).max() > 0.99 * limit


FAN_IN, FAN_OUT = 2000, 2400  # of LARGE
STDDEVS = {
    "glorot_normal": math.sqrt(2 / (FAN_IN + FAN_OUT)),
    "glorot_uniform": math.sqrt(2 / (FAN_IN + FAN_OUT)),
    "he_normal": math.sqrt(2 / FAN_IN),
    "he_uniform": math.sqrt(2 / FAN_IN),
    "lecun_normal": math.sqrt(1 / FAN_IN),
    "lecun_uniform": math.sqrt(1 / FAN_IN),
    "random_normal": 0.05,
    "random_uniform": 0.05 / math.sqrt(3),
    "truncated_normal": 0.05 * 0.8796256610,
    "variance_scaling": math.sqrt(1 / FAN_IN),
}


@pytest.mark.parametrize("name", STDDEVS)
def test_mean_and_standard_deviation(name):
    w = initializers.get({"class_name": camel_case(name), "config": {"seed": 3}})(LARGE, "float64")
    stddev = STDDEVS[name]
    assert abs(w.mean()) < 4 * stddev / math.sqrt(w.size)
    assert w.std() == pytest.approx(stddev, rel=0.01)


@pytest.mark.parametrize("mode, fan", [("fan_in", 2000), ("fan_out", 2400), ("fan_avg", 2200)])
@pytest.mark.parametrize("distribution", ["truncated_normal", "untruncated_normal", "uniform", "normal", "Uniform"])
def test_variance_scaling(distribution, mode, fan):
    w = initializers.VarianceScaling(3.0, mode, distribution, seed=4)(LARGE, "float64")
    stddev = math.sqrt(3 / fan)
    assert w.std() == pytest.approx(stddev, rel=0.01)
    furthest = np.abs(w).max() / stddev
    if distribution.lower() == "uniform":
        assert furthest == pytest.approx(math.sqrt(3), rel=1e-3)
    elif distribution == "untruncated_normal":
        assert furthest > 3.5
    else:
        assert furthest == pytest.approx(2 / 0.8796256610, rel=1e-2)


def test_truncated_normal_is_cut_and_not_piled_up():
    w = initializers.TruncatedNormal(mean=1.0, stddev=0.5, seed=5)((200_000,), "float64")
    z = (w - 1) / 0.5
    assert np.abs(z).max() <= 2
    inside = math.erf(2 / math.sqrt(2))
    for cut in (0.5, 1.0, 1.5, 1.9):
        assert np.mean(np.abs(z) <= cut) == pytest.approx(math.erf(cut / math.sqrt(2)) / inside, abs=4e-3)


def test_normal_quantiles():
    z = initializers.RandomNormal(0.0, 1.0, seed=6)((200_000,), "float64")
    for cut in (0.5, 1.0, 2.0, 3.0):
        assert np.mean(np.abs(z) <= cut) == pytest.approx(math.erf(cut / math.sqrt(2)), abs=4e-3)
    assert np.abs(z).max() > 4


def test_uniform_is_flat():
    w = initializers.RandomUniform(2.0, 6.0, seed=7)((200_000,), "float64")
    counts, _ = np.histogram(w, bins=10, range=(2, 6))
    assert counts.sum() == w.size
    np.testing.assert_allclose(counts / w.size, 0.1, atol=4e-3)


@pytest.mark.parametrize("shape", [(3, 3, 2, 5), (7, 4), (2, 3, 40), (5, 5)], ids=str)
def test_orthogonal(shape):
    w = initializers.Orthogonal(gain=2.0, seed=8)(shape, "float64")
    assert w.shape == shape
    m = w.reshape(-1, shape[-1])
    gram = m.T @ m if m.shape[0] >= m.shape[1] else m @ m.T
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-13)


def test_orthogonal_prefers_no_direction():
    firsts = [initializers.Orthogonal(seed=seed)((3, 3), "float64") for seed in range(400)]
    np.testing.assert_allclose(np.mean(firsts, axis=0), 0, atol=0.15)  # standard error 0.03
    assert np.mean([np.linalg.det(w) > 0 for w in firsts]) == pytest.approx(0.5, abs=0.1)


def test_orthogonal_needs_two_axes():
    with pytest.raises(ValueError, match=r"at least two axes. Received: shape=\(3,\)"):
        initializers.Orthogonal()((3,))


def test_constants():
    np.testing.assert_array_equal(initializers.Zeros()((2, 3)), np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(initializers.Ones()((2,)), [1, 1])
    np.testing.assert_array_equal(initializers.Constant(2.5)((2, 2)), [[2.5, 2.5], [2.5, 2.5]])
    assert initializers.Constant(1 + 2j)((1,), "complex64")[0] == 1 + 2j
    np.testing.assert_array_equal(initializers.Identity(3.0)((2, 3)), [[3, 0, 0], [0, 3, 0]])
    with pytest.raises(ValueError, match=r"two axes. Received: shape=\(2, 2, 2\)"):
        initializers.Identity()((2, 2, 2))


def test_stft_is_the_short_time_fourier_transform():
    frame, bins = 16, 9
    signal = np.random.default_rng(0).normal(size=frame)
    transform = np.fft.rfft(signal)
    for side, expected in (("real", transform.real), ("imag", transform.imag)):
        kernel = initializers.STFT(side, window=None)((frame, 1, bins), "float64")
        np.testing.assert_allclose(signal @ kernel[:, 0], expected, atol=1e-13)


@pytest.mark.parametrize(
    ("window", "periodic", "expected"),
    [
        ("hann", False, np.hanning(8)),
        ("hamming", False, np.hamming(8)),
        ("blackman", False, np.blackman(8)),
        ("hann", True, np.hanning(9)[:8]),
        ("boxcar", False, np.ones(8)),
        (np.arange(8.0), False, np.arange(8.0)),
    ],
    ids=["hann", "hamming", "blackman", "hann-periodic", "boxcar", "array"],
)
def test_stft_windows_and_scalings(window, periodic, expected):
    plain = initializers.STFT("real", None)((8, 1, 5), "float64")[:, 0]
    scales = {"density": math.sqrt(np.sum(expected**2)), "spectrum": np.sum(np.abs(expected)), None: 1.0}
    for scaling, scale in scales.items():
        kernel = initializers.STFT("real", window, scaling, periodic)((8, 1, 5), "float64")[:, 0]
        np.testing.assert_allclose(kernel, plain * expected[:, None] / scale, atol=1e-15)


def test_stft_of_a_single_sample():
    assert initializers.STFT()((1, 1, 2)).tolist() == [[[1, 1]]]


def test_stft_errors():
    with pytest.raises(ValueError, match="`side` must be one of 'real', 'imag'. Received: side='left'"):
        initializers.STFT("left")
    with pytest.raises(ValueError, match="`scaling` must be one of .*None. Received: scaling='loud'"):
        initializers.STFT(scaling="loud")
    with pytest.raises(ValueError, match="`window` must be one of .*'hann'.*Received: window='door'"):
        initializers.STFT(window="door")
    with pytest.raises(ValueError, match=r"STFT makes kernels \(frame, 1, bins\) only. Received: shape=\(8, 2, 5\)"):
        initializers.STFT()((8, 2, 5))
    with pytest.raises(ValueError, match=r"`window` must have the shape \(8,\). Received: window.shape=\(7,\)"):
        initializers.STFT(window=np.ones(7))((8, 1, 5))


# ---- dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("name", SNAKE_CASE)
def test_dtypes_are_one_set_of_values_rounded(name, dtype):
    initializer = initializers.get(name)
    shape = shape_for(name)
    w = initializer(shape, dtype)
    assert type(w) is np.ndarray
    assert w.dtype == (np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype))
    assert w.shape == shape
    np.testing.assert_array_equal(w, initializer(shape, "float64").astype(w.dtype))
    assert not np.any(w.imag) if w.dtype.kind == "c" else True


def test_float32_is_the_default():
    assert initializers.Zeros()((2,)).dtype == np.float32
    assert initializers.get("he_normal")((2, 2), None).dtype == np.float32
    custom = initializers.get(lambda shape, dtype=None: np.ones(shape))
    assert custom((2, 2)).dtype == custom((2, 2), None).dtype == np.float32


# ---- seeds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANDOM)
def test_seeds(name):
    cls = getattr(initializers, camel_case(name))
    shape = (3, 4, 5)
    seeded, unseeded, other = cls(seed=9), cls(), cls()
    np.testing.assert_array_equal(seeded(shape), seeded(shape))
    np.testing.assert_array_equal(seeded(shape), cls(seed=9)(shape))
    np.testing.assert_array_equal(unseeded(shape), unseeded(shape))
    assert np.any(seeded(shape) != cls(seed=10)(shape))
    assert np.any(unseeded(shape) != other(shape))
    assert seeded.get_config()["seed"] == 9
    assert unseeded.get_config()["seed"] is None
    np.testing.assert_array_equal(copy.deepcopy(unseeded)(shape), unseeded(shape))


def test_set_random_seed_repeats_what_has_no_seed():
    drawn = []
    for seed in (11, 11, 12):
        seeding.set_random_seed(seed)
        drawn.append([initializers.get("glorot_uniform")((2, 3)), initializers.get("glorot_uniform")((2, 3))])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.all(drawn[0][0] != drawn[0][1])
    assert np.all(drawn[0][0] != drawn[2][0])


@pytest.mark.parametrize("seed", [-1, 1.5, "1", True, [1]], ids=repr)
def test_seeds_are_integers(seed):
    with pytest.raises(ValueError, match="`seed` must be an integer >= 0. Received: seed="):
        initializers.RandomNormal(seed=seed)
    with pytest.raises(ValueError, match="`seed` must be an integer >= 0. Received: seed="):
        seeding.set_random_seed(seed)


def test_numpy_and_huge_seeds():
    assert initializers.RandomNormal(seed=np.int64(3)).get_config()["seed"] == 3
    assert type(initializers.RandomNormal(seed=np.int64(3)).get_config()["seed"]) is int
    initializers.RandomNormal(seed=2**70)((2,))


def test_seeding_leaves_other_generators_alone():
    np.random.seed(1)
    expected = np.random.random()
    np.random.seed(1)
    seeding.set_random_seed(5)
    initializers.RandomNormal()((3,))
    assert np.random.random() == expected


# ---- identifiers ---------------------------------------------------------------------------------------------------


def halves(shape, dtype=None):
    return np.full(shape, 0.5, dtype)


class Ramp:
    """A custom initializer without our base class."""

    def __init__(self, step=1.0):
        self.step = step

    def __call__(self, shape, dtype=None):
        return (self.step * np.arange(math.prod(shape))).reshape(shape).astype(dtype)

    def get_config(self):
        return {"step": self.step}


@pytest.mark.parametrize("name", SNAKE_CASE)
def test_every_name(name):
    cls = getattr(initializers, camel_case(name))
    for spelling in (name, camel_case(name), cls, {"class_name": camel_case(name), "config": {}}):
        assert type(initializers.get(spelling)) is cls
    assert getattr(initializers, name) is cls
    instance = cls()
    assert initializers.get(instance) is instance


@pytest.mark.parametrize(("alias", "name"), {**ALIASES, **COMPATIBLE}.items())
def test_aliases(alias, name):
    assert type(initializers.get(alias)).__name__ == name


def test_none_is_the_fallback():
    assert initializers.get(None) is None
    assert type(initializers.get(None, "zeros")) is initializers.Zeros
    assert type(initializers.get("ones", "zeros")) is initializers.Ones


@pytest.mark.parametrize("name", ["constant", "Constant"])
def test_the_name_constant_lacks_a_value(name):
    message = rf"needs its value: write `cuconv.initializers.Constant\(value\)`.*Received: initializer='{name}'"
    with pytest.raises(ValueError, match=message):
        initializers.get(name)
    assert initializers.get({"class_name": name, "config": {"value": 3}})((2,)).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("identifier", "message"),
    [
        ("zzz", "Names: .*Zeros.*Received: initializer='zzz'"),
        ("GlorotUnifrom", "Did you mean '(GlorotUniform|glorot_uniform)'"),
        (0.5, "`initializer` must be None.*Received: initializer=0.5"),
        ([1, 2], r"`initializer` must be None.*Received: initializer=\[1, 2\] \(of type list\)"),
        ({"class_name": "Zeros", "config": {}, "module": None}, "not part of cuconv"),
        ({"class_name": "Zeros", "config": "x"}, "a dict `config`"),
    ],
    ids=str,
)
def test_unknown_identifiers(identifier, message):
    with pytest.raises(ValueError, match=message):
        initializers.get(identifier)


def test_an_array():
    values = np.arange(6.0).reshape(2, 3)
    initializer = initializers.get(values)
    w = initializer((2, 3), "float32")
    np.testing.assert_array_equal(w, values)
    assert w.dtype == np.float32
    assert not np.shares_memory(initializer((2, 3), "float64"), values)
    with pytest.raises(ValueError, match=r"must have the weight's shape \(3, 2\). Received: shape=\(2, 3\)"):
        initializer((3, 2))
    with pytest.raises(ValueError, match="must have the weight's shape"):
        initializers.get(np.ones((1, 3)))((2, 3))  # no broadcasting
    again = initializers.get(json.loads(json.dumps(initializers.serialize(initializer))))
    np.testing.assert_array_equal(again((2, 3)), values)


def test_a_bfloat16_array_survives_its_config():
    values = np.array([0.5, -3.0], ml_dtypes.bfloat16)
    config = initializers.serialize(initializers.get(values))
    assert config["config"]["value"] == {
        "class_name": "__numpy__",
        "config": {"value": [0.5, -3.0], "dtype": "bfloat16"},
    }
    np.testing.assert_array_equal(initializers.get(json.loads(json.dumps(config))).value, values)


def test_custom_callables():
    initializer = initializers.get(halves)
    assert initializer((2, 2), "bfloat16").tolist() == [[0.5, 0.5], [0.5, 0.5]]
    config = initializers.serialize(initializer)
    assert config == {"module": "builtins", "class_name": "function", "config": "halves", "registered_name": "function"}
    assert initializers.get(config, custom_objects={"halves": halves})((1,)) == 0.5
    ramp = initializers.get(Ramp(2.0))
    assert ramp((3,), "float16").tolist() == [0, 2, 4]
    config = initializers.serialize(ramp)
    assert config == {"module": __name__, "class_name": "Ramp", "config": {"step": 2.0}, "registered_name": "Ramp"}
    assert initializers.get(config, custom_objects={"Ramp": Ramp})((2,)).tolist() == [0, 2]
    assert initializers.get("Ramp", custom_objects={"Ramp": Ramp})((2,)).tolist() == [0, 1]
    with pytest.raises(ValueError, match="custom_objects"):
        initializers.get(config)
    with pytest.raises(ValueError, match=r"must return an array of shape \(2, 3\). Received: shape=\(3,\)"):
        initializers.get(lambda shape, dtype=None: np.ones(3))((2, 3))


def test_a_subclass_of_a_built_in_is_not_mistaken_for_it():
    class Zeros(initializers.Zeros):
        pass

    assert initializers.serialize(Zeros())["module"] == __name__


# ---- configs -------------------------------------------------------------------------------------------------------

INSTANCES = {
    "constant": initializers.Constant(3),
    "constant-numpy": initializers.Constant(np.float32(2)),
    "constant-array": initializers.Constant(np.ones(3)),
    "zeros": initializers.Zeros(),
    "identity": initializers.Identity(),
    "random_normal": initializers.RandomNormal(1.0, 2.0, seed=3),
    "random_uniform": initializers.RandomUniform(1.0, 2.0),
    "truncated_normal": initializers.TruncatedNormal(1.0, 2.0, seed=3),
    "variance_scaling": initializers.VarianceScaling(2.0, "fan_out", "normal", seed=1, input_axes=[0], output_axes=[1]),
    "glorot_uniform": initializers.GlorotUniform(seed=5),
    "he_normal": initializers.HeNormal(),
    "orthogonal": initializers.Orthogonal(gain=0.5, seed=2),
    "stft": initializers.STFT("imag", "hamming", "spectrum", True),
    "stft-array": initializers.STFT(window=np.ones(4)),
}


@pytest.mark.parametrize("initializer", INSTANCES.values(), ids=INSTANCES)
def test_config_round_trip(initializer):
    config = initializers.serialize(initializer)
    again = initializers.get(json.loads(json.dumps(config)))
    assert type(again) is type(initializer)
    assert initializers.serialize(again) == config
    keras_2 = {"class_name": config["class_name"], "config": config["config"]}
    assert initializers.serialize(initializers.get(keras_2)) == config


def test_the_gain_of_an_identity_is_kept():
    assert initializers.get(initializers.serialize(initializers.Identity(3.0))).gain == 3


def test_config_dicts_of_old_files():
    glorot = {"scale": 1.0, "mode": "fan_avg", "distribution": "uniform", "seed": None}
    assert np.abs(initializers.get({"class_name": "VarianceScaling", "config": glorot})((3, 3, 16, 8))).max() <= 1 / 6
    first = {"class_name": "GlorotUniform", "config": {"seed": None, "dtype": "float32"}}
    assert type(initializers.get(first)) is initializers.GlorotUniform


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "`scale` must be positive. Received: scale=0"),
        ({"mode": "fan"}, "`mode` must be one of 'fan_in', 'fan_out', 'fan_avg'. Received: mode='fan'"),
        ({"distribution": "cauchy"}, "`distribution` must be one of .* Received: distribution='cauchy'"),
    ],
    ids=["scale", "mode", "distribution"],
)
def test_variance_scaling_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        initializers.VarianceScaling(**arguments)


def test_a_base_class_says_what_is_missing():
    with pytest.raises(NotImplementedError, match=r"Empty must define `values\(shape\)`"):
        type("Empty", (initializers.Initializer,), {})()((2,))


# ---- against Keras -------------------------------------------------------------------------------------------------


@against_keras
def test_names_are_keras():
    keras = live_keras()
    from keras.src import initializers as source

    theirs = set(source.ALL_OBJECTS_DICT) - {"Initializer", "initializer"}
    ours = {*SNAKE_CASE, *map(camel_case, SNAKE_CASE), *ALIASES, *COMPATIBLE, "constant", "Constant"}
    assert ours == theirs
    for name in theirs - {"constant", "Constant"}:
        expected = keras.initializers.serialize(keras.initializers.get(name))
        assert initializers.serialize(initializers.get(name)) == expected
        assert initializers.serialize(initializers.get(expected)) == expected


@against_keras
@pytest.mark.parametrize("initializer", INSTANCES.values(), ids=INSTANCES)
def test_configs_are_keras(initializer):
    keras = live_keras()
    config = initializers.serialize(initializer)
    theirs = keras.initializers.get(json.loads(json.dumps(config)))
    assert type(theirs).__name__ == type(initializer).__name__
    assert keras.initializers.serialize(theirs) == config


@against_keras
@pytest.mark.parametrize("shape", [shape for shape, _ in FANS.values()], ids=FANS)
def test_fans_are_keras(shape):
    live_keras()
    from keras.src.initializers.random_initializers import compute_fans

    assert initializers.compute_fans(shape) == compute_fans(shape)


@against_keras
@pytest.mark.parametrize("name", STDDEVS)
def test_moments_are_keras(name):
    keras = live_keras()
    keras.utils.set_random_seed(1)
    seeding.set_random_seed(1)
    ours = initializers.get(name)(LARGE, "float64")
    theirs = keras.ops.convert_to_numpy(keras.initializers.get(name)(LARGE, "float64"))
    assert ours.std() == pytest.approx(theirs.std(), rel=0.01)
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        assert np.quantile(ours, share) == pytest.approx(np.quantile(theirs, share), abs=0.02 * theirs.std())


@against_keras
@pytest.mark.parametrize("periodic", [False, True], ids=["symmetric", "periodic"])
@pytest.mark.parametrize("side", ["real", "imag"])
@pytest.mark.parametrize("window", [*initializers.COSINE_WINDOWS, None])
def test_stft_is_keras(window, side, periodic):
    keras = live_keras()
    pytest.importorskip("scipy")
    for scaling in ("density", "spectrum", None):
        for shape in ((12, 1, 9), (7, 1, 3), (1, 1, 2)):
            arguments = {"side": side, "window": window, "scaling": scaling, "periodic": periodic}
            theirs = keras.ops.convert_to_numpy(keras.initializers.STFT(**arguments)(shape, dtype="float64"))
            np.testing.assert_allclose(initializers.STFT(**arguments)(shape, "float64"), theirs, atol=1e-12)


@against_keras
def test_keras_objects_serve_as_callables():
    keras = live_keras()
    w = initializers.get(keras.initializers.Constant(2.0))((2, 3), "float32")
    assert type(w) is np.ndarray and w.tolist() == [[2, 2, 2], [2, 2, 2]]
