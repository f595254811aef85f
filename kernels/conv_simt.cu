// conv_simt.cu -- convolution of any rank as an implicit matrix product on the ordinary arithmetic units.
//
//   y[b,p,f] = act( bias[f] + sum over r,c of  x[b, p*stride + r*dilation - pad, c] * w[r,c,f] )
//   x reads as zero outside its bounds.
//
// Twin   cuconv/reference/conv.py::conv, transpose.py::conv_transpose      Plan  cuconv/plan/conv.py, transpose.py
// Test   tests/test_conv_kernels.py
//
// As a matrix product, for each of G groups:  M = B*P positions, N = columns, K = taps * C/G.
//
// Arrays, C-contiguous (channels last; CHANNELS_FIRST has the channels on axis 1)
//   x [B, L.., C]   w [K, N] of a group, rows w_pitch and groups w_group apart   bias [F]   y [B, P.., F]
//
// UPSAMPLED: transposed convolution in sub-pixel form. The positions are q, the columns (rho.., c) of a packed kernel
// (pack_weights.cu), and the product goes to y[b, q*up + rho + shift, c], which exists inside `full` only.
//
// Work split
//   blockIdx.x   part of K, group, tile of BM positions, tile of BN columns; columns fastest, so neighbours share rows
//                of x
//   one thread   TM x TN sums (simt.cuh); it loads ROWS positions at SLOTS values of k, and LOADS vectors of w, a step
//
// Shared memory, two stages of one step each:  xs [2][BK][BM + V]   ws [2][BK][BN]
//   Elements are widened when they are staged, x is transposed. While one stage is multiplied the next step is on its
//   way in registers; one barrier a step.

#include "conv.cuh"
#include "simt.cuh"

// Set by the plan, besides those of conv.cuh and simt.cuh: ACTIVATION   VECX VECW VECY MIN_BLOCKS
constexpr int VECTORS_K = BK / VECX;
constexpr int SLOTS = CHANNELS_FIRST ? BK * 32 / THREADS : 1;
constexpr int ROWS = CHANNELS_FIRST ? BM / 32 : BM * VECTORS_K / THREADS;
constexpr int ROW_STEP = CHANNELS_FIRST ? 32 : THREADS / VECTORS_K;
static_assert(SLOTS * ROWS * VECX * THREADS == BM * BK, "threads must share the loads of x evenly");
static_assert(!CHANNELS_FIRST || VECX == 1, "channels_first reads x position by position");

