"""The byte and FLOP model that plans share. What it assumes of devices is to be replaced by what a GPU measures."""

from __future__ import annotations

from collections.abc import Iterable

from cuconv.plan.types import Cost

LAUNCH_SECONDS = 3e-6  # from one launch to the next that waits for it
L2_FACTOR = 2.5  # bandwidth of the L2 cache over that of the memory


def slowest(flops: int, least_flops: int, bytes_: int, least_bytes: int, times: dict[str, float]) -> Cost:
    """The cost of a launch that takes as long as the slowest of what happens in it, and what every launch takes.

    Args:
        times: seconds of each, by the name of what they are spent on.
    """
    bound = max(times, key=lambda name: times[name])
    seconds = times[bound]
    named = bound if seconds >= LAUNCH_SECONDS else "launch"
    return Cost(flops, least_flops, bytes_, least_bytes, seconds + LAUNCH_SECONDS, named)


def total(costs: Iterable[Cost | None]) -> Cost:
    """The cost of launches one after the other."""
    known = [cost for cost in costs if cost is not None]
    return Cost(
        sum(cost.flops for cost in known),
        sum(cost.least_flops for cost in known),
        sum(cost.bytes for cost in known),
        sum(cost.least_bytes for cost in known),
        sum(cost.seconds for cost in known),
        max(known, key=lambda cost: cost.seconds).bound if known else "",
    )
