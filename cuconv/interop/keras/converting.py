"""Layers and models of Keras as ours, and ours as Keras': by configuration, then weight by weight.

The configurations are those that :mod:`cuconv.layers` reads and writes anyway; here they are only handed on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from cuconv import layers
from cuconv.files.keras import check_classes
from cuconv.models import Model, Sequential


def from_keras(layer_or_model: Any, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """Our layer or model with the configuration and, where it is built, the weights of Keras'.

    Weights on a GPU stay there, as CuPy arrays of their own.

    Args:
        layer_or_model: a layer, or a Sequential or functional model of such layers, nested too.
        custom_objects: name -> our class or callable for what a configuration names and cuconv does not have.

    Raises:
        TypeError: it is no layer of Keras.
        ValueError: it is, or holds, what cuconv has no class for; the message names all. Or an option is none of ours.
    """
    if not isinstance(layer_or_model, keras.layers.Layer):
        raise TypeError(
            f"`layer_or_model` must be a layer or model of Keras. Received: {type(layer_or_model).__name__}"
        )
    config = _without_lora(keras.saving.serialize_keras_object(layer_or_model))
    check_classes(config, custom_objects or ())
    ours = layers.deserialize(config, custom_objects)
    if layer_or_model.weights and not ours.built:
        ours.build(layer_or_model.get_build_config()["input_shape"])
    for theirs, leaf in _leaf_pairs(layer_or_model, ours):
        arrays = [_array(weight) for weight in _weights(theirs)]
        if arrays and not isinstance(arrays[0], np.ndarray):
            leaf._move(arrays[0])
        leaf.set_weights(arrays)
    return ours


def to_keras(layer_or_model: Any, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """Keras' layer or model with the configuration and, where it is built, the weights of ours.

    Args:
        layer_or_model: a layer or model of cuconv.
        custom_objects: name -> Keras' class or callable for what a configuration names and Keras does not have.

    Raises:
        TypeError: it is no layer of cuconv.
        ValueError: it is, or holds, a class that Keras does not have, or complex numbers; the message names all.
    """
    if not isinstance(layer_or_model, layers.Layer):
        raise TypeError(
            f"`layer_or_model` must be a layer or model of cuconv. Received: {type(layer_or_model).__name__}"
        )
    unknown = [each for each in _all_layers(layer_or_model) if not _is_of_keras(each, custom_objects or ())]
    if unknown:
        names = (f"{each.name!r} ({type(each).__name__}, {each.compute_dtype})" for each in unknown)
        raise ValueError(f"Keras does not have the layers {', '.join(dict.fromkeys(names))}")
    theirs = keras.saving.deserialize_keras_object(layers.serialize(layer_or_model), custom_objects)
    for ours, leaf in _leaf_pairs(layer_or_model, theirs):
        leaf.set_weights(ours.get_weights())
    return theirs


def _is_of_keras(layer: layers.Layer, custom_names: Collection[str]) -> bool:
    """Whether Keras has the class and the dtype of a layer of ours."""
    cls, name = type(layer), type(layer).__name__
    own = cls in (Model, Sequential) or (getattr(layers, name, None) is cls and hasattr(keras.layers, name))
    return (own or name in custom_names) and not layer.compute_dtype.startswith("complex")


def _all_layers(layer: Any) -> Iterator[Any]:
    yield layer
    for each in getattr(layer, "layers", ()):
        yield from _all_layers(each)


def _leaf_pairs(one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    """The layers that are no models, with those of the same place in the other library's model."""
    if not hasattr(one, "layers"):
        yield one, other
    for each in getattr(one, "layers", ()):
        yield from _leaf_pairs(each, other.get_layer(each.name))


def _weights(layer: Any) -> list[Any]:
    """The weights of a layer of Keras, with LoRA's factors merged into the kernel."""
    if not getattr(layer, "lora_enabled", False):
        return list(layer.weights)
    return [each for each in (layer.kernel, layer.bias) if each is not None]


def _without_lora(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {key: _without_lora(each) for key, each in config.items() if not str(key).startswith("lora_")}
    return [_without_lora(each) for each in config] if isinstance(config, list | tuple) else config


def _array(weight: Any) -> Any:
    """A variable or tensor of Keras as an array where it lies: CuPy's on a GPU of torch, else NumPy's."""
    tensor = weight.value if isinstance(weight, keras.Variable) else weight
    if getattr(tensor, "is_cuda", False):
        from cuconv.interop.torch.arrays import view  # torch is there, or there would be no such tensor

        return view(tensor)
    return keras.ops.convert_to_numpy(tensor)
