"""Weights in files: an .npz of plain arrays and one JSON member that names them, never pickle.

The member ``cuconv.json`` holds ``format`` ("cuconv"), ``version`` (1), ``weights`` (name, shape and dtype of each) and
``model`` (a config or null). Each array is a member ``<name>.npy``, stored uncompressed, so that no file needs more
memory than its own size; bfloat16 is kept as the 16-bit integers it is made of. ``numpy.load`` opens such a file too.

Everything that can be checked is checked before memory is taken: the list of members, their sizes against the shapes,
the shapes against those of the layers. Files are written beside their place and moved there at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from cuconv import ops
from cuconv.layers.base import BFLOAT16, Layer

MANIFEST = "cuconv.json"
MAX_MANIFEST_BYTES = 16 << 20  # a network of a thousand layers describes itself in about 1 MB
DTYPES = {dtype.name: dtype for dtype in ops.DTYPES}

PathLike = str | os.PathLike[str]


def save_weights(layer: Layer, path: PathLike) -> None:
    """Writes the weights of a layer or model to an .npz file."""
    write_archive(path, named_arrays(layer), None)


def load_weights(layer: Layer, path: PathLike) -> None:
    """Overwrites the weights of a built layer or model with those of an .npz file.

    Raises:
        ValueError: the file is damaged, or its names or shapes are not those of the layer. No weight has been changed
            then.
    """
    own = {name: weight.value for name, weight in layer._named_weights().items()}
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    with open(_npz(path), "rb") as stream:
        with _intact(path):
            archive = _Archive(stream)
        stored = {name: shape for name, (shape, _) in archive.entries.items()}
        differing = sorted(name for name in stored.keys() | shapes.keys() if stored.get(name) != shapes.get(name))
        if differing:
            listed = ", ".join(f"{name} ({stored.get(name)} for {shapes.get(name)})" for name in differing[:5])
            raise ValueError(
                f"these are not the weights of {layer.name!r}, they differ in {listed}. "
                f"Received: path={os.fspath(path)!r}"
            )
        with _intact(path):
            arrays = {name: archive.read(name) for name in own}
    for name, value in own.items():
        value[...] = ops.like(arrays[name], value)


def named_arrays(layer: Layer) -> dict[str, np.ndarray]:
    """The weights by path, as NumPy arrays."""
    if not layer.built:
        raise ValueError(f"{layer.name!r} has no weights to save yet: build it, or call it. Received: built=False")
    return {name: ops.to_numpy(weight.value) for name, weight in layer._named_weights().items()}


def write_archive(path: PathLike, arrays: Mapping[str, np.ndarray], model: Mapping[str, Any] | None) -> None:
    """Writes arrays and a model's config; the file is complete or not there at all."""
    place = _npz(path)
    entries = [{"name": name, "shape": array.shape, "dtype": array.dtype.name} for name, array in arrays.items()]
    manifest = json.dumps({"format": "cuconv", "version": 1, "weights": entries, "model": model}).encode()
    unfinished = place.with_name(f"{place.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with open(unfinished, "xb") as stream:
            with zipfile.ZipFile(stream, "w") as archive:
                archive.writestr(zipfile.ZipInfo(MANIFEST), manifest)
                for name, array in arrays.items():
                    plain = array.view(np.uint16) if array.dtype == BFLOAT16 else array
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.ascontiguousarray(plain), allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, place)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def load_archive(path: PathLike, create: Callable[[Mapping[str, Any]], Any], custom_names: Collection[str] = ()) -> Any:
    """The model that `create` makes of the config in the file, with the arrays of the file as its weights.

    The arrays are put into the config as each layer's `weights`, so a layer compares shapes before it takes memory.
    Only classes in `custom_names` that have no arrays are left to themselves.
    """
    with open(_npz(path), "rb") as stream, _intact(path):
        archive = _Archive(stream)
        arrays = {name: archive.read(name) for name in archive.entries}
    if not isinstance(archive.model, dict):
        raise ValueError(
            f"this file holds weights without a model: use load_weights. Received: path={os.fspath(path)!r}"
        )
    try:
        model = create(_with_weights(archive.model, arrays, custom_names, ""))
        if set(model._named_weights()) != set(arrays):
            raise ValueError(
                f"it has {len(model._named_weights())} weights and the file {len(arrays)}, under other names"
            )
    except Exception as error:  # a config from elsewhere can be wrong in any way
        raise ValueError(f"this model cannot be built: {_reason(error)}. Received: path={os.fspath(path)!r}") from error
    return model


