"""The PTX emulator against NumPy in float64, and its detector against planted mistakes.

A mistake is a macro of a sample: the test that plants it names what must report it. Without NVRTC or g++ there is
nothing to run.
"""

import ctypes
import dataclasses
import functools
import math
import os
from pathlib import Path

import emulated
import emulator
import ml_dtypes
import numpy as np
import pytest
from compare import assert_close
from emulated import EmulatedRuntime
from emulator import EmulationError, Module, UnsupportedError, compile_ptx
from emulator.ptx import Address, Instruction, Label, Name, Number, PtxError, Vector, parse

from cuconv.cuda.arrays import compact
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import LaunchPlan

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

SAMPLES = Path(emulator.__file__).parent / "samples"
RUNS = [("plain", 0), ("plain", 1), ("trace", 0), ("trace", 1), ("trace", 2)]
every_run = pytest.mark.parametrize("mode, seed", RUNS, ids=[f"{mode}-{seed}" for mode, seed in RUNS])


@functools.cache
def sample(name: str, *defines: str, arch: str = "sm_80") -> Module:
    """A sample's module; a define is "NAME" or "NAME=value"."""
    macros = {key: value or None for key, _, value in (define.partition("=") for define in defines)}
    return Module(compile_ptx(SAMPLES / f"{name}.cu", arch, macros, options=("--device-int128",)))


def kinds(launch) -> set[str]:
    return {report.kind for report in launch.reports}


WIDE_STRIDE = 2**31 // 39 + 1  # element 39 lies beyond what 32 bits can count


HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"


def kernel(body: str) -> str:
    return (
        HEADER
        + ".visible .entry k(.param .u64 k_param_0)\n{\n.reg .b32 %r<4>;\n.reg .b64 %rd<4>;\n"
        + body
        + "\nret;\n}"
    )


# --- Samples -----------------------------------------------------------------------------------------------------


class ConvTile:
    """Two batches, 45 positions in tiles of 32, three taps, four channels, eight filters."""

    def __init__(self, *defines: str):
        rng = np.random.default_rng(0)
        self.module = sample("conv_tile", *defines)
        self.x = rng.standard_normal((2, 47, 4), np.float32)
        self.w = rng.standard_normal((3, 4, 8), np.float32)
        self.y = np.full((2, 45, 8), np.nan, np.float32)

    def launch(self, **options):
        args = (self.x, self.w, self.y, np.int32(47), np.int32(45))
        return self.module.launch("conv_tile", (4,), (32,), args, uninitialised=(2,), **options)

    def check(self):
        expected = sum(self.x[:, r : r + 45].astype(np.float64) @ self.w[r].astype(np.float64) for r in range(3))
        assert_close(self.y, expected, dtype="float32", terms=12)


class MmaTile:
    """A product [64, 48] [48, 32] whose last rows of `a` count as zero."""

    def __init__(self, *defines: str, element: str = "f16"):
        rng = np.random.default_rng(1)
        dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[element]
        self.module = sample("mma_tile", f"ELEMENT={element}", *defines)
        self.a = rng.standard_normal((64, 48)).astype(dtype)
        self.b = rng.standard_normal((48, 32)).astype(dtype)
        self.y = np.full((64, 32), np.nan, np.float32)

    def launch(self, **options):
        args = (self.a, self.b, self.y, np.int32(32), np.int32(48), np.int32(50))
        return self.module.launch("mma_tile", (2, 2), (64,), args, uninitialised=(2,), **options)

    def check(self):
        a = self.a.astype(np.float64)
        a[50:] = 0
        assert_close(self.y, a @ self.b.astype(np.float64), dtype="float32", terms=48)


@every_run
def test_shared_tile(mode, seed):
    case = ConvTile()
    case.launch(mode=mode, seed=seed)
    case.check()


@every_run
@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_mma_tile(mode, seed, element):
    case = MmaTile(element=element)
    case.launch(mode=mode, seed=seed)
    case.check()


@every_run
def test_mma_other_shapes(mode, seed):
    module, rng = sample("mma_shapes", arch="sm_90"), np.random.default_rng(2)
    a, b = rng.integers(-8, 8, (16, 16)), rng.integers(-8, 8, (16, 8))  # exact in every type
    shapes = [("tf32", "f4", 16, 8), ("tf32_k4", "f4", 16, 4), ("f64", "f8", 8, 4), ("f16_sums", "f2", 16, 8)]
    shapes += [(f"f64_k{depth}", "f8", 16, depth) for depth in (4, 8, 16)]
    for name, dtype, rows, depth in shapes:
        y = np.full((rows, 8), np.nan, dtype)
        args = (a[:rows, :depth].astype(dtype), b[:depth].astype(dtype), y)
        module.launch(f"mma_{name}", (1,), (32,), args, mode=mode, seed=seed, uninitialised=(2,))
        np.testing.assert_array_equal(y, a[:rows, :depth] @ b[:depth], err_msg=name)


# Products that meet in one sum of four, and what tensor cores of sm_80 make of them.
CUT_OFF = {
    "kept": ([1, 2.0**-23], 1 + 2.0**-23),
    "one bit more": ([1, 2.0**-24, 2.0**-24], 1 + 2.0**-23),
    "cut off each": ([1, 2.0**-25, 2.0**-25, 2.0**-25], 1),
    "cut off towards zero": ([-1, -(2.0**-23) - 2.0**-24], -1 - 2.0**-23),
    "not rounded": ([1, 2.0**-23, 2.0**-24], 1 + 2.0**-23),
    "a carry takes a bit": ([1, 1, 2.0**-23], 2),
    "what is cut off is not subtracted": ([1, -(2.0**-25)], 1),
    "another four": ([2.0**-25, 0, 0, 2.0**-24, 1], 1),
    "small ones": ([2.0**-140, 2.0**-149], 2.0**-140 + 2.0**-149),
    "too large": ([2.0**127, 2.0**127], np.inf),
    "opposite infinities": ([np.inf, -np.inf], np.nan),
}


@pytest.mark.parametrize("name", CUT_OFF)
def test_sums_of_products_are_cut_off(name):
    """Fasi et al., PeerJ CS 7:e330: no rounding, one bit more than a float has, four products of TF32 at once."""
    products, expected = CUT_OFF[name]
    a, b, y = np.zeros((16, 8), "f4"), np.zeros((8, 8), "f4"), np.zeros((16, 8), "f4")
    factors = [2.0**-60 if abs(product) < 2.0**-100 else 1.0 for product in products]
    a[3, : len(products)], b[: len(products), 5] = np.divide(products, factors), factors
    b[len(products) :, 5] = 1
    sample("mma_shapes", arch="sm_90").launch("mma_tf32", (1,), (32,), (a, b, y), uninitialised=(2,))
    np.testing.assert_array_equal(y[3, 5], np.float32(expected))


