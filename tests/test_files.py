"""Files of Keras and safetensors without a live Keras: what it wrote is read, and what is written comes back.

tests/golden holds files of Keras 3.15.1. Files in the layouts of Keras 1 and 2, which cannot be installed beside it,
are made here with h5py as their sources write them.
"""

import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import oracle
import pytest
from compare import assert_close
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import PLAIN
from strategies import examples
from test_weights import model_of_everything

from cuconv import cli, layers
from cuconv.files import keras
from cuconv.models import Input, Sequential, load_model, load_weights, save_weights

GOLDEN = Path(__file__).parent / "golden"
MODELS = ["keras", "h5"]
WEIGHTS = ["weights.h5", "h5", "safetensors"]
each_model_format = pytest.mark.parametrize("suffix", MODELS)
each_weight_format = pytest.mark.parametrize("suffix", WEIGHTS)


@pytest.fixture(autouse=True)
def names_start_again():
    layers.reset_names()


# --- Files of Keras 3 --------------------------------------------------------------------------------------------


def check_golden(model):
    known = np.load(GOLDEN / "files.npz")
    assert len(model.weights) == len([name for name in known.files if name[0] == "w"])
    for i, w in enumerate(model.weights):
        assert np.array_equal(w, known[f"w{i}"]) and w.flags.writeable
    for i, y in enumerate(model([known["x0"], known["x1"]])):
        assert_close(y, known[f"y{i}"].astype("f8"), dtype="float32", terms=100)


@each_model_format
def test_a_model_that_keras_saved(suffix):
    check_golden(load_model(GOLDEN / f"keras.{suffix}"))


@pytest.mark.parametrize("suffix", ["keras", "h5", "weights.h5"])
def test_weights_that_keras_saved(suffix):
    model = load_model(GOLDEN / "keras.keras")
    for w in model.weights:
        w[...] = np.nan
    load_weights(model, GOLDEN / f"keras.{suffix}")
    check_golden(model)


def entries(path):
    """Every dataset and attribute of an HDF5 file, but those that tell who wrote it."""
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = (item.dtype, item[()].tobytes())
        for key in item.attrs:
            if key not in ("backend", "model_config", "keras_version"):
                found[name, key] = np.asarray(item.attrs[key]).tolist()

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def test_the_weights_file_is_that_of_keras(tmp_path):
    """Every group, dataset and name but that of the ConvLSTM's cell, which only Keras has."""
    load_model(GOLDEN / "keras.keras").save_weights(tmp_path / "m.weights.h5")
    theirs = entries(GOLDEN / "keras.weights.h5")
    theirs.pop(("layers/conv_lstm1d/cell/vars", "name"))
    assert entries(tmp_path / "m.weights.h5") == theirs


# --- There and back ----------------------------------------------------------------------------------------------


def same_bytes(one, other):
    return [(w.dtype, w.tobytes()) for w in one.weights] == [(w.dtype, w.tobytes()) for w in other.weights]


def randomized(model, seed=0):
    rng = np.random.default_rng(seed)
    for w in model.weights:
        w[...] = rng.standard_normal(w.shape) * (1 + 1j if w.dtype.kind == "c" else 1)
    return model


@each_model_format
def test_model_round_trip(suffix, tmp_path):
    model = randomized(model_of_everything())
    model.save(tmp_path / f"m.{suffix}")
    again = load_model(tmp_path / f"m.{suffix}")
    assert again.get_config() == model.get_config() and same_bytes(again, model)
    x = np.random.default_rng(0).standard_normal((3, 12, 4)).astype("f")
    assert np.array_equal(again(x), model(x))
    again.forward(x)
    assert again.backward(np.ones_like(model(x))).shape == x.shape
    model.save(tmp_path / f"n.{suffix}")
    assert (tmp_path / f"n.{suffix}").read_bytes() == (tmp_path / f"m.{suffix}").read_bytes(), "the same bytes"


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_float16", "complex64"])
def test_every_layer_and_dtype_in_every_format(case, dtype, tmp_path):
    arguments = {}
    if dtype == "complex64" and "LSTM" in case.layer:
        arguments = {"activation": "linear", "recurrent_activation": "linear", "recurrent_initializer": "zeros"}
    model = randomized(Sequential([Input(case.shape[1:]), case.make(dtype=dtype, **arguments)]))
    for suffix in MODELS:
        model.save(tmp_path / f"m.{suffix}")
        again = load_model(tmp_path / f"m.{suffix}")
        assert same_bytes(again, model) and again.get_config() == model.get_config()
    for suffix in WEIGHTS:
        save_weights(model, tmp_path / f"w.{suffix}")
        for w in again.weights:
            w[...] = np.nan
        load_weights(again, tmp_path / f"w.{suffix}")
        assert same_bytes(again, model)