def _with_weights(config: Any, arrays: Mapping[str, np.ndarray], custom_names: Collection[str], prefix: str) -> Any:
    """A layer's dict with its arrays in its config; a model's with those of its layers."""
    inner = config.get("config") if isinstance(config, dict) else None
    parts = inner.get("layers") if isinstance(inner, dict) else inner
    if isinstance(parts, list):
        parts = [_with_weights(each, arrays, custom_names, f"{prefix}{_layer_name(each)}/") for each in parts]
        return {**config, "config": {**inner, "layers": parts} if isinstance(inner, dict) else parts}
    if not isinstance(inner, dict) or config.get("class_name") == "InputLayer":
        return config
    own = [array for name, array in arrays.items() if name.startswith(prefix) and "/" not in name[len(prefix) :]]
    custom = {str(config.get("class_name")).rpartition(">")[2], str(config.get("registered_name"))} & set(custom_names)
    return config if custom and not own else {**config, "config": {**inner, "weights": own}}


def _layer_name(config: Any) -> Any:
    inner = config.get("config") if isinstance(config, dict) else None
    return inner.get("name") if isinstance(inner, dict) else None


class _Archive:
    """An opened file whose member list, names and sizes have been checked."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(stream)
        members = self._zip.infolist()
        self._members = {member.filename: member for member in members}
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"member {member.filename!r} is compressed")
        if len(self._members) != len(members):
            raise ValueError("a member is there twice")
        if MANIFEST not in self._members or self._members[MANIFEST].file_size > MAX_MANIFEST_BYTES:
            raise ValueError(f"it has no {MANIFEST} of at most {MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads(self._zip.read(MANIFEST))
        if manifest["format"] != "cuconv" or manifest["version"] != 1:
            raise ValueError(f"its format is {manifest['format']!r}, version {manifest['version']!r}")
        self.model = manifest["model"]
        self.entries: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            entry["name"]: (tuple(entry["shape"]), DTYPES[entry["dtype"]]) for entry in manifest["weights"]
        }
        if len(self.entries) != len(manifest["weights"]) or self._members.keys() != {
            MANIFEST,
            *(f"{name}.npy" for name in self.entries),
        }:
            raise ValueError(f"its members are not those {MANIFEST} names")

    def read(self, name: str) -> np.ndarray:
        """The array of that name."""
        shape, dtype = self.entries[name]
        stored = np.dtype(np.uint16) if dtype == BFLOAT16 else dtype
        with self._zip.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            if version != (1, 0):
                raise ValueError(f"array {name!r} has the header version {version}")
            found_shape, fortran, found_dtype = np.lib.format.read_array_header_1_0(member)
            if (found_shape, fortran and len(shape) > 1, found_dtype) != (shape, False, stored):
                raise ValueError(f"array {name!r} is {found_dtype} {found_shape}, not {stored} {shape}")
            data = member.read()
        return np.frombuffer(data, stored).reshape(shape).view(dtype)


@contextlib.contextmanager
def _intact(path: PathLike) -> Iterator[None]:
    """Makes one ValueError of the dozen types in which a damaged file shows itself."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"this is not an intact cuconv file: {_reason(error)}. Received: path={os.fspath(path)!r}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of the message, after the type where the message alone would say nothing."""
    first = str(error).partition("\n")[0].rstrip(".")
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"


def _npz(path: PathLike) -> Path:
    place = Path(path)
    if place.suffix != ".npz":
        raise ValueError(f"`path` must end in .npz. Received: path={os.fspath(path)!r}")
    return place
