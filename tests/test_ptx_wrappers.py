"""Each function of kernels/ptx.cuh against its definition: in the emulator, and on a GPU where there is one.

The same source and arrays go to both, so what the emulator believes of an instruction is what hardware has confirmed.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import emulator
import ml_dtypes
import numpy as np
import pytest

from cuconv.cuda.runtime import kernel_directory

pytestmark = pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))

THREADS = 256

# One element a thread.
APPLY = """
#include "ptx.cuh"
extern "C" __global__ void apply(const {source}* __restrict__ x, {target}* __restrict__ y, int n) {{
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) y[i] = ptx::{name}(x[i]);
}}
"""


@dataclass(frozen=True)
class Wrapper:
    """A function of one number, as a kernel that applies it to an array, and its definition."""

    source: str  # C++ type of what it takes
    target: str  # and of what it gives
    values: Callable[[], np.ndarray]  # what to apply it to
    define: Callable[[np.ndarray], np.ndarray]  # the numbers that should come out, in their own dtype


BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def all_halves() -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def tricky_floats(dtype) -> np.ndarray:
    """Every number of a 16-bit type, the middles between neighbours, and the floats next to both."""
    patterns = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    ordered = np.sort(patterns[np.isfinite(patterns)]).astype(np.float64)
    top = ordered[-1] + (ordered[-1] - ordered[-2]) / 2  # from here on it is infinity
    middles = np.concatenate([(ordered[1:] + ordered[:-1]) / 2, [top, -top]]).astype(np.float32)
    chosen = np.concatenate([patterns, middles])
    bits = chosen.view(np.uint32)
    near = np.concatenate([chosen, (bits + np.uint32(1)).view(np.float32), (bits - np.uint32(1)).view(np.float32)])
    special = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0x00000001, 0x80000001], np.uint32)
    return np.concatenate([near, special.view(np.float32)])


WRAPPERS = {
    "float_from_half": Wrapper("unsigned short", "float", all_halves, lambda x: x.astype(np.float32)),
    "half_from_float": Wrapper(
        "float", "unsigned short", lambda: tricky_floats(np.float16), lambda x: x.astype(np.float16)
    ),
    "bfloat_from_float": Wrapper(
        "float", "unsigned short", lambda: tricky_floats(ml_dtypes.bfloat16), lambda x: x.astype(ml_dtypes.bfloat16)
    ),
}


@functools.cache
def problem(name: str) -> tuple[np.ndarray, np.ndarray]:
    """What a wrapper is applied to, and what should come out."""
    x = WRAPPERS[name].values()
    with np.errstate(over="ignore", invalid="ignore"):
        return x, WRAPPERS[name].define(x)


def source(name: str, folder: Path | None = None) -> tuple[str, tuple[str, ...]]:
    """The kernel that applies a wrapper of the ptx.cuh in `folder`, and the compiler's options."""
    wrapper = WRAPPERS[name]
    text = APPLY.format(name=name, source=wrapper.source, target=wrapper.target)
    return text, (f"--include-path={folder or kernel_directory()}",)


def assert_same(x: np.ndarray, got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, zeros by their sign too; any NaN for a NaN."""
    bits = BITS[expected.itemsize]
    numbers = ~np.isnan(expected)
    with np.errstate(invalid="ignore"):  # bfloat16's isnan warns of signalling NaNs
        lost = ~np.isnan(got.view(expected.dtype))
    wrong = np.where(numbers, got.view(bits) != expected.view(bits), lost)
    if wrong.any():
        first = int(np.argmax(wrong))
        given, came, should = (int(each.view(BITS[each.itemsize])[first]) for each in (x, got, expected))
        raise AssertionError(
            f"{np.count_nonzero(wrong)} of {wrong.size} are wrong, first of bits {given:#x}: "
            f"{came:#x} instead of {should:#x}"
        )


def run(name: str, arch: str, folder: Path | None = None) -> None:
    x, expected = problem(name)
    text, options = source(name, folder)
    y = np.zeros(x.size, BITS[expected.itemsize])
    grid = (-(-x.size // THREADS),)
    module = emulator.Module(emulator.compile_ptx(text, arch, options=options))
    module.launch("apply", grid, (THREADS,), (x, y, np.int32(x.size)))
    assert_same(x, y, expected)


in_the_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


@in_the_emulator
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_in_the_emulator(name, arch):
    run(name, arch)


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


def test_every_wrapper_has_a_mistake():
    assert {name for name, *_ in MISTAKES.values()} == set(WRAPPERS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRAPPERS)
def test_on_a_gpu(name, tmp_path):
    cupy = pytest.importorskip("cupy")
    try:
        device = cupy.cuda.Device()
        arch = f"sm_{device.compute_capability}"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    x, expected = problem(name)
    text, options = source(name)
    path = tmp_path / "wrapper.cubin"
    path.write_bytes(emulator.compile_cubin(text, arch, options=options))
    kernel = cupy.RawModule(path=str(path)).get_function("apply")
    y = cupy.zeros(x.size, BITS[expected.itemsize])
    given = cupy.asarray(x.view(BITS[x.itemsize]))
    kernel((-(-x.size // THREADS),), (THREADS,), (given, y, np.int32(x.size)))
    assert_same(x, cupy.asnumpy(y), expected)


def test_every_wrapper_is_tested():
    text = (kernel_directory() / "ptx.cuh").read_text()
    names = re.findall(r"__device__[^(){};]*?(\w+)\s*\(", text)
    assert set(names) == set(WRAPPERS)


def test_no_assembly_elsewhere():
    files = [path for path in kernel_directory().iterdir() if path.suffix in (".cu", ".cuh") and path.name != "ptx.cuh"]
    with_assembly = [path.name for path in files if re.search(r"\basm\b", re.sub(r"//.*", "", path.read_text()))]
    assert files and with_assembly == []
