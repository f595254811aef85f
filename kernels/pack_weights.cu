// pack_weights.cu -- the kernel of a convolution as the matrix that its transpose multiplies with, in sub-pixel form.
//
//   packed[g, (a.., f), (rho.., c)] = w[r.., c, g*F/G + f],   r = first + rho + (taps - 1 - a) * step  on every axis,
//   zero where r is no tap of w. Taps are reversed: what scatters becomes what gathers.
//
// Or with what is summed along memory, as products of TF32 need it: FILTERS_LAST, packed[g, a.., (rho.., c), f]; and of a
// convolution as it is packed[g, r.., f, c], which is the first form with steps of -1.
//
// Twin   cuconv/reference/transpose.py::_subpixel      Plan  cuconv/plan/pack.py
// Test   tests/test_conv_kernels.py, tests/test_conv_wgmma.py
//
// Arrays, C-contiguous   w [kernel.., C/G, F]   packed [G, taps.., F/G, phases.., C/G], or [G, taps.., phases.., C/G, F/G]
//
// Work split
//   blockIdx.x   group, tap, phase, tile of 32 filters, tile of 32 channels; channels fastest
//   one thread   4 elements: a warp reads 32 filters of one channel and writes 32 channels of one filter, or the filters
//
// Shared memory   tile [32][33], which is the transposition; the 33rd column keeps it free of bank conflicts for
//                 elements of 4 bytes.

#include "common.cuh"

// Set by the plan: ELEMENT INDEX RANK FILTERS_LAST
using E = ELEMENT;
using Index = INDEX;

constexpr int TILE = 32, ROWS = 8;  // a block has TILE x ROWS threads

struct Params {
  const E* w;
  E* packed;
  Index groups, channels, filters;  // channels and filters of one group
  Index tiles_c, tiles_f;
  Index kernel[RANK], taps[RANK], phases[RANK], first[RANK], step[RANK];
};

extern "C" __global__ void __launch_bounds__(TILE * ROWS, 1) pack_weights(const __grid_constant__ Params p) {
  __shared__ E tile[TILE][TILE + 1];
  Index block = blockIdx.x;
  const Index c0 = block % p.tiles_c * TILE;
  block /= p.tiles_c;
  const Index f0 = block % p.tiles_f * TILE;
  block /= p.tiles_f;

  // Phase and tap of this block on every axis, both also as one number.
  Index tap[RANK], phase = 0, number = 0, scale = 1;
#pragma unroll
  for (int a = RANK - 1; a >= 0; --a) {
    const Index rho = block % p.phases[a];
    block /= p.phases[a];
    phase += rho * scale;
    scale *= p.phases[a];
    tap[a] = p.first[a] + rho;
  }
  const Index phases = scale;
  scale = 1;
#pragma unroll
  for (int a = RANK - 1; a >= 0; --a) {
    const Index t = block % p.taps[a];
    block /= p.taps[a];
    number += t * scale;
    scale *= p.taps[a];
    tap[a] += (p.taps[a] - 1 - t) * p.step[a];
  }
  const Index g = block;
  bool exists = true;
  Index r = 0;
#pragma unroll
  for (int a = 0; a < RANK; ++a) {
    exists = exists && tap[a] < p.kernel[a];
    r = r * p.kernel[a] + tap[a];
  }

  const int lane = threadIdx.x % TILE, row = threadIdx.x / TILE;
#pragma unroll
  for (int i = row; i < TILE; i += ROWS) {
    const Index c = c0 + i, f = f0 + lane;
    const bool inside = exists && c < p.channels && f < p.filters;
    tile[i][lane] = load_or_zero<1>(p.w + (r * p.channels + c) * p.groups * p.filters + g * p.filters + f, inside).at[0];
  }
  __syncthreads();
  E* const packed = p.packed + (g * scale + number) * p.filters * phases * p.channels;
#pragma unroll
  for (int i = row; i < TILE; i += ROWS) {
    const Index f = f0 + (FILTERS_LAST ? lane : i), c = c0 + (FILTERS_LAST ? i : lane);
    if (f >= p.filters || c >= p.channels) continue;
    if constexpr (FILTERS_LAST)
      packed[(phase * p.channels + c) * p.filters + f] = tile[i][lane];
    else
      packed[(f * phases + phase) * p.channels + c] = tile[lane][i];
  }
}
