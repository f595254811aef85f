"""Names and config dicts of activations, initializers, regularizers and constraints, in Keras' grammar.

Three spellings are read: a name (``"glorot_uniform"`` or ``"GlorotUniform"``), Keras 3's dict and Keras 2's dict::

    {"module": "keras.initializers", "class_name": "Zeros", "config": {}, "registered_name": None}
    {"class_name": "Zeros", "config": {}}

Keras 3's dict is written. Nothing is ever imported or evaluated because a config names it: what is not built in must be
in `custom_objects`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np


def snake_case(name: str) -> str:
    """Keras' lower-case spelling of a class name: ``GlorotUniform`` -> ``glorot_uniform``, ``L1L2`` -> ``l1l2``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()


def both_spellings(classes: Iterable[type]) -> dict[str, Any]:
    """Each class under its own name and under its snake_case name."""
    return {name: cls for cls in classes for name in (cls.__name__, snake_case(cls.__name__))}


def suggestion(name: str, names: Iterable[str]) -> str:
    """A sentence naming the closest of `names`, empty if none is close. Case and underscores do not count."""

    def squashed(word: str) -> str:
        return word.replace("_", "").lower()

    spellings = {squashed(word): word for word in sorted(names)}
    close = difflib.get_close_matches(squashed(name), spellings, n=1)
    return f" Did you mean {spellings[close[0]]!r}?" if close else ""


def to_plain(value: Any) -> Any:
    """`value` as JSON can hold it: NumPy scalars become Python's, arrays become Keras' ``__numpy__`` dict."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return {"class_name": "__numpy__", "config": {"value": value.tolist(), "dtype": value.dtype.name}}
    return value


def from_plain(value: Any) -> Any:
    """The inverse of :func:`to_plain`; Keras writes arrays of its backend as ``__tensor__``."""
    if isinstance(value, Mapping) and value.get("class_name") in ("__numpy__", "__tensor__"):
        return np.array(value["config"]["value"], dtype=value["config"]["dtype"])
    return value


class Configurable:
    """Base of objects described by their constructor's arguments."""

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments by name, JSON-serializable, as Keras 3 writes them."""
        return {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """An object with the constructor arguments `config`."""
        return cls(**{key: from_plain(value) for key, value in config.items()})

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


class Wrapped:
    """A user's plain callable, dressed as an object of ours."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


class Registry:
    """Everything of one kind that has a name, and the two directions between objects and configs.

    Args:
        kind: word for error messages, e.g. "initializer".
        module: where Keras keeps these objects, e.g. "keras.initializers".
        objects: name -> class to instantiate, or ready object.
        wrap: dresses a plain callable as an object of this kind, and returns one that is already as it is.
        refused: name -> why it is not accepted and what to write instead.
    """

    def __init__(
        self,
        kind: str,
        module: str,
        objects: Mapping[str, Any],
        wrap: Callable[[Any], Any],
        refused: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self.module = module
        self.objects = objects
        self.wrap = wrap
        self.refused = refused or {}

    def get(self, identifier: Any, custom_objects: Mapping[str, Any] | None = None) -> Any:
        """The object that a name, config dict, class, instance or callable stands for; None stays None."""
        if identifier is None:
            return None
        custom = custom_objects or {}
        if isinstance(identifier, str):
            if identifier in self.refused and identifier not in custom:
                raise ValueError(f"{self.refused[identifier]} Received: {self.kind}={identifier!r}")
            found = self._create(self._named(identifier, custom), {})
        elif isinstance(identifier, Mapping):
            found = self._from_dict(identifier, custom)
        else:
            found = identifier() if isinstance(identifier, type) else identifier
        if not callable(found):
            raise ValueError(
                f"`{self.kind}` must be None, a name, a callable, a class or a config dict. "
                f"Received: {self.kind}={identifier!r} (of type {type(identifier).__name__})"
            )
        return self.wrap(found)

    def serialize(self, obj: Any) -> dict[str, Any] | None:
        """Keras 3's dict for an object of this kind, or None for None."""
        if obj is None:
            return None
        obj = obj.function if isinstance(obj, Wrapped) else obj
        cls = type(obj)
        if hasattr(obj, "get_config"):
            builtin = self.objects.get(cls.__name__) is cls
            return {
                "module": self.module if builtin else None if cls.__module__ == "__main__" else cls.__module__,
                "class_name": cls.__name__,
                "config": obj.get_config(),
                "registered_name": None if builtin else cls.__name__,
            }
        name = getattr(obj, "__name__", "<lambda>")
        if name == "<lambda>":
            raise ValueError(
                f"`{self.kind}` can be saved if it is a named function or has `get_config`. "
                f"Received: {self.kind}={obj!r}"
            )
        return {"module": "builtins", "class_name": "function", "config": name, "registered_name": "function"}

    def _from_dict(self, config: Mapping[str, Any], custom: Mapping[str, Any]) -> Any:
        name, arguments = config.get("class_name"), config.get("config") or {}
        if name == "function":
            name, arguments = arguments, {}
        if not (isinstance(name, str) and isinstance(arguments, Mapping)):
            raise ValueError(
                f"The config dict of `{self.kind}` must hold a string `class_name` and a dict `config` (for a function "
                f"its name). Received: {self.kind}={dict(config)!r}"
            )
        name = next((key for key in custom if key == config.get("registered_name")), name)
        # Keras 3 writes each object's module, Keras 2 wrote none. A module that is not Keras' means a custom object,
        # which must not be mistaken for a built-in of the same name.
        module = config.get("module", self.module)
        builtin = module is not None and module.partition(".")[0] in ("keras", "builtins")
        return self._create(self._named(name, custom, self.objects if builtin else {}), arguments)

    def _named(self, name: str, custom: Mapping[str, Any], builtins: Mapping[str, Any] | None = None) -> Any:
        builtins = self.objects if builtins is None else builtins
        short = name.rpartition(">")[2]  # a registered custom object is called "package>name"
        for table, key in ((custom, name), (custom, short), (builtins, name)):
            if key in table:
                return table[key]
        if builtins:
            names = f" Names: {', '.join(sorted(builtins))}; others must be in `custom_objects`."
            hint = suggestion(name, builtins) or names
        else:
            hint = f" It is not part of cuconv; pass `custom_objects={{{short!r}: ...}}`."
        raise ValueError(f"Unknown {self.kind}.{hint} Received: {self.kind}={name!r}")

    @staticmethod
    def _create(entry: Any, arguments: Mapping[str, Any]) -> Any:
        if not isinstance(entry, type):
            return entry
        return entry.from_config(arguments) if hasattr(entry, "from_config") else entry(**arguments)
