// fragments.cuh -- the product of two fragments on tensor cores, by the type of the elements (the last argument).

#pragma once

#include "common.cuh"

__device__ __forceinline__ void multiply_add(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2], half_t) {
  ptx::multiply_half(acc, a, b);
}
__device__ __forceinline__ void multiply_add(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2], bfloat_t) {
  ptx::multiply_bfloat(acc, a, b);
}
__device__ __forceinline__ void multiply_add(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2], float) {
  ptx::multiply_tf32(acc, a, b);
}
__device__ __forceinline__ void multiply_add(double (&acc)[4], const double (&a)[4], const double (&b)[2], double) {
  ptx::multiply_double(acc, a, b);
}
