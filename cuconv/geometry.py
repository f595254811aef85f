"""Shapes of the convolution family: every size, padding rule and shape error, in plain integers.

One frozen :class:`ConvShape` describes a convolution. The other families are the same object, read differently:

* depthwise: as many groups as input channels;
* transposed: the convolution whose input gradient it is, so that its input is ``y`` here and its output is ``x``;
* gradients: the same :class:`ConvShape` as the forward pass.

Per spatial axis, with ``k_eff = (k - 1) * d + 1`` and ``s`` the stride, a length n becomes m:

=========  ========================  =====================================================
padding    m                         zeros in front
=========  ========================  =====================================================
valid      (n - k_eff) // s + 1      0
same       ceil(n / s)               max(0, (m - 1) * s + k_eff - n) // 2
causal     ceil(n / s)               d * (k - 1)
(a, b)     (n + a + b - k_eff)//s+1  a
=========  ========================  =====================================================

Batch and spatial sizes may be None (unknown); what depends on them is None too. Imports nothing but the language.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

# An int, or None where it is not known yet. Any, because whoever computes has only known ones (ConvShape.is_static).
Size: TypeAlias = Any
Shape: TypeAlias = tuple[Size, ...]
Pairs: TypeAlias = tuple[tuple[int, int], ...]

CHANNELS_LAST = "channels_last"
CHANNELS_FIRST = "channels_first"
DATA_FORMATS = (CHANNELS_LAST, CHANNELS_FIRST)
MAX_RANK = 3


@dataclass(frozen=True)
class ConvShape:
    """The integers of one convolution::

        y[b,p,f] = sum over r,c of x[b, p*stride + r*dilation - pad_before, c] * w[r,c,f]

    ``x`` reads as zero outside its bounds. Every field is final: no rule is left to apply.
    """

    batch: Size
    in_size: Shape
    out_size: Shape
    in_channels: int
    filters: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation_rate: tuple[int, ...]
    pad_before: Shape
    groups: int
    data_format: str

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    @property
    def x_shape(self) -> Shape:
        """Shape of x in `data_format`."""
        return join_shape(self.batch, self.in_size, self.in_channels, self.data_format)

    @property
    def y_shape(self) -> Shape:
        """Shape of y in `data_format`."""
        return join_shape(self.batch, self.out_size, self.filters, self.data_format)

    @property
    def w_shape(self) -> tuple[int, ...]:
        """Shape of the kernel: taps, input channels of one group, filters."""
        return (*self.kernel_size, self.in_channels // self.groups, self.filters)

    @property
    def k_eff(self) -> tuple[int, ...]:
        """Input positions from the first tap to the last, per axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation_rate, strict=True))

    @property
    def depth_multiplier(self) -> int:
        """Filters of one group; of a depthwise convolution its depth multiplier."""
        return self.filters // self.groups

    @property
    def is_static(self) -> bool:
        """True when no size is None."""
        return None not in (self.batch, *self.in_size)


# --- Arguments ---------------------------------------------------------------------------------------------------


