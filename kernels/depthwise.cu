// depthwise.cu -- depthwise convolution and its transpose: any rank, layout, stride, dilation, multiplier, kernel size.
//
//   y[b,p,c*M+m] = act( bias[c*M+m] + sum over r of  x[b, p*stride + r*dilation - pad, c] * w[r,c,m] )
//   TRANSPOSED:  dx[b,u,c] = sum over m and the p, r with p*stride + r*dilation - pad = u of  dy[b,p,c*M+m] * w[r,c,m]
//   What is read is zero outside its bounds; a product that the sum does not contain is not formed.
//
// Twin   cuconv/reference/depthwise.py      Plan  cuconv/plan/depthwise.py::plan_walk
// Test   tests/test_depthwise_kernels.py
//
// Arrays, C-contiguous   x [B, L.., C] or [B, C, L..]   w [R.., C, M]   bias [C*M] or null   y [B, P.., C*M] or
//   [B, C*M, P..]; transposed, x is dy and y is dx.
//
// Work split
//   One thread walks TP outputs along one axis in phase order (depthwise.cuh): the last spatial axis of channels_last,
//   where it owns VEC neighbouring channels, and the last but one of channels_first, where neighbouring lanes have
//   neighbouring positions of the last axis. blockIdx.x and threadIdx.x count, fastest first,
//     channels_last    channel vector, phase, group of TP outputs, the other axes, batch item
//     channels_first   position of the last axis, phase, group, first axis, channel, batch item
//   Taps of the walked axis are taken KC at a time, the last few singly: (TP-1)*SG + KC inputs and KC weights are read
//   for TP * KC products, and each is used from registers. Overlapping inputs of neighbouring threads come from L1.
//
// No shared memory.

#include "depthwise.cuh"

// Set by the plan: ELEMENT INDEX CHANNELS_FIRST TRANSPOSED ACTIVATION
//   VEC output channels of a thread   XV input channels they read   TP outputs   KC taps   SG source steps an output
constexpr int THREADS = 128;
static_assert(VEC % XV == 0, "a multiplier repeats whole channels");
static_assert(!CHANNELS_FIRST || VEC == 1, "neighbouring channels lie far apart");
static_assert(!TRANSPOSED || (SG == 1 && XV == VEC), "the transpose reads a channel for each it writes");

struct Params {
  const E* x;
  const E* w;
  const E* bias;
  E* y;
  Index threads, vectors, multiplier;
  Index phases, groups;                         // of the walked axis
  Index source_batch, target_batch;             // elements of a batch item
  Index source_channel, target_channel;         // elements from one channel to the next
  Axis walk, outer[2];
};

// Adds N taps, from tap t of the line on, to TP outputs. `from` is at source position 0, `weights` at tap 0.
template <int N>
__device__ __forceinline__ void add_taps(S (&acc)[TP][VEC], const E* from, const E* weights, const Axis& axis,
                                         const Line& line, Index first, Index t) {
  S w[N][VEC];
#pragma unroll
  for (int r = 0; r < N; ++r)
    widen_vector(w[r], load<VEC>(weights + (line.tap_first + (t + r) * line.tap_step) * axis.tap_pitch));
#pragma unroll
  for (int i = 0; i < (TP - 1) * SG + N; ++i) {
    if (i % SG >= N) continue;  // between two windows
    const Index at = first + (t + i) * line.step;
    S x[XV];
    widen_vector(x, load_or_zero<XV>(from + at * axis.source_pitch, within(at, axis.source)));
#pragma unroll
    for (int r = 0; r < N; ++r)
      if (i >= r && (i - r) % SG == 0 && (i - r) / SG < TP) add_products(acc[(i - r) / SG], x, w[r]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) depthwise(const __grid_constant__ Params p) {
  Index n = Index(blockIdx.x) * THREADS + threadIdx.x;
  if (n >= p.threads) return;
  Index vector = 0, at1 = 0;
  if constexpr (CHANNELS_FIRST) at1 = take(n, p.outer[1].target);
  else vector = take(n, p.vectors);
  const Index phase = take(n, p.phases), group = take(n, p.groups);
  if constexpr (!CHANNELS_FIRST) at1 = take(n, p.outer[1].target);
  const Index at0 = take(n, p.outer[0].target);
  if constexpr (CHANNELS_FIRST) vector = take(n, p.vectors);
  const Index batch = n;

  const Index channel = vector * VEC;                                                  // of the target
  const Index source_channel = TRANSPOSED ? channel * p.multiplier : channel / p.multiplier;
  const Line walk = line_of<TRANSPOSED>(p.walk, phase);
  const Line line0 = line_of<TRANSPOSED>(p.outer[0], at0), line1 = line_of<TRANSPOSED>(p.outer[1], at1);
  const Index first = walk.first + group * TP * SG * walk.step;

  S acc[TP][VEC] = {};
  for (Index m = 0; m < (TRANSPOSED ? p.multiplier : 1); ++m) {
    for (Index t0 = 0; t0 < line0.taps; ++t0) {
      const Index source0 = line0.first + t0 * line0.step;
      if (!within(source0, p.outer[0].source)) continue;
      for (Index t1 = 0; t1 < line1.taps; ++t1) {
        const Index source1 = line1.first + t1 * line1.step;
        if (!within(source1, p.outer[1].source)) continue;
        const E* from = p.x + batch * p.source_batch + (source_channel + m) * p.source_channel +
                        source0 * p.outer[0].source_pitch + source1 * p.outer[1].source_pitch;
        const E* weights = p.w + (TRANSPOSED ? source_channel + m : channel) +
                           (line0.tap_first + t0 * line0.tap_step) * p.outer[0].tap_pitch +
                           (line1.tap_first + t1 * line1.tap_step) * p.outer[1].tap_pitch;
        Index t = 0;
        for (; t + KC <= walk.taps; t += KC) add_taps<KC>(acc, from, weights, p.walk, walk, first, t);
        if constexpr (KC > 1)
          for (; t < walk.taps; ++t) add_taps<1>(acc, from, weights, p.walk, walk, first, t);
      }
    }
  }

  S bias[VEC] = {};
  if (p.bias)
#pragma unroll
    for (int v = 0; v < VEC; ++v) bias[v] = widen(p.bias[channel + v]);
  E* to = p.y + batch * p.target_batch + channel * p.target_channel + at0 * p.outer[0].target_pitch +
          at1 * p.outer[1].target_pitch;
#pragma unroll
  for (int j = 0; j < TP; ++j) {
    const Index at = phase + (group * TP + j) * p.phases;
    if (at >= p.walk.target) continue;
    Vector<E, VEC> result;
#pragma unroll
    for (int v = 0; v < VEC; ++v) result.at[v] = finish<ACTIVATION, E>(add(acc[j][v], bias[v]));
    store(to + at * p.walk.target_pitch, result);
  }
}
