"""separable.cu: its real PTX on the CPU against the oracle and against the two kernels it replaces, its traffic, its
machine code, its plans.

Cases are chosen around what differs: how many channels an access has, how outputs are grouped along the innermost axis
(stride, dilation, ends of rows), the multiplier, and the edges of tiles in positions, filters and middle channels.
"""

import dataclasses
import itertools
import math
from contextlib import contextmanager
from unittest import mock

import disassembly
import emulator
import numpy as np
import oracle
import pytest
from compare import assert_close, dtype_of, eps, poisoned
from emulated import EmulatedRuntime
from planted import planted
from strategies import uniform

from cuconv import activations, ops
from cuconv.cuda.arrays import alignment
from cuconv.cuda.runtime import kernel_directory
from cuconv.cuda.separable import separable_conv
from cuconv.geometry import depthwise_shape, join_shape
from cuconv.plan import separable
from cuconv.plan.devices import DEVICES
from cuconv.plan.separable import TILES, plan_fused, plan_separable
from cuconv.plan.types import ACTIVATION_CODES, PlanError

emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

LIMITS = DEVICES["H200"]
ALIGNED = (0, 0, 0, 0)
SMALL = (32, 64, 16, 32, 128)  # the least work for the emulator


@contextmanager
def only(tile=SMALL, shares=separable.SHARES, staged=separable.STAGED):
    """Plans find no other tile than this one, and no other shares of threads."""
    names = {"TILES": (tile,), "SHARES": shares, "STAGED": staged}
    plan_separable.cache_clear()
    try:
        with mock.patch.multiple(separable, **names):
            yield
    finally:
        plan_separable.cache_clear()


class Case:
    """A separable convolution with random arrays, and its output on a runtime."""

    def __init__(self, x_shape, w_shape, filters, dtype="float16", seed=0, **options):
        self.dtype, self.options, self.filters = dtype, options, filters
        self.shape = depthwise_shape(x_shape, w_shape, **options)
        self.y_shape = join_shape(self.shape.batch, self.shape.out_size, filters, self.shape.data_format)
        shapes = x_shape, w_shape, (*(1,) * self.shape.rank, self.shape.filters, filters), (filters,)
        rng = np.random.default_rng(seed)
        self.x, self.taps, self.w, self.bias = (uniform(rng, shape, dtype) for shape in shapes)

    def run(self, runtime, activation="linear", bias=True, out=None):
        y = poisoned(self.y_shape, self.dtype) if out is None else out
        aligned = alignment(runtime, self.x, self.taps, self.w, y)
        plan = plan_fused(self.shape, self.filters, self.dtype, activation, aligned, runtime.limits)
        runtime.launch(plan, (self.x, self.taps, self.w, self.bias if bias else None, y))
        return y

    def check(self, runtime, activation="linear", bias=True, **how):
        function = activation if activation in oracle.ACTIVATIONS else activations.get(activation)
        arrays = self.x, self.taps, self.w
        expected = oracle.separable_conv(*arrays, self.bias if bias else None, activation=function, **self.options)
        # What lies between the convolutions is rounded.
        slack = eps(self.dtype) / 2 * oracle.separable_conv(*map(np.abs, arrays), **self.options)
        actual = self.run(runtime, activation, bias, **how)
        try:
            assert_close(actual, expected, dtype=self.dtype, terms=self.taps.size, slack=slack, what="separable")
        except AssertionError as error:
            error.add_note(f"x {self.x.shape}, taps {self.taps.shape}, {self.options}; {runtime.launches[-1]}")
            raise
        return actual


def trace(seed=1, limits=LIMITS):
    return EmulatedRuntime(limits, mode="trace", seed=seed)


def constants_of(runtime):
    return dict(runtime.launches[-1].constants)


# --- Every kind of problem ---------------------------------------------------------------------------------------

# x, taps, filters, options: each with something of its own.
PROBLEMS = (
    ((2, 45, 16), (5, 16, 1), 24, {"padding": "same"}),
    ((2, 41, 72), (3, 72, 1), 40, {"padding": "causal"}),  # two steps, the second with one vector
    ((1, 50, 8), (4, 8, 2), 72, {"strides": 2, "padding": "same"}),  # two tiles of filters
    ((2, 37, 3), (3, 3, 1), 5, {"dilation_rate": 3, "padding": "causal"}),  # element by element, in phase order
    ((1, 44, 6), (3, 6, 3), 9, {"dilation_rate": 4, "strides": 2}),  # phases and a step; a multiplier of 3
    ((2, 29, 4), (1, 4, 8), 8, {"strides": 3}),  # one tap; channels of z that share one of x
    ((2, 9, 13, 8), (3, 3, 8, 1), 16, {"padding": "same"}),
    ((1, 11, 9, 10), (3, 2, 10, 1), 16, {"padding": ((1, 0), (2, 1)), "strides": (2, 1), "dilation_rate": (1, 2)}),
    ((2, 4, 5, 6, 4), (2, 3, 2, 4, 2), 8, {"padding": "same", "strides": (1, 2, 1)}),
    ((1, 30, 8), (13, 8, 1), 8, {"padding": "same"}),  # taps several times, and what is left over
    ((1, 12, 8), (3, 8, 1), 8, {"dilation_rate": 20, "padding": "same"}),  # more phases than outputs
)


@emulated
@pytest.mark.parametrize("x, taps, filters, options", PROBLEMS)
def test_problem(x, taps, filters, options):
    for staged in (False, True):
        with only(staged=(staged, False)):
            runtime = trace()
            Case(x, taps, filters, "bfloat16", **options).check(runtime)
            print(staged, runtime.launches[-1].reason)
