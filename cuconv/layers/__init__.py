"""Keras' convolution family as layers on NumPy and CuPy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cuconv.layers.base import (
    Activation,
    DTypePolicy,
    InputLayer,
    Layer,
    reset_names,
)
from cuconv.layers.conv import Conv1D, Conv2D, Conv3D, Convolution1D, Convolution2D, Convolution3D
from cuconv.layers.conv_lstm import ConvLSTM1D, ConvLSTM2D, ConvLSTM3D
from cuconv.layers.depthwise import DepthwiseConv1D, DepthwiseConv2D
from cuconv.layers.reshape import Cropping1D, Cropping2D, Cropping3D, ZeroPadding1D, ZeroPadding2D, ZeroPadding3D
from cuconv.layers.separable import SeparableConv1D, SeparableConv2D, SeparableConvolution1D, SeparableConvolution2D
from cuconv.layers.transpose import (
    Conv1DTranspose,
    Conv2DTranspose,
    Conv3DTranspose,
    Convolution1DTranspose,
    Convolution2DTranspose,
    Convolution3DTranspose,
)
from cuconv.layers.upsample import UpSampling1D, UpSampling2D, UpSampling3D

__all__ = [
    "Activation",
    "Conv1D",
    "Conv1DTranspose",
    "Conv2D",
    "Conv2DTranspose",
    "Conv3D",
    "Conv3DTranspose",
    "ConvLSTM1D",
    "ConvLSTM2D",
    "ConvLSTM3D",
    "Convolution1D",
    "Convolution1DTranspose",
    "Convolution2D",
    "Convolution2DTranspose",
    "Convolution3D",
    "Convolution3DTranspose",
    "Cropping1D",
    "Cropping2D",
    "Cropping3D",
    "DTypePolicy",
    "DepthwiseConv1D",
    "DepthwiseConv2D",
    "InputLayer",
    "Layer",
    "SeparableConv1D",
    "SeparableConv2D",
    "SeparableConvolution1D",
    "SeparableConvolution2D",
    "UpSampling1D",
    "UpSampling2D",
    "UpSampling3D",
    "ZeroPadding1D",
    "ZeroPadding2D",
    "ZeroPadding3D",
    "deserialize",
    "register",
    "reset_names",
    "serialize",
]

_CLASSES: dict[str, type[Layer]] = {}  # by every name a config may use
_ORIGINS: dict[type[Layer], tuple[str, str, str | None]] = {}  # Keras' module, class name and registered name


def register(
    cls: type[Layer], module: str, class_name: str, *, registered_name: str | None = None, also: Sequence[str] = ()
) -> None:
    """Lets a config with that class name, or one in `also`, mean `cls`, and `serialize` write it as Keras does."""
    _ORIGINS[cls] = (module, class_name, registered_name)
    _CLASSES.update(dict.fromkeys((class_name, *also), cls))


for _name, _value in list(globals().items()):
    if isinstance(_value, type) and issubclass(_value, Layer):
        register(_value, "keras.layers", _value.__name__, also=(_name,))  # _name may be an alias


def class_name(layer: Layer) -> str:
    """What Keras calls the class of a layer."""
    cls = type(layer)
    return _ORIGINS[cls][1] if cls in _ORIGINS else cls.__name__


def has_class(name: str) -> bool:
    """Whether a config with that class name is understood without `custom_objects`."""
    return name in _CLASSES


def serialize(layer: Layer) -> dict[str, Any]:
    """Keras 3's dict of a layer: its class, its config and the shape it was built for."""
    cls = type(layer)
    module, name, registered = _ORIGINS.get(cls, (cls.__module__, cls.__name__, cls.__name__))
    config: dict[str, Any] = {
        "module": module,
        "class_name": name,
        "config": layer.get_config(),
        "registered_name": registered,
    }
    if layer._build_shape is not None:
        config["build_config"] = {"input_shape": layer._build_shape}
    return config


def deserialize(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
    """A layer or model from the dict of Keras 3, or of Keras 2, which has only `class_name` and `config`.

    Args:
        custom_objects: name -> class or callable that is not built in; nothing is ever imported by name.
    """
    custom = dict(custom_objects or {})
    name = config.get("class_name") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or not isinstance(config.get("config"), Mapping | list):
        raise ValueError(f"a layer's config holds `class_name` and `config`. Received: {config!r}")
    registered = str(config.get("registered_name"))
    cls = custom.get(registered) or custom.get(name.rpartition(">")[2]) or _CLASSES.get(name)
    if cls is None:
        raise ValueError(
            f"Unknown layer. Pass `custom_objects={{{name!r}: ...}}` or use one of {', '.join(sorted(_CLASSES))}. "
            f"Received: class_name={name!r}"
        )
    return cls.from_config(config["config"], custom_objects=custom)
