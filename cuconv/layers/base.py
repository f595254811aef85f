"""What every layer shares: names, dtype policies, symbolic calls, weights, configuration and the two training passes.

A family of layers overrides, besides its constructor:

* ``_weight_shapes(input_shape)``: name -> shape of each weight, every shape error raised before anything is allocated;
* ``_infer(x, training=)``: the output, fused as far as possible;
* ``_record(x, training=)``: the output and what ``_propagate`` needs of the way there;
* ``_propagate(saved, dy)``: the gradient of the input and of each weight;
* ``compute_output_shape(input_shape)``.

None of the three passes stores anything on the layer, so one layer can stand at several places of a model.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

from cuconv import activations, constraints, geometry, initializers, ops, regularizers

Array: TypeAlias = Any  # a NumPy or a CuPy array
Shape: TypeAlias = "tuple[int | None, ...]"


# --- Names -------------------------------------------------------------------------------------------------------

_names: Counter[str] = Counter()


def name_stem(class_name: str) -> str:
    """What Keras makes of a class name: ``Conv1DTranspose`` -> "conv1d_transpose"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=.)(?=[A-Z][a-z])", "_", class_name).lower()


def auto_name(class_name: str) -> str:
    """Keras' automatic name: ``Conv1D`` -> "conv1d", then "conv1d_1", "conv1d_2", ..."""
    stem = name_stem(class_name)
    number = _names[stem]
    _names[stem] += 1
    return f"{stem}_{number}" if number else stem


def reset_names() -> None:
    """Lets automatic names start again at "conv1d"."""
    _names.clear()


# --- Dtypes ------------------------------------------------------------------------------------------------------

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64", "complex64", "complex128")} | {
    "bfloat16": BFLOAT16
}
_MIXED = {"mixed_float16": "float16", "mixed_bfloat16": "bfloat16"}


@dataclass(frozen=True)
class DTypePolicy:
    """The dtype a layer computes in and the dtype its weights are kept in.

    Args:
        name: "float16", "bfloat16", "float32", "float64", "complex64" or "complex128" for both; "mixed_float16" or
            "mixed_bfloat16" for 16-bit computation with float32 weights.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in _DTYPES and self.name not in _MIXED:
            raise ValueError(f"`dtype` must be one of {', '.join([*_DTYPES, *_MIXED])}. Received: dtype={self.name!r}")

    @property
    def compute_dtype(self) -> str:
        """Name of the dtype of inputs, outputs and arithmetic."""
        return _MIXED.get(self.name, self.name)

    @property
    def variable_dtype(self) -> str:
        """Name of the dtype of the weights."""
        return "float32" if self.name in _MIXED else self.name

    def get_config(self) -> dict[str, str]:
        """The constructor's arguments."""
        return {"name": self.name}

    @classmethod
    def get(cls, dtype: Any) -> DTypePolicy:
        """The policy that a name, NumPy dtype, policy or config dict stands for; None is "float32"."""
        if isinstance(dtype, DTypePolicy):
            return dtype
        if isinstance(dtype, Mapping):
            dtype = dtype["config"].get("name") if isinstance(dtype.get("config"), Mapping) else dict(dtype)
        if isinstance(dtype, str) or dtype is None:
            return cls(dtype or "float32")
        try:
            return cls(np.dtype(dtype).name)
        except TypeError:
            raise ValueError(
                f"`dtype` must be the name of a dtype or a DTypePolicy. Received: dtype={dtype!r}"
            ) from None


# --- Symbolic calls ----------------------------------------------------------------------------------------------


