// mma.cuh -- what the matrix products on tensor cores share: tiles, swizzled shared memory, fragments, the product of a
// warp. For mma.sync, sm_80 and newer.
//
// A block computes BM x BN sums over K in steps of BK; a warp has WM x WN of them. The operands of a step lie in shared
// memory as xs [BM][BK] and ws [BK][BN], rows without padding; the 16-byte chunks of a row change places with the row
// (`swizzle`), so that neither 8 rows of one chunk, which is what a fragment reads, nor 8 chunks of a row, which is what
// a copy writes, meet in a bank.
//
// PRECISION of float elements: 1 rounds both operands to TF32; 3 splits each into two of those, and keeps three of the
// four products. Elements of 16 and 64 bits are multiplied as they are.

#pragma once

#include "fragments.cuh"
#include "positions.cuh"

// Set by the plan, besides those of positions.cuh: BM BN BK WM WN PRECISION
constexpr int WARPS_M = BM / WM, WARPS_N = BN / WN, THREADS = WARPS_M * WARPS_N * 32;
static_assert(BM % WM == 0 && BN % WN == 0 && WM % 16 == 0 && WN % 16 == 0, "tiles must divide into 16 x 16");

constexpr int CHUNK = 16 / sizeof(E);             // elements
constexpr int DEPTH = sizeof(E) == 2 ? 16 : 8;    // k of one mma
constexpr int TM = WM / 16, TN = WN / 8;          // mma of a warp
static_assert(BK % DEPTH == 0 && BK % CHUNK == 0, "a step must be whole mma and whole chunks");
static_assert(BK * sizeof(E) == 64 || BK * sizeof(E) == 128, "rows of xs have 64 or 128 bytes");
static_assert(BN * sizeof(E) >= 64, "rows of ws have at least 64 bytes");

// Bytes from the start of an array of rows of ROW_BYTES to a byte of a row.
// What is read element by element are 2 chunks of 4 rows; all else is 1 chunk of 8 rows.
template <int ROW_BYTES, bool WORDS = false>
__device__ __forceinline__ int swizzle(int row, int byte) {
  const int turn = WORDS ? (row & 3) << 1 : ROW_BYTES >= 128 ? row & 7 : row >> 1 & 3;
  return row * ROW_BYTES + (byte ^ turn << 4);
}
constexpr int X_ROW = BK * sizeof(E), W_ROW = BN * sizeof(E);
constexpr int X_BYTES = BM * X_ROW, W_BYTES = BK * W_ROW, STAGE_BYTES = X_BYTES + W_BYTES;
// No instruction loads fragments of 8 bytes, or transposes those of 4: they are read element by element.
constexpr bool X_WORDS = sizeof(E) == 8, W_WORDS = sizeof(E) >= 4;
static_assert((!X_WORDS || X_ROW >= 128) && (!W_WORDS || W_ROW >= 128), "words need rows of at least 128 bytes");

// The part of the tile that a warp has, and a lane's place in its fragments.
struct Warp {
  int m, n, lane;  // first row and column

  __device__ __forceinline__ explicit Warp(int thread) {
    lane = thread % 32;
    m = thread / 32 / WARPS_N * WM;
    n = thread / 32 % WARPS_N * WN;
  }
  // Of the sums acc[i / 2][j / 2][i % 2 * 2 + j % 2].
  __device__ __forceinline__ int row(int i) const { return m + i * 8 + lane / 4; }
  __device__ __forceinline__ int column(int j) const { return n + j / 2 * 8 + lane % 4 * 2 + j % 2; }
};

// One vector on its way to shared memory.
template <int N, bool COPIED>
struct Transfer {
  Vector<E, N> v;

  __device__ __forceinline__ void fetch(unsigned char* to, const E* from, bool inside) {
    if constexpr (COPIED)
      ptx::copy_async<N * sizeof(E)>(ptx::shared_address(to), from, inside);
    else
      v = load_or_zero<N>(from, inside);
  }
  __device__ __forceinline__ void put(unsigned char* to) const {
    if constexpr (!COPIED) store(reinterpret_cast<E*>(to), v);
  }
};

// ---- products ---------------------------------------------------------------------------------------------------

// What a register of a fragment holds: a double, a float, or two 16-bit elements.
template <class T>
using Word = conditional<sizeof(T) == 8, double, unsigned>;

// The nearest TF32 of a float, ties away from zero, but for the last 13 bits, which tensor cores ignore. Infinities, NaN,
// and what would become an infinity stay as they are: the largest floats only lose those bits.
__device__ __forceinline__ unsigned nearest_tf32(unsigned x) {
  constexpr float LEAST = 0x1.ffep127f;  // the middle between the largest TF32 and what would follow it
  return fabsf(__uint_as_float(x)) < LEAST ? x + 0x1000 : x;
}

// Of floats below it in every place, products and what is left of them stay below infinity.
constexpr float ORDINARY = 0x1p60f;

// Rounds floats to TF32; what that leaves goes to `rest`, 11 of its 13 bits.
template <bool ALL_ORDINARY, int N>
__device__ __forceinline__ void split_into_tf32(unsigned (&x)[N], unsigned (&rest)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const unsigned rounded = (ALL_ORDINARY ? x[i] + 0x1000 : nearest_tf32(x[i])) & ~0x1fffu;
    rest[i] = __float_as_uint(__uint_as_float(x[i]) - __uint_as_float(rounded));
    x[i] = rounded;
  }
}

