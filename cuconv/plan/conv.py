"""Plans of convolutions and their kernel gradients: the kernel that each is computed by, and its launches."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cuconv.geometry import CHANNELS_LAST, ConvShape
from cuconv.plan import mma
from cuconv.plan.cost import total
from cuconv.plan.halo import plan_halo
from cuconv.plan.kernel_grad_mma import plan_on_tensor_cores
from cuconv.plan.kernel_grad_wgmma import plan_on_warpgroups
from cuconv.plan.narrow import plan_narrow
from cuconv.plan.pack import in_order, plan_pack
from cuconv.plan.reduce import plan_conv_reduce, plan_reduce
from cuconv.plan.simt import BK, CHOICE_FACTOR, Operands, Product, Tile, choose_tile
from cuconv.plan.taps import plan_taps
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
from cuconv.plan.wgmma import parts_of, plan_wgmma, tiles_of
from cuconv.plan.wgmma_first import plan_wgmma_first

# conv_narrow.cu or conv_taps.cu is taken unless another kernel, which reads inputs once a tap, is predicted to be this
# much faster.
SPECIAL_FACTOR = 1.1
WARPGROUP_FACTOR = 1.0  # conv_wgmma.cu or conv_wgmma_first.cu is taken unless it is predicted to take longer
LONGEST_STEP = 64  # values of k, of any kernel
FEW_BLOCKS = 2  # a multiprocessor: with fewer, either some are idle or the tiles are small ones for want of better
PARTS = (2, 4, 8, 16)  # of K, that are weighed there
# A split sums at least this many positions: fewer, and its result costs more to store than to compute.
LEAST_CHUNK = 128


@functools.lru_cache(maxsize=4096)
def plan_conv(
    shape: ConvShape,
    dtype: str,
    activation: str,
    aligned: tuple[int, ...],
    limits: DeviceLimits,
    precision: str = "highest",
) -> LaunchPlan:
    """The plan of a convolution, for the arrays (x, w, bias, y).

    Args:
        activation: a name of ACTIVATION_CODES.
        aligned: elements by which x, w and y lie behind a 16-byte boundary.
        precision: "highest", or "high": products of float32 may be of TF32.
    """
    shape = _whole_windows(shape)
    plan = plan_form(form_of(shape), dtype, activation, aligned, limits, precision)
    for special in (plan_narrow, plan_taps):
        plan = _faster(plan, SPECIAL_FACTOR, special, shape, dtype, activation, aligned, limits)
    return plan


def _faster(plan: LaunchPlan, factor: float, plan_other: Callable[..., LaunchPlan], *problem: Any) -> LaunchPlan:
    """What `plan_other` makes of `problem`, if it is predicted to take at most `factor` times as long, else `plan`."""
    try:
        other = plan_other(*problem)
    except PlanError as error:
        return plan.rejecting(str(error))
    if other.seconds <= factor * plan.seconds:
        plan, other = other, plan
    return plan.rejecting(other.prediction)


def _whole_windows(shape: ConvShape) -> ConvShape:
    """The same convolution of the same memory, with the taps of the innermost axis as channels.

    Where windows lie side by side and fill their rows, what an output reads of a row is a run of neighbours: patches of
    an image in 3 colours have runs that are long enough for wide accesses.
    """
    taps, size = shape.kernel_size[-1], shape.in_size[-1]
    beside = shape.strides[-1] == taps and shape.dilation_rate[-1] == 1 and shape.pad_before[-1] == 0
    if not (beside and taps > 1 and size % taps == 0 and shape.groups == 1 and shape.data_format == CHANNELS_LAST):
        return shape
    return dataclasses.replace(
        shape,
        in_size=(*shape.in_size[:-1], size // taps),
        in_channels=shape.in_channels * taps,
        kernel_size=(*shape.kernel_size[:-1], 1),
        strides=(*shape.strides[:-1], 1),
    )


@dataclass(frozen=True)
class Form:
    """What all kernels of products compute: the convolution `shape` with a matrix of weights, and where results go.

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

    @property
    def results(self) -> tuple[int, int]:
        """Places of y in one batch item, and filters."""
        sizes, phases = self.shape.out_size, 1
        if self.upsampled:
            sizes, phases = self.upsampled[0], math.prod(self.upsampled[2])
        return math.prod(sizes), self.columns // phases * self.shape.groups

    @property
    def count(self) -> int:
        """Elements of y."""
        places, filters = self.results
        return int(self.shape.batch) * places * filters


