"""The benchmark suite's rows on few positions and channels, and their answers by the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest

from benchmarks import suite


def small(row: suite.Row, dtype: str | None = None) -> suite.Row:
    """The row with its kernel, strides and padding on few positions and channels."""
    rates = tuple(min(d, 5) for d in row.dilation_rate)
    sizes = tuple(
        min(n, (k - 1) * d + 1 + 2 * s + 1)
        for n, k, d, s in zip(row.x[1:-1], row.kernel_size, rates, row.strides, strict=True)
    )
    padding = row.padding if isinstance(row.padding, str) else tuple((min(a, 5), min(b, 5)) for a, b in row.padding)
    return replace(
        row,
        x=(2, *sizes, 3),
        filters=3 if row.depthwise else 4,
        dilation_rate=rates,
        padding=padding,
        dtype=dtype or row.dtype,
    )


def case(row: suite.Row):
    """The row as a parameter of a test."""
    return pytest.param(row, id=f"{row.number} {row.name}")


ALL = [case(row) for row in suite.ROWS]
# One of every operation, rank, padding and kind of stride.
DIFFERENT = [case(suite.ROWS[number - 1]) for number in (2, 4, 6, 9, 20, 23, 27, 29, 31, 37, 42, 46, 47, 50)]
DIFFERENT += [case(suite.ROWS[number - 1]) for number in (51, 52, 53, 54, 55, 57, 58)]


def answers(row: suite.Row, operands, variant: str = "plain") -> tuple[np.ndarray, ...]:
    """What the operation returns, in float64, always a tuple."""
    options = row.options(variant)
    options.pop("precision", None)
    if options.get("activation") == "silu":
        options["activation"] = lambda z: z / (1 + np.exp(-z))
    arguments = operands.arguments(row, variant)
    if row.op != "depthwise_conv_grad":
        return (getattr(oracle, row.op)(*arguments, **options),)
    x, w, dy = arguments
    return (
        oracle.depthwise_conv_input_grad(dy, w, x.shape, **options),
        oracle.depthwise_conv_kernel_grad(x, dy, w.shape, **options),
        oracle.bias_grad(dy),
    )
