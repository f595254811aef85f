"""HDF5 with nothing but what Keras writes: groups by hard links, plain arrays in one piece, text attributes.

HDF5 knows links into other files, arrays stored elsewhere or computed from others, chunks that decompress to any size
and arrays without data. All of that is refused before an array is touched. The arrays of a file together are never
larger than the file, so neither is the memory that reading takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import IO, Any

import numpy as np

from cuconv.files.common import Stored, library
from cuconv.layers.base import BFLOAT16

MAX_NAME_BYTES = 64512  # Keras splits lists of names that are longer, the limit of an attribute
MAX_CHILDREN = 100_000  # of a group


class Reader:
    """An open file, read only.

    Args:
        stream: seekable, holding nothing but the HDF5 file.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._h5py = library("h5py")
        self._room = self._size = stream.seek(0, 2)
        stream.seek(0)
        self._file = self._h5py.File(stream, "r")
        self.root = self._file["/"]

    def close(self) -> None:
        """Ends reading."""
        self._file.close()

    def group(self, parent: Any, path: str) -> Any:
        """The group at `path`, None if there is none."""
        found = self._find(parent, path)
        if found is not None and not isinstance(found, self._h5py.Group):
            raise ValueError(f"{path!r} is not a group")
        return found

    def children(self, group: Any) -> list[str]:
        """The names in a group."""
        if len(group) > MAX_CHILDREN:
            raise ValueError(f"{group.name!r} has {len(group)} members, more than {MAX_CHILDREN}")
        return list(group)

    def array(self, parent: Any, path: str) -> Stored:
        """The array at `path`."""
        dataset = self._find(parent, path)
        if not isinstance(dataset, self._h5py.Dataset):
            raise ValueError(f"there is no array {path!r}")
        plist = dataset.id.get_create_plist()
        plain = plist.get_layout() in (self._h5py.h5d.CONTIGUOUS, self._h5py.h5d.COMPACT)
        if not plain or plist.get_external_count() or plist.get_nfilters():
            raise ValueError(f"array {path!r} is chunked, compressed or kept elsewhere, and Keras writes none that is")
        dtype = self._dtype(dataset, path)
        shape = tuple(int(n) for n in dataset.shape)
        size = math.prod(shape) * dtype.itemsize
        self._room -= size
        if size and (self._room < 0 or dataset.id.get_storage_size() != size):
            raise ValueError(f"array {path!r} claims to be {dtype} {shape}, which its data are not")
        offset = dataset.id.get_offset()  # None if compact
        if offset is not None and offset + size > self._size:
            raise ValueError(f"array {path!r} lies beyond the end of the file")

        def read() -> np.ndarray:
            return np.asarray(dataset[()]).reshape(shape).view(dtype) if dtype == BFLOAT16 else dataset[()]

        return Stored(shape, dtype, read)

    def _dtype(self, dataset: Any, path: str) -> np.dtype:
        h5t, kind = self._h5py.h5t, dataset.id.get_type()
        for name in ("F16", "F32", "F64"):
            for order in ("LE", "BE"):
                if kind.equal(getattr(h5t, f"IEEE_{name}{order}")):
                    return np.dtype(f"{'<' if order == 'LE' else '>'}f{int(name[1:]) // 8}")
        for dtype in (np.dtype("c8"), np.dtype("c16")):
            if kind.equal(h5t.py_create(dtype)):
                return dtype
        # Keras 3 stores bfloat16 as two opaque bytes; its legacy files do not say what they are.
        if isinstance(kind, h5t.TypeOpaqueID) and kind.get_size() == 2:
            return BFLOAT16
        raise ValueError(f"array {path!r} holds {dataset.dtype} and not floating-point numbers")

    def _find(self, parent: Any, path: str) -> Any:
        found = parent
        for part in path.split("/"):
            link = found.get(part, getlink=True) if isinstance(found, self._h5py.Group) and part else None
            if link is None:
                return None
            if not isinstance(link, self._h5py.HardLink):
                raise ValueError(f"{part!r} in {path!r} is a {type(link).__name__} and not a part of the file")
            found = found[part]
        return found

    # --- Attributes ---

    def text(self, holder: Any, name: str) -> str | None:
        """The attribute of that name, None if there is none."""
        if name not in holder.attrs:
            return None
        values = self._strings(holder, name)
        if len(values) != 1:
            raise ValueError(f"attribute {name!r} is not one text")
        return values[0]

    def texts(self, holder: Any, name: str) -> list[str]:
        """A list of texts, which Keras splits into <name>0, <name>1, ... if it is long."""
        if name in holder.attrs:
            return self._strings(holder, name)
        if f"{name}0" not in holder.attrs:
            raise ValueError(f"{holder.name!r} has no attribute {name!r}")
        values: list[str] = []
        place = 0
        while f"{name}{place}" in holder.attrs:
            values += self._strings(holder, f"{name}{place}")
            place += 1
        return values

    def _strings(self, holder: Any, name: str) -> list[str]:
        attribute = holder.attrs.get_id(name)
        shape = attribute.shape
        if shape is None or math.prod(shape) == 0:  # an empty list has no text in it, whatever its type
            return []
        kind = attribute.get_type()
        if not isinstance(kind, self._h5py.h5t.TypeStringID) or math.prod(shape) * kind.get_size() > self._size:
            raise ValueError(f"attribute {name!r} is not text")
        value = holder.attrs[name]
        parts = [value] if isinstance(value, str | bytes) else np.asarray(value).ravel().tolist()
        # h5py lets bytes that are no UTF-8 pass as surrogates; encoding them again refuses them.
        return [(part if isinstance(part, bytes) else str(part).encode()).decode() for part in parts]


def write_array(group: Any, path: str, array: np.ndarray, *, label: bool) -> None:
    """Adds an array in one piece; `label` marks bfloat16 as Keras 3 does outside its legacy format."""
    plain = np.ascontiguousarray(array).reshape(array.shape)
    dataset = group.create_dataset(path, data=plain.view("V2") if array.dtype == BFLOAT16 else plain)
    if label and array.dtype == BFLOAT16:
        dataset.attrs["dtype"] = "bfloat16"


def write_texts(holder: Any, name: str, texts: Iterable[str]) -> None:
    """Sets a list of texts, in as many attributes as it needs."""
    data = np.array([text.encode() for text in texts])
    if data.itemsize > MAX_NAME_BYTES:
        raise ValueError(f"a name is longer than {MAX_NAME_BYTES} bytes, which HDF5 cannot hold in {name!r}")
    if data.nbytes <= MAX_NAME_BYTES:
        holder.attrs[name] = data if data.size else np.zeros(0)
        return
    for place, part in enumerate(np.array_split(data, -(-data.nbytes // MAX_NAME_BYTES) + 1)):
        holder.attrs[f"{name}{place}"] = part
