"""What `accelerate` opens: layers of Keras whose `call` is ours for a while.

A layer is switched by an attribute `call` of the object, which Python finds before the method of its class; taking the
attribute away gives the layer back.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import rich.box
import rich.console
import rich.table
import torch
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell

from cuconv import ops as array_ops
from cuconv.cuda import runtime
from cuconv.interop.torch import ops
from cuconv.interop.torch.arrays import DEVICES, DTYPES

GATES = 4  # of a ConvLSTM: input, forget, candidate, output
_lock = threading.RLock()


# --- What layers compute -----------------------------------------------------------------------------------------


def _tensor(value: Any) -> Any:
    """A variable in the dtype that its layer computes in, as a tensor; None stays."""
    return None if value is None else keras.ops.convert_to_tensor(value)


def _window(layer: Any) -> dict[str, Any]:
    return {
        "strides": layer.strides,
        "padding": layer.padding,
        "data_format": layer.data_format,
        "dilation_rate": layer.dilation_rate,
    }


def _activated(layer: Any, y: Any) -> Any:
    return y if layer.activation is None else layer.activation(y)


def _conv(layer: Any, precision: str, inputs: Any) -> Any:
    x, w, bias = _tensor(inputs), _tensor(layer.kernel), _tensor(layer.bias)
    return _activated(layer, ops.conv(x, w, bias, groups=layer.groups, precision=precision, **_window(layer)))


def _conv_transpose(layer: Any, precision: str, inputs: Any) -> Any:
    x, w, bias = _tensor(inputs), _tensor(layer.kernel), _tensor(layer.bias)
    options = {**_window(layer), "output_padding": layer.output_padding, "precision": precision}
    return _activated(layer, ops.conv_transpose(x, w, bias, **options))


def _depthwise_conv(layer: Any, precision: str, inputs: Any) -> Any:
    x, w, bias = _tensor(inputs), _tensor(layer.kernel), _tensor(layer.bias)
    return _activated(layer, ops.depthwise_conv(x, w, bias, precision=precision, **_window(layer)))


def _separable_conv(layer: Any, precision: str, inputs: Any) -> Any:
    kernels = _tensor(layer.depthwise_kernel), _tensor(layer.pointwise_kernel)
    y = ops.separable_conv(_tensor(inputs), *kernels, _tensor(layer.bias), precision=precision, **_window(layer))
    return _activated(layer, y)


def _conv_lstm_step(cell: Any, precision: str, inputs: Any, states: Any, training: bool = False) -> Any:
    """One step: a convolution for all gates of the input, and one of the state. Dropout makes each four groups."""
    axis = -1 if cell.data_format == "channels_last" else 1
    h, c = states

    def masked(x: Any, masks: Any) -> tuple[Any, int]:
        return (x, 1) if masks is None else (torch.cat([x * mask for mask in masks], axis), GATES)

    drops = training and 0.0 < cell.dropout < 1.0, training and 0.0 < cell.recurrent_dropout < 1.0
    x, groups = masked(_tensor(inputs), cell.get_dropout_mask(inputs) if drops[0] else None)
    kernel, recurrent_kernel, bias = _tensor(cell.kernel), _tensor(cell.recurrent_kernel), _tensor(cell.bias)
    z = ops.conv(x, kernel, bias, groups=groups, precision=precision, **_window(cell))
    x, groups = masked(h, cell.get_recurrent_dropout_mask(h) if drops[1] else None)
    same = {"padding": "same", "data_format": cell.data_format, "precision": precision}
    z = z + ops.conv(x, recurrent_kernel, groups=groups, **same)
    i, f, candidate, o = torch.chunk(z, GATES, axis)
    c = cell.recurrent_activation(f) * c + cell.recurrent_activation(i) * cell.activation(candidate)
    h = cell.recurrent_activation(o) * cell.activation(c)
    return h, [h, c]


_FAMILIES: dict[Callable[..., Any], tuple[str, ...]] = {
    _conv: ("Conv1D", "Conv2D", "Conv3D"),
    _conv_transpose: ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
    _depthwise_conv: ("DepthwiseConv1D", "DepthwiseConv2D"),
    _separable_conv: ("SeparableConv1D", "SeparableConv2D"),
}
_COMPUTE = {getattr(keras.layers, name): compute for compute, names in _FAMILIES.items() for name in names}
_COMPUTE[ConvLSTMCell] = _conv_lstm_step
_METHODS = ("call", "convolution_op", "input_conv", "recurrent_conv")  # where a subclass may compute something else


# --- Which layers ------------------------------------------------------------------------------------------------


@dataclass
class Use:
    """A layer with a convolution.

    Attributes:
        layer: Keras' layer; of a ConvLSTM its cell.
        reason: why it was left, "" where it was not.
        calls: how often cuconv computed it, while this was open.
    """

    name: str
    layer: Any
    reason: str = ""
    calls: int = 0


def _uses(model: Any) -> Iterator[Use]:
    every = model._flatten_layers()
    of_cells = {id(each.cell): each.name for each in every if isinstance(each, keras.layers.RNN)}
    for layer in every:
        own = _known_class(layer)
        if own or _wraps_convolution(layer):
            yield Use(of_cells.get(id(layer), layer.name), layer, _obstacle(layer, own))


def _known_class(layer: Any) -> Any:
    return next((cls for cls in type(layer).__mro__ if cls in _COMPUTE), None)


def _wraps_convolution(layer: Any) -> bool:
    wrapped = getattr(layer, "module", None) if isinstance(layer, keras.layers.TorchModuleWrapper) else None
    return wrapped is not None and any(isinstance(each, torch.nn.modules.conv._ConvNd) for each in wrapped.modules())


def _obstacle(layer: Any, own: Any) -> str:
    """Why `layer`, of Keras' class `own` or one derived from it, cannot be switched; "" where it can."""
    if own is None:
        return "a module of torch: cuconv.interop.torch.replace takes it"
    for method in _METHODS:
        if getattr(type(layer), method, None) is not getattr(own, method, None):
            return f"{type(layer).__name__} has a `{method}` of its own"
        if method in vars(layer) and not hasattr(vars(layer)[method], "users"):
            return f"its `{method}` was assigned to the object"
    if getattr(layer, "quantization_mode", None) is not None:
        return f"quantized to {layer.quantization_mode}"
    if getattr(torch, layer.compute_dtype, None) not in DTYPES:
        return f"cuconv has no {layer.compute_dtype}"
    for variable in layer.variables:
        device = variable.value.device.type
        if device not in (*DEVICES, "meta"):
            return f"cuconv does not compute on {device}"
        if device == "cuda" and not runtime.probe().usable:
            return runtime.probe().reason
    return ""


