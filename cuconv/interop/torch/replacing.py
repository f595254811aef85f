"""Convolutions of a model that is there already become cuconv's, and torch's again.

A module is swapped by its class: the object stays, with its parameters, buffers, hooks, training flag and everything
that points to it, in an optimizer or elsewhere. What forward computes is all that changes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import rich.box
import rich.table
import torch
from rich.console import Console
from rich.markup import escape
from torch import nn
from torch.nn.utils import parametrize

from cuconv.cuda import runtime
from cuconv.interop.torch import modules
from cuconv.interop.torch.arrays import DEVICES, DTYPES
from cuconv.ops import PRECISIONS

__all__ = ["Report", "Swap", "replace", "restore"]

_NAMES = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
_OURS: dict[type, type] = {getattr(nn, name): getattr(modules, name) for name in _NAMES}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_SEPARABLE = (modules.SeparableConv1d, modules.SeparableConv2d, modules.SeparableConv3d)


@dataclass(frozen=True)
class Swap:
    """One module of the model, under all the names that it has there, and why it was left; "" where it was not."""

    names: tuple[str, ...]
    module: nn.Module
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What became of a model's convolutions; prints as a table, through `rich` too."""

    swapped: tuple[Swap, ...]
    left: tuple[Swap, ...]

    def __rich__(self) -> rich.table.Table:
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=f"{len(self.swapped)} swapped, {len(self.left)} left")
        for column in ("module", "class", "left because"):
            table.add_column(column, overflow="fold")
        for swap in (*self.swapped, *self.left):
            names = ", ".join(name or "(the model)" for name in swap.names)
            table.add_row(*map(escape, (names, type(swap.module).__name__, swap.reason)))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def replace(model: nn.Module, *, precision: str = "highest") -> Report:
    """Lets cuconv compute the convolutions of `model`, in place.

    Swapped are the modules of exactly the classes Conv1d to Conv3d and ConvTranspose1d to ConvTranspose3d of torch.nn,
    with parametrizations (weight_norm, spectral_norm) too. Subclasses are left: their forward may be another one.

    Args:
        precision: of float32 on a GPU's tensor cores, "highest" or "high" (TF32).

    Returns:
        The swapped and the left modules, the latter with the reason.
    """
    if precision not in PRECISIONS:
        raise ValueError(f'`precision` must be "highest" or "high". Received: precision={precision!r}')

    def swap(module: nn.Module, own: type) -> str:
        reason = _obstacle(module, own)
        if not reason:
            _become(module, _OURS[own])
            module.precision = precision
        return reason

    return _swapped(model, swap)


def restore(model: nn.Module) -> Report:
    """Lets torch compute the convolutions of `model` again; of cuconv's modules those that torch has not are left."""

    def swap(module: nn.Module, own: type) -> str | None:
        if own in _SEPARABLE:
            return f"torch has no {own.__name__}"
        if own not in _THEIRS:
            return _of_its_own(own) if issubclass(own, tuple(_THEIRS)) else None
        for name, value in (("data_format", modules.CHANNELS_LAST), ("padding", "causal")):
            if getattr(module, name) == value:
                return f"torch has no {name}={value!r}"
        for name in ("data_format", "precision"):
            vars(module).pop(name, None)
        _become(module, _THEIRS[own])
        return ""

    return _swapped(model, swap)


def _swapped(model: nn.Module, swap: Callable[[nn.Module, type], str | None]) -> Report:
    """What `swap` says of each convolution, given it and its class: why it was left, "" or None if it was not meant."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module. Received: {type(model).__name__}")
    swapped: list[Swap] = []
    left: list[Swap] = []
    for names, module in _convolutions(model):
        reason = swap(module, _own_class(module))
        if reason is not None:
            (left if reason else swapped).append(Swap(names, module, reason))
    return Report(tuple(swapped), tuple(left))


def _convolutions(model: nn.Module) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Modules of torch and cuconv that convolve, each once with all its names."""
    named: dict[int, tuple[list[str], nn.Module]] = {}
    parts = {id(part) for module in model.modules() if isinstance(module, _SEPARABLE) for part in module.children()}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in parts:
            continue
        kinds = type(module).__mro__
        quantized = any("quantized" in kind.__module__ and "Conv" in kind.__name__ for kind in kinds)
        scripted = "Conv" in getattr(module, "original_name", "")
        if quantized or scripted or isinstance(module, (nn.modules.conv._ConvNd, *_SEPARABLE)):
            named.setdefault(id(module), ([], module))[0].append(name)
    for names, module in named.values():
        yield tuple(names), module


def _obstacle(module: nn.Module, own: type) -> str:
    """Why `module`, of class `own`, cannot be swapped; "" where it can."""
    if own in _THEIRS or own in _SEPARABLE:
        return "cuconv's already"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit: replace before you compile"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: run the model once, then replace"
    if own not in _OURS:
        return _of_its_own(own)
    if {"forward", "_conv_forward"} & set(vars(module)):
        return "its forward was assigned to the object"
    for tensor in module.parameters():
        if tensor.dtype not in DTYPES:
            return f"cuconv has no {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.device.type not in (*DEVICES, "meta"):
            return f"cuconv does not compute on {tensor.device.type}"
        if tensor.is_cuda and not runtime.probe().usable:
            return runtime.probe().reason
    return ""


def _of_its_own(own: type) -> str:
    what = "quantized" if any("quantized" in kind.__module__ for kind in own.__mro__) else "a class of its own"
    return f"{what} ({own.__module__}.{own.__qualname__}), its forward may be another one"


def _own_class(module: nn.Module) -> type:
    """The class without what torch.nn.utils.parametrize puts before it."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _become(module: nn.Module, own: type) -> None:
    """Makes `module` one of class `own`; its parametrizations stay."""
    if parametrize.is_parametrized(module):
        # A class made for this module alone, or for its copies too, which must keep it.
        added = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        own = type(f"Parametrized{own.__name__}", (own,), added)
    module.__class__ = own
