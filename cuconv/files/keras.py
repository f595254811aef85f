"""Keras' files: ``.keras``, ``.weights.h5`` and the older ``.h5``, as Keras writes and reads them.

``.weights.h5`` (Keras 3) numbers layers by class, ``layers/conv1d_1/vars/0``, and the weights of each in the order of
get_weights. ``.keras`` is a zip of ``config.json``, ``metadata.json`` and such a file. ``.h5`` (Keras 1 and 2, and
Keras 3's ``save("x.h5")``) has a group for each layer and lists them in attributes; a file with a model holds its
config as the attribute ``model_config``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from cuconv import layers, ops
from cuconv.files import hdf5
from cuconv.files.common import MAX_CONFIG_BYTES, Stored, intact, library, replacing
from cuconv.layers.base import Layer, Weight, name_stem
from cuconv.layers.conv_lstm import ConvLSTM

KERAS_VERSION = "3.15.1"  # whose files these are
CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"
LAYERS, LAYERS_OF_KERAS_2 = (
    "layers",
    "_layer_checkpoint_dependencies",
)  # the latter in .weights.h5 files of 2.13 to 2.15
MODEL_CLASSES = ("Functional", "Sequential", "Model")


# --- Layers in Keras 3's order -----------------------------------------------------------------------------------


def saved_places(layer: Layer, word: str = LAYERS) -> Iterator[tuple[str, str, Layer]]:
    """For each layer once, its group in a ``.weights.h5``, the prefix of its weights' names, and itself."""
    seen: set[Layer] = set()

    def visit(layer: Layer, path: str, prefix: str) -> Iterator[tuple[str, str, Layer]]:
        if layer in seen:
            return
        seen.add(layer)
        yield path, prefix, layer
        counts: dict[str, int] = {}
        for part in _sublayers(layer):
            stem = name_stem(layers.class_name(part))
            number = counts[stem] = counts.get(stem, -1) + 1
            place = f"{path}/{word}/{stem}_{number}" if number else f"{path}/{word}/{stem}"
            yield from visit(part, place.lstrip("/"), f"{prefix}{part.name}/")

    return visit(layer, "", "")


def _sublayers(layer: Layer) -> list[Layer]:
    return getattr(layer, "layers", [])


def _variables(layer: Layer, path: str) -> str:
    """The group of a layer's own weights; Keras gives those of a ConvLSTM to its cell."""
    inner = "cell/vars" if isinstance(layer, ConvLSTM) else "vars"
    return f"{path}/{inner}".lstrip("/")


# --- Weights -----------------------------------------------------------------------------------------------------


def stored_weights(reader: hdf5.Reader, layer: Layer) -> dict[str, Stored]:
    """The arrays of the file under the names of the layer's weights; those it does not know under the file's."""
    root = reader.root
    if "layer_names" not in root.attrs and "layer_names0" not in root.attrs:
        root = reader.group(root, "model_weights")
    found = _by_place(reader, layer) if root is None else _by_order(reader, root, layer)
    own = layer._named_weights()
    known = {own[name]: stored for name, stored in found.items() if name in own}
    # A layer in two models of one model has two names and is stored once.
    return {**{name: known[weight] for name, weight in own.items() if weight in known}, **found}


def _by_place(reader: hdf5.Reader, layer: Layer) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    root = reader.root
    word = LAYERS if reader.group(root, LAYERS) is not None else LAYERS_OF_KERAS_2
    places = list(saved_places(layer, word))
    known = {path for path, _, _ in places}
    for path, prefix, each in places:
        variables = _variables(each, path)
        group = reader.group(root, variables)
        own = list(each._weights) if not _sublayers(each) else []
        names = reader.children(group) if group is not None else []
        for name in names:
            index = int(name) if name.isdecimal() and name == str(int(name)) else len(own)
            key = f"{prefix}{own[index].name}" if index < len(own) else f"{variables}/{name}"
            found[key] = reader.array(group, name)
        inner = reader.group(root, f"{path}/{word}".lstrip("/")) if _sublayers(each) or not path else None
        for name in reader.children(inner) if inner is not None else ():
            place = f"{path}/{word}/{name}".lstrip("/")
            if place not in known and (stray := _any_array(reader, inner, name)) is not None:
                found[place] = stray
    return found


