"""Plans of pack_weights.cu: the weights of a convolution in the order that a product reads them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cuconv.geometry import ConvShape
from cuconv.plan.cost import slowest
from cuconv.plan.types import ELEMENTS, DeviceLimits, LaunchPlan, index_bytes

TILE, ROWS = 32, 8  # of pack_weights.cu


@dataclass(frozen=True)
class Taps:
    """One axis of packed weights: tap a of phase rho is tap ``first + rho + (count - 1 - a) * step`` of the kernel."""

    count: int
    phases: int
    first: int
    step: int


def in_order(shape: ConvShape) -> tuple[Taps, ...]:
    """All taps of `shape` as they stand in its kernel."""
    return tuple(Taps(taps, 1, taps - 1, -1) for taps in shape.kernel_size)


def plan_pack(
    shape: ConvShape, axes: Sequence[Taps], dtype: str, limits: DeviceLimits, filters_last: bool = False
) -> LaunchPlan:
    """The launch that packs the kernel of `shape`, for the arrays (w, packed).

    Packed are [G, taps.., F/G, phases.., C/G], or with `filters_last` [G, taps.., phases.., C/G, F/G].
    """
    element = ELEMENTS[dtype]
    channels, filters = shape.in_channels // shape.groups, shape.filters // shape.groups
    tiles_c, tiles_f = -(-channels // TILE), -(-filters // TILE)
    matrices = math.prod(axis.count * axis.phases for axis in axes) * shape.groups
    size = math.prod(shape.w_shape)
    packed = matrices * channels * filters
    width = index_bytes(2 * size, 2 * packed)
    moved = (size + packed) * element.bytes
    return LaunchPlan(
        kernel="pack_weights",
        constants=(
            ("ELEMENT", element.c_type),
            ("INDEX", "int" if width == 4 else "long long"),
            ("RANK", shape.rank),
            ("FILTERS_LAST", int(filters_last)),
        ),
        integers=(
            shape.groups,
            channels,
            filters,
            tiles_c,
            tiles_f,
            *shape.kernel_size,
            *(value for values in zip(*map(dataclasses.astuple, axes), strict=True) for value in values),
        ),
        grid=(tiles_c * tiles_f * matrices, 1, 1),
        block=(TILE * ROWS, 1, 1),
        index_bytes=width,
        shared_bytes=TILE * (TILE + 1) * element.bytes,
        registers=32,
        reason=f"{matrices} {'matrices' if filters_last else 'transposed matrices'} of {channels} x {filters}",
        cost=slowest(0, 0, moved, moved, {"memory": moved / limits.bandwidth}),
    )
