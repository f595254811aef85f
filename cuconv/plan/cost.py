"""The byte and FLOP model that plans share. What it assumes of devices is to be replaced by what a GPU measures."""

from __future__ import annotations

from collections.abc import Iterable

from cuconv.plan.types import Cost

LAUNCH_SECONDS = 3e-6  # from one launch to the next that waits for it
L2_FACTOR = 2.5  # bandwidth of the L2 cache over that of the memory


def total(costs: Iterable[Cost | None]) -> Cost:
    """The cost of launches one after the other."""
    known = [cost for cost in costs if cost is not None]
    return Cost(
        sum(cost.flops for cost in known),
        sum(cost.least_flops for cost in known),
        sum(cost.bytes for cost in known),
        sum(cost.least_bytes for cost in known),
        sum(cost.seconds for cost in known),
    )