class SymbolicTensor:
    """The shape and dtype of an array that a model will compute, and the node that computes it."""

    __slots__ = ("dtype", "index", "node", "shape")

    def __init__(self, shape: Shape, dtype: str, node: Node, index: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self.node = node
        self.index = index

    @property
    def name(self) -> str:
        """Name of the layer this comes from."""
        return self.node.layer.name

    def __repr__(self) -> str:
        return f"<SymbolicTensor shape={self.shape}, dtype={self.dtype}, name={self.name}>"


class Node:
    """One symbolic call of a layer: the tensors that went in and those that come out."""

    __slots__ = ("inputs", "layer", "outputs")

    def __init__(
        self, layer: Layer, inputs: Sequence[SymbolicTensor], shapes: Iterable[Shape], dtypes: Iterable[str]
    ) -> None:
        self.layer = layer
        self.inputs = tuple(inputs)
        self.outputs = tuple(
            SymbolicTensor(shape, dtype, self, index)
            for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
        )
        layer._nodes.append(self)


# --- Arguments ---------------------------------------------------------------------------------------------------


def as_shape(value: Any, name: str) -> Shape:
    """`value` as a tuple of sizes, each None or an integer >= 0."""
    entries = list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else [value]
    sizes = tuple(None if entry is None else geometry.as_int(entry) for entry in entries)
    wrong = [
        entry for entry, size in zip(entries, sizes, strict=True) if entry is not None and (size is None or size < 0)
    ]
    if wrong or not hasattr(value, "__iter__"):
        raise ValueError(f"`{name}` must be a tuple of integers >= 0 or None. Received: {name}={value!r}")
    return sizes


def as_flag(value: Any, name: str) -> bool:
    """`value` as a bool; integers 0 and 1 are accepted."""
    if isinstance(value, bool | np.bool_) or geometry.as_int(value) in (0, 1):
        return bool(value)
    raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}")


def as_trainable(value: Any) -> bool:
    """`value`, which must be a bool, as Keras demands here."""
    if not isinstance(value, bool):
        raise ValueError(f"`trainable` must be True or False. Received: trainable={value!r}")
    return value


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == BFLOAT16


# Arguments that stand for an object, by the last word of their name, and the module that knows such objects.
_OBJECTS: dict[str, Any] = {
    "activation": activations,
    "initializer": initializers,
    "regularizer": regularizers,
    "constraint": constraints,
}


def _object_module(argument: str) -> Any:
    return _OBJECTS.get(argument.rpartition("_")[2])


