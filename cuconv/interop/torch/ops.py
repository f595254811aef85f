"""The functions of :mod:`cuconv.ops` on tensors, with gradients: layouts, names and rules are those of that module.

Each family is three custom operators of torch, for example ``torch.ops.cuconv.conv``, ``conv_input_grad`` and
``conv_kernel_grad``. A convolution is linear in x and in w, so with dy the three are derivatives of one form

    <conv(x, w), dy> = <x, input_grad(dy, w)> = <w, kernel_grad(x, dy)>

and the derivative of each is given by the two others: gradients of any order need nothing more. Results lie in memory
as `data_format` says, whatever the strides of the arguments.

The functions here take what cuconv.ops takes but `activation`, `out` and `workspace`, check it, follow
:class:`torch.autocast` and write padding out as (before, after) pairs, which is all that the operators know. Their
errors are ValueError for shapes, options and devices, TypeError for dtypes and for what is no tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cuconv import geometry, ops
from cuconv.geometry import CHANNELS_LAST
from cuconv.interop.torch.arrays import DEVICES, DTYPES, placed, view

__all__ = ["conv", "conv_transpose", "depthwise_conv", "separable_conv"]

Sizes = int | Sequence[int]
Padding = str | Sequence[int] | Sequence[Sequence[int]]

# --- Operators ---------------------------------------------------------------------------------------------------

_SCHEMA = {
    "strides": "int[]",
    "padding": "SymInt[]",  # before, after, before, after; of "same" they may depend on the input
    "output_padding": "int[]",
    "dilation_rate": "int[]",
    "groups": "int",
    "data_format": "str",
    "precision": "str",
}
_CONV = ("strides", "padding", "data_format", "dilation_rate", "groups", "precision")
_TRANSPOSE = ("strides", "padding", "output_padding", "data_format", "dilation_rate", "groups", "precision")
_DEPTHWISE = ("strides", "padding", "data_format", "dilation_rate", "precision")

Operator = Callable[..., Any]


def _operator(
    name: str, arguments: str, options: Sequence[str], function: Operator, allocate: Operator, results: str = "Tensor"
) -> Any:
    """The operator ``cuconv::name``.

    Args:
        arguments: the schema of those before `options`.
        function: of :mod:`cuconv.ops`, with these names.
        allocate: the arguments -> where the result goes, not initialised; the shapes are checked there. torch calls it
            on tensors without memory to learn the result's shape.
    """
    schema = ", ".join([arguments, *(f"{_SCHEMA[option]} {option}" for option in options)])

    def compute(*given: Any) -> Any:
        out = allocate(*given)
        first = len(given) - len(options)
        with placed(given[0]):
            arrays = [view(each) if isinstance(each, Tensor) else each for each in given[:first]]
            target = view(out) if isinstance(out, Tensor) else tuple(map(view, out))
            function(*arrays, **_keywords(options, given[first:]), out=target)
        return out

    operator: Any = torch.library.custom_op(
        f"cuconv::{name}", compute, mutates_args=(), device_types=DEVICES, schema=f"({schema}) -> {results}"
    )
    operator.register_fake(allocate)
    return operator


def _keywords(options: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """The options of a function of cuconv.ops: tuples, and padding in pairs."""
    found = dict(zip(options, map(_frozen, values), strict=True))
    flat = found["padding"]
    return {**found, "padding": tuple(zip(flat[::2], flat[1::2], strict=True))}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _remembered(rule: Callable[..., Sequence[int]]) -> Callable[..., Sequence[int]]:
    """The shape that `rule` finds for some shapes and the values of options, remembered where the sizes are known."""
    known = functools.lru_cache(maxsize=4096)(rule)

    def shape(*given: Any) -> Sequence[int]:
        *shapes, values = (tuple(map(_frozen, each)) for each in given)
        plain = all(type(size) is int for sizes in shapes for size in sizes)  # torch.compile has symbols in their place
        return (known if plain else rule)(*shapes, values)

    return shape


def _family(name: str, rule: Callable[..., Any], result: str, options: Sequence[str]) -> tuple[Any, Any, Any]:
    """The three operators of a family with one kernel.

    Args:
        rule: of :mod:`cuconv.geometry`.
        result: which shape of it is the result's.
    """

    @_remembered
    def shape(x_shape: Sequence[int], w_shape: Sequence[int], values: Sequence[Any]) -> Sequence[int]:
        given = _keywords(options, values)
        del given["precision"]
        found: Sequence[int] = getattr(rule(x_shape, w_shape, **given), result)
        return found

    def room_for_result(x: Tensor, w: Tensor, bias: Tensor | None, *values: Any) -> Tensor:
        return x.new_empty(shape(x.shape, w.shape, values))

    def room_for_input_grad(dy: Tensor, w: Tensor, input_shape: Sequence[int], *values: Any) -> Tensor:
        _expect("dy", dy, shape(input_shape, w.shape, values))
        return dy.new_empty(input_shape)

    def room_for_kernel_grad(x: Tensor, dy: Tensor, kernel_shape: Sequence[int], *values: Any) -> Tensor:
        _expect("dy", dy, shape(x.shape, kernel_shape, values))
        return x.new_empty(kernel_shape)

    def operator(suffix: str, arguments: str, room: Operator) -> Any:
        return _operator(name + suffix, arguments, options, getattr(ops, name + suffix), room)

    forward = operator("", "Tensor x, Tensor w, Tensor? bias", room_for_result)
    input_grad = operator("_input_grad", "Tensor dy, Tensor w, SymInt[] input_shape", room_for_input_grad)
    kernel_grad = operator("_kernel_grad", "Tensor x, Tensor dy, SymInt[] kernel_shape", room_for_kernel_grad)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Of the two factors, only what the other one's gradient needs."""
        first, second, _, *values = inputs
        by_first, by_second = ctx.needs_input_grad[:2]
        ctx.save_for_backward(first if by_second else None, second if by_first else None)
        ctx.shapes, ctx.values = (first.shape, second.shape), values

    def differentiated(by_first: Operator, by_second: Operator) -> Operator:
        """backward(ctx, g), where ``by_*(first, second, g, shape of the gradient)`` give the gradients."""

        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            needed, saved = ctx.needs_input_grad, ctx.saved_tensors
            given = [
                gradient(*saved, g, shape, *ctx.values) if wanted else None
                for gradient, shape, wanted in zip((by_first, by_second), ctx.shapes, needed, strict=False)
            ]
            third = _bias_grad(g, ctx.values[options.index("data_format")]) if needed[2] else None
            return (*given, third, *(None for _ in options))

        return backward

    forward.register_autograd(
        differentiated(
            lambda x, w, g, shape, *values: input_grad(g, w, shape, *values),
            lambda x, w, g, shape, *values: kernel_grad(x, g, shape, *values),
        ),
        setup_context=keep,
    )
    input_grad.register_autograd(
        differentiated(
            lambda dy, w, g, shape, *values: forward(g, w, None, *values),
            lambda dy, w, g, shape, *values: kernel_grad(g, dy, shape, *values),
        ),
        setup_context=keep,
    )
    kernel_grad.register_autograd(
        differentiated(
            lambda x, dy, g, shape, *values: input_grad(dy, g, shape, *values),
            lambda x, dy, g, shape, *values: forward(x, g, None, *values),
        ),
        setup_context=keep,
    )
    return forward, input_grad, kernel_grad


