"""The device code that kernels share, run from its real PTX on the CPU."""

import emulator
import numpy as np
import pytest

from cuconv import activations
from cuconv.cuda import runtime
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import ACTIVATION_CODES

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

# Every activation and its slope at every x; one thread an element, the last block has threads beyond the end.
APPLY = """
#include "activations.cuh"
template <int ACT>
__device__ __forceinline__ void apply_from(const REAL* x, REAL* y, REAL* slopes, int i, int n) {
  y[ACT * n + i] = activate<ACT>(x[i]);
  slopes[ACT * n + i] = slope<ACT>(x[i]);
  if constexpr (ACT < ACT_LAST) apply_from<ACT + 1>(x, y, slopes, i, n);
}
extern "C" __global__ void apply(const REAL* __restrict__ x, REAL* y, REAL* slopes, int n) {
  const int i = blockIdx.x * 128 + threadIdx.x;
  if (i < n) apply_from<0>(x, y, slopes, i, n);
}
"""

EDGES = [0.0, -0.0, 0.5, -0.5, 1, -1, 20, 3, -3, 6, 1e-30, -1e-30, 1e-3, -1e-3, 88, -88, 700, -700]
SPECIAL = [np.inf, -np.inf, np.nan]


def compiled(arch: str, real: str) -> str:
    include = f"--include-path={runtime.kernel_directory()}"
    return emulator.compile_ptx(APPLY, arch, {"REAL": real}, options=(include,))


@pytest.fixture(scope="module", params=["float32", "float64"])
def applied(request):
    """x, and for every code the values and the slopes there."""
    x = np.concatenate([np.linspace(-30, 30, 1001), EDGES, SPECIAL]).astype(request.param)
    y, slopes = (np.full((len(ACTIVATION_CODES), len(x)), -7, x.dtype) for _ in range(2))
    module = emulator.Module(compiled("sm_80", {"float32": "float", "float64": "double"}[request.param]))
    arguments = (x, y, slopes, np.int32(len(x)))
    module.launch("apply", (-(-len(x) // 128),), (128,), arguments, mode="trace", seed=1, uninitialised=(1, 2))
    return x, y, slopes


def assert_near(actual, expected, x, units, terms=1.0):
    """Within `units` in the last place of the value and of `terms` that cancel in it; infinities and NaN in place."""
    with np.errstate(invalid="ignore", over="ignore"):
        expected = expected.astype(actual.dtype).astype(np.float64)
        off = np.abs(actual.astype(np.float64) - expected)
        allowed = units * np.finfo(actual.dtype).eps * (np.abs(expected) + terms)
        wrong = ~((off <= allowed) | (actual == expected) | (np.isnan(actual) & np.isnan(expected)))
    assert not wrong.any(), f"at {x[wrong]}: {actual[wrong]} instead of {expected[wrong]}"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # activations of infinity
@pytest.mark.parametrize("name", ACTIVATION_CODES)
def test_fused_activation_is_the_layer_s(name, applied):
    x, y, _ = applied
    y, wide = y[ACTIVATION_CODES[name]], x.astype(np.float64)
    assert np.isnan(y[-1])
    expected = activations.get(name)(wide)
    if name == "hard_silu":
        expected[-2] = 0  # the limit at -infinity, where the layer has infinity * 0
    assert_near(y, expected, wide, 4, np.minimum(np.abs(wide), 1))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ACTIVATION_CODES)
def test_slope_of_a_fused_activation_is_the_layer_s(name, applied):
    """At kinks too: relu at 0, relu6 at 0 and 6, hard_sigmoid and hard_silu at -3 and 3."""
    x, _, slopes = applied
    wide = x.astype(np.float64)
    expected = activations.get(name).gradient(wide, np.ones_like(wide))
    ours = slopes[ACTIVATION_CODES[name]]
    # The layer's slope of silu takes x times a difference of numbers near 1.
    assert_near(ours, expected, wide, 4, np.maximum(np.abs(wide), 1) if name == "silu" else 1)


@pytest.mark.parametrize("arch", sorted({limits.arch for limits in DEVICES.values()}))
def test_common_header_compiles(arch):
    assert ".visible .entry apply" in compiled(arch, "float")
