"""Models and weights in files: what is written, what is read back, and what is refused."""

import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest
from layer_cases import PLAIN, outputs_of

from cuconv import layers
from cuconv.files import npz as weights
from cuconv.models import Input, Model, Sequential, load_model, load_weights, save_weights


def model_of_everything():
    x = Input((12, 4))
    shared = layers.Conv1D(4, 3, padding="same", activation="tanh", name="shared", kernel_regularizer="l2")
    inner = Sequential([layers.SeparableConv1D(3, 2), layers.UpSampling1D(2)], name="inner")
    y = inner(shared(shared(x)))
    return Model(x, layers.Conv1D(2, 1, name="head", trainable=False)(y))


@pytest.fixture
def saved(tmp_path):
    model = model_of_everything()
    model.save(tmp_path / "model.npz")
    return model, tmp_path / "model.npz"


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def rewrite(path, contents, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)


def manifest_of(contents):
    return json.loads(contents[weights.MANIFEST])


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


# --- There and back ----------------------------------------------------------------------------------------------


def test_model_round_trip(saved):
    model, path = saved
    again = load_model(path)
    x = np.random.default_rng(0).standard_normal((3, 12, 4)).astype("f")
    assert np.array_equal(again(x), model(x))
    assert again.get_config() == model.get_config()
    assert [w.tobytes() for w in again.weights] == [w.tobytes() for w in model.weights]
    assert len(again.trainable_weights) == len(model.trainable_weights)
    for w in again.weights:
        w += 1


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16", "complex64"])
def test_every_layer_and_dtype(case, dtype, tmp_path):
    arguments = (
        {"activation": "linear", "recurrent_activation": "linear"}
        if dtype == "complex64" and "LSTM" in case.layer
        else {}
    )
    if dtype == "complex64" and "LSTM" in case.layer:
        arguments["recurrent_initializer"] = "glorot_uniform"
    model = Sequential([Input(case.shape[1:], dtype="float32"), case.make(dtype=dtype, **arguments)])
    for w in model.weights:
        w[...] = np.random.default_rng(0).standard_normal(w.shape) * (1 + 1j if w.dtype.kind == "c" else 1)
    model.save(tmp_path / "m.npz")
    again = load_model(tmp_path / "m.npz")
    assert [w.dtype for w in again.weights] == [w.dtype for w in model.weights]
    assert [w.tobytes() for w in again.weights] == [w.tobytes() for w in model.weights]
    x = case.input(dtype="float32")
    for y, same in zip(outputs_of(again(x)), outputs_of(model(x)), strict=True):
        assert np.array_equal(y, same)


def test_the_file_is_plain_arrays_and_one_json(saved):
    model, path = saved
    opened = np.load(path, allow_pickle=False)
    names = ["shared/kernel", "shared/bias", "inner/separable_conv1d", "head/kernel", "head/bias"]
    assert names[0] in opened.files and weights.MANIFEST in opened.files
    assert np.array_equal(opened["shared/kernel"], model.get_layer("shared").kernel)
    contents = members(path)
    manifest = manifest_of(contents)
    assert (manifest["format"], manifest["version"]) == ("cuconv", 1)
    assert [entry["name"] for entry in manifest["weights"]] == model.weight_names
    assert sorted(contents) == sorted([weights.MANIFEST, *(f"{name}.npy" for name in model.weight_names)])
    assert not any(b"pickle" in data or data[:2] == b"\x80\x04" for data in contents.values())


def test_the_same_model_gives_the_same_bytes(saved, tmp_path):
    model, path = saved
    model.save(tmp_path / "again.npz")
    assert path.read_bytes() == (tmp_path / "again.npz").read_bytes()


@pytest.mark.parametrize(
    "make", [model_of_everything, lambda: built(layers.Conv1D(3, 2), (None, 5, 2))], ids=["model", "layer"]
)
def test_weights_round_trip(make, tmp_path):
    one, other = make(), make()
    layers.reset_names()
    save_weights(one, tmp_path / "w.npz")
    if isinstance(one, Model):
        other = Model.from_config(one.get_config())
    kept = other.weights
    load_weights(other, tmp_path / "w.npz")
    assert all(a is b for a, b in zip(kept, other.weights, strict=True)), "in place"
    assert all(np.array_equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))
    with pytest.raises(ValueError, match="load_weights"):
        load_model(tmp_path / "w.npz")


def built(layer, shape):
    layer.build(shape)
    return layer


def test_model_methods(saved, tmp_path):
    model, path = saved
    model.save_weights(tmp_path / "w.npz")
    before = model.get_weights()
    for w in model.weights:
        w[...] = 0
    model.load_weights(tmp_path / "w.npz")
    assert all(np.array_equal(a, b) for a, b in zip(before, model.weights, strict=True))
    model.load_weights(path)