def _bias_grad(dy: Tensor, data_format: str) -> Tensor:
    channels = dy.dim() - 1 if data_format == CHANNELS_LAST else 1
    return dy.sum([axis for axis in range(dy.dim()) if axis != channels])


def _separable_family() -> tuple[Any, Any, Any]:
    """The three operators of separable convolutions; their form is linear in x, in dy and in either kernel."""
    options = _DEPTHWISE

    @_remembered
    def shape(
        x_shape: Sequence[int], depthwise_shape: Sequence[int], pointwise_shape: Sequence[int], values: Sequence[Any]
    ) -> Sequence[int]:
        given = _keywords(options, values)
        del given["precision"]
        found = geometry.depthwise_shape(x_shape, depthwise_shape, **given)
        wanted = (*(1,) * found.rank, found.filters)
        if pointwise_shape[:-1] != wanted or pointwise_shape[-1] < 1:
            raise ValueError(
                f"`pointwise_w` must have the shape {wanted} + (filters,). "
                f"Received: pointwise_w.shape={pointwise_shape}"
            )
        return geometry.join_shape(found.batch, found.out_size, pointwise_shape[-1], found.data_format)

    def room_for_result(
        x: Tensor, depthwise_w: Tensor, pointwise_w: Tensor, bias: Tensor | None, *values: Any
    ) -> Tensor:
        return x.new_empty(shape(x.shape, depthwise_w.shape, pointwise_w.shape, values))

    def room_for_input_grad(
        dy: Tensor, depthwise_w: Tensor, pointwise_w: Tensor, input_shape: Sequence[int], *values: Any
    ) -> Tensor:
        _expect("dy", dy, shape(input_shape, depthwise_w.shape, pointwise_w.shape, values))
        return dy.new_empty(input_shape)

    def room_for_kernel_grad(
        x: Tensor, dy: Tensor, depthwise_w: Tensor, pointwise_w: Tensor, *values: Any
    ) -> tuple[Tensor, Tensor]:
        _expect("dy", dy, shape(x.shape, depthwise_w.shape, pointwise_w.shape, values))
        return x.new_empty(depthwise_w.shape), x.new_empty(pointwise_w.shape)

    def kernel_grads(*arrays: Any, out: Any, **keywords: Any) -> None:
        for target, found in zip(out, ops.separable_conv_kernel_grad(*arrays, **keywords), strict=True):
            target[...] = found

    name, kernels = "separable_conv", "Tensor depthwise_w, Tensor pointwise_w"
    forward = _operator(name, f"Tensor x, {kernels}, Tensor? bias", options, ops.separable_conv, room_for_result)
    input_grad = _operator(
        f"{name}_input_grad",
        f"Tensor dy, {kernels}, SymInt[] input_shape",
        options,
        ops.separable_conv_input_grad,
        room_for_input_grad,
    )
    kernel_grad = _operator(
        f"{name}_kernel_grad",
        f"Tensor x, Tensor dy, {kernels}",
        options,
        kernel_grads,
        room_for_kernel_grad,
        "(Tensor, Tensor)",
    )

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, values = inputs[: -len(options)], inputs[-len(options) :]
        ctx.save_for_backward(*(each if isinstance(each, Tensor) else None for each in tensors))
        ctx.values = values

    def forward_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, depthwise_w, pointwise_w, _ = ctx.saved_tensors
        needed, values = ctx.needs_input_grad, ctx.values
        dx = input_grad(g, depthwise_w, pointwise_w, x.shape, *values) if needed[0] else None
        kernels = kernel_grad(x, g, depthwise_w, pointwise_w, *values) if any(needed[1:3]) else (None, None)
        dbias = _bias_grad(g, values[options.index("data_format")]) if needed[3] else None
        return (dx, *kernels, dbias, *(None for _ in options))

    def input_grad_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dy, depthwise_w, pointwise_w, _ = ctx.saved_tensors
        needed, values = ctx.needs_input_grad, ctx.values
        ddy = forward(g, depthwise_w, pointwise_w, None, *values) if needed[0] else None
        kernels = kernel_grad(g, dy, depthwise_w, pointwise_w, *values) if any(needed[1:3]) else (None, None)
        return (ddy, *kernels, None, *(None for _ in options))

    def kernel_grad_backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor | None, ...]:
        x, dy, depthwise_w, pointwise_w = ctx.saved_tensors
        values = ctx.values
        pairs = ((g, pointwise_w), (depthwise_w, h))  # in the place of both kernels, once each gradient
        dx = sum(input_grad(dy, *pair, x.shape, *values) for pair in pairs)
        ddy = sum(forward(x, *pair, None, *values) for pair in pairs)
        by_depthwise, _ = kernel_grad(x, dy, *pairs[1], *values)
        _, by_pointwise = kernel_grad(x, dy, *pairs[0], *values)
        return (dx, ddy, by_depthwise, by_pointwise, *(None for _ in options))

    forward.register_autograd(forward_backward, setup_context=keep)
    input_grad.register_autograd(input_grad_backward, setup_context=keep)
    kernel_grad.register_autograd(kernel_grad_backward, setup_context=keep)
    return forward, input_grad, kernel_grad


