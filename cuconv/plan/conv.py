"""Plans of convolutions and their kernel gradients on the ordinary arithmetic units."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan import mma
from cuconv.plan.cost import total
from cuconv.plan.kernel_grad_mma import plan_on_tensor_cores
from cuconv.plan.narrow import plan_narrow
from cuconv.plan.reduce import plan_reduce
from cuconv.plan.simt import BK, CHOICE_FACTOR, Operands, Product, Tile, choose_tile
from cuconv.plan.types import (
    ACTIVATION_CODES,
    ELEMENTS,
    VECTOR_BYTES,
    DeviceLimits,
    Element,
    LaunchPlan,
    PlanError,
    index_bytes,
    vector,
)
from cuconv.plan.wgmma import plan_wgmma

# conv_narrow.cu is taken unless another kernel, which reads inputs once a tap, is predicted to be this much faster.
SPECIAL_FACTOR = 1.1
WARPGROUP_FACTOR = 1.0  # conv_wgmma.cu is taken unless it is predicted to take longer
LONGEST_STEP = 64  # values of k, of any kernel
# A split sums at least this many positions: fewer, and its result costs more to store than to compute.
LEAST_CHUNK = 128


@functools.lru_cache(maxsize=4096)
def plan_conv(
    shape: ConvShape, dtype: str, activation: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> LaunchPlan:
    """The plan of a convolution, for the arrays (x, w, bias, y).

    Args:
        activation: a name of ACTIVATION_CODES.
        aligned: elements by which x, w and y lie behind a 16-byte boundary.
    """
    plan = plan_form(form_of(shape), dtype, activation, aligned, limits)
    try:
        narrow = plan_narrow(shape, dtype, activation, aligned, limits)
    except PlanError as error:
        return _rejecting(plan, str(error))
    return _faster(plan, narrow, SPECIAL_FACTOR)


def _faster(plan: LaunchPlan, other: LaunchPlan, factor: float) -> LaunchPlan:
    """`other` where it is predicted to take at most `factor` times as long, else `plan`."""
    if _seconds(other) <= factor * _seconds(plan):
        plan, other = other, plan
    return _rejecting(plan, f"{other.reason}: {_seconds(other) * 1e6:.1f} us predicted")


@dataclass(frozen=True)
class Form:
    """What conv_simt.cu computes: the convolution `shape` with a matrix of weights, and where results go.

    Attributes:
        columns, depth: N and K of one group's product.
        w_pitch, w_group: elements from one row of weights to the next, and from one group's to the next.
        span: taps * dilation an axis.
        products: multiply-adds of elements that the definition needs.
        upsampled: (full, up, phases, shift), each one integer an axis; empty for a plain convolution.
    """

    shape: ConvShape
    columns: int
    depth: int
    w_pitch: int
    w_group: int
    span: tuple[int, ...]
    products: int
    upsampled: tuple[tuple[int, ...], ...] = ()


def form_of(shape: ConvShape) -> Form:
    """A convolution as it is."""
    columns = shape.filters // shape.groups
    depth = math.prod(shape.kernel_size) * (shape.in_channels // shape.groups)
    products = shape.batch * math.prod(shape.out_size) * depth * shape.filters
    return Form(shape, columns, depth, shape.filters, columns, _span(shape), products)


def plan_form(form: Form, dtype: str, activation: str, aligned: tuple[int, ...], limits: DeviceLimits) -> LaunchPlan:
    """The launch for `form`, of conv_simt.cu or of another kernel that computes it; arguments as :func:`plan_conv`."""
    plan = plan_by_warps(form, dtype, activation, aligned, limits)
    try:
        other = plan_wgmma(form, dtype, activation, aligned, limits)
    except PlanError as error:
        return _rejecting(plan, str(error))
    return _faster(plan, other, WARPGROUP_FACTOR)


def plan_by_warps(
    form: Form, dtype: str, activation: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> LaunchPlan:
    """The launch of conv_simt.cu or conv_mma.cu for `form`."""
    shape, element = form.shape, ELEMENTS[dtype]
    last = shape.data_format == CHANNELS_LAST
    channels = shape.in_channels // shape.groups
    positions = shape.batch * math.prod(shape.out_size)
    x_size = shape.batch * math.prod(shape.in_size) * shape.in_channels
    sizes, phases = shape.out_size, 1
    if form.upsampled:
        sizes, phases = form.upsampled[0], math.prod(form.upsampled[2])
    y_size = shape.batch * math.prod(sizes) * form.columns // phases * shape.groups
    w_size = form.depth * form.columns * shape.groups

    contiguous = not form.upsampled or max(form.upsampled[1]) == 1
    neighbours = form.columns // phases if last else math.prod(sizes) if contiguous else 1
    # The last positions and values of k of a tile lie behind the end, and their indices are computed all the same.
    rows = (form.depth + 2 * LONGEST_STEP) * form.w_pitch + w_size
    width = index_bytes(2 * x_size, 2 * y_size, rows, positions + 256, _furthest(shape))
    operands = Operands(
        vector_x=vector(element.bytes, channels, aligned[0]) if last else 1,
        vector_w=vector(element.bytes, form.columns, aligned[1]),
        transposed=not last,
        gradient=False,
        index_bytes=width,
        rank=shape.rank,
        least_bytes=(x_size + w_size + y_size) * element.bytes,
    )
    product = Product(positions, form.columns, form.depth, shape.groups)
    tile, rejected = _choose(product, element, operands, limits)
    needed = dataclasses.replace(tile.cost, least_flops=form.products * (8 if element.is_complex else 2))
    tile = dataclasses.replace(tile, cost=needed)
    # Results go to y from a thread's block of sums, or where tensor cores made them through shared memory.
    simt = isinstance(tile, Tile)
    block = VECTOR_BYTES // (element.sum_bytes if simt else element.bytes)
    return LaunchPlan(
        kernel="conv_simt" if simt else "conv_mma",
        constants=(
            *_base_constants(shape, element, width),
            ("UPSAMPLED", int(bool(form.upsampled))),
            ("ACTIVATION", ACTIVATION_CODES[activation]),
            *tile.constants,
            ("VECX", tile.vector_x),
            ("VECW", tile.vector_w),
            ("VECY", vector(element.bytes, block, neighbours, aligned[2])),
        ),
        integers=(
            positions,
            form.columns,
            form.depth,
            tile.blocks_m,
            tile.blocks_n,
            shape.groups,
            channels,
            form.w_pitch,
            form.w_group,
            *shape.in_size,
            *shape.out_size,
            *shape.strides,
            *shape.dilation_rate,
            *shape.pad_before,
            *form.span,
            *(size for sizes in form.upsampled for size in sizes),
        ),
        **_launch(tile, width),
        reason=f"{tile}; {_why(tile, product, limits)}",
        rejected=rejected,
    )


def _choose(
    product: Product, element: Element, operands: Operands, limits: DeviceLimits
) -> tuple[Tile | mma.Tile, tuple[str, ...]]:
    """The tile with the lowest predicted time, on tensor cores or on the ordinary units, and why the others lost."""
    tile, lost = choose_tile(product, element, operands, limits)
    try:
        other, others = mma.choose_tile(product, element, operands, limits)
    except PlanError as error:
        return tile, (*lost, str(error))
    if other.cost.seconds <= CHOICE_FACTOR * tile.cost.seconds:
        return other, (*others, f"{tile}: {tile.cost.seconds * 1e6:.1f} us predicted", *lost)
    return tile, (f"{other}: {other.cost.seconds * 1e6:.1f} us predicted", *lost, *others)


@dataclass(frozen=True)
class KernelGradPlan:
    """The launches of a kernel gradient: `grad`, and where positions are split, `reduce` of its partial sums.

    Attributes:
        partial: elements of the sum dtype that the partial sums take; 0 if there are none.
    """

    grad: LaunchPlan
    reduce: LaunchPlan | None
    partial: int

    @property
    def seconds(self) -> float:
        """Predicted for both launches."""
        return total(each.cost for each in (self.grad, self.reduce) if each is not None).seconds


@functools.lru_cache(maxsize=4096)
def plan_kernel_grad(
    shape: ConvShape, dtype: str, aligned: tuple[int, ...], workspace: int, limits: DeviceLimits
) -> KernelGradPlan:
    """The plan of a kernel gradient, for the arrays (x, dy, dw) or (x, dy, partial sums).

    Args:
        aligned: elements by which x, dy and dw lie behind a 16-byte boundary.
        workspace: bytes that partial sums may take.
    """
    element = ELEMENTS[dtype]
    last = shape.data_format == CHANNELS_LAST
    channels, columns = shape.in_channels // shape.groups, shape.filters // shape.groups
    rows = math.prod(shape.kernel_size) * channels
    positions = shape.batch * math.prod(shape.out_size)
    count = rows * shape.filters
    x_size = shape.batch * math.prod(shape.in_size) * shape.in_channels
    dy_size = positions * shape.filters
    most = max(1, min(positions // LEAST_CHUNK, workspace // (count * element.sum_bytes)))

    width = index_bytes(2 * x_size, 2 * dy_size, most * count + 256, positions + 2 * BK, _furthest(shape))
    operands = Operands(
        vector_x=vector(element.bytes, channels, aligned[0]) if last else 1,
        vector_w=vector(element.bytes, columns, aligned[1]) if last else 1,
        transposed=not last,
        gradient=True,
        index_bytes=width,
        rank=shape.rank,
        least_bytes=(x_size + dy_size + count) * element.bytes,
    )
    product = Product(rows, columns, positions, shape.groups, most)
    tile, rejected = choose_tile(product, element, operands, limits)
    splits, chunk = tile.splits, product.part(tile.splits)
    # Partial sums are an array of their own, which begins on a boundary.
    target_bytes, target_aligned = (element.sum_bytes, 0) if splits > 1 else (element.bytes, aligned[2])
    block = VECTOR_BYTES // element.sum_bytes
    grad = LaunchPlan(
        kernel="kernel_grad_simt",
        constants=(
            *_base_constants(shape, element, width),
            ("SPLIT", int(splits > 1)),
            *tile.constants,
            ("VECX", tile.vector_x),
            ("VECD", tile.vector_w),
            ("VECW", vector(target_bytes, block, columns, target_aligned)),
        ),
        integers=(
            positions,
            chunk,
            rows,
            columns,
            tile.blocks_m,
            tile.blocks_n,
            shape.groups,
            channels,
            *shape.in_size,
            *shape.out_size,
            *shape.kernel_size,
            *shape.strides,
            *shape.dilation_rate,
            *shape.pad_before,
        ),
        **_launch(tile, width),
        reason=f"{tile}; {splits} parts of {chunk} positions; {_why(tile, product, limits)}",
        rejected=rejected,
    )
    found = [_with_reduction(grad, splits, count, dtype, aligned, limits)]
    try:
        tensor, splits = plan_on_tensor_cores(shape, element, aligned, most, grad, limits)
        found.insert(0, _with_reduction(tensor, splits, count, dtype, aligned, limits))
    except PlanError as error:
        return dataclasses.replace(found[0], grad=_rejecting(grad, str(error)))
    best = min(found, key=lambda plan: plan.seconds)
    (other,) = (plan for plan in found if plan is not best)
    word = f"{other.grad.reason}: {other.seconds * 1e6:.1f} us predicted"
    return dataclasses.replace(best, grad=_rejecting(best.grad, word, *other.grad.rejected))


def _with_reduction(
    grad: LaunchPlan, splits: int, count: int, dtype: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> KernelGradPlan:
    if splits == 1:
        return KernelGradPlan(grad, None, 0)
    return KernelGradPlan(grad, plan_reduce(dtype, splits, count, aligned[2], limits), splits * count)


def _seconds(plan: LaunchPlan) -> float:
    return plan.cost.seconds if plan.cost else math.inf


def _rejecting(plan: LaunchPlan, *words: str) -> LaunchPlan:
    return dataclasses.replace(plan, rejected=(*plan.rejected, *words))


def _span(shape: ConvShape) -> tuple[int, ...]:
    return tuple(k * d for k, d in zip(shape.kernel_size, shape.dilation_rate, strict=True))


def _furthest(shape: ConvShape) -> int:
    """Twice the largest coordinate that a window or a step beyond the last tap comes to; kernels need the room."""
    axes = zip(
        shape.in_size, shape.out_size, shape.strides, shape.k_eff, shape.dilation_rate, shape.pad_before, strict=True
    )
    return 2 * max(  # type: ignore[no-any-return]  # sizes are integers here
        n + m * s + k_eff + LONGEST_STEP * d + abs(pad) for n, m, s, k_eff, d, pad in axes
    )


def _base_constants(shape: ConvShape, element: Element, width: int) -> tuple[tuple[str, int | str], ...]:
    return (
        ("ELEMENT", element.c_type),
        ("INDEX", "int" if width == 4 else "long long"),
        ("RANK", shape.rank),
        ("CHANNELS_FIRST", int(shape.data_format != CHANNELS_LAST)),
    )


def _launch(tile: Tile | mma.Tile, width: int) -> dict[str, Any]:
    return {
        "grid": (tile.blocks, 1, 1),
        "block": (tile.threads, 1, 1),
        "index_bytes": width,
        "shared_bytes": tile.shared_bytes,
        "dynamic_shared_bytes": 0 if isinstance(tile, Tile) else tile.shared_bytes,
        "registers": tile.registers,
        "cost": tile.cost,
    }


def _why(tile: Tile | mma.Tile, product: Product, limits: DeviceLimits) -> str:
    """How much of the work is useful, and how full the device is."""
    useful = 100 * tile.cost.least_flops / max(1, tile.cost.flops)
    rounds = tile.blocks / limits.multiprocessors
    accesses = f"{tile.vector_x} and {tile.vector_w} elements an access"
    return f"{useful:.0f} % of its products count, {rounds:.1f} blocks a multiprocessor, {accesses}"
