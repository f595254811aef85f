// depthwise_rows.cu -- depthwise convolution along channels-first sequences of stride 1: 16 bytes at a time.
//
//   y[b,c*M+m,p] = act( bias[c*M+m] + sum over r of  x[b, c, p + r*dilation + first] * w[r,c,m] )
//   with first = -pad; or, with taps in reverse and first = pad - (K-1)*dilation, the transpose for M = 1.
//
// Twin   cuconv/reference/depthwise.py      Plan  cuconv/plan/depthwise.py::plan_rows
// Test   tests/test_depthwise_kernels.py
//
// Arrays, C-contiguous   x [B, C, L]   w [K, C, M]   bias [C*M] or null   y [B, C*M, P]
//
// Work split
//   Vectors are V elements, 16 bytes. BR = THREADS / TR rows (b, c) of a block, TR threads a row, TV vectors of outputs
//   a thread, TR vectors apart. blockIdx.x: (rows, tile of TR * TV vectors), tile fastest.
//
// Shared memory   xs [BR][(TR * TV + HALO) * V]: the inputs of a tile from the last multiple of V at or below its first
//   input on, zero outside of x. `first` = V * k + PHASE, so how a window of V elements lies across two vectors is
//   known at compile time: all reads are whole vectors, and elements are selected from registers.
//
//     vectors of xs   | 0 1 2 3 | 4 5 6 7 | 8 ..         V = 4, PHASE = 1, dilation 1
//     tap 0, 1, 2, 3     1 2 3 4                          of the first vector of outputs
//                          2 3 4 5
//                            3 4 5 6

#include "depthwise_windows.cuh"

// Set by the plan: ELEMENT INDEX ACTIVATION   XV, YV elements of an access to x and y
//   PHASE   UNIT 1 for dilation 1   DMOD dilation % V   KC taps at a time   MANY 1 for more
//   taps than KC   KT taps left over   TR   TV   HALO
constexpr int THREADS = 128;
constexpr int BR = THREADS / TR;
constexpr int SPAN = (TR * TV + HALO) * V;
static_assert(THREADS % TR == 0, "whole rows in a block");

struct Params {
  const E* x;
  const E* w;
  const E* bias;
  E* y;
  Index rows, channels, multiplier, tiles;
  Index source, target;       // L, P
  Index first, dilation;      // `first` rounded down to a multiple of V
  Index before;               // accesses to x that lie before the first output's place
  Index chunks;               // of KC taps
  Index tap_first, tap_step;  // elements of w
};

template <int N>
__device__ __forceinline__ void load_weights(S (&w)[N], const E* from, Index tap_step) {
#pragma unroll
  for (int r = 0; r < N; ++r) w[r] = value(from + r * tap_step);
}

// Adds N taps to V outputs; the window of the first is at element PHASE of vector i of xs.
template <int N>
__device__ __forceinline__ void add_taps(S (&acc)[V], const E* xs, Index i, const S (&w)[N], Index dilation) {
  S window[N][V];
  windows<N, PHASE, UNIT, DMOD>(window, dilation, [&](Index next) { return read<V>(xs + (i + next) * V); });
#pragma unroll
  for (int r = 0; r < N; ++r)
#pragma unroll
    for (int v = 0; v < V; ++v) multiply_add(acc[v], window[r][v], w[r]);
}

extern "C" __global__ void __launch_bounds__(THREADS) depthwise_rows(const __grid_constant__ Params p) {
  __shared__ alignas(16) E xs[BR][SPAN];
  const int lane = threadIdx.x % TR, slot = threadIdx.x / TR;
  const Index row = Index(blockIdx.x) / p.tiles * BR + slot;
  const Index p0 = Index(blockIdx.x) % p.tiles * (TR * TV * V);  // first output of the tile

  // 1. Stage, from the first output's own place on, so that a warp reads whole sectors; what lies before comes last.
  const E* from = p.x + row * p.source;
  constexpr int PIECES = SPAN / XV;
#pragma unroll
  for (int t = 0; t < ceil_div(PIECES, TR); ++t) {
    const int next = lane + t * TR;
    const int piece = next < PIECES - p.before ? next + int(p.before) : next - (PIECES - int(p.before));
    const Index at = p0 + p.first + piece * XV;
    if (next < PIECES) store(&xs[slot][piece * XV], load_or_zero<XV>(from + at, row < p.rows && within(at, p.source)));
  }
  __syncthreads();
  if (row >= p.rows) return;

  for (Index m = 0; m < p.multiplier; ++m) {
    const Index filter = row % p.channels * p.multiplier + m;
    const S bias = p.bias ? value(p.bias + filter) : S{};
    const E* weights = p.w + p.tap_first + filter;
    E* to = p.y + (row * p.multiplier + m) * p.target;
    S w[KC];
    load_weights(w, weights, p.tap_step);
#pragma unroll
    for (int t = 0; t < TV; ++t) {
      // 2. Multiply-accumulate.
      const Index vector = lane + t * TR;
      S acc[V];
#pragma unroll
      for (int v = 0; v < V; ++v) acc[v] = bias;
      if constexpr (!MANY) {
        add_taps(acc, xs[slot], vector, w, p.dilation);
      } else {
        const E* from = weights;
        for (Index chunk = 0; chunk < p.chunks; ++chunk) {
          load_weights(w, from, p.tap_step);
          add_taps(acc, xs[slot], vector + chunk * (KC / V) * p.dilation, w, p.dilation);
          from += KC * p.tap_step;
        }
        if constexpr (KT > 0) {
          S rest[larger(KT, 1)];
          load_weights(rest, from, p.tap_step);
          add_taps(acc, xs[slot], vector + p.chunks * (KC / V) * p.dilation, rest, p.dilation);
        }
      }

      // 3. Epilogue.
      const Index at = p0 + vector * V;
#pragma unroll
      for (int q = 0; q < V; q += YV) {
        if (at + q >= p.target) continue;
        Vector<E, YV> result;
#pragma unroll
        for (int v = 0; v < YV; ++v) result.at[v] = finish<ACTIVATION, E>(acc[q + v]);
        store(to + at + q, result);
      }
    }
  }
}
