// common.cuh -- what every kernel file shares: the dimension key, index helpers, activations.
//
// Twin   cuconv/activations.py      Test   tests/test_kernels.py
//
// Dimension key (all kernel files, all comments)
//   B batch            C input channels     F filters (output channels)     G groups
//   L | H W | D H W    input positions      P | P Q | Z P Q  output positions
//   R | R S | T R S    filter taps
// Tile constants: first letter = level (B block, W warp, T thread), second = dimension.
//
// Header-free CUDA C: NVRTC needs no include path. Built-in math functions only.

#pragma once

__device__ __forceinline__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ACTIVATION codes of the pointwise activations that kernels fuse; mirrored by cuconv/plan/types.py::ACTIVATION_CODES.
constexpr int ACT_LINEAR = 0;
constexpr int ACT_RELU = 1;
constexpr int ACT_RELU6 = 2;
constexpr int ACT_LEAKY_RELU = 3;
constexpr int ACT_SIGMOID = 4;
constexpr int ACT_TANH = 5;
constexpr int ACT_SILU = 6;
constexpr int ACT_GELU = 7;
constexpr int ACT_ELU = 8;
constexpr int ACT_SELU = 9;
constexpr int ACT_SOFTPLUS = 10;
constexpr int ACT_SOFTSIGN = 11;
constexpr int ACT_EXPONENTIAL = 12;
constexpr int ACT_HARD_SIGMOID = 13;
constexpr int ACT_HARD_SILU = 14;

// exp(-|v|) keeps the argument of exp at or below zero, so that nothing overflows.
__device__ __forceinline__ float sigmoid(float v) {
  const float e = expf(-fabsf(v));
  return (v >= 0.f ? 1.f : e) / (1.f + e);
}

// One pointwise activation. A NaN stays a NaN: comparisons are written so that they are false for it.
template <int ACT>
__device__ __forceinline__ float activate(float v) {
  if constexpr (ACT == ACT_RELU) return v < 0.f ? 0.f : v;
  if constexpr (ACT == ACT_RELU6) return v < 0.f ? 0.f : v > 6.f ? 6.f : v;
  if constexpr (ACT == ACT_LEAKY_RELU) return v < 0.f ? 0.2f * v : v;
  if constexpr (ACT == ACT_SIGMOID) return sigmoid(v);
  if constexpr (ACT == ACT_TANH) return tanhf(v);
  if constexpr (ACT == ACT_SILU) return v * sigmoid(v);
  if constexpr (ACT == ACT_GELU) return 0.5f * v * erfcf(-v * 0.70710678118654752f);
  if constexpr (ACT == ACT_ELU) return v < 0.f ? expm1f(v) : v;
  if constexpr (ACT == ACT_SELU) return 1.05070098735548049f * (v < 0.f ? 1.67326324235437728f * expm1f(v) : v);
  if constexpr (ACT == ACT_SOFTPLUS) return (v < 0.f ? 0.f : v) + log1pf(expf(-fabsf(v)));
  if constexpr (ACT == ACT_SOFTSIGN) return v / (1.f + fabsf(v));
  if constexpr (ACT == ACT_EXPONENTIAL) return expf(v);
  if constexpr (ACT == ACT_HARD_SIGMOID) return v < -3.f ? 0.f : v > 3.f ? 1.f : (v + 3.f) / 6.f;
  if constexpr (ACT == ACT_HARD_SILU) return v < -3.f ? 0.f : v > 3.f ? v : v * (v + 3.f) / 6.f;
  return v;
}
