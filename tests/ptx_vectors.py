"""Each function of kernels/ptx.cuh as a kernel, with numbers to apply it to, its definition, and its golden vectors.

    python tests/ptx_vectors.py [NAME ...]        # makes golden/ptx_<name>.npz anew; needs the emulator

The vectors are the emulator's answers, committed: the emulator is held to them in every test run, and hardware wherever
there is a GPU, which takes CuPy and nothing else. So what the emulator believes of an instruction is what hardware has
confirmed. A function that is added to ptx.cuh gets its entry in WRAPPERS and its vectors, or stands `besides` another.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cuconv.cuda import cubins, runtime
from cuconv.plan.types import MAP_BYTES, TensorMap

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

# One item a thread, which copies 4, 8 and 16 bytes into three places of 16, a group each, and reads each as soon as it
# is there.
COPIES = """
template <int BYTES>
__device__ void copy(uint4& to, const uint4& from, bool inside) {
  ptx::copy_async<BYTES>(ptx::shared_address(&to), inside ? &from : nullptr, inside);
  ptx::copy_async_commit();
}
extern "C" __global__ void apply(const uint4 (*x)[3], const bool (*inside)[3], uint4 (*y)[3], int count) {
  __shared__ uint4 memory[256][3];
  const int i = blockIdx.x * 256 + threadIdx.x;
  uint4(&to)[3] = memory[threadIdx.x];
  for (uint4& place : to) place = make_uint4(~0u, ~0u, ~0u, ~0u);
  __syncthreads();
  if (i >= count) return;
  copy<4>(to[0], x[i][0], inside[i][0]);
  copy<8>(to[1], x[i][1], inside[i][1]);
  copy<16>(to[2], x[i][2], inside[i][2]);
  ptx::copy_async_wait<2>();
  y[i][0] = to[0];
  ptx::copy_async_wait<1>();
  y[i][1] = to[1];
  ptx::copy_async_wait<0>();
  y[i][2] = to[2];
}
"""

# One item a warp: 32 rows of 8 elements, and which of them each lane gives the address of.
MATRICES = """
extern "C" __global__ void apply(const uint4 (*x)[32], const int (*rows)[32], uint4 (*y)[32], int count) {{
  __shared__ uint4 memory[32];
  const int lane = threadIdx.x;
  memory[lane] = x[blockIdx.x][lane];
  __syncthreads();
  unsigned r[4];
  ptx::{name}(r, ptx::shared_address(&memory[rows[blockIdx.x][lane]]));
  y[blockIdx.x][lane] = make_uint4(r[0], r[1], r[2], r[3]);
}}
"""

# One product a warp, d = c + a b: a [16,K], b transposed [8,K], c and d [16,8], where a row of a or of b has 8 words.
# The fragments are those of the PTX manual; with 16-bit elements a word has two neighbours in K.
PRODUCT = """
extern "C" __global__ void apply(const unsigned (*a)[16][8], const unsigned (*b)[8][8], const float (*c)[16][8],
                                 float (*d)[16][8], int count) {{
  const int item = blockIdx.x, row = threadIdx.x / 4, column = threadIdx.x % 4;
  const unsigned left[4] = {{a[item][row][column], a[item][row + 8][column],
                            a[item][row][column + 4], a[item][row + 8][column + 4]}};
  const unsigned right[2] = {{b[item][row][column], b[item][row][column + 4]}};
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[item][row + i / 2 * 8][column * 2 + i % 2];
  ptx::{name}(sum, left, right);
  for (int i = 0; i < 4; ++i) d[item][row + i / 2 * 8][column * 2 + i % 2] = sum[i];
}}
"""

# The same of doubles: a [16,8], b transposed [8,8].
PRODUCT_OF_DOUBLES = """
extern "C" __global__ void apply(const double (*a)[16][8], const double (*b)[8][8], const double (*c)[16][8],
                                 double (*d)[16][8], int count) {{
  const int item = blockIdx.x, row = threadIdx.x / 4, column = threadIdx.x % 4;
  const double left[4] = {{a[item][row][column], a[item][row + 8][column],
                          a[item][row][column + 4], a[item][row + 8][column + 4]}};
  const double right[2] = {{b[item][row][column], b[item][row][column + 4]}};
  double sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[item][row + i / 2 * 8][column * 2 + i % 2];
  ptx::{name}(sum, left, right);
  for (int i = 0; i < 4; ++i) d[item][row + i / 2 * 8][column * 2 + i % 2] = sum[i];
}}
"""

# One item a block, in two rounds: at the coordinates of each, boxes of 3, 4 and 5 axes of the one tensor.
BOXES = """
struct alignas(64) Map {
  unsigned char bytes[128];
};
extern "C" __global__ void apply(const __grid_constant__ Map three, const __grid_constant__ Map four,
                                 const __grid_constant__ Map five, const void*, const int (*at)[2][5],
                                 uint4 (*y)[2][3][8], int count) {
  __shared__ alignas(128) uint4 memory[3][8];
  __shared__ alignas(8) unsigned long long barrier;
  const unsigned here = ptx::shared_address(&barrier);
  if (threadIdx.x == 0) {
    ptx::barrier_init(here, 2);
    ptx::barriers_visible();
  }
  __syncthreads();
  for (int round = 0; round < 2; ++round) {
    const int* const c = at[blockIdx.x][round];
    if (threadIdx.x == 0) {
      ptx::barrier_expect(here, sizeof memory);
      ptx::load_box(ptx::shared_address(memory[0]), &three, here, {c[0], c[1], c[2]});
      ptx::load_box(ptx::shared_address(memory[1]), &four, here, {c[0], c[1], c[2], c[3]});
      ptx::load_box(ptx::shared_address(memory[2]), &five, here, {c[0], c[1], c[2], c[3], c[4]});
    }
    if (threadIdx.x == 1) ptx::barrier_arrive(here);
    ptx::barrier_wait(here, round);
    if (threadIdx.x < 24) y[blockIdx.x][round][threadIdx.x / 8][threadIdx.x % 8] = memory[0][threadIdx.x];
    ptx::fence_async();
    __syncthreads();
  }
}
"""

# One item a block, d = c + 2 a b, and again with the first N columns for every other N. Rows have 128 bytes, so columns
# of b lie in four pieces of 64; the 16-byte chunks of a row change places. Of TF32, columns of b are rows in memory.
PRODUCT_OF_A_WARPGROUP = """
__device__ unsigned place(int row, int chunk) {{ return row * 8 + (chunk ^ row % 8); }}
template <int N>
__device__ void product(float (*d)[256], unsigned long long a, unsigned long long second, unsigned long long b) {{
  const int thread = threadIdx.x, lane = thread % 32;
  float sums[2][N / 2] = {{}};
  ptx::products_fence();
  ptx::{name}<N>(sums[0], a, b);
  ptx::products_commit();
  ptx::{name}<N{across}>(sums[1], second, b);
  ptx::products_commit();
  ptx::products_wait<1>(sums);
  for (int j = 0; j < N / 2; ++j)
    d[thread / 32 * 16 + lane / 4 + j / 2 % 2 * 8][j / 4 * 8 + lane % 4 * 2 + j % 2] += sums[0][j];
  ptx::products_wait<0>(sums);
  for (int j = 0; j < N / 2; ++j)
    d[thread / 32 * 16 + lane / 4 + j / 2 % 2 * 8][j / 4 * 8 + lane % 4 * 2 + j % 2] += sums[1][j];
}}
extern "C" __global__ void __launch_bounds__(128, 1)
    apply(const uint4 (*a)[64][2], const uint4 (*b){b}, const float (*c)[64][256], float (*d)[64][256], int) {{
  __shared__ alignas(1024) uint4 left[64 * 8], turned[16 * 8], right{right};
  const int item = blockIdx.x, thread = threadIdx.x;
  left[place(thread / 2, thread % 2)] = a[item][thread / 2][thread % 2];
  for (int i = thread; i < 64 * 16; i += 128) {turn};
  for (int i = thread; i < 512; i += 128) {fill};
  for (int i = thread; i < 64 * 256; i += 128) d[item][i / 256][i % 256] = c[item][i / 256][i % 256];
  ptx::fence_async();
  __syncthreads();
  constexpr unsigned long long layout = 1ull << 62 | 1024ull / 16 << 32;
  const unsigned long long from_a = layout | ptx::shared_address(left) >> 4;
  const unsigned long long second = layout | ptx::shared_address({second}) >> 4;
  const unsigned long long from_b = layout | {pitch} << 16 | ptx::shared_address(right) >> 4;
  product<256>(d[item], from_a, second, from_b);
  product<192>(d[item], from_a, second, from_b);
  product<160>(d[item], from_a, second, from_b);
  product<128>(d[item], from_a, second, from_b);
  product<96>(d[item], from_a, second, from_b);
  product<64>(d[item], from_a, second, from_b);
  product<32>(d[item], from_a, second, from_b);
}}
"""

OF_16_BITS = {
    "b": "[16][32]",
    "right": "[4][16 * 8]",
    "fill": "right[i % 32 / 8][place(i / 32, i % 8)] = b[item][i / 32][i % 32]",
    "pitch": "sizeof right[0] / 16",
    "turn": (
        "reinterpret_cast<unsigned short*>(turned)[place(i % 16, i / 128) * 8 + i / 16 % 8] =\n"
        "        reinterpret_cast<const unsigned short*>(a[item][i / 16])[i % 16]"
    ),
    "second": "turned",
    "across": ", true",
}
OF_TF32 = {
    "b": "[256][2]",
    "right": "[256 * 8]",
    "fill": "right[place(i / 2, i % 2)] = b[item][i / 2][i % 2]",
    "pitch": "1ull",
    "turn": "turned[i % 128] = uint4{}",
    "second": "left",
    "across": "",
}

# One element a thread, after two warpgroups have taken what the third has given.
REGISTERS = """
extern "C" __global__ void __launch_bounds__(384, 1) apply(const unsigned* x, unsigned* y, int count) {
  if (threadIdx.x < 128)
    ptx::give_registers<40>();
  else
    ptx::take_registers<232>();
  const int i = blockIdx.x * 384 + threadIdx.x;
  if (i < count) y[i] = x[i];
}
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
        arch: the oldest that it is for.
        besides: the other functions of ptx.cuh that `text` applies and that have no entry of their own.
        maps: tensor maps of the first input, which come before it, each given its shape.
    """

    text: str
    values: Callable[[], tuple[np.ndarray, ...]]
    define: Callable[..., np.ndarray]
    threads: int = 256
    items: int = 256
    arch: str = "sm_75"
    besides: tuple[str, ...] = ()
    maps: tuple[Callable[[tuple[int, ...]], TensorMap], ...] = ()

    @property
    def capability(self) -> int:
        """The oldest that it is for, such as 90."""
        return int(self.arch[3:].rstrip("a"))

    def runs_on(self, capability: int) -> bool:
        """Whether GPUs of that have it."""
        return capability == self.capability if self.arch.endswith("a") else capability >= self.capability

    def blocks(self, count: int) -> int:
        return -(-count // self.items)


def of_one_number(
    name: str, source: str, target: str, values: Callable[[], np.ndarray], define, arch: str = "sm_75"
) -> Wrapper:
    """A function from one number of C++ type `source` to one of `target`."""
    text = OF_ONE_NUMBER.format(name=name, source=source, target=target)
    return Wrapper(text, lambda: (values(),), define, arch=arch)


def all_numbers(dtype) -> np.ndarray:
    """Of a 16-bit type."""
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def tricky_floats(numbers: np.ndarray) -> np.ndarray:
    """Every number of a type, the middles between neighbours, and the floats next to both."""
    patterns = numbers.astype(np.float32)
    ordered = np.sort(patterns[np.isfinite(patterns)]).astype(np.float64)
    top = ordered[-1] + (ordered[-1] - ordered[-2]) / 2  # from here on it is infinity
    middles = np.concatenate([(ordered[1:] + ordered[:-1]) / 2, [top, -top]]).astype(np.float32)
    chosen = np.concatenate([patterns, middles])
    bits = chosen.view(np.uint32)
    near = np.concatenate([chosen, (bits + np.uint32(1)).view(np.float32), (bits - np.uint32(1)).view(np.float32)])
    special = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0x00000001, 0x80000001], np.uint32)
    return np.concatenate([near, special.view(np.float32)])


def things_to_copy() -> tuple[np.ndarray, ...]:
    """Three times 16 bytes, and whether each lies inside: all combinations, and a block that is not full."""
    random = np.random.default_rng(1)
    inside = np.arange(300)[:, None] >> np.arange(3) & 1 == 1
    return random.integers(1, 1 << 32, (300, 3, 4), np.uint32), inside


def copied(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The first 4, 8 and 16 bytes, zeros where they are not inside; ones where nothing is copied to."""
    y = np.full_like(x, 0xFFFFFFFF)
    for place, words in enumerate((1, 2, 4)):
        y[:, place, :words] = np.where(inside[:, place, None], x[:, place, :words], 0)
    return y