constexpr int VECTORS_N = BN / VECW;
constexpr int LOADS = ceil_div(BK * VECTORS_N, THREADS);

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_simt(const __grid_constant__ Params p) {
  __shared__ alignas(16) S xs[2][BK][BM + V];
  __shared__ alignas(16) S ws[2][BK][BN];

  Index tile = blockIdx.x;
  const Index n0 = tile % p.tiles_n * BN;  // first column
  tile /= p.tiles_n;
  const Index m0 = tile % p.tiles_m * BM;  // first position
  tile /= p.tiles_m;
  const Index g = tile % p.groups, part = tile / p.groups;
  Index k0 = 0, end = p.depth;  // the first k that has not been fetched, and behind the last one of this block
#if SPLIT
  k0 = part * p.chunk;
  end = p.depth - k0 < p.chunk ? p.depth : k0 + p.chunk;
#endif
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  // Elements from one position of x to the next, and from one channel to the next.
  const Index step_l = CHANNELS_FIRST ? 1 : p.groups * p.channels;
  const Index step_c = CHANNELS_FIRST ? volume(p.in) : 1;

  // The windows of this thread's positions: first input on every axis, and its index in x. A position behind the last
  // one gets a window outside of x. Indices instead of pointers: registers are what limits this kernel.
  const int row0 = CHANNELS_FIRST ? lane : thread / VECTORS_K;
  Index window[ROWS][RANK], origin[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const Index m = m0 + row0 + i * ROW_STEP;
    const Index b = split(m, p.out, window[i]);
#pragma unroll
    for (int a = 0; a < RANK; ++a) window[i][a] = window[i][a] * p.stride[a] - p.pad[a];
    origin[i] = (b * p.groups * volume(p.in) + g * step_c) * p.channels + linear(window[i], p.in) * step_l;
    if (m >= p.positions) window[i][0] = NOWHERE;
  }
  Depth depth[SLOTS];
#pragma unroll
  for (int j = 0; j < SLOTS; ++j) {
    depth[j] = {};
    depth[j].channel = k0 + (CHANNELS_FIRST ? warp + j * (THREADS / 32) : thread % VECTORS_K * VECX);
    settle(depth[j], p);
  }

  // 1. Stage: from global memory to registers, and a step later to shared memory.
  Vector<E, VECX> xr[SLOTS][ROWS];
  Vector<E, VECW> wr[LOADS];
  const auto fetch = [&] {
#pragma unroll
    for (int j = 0; j < SLOTS; ++j) {
      const Index offset = linear(depth[j].reach, p.in) * step_l + depth[j].channel * step_c;
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        bool inside = depth[j].reach[0] < p.span[0];
#pragma unroll
        for (int a = 0; a < RANK; ++a) inside &= within(window[i][a] + depth[j].reach[a], p.in[a]);
        xr[j][i] = load_or_zero<VECX>(p.x + (origin[i] + offset), inside);
      }
      depth[j].channel += BK;
      settle(depth[j], p);
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int at = thread + i * THREADS;
      const Index k = k0 + at / VECTORS_N, n = n0 + at % VECTORS_N * VECW;
      const bool inside = at < BK * VECTORS_N && k < end && n < p.columns;
      wr[i] = load_or_zero<VECW>(p.w + (g * p.w_group + k * p.w_pitch + n), inside);
    }
    k0 += BK;
  };
  const auto stage = [&](int buffer) {
#pragma unroll
    for (int j = 0; j < SLOTS; ++j) {
      const int k = CHANNELS_FIRST ? warp + j * (THREADS / 32) : thread % VECTORS_K * VECX;
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int v = 0; v < VECX; ++v) xs[buffer][k + v][row0 + i * ROW_STEP] = widen(xr[j][i].at[v]);
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const int at = thread + i * THREADS;
      if (at < BK * VECTORS_N) widen_into(&ws[buffer][at / VECTORS_N][at % VECTORS_N * VECW], wr[i]);
    }
  };

  // 2. Multiply-accumulate.
  const Thread<CHANNELS_FIRST> own(thread);
  S acc[TM][TN] = {};
  fetch();
  stage(0);
  __syncthreads();
  int buffer = 0;
  while (k0 < end) {
    fetch();
    multiply(acc, xs[buffer], ws[buffer], own);
    buffer ^= 1;
    stage(buffer);
    __syncthreads();
  }
  multiply(acc, xs[buffer], ws[buffer], own);

  // 3. Epilogue: the only place that tests the edges of y.
  const Result result(p, g);
  Y* y = p.y;
#if SPLIT
  y += part * p.total;
#endif
  // VECY results that are neighbours in y: positions in channels_first, else filters.
  constexpr int STEP_M = CHANNELS_FIRST ? VECY : 1, STEP_N = CHANNELS_FIRST ? 1 : VECY;
  Place columns[TN];
  S bias[TN] = {};
#pragma unroll
  for (int j = 0; j < TN; ++j) {
    Index f;
    columns[j] = result.column(n0 + own.column(j), f);
    if (p.bias && n0 + own.column(j) < p.columns) bias[j] = widen(p.bias[f]);
  }
#pragma unroll
  for (int i = 0; i < TM; i += STEP_M) {
    if (m0 + own.row(i) >= p.positions) continue;
    const Place row = result.row(m0 + own.row(i));
#pragma unroll
    for (int j = 0; j < TN; j += STEP_N) {
      if (n0 + own.column(j) >= p.columns || !result.exists(row, columns[j])) continue;
      Vector<Y, VECY> v;
#pragma unroll
      for (int q = 0; q < VECY; ++q)
        v.at[q] = finish<ACTIVATION, Y>(add(acc[i + q % STEP_M][j + q % STEP_N], bias[j + q % STEP_N]));
      store(y + row.offset + columns[j].offset, v);
    }
  }
}