@st.composite
def stacks(draw):
    """Models of a few 1-D layers with any arguments."""
    kinds = st.sampled_from(
        ["Conv1D", "DepthwiseConv1D", "SeparableConv1D", "Conv1DTranspose", "inner", "UpSampling1D"]
    )

    def layer(kind, place):
        if kind == "inner":
            stack = [
                layer(draw(kinds.filter(lambda k: k != "inner")), f"{place}_{i}")
                for i in range(draw(st.integers(1, 2)))
            ]
            return Sequential(stack, name=f"s{place}")
        if kind == "UpSampling1D":
            return layers.UpSampling1D(draw(st.integers(1, 3)), name=f"l{place}")
        options = {
            "kernel_size": draw(st.integers(1, 3)),
            "padding": draw(st.sampled_from(["valid", "same"])),
            "use_bias": draw(st.booleans()),
            "activation": draw(st.sampled_from([None, "relu", "tanh"])),
            "trainable": draw(st.booleans()),
            "dtype": draw(st.sampled_from(["float32", "bfloat16", "mixed_float16", "float64"])),
            "name": draw(st.sampled_from([f"l{place}", f"\u00fc {place}"])),
        }
        if kind != "DepthwiseConv1D":
            options["filters"] = draw(st.integers(1, 4))
        return getattr(layers, kind)(**options)

    return Sequential([Input((16, 2)), *(layer(draw(kinds), i) for i in range(draw(st.integers(1, 4))))], name="m")


@given(stacks(), st.sampled_from(MODELS), st.sampled_from(WEIGHTS), st.integers(0, 99))
@examples(60)
def test_any_stack_comes_back(tmp_path_factory, model, suffix, weights_suffix, seed):
    randomized(model, seed)
    folder = tmp_path_factory.mktemp("stack")
    model.save(folder / f"m.{suffix}")
    again = load_model(folder / f"m.{suffix}")
    assert same_bytes(again, model) and again.get_config() == model.get_config()
    save_weights(model, folder / f"w.{weights_suffix}")
    for w in again.weights:
        w[...] = np.nan
    load_weights(again, folder / f"w.{weights_suffix}")
    assert same_bytes(again, model)


@pytest.mark.parametrize("suffix", [*WEIGHTS, "npz"])
def test_a_single_layer(suffix, tmp_path):
    for layer in (layers.Conv1D(3, 2), layers.ConvLSTM1D(2, 2)):
        layer.build((None, 5, 2) if layer.rank == 1 and "LSTM" not in type(layer).__name__ else (None, 3, 5, 2))
        save_weights(randomized(layer), tmp_path / f"w.{suffix}")
        kept = layer.get_weights()
        for w in layer.weights:
            w[...] = np.nan
        load_weights(layer, tmp_path / f"w.{suffix}")
        assert all(np.array_equal(a, b) for a, b in zip(kept, layer.weights))


def test_safetensors_files_name_weights_by_path(tmp_path):
    from safetensors.numpy import load_file

    model = randomized(model_of_everything())
    model.save_weights(tmp_path / "w.safetensors")
    found = load_file(tmp_path / "w.safetensors")
    assert set(found) == set(model._named_weights())
    assert np.array_equal(found["shared/kernel"], model.get_layer("shared").kernel)