def test_custom_objects(tmp_path):
    class Thrice(layers.Layer):
        def _record(self, *inputs, training):
            return inputs[0] * 3, None

        def compute_output_shape(self, input_shape):
            return tuple(input_shape)

    def steps(x):
        return np.floor(x)

    Sequential([Input((4, 2)), layers.Conv1D(2, 1, activation=steps), Thrice()]).save(tmp_path / "m.npz")
    with pytest.raises(ValueError, match="cannot be built: Unknown"):
        load_model(tmp_path / "m.npz")
    again = load_model(tmp_path / "m.npz", custom_objects={"steps": steps, "Thrice": Thrice})
    assert np.all(again(np.ones((1, 4, 2), "f")) % 3 == 0)


# --- Writing -----------------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fail(*arguments, **keywords):
        raise OSError("disk full")

    for broken in ((np.lib.format, "write_array"), (os, "replace"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(*broken, fail)
            with pytest.raises(OSError, match="disk full"):
                model.save(path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name], "nothing is left behind"
    model.save(path)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="not built|no weights"):
        Sequential([layers.Conv1D(2, 3)]).save_weights(tmp_path / "w.npz")
    with pytest.raises(ValueError, match=r"\.npz"):
        model_of_everything().save(tmp_path / "model.pkl")
    with pytest.raises(FileNotFoundError):
        model_of_everything().save(tmp_path / "missing" / "model.npz")
    assert os.listdir(tmp_path) == []


def test_the_new_file_has_ordinary_permissions(saved):
    _, path = saved
    plain = path.parent / "plain"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode


# --- Damaged and hostile files -----------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "m.npz")
    with pytest.raises(ValueError, match=r"\.npz"):
        load_model(tmp_path / "m.pkl")


@pytest.mark.parametrize("part", [0, 1, 100, 0.5, 0.9, -1, -30])
def test_truncated_file(saved, part):
    _, path = saved
    data = path.read_bytes()
    end = int(len(data) * part) if isinstance(part, float) else part
    path.write_bytes(data[:end])
    with pytest.raises(ValueError, match="not an intact cuconv file"):
        load_model(path)


def test_every_flipped_byte_is_noticed_or_harmless(saved):
    model, path = saved
    data = bytearray(path.read_bytes())
    sound = [w.tobytes() for w in model.weights]
    noticed = 0
    for place in range(0, len(data), 37):
        data[place] ^= 0xFF
        path.write_bytes(data)
        data[place] ^= 0xFF
        try:
            again = load_model(path)
        except ValueError:
            noticed += 1
        else:
            assert [w.tobytes() for w in again.weights] == sound, f"byte {place}"
    assert noticed > 0.8 * len(range(0, len(data), 37))


@pytest.mark.parametrize(
    "data",
    [b"", b"PK\x05\x06" + bytes(18), b"\x89HDF\r\n\x1a\n" + bytes(100), npy(np.ones(3)), b"\x80\x04K\x01."],
    ids=["empty", "empty-zip", "hdf5", "npy", "pickle"],
)
def test_other_files(data, tmp_path):
    (tmp_path / "m.npz").write_bytes(data)
    with pytest.raises(ValueError, match="not an intact cuconv file"):
        load_model(tmp_path / "m.npz")


def test_numpys_own_archive_is_not_ours(tmp_path):
    np.savez(tmp_path / "m.npz", kernel=np.ones((3, 2, 2)))
    with pytest.raises(ValueError, match="not an intact cuconv file"):
        load_model(tmp_path / "m.npz")


def change_manifest(change):
    def damage(contents):
        manifest = manifest_of(contents)
        change(manifest)
        contents[weights.MANIFEST] = json.dumps(manifest)

    return damage


def grow_filters(manifest):
    for layer in manifest["model"]["config"]["layers"]:
        if layer["config"]["name"] == "head":
            layer["config"]["filters"] = 10**9


def set_entry(**changes):
    return change_manifest(lambda manifest: manifest["weights"][0].update(changes))


def add_array_of_no_layer(contents):
    entry = {"name": "ghost/kernel", "shape": [3], "dtype": "float32"}
    change_manifest(lambda manifest: manifest["weights"].append(entry))(contents)
    contents["ghost/kernel.npy"] = npy(np.ones(3, "f"))


DAMAGE = {
    "array-of-no-layer": add_array_of_no_layer,
    "no-manifest": lambda c: c.pop(weights.MANIFEST),
    "manifest-is-no-json": lambda c: c.update({weights.MANIFEST: b"{"}),
    "manifest-is-a-list": lambda c: c.update({weights.MANIFEST: b"[]"}),
    "manifest-is-deep": lambda c: c.update({weights.MANIFEST: b"[" * 100_000}),
    "manifest-is-huge": lambda c: c.update({weights.MANIFEST: c[weights.MANIFEST] + b" " * weights.MAX_MANIFEST_BYTES}),
    "other-format": change_manifest(lambda m: m.update(format="other")),
    "other-version": change_manifest(lambda m: m.update(version=2)),
    "missing-array": lambda c: c.pop("shared/bias.npy"),
    "surplus-array": lambda c: c.update({"surplus.npy": npy(np.ones(3))}),
    "surplus-file": lambda c: c.update({"../../evil.py": b"print()"}),
    "entry-twice": change_manifest(lambda m: m["weights"].append(m["weights"][0])),
    "shape-huge": set_entry(shape=[10**6, 10**6, 10**6]),
    "shape-negative": set_entry(shape=[-1, 4, 4]),
    "shape-text": set_entry(shape="344"),
    "shape-float": set_entry(shape=[3.0, 4, 4]),
    "dtype-object": set_entry(dtype="object"),
    "dtype-other": set_entry(dtype="float64"),
    "name-number": set_entry(name=3),
    "array-other-shape": lambda c: c.update({"shared/bias.npy": npy(np.ones(5, "f"))}),
    "array-other-dtype": lambda c: c.update({"shared/bias.npy": npy(np.ones(4, "f8"))}),
    "array-pickled": lambda c: c.update({"shared/bias.npy": pickled()}),
    "array-fortran": lambda c: c.update({"shared/kernel.npy": npy(np.asfortranarray(np.ones((3, 4, 4), "f")))}),
    "array-too-long": lambda c: c.update({"shared/bias.npy": npy(np.ones(4, "f")) + bytes(8)}),
    "array-short": lambda c: c.update({"shared/bias.npy": npy(np.ones(4, "f"))[:-8]}),
    "array-no-npy": lambda c: c.update({"shared/bias.npy": bytes(200)}),
    "array-header-bomb": lambda c: c.update({"shared/bias.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H",
    60000) + b"(" * 60000}),
    "model-is-text": change_manifest(lambda m: m.update(model="Sequential")),
    "model-unknown": change_manifest(lambda m: m["model"].update(class_name="os.system")),
    "layer-grown-to-4-GB": change_manifest(grow_filters),
    "layers-shuffled": change_manifest(lambda m: m["model"]["config"].update(layers=[])),
    "layers-are-text": change_manifest(lambda m: m["model"]["config"].update(layers="abc")),
}  # fmt: skip