def matrices(name: str, transposed: bool) -> Wrapper:
    """A function that loads four 8 x 8 matrices: their rows in order, in disorder, and some of them twice."""

    def values() -> tuple[np.ndarray, ...]:
        random = np.random.default_rng(2)
        rows = np.stack([np.arange(32), random.permutation(32), *random.integers(0, 32, (6, 32))]).astype(np.int32)
        return random.integers(0, 1 << 16, (8, 32, 8), np.uint16), rows

    def define(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        loaded = np.take_along_axis(x, rows[..., None], 1).reshape(-1, 4, 8, 8)
        if transposed:
            loaded = loaded.swapaxes(2, 3)
        return loaded.reshape(-1, 4, 32, 2).swapaxes(1, 2)  # [item, lane, register, half]: a lane has two neighbours

    return Wrapper(MATRICES.format(name=name), values, define, threads=32, items=1, arch="sm_80")


def product(name: str, dtype, depth: int, bits: int, scales: tuple[int, int]) -> Wrapper:
    """A function that multiplies 16 x `depth` by `depth` x 8 elements of `bits` significant bits.

    The elements of an item are integers times one power of two, with exponents from `scales`. Products have 17 bits at
    most, so sums of 16 and c have 22. Infinities and NaN are in the last item.
    """

    sums = np.float64 if dtype is np.float64 else np.float32

    def values() -> tuple[np.ndarray, ...]:
        random = np.random.default_rng(3)
        wide, narrow = (1 << bits) - 1, (1 << min(bits, 17 - bits)) - 1
        most = np.where(np.arange(16) % 2, wide, narrow)[:, None, None]
        least, greatest = scales
        scale = random.integers(least, greatest + 1, (2, 16, 1, 1))
        scale[:, 0], scale[:, 1] = least, greatest
        a = np.ldexp(random.integers(-most, most + 1, (16, 16, depth)), scale[0])
        b = np.ldexp(random.integers(-most[::-1], most[::-1] + 1, (16, 8, depth)), scale[1])
        c = np.ldexp(random.integers(-(1 << 20), 1 << 20, (16, 16, 8)), scale[0] + scale[1])
        a[-1, 2, 3], a[-1, 11, 4], b[-1, 5, 6], c[-1, 7, 1] = np.inf, np.nan, -np.inf, np.inf
        return a.astype(dtype), b.astype(dtype), c.astype(sums)

    def define(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return (c + np.einsum("imk,ink->imn", a.astype(np.float64), b.astype(np.float64))).astype(sums)

    text = PRODUCT_OF_DOUBLES if dtype is np.float64 else PRODUCT
    return Wrapper(text.format(name=name), values, define, threads=32, items=1, arch="sm_80")


BOX = {3: (8, 4, 2), 4: (8, 2, 2, 2), 5: (8, 2, 2, 2, 1)}  # elements of 16 bits, axes innermost first


def map_of(axes: int) -> Callable[[tuple[int, ...]], TensorMap]:
    """Of a tensor of five axes, the outermost ones as one."""

    def make(shape: tuple[int, ...]) -> TensorMap:
        sizes = (*shape[::-1][: axes - 1], int(np.prod(shape[: 6 - axes])))
        strides = tuple(2 * int(np.prod(sizes[:axis])) for axis in range(1, axes))
        return TensorMap(0, "float16", sizes, strides, BOX[axes], (1,) * axes, 0)

    return make


def things_to_box() -> tuple[np.ndarray, ...]:
    """A tensor, and coordinates inside, at its edges and outside."""
    random = np.random.default_rng(4)
    x = random.integers(1, 1 << 16, (8, 3, 4, 3, 24), np.uint16)
    at = np.stack([random.integers(-3, size + 1, (8, 2)) for size in x.shape[::-1]], -1)
    return x, at.astype(np.int32)


def boxes(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Of every item and round, for 3, 4 and 5 axes; zeros outside."""
    y = np.zeros((*at.shape[:2], 3, 64), np.uint16)
    for place, axes in enumerate((3, 4, 5)):
        tensor = x.reshape(-1, *x.shape[6 - axes :])
        for item, round_ in np.ndindex(at.shape[:2]):
            chosen = [c + np.arange(n) for c, n in zip(at[item, round_, :axes][::-1], BOX[axes][::-1])]
            inside = [(c >= 0) & (c < size) for c, size in zip(chosen, tensor.shape)]
            box = tensor[np.ix_(*(np.clip(c, 0, size - 1) for c, size in zip(chosen, tensor.shape)))]
            y[item, round_, place] = np.where(np.all(np.meshgrid(*inside, indexing="ij"), 0), box, 0).ravel()
    return y


def product_of_a_warpgroup(name: str, dtype) -> Wrapper:
    """A function that multiplies 64 x 16 by 16 x N elements, of TF32 half as many: small integers, sums are exact."""
    tf32 = dtype == np.float32

    def values() -> tuple[np.ndarray, ...]:
        random = np.random.default_rng(5)
        shapes = ((1, 64, 8), (1, 256, 8), (1, 64, 256)) if tf32 else ((1, 64, 16), (1, 16, 256), (1, 64, 256))
        return tuple(random.integers(-5, 6, shape).astype(kind) for shape, kind in zip(shapes, (dtype, dtype, "f4")))

    def define(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        sums = a.astype(np.float64) @ (b.swapaxes(1, 2) if tf32 else b).astype(np.float64)
        times = 2 * np.repeat(np.arange(7.0, 0, -1), (32, 32, 32, 32, 32, 32, 64))
        return (c + times * sums).astype(np.float32)

    besides = ("products_fence", "products_commit", "products_wait") if dtype == np.float16 else ()
    text = PRODUCT_OF_A_WARPGROUP.format(name=name, **(OF_TF32 if tf32 else OF_16_BITS))
    return Wrapper(text, values, define, threads=128, items=1, arch="sm_90a", besides=besides)


def things_to_keep() -> tuple[np.ndarray, ...]:
    """A block of them, and some."""
    return (np.random.default_rng(6).integers(0, 1 << 32, 500, np.uint32),)


WRAPPERS = {
    "float_from_half": of_one_number(
        "float_from_half", "unsigned short", "float", lambda: all_numbers(np.float16), lambda x: x.astype(np.float32)
    ),
    "half_from_float": of_one_number(
        "half_from_float",
        "float",
        "unsigned short",
        lambda: tricky_floats(all_numbers(np.float16)),
        lambda x: x.astype(np.float16),
    ),
    "bfloat_from_float": of_one_number(
        "bfloat_from_float",
        "float",
        "unsigned short",
        lambda: tricky_floats(all_numbers(ml_dtypes.bfloat16)),
        lambda x: x.astype(ml_dtypes.bfloat16),
    ),
    "copy_async": Wrapper(
        COPIES,
        things_to_copy,
        copied,
        arch="sm_80",
        besides=("shared_address", "copy_async_commit", "copy_async_wait"),
    ),
    "load_matrices": matrices("load_matrices", transposed=False),
    "load_matrices_transposed": matrices("load_matrices_transposed", transposed=True),
    "multiply_half": product("multiply_half", np.float16, 16, 11, (-24, 4)),
    "multiply_bfloat": product("multiply_bfloat", ml_dtypes.bfloat16, 16, 8, (-50, 50)),
    "multiply_tf32": product("multiply_tf32", np.float32, 8, 11, (-50, 50)),
    "multiply_double": product("multiply_double", np.float64, 8, 11, (-400, 400)),
    "load_box": Wrapper(
        BOXES,
        things_to_box,
        boxes,
        threads=32,
        items=1,
        arch="sm_90",
        besides=("barrier_init", "barriers_visible", "barrier_expect", "barrier_arrive", "barrier_wait", "fence_async"),
        maps=(map_of(3), map_of(4), map_of(5)),
    ),
    "take_registers": Wrapper(
        REGISTERS, things_to_keep, np.copy, threads=384, items=384, arch="sm_90a", besides=("give_registers",)
    ),
    "multiply_tiles_half": product_of_a_warpgroup("multiply_tiles_half", np.float16),
    "multiply_tiles_bfloat": product_of_a_warpgroup("multiply_tiles_bfloat", ml_dtypes.bfloat16),
    "multiply_tiles_tf32": product_of_a_warpgroup("multiply_tiles_tf32", np.float32),
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
    """The emulator's answers; what copies and multiplies on its own is under its detector."""
    import emulator

    expected = definition(wrapper, inputs)
    answers = np.zeros(expected.shape, BITS[expected.itemsize])
    count = len(inputs[0])
    module = emulator.Module(emulator.compile_ptx(source_of(wrapper, folder), arch))
    maps = [emulated_map(each(inputs[0].shape), inputs[0]) for each in wrapper.maps]
    arguments = (*maps, *inputs, answers, np.int32(count))
    mode = "trace" if wrapper.capability >= 90 else "plain"
    module.launch("apply", (wrapper.blocks(count),), (wrapper.threads,), arguments, mode=mode)
    return answers.view(expected.dtype)


def emulated_map(given: TensorMap, array: np.ndarray) -> Any:
    """A tensor map for the emulator."""
    import emulated
    import emulator

    return emulator.Structure((array,), lambda addresses: emulated.encoded(given, *addresses))


def map_on_gpu(given: TensorMap, array: Any) -> Any:
    """A tensor map by value."""
    return np.frombuffer(runtime.tensor_map(given, array.data.ptr), f"V{MAP_BYTES}")


def on_gpu(wrapper: Wrapper, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The answers of the GPU at hand, by the compiler that CuPy brings."""
    import cupy

    expected = definition(wrapper, inputs)
    compiler = runtime._Compiler()
    target = compiler.target(runtime.current().limits.capability)
    if wrapper.arch.endswith("a"):
        target = runtime.Target(wrapper.arch)
    recipe = compiler.recipe("apply", source_of(wrapper), (), target)
    given = [cupy.asarray(bits_of(each)) for each in inputs]
    answers = cupy.zeros(expected.shape, BITS[expected.itemsize])
    count = len(inputs[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"apply{target.suffix}"
        path.write_bytes(compiler.compile(recipe))
        kernel = cupy.RawModule(path=str(path)).get_function("apply")
        maps = [map_on_gpu(each(inputs[0].shape), given[0]) for each in wrapper.maps]
        kernel((wrapper.blocks(count),), (wrapper.threads,), (*maps, *given, answers, np.int32(count)))
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