@every_run
@pytest.mark.parametrize("defines", [(), ("ATOMIC",)], ids=["a row a block", "atomic"])
def test_warp_sum(mode, seed, defines):
    x = np.random.default_rng(3).standard_normal((3, 301), np.float32)
    y = np.zeros(3, np.float32)
    sample("warp_sum", *defines).launch("warp_sum", (3,), (128,), (x, y, np.int32(301)), mode=mode, seed=seed)
    rows = x.sum(axis=1, dtype=np.float64)
    expected = [rows.sum(), 0, 0] if defines else rows
    assert_close(y, np.array(expected), dtype="float32", terms=903)


@every_run
@pytest.mark.parametrize("wide", [False, True], ids=["small", "sparse 4 GiB"])
def test_structure_by_value(mode, seed, wide):
    n, stride = 40, WIDE_STRIDE if wide else 5
    x = np.zeros(n * stride, np.uint16)  # mapped, not touched
    x[::stride] = np.arange(n) + 1
    y = np.full(n, -1, np.int32)
    args = ((x, np.float32(3), np.bool_(True), np.int64(stride), y), np.int32(n))
    sample("structure").launch("gather", (2,), (32,), args, mode=mode, seed=seed)
    np.testing.assert_array_equal(y, -3 * (np.arange(n) + 1))


@every_run
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_mbarrier_hand_over(mode, seed, arch):
    x, y = np.arange(160, dtype=np.int32), np.zeros(160, np.int32)
    sample("control", arch=arch).launch("hand_over", (1,), (64,), (x, y, np.int32(5)), mode=mode, seed=seed)
    np.testing.assert_array_equal(y, 2 * x)


@every_run
def test_named_barriers(mode, seed):
    x, y = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    sample("control").launch("halves", (1,), (128,), (x, y), 512, mode, seed)
    np.testing.assert_array_equal(y, x.reshape(2, 64)[:, ::-1].reshape(-1))


@every_run
def test_arrival_without_waiting(mode, seed):
    x, y = np.arange(32, dtype=np.int32), np.zeros(64, np.int32)
    sample("control").launch("arrive", (1,), (64,), (x, y), mode=mode, seed=seed, uninitialised=(1,))
    np.testing.assert_array_equal(y, [*[7] * 32, *x[::-1]])


@every_run
@pytest.mark.parametrize("odd", [None, 5])
def test_agreement(mode, seed, odd):
    x, z, y = np.full(32, 3, np.int32), np.full(32, 2**40, np.int64), np.zeros((32, 4), np.uint32)
    if odd is not None:
        z[odd] += 2**35  # a difference in the upper half
    sample("control").launch("agree", (1,), (32,), (x, z, y), mode=mode, seed=seed)
    np.testing.assert_array_equal(y, [[2**32 - 1, 1, *((2**32 - 1, 1) if odd is None else (0, 0))]] * 32)


