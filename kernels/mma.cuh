// mma.cuh -- what the matrix products on tensor cores share: tiles, swizzled shared memory, fragments, the product of a
// warp. For mma.sync, sm_80 and newer.
//
// A block computes BM x BN sums over K in steps of BK; a warp has WM x WN of them. The operands of a step lie in shared
// memory as xs [BM][BK] and ws [BK][BN], rows without padding; the 16-byte chunks of a row change places with the row
// (`swizzle`), so that neither 8 rows of one chunk, which is what a fragment reads, nor 8 chunks of a row, which is what
// a copy writes, meet in a bank.
//
// PRECISION of float elements: 1 rounds both operands to TF32; 3 splits each into two, and keeps three of the four
// products. 16-bit elements are multiplied as they are. No plan asks for 3 yet: added to one sum, three products are
// further off than float is, and operands beyond the largest TF32 become infinite.

#pragma once

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
// Fragments of 4-byte columns read 2 chunks of 4 rows; all others 1 chunk of 8 rows.
template <int ROW_BYTES, bool WORDS = false>
__device__ __forceinline__ int swizzle(int row, int byte) {
  const int turn = WORDS ? (row & 3) << 1 : ROW_BYTES >= 128 ? row & 7 : row >> 1 & 3;
  return row * ROW_BYTES + (byte ^ turn << 4);
}
constexpr int X_ROW = BK * sizeof(E), W_ROW = BN * sizeof(E);
constexpr int X_BYTES = BM * X_ROW, W_BYTES = BK * W_ROW, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr bool W_WORDS = sizeof(E) == 4;
static_assert(!W_WORDS || W_ROW >= 128, "words need rows of at least 128 bytes");

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

// ---- products ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ void multiply_add(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2], half_t) {
  ptx::multiply_half(acc, a, b);
}
__device__ __forceinline__ void multiply_add(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2], bfloat_t) {
  ptx::multiply_bfloat(acc, a, b);
}

// Rounds floats to TF32; what that leaves, rounded as well, goes to `rest`.
template <int N>
__device__ __forceinline__ void round_to_tf32(unsigned (&x)[N], unsigned (&rest)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float f = __uint_as_float(x[i]);
    x[i] = ptx::tf32_from_float(f);
    rest[i] = ptx::tf32_from_float(f - __uint_as_float(x[i]));
  }
}

// acc += xs ws, one step, which lies `stage` bytes behind the start of shared memory: xs, and ws behind it.
template <class T>
__device__ __forceinline__ void multiply(float (&acc)[TM][TN][4], const unsigned char* memory, int stage,
                                         const Warp& warp) {
  const int lane = warp.lane;
  const unsigned start = ptx::shared_address(memory) + stage;
  // Lanes 0-15 give the rows of a fragment's first chunks, lanes 16-31 those of its second. Later chunks of a row differ
  // in bits that no carry reaches.
  const int x_at = swizzle<X_ROW>(warp.m + lane % 16, lane / 16 * 16);
  if constexpr (sizeof(T) == 2) {
    const int w_at = X_BYTES + swizzle<W_ROW>(lane % 16, warp.n * 2 + lane / 16 * 16);
#pragma unroll
    for (int k = 0; k < BK; k += DEPTH) {
      unsigned a[TM][4], b[TN][2];
#pragma unroll
      for (int i = 0; i < TM; ++i) ptx::load_matrices(a[i], start + (x_at ^ k * 2) + i * 16 * X_ROW);
#pragma unroll
      for (int j = 0; j < TN; j += 2) {
        unsigned two[4];
        ptx::load_matrices_transposed(two, start + (w_at ^ j * 16) + k * W_ROW);
        b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) multiply_add(acc[i][j], a[i], b[j], T{});
    }
  } else {
    const int w_at = X_BYTES + swizzle<W_ROW, true>(lane % 4, (warp.n + lane / 4) * 4);
#pragma unroll
    for (int k = 0; k < BK; k += DEPTH) {
      unsigned a[TM][4], rest_a[TM][4];
#pragma unroll
      for (int i = 0; i < TM; ++i) {
        ptx::load_matrices(a[i], start + (x_at ^ k * 4) + i * 16 * X_ROW);
        round_to_tf32(a[i], rest_a[i]);
      }
#pragma unroll
      for (int j = 0; j < TN; ++j) {
        unsigned b[2], rest_b[2];
        const unsigned char* from = memory + stage + (w_at ^ j * 32) + k * W_ROW;
        b[0] = *reinterpret_cast<const unsigned*>(from);
        b[1] = *reinterpret_cast<const unsigned*>(from + 4 * W_ROW);
        round_to_tf32(b, rest_b);
#pragma unroll
        for (int i = 0; i < TM; ++i) {
          if (PRECISION == 3) {  // the small ones first
            ptx::multiply_tf32(acc[i][j], rest_a[i], b);
            ptx::multiply_tf32(acc[i][j], a[i], rest_b);
          }
          ptx::multiply_tf32(acc[i][j], a[i], b);
        }
      }
    }
  }
}
