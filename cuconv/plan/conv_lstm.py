"""Plans of the gates of a convolutional LSTM step and of their gradients: one pass, bound by memory."""

from __future__ import annotations

import functools

from cuconv.plan.cost import slowest
from cuconv.plan.types import ACTIVATION_CODES, ELEMENTS, DeviceLimits, LaunchPlan, index_bytes, vector

THREADS = 128  # of a block; as in both kernels
# Operations of one gate's activation, by guess: an exponential and a division are about twenty each, and two
# activations have a slope as well in the gradient. Memory takes longer on every device.
GATE_FLOPS = 40


def plan_gates(
    outer: int,
    inner: int,
    activation: str,
    recurrent_activation: str,
    dtype: str,
    aligned: tuple[int, ...],
    limits: DeviceLimits,
) -> LaunchPlan:
    """The launch of conv_lstm.cu on z [outer, 4, inner].

    Args:
        activation, recurrent_activation: names of :data:`cuconv.plan.types.ACTIVATION_CODES`.
        aligned: of every array, see :func:`cuconv.cuda.arrays.alignment`.
    """
    return _plan("conv_lstm", 7, outer, inner, activation, recurrent_activation, dtype, aligned, limits)


def plan_gates_grad(
    outer: int,
    inner: int,
    activation: str,
    recurrent_activation: str,
    dtype: str,
    aligned: tuple[int, ...],
    limits: DeviceLimits,
) -> LaunchPlan:
    """The launch of conv_lstm_grad.cu; arguments as :func:`plan_gates`."""
    return _plan("conv_lstm_grad", 12, outer, inner, activation, recurrent_activation, dtype, aligned, limits)


@functools.lru_cache(maxsize=4096)
def _plan(
    kernel: str,
    arrays: int,
    outer: int,
    inner: int,
    activation: str,
    recurrent_activation: str,
    dtype: str,
    aligned: tuple[int, ...],
    limits: DeviceLimits,
) -> LaunchPlan:
    """`arrays` counts what is read and written, in arrays of the size of c."""
    element = ELEMENTS[dtype]
    width = vector(element.bytes, inner, *aligned)
    vectors = outer * inner // width
    wide = index_bytes(4 * outer * inner, vectors + THREADS)
    moved = arrays * outer * inner * element.bytes
    flops = arrays * GATE_FLOPS * outer * inner
    rate = limits.fp64_rate if element.sum_bytes > 4 else limits.fp32_rate
    return LaunchPlan(
        kernel=kernel,
        constants=(
            ("ELEMENT", element.c_type),
            ("ACTIVATION", ACTIVATION_CODES[activation]),
            ("RECURRENT", ACTIVATION_CODES[recurrent_activation]),
            ("VECTOR", width),
            ("INDEX", "int" if wide == 4 else "long long"),
        ),
        integers=(inner, vectors),
        grid=(-(-vectors // THREADS), 1, 1),
        block=(THREADS, 1, 1),
        index_bytes=wide,
        registers=64,
        reason=f"one pass, {width * element.bytes}-byte vectors",
        cost=slowest(flops, flops, moved, moved, {"memory": moved / limits.bandwidth, "multiply-adds": flops / rate}),
    )
