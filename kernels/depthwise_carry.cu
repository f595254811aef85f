// depthwise_carry.cu -- depthwise convolution along channels-last sequences, few taps: every input is loaded once.
//
//   y[b,p,c*M+m] = act( bias[c*M+m] + sum over r of  x[b, p*stride + r*dilation - pad, c] * w[r,c,m] ),
//   where the stride divides the dilation; or, with taps in reverse, the transpose of stride 1 and M = 1.
//
// Twin   cuconv/reference/depthwise.py      Plan  cuconv/plan/depthwise.py::plan_carry
// Test   tests/test_depthwise_kernels.py
//
// Arrays, C-contiguous   x [B, L, C]   w [K, C, M]   bias [C*M] or null   y [B, P, C*M]
//
// Work split
//   One thread owns VEC neighbouring output channels and walks `steps` outputs of one phase (depthwise.cuh). Input i of
//   the walk belongs to outputs i-K+1 .. i; their K sums are in registers, where slot j % K holds output j:
//
//     input      i-1     i      i+1
//     output j    w2     w3                      K = 4: output j = i-3 leaves after input i, and its slot is then
//           j+1   w1     w2     w3               taken by output i+1
//           j+2   w0     w1     w2
//
//   TP inputs, a multiple of K, are loaded at once: TP * 16 bytes of a thread are on their way. The first K-1 inputs of
//   a walk are read by the walk before too. blockIdx.x and threadIdx.x count, fastest first: channel vector, phase,
//   walk, batch item.
//
// No shared memory.

#include "depthwise.cuh"

// Set by the plan: ELEMENT INDEX ACTIVATION   VEC output channels of a thread   XV input channels they read
//   K taps   TP inputs at a time   BLOCKS of a multiprocessor, whose registers they share
constexpr int THREADS = 128;
static_assert(VEC % XV == 0, "a multiplier repeats whole channels");
static_assert(TP % K == 0, "slots of sums repeat after K inputs");

struct Params {
  const E* x;
  const E* w;
  const E* bias;
  E* y;
  Index threads, vectors, multiplier, channels, filters;
  Index phases, walks, steps;            // outputs of a walk
  Index source, target;                  // L, P
  Index first, phase_step, source_step;  // tap 0 of output j of phase f reads first + f*phase_step + j*source_step
  Index tap_first, tap_step;             // elements of w
};

// One walk, as it stands before input i.
struct Walk {
  const E* from;  // of input i
  E* to;          // of output i - (K-1)
  Index from_step, to_step;
  Index at, source_step, source;  // source position of input i
  Index i, inputs;
};

// Takes TP inputs. WHOLE: all of them lie inside x, all belong to this walk, and all complete an output of it.
template <bool WHOLE>
__device__ __forceinline__ void advance(Walk& walk, S (&acc)[K][VEC], const S (&w)[K][VEC], const S (&bias)[VEC]) {
  Vector<E, XV> xs[TP];
#pragma unroll
  for (int t = 0; t < TP; ++t) {
    const E* from = walk.from + t * walk.from_step;
    const bool inside = walk.i + t < walk.inputs && within(walk.at + t * walk.source_step, walk.source);
    xs[t] = WHOLE ? load<XV>(from) : load_or_zero<XV>(from, inside);
  }
#pragma unroll
  for (int t = 0; t < TP; ++t) {
    S x[XV];
    widen_vector(x, xs[t]);
#pragma unroll
    for (int v = 0; v < VEC; ++v) acc[t % K][v] = bias[v];
#pragma unroll
    for (int r = 0; r < K; ++r) add_products(acc[(t + K - r) % K], x, w[r]);
    if (!WHOLE && (walk.i + t < K - 1 || walk.i + t >= walk.inputs)) continue;
    Vector<E, VEC> result;
#pragma unroll
    for (int v = 0; v < VEC; ++v) result.at[v] = finish<ACTIVATION, E>(acc[(t + 1) % K][v]);
    store(walk.to + t * walk.to_step, result);
  }
  walk.from += TP * walk.from_step;
  walk.to += TP * walk.to_step;
  walk.at += TP * walk.source_step;
  walk.i += TP;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) depthwise_carry(const __grid_constant__ Params p) {
  Index n = Index(blockIdx.x) * THREADS + threadIdx.x;
  if (n >= p.threads) return;
  const Index channel = take(n, p.vectors) * VEC;
  const Index phase = take(n, p.phases), j0 = take(n, p.walks) * p.steps, batch = n;
  const Index left = (p.target - phase + p.phases - 1) / p.phases - j0;
  const Index outputs = left < p.steps ? left : p.steps;
  if (outputs <= 0) return;

  S w[K][VEC], bias[VEC] = {};
#pragma unroll
  for (int r = 0; r < K; ++r) widen_vector(w[r], load<VEC>(p.w + p.tap_first + r * p.tap_step + channel));
  if (p.bias)
#pragma unroll
    for (int v = 0; v < VEC; ++v) bias[v] = value(p.bias + channel + v);

  const Index at = p.first + phase * p.phase_step + j0 * p.source_step;
  Walk walk{p.x + (batch * p.source + at) * p.channels + channel / p.multiplier,
            p.y + (batch * p.target + phase + (j0 - (K - 1)) * p.phases) * p.filters + channel,
            p.source_step * p.channels,
            p.phases * p.filters,
            at,
            p.source_step,
            p.source,
            0,
            outputs + K - 1};
  S acc[K][VEC] = {};
  while (walk.i < walk.inputs) {
    advance<false>(walk, acc, w, bias);
    while (walk.at >= 0 && walk.at + (TP - 1) * p.source_step < p.source && walk.i + TP <= walk.inputs)
      advance<true>(walk, acc, w, bias);
  }
}