def as_int(value: object) -> int | None:
    """`value` as an int, or None when it is no integer. A bool is not a size."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def normalize_tuple(value: object, rank: int, name: str, *, allow_zero: bool = False) -> tuple[int, ...]:
    """`value` (one integer, or `rank` of them) as a tuple of `rank` integers.

    Raises:
        ValueError: not an integer or a sequence of exactly `rank` integers, or one below 1 (below 0 with `allow_zero`).
    """
    single = as_int(value)
    entries: list[object] = [single] * rank if single is not None else _entries(value)
    sizes = [size for size in map(as_int, entries) if size is not None and size >= (0 if allow_zero else 1)]
    if len(entries) != rank or len(sizes) != rank:
        least = ">= 0" if allow_zero else ">= 1"
        wanted = f"an integer {least}" if rank == 1 else f"an integer {least} or a tuple of {rank} such integers"
        raise ValueError(f"`{name}` must be {wanted}. Received: {name}={value!r}")
    return tuple(sizes)


def normalize_pairs(value: object, rank: int, name: str) -> Pairs:
    """`value` as `rank` pairs (before, after) of integers >= 0.

    Accepts one integer, `rank` integers (the same before and after), `rank` pairs, or a mixture; at rank 1 also one
    bare pair.

    Raises:
        ValueError: anything else.
    """
    single = as_int(value)
    entries: list[object] = [single] * rank if single is not None else _entries(value)
    if rank == 1 and len(entries) == 2 and None not in map(as_int, entries):
        entries = [tuple(entries)]
    pairs = []
    for entry in entries:
        amount = as_int(entry)
        pair = [amount, amount] if amount is not None else [as_int(side) for side in _entries(entry)]
        if len(pair) == 2 and pair[0] is not None and pair[1] is not None and min(pair[0], pair[1]) >= 0:
            pairs.append((pair[0], pair[1]))
    if len(pairs) != rank or len(entries) != rank:
        wanted = "an integer >= 0 or a pair of them"
        if rank > 1:
            wanted = f"an integer >= 0, {rank} such integers, or {rank} pairs (before, after)"
        raise ValueError(f"`{name}` must be {wanted}. Received: {name}={value!r}")
    return tuple(pairs)


def normalize_padding(padding: object, rank: int, *, causal: bool = True) -> str | Pairs:
    """`padding` as a lower-case name, or as `rank` pairs (before, after).

    Raises:
        ValueError: an unknown name, "causal" at a rank other than 1 (or where `causal` is False), or pairs that do not
        fit.
    """
    allowed = ("valid", "same", "causal") if rank == 1 and causal else ("valid", "same")
    if isinstance(padding, str):
        if padding.lower() in allowed:
            return padding.lower()
    elif isinstance(padding, Sequence):
        return normalize_pairs(padding, rank, "padding")
    names = ", ".join(f'"{name}"' for name in allowed)
    also = ' ("causal" needs one spatial axis)' if isinstance(padding, str) and padding == "causal" and causal else ""
    raise ValueError(
        f"`padding` must be one of {names}, or one (before, after) pair for each of {rank} spatial axes{also}. "
        f"Received: padding={padding!r}"
    )


def normalize_data_format(data_format: object) -> str:
    """`data_format` in lower case; None means "channels_last".

    Raises:
        ValueError: an unknown name.
    """
    if data_format is None:
        return CHANNELS_LAST
    if isinstance(data_format, str) and data_format.lower() in DATA_FORMATS:
        return data_format.lower()
    raise ValueError(
        f'`data_format` must be "channels_last", "channels_first" or None. Received: data_format={data_format!r}'
    )


def _entries(value: object) -> list[object]:
    """The entries of a sequence; of anything else, and of a string, none."""
    if isinstance(value, str) or not hasattr(value, "__len__"):
        return []
    return list(value) if hasattr(value, "__iter__") else []


# --- Layout ------------------------------------------------------------------------------------------------------


def join_shape(batch: Size, sizes: Shape, channels: Size, data_format: str) -> Shape:
    """Batch, spatial sizes and channels in the order of `data_format`."""
    return (batch, *sizes, channels) if data_format == CHANNELS_LAST else (batch, channels, *sizes)


def split_shape(shape: Sequence[Size], data_format: str) -> tuple[Size, Shape, Size]:
    """Batch, spatial sizes and channels of a shape in `data_format`."""
    if data_format == CHANNELS_LAST:
        return shape[0], tuple(shape[1:-1]), shape[-1]
    return shape[0], tuple(shape[2:]), shape[1]


# --- One axis ----------------------------------------------------------------------------------------------------


def conv_axis(n: Size, k: int, s: int, d: int, padding: str | tuple[int, int]) -> tuple[Size, Size]:
    """Output length and zeros in front of one axis of a convolution; an output that does not exist is < 1."""
    k_eff = (k - 1) * d + 1
    if padding == "causal":
        return _ceil_div(n, s), k_eff - 1
    if padding == "same":
        if n is None:
            # With stride 1 the padding does not depend on the length.
            return None, (k_eff - 1) // 2 if s == 1 else None
        m = -(-n // s)
        return m, max(0, (m - 1) * s + k_eff - n) // 2
    before, after = (0, 0) if isinstance(padding, str) else padding
    return None if n is None else (n + before + after - k_eff) // s + 1, before


def transpose_axis(
    n: Size, k: int, s: int, d: int, padding: str | tuple[int, int], output_padding: int | None
) -> tuple[Size, int]:
    """Output length and positions cropped in front of one axis of a transposed convolution.

    The full product has ``(n - 1) * s + k_eff`` positions. It is cropped in front, then cut or extended with zeros to
    the length.
    """
    k_eff = (k - 1) * d + 1
    extra = 0 if output_padding is None else output_padding
    if padding == "same":
        if output_padding is None:
            total = s + k_eff - 2  # what "same" would add to a convolution of the same stride
            length = None if n is None else n * s
        else:
            total = k_eff + k_eff % 2 - 2 + extra
            length = None if n is None else (n - 1) * s + k_eff % 2 + extra
        return length, k_eff - 1 - min(-(-total // 2), k_eff - 1)
    if padding == "valid":
        tail = max(k_eff, s) if output_padding is None else k_eff + extra
        return None if n is None else (n - 1) * s + tail, 0
    before, after = (0, 0) if isinstance(padding, str) else padding
    return None if n is None else (n - 1) * s + k_eff + extra - before - after, before


def _ceil_div(n: Size, s: int) -> Size:
    return None if n is None else -(-n // s)


# --- The families ------------------------------------------------------------------------------------------------


def conv_shape(
    x_shape: Sequence[Size],
    w_shape: Sequence[int],
    *,
    strides: object = 1,
    padding: object = "valid",
    data_format: object = CHANNELS_LAST,
    dilation_rate: object = 1,
    groups: int = 1,
) -> ConvShape:
    """The geometry of a convolution of `x_shape` with a kernel of `w_shape` = taps + (in_channels / groups, filters).

    Raises:
        ValueError: an argument is out of range, the shapes do not fit, or an output size would be zero or negative.
    """
    data_format, rank = normalize_data_format(data_format), _rank(x_shape, w_shape)
    kernel_size, depth, filters = _taps(w_shape, rank), int(w_shape[-2]), int(w_shape[-1])
    batch, in_size, channels = split_shape(x_shape, data_format)
    _check_groups(groups, filters, "filters")
    if channels != depth * groups:
        raise ValueError(
            f"the input must have {depth * groups} channels, which the kernel's input channels ({depth}) times "
            f"`groups` ({groups}) give. Received: input shape={tuple(x_shape)} ({data_format}), "
            f"kernel shape={tuple(w_shape)}"
        )
    return _conv(
        batch, in_size, depth * groups, filters, kernel_size, strides, padding, data_format, dilation_rate, groups
    )


def depthwise_shape(
    x_shape: Sequence[Size],
    w_shape: Sequence[int],
    *,
    strides: object = 1,
    padding: object = "valid",
    data_format: object = CHANNELS_LAST,
    dilation_rate: object = 1,
) -> ConvShape:
    """The geometry of a depthwise convolution with a kernel of `w_shape` = taps + (in_channels, depth_multiplier).

    It is the convolution with one group for each input channel: output channel ``c * depth_multiplier + m`` reads
    channel ``c``.

    Raises:
        ValueError: as :func:`conv_shape`.
    """
    data_format, rank = normalize_data_format(data_format), _rank(x_shape, w_shape)
    kernel_size, depth, multiplier = _taps(w_shape, rank), int(w_shape[-2]), int(w_shape[-1])
    batch, in_size, channels = split_shape(x_shape, data_format)
    if channels != depth or depth < 1:
        raise ValueError(
            f"the input must have as many channels as the depthwise kernel ({depth}), at least 1. "
            f"Received: input shape={tuple(x_shape)} ({data_format}), kernel shape={tuple(w_shape)}"
        )
    filters = depth * multiplier
    return _conv(batch, in_size, depth, filters, kernel_size, strides, padding, data_format, dilation_rate, depth)


def transpose_shape(
    x_shape: Sequence[Size],
    w_shape: Sequence[int],
    *,
    strides: object = 1,
    padding: object = "valid",
    output_padding: object = None,
    data_format: object = CHANNELS_LAST,
    dilation_rate: object = 1,
    groups: int = 1,
) -> ConvShape:
    """The convolution whose input gradient is this transposed convolution.

    `x_shape` is the input of the transposed convolution and becomes ``.y_shape``; its output is ``.x_shape``. `w_shape`
    is taps + (filters / groups, in_channels), which is the kernel of that convolution as it stands.

    Raises:
        ValueError: an argument is out of range, the shapes do not fit, or an output size would be negative.
    """
    data_format, rank = normalize_data_format(data_format), _rank(x_shape, w_shape)
    kernel_size, depth, in_channels = _taps(w_shape, rank), int(w_shape[-2]), int(w_shape[-1])
    batch, in_size, channels = split_shape(x_shape, data_format)
    _check_groups(groups, in_channels, "input channels")
    if channels != in_channels:
        raise ValueError(
            f"the input must have {in_channels} channels, the last axis of a transposed kernel. "
            f"Received: input shape={tuple(x_shape)} ({data_format}), kernel shape={tuple(w_shape)}"
        )
    steps = normalize_tuple(strides, rank, "strides")
    rates = normalize_tuple(dilation_rate, rank, "dilation_rate")
    pads = list(_per_axis(normalize_padding(padding, rank, causal=False), rank))
    extras = normalize_output_padding(output_padding, steps)
    axes = [
        transpose_axis(*axis)
        for axis in zip(in_size, kernel_size, steps, rates, pads, extras or (None,) * rank, strict=True)
    ]
    out_size = tuple(m for m, _ in axes)
    if any(m is not None and m < 0 for m in out_size):
        raise ValueError(
            f"an output size would be negative: {out_size}. Received: input shape={tuple(x_shape)}, "
            f"kernel shape={tuple(w_shape)}, strides={steps}, padding={padding!r}, "
            f"output_padding={output_padding!r}, dilation_rate={rates}"
        )
    return ConvShape(
        batch=batch,
        in_size=out_size,
        out_size=in_size,
        in_channels=depth * groups,
        filters=in_channels,
        kernel_size=kernel_size,
        strides=steps,
        dilation_rate=rates,
        pad_before=tuple(crop for _, crop in axes),
        groups=groups,
        data_format=data_format,
    )


def normalize_output_padding(output_padding: object, strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """`output_padding` as one integer >= 0 an axis, each smaller than its stride; None stays None.

    Raises:
        ValueError: anything else.
    """
    if output_padding is None:
        return None
    extras = normalize_tuple(output_padding, len(strides), "output_padding", allow_zero=True)
    if any(extra >= step for extra, step in zip(extras, strides, strict=True)):
        raise ValueError(
            f"`output_padding` must be smaller than the stride of its axis. "
            f"Received: output_padding={output_padding!r}, strides={strides}"
        )
    return extras


def _conv(
    batch: Size,
    in_size: Shape,
    in_channels: int,
    filters: int,
    kernel_size: tuple[int, ...],
    strides: object,
    padding: object,
    data_format: str,
    dilation_rate: object,
    groups: int,
) -> ConvShape:
    rank = len(kernel_size)
    steps = normalize_tuple(strides, rank, "strides")
    rates = normalize_tuple(dilation_rate, rank, "dilation_rate")
    pads = list(_per_axis(normalize_padding(padding, rank), rank))
    axes = [conv_axis(*axis) for axis in zip(in_size, kernel_size, steps, rates, pads, strict=True)]
    named = isinstance(padding, str) and padding.lower() != "valid"
    if any(m is not None and m < (0 if named else 1) for m, _ in axes):
        raise ValueError(
            f"an output size would be zero or negative: {tuple(m for m, _ in axes)}. "
            'Use a smaller kernel, a longer input or `padding="same"`. '
            f"Received: input size={in_size}, kernel_size={kernel_size}, strides={steps}, padding={padding!r}, "
            f"dilation_rate={rates}"
        )
    return ConvShape(
        batch=batch,
        in_size=in_size,
        out_size=tuple(m for m, _ in axes),
        in_channels=in_channels,
        filters=filters,
        kernel_size=kernel_size,
        strides=steps,
        dilation_rate=rates,
        pad_before=tuple(before for _, before in axes),
        groups=groups,
        data_format=data_format,
    )


def _per_axis(padding: str | Pairs, rank: int) -> Iterator[str | tuple[int, int]]:
    return iter([padding] * rank if isinstance(padding, str) else padding)


def _rank(x_shape: Sequence[Size], w_shape: Sequence[int]) -> int:
    rank = len(w_shape) - 2
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(
            f"a kernel must have 1 to {MAX_RANK} spatial axes and two of channels. "
            f"Received: kernel shape={tuple(w_shape)}"
        )
    if len(x_shape) != rank + 2:
        raise ValueError(
            f"the input must have {rank + 2} axes (batch, {rank} spatial, channels), as many as the kernel. "
            f"Received: input shape={tuple(x_shape)}, kernel shape={tuple(w_shape)}"
        )
    return rank


def _taps(w_shape: Sequence[int], rank: int) -> tuple[int, ...]:
    kernel_size = tuple(int(k) for k in w_shape[:rank])
    if min(kernel_size) < 1 or min(w_shape[rank:]) < 1:
        raise ValueError(f"every axis of a kernel must be at least 1. Received: kernel shape={tuple(w_shape)}")
    return kernel_size


def _check_groups(groups: object, divided: int, what: str) -> None:
    count = as_int(groups)
    if count is None or count < 1:
        raise ValueError(f"`groups` must be an integer >= 1. Received: groups={groups!r}")
    if divided % count:
        raise ValueError(f"`groups` must divide the {what} ({divided}). Received: groups={groups}")


# --- Reshaping families ------------------------------------------------------------------------------------------


def upsample_shape(x_shape: Sequence[Size], size: tuple[int, ...], data_format: str) -> Shape:
    """Output shape of an upsampling by `size` per spatial axis."""
    batch, sizes, channels = split_shape(x_shape, data_format)
    grown = tuple(None if n is None else n * factor for n, factor in zip(sizes, size, strict=True))
    return join_shape(batch, grown, channels, data_format)


def pad_shape(x_shape: Sequence[Size], padding: Pairs, data_format: str) -> Shape:
    """Output shape of a zero padding by (before, after) per spatial axis."""
    batch, sizes, channels = split_shape(x_shape, data_format)
    padded = tuple(None if n is None else n + a + b for n, (a, b) in zip(sizes, padding, strict=True))
    return join_shape(batch, padded, channels, data_format)


def crop_shape(x_shape: Sequence[Size], cropping: Pairs, data_format: str) -> Shape:
    """Output shape of a cropping by (before, after) per spatial axis.

    Raises:
        ValueError: nothing would be left of an axis.
    """
    batch, sizes, channels = split_shape(x_shape, data_format)
    if any(n is not None and n <= a + b for n, (a, b) in zip(sizes, cropping, strict=True)):
        raise ValueError(
            f"`cropping` must leave at least one position of every axis. "
            f"Received: cropping={cropping}, input shape={tuple(x_shape)}"
        )
    cropped = tuple(None if n is None else n - a - b for n, (a, b) in zip(sizes, cropping, strict=True))
    return join_shape(batch, cropped, channels, data_format)


@dataclass(frozen=True)
class Halo:
    """Which inputs one axis of a convolution reads: output p reads ``p * stride - before + [0, extent)``."""

    stride: int
    extent: int
    before: int

    def input_range(self, start: int, stop: int) -> tuple[int, int]:
        """The inputs [first, last) that outputs [start, stop) read; below 0 and beyond the end lies padding."""
        if stop <= start:
            return start * self.stride - self.before, start * self.stride - self.before
        return start * self.stride - self.before, (stop - 1) * self.stride - self.before + self.extent

    def output_range(self, start: int, stop: int) -> tuple[int, int]:
        """The outputs [first, last) that inputs [start, stop) reach; not bounded by the number of outputs."""
        if stop <= start:
            return 0, 0
        first = -(-(start + self.before - self.extent + 1) // self.stride)
        return first, (stop - 1 + self.before) // self.stride + 1

    def piece(self, start: int, stop: int, in_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The inputs [first, last) within [0, in_size) that outputs [start, stop) read, and the zeros (before, after).

        With those zeros for `padding`, the convolution of that piece alone is exactly these outputs.
        """
        begin, end = self.input_range(start, stop)
        first = min(max(begin, 0), in_size)
        last = max(first, min(end, in_size))
        before = min(max(0, -begin), end - begin)
        return (first, last), (before, end - begin - (last - first) - before)

    def out_chunks(self, in_chunks: Sequence[int], out_size: int) -> tuple[int, ...]:
        """Lengths in which `out_size` outputs are split where the inputs are split in `in_chunks`.

        Inputs [a, b) have the outputs p with ``a <= p * stride < b``, the last ones also those beyond, so that with
        stride 1 "same" and "causal" keep the lengths. None is 0, unless there are no outputs: then it is the only one.
        """
        inner = list(itertools.accumulate(length for length in in_chunks if length))[:-1]
        ends = [*(min(-(-end // self.stride), out_size) for end in inner), out_size]
        lengths = (end - start for start, end in zip((0, *ends), ends, strict=False))
        return tuple(length for length in lengths if length) or (0,)


def halo(
    kernel_size: object,
    strides: object = 1,
    dilation_rate: object = 1,
    padding: object = "valid",
    *,
    in_size: object = None,
) -> tuple[Halo, ...]:
    """What an output range of a convolution reads, one :class:`Halo` per spatial axis.

    Args:
        in_size: input lengths; needed only where the padding depends on them ("same" with a stride above 1).

    Raises:
        ValueError: an argument is out of range, or `in_size` is missing where it is needed.
    """
    rank = len(_entries(kernel_size)) or 1
    taps = normalize_tuple(kernel_size, rank, "kernel_size")
    steps = normalize_tuple(strides, rank, "strides")
    rates = normalize_tuple(dilation_rate, rank, "dilation_rate")
    sizes = (None,) * rank if in_size is None else normalize_tuple(in_size, rank, "in_size", allow_zero=True)
    pads = list(_per_axis(normalize_padding(padding, rank), rank))
    halos = []
    for n, k, s, d, pad in zip(sizes, taps, steps, rates, pads, strict=True):
        before = conv_axis(n, k, s, d, pad)[1]
        if before is None:
            raise ValueError(
                f'with `padding="same"` and strides above 1 the padding depends on the input: `in_size` must be given. '
                f"Received: strides={strides}, in_size={in_size}"
            )
        halos.append(Halo(stride=s, extent=(k - 1) * d + 1, before=before))
    return tuple(halos)
