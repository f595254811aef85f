"""Each function of kernels/ptx.cuh against its definition and its golden vectors, in the emulator and on a GPU."""

import functools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import emulator
import numpy as np
import ptx_vectors
import pytest
from ptx_vectors import WRAPPERS, assert_same, definition

from cuconv.cuda import runtime
from cuconv.cuda.runtime import Target, kernel_directory, probe
from cuconv.plan.devices import DEVICES

in_the_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

NUMBERS = [name for name in WRAPPERS if "_from_" in name]


def functions(text):
    """The names of the functions that begin in a text."""
    return re.findall(r"__device__[^(){};]*?(\w+)\s*\(", text)


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
    if wrapper.arch.endswith("a"):
        return [wrapper.arch]
    return [arch for arch in ("sm_75", "sm_80", "sm_90") if wrapper.runs_on(int(arch[3:]))]


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


# Operands of a matrix instruction: the sums, a, and a with two of its quarters exchanged.
FOUR, LEFT, EXCHANGED = "{%0, %1, %2, %3}", "{%4, %5, %6, %7}", "{%4, %6, %5, %7}"

# A mistake in each function, and where it shows.
MISTAKES = {
    "a wrong operand": ("float_from_half", "sm_80", '"=f"(f) : "h"(h)', '"=f"(f) : "h"((unsigned short)(h ^ 1))'),
    "half towards zero": ("half_from_float", "sm_80", "cvt.rn.f16.f32", "cvt.rz.f16.f32"),
    "bfloat towards zero": ("bfloat_from_float", "sm_80", "cvt.rn.bf16.f32", "cvt.rz.bf16.f32"),
    "ties upwards": ("bfloat_from_float", "sm_75", "0x7fff + (bits >> 16 & 1)", "0x8000"),
    "no NaN": ("bfloat_from_float", "sm_75", "if (f != f) return 0x7fff;", ""),
    "the neighbour's address": (
        "copy_async",
        "sm_80",
        "__cvta_generic_to_shared(p))",
        "__cvta_generic_to_shared(p)) ^ 16",
    ),
    "half a copy": ("copy_async", "sm_80", "inside ? BYTES : 0", "inside ? BYTES / 2 : 0"),
    "nothing copied": ("copy_async", "sm_80", "inside ? BYTES : 0", "0"),
    "a group left open": ("copy_async", "sm_80", "cp.async.commit_group;", ""),
    "a group too few": ("copy_async", "sm_80", '"n"(N)', '"n"(N + 1)'),
    "two matrices exchanged": ("load_matrices", "sm_80", f"x4.shared.b16 {FOUR}", "x4.shared.b16 {%0, %2, %1, %3}"),
    "transposed": ("load_matrices", "sm_80", "x4.shared", "x4.trans.shared"),
    "not transposed": ("load_matrices_transposed", "sm_80", "x4.trans.shared", "x4.shared"),
    "half as bfloat": ("multiply_half", "sm_80", "f32.f16.f16.f32", "f32.bf16.bf16.f32"),
    "quarters of half exchanged": (
        "multiply_half",
        "sm_80",
        f".f16.f32 {FOUR}, {LEFT}",
        f".f16.f32 {FOUR}, {EXCHANGED}",
    ),
    "bfloat as half": ("multiply_bfloat", "sm_80", "f32.bf16.bf16.f32", "f32.f16.f16.f32"),
    "quarters of bfloat exchanged": (
        "multiply_bfloat",
        "sm_80",
        f"bf16.f32 {FOUR}, {LEFT}",
        f"bf16.f32 {FOUR}, {EXCHANGED}",
    ),
    "quarters of TF32 exchanged": (
        "multiply_tf32",
        "sm_80",
        f"tf32.f32 {FOUR}, {LEFT}",
        f"tf32.f32 {FOUR}, {EXCHANGED}",
    ),
    "quarters of double exchanged": (
        "multiply_double",
        "sm_90",
        f"f64.f64 {FOUR}, {LEFT}",
        f"f64.f64 {FOUR}, {EXCHANGED}",
    ),
    "halves of b exchanged": ("multiply_double", "sm_80", '"d"(b[i / 2])', '"d"(b[i % 2])'),
    "an arrival too few": ("load_box", "sm_90", '"r"(barrier), "r"(arrivals)', '"r"(barrier), "r"(arrivals + 1)'),
    "a barrier that the copy engine does not see": ("load_box", "sm_90", "fence.mbarrier_init.release.cluster;", ""),
    "more bytes than come": ("load_box", "sm_90", '"r"(barrier), "r"(bytes)', '"r"(barrier), "r"(bytes + 16)'),
    "no arrival": ("load_box", "sm_90", "mbarrier.arrive.shared::cta.b64 _, [%0];", ""),
    "the other phase": ("load_box", "sm_90", '"r"(barrier), "r"(parity)', '"r"(barrier), "r"(parity ^ 1)'),
    "coordinates exchanged": ("load_box", "sm_90", "{%3, %4, %5, %6}", "{%3, %5, %4, %6}"),
    "what engines do not see": ("multiply_tiles_half", "sm_90a", "fence.proxy.async.shared::cta;", ""),
    "registers that nobody gave": (
        "take_registers",
        "sm_90a",
        'setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)',
        'setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS + 8)',
    ),
    "registers that nobody has": ("take_registers", "sm_90a", "setmaxnreg.dec", "setmaxnreg.inc"),
    "sums that a product may not see": ("multiply_tiles_half", "sm_90a", "wgmma.fence.sync.aligned;", ""),
    "products in no group": ("multiply_tiles_half", "sm_90a", "wgmma.commit_group.sync.aligned;", ""),
    "a group of products too few": ("multiply_tiles_half", "sm_90a", '"n"(PENDING)', '"n"(PENDING + 1)'),
    "columns of a as rows": ("multiply_tiles_half", "sm_90a", '"f16", "k16", ", 1, 1"', '"f16", "k16", ", 0, 1"'),
    "tiles of half as bfloat": (
        "multiply_tiles_half",
        "sm_90a",
        'TILES("f16", "k16", ", 0',
        'TILES("bf16", "k16", ", 0',
    ),
    "tiles of bfloat as half": (
        "multiply_tiles_bfloat",
        "sm_90a",
        'TILES("bf16", "k16", ", 0',
        'TILES("f16", "k16", ", 0',
    ),
    "the next tiles of TF32": (
        "multiply_tiles_tf32",
        "sm_90a",
        'CUCONV_MULTIPLY_TILES("tf32"',
        'b += 2;\n  CUCONV_MULTIPLY_TILES("tf32"',
    ),
}


