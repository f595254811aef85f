// conv_mma.cu -- convolution of any rank as an implicit matrix product on tensor cores, sm_80 and newer.
//
//   y[b,p,f] = act( bias[f] + sum over r,c of  x[b, p*stride + r*dilation - pad, c] * w[r,c,f] )
//   x reads as zero outside its bounds.
//
// Twin   cuconv/reference/conv.py::conv, transpose.py::conv_transpose      Plan  cuconv/plan/conv.py, transpose.py
// Test   tests/test_conv_kernels.py
//
// The product, its arrays and UPSAMPLED are those of conv_simt.cu. Real elements; of float see mma.cuh: PRECISION.
//
// Work split
//   blockIdx.x   part of K, group, tile of BM positions, tile of BN columns; columns fastest, so neighbours share rows
//                of x
//   one warp     WM x WN sums; one thread copies ROWS positions at SLOTS values of k, and LOADS vectors of w, a step
//
// Shared memory, STAGES of one step each:  xs [BM][BK]   ws [BK][BN]   (mma.cuh: swizzled); at the end the tile of y
//   Copies run STAGES - 1 steps ahead and never pass through registers, except where fewer than 4 bytes are together:
//   those are fetched before a product and stored behind it. Padding is what a copy fills with zeros. One barrier a step.

#include "conv_mma.cuh"

// Set by the plan, besides those of conv_mma.cuh: STAGES   VECX VECW   WHOLE (channels are whole steps)   MIN_BLOCKS
constexpr int VECTORS_K = BK / VECX;
constexpr int SLOTS = CHANNELS_FIRST ? BK * 32 / THREADS : 1;
constexpr int ROWS = CHANNELS_FIRST ? BM / 32 : BM * VECTORS_K / THREADS;
constexpr int ROW_STEP = CHANNELS_FIRST ? 32 : THREADS / VECTORS_K;
static_assert(SLOTS * ROWS * VECX * THREADS == BM * BK, "threads must share the copies of x evenly");
static_assert(!CHANNELS_FIRST || VECX == 1, "channels_first reads x position by position");

constexpr int VECTORS_N = BN / VECW;
constexpr int W_STEP = larger(1, THREADS / VECTORS_N);  // rows of w from one load of a thread to its next
constexpr int LOADS = ceil_div(BK, W_STEP);
constexpr bool ALL_LOAD = BK % W_STEP == 0;
static_assert(VECTORS_N <= THREADS && THREADS % VECTORS_N == 0, "threads must share the copies of w evenly");

constexpr bool X_COPIED = VECX * sizeof(E) >= 4, W_COPIED = VECW * sizeof(E) >= 4;

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_mma(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char memory[];

  Index tile = blockIdx.x;
  const Index n0 = tile % p.tiles_n * BN;  // first column
  tile /= p.tiles_n;
  const Index m0 = tile % p.tiles_m * BM;  // first position
  tile /= p.tiles_m;
  const Index g = tile % p.groups, part = tile / p.groups;
  Index first = 0, count = p.depth;  // the values of k of this block
#if SPLIT
  first = part * p.chunk;
  count = p.depth - first < p.chunk ? p.depth - first : p.chunk;
#endif
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  // Elements from one position of x to the next, and from one channel to the next.
  const Index step_l = CHANNELS_FIRST ? 1 : p.groups * p.channels;
  const Index step_c = CHANNELS_FIRST ? volume(p.in) : 1;

  // The windows of this thread's positions: first input on every axis, and its index in x. A position behind the last
  // one gets a window outside of x.
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

  // The k of each slot. What depends on its tap is found when that changes: where it lies behind an origin, and bit i
  // of `inside`, whether window i has an input there.
  Depth depth[SLOTS];
  Index offset[SLOTS];
  bool inside[SLOTS][ROWS];
  const auto slot_k = [&](int j) { return CHANNELS_FIRST ? warp + j * (THREADS / 32) : thread % VECTORS_K * VECX; };
  const auto arrive = [&](int j) {
    settle(depth[j], p);
    offset[j] = linear(depth[j].reach, p.in) * step_l + depth[j].channel * step_c;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      bool here = depth[j].reach[0] < p.span[0];
#pragma unroll
      for (int a = 0; a < RANK; ++a) here &= within(window[i][a] + depth[j].reach[a], p.in[a]);
      inside[j][i] = here;
    }
  };