@every_run
def test_warp_exchange(mode, seed):
    x, y = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    sample("control").launch("warp_exchange", (1,), (128,), (x, y), mode=mode, seed=seed)
    np.testing.assert_array_equal(y, x // 32 * 32)


@every_run
def test_votes(mode, seed):
    x = np.random.default_rng(4).integers(-3, 4, 32).astype(np.int32)
    y = np.zeros((32, 6), np.uint32)
    sample("control").launch("votes", (1,), (32,), (x, y), mode=mode, seed=seed)
    weights = 1 << np.arange(32, dtype=np.uint64)
    np.testing.assert_array_equal(y[:, 0], np.sum(weights[x > 0]))
    np.testing.assert_array_equal(y[:, 1], 0)
    np.testing.assert_array_equal(y[:, 2], 1)
    np.testing.assert_array_equal(y[:, 3], [np.sum(weights[x == v]) for v in x])
    np.testing.assert_array_equal(y[:, 4], 2**32 - 1)
    np.testing.assert_array_equal(y[:, 5].astype(np.int32), x.sum())


@every_run
def test_shuffles(mode, seed):
    x, y = 100 + np.arange(32, dtype=np.int32), np.zeros((32, 6), np.int32)
    sample("control").launch("shuffles", (1,), (32,), (x, y), mode=mode, seed=seed)
    i, inner = np.arange(32), np.arange(32) % 8
    sources = [np.where(i < 3, i, i - 3), np.where(i > 28, i, i + 3), i ^ 5, i - inner + 1]
    sources += [np.where(inner < 2, i, i - 2), np.where(inner > 5, i, i + 2)]
    np.testing.assert_array_equal(y, 100 + np.stack(sources, axis=1))


@every_run
def test_reductions_and_atomics(mode, seed):
    x = np.random.default_rng(8).integers(-3, 4, 128).astype(np.int32)
    y, totals = np.zeros((128, 3), np.int32), np.zeros(5, np.uint32)
    sample("control").launch("reductions", (1,), (128,), (x, y, totals), mode=mode, seed=seed)
    np.testing.assert_array_equal(y, [[np.count_nonzero(x > 0), 0, 0]] * 128)
    np.testing.assert_array_equal(totals, [6, 128 - 101, 0, 7, 9])


@every_run
def test_constants_and_local_arrays(mode, seed):
    x, y = np.arange(8, dtype=np.float32), np.zeros(50, np.float32)
    sample("tables").launch("tables", (2,), (32,), (x, y, np.int32(50)), mode=mode, seed=seed)
    i = np.arange(50)
    np.testing.assert_array_equal(y, np.array([1, -2, 0.5, 4])[i % 4] * x[7 - i % 8])


@every_run
def test_calls(mode, seed):
    x, y, z = np.linspace(-2, 2, 64), np.zeros(64, np.int32), np.zeros(64)
    sample("functions").launch("calls", (1,), (64,), (x, y, z), mode=mode, seed=seed, uninitialised=(1, 2))

    def weigh(v, depth):
        return v % 32 if depth == 0 else 3 * weigh(v + 1, depth - 1) + depth

    np.testing.assert_array_equal(y, [weigh(i, 3) for i in range(64)])
    np.testing.assert_allclose(z, np.sign(x) * np.abs(x) ** 1.7, rtol=1e-15)  # pow is a function of its own


@every_run
def test_bytes(mode, seed):
    x = np.random.default_rng(9).integers(0, 256, 64).astype(np.uint8)
    y = np.zeros(65, np.int8)[:64]
    sample("functions").launch("bytes", (1,), (64,), (x, y, np.int32(64)), mode=mode, seed=seed, uninitialised=(1,))
    padded = np.pad(x, 1)
    np.testing.assert_array_equal(y.view(np.uint8), np.maximum(np.maximum(padded[:-2], x), padded[2:]))


def test_sums_of_128_bits():
    a, b, c = np.random.default_rng(10).integers(0, 2**64, (3, 32), np.uint64)
    y = np.zeros((32, 2), np.uint64)
    sample("functions").launch("wide_product", (1,), (32,), (a, b, c, y))
    for row, *factors in zip(y, a, b, c):
        p, q, r = map(int, factors)
        assert (int(row[0]) << 64 | int(row[1])) == p * q + r


@pytest.mark.parametrize("index, expected", [(0, 10), (1, 31), (2, 12)])
def test_branch_by_index(index, expected):
    text = kernel(
        f"""ld.param.u64 %rd1, [k_param_0]; mov.u32 %r1, {index}; mov.u32 %r2, 0;
        again: brx.idx %r1, table;
        table: .branchtargets first, second, third;
        first: add.u32 %r2, %r2, 10; bra end;
        second: add.u32 %r2, %r2, 21; mov.u32 %r1, 0; bra again;
        third: add.u32 %r2, %r2, 12;
        end: st.global.u32 [%rd1], %r2;"""
    )
    y = np.zeros(1, np.int32)
    Module(text).launch("k", (1,), (1,), (y,))
    assert y[0] == expected


def test_branch_beyond_its_table():
    y = np.zeros(1, np.int32)
    text = kernel("mov.u32 %r1, 1; brx.idx %r1, table; table: .branchtargets first; first:")
    assert kinds(Module(text).launch("k", (1,), (1,), (y,), check=False)) == {"trap"}


def test_sparse_grid():
    n, stride = 40, WIDE_STRIDE
    x = np.zeros(n * stride, np.uint16)
    x[::stride] = np.arange(n) + 1
    y = np.full(n, -1, np.int32)
    args = ((x, np.float32(3), np.bool_(True), np.int64(stride), y), np.int32(n))
    sample("structure").launch("gather", (2**31 - 1, 3), (32,), args, blocks=[1])
    np.testing.assert_array_equal(y, np.where(np.arange(n) < 32, -1, -3 * (np.arange(n) + 1)))
    for seed in (0, 1):
        with pytest.raises(EmulationError, match="hang at launch: still running after 0.2 s"):
            sample("structure").launch("gather", (2**31 - 1, 3), (32,), args, seed=seed, timeout=0.2)
    with pytest.raises(ValueError, match="`blocks` must lie in the grid of 2"):
        sample("structure").launch("gather", (2,), (32,), args, blocks=[2])


@pytest.mark.parametrize("seed", [0, 1])
def test_blocks_in_any_order_are_all_run(seed):
    x, y = np.ones((40, 128), np.float32), np.zeros(40, np.float32)
    sample("warp_sum").launch("warp_sum", (40,), (128,), (x, y, np.int32(128)), seed=seed)
    np.testing.assert_array_equal(y, 128)
    chosen = np.zeros(40, np.float32)
    sample("warp_sum").launch("warp_sum", (40,), (128,), (x, chosen, np.int32(128)), seed=seed, blocks=[3, 38])
    assert np.flatnonzero(chosen).tolist() == [3, 38]


# --- Numbers -----------------------------------------------------------------------------------------------------


def halves(dtype, seed=5, n=2000) -> np.ndarray:
    """Numbers [3, n] of a 16-bit type, of sizes from subnormal to large.

    The first two are products in the middle between two bfloat16 numbers and a sum that is smaller than a double sees.
    """
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal((3, n)) * np.exp2(rng.integers(-14, 7, (3, n)))).astype(dtype)
    values[:, 0] = 7, 37 / 256, -(2.0**-60)
    values[:, 1] = 9, 29 / 256, 2.0**-60
    return values


def rounded_fma(a, b, c, dtype) -> np.ndarray:
    """a b + c rounded once: exact in long double for these sizes, and odd where that rounds."""
    exact = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
    near = exact.astype(np.float64)
    lost = exact - near
    bits = near.view(np.int64).copy()
    to_odd = (lost != 0) & (bits & 1 == 0)
    bits[to_odd] += np.where((lost > 0) == (near > 0), 1, -1)[to_odd]
    near = bits.view(np.float64)
    if dtype == np.float16:
        return near.astype(np.float16)
    single = near.astype(np.float32)
    # bfloat16 from double through float, made odd in the same way
    lost = near - single.astype(np.float64)
    bits = single.view(np.int32).copy()
    to_odd = (lost != 0) & (bits & 1 == 0)
    bits[to_odd] += np.where((lost > 0) == (single > 0), 1, -1)[to_odd]
    return bits.view(np.float32).astype(dtype)


def test_half_arithmetic_is_correctly_rounded():
    a, b, c = halves(np.float16)
    y = np.zeros((a.size, 8), np.uint16)
    args = (a, b, c, y, np.int32(a.size))
    sample("numbers", arch="sm_90").launch("half_math", (8,), (256,), args)
    scaled = a.astype(np.float32) * np.float32(1.001)
    expected = [rounded_fma(a, b, c, np.float16), a + b, a * b, np.maximum(a, b), scaled.astype(np.float16)]
    expected += [scaled.astype(ml_dtypes.bfloat16), rounded_fma(a, b, c, np.float16), rounded_fma(b, c, a, np.float16)]
    for column, values in enumerate(expected):
        np.testing.assert_array_equal(y[:, column], values.view(np.uint16), err_msg=f"column {column}")