def _public_signature(cls: type[Layer]) -> inspect.Signature:
    """The constructor's signature as a caller should see it.

    ``*rest`` stands for the parent's arguments that are not named. Above rank 1, a default that is one number for all
    axes is shown as one number for each axis.
    """
    own = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in own):
        named = [parameter for parameter in own if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        names = {parameter.name for parameter in named}
        inherited = _public_signature(cls.__bases__[0]).parameters.values()
        own = named + [parameter for parameter in inherited if parameter.name not in names]
    if cls.rank and cls.rank > 1:
        own = [
            parameter.replace(default=(parameter.default,) * cls.rank)
            if parameter.name in cls._per_axis and isinstance(parameter.default, int)
            else parameter
            for parameter in own
        ]
    return inspect.Signature(own)


# --- Layers ------------------------------------------------------------------------------------------------------

_hollow: ContextVar[bool] = ContextVar("hollow", default=False)


@contextlib.contextmanager
def hollow_weights() -> Iterator[None]:
    """While this is open, layers are built with read-only weights that take no memory, to be replaced afterwards."""
    token = _hollow.set(True)
    try:
        yield
    finally:
        _hollow.reset(token)


class Weight:
    """One weight of a layer; the live array is the layer's attribute of that name."""

    __slots__ = ("constraint", "layer", "name", "regularizer")

    def __init__(self, layer: Layer, name: str, regularizer: Any, constraint: Any) -> None:
        self.layer = layer
        self.name = name
        self.regularizer = regularizer
        self.constraint = constraint

    @property
    def value(self) -> Array:
        """The live array."""
        return getattr(self.layer, self.name)

    @value.setter
    def value(self, array: Array) -> None:
        setattr(self.layer, self.name, array)

    @property
    def trainable(self) -> bool:
        """Whether its layer is trainable."""
        return self.layer.trainable


class Context(NamedTuple):
    """What one forward pass through a layer leaves for its backward pass."""

    saved: Any
    shapes: tuple[Shape, ...]  # of the outputs
    dtypes: tuple[np.dtype, ...]  # of the inputs as they were given
    outputs: tuple[Array, ...]  # kept for the activity regularizer alone


class Layer:
    """Base of all layers.

    Args:
        name: a string without "/"; automatic if None.
        trainable: whether the weights appear in `trainable_weights` and are regularized and constrained.
        dtype: name of a dtype, or a DTypePolicy; None is "float32".
        autocast: whether floating-point inputs are cast to the compute dtype.
        activity_regularizer: regularizer of the output; its loss is divided by the batch size.
        input_shape: shape of the inputs without the batch axis, for the first layer of a Sequential model.
        batch_input_shape: the same with the batch axis.
        batch_size: batch axis that goes with `input_shape`.
        input_dim: number of input channels, for rank 1: the `input_shape` is then (input_length, input_dim).
        input_length: number of input steps that goes with `input_dim`.
        weights: list of arrays in the order of get_weights, taken over when the layer is built.
    """

    rank: ClassVar[int | None] = None  # number of spatial axes
    __signature__: ClassVar[inspect.Signature]
    _per_axis: ClassVar[tuple[str, ...]] = ()  # arguments whose default Keras spells once per axis
    # Keys of Keras 2 configs that are no arguments here -> the only value that means nothing, or ... for any.
    _obsolete: ClassVar[Mapping[str, Any]] = {}
    _takes_integers: ClassVar[bool] = False  # whether integer arrays pass through unchanged

    def __init_subclass__(cls, rank: int | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if rank is not None:
            cls.rank = rank
            family = inspect.getdoc(cls.__bases__[0])
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or cls.__name__)}\n\n{family}"
        cls.__signature__ = _public_signature(cls)

    def __init__(
        self,
        *,
        name: str | None = None,
        trainable: bool = True,
        dtype: Any = None,
        autocast: bool = True,
        activity_regularizer: Any = None,
        input_shape: Sequence[int | None] | None = None,
        batch_input_shape: Sequence[int | None] | None = None,
        batch_size: int | None = None,
        input_dim: int | None = None,
        input_length: int | None = None,
        weights: Sequence[Any] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(
                f"Unrecognized keyword arguments for {type(self).__name__}. The arguments are "
                f"{', '.join(type(self)._argument_names())} and those of every layer. "
                f"Received: {', '.join(f'{key}={value!r}' for key, value in unknown.items())}"
            )
        if name is not None and (not isinstance(name, str) or "/" in name):
            raise ValueError(f'`name` must be a string without "/". Received: name={name!r}')
        self._policy = DTypePolicy.get(dtype)
        self._compute = _DTYPES[self._policy.compute_dtype]
        self._variable = _DTYPES[self._policy.variable_dtype]
        self.autocast = as_flag(autocast, "autocast")
        self._trainable = as_trainable(trainable)
        self.activity_regularizer: Any = regularizers.get(activity_regularizer)
        self._batch_input_shape = _first_shape(
            self.rank, input_shape, batch_input_shape, batch_size, input_dim, input_length
        )
        self._initial_weights = None if weights is None else list(weights)
        self.name = auto_name(type(self).__name__) if name is None else name
        self.built = False
        self.gradients: list[Array] = []
        self._build_shape: Shape | None = None
        self._weights: list[Weight] = []
        self._nodes: list[Node] = []
        self._home: type | None = None  # array class the weights live in, once an input decided it
        self._accepted: tuple[Any, ...] | None = None  # class, shape and dtype of an input that passed every check
        self._context: Any = None
        self._activity_losses: list[float] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} name={self.name}, built={self.built}>"

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along: neither the calls that joined it to others nor what a pass has left."""
        own = [node for node in self._nodes if not node.inputs]
        return {**self.__dict__, "_nodes": own, "_context": None, "gradients": []}

    # --- Facts ---

    @property
    def trainable(self) -> bool:
        """Whether the weights are trained, regularized and constrained."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = as_trainable(value)
        for part in self._parts():
            part.trainable = value

    def _parts(self) -> list[Layer]:
        """The layers this one is made of."""
        return []

    def _leaves(self) -> list[Layer]:
        """The layers with weights of their own, this one or those it is made of."""
        return [self]

    @property
    def dtype_policy(self) -> DTypePolicy:
        """The dtypes of computation and of weights."""
        return self._policy

    @property
    def compute_dtype(self) -> str:
        """Name of the dtype of inputs, outputs and arithmetic."""
        return self._policy.compute_dtype

    @property
    def variable_dtype(self) -> str:
        """Name of the dtype of the weights."""
        return self._policy.variable_dtype

    @property
    def dtype(self) -> str:
        """Name of the dtype of the weights."""
        return self._policy.variable_dtype

    @property
    def input(self) -> Any:
        """The symbolic tensor, or tuple of them, this layer was called with once."""
        return single(self._only_node().inputs)

    @property
    def output(self) -> Any:
        """The symbolic tensor, or tuple of them, that one symbolic call of this layer gave."""
        return single(self._only_node().outputs)

    def _only_node(self) -> Node:
        if len(self._nodes) != 1:
            raise AttributeError(
                f"layer {self.name!r} has `input` and `output` after exactly one symbolic call. "
                f"Received: {len(self._nodes)} calls"
            )
        return self._nodes[0]

    # --- Weights ---

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the weights for inputs of `input_shape` (with the batch axis). A layer with weights is built once.

        Raises:
            ValueError: the layer cannot take such inputs, or is already built. Nothing has been allocated then.
        """
        if self._weights:
            raise ValueError(f"layer {self.name!r} is already built. Received: input_shape={tuple(input_shape)}")
        shape = as_shape(input_shape, "input_shape")
        self._check_shape(shape)
        values = self._initial_values(self._weight_shapes(shape))
        for name, value in values.items():
            setattr(self, name, value)
            option = self._option_name(name)
            self._weights.append(
                Weight(self, name, getattr(self, f"{option}_regularizer"), getattr(self, f"{option}_constraint"))
            )
        self._build_shape = shape
        self.built = True

    def _weight_shapes(self, input_shape: Shape) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each weight, in the order of get_weights."""
        return {}

    def _option_name(self, weight: str) -> str:
        """The word in front of `_initializer`, `_regularizer` and `_constraint` of that weight."""
        return weight.removesuffix("_kernel")

    def _set_options(self, **options: tuple[Any, Any, Any]) -> None:
        """Sets `<word>_initializer`, `<word>_regularizer` and `<word>_constraint` for each word."""
        for word, (initializer, regularizer, constraint) in options.items():
            setattr(self, f"{word}_initializer", initializers.get(initializer))
            setattr(self, f"{word}_regularizer", regularizers.get(regularizer))
            setattr(self, f"{word}_constraint", constraints.get(constraint))

    def _initial_values(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
        if _hollow.get():
            zero = np.zeros((), self._variable)
            return {name: np.broadcast_to(zero, shape) for name, shape in shapes.items()}
        given = self._initial_weights
        if given is None:
            return {
                name: _fitted(self._initial_value(name, shape), shape, name, self._variable)
                for name, shape in shapes.items()
            }
        arrays = _checked(self, given, [(name, shape, self._variable) for name, shape in shapes.items()])
        self._initial_weights = None
        return {name: np.array(ops.to_numpy(array), self._variable) for name, array in zip(shapes, arrays, strict=True)}

    def _initial_value(self, name: str, shape: tuple[int, ...]) -> Array:
        initializer: Any = initializers.get(getattr(self, f"{self._option_name(name)}_initializer"), "glorot_uniform")
        return initializer(shape, dtype=self.variable_dtype)

    def _all_weights(self) -> list[Weight]:
        return [weight for leaf in self._leaves() for weight in leaf._weights]

    @property
    def weights(self) -> list[Array]:
        """The live arrays in the order of get_weights; changing one in place changes the layer."""
        return [weight.value for weight in self._all_weights()]

    @property
    def trainable_weights(self) -> list[Array]:
        """Those of `weights` that are trained."""
        return [weight.value for weight in self._all_weights() if weight.trainable]

    @property
    def non_trainable_weights(self) -> list[Array]:
        """Those of `weights` that are not trained."""
        return [weight.value for weight in self._all_weights() if not weight.trainable]

    @property
    def trainable_gradients(self) -> list[Array]:
        """Those of `gradients` that belong to `trainable_weights`, in the same order."""
        return [
            gradient for weight, gradient in zip(self._all_weights(), self.gradients, strict=False) if weight.trainable
        ]

    @property
    def weight_names(self) -> list[str]:
        """The names of `weights`; in a model with the layers' names in front."""
        paths = {weight: path for path, weight in reversed(self._named_weights().items())}
        return [paths[weight] for weight in self._all_weights()]

    def _named_weights(self) -> dict[str, Weight]:
        """Every path to a weight; in a model, several may lead to one weight."""
        return {weight.name: weight for weight in self._weights}

    def get_weights(self) -> list[np.ndarray]:
        """NumPy copies of the weights."""
        return [np.array(ops.to_numpy(value)) for value in self.weights]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Overwrites the weights, in the order of get_weights. Values are cast to the dtype of the weights.

        Raises:
            ValueError: another number of arrays, or another shape. No weight has been changed then.
        """
        own = self.weights
        specs = [(name, value.shape, value.dtype) for name, value in zip(self.weight_names, own, strict=True)]
        for value, array in zip(own, _checked(self, list(weights), specs), strict=True):
            value[...] = ops.like(array, value)

    def count_params(self) -> int:
        """Number of scalars in the weights."""
        if not self.built:
            raise ValueError(
                f"layer {self.name!r} has no weights to count yet: build it, or call it. Received: built=False"
            )
        return sum(int(weight.value.size) for weight in self._all_weights())

    def apply_constraints(self) -> None:
        """Applies each constraint to its weight in place, where trainable; to be called after an update."""
        for weight in self._all_weights():
            if weight.constraint is not None and weight.trainable:
                weight.value[...] = weight.constraint(weight.value)

    @property
    def losses(self) -> list[float]:
        """Activity losses of the last call, then the regularization of each trainable weight."""
        activity = [loss for leaf in self._leaves() for loss in leaf._activity_losses]
        return activity + [
            float(weight.regularizer(weight.value))
            for weight in self._all_weights()
            if weight.regularizer is not None and weight.trainable
        ]

    # --- Calls ---

    def __call__(self, inputs: Any, /, *, training: bool = False) -> Any:
        """The output for an array, or a symbolic tensor for a symbolic tensor."""
        return self._apply((inputs,), training)

    def forward(self, inputs: Any, /, *, training: bool = True) -> Any:
        """The output, keeping what `backward` needs."""
        return self._apply_recording((inputs,), training)

    def backward(self, dy: Any) -> Any:
        """The gradient of the inputs of the last `forward`, given that of its outputs; fills `gradients`."""
        if self._context is None:
            raise RuntimeError(f"`backward` of layer {self.name!r} needs a `forward` before it.")
        dx, gradients = self._backward(self._context, dy)
        self.gradients = [
            gradient + weight.regularizer.gradient(weight.value)
            if weight.regularizer is not None and weight.trainable
            else gradient
            for weight, gradient in zip(self._all_weights(), gradients, strict=True)
        ]
        return dx

    def _apply(self, inputs: tuple[Any, ...], training: bool) -> Any:
        if inputs[0].__class__ is SymbolicTensor:
            return self._connect(inputs)
        self._forget_activity()
        return self._run(*inputs, training=training)

    def _apply_recording(self, inputs: tuple[Any, ...], training: bool) -> Any:
        self._forget_activity()
        outputs, self._context = self._forward(*inputs, training=training)
        return outputs

    def _forget_activity(self) -> None:
        if self._activity_losses:
            self._activity_losses = []

    def _run(self, *inputs: Array, training: bool) -> Any:
        """One inference pass."""
        x = inputs[0]
        if len(inputs) > 1 or (x.__class__, getattr(x, "shape", None), getattr(x, "dtype", None)) != self._accepted:
            inputs = self._accept(inputs)
        outputs = self._infer(*inputs, training=training)
        if self.activity_regularizer is not None:
            self._note_activity(outputs)
        return outputs

    def _forward(self, *inputs: Array, training: bool) -> tuple[Any, Context]:
        """One training pass: the outputs, and what `_backward` needs."""
        arrays = self._accept(inputs)
        outputs, saved = self._record(*arrays, training=training)
        every = to_tuple(outputs)
        if self.activity_regularizer is not None:
            self._note_activity(outputs)
        return outputs, Context(
            saved,
            tuple(y.shape for y in every),
            tuple(x.dtype for x in inputs),
            every if self.activity_regularizer is not None else (),
        )

    def _backward(self, context: Any, dy: Any) -> tuple[Any, list[Array]]:
        """Gradients of the inputs, and of the weights in get_weights order without their regularizers' share."""
        parts = [self._output_gradient(part, shape) for part, shape in zip(to_tuple(dy), context.shapes, strict=True)]
        for index, y in enumerate(context.outputs):
            share = (self.activity_regularizer.gradient(y) / max(1, y.shape[0])).astype(self._compute, copy=False)
            parts[index] = share if parts[index] is None else parts[index] + share
        if all(part is None for part in parts):
            raise ValueError(f"`backward` of layer {self.name!r} needs the gradient of an output. Received: dy=None")
        dx, gradients = self._propagate(context.saved, single(tuple(parts)))
        dx = tuple(part.astype(dtype, copy=False) for part, dtype in zip(to_tuple(dx), context.dtypes, strict=True))
        return single(dx), [gradient.astype(self._variable, copy=False) for gradient in gradients]

    def _has_losses(self, context: Any) -> bool:
        """Whether that pass has a gradient even if no output has one."""
        return bool(context.outputs)

    def _output_gradient(self, dy: Any, shape: Shape) -> Array:
        if dy is None:
            return None
        if getattr(dy, "shape", None) != shape:
            raise ValueError(
                f"the gradient of an output must have the output's shape {shape}. "
                f"Received: dy of shape {getattr(dy, 'shape', None)} (layer {self.name!r})"
            )
        return dy.astype(self._compute, copy=False)

    def _note_activity(self, outputs: Any) -> None:
        for y in to_tuple(outputs):
            batch = y.shape[0]
            self._activity_losses.append(float(self.activity_regularizer(y)) / batch if batch else 0.0)

    def _infer(self, *inputs: Array, training: bool) -> Any:
        return self._record(*inputs, training=training)[0]

    def _record(self, *inputs: Array, training: bool) -> tuple[Any, Any]:
        raise NotImplementedError(f"{type(self).__name__} does not say how it computes its output.")

    def _propagate(self, saved: Any, dy: Any) -> tuple[Any, list[Array]]:
        raise NotImplementedError(f"{type(self).__name__} has no backward pass.")

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Any:
        """Shape of the output for inputs of `input_shape`, both with the batch axis."""
        raise NotImplementedError(f"{type(self).__name__} does not say the shape of its output.")

    # --- Inputs ---

    def _accept(self, inputs: tuple[Any, ...]) -> tuple[Array, ...]:
        """The inputs in the compute dtype; the layer is built and its weights are where the inputs are, if need be."""
        arrays = tuple(self._cast(x) for x in inputs)
        x = arrays[0]
        if self.built:
            self._check_shape(x.shape)
        else:
            self.build(x.shape)
        self._follow(x)
        if len(inputs) == 1:
            self._accepted = (x.__class__, x.shape, x.dtype)
        return arrays

    def _cast(self, x: Any) -> Array:
        if not (hasattr(x, "__array_function__") and hasattr(x, "dtype")):
            raise ValueError(f"a layer takes a NumPy or CuPy array. Received: inputs of type {type(x).__name__}")
        if isinstance(x, np.ndarray) and type(x) is not np.ndarray:
            x = x.view(np.ndarray)
        dtype = x.dtype
        if dtype == self._compute or not (self.autocast or self._is_foreign(dtype)):
            return x
        if self._is_foreign(dtype):
            if self._takes_integers and dtype.kind != "c":
                return x
            advice = f'give the layer `dtype="{dtype}"`' if dtype.kind == "c" else "cast them first"
            raise TypeError(
                f"layer {self.name!r} computes in {self.compute_dtype} and does not take {dtype} inputs: {advice}. "
                f"Received: inputs.dtype={dtype}"
            )
        return x.astype(self._compute)

    def _is_foreign(self, dtype: np.dtype) -> bool:
        """Whether casting `dtype` to the compute dtype would change more than precision."""
        return not (_is_float(dtype) or (dtype.kind == "c" and self._compute.kind == "c"))

    def _check_shape(self, shape: Shape) -> None:
        """Raises ValueError for a shape the layer cannot take, whatever its size may be otherwise."""

    def _follow(self, x: Array) -> None:
        """Brings the weights to the array library of `x`, once."""
        if self._weights and self._home is not x.__class__:
            if self._home is not None:
                raise ValueError(
                    f"the weights of layer {self.name!r} are {self._home.__module__} arrays since its first call and "
                    "do not move silently. Bring the input there. "
                    f"Received: inputs of type {type(x).__module__}.{type(x).__name__}"
                )
            self._move(x)

    def _move(self, reference: Array) -> None:
        """Brings the weights to where `reference` lives."""
        for weight in self._weights:
            weight.value = ops.like(weight.value, reference)
        self._home = reference.__class__

    def _in_compute_dtype(self, weight: Array) -> Array:
        return weight.astype(self._compute) if self._variable != self._compute and self.autocast else weight

    # --- Symbolic calls ---

    def _connect(self, inputs: tuple[Any, ...]) -> Any:
        """The symbolic outputs for symbolic inputs; builds the layer."""
        if any(x.__class__ is not SymbolicTensor for x in inputs):
            raise ValueError("symbolic and array inputs cannot be mixed in one call.")
        x = inputs[0]
        shape = x.shape
        if self.built:
            self._check_shape(shape)
        else:
            self.build(shape)
        shapes = self._output_shapes(*(each.shape for each in inputs))
        return single(Node(self, inputs, shapes, self._output_dtypes(inputs, len(shapes))).outputs)

    def _output_shapes(self, *input_shapes: Shape) -> tuple[Shape, ...]:
        shape = self.compute_output_shape(input_shapes[0])
        return shape if shape and isinstance(shape[0], tuple) else (shape,)

    def _output_dtypes(self, inputs: tuple[SymbolicTensor, ...], count: int) -> list[str]:
        """Names of the dtypes of `count` outputs."""
        passes = self._takes_integers and inputs[0].dtype not in _DTYPES
        return [inputs[0].dtype if passes else self.compute_dtype] * count

    def _call_arguments(self, tensors: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The positional and keyword arguments of a call with these tensors."""
        return list(tensors), {}

    # --- Configuration ---

    @classmethod
    def _argument_names(cls) -> list[str]:
        """The constructor's arguments in order, then those that its ``**kwargs`` hand to the parent's."""
        parameters = cls.__signature__.parameters.values()
        own = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        parent = cls.__bases__[0]
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters) and issubclass(parent, Layer):
            own += [name for name in parent._argument_names() if name not in own]
        return own

    def get_config(self) -> dict[str, Any]:
        """Keras 3's config of this layer: name, trainable, dtype and every constructor argument; JSON-serializable."""
        policy = {
            "module": "keras",
            "class_name": "DTypePolicy",
            "config": self._policy.get_config(),
            "registered_name": None,
        }
        config: dict[str, Any] = {"name": self.name, "trainable": self.trainable, "dtype": policy}
        arguments = self._argument_names()
        if self.activity_regularizer is not None and "activity_regularizer" not in arguments:
            arguments = ["activity_regularizer", *arguments]
        for argument in arguments:
            if not hasattr(self, argument):
                raise NotImplementedError(
                    f"{type(self).__name__} must keep `{argument}` as an attribute, or write get_config."
                )
            value, module = getattr(self, argument), _object_module(argument)
            config[argument] = value if module is None else module.serialize(value)
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
        """A layer from a config of Keras 3 or Keras 2.

        Args:
            custom_objects: name -> callable or class, for activations and other objects that are not built in.
        """
        arguments = dict(config)
        for key, harmless in cls._obsolete.items():
            value = arguments.pop(key, harmless)
            if harmless is not ... and value != harmless:
                raise ValueError(
                    f"{cls.__name__} has no `{key}`; a config may only say {harmless!r}. Received: {key}={value!r}"
                )
        for key, value in arguments.items():
            module = _object_module(key)
            if module is not None and value is not None:
                arguments[key] = module.get(value, custom_objects=custom_objects)
        return cls(**arguments)


def _first_shape(
    rank: int | None,
    input_shape: Any,
    batch_input_shape: Any,
    batch_size: Any,
    input_dim: Any,
    input_length: Any,
) -> Shape | None:
    """The one batch input shape that the arguments of Keras 2 and R give together, or None."""
    if batch_input_shape is not None:
        return as_shape(batch_input_shape, "batch_input_shape")
    if input_shape is None and input_dim is not None:
        input_shape = (input_length, input_dim) if rank == 1 else (input_dim,)
    if input_shape is None:
        return None
    return as_shape((batch_size, *as_shape(input_shape, "input_shape")), "batch_size")


def to_tuple(value: Any) -> tuple[Any, ...]:
    """A list or tuple as a tuple, anything else as its only element."""
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def single(values: tuple[Any, ...]) -> Any:
    """The element of a tuple that has only one, else the tuple."""
    return values[0] if len(values) == 1 else values


def _fitted(value: Any, shape: tuple[int, ...], name: str, dtype: np.dtype) -> np.ndarray:
    array = np.asarray(value)
    if array.shape != shape:
        raise ValueError(
            f"the initializer of `{name}` must give an array of shape {shape}. Received: shape={array.shape}"
        )
    return np.array(array, dtype, order="C")


def _checked(layer: Layer, values: list[Any], specs: list[tuple[str, tuple[int, ...], np.dtype]]) -> list[Array]:
    """`values` as arrays, if they fit `specs` (name, shape, dtype) one by one."""
    if len(values) != len(specs):
        advice = "" if layer.built or specs else " It is not built yet: build it, or call it, first."
        raise ValueError(
            f"layer {layer.name!r} has {len(specs)} weights "
            f"({', '.join(name for name, *_ in specs) or 'none'}).{advice} Received: {len(values)} arrays"
        )
    arrays = [value if hasattr(value, "dtype") else np.asarray(value) for value in values]
    for array, (name, shape, dtype) in zip(arrays, specs, strict=True):
        if tuple(array.shape) != tuple(shape):
            raise ValueError(
                f"weight {name!r} of layer {layer.name!r} has shape {tuple(shape)}. "
                f"Received: shape={tuple(array.shape)}"
            )
        if array.dtype.kind == "c" and dtype.kind != "c":
            raise TypeError(f"weight {name!r} of layer {layer.name!r} is real. Received: dtype={array.dtype}")
    return arrays


# --- Layers that are no family -----------------------------------------------------------------------------------


Layer.__signature__ = _public_signature(Layer)


class InputLayer(Layer):
    """The place of one input array in a model.

    Args:
        shape: without the batch axis.
        batch_size: the batch axis, None if it may vary.
        dtype: name of the dtype the model casts its inputs to.
        batch_shape: shape with the batch axis, instead of `shape` and `batch_size`.
    """

    _obsolete: ClassVar[Mapping[str, Any]] = {"sparse": False, "ragged": False, "optional": False}

    def __init__(
        self,
        shape: Sequence[int | None] | None = None,
        batch_size: int | None = None,
        dtype: Any = None,
        *,
        batch_shape: Sequence[int | None] | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name)
        batch_shape = kwargs.pop("batch_input_shape", batch_shape)
        given = {"shape": shape, "batch_shape": batch_shape, **kwargs}
        if kwargs or (shape is None) == (batch_shape is None):
            raise ValueError(
                f"an input has either `shape` or `batch_shape`, and `batch_size`, `dtype` and `name`. "
                f"Received: {', '.join(f'{key}={value!r}' for key, value in given.items())}"
            )
        if batch_shape is None:
            batch_shape = (batch_size, *as_shape(shape, "shape"))
        self.batch_shape = as_shape(batch_shape, "batch_shape")
        try:
            self.input_dtype = np.dtype("float32" if dtype is None else dtype).name
        except TypeError:
            raise ValueError(f"`dtype` must be the name of a dtype. Received: dtype={dtype!r}") from None
        self.built = True
        Node(self, (), [self.batch_shape], [self.input_dtype])

    @property
    def dtype(self) -> str:
        """Name of the dtype the model casts this input to."""
        return self.input_dtype

    def get_config(self) -> dict[str, Any]:
        """Keras 3's config of an input."""
        return {"batch_shape": self.batch_shape, "dtype": self.dtype, **self._obsolete, "name": self.name}


class Activation(Layer):
    """Applies an activation to every element (or to the last axis, as softmax does).

    Args:
        activation: name, callable or config dict.

    >>> Activation("relu")(np.array([[-1.0, 2.0]], "float32"))
    array([[0., 2.]], dtype=float32)
    """

    def __init__(self, activation: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.activation = activations.get(activation)

    def _record(self, *inputs: Array, training: bool) -> tuple[Array, Array]:
        return self.activation(inputs[0]), inputs[0]

    def _propagate(self, saved: Array, dy: Array) -> tuple[Array, list[Array]]:
        return self.activation.gradient(saved, dy), []

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Shape:
        """The shape of the input."""
        return as_shape(input_shape, "input_shape")
