"""Files that are damaged or made to harm: one clear error, before memory is taken, or what the file says."""

import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import h5py
import mutations
import numpy as np
import pytest

from cuconv import layers
from cuconv.models import Input, Sequential, load_model, load_weights, model_from_json

PLACE = "layers/conv1d/vars"


def small():
    model = Sequential([Input((9, 2), name="x"), layers.Conv1D(3, 2, name="c")], name="m")
    model.set_weights([np.ones(w.shape) for w in model.weights])
    return model


# --- HDF5 --------------------------------------------------------------------------------------------------------


def replaced(**options):
    def damage(file):
        del file[f"{PLACE}/0"]
        file.create_dataset(f"{PLACE}/0", **{"shape": (2, 2, 3), "dtype": "f4", **options})

    return damage


def linked(link):
    def damage(file):
        file["hidden"] = np.ones((2, 2, 3), "f")
        del file[f"{PLACE}/0"]
        file[f"{PLACE}/0"] = link

    return damage


def virtual(file):
    layout = h5py.VirtualLayout((2, 2, 3), "f4")
    layout[...] = h5py.VirtualSource("/etc/passwd", "x", (2, 2, 3))
    del file[f"{PLACE}/0"]
    file.create_virtual_dataset(f"{PLACE}/0", layout)


def cyclic(file):
    file["layers/conv1d/layers"] = file["layers"]
    file["layers/layers"] = file["/"]


def in_a_group(change):
    return lambda file: change(file["layers"])


ones = np.ones((2, 2, 3), "f")
HDF5 = {
    "external link": linked(h5py.ExternalLink("/etc/passwd", "/x")),
    "soft link": linked(h5py.SoftLink("/hidden")),
    "dangling soft link": linked(h5py.SoftLink("/nowhere")),
    "virtual": virtual,
    "kept elsewhere": replaced(external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]),
    "chunked": replaced(data=ones, chunks=(1, 1, 1)),
    "compressed": replaced(data=ones, compression="gzip"),
    "without data": replaced(),
    "other shape": replaced(shape=(2, 2, 4), data=np.ones((2, 2, 4), "f")),
    "huge and without data": replaced(shape=(10**6, 10**6, 10**4)),
    "integers": replaced(data=np.ones((2, 2, 3), "i4"), dtype="i4"),
    "short integers": replaced(data=np.ones((2, 2, 3), "i2"), dtype="i2"),
    "other opaque bytes": replaced(data=np.ones((2, 2, 3), "f").view("V4"), dtype="V4"),
    "references": replaced(dtype=h5py.ref_dtype),
    "texts": replaced(dtype=h5py.string_dtype()),
    "records": replaced(dtype=np.dtype([("a", "f4"), ("b", "i4")])),
    "long doubles": replaced(data=np.ones((2, 2, 3), "g"), dtype="g"),
    "a group": lambda file: (file.__delitem__(f"{PLACE}/0"), file.create_group(f"{PLACE}/0")),
    "a missing array": lambda file: file.__delitem__(f"{PLACE}/1"),
    "a missing layer": lambda file: file.__delitem__("layers/conv1d"),
    "one array more": lambda file: file.__setitem__(f"{PLACE}/2", np.ones(3, "f")),
    "one layer more": lambda file: file.__setitem__("layers/conv1d_1/vars/0", np.ones(3, "f")),
    "an array that is no number": lambda file: file.move(f"{PLACE}/1", f"{PLACE}/+1"),
    "a layer that is a link": lambda file: (
        file.move("layers/conv1d", "elsewhere"),
        file.__setitem__("layers/conv1d", h5py.SoftLink("/elsewhere")),
    ),
}


@pytest.mark.parametrize("damage", HDF5.values(), ids=HDF5)
@pytest.mark.parametrize("suffix", ["weights.h5", "keras"])
def test_hostile_hdf5(damage, suffix, tmp_path):
    model, path = small(), tmp_path / f"m.{suffix}"
    inner = tmp_path / "m.weights.h5"
    model.save_weights(inner)
    with h5py.File(inner, "a") as file:
        damage(file)
    if suffix == "keras":
        rezip(path, {"model.weights.h5": inner.read_bytes()})
    before = [w.tobytes() for w in model.weights]
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"Received: path='{path}'$") as caught:
        load_weights(model, path)
    if suffix == "keras":
        with pytest.raises(ValueError, match=f"Received: path='{path}'$"):
            load_model(path)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    assert type(caught.value) is ValueError and [w.tobytes() for w in model.weights] == before