def test_weights_have_the_dtype_of_the_config(tmp_path):
    """Whatever the file's: other sizes and other byte orders are cast."""
    model = randomized(Sequential([Input((5, 2)), layers.Conv1D(3, 2, name="c")]))
    model.save(tmp_path / "m.h5")
    place = "model_weights/c/c/kernel"
    for dtype in (">f4", "<f8", ">f8"):
        with h5py.File(tmp_path / "m.h5", "a") as file:
            values = file[place][()].astype(dtype)
            del file[place]
            file[place] = values
        again = load_model(tmp_path / "m.h5")
        assert again.weights[0].dtype == np.float32 and again.weights[0].dtype.isnative
        assert same_bytes(again, model) and all(w.flags.writeable for w in again.weights)


def test_bfloat16_is_marked_as_keras_marks_it(tmp_path):
    Sequential([Input((5, 2)), layers.Conv1D(3, 2, dtype="bfloat16")]).save_weights(tmp_path / "w.weights.h5")
    with h5py.File(tmp_path / "w.weights.h5") as file:
        stored = file["layers/conv1d/vars/0"]
        assert (stored.dtype, stored.attrs["dtype"]) == (np.dtype("V2"), "bfloat16")


def test_float32_files_load_into_other_dtypes(tmp_path):
    def make(dtype):
        return Sequential([Input((5, 2)), layers.Conv1D(3, 2, dtype=dtype, name="c")])

    model, half = randomized(make("float32")), make("bfloat16")
    for suffix in [*WEIGHTS, "npz"]:
        save_weights(model, tmp_path / f"w.{suffix}")
        load_weights(half, tmp_path / f"w.{suffix}")
        assert np.array_equal(half.weights[0], model.weights[0].astype(half.weights[0].dtype))
        save_weights(randomized(make("complex64")), tmp_path / f"w.{suffix}")
        with pytest.raises(ValueError, match="is real"):
            load_weights(model, tmp_path / f"w.{suffix}")


# --- Keras 1 and 2 -----------------------------------------------------------------------------------------------


def legacy(path, parts, config=None, version=b"2.2.4", backend=b"tensorflow"):
    """A file as Keras 2 writes it: `parts` holds (layer, [(weight's name, array)])."""
    with h5py.File(path, "w") as file:
        root = file if config is None else file.create_group("model_weights")
        if config is not None:
            file.attrs["model_config"] = json.dumps(config).encode()
        root.attrs["layer_names"] = [name.encode() for name, _ in parts]
        if version:
            root.attrs["keras_version"] = version
            root.attrs["backend"] = backend
        for name, arrays in parts:
            group = root.create_group(name)
            group.attrs["weight_names"] = [weight.encode() for weight, _ in arrays]
            for weight, array in arrays:
                group.create_dataset(weight, array.shape, dtype=array.dtype)[...] = array
    return path


KERAS_2 = {
    "class_name": "Sequential",
    "config": {
        "name": "sequential_1",
        "layers": [
            {
                "class_name": "DepthwiseConv2D",
                "config": {
                    "name": "dw",
                    "trainable": True,
                    "batch_input_shape": [None, 5, 4, 2],
                    "dtype": "float32",
                    "kernel_size": [2, 2],
                    "strides": [1, 1],
                    "padding": "valid",
                    "data_format": "channels_last",
                    "dilation_rate": [1, 1],
                    "groups": 1,
                    "activation": "relu",
                    "use_bias": True,
                    "kernel_initializer": {"class_name": "VarianceScaling", "config": {"scale": 1.0, "seed": None}},
                    "bias_initializer": {"class_name": "Zeros", "config": {}},
                    "depth_multiplier": 1,
                    "depthwise_initializer": {"class_name": "GlorotUniform", "config": {"seed": None}},
                    "depthwise_regularizer": None,
                    "depthwise_constraint": None,
                },
            },
            {
                "class_name": "Conv2D",
                "config": {
                    "name": "conv",
                    "dtype": {"class_name": "Policy", "config": {"name": "float32"}},
                    "filters": 3,
                    "kernel_size": [1, 1],
                    "kernel_regularizer": {"class_name": "L1L2", "config": {"l1": 0.0, "l2": 0.01}},
                },
            },
            {"class_name": "Activation", "config": {"name": "a", "trainable": True, "activation": "tanh"}},
        ],
    },
}