def _expect(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"`{name}` must have the shape {tuple(shape)}. Received: {name}.shape={tuple(tensor.shape)}")


_conv, _, _ = _family("conv", geometry.conv_shape, "y_shape", _CONV)
_conv_transpose, _, _ = _family("conv_transpose", geometry.transpose_shape, "x_shape", _TRANSPOSE)
_depthwise_conv, _depthwise_conv_input_grad, _ = _family(
    "depthwise_conv", geometry.depthwise_shape, "y_shape", _DEPTHWISE
)
_separable_conv, _, _ = _separable_family()

# --- Functions ---------------------------------------------------------------------------------------------------


def conv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    groups: int = 1,
    precision: str = "highest",
) -> Tensor:
    """The convolution of x [B, L.., C] with w [taps.., C / groups, F], as :func:`cuconv.ops.conv`."""
    x, w, bias = _alike(x, w, bias, precision=precision)
    (groups,) = geometry.normalize_tuple(groups, 1, "groups")
    steps, pads, data_format, rates = _window(x, w, strides, padding, data_format, dilation_rate)
    return _conv(x, w, _bias(bias, w.shape[-1]), steps, pads, data_format, rates, groups, precision)


def conv_transpose(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    output_padding: Sizes | None = None,
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    groups: int = 1,
    precision: str = "highest",
) -> Tensor:
    """The transposed convolution of x [B, L.., C] with w [taps.., F / groups, C], as :func:`cuconv.ops.conv_transpose`.

    `output_padding` may reach up to the dilation too, as in torch.
    """
    x, w, bias = _alike(x, w, bias, precision=precision)
    (groups,) = geometry.normalize_tuple(groups, 1, "groups")
    rank, data_format = _rank(x, w), geometry.normalize_data_format(data_format)
    steps = geometry.normalize_tuple(strides, rank, "strides")
    rates = geometry.normalize_tuple(dilation_rate, rank, "dilation_rate")
    extras: Sequence[int | None] = (None,) * rank
    if output_padding is not None:
        extras = geometry.normalize_tuple(output_padding, rank, "output_padding", allow_zero=True)
        if any(extra and extra >= max(s, d) for extra, s, d in zip(extras, steps, rates, strict=True)):
            raise ValueError(
                "`output_padding` must be smaller than the stride or the dilation of its axis. "
                f"Received: output_padding={output_padding}, strides={steps}, dilation_rate={rates}"
            )
    pads, ends, more = _cropping(w.shape, steps, rates, padding, extras)
    if any(more):
        around = [size for behind in reversed(more) for size in (0, behind)]  # the last axis comes first
        x = torch.nn.functional.pad(x, [0, 0, *around] if data_format == CHANNELS_LAST else around)
    bias = _bias(bias, groups * w.shape[-2])
    if w.shape[-2] == 1 < groups == w.shape[-1] and (bias is None or x.element_size() > 2):
        # A filter a channel: the gradient of a depthwise convolution, which has faster kernels. A bias comes on top of
        # what was rounded already, which 16 bits would show.
        found = geometry.transpose_shape(
            tuple(x.shape),
            tuple(w.shape),
            strides=steps,
            padding=tuple(zip(pads[::2], pads[1::2], strict=True)),
            output_padding=tuple(ends),
            data_format=data_format,
            dilation_rate=rates,
            groups=groups,
        )
        turned = w.transpose(-1, -2).conj()  # which the gradient conjugates again
        y = _depthwise_conv_input_grad(x, turned, found.x_shape, steps, pads, data_format, rates, precision)
        return y if bias is None else y + bias.reshape(-1, *(1,) * (0 if data_format == CHANNELS_LAST else rank))
    return _conv_transpose(x, w, bias, steps, pads, ends, data_format, rates, groups, precision)


