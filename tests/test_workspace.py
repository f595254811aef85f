"""Scratch memory stays within `workspace`, whatever the input, measured by the allocator."""

import tracemalloc

import numpy as np
import pytest
from compare import assert_close
from strategies import uniform

from cuconv import ops

WORKSPACE = 256 << 10
BIG = 1 << 20  # bytes of the larger array of each case in float32
SLACK = 48 << 10  # bytes for kernels in another order or dtype, for views and for the interpreter


class Positions(tuple):
    """[B, L.., C] of an array, which the test makes in its layout."""


class InputShape(Positions):
    """The same, given to the operation as a shape."""


class Kernel(tuple):
    """The shape of a kernel, which the test makes."""


LONG, WIDE = BIG // 4 // 16, 128
X, X2 = Positions((1, LONG, 16)), Positions((1, WIDE, WIDE, 16))
W, W2 = Kernel((9, 16, 16)), Kernel((3, 3, 16, 16))
SAME = {"padding": "same"}

CASES = {
    "conv": (ops.conv, (X, W), {}),
    "conv-same": (ops.conv, (X, W), SAME),
    "conv-narrow": (ops.conv, (Positions((1, BIG // 4, 1)), Kernel((80, 1, 16))), {**SAME, "strides": 4}),
    "conv-dilated": (ops.conv, (Positions((2, LONG // 2, 16)), W), {"padding": "causal", "dilation_rate": 64}),
    "conv-groups": (ops.conv, (X, Kernel((9, 4, 16))), {"groups": 4}),
    "conv-2d": (ops.conv, (X2, W2), SAME),
    "conv-2d-narrow": (ops.conv, (Positions((1, 512, 512, 1)), Kernel((5, 5, 1, 8))), SAME),
    "conv_transpose": (ops.conv_transpose, (Positions((1, LONG // 4, 16)), W), {"strides": 4}),
    "conv_transpose-s1": (ops.conv_transpose, (X, W), SAME),
    "conv_transpose-2d": (ops.conv_transpose, (Positions((1, WIDE // 2, WIDE // 2, 16)), W2), {"strides": 2}),
    "depthwise": (ops.depthwise_conv, (X, Kernel((31, 16, 1))), SAME),
    "depthwise-2d": (ops.depthwise_conv, (X2, Kernel((7, 7, 16, 1))), SAME),
    "separable": (ops.separable_conv, (X, Kernel((9, 16, 2)), Kernel((1, 32, 16))), {}),
    "separable_input_grad": (
        ops.separable_conv_input_grad,
        (X, Kernel((9, 16, 2)), Kernel((1, 32, 16)), InputShape(X)),
        SAME,
    ),
    "input_grad": (ops.conv_input_grad, (X, W, InputShape(X)), SAME),
    "input_grad-s2": (ops.conv_input_grad, (Positions((1, LONG // 2, 16)), W, InputShape(X)), {**SAME, "strides": 2}),
    "kernel_grad": (ops.conv_kernel_grad, (X, X, tuple(W)), SAME),
    "depthwise_input_grad": (ops.depthwise_conv_input_grad, (X, Kernel((9, 16, 1)), InputShape(X)), SAME),
    "depthwise_kernel_grad": (ops.depthwise_conv_kernel_grad, (X, X, (9, 16, 1)), SAME),
}


def made(argument, data_format: str, dtype: str, rng):
    """The argument in the layout and dtype of the test."""
    if isinstance(argument, Kernel):
        return uniform(rng, argument, dtype)
    if not isinstance(argument, Positions):
        return argument
    batch, *sizes, channels = argument
    shape = (batch, channels, *sizes) if data_format == "channels_first" else tuple(argument)
    return shape if isinstance(argument, InputShape) else uniform(rng, shape, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("name", CASES)
def test_scratch_memory_is_bounded(name, data_format, dtype):
    """In 16 bits too, where sums are taken in 32; and many blocks give what one block gives."""
    function, arguments, options = CASES[name]
    options = {**options, "data_format": data_format}
    rng = np.random.default_rng(0)
    arguments = [made(argument, data_format, dtype, rng) for argument in arguments]
    expected = function(*arguments, **options)
    out = np.full_like(expected, np.nan)
    tracemalloc.start()
    try:
        function(*arguments, **options, out=out, workspace=WORKSPACE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    slack = np.abs(expected).max() * 2.0**-11 if dtype == "float16" else 0.0  # the other answer is rounded as well
    assert_close(out, expected.astype(np.float64), dtype=dtype, terms=LONG, slack=slack)
    assert peak <= WORKSPACE + SLACK, f"{peak / WORKSPACE:.1f} workspaces"