def form_of(shape: ConvShape) -> Form:
    """A convolution as it is."""
    columns = shape.filters // shape.groups
    depth = math.prod(shape.kernel_size) * (shape.in_channels // shape.groups)
    products = shape.batch * math.prod(shape.out_size) * depth * shape.filters
    return Form(shape, columns, depth, shape.filters, columns, _span(shape), products)


def plan_form(
    form: Form,
    dtype: str,
    activation: str,
    aligned: tuple[int, ...],
    limits: DeviceLimits,
    precision: str = "highest",
) -> LaunchPlan:
    """The launch for `form`, of conv_simt.cu or of another kernel that computes it; arguments as :func:`plan_conv`."""
    plan = plan_by_warps(form, dtype, activation, aligned, limits, precision)
    problem = form, dtype, activation, aligned, limits
    if form.shape.data_format == CHANNELS_LAST:
        return _faster(plan, WARPGROUP_FACTOR, plan_wgmma, *problem, precision)
    return _faster(plan, WARPGROUP_FACTOR, plan_wgmma_first, *problem)


def plan_by_warps(
    form: Form,
    dtype: str,
    activation: str,
    aligned: tuple[int, ...],
    limits: DeviceLimits,
    precision: str = "highest",
    most: int = 1,
) -> LaunchPlan:
    """The launch of conv_simt.cu, conv_mma.cu or conv_halo.cu for `form`.

    With `most` above one, K is cut into as many parts at most. Each has sums of its own, as large as y, in the dtype of
    sums; `activation` is not applied then.
    """
    shape, element = form.shape, ELEMENTS[dtype]
    last = shape.data_format == CHANNELS_LAST
    channels = shape.in_channels // shape.groups
    positions = shape.batch * math.prod(shape.out_size)
    x_size = shape.batch * math.prod(shape.in_size) * shape.in_channels
    places, filters = form.results
    y_size = form.count
    w_size = form.depth * form.columns * shape.groups

    y_bytes, y_aligned = (element.bytes, aligned[2]) if most == 1 else (element.sum_bytes * most, 0)
    contiguous = not form.upsampled or max(form.upsampled[1]) == 1
    neighbours = filters // shape.groups if last else places if contiguous else 1
    # The last positions and values of k of a tile lie behind the end, and their indices are computed all the same.
    rows = (form.depth + 2 * LONGEST_STEP) * form.w_pitch + w_size
    width = index_bytes(2 * x_size, max(2, most) * y_size, rows, positions + 256, _furthest(shape))
    operands = Operands(
        vector_x=vector(element.bytes, channels, aligned[0]) if last else 1,
        vector_w=vector(element.bytes, form.columns, aligned[1]),
        transposed=not last,
        gradient=False,
        index_bytes=width,
        rank=shape.rank,
        least_bytes=(x_size + w_size) * element.bytes + y_size * y_bytes,
    )
    product = Product(positions, form.columns, form.depth, shape.groups, most)
    tile, rejected = _choose(product, element, operands, limits, precision)
    needed = dataclasses.replace(tile.cost, least_flops=form.products * (8 if element.is_complex else 2))
    tile = dataclasses.replace(tile, cost=needed)
    # Results go to y from a thread's block of sums, or where tensor cores made them through shared memory.
    simt = isinstance(tile, Tile)
    block = VECTOR_BYTES // (element.sum_bytes if simt or most > 1 else element.bytes)
    step = BK if isinstance(tile, Tile) else tile.bk
    chunk = -(-form.depth // (tile.splits * step)) * step
    parts = (chunk, y_size) if most > 1 else ()
    plan = LaunchPlan(
        kernel="conv_simt" if simt else "conv_mma",
        constants=(
            *_base_constants(shape, element, width),
            ("UPSAMPLED", int(bool(form.upsampled))),
            ("SPLIT", int(most > 1)),
            ("ACTIVATION", ACTIVATION_CODES[activation] if most == 1 else 0),
            *tile.constants,
            ("VECX", tile.vector_x),
            ("VECW", tile.vector_w),
            *(() if isinstance(tile, Tile) else (("WHOLE", int(channels % tile.bk == 0)),)),
            ("VECY", vector(y_bytes if most == 1 else element.sum_bytes, block, neighbours, y_aligned)),
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
            *parts,
            *(size for sizes in form.upsampled for size in sizes),
        ),
        **_launch(tile, width),
        reason=f"{tile}{_parts(tile.splits)}: {tile.cost.bytes} bytes to shared memory; {_why(tile, product, limits)}",
        rejected=rejected,
    )
    try:
        halo = plan_halo(form, dtype, aligned, plan, limits, most)
    except PlanError as error:
        return plan.rejecting(str(error))
    best, other = (halo, plan) if _is_better(halo, plan) else (plan, halo)
    return best.rejecting(other.prediction, *other.rejected)


def _choose(
    product: Product, element: Element, operands: Operands, limits: DeviceLimits, precision: str
) -> tuple[Tile | mma.Tile, tuple[str, ...]]:
    """The tile with the lowest predicted time, on tensor cores or on the ordinary units, and why the others lost."""
    tile, lost = choose_tile(product, element, operands, limits)
    try:
        other, others = mma.choose_tile(product, element, operands, limits, precision)
    except PlanError as error:
        return tile, (*lost, str(error))
    # Of equal ones, tensor cores; of float32 the more exact.
    factor = 1 / CHOICE_FACTOR if element.dtype == "float32" else CHOICE_FACTOR
    if other.cost.seconds <= factor * tile.cost.seconds:
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
    shape: ConvShape,
    dtype: str,
    aligned: tuple[int, ...],
    workspace: int,
    limits: DeviceLimits,
    precision: str = "highest",
) -> KernelGradPlan:
    """The plan of a kernel gradient, for the arrays (x, dy, dw) or (x, dy, partial sums).

    Args:
        aligned: elements by which x, dy and dw lie behind a 16-byte boundary.
        workspace: bytes that partial sums may take.
        precision: as of :func:`plan_conv`.
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
    words: list[str] = []
    found = [
        *_tried(words, plan_on_warpgroups, shape, dtype, aligned, most, limits),
        *_tried(words, plan_on_tensor_cores, shape, element, aligned, most, grad, limits, precision),
        (grad, splits),
    ]
    plans = [_with_reduction(*each, count, dtype, aligned, limits) for each in found]
    best = min(plans, key=lambda plan: plan.seconds)
    for plan in plans:
        if plan is not best:
            words += [f"{plan.grad.reason}: {plan.seconds * 1e6:.1f} us predicted", *plan.grad.rejected]
    return dataclasses.replace(best, grad=best.grad.rejecting(*words))


def _tried(
    words: list[str], plan_other: Callable[..., tuple[LaunchPlan, int]], *problem: Any
) -> list[tuple[LaunchPlan, int]]:
    """What `plan_other` makes of `problem`, if anything; `words` get the reason if not."""
    try:
        return [plan_other(*problem)]
    except PlanError as error:
        words.append(str(error))
        return []


def _with_reduction(
    grad: LaunchPlan, splits: int, count: int, dtype: str, aligned: tuple[int, ...], limits: DeviceLimits
) -> KernelGradPlan:
    if splits == 1:
        return KernelGradPlan(grad, None, 0)
    return KernelGradPlan(grad, plan_reduce(dtype, splits, count, aligned[2], limits), splits * count)


@dataclass(frozen=True)
class Parts:
    """A convolution in several launches.

    Attributes:
        pack: of weights, `packed` elements, which `conv` takes; None: it takes those that there are.
        reduce: where K is split, adds up the `partial` sums that `conv` makes, and ends it.
    """

    conv: LaunchPlan
    reduce: LaunchPlan | None
    partial: int
    pack: LaunchPlan | None = None
    packed: int = 0

    @property
    def seconds(self) -> float:
        """Predicted for all launches."""
        return total(each.cost for each in (self.pack, self.conv, self.reduce) if each is not None).seconds


@functools.lru_cache(maxsize=4096)
def plan_conv_parts(
    shape: ConvShape,
    dtype: str,
    activation: str,
    aligned: tuple[int, ...],
    workspace: int,
    limits: DeviceLimits,
    precision: str = "highest",
) -> Parts | None:
    """The plan of a convolution in several launches, or None where :func:`plan_conv` is predicted to be as fast.

    Args:
        workspace: bytes that partial sums and packed weights may take; the others as :func:`plan_conv`.
    """
    form = form_of(_whole_windows(shape))
    whole = plan_conv(shape, dtype, activation, aligned, limits, precision)
    parts = plan_parts(form, dtype, activation, aligned, workspace, whole, limits, precision)
    if dtype != "float32" or precision != "high":
        return parts
    packed = _plan_packed(form, activation, aligned, workspace, limits)
    if packed is None:
        return parts
    other = parts or Parts(whole, None, 0)
    best, lost = (packed, other) if packed.seconds <= WARPGROUP_FACTOR * other.seconds else (other, packed)
    if best.conv is whole:
        return None
    word = f"{lost.conv.reason}: {lost.seconds * 1e6:.1f} us predicted"
    return dataclasses.replace(best, conv=best.conv.rejecting(word))


def _plan_packed(
    form: Form, activation: str, aligned: tuple[int, ...], workspace: int, limits: DeviceLimits
) -> Parts | None:
    """The launches of a float32 convolution by products of TF32 that need packed weights; None: there are none."""
    shape, packed = form.shape, form.depth * form.columns * form.shape.groups
    room = workspace - packed * ELEMENTS["float32"].bytes
    if room < 0:
        return None
    form = dataclasses.replace(form, w_pitch=form.columns, w_group=form.depth * form.columns)
    problem = ("float32", activation, (aligned[0], 0, aligned[2]))
    try:
        conv = plan_wgmma(form, *problem, limits, "high")
    except PlanError:  # which plan_conv tells
        return None
    split = plan_parts(form, *problem, room, conv, limits, "high", by_warps=False)
    return dataclasses.replace(
        split or Parts(conv, None, 0), pack=plan_pack(shape, in_order(shape), "float32", limits), packed=packed
    )


def plan_parts(
    form: Form,
    dtype: str,
    activation: str,
    aligned: tuple[int, ...],
    workspace: int,
    whole: LaunchPlan,
    limits: DeviceLimits,
    precision: str = "highest",
    by_warps: bool = True,
) -> Parts | None:
    """The launches of `form` in parts of K; None where `whole`, the launch without, is predicted to be as fast.

    Only launches of few blocks are cut: a part costs sums as large as y, and a launch more. Without `by_warps`, those
    of conv_wgmma.cu alone.
    """
    if tiles_of(whole) >= FEW_BLOCKS * limits.multiprocessors:
        return None
    element, shape = ELEMENTS[dtype], form.shape
    (places, filters), count = form.results, form.count
    inner = 1 if shape.data_format == CHANNELS_LAST else places
    best = None
    planners: dict[Callable[..., LaunchPlan], float] = {plan_by_warps: math.inf} if by_warps else {}
    planners[plan_wgmma] = math.inf
    for most in PARTS:
        if most * count * element.sum_bytes > workspace:
            break
        for plan_one, fastest in list(planners.items()):
            try:
                conv = plan_one(form, dtype, "linear", aligned, limits, precision, most)
            except PlanError:  # which the launch in one part tells
                del planners[plan_one]
                continue
            splits = parts_of(conv, shape.groups)
            if splits == 1:
                continue
            reduce = plan_conv_reduce(dtype, activation, splits, count, inner, filters, aligned[2], limits)
            parts = Parts(conv, reduce, splits * count)
            if best is None or parts.seconds * CHOICE_FACTOR < best.seconds:
                best = parts
            if parts.seconds > CHOICE_FACTOR * fastest:  # more of them take longer still
                del planners[plan_one]
            else:
                planners[plan_one] = min(fastest, parts.seconds)
    if best is None or not _gains(best, whole):
        return None
    return dataclasses.replace(best, conv=best.conv.rejecting(f"{whole.prediction} in one part"))


def _gains(parts: Parts, whole: LaunchPlan) -> bool:
    """Whether splitting is predicted to pay, with both launches."""
    return parts.seconds * CHOICE_FACTOR <= whole.seconds


def _parts(splits: int) -> str:
    return f", {splits} parts of k" if splits > 1 else ""


def _is_better(plan: LaunchPlan, other: LaunchPlan) -> bool:
    """Whether it is predicted to be faster, or as fast with fewer bytes moved."""
    ours, theirs = plan.cost, other.cost
    if ours is None or theirs is None:
        return False
    near = ours.seconds <= CHOICE_FACTOR * theirs.seconds
    return CHOICE_FACTOR * ours.seconds < theirs.seconds or (near and ours.bytes < theirs.bytes)


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
