"""Scratch memory stays within `workspace`, whatever the input, measured by the allocator."""

import tracemalloc

import numpy as np
import pytest
from compare import assert_close

from cuconv import ops

WORKSPACE = 256 << 10
BIG = 1 << 20  # bytes of the larger array of each case in float32
SLACK = 48 << 10  # bytes for kernels in another order or dtype, for views and for the interpreter


def float32(*shape):
    return np.full(shape, 0.5, np.float32)


LONG, WIDE = BIG // 4 // 16, 128
W1, W2 = float32(9, 16, 16), float32(3, 3, 16, 16)

CASES = {
    "conv": (ops.conv, (float32(1, LONG, 16), W1), {}),
    "conv-same": (ops.conv, (float32(1, LONG, 16), W1), {"padding": "same"}),
    "conv-narrow": (ops.conv, (float32(1, BIG // 4, 1), float32(80, 1, 16)), {"strides": 4, "padding": "same"}),
    "conv-dilated": (ops.conv, (float32(2, LONG // 2, 16), W1), {"padding": "causal", "dilation_rate": 64}),
    "conv-groups": (ops.conv, (float32(1, LONG, 16), float32(9, 4, 16)), {"groups": 4}),
    "conv-2d": (ops.conv, (float32(1, WIDE, WIDE, 16), W2), {"padding": "same"}),
    "conv-2d-narrow": (ops.conv, (float32(1, 512, 512, 1), float32(5, 5, 1, 8)), {"padding": "same"}),
    "conv_transpose": (ops.conv_transpose, (float32(1, LONG // 4, 16), W1), {"strides": 4}),
    "conv_transpose-s1": (ops.conv_transpose, (float32(1, LONG, 16), W1), {"padding": "same"}),
    "conv_transpose-2d": (ops.conv_transpose, (float32(1, WIDE // 2, WIDE // 2, 16), W2), {"strides": 2}),
    "depthwise": (ops.depthwise_conv, (float32(1, LONG, 16), float32(31, 16, 1)), {"padding": "same"}),
    "depthwise-2d": (ops.depthwise_conv, (float32(1, WIDE, WIDE, 16), float32(7, 7, 16, 1)), {"padding": "same"}),
    "separable": (ops.separable_conv, (float32(1, LONG, 16), float32(9, 16, 2), float32(1, 32, 16)), {}),
    "input_grad": (ops.conv_input_grad, (float32(1, LONG, 16), W1, (1, LONG, 16)), {"padding": "same"}),
    "input_grad-s2": (
        ops.conv_input_grad,
        (float32(1, LONG // 2, 16), W1, (1, LONG, 16)),
        {"padding": "same", "strides": 2},
    ),
    "kernel_grad": (ops.conv_kernel_grad, (float32(1, LONG, 16), float32(1, LONG, 16), W1.shape), {"padding": "same"}),
    "depthwise_input_grad": (
        ops.depthwise_conv_input_grad,
        (float32(1, LONG, 16), float32(9, 16, 1), (1, LONG, 16)),
        {"padding": "same"},
    ),
    "depthwise_kernel_grad": (
        ops.depthwise_conv_kernel_grad,
        (float32(1, LONG, 16), float32(1, LONG, 16), (9, 16, 1)),
        {"padding": "same"},
    ),
}


def channels_first(argument):
    """An array of positions, or its shape, with the channels in front; a kernel as it is."""
    shape = argument if isinstance(argument, tuple) else argument.shape
    if len(shape) < 3 or shape[0] > 2 or shape == (1, 32, 16):  # batches here are 1 or 2, kernels longer but for 1x1
        return argument
    if isinstance(argument, tuple):
        return (shape[0], shape[-1], *shape[1:-1])
    return np.ascontiguousarray(np.moveaxis(argument, -1, 1))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("name", CASES)
def test_scratch_memory_is_bounded(name, data_format, dtype):
    """In 16 bits too, where sums are taken in 32."""
    function, arguments, options = CASES[name]
    if data_format == "channels_first":
        arguments, options = map(channels_first, arguments), {**options, "data_format": data_format}
    arguments = [a.astype(dtype) if isinstance(a, np.ndarray) else a for a in arguments]
    expected = function(*arguments, **options)
    out = np.full_like(expected, np.nan)
    tracemalloc.start()
    try:
        function(*arguments, **options, out=out, workspace=WORKSPACE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert_close(out, expected.astype(np.float64), dtype=dtype, terms=1 << 16)
    assert peak <= WORKSPACE + SLACK, f"{peak / WORKSPACE:.1f} workspaces"
