"""Convolutions of Dask arrays, chunked along batch and space, and models over them: ``pip install "cuconv[dask]"``.

>>> x = dask.array.random.default_rng(0).random((8, 100_000, 4), chunks=(1, 10_000, 4))
>>> conv(x, np.ones((9, 4, 16)), strides=2, padding="same")
dask.array<conv, shape=(8, 50000, 16), dtype=float64, chunksize=(1, 5000, 16), chunktype=numpy.ndarray>

Nothing is computed before `compute`, `persist` or a store. Then each output chunk is one call of :mod:`cuconv.ops` on
the inputs that it reads: its own chunk, and of the others only the halo, cut out where they lie so that no more than
that travels. :func:`cuconv.halo` says in integers which that is, for any stride, dilation and padding, and chunks of
any length, shorter than the kernel too.

* **Chunks.** An input chunk [a, b) yields the outputs p with ``a <= p * stride < b``; with stride 1, "same" and
  "causal" keep the chunks. Batch chunks stay as they are, of unknown length too, and so do those of `depthwise_conv`
  along the channels. `conv` sums over the channels, so each call takes them all together.
* **Kernel and bias** are NumPy, CuPy or Dask arrays. They are one entry of the graph, not a part of each call.
* **The result** is the whole array's: up to the order in which BLAS, or a GPU's plan, adds for chunks of another size;
  to the last bit where sums are exact. On NumPy it nearly always is where only the batch or, of `conv`, the channels
  are chunked. Every scheduler gives the same bits.

Several GPUs: dask-cuda starts a worker for each, and chunks are CuPy arrays::

    from dask_cuda import LocalCUDACluster
    from distributed import Client

    client = Client(LocalCUDACluster())
    y = conv(x.map_blocks(cupy.asarray), cupy.asarray(w), padding="same")
    y.map_blocks(cupy.asnumpy).to_zarr("y.zarr")

More data than memory: ``python -m cuconv.demo.larger_than_memory``.

Weak points:

* No gradients, and of the operations these two alone. `conv_transpose` and the others can be mapped over chunks of the
  batch, ``x.map_blocks(cuconv.ops.conv_transpose, w, chunks=...)``.
* A halo as long as the chunk doubles the reads. Chunks should be a good deal longer than ``(k - 1) * dilation + 1``.
* Kernels and models in memory are sent along with the graph, of which Dask warns from 10 MB on. A kernel that is a Dask
  array in one chunk, persisted, avoids it.
* An activation that is not element by element sees whole rows of the last axis, which then is one chunk; a function of
  one's own has to be content with that.
* The threads of Dask and those of BLAS multiply on a CPU: ``OPENBLAS_NUM_THREADS=1`` (or MKL's) for as many threads as
  cores. On a GPU, one thread a worker, as dask-cuda has it.
* Dask's own rules: `dask.annotate` holds for the tasks here where ``optimization.fuse.active`` is False. Its array
  expressions (``array.query-planning``, experimental) are not supported.
"""

from __future__ import annotations

import bisect
import copy
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cuconv import activations, geometry, models, ops
from cuconv.geometry import ConvShape, Halo, halo

try:
    import dask.array as da
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph
except ImportError as error:
    raise ImportError('cuconv.interop.dask needs Dask: pip install "cuconv[dask]"') from error
if da.Array.__module__ != "dask.array.core":
    raise ImportError(
        "cuconv.interop.dask builds graphs, and no array expressions: set DASK_ARRAY__QUERY_PLANNING=False. "
        f"Received: arrays of {da.Array.__module__}"
    )

__all__ = ["conv", "depthwise_conv", "halo", "predict"]

Array = Any  # a NumPy or a CuPy array


def conv(
    x: da.Array,
    w: Any,
    bias: Any = None,
    *,
    strides: ops.Sizes = 1,
    padding: ops.Padding = "valid",
    data_format: str | None = None,
    dilation_rate: ops.Sizes = 1,
    groups: int = 1,
    activation: Any = None,
    precision: str = "highest",
) -> da.Array:
    """:func:`cuconv.ops.conv` of a Dask array x [B, L.., C] with w [taps.., C / groups, F], lazily, [B, P.., F].

    Args:
        x: in any chunks; their lengths along space and channels must be known.
        w: a NumPy, CuPy or Dask array, as `bias`; where the chunks of x are, and of their dtype.

    Raises:
        TypeError: `x` is no Dask array, or what :func:`cuconv.ops.conv` raises for such arrays.
        ValueError: what it raises for such shapes and options, or unknown lengths; now, not when chunks are computed.
    """
    options = {"strides": strides, "data_format": data_format, "dilation_rate": dilation_rate, "groups": groups}
    return _convolved(ops.conv, geometry.conv_shape, x, w, bias, padding, options, activation, precision)