// acc += a b, of 16 values of k, three products each. Tensor cores cut off what they add where floats are rounded, so these
// values have sums of their own, the small products first, which are added as floats are. Shorter sums would be less exact
// where they are many, longer ones where they are few.
template <bool ALL_ORDINARY>
__device__ __forceinline__ void add_three_products(float (&acc)[TM][TN][4], unsigned (&a)[2][TM][4],
                                                   unsigned (&b)[2][TN][2]) {
  unsigned rest_a[2][TM][4], rest_b[2][2];
#pragma unroll
  for (int q = 0; q < 2; ++q)
#pragma unroll
    for (int i = 0; i < TM; ++i) split_into_tf32<ALL_ORDINARY>(a[q][i], rest_a[q][i]);
#pragma unroll
  for (int j = 0; j < TN; ++j) {
#pragma unroll
    for (int q = 0; q < 2; ++q) split_into_tf32<ALL_ORDINARY>(b[q][j], rest_b[q]);
#pragma unroll
    for (int i = 0; i < TM; ++i) {
      float sum[4] = {};
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        ptx::multiply_tf32(sum, rest_a[q][i], b[q][j]);
        ptx::multiply_tf32(sum, a[q][i], rest_b[q]);
      }
      // Where an operand or a product is not finite, large products say what comes out, and the small ones nothing.
      if (!ALL_ORDINARY) {
        constexpr float LARGEST = 0x1.fffffep127f;
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] = fminf(fmaxf(sum[e], -LARGEST), LARGEST);
      }
#pragma unroll
      for (int q = 0; q < 2; ++q) ptx::multiply_tf32(sum, a[q][i], b[q][j]);
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] += sum[e];
    }
  }
}

// acc += xs ws, one step; load(a, b, part) gives the fragments of DEPTH values of k from part * DEPTH on.
template <class T, class Load>
__device__ __forceinline__ void multiply_step(Sum<T> (&acc)[TM][TN][4], const Load& load) {
  constexpr int PARTS = BK / DEPTH;
  if constexpr (sizeof(T) == 4 && PRECISION == 3) {
    static_assert(PARTS % 2 == 0, "a step must be whole sums of 16 values of k");
#pragma unroll
    for (int part = 0; part < PARTS; part += 2) {
      unsigned a[2][TM][4], b[2][TN][2];
      float largest = 0;  // a NaN, which this ignores, makes NaN of what is left of it
      const auto look = [&](unsigned x) { largest = fmaxf(largest, fabsf(__uint_as_float(x))); };
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        load(a[q], b[q], part + q);
#pragma unroll
        for (int i = 0; i < 4 * TM; ++i) look(a[q][i / 4][i % 4]);
#pragma unroll
        for (int j = 0; j < 2 * TN; ++j) look(b[q][j / 2][j % 2]);
      }
      if (__all_sync(~0u, largest < ORDINARY))
        add_three_products<true>(acc, a, b);
      else
        add_three_products<false>(acc, a, b);
    }
  } else {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      Word<T> a[TM][4], b[TN][2];
      load(a, b, part);
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 4 * TM; ++i) a[i / 4][i % 4] = nearest_tf32(a[i / 4][i % 4]);
#pragma unroll
        for (int j = 0; j < 2 * TN; ++j) b[j / 2][j % 2] = nearest_tf32(b[j / 2][j % 2]);
      }
#pragma unroll
      for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) multiply_add(acc[i][j], a[i], b[j], T{});
    }
  }
}

// acc += xs ws, one step, which lies `stage` bytes behind the start of shared memory: xs, and ws behind it.
template <class T>
__device__ __forceinline__ void multiply(Sum<T> (&acc)[TM][TN][4], const unsigned char* memory, int stage,
                                         const Warp& warp) {
  const int lane = warp.lane;
  const unsigned start = ptx::shared_address(memory) + stage;
  const auto words = [&](int at) { return *reinterpret_cast<const Word<T>*>(memory + stage + at); };
  // Lanes 0-15 give the rows of a fragment's first chunks, lanes 16-31 those of its second. Later chunks of a row differ
  // in bits that no carry reaches.
  const int x_at = X_WORDS ? swizzle<X_ROW, true>(warp.m + lane / 4, lane % 4 * 8)
                           : swizzle<X_ROW>(warp.m + lane % 16, lane / 16 * 16);
  const int w_at = X_BYTES + (W_WORDS ? swizzle<W_ROW, true>(lane % 4, (warp.n + lane / 4) * int(sizeof(T)))
                                      : swizzle<W_ROW>(lane % 16, warp.n * 2 + lane / 16 * 16));
  multiply_step<T>(acc, [&](Word<T>(&a)[TM][4], Word<T>(&b)[TN][2], int part) {
    const int k = part * DEPTH;
#pragma unroll
    for (int i = 0; i < TM; ++i) {
      if constexpr (X_WORDS) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[i][r] = words((x_at ^ k * 8 ^ r / 2 * 32) + (i * 16 + r % 2 * 8) * X_ROW);
      } else {
        ptx::load_matrices(a[i], start + (x_at ^ k * int(sizeof(T))) + i * 16 * X_ROW);
      }
    }
    if constexpr (W_WORDS) {
#pragma unroll
      for (int j = 0; j < TN; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) b[j][r] = words((w_at ^ j * 8 * int(sizeof(T))) + (k + r * 4) * W_ROW);
    } else {
#pragma unroll
      for (int j = 0; j < TN; j += 2) {
        unsigned two[4];
        ptx::load_matrices_transposed(two, start + (w_at ^ j * 16) + k * W_ROW);
        b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
      }
    }
  });
}