def test_bfloat_arithmetic_is_correctly_rounded():
    a, b, c = halves(ml_dtypes.bfloat16)
    y = np.zeros((a.size, 2), np.uint16)
    sample("numbers", arch="sm_90").launch("bfloat_math", (8,), (256,), (a, b, c, y, np.int32(a.size)))
    np.testing.assert_array_equal(y[:, 0], rounded_fma(a, b, c, ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(
        y[:, 1], (a.astype(np.float32) + b.astype(np.float32)).astype(a.dtype).view(np.uint16)
    )


def test_double_arithmetic():
    a, b = np.random.default_rng(6).standard_normal((2, 500))
    y = np.zeros((500, 4))
    sample("numbers", arch="sm_90").launch("double_math", (2,), (256,), (a, b, y, np.int32(500)))
    exact = np.stack([a.astype(np.longdouble) * b + 1, a / b, np.exp(a), np.sqrt(np.abs(a))], axis=1).astype(np.float64)
    np.testing.assert_array_max_ulp(y, exact, maxulp=1)


def test_float_functions():
    v = np.linspace(-8, 8, 801, dtype=np.float32)
    y = np.full((v.size, 8), np.nan, np.float32)
    sample("numbers", arch="sm_90").launch("float_math", (4,), (256,), (v, y, np.int32(v.size)))
    w = v.astype(np.float64)
    erf = np.vectorize(math.erf)
    expected = [np.exp(w), np.tanh(w), erf(w), 1 / (1 + np.exp(-w)), np.log1p(np.abs(w)), 1 / np.sqrt(np.abs(w) + 1)]
    expected = np.stack([*expected, np.sin(w), np.trunc(w)], axis=1)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=2e-7)


def test_integer_arithmetic():
    rng = np.random.default_rng(7)
    a, b = rng.integers(-(2**31), 2**31, (2, 400)).astype(np.int32)
    a[:2], b[:2] = (-(2**31), 7), (2, -3)
    y = np.zeros((400, 12), np.int64)
    sample("numbers", arch="sm_90").launch("integer_math", (2,), (256,), (a, b, y, np.int32(400)))

    def signed(v, bits):
        return (v + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)

    def row(p, q):
        bits_p, bits_q = p % 2**32, q % 2**32
        quotient = abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1)
        picked = [(bits_q << 32 | bits_p) >> 8 * byte & 255 for byte in (1, 3, 5, 7)]
        permuted = sum(byte << 8 * i for i, byte in enumerate(picked))
        funnel = (bits_q << 32 | bits_p) << 9 >> 32
        arithmetic = [p * q, p * q >> 32, quotient, p - quotient * q, bits_p.bit_count(), 32 - bits_p.bit_length()]
        moved = [signed(funnel, 32), signed(permuted, 32), p >> (q & 31), signed(p << (q & 31), 32)]
        return [*arithmetic, *moved, signed(p, 8), signed(p >> 5, 9)]

    np.testing.assert_array_equal(y, [row(int(p), int(q)) for p, q in zip(a, b)])


NAN, INFINITY = float("nan"), float("inf")
INSTRUCTIONS = [
    ("add.f32", (2.0**-140, 2.0**-140), 2.0**-139),
    ("add.ftz.f32", (2.0**-140, 2.0**-140), 0.0),
    ("add.rm.f32", (1.0, -(2.0**-60)), 1 - 2.0**-24),
    ("add.rz.f32", (1.0, -(2.0**-40)), 1 - 2.0**-24),
    ("add.rn.f32", (1.0, -(2.0**-40)), 1.0),
    ("sub.rp.f32", (1.0, -(2.0**-60)), 1 + 2.0**-23),
    ("mul.rz.f32", (-1 - 2.0**-23, 1 + 2.0**-23), -1 - 2.0**-22),
    ("fma.rn.f32", (1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11), 2.0**-24),
    ("fma.rp.f32", (1 + 2.0**-23, 1 + 2.0**-23, 0.0), 1 + 2.0**-22 + 2.0**-23),
    ("add.sat.f32", (0.7, 0.7), 1.0),
    ("mul.sat.f32", (NAN, 1.0), 0.0),
    ("min.f32", (NAN, 1.0), 1.0),
    ("max.NaN.f32", (NAN, 1.0), NAN),
    ("copysign.f32", (-3.0, 2.0), -2.0),
    ("ex2.approx.f32", (-1.5,), 2**-1.5),
    ("lg2.approx.f32", (8.0,), 3.0),
    ("rcp.approx.ftz.f32", (0.0,), INFINITY),
    ("cvt.rni.f32.f32", (2.5,), 2.0),
    ("cvt.rpi.f32.f32", (2.1,), 3.0),
    ("cvt.rn.f32.s32", (-7,), -7.0),
    ("cvt.rn.f32.u32", (-1,), 2.0**32),
    ("cvt.sat.f32.f32", (-0.3,), 0.0),
    ("cvt.rna.tf32.f32", (1 + 2.0**-11,), 1 + 2.0**-10),
    ("cvt.rzi.s32.f32", (3e9,), 2**31 - 1),
    ("cvt.rzi.s32.f32", (NAN,), 0),
    ("cvt.rni.s32.f32", (-2.5,), -2),
    ("cvt.rmi.s32.f32", (-2.1,), -3),
    ("cvt.s32.s8", (0x1F0,), -16),
    ("cvt.u32.u16", (-1,), 0xFFFF),
    ("cvt.sat.s8.s32", (1000,), 127),
    ("shl.b32", (1, 33), 0),
    ("shr.s32", (-8, 40), -1),
    ("shr.u32", (-8, 28), 15),
    ("bfe.u32", (0xABCD, 4, 8), 0xBC),
    ("bfi.b32", (0xF, 0x1000, 4, 2), 0x1030),
    ("mad.hi.u32", (-1, -1, 5), 3),
    ("mad.lo.s32", (-3, 5, 1), -14),
    ("div.s32", (-7, 2), -3),
    ("rem.s32", (-7, 2), -1),
    ("abs.s32", (-5,), 5),
    ("lop3.b32", (0xC, 0xA, 0x9, 0x96), 0xF),
    ("prmt.b32", (0x80, 0, 0x4448), 0xFF),
    ("shf.r.wrap.b32", (0x10, 0x1, 4), 0x10000001),
    ("brev.b32", (1,), -(2**31)),
    ("add.f16x2", (0x3C003C00, 0x40003C00), 0x42004000),
    ("fma.rn.relu.f16x2", (0x3C003C00, 0xBC003C00, 0), 0x3C00),
    ("max.bf16x2", (0x3F80BF80, 0x40004000), 0x40004000),
    ("cvt.rn.f16x2.f32", (1.0, 2.0), 0x3C004000),
    ("cvt.rz.f32.s32", (2**30 + 127,), float(2**30)),
    ("cvt.rp.f32.s32", (2**30 + 1,), float(2**30 + 128)),
    ("cvt.rm.f32.s32", (-(2**30) - 1,), float(-(2**30) - 128)),
    ("cvt.rz.f16.f32", (1 + 2.0**-10 + 2.0**-11,), 0x3C01),
    ("cvt.rp.f16.f32", (1 + 2.0**-20,), 0x3C01),
    ("cvt.rm.f16.f32", (-(2.0**-30),), 0x8001),
    ("cvt.rz.f16.f32", (70000.0,), 0x7BFF),
    ("cvt.rz.bf16.f32", (-1 - 2.0**-8,), 0xBF80),
    ("cvt.rz.bf16.f32", (INFINITY,), 0x7F80),
    ("cvt.rna.tf32.f32", (1 + 2.0**-11,), 1 + 2.0**-10),
    ("cvt.rn.tf32.f32", (1 + 2.0**-11,), 1.0),
    ("set.lt.u32.s32", (-1, 1), -1),
    ("set.lt.u32.u32", (-1, 1), 0),
    ("set.geu.f32.f32", (NAN, 1.0), 1.0),
    ("set.ne.f32.f32", (NAN, 1.0), 0.0),
    ("set.neu.f32.f32", (NAN, 1.0), 1.0),
    ("set.num.u32.f32", (NAN, 1.0), 0),
    ("bfind.u32", (0x00100000,), 20),
    ("bfind.s32", (-1,), -1),
    ("bfind.shiftamt.u32", (0x00100000,), 11),
    ("shl.b32", (1, 33), 0),
    ("shr.s32", (-8, 40), -1),
    ("shr.s32", (-8, 2), -2),
    ("shr.u32", (-8, 28), 15),
    ("mul.lo.s32", (-3, 2**30), 2**30),
    ("mad.lo.s32", (-3, 5, 7), -8),
    ("mul.hi.u32", (-1, -1), -2),
    ("mad.hi.s32", (-1, 1, 5), 4),
    ("add.cc.u32", (-1, 2), 1),
    ("addc.u32", (10, 20), 31),
    ("addc.u32", (11, 20), 32),  # without .cc the carry stays
    ("sub.cc.u32", (1, 2), -1),
    ("subc.cc.u32", (10, 3), 6),
    ("addc.u32", (10, 20), 30),
    ("mad.lo.cc.u32", (2**16, 2**16, -1), -1),
    ("madc.hi.u32", (2**16, 2**16, 5), 6),
    ("cvt.rn.relu.bf16x2.f32", (-1.0, 2.0), 0x4000),
]


