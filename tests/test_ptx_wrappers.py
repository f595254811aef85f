"""Each function of kernels/ptx.cuh against its definition and its golden vectors, in the emulator and on a GPU."""

import functools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import emulator
import ml_dtypes
import numpy as np
import ptx_vectors
import pytest
from ptx_vectors import WRAPPERS, Wrapper, assert_same, definition

from cuconv.cuda import runtime
from cuconv.cuda.runtime import Target, kernel_directory, probe
from cuconv.plan.devices import DEVICES

in_the_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


@functools.cache
def problem(name):
    """What a wrapper is applied to, and what should come out."""
    inputs = WRAPPERS[name].values()
    return inputs, definition(WRAPPERS[name], inputs)


def run(name, arch, folder=None):
    inputs, expected = problem(name)
    assert_same(inputs, ptx_vectors.emulated(WRAPPERS[name], inputs, arch, folder), expected)


# --- In the emulator ---------------------------------------------------------------------------------------------


def architectures(wrapper):
    return [arch for arch in ("sm_75", "sm_80", "sm_90") if int(arch[3:]) >= int(wrapper.arch[3:])]


EACH = [pytest.param(name, arch, id=f"{name}-{arch}") for name in WRAPPERS for arch in architectures(WRAPPERS[name])]


@in_the_emulator
@pytest.mark.parametrize("name, arch", EACH)
def test_the_emulator_and_the_definition(name, arch):
    run(name, arch)


@in_the_emulator
@pytest.mark.parametrize("name, arch", EACH)
def test_the_emulator_and_its_golden_vectors(name, arch):
    inputs, answers = ptx_vectors.load(name, WRAPPERS[name])
    assert_same(inputs, ptx_vectors.emulated(WRAPPERS[name], inputs, arch), answers)


# A mistake in each wrapper, and where it shows.
MISTAKES = {
    "a wrong operand": ("float_from_half", "sm_80", '"=f"(f) : "h"(h)', '"=f"(f) : "h"((unsigned short)(h ^ 1))'),
    "half towards zero": ("half_from_float", "sm_80", "cvt.rn.f16.f32", "cvt.rz.f16.f32"),
    "bfloat towards zero": ("bfloat_from_float", "sm_80", "cvt.rn.bf16.f32", "cvt.rz.bf16.f32"),
    "ties upwards": ("bfloat_from_float", "sm_75", "0x7fff + (bits >> 16 & 1)", "0x8000"),
    "no NaN": ("bfloat_from_float", "sm_75", "if (f != f) return 0x7fff;", ""),
}


