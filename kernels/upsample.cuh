// upsample.cuh -- the tables of weights that upsample.cu and upsample_grad.cu read.
//
// Test   tests/test_upsample_kernels.py::test_short_tables_hold_every_weight

#pragma once

#include "common.cuh"

// Row of input i, out of n, in the table of an axis with at most 2 * margin + 1 inputs: those further than `margin`
// from both ends have the weights of the one in its middle.
template <class I>
__device__ __forceinline__ I table_row(I i, I n, int margin) {
  const I shortened = n < 2 * margin + 1 ? n : I(2 * margin + 1);
  const I middle = i - margin;
  return i - (middle < 0 ? 0 : middle < n - shortened ? middle : n - shortened);
}