# 64-bit operands and results
WIDE_INSTRUCTIONS = [
    ("fma.rn.f64", (1 + 2.0**-27, 1 + 2.0**-27, -1 - 2.0**-26), 2.0**-54),
    ("rcp.approx.ftz.f64", (3.0,), float.fromhex("0x1.55555p-2")),
    ("rcp.approx.ftz.f64", (2.0**-1060,), INFINITY),
    ("cvt.rz.f32.f64", (-1 - 2.0**-40,), -1.0),
    ("cvt.rm.f32.f64", (-1 - 2.0**-40,), -1 - 2.0**-23),
    ("cvt.rp.f32.f64", (2.0**200,), INFINITY),
    ("cvt.rz.f32.f64", (2.0**200,), (2 - 2.0**-23) * 2.0**127),
    ("cvt.rz.f32.s64", (-(2**40) - 1,), -(2.0**40)),
    ("cvt.rm.f32.s64", (-(2**40) - 1,), -(2.0**40) - 2**17),
    ("cvt.rp.f64.u64", (2**64 - 1,), 2.0**64),
    ("cvt.rz.f64.u64", (2**64 - 1,), 2.0**64 - 2**11),
    ("cvt.rpi.s64.f64", (-2.5,), -2),
    ("testp.subnormal.f64", (2.0**-1060,), 1),
    ("bfind.u64", (2**40 + 5,), 40),
    ("copysign.f64", (-3.0, 2.0), -2.0),
]


def test_wide_instruction_by_instruction():
    def bits(value):
        return int(np.float64(value).view(np.uint64)) if isinstance(value, float) else value % 2**64

    lines = ["ld.param.u64 %rd1, [k_param_0]; .reg .f64 %fd<2>; .reg .f32 %f<2>; .reg .pred %p<2>;"]
    for index, (opcode, operands, _) in enumerate(WIDE_INSTRUCTIONS):
        values = ", ".join(f"{bits(v):#x}" for v in operands)
        if opcode.startswith("testp"):
            lines.append(f"{opcode} %p1, {values}; selp.u64 %rd2, 1, 0, %p1;")
        elif opcode.startswith("bfind"):
            lines.append(f"{opcode} %r1, {values}; cvt.u64.u32 %rd2, %r1;")
        elif ".f32." in opcode:
            lines.append(f"{opcode} %f1, {values}; cvt.f64.f32 %fd1, %f1; mov.b64 %rd2, %fd1;")
        else:
            lines.append(f"{opcode} %rd2, {values};")
        lines.append(f"st.global.b64 [%rd1+{8 * index}], %rd2;")
    y = np.zeros(len(WIDE_INSTRUCTIONS), np.uint64)
    Module(kernel("\n".join(lines))).launch("k", (1,), (1,), (y,))
    for (opcode, operands, expected), got in zip(WIDE_INSTRUCTIONS, y):
        assert int(got) == bits(expected), f"{opcode} {operands} is {got.view(np.float64)} or {int(got):#x}"


def test_instruction_by_instruction():
    def bits(value):
        return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else value % 2**32

    lines = ["ld.param.u64 %rd1, [k_param_0];"]
    for index, (opcode, operands, _) in enumerate(INSTRUCTIONS):
        lines.append(f"{opcode} %r1, {', '.join(f'{bits(v):#x}' for v in operands)};")
        lines.append(f"st.global.b32 [%rd1+{4 * index}], %r1;")
    y = np.zeros(len(INSTRUCTIONS), np.uint32)
    Module(kernel("\n".join(lines))).launch("k", (1,), (1,), (y,))
    for (opcode, operands, expected), got in zip(INSTRUCTIONS, y):
        if isinstance(expected, float):
            np.testing.assert_allclose(got.view(np.float32), np.float32(expected), rtol=2e-7, err_msg=opcode)
            assert np.signbit(got.view(np.float32)) == np.signbit(expected) or np.isnan(expected), opcode
        else:
            assert int(got) == bits(expected), f"{opcode} {operands}"


# --- Planted mistakes --------------------------------------------------------------------------------------------

