"""``tf.layers.conv1d`` of TensorFlow 1 on NumPy and CuPy arrays, with variable scopes, names and reuse.

    from cuconv.compat import tf_layers as tf

    with tf.variable_scope("tower"):
        y = tf.conv1d(x, 32, 3, activation="relu", name="first")  # makes tower/first/kernel and tower/first/bias
    with tf.variable_scope("tower", reuse=True):
        z = tf.conv1d(other, 32, 3, activation="relu", name="first")  # the same weights

Calls compute at once: what is a tensor in a graph there is an array here, or a symbolic tensor of :mod:`cuconv.models`.
The rules of TensorFlow 1 hold for everything that has a name:

* A call without `name` is "conv1d", then "conv1d_1", ..., counted inside the scope that is open. The count starts again
  when a scope is entered again, so an equal block under ``reuse=True`` meets the same names.
* `reuse` None or False makes variables, which must not exist; True finds them, which must exist; AUTO_REUSE does
  either. True and AUTO_REUSE hold for all scopes inside, and a call with them and without `name` is "conv1d".
* Scopes hand down an initializer, for weights that name none, and a regularizer, for weights without one of their own.
* The default graph and the scope that is open belong to a thread; a graph that is opened in several is shared by them.

Training needs gradients. Inside :func:`recording` calls keep what these need: `calls.layers` are the layers behind the
calls, each with its `backward`, and `calls.gradients()` is what then arrived at every trainable variable::

    with tf.recording() as calls:
        y = tf.conv1d(x, 32, 3, name="first", reuse=tf.AUTO_REUSE)
    calls.layers[0].backward(dy)
    for name, gradient in calls.gradients().items():
        tf.get_default_graph().variables[name].value[...] -= 1e-3 * gradient
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np

from cuconv import constraints, initializers, layers, ops, regularizers
from cuconv.layers.base import Array, SymbolicTensor

__all__ = [
    "AUTO_REUSE",
    "Graph",
    "Recording",
    "Variable",
    "VariableScope",
    "apply_constraints",
    "conv1d",
    "get_default_graph",
    "get_regularization_loss",
    "get_regularization_losses",
    "get_variable",
    "get_variable_scope",
    "global_variables",
    "recording",
    "reset_default_graph",
    "trainable_variables",
    "variable_scope",
]


class _AutoReuse:
    def __repr__(self) -> str:
        return "AUTO_REUSE"


AUTO_REUSE: Final = _AutoReuse()
_PATH = r"[\w.-]+(/[\w.-]+)*"
Reuse: TypeAlias = "bool | _AutoReuse | None"


# --- Variables ---------------------------------------------------------------------------------------------------


class Variable:
    """A named weight.

    Attributes:
        name: path of scopes, then the weight's own name: "tower/first/kernel".
        value: the live array; changing it in place changes every call that shares it.
        trainable: as the call said that made it.
        regularizer: of this variable, or None; likewise `constraint`.
    """

    def __init__(self, name: str, value: Array, trainable: bool, regularizer: Any, constraint: Any) -> None:
        self.name = name
        self.value = value
        self.trainable = trainable
        self.regularizer = regularizer
        self.constraint = constraint
        self._home: type | None = None  # array class of the first input that met it

    def __repr__(self) -> str:
        return f"<Variable {self.name!r} shape={self.value.shape} dtype={self.value.dtype}>"

    def _follow(self, x: Array) -> None:
        """Brings the value to where `x` lives, once."""
        if self._home not in (None, x.__class__):
            raise ValueError(
                f"variable {self.name!r} is a {type(self.value).__module__} array since its first call and does not "
                "move silently. Bring the input there. "
                f"Received: inputs of type {type(x).__module__}.{type(x).__name__}"
            )
        if self._home is None:
            self.value, self._home = ops.like(self.value, x), x.__class__


# --- Scopes and graphs -------------------------------------------------------------------------------------------


@dataclass
class VariableScope:
    """A place for variables, and what calls in it take where they say nothing."""

    name: str = ""
    reuse: Reuse = False
    initializer: Any = None
    regularizer: Any = None

    def reuse_variables(self) -> None:
        """From now on calls in this scope find their variables instead of making them."""
        self.reuse = True

    def _path(self, name: str) -> str:
        return f"{self.name}/{name}" if self.name else name


@dataclass
class _State:
    """What one thread does in one graph."""

    scope: VariableScope = field(default_factory=VariableScope)
    entered: dict[str, int] = field(default_factory=dict)  # how often each scope was entered since its parent was
    recordings: list[Recording] = field(default_factory=list)

    def unique(self, name: str) -> str:
        """`name`, with a number where a scope of that name has been entered."""
        names = [name, *(f"{name}_{number}" for number in range(1, len(self.entered) + 1))]
        return next(each for each in names if not self.entered.get(self.scope._path(each)))


class Graph:
    """A set of variables. ``with graph.as_default():`` lets a thread work in it.

    Attributes:
        variables: each by name, in the order of creation.
    """

    def __init__(self) -> None:
        self.variables: dict[str, Variable] = {}
        self._activity: dict[str, float] = {}  # scope -> activity loss of its last call
        self._symbolic: list[Conv1D] = []  # the layers of symbolic calls
        self._lock = threading.RLock()
        self._threads = threading.local()

    @property
    def _state(self) -> _State:
        if not hasattr(self._threads, "state"):
            self._threads.state = _State()
        return self._threads.state

    @contextlib.contextmanager
    def as_default(self) -> Iterator[Graph]:
        """While this is open, this graph is the default of this thread."""
        _defaults.stack.append(self)
        try:
            yield self
        finally:
            _defaults.stack.remove(self)

    def _obtain(
        self,
        scope: VariableScope,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: np.dtype,
        initial: Any,
        options: Mapping[str, tuple[Any, Any, bool]],
    ) -> dict[str, Variable]:
        """The variables of `shapes` in `scope`, found or made as its `reuse` says. All of them, or an error and none.

        Args:
            initial: name -> initial value.
            options: name -> regularizer, constraint, trainable.
        """
        with self._lock:
            paths = {name: scope._path(name) for name in shapes}
            for name, path in paths.items():
                found = self.variables.get(path)
                if found is None and scope.reuse is True:
                    raise ValueError(
                        f"Variable {path} does not exist. Did you mean to set reuse=AUTO_REUSE? Received: reuse=True"
                    )
                if found is not None and not scope.reuse:
                    raise ValueError(
                        f"Variable {path} already exists, disallowed. Did you mean to set reuse=True or "
                        f"reuse=AUTO_REUSE? Received: reuse={scope.reuse}"
                    )
                if found is not None:
                    for word, wanted, own in (
                        ("shape", tuple(shapes[name]), tuple(found.value.shape)),
                        ("dtype", dtype, found.value.dtype),
                    ):
                        if wanted != own:
                            raise ValueError(
                                f"Trying to share variable {path}, whose {word} is {own}. Received: {word}={wanted}"
                            )
            made = {
                path: Variable(path, initial(name), options[name][2], *options[name][:2])
                for name, path in paths.items()
                if path not in self.variables
            }
            self.variables.update(made)
            return {name: self.variables[path] for name, path in paths.items()}


class _Defaults(threading.local):
    """The graphs that a thread has opened, its own one first."""

    def __init__(self) -> None:
        self.stack = [Graph()]


_defaults = _Defaults()


def get_default_graph() -> Graph:
    """The graph that this thread works in."""
    return _defaults.stack[-1]


def reset_default_graph() -> None:
    """Gives this thread a new, empty default graph."""
    if len(_defaults.stack) > 1 or get_default_graph()._state.scope.name:
        raise AssertionError("the default graph cannot be reset inside a scope or inside `Graph.as_default`.")
    _defaults.stack = [Graph()]


def get_variable_scope() -> VariableScope:
    """The scope that this thread has open in its default graph."""
    return get_default_graph()._state.scope


@contextlib.contextmanager
def variable_scope(
    name_or_scope: str | VariableScope | None,
    default_name: str | None = None,
    *,
    initializer: Any = None,
    regularizer: Any = None,
    reuse: Reuse = None,
) -> Iterator[VariableScope]:
    """Opens a scope inside the current one.

    Args:
        name_or_scope: a name; or a scope from before, which is opened again wherever the call stands.
        default_name: name for ``name_or_scope=None``, with a number where that is taken.
        initializer: for weights that name none; None leaves what holds outside. Likewise `regularizer`.
        reuse: True or AUTO_REUSE for this scope and those inside; None and False leave what holds outside.

    Raises:
        ValueError: a name that is no path of letters, digits and ``_.-``, or `reuse` without a name.
        TypeError: neither a name nor a default.
    """
    if not (reuse is None or reuse is AUTO_REUSE or isinstance(reuse, bool)):
        raise ValueError(f"`reuse` must be True, False, None or AUTO_REUSE. Received: reuse={reuse!r}")
    state = get_default_graph()._state
    outer = state.scope
    given: VariableScope | None = None
    if isinstance(name_or_scope, VariableScope):
        given = name_or_scope
    elif name_or_scope is None:
        if default_name is None:
            raise TypeError("`name_or_scope` may be None where `default_name` is given. Received: default_name=None")
        if reuse:
            raise ValueError(f"`reuse` needs a `name_or_scope`. Received: name_or_scope=None, reuse={reuse!r}")
        name_or_scope = state.unique(default_name)
    if given is None and not (isinstance(name_or_scope, str) and re.fullmatch(_PATH, name_or_scope)):
        raise ValueError(
            "`name_or_scope` must be a scope, or a path of letters, digits and _.-, parted by /. "
            f"Received: name_or_scope={name_or_scope!r}"
        )
    model = given or outer
    scope = VariableScope(
        given.name if given else outer._path(str(name_or_scope)),
        reuse or model.reuse,
        model.initializer if initializer is None else initializers.get(initializer),
        model.regularizer if regularizer is None else regularizers.get(regularizer),
    )
    state.scope = scope
    state.entered[scope.name] = state.entered.get(scope.name, 0) + 1
    before = dict(state.entered)
    try:
        yield scope
    finally:
        state.scope = outer
        if given:
            state.entered = before
        else:  # what is inside counts from the start when this is entered again
            state.entered = {key: n for key, n in state.entered.items() if not key.startswith(f"{scope.name}/")}


def get_variable(
    name: str,
    shape: Sequence[int] | None = None,
    dtype: Any = "float32",
    initializer: Any = None,
    regularizer: Any = None,
    trainable: bool = True,
    constraint: Any = None,
) -> Variable:
    """The variable of that name in the current scope, found or made as its `reuse` says.

    Args:
        shape: needed unless `initializer` is an array, or the variable is there.
    """
    graph, scope = get_default_graph(), get_variable_scope()
    if shape is None:
        found = graph.variables.get(scope._path(name))
        like = initializer if hasattr(initializer, "shape") else found.value if found and scope.reuse else None
        if like is None:
            raise ValueError(f"`shape` of a new variable must be given. Received: name={name!r}, shape=None")
        shape = like.shape
    sizes, kind = tuple(shape), np.dtype(layers.DTypePolicy.get(dtype).variable_dtype)
    draw: Any = initializers.get(scope.initializer if initializer is None else initializer, "glorot_uniform")

    def initial(_: str) -> Array:
        return np.array(np.broadcast_to(draw(sizes, dtype=kind.name), sizes), kind)

    penalty = regularizers.get(scope.regularizer if regularizer is None else regularizer)
    options = {name: (penalty, constraints.get(constraint), trainable)}
    return graph._obtain(scope, {name: sizes}, kind, initial, options)[name]


# --- Collections -------------------------------------------------------------------------------------------------


def global_variables(scope: str | None = None) -> list[Variable]:
    """The variables of the default graph; with `scope` those whose name starts with that regular expression."""
    return [each for each in list(get_default_graph().variables.values()) if re.match(scope or "", each.name)]


def trainable_variables(scope: str | None = None) -> list[Variable]:
    """Those of `global_variables` that were made with ``trainable=True``."""
    return [each for each in global_variables(scope) if each.trainable]


def get_regularization_losses(scope: str | None = None) -> list[float]:
    """The penalty of each regularized variable, once, for its present value; then the activity losses of last calls."""
    activity = [
        (name, loss) for name, loss in list(get_default_graph()._activity.items()) if re.match(scope or "", name)
    ]
    penalties = [
        float(each.regularizer(each.value)) for each in global_variables(scope) if each.regularizer is not None
    ]
    return penalties + [loss for _, loss in activity]


def get_regularization_loss(scope: str | None = None) -> float:
    """The sum of `get_regularization_losses`."""
    return float(sum(get_regularization_losses(scope)))


def apply_constraints(scope: str | None = None) -> None:
    """Applies each trainable variable's constraint in place, as an optimizer does after its update."""
    for variable in trainable_variables(scope):
        if variable.constraint is not None:
            variable.value[...] = variable.constraint(variable.value)


