// conv_lstm.cu -- the gates of a convolutional LSTM step.
//
//   c' = r(z_f) * c + r(z_i) * a(z_c)        h' = r(z_o) * a(c')
//   r is the recurrent activation, a the output's; z holds the sums of both convolutions, gates i, f, c, o.
//
// Twin   cuconv/reference/conv_lstm.py::gates      Plan  cuconv/plan/conv_lstm.py::plan_gates
// Test   tests/test_conv_lstm_kernels.py
//
// Arrays, C-contiguous:  z [outer,4,inner]   c, h_out, c_out [outer,inner]
//   channels_last: outer = B * P.., inner = F.   channels_first: outer = B, inner = F * P...
//
// Work split
//   one thread   VECTOR neighbours of c; neighbours in a block lie side by side
//
// Shared memory: none.

#include "activations.cuh"

// Set by the plan:  ELEMENT   ACTIVATION RECURRENT (codes)   VECTOR   INDEX
using E = ELEMENT;
using Index = INDEX;
constexpr int THREADS = 128;

struct Params {
  const E* z;
  const E* c;
  E* h_out;
  E* c_out;
  Index inner;
  Index vectors;  // of c
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_lstm(const __grid_constant__ Params p) {
  const Index id = Index(blockIdx.x) * THREADS + threadIdx.x;
  if (id >= p.vectors) return;
  const Index at = id * VECTOR;
  const E* z = p.z + at / p.inner * 3 * p.inner + at;  // stands on z_i

  const Vector<E, VECTOR> zi = load<VECTOR>(z), zf = load<VECTOR>(z + p.inner), zc = load<VECTOR>(z + 2 * p.inner),
                          zo = load<VECTOR>(z + 3 * p.inner), before = load<VECTOR>(p.c + at);
  Vector<E, VECTOR> h, after;
#pragma unroll
  for (int e = 0; e < VECTOR; ++e) {
    Sum<E> c{}, product{};
    multiply_add(c, activate<RECURRENT>(widen(zf.at[e])), widen(before.at[e]));
    multiply_add(c, activate<RECURRENT>(widen(zi.at[e])), activate<ACTIVATION>(widen(zc.at[e])));
    multiply_add(product, activate<RECURRENT>(widen(zo.at[e])), activate<ACTIVATION>(c));
    after.at[e] = narrow<E>(c);
    h.at[e] = narrow<E>(product);
  }
  store<VECTOR>(p.h_out + at, h);
  store<VECTOR>(p.c_out + at, after);
}
