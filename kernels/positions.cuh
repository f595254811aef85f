// positions.cuh -- the elements and indices that a kernel of products is compiled for, and positions of any rank.

#pragma once

#include "common.cuh"

// Set by the plan: ELEMENT INDEX RANK
using E = ELEMENT;
using S = Sum<E>;
using Index = INDEX;

// A coordinate so far below zero that no reach of a window brings it back.
constexpr Index NOWHERE = -(Index(1) << (8 * sizeof(Index) - 2));

__device__ __forceinline__ Index linear(const Index (&at)[RANK], const Index (&size)[RANK]) {
  Index index = at[0];
#pragma unroll
  for (int a = 1; a < RANK; ++a) index = index * size[a] + at[a];
  return index;
}

__device__ __forceinline__ Index volume(const Index (&size)[RANK]) {
  Index count = size[0];
#pragma unroll
  for (int a = 1; a < RANK; ++a) count *= size[a];
  return count;
}

// Splits a linear index into coordinates; what is left, the batch item, is returned.
template <int N>
__device__ __forceinline__ Index split(Index index, const Index (&size)[N], Index (&at)[N]) {
#pragma unroll
  for (int a = N - 1; a >= 0; --a) {
    at[a] = index % size[a];
    index /= size[a];
  }
  return index;
}