def depthwise_conv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    precision: str = "highest",
) -> Tensor:
    """The depthwise convolution of x [B, L.., C] with w [taps.., C, M], as :func:`cuconv.ops.depthwise_conv`."""
    x, w, bias = _alike(x, w, bias, precision=precision)
    steps, pads, data_format, rates = _window(x, w, strides, padding, data_format, dilation_rate)
    bias = _bias(bias, w.shape[-2] * w.shape[-1])
    return _depthwise_conv(x, w, bias, steps, pads, data_format, rates, precision)


def separable_conv(
    x: Tensor,
    depthwise_w: Tensor,
    pointwise_w: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Sizes = 1,
    padding: Padding = "valid",
    data_format: str | None = None,
    dilation_rate: Sizes = 1,
    precision: str = "highest",
) -> Tensor:
    """A depthwise convolution with [taps.., C, M], then one with [1.., C * M, F]; :func:`cuconv.ops.separable_conv`."""
    x, depthwise_w, pointwise_w, bias = _alike(x, depthwise_w, pointwise_w, bias, precision=precision)
    steps, pads, data_format, rates = _window(x, depthwise_w, strides, padding, data_format, dilation_rate)
    bias = _bias(bias, pointwise_w.shape[-1])
    return _separable_conv(x, depthwise_w, pointwise_w, bias, steps, pads, data_format, rates, precision)


