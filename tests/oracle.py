"""Every operation of the family by its definition: plain loops over positions and taps, in float64 or complex128.

Imports numpy only and shares nothing with the package, not even the padding arithmetic, so that a comparison of the two
can fail. Batches and channels go through one `@` per position and tap; what a reader could doubt, which input meets
which tap, is written out. Signatures are those of `cuconv.ops` without `out`, `precision` and `workspace`.

Names in here: p output position, i input position, r kernel tap (tuples of one integer per spatial axis), c channels,
f filters. Arrays are channels last inside; `data_format` only moves an axis at the two ends.
"""

from collections.abc import Callable, Iterator
from math import ceil, prod

import numpy as np

Array = np.ndarray
Position = tuple[int, ...]


# Layout, arguments, positions


def wide(x: Array) -> Array:
    """x in float64 or complex128, the precision in which everything here is computed."""
    return np.asarray(x).astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def channels_last(x: Array, data_format: str | None) -> Array:
    """x [B, spatial..., C] whatever the layout it came in."""
    return np.moveaxis(wide(x), 1, -1) if data_format == "channels_first" else wide(x)


def in_layout(y: Array, data_format: str | None) -> Array:
    """y [B, spatial..., C] moved to the layout asked for."""
    return np.moveaxis(y, -1, 1) if data_format == "channels_first" else y


def spatial(shape: tuple[int, ...], data_format: str | None) -> tuple[int, ...]:
    """The spatial sizes of an array shape."""
    return tuple(shape[2:] if data_format == "channels_first" else shape[1:-1])


def one_per_axis(value, rank: int) -> tuple[int, ...]:
    """strides, dilation_rate or size as one integer per spatial axis."""
    return (value,) * rank if isinstance(value, int) else tuple(value)


def pair_per_axis(value, rank: int) -> tuple[tuple[int, int], ...]:
    """Explicit padding or cropping as a (before, after) pair per spatial axis; rank 1 may give the bare pair."""
    return (tuple(value),) if rank == 1 and isinstance(value[0], int) else tuple(tuple(pair) for pair in value)


def at(position: Position, channels=slice(None)) -> tuple:
    """The index of one position in [B, spatial..., C], for all batches."""
    return (slice(None), *position, channels)


def inside(position: Position, size: tuple[int, ...]) -> bool:
    return all(0 <= i < n for i, n in zip(position, size))