def test_a_model_of_keras_2(tmp_path):
    rng = np.random.default_rng(0)
    dw, db = rng.standard_normal((2, 2, 2, 1)).astype("f"), rng.standard_normal(2).astype("f")
    w, b = rng.standard_normal((1, 1, 2, 3)).astype("f"), rng.standard_normal(3).astype("f")
    parts = [
        ("dw", [("dw/depthwise_kernel:0", dw), ("dw/bias:0", db)]),
        ("conv", [("conv/kernel:0", w), ("conv/bias:0", b)]),
        ("a", []),
    ]
    model = load_model(legacy(tmp_path / "m.h5", parts, KERAS_2))
    x = rng.standard_normal((2, 5, 4, 2)).astype("f")
    middle = np.maximum(oracle.depthwise_conv(x, dw) + db, 0)
    assert_close(model(x), np.tanh(oracle.conv(middle, w) + b), dtype="float32", terms=10)
    load_weights(model, legacy(tmp_path / "w.h5", parts))
    assert np.array_equal(model.weights[0], dw)


def test_weights_of_tensorflows_keras(tmp_path):
    """Versions 2.13 to 2.15 wrote Keras 3's layout with another word."""
    model = randomized(model_of_everything())
    model.save_weights(tmp_path / "w.weights.h5")
    word = "_layer_checkpoint_dependencies"
    with h5py.File(tmp_path / "w.weights.h5", "a") as file:
        file.move("layers", word)
        file.move(f"{word}/sequential/layers", f"{word}/sequential/{word}")
    again = model_of_everything()
    load_weights(again, tmp_path / "w.weights.h5")
    assert same_bytes(again, model)


def test_weights_go_by_name_where_names_agree_and_by_order_else(tmp_path):
    model = Sequential([Input((5, 2)), layers.Conv1D(2, 1, name="a"), layers.Conv1D(2, 1, name="b")])
    one, two = [[("k", np.full((1, 2, 2), i, "f")), ("b", np.zeros(2, "f"))] for i in (1, 2)]
    load_weights(model, legacy(tmp_path / "w.h5", [("b", two), ("a", one)]))
    assert [w.flat[0] for w in model.weights] == [1, 0, 2, 0]
    load_weights(model, legacy(tmp_path / "w.h5", [("conv1d_7", two), ("conv1d_8", one)]))
    assert [w.flat[0] for w in model.weights] == [2, 0, 1, 0]


def test_what_is_not_trained_comes_last_in_a_nested_model(tmp_path):
    part = Sequential([layers.Conv1D(2, 1, name="a", trainable=False), layers.Conv1D(2, 1, name="b")], name="part")
    model = Sequential([Input((5, 2)), part])
    trained = [("b/kernel", np.full((1, 2, 2), 3, "f")), ("b/bias", np.full(2, 4, "f"))]
    frozen = [("a/kernel", np.full((1, 2, 2), 1, "f")), ("a/bias", np.full(2, 2, "f"))]
    load_weights(model, legacy(tmp_path / "w.h5", [("part", trained + frozen)]))
    assert [w.flat[0] for w in model.weights] == [1, 2, 3, 4]
    save_weights(model, tmp_path / "n.h5")
    with h5py.File(tmp_path / "n.h5") as file:
        names = ["part/b/kernel", "part/b/bias", "part/a/kernel", "part/a/bias"]
        assert list(file["part"].attrs["weight_names"]) == [name.encode() for name in names]