CONV_BUGS = {
    "BUG_MISSING_BARRIER": "race",
    "BUG_GLOBAL_BOUND": "bounds",
    "BUG_SHARED_BOUND": "bounds",
    "BUG_DIVERGENT_BARRIER": "divergence",
    "BUG_EARLY_EXIT": "divergence",
    "BUG_UNINITIALISED": "uninitialised",
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bug, kind", CONV_BUGS.items(), ids=CONV_BUGS)
def test_planted_in_shared_tile(bug, kind, seed):
    assert kind in kinds(ConvTile(bug).launch(mode="trace", seed=seed, check=False))


@pytest.mark.parametrize("bug", ["BUG_GLOBAL_BOUND", "BUG_SHARED_BOUND", "BUG_EARLY_EXIT"])
def test_bounds_and_barriers_are_checked_without_tracing(bug):
    with pytest.raises(EmulationError, match=r"conv_tile\.cu:\d+"):
        ConvTile(bug).launch()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_wait_count(seed):
    case = MmaTile("BUG_WAIT_COUNT")
    assert "pending" in kinds(case.launch(mode="trace", seed=seed, check=False))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_barrier_between_stages(seed):
    assert "race" in kinds(MmaTile("BUG_MISSING_BARRIER").launch(mode="trace", seed=seed, check=False))


@pytest.mark.parametrize("bug", ["BUG_WAIT_COUNT", "BUG_SWAPPED_OPERAND", "BUG_ZERO_FILL"])
def test_planted_gives_a_wrong_result(bug):
    case = MmaTile(bug)
    case.launch(seed=0)
    with pytest.raises(AssertionError, match="elements"):
        case.check()


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_race_between_blocks(seed):
    x, y = np.ones((3, 128), np.float32), np.zeros(1, np.float32)
    launch = sample("warp_sum", "BUG_CROSS_BLOCK").launch(
        "warp_sum", (3,), (128,), (x, y, np.int32(128)), mode="trace", seed=seed, check=False
    )
    assert kinds(launch) == {"race"}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "kernel, bug, threads, scalars",
    [("warp_exchange", "BUG_MISSING_SYNCWARP", 128, ()), ("hand_over", "BUG_NO_FULL_WAIT", 64, (np.int32(1),))],
    ids=["warp", "mbarrier"],
)
def test_planted_race_without_block_barrier(kernel, bug, threads, scalars, seed):
    args = (np.zeros(128, np.int32), np.zeros(128, np.int32), *scalars)
    launch = sample("control", bug).launch(kernel, (1,), (threads,), args, mode="trace", seed=seed, check=False)
    assert "race" in kinds(launch)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_read_before_arrival(seed):
    args = (np.zeros(32, np.int32), np.zeros(64, np.int32))
    module = sample("control", "BUG_NO_ARRIVAL")
    assert "race" in kinds(module.launch("arrive", (1,), (64,), args, mode="trace", seed=seed, check=False))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bug, kind", [("BUG_MISSING_BARRIER", "race"), ("BUG_BYTE_BOUND", "bounds")])
def test_planted_in_bytes(bug, kind, seed):
    args = (np.zeros(64, np.uint8), np.zeros(63, np.int8), np.int32(63))
    module = sample("functions", bug)
    assert kind in kinds(module.launch("bytes", (1,), (64,), args, mode="trace", seed=seed, check=False))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_write_after_the_second_read(seed):
    for bug, expected in (((), set()), (("BUG_MISSING_BARRIER",), {"race"})):
        args = (np.array([3, 4], np.int32), np.zeros(3, np.int32))
        launch = sample("control", *bug).launch("read_twice", (1,), (64,), args, mode="trace", seed=seed, check=False)
        assert kinds(launch) == expected


@pytest.mark.parametrize("arch, kind", [("sm_80", "hang"), ("sm_90", "deadlock")])
def test_planted_missing_wait_for_an_empty_slot(arch, kind):
    args = (np.zeros(160, np.int32), np.zeros(160, np.int32), np.int32(5))
    module = sample("control", "BUG_NO_EMPTY_WAIT", arch=arch)
    assert kinds(module.launch("hand_over", (1,), (64,), args, timeout=0.2, check=False)) == {kind}


@pytest.mark.parametrize("mode", ["plain", "trace"])
def test_planted_narrow_offset(mode):
    n, stride = 40, WIDE_STRIDE
    x, y = np.zeros(n * stride, np.uint16), np.zeros(n, np.int32)
    args = ((x, np.float32(1), np.bool_(False), np.int64(stride), y), np.int32(n))
    launch = sample("structure", "BUG_NARROW_OFFSET").launch("gather", (2,), (32,), args, mode=mode, check=False)
    assert kinds(launch) == {"bounds"}


def test_read_of_output_that_nobody_wrote():
    x, y = np.zeros((1, 128), np.float32), np.zeros(1, np.float32)
    args = (x, y, np.int32(128))
    with pytest.raises(EmulationError, match="uninitialised at warp_sum.cu"):
        sample("warp_sum").launch("warp_sum", (1,), (128,), args, mode="trace", uninitialised=(0, 1))


def test_write_to_read_only_array():
    y = np.zeros(1, np.float32)
    y.flags.writeable = False
    with pytest.raises(EmulationError, match="argument 1, which is read-only"):
        sample("warp_sum").launch("warp_sum", (1,), (128,), (np.zeros(128, np.float32), y, np.int32(128)))


def test_planted_constant_bound():
    args = (np.zeros(8, np.float32), np.zeros(50, np.float32), np.int32(50))
    with pytest.raises(EmulationError, match="0 bytes past the end of a module variable"):
        sample("tables", "BUG_CONSTANT_BOUND").launch("tables", (2,), (32,), args)


@pytest.mark.parametrize("mode", ["plain", "trace"])
@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize("offset, out", [(0, False), (8, True), (16, True)])
def test_vector_across_the_end(mode, space, offset, out):
    base = {"shared": "s", "global": "%rd1"}[space]
    body = f"""ld.param.u64 %rd1, [k_param_0]; .reg .f32 %f<4>; .shared .align 16 .b8 s[24];
        st.{space}.v4.f32 [{base}+{offset}], {{%f0, %f1, %f2, %f3}};"""
    launch = Module(kernel(body)).launch("k", (1,), (1,), (np.zeros(6, np.float32),), mode=mode, check=False)
    assert kinds(launch) == ({"alignment"} if offset == 8 else {"bounds"} if out else set())


def test_misaligned_vector():
    case = ConvTile()
    case.y = np.zeros(case.y.size + 1, np.float32)[1:].reshape(case.y.shape)
    assert kinds(case.launch(check=False)) == {"alignment"}


def test_watchdog_ends_a_hang():
    with pytest.raises(EmulationError, match=r"hang at control\.cu:\d+: still running after 0.2 s"):
        sample("control").launch("never", (1,), (32,), (np.zeros(1, np.int32),), timeout=0.2)


def test_exited_lanes_are_a_deadlock():
    with pytest.raises(EmulationError, match=r"deadlock at control\.cu:\d+: .* 16 for lanes of their warp"):
        sample("control").launch("partial_shuffle", (1,), (32,), (np.zeros(32, np.int32),))


def test_array_is_unharmed_by_a_write_beyond_it():
    memory = np.full(3 * 32, 7, np.int32)
    inner = memory[32:63]
    launch = sample("control").launch("warp_exchange", (1,), (32,), (memory[:32], inner), check=False)
    assert kinds(launch) == {"bounds"}
    assert np.all(memory[63:] == 7)