# Products of a warpgroup of every size take the longest to compile.
MARKED = [
    pytest.param(*each, id=key, marks=[pytest.mark.exhaustive] if "tiles" in each[0] else [])
    for key, each in MISTAKES.items()
]


@in_the_emulator
@pytest.mark.parametrize("name, arch, right, wrong", MARKED)
def test_a_mistake_is_caught(name, arch, right, wrong, tmp_path):
    text = (kernel_directory() / "ptx.cuh").read_text()
    assert text.count(right) == 1
    (tmp_path / "ptx.cuh").write_text(text.replace(right, wrong))
    with pytest.raises((AssertionError, emulator.EmulationError), match="are wrong|reports"):
        run(name, arch, tmp_path)
    inputs, answers = ptx_vectors.load(name, WRAPPERS[name])
    with pytest.raises((AssertionError, emulator.EmulationError), match="are wrong|reports"):
        assert_same(inputs, ptx_vectors.emulated(WRAPPERS[name], inputs, arch, tmp_path), answers)


def test_every_function_has_a_mistake():
    text = (kernel_directory() / "ptx.cuh").read_text()
    mistaken = {functions(text[: text.index(right)])[-1] for _, _, right, _ in MISTAKES.values()}
    assert mistaken == set(functions(text))


@in_the_emulator
def test_what_lies_outside_is_not_read(tmp_path):
    text = (kernel_directory() / "ptx.cuh").read_text()
    assert text.count("inside ? BYTES : 0") == 1
    (tmp_path / "ptx.cuh").write_text(text.replace("inside ? BYTES : 0", "BYTES"))
    with pytest.raises(emulator.EmulationError, match="bounds"):
        run("copy_async", "sm_80", tmp_path)


