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
constexpr int ACT_CELU = 15;
constexpr int ACT_MISH = 16;
constexpr int ACT_SQUAREPLUS = 17;
constexpr int ACT_LOG_SIGMOID = 18;
constexpr int ACT_HARD_TANH = 19;
constexpr int ACT_TANH_SHRINK = 20;
constexpr int ACT_HARD_SHRINK = 21;
constexpr int ACT_SOFT_SHRINK = 22;
constexpr int ACT_SPARSE_PLUS = 23;
constexpr int ACT_SPARSE_SIGMOID = 24;
constexpr int ACT_LAST = ACT_SPARSE_SIGMOID;

// a / b for b from 1 to 2^126. Of floats it is two units in the last place off; the exact division is a call, for which
// kernels that fuse it spill.
__device__ __forceinline__ float divide(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double divide(double a, double b) { return a / b; }

// exp(-|v|) keeps the argument of exp at or below zero, so that nothing overflows.
template <class R>
__device__ __forceinline__ R sigmoid(R v) {
  const R e = exp(-fabs(v));
  return divide(v >= R(0) ? R(1) : e, R(1) + e);
}

// P(normal > v) of the standard normal distribution.
template <class R>
__device__ __forceinline__ R tail(R v) { return R(0.5) * erfc(v * R(0.70710678118654752)); }

template <class R>
__device__ __forceinline__ R softplus(R v) { return (v < R(0) ? R(0) : v) + log1p(exp(-fabs(v))); }

template <class R>
__device__ __forceinline__ R squareplus(R v) {
  const R total = sqrt(v * v + R(4)) + fabs(v);
  return R(0.5) * (v < R(0) ? R(4) / total : total);
}

// v within [low, high]; a NaN as it is.
template <class R>
__device__ __forceinline__ R clip(R v, R low, R high) { return v < low ? low : v > high ? high : v; }

// tanh(softplus(v)) = n / (n + 2) with n = e (e + 2), e = exp(v); from 20 on it is 1 in double precision.
template <class R>
struct MishParts {
  R t, e, n;
  __device__ __forceinline__ explicit MishParts(R v) : t(v > R(20) ? R(20) : v), e(exp(t)), n(e * (e + R(2))) {}
};

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
  if constexpr (ACT == ACT_SOFTPLUS) return softplus(v);
  if constexpr (ACT == ACT_SOFTSIGN) return v / (R(1) + fabs(v));
  if constexpr (ACT == ACT_EXPONENTIAL) return exp(v);
  if constexpr (ACT == ACT_HARD_SIGMOID) return v < R(-3) ? R(0) : v > R(3) ? R(1) : (v + R(3)) / R(6);
  if constexpr (ACT == ACT_HARD_SILU) return v < R(-3) ? R(0) : v > R(3) ? v : v * (v + R(3)) / R(6);
  if constexpr (ACT == ACT_CELU) return v < R(0) ? expm1(v) : v;
  if constexpr (ACT == ACT_MISH) {
    const MishParts<R> m(v);
    return v * (m.n / (m.n + R(2)));
  }
  if constexpr (ACT == ACT_SQUAREPLUS) return squareplus(v);
  if constexpr (ACT == ACT_LOG_SIGMOID) return -softplus(-v);
  if constexpr (ACT == ACT_HARD_TANH) return clip(v, R(-1), R(1));
  if constexpr (ACT == ACT_TANH_SHRINK) return v - tanh(v);
  if constexpr (ACT == ACT_HARD_SHRINK) return fabs(v) <= R(0.5) ? R(0) : v;
  if constexpr (ACT == ACT_SOFT_SHRINK) return v - clip(v, R(-0.5), R(0.5));
  if constexpr (ACT == ACT_SPARSE_PLUS) {
    const R h = v < R(-1) ? R(0) : v + R(1);
    return v < R(1) ? h * h / R(4) : v;
  }
  if constexpr (ACT == ACT_SPARSE_SIGMOID) return R(0.5) * (clip(v, R(-1), R(1)) + R(1));
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
  if constexpr (ACT == ACT_CELU) return v > R(0) ? R(1) : exp(v);
  if constexpr (ACT == ACT_MISH) {
    const MishParts<R> m(v);
    return (m.n + R(4) * m.t * m.e * (m.e + R(1)) / (m.n + R(2))) / (m.n + R(2));
  }
  if constexpr (ACT == ACT_SQUAREPLUS) return squareplus(v) / sqrt(v * v + R(4));
  if constexpr (ACT == ACT_LOG_SIGMOID) return sigmoid(-v);
  if constexpr (ACT == ACT_HARD_TANH) return v <= R(-1) || v >= R(1) ? R(0) : R(1);
  if constexpr (ACT == ACT_TANH_SHRINK) return tanh(v) * tanh(v);
  if constexpr (ACT == ACT_HARD_SHRINK || ACT == ACT_SOFT_SHRINK) return fabs(v) <= R(0.5) ? R(0) : R(1);
  if constexpr (ACT == ACT_SPARSE_PLUS) return R(0.5) * (clip(v, R(-1), R(1)) + R(1));
  if constexpr (ACT == ACT_SPARSE_SIGMOID) return v <= R(-1) || v >= R(1) ? R(0) : R(0.5);
  return R(1);
}

// bias + activation of one sum, as the element it is stored as. Complex numbers have the linear one only.
template <int ACT, class E>
__device__ __forceinline__ E finish(Sum<E> sum) {
  if constexpr (ACT == ACT_LINEAR) return narrow<E>(sum);
  else return narrow<E>(activate<ACT>(sum));
}