#pragma unroll
  for (int j = 0; j < SLOTS; ++j) {
    depth[j] = {};
    depth[j].channel = first + slot_k(j);
    arrive(j);
  }

  // 1. Stage: from global to shared memory.
  Transfer<VECX, X_COPIED> xr[SLOTS][ROWS];
  Transfer<VECW, W_COPIED> wr[LOADS];
  const int w_row = thread / VECTORS_N, w_column = thread % VECTORS_N * VECW;
  Index w_left = count - w_row;  // rows of w from this thread's first one on
  const bool w_inside = n0 + w_column < p.columns;
  if (!w_inside) w_left = 0;
  const E* w_from = p.w + (g * p.w_group + (first + w_row) * p.w_pitch + n0 + w_column);
  // Where they go: the swizzle repeats after 8 rows.
  const auto x_to = [&](int i, int j) {
    const int first = ROW_STEP % 8 ? i * ROW_STEP : 0;
    return swizzle<X_ROW, X_WORDS>(row0 + first, slot_k(j) * int(sizeof(E))) + (i * ROW_STEP - first) * X_ROW;
  };
  const auto w_to = [&](int i) {
    const int first = W_STEP % 8 ? i * W_STEP : 0;
    return X_BYTES + swizzle<W_ROW, W_WORDS>(w_row + first, w_column * int(sizeof(E))) + (i * W_STEP - first) * W_ROW;
  };
  const auto fetch = [&](int stage) {
#pragma unroll
    for (int j = 0; j < SLOTS; ++j) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
        xr[j][i].fetch(memory + stage + x_to(i, j), p.x + (origin[i] + offset[j]), inside[j][i]);
      offset[j] += BK * step_c;
      if (WHOLE) continue;
      depth[j].channel += BK;
      if (depth[j].channel >= p.channels) arrive(j);
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (ALL_LOAD || w_row + i * W_STEP < BK)
        wr[i].fetch(memory + stage + w_to(i), w_from + i * W_STEP * p.w_pitch, WHOLE ? w_inside : i * W_STEP < w_left);
    w_from += BK * p.w_pitch;
    w_left -= BK;
  };
  const auto put = [&](int stage) {
#pragma unroll
    for (int j = 0; j < SLOTS; ++j)
#pragma unroll
      for (int i = 0; i < ROWS; ++i) xr[j][i].put(memory + stage + x_to(i, j));
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (ALL_LOAD || w_row + i * W_STEP < BK) wr[i].put(memory + stage + w_to(i));
  };

  // 2. Multiply-accumulate.
  const Warp own(thread);
  S acc[TM][TN][4] = {};
  // Where channels are whole steps, all slots come to the next tap together, between two passes of the loop.
  const Index steps = (count + BK - 1) / BK;
  Index fetched = 0, same = steps;  // steps that are fetched, and that will be with the same tap
  if (WHOLE && steps > 0) same = (p.channels - depth[0].channel + BK - 1) / BK;
  const auto advance = [&] {
    if (!WHOLE || same > 0) return;
#pragma unroll
    for (int j = 0; j < SLOTS; ++j) {
      depth[j].channel = p.channels + slot_k(j);
      arrive(j);
    }
    same = p.channels / BK;
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (fetched < steps) {
      fetch(stage * STAGE_BYTES);
      put(stage * STAGE_BYTES);
      ++fetched, --same;
      advance();
    }
    ptx::copy_async_commit();
  }
  int stage = 0, ahead = (STAGES - 1) * STAGE_BYTES;  // what is multiplied, and what is filled meanwhile
  const auto next = [](int stage) { return stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES; };
  for (Index done = 0; done < steps;) {
    const Index rest = steps - fetched;
    const bool more = rest > 0;
    Index passes = !more ? steps - done : rest < same ? rest : same;
    done += passes;
    if (more) fetched += passes, same -= passes;
#pragma unroll 1
    for (; passes > 0; --passes) {
      ptx::copy_async_wait<STAGES - 2>();
      __syncthreads();
      if (more) fetch(ahead);
      ptx::copy_async_commit();
      multiply<E>(acc, memory, stage, own);
      if (more) put(ahead);
      stage = next(stage);
      ahead = next(ahead);
    }
    advance();
  }

  // 3. Epilogue.
  const Result result(p, g);
  store_tile(acc, memory, own, result, part, n0, [&](int i, Place& row) {
    if (m0 + i < p.positions) row = result.row(m0 + i);
    return m0 + i < p.positions;
  });
}
