"""Models: layers joined into a graph, with the passes, the summary, prediction and configuration of the whole.

>>> x = Input((128, 9))
>>> model = Model(x, layers.Conv1D(100, 10, activation="relu")(x))
>>> model.output_shape, model.count_params()
((None, 119, 100), 9100)
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.markup
import rich.progress
import rich.table

from cuconv import geometry, layers, ops, weights
from cuconv.cuda import runtime
from cuconv.layers.base import (
    Array,
    InputLayer,
    Layer,
    Node,
    Shape,
    SymbolicTensor,
    Weight,
    as_shape,
    auto_name,
    single,
    to_tuple,
)

__all__ = [
    "Input",
    "Model",
    "Sequential",
    "SymbolicTensor",
    "load_model",
    "load_weights",
    "model_from_json",
    "save_weights",
]

save_weights = weights.save_weights
load_weights = weights.load_weights


def Input(
    shape: Sequence[int | None] | None = None,
    batch_size: int | None = None,
    dtype: Any = None,
    *,
    name: str | None = None,
    batch_shape: Sequence[int | None] | None = None,
) -> SymbolicTensor:
    """The symbolic tensor of one input of a model.

    Args:
        shape: without the batch axis; None where a size may vary.
        batch_size: the batch axis, None if it may vary.
        dtype: name of the dtype the model casts this input to; None is "float32".
        name: of the input's layer.
        batch_shape: shape with the batch axis, instead of `shape` and `batch_size`.
    """
    layer = InputLayer(shape, batch_size, dtype, batch_shape=batch_shape, name=name)
    return layer.output


# --- The graph ---------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    node: Node
    unneeded: tuple[SymbolicTensor, ...]  # afterwards


class Graph:
    """The calls between `inputs` and `outputs`, in an order in which they can be computed.

    Attributes:
        layers: each layer once, inputs first, in Keras' order: by distance from the outputs, then by first visit.
    """

    def __init__(self, inputs: Sequence[SymbolicTensor], outputs: Sequence[SymbolicTensor]) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        nodes, visits = self._sorted()
        self.layers = self._ordered_layers(nodes, visits)
        self.steps = self._steps([node for node in nodes if node.inputs])
        self.nodes = set(nodes) | {tensor.node for tensor in self.inputs}
        names = [layer.name for layer in self.layers]
        double = {name for name in names if names.count(name) > 1}
        if double:
            raise ValueError(
                f"the layers of a model need different names. Received: {', '.join(sorted(double))} more than once"
            )

    def _sorted(self) -> tuple[list[Node], dict[Layer, int]]:
        """The nodes, each after those it needs, and the order in which the layers were met, from the outputs on."""
        done: dict[Node, None] = {}
        visits: dict[Layer, int] = {}
        ends = self.intermediate_inputs()
        for output in self.outputs:
            stack = [] if output in self.inputs else [output.node]
            while stack:
                node = stack[-1]
                visits.setdefault(node.layer, len(visits))
                if not node.inputs and not set(node.outputs) & set(self.inputs):
                    raise ValueError(
                        f"the outputs of a model depend on {node.layer.name!r}, which is not among its inputs. "
                        f"Received: inputs={[tensor.name for tensor in self.inputs]}"
                    )
                missing = [tensor.node for tensor in node.inputs if tensor not in ends and tensor.node not in done]
                if missing:
                    stack.append(missing[0])
                else:
                    done[node] = None
                    stack.pop()
        return list(done), visits

    def intermediate_inputs(self) -> set[SymbolicTensor]:
        """The inputs that come out of a layer of another graph."""
        return {tensor for tensor in self.inputs if tensor.node.inputs}

    def _ordered_layers(self, nodes: list[Node], visits: dict[Layer, int]) -> list[Layer]:
        depths: dict[Node, int] = {}
        of_layer: dict[Layer, int] = {}
        for node in reversed(nodes):
            depth = max(depths.get(node, 0), of_layer.get(node.layer, 0))
            of_layer[node.layer] = depths[node] = depth
            for tensor in node.inputs:
                depths[tensor.node] = max(depth + 1, depths.get(tensor.node, 0))
        for tensor in self.inputs:
            if tensor.node.layer not in of_layer and not tensor.node.inputs:
                of_layer[tensor.node.layer], visits[tensor.node.layer] = 0, -1
        return sorted(of_layer, key=lambda layer: (-of_layer[layer], visits[layer]))

    def _steps(self, nodes: list[Node]) -> list[_Step]:
        last_use = {
            tensor: node for node in nodes for tensor in (*node.outputs, *node.inputs) if tensor not in self.outputs
        }
        unneeded: dict[Node, list[SymbolicTensor]] = {node: [] for node in nodes}
        for tensor, node in last_use.items():
            unneeded[node].append(tensor)
        return [_Step(node, tuple(unneeded[node])) for node in nodes]

    def evaluate(self, values: Iterable[Any], visit: Callable[[Node, list[Any]], Sequence[Any]]) -> list[Any]:
        """What `visit(node, values of its inputs)` makes of `values` on the way from the inputs to the outputs."""
        held = dict(zip(self.inputs, values, strict=True))
        for node, unneeded in self.steps:
            held.update(zip(node.outputs, visit(node, [held[tensor] for tensor in node.inputs]), strict=True))
            for tensor in unneeded:
                held.pop(tensor, None)
        return [held[tensor] for tensor in self.outputs]

    def with_own_inputs(self) -> Graph:
        """The same calls once more, from new inputs where an input was an intermediate tensor."""
        fresh = [Input(batch_shape=t.shape, dtype=t.dtype) if t.node.inputs else t for t in self.inputs]
        outputs = self.evaluate(fresh, lambda node, tensors: to_tuple(node.layer._connect(tuple(tensors))))
        return Graph(fresh, outputs)


class _ModelContext(NamedTuple):
    inputs: tuple[Array, ...]
    records: list[tuple[Node, Any]]


# --- Models ------------------------------------------------------------------------------------------------------


class Model(Layer):
    """The layers between symbolic inputs and outputs. A model is itself a layer.

    Args:
        inputs: one symbolic tensor or a list of them.
        outputs: likewise.
        name: automatic if None.
        trainable: if given, set on every layer.
    """

    def __init__(self, inputs: Any, outputs: Any, name: str | None = None, trainable: bool | None = None) -> None:
        given = [to_tuple(inputs), to_tuple(outputs)]
        for word, tensors in zip(("inputs", "outputs"), given, strict=True):
            if not tensors or any(not isinstance(tensor, SymbolicTensor) for tensor in tensors):
                raise ValueError(
                    f"`{word}` must be symbolic tensors, which start at `Input`. Received: {word}={tensors!r}"
                )
        if len(set(given[0])) < len(given[0]):
            raise ValueError(f"`inputs` must differ from each other. Received: inputs={given[0]!r}")
        graph = Graph(*given)
        self._graph: Graph | None = graph.with_own_inputs() if graph.intermediate_inputs() else graph
        super().__init__(name=name or auto_name("Functional" if type(self) is Model else type(self).__name__))
        self.built = True
        if trainable is not None:
            self.trainable = trainable

    # --- Copies ---

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle is made of: layers and calls in a row, which can be of any depth."""
        state, graph = super().__getstate__(), self._graph
        if graph is not None:
            nodes = [step.node for step in graph.steps]
            tensors = [*graph.inputs, *(tensor for node in nodes for tensor in node.outputs)]
            places = {tensor: place for place, tensor in enumerate(tensors)}
            calls = [(node.layer, [places[tensor] for tensor in node.inputs]) for node in nodes]
            state["_graph"] = graph.inputs, calls, [places[tensor] for tensor in graph.outputs]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["_graph"] is not None:
            inputs, calls, outputs = state["_graph"]
            tensors = list(inputs)
            for layer, places in calls:
                tensors += to_tuple(layer._connect(tuple(tensors[place] for place in places)))
            self._graph = Graph(inputs, [tensors[place] for place in outputs])

    # --- Facts ---

    def _known_graph(self) -> Graph:
        if self._graph is None:
            raise ValueError(
                f"model {self.name!r} has no input shape yet: call `build`, call it on an array, or add an Input first."
            )
        return self._graph

    @property
    def layers(self) -> list[Layer]:
        """The layers in the order of the summary."""
        return list(self._known_graph().layers)

    def get_layer(self, name: str | None = None, index: int | None = None) -> Layer:
        """The layer of that name, or at that place in `layers`."""
        found = [layer for place, layer in enumerate(self.layers) if index == place or layer.name == name]
        if len(found) != 1 or (name is None) == (index is None):
            names = ", ".join(layer.name for layer in self.layers)
            raise ValueError(
                f"`name` must be one of {names}, or `index` a place. Received: name={name!r}, index={index!r}"
            )
        return found[0]

    @property
    def inputs(self) -> list[SymbolicTensor]:
        """The symbolic inputs."""
        return list(self._known_graph().inputs)

    @property
    def outputs(self) -> list[SymbolicTensor]:
        """The symbolic outputs."""
        return list(self._known_graph().outputs)

    @property
    def input(self) -> Any:
        """The symbolic input, or a tuple of them."""
        return single(self._known_graph().inputs)

    @property
    def output(self) -> Any:
        """The symbolic output, or a tuple of them."""
        return single(self._known_graph().outputs)

    @property
    def input_shape(self) -> Any:
        """Shape of the input with the batch axis, or a tuple of them."""
        return single(tuple(tensor.shape for tensor in self._known_graph().inputs))

    @property
    def output_shape(self) -> Any:
        """Shape of the output with the batch axis, or a tuple of them."""
        return single(tuple(tensor.shape for tensor in self._known_graph().outputs))

    def _parts(self) -> list[Layer]:
        return self.layers

    def _leaves(self) -> list[Layer]:
        return list(dict.fromkeys(leaf for layer in self.layers for leaf in layer._leaves()))

    def _named_weights(self) -> dict[str, Weight]:
        return {
            f"{layer.name}/{name}": weight for layer in self.layers for name, weight in layer._named_weights().items()
        }

    # --- Passes ---

    def __call__(self, inputs: Any, /, *, training: bool = False) -> Any:
        """The output, or a list of them, for an array, a list of arrays, or a dict of them by input name."""
        return self._listed(self._apply(self._arranged(inputs), training))

    def forward(self, inputs: Any, /, *, training: bool = True) -> Any:
        """The output, keeping what `backward` needs."""
        return self._listed(self._apply_recording(self._arranged(inputs), training))

    def backward(self, dy: Any) -> Any:
        """The gradient of the inputs of the last `forward`, given that of its outputs; fills `gradients`."""
        return self._listed(super().backward(dy))

    @staticmethod
    def _listed(values: Any) -> Any:
        return list(values) if isinstance(values, tuple) else values

    def _arranged(self, inputs: Any) -> tuple[Any, ...]:
        names = [tensor.name for tensor in self._known_graph().inputs]
        if isinstance(inputs, Mapping):
            if set(inputs) != set(names):
                raise ValueError(f"the inputs of model {self.name!r} are {names}. Received: {list(inputs)}")
            return tuple(inputs[name] for name in names)
        arranged = to_tuple(inputs)
        if len(arranged) != len(names):
            raise ValueError(
                f"model {self.name!r} has {len(names)} inputs: {', '.join(names)}. Received: {len(arranged)}"
            )
        return arranged

    def _forget_activity(self) -> None:
        for leaf in self._leaves():
            leaf._forget_activity()

    def _run(self, *inputs: Array, training: bool) -> Any:
        def visit(node: Node, arrays: list[Array]) -> Sequence[Array]:
            return to_tuple(node.layer._run(*arrays, training=training))

        return single(tuple(self._known_graph().evaluate(self._accept(inputs), visit)))

    def _forward(self, *inputs: Array, training: bool) -> tuple[Any, Any]:
        records: list[tuple[Node, Any]] = []

        def visit(node: Node, arrays: list[Array]) -> Sequence[Array]:
            outputs, context = node.layer._forward(*arrays, training=training)
            records.append((node, context))
            return to_tuple(outputs)

        inputs = self._accept(inputs)
        outputs = self._known_graph().evaluate(inputs, visit)
        return single(tuple(outputs)), _ModelContext(inputs, records)

    def _backward(self, context: _ModelContext, dy: Any) -> tuple[Any, list[Array]]:
        graph = self._known_graph()
        arriving: dict[SymbolicTensor, Array] = {}
        shares: dict[Weight, Array] = {}
        if len(to_tuple(dy)) != len(graph.outputs):
            raise ValueError(
                f"model {self.name!r} has {len(graph.outputs)} outputs. Received: {len(to_tuple(dy))} gradients"
            )
        for tensor, gradient in zip(graph.outputs, to_tuple(dy), strict=True):
            _add(arriving, tensor, gradient)
        for node, record in reversed(context.records):
            parts = tuple(arriving.pop(tensor, None) for tensor in node.outputs)
            if any(part is not None for part in parts) or node.layer._has_losses(record):
                dx, gradients = node.layer._backward(record, single(parts))
                for tensor, gradient in zip(node.inputs, to_tuple(dx), strict=True):
                    _add(arriving, tensor, gradient)
                for weight, gradient in zip(node.layer._all_weights(), gradients, strict=True):
                    _add(shares, weight, gradient)
        dx = [arriving.get(t) for t in graph.inputs]
        dx = [np.zeros_like(x) if part is None else part for x, part in zip(context.inputs, dx, strict=True)]
        own = self._all_weights()
        return single(tuple(dx)), [shares[w] if w in shares else np.zeros_like(w.value) for w in own]

    def _has_losses(self, context: Any) -> bool:
        return any(node.layer._has_losses(record) for node, record in context.records)

    def _accept(self, inputs: tuple[Any, ...]) -> tuple[Array, ...]:
        """The inputs in the dtypes of the model's inputs."""
        return tuple(self._accept_one(x, tensor) for x, tensor in zip(inputs, self._known_graph().inputs, strict=True))

    def _accept_one(self, x: Any, tensor: SymbolicTensor) -> Array:
        if not (hasattr(x, "__array_function__") and hasattr(x, "dtype")):
            raise ValueError(
                f"model {self.name!r} takes NumPy or CuPy arrays. Received: inputs of type {type(x).__name__}"
            )
        self._check_fit(x.shape, tensor)
        dtype = np.dtype(tensor.dtype)
        if x.dtype.kind == "c" and dtype.kind != "c":
            raise TypeError(f"input {tensor.name!r} is {dtype}. Received: inputs.dtype={x.dtype}")
        return x.astype(dtype, copy=False)

    def _check_fit(self, shape: Shape, tensor: SymbolicTensor) -> None:
        pairs = zip(shape[1:], tensor.shape[1:], strict=False)
        if len(shape) != len(tensor.shape) or any(None not in pair and pair[0] != pair[1] for pair in pairs):
            raise ValueError(
                f"input {tensor.name!r} of model {self.name!r} has shape {tensor.shape}. "
                f"Received: inputs.shape={tuple(shape)}"
            )

    def build(self, input_shape: Any = None) -> None:
        """Nothing: a model with inputs and outputs is built."""

    def _connect(self, inputs: tuple[Any, ...]) -> Any:
        inputs = self._arranged(inputs)
        for x, tensor in zip(inputs, self._known_graph().inputs, strict=True):
            self._check_fit(x.shape, tensor)
        return super()._connect(inputs)

    def _check_shape(self, shape: Shape) -> None:
        """All inputs are checked together, by `_connect` and `_accept`."""

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Shape of the output, or a tuple of them, for the shape of the input, or a list of them."""
        several = isinstance(input_shape, list | tuple) and input_shape and isinstance(input_shape[0], list | tuple)
        shapes = [as_shape(shape, "input_shape") for shape in (input_shape if several else [input_shape])]
        return single(self._output_shapes(*shapes))

    def _output_shapes(self, *input_shapes: Shape) -> tuple[Shape, ...]:
        graph = self._known_graph()
        return tuple(graph.evaluate(input_shapes, lambda node, shapes: node.layer._output_shapes(*shapes)))

    def _output_dtypes(self, inputs: tuple[SymbolicTensor, ...], count: int) -> list[str]:
        return [tensor.dtype for tensor in self._known_graph().outputs]

    def _call_arguments(self, tensors: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        return ([list(tensors)] if len(tensors) > 1 else list(tensors)), {}

    def _move(self, reference: Array) -> None:
        for leaf in self._leaves():
            leaf._move(reference)

    # --- Prediction ---

    def predict(
        self,
        x: Any,
        batch_size: int | None = 32,
        verbose: bool | int | str = "auto",
        device: str | None = None,
    ) -> Any:
        """The outputs for host data of any size, as NumPy arrays, computed batch by batch.

        On a GPU, batches are copied there and back while others are computed; the weights move there once.
        For Dask arrays the outputs are Dask arrays too, computed later: :func:`cuconv.interop.dask.predict`.

        Args:
            x: an array, maybe memory-mapped, a list of them, or a dict by input name; the first axes have one length.
            batch_size: samples a batch; None is 32.
            verbose: whether to show progress; "auto" in a terminal.
            device: "cpu", "gpu", or None: where the weights are, or else where `cuconv.asarray` puts arrays.
        """
        size = 32 if batch_size is None else geometry.as_int(batch_size)
        if size is None or size < 1:
            raise ValueError(f"`batch_size` must be an integer >= 1. Received: batch_size={batch_size!r}")
        if device not in (None, "cpu", "gpu"):
            raise ValueError(f'`device` must be None, "cpu" or "gpu". Received: device={device!r}')
        inputs = [each if hasattr(each, "dtype") else np.asarray(each) for each in self._arranged(x)]
        if any(hasattr(each, "__dask_graph__") for each in inputs):
            # By name, as it stands above this module and Dask may not be there.
            return importlib.import_module("cuconv.interop.dask").predict(self, inputs, size, device)
        count = inputs[0].shape[0] if inputs[0].ndim else 0
        if any(each.ndim == 0 or each.shape[0] != count for each in inputs):
            raise ValueError(
                f"all inputs must have the same number of samples. Received: {[each.shape for each in inputs]}"
            )
        place, sample = self._placing(device, inputs)
        starts = self._progress(range(0, max(count, 1), size), verbose)
        batches = (tuple(each[start : start + size] for each in inputs) for start in starts)
        results: Generator[Sequence[Array], None, None]
        if runtime.is_device_array(sample) and all(isinstance(each, np.ndarray) for each in inputs):
            results = self._streamed(batches, inputs, sample)
        else:
            results = (self._predict_batch(tuple(map(place, batch))) for batch in batches)
        outputs: list[np.ndarray] = []
        with contextlib.closing(results):
            for number, ys in enumerate(results):
                outputs = outputs or [np.empty((count, *y.shape[1:]), y.dtype) for y in ys]
                for output, y in zip(outputs, ys, strict=True):
                    output[number * size : (number + 1) * size] = ops.to_numpy(y)
        return outputs[0] if len(outputs) == 1 else outputs

    def _predict_batch(self, batch: tuple[Array, ...]) -> tuple[Array, ...]:
        return to_tuple(self._apply(batch, training=False))

    def _streamed(
        self, batches: Iterable[Sequence[np.ndarray]], inputs: Sequence[np.ndarray], sample: Array
    ) -> Generator[list[np.ndarray], None, None]:
        """The outputs of host batches, computed on the GPU that holds the weights or else `sample`."""
        tensors = self._known_graph().inputs
        dtypes = [_uploaded(each.dtype, np.dtype(tensor.dtype)) for each, tensor in zip(inputs, tensors, strict=True)]
        device = next(filter(runtime.is_device_array, self.weights), sample).device.id
        return runtime.stream_batches(self._predict_batch, batches, dtypes, device)

    def _placing(self, device: str | None, inputs: list[Array]) -> tuple[Callable[[Array], Array], Array]:
        """What brings arrays to where the model computes, and an array that lives there."""
        homes = {leaf._home for leaf in self._leaves()} - {None}
        if device == "cpu" or (device is None and homes == {np.ndarray}):
            place: Callable[[Array], Array] = _host_array
        else:
            place = ops.asarray
        sample, *_ = [place(each[:0]) for each in inputs]  # all of them: an array that cannot be placed is told here
        if device == "gpu" and isinstance(sample, np.ndarray):
            raise ValueError('no usable GPU; `cuconv doctor` says why. Received: device="gpu"')
        if homes - {type(sample)}:
            self._move(sample)
        return place, sample

    def _progress(self, steps: range, verbose: bool | int | str) -> Iterable[int]:
        console = rich.console.Console()
        if not (console.is_terminal if verbose == "auto" else verbose):
            return steps
        return rich.progress.track(steps, description=f"{self.name}: batches", console=console)

    # --- Summary ---

    def summary(self, line_length: int | None = None, print_fn: Callable[[str], Any] | None = None) -> None:
        """Prints Keras' table of the layers with their output shapes and numbers of weights.

        Args:
            line_length: width of the table; None fits the terminal, 76 where there is none.
            print_fn: called once with the whole text instead of printing it.
        """
        table = _summary_table(self, line_length)
        console = rich.console.Console(highlight=False, color_system=None if print_fn else "auto")
        lines: list[Any] = [f'[bold]Model: "{rich.markup.escape(self.name)}"[/]', table]
        for word, arrays in (
            ("Total", self.weights),
            ("Trainable", self.trainable_weights),
            ("Non-trainable", self.non_trainable_weights),
        ):
            count, size = sum(array.size for array in arrays), sum(array.nbytes for array in arrays)
            lines.append(f"[bold] {word} params: [/][color(34)]{count:,}[/] ({_readable(size)})")
        if print_fn is None:
            console.print(*lines, sep="\n", soft_wrap=True)
        else:
            with console.capture() as captured:
                console.print(*lines, sep="\n", soft_wrap=True)
            print_fn(captured.get())

    # --- Configuration ---

    def get_config(self) -> dict[str, Any]:
        """Keras 3's config of a functional model: its layers, and for each the calls that lead to it."""
        graph = self._known_graph()
        indices = {
            node: index
            for layer in graph.layers
            for index, node in enumerate(node for node in layer._nodes if node in graph.nodes)
        }

        def reference(tensor: SymbolicTensor) -> list[Any]:
            return [tensor.node.layer.name, indices[tensor.node], tensor.index]

        def argument(tensor: Any) -> Any:
            if isinstance(tensor, list):
                return [argument(each) for each in tensor]
            config = {"shape": tensor.shape, "dtype": tensor.dtype, "keras_history": reference(tensor)}
            return {"class_name": "__keras_tensor__", "config": config}

        def call(node: Node) -> dict[str, Any]:
            positional, keywords = node.layer._call_arguments(node.inputs)
            return {
                "args": [argument(each) for each in positional],
                "kwargs": {key: argument(value) for key, value in keywords.items()},
            }

        def end(tensor: SymbolicTensor) -> list[Any]:
            name, index, place = reference(tensor)
            return [name, index + _first_index(tensor.node.layer), place]

        described = []
        for layer in graph.layers:
            calls = [call(node) for node in layer._nodes if node in graph.nodes and node.inputs]
            described.append({**layers.serialize(layer), "name": layer.name, "inbound_nodes": calls})
        return {
            "name": self.name,
            "trainable": self.trainable,
            "layers": described,
            "input_layers": single(tuple(end(tensor) for tensor in graph.inputs)),
            "output_layers": single(tuple(end(tensor) for tensor in graph.outputs)),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Any:
        """A model from a functional config of Keras 3 or Keras 2."""
        missing = {"layers", "input_layers", "output_layers"} - set(config)
        if missing:
            raise ValueError(f"the config of a model lacks {', '.join(sorted(missing))}. Received: {sorted(config)}")
        created: dict[str, Layer] = {}
        waiting: list[tuple[Layer, list[Any]]] = []
        for each in config["layers"]:
            layer = layers.deserialize(each, custom_objects)
            created[each.get("name", layer.name)] = layer
            waiting.append((layer, list(each["inbound_nodes"])))

        def tensor(name: str, index: int, place: int) -> SymbolicTensor:
            return created[name]._nodes[index].outputs[place]

        def argument(value: Any) -> Any:
            if isinstance(value, Mapping) and value.get("class_name") == "__keras_tensor__":
                return tensor(*value["config"]["keras_history"])
            return [argument(each) for each in value] if isinstance(value, list | tuple) else value

        def call(layer: Layer, node: Any) -> None:
            if isinstance(node, Mapping):
                keywords = {key: argument(value) for key, value in node.get("kwargs", {}).items() if value is not None}
                layer(*[argument(value) for value in node["args"]], **keywords)
            else:  # Keras 2: [[name, node index, tensor index, keywords], ...], or one of these alone
                triples = [node] if isinstance(node[0], str) else node
                layer._connect(tuple(tensor(*each[:3]) for each in triples))

        while any(nodes for _, nodes in waiting):
            before = sum(len(nodes) for _, nodes in waiting)
            for layer, nodes in waiting:
                while nodes and all(index < len(created[name]._nodes) for name, index in _references(nodes[0])):
                    call(layer, nodes.pop(0))
            if sum(len(nodes) for _, nodes in waiting) == before:
                stuck = [layer.name for layer, nodes in waiting if nodes]
                raise ValueError(
                    f"the config of a model describes calls that depend on each other. Received: layers {stuck}"
                )

        def ends(value: Any) -> list[SymbolicTensor]:
            triples = [value] if isinstance(value[0], str) else list(value)
            return [tensor(name, index - _first_index(created[name]), place) for name, index, place in triples]

        inputs, outputs = ends(config["input_layers"]), ends(config["output_layers"])
        return cls(inputs, outputs, name=config.get("name"), trainable=None if config.get("trainable", True) else False)

    def to_json(self) -> str:
        """The config as JSON, for `model_from_json`."""
        return json.dumps(layers.serialize(self))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes config and weights to one file, which `load_model` reads. Nothing in it is executable.

        Args:
            path: ends in .npz (cuconv's own format), .keras (which Keras 3 loads) or .h5 (which Keras 2 and 3 load).
        """
        weights.save_model(self, path, lambda: layers.serialize(self))

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Writes the weights to a .npz, .weights.h5, .h5 or .safetensors file."""
        weights.save_weights(self, path)

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Overwrites the weights with those of a .npz, .keras, .weights.h5, .h5 or .safetensors file."""
        weights.load_weights(self, path)


class Sequential(Model):
    """Layers one after the other.

    Args:
        layers: the layers, maybe an `Input` first. Without an input shape, the model is built by its first call.
        trainable: False freezes every layer.
        name: automatic if None.

    >>> Sequential([Input((128, 9)), layers.Conv1D(100, 10), layers.Conv1D(6, 1)]).output_shape
    (None, 119, 6)
    """

    def __init__(self, layers: Sequence[Any] | None = None, trainable: bool = True, name: str | None = None) -> None:
        Layer.__init__(self, name=name)
        self._graph = None
        self._stack: list[Layer] = []
        self._tensors: list[
            SymbolicTensor
        ] = []  # the input, then the output of each layer; none without an input shape
        for layer in layers or ():
            self.add(layer)
        if not trainable:
            self.trainable = trainable

    @property
    def layers(self) -> list[Layer]:
        """The layers that were added, without the input."""
        return list(self._stack)

    def add(self, layer: Any) -> None:
        """Appends a layer. The first may be an `Input`, or know its input shape."""
        if isinstance(layer, SymbolicTensor) and isinstance(layer.node.layer, InputLayer):
            layer = layer.node.layer
        if not isinstance(layer, Layer):
            raise ValueError(f"a Sequential model is made of layers. Received: layer={layer!r}")
        if any(layer.name == other.name for other in self._stack):
            raise ValueError(f"the layers of a model need different names. Received: {layer.name!r} once more")
        if isinstance(layer, InputLayer):
            if self._stack or self._tensors:
                raise ValueError(f"an input must come first and only once. Received: {layer!r} in model {self.name!r}")
            self._tensors = [layer.output]
            return
        if not self._stack and not self._tensors:
            self._tensors = _input_of(layer)
        if self._tensors:
            self._tensors.append(_only_tensor(layer, self._tensors[-1]))
        self._stack.append(layer)
        self._rejoin()

    def pop(self) -> Layer:
        """Removes the last layer and returns it."""
        if not self._stack:
            raise ValueError(f"model {self.name!r} has no layers to remove. Received: 0 layers")
        layer = self._stack.pop()
        if self._tensors:
            self._tensors.pop()
        self._rejoin()
        return layer

    def build(self, input_shape: Any = None) -> None:
        """Gives the model its input shape (with the batch axis) and builds every layer."""
        shape = as_shape(input_shape, "input_shape")
        if self._tensors and self._tensors[0].shape != shape:
            raise ValueError(
                f"model {self.name!r} already has the input shape {self._tensors[0].shape}. "
                f"Received: input_shape={shape}"
            )
        if not self._stack:
            raise ValueError(f"model {self.name!r} has no layers to build. Received: input_shape={shape}")
        if not self._tensors:
            self.compute_output_shape(shape)  # whatever does not fit shows before a weight is made
            tensors = [Input(batch_shape=shape, dtype=self._stack[0].compute_dtype)]
            for layer in self._stack:
                tensors.append(_only_tensor(layer, tensors[-1]))
            self._tensors = tensors
            self._rejoin()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_tensors": self._tensors[:1]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._graph is not None:
            self._tensors = [*self._graph.inputs, *(step.node.outputs[0] for step in self._graph.steps)]

    def _rejoin(self) -> None:
        """Makes the graph of the layers there are now."""
        self.built = bool(self._stack and self._tensors)
        self._graph = Graph(self._tensors[:1], self._tensors[-1:]) if self.built else None

    def _arranged(self, inputs: Any) -> tuple[Any, ...]:
        x = to_tuple(inputs)[0]
        if self._graph is None and hasattr(x, "shape"):
            fixed = isinstance(x, SymbolicTensor) or any(getattr(leaf, "stateful", False) for leaf in self._leaves())
            self.build((x.shape[0] if fixed else None, *x.shape[1:]))
        return super()._arranged(inputs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Shape of the output for inputs of `input_shape`, both with the batch axis."""
        for layer in self._stack:
            input_shape = layer.compute_output_shape(input_shape)
        return input_shape

    def _output_shapes(self, *input_shapes: Shape) -> tuple[Shape, ...]:
        return Layer._output_shapes(self, *input_shapes)

    def get_config(self) -> dict[str, Any]:
        """Keras 3's config of a sequential model: the configs of its layers, the input first."""
        first = [self._tensors[0].node.layer] if self._tensors else []
        config = Layer.get_config(self)
        config["layers"] = [layers.serialize(layer) for layer in (*first, *self._stack)]
        if self.built:
            config["build_input_shape"] = self._tensors[0].shape
        return config

    @classmethod
    def from_config(cls, config: Any, custom_objects: Mapping[str, Any] | None = None) -> Any:
        """A model from a config of Keras 3 or Keras 2, where it may be a bare list of layers."""
        described = config if isinstance(config, list) else config["layers"]
        facts: Mapping[str, Any] = {} if isinstance(config, list) else config
        model = cls([layers.deserialize(each, custom_objects) for each in described], name=facts.get("name"))
        if facts.get("build_input_shape") and not model.built:
            model.build(facts["build_input_shape"])
        if not facts.get("trainable", True):
            model.trainable = False
        return model


layers.register(Model, "keras.src.models.functional", "Functional", registered_name="Functional", also=("Model",))
layers.register(Sequential, "keras", "Sequential")


def model_from_json(text: str, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """The model that `Model.to_json` of cuconv, or of Keras 3 or 2, describes; its weights are new.

    Args:
        custom_objects: name -> class or callable that is not built in.
    """
    return layers.deserialize(json.loads(text), custom_objects)


def load_model(path: str | os.PathLike[str], custom_objects: Mapping[str, Any] | None = None) -> Any:
    """The model that `Model.save` of cuconv or of Keras wrote, with its weights.

    Args:
        path: ends in .npz, .keras or .h5.
        custom_objects: name -> class or callable that is not built in; nothing is ever imported by name.

    Raises:
        ValueError: the file is damaged, was made by something else, or its weights do not fit its layers. Sizes are
            checked before anything is allocated for them.
        ImportError: the library for this format is missing.
    """
    return weights.load_model(path, lambda config: layers.deserialize(config, custom_objects), custom_objects or ())


# --- Small helpers -----------------------------------------------------------------------------------------------


def _add(sums: dict[Any, Array], key: Any, part: Array) -> None:
    if part is not None:
        sums[key] = sums[key] + part if key in sums else part


def _host_array(x: Array) -> np.ndarray:
    return np.asarray(ops.to_numpy(x))


def _uploaded(given: np.dtype, wanted: np.dtype) -> np.dtype:
    """The dtype in which samples go to a GPU: the model's, or their own where that has fewer bytes to copy."""
    smaller = given.kind in "biuf" and given.itemsize < wanted.itemsize
    complex_to_real = given.kind == "c" and wanted.kind != "c"  # an error that the model reports
    return given.newbyteorder("=") if smaller or complex_to_real else wanted


def _input_of(layer: Layer) -> list[SymbolicTensor]:
    """The input that a first layer asks for, if it does."""
    if isinstance(layer, Model) and layer._graph is not None:
        tensor = layer._graph.inputs[0]
        return [Input(batch_shape=tensor.shape, dtype=tensor.dtype)]
    shape = layer._batch_input_shape
    return [] if shape is None else [Input(batch_shape=shape, dtype=layer.compute_dtype)]


def _only_tensor(layer: Layer, x: SymbolicTensor) -> SymbolicTensor:
    y = layer(x)
    if not isinstance(y, SymbolicTensor):
        raise ValueError(
            f"a layer of a Sequential model has one output. Received: {len(y)} outputs of layer {layer.name!r}"
        )
    return y


def _first_index(layer: Layer) -> int:
    """Where Keras starts to number the calls of a layer in `input_layers` and `output_layers`."""
    return int(isinstance(layer, Model) and not isinstance(layer, Sequential))


def _references(value: Any) -> Iterable[tuple[str, int]]:
    """Every (layer name, call index) that a call in a config refers to."""
    if isinstance(value, Mapping):
        if value.get("class_name") == "__keras_tensor__":
            name, index, _ = value["config"]["keras_history"]
            yield name, index
        else:
            for each in value.values():
                yield from _references(each)
    elif isinstance(value, list | tuple):
        if len(value) in (3, 4) and isinstance(value[0], str):
            yield value[0], value[1]
        else:
            for each in value:
                yield from _references(each)


def _readable(size: float) -> str:
    """Bytes in a unit that leaves less than 1024."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TB"


def _summary_table(model: Model, line_length: int | None) -> rich.table.Table:
    """Keras' table: a row for each layer, and where from it is called unless the layers form a chain."""
    graph = model._graph
    chain = graph is None or isinstance(model, Sequential) or _is_chain(graph)
    headings = ["Layer (type)", "Output Shape", "Param #"] + ([] if chain else ["Connected to"])
    ends = (0.45, 0.80, 1.0) if chain else (0.3, 0.56, 0.74, 1.0)
    widest = 88 if chain else 108
    width = line_length or min(widest, max(40, shutil.get_terminal_size().columns - 4))
    stops = [int(end * width) for end in ends]
    table = rich.table.Table(width=width, show_lines=True)
    for heading, start, stop in zip(headings, [0, *stops], stops, strict=False):
        table.add_column(heading, justify="right" if heading == "Param #" else "left", width=stop - start)
    for layer in model.layers:
        nodes = [node for node in layer._nodes if graph is not None and node in graph.nodes]
        name, kind = rich.markup.escape(layer.name), rich.markup.escape(type(layer).__name__)
        count = f"{layer.count_params():,}" if layer.built else "0 (unbuilt)"
        row = [f"{name} ([color(33)]{kind}[/])", _shapes_text(nodes), f"[color(34)]{count}[/]"]
        if not chain:
            sources = [tensor for node in nodes for tensor in node.inputs]
            row.append(", ".join(_source_text(tensor) for tensor in sources) or "-")
        table.add_row(*row)
    return table


def _is_chain(graph: Graph) -> bool:
    used = [tensor for step in graph.steps for tensor in step.node.inputs]
    return (
        len(graph.inputs) == 1
        and len(graph.nodes) == len(graph.layers)
        and len(used) == len(set(used)) == len(graph.steps)
    )


def _shapes_text(nodes: list[Node]) -> str:
    """The output shapes of the last call, sizes in colour."""
    if not nodes:
        return "?"
    shapes = [
        "(" + ", ".join(f"[color({45 if size is None else 34})]{size}[/]" for size in tensor.shape) + ")"
        for tensor in nodes[-1].outputs
    ]
    return shapes[0] if len(shapes) == 1 else rich.markup.escape("[") + ", ".join(shapes) + "]"


def _source_text(tensor: SymbolicTensor) -> str:
    place = f"[{tensor.node.layer._nodes.index(tensor.node)}][{tensor.index}]"
    return rich.markup.escape(tensor.name + place)
