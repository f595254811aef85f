// parts.cuh -- sums of parts: what kernels that split a sum have left, added up in ascending order.

#pragma once

#include "common.cuh"

// Sums i .. i + N - 1 over `splits` rows of `count` partial sums: the same bits on every run.
template <int N, class T, class I>
__device__ __forceinline__ Vector<T, N> sum_of_parts(const T* partial, I splits, I count, I i) {
  Vector<T, N> sum{};
#pragma unroll 4
  for (I s = 0; s < splits; ++s) {
    const Vector<T, N> part = load<N>(partial + s * count + i);
#pragma unroll
    for (int v = 0; v < N; ++v) sum.at[v] = add(sum.at[v], part.at[v]);
  }
  return sum;
}
