// conv_reduce.cu -- the end of a convolution whose K was split: adds up its parts, then bias and activation.
//
//   y[i] = act( bias[i / inner % F] + sum over s of partial[s, i] ), in ascending order of s: the same bits on every run.
//
// Plan   cuconv/plan/reduce.py::plan_conv_reduce      Test  tests/test_conv_parts.py
//
// Arrays, C-contiguous   partial [splits, count] of the sum type   bias [F]   y [count]
//
// Work split   blockIdx.x: tile of THREADS * VEC sums; one thread VEC neighbouring ones. No shared memory.

#include "activations.cuh"
#include "parts.cuh"

// Set by the plan: ELEMENT INDEX ACTIVATION THREADS VEC
using E = ELEMENT;
using S = Sum<E>;
using Index = INDEX;

struct Params {
  const S* partial;
  const E* bias;  // null: none
  E* y;
  Index splits, count;
  Index inner, filters;  // results that share a filter, one behind the other
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_reduce(const __grid_constant__ Params p) {
  const Index i = (Index(blockIdx.x) * THREADS + threadIdx.x) * VEC;
  if (i >= p.count) return;
  Vector<S, VEC> sum = sum_of_parts<VEC>(p.partial, p.splits, p.count, i);
  Vector<E, VEC> result;
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    if (p.bias) sum.at[v] = add(sum.at[v], S(widen(p.bias[(i + v) / p.inner % p.filters])));
    result.at[v] = finish<ACTIVATION, E>(sum.at[v]);
  }
  store(p.y + i, result);
}