def test_cycles_of_groups_are_walked_once(tmp_path):
    model = small()
    model.save_weights(tmp_path / "m.weights.h5")
    with h5py.File(tmp_path / "m.weights.h5", "a") as file:
        cyclic(file)
    with pytest.raises(ValueError, match="layers/layers"):
        load_weights(model, tmp_path / "m.weights.h5")


def test_one_array_cannot_serve_many_layers(tmp_path):
    """Names that share their data would take more memory than the file has."""
    model = Sequential([Input((4, 1)), *(layers.Conv1D(40, 40, padding="same", name=f"c{i}") for i in range(30))])
    model.save_weights(tmp_path / "m.weights.h5")
    with h5py.File(tmp_path / "m.weights.h5", "a") as file:
        shared = file.create_dataset("shared", data=np.ones((40, 40, 40), "f"))
        with h5py.File(tmp_path / "n.weights.h5", "w") as other:
            file.copy(shared, other, "one")
            other["layers/conv1d/vars/0"] = np.ones((40, 1, 40), "f")
            other["layers/conv1d/vars/1"] = np.ones(40, "f")
            for i in range(1, 30):
                other[f"layers/conv1d_{i}/vars/0"] = other["one"]
                other[f"layers/conv1d_{i}/vars/1"] = np.ones(40, "f")
    with pytest.raises(ValueError, match="which its data are not"):
        load_weights(model, tmp_path / "n.weights.h5")


LEGACY = {
    "names that are numbers": lambda root: root.attrs.__setitem__("layer_names", np.arange(3.0)),
    "a layer that is not there": lambda root: root.attrs.__setitem__("layer_names", [b"c", b"d"]),
    "the same layer twice": lambda root: root["c"].attrs.__setitem__("weight_names", [b"c/kernel", b"c/kernel"]),
    "no names": lambda root: root["c"].attrs.__delitem__("weight_names"),
    "a path upwards": lambda root: root["c"].attrs.__setitem__("weight_names", [b"../c/c/kernel", b"/etc"]),
    "an empty name": lambda root: root.attrs.__setitem__("layer_names", [b""]),
    "no group": lambda root: root.__delitem__("c"),
    "a link": lambda root: (root.__delitem__("c"), root.__setitem__("c", h5py.ExternalLink("/etc/passwd", "/c"))),
}


@pytest.mark.parametrize("damage", LEGACY.values(), ids=LEGACY)
def test_hostile_legacy_hdf5(damage, tmp_path):
    model, path = small(), tmp_path / "m.h5"
    model.save(path)
    with h5py.File(path, "a") as file:
        damage(file["model_weights"])
    for load in (load_model, lambda path: load_weights(model, path)):
        with pytest.raises(ValueError, match=f"Received: path='{path}'$"):
            load(path)


# --- Zip files and configs ---------------------------------------------------------------------------------------


def rezip(path, changes=None, change_config=None, compression=zipfile.ZIP_STORED):
    """A `.keras` of `small()` with other members, where None takes one away, or another config."""
    small().save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    if change_config:
        config = json.loads(members["config.json"])
        members["config.json"] = json.dumps(change_config(config) or config).encode()
    members.update(changes or {})
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            if data is not None:
                archive.writestr(zipfile.ZipInfo(name), data, compression)


ZIPS = {
    "no config": {"config.json": None},
    "no weights": {"model.weights.h5": None},
    "a config that is no JSON": {"config.json": b"{"},
    "a config that is no text": {"config.json": b"\xff\xfe"},
    "a config that is a list": {"config.json": b"[]"},
    "a deep config": {"config.json": b"[" * 200_000},
    "a long config": {"config.json": b" " * (17 << 20)},
    "weights that are no HDF5": {"model.weights.h5": b"PK" * 1000},
    "empty weights": {"model.weights.h5": b""},
}


@pytest.mark.parametrize("changes", ZIPS.values(), ids=ZIPS)
def test_hostile_zip(changes, tmp_path):
    rezip(tmp_path / "m.keras", changes)
    with pytest.raises(ValueError, match=r"Received: path=.*m\.keras'$"):
        load_model(tmp_path / "m.keras")


def test_long_configs_are_not_read(tmp_path):
    small().save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "a") as file:
        config = file.attrs["model_config"] + " " * (17 << 20)
        file.attrs["model_config"] = config
    with pytest.raises(ValueError, match="its config has .* more than 16777216"):
        load_model(tmp_path / "m.h5")
    rezip(tmp_path / "m.keras", {"config.json": config.encode()})
    with pytest.raises(ValueError, match="config.json has more than 16777216"):
        load_model(tmp_path / "m.keras")