def pickled():
    stream = io.BytesIO()
    np.save(stream, np.array([{}, {}, {}, {}], object), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_hostile_file_is_one_clear_error(saved, damage):
    _, path = saved
    contents = members(path)
    damage(contents)
    rewrite(path, contents)
    with pytest.raises(ValueError, match=r"Received: path=.*model\.npz'$") as caught:
        load_model(path)
    assert type(caught.value) is ValueError


def test_a_member_that_is_there_twice_is_refused(saved):
    _, path = saved
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("shared/bias.npy", npy(np.zeros(4, "f")))
    with pytest.raises(ValueError, match="twice"):
        load_model(path)


def test_compressed_members_are_refused(saved):
    """No zip bomb: a file never needs more memory than its size."""
    _, path = saved
    contents = members(path)
    contents["shared/bias.npy"] = bytes(10**7)
    rewrite(path, contents, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match="' is compressed"):
        load_model(path)


@pytest.mark.parametrize("kind", ["renamed", "keras-2-list", "registered-name"])
def test_a_config_cannot_ask_for_weights_the_file_does_not_hold(kind, saved, monkeypatch):
    """A config with enormous layers must fail before an array of that size is made."""
    _, path = saved
    contents = members(path)
    manifest = manifest_of(contents)
    huge = {"class_name": "Conv1D", "config": {"name": "huge", "filters": 10**12, "kernel_size": [3]}}
    if kind == "registered-name":
        huge["registered_name"] = "Conv1D"
    first = {"class_name": "InputLayer", "config": {"batch_input_shape": [None, 12, 4], "name": "x"}}
    described = [first, huge] if kind == "keras-2-list" else {"name": "s", "layers": [first, huge]}
    manifest["model"] = {"class_name": "Sequential", "config": described}
    contents[weights.MANIFEST] = json.dumps(manifest)
    rewrite(path, contents)
    made = []
    monkeypatch.setattr(layers.Layer, "_initial_value", lambda self, name, shape: made.append(shape))
    with pytest.raises(ValueError, match="cannot be built.*2 weights"):
        load_model(path)
    assert made == [], "an initializer was asked for a weight"


def test_weights_of_another_model_are_refused_and_nothing_changes(saved):
    _, path = saved
    other = Sequential([Input((12, 4)), layers.Conv1D(4, 3, name="shared")])
    before = other.get_weights()
    with pytest.raises(ValueError, match="not the weights of.*head/bias"):
        load_weights(other, path)
    assert all(np.array_equal(a, b) for a, b in zip(before, other.weights, strict=True))


def test_a_damaged_array_changes_no_weight(saved):
    model, path = saved
    contents = members(path)
    last = f"{model.weight_names[-1]}.npy"
    contents[last] = npy(np.ones(7, "f"))
    rewrite(path, contents)
    before = model.get_weights()
    for w in model.weights:
        w += 1
    with pytest.raises(ValueError, match="not an intact cuconv file"):
        model.load_weights(path)
    assert all(np.array_equal(a + 1, b) for a, b in zip(before, model.weights, strict=True))
