"""Each function of kernels/ptx.cuh as a kernel, with numbers to apply it to, its definition, and its golden vectors.

    python tests/ptx_vectors.py [NAME ...]        # makes golden/ptx_<name>.npz anew; needs the emulator

The vectors are the emulator's answers, committed: the emulator is held to them in every test run, and hardware wherever
there is a GPU, which takes CuPy and nothing else. So what the emulator believes of an instruction is what hardware has
confirmed. A function that is added to ptx.cuh gets its entry in WRAPPERS and its vectors.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from cuconv.cuda import cubins, runtime

GOLDEN = Path(__file__).parent / "golden"
MOST = 8192  # items in a file of vectors
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

# One element a thread.
OF_ONE_NUMBER = """
extern "C" __global__ void apply(const {source}* __restrict__ x, {target}* __restrict__ y, int count) {{
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i < count) y[i] = ptx::{name}(x[i]);
}}
"""


@dataclass(frozen=True)
class Wrapper:
    """A function of ptx.cuh.

    Attributes:
        text: of a kernel `apply(inputs.., answers, int count)`, which stands behind ptx.cuh.
        values: makes the inputs; item i of each belongs to answer i. Where sums are rounded by the hardware's own
            rules, numbers whose sums are exact.
        define: the answers that should come out, in their own dtype.
        threads, items: of a block. A function of a warp has 32 and 1.
        arch: the oldest that has the instruction.
    """

    text: str
    values: Callable[[], tuple[np.ndarray, ...]]
    define: Callable[..., np.ndarray]
    threads: int = 256
    items: int = 256
    arch: str = "sm_75"

    def blocks(self, count: int) -> int:
        return -(-count // self.items)


def of_one_number(name: str, source: str, target: str, values: Callable[[], np.ndarray], define) -> Wrapper:
    """A function from one number of C++ type `source` to one of `target`."""
    text = OF_ONE_NUMBER.format(name=name, source=source, target=target)
    return Wrapper(text, lambda: (values(),), define)


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
    "float_from_half": of_one_number(
        "float_from_half", "unsigned short", "float", all_halves, lambda x: x.astype(np.float32)
    ),
    "half_from_float": of_one_number(
        "half_from_float",
        "float",
        "unsigned short",
        lambda: tricky_floats(np.float16),
        lambda x: x.astype(np.float16),
    ),
    "bfloat_from_float": of_one_number(
        "bfloat_from_float",
        "float",
        "unsigned short",
        lambda: tricky_floats(ml_dtypes.bfloat16),
        lambda x: x.astype(ml_dtypes.bfloat16),
    ),
}


# --- Problems and vectors ----------------------------------------------------------------------------------------


def definition(wrapper: Wrapper, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The answers that should come out."""
    with np.errstate(over="ignore", invalid="ignore"):
        return wrapper.define(*inputs)


def sample(inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """At most MOST of the items, from everywhere, the last ones among them."""
    count = len(inputs[0])
    last = min(16, count)
    chosen = np.unique(np.append(np.arange(0, count, -(-count // (MOST - last)) | 1), np.arange(count - last, count)))
    return tuple(each[chosen] for each in inputs)


def path_of(name: str, folder: Path = GOLDEN) -> Path:
    return folder / f"ptx_{name}.npz"


def write(name: str, inputs: Sequence[np.ndarray], answers: np.ndarray, folder: Path = GOLDEN) -> None:
    """Keeps vectors, as the bits they are."""
    arrays = {f"input{i}": bits_of(each) for i, each in enumerate(inputs)}
    np.savez_compressed(path_of(name, folder), **arrays, answers=bits_of(answers))


def load(name: str, wrapper: Wrapper, folder: Path = GOLDEN) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The inputs and answers of a wrapper's vectors, in their own dtypes."""
    given = wrapper.values()
    with np.load(path_of(name, folder), allow_pickle=False) as file:
        inputs = tuple(file[f"input{i}"].view(each.dtype) for i, each in enumerate(given))
        return inputs, file["answers"].view(definition(wrapper, [each[:1] for each in inputs]).dtype)


def bits_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(BITS[array.dtype.itemsize])


def assert_same(inputs: Sequence[np.ndarray], got: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, zeros by their sign too; any NaN for a NaN."""
    assert got.shape == expected.shape
    numbers = ~np.isnan(expected)
    with np.errstate(invalid="ignore"):  # bfloat16's isnan warns of signalling NaNs
        lost = ~np.isnan(got.view(expected.dtype))
    wrong = np.where(numbers, bits_of(got) != bits_of(expected), lost)
    if wrong.any():
        first = tuple(map(int, np.argwhere(wrong)[0]))
        given = " ".join(hex(int(bits_of(each)[first[0]].ravel()[0])) for each in inputs)
        came, should = (int(bits_of(each)[first]) for each in (got, expected))
        raise AssertionError(
            f"{np.count_nonzero(wrong)} of {wrong.size} are wrong, first of item {first[0]}, bits {given}: "
            f"{came:#x} instead of {should:#x}"
        )


# --- Applying ----------------------------------------------------------------------------------------------------


def source_of(wrapper: Wrapper, folder: Path | None = None) -> str:
    """The kernel behind the ptx.cuh of `folder`."""
    return cubins.expanded(folder or runtime.kernel_directory(), "ptx.cuh") + wrapper.text


def emulated(wrapper: Wrapper, inputs: Sequence[np.ndarray], arch: str, folder: Path | None = None) -> np.ndarray:
    """The emulator's answers."""
    import emulator

    expected = definition(wrapper, inputs)
    answers = np.zeros(expected.shape, BITS[expected.itemsize])
    count = len(inputs[0])
    module = emulator.Module(emulator.compile_ptx(source_of(wrapper, folder), arch))
    module.launch("apply", (wrapper.blocks(count),), (wrapper.threads,), (*inputs, answers, np.int32(count)))
    return answers.view(expected.dtype)


def on_gpu(wrapper: Wrapper, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The answers of the GPU at hand, by the compiler that CuPy brings."""
    import cupy

    expected = definition(wrapper, inputs)
    compiler = runtime._Compiler()
    target = compiler.target(runtime.current().limits.capability)
    recipe = compiler.recipe("apply", source_of(wrapper), (), target)
    given = [cupy.asarray(bits_of(each)) for each in inputs]
    answers = cupy.zeros(expected.shape, BITS[expected.itemsize])
    count = len(inputs[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"apply{target.suffix}"
        path.write_bytes(compiler.compile(recipe))
        kernel = cupy.RawModule(path=str(path)).get_function("apply")
        kernel((wrapper.blocks(count),), (wrapper.threads,), (*given, answers, np.int32(count)))
        return cupy.asnumpy(answers).view(expected.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the vectors anew.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(WRAPPERS))
    for name in parser.parse_args().names or WRAPPERS:
        inputs = sample(WRAPPERS[name].values())
        write(name, inputs, emulated(WRAPPERS[name], inputs, WRAPPERS[name].arch))
        print(f"{path_of(name)}: {len(inputs[0])} items, {path_of(name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
