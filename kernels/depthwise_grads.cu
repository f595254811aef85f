// depthwise_grads.cu -- all gradients of a depthwise convolution along channels-last sequences, in one pass over x and
// dy.
//
//   dx[b,u,c] = sum over r of    dy[b, u + pad - r*dilation, c] * w[r,c]
//   dw[r,c]   = sum over b,p of  conj(x[b, p + r*dilation - pad, c]) * dy[b,p,c]
//   db[c]     = sum over b,p of  dy[b,p,c]                           stride 1, no multiplier, K taps
//
// Twin   cuconv/reference/depthwise.py      Plan  cuconv/plan/depthwise.py::plan_grads
// Test   tests/test_depthwise_kernels.py
//
// Arrays, C-contiguous   x, dx [B, L, C]   w [K, C, 1], conjugated   dy [B, P, C]   dx may be null
//   partial [splits, K, C] and bias_partial [splits, C] or null, of the sum type; reduce_splits.cu adds them up.
//
// Work split
//   In phase f, input i is position f + i*dilation - pad, and output j reads inputs j .. j+K-1. A unit is TP
//   neighbouring i of a phase: it writes their dx and adds the products of the outputs j = i. It reads TP + K-1 vectors
//   of x and of dy; the K-1 that belong to a neighbour come from L1. Thread (ty, tx) owns VEC channels and every
//   (THREADS / TX)-th unit of the `share` units of its block; blockIdx.x: (split, tile of TX channel vectors), tile
//   fastest.
//
// Shared memory   sums [THREADS][VEC]: the threads of a column are added in a tree of fixed shape.

#include "depthwise.cuh"

// Set by the plan: ELEMENT INDEX   VEC channels   TX   TP   K taps
constexpr int THREADS = 128;
constexpr int TY = THREADS / TX;
static_assert(THREADS % TX == 0 && (TX & (TX - 1)) == 0, "the tree of sums halves");

struct Params {
  const E* x;
  const E* w;
  const E* dy;
  E* dx;
  S* partial;
  S* bias_partial;
  Index vectors, tiles, channels;
  Index source, target, dilation, pad;  // source: L, target: P
  Index groups, units, share;
};

struct Unit {
  const E* x;    // of input i0
  const E* dy;   // of output i0 - (K-1)
  E* dx;         // of input i0, or null
  Index step;    // elements from one to the next
  Index at, dilation, source;  // position of input i0
  Index i0, outputs;           // outputs that exist from i0 on; may be negative
};

// WHOLE: all inputs lie inside x and all outputs exist, those of the unit before included.
template <bool WHOLE>
__device__ __forceinline__ void add_unit(const Unit& unit, const S (&w)[K][VEC], S (&dw)[K][VEC], S (&db)[VEC]) {
  // 1. Load inputs i0 .. and outputs i0 - (K-1) ..
  Vector<E, VEC> x[TP + K - 1], dy[TP + K - 1];
#pragma unroll
  for (int i = 0; i < TP + K - 1; ++i) {
    const E *from = unit.dy + i * unit.step, *input = unit.x + i * unit.step;
    dy[i] = WHOLE ? load<VEC>(from) : load_or_zero<VEC>(from, unit.i0 + i >= K - 1 && i - (K - 1) < unit.outputs);
    x[i] = WHOLE ? load<VEC>(input) : load_or_zero<VEC>(input, within(unit.at + i * unit.dilation, unit.source));
  }
  S gradient[TP + K - 1][VEC];
#pragma unroll
  for (int j = 0; j < TP + K - 1; ++j) widen_vector(gradient[j], dy[j]);

  // 2. dx, in ascending order of the positions of dy, as the convolution with the reversed kernel has it.
  if (unit.dx)
#pragma unroll
    for (int i = 0; i < TP; ++i) {
      S acc[VEC] = {};
#pragma unroll
      for (int t = 0; t < K; ++t) add_products(acc, gradient[i + t], w[K - 1 - t]);
      Vector<E, VEC> result;
#pragma unroll
      for (int v = 0; v < VEC; ++v) result.at[v] = narrow<E>(acc[v]);
      if (WHOLE || within(unit.at + i * unit.dilation, unit.source)) store(unit.dx + i * unit.step, result);
    }

  // 3. db and dw. An output that does not exist has no products, whatever its inputs would be.
#pragma unroll
  for (int j = 0; j < TP; ++j)
#pragma unroll
    for (int v = 0; v < VEC; ++v) db[v] = add(db[v], gradient[j + K - 1][v]);
#pragma unroll
  for (int i = 0; i < TP + K - 1; ++i) {
    S input[VEC];
    widen_vector(input, x[i]);
#pragma unroll
    for (int v = 0; v < VEC; ++v) input[v] = conjugate(input[v]);
#pragma unroll
    for (int r = 0; r < K; ++r)
      if (i >= r && i - r < TP && (WHOLE || i - r < unit.outputs)) add_products(dw[r], input, gradient[i - r + K - 1]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) depthwise_grads(const __grid_constant__ Params p) {
  __shared__ alignas(16) S sums[THREADS][VEC];
  Index block = blockIdx.x;
  const Index vector = take(block, p.tiles) * TX + threadIdx.x % TX, split = block;
  const Index channel = vector * VEC, last = p.units - split * p.share;
  const Index end = vector < p.vectors ? split * p.share + (last < p.share ? last : p.share) : 0;

  S w[K][VEC] = {}, dw[K][VEC] = {}, db[VEC] = {};
  if (vector < p.vectors)
#pragma unroll
    for (int r = 0; r < K; ++r) widen_vector(w[r], load<VEC>(p.w + r * p.channels + channel));

  for (Index next = split * p.share + threadIdx.x / TX; next < end; next += TY) {
    Index n = next;
    const Index phase = take(n, p.dilation), i0 = take(n, p.groups) * TP, batch = n;
    const Index outputs = (p.target - phase + p.dilation - 1) / p.dilation - i0;  // of i0 and above; may be negative
    const Index u0 = phase + i0 * p.dilation - p.pad;
    if (u0 >= p.source && outputs <= 0) continue;
    const Index step = p.dilation * p.channels;
    const Index offset = (batch * p.source + u0) * p.channels + channel;
    const E* x = p.x + offset;
    const E* dy = p.dy + (batch * p.target + phase + (i0 - (K - 1)) * p.dilation) * p.channels + channel;
    E* dx = p.dx ? p.dx + offset : nullptr;
    const Unit unit{x, dy, dx, step, u0, p.dilation, p.source, i0, outputs};
    const bool inputs_exist = u0 >= 0 && u0 + (TP + K - 2) * p.dilation < p.source;
    if (inputs_exist && i0 >= K - 1 && outputs >= TP) add_unit<true>(unit, w, dw, db);
    else add_unit<false>(unit, w, dw, db);
  }

  const bool writes = threadIdx.x < TX && vector < p.vectors;
#pragma unroll
  for (int r = 0; r < K; ++r) {
    add_over_block<THREADS, TX>(dw[r], sums);
    if (writes)
#pragma unroll
      for (int v = 0; v < VEC; ++v) p.partial[(split * K + r) * p.channels + channel + v] = dw[r][v];
  }
  if (p.bias_partial) {
    add_over_block<THREADS, TX>(db, sums);
    if (writes)
#pragma unroll
      for (int v = 0; v < VEC; ++v) p.bias_partial[split * p.channels + channel + v] = db[v];
  }
}