def depthwise_conv(
    x: da.Array,
    w: Any,
    bias: Any = None,
    *,
    strides: ops.Sizes = 1,
    padding: ops.Padding = "valid",
    data_format: str | None = None,
    dilation_rate: ops.Sizes = 1,
    activation: Any = None,
    precision: str = "highest",
) -> da.Array:
    """:func:`cuconv.ops.depthwise_conv` of a Dask array x [B, L.., C] with w [taps.., C, M], lazily, [B, P.., C * M].

    Chunks along the channels stay chunks, M times as long. Arguments and errors as :func:`conv`.
    """
    options = {"strides": strides, "data_format": data_format, "dilation_rate": dilation_rate}
    return _convolved(ops.depthwise_conv, geometry.depthwise_shape, x, w, bias, padding, options, activation, precision)


def predict(model: models.Model, inputs: Any, batch_size: int = 32, device: str | None = None) -> Any:
    """What ``model.predict`` gives for Dask arrays: its output, or a list of them, in chunks along the batch.

    Each chunk is one `predict` of a copy of the model as it is now, which goes to each worker once. It computes where
    `device` says, and its outputs are NumPy arrays.

    Args:
        inputs: an array, a list of them or a dict by input name; the batch chunks of the first Dask array hold for all.

    Raises:
        TypeError, ValueError: the inputs do not fit the model or each other, or a layer keeps a state between batches.
    """
    inputs = model._arranged(inputs)
    stateful = [leaf.name for leaf in model._leaves() if getattr(leaf, "stateful", False)]
    if stateful:
        raise ValueError(f"chunks have no order, so no layer may be stateful. Received: stateful layers {stateful}")
    samples = next((each.chunks[0] for each in inputs if isinstance(each, da.Array) and each.ndim), ())
    arrays = [_batched(each, samples) for each in inputs]
    model = copy.deepcopy(model)
    model._accept(tuple(np.empty((0, *each.shape[1:]), each.dtype) for each in arrays))
    fresh = [models.Input(each.shape[1:], dtype=own.dtype) for each, own in zip(arrays, model.inputs, strict=True)]
    outputs = model(fresh)
    token = tokenize(model, arrays, batch_size, device)
    name, held = f"predict-{token}", f"model-{token}"
    run = functools.partial(_predicted, batch_size=batch_size, device=device)
    tasks: dict[Any, Any] = {held: model}
    for i in range(len(samples)):
        tasks[name, i] = (run, held, [(each.name, i, *(0,) * (each.ndim - 1)) for each in arrays])
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=arrays)
    results = []
    for number, end in enumerate(outputs if isinstance(outputs, list) else [outputs]):
        zeros, own = (0,) * (len(end.shape) - 1), f"{name}-{number}"
        layer = {(own, i, *zeros): (operator.getitem, (name, i), number) for i in range(len(samples))}
        joined = HighLevelGraph({**graph.layers, own: layer}, {**graph.dependencies, own: {name}})
        chunks = (samples, *((size,) for size in end.shape[1:]))
        results.append(da.Array(joined, own, chunks=chunks, meta=np.empty((0, *zeros), np.dtype(end.dtype))))
    return results if isinstance(outputs, list) else results[0]


# --- The graph ---------------------------------------------------------------------------------------------------

Part = tuple[int, slice]  # the number of a block of one axis, and what is taken of it
WHOLE = slice(None)


class Axis(NamedTuple):
    """How the chunks of one axis of the result come from the blocks of x; one entry each."""

    lengths: tuple[Any, ...]
    parts: list[list[Part]]
    zeros: list[tuple[int, int]]  # before and after the parts