# --- Counters ----------------------------------------------------------------------------------------------------


def test_counters_of_a_coalesced_kernel():
    case = ConvTile()
    traffic = case.launch(mode="trace", seed=1).traffic
    stores = [t for t in traffic if t.space == "global" and t.instruction.startswith("st.")]
    assert sum(t.bytes for t in stores) == case.y.nbytes
    staged = next(t for t in traffic if t.space == "shared" and t.instruction.startswith("st."))
    assert staged.bank_conflicts == 0
    source = (SAMPLES / "conv_tile.cu").read_text().splitlines()
    assert all("y +" in source[t.line - 1] for t in stores)


@pytest.mark.parametrize("defines, conflicts", [((), False), (("CONFLICTS",), True)], ids=["padded", "conflicts"])
def test_counted_bank_conflicts(defines, conflicts):
    traffic = MmaTile(*defines).launch(mode="trace").traffic
    loads = [t for t in traffic if t.instruction.startswith("ldmatrix")]
    assert len(loads) >= 2
    assert all((t.bank_conflicts > 0) == conflicts for t in loads)


def test_counted_sectors():
    x, y = np.zeros((1, 128), np.float32), np.zeros(1, np.float32)
    launch = sample("warp_sum").launch("warp_sum", (1,), (128,), (x, y, np.int32(128)), mode="trace")
    load = next(t for t in launch.traffic if t.instruction.startswith("ld.global"))
    assert (load.requests, load.bytes, load.sectors, load.least_sectors) == (4, 512, 16, 16)
    assert launch.touched == 512 + 4


# --- Plans -------------------------------------------------------------------------------------------------------

SCALE = """
using Index = INDEX;
struct Params { const float* x; const float* bias; float* y; Index n; Index extra[EXTRA + 1]; };
extern "C" __global__ void __launch_bounds__(64) scale(const __grid_constant__ Params p) {
  __shared__ float factors[64];
  extern __shared__ float more[];
  factors[threadIdx.x] = 2;
  __syncthreads();
  const Index i = Index(blockIdx.x) * 64 + threadIdx.x;
  if (i < p.n) p.y[i] = p.x[i] * factors[63 - threadIdx.x] + (p.bias ? p.bias[i] : 0.f);
}
"""


@pytest.fixture
def scale(tmp_path, monkeypatch):
    """A runtime that has the kernel above, and its plan for n elements."""
    (tmp_path / "scale.cu").write_text(SCALE)
    monkeypatch.setattr(emulated, "kernel_directory", lambda: tmp_path)
    monkeypatch.setattr(emulated, "module", emulated.module.__wrapped__)

    def plan(n, index=4, **changes):
        constants = (("INDEX", {4: "int", 8: "long long"}[index]), ("EXTRA", 1))
        grid = (-(-n // 64), 1, 1)
        plan = LaunchPlan("scale", constants, (n, 0, 0), grid, (64, 1, 1), index, shared_bytes=256)
        return dataclasses.replace(plan, **changes)

    return plan


@pytest.mark.parametrize("index", [4, 8])
@pytest.mark.parametrize("mode, seed", [("plain", 0), ("trace", 3)])
def test_plan_runs(scale, index, mode, seed):
    runtime = EmulatedRuntime(DEVICES["T4"], mode, seed)
    x = np.arange(100, dtype=np.float32)
    y, z = runtime.empty((100,), np.float32), runtime.empty((100,), np.float32)
    assert np.isnan(y).all()
    runtime.launch(scale(100, index), (x, None, y))
    runtime.launch(scale(100, index), (y, x, z))
    np.testing.assert_array_equal(z, 5 * x)
    assert [plan.grid for plan in runtime.launches] == [(2, 1, 1)] * 2
    stored = [t.bytes for t in runtime.traffic if t.instruction.startswith("st.global")]
    assert stored == ([400] if mode == "trace" else [])


@pytest.mark.parametrize("seed, expected", [(0, [0, 0, 0]), (5, [5, 6, 7])])
def test_every_launch_has_another_order(scale, monkeypatch, seed, expected):
    seeds = []
    launch = Module.launch

    def spy(self, name, grid, block, args, shared_bytes, mode, seed, **options):
        seeds.append(seed)
        return launch(self, name, grid, block, args, shared_bytes, mode, seed, **options)

    monkeypatch.setattr(Module, "launch", spy)
    runtime, x = EmulatedRuntime(seed=seed), np.zeros(64, np.float32)
    for _ in range(3):
        runtime.launch(scale(64), (x, None, x.copy()))
    assert seeds == expected


def test_plan_reads_what_no_launch_has_written(scale):
    runtime = EmulatedRuntime(mode="trace")
    x, y, z = np.zeros(128, np.float32), runtime.empty((128,), np.float32), runtime.empty((128,), np.float32)
    runtime.launch(scale(70), (x, None, y))
    runtime.launch(scale(70), (y, None, z))
    with pytest.raises(EmulationError, match=r"uninitialised at scale\.cu:10: read of argument 0"):
        runtime.launch(scale(71), (y, None, z))
    y[70] = 0
    runtime.launch(scale(71), (y, None, z))


def test_plan_writes_to_frozen_array(scale):
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    y.flags.writeable = False
    with pytest.raises(EmulationError, match="read-only"):
        EmulatedRuntime().launch(scale(64), (x, None, y))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"integers": (64, 0)}, "make 32 bytes, the kernel's structure has 40"),
        ({"index_bytes": 8}, "make 48 bytes, the kernel's structure has 40"),
        ({"block": (96, 1, 1)}, "the kernel takes 64 threads"),
        ({"grid": (1, 65536, 1)}, "the grid .* is beyond"),
        ({"shared_bytes": 512}, "plans 512 bytes of shared memory, has 256"),
        ({"dynamic_shared_bytes": 65536, "shared_bytes": 0}, "65792 bytes of shared memory"),
        ({"constants": (("INDEX", "int"), ("EXTRA", 6))}, "make 40 bytes, the kernel's structure has 56"),
    ],
    ids=["integers", "index", "threads", "grid", "shared", "too much shared", "structure"],
)
def test_plan_does_not_fit(scale, changes, message):
    x = np.zeros(64, np.float32)
    with pytest.raises(AssertionError, match=message):
        EmulatedRuntime(DEVICES["T4"]).launch(scale(64, **changes), (x, None, x.copy()))


