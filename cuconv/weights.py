"""Models and weights in files; the suffix of a path names the format, `cuconv.files` knows it.

===================  ===================================================  ===========================
suffix               holds                                                needs
===================  ===================================================  ===========================
``.npz``             weights, or a model with them: cuconv's own format   nothing
``.keras``           a model of Keras 3                                   ``pip install cuconv[files]``
``.h5``              weights or a model in Keras 1's and 2's layout       the same
``.weights.h5``      weights of Keras 3                                   the same
``.safetensors``     weights by path, "conv1d/kernel"                     the same
===================  ===================================================  ===========================

Files may come from anyone. Names, shapes and sizes are compared with the layers and with the size of the file before
memory is taken, nothing in a file is executed, and whatever is wrong is one ValueError. Files are written beside their
place and moved there at the end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cuconv import ops
from cuconv.files import keras, npz, tensors
from cuconv.files.common import PathLike, Stored, intact, reason
from cuconv.layers.base import Layer, hollow_weights

MODEL_SUFFIXES = (".npz", ".keras", ".h5")
KINDS = {".npz": "cuconv", ".safetensors": "safetensors", ".keras": "Keras", ".h5": "Keras"}
WEIGHT_SUFFIXES = (".npz", ".weights.h5", ".h5", ".safetensors")


# --- Weights -----------------------------------------------------------------------------------------------------


def save_weights(layer: Layer, path: PathLike) -> None:
    """Writes the weights of a layer or model to a .npz, .weights.h5, .h5 or .safetensors file."""
    place = _place(path, WEIGHT_SUFFIXES)
    arrays = named_arrays(layer)
    if place.suffix == ".npz":
        npz.write(place, arrays, None)
    elif place.suffix == ".safetensors":
        tensors.write(place, arrays)
    else:
        keras.write_weights(place, layer)


def load_weights(layer: Layer, path: PathLike) -> None:
    """Overwrites the weights of a built layer or model with those of a .npz, .keras, .h5 or .safetensors file.

    Values are cast to the dtype of the weights.

    Raises:
        ValueError: the file is damaged, or its names or shapes are not those of the layer. No weight has been changed
            then.
        ImportError: the library for this format is missing.
    """
    place = _place(path, (*WEIGHT_SUFFIXES, ".keras"))
    own = {name: weight.value for name, weight in layer._named_weights().items()}
    with _stored(place, layer) as stored:
        arrays = _read(place, layer, own, stored)
    for name, value in own.items():
        value[...] = ops.like(arrays[name], value)


def named_arrays(layer: Layer) -> dict[str, np.ndarray]:
    """The weights by path, as NumPy arrays."""
    if not layer.built:
        raise ValueError(f"{layer.name!r} has no weights to save yet: build it, or call it. Received: built=False")
    return {name: ops.to_numpy(weight.value) for name, weight in layer._named_weights().items()}


@contextlib.contextmanager
def _stored(place: Path, layer: Layer) -> Iterator[dict[str, Stored]]:
    """What the file holds, under the names of the layer's weights where it is clear which is meant."""
    if place.suffix in (".npz", ".safetensors"):
        with (npz if place.suffix == ".npz" else tensors).opened(place) as stored:
            yield stored
    else:
        with keras.opened(place) as (_, reader):
            with intact(place, "Keras"):
                stored = keras.stored_weights(reader, layer)
            yield stored


def _read(place: Path, layer: Layer, own: Mapping[str, Any], stored: Mapping[str, Stored]) -> dict[str, np.ndarray]:
    """The arrays of the file, if they are those of the layer."""
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    found = {name: each.shape for name, each in stored.items()}
    differing = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
    if differing:
        listed = ", ".join(f"{name} ({found.get(name)} for {shapes.get(name)})" for name in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(
            f"these are not the weights of {layer.name!r}, they differ in {listed}{more}. "
            f"Received: path={os.fspath(place)!r}"
        )
    for name, value in own.items():
        if stored[name].dtype.kind == "c" and np.dtype(value.dtype).kind != "c":
            raise ValueError(
                f"weight {name!r} of {layer.name!r} is real and the file's is {stored[name].dtype}. "
                f"Received: path={os.fspath(place)!r}"
            )
    with intact(place, KINDS[place.suffix]):
        return {name: stored[name].read() for name in own}


# --- Models ------------------------------------------------------------------------------------------------------


def save_model(model: Layer, path: PathLike, config: Callable[[], Mapping[str, Any]]) -> None:
    """Writes config and weights to a .npz, .keras or .h5 file."""
    place = _place(path, MODEL_SUFFIXES)
    arrays = named_arrays(model)
    if place.suffix == ".npz":
        npz.write(place, arrays, config())
    else:
        keras.write_model(place, model)


def load_model(path: PathLike, create: Callable[[Mapping[str, Any]], Any], custom_names: Collection[str] = ()) -> Any:
    """The model that `create` makes of the config in the file, with the weights in the file."""
    place = _place(path, MODEL_SUFFIXES)
    if place.suffix == ".npz":
        return npz.load_model(place, create, custom_names)
    with keras.opened(place) as (config, reader):
        if config is None:
            raise ValueError(
                f"this file holds weights without a model: use load_weights. Received: path={os.fspath(path)!r}"
            )
        try:
            keras.check_classes(config, custom_names)
            with hollow_weights():
                model = create(config)
            stored = keras.stored_weights(reader, model)
        except Exception as error:  # a config from elsewhere can be wrong in any way
            raise ValueError(
                f"this model cannot be built: {reason(error)}. Received: path={os.fspath(path)!r}"
            ) from error
        own = model._named_weights()
        arrays = _read(place, model, {name: weight.value for name, weight in own.items()}, stored)
    for name, weight in own.items():
        weight.value = np.require(arrays.pop(name), weight.value.dtype, ["C", "W"])
    return model


def _place(path: PathLike, suffixes: tuple[str, ...]) -> Path:
    place = Path(path)
    end = ".weights.h5" if place.name.endswith(".weights.h5") else place.suffix
    if end not in suffixes:
        advice = " Weights without a model are for load_weights and save_weights." if end in WEIGHT_SUFFIXES else ""
        advice = advice or (" A model is saved with Model.save." if end in MODEL_SUFFIXES else "")
        raise ValueError(f"`path` must end in {', '.join(suffixes)}.{advice} Received: path={os.fspath(path)!r}")
    return place