def _convolved(
    function: Callable[..., Array],
    rule: Callable[..., ConvShape],
    x: Any,
    w: Any,
    bias: Any,
    padding: Any,
    options: dict[str, Any],
    activation: Any,
    precision: str,
) -> da.Array:
    if not isinstance(x, da.Array):
        raise TypeError(f"`x` must be a Dask array. Received: x of type {_kind(x)}")
    _check_known(x, "x", 1)
    x_shape = tuple(None if math.isnan(n) else n for n in x.shape)
    w, bias = _kernel(w, "w"), None if bias is None else _kernel(bias, "bias")
    shape = rule(x_shape, w.shape, padding=padding, **options)
    options = {**options, "activation": activation, "precision": precision}
    # The answer for no samples costs nothing, has the dtype and the kind of the result, and tells every error.
    few = [None if each is None else np.empty_like(each._meta, shape=each.shape) for each in (w, bias)]
    meta = function(np.empty_like(x._meta, shape=(0, *x.shape[1:])), *few, padding=padding, **options)

    rowwise = activation is not None and not activations.get(activation).pointwise
    axes = _axes(shape, x.chunks, function is ops.depthwise_conv, rowwise)
    _, space, channels = geometry.split_shape(range(x.ndim), shape.data_format)
    if function is ops.depthwise_conv:
        w = w.rechunk((*w.shape[:-2], tuple(n // shape.depth_multiplier for n in axes[channels].lengths), -1))
    else:
        w = w.rechunk(-1)
    bias = None if bias is None else bias.rechunk((axes[channels].lengths,))
    token = tokenize(function.__name__, x, w, bias, padding, options)
    name, cut = f"{function.__name__.replace('_', '-')}-{token}", f"halo-{token}"
    run = functools.partial(_call, function, options)
    tasks: dict[Any, Any] = {}
    for at in itertools.product(*(range(len(axis.lengths)) for axis in axes)):
        corners = [axis.parts[i] for axis, i in zip(axes, at, strict=True)]
        blocks = []
        for number, corner in enumerate(itertools.product(*corners)):
            key: tuple[Any, ...] = (x.name, *(block for block, _ in corner))
            if any(part != WHOLE for _, part in corner):
                key, whole = (cut, *at, number), key
                tasks[key] = (_cut, whole, tuple(part for _, part in corner))
            blocks.append(key)
        sizes = tuple(axis.lengths[i] for axis, i in zip(axes[1:], at[1:], strict=True))
        zeros = tuple(axes[axis].zeros[at[axis]] for axis in space)
        kernel = (w.name, *(0,) * shape.rank, at[channels], 0)
        shift = None if bias is None else (bias.name, at[channels])
        counts = tuple(map(len, corners))
        tasks[(name, *at)] = (_nothing, blocks[0], sizes) if 0 in sizes else (run, blocks, counts, zeros, kernel, shift)
    arrays = [x, w] if bias is None else [x, w, bias]
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=arrays)
    return da.Array(graph, name, chunks=tuple(axis.lengths for axis in axes), meta=meta)


def _axes(shape: ConvShape, chunks: Sequence[tuple[int, ...]], depthwise: bool, rowwise: bool) -> list[Axis]:
    """The chunks of the result, axis by axis; with `rowwise` the last axis is one chunk."""
    batch, space, channels = geometry.split_shape(chunks, shape.data_format)
    along: list[Axis] = []
    for lengths, n, m, s, extent, before in zip(
        space, shape.in_size, shape.out_size, shape.strides, shape.k_eff, shape.pad_before, strict=True
    ):
        axis = Halo(stride=s, extent=extent, before=before)
        whole = rowwise and shape.data_format != geometry.CHANNELS_LAST and len(along) == shape.rank - 1
        pieces = (m,) if whole else axis.out_chunks(lengths, m)
        ends = list(itertools.accumulate(pieces))
        reads = [axis.piece(end - piece, end, n) for piece, end in zip(pieces, ends, strict=True)]
        along.append(Axis(pieces, _parts(lengths, [span for span, _ in reads]), [zeros for _, zeros in reads]))
    split = depthwise and not (rowwise and shape.data_format == geometry.CHANNELS_LAST)
    given = tuple(n for n in channels if n) if split else (shape.in_channels,)
    ends = list(itertools.accumulate(given))
    spans = [(end - n, end) for n, end in zip(given, ends, strict=True)]
    made = tuple(n * shape.depth_multiplier for n in given) if depthwise else (shape.filters,)
    items = Axis(batch, [[(block, WHOLE)] for block in range(len(batch))], [])
    return list(geometry.join_shape(items, tuple(along), Axis(made, _parts(channels, spans), []), shape.data_format))


def _parts(lengths: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[list[Part]]:
    """The blocks of those `lengths` that hold each span [first, last); for an empty one nothing, but of some block."""
    ends = list(itertools.accumulate(lengths))
    found = []
    for first, last in spans:
        parts = []
        for block in range(bisect.bisect_right(ends, first), bisect.bisect_left(ends, last) + 1):
            start = ends[block] - lengths[block]
            part = slice(max(first - start, 0), min(last - start, lengths[block]))
            if lengths[block]:
                parts.append((block, WHOLE if part == slice(0, lengths[block]) else part))
        found.append(parts if first < last else [(0, slice(0, 0))])
    return found


def _kernel(array: Any, name: str) -> da.Array:
    """`array` as a Dask array; one in memory becomes one entry of the graph."""
    if not isinstance(array, da.Array):
        if not (hasattr(array, "__array_function__") and hasattr(array, "dtype")):
            raise TypeError(f"`{name}` must be a NumPy, CuPy or Dask array. Received: {name} of type {_kind(array)}")
        array = da.from_array(array, chunks=-1)
    _check_known(array, name)
    return array


def _check_known(array: da.Array, name: str, axis: int = 0) -> None:
    """Raises ValueError unless the sizes from `axis` on are known."""
    if any(map(math.isnan, array.shape[axis:])):
        but = " except those of the first axis" if axis else ""
        raise ValueError(
            f"the chunks of `{name}`{but} must have known lengths: `{name}.compute_chunk_sizes()` finds them out. "
            f"Received: {name}.chunks={array.chunks}"
        )


def _batched(array: Any, samples: tuple[Any, ...]) -> da.Array:
    """An input of a model, of known sizes but for the batch, in chunks of `samples` and no others."""
    unknown = isinstance(array, da.Array) and array.numblocks[:1] == (len(samples),) and math.isnan(array.shape[0])
    if array.ndim == 0 or not (array.shape[0] == sum(samples) or (unknown and math.isnan(sum(samples)))):
        raise ValueError(
            "all inputs must have the same number of samples, or be in the same number of chunks where it is unknown. "
            f"Received: an input of shape {array.shape} with chunks {samples}"
        )
    if not isinstance(array, da.Array):
        return da.from_array(array, chunks=(samples, *array.shape[1:]))
    _check_known(array, "x", 1)
    return array.rechunk(dict.fromkeys(range(1, array.ndim), -1) | ({} if unknown else {0: samples}))


def _kind(value: Any) -> str:
    return f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"


# --- In a task ---------------------------------------------------------------------------------------------------


def _call(
    function: Callable[..., Array],
    options: dict[str, Any],
    blocks: list[Array],
    counts: tuple[int, ...],
    zeros: tuple[tuple[int, int], ...],
    w: Array,
    bias: Array | None,
) -> Array:
    return function(_joined(blocks, counts), w, bias, padding=zeros, **options)


def _joined(blocks: list[Array], counts: tuple[int, ...]) -> Array:
    """One array of `blocks`, of which there are `counts` along each axis, the last axis fastest."""
    if len(blocks) == 1:
        return blocks[0]
    step, slices = len(blocks), []
    for axis, count in enumerate(counts):
        step //= count
        ends = (0, *itertools.accumulate(block.shape[axis] for block in blocks[: step * count : step]))
        slices.append(list(itertools.starmap(slice, itertools.pairwise(ends))))
    whole = np.empty_like(blocks[0], order="C", shape=tuple(axis[-1].stop for axis in slices))
    for block, at in zip(blocks, itertools.product(*slices), strict=True):
        whole[at] = block
    return whole


def _cut(block: Array, at: tuple[slice, ...]) -> Array:
    """A part of a block. A small one is copied, so as not to keep the block in memory."""
    part = block[at]
    return part.copy() if 2 * part.size <= block.size else part


def _nothing(block: Array, sizes: tuple[int, ...]) -> Array:
    """As many samples as `block` has, of a shape without elements."""
    return np.empty_like(block, shape=(block.shape[0], *sizes))


def _predicted(model: models.Model, arrays: list[Array], batch_size: int, device: str | None) -> list[np.ndarray]:
    outputs = model.predict(arrays, batch_size=batch_size, verbose=0, device=device)
    return outputs if isinstance(outputs, list) else [outputs]