def group_slices(groups: int, channels: int, filters: int) -> Iterator[tuple[slice, slice]]:
    """For each group its input channels and its filters: consecutive blocks of equal width."""
    for g in range(groups):
        yield (
            slice(g * channels // groups, (g + 1) * channels // groups),
            slice(g * filters // groups, (g + 1) * filters // groups),
        )


def window_starts(n: int, k: int, stride: int, dilation: int, padding) -> range:
    """First input index, possibly negative, that each output along one axis reads; its length is the output size."""
    span = (k - 1) * dilation + 1
    if padding == "valid":
        return range(0, n - span + 1, stride)
    if padding == "causal":
        return range(1 - span, n - span + 1, stride)
    if padding == "same":
        missing = max(0, range(0, n, stride)[-1] + span - n) if n else 0
        return range(-(missing // 2), n - missing // 2, stride)
    before, after = padding
    return range(-before, n + after - span + 1, stride)


def reads(in_size, kernel_size, strides, padding, dilation_rate) -> tuple[tuple[int, ...], list]:
    """The output size and every (p, r, i): output p reads input i through tap r. A tap outside the input reads zero
    and is not listed."""
    rank = len(in_size)
    strides, dilation = one_per_axis(strides, rank), one_per_axis(dilation_rate, rank)
    rules = (padding,) * rank if isinstance(padding, str) else pair_per_axis(padding, rank)
    starts = [window_starts(*axis) for axis in zip(in_size, kernel_size, strides, dilation, rules)]
    out_size = tuple(len(s) for s in starts)
    found = []
    for p in np.ndindex(*out_size):
        for r in np.ndindex(*kernel_size):
            i = tuple(starts[a][p[a]] + r[a] * dilation[a] for a in range(rank))
            if inside(i, in_size):
                found.append((p, r, i))
    return out_size, found


def finish(y: Array, bias, activation, data_format: str | None) -> Array:
    """y + bias along the channels, in the layout asked for, then the activation (which sees that layout)."""
    if bias is not None:
        y = y + wide(bias)
    return activate(activation, in_layout(y, data_format))


# Activations, the few that the tests of the operations fuse. Branches look at the real part, so that a complex step
# passes through them.

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda z: z,
    "relu": lambda z: np.where(z.real > 0, z, 0),
    "elu": lambda z: np.where(z.real > 0, z, np.exp(np.where(z.real > 0, 0, z)) - 1),
    "tanh": np.tanh,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "hard_sigmoid": lambda z: np.where(z.real <= -3, 0, np.where(z.real >= 3, 1, (z + 3) / 6)),
    "softplus": lambda z: np.log(1 + np.exp(z)),
    "softmax": lambda z: np.exp(z) / np.sum(np.exp(z), axis=-1, keepdims=True),
}


def activate(activation, z: Array) -> Array:
    """The activation of z, given by name, as a callable, or None."""
    return ACTIVATIONS[activation or "linear"](z) if not callable(activation) else activation(z)


# Convolution (cross-correlation: the kernel is not flipped)


def conv(x, w, bias=None, *, strides=1, padding="valid", data_format=None, dilation_rate=1, groups=1, activation=None):
    """y[p, f] = activation(bias[f] + sum over r, c of x[p*stride + r*dilation - left, c] * w[r, c, f])."""
    x, w = channels_last(x, data_format), wide(w)
    filters = w.shape[-1]
    out_size, found = reads(x.shape[1:-1], w.shape[:-2], strides, padding, dilation_rate)
    y = np.zeros((x.shape[0], *out_size, filters), np.result_type(x, w))
    for p, r, i in found:
        for c, f in group_slices(groups, x.shape[-1], filters):
            y[at(p, f)] += x[at(i, c)] @ w[r][:, f]
    return finish(y, bias, activation, data_format)


def conv_input_grad(dy, w, input_shape, *, strides=1, padding="valid", data_format=None, dilation_rate=1, groups=1):
    """What each input is worth: dy of every output that read it, times the conjugated tap it was read through."""
    dy, w = channels_last(dy, data_format), wide(w)
    in_size, channels = spatial(input_shape, data_format), w.shape[-2] * groups
    dx = np.zeros((dy.shape[0], *in_size, channels), np.result_type(dy, w))
    for p, r, i in reads(in_size, w.shape[:-2], strides, padding, dilation_rate)[1]:
        for c, f in group_slices(groups, channels, w.shape[-1]):
            dx[at(i, c)] += dy[at(p, f)] @ w[r][:, f].conj().T
    return in_layout(dx, data_format)


def conv_kernel_grad(x, dy, kernel_shape, *, strides=1, padding="valid", data_format=None, dilation_rate=1, groups=1):
    """What each tap is worth: the conjugated inputs it was applied to, times dy of the outputs it went to."""
    x, dy = channels_last(x, data_format), channels_last(dy, data_format)
    dw = np.zeros(kernel_shape, np.result_type(x, dy))
    for p, r, i in reads(x.shape[1:-1], kernel_shape[:-2], strides, padding, dilation_rate)[1]:
        for c, f in group_slices(groups, x.shape[-1], dy.shape[-1]):
            dw[r][:, f] += x[at(i, c)].conj().T @ dy[at(p, f)]
    return dw


def bias_grad(dy, *, data_format=None):
    """The sum of dy over everything but the channels."""
    return channels_last(dy, data_format).reshape(-1, channels_last(dy, data_format).shape[-1]).sum(axis=0)


# Transposed convolution


def transpose_axis(n: int, k: int, stride: int, dilation: int, padding, output_padding) -> tuple[int, int]:
    """Output length along one axis, and how much of the full product is cut off on its left."""
    span, extra = (k - 1) * dilation + 1, output_padding or 0
    if padding == "valid":
        return (n - 1) * stride + (max(span, stride) if output_padding is None else span + extra), 0
    if padding == "same":
        if output_padding is None:
            length, kept = n * stride, ceil((stride + span - 2) / 2)
        else:
            length, kept = (n - 1) * stride + span % 2 + extra, ceil((span + span % 2 - 2 + extra) / 2)
        return length, span - 1 - min(kept, span - 1)
    before, after = padding
    return (n - 1) * stride + span + extra - before - after, before


def transpose_axes(in_size, kernel_size, strides, padding, output_padding, dilation_rate):
    """Output size, left crop, strides and dilation, each one integer per spatial axis."""
    rank = len(in_size)
    strides, dilation = one_per_axis(strides, rank), one_per_axis(dilation_rate, rank)
    rules = (padding,) * rank if isinstance(padding, str) else pair_per_axis(padding, rank)
    extra = (None,) * rank if output_padding is None else one_per_axis(output_padding, rank)
    axes = [transpose_axis(*axis) for axis in zip(in_size, kernel_size, strides, dilation, rules, extra)]
    return tuple(length for length, _ in axes), tuple(crop for _, crop in axes), strides, dilation


def conv_transpose(
    x,
    w,
    bias=None,
    *,
    strides=1,
    padding="valid",
    output_padding=None,
    data_format=None,
    dilation_rate=1,
    groups=1,
    activation=None,
):
    """The full product z[i*stride + r*dilation, f] += x[i, c] * w[r, f, c], then out_size of it from the left crop on,
    zeros where it has ended; bias and activation last, so they fill the gaps too."""
    x, w = channels_last(x, data_format), wide(w)
    in_size, kernel_size, filters = x.shape[1:-1], w.shape[:-2], w.shape[-2] * groups
    out_size, crop, strides, dilation = transpose_axes(
        in_size, kernel_size, strides, padding, output_padding, dilation_rate
    )
    full_size = tuple((n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(in_size, kernel_size, strides, dilation))
    z = np.zeros((x.shape[0], *full_size, filters), np.result_type(x, w))
    for i in np.ndindex(*in_size):
        for r in np.ndindex(*kernel_size):
            q = tuple(i[a] * strides[a] + r[a] * dilation[a] for a in range(len(i)))
            for c, f in group_slices(groups, x.shape[-1], filters):
                z[at(q, f)] += x[at(i, c)] @ w[r][:, c].T
    y = np.zeros((x.shape[0], *out_size, filters), z.dtype)
    for p in np.ndindex(*out_size):
        q = tuple(p[a] + crop[a] for a in range(len(p)))
        if inside(q, full_size):
            y[at(p)] = z[at(q)]
    return finish(y, bias, activation, data_format)


def transpose_writes(in_size, kernel_size, strides, padding, output_padding, dilation_rate) -> Iterator[tuple]:
    """Every (i, r, p): input i reaches output p through tap r; what the crop cut off is not listed."""
    out_size, crop, strides, dilation = transpose_axes(
        in_size, kernel_size, strides, padding, output_padding, dilation_rate
    )
    for i in np.ndindex(*in_size):
        for r in np.ndindex(*kernel_size):
            p = tuple(i[a] * strides[a] + r[a] * dilation[a] - crop[a] for a in range(len(i)))
            if inside(p, out_size):
                yield i, r, p


def conv_transpose_input_grad(
    dy, w, input_shape, *, strides=1, padding="valid", output_padding=None, data_format=None, dilation_rate=1, groups=1
):
    """What each input is worth: dy of every output it reached, times the conjugated tap."""
    dy, w = channels_last(dy, data_format), wide(w)
    in_size, channels = spatial(input_shape, data_format), w.shape[-1]
    dx = np.zeros((dy.shape[0], *in_size, channels), np.result_type(dy, w))
    for i, r, p in transpose_writes(in_size, w.shape[:-2], strides, padding, output_padding, dilation_rate):
        for c, f in group_slices(groups, channels, dy.shape[-1]):
            dx[at(i, c)] += dy[at(p, f)] @ w[r][:, c].conj()
    return in_layout(dx, data_format)


def conv_transpose_kernel_grad(
    x, dy, kernel_shape, *, strides=1, padding="valid", output_padding=None, data_format=None, dilation_rate=1, groups=1
):
    """What each tap is worth: dy of the outputs it went to, times the conjugated inputs it was applied to."""
    x, dy = channels_last(x, data_format), channels_last(dy, data_format)
    dw = np.zeros(kernel_shape, np.result_type(x, dy))
    for i, r, p in transpose_writes(x.shape[1:-1], kernel_shape[:-2], strides, padding, output_padding, dilation_rate):
        for c, f in group_slices(groups, x.shape[-1], dy.shape[-1]):
            dw[r][:, c] += dy[at(p, f)].T @ x[at(i, c)].conj()
    return dw


# Depthwise and separable convolution


def depthwise_conv(x, w, bias=None, *, strides=1, padding="valid", data_format=None, dilation_rate=1, activation=None):
    """y[p, c*M + m] = activation(bias + sum over r of x[p*stride + r*dilation - left, c] * w[r, c, m])."""
    x, w = channels_last(x, data_format), wide(w)
    channels, multiplier = w.shape[-2:]
    out_size, found = reads(x.shape[1:-1], w.shape[:-2], strides, padding, dilation_rate)
    y = np.zeros((x.shape[0], *out_size, channels * multiplier), np.result_type(x, w))
    for p, r, i in found:
        for m in range(multiplier):
            y[at(p, slice(m, None, multiplier))] += x[at(i)] * w[r][:, m]
    return finish(y, bias, activation, data_format)


def depthwise_conv_input_grad(dy, w, input_shape, *, strides=1, padding="valid", data_format=None, dilation_rate=1):
    """As conv_input_grad, each channel from its own M filters."""
    dy, w = channels_last(dy, data_format), wide(w)
    in_size, (channels, multiplier) = spatial(input_shape, data_format), w.shape[-2:]
    dx = np.zeros((dy.shape[0], *in_size, channels), np.result_type(dy, w))
    for p, r, i in reads(in_size, w.shape[:-2], strides, padding, dilation_rate)[1]:
        for m in range(multiplier):
            dx[at(i)] += dy[at(p, slice(m, None, multiplier))] * w[r][:, m].conj()
    return in_layout(dx, data_format)


def depthwise_conv_kernel_grad(x, dy, kernel_shape, *, strides=1, padding="valid", data_format=None, dilation_rate=1):
    """As conv_kernel_grad, each filter from its own channel."""
    x, dy = channels_last(x, data_format), channels_last(dy, data_format)
    dw, multiplier = np.zeros(kernel_shape, np.result_type(x, dy)), kernel_shape[-1]
    for p, r, i in reads(x.shape[1:-1], kernel_shape[:-2], strides, padding, dilation_rate)[1]:
        for m in range(multiplier):
            dw[r][:, m] += np.sum(x[at(i)].conj() * dy[at(p, slice(m, None, multiplier))], axis=0)
    return dw


def mixing_matrix(pointwise_w: Array) -> Array:
    """The 1x1 kernel [1..., C*M, F] as a matrix [C*M, F]."""
    return wide(pointwise_w).reshape(pointwise_w.shape[-2:])


def separable_conv(
    x,
    depthwise_w,
    pointwise_w,
    bias=None,
    *,
    strides=1,
    padding="valid",
    data_format=None,
    dilation_rate=1,
    activation=None,
):
    """The depthwise convolution, then the same matrix at every position, then bias and activation, once."""
    middle = depthwise_conv(
        channels_last(x, data_format), depthwise_w, strides=strides, padding=padding, dilation_rate=dilation_rate
    )
    return finish(middle @ mixing_matrix(pointwise_w), bias, activation, data_format)


def separable_conv_input_grad(
    dy, depthwise_w, pointwise_w, input_shape, *, strides=1, padding="valid", data_format=None, dilation_rate=1
):
    """dy through the conjugated matrix, then through the depthwise convolution's adjoint."""
    middle_grad = channels_last(dy, data_format) @ mixing_matrix(pointwise_w).conj().T
    return depthwise_conv_input_grad(
        in_layout(middle_grad, data_format),
        depthwise_w,
        input_shape,
        strides=strides,
        padding=padding,
        data_format=data_format,
        dilation_rate=dilation_rate,
    )


def separable_conv_kernel_grad(
    x, dy, depthwise_w, pointwise_w, *, strides=1, padding="valid", data_format=None, dilation_rate=1
):
    """(d depthwise_w, d pointwise_w)."""
    options = {"strides": strides, "padding": padding, "dilation_rate": dilation_rate}
    x, dy = channels_last(x, data_format), channels_last(dy, data_format)
    middle = depthwise_conv(x, depthwise_w, **options)
    pointwise_grad = np.zeros(pointwise_w.shape[-2:], np.result_type(middle, dy))
    for p in np.ndindex(*middle.shape[1:-1]):
        pointwise_grad += middle[at(p)].conj().T @ dy[at(p)]
    middle_grad = dy @ mixing_matrix(pointwise_w).conj().T
    depthwise_grad = depthwise_conv_kernel_grad(x, middle_grad, depthwise_w.shape, **options)
    return depthwise_grad, pointwise_grad.reshape(pointwise_w.shape)


# Upsampling, padding, cropping


def cubic(t: float) -> float:
    """Keys' cubic convolution kernel with a = -0.75, torch's choice."""
    a, t = -0.75, abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def lanczos(t: float, lobes: int) -> float:
    """sinc windowed by the main lobe of a wider sinc."""
    return float(np.sinc(t) * np.sinc(t / lobes)) if abs(t) < lobes else 0.0


def interpolation_row(p: int, n: int, size: int, interpolation: str) -> dict[int, float]:
    """The inputs, and their weights, that make up output p of one axis of n inputs enlarged `size` times."""
    if interpolation == "nearest":
        return {p // size: 1.0}
    centre = (p + 0.5) / size - 0.5  # of output p, in units of input pixels
    first = int(np.floor(centre))
    row: dict[int, float] = {}
    if interpolation in ("lanczos3", "lanczos5"):
        lobes = int(interpolation[-1])
        for i in range(max(0, first - lobes), min(n, first + lobes + 2)):
            row[i] = lanczos(centre - i, lobes)
        return {i: weight / sum(row.values()) for i, weight in row.items()}
    reach, kernel = {"bilinear": (0, lambda t: max(0.0, 1 - abs(t))), "bicubic": (1, cubic)}[interpolation]
    for i in range(first - reach, first + reach + 2):
        inner = min(max(i, 0), n - 1)  # beyond the edge stands the edge
        row[inner] = row.get(inner, 0.0) + kernel(centre - i)
    return row


def interpolation_terms(in_size, size, interpolation) -> Iterator[tuple[Position, Position, float]]:
    """Every (p, i, weight): output p holds that share of input i. The weight is the product over the axes."""
    for p in np.ndindex(*(n * s for n, s in zip(in_size, size))):
        rows = [interpolation_row(p[a], in_size[a], size[a], interpolation) for a in range(len(p))]
        for i in np.ndindex(*in_size):
            if all(i[a] in rows[a] for a in range(len(p))):
                yield p, i, prod(rows[a][i[a]] for a in range(len(p)))


def upsample(x, size, *, interpolation="nearest", data_format=None):
    """x enlarged `size` times, half-pixel centres."""
    x = channels_last(x, data_format)
    in_size = x.shape[1:-1]
    size = one_per_axis(size, len(in_size))
    y = np.zeros((x.shape[0], *(n * s for n, s in zip(in_size, size)), x.shape[-1]), x.dtype)
    for p, i, weight in interpolation_terms(in_size, size, interpolation):
        y[at(p)] += weight * x[at(i)]
    return in_layout(y, data_format)


def upsample_input_grad(dy, size, *, interpolation="nearest", data_format=None):
    """Each input collects dy of the outputs that hold a share of it, times that share."""
    dy = channels_last(dy, data_format)
    size = one_per_axis(size, dy.ndim - 2)
    in_size = tuple(m // s for m, s in zip(dy.shape[1:-1], size))
    dx = np.zeros((dy.shape[0], *in_size, dy.shape[-1]), dy.dtype)
    for p, i, weight in interpolation_terms(in_size, size, interpolation):
        dx[at(i)] += weight * dy[at(p)]
    return in_layout(dx, data_format)


def pad(x, padding, data_format=None):
    """x with zeros around it: a (before, after) pair per spatial axis."""
    x = channels_last(x, data_format)
    pairs = pair_per_axis(padding, x.ndim - 2)
    y = np.zeros((x.shape[0], *(n + sum(pair) for n, pair in zip(x.shape[1:-1], pairs)), x.shape[-1]), x.dtype)
    for i in np.ndindex(*x.shape[1:-1]):
        y[at(tuple(i[a] + pairs[a][0] for a in range(len(i))))] = x[at(i)]
    return in_layout(y, data_format)


def crop(x, cropping, data_format=None):
    """x without its first and last positions: a (before, after) pair per spatial axis."""
    x = channels_last(x, data_format)
    pairs = pair_per_axis(cropping, x.ndim - 2)
    y = np.zeros((x.shape[0], *(n - sum(pair) for n, pair in zip(x.shape[1:-1], pairs)), x.shape[-1]), x.dtype)
    for p in np.ndindex(*y.shape[1:-1]):
        y[at(p)] = x[at(tuple(p[a] + pairs[a][0] for a in range(len(p))))]
    return in_layout(y, data_format)


# Convolutional LSTM


def conv_lstm_step(
    x,
    h,
    c,
    w,
    recurrent_w,
    bias=None,
    *,
    strides=1,
    padding="valid",
    data_format=None,
    dilation_rate=1,
    activation="tanh",
    recurrent_activation="sigmoid",
):
    """(h, c) after one step; gates i, f, c, o side by side in the last axis of every weight. With w=None, x already is
    the input convolution [B, P..., 4F], bias included; with recurrent_w=None, the recurrent one is in it too."""
    if w is not None:
        x = conv(x, w, bias, strides=strides, padding=padding, data_format=data_format, dilation_rate=dilation_rate)
    h_gates = 0.0
    if recurrent_w is not None:
        h_gates = conv(h, recurrent_w, padding="same", data_format=data_format)
    i, f, candidate, o = np.split(wide(x) + h_gates, 4, axis=1 if data_format == "channels_first" else -1)
    c = activate(recurrent_activation, f) * wide(c) + activate(recurrent_activation, i) * activate(
        activation, candidate
    )
    return activate(recurrent_activation, o) * activate(activation, c), c


# Derivatives without a formula


def complex_step(function: Callable[..., Array], *arrays: Array, step: float = 1e-30) -> list[Array]:
    """Gradients of a real scalar function by every element of every array: the imaginary part of
    function(a + i*step) / step. Nothing is subtracted, so they are exact to the last digit."""
    gradients = []
    for position, array in enumerate(arrays):
        gradient = np.zeros(array.shape)
        for index in np.ndindex(*array.shape):
            moved = [wide(a).astype(np.complex128) for a in arrays]
            moved[position][index] += 1j * step
            gradient[index] = function(*moved).imag / step
        gradients.append(gradient)
    return gradients