def _any_array(reader: hdf5.Reader, parent: Any, name: str) -> Stored | None:
    """The first array of a layer that the model does not have; of a model, anything."""
    if reader.group(parent, f"{name}/layers") is not None:
        return Stored((), np.dtype(np.float32), lambda: np.zeros((), np.float32))
    for inside in ("vars/0", "cell/vars/0"):
        group = reader.group(parent, f"{name}/{inside.rpartition('/')[0]}")
        if group is not None and "0" in group:
            return reader.array(group, "0")
    return None


def _by_order(reader: hdf5.Reader, root: Any, layer: Layer) -> dict[str, Stored]:
    version, backend = reader.text(root, "keras_version") or "1", reader.text(root, "backend")
    own = {part.name: part for part in (_sublayers(layer) or [layer]) if part._all_weights()}
    listed: dict[str, list[str]] = {}
    groups: dict[str, Any] = {}
    for name in reader.texts(root, "layer_names"):
        groups[name] = reader.group(root, name)
        if groups[name] is None:
            raise ValueError(f"it lists a layer {name!r} and has none of that name")
        if names := reader.texts(groups[name], "weight_names"):
            listed[name] = names
    if len(listed) != len(own):
        return {f"{name}/{each}": reader.array(groups[name], each) for name in listed for each in listed[name]}
    # Automatic names depend on what else a program made, so Keras goes by the order. Where the names agree they tell.
    pairs = zip(own, own if set(own) == set(listed) else listed, strict=True)
    found: dict[str, Stored] = {}
    for name, theirs in pairs:
        arrays = [reader.array(groups[theirs], weight) for weight in listed[theirs]]
        weights = _in_legacy_order(own[name])
        arrays = _converted(weights, arrays, version, backend)
        prefix = f"{name}/" if _sublayers(layer) else ""
        for (path, _), stored in zip(weights, arrays, strict=False):
            found[f"{prefix}{path}"] = stored
        for surplus, stored in zip(listed[theirs][len(weights) :], arrays[len(weights) :], strict=False):
            found[f"{theirs}/{surplus}"] = stored
    return found


def _in_legacy_order(layer: Layer) -> list[tuple[str, Weight]]:
    """The weights of a layer by name, those that are trained first."""
    names = {weight: path for path, weight in reversed(layer._named_weights().items())}
    return [(names[weight], weight) for weight in sorted(layer._all_weights(), key=lambda weight: not weight.trainable)]


# --- Keras 1 and Theano ------------------------------------------------------------------------------------------


def _converted(
    weights: list[tuple[str, Weight]], arrays: list[Stored], version: str, backend: str | None
) -> list[Stored]:
    """The arrays as Keras 2 has them, as Keras 2 itself converted those of Keras 1 and of Theano."""
    if not version.startswith("1") and backend != "theano":
        return arrays
    done: list[Stored] = []
    left = list(arrays)
    for leaf in dict.fromkeys(weight.layer for _, weight in weights):
        gates = isinstance(leaf, ConvLSTM) and version.startswith("1") and len(left) >= 12
        count = 12 if gates else len(leaf._weights)
        values = [stored.read() for stored in left[:count]]
        left = left[count:]
        if version.startswith("1"):
            values = _from_keras_1(leaf, values)
        if backend == "theano" and _is_convolution(leaf):
            kernels = 2 if isinstance(leaf, ConvLSTM) else 1
            values = [_flipped(value) if i < kernels else value for i, value in enumerate(values)]
        done += [Stored(value.shape, value.dtype, _giving(value)) for value in values]
    return done + left