@pytest.mark.parametrize("name", ["../../evil.py", "/etc/evil", "C:\\evil", "a/../../b", "evil\x00.py", "assets/x"])
def test_other_members_are_never_touched(name, tmp_path):
    """Nothing is extracted, so their names mean nothing."""
    folder = tmp_path / "inner" / "most"
    folder.mkdir(parents=True)
    rezip(folder / "m.keras", {name: b"evil"})
    assert np.array_equal(load_model(folder / "m.keras").weights[0], small().weights[0])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["m.keras"]


def test_compressed_and_doubled_members_are_refused(tmp_path):
    rezip(tmp_path / "m.keras", {"model.weights.h5": bytes(10**8)}, compression=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "m.keras").stat().st_size < 10**6
    with pytest.raises(ValueError, match="compressed"):
        load_model(tmp_path / "m.keras")
    rezip(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("config.json", b"{}")
    with pytest.raises(ValueError, match="twice"):
        load_model(tmp_path / "m.keras")


def layer(class_name, **config):
    return {"class_name": class_name, "config": {"name": class_name.lower(), **config}, "module": "keras.layers"}


def with_layers(*more, **facts):
    def change(config):
        config["config"]["layers"] += [{**each, **facts} for each in more]

    return change


CONFIGS = {
    "Lambda": (with_layers(layer("Lambda", function="evil")), r"'lambda' \(Lambda\)"),
    "two unsupported layers": (with_layers(layer("Dense"), layer("Lambda")), r"\(Dense\), 'lambda' \(Lambda\)"),
    "another module": (with_layers(layer("Conv1D"), module="os"), r"os\.Conv1D"),
    "another registered name": (with_layers(layer("Conv1D"), registered_name="evil>Conv1D"), "Conv1D"),
    "a huge layer": (with_layers(layer("Conv1D", filters=10**9, kernel_size=[9])), "cannot be built|None for"),
    "a layer beyond integers": (with_layers(layer("Conv1D", filters=10**30, kernel_size=[9])), "cannot be built"),
    "a function": (with_layers(layer("Conv1D", filters=1, kernel_size=[1], activation="system")), "activation"),
    "a function of a module": (
        with_layers(
            layer(
                "Activation",
                activation={"module": "os", "class_name": "function", "config": "system", "registered_name": "system"},
            )
        ),
        "activation",
    ),
    "an initializer of a module": (
        with_layers(
            layer("Conv1D", filters=1, kernel_size=[1], kernel_initializer={"module": "os", "class_name": "Zeros"})
        ),
        "initializer",
    ),
    "a class that is no text": (lambda config: config.update(class_name=["Sequential"]), "class_name"),
    "no layers": (lambda config: config["config"].update(layers=None), "cannot be built"),
    "a bare layer": (lambda config: config["config"]["layers"][1], "Received"),
}


@pytest.mark.parametrize("change, message", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_hostile_config(change, message, suffix, tmp_path, monkeypatch):
    path = tmp_path / f"m.{suffix}"
    if suffix == "keras":
        rezip(path, change_config=change)
    else:
        small().save(path)
        with h5py.File(path, "a") as file:
            config = json.loads(file.attrs["model_config"])
            file.attrs["model_config"] = json.dumps(change(config) or config)
    monkeypatch.setattr(layers.Layer, "_initial_value", lambda *arguments: pytest.fail("memory was taken"))
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert str(caught.value).endswith(f"Received: path={str(path)!r}") and type(caught.value) is ValueError


def test_custom_objects_are_the_callers(tmp_path):
    class Thrice(layers.Layer):
        def _record(self, *inputs, training):
            return inputs[0] * 3, None

        def compute_output_shape(self, input_shape):
            return tuple(input_shape)

    model = Sequential([Input((4, 2)), layers.Conv1D(2, 1), Thrice()])
    for suffix in ("keras", "h5"):
        model.save(tmp_path / f"m.{suffix}")
        with pytest.raises(ValueError, match=r"does not have the layers .*Thrice"):
            load_model(tmp_path / f"m.{suffix}")
        again = load_model(tmp_path / f"m.{suffix}", custom_objects={"Thrice": Thrice})
        x = np.ones((1, 4, 2), "f")
        assert np.array_equal(again(x), model(x))


# --- safetensors -------------------------------------------------------------------------------------------------


def tensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


TENSORS = {
    "empty": b"",
    "no header": bytes(4),
    "a long header": (1 << 60).to_bytes(8, "little") + b"{}",
    "a header beyond the limit": tensors(b"{}" + b" " * (17 << 20)),
    "a deep header": tensors(b"[" * 100_000),
    "no data": tensors({"c/kernel": entry([2, 2, 3], 0, 48), "c/bias": entry([3], 48, 60)}),
    "huge": tensors({"c/kernel": entry([10**6, 10**6, 10**6], 0, 48)}, bytes(48)),
    "overlapping": tensors({"c/kernel": entry([2, 2, 3], 0, 48), "c/bias": entry([3], 0, 12)}, bytes(48)),
    "integers": tensors({"c/kernel": entry([2, 2, 3], 0, 48, "I32"), "c/bias": entry([3], 48, 60)}, bytes(60)),
    "one array": tensors({"c/kernel": entry([2, 2, 3], 0, 48)}, bytes(48)),
    "other names": tensors({"k": entry([2, 2, 3], 0, 48), "b": entry([3], 48, 60)}, bytes(60)),
}


@pytest.mark.parametrize("data", TENSORS.values(), ids=TENSORS)
def test_hostile_safetensors(data, tmp_path):
    path, model = tmp_path / "m.safetensors", small()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"Received: path='{path}'$"):
        load_weights(model, path)
    assert np.all(model.weights[0] == 1)


def test_long_headers_are_not_read(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(TENSORS["a header beyond the limit"])
    with pytest.raises(ValueError, match="its header has .* more than 16777216"):
        load_weights(small(), tmp_path / "m.safetensors")


# --- Two hundred damaged files -----------------------------------------------------------------------------------

SEEDS = 50


class Sound:
    """A file before the damage, and where its arrays and its config lie."""

    def __init__(self, path):
        self.data = path.read_bytes()
        model = mutations.small_model()
        self.config = json.loads(json.dumps(model.get_config()))
        self.arrays = {}
        for name, weight in model._named_weights().items():
            content = weight.value.tobytes()
            places = [i for i in range(len(self.data)) if self.data.startswith(content, i)]
            # Zero biases would be everywhere; these weights are random and lie in one place.
            assert len(places) == 1, name
            self.arrays[name] = (places[0], len(content))
        text = json.dumps(layers.serialize(model)).encode()
        self.text = (self.data.find(text), len(text))

    def check(self, data, found):
        """What was loaded is what the damaged file says."""
        says = {name: data[place : place + size].hex() for name, (place, size) in self.arrays.items()}
        assert found["weights"] == says
        place, size = self.text
        if place >= 0 and data[place : place + size] != self.data[place : place + size]:
            described = model_from_json(data[place : place + size].decode())
            assert found["config"] == json.loads(json.dumps(described.get_config()))
        else:
            assert found["config"] == self.config


def test_two_hundred_damaged_files(tmp_path, record_property):
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    asked = [(suffix, seed) for suffix in mutations.SUFFIXES for seed in range(SEEDS)]
    run = subprocess.run(
        [sys.executable, mutations.__file__, tmp_path],
        input="".join(f"{suffix} {seed}\n" for suffix, seed in asked),
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    ready, *lines = run.stdout.splitlines()
    assert ready == "ready"
    assert len(lines) == len(asked), f"{asked[len(lines)]} ended the process ({run.returncode}): {run.stderr[-500:]}"
    sound = {suffix: Sound(tmp_path / f"sound.{suffix}") for suffix in mutations.SUFFIXES}
    outcomes = {"error": 0, "loaded": 0}
    for (suffix, seed), line in zip(asked, lines):
        found = json.loads(line)
        assert found["seconds"] < 2, (suffix, seed)
        if "error" in found:
            outcomes["error"] += 1
            assert not found["error"].startswith("UNCLEAR") and "Memory" not in found["error"], (suffix, seed, found)
        else:
            outcomes["loaded"] += 1
            data = mutations.damaged(sound[suffix].data, f"{suffix} {seed}")
            try:
                sound[suffix].check(data, found)
            except AssertionError as error:
                raise AssertionError(f"{suffix} {seed}: loaded other than what the file says") from error
    print(outcomes)
    record_property("outcomes", str(outcomes))
    assert outcomes["error"] > 80 and outcomes["loaded"] > 20