# --- Switching ---------------------------------------------------------------------------------------------------


def _switch(layer: Any, use: Use, precision: str) -> None:
    """Lets `layer` be computed by cuconv on behalf of `use`, whoever else wants that."""
    if "call" not in vars(layer):
        original, compute = layer.call, _COMPUTE[_known_class(layer)]
        users: list[tuple[Use, str]] = []

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            with _lock:
                present = list(users)
                for each, _ in present:
                    each.calls += not getattr(next(iter((*args, *kwargs.values())), None), "is_meta", False)
            # Without users this was kept by someone who had got hold of it while it was ours.
            return compute(layer, present[-1][1], *args, **kwargs) if present else original(*args, **kwargs)

        call.users = users  # type: ignore[attr-defined]
        vars(layer)["call"] = call
    vars(layer)["call"].users.append((use, precision))


def _switch_back(layer: Any, use: Use, call: Any) -> None:
    """Ends what `_switch` began for `use`; `call` is what it had put there."""
    call.users[:] = [each for each in call.users if each[0] is not use]
    if not call.users and vars(layer).get("call") is call:
        del vars(layer)["call"]


class Acceleration:
    """A model on cuconv, while it is open; made by :func:`cuconv.interop.keras.accelerate`.

    Attributes:
        accelerated: layers that cuconv computes, as they were found when this was opened last.
        left: layers with a convolution that stay Keras', each with the reason.
    """

    def __init__(self, model: Any, precision: str) -> None:
        if not isinstance(model, keras.layers.Layer):
            raise TypeError(f"`model` must be a model or layer of Keras. Received: {type(model).__name__}")
        if precision not in array_ops.PRECISIONS:
            raise ValueError(f'`precision` must be "highest" or "high". Received: precision={precision!r}')
        self._model = model
        self._precision = precision
        self._depth = 0
        self._switched: list[tuple[Any, Use, Any]] = []
        self._look()

    def _look(self) -> None:
        found = list(_uses(self._model))
        self.accelerated = tuple(use for use in found if not use.reason)
        self.left = tuple(use for use in found if use.reason)

    def __enter__(self) -> Acceleration:
        with _lock:
            self._depth += 1
            if self._depth == 1:
                self._look()
                for use in self.accelerated:
                    _switch(use.layer, use, self._precision)
                    self._switched.append((use.layer, use, vars(use.layer)["call"]))
        return self

    def __exit__(self, *exception: object) -> None:
        with _lock:
            self._depth -= 1
            if self._depth == 0:
                while self._switched:
                    _switch_back(*self._switched.pop())

    @property
    def calls(self) -> int:
        """How often cuconv computed a layer."""
        return sum(use.calls for use in self.accelerated)

    def __rich__(self) -> rich.table.Table:
        title = f"{len(self.accelerated)} accelerated, {len(self.left)} left"
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=title)
        for column, side in (("layer", "left"), ("class", "left"), ("calls", "right"), ("left because", "left")):
            table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
        for use in (*self.accelerated, *self.left):
            table.add_row(use.name, type(use.layer).__name__, "" if use.reason else str(use.calls), use.reason)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        rich.console.Console(file=text, width=120).print(self)
        return text.getvalue()
