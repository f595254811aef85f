// reduce_splits.cu -- adds up the partial sums of a gradient that was split over positions.
//
//   out[i] = sum over s of partial[s, i], in ascending order of s: the same bits on every run.
//
// Plan   cuconv/plan/reduce.py::plan_reduce      Test  tests/test_conv_kernels.py
//
// Arrays, C-contiguous   partial [splits, count] of the sum type   out [count] of the element type
//
// Work split   blockIdx.x: tile of THREADS * VEC sums; one thread VEC neighbouring ones. No shared memory.

#include "parts.cuh"

// Set by the plan: ELEMENT INDEX THREADS VEC
using E = ELEMENT;
using S = Sum<E>;
using Index = INDEX;

struct Params {
  const S* partial;
  E* out;
  Index splits, count;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) reduce_splits(const __grid_constant__ Params p) {
  const Index i = (Index(blockIdx.x) * THREADS + threadIdx.x) * VEC;
  if (i >= p.count) return;
  const Vector<S, VEC> sum = sum_of_parts<VEC>(p.partial, p.splits, p.count, i);
  Vector<E, VEC> result;
#pragma unroll
  for (int v = 0; v < VEC; ++v) result.at[v] = narrow<E>(sum.at[v]);
  store(p.out + i, result);
}
