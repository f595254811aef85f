"""safetensors: the arrays of a layer under their paths, "conv1d/kernel"."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from cuconv.files.common import MAX_CONFIG_BYTES, Stored, intact, library, replacing
from cuconv.layers.base import BFLOAT16

DTYPES = {"F16": "f2", "F32": "f4", "F64": "f8", "C64": "c8", "BF16": BFLOAT16}


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays; the file is complete or not there at all."""
    numpy = library("safetensors.numpy")
    large = [name for name, array in arrays.items() if array.dtype == np.complex128]
    if large:
        raise ValueError(f"safetensors files hold no complex128; .npz files do. Received: {', '.join(large)}")
    with replacing(path) as stream:
        numpy.save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, stream.name, {"format": "cuconv"}
        )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[dict[str, Stored]]:
    """What the file holds, by name, while it is open."""
    safetensors = library("safetensors")
    with open(path, "rb") as stream, intact(path, "safetensors"):
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_CONFIG_BYTES:
            raise ValueError(f"its header has {length} bytes, more than {MAX_CONFIG_BYTES}")
    with contextlib.ExitStack() as stack:
        found = {}
        with intact(path, "safetensors"):
            file = stack.enter_context(safetensors.safe_open(path, framework="np"))
            for name in file.keys():  # noqa: SIM118  the file is no dict
                view = file.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise ValueError(f"array {name!r} holds {view.get_dtype()} and not floating-point numbers")
                read = functools.partial(file.get_tensor, name)
                found[name] = Stored(tuple(view.get_shape()), np.dtype(DTYPES[view.get_dtype()]), read)
        yield found
