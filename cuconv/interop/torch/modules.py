"""torch.nn's convolution modules, computed by cuconv.

Each is a subclass of the module of the same name: constructor, parameters, initial values, state_dict, repr and
whatever else is torch's stay torch's, and code that asks ``isinstance(module, torch.nn.Conv2d)`` gets the answer that
it expects. Two keywords come on top, `data_format` and `precision`, and padding "causal" of :class:`Conv1d`; what they
do stands in :mod:`cuconv.interop.torch.functional`.

A separable module takes `depth_multiplier` in the place of `groups`, the channels in the middle for each of the input,
and holds its parameters as the two modules `depthwise` and `pointwise`, so that it loads the weights of two of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cuconv import geometry
from cuconv.geometry import CHANNELS_FIRST, CHANNELS_LAST
from cuconv.interop.torch import functional
from cuconv.interop.torch.ops import Sizes
from cuconv.ops import PRECISIONS

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "SeparableConv1d",
    "SeparableConv2d",
    "SeparableConv3d",
]


class _Options(nn.Module):
    """The keywords that cuconv adds. They are attributes of the class, so that a module of torch's can become ours."""

    data_format = CHANNELS_FIRST
    precision = "highest"

    def _take(self, data_format: str, precision: str) -> None:
        if data_format not in geometry.DATA_FORMATS:
            names = " or ".join(f'"{name}"' for name in geometry.DATA_FORMATS)
            raise ValueError(f"`data_format` must be {names}. Received: data_format={data_format!r}")
        if precision not in PRECISIONS:
            raise ValueError(f'`precision` must be "highest" or "high". Received: precision={precision!r}')
        self.data_format, self.precision = data_format, precision

    def extra_repr(self) -> str:
        changed = [name for name in ("data_format", "precision") if getattr(self, name) != getattr(_Options, name)]
        told = [super().extra_repr(), *(f"{name}={getattr(self, name)!r}" for name in changed)]
        return ", ".join(filter(None, told))


class _Conv(_Options):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: str | Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        data_format: str = CHANNELS_FIRST,
        precision: str = "highest",
    ) -> None:
        causal = padding == "causal"  # which torch's own constructors refuse
        inherited: Any = super()
        inherited.__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if causal else padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self._take(data_format, precision)
        if causal:
            if len(self.kernel_size) > 1:
                raise ValueError("`padding=\"causal\"` needs one spatial axis. Received: padding='causal'")
            self.padding = padding
            self._reversed_padding_repeated_twice = [(self.kernel_size[0] - 1) * self.dilation[0], 0]

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = _padded(self, input, self.data_format)
        return functional.conv(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            data_format=self.data_format,
            precision=self.precision,
        )


def _padded(conv: Any, input: Tensor, data_format: str) -> tuple[Tensor, Any]:
    """The input and the padding of `conv` that is left to do: zeros are, all else is done as in torch, by a copy."""
    if conv.padding_mode == "zeros":
        return input, conv.padding
    rank, last = len(conv.kernel_size), data_format == CHANNELS_LAST
    first = input.movedim(-1, -1 - rank) if last else input
    first = nn.functional.pad(first, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    return first.movedim(-1 - rank, -1) if last else first, 0


class _ConvTranspose(_Options):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        data_format: str = CHANNELS_FIRST,
        precision: str = "highest",
    ) -> None:
        inherited: Any = super()
        inherited.__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self._take(data_format, precision)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        rank, last = len(self.kernel_size), self.data_format == CHANNELS_LAST
        shown = input.movedim(-1, -1 - rank) if last else input  # the order of axes that torch's rule knows
        if last and output_size is not None and len(output_size) == input.dim():
            output_size = output_size[-1 - rank : -1]
        output_padding = self._output_padding(
            shown, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation
        )
        return functional.conv_transpose(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
            data_format=self.data_format,
            precision=self.precision,
        )


class Conv1d(_Conv, nn.Conv1d):
    """:class:`torch.nn.Conv1d`; also with padding "causal" and for inputs (N, L, C)."""


class Conv2d(_Conv, nn.Conv2d):
    """:class:`torch.nn.Conv2d`; also for inputs (N, H, W, C)."""


class Conv3d(_Conv, nn.Conv3d):
    """:class:`torch.nn.Conv3d`; also for inputs (N, D, H, W, C)."""


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d`; also for inputs (N, L, C)."""


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d`; also for inputs (N, H, W, C)."""


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d`; also for inputs (N, D, H, W, C)."""


class _SeparableConv(_Options):
    _conv: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: str | Sizes = 0,
        dilation: Sizes = 1,
        depth_multiplier: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        data_format: str = CHANNELS_FIRST,
        precision: str = "highest",
    ) -> None:
        super().__init__()
        self._take(data_format, precision)
        options = {"device": device, "dtype": dtype, "data_format": data_format, "precision": precision}
        between = in_channels * depth_multiplier
        self.depthwise = self._conv(
            in_channels,
            between,
            kernel_size,
            stride,
            padding,
            dilation,
            in_channels,
            False,
            padding_mode,
            **options,
        )
        self.pointwise = self._conv(between, out_channels, 1, bias=bias, **options)

    def forward(self, input: Tensor) -> Tensor:
        first = self.depthwise
        input, padding = _padded(first, input, self.data_format)
        return functional.separable_conv(
            input,
            first.weight,
            self.pointwise.weight,
            self.pointwise.bias,
            first.stride,
            padding,
            first.dilation,
            data_format=self.data_format,
            precision=self.precision,
        )


class SeparableConv1d(_SeparableConv):
    """A depthwise and a pointwise convolution of inputs (N, C, L) or (N, L, C) in one step."""

    _conv = Conv1d


class SeparableConv2d(_SeparableConv):
    """A depthwise and a pointwise convolution of inputs (N, C, H, W) or (N, H, W, C) in one step."""

    _conv = Conv2d


class SeparableConv3d(_SeparableConv):
    """A depthwise and a pointwise convolution of inputs (N, C, D, H, W) or (N, D, H, W, C) in one step."""

    _conv = Conv3d