# --- On a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(name):
    if not probe().usable:
        pytest.skip(probe().reason)
    major, minor = runtime.current().limits.capability
    if not WRAPPERS[name].runs_on(major * 10 + minor):
        pytest.skip(f"{name} needs {WRAPPERS[name].arch}. Received: a GPU of {major}.{minor}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_gpu_and_the_definition(name, gpu):
    inputs, expected = problem(name)
    assert_same(inputs, ptx_vectors.on_gpu(WRAPPERS[name], inputs), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_gpu_and_the_golden_vectors(name, gpu):
    inputs, answers = ptx_vectors.load(name, WRAPPERS[name])
    assert_same(inputs, ptx_vectors.on_gpu(WRAPPERS[name], inputs), answers)


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
    monkeypatch.setattr(ptx_vectors, "map_on_gpu", ptx_vectors.emulated_map)
    inputs, answers = ptx_vectors.load(name, WRAPPERS[name])
    assert_same(inputs, ptx_vectors.on_gpu(WRAPPERS[name], inputs), answers)


# --- The vectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRAPPERS)
def test_vectors_are_small_and_as_defined(name):
    inputs, answers = ptx_vectors.load(name, WRAPPERS[name])
    assert_same(inputs, answers, definition(WRAPPERS[name], inputs))
    assert ptx_vectors.path_of(name).stat().st_size < 64 << 10
    assert 1 <= len(inputs[0]) == len(answers) <= ptx_vectors.MOST
    for mine, kept in zip(ptx_vectors.sample(WRAPPERS[name].values()), inputs, strict=True):
        assert_same(inputs, kept, mine)


@pytest.mark.parametrize("name", NUMBERS)
def test_vectors_of_numbers_are_from_everywhere(name):
    _, answers = ptx_vectors.load(name, WRAPPERS[name])
    with np.errstate(invalid="ignore"):  # signalling NaNs
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


def test_one_bit_of_a_matrix_is_seen():
    inputs, answers = ptx_vectors.load("multiply_bfloat", WRAPPERS["multiply_bfloat"])
    other = answers.copy()
    other.view(np.uint32)[4, 15, 7] ^= 1
    with pytest.raises(AssertionError, match="1 of 2048 are wrong, first of item 4"):
        assert_same(inputs, other, answers)


def test_vectors_are_kept_as_they_are(tmp_path):
    wrapper = WRAPPERS["multiply_bfloat"]
    inputs = wrapper.values()
    answers = definition(wrapper, inputs)
    ptx_vectors.write("multiply_bfloat", inputs, answers, tmp_path)
    kept = ptx_vectors.load("multiply_bfloat", wrapper, tmp_path)
    for mine, its in zip((*inputs, answers), (*kept[0], kept[1]), strict=True):
        assert mine.dtype == its.dtype and np.array_equal(ptx_vectors.bits_of(mine), ptx_vectors.bits_of(its))


# --- The list ----------------------------------------------------------------------------------------------------


def test_every_wrapper_is_tested_and_has_its_vectors():
    text = (kernel_directory() / "ptx.cuh").read_text()
    tested = [(each, wrapper) for name, wrapper in WRAPPERS.items() for each in (name, *wrapper.besides)]
    assert sorted(functions(text)) == sorted(each for each, _ in tested)
    assert all(re.search(rf"ptx::{each}\b", wrapper.text) for each, wrapper in tested)
    assert {path.name for path in ptx_vectors.GOLDEN.glob("ptx_*")} == {f"ptx_{name}.npz" for name in WRAPPERS}


def test_no_assembly_elsewhere():
    files = [path for path in kernel_directory().iterdir() if path.suffix in (".cu", ".cuh") and path.name != "ptx.cuh"]
    with_assembly = [path.name for path in files if re.search(r"\basm\b", re.sub(r"//.*", "", path.read_text()))]
    assert files and with_assembly == []