@in_the_emulator
@pytest.mark.parametrize("name, arch, right, wrong", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_caught(name, arch, right, wrong, tmp_path):
    text = (kernel_directory() / "ptx.cuh").read_text()
    assert text.count(right) == 1
    (tmp_path / "ptx.cuh").write_text(text.replace(right, wrong))
    with pytest.raises(AssertionError, match="are wrong"):
        run(name, arch, tmp_path)
    inputs, answers = ptx_vectors.load(name, WRAPPERS[name])
    with pytest.raises(AssertionError, match="are wrong"):
        assert_same(inputs, ptx_vectors.emulated(WRAPPERS[name], inputs, arch, tmp_path), answers)


def test_every_wrapper_has_a_mistake():
    assert {name for name, *_ in MISTAKES.values()} == set(WRAPPERS)


# --- On a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    if not probe().usable:
        pytest.skip(probe().reason)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_gpu_and_the_golden_vectors(name, gpu):
    inputs, answers = ptx_vectors.load(name, WRAPPERS[name])
    assert_same(inputs, ptx_vectors.on_gpu(WRAPPERS[name], inputs), answers)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_gpu_and_the_definition(name, gpu):
    inputs, expected = problem(name)
    assert_same(inputs, ptx_vectors.on_gpu(WRAPPERS[name], inputs), expected)


class GpuOfTheEmulator:
    """What ptx_vectors.on_gpu uses of CuPy, with NumPy's memory and the emulator's kernels."""

    asarray, zeros, asnumpy = staticmethod(np.asarray), staticmethod(np.zeros), staticmethod(np.asarray)

    class RawModule:
        def __init__(self, path):
            self.module = emulator.Module(Path(path).read_text())

        def get_function(self, name):
            return lambda grid, block, arguments: self.module.launch(name, grid, block, arguments)


class EmulatorsCompiler:
    def target(self, capability):
        return Target("compute_{}{}".format(*capability))

    def recipe(self, kernel, source, constants, target):
        return source, target.arch.replace("compute", "sm")

    def compile(self, recipe):
        return emulator.compile_ptx(*recipe).encode()


@in_the_emulator
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_way_to_the_gpu(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", GpuOfTheEmulator)
    monkeypatch.setattr(runtime, "_Compiler", EmulatorsCompiler)
    monkeypatch.setattr(runtime, "current", lambda: SimpleNamespace(limits=DEVICES["H200"]))
    inputs, answers = ptx_vectors.load(name, WRAPPERS[name])
    assert_same(inputs, ptx_vectors.on_gpu(WRAPPERS[name], inputs), answers)


# --- The vectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRAPPERS)
def test_vectors_are_small_and_from_everywhere(name):
    inputs, answers = ptx_vectors.load(name, WRAPPERS[name])
    assert_same(inputs, answers, definition(WRAPPERS[name], inputs))
    assert ptx_vectors.path_of(name).stat().st_size < 64 << 10
    assert 1 <= len(inputs[0]) == len(answers) <= ptx_vectors.MOST
    assert_same(inputs, inputs[0], ptx_vectors.sample(WRAPPERS[name].values())[0])
    values = answers.astype(np.float64)
    assert np.isnan(values).any() and np.isinf(values).any() and (values == 0).any() and (values < 0).any()
    least = 2.0**-14 if answers.dtype == np.float16 else 2.0**-126
    assert ((values != 0) & (np.abs(values) < least)).any() == (name != "float_from_half"), "subnormal numbers"


def test_one_bit_is_seen():
    inputs, answers = ptx_vectors.load("half_from_float", WRAPPERS["half_from_float"])
    numbers = np.flatnonzero(~np.isnan(answers))
    for at in (numbers[0], numbers[len(numbers) // 2], numbers[-1]):
        other = answers.copy()
        other.view(np.uint16)[at] ^= 1
        with pytest.raises(AssertionError, match="1 of .* are wrong"):
            assert_same(inputs, other, answers)
    zero = int(np.flatnonzero(answers == 0)[0])
    other = answers.copy()
    other[zero] = -other[zero]
    with pytest.raises(AssertionError, match="are wrong"):
        assert_same(inputs, other, answers)
    lost = int(np.flatnonzero(np.isnan(answers))[0])
    other = answers.copy()
    other.view(np.uint16)[lost] ^= 1  # another NaN is a NaN
    assert_same(inputs, other, answers)
    other[lost] = 1
    with pytest.raises(AssertionError, match="are wrong"):
        assert_same(inputs, other, answers)


# --- What comes next: a function of a warp -----------------------------------------------------------------------

HEADER = """
namespace ptx {
__device__ __forceinline__ void multiply_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
}  // namespace ptx
"""

# One product a warp: a thread's words of a, b and d stand where the instruction has them.
PRODUCT = Wrapper(
    """
extern "C" __global__ void apply(const unsigned* a, const unsigned* b, float* d, int count) {
  const int lane = threadIdx.x, row = lane / 4, pair = lane % 4;
  const unsigned* const x = a + blockIdx.x * 128;
  const unsigned* const w = b + blockIdx.x * 64;
  const unsigned left[4] = {x[row * 8 + pair], x[row * 8 + pair + 64], x[row * 8 + pair + 4], x[row * 8 + pair + 68]};
  const unsigned right[2] = {w[row * 8 + pair], w[row * 8 + pair + 4]};
  float sum[4] = {};
  ptx::multiply_16x8x16(sum, left, right);
  float* const y = d + blockIdx.x * 128;
  for (int i = 0; i < 4; ++i) y[(row + i / 2 * 8) * 8 + pair * 2 + i % 2] = sum[i];
}
""",
    lambda: tuple(
        np.random.default_rng(3).integers(-8, 9, (5, rows, 16)).astype(ml_dtypes.bfloat16) for rows in (16, 8)
    ),
    lambda a, b: a.astype(np.float32) @ b.astype(np.float32).transpose(0, 2, 1),
    threads=32,
    items=1,
    arch="sm_80",
)


@in_the_emulator
def test_a_function_of_a_warp_fits_in(tmp_path):
    (tmp_path / "ptx.cuh").write_text(HEADER)
    inputs = ptx_vectors.sample(PRODUCT.values())
    answers = ptx_vectors.emulated(PRODUCT, inputs, PRODUCT.arch, tmp_path)
    assert_same(inputs, answers, definition(PRODUCT, inputs))
    ptx_vectors.write("product", inputs, answers, tmp_path)
    again = ptx_vectors.load("product", PRODUCT, tmp_path)
    assert_same(inputs, again[1], answers)
    assert all(np.array_equal(mine, kept) for mine, kept in zip(inputs, again[0], strict=True))
    other = answers.copy()
    other[4, 15, 7] += 1
    with pytest.raises(AssertionError, match="1 of 640 are wrong, first of item 4"):
        assert_same(inputs, other, answers)


# --- The list ----------------------------------------------------------------------------------------------------


def test_every_wrapper_is_tested_and_has_its_vectors():
    text = (kernel_directory() / "ptx.cuh").read_text()
    names = re.findall(r"__device__[^(){};]*?(\w+)\s*\(", text)
    assert set(names) == set(WRAPPERS)
    assert {path.name for path in ptx_vectors.GOLDEN.glob("ptx_*")} == {f"ptx_{name}.npz" for name in names}


def test_no_assembly_elsewhere():
    files = [path for path in kernel_directory().iterdir() if path.suffix in (".cu", ".cuh") and path.name != "ptx.cuh"]
    with_assembly = [path.name for path in files if re.search(r"\basm\b", re.sub(r"//.*", "", path.read_text()))]
    assert files and with_assembly == []
