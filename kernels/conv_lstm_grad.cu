// conv_lstm_grad.cu -- gradients of the gates of a convolutional LSTM step.
//
//   with the gates, c' and h' of conv_lstm.cu, computed again from z and c:
//   g    = dc' + dh' * r(z_o) * a'(c')
//   dz_i = g * a(z_c) * r'(z_i)    dz_f = g * c * r'(z_f)
//   dz_c = g * r(z_i) * a'(z_c)    dz_o = dh' * a(c') * r'(z_o)    dc = g * r(z_f)
//
// Twin   cuconv/reference/conv_lstm.py::gates_grad      Plan  cuconv/plan/conv_lstm.py::plan_gates_grad
// Test   tests/test_conv_lstm_kernels.py
//
// Arrays, C-contiguous:  z, dz_out [outer,4,inner]   c, dh, dc, dc_out [outer,inner]
//   outer and inner as in conv_lstm.cu
//
// Work split
//   one thread   VECTOR neighbours of c; neighbours in a block lie side by side
//
// Shared memory: none.

#include "activations.cuh"

// Set by the plan:  ELEMENT   ACTIVATION RECURRENT (codes)   VECTOR   INDEX
using E = ELEMENT;
using Index = INDEX;
using S = Sum<E>;
constexpr int THREADS = 128;

struct Params {
  const E* z;
  const E* c;
  const E* dh;
  const E* dc;
  E* dz_out;
  E* dc_out;
  Index inner;
  Index vectors;  // of c
};

__device__ __forceinline__ S times(S a, S b) {
  S product{};
  multiply_add(product, a, b);
  return product;
}

// dy times the slope of an activation; the linear one has no slope to multiply with, nor have complex numbers.
template <int ACT, class R>
__device__ __forceinline__ R back(R v, R dy) {
  if constexpr (ACT == ACT_LINEAR) return dy;
  else return dy * slope<ACT>(v);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_lstm_grad(const __grid_constant__ Params p) {
  const Index id = Index(blockIdx.x) * THREADS + threadIdx.x;
  if (id >= p.vectors) return;
  const Index at = id * VECTOR;
  const Index at_z = at / p.inner * 3 * p.inner + at;  // z_i, the other gates `inner` further each
  const E* z = p.z + at_z;

  const Vector<E, VECTOR> zi = load<VECTOR>(z), zf = load<VECTOR>(z + p.inner), zc = load<VECTOR>(z + 2 * p.inner),
                          zo = load<VECTOR>(z + 3 * p.inner), before = load<VECTOR>(p.c + at),
                          dh = load<VECTOR>(p.dh + at), dc = load<VECTOR>(p.dc + at);
  Vector<E, VECTOR> di, df, dg, dout, dbefore;
#pragma unroll
  for (int e = 0; e < VECTOR; ++e) {
    const S i = widen(zi.at[e]), f = widen(zf.at[e]), g = widen(zc.at[e]), o = widen(zo.at[e]);
    const S c = widen(before.at[e]), dy = widen(dh.at[e]);
    const S in = activate<RECURRENT>(i), keep = activate<RECURRENT>(f), value = activate<ACTIVATION>(g);
    S after = times(keep, c);
    multiply_add(after, in, value);
    const S total = add(widen(dc.at[e]), back<ACTIVATION>(after, times(dy, activate<RECURRENT>(o))));
    di.at[e] = narrow<E>(back<RECURRENT>(i, times(total, value)));
    df.at[e] = narrow<E>(back<RECURRENT>(f, times(total, c)));
    dg.at[e] = narrow<E>(back<ACTIVATION>(g, times(total, in)));
    dout.at[e] = narrow<E>(back<RECURRENT>(o, times(dy, activate<ACTIVATION>(after))));
    dbefore.at[e] = narrow<E>(times(total, keep));
  }
  E* dz = p.dz_out + at_z;
  store<VECTOR>(dz, di);
  store<VECTOR>(dz + p.inner, df);
  store<VECTOR>(dz + 2 * p.inner, dg);
  store<VECTOR>(dz + 3 * p.inner, dout);
  store<VECTOR>(p.dc_out + at, dbefore);
}
