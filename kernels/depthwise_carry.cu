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
//   K taps   TP inputs at a time
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

extern "C" __global__ void __launch_bounds__(THREADS) depthwise_carry(const __grid_constant__ Params p) {
  Index n = Index(blockIdx.x) * THREADS + threadIdx.x;
  if (n >= p.threads) return;
  const Index channel = take(n, p.vectors) * VEC;
  const Index phase = take(n, p.phases), j0 = take(n, p.walks) * p.steps, batch = n;
  const Index left = (p.target - phase + p.phases - 1) / p.phases - j0;
  const Index outputs = left < p.steps ? left : p.steps;
  if (outputs <= 0) return;
  const Index inputs = outputs + K - 1;

  S w[K][VEC], bias[VEC] = {};
#pragma unroll
  for (int r = 0; r < K; ++r) widen_vector(w[r], load<VEC>(p.w + p.tap_first + r * p.tap_step + channel));
  if (p.bias)
#pragma unroll
    for (int v = 0; v < VEC; ++v) bias[v] = widen(p.bias[channel + v]);

  Index at = p.first + phase * p.phase_step + j0 * p.source_step;  // source position of input i
  const Index from_step = p.source_step * p.channels, to_step = p.phases * p.filters;
  const E* from = p.x + (batch * p.source + at) * p.channels + channel / p.multiplier;
  E* to = p.y + (batch * p.target + phase + (j0 - (K - 1)) * p.phases) * p.filters + channel;  // output i - (K-1)

  S acc[K][VEC] = {};
  for (Index i = 0; i < inputs; i += TP) {
    Vector<E, XV> xs[TP];
#pragma unroll
    for (int t = 0; t < TP; ++t)
      xs[t] = load_or_zero<XV>(from + t * from_step, i + t < inputs && within(at + t * p.source_step, p.source));
#pragma unroll
    for (int t = 0; t < TP; ++t) {
      S x[XV];
      widen_vector(x, xs[t]);
#pragma unroll
      for (int v = 0; v < VEC; ++v) acc[t % K][v] = S{};
#pragma unroll
      for (int r = 0; r < K; ++r) add_products(acc[(t + K - r) % K], x, w[r]);
      if (i + t < K - 1 || i + t >= inputs) continue;
      Vector<E, VEC> result;
#pragma unroll
      for (int v = 0; v < VEC; ++v) result.at[v] = finish<ACTIVATION, E>(add(acc[(t + 1) % K][v], bias[v]));
      store(to + t * to_step, result);
    }
    at += TP * p.source_step;
    from += TP * from_step;
    to += TP * to_step;
  }
}