def _giving(value: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: value


def _is_convolution(leaf: Layer) -> bool:
    kinds = (layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.Conv2DTranspose, layers.ConvLSTM2D)
    return isinstance(leaf, kinds)


def _flipped(kernel: np.ndarray) -> np.ndarray:
    """A kernel of Theano, which convolved where others correlate."""
    return np.flip(kernel, tuple(range(kernel.ndim - 2)))


def _from_keras_1(leaf: Layer, values: list[np.ndarray]) -> list[np.ndarray]:
    first = getattr(leaf, "data_format", "") == "channels_first"
    if not values:
        return values
    kernel, rest = values[0], values[1:]
    if isinstance(leaf, layers.Conv1D) and kernel.ndim == 4:
        if kernel.shape[:2] != (leaf.kernel_size[0], 1) or kernel.shape[3] != leaf.filters:
            kernel = kernel.transpose(2, 3, 1, 0)  # Keras 1.1: [filters, channels, taps, 1]
        return [kernel[:, 0], *rest]
    if isinstance(leaf, layers.Conv2D) and first and kernel.ndim == 4:
        return [kernel.transpose(2, 3, 1, 0), *rest]  # [filters, channels, rows, columns]
    if isinstance(leaf, layers.Conv3D) and first and kernel.ndim == 5:
        return [kernel.transpose(2, 3, 4, 1, 0), *rest]
    if isinstance(leaf, layers.Conv2DTranspose) and kernel.ndim == 4:
        return [kernel.transpose((2, 3, 0, 1) if first else (0, 1, 3, 2)), *rest]
    if isinstance(leaf, layers.ConvLSTM2D) and len(values) == 12:
        # Kernel, recurrent kernel and bias of each gate: input, cell, forget, output.
        joined = [np.concatenate([values[3 * gate + i] for gate in (0, 2, 1, 3)], axis=-1) for i in range(3)]
        return [*(kernel.transpose(2, 3, 1, 0) if first else kernel for kernel in joined[:2]), joined[2]]
    return values


# --- Reading -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Any, hdf5.Reader]]:
    """The config in a file, or None, and its weights, while it is open."""
    library("h5py")
    with open(path, "rb") as stream, contextlib.ExitStack() as stack:
        with intact(path, "Keras"):
            if path.suffix == ".keras":
                config, inner = _unzipped(stream, stack)
                reader = hdf5.Reader(inner)
            else:
                reader = hdf5.Reader(stream)
                config = None
            stack.callback(reader.close)
            text = config if config is not None else reader.text(reader.root, "model_config")
            if text is not None and len(text) > MAX_CONFIG_BYTES:
                raise ValueError(f"its config has {len(text)} characters, more than {MAX_CONFIG_BYTES}")
            described = None if text is None else json.loads(text)
        yield described, reader


def _unzipped(stream: IO[bytes], stack: contextlib.ExitStack) -> tuple[str, IO[bytes]]:
    """The config and the weights of a ``.keras`` file, these in a nameless file, their checksum verified."""
    archive = stack.enter_context(zipfile.ZipFile(stream))
    members = {member.filename: member for member in archive.infolist()}
    if len(members) != len(archive.infolist()):
        raise ValueError("a member is there twice")
    for name in (CONFIG, WEIGHTS):
        if name not in members:
            raise ValueError(f"it has no {name}")
        if members[name].compress_type != zipfile.ZIP_STORED or members[name].file_size != members[name].compress_size:
            raise ValueError(f"member {name!r} is compressed, and Keras compresses none")
    if members[CONFIG].file_size > MAX_CONFIG_BYTES:
        raise ValueError(f"its {CONFIG} has more than {MAX_CONFIG_BYTES} bytes")
    inner = tempfile.TemporaryFile()  # noqa: SIM115  the stack closes it
    stack.callback(inner.close)
    with archive.open(WEIGHTS) as member:
        shutil.copyfileobj(member, inner)
    return archive.read(CONFIG).decode(), inner


def check_classes(config: Any, custom_names: Any = ()) -> None:
    """Raises ValueError naming every layer of a config that is neither ours nor in `custom_names`."""
    unsupported = list(dict.fromkeys(_unsupported(config, frozenset(custom_names))))
    if unsupported:
        raise ValueError(f"cuconv does not have the layers {', '.join(unsupported)}")


def _unsupported(config: Any, custom_names: frozenset[str]) -> Iterator[str]:
    if not isinstance(config, Mapping) or not isinstance(config.get("class_name"), str):
        raise ValueError("the config of a layer has no `class_name`")
    name, module, inner = config["class_name"], config.get("module"), config.get("config")
    registered = str(config.get("registered_name"))
    custom = {name.rpartition(">")[2], registered} & custom_names
    ours = layers.has_class(name) and (module is None or str(module).partition(".")[0] == "keras")
    if not custom and (not ours or config.get("registered_name") not in (None, name)):
        called = inner.get("name") if isinstance(inner, Mapping) else None
        shown = name if module is None or str(module).startswith("keras") else f"{module}.{name}"
        yield f"{called!r} ({shown})" if called else shown
    elif name in MODEL_CLASSES:
        parts = inner.get("layers") if isinstance(inner, Mapping) else inner
        for part in parts if isinstance(parts, list) else ():
            yield from _unsupported(part, custom_names)


# --- Writing -----------------------------------------------------------------------------------------------------


def write_weights(path: Path, layer: Layer) -> None:
    """Writes a ``.weights.h5`` as Keras 3 does, or an ``.h5`` with the layout of Keras 2."""
    library("h5py")
    with replacing(path) as stream:
        if path.name.endswith(".weights.h5"):
            _write_by_place(stream, layer)
        else:
            with library("h5py").File(stream, "w") as file:
                _write_by_order(file, layer)


def write_model(path: Path, model: Layer) -> None:
    """Writes config and weights: a ``.keras``, or an ``.h5`` with the layout of Keras 2."""
    h5py = library("h5py")
    config = json.dumps(layers.serialize(model))
    with replacing(path) as stream:
        if path.suffix == ".keras":
            with zipfile.ZipFile(stream, "w") as archive, tempfile.TemporaryFile(dir=path.parent) as inner:
                _write_by_place(inner, model)
                inner.seek(0)
                archive.writestr(zipfile.ZipInfo(METADATA), json.dumps({"keras_version": KERAS_VERSION}))
                archive.writestr(zipfile.ZipInfo(CONFIG), config)
                with archive.open(zipfile.ZipInfo(WEIGHTS), "w", force_zip64=True) as member:
                    shutil.copyfileobj(inner, member)
            return
        with h5py.File(stream, "w") as file:
            _write_version(file)
            file.attrs["model_config"] = config
            _write_by_order(file.create_group("model_weights"), model)


def _write_by_place(stream: IO[bytes], layer: Layer) -> None:
    with library("h5py").File(stream, "w") as file:
        for path, _, each in saved_places(layer):
            file.create_group(f"{path}/vars".lstrip("/")).attrs["name"] = each.name
            if not _sublayers(each):
                group = file.require_group(_variables(each, path))
                for index, weight in enumerate(each._weights):
                    hdf5.write_array(group, str(index), ops.to_numpy(weight.value), label=True)


def _write_by_order(root: Any, layer: Layer) -> None:
    parts = _sublayers(layer) or [layer]
    hdf5.write_texts(root, "layer_names", [part.name for part in parts])
    _write_version(root)
    for part in parts:
        group = root.create_group(part.name)
        weights = _in_legacy_order(part)
        names = [f"{part.name}/{name}" for name, _ in weights]
        hdf5.write_texts(group, "weight_names", names)
        for name, (_, weight) in zip(names, weights, strict=True):
            hdf5.write_array(group, name, ops.to_numpy(weight.value), label=False)


def _write_version(holder: Any) -> None:
    holder.attrs["keras_version"] = KERAS_VERSION
    holder.attrs["backend"] = "numpy"
