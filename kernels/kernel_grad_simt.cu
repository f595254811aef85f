// kernel_grad_simt.cu -- gradient of a convolution's kernel, any rank, on the ordinary arithmetic units.
//
//   dw[r,c,f] = sum over b,p of  conj(x[b, p*stride + r*dilation - pad, c]) * dy[b,p,f]
//   x reads as zero outside its bounds.
//
// Twin   cuconv/reference/conv.py::kernel_grad      Plan  cuconv/plan/kernel_grad.py
// Test   tests/test_conv_kernels.py
//
// As a matrix product, for each of G groups:  M = taps * C/G rows (r,c), N = F/G columns, K = B*P positions.
//
// Arrays, C-contiguous (channels last; CHANNELS_FIRST has the channels on axis 1)
//   x [B, L.., C]   dy [B, P.., F]   dw [taps.., C/G, F], or sums [splits, taps.., C/G, F] where SPLIT
//
// Work split
//   blockIdx.x   split of the positions, group, tile of BM rows, tile of BN columns; columns fastest
//   one thread   TM x TN sums (simt.cuh); it loads one position a step, at ROWS places of x and LOADS places of dy
//
//   Every split sums its positions in their order and has its own place in `sums`; reduce_splits.cu adds them up in
//   theirs. No atomics: the same bits on every run.
//
// Shared memory, two stages of one step each:  xs [2][BK][BM + PAD_X]   ws [2][BK][BN + PAD_W], dy in the place of w
//   One access takes 128 bytes. In channels_first the threads of 8 positions share it, V rows each; in channels_last
//   the SHARE threads of a position fill it, or as many positions as it takes lie behind one another.

#include "simt.cuh"

// Set by the plan, besides those of simt.cuh: CHANNELS_FIRST SPLIT   VECX VECD VECW MIN_BLOCKS
using Result = conditional<SPLIT, S, E>;

// Threads of one position; in channels_last they are neighbours and read neighbouring channels, in channels_first
// neighbours have neighbouring positions.
constexpr int SHARE = THREADS / BK;
constexpr int ROWS = ceil_div(BM, SHARE * VECX);
constexpr int LOADS = ceil_div(BN, SHARE * VECD);
static_assert(THREADS % BK == 0, "every position of a step needs as many threads");
static_assert(!CHANNELS_FIRST || (VECX == 1 && VECD == 1), "channels_first reads position by position");

__device__ constexpr int padding(int stored) {  // `stored`: elements of one position that are stored at once
  return CHANNELS_FIRST ? V : stored < 8 * V ? stored : 0;
}
constexpr int PAD_X = padding(SHARE * VECX);
constexpr int PAD_W = padding(SHARE * VECD);