def test_long_lists_of_names(tmp_path):
    """Keras splits a list that does not fit an attribute."""
    names = [f"{'n' * 3000}{i}" for i in range(30)]
    model = randomized(Sequential([Input((2, 1)), *(layers.Conv1D(1, 1, name=name) for name in names)]))
    save_weights(model, tmp_path / "w.h5")
    with h5py.File(tmp_path / "w.h5") as file:
        assert "layer_names" not in file.attrs and "layer_names1" in file.attrs
    again = Sequential([Input((2, 1)), *(layers.Conv1D(1, 1, name=name) for name in names)])
    load_weights(again, tmp_path / "w.h5")
    assert same_bytes(again, model)


FIRST = {"data_format": "channels_first"}


@pytest.mark.parametrize(
    "layer, shape, to_keras_1",
    [
        (lambda: layers.Conv1D(3, 2), (None, 5, 4), lambda k: k[:, None]),
        (lambda: layers.Conv1D(3, 2), (None, 5, 4), lambda k: k[:, None].transpose(3, 2, 0, 1)),
        (lambda: layers.Conv2D(3, (2, 1)), (None, 5, 4, 2), lambda k: k),
        (lambda: layers.Conv2D(3, (2, 1), **FIRST), (None, 2, 5, 4), lambda k: k.transpose(3, 2, 0, 1)),
        (lambda: layers.Conv3D(3, (2, 1, 2), **FIRST), (None, 2, 5, 4, 3), lambda k: k.transpose(4, 3, 0, 1, 2)),
        (lambda: layers.Conv2DTranspose(3, (2, 1)), (None, 5, 4, 2), lambda k: k.transpose(0, 1, 3, 2)),
        (lambda: layers.Conv2DTranspose(3, (2, 1), **FIRST), (None, 2, 5, 4), lambda k: k.transpose(2, 3, 0, 1)),
    ],
    ids=["1-D", "1-D of 1.1", "2-D", "2-D first", "3-D first", "transpose", "transpose first"],
)
def test_kernels_of_keras_1(layer, shape, to_keras_1, tmp_path):
    layer = layer()
    layer.build(shape)
    kernel, bias = [np.random.default_rng(0).standard_normal(w.shape).astype("f") for w in layer.weights]
    stored = [("convolution_1_W", to_keras_1(kernel)), ("convolution_1_b", bias)]
    load_weights(layer, legacy(tmp_path / "w.h5", [("convolution_1", stored)], version=None))
    assert np.array_equal(layer.kernel, kernel) and np.array_equal(layer.bias, bias)


def test_gates_of_keras_1(tmp_path):
    layer = layers.ConvLSTM2D(3, 2)
    layer.build((None, 2, 5, 4, 2))
    kernel, recurrent, bias = [np.random.default_rng(0).standard_normal(w.shape).astype("f") for w in layer.weights]
    stored = []
    for word, gate in zip("icfo", (0, 2, 1, 3)):
        part = slice(3 * gate, 3 * gate + 3)
        stored += [(f"W_{word}", kernel[..., part]), (f"U_{word}", recurrent[..., part]), (f"b_{word}", bias[part])]
    load_weights(layer, legacy(tmp_path / "w.h5", [("convlstm2d_1", stored)], version=b"1.2.2"))
    assert all(np.array_equal(a, b) for a, b in zip(layer.weights, (kernel, recurrent, bias)))


def test_kernels_of_theano_are_flipped(tmp_path):
    layer = layers.Conv2D(3, (2, 3))
    layer.build((None, 5, 4, 2))
    kernel, bias = [np.random.default_rng(0).standard_normal(w.shape).astype("f") for w in layer.weights]
    stored = [("kernel:0", kernel[::-1, ::-1]), ("bias:0", bias)]
    load_weights(layer, legacy(tmp_path / "w.h5", [("c", stored)], backend=b"theano"))
    assert np.array_equal(layer.kernel, kernel)


# --- Mismatches --------------------------------------------------------------------------------------------------