def test_addresses_show_misaligned_views():
    runtime = EmulatedRuntime()
    x = np.zeros(65, np.float32)
    assert [runtime.address(x[n:]) % 16 for n in range(5)] == [0, 4, 8, 12, 0]
    assert compact(runtime, x[1:]).base is x
    assert compact(runtime, x[::2]).flags.c_contiguous
    raw = np.zeros(65, np.uint8)[1:].view(np.float32)
    assert compact(runtime, raw).ctypes.data % 4 == 0


def test_last_block_of_a_sparse_array(scale):
    n = 2**30 + 70
    runtime = EmulatedRuntime(blocks=lambda plan: [plan.grid[0] - 1])
    x, y = np.zeros(n, np.float32), runtime.empty((n,), np.float32)
    x[-1] = 3
    runtime.launch(scale(n, 8), (x, None, y))
    assert y[-1] == 6


# --- Parser, table, arguments ------------------------------------------------------------------------------------


def test_parser_keeps_scopes_apart():
    body = "{ .reg .pred p; W: @!p bra W; }\n{ .reg .pred p; W: @p bra W; }"
    items = parse(kernel(body)).kernels["k"].body
    labels = [item.name for item in items if isinstance(item, Label)]
    branches = [item for item in items if isinstance(item, Instruction) and item.opcode == "bra"]
    assert len(set(labels)) == 2
    assert [branch.operands[0].text for branch in branches] == labels
    assert branches[0].guard.negated and not branches[1].guard.negated
    assert branches[0].guard.text != branches[1].guard.text


def test_parser_reads_operands():
    body = "ld.shared.v2.f32 {%r1, _}, [%r2+-8];\nadd.f32 %r3, %r1, 0f3F800000;"
    load, add = parse(kernel(body)).kernels["k"].body[:2]
    assert load.operands == (Vector((Name("%r1"), Name("_"))), Address(Name("%r2"), -8))
    assert add.operands[2] == Number(0x3F800000, 32)
    assert (load.line, add.line) == (8, 9)


@pytest.mark.parametrize(
    "body, message",
    [
        ("frobnicate.u32 %r1, %r2;", r"PTX line 8: unknown opcode. Received: frobnicate.u32"),
        ("add.sparkling.u32 %r1, %r2, %r3;", r"PTX line 8: unknown modifier .sparkling"),
        ("tcgen05.fence::before_thread_sync;", r"PTX line 8: unknown opcode. Received: tcgen05"),
        ("mov.u32 %r1, %nonsense;", r"PTX line 8: an undeclared name"),
        (".frobnicate 3;", r"PTX line 8: unknown directive .frobnicate"),
    ],
)
def test_what_is_not_known_is_an_error(body, message):
    with pytest.raises(PtxError, match=message):
        Module(kernel(body))


def test_unknown_opcode_names_the_source_line():
    source = '\nextern "C" __global__ void k() {\n  asm volatile("griddepcontrol.wait;");\n}\n'
    with pytest.raises(UnsupportedError, match=r"\(kernel\.cu:3\): unknown opcode. Received: griddepcontrol"):
        Module(compile_ptx(source, "sm_90a"))


def test_compile_error_is_the_log():
    with pytest.raises(emulator.CompileError, match="identifier"):
        compile_ptx("__global__ void k() { nonsense; }")


@pytest.mark.parametrize(
    "args, message",
    [
        ((np.zeros(1, np.int32),), "takes 3 arguments. Received: 1"),
        ((np.zeros(1), np.zeros(1), np.int64(1)), "argument 2 of warp_sum has 4 bytes. Received: 8 bytes"),
        ((np.zeros(1), np.zeros(1), 1), "an argument is an array"),
    ],
    ids=["count", "size", "type"],
)
def test_arguments_are_checked(args, message):
    with pytest.raises(TypeError, match=message):
        sample("warp_sum").launch("warp_sum", (1,), (128,), args)


@pytest.mark.parametrize("grid, block", [((1,), (1025,)), ((0,), (32,)), ((1, 65536), (32,))])
def test_launch_size_is_checked(grid, block):
    with pytest.raises(ValueError, match="Received"):
        sample("control").launch("votes", grid, block, (np.zeros(32, np.int32), np.zeros(192, np.int32)))


def test_cache_forgets_what_was_not_used_for_the_longest(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(emulator.cache, "LIMIT_BYTES", 2500)
    monkeypatch.setattr(emulator.cache, "prune", emulator.cache.prune.__wrapped__)
    paths = [emulator.cache.cached(str(n), ".so", lambda: bytes(1000)) for n in range(3)]
    assert all(path.exists() for path in paths)  # too young
    for days, path in zip((2, 3, 4), paths):
        os.utime(path, (0, path.stat().st_mtime - days * 86400))
    emulator.cache.cached("2", ".so", lambda: b"")  # used
    emulator.cache.cached("3", ".so", lambda: b"")
    assert [path.exists() for path in paths] == [True, False, True]


def test_ptx_follows_its_headers(tmp_path):
    (tmp_path / "kernel.cu").write_text('#include "outer.h"\nextern "C" __global__ void k(int* y) { *y = VALUE; }')
    (tmp_path / "outer.h").write_text('#include "inner.h"')
    for value in (3, 4, 3):
        (tmp_path / "inner.h").write_text(f"#define VALUE {value}")
        y = np.zeros(1, np.int32)
        Module(compile_ptx(tmp_path / "kernel.cu")).launch("k", (1,), (1,), (y,))
        assert y[0] == value


def test_structure_may_come_from_ctypes():
    class Arguments(ctypes.Structure):
        _fields_ = (("x", ctypes.c_void_p), ("scale", ctypes.c_float), ("negate", ctypes.c_bool))
        _fields_ += (("stride", ctypes.c_longlong), ("y", ctypes.c_void_p))

    launch = sample("structure").launch("gather", (1,), (32,), (Arguments(), np.int32(0)))
    assert launch.reports == []


def test_cache_is_private_and_reused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x, y = np.arange(32, dtype=np.int32), np.zeros((32, 6), np.uint32)
    source = 'extern "C" __global__ void k(const int* x, int* y) { y[threadIdx.x] = x[threadIdx.x]; }'
    built = []
    for _ in range(2):
        Module(compile_ptx(source)).launch("k", (1,), (32,), (x, y))
        built.append({path: path.stat().st_mtime_ns for path in (tmp_path / "cuconv" / "emulator").iterdir()})
    assert built[0] == built[1] and {path.suffix for path in built[0]} == {".o", ".so", ".ptx", ".translation"}
    directory = tmp_path / "cuconv" / "emulator"
    assert directory.stat().st_mode & 0o077 == 0
    os.chmod(directory, 0o777)
    with pytest.raises(PermissionError, match="writable by no one else"):
        emulator.cache.directory()
