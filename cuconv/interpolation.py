"""Interpolation by whole factors along one axis, as tables: which inputs make up an output, with which weights.

Output p of an axis lies at ``(p + 1/2) / size - 1/2`` of the input (half-pixel centres, corners not aligned). Beyond
the edge stands the edge, except for the Lanczos kernels, which leave such taps out and share their weight among the
others. bicubic is Keys' kernel with a = -3/4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

Array = np.ndarray


def _triangle(t: Array) -> Array:
    return np.maximum(0, 1 - np.abs(t))


def _cubic(t: Array) -> Array:
    a, t = -0.75, np.abs(t)
    inner = ((a + 2) * t - (a + 3)) * t * t + 1
    outer = ((t - 5) * t + 8) * t * a - 4 * a
    return np.where(t <= 1, inner, np.where(t < 2, outer, 0))


def _lanczos(t: Array, lobes: int) -> Array:
    return np.where(np.abs(t) < lobes, np.sinc(t) * np.sinc(t / lobes), 0)


# Interpolation kernels, and how many inputs they reach to either side.
KERNELS: dict[str, tuple[Callable[[Array], Array], int]] = {
    "bilinear": (_triangle, 1),
    "bicubic": (_cubic, 2),
    "lanczos3": (functools.partial(_lanczos, lobes=3), 3),
    "lanczos5": (functools.partial(_lanczos, lobes=5), 5),
}


@functools.lru_cache(maxsize=64)
def taps(n: int, size: int, interpolation: str) -> tuple[Array, Array]:
    """Which inputs make up each output of one axis, index [n * size, taps], and their weights.

    Inputs ``start .. start + taps - 1`` with ``start = p // size - reach + (p % size >= size // 2)``, clipped to 0 ..
    n - 1.
    """
    kernel, reach = KERNELS[interpolation]
    centre = (np.arange(n * size)[:, None] + 0.5) / size - 0.5
    index = np.floor(centre).astype(np.intp) + np.arange(1 - reach, 1 + reach)
    weight = kernel(centre - index)
    if interpolation.startswith("lanczos"):
        weight *= (index >= 0) & (index < n)
        weight /= weight.sum(axis=1, keepdims=True)
    return index.clip(0, max(n - 1, 0)), weight


# The kernels in kernels/ read tables of axes with few inputs: weights far from both ends are those of one input in the
# middle, so a longer axis has them too. Row i of `n` inputs stands in row ``i - clip(i - margin, 0, n - short)``, where
# ``short = min(n, 2 * margin + 1)``; the margin is the reach for a window and twice that for the shares.


def window_weights(n: int, size: int, interpolation: str) -> Array:
    """Weights [n * size, taps] of the inputs from `start` on, those outside 0 .. n - 1 being 0: the edge has theirs."""
    index, weight = taps(n, size, interpolation)
    reach = KERNELS[interpolation][1]
    output = np.arange(n * size)[:, None]
    start = output // size - reach + (output % size >= size // 2)
    window = np.zeros_like(weight)
    np.add.at(window, (np.broadcast_to(output, index.shape), index - start), weight)
    return window


def share_weights(n: int, size: int, interpolation: str) -> Array:
    """Weights [n, taps * size] with which outputs ``(i - reach) * size + size // 2 ..`` hold a share of input i."""
    index, weight = taps(n, size, interpolation)
    reach = KERNELS[interpolation][1]
    shares = np.zeros((n, 2 * reach * size))
    output = np.broadcast_to(np.arange(n * size)[:, None], index.shape)
    np.add.at(shares, (index, output - (index - reach) * size - size // 2), weight)
    return shares
