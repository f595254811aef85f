"""The device code of kernels/, run from its real PTX on the CPU."""

import emulator
import numpy as np
import pytest

from cuconv import activations
from cuconv.cuda import runtime
from cuconv.plan.types import ACTIVATION_CODES

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

# One thread, one element; the last block has threads beyond the end.
APPLY = """
#include "activations.cuh"
extern "C" __global__ void apply(const float* __restrict__ x, float* __restrict__ y, int n) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i < n) y[i] = activate<CODE>(x[i]);
}
"""


def module(arch: str, code: int) -> emulator.Module:
    include = f"--include-path={runtime.kernel_directory()}"
    return emulator.Module(emulator.compile_ptx(APPLY, arch, {"CODE": code}, options=(include,)))


@pytest.mark.parametrize("name", ACTIVATION_CODES)
def test_fused_activation_is_the_layer_s(name):
    x = np.concatenate([np.linspace(-30, 30, 1001), [0.0, -0.0, 3, -3, 6, 1e-30, -1e-30, 88, -88, np.nan]])
    x = x.astype(np.float32)
    y = np.full_like(x, np.inf)
    blocks = (len(x) + 127) // 128
    module("sm_80", ACTIVATION_CODES[name]).launch(
        "apply", (blocks,), (128,), (x, y, np.int32(len(x))), mode="trace", seed=1, uninitialised=(1,)
    )
    expected = activations.get(name)(x.astype(np.float64))
    assert np.isnan(y[-1])
    # Four units in the last place of float32 for the value, and as many of the terms that cancel in it.
    allowed = 4 * np.finfo(np.float32).eps * (np.abs(expected) + np.minimum(np.abs(x), 1))
    assert np.all(np.abs(y - expected)[:-1] <= allowed[:-1]), x[:-1][np.argmax((np.abs(y - expected) - allowed)[:-1])]


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_common_header_compiles(arch):
    assert ".visible .entry apply" in emulator.compile_ptx(
        APPLY, arch, {"CODE": 7}, options=(f"--include-path={runtime.kernel_directory()}",)
    )