# --- Calls -------------------------------------------------------------------------------------------------------


class Conv1D(layers.Conv1D):
    """The layer behind a call of `conv1d`: its weights are variables of a graph."""

    _paddings = ("valid", "same")
    _graph: Graph
    _scope: VariableScope
    _options_of: Mapping[str, tuple[Any, Any, bool]]
    variables: dict[str, Variable]

    def _initial_values(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
        def initial(name: str) -> Array:
            return layers.Conv1D._initial_values(self, {name: shapes[name]})[name]

        self.variables = self._graph._obtain(self._scope, shapes, self._variable, initial, self._options_of)
        return {name: variable.value for name, variable in self.variables.items()}

    def _move(self, reference: Array) -> None:
        for weight in self._weights:
            variable = self.variables[weight.name]
            variable._follow(reference)
            weight.value = variable.value
        self._home = reference.__class__


class Recording:
    """The calls that were made while it was open.

    Attributes:
        layers: the layer behind each call, in order, ready for `backward(dy)`.
    """

    def __init__(self) -> None:
        self.layers: list[Conv1D] = []

    def gradients(self) -> dict[str, Array]:
        """Variable name -> the sum of what the layers' `backward` left, and of its regularizer's gradient.

        Trainable variables of the recorded calls only.
        """
        total: dict[str, Array] = {}
        reached: dict[str, Variable] = {}
        for layer in self.layers:
            for variable, gradient in zip(layer.variables.values(), layer.gradients, strict=False):
                if variable.trainable:
                    reached[variable.name] = variable
                    total[variable.name] = total[variable.name] + gradient if variable.name in total else gradient
        for name, variable in reached.items():
            if variable.regularizer is not None:
                total[name] = total[name] + variable.regularizer.gradient(variable.value)
        return total


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """While this is open, the calls of this thread in its default graph keep what their gradients need."""
    state, kept = get_default_graph()._state, Recording()
    state.recordings.append(kept)
    try:
        yield kept
    finally:
        state.recordings.remove(kept)


def conv1d(
    inputs: Any,
    filters: int,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: str = "valid",
    data_format: str = "channels_last",
    dilation_rate: int | Sequence[int] = 1,
    activation: Any = None,
    use_bias: bool = True,
    kernel_initializer: Any = None,
    bias_initializer: Any = "zeros",
    kernel_regularizer: Any = None,
    bias_regularizer: Any = None,
    activity_regularizer: Any = None,
    kernel_constraint: Any = None,
    bias_constraint: Any = None,
    trainable: bool = True,
    name: str | VariableScope | None = None,
    reuse: Reuse = None,
) -> Any:
    """The convolution of `inputs` [batch, steps, channels] with the variables ``<scope>/kernel`` and ``<scope>/bias``.

    The dtype is that of `inputs`. The arguments are those of :class:`cuconv.layers.Conv1D` but for:

    Args:
        inputs: a NumPy or CuPy array, or a symbolic tensor. Symbolic calls that share a scope and are otherwise equal
            are calls of one layer, which a model then trains.
        padding: "valid" or "same".
        kernel_initializer: None stands for the scope's initializer, or "glorot_uniform".
        trainable: False keeps new variables out of `trainable_variables`.
        name: of the scope inside the current one, or a scope; None for "conv1d", "conv1d_1", ...
        reuse: None or False: the variables must not exist; True: they must; AUTO_REUSE: they may. A scope's own `reuse`
            holds for the calls inside.

    Raises:
        ValueError: a variable exists, or does not, or has another shape or dtype; or any other argument is not allowed.
            Nothing was made then, and the name is not taken.
        TypeError: the dtype of `inputs` is none that cuconv computes in.
    """
    graph = get_default_graph()
    state = graph._state
    before = dict(state.entered)
    place = name or ("conv1d" if reuse else None)
    try:
        with variable_scope(place, "conv1d", reuse=reuse) as scope:
            layer = Conv1D(
                filters,
                kernel_size,
                strides,
                padding,
                data_format,
                dilation_rate,
                activation=activation,
                use_bias=use_bias,
                kernel_initializer=scope.initializer if kernel_initializer is None else kernel_initializer,
                bias_initializer=scope.initializer if bias_initializer is None else bias_initializer,
                activity_regularizer=activity_regularizer,
                trainable=trainable,
                dtype=_dtype_of(inputs),
                name=scope.name.replace("/", "."),
            )
            layer._graph, layer._scope = graph, scope
            own = {"kernel": (kernel_regularizer, kernel_constraint), "bias": (bias_regularizer, bias_constraint)}
            layer._options_of = {
                weight: (
                    regularizers.get(scope.regularizer if regularizer is None else regularizer),
                    constraints.get(constraint),
                    layer.trainable,
                )
                for weight, (regularizer, constraint) in own.items()
            }
            if isinstance(inputs, SymbolicTensor):
                return _symbolic(graph, layer, inputs)
            y = layer.forward(inputs) if state.recordings else layer(inputs)
    except BaseException:
        state.entered = before
        raise
    for kept in state.recordings:
        kept.layers.append(layer)
    if layer._activity_losses:
        graph._activity[scope.name] = sum(layer._activity_losses)
    return y


def _symbolic(graph: Graph, layer: Conv1D, inputs: SymbolicTensor) -> Any:
    """The symbolic output, of a layer from before where one is the same; it then has the regularizers itself."""
    for word, (regularizer, constraint, _) in layer._options_of.items():
        setattr(layer, f"{word}_regularizer", regularizer)
        setattr(layer, f"{word}_constraint", constraint)
    with graph._lock:
        for other in graph._symbolic:
            if layer._scope.reuse and _is_same_call(layer, other):
                return other(inputs)
        y = layer(inputs)
        graph._symbolic.append(layer)
        return y


def _is_same_call(one: Conv1D, other: Conv1D) -> bool:
    """Whether two layers of one graph compute the same, having the same variables."""

    def facts(layer: Conv1D) -> tuple[Any, ...]:
        activation = getattr(layer.activation, "function", layer.activation)
        size = layer.filters, layer.kernel_size, layer.use_bias
        return layer.name, size, layer._options, activation, layer.dtype_policy, layer.activity_regularizer

    return facts(one) == facts(other)


def _dtype_of(inputs: Any) -> str:
    """Name of the dtype to compute in; what cannot be computed in is left to the layer's error."""
    names = {dtype.name for dtype in ops.DTYPES}
    found = str(getattr(inputs, "dtype", ""))
    return found if found in names else "float32"
