// conv_mma.cuh -- the end of a convolution on tensor cores: bias and activation in registers, then through shared memory
// to whole vectors of y.

#pragma once

#include "conv.cuh"
#include "mma.cuh"

// Set by the plan, besides those of conv.cuh and mma.cuh: ACTIVATION   VECY

// The tile of y as it waits for its stores: rows are positions, of channels_first filters. The padding spreads what a
// warp writes over the banks.
constexpr int Y_ROWS = CHANNELS_FIRST ? BN : BM, Y_COLUMNS = CHANNELS_FIRST ? BM : BN;
constexpr int Y_PITCH = Y_COLUMNS + 8;

// The sums of a block to y, or to part `part` of partial sums. `row_of(i, row)` says whether row i of the tile exists,
// and where it goes. Every warp must be done with `memory`.
template <class RowOf>
__device__ __forceinline__ void store_tile(const S (&acc)[TM][TN][4], unsigned char* memory, const Warp& own,
                                           const Result& result, Index part, Index n0, const RowOf& row_of) {
  const Params& p = result.p;
  ptx::copy_async_wait<0>();
  __syncthreads();
  Y* ys = reinterpret_cast<Y*>(memory);
#pragma unroll
  for (int j = 0; j < 2 * TN; j += 2) {
    S bias[2] = {};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      Index f;
      const Index n = n0 + own.column(j + e);
      result.column(n, f);
      if (p.bias && n < p.columns) bias[e] = widen(p.bias[f]);
    }
#pragma unroll
    for (int i = 0; i < 2 * TM; ++i) {
      Vector<Y, 2> two;
#pragma unroll
      for (int e = 0; e < 2; ++e) two.at[e] = finish<ACTIVATION, Y>(acc[i / 2][j / 2][i % 2 * 2 + e] + bias[e]);
      if constexpr (CHANNELS_FIRST) {
        ys[own.column(j) * Y_PITCH + own.row(i)] = two.at[0];
        ys[own.column(j + 1) * Y_PITCH + own.row(i)] = two.at[1];
      } else {
        store(ys + own.row(i) * Y_PITCH + own.column(j), two);
      }
    }
  }
  __syncthreads();
  Y* y = p.y;
#if SPLIT
  y += part * p.total;
#endif
  for (int at = threadIdx.x * VECY; at < Y_ROWS * Y_COLUMNS; at += THREADS * VECY) {
    const int across = at / Y_COLUMNS, along = at % Y_COLUMNS;
    const Index n = n0 + (CHANNELS_FIRST ? across : along);
    Place row;
    if (!row_of(CHANNELS_FIRST ? along : across, row) || n >= p.columns) continue;
    Index f;
    const Place column = result.column(n, f);
    if (!result.exists(row, column)) continue;
    store(y + row.offset + column.offset, read<VECY>(ys + across * Y_PITCH + along));
  }
}
