// depthwise.cuh -- what the depthwise kernels share: one spatial axis of a convolution or of its transpose, phase
// order, and sums over the threads of a block.
//
// Phase order. With g = gcd(stride, dilation), the outputs f, f + dilation/g, f + 2*dilation/g, ... of an axis read
// input positions that are `dilation` apart, `stride / g` from one output to the next: whatever the dilation, a walk in
// this order is a walk of dilation 1.
//
//   stride 1, dilation 3      input  0 1 2 3 4 5 6 7 8 9 ..
//   phase f = 0, two taps     output 0 reads 0 3, output 3 reads 3 6, output 6 reads 6 9
//
// The transpose (gradient of the input) in the same words: the positions f, f + phases, ... with phases =
// stride * dilation/g are reached by the same taps, and each of those reads every (dilation/g)-th position of y.
// Taps are numbered so that the positions they read ascend; the order of a sum depends on nothing else.

#pragma once

#include "activations.cuh"

using E = ELEMENT;
using S = Sum<E>;
using Index = INDEX;

template <class T>
constexpr bool is_bfloat = false;
template <>
constexpr bool is_bfloat<bfloat_t> = true;

// One axis. The source is the array that is read through the taps, the target the one that is written.
struct Axis {
  Index source, target;             // positions
  Index stride, dilation, pad, taps;  // of the convolution
  Index common;                     // gcd(stride, dilation)
  Index inverse;                    // of dilation / common, modulo stride / common
  Index source_pitch, target_pitch;  // elements from one position to the next
  Index tap_pitch;                  // elements of w from one tap to the next
};

// What one target position sums: tap t < taps is tap_first + t * tap_step of w and reads source first + t * step.
struct Line {
  Index first, step, taps, tap_first, tap_step;
};

template <bool BACKWARDS>
__device__ __forceinline__ Line line_of(const Axis& a, Index at) {
  if constexpr (!BACKWARDS) {
    return {at * a.stride - a.pad, a.dilation, a.taps, 0, 1};
  } else {
    // p * stride + r * dilation = at + pad has solutions r = tap, tap + every, ..
    const Index every = a.stride / a.common, reach = at + a.pad;
    const Index tap = Index((long long)(reach / a.common % every) * a.inverse % every);
    const bool none = reach % a.common != 0 || tap >= a.taps;
    const Index count = none ? 0 : (a.taps - tap + every - 1) / every;
    const Index step = a.dilation / a.common;
    const Index source = none ? 0 : (reach - tap * a.dilation) / a.stride;  // divides evenly; may be negative
    return {source - (count - 1) * step, step, count, tap + (count - 1) * every, -every};
  }
}

// The remainder by `size`; what is left of n is the quotient.
__device__ __forceinline__ Index take(Index& n, Index size) {
  const Index quotient = n / size, rest = n - quotient * size;
  n = quotient;
  return rest;
}

// sum[v] += x[v * XV / N] * w[v]: N output channels, that read XV input channels.
template <int N, int XN>
__device__ __forceinline__ void add_products(S (&sum)[N], const S (&x)[XN], const S (&w)[N]) {
#pragma unroll
  for (int v = 0; v < N; ++v) multiply_add(sum[v], x[v * XN / N], w[v]);
}

// Two bfloat16 make a word: one instruction each.
template <int N>
__device__ __forceinline__ void widen_vector(S (&to)[N], const Vector<E, N>& from) {
  if constexpr (is_bfloat<E> && N % 2 == 0) {
    unsigned words[N / 2];
    memcpy(words, &from, sizeof words);
#pragma unroll
    for (int v = 0; v < N; v += 2) {
      to[v] = __uint_as_float(words[v / 2] << 16);
      to[v + 1] = __uint_as_float(words[v / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int v = 0; v < N; ++v) to[v] = widen(from.at[v]);
  }
}

// One element of an array that this kernel only reads.
__device__ __forceinline__ S value(const E* from) { return widen(load<1>(from).at[0]); }

// Adds each sum of the threads that are equal modulo LANES, in a fixed order; the first LANES threads hold the result.
// `sums` is shared, [COUNT][N], COUNT the threads of the block, all of which take part.
template <int COUNT, int LANES, int N>
__device__ __forceinline__ void add_over_block(S (&sum)[N], S (*sums)[N]) {
  const int thread = threadIdx.x;
  __syncthreads();  // what was in `sums` has been read
#pragma unroll
  for (int v = 0; v < N; ++v) sums[thread][v] = sum[v];
#pragma unroll 1
  for (int half = COUNT / 2; half >= LANES; half /= 2) {
    __syncthreads();
    if (thread < half)
#pragma unroll
      for (int v = 0; v < N; ++v) sums[thread][v] = sum[v] = add(sum[v], sums[thread + half][v]);
  }
}
