// simt.cuh -- what the matrix products on the ordinary arithmetic units share: tiles, threads, and the inner product.
//
// A block computes BM x BN sums over K in steps of BK; xs [BK][BM + padding] and ws [BK][BN + padding] hold a step's
// operands. The padding keeps a warp that stores several k at once free of bank conflicts; it is a multiple of V. A
// thread owns TM x TN sums in blocks of V x V, where V sums are 16 bytes; its blocks lie THREADS_M * V rows and
// THREADS_N * V columns apart, so that the threads of a warp read neighbouring 16 bytes of shared memory.

#pragma once

#include "activations.cuh"
#include "positions.cuh"

// Set by the plan, besides those of positions.cuh: BM BN BK TM TN

constexpr int V = 16 / sizeof(S);
constexpr int THREADS_M = BM / TM;
constexpr int THREADS_N = BN / TN;
constexpr int THREADS = THREADS_M * THREADS_N;
static_assert(BM % TM == 0 && BN % TN == 0 && TM % V == 0 && TN % V == 0, "tiles must divide into blocks of V x V");
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "a block is whole warps, at most 1024 threads");

// Which sums a thread owns. The longer side of a warp, 8 threads, lies along the axis that is contiguous in the result.
template <bool M_IS_CONTIGUOUS>
struct Thread {
  static constexpr int LANES_N = M_IS_CONTIGUOUS ? larger(32 / THREADS_M, smaller(4, THREADS_N)) : smaller(8, THREADS_N);
  static constexpr int LANES_M = 32 / LANES_N;
  static constexpr int WARPS_N = THREADS_N / LANES_N;
  static_assert(THREADS_M % LANES_M == 0 && THREADS_N % LANES_N == 0, "a warp must lie inside the tile");

  int m, n;  // the first row and column

  __device__ __forceinline__ explicit Thread(int thread) {
    const int lane = thread % 32, warp = thread / 32;
    m = (warp / WARPS_N * LANES_M + (M_IS_CONTIGUOUS ? lane % LANES_M : lane / LANES_N)) * V;
    n = (warp % WARPS_N * LANES_N + (M_IS_CONTIGUOUS ? lane / LANES_M : lane % LANES_N)) * V;
  }
  __device__ __forceinline__ int row(int i) const { return m + i / V * (THREADS_M * V) + i % V; }
  __device__ __forceinline__ int column(int j) const { return n + j / V * (THREADS_N * V) + j % V; }
};

// acc += xs^T ws, one step.
template <class Owner, int PITCH_X, int PITCH_W>
__device__ __forceinline__ void multiply(S (&acc)[TM][TN], const S (&xs)[BK][PITCH_X], const S (&ws)[BK][PITCH_W],
                                         const Owner& own) {
#pragma unroll
  for (int k = 0; k < BK; ++k) {
    Vector<S, V> a[TM / V], b[TN / V];
#pragma unroll
    for (int i = 0; i < TM; i += V) a[i / V] = read<V>(&xs[k][own.row(i)]);
#pragma unroll
    for (int j = 0; j < TN; j += V) b[j / V] = read<V>(&ws[k][own.column(j)]);
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j) multiply_add(acc[i][j], a[i / V].at[i % V], b[j / V].at[j % V]);
  }
}

// Stores N elements as sums in shared memory, 16 bytes at a time.
template <int N>
__device__ __forceinline__ void widen_into(S* to, const Vector<E, N>& from) {
  constexpr int PART = smaller(N, V);
#pragma unroll
  for (int q = 0; q < N; q += PART) {
    Vector<S, PART> part;
#pragma unroll
    for (int v = 0; v < PART; ++v) part.at[v] = widen(from.at[q + v]);
    store(to + q, part);
  }
}
