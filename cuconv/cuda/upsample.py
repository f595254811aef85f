"""Upsampling by whole factors on the GPU: kernels/upsample.cu and kernels/upsample_grad.cu."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cuconv import interpolation as tables
from cuconv.cuda.arrays import Array, Runtime, compact, dtype_name, writing
from cuconv.geometry import split_shape
from cuconv.plan.types import ELEMENTS, VECTOR_BYTES, Element
from cuconv.plan.upsample import COPIED, Stage, plan_upsample, plan_upsample_grad


def upsample(
    runtime: Runtime, x: Array, size: tuple[int, ...], interpolation: str, data_format: str, out: Array
) -> None:
    """Write x, enlarged `size` times, to `out`; nearest takes any dtype."""
    if not out.size:
        return
    if max(size) == 1:
        out[...] = x
        return
    x = compact(runtime, x)
    with writing(runtime, out) as y:
        if interpolation != "nearest":
            element, per_item = _real(x.dtype)
            reach = tables.KERNELS[interpolation][1]
        elif x.dtype.itemsize > 1:
            (element, per_item), reach = _bits(x.dtype.itemsize), 0
        else:
            _upsample_bytes(runtime, x, size, data_format, y)
            return
        batch, sizes, channels = _axes(x.shape, data_format, per_item)
        aligned = _alignment(runtime, x, element), _alignment(runtime, y, element)
        stages = plan_upsample(batch, sizes, channels, size, reach, element, aligned, runtime.limits)
        _run(runtime, stages, interpolation, (tables.window_weights,) * 3, x, y, element)


def upsample_input_grad(
    runtime: Runtime, dy: Array, size: tuple[int, ...], interpolation: str, data_format: str, out: Array
) -> None:
    """Write the gradient of the input to `out`: each input collects its share of every output, in a fixed order."""
    if not out.size:
        return
    if max(size) == 1:
        out[...] = dy
        return
    dy = compact(runtime, dy)
    with writing(runtime, out) as dx:
        element, per_item = _real(dy.dtype)
        reach = 0 if interpolation == "nearest" else tables.KERNELS[interpolation][1]
        batch, sizes, channels = _axes(dx.shape, data_format, per_item)
        aligned = _alignment(runtime, dy, element), _alignment(runtime, dx, element)
        stages = plan_upsample_grad(batch, sizes, channels, size, reach, element, aligned, runtime.limits)
        makers = (tables.window_weights, tables.share_weights, tables.share_weights)
        _run(runtime, stages, interpolation, makers, dy, dx, element)


def _upsample_bytes(runtime: Runtime, x: Array, size: tuple[int, ...], data_format: str, y: Array) -> None:
    """Elements of one byte: pairs of channels where there are pairs, otherwise through 16 bits and back."""
    channels = x.shape[-1]
    if data_format == "channels_last" and channels % 2 == 0 and not _odd(runtime, x, y):
        upsample(runtime, x.view(np.uint16), size, "nearest", data_format, y.view(np.uint16))
        return
    wide = runtime.empty(y.shape, np.uint16)
    upsample(runtime, x.view(np.uint8).astype(np.uint16), size, "nearest", data_format, wide)
    y.view(np.uint8)[...] = wide


def _odd(runtime: Runtime, *arrays: Array) -> bool:
    return any(runtime.address(array) % 2 for array in arrays)


def _real(dtype: np.dtype) -> tuple[Element, int]:
    """The element of the real numbers in `dtype`, and how many an item has: the weights are real."""
    element = ELEMENTS[dtype_name(dtype)]
    if element.is_complex:
        return ELEMENTS[np.empty(0, dtype).real.dtype.name], 2
    return element, 1


def _bits(itemsize: int) -> tuple[Element, int]:
    """An element of which only the size matters, and how many an item has."""
    size = min(itemsize, max(COPIED))
    name = f"{8 * size} bits"
    return Element(name, COPIED[size], size, name, size), itemsize // size


def _axes(shape: Sequence[int], data_format: str, per_item: int) -> tuple[int, tuple[int, ...], int]:
    """Batch, sizes and channels; the channels of channels_first are a batch, since all are treated alike."""
    batch, sizes, channels = split_shape(shape, data_format)
    if data_format == "channels_first":
        return batch * channels, sizes, per_item
    return batch, sizes, channels * per_item


def _alignment(runtime: Runtime, array: Array, element: Element) -> int:
    """Of an array, in elements of another size than its own."""
    return runtime.address(array) % VECTOR_BYTES // element.bytes


def _run(
    runtime: Runtime,
    stages: Sequence[Stage],
    interpolation: str,
    makers: Sequence[Callable[[int, int, str], np.ndarray]],
    source: Array,
    target: Array,
    element: Element,
) -> None:
    for stage in stages:
        to = target if stage is stages[-1] else runtime.empty((stage.elements,), element.sum_dtype)
        weights = [
            None if table is None else _table(runtime, maker, *table, interpolation, element.sum_dtype)
            for maker, table in zip(makers, stage.tables, strict=True)
        ]
        runtime.launch(stage.plan, (source, *weights, to))
        source = to


def _table(
    runtime: Runtime, make: Callable[[int, int, str], np.ndarray], n: int, size: int, interpolation: str, dtype: str
) -> Array:
    """The weights of an axis on the device: those of a short one, where all that differ occur once."""
    reach = tables.KERNELS[interpolation][1]
    margin = reach if make is tables.window_weights else 2 * reach
    short = min(n, 2 * margin + 1)
    key = (make.__name__, short, size, interpolation, dtype)
    return runtime.constant(key, lambda: np.ascontiguousarray(make(short, size, interpolation), dtype))