@each_weight_format
def test_weights_of_another_model(suffix, tmp_path):
    def make(filters, name="c", more=()):
        return Sequential([Input((9, 2)), layers.Conv1D(filters, 3, name=name), *more])

    path = tmp_path / f"w.{suffix}"
    model = make(3)
    before = [w.tobytes() for w in model.weights]
    others = [
        make(4),
        make(3, more=[layers.Conv1D(2, 1, name="d")]),
        make(3, more=[layers.DepthwiseConv1D(2, name="e")]),
    ]
    for other in others:
        save_weights(other, path)
        with pytest.raises(ValueError, match="not the weights of.*Received: path"):
            load_weights(model, path)
        save_weights(model, path)
        with pytest.raises(ValueError, match="not the weights of.*Received: path"):
            load_weights(other, path)
    assert [w.tobytes() for w in model.weights] == before
    save_weights(make(4), path)
    with pytest.raises(ValueError, match=r"not the weights of 'sequential.*c/bias \(\(4,\) for \(3,\)\), c/kernel"):
        load_weights(model, path)


def test_paths(tmp_path):
    model = model_of_everything()
    for path in ("m.weights.h5", "m.safetensors", "m.pkl", "m"):
        with pytest.raises(ValueError, match="`path` must end in .*Received: path="):
            model.save(tmp_path / path)
        with pytest.raises(ValueError, match="`path` must end in .*Received: path="):
            load_model(tmp_path / path)
    with pytest.raises(ValueError, match="Model.save"):
        model.save_weights(tmp_path / "m.keras")
    save_weights(model, tmp_path / "w.h5")
    with pytest.raises(ValueError, match="use load_weights"):
        load_model(tmp_path / "w.h5")
    for suffix in (*MODELS, *WEIGHTS):
        with pytest.raises(FileNotFoundError):
            load_weights(model, tmp_path / f"missing.{suffix}")
        with pytest.raises(FileNotFoundError):
            save_weights(model, tmp_path / "missing" / "w.h5")
    assert os.listdir(tmp_path) == ["w.h5"]


def test_missing_libraries(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    model = model_of_everything()
    for action in (
        lambda: load_model(GOLDEN / "keras.keras"),
        lambda: load_model(GOLDEN / "keras.h5"),
        lambda: model.save(tmp_path / "m.keras"),
        lambda: model.save_weights(tmp_path / "m.safetensors"),
        lambda: load_weights(model, GOLDEN / "keras.weights.h5"),
    ):
        with pytest.raises(ImportError, match=r'pip install "cuconv\[files\]"'):
            action()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [*MODELS, "weights.h5", "safetensors"])
def test_an_interrupted_write_leaves_the_old_file(suffix, tmp_path, monkeypatch):
    model, path = model_of_everything(), tmp_path / f"m.{suffix}"
    save = model.save if suffix in MODELS else model.save_weights
    save(path)
    before = path.read_bytes()

    def fail(*arguments, **keywords):
        raise OSError("disk full")

    broken = [(os, "replace"), (os, "fsync")]
    broken += [] if suffix == "safetensors" else [(keras.hdf5, "write_array")]
    for place in broken:
        with monkeypatch.context() as patch:
            patch.setattr(*place, fail)
            with pytest.raises(OSError, match="disk full"):
                save(path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


# --- The command line --------------------------------------------------------------------------------------------


@each_model_format
def test_commands_take_models_of_keras(suffix, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = randomized(model_of_everything())
    model.save(f"m.{suffix}")
    x = np.random.default_rng(0).standard_normal((5, 12, 4)).astype("f")
    np.save("x.npy", x)
    assert cli.main(["run", f"m.{suffix}", "x.npy", "-o", "y.npy"]) == 0
    assert_close(np.load("y.npy"), model(x).astype("f8"), dtype="float32", terms=100)
    capsys.readouterr()
    Path(f"bad.{suffix}").write_bytes(Path(f"m.{suffix}").read_bytes()[:-9])
    assert cli.main(["run", f"bad.{suffix}", "x.npy", "-o", "z.npy"]) == 1
    assert "not an intact Keras file" in capsys.readouterr().err and not Path("z.npy").exists()
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert cli.main(["run", f"m.{suffix}", "x.npy", "-o", "z.npy"]) == 1
    assert 'pip install "cuconv[files]"' in capsys.readouterr().err
