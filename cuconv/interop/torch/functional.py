"""torch.nn.functional's convolutions, with its names, layouts, defaults and rules.

Inputs are (N, C, L..) or (C, L..), kernels (out, in / groups, k..), of transposed convolutions (in, out / groups, k..).
What these functions add:

* `data_format`: "channels_first", as torch has it, or "channels_last" for inputs and results (N, L.., C), of any rank.
* padding "causal" of :func:`conv1d`: zeros in front only, so that no output reads what comes after it.
* `precision` of float32 on a GPU's tensor cores, "highest" or "high" (TF32); torch's switches for TF32 are not read.

Inputs are never transposed in memory. A channels_first tensor in which the channels lie closest together, for example
of ``torch.channels_last``, is read as the channels_last array that it is, and the result lies like it. Kernels are
rearranged at every call.

A convolution of as many groups as channels goes to the depthwise functions, and so does its transpose with one filter a
channel. Errors are ValueError for shapes, options and devices, TypeError for dtypes and for what is no tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cuconv import geometry
from cuconv.geometry import CHANNELS_FIRST, CHANNELS_LAST
from cuconv.interop.torch import ops
from cuconv.interop.torch.ops import Sizes

__all__ = [
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "separable_conv1d",
    "separable_conv2d",
    "separable_conv3d",
]


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: str | Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    data_format: str = CHANNELS_FIRST,
    precision: str = "highest",
) -> Tensor:
    """The convolution of (N, C, L..) with (out, C / groups, k..), (N, out, P..), of the rank that `weight` has."""
    (groups,) = geometry.normalize_tuple(groups, 1, "groups")
    rank = weight.dim() - 2
    options = {
        "strides": stride,
        "padding": _padding(padding, rank, stride),
        "dilation_rate": dilation,
        "precision": precision,
    }
    kernel = _kernel(weight)
    depthwise = weight.shape[1] == 1 < groups and weight.shape[0] % groups == 0
    if depthwise:
        kernel = kernel.reshape(*kernel.shape[:rank], groups, -1)

    def run(x: Tensor, layout: str) -> Tensor:
        if depthwise:
            return ops.depthwise_conv(x, kernel, bias, data_format=layout, **options)
        return ops.conv(x, kernel, bias, data_format=layout, groups=groups, **options)

    return _as_it_lies(run, input, rank, data_format)


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    data_format: str = CHANNELS_FIRST,
    precision: str = "highest",
) -> Tensor:
    """The transposed convolution of (N, C, L..) with (C, out / groups, k..), (N, out, P..), of the rank of `weight`."""
    rank, kernel = weight.dim() - 2, _kernel(weight)
    pads = geometry.normalize_tuple(padding, rank, "padding", allow_zero=True)

    def run(x: Tensor, layout: str) -> Tensor:
        return ops.conv_transpose(
            x,
            kernel,
            bias,
            strides=stride,
            padding=tuple((pad, pad) for pad in pads),
            output_padding=output_padding,
            data_format=layout,
            dilation_rate=dilation,
            groups=groups,
            precision=precision,
        )

    return _as_it_lies(run, input, rank, data_format)


def separable_conv(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: str | Sizes = 0,
    dilation: Sizes = 1,
    *,
    data_format: str = CHANNELS_FIRST,
    precision: str = "highest",
) -> Tensor:
    """A convolution of C groups with (C * M, 1, k..), then one with (out, C * M, 1..), in one step; (N, out, P..).

    Stride, padding and dilation are those of the first one, `bias` is that of the second.
    """
    rank = depthwise_weight.dim() - 2
    pads = _padding(padding, rank, stride)
    pointwise = _kernel(pointwise_weight)
    filters = _kernel(depthwise_weight)
    if depthwise_weight.shape[1] != 1:
        raise ValueError(
            "`depthwise_weight` must have the shape (channels * multiplier, 1, k..). "
            f"Received: depthwise_weight.shape={tuple(depthwise_weight.shape)}"
        )

    def run(x: Tensor, layout: str) -> Tensor:
        channels = x.shape[-1 if layout == CHANNELS_LAST else 1]
        if channels == 0 or depthwise_weight.shape[0] % channels:
            raise ValueError(
                "`depthwise_weight` must have a multiple of the input's channels. "
                f"Received: input.shape={tuple(input.shape)}, depthwise_weight.shape={tuple(depthwise_weight.shape)}"
            )
        depthwise = filters.reshape(*filters.shape[:rank], channels, -1)
        return ops.separable_conv(
            x,
            depthwise,
            pointwise,
            bias,
            strides=stride,
            padding=pads,
            data_format=layout,
            dilation_rate=dilation,
            precision=precision,
        )

    return _as_it_lies(run, input, rank, data_format)


def _of_rank(function: Callable[..., Tensor], rank: int) -> Callable[..., Tensor]:
    """`function` for kernels of one rank."""

    def ranked(input: Tensor, weight: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
            given = f"{type(input).__name__}, {type(weight).__name__}"
            raise TypeError(f"`input` and `weight` must be tensors. Received: {given}")
        if weight.dim() != rank + 2:
            raise ValueError(f"`weight` must have {rank + 2} axes. Received: weight.shape={tuple(weight.shape)}")
        return function(input, weight, *arguments, **keywords)

    ranked.__name__ = ranked.__qualname__ = f"{function.__name__}{rank}d"
    ranked.__doc__ = f"{function.__doc__}\n\n    The function `{function.__name__}` for {rank} spatial axes."
    return ranked


conv1d, conv2d, conv3d = (_of_rank(conv, rank) for rank in (1, 2, 3))
conv_transpose1d, conv_transpose2d, conv_transpose3d = (_of_rank(conv_transpose, rank) for rank in (1, 2, 3))
separable_conv1d, separable_conv2d, separable_conv3d = (_of_rank(separable_conv, rank) for rank in (1, 2, 3))


def _padding(padding: Any, rank: int, stride: Any) -> Any:
    """torch's padding as that of :mod:`cuconv.ops`: a name, or pairs."""
    if not isinstance(padding, str):
        return tuple((size, size) for size in geometry.normalize_tuple(padding, rank, "padding", allow_zero=True))
    if padding == "same" and any(step != 1 for step in geometry.normalize_tuple(stride, rank, "stride")):
        raise ValueError(f'`padding="same"` needs a stride of 1, as in torch. Received: stride={stride}')
    return padding


def _kernel(weight: Tensor) -> Tensor:
    """(F, C, k..) as [k.., C, F], in one piece."""
    return weight.permute(*range(2, weight.dim()), 1, 0).contiguous()


def _as_it_lies(run: Callable[[Tensor, str], Tensor], input: Tensor, rank: int, data_format: str) -> Tensor:
    """``run(x, layout)`` on `input` with a batch, in the layout it has in memory; the result as `data_format` says."""
    if data_format not in geometry.DATA_FORMATS:
        raise ValueError(
            f'`data_format` must be "channels_first" or "channels_last". Received: data_format={data_format!r}'
        )
    if input.dim() not in (rank + 1, rank + 2):
        raise ValueError(
            f"`input` must have {rank + 2} axes, or {rank + 1} without a batch. "
            f"Received: input.shape={tuple(input.shape)}"
        )
    x = input if input.dim() == rank + 2 else input.unsqueeze(0)
    if data_format == CHANNELS_FIRST and x.stride(1) < min(x.stride()[2:]):
        y = run(x.movedim(1, -1), CHANNELS_LAST).movedim(-1, 1)
    else:
        y = run(x, data_format)
    return y if input.dim() == rank + 2 else y.squeeze(0)
