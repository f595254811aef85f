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
//     channels_last    channel vector, position of the last but one axis, phase, group of TP outputs, first axis, item
//     channels_first   position of the last axis, phase, group of TP outputs, first axis, channel, item
//   so that with few channels a block has several rows of outputs, which read the same rows of inputs.
//   Taps of the walked axis are taken KC at a time, the last few singly: (TP-1)*SG + KC inputs and KC weights are read
//   for TP * KC products, and each is used from registers. Overlapping inputs of neighbouring threads come from L1.
//
// No shared memory.

#include "depthwise.cuh"

// Set by the plan: ELEMENT INDEX CHANNELS_FIRST TRANSPOSED ACTIVATION
//   VEC output channels of a thread   XV input channels they read   TP outputs   KC taps   SG source steps an output
//   BLOCKS of a multiprocessor, whose registers they share
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

// Where a thread stands among the taps of the walked axis.
struct Place {
  const E* from;        // of the first output's input
  const E* weights;
  Index at;             // source position of `from`
  Index step, from_step, weight_step;  // from one tap to the next: positions, elements of x, elements of w
};

// Adds N taps to TP outputs. WHOLE: every input of theirs lies inside x.
template <int N, bool WHOLE>
__device__ __forceinline__ void add_taps(S (&acc)[TP][VEC], const Place& place, Index source) {
  S w[N][VEC];
#pragma unroll
  for (int r = 0; r < N; ++r) widen_vector(w[r], load<VEC>(place.weights + r * place.weight_step));
  // Windows that do not overlap leave inputs out.
  constexpr bool APART = SG >= N;
#pragma unroll
  for (int k = 0; k < (APART ? TP * N : (TP - 1) * SG + N); ++k) {
    const int i = APART ? k / N * SG + k % N : k;
    const E* from = place.from + i * place.from_step;
    S x[XV];
    widen_vector(x, WHOLE ? load<XV>(from) : load_or_zero<XV>(from, within(place.at + i * place.step, source)));
#pragma unroll
    for (int r = 0; r < N; ++r)
      if (i >= r && (i - r) % SG == 0 && (i - r) / SG < TP) add_products(acc[(i - r) / SG], x, w[r]);
  }
}

template <int N>
__device__ __forceinline__ void add_taps(S (&acc)[TP][VEC], Place& place, Index source) {
  constexpr int LAST = (TP - 1) * SG + N - 1;
  if (N > 1 && place.at >= 0 && place.at + LAST * place.step < source) add_taps<N, true>(acc, place, source);
  else add_taps<N, false>(acc, place, source);
  place.from += N * place.from_step;
  place.weights += N * place.weight_step;
  place.at += N * place.step;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) depthwise(const __grid_constant__ Params p) {
  Index n = Index(blockIdx.x) * THREADS + threadIdx.x;
  if (n >= p.threads) return;
  Index vector = 0;
  if constexpr (!CHANNELS_FIRST) vector = take(n, p.vectors);
  const Index at1 = take(n, p.outer[1].target), phase = take(n, p.phases), group = take(n, p.groups);
  const Index at0 = take(n, p.outer[0].target);
  if constexpr (CHANNELS_FIRST) vector = take(n, p.vectors);
  const Index batch = n;

  const Index channel = vector * VEC;                                                  // of the target
  const Index source_channel = TRANSPOSED ? channel * p.multiplier : channel / p.multiplier;
  const Line walk = line_of<TRANSPOSED>(p.walk, phase);
  const Line line0 = line_of<TRANSPOSED>(p.outer[0], at0), line1 = line_of<TRANSPOSED>(p.outer[1], at1);
  const Index first = walk.first + group * TP * SG * walk.step;
  const Index target = phase + group * TP * p.phases;  // the first output of the thread

  // All that the loops and the epilogue need of the above.
  const Index outputs = (p.walk.target - target + p.phases - 1) / p.phases;
  const E* base = p.x + batch * p.source_batch + source_channel * p.source_channel + first * p.walk.source_pitch;
  const E* taps = p.w + (TRANSPOSED ? source_channel : channel) + walk.tap_first * p.walk.tap_pitch;
  E* to = p.y + batch * p.target_batch + channel * p.target_channel + at0 * p.outer[0].target_pitch +
          at1 * p.outer[1].target_pitch + target * p.walk.target_pitch;

  S acc[TP][VEC];
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    const S bias = p.bias ? value(p.bias + channel + v) : S{};
#pragma unroll
    for (int j = 0; j < TP; ++j) acc[j][v] = bias;
  }
  for (Index m = 0; m < (TRANSPOSED ? p.multiplier : 1); ++m) {
    for (Index t0 = 0; t0 < line0.taps; ++t0) {
      const Index source0 = line0.first + t0 * line0.step;
      if (!within(source0, p.outer[0].source)) continue;
      for (Index t1 = 0; t1 < line1.taps; ++t1) {
        const Index source1 = line1.first + t1 * line1.step;
        if (!within(source1, p.outer[1].source)) continue;
        Place place{base + m * p.source_channel + source0 * p.outer[0].source_pitch + source1 * p.outer[1].source_pitch,
                    taps + m + (line0.tap_first + t0 * line0.tap_step) * p.outer[0].tap_pitch +
                        (line1.tap_first + t1 * line1.tap_step) * p.outer[1].tap_pitch,
                    first,
                    walk.step,
                    walk.step * p.walk.source_pitch,
                    walk.tap_step * p.walk.tap_pitch};
        Index left = walk.taps;
        for (; left >= KC; left -= KC) add_taps<KC>(acc, place, p.walk.source);
        if constexpr (KC > 1)
          for (; left > 0; --left) add_taps<1>(acc, place, p.walk.source);
      }
    }
  }

#pragma unroll
  for (int j = 0; j < TP; ++j) {
    if (j >= outputs) break;
    Vector<E, VEC> result;
#pragma unroll
    for (int v = 0; v < VEC; ++v) result.at[v] = finish<ACTIVATION, E>(acc[j][v]);
    store(to + j * p.phases * p.walk.target_pitch, result);
  }
}
