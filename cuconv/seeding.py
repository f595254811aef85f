"""The seeds of everything that was given none."""

from __future__ import annotations

import operator
import random

_SEEDS = random.Random()


def set_random_seed(seed: int) -> None:
    """Makes every seed drawn from now on repeatable. The generators of Python and NumPy are left alone."""
    _SEEDS.seed(check_seed(seed))


def draw_seed() -> int:
    """A new seed in [0, 2^32)."""
    return _SEEDS.getrandbits(32)


def check_seed(seed: int) -> int:
    """`seed` as a Python int.

    Raises:
        ValueError: it is not an integer, or negative.
    """
    try:
        value = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        value = -1
    if value < 0:
        raise ValueError(f"`seed` must be an integer >= 0. Received: seed={seed!r}")
    return value
