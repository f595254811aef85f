// activations.cuh -- the pointwise activations that kernels fuse.
//
// Twin   cuconv/activations.py      Test   tests/test_kernels.py
//
// R is float or double; the mathematical functions are CUDA's own, a few units in the last place off.

#pragma once

#include "common.cuh"

// Codes, mirrored by cuconv/plan/types.py::ACTIVATION_CODES.
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
template <class R>
__device__ __forceinline__ R sigmoid(R v) {
  const R e = exp(-fabs(v));
  return (v >= R(0) ? R(1) : e) / (R(1) + e);
}

// P(normal > v) of the standard normal distribution.
template <class R>
__device__ __forceinline__ R tail(R v) { return R(0.5) * erfc(v * R(0.70710678118654752)); }

// One pointwise activation. A NaN stays a NaN: comparisons are written so that they are false for it.
template <int ACT, class R>
__device__ __forceinline__ R activate(R v) {
  if constexpr (ACT == ACT_RELU) return v < R(0) ? R(0) : v;
  if constexpr (ACT == ACT_RELU6) return v < R(0) ? R(0) : v > R(6) ? R(6) : v;
  if constexpr (ACT == ACT_LEAKY_RELU) return v < R(0) ? R(0.2) * v : v;
  if constexpr (ACT == ACT_SIGMOID) return sigmoid(v);
  if constexpr (ACT == ACT_TANH) return tanh(v);
  if constexpr (ACT == ACT_SILU) return v * sigmoid(v);
  if constexpr (ACT == ACT_GELU) return v < R(-40) ? R(0) : v * tail(-v);
  if constexpr (ACT == ACT_ELU) return v < R(0) ? expm1(v) : v;
  if constexpr (ACT == ACT_SELU)
    return R(1.05070098735548049) * (v < R(0) ? R(1.67326324235437728) * expm1(v) : v);
  if constexpr (ACT == ACT_SOFTPLUS) return (v < R(0) ? R(0) : v) + log1p(exp(-fabs(v)));
  if constexpr (ACT == ACT_SOFTSIGN) return v / (R(1) + fabs(v));
  if constexpr (ACT == ACT_EXPONENTIAL) return exp(v);
  if constexpr (ACT == ACT_HARD_SIGMOID) return v < R(-3) ? R(0) : v > R(3) ? R(1) : (v + R(3)) / R(6);
  if constexpr (ACT == ACT_HARD_SILU) return v < R(-3) ? R(0) : v > R(3) ? v : v * (v + R(3)) / R(6);
  return v;
}

// Its derivative at v; at a kink that of the left side, and of both sides of hard_sigmoid and relu6 the flat one.
template <int ACT, class R>
__device__ __forceinline__ R slope(R v) {
  if constexpr (ACT == ACT_RELU) return v <= R(0) ? R(0) : R(1);
  if constexpr (ACT == ACT_RELU6) return v <= R(0) || v >= R(6) ? R(0) : R(1);
  if constexpr (ACT == ACT_LEAKY_RELU) return v > R(0) ? R(1) : v <= R(0) ? R(0.2) : v;
  if constexpr (ACT == ACT_SIGMOID) return sigmoid(v) * sigmoid(-v);
  if constexpr (ACT == ACT_TANH) {
    const R t = tanh(v);
    return R(1) - t * t;
  }
  if constexpr (ACT == ACT_SILU) return sigmoid(v) * (v * sigmoid(-v) + R(1));
  if constexpr (ACT == ACT_GELU) {
    const R a = v < R(-40) ? R(-40) : v > R(40) ? R(40) : v;  // infinity times a density of 0 is 0
    return tail(-a) + a * (R(0.39894228040143268) * exp(R(-0.5) * a * a));
  }
  if constexpr (ACT == ACT_ELU) return v > R(0) ? R(1) : exp(v);
  if constexpr (ACT == ACT_SELU)
    return R(1.05070098735548049) * (v > R(0) ? R(1) : R(1.67326324235437728) * exp(v));
  if constexpr (ACT == ACT_SOFTPLUS) return sigmoid(v);
  if constexpr (ACT == ACT_SOFTSIGN) {
    const R q = R(1) / (R(1) + fabs(v));
    return q * q;
  }
  if constexpr (ACT == ACT_EXPONENTIAL) return exp(v);
  if constexpr (ACT == ACT_HARD_SIGMOID) return v <= R(-3) || v >= R(3) ? R(0) : R(1) / R(6);
  if constexpr (ACT == ACT_HARD_SILU) {
    if (v <= R(-3)) return R(0);
    return v >= R(3) ? R(1) : (v + v + R(3)) / R(6);
  }
  return R(1);
}

// bias + activation of one sum, as the element it is stored as. Complex numbers have the linear one only.
template <int ACT, class E>
__device__ __forceinline__ E finish(Sum<E> sum) {
  if constexpr (ACT == ACT_LINEAR) return narrow<E>(sum);
  else return narrow<E>(activate<ACT>(sum));
}
