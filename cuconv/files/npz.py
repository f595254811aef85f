"""cuconv's own format: an .npz of plain arrays and one JSON member that names them, never pickle.

The member ``cuconv.json`` holds ``format`` ("cuconv"), ``version`` (1), ``weights`` (name, shape and dtype of each) and
``model`` (a config or null). Each array is a member ``<name>.npy``, stored uncompressed, so that no file needs more
memory than its own size; bfloat16 is kept as the 16-bit integers it is made of. ``numpy.load`` opens such a file too.

Everything that can be checked is checked before memory is taken: the list of members, their sizes against the shapes,
the shapes against those of the layers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from cuconv import ops
from cuconv.files.common import MAX_CONFIG_BYTES, Stored, intact, reason, replacing
from cuconv.layers.base import BFLOAT16

MANIFEST = "cuconv.json"
MAX_MANIFEST_BYTES = MAX_CONFIG_BYTES
DTYPES = {dtype.name: dtype for dtype in ops.DTYPES}


def write(path: Path, arrays: Mapping[str, np.ndarray], model: Mapping[str, Any] | None) -> None:
    """Writes arrays and a model's config; the file is complete or not there at all."""
    entries = [{"name": name, "shape": array.shape, "dtype": array.dtype.name} for name, array in arrays.items()]
    manifest = json.dumps({"format": "cuconv", "version": 1, "weights": entries, "model": model}).encode()
    with replacing(path) as stream, zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(zipfile.ZipInfo(MANIFEST), manifest)
        for name, array in arrays.items():
            plain = array.view(np.uint16) if array.dtype == BFLOAT16 else array
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(plain), allow_pickle=False)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[dict[str, Stored]]:
    """What the file holds, by name, while it is open."""
    with open(path, "rb") as stream:
        with intact(path, "cuconv"):
            archive = _Archive(stream)
        yield {
            name: Stored(shape, dtype, functools.partial(archive.read, name))
            for name, (shape, dtype) in archive.entries.items()
        }


def load_model(path: Path, create: Callable[[Mapping[str, Any]], Any], custom_names: Collection[str] = ()) -> Any:
    """The model that `create` makes of the config in the file, with the arrays of the file as its weights.

    The arrays are put into the config as each layer's `weights`, so a layer compares shapes before it takes memory.
    Only classes in `custom_names` that have no arrays are left to themselves.
    """
    with open(path, "rb") as stream, intact(path, "cuconv"):
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
        raise ValueError(f"this model cannot be built: {reason(error)}. Received: path={os.fspath(path)!r}") from error
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
