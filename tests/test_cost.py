"""The cost of launches: the slowest part counts and is named."""

import pytest

from cuconv.plan.cost import LAUNCH_SECONDS, slowest, total


@pytest.mark.parametrize(
    "times, seconds, bound",
    [
        ({"memory": 5e-6, "instructions": 4e-6}, 5e-6, "memory"),
        ({"memory": 5e-6, "instructions": 6e-6}, 6e-6, "instructions"),
        ({"memory": LAUNCH_SECONDS}, LAUNCH_SECONDS, "memory"),
        ({"memory": LAUNCH_SECONDS / 2, "instructions": 0.0}, LAUNCH_SECONDS / 2, "launch"),
    ],
)
def test_the_slowest_counts_and_is_named(times, seconds, bound):
    cost = slowest(1, 2, 3, 4, times)
    assert (cost.flops, cost.least_flops, cost.bytes, cost.least_bytes) == (1, 2, 3, 4)
    assert cost.seconds == pytest.approx(seconds + LAUNCH_SECONDS) and cost.bound == bound


def test_launches_one_after_the_other_are_bound_by_the_longest():
    short, long = (slowest(1, 2, 3, 4, {name: n * 1e-5}) for n, name in ((1, "memory"), (2, "tensor cores")))
    cost = total([short, None, long])
    assert (cost.flops, cost.least_flops, cost.bytes, cost.least_bytes) == (2, 4, 6, 8)
    assert cost.seconds == pytest.approx(short.seconds + long.seconds) and cost.bound == "tensor cores"
    assert total([]).seconds == 0 and total([None]).bound == ""