struct Params {
  const E* x;
  const E* dy;
  Result* dw;
  Index positions, chunk;  // of all, and of one split
  Index rows, columns;     // M, N of one group
  Index tiles_m, tiles_n;
  Index groups, channels;  // channels of x in one group
  Index in[RANK], out[RANK], taps[RANK], stride[RANK], dilation[RANK], pad[RANK];
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) kernel_grad_simt(const __grid_constant__ Params p) {
  __shared__ alignas(16) S xs[2][BK][BM + PAD_X];
  __shared__ alignas(16) S ws[2][BK][BN + PAD_W];

  Index tile = blockIdx.x;
  const Index n0 = tile % p.tiles_n * BN;
  tile /= p.tiles_n;
  const Index m0 = tile % p.tiles_m * BM;
  tile /= p.tiles_m;
  const Index g = tile % p.groups, part = tile / p.groups;
  const int thread = threadIdx.x;

  const Index filters = p.groups * p.columns;
  const Index step_l = CHANNELS_FIRST ? 1 : p.groups * p.channels;
  const Index step_c = CHANNELS_FIRST ? volume(p.in) : 1;
  const Index step_p = CHANNELS_FIRST ? 1 : filters;
  const Index step_f = CHANNELS_FIRST ? volume(p.out) : 1;
  const E* const x = p.x + g * p.channels * step_c;
  const E* const dy = p.dy + (g * p.columns + n0) * step_f;

  // The rows of this thread: distance of their tap from the first input of a window, and offset in x. A row behind the
  // last one reaches outside of x.
  const int k = CHANNELS_FIRST ? thread % BK : thread / SHARE;
  const int slot = CHANNELS_FIRST ? thread / BK : thread % SHARE;
  Index reach[ROWS][RANK], offset[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const int row = (slot + i * SHARE) * VECX;
    const Index m = m0 + row;
    split(m / p.channels, p.taps, reach[i]);
#pragma unroll
    for (int a = 0; a < RANK; ++a) reach[i][a] *= p.dilation[a];
    offset[i] = linear(reach[i], p.in) * step_l + m % p.channels * step_c;
    if (row >= BM || m >= p.rows) reach[i][0] = NOWHERE;
  }

  // The position of this thread, as coordinates and as the first input of its window.
  Index position = part * p.chunk + k;
  const Index end = position - k + p.chunk < p.positions ? position - k + p.chunk : p.positions;
  Index at[RANK];
  Index b = split(position, p.out, at);

  // 1. Stage: from global memory to registers, and a step later to shared memory.
  Vector<E, VECX> xr[ROWS];
  Vector<E, VECD> dr[LOADS];
  const auto fetch = [&] {
    Index window[RANK];
#pragma unroll
    for (int a = 0; a < RANK; ++a) window[a] = at[a] * p.stride[a] - p.pad[a];
    const Index origin = b * p.groups * p.channels * volume(p.in) + linear(window, p.in) * step_l;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      bool inside = position < end;
#pragma unroll
      for (int a = 0; a < RANK; ++a) inside = inside && within(window[a] + reach[i][a], p.in[a]);
      xr[i] = load_or_zero<VECX>(x + origin + offset[i], inside);
    }
    const Index place = b * filters * volume(p.out) + linear(at, p.out) * step_p;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int n = (slot + i * SHARE) * VECD;
      dr[i] = load_or_zero<VECD>(dy + place + n * step_f, position < end && n < BN && n0 + n < p.columns);
    }
    position += BK;
    at[RANK - 1] += BK;
    while (at[RANK - 1] >= p.out[RANK - 1]) {
      at[RANK - 1] -= p.out[RANK - 1];
      Index carry = 1;
#pragma unroll
      for (int a = RANK - 2; a >= 0; --a) {
        at[a] += carry;
        carry = at[a] == p.out[a];
        if (carry) at[a] = 0;
      }
      b += carry;
    }
  };
  const auto stage = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = (slot + i * SHARE) * VECX;
#pragma unroll
      for (int v = 0; v < VECX; ++v) xr[i].at[v] = conjugate(xr[i].at[v]);
      if (row < BM) widen_into(&xs[buffer][k][row], xr[i]);
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int n = (slot + i * SHARE) * VECD;
      if (n < BN) widen_into(&ws[buffer][k][n], dr[i]);
    }
  };

  // 2. Multiply-accumulate. The number of steps is the same for all threads: that of the first position.
  const Thread<false> own(thread);
  S acc[TM][TN] = {};
  fetch();
  stage(0);
  __syncthreads();
  int buffer = 0;
  while (position - k < end) {
    fetch();
    multiply(acc, xs[buffer], ws[buffer], own);
    buffer ^= 1;
    stage(buffer);
    __syncthreads();
  }
  multiply(acc, xs[buffer], ws[buffer], own);

  // 3. Epilogue: the only place that tests the edges of dw.
  Result* const dw = p.dw + part * p.rows * filters + g * p.columns;
#pragma unroll
  for (int i = 0; i < TM; ++i) {
    const Index m = m0 + own.row(i);
    if (m >= p.rows) continue;
#pragma unroll
    for (int j = 0; j < TN; j += VECW) {
      const Index n = n0 + own.column(j);
      if (n >= p.columns) continue;
      Vector<Result, VECW> v;
#pragma unroll
      for (int q = 0; q < VECW; ++q) v.at[q] = narrow<Result>(acc[i][j + q]);
      store(dw + m * filters + n, v);
    }
  }
}