# --- Checks ------------------------------------------------------------------------------------------------------


def _alike(*tensors: Tensor | None, precision: str) -> Any:
    """`tensors` in the dtype of autocast where that is on; of one dtype and one device, or an error."""
    given: list[Tensor] = [each for each in tensors if each is not None]
    if not all(isinstance(each, Tensor) for each in given):
        kinds = ", ".join(type(each).__name__ for each in given)
        raise TypeError(f"arguments must be tensors. Received: {kinds}")
    device = given[0].device
    if any(each.device != device for each in given) or device.type not in (*DEVICES, "meta"):
        places = ", ".join(str(each.device) for each in given)
        raise ValueError(f"tensors must be on one CPU or CUDA device. Received: {places}")
    if device.type in DEVICES and torch.is_autocast_enabled(device.type):
        # As torch does: what is float64 stays so.
        dtype = torch.get_autocast_dtype(device.type)
        lowered = [
            each if each is None or not each.is_floating_point() or each.dtype == torch.float64 else each.to(dtype)
            for each in tensors
        ]
        tensors, given = tuple(lowered), [each for each in lowered if each is not None]
    if given[0].dtype not in DTYPES or any(each.dtype != given[0].dtype for each in given):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        found = ", ".join(str(each.dtype).removeprefix("torch.") for each in given)
        raise TypeError(f"tensors must have one dtype of {names}. Received: {found}")
    if precision not in ops.PRECISIONS:
        raise ValueError(f'`precision` must be "highest" or "high". Received: precision={precision!r}')
    return tensors


def _window(
    x: Tensor, w: Tensor, strides: Any, padding: Any, data_format: Any, dilation_rate: Any
) -> tuple[tuple[int, ...], list[int], str, tuple[int, ...]]:
    """Strides, padding in pairs one after the other, data_format and dilation."""
    rank, data_format = _rank(x, w), geometry.normalize_data_format(data_format)
    steps = geometry.normalize_tuple(strides, rank, "strides")
    rates = geometry.normalize_tuple(dilation_rate, rank, "dilation_rate")
    _, sizes, _ = geometry.split_shape(x.shape, data_format)
    pads: list[int] = []
    named = geometry.normalize_padding(padding, rank)
    for n, k, s, d, pad in zip(sizes, w.shape, steps, rates, _per_axis(named, rank), strict=False):
        length, before = geometry.conv_axis(n, k, s, d, pad)
        if not isinstance(pad, str):
            pads += pad
        elif pad == "valid":
            pads += 0, 0
        else:
            pads += before, max(0, (length - 1) * s + (k - 1) * d + 1 - n - before)
    return steps, pads, data_format, rates


def _cropping(
    w_shape: Sequence[int],
    strides: Sequence[int],
    dilation_rate: Sequence[int],
    padding: Any,
    output_padding: Sequence[int | None],
) -> tuple[list[int], list[int], list[int]]:
    """What the full product of a transposed convolution has too much or too little, an axis.

    Positions to crop, in pairs one after the other; positions it lacks behind, fewer than a stride; and positions of
    zeros to put behind the input where it lacks more.
    """
    rank = len(strides)
    named = _per_axis(geometry.normalize_padding(padding, rank, causal=False), rank)
    pads: list[int] = []
    ends: list[int] = []
    more: list[int] = []
    for k, s, d, pad, extra in zip(w_shape, strides, dilation_rate, named, output_padding, strict=False):
        length, before = geometry.transpose_axis(1, k, s, d, pad, extra)  # each further position adds a stride
        after = (k - 1) * d + 1 - before - length
        more.append(max(0, -after) // s)
        after += more[-1] * s
        pads += before, max(0, after)
        ends.append(max(0, -after))
    return pads, ends, more


def _per_axis(padding: Any, rank: int) -> Sequence[Any]:
    return (padding,) * rank if isinstance(padding, str) else padding


def _rank(x: Tensor, w: Tensor) -> int:
    rank = w.dim() - 2
    if not 1 <= rank <= geometry.MAX_RANK or x.dim() != w.dim():
        raise ValueError(
            f"a kernel must have 1 to {geometry.MAX_RANK} spatial axes and two of channels, the input as many axes. "
            f"Received: input shape={tuple(x.shape)}, kernel shape={tuple(w.shape)}"
        )
    return rank


def _bias(bias: Tensor | None, filters: int) -> Tensor | None:
    if bias is not None:
        _expect("bias", bias, (filters,))
    return bias
