// depthwise_grad_rows.cu -- gradients of a depthwise convolution along channels-first sequences of stride 1, 16 bytes
// at a time: kernel and bias, and without a multiplier the input too, in one pass over x and dy.
//
//   dw[r,c,m]   = sum over b,p of  conj(x[b, c, p + r*dilation - pad]) * dy[b,c*M+m,p]
//   db[c*M+m]   = sum over b,p of  dy[b,c*M+m,p]
//   dx[b,c,u]   = sum over r of    dy[b, c, u + pad - r*dilation] * w[r,c]          M = 1, one chunk of taps
//
// Twin   cuconv/reference/depthwise.py      Plan  cuconv/plan/depthwise.py::plan_grad_rows
// Test   tests/test_depthwise_kernels.py
//
// Arrays, C-contiguous   x, dx [B, C, L]   w [K, C, M], conjugated   dy [B, C*M, P]; w and dx may be null
//   partial [splits, K, C, M] and bias_partial [splits, C*M] or null, of the sum type; reduce_splits.cu adds them up.
//
// Work split
//   Vectors are V elements, 16 bytes (depthwise_windows.cuh). A block sums KC taps of one filter over `share` units; a
//   unit is a vector of positions of one row, every THREADS-th belongs to a thread. Windows that reach into
//   neighbouring vectors are read again from L1. blockIdx.x: (split, chunk of taps, filter), filter fastest.
//
// Shared memory   sums [THREADS][1]: the threads are added in a tree of fixed shape.

#include "depthwise_windows.cuh"

// Set by the plan: ELEMENT INDEX   XV, YV elements of an access to x and dx, and to dy   KC taps
//   UNIT 1 for dilation 1   DMOD dilation % V   X_PHASE, Y_PHASE   WHOLE_ROWS 1 where V divides P   WITH_INPUT
constexpr int THREADS = 128;

struct Params {
  const E* x;
  const E* w;
  const E* dy;
  E* dx;
  S* partial;
  S* bias_partial;
  Index filters, multiplier, taps, chunks;
  Index source, target, dilation;  // L, P
  Index x_first, y_first;          // of the windows of x from p on and of dy from u on, rounded down to multiples of V
  Index row_vectors, units, share;
};

// V elements of a row from position `at` on, zero outside; `at` is a multiple of N.
template <int N>
__device__ __forceinline__ Vector<E, V> load_row(const E* row, Index at, Index size) {
  Vector<E, V> all;
#pragma unroll
  for (int q = 0; q < V; q += N) {
    const Vector<E, N> part = load_or_zero<N>(row + at + q, within(at + q, size));
#pragma unroll
    for (int v = 0; v < N; ++v) all.at[q + v] = part.at[v];
  }
  return all;
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) depthwise_grad_rows(const __grid_constant__ Params p) {
  __shared__ S sums[THREADS][1];
  Index block = blockIdx.x;
  const Index filter = take(block, p.filters), chunk = take(block, p.chunks), split = block;
  const Index channel = filter / p.multiplier, channels = p.filters / p.multiplier;
  const bool with_bias = p.bias_partial && chunk == 0;

  S w[KC] = {};
  if constexpr (WITH_INPUT)
#pragma unroll
    for (int r = 0; r < KC; ++r) w[r] = value(p.w + r * p.filters + filter);

  S dw[KC] = {}, db = {};
  const Index last = p.units - split * p.share, end = split * p.share + (last < p.share ? last : p.share);
  for (Index unit = split * p.share + threadIdx.x; unit < end; unit += THREADS) {
    Index batch = unit;
    const Index at = take(batch, p.row_vectors) * V;
    const E* x = p.x + (batch * channels + channel) * p.source;
    const E* dy = p.dy + (batch * p.filters + filter) * p.target;
    S window[KC][V];

    if (at < p.target) {
      S gradient[V];
      widen_vector(gradient, load_row<YV>(dy, at, p.target));
      if (with_bias)
#pragma unroll
        for (int v = 0; v < V; ++v) db = add(db, gradient[v]);
      const Index from = at + p.x_first + chunk * (KC / V) * V * p.dilation;
      windows<KC, X_PHASE, UNIT, DMOD>(window, p.dilation,
                                       [&](Index i) { return load_row<XV>(x, from + i * V, p.source); });
#pragma unroll
      for (int r = 0; r < KC; ++r)
#pragma unroll
        for (int v = 0; v < V; ++v)
          // An output that does not exist has no products, whatever its inputs would be.
          if (WHOLE_ROWS || at + v < p.target) multiply_add(dw[r], conjugate(window[r][v]), gradient[v]);
    }

    if constexpr (WITH_INPUT) {
      if (at < p.source) {
        // In ascending order of the positions of dy, as the convolution with the reversed kernel has it.
        windows<KC, Y_PHASE, UNIT, DMOD>(window, p.dilation,
                                         [&](Index i) { return load_row<YV>(dy, at + p.y_first + i * V, p.target); });
        S acc[V] = {};
#pragma unroll
        for (int t = 0; t < KC; ++t)
#pragma unroll
          for (int v = 0; v < V; ++v) multiply_add(acc[v], window[t][v], w[KC - 1 - t]);
        E* dx = p.dx + (batch * channels + channel) * p.source + at;
#pragma unroll
        for (int q = 0; q < V; q += XV) {
          if (at + q >= p.source) continue;
          Vector<E, XV> result;
#pragma unroll
          for (int v = 0; v < XV; ++v) result.at[v] = narrow<E>(acc[q + v]);
          store(dx + q, result);
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < KC; ++r) {
    S sum[1] = {dw[r]};
    add_over_block<THREADS, 1>(sum, sums);
    const Index tap = chunk * KC + r;
    if (threadIdx.x == 0 && tap < p.taps) p.partial[(split * p.taps + tap) * p.filters + filter] = sum[0];
  }
  if (with_bias) {
    S sum[1] = {db};
    add_over_block<THREADS, 1>(sum, sums);
    if (threadIdx.x == 0) p.bias_partial[split * p.filters + filter] = sum[0];
  }
}
