"""Plans of the reduction that ends a split gradient."""

from __future__ import annotations

import functools

from cuconv.plan.cost import slowest
from cuconv.plan.types import ELEMENTS, VECTOR_BYTES, DeviceLimits, LaunchPlan, index_bytes, vector

THREADS = 256


@functools.lru_cache(maxsize=4096)
def plan_reduce(dtype: str, splits: int, count: int, aligned: int, limits: DeviceLimits) -> LaunchPlan:
    """Adds `splits` rows of `count` partial sums in their order, for the arrays (partial, out).

    Args:
        dtype: of `out`; the partial sums have its sum dtype and begin on a 16-byte boundary.
        aligned: elements by which `out` lies behind such a boundary.
    """
    element = ELEMENTS[dtype]
    width = vector(element.sum_bytes, count, aligned)
    blocks = -(-count // (THREADS * width))
    bytes_ = count * (splits * element.sum_bytes + element.bytes)
    additions = count * splits * (2 if element.is_complex else 1)
    indices = index_bytes(count * (splits + 1) + THREADS * VECTOR_BYTES)
    return LaunchPlan(
        kernel="reduce_splits",
        constants=(
            ("ELEMENT", element.c_type),
            ("INDEX", "int" if indices == 4 else "long long"),
            ("THREADS", THREADS),
            ("VEC", width),
        ),
        integers=(splits, count),
        grid=(blocks, 1, 1),
        block=(THREADS, 1, 1),
        index_bytes=indices,
        registers=32,
        reason=f"{splits} parts of {count} sums in ascending order, {width} an access",
        # The product that made the sums has counted these additions as the definition's.
        cost=slowest(additions, 0, bytes_, bytes_, {"memory": bytes_ / limits.bandwidth}),
    )
