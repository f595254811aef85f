// depthwise_tile.cu -- depthwise convolution of stride 1 with many taps, channels last: several outputs a thread.
//
//   y[b,p,c] = act( bias[c] + sum over r of  x[b, p + r*dilation - pad, c] * w[r,c] )   along one axis or two; or, with
//   taps in reverse and first = pad - (K-1)*dilation, the transpose.
//
// Twin   cuconv/reference/depthwise.py      Plan  cuconv/plan/depthwise_tile.py
// Test   tests/test_depthwise_tile.py
//
// Arrays, C-contiguous   x [B, L.., C]   w [R.., C, 1]   bias [C] or null   y [B, P.., C]
//
// Work split
//   blockIdx.x as in depthwise_tiles.cuh. A tile has BC channels, BH positions of the outer axis and GW * TP of the
//   inner one, in phase order. One thread: VEC channels, TP outputs of one row. It takes KC taps at a time: TP + KC - 1
//   inputs and KC weights are read for TP * KC products, at offsets that the compiler knows. No product is formed that
//   is not in a sum.
//
// Shared memory
//   ws [OUTER * K][BC]    as they are summed      xs [BH + OUTER - 1][COLUMNS][BC]    zero outside of x

#include "depthwise_tiles.cuh"

// Set by the plan: ELEMENT INDEX ACTIVATION   OUTER taps of the outer axis, K of the inner, KC at a time
//   BC channels   VEC of a thread   XV of an access to x   TP outputs   GW threads along the inner axis   BH rows
//   PHASED 1 for phases in place of an outer axis   BLOCKS of a multiprocessor, whose registers they share
constexpr int THREADS = 128;
constexpr int LANES = BC / VEC;  // threads for the channels
constexpr int COLUMNS = GW * TP + K - 1, ROWS = BH + OUTER - 1;
constexpr int W_BYTES = OUTER * K * BC * sizeof(S);
static_assert(LANES * GW * BH == THREADS, "threads must share the tile evenly");
static_assert(BC % XV == 0 && BC % VEC == 0 && W_BYTES % 16 == 0, "channels must be whole vectors");

// Adds N taps to TP outputs of VEC channels.
template <int N>
__device__ __forceinline__ void add_taps(S (&acc)[TP][VEC], const E* x, const S* w) {
  S wr[N][VEC];
#pragma unroll
  for (int r = 0; r < N; ++r) {
    const Vector<S, VEC> some = read<VEC>(w + r * BC);
#pragma unroll
    for (int v = 0; v < VEC; ++v) wr[r][v] = some.at[v];
  }
#pragma unroll
  for (int i = 0; i < TP + N - 1; ++i) {
    S xr[VEC];
    widen_vector(xr, read<VEC>(x + i * BC));
#pragma unroll
    for (int r = 0; r < N; ++r)
      if (i >= r && i - r < TP) add_products(acc[i - r], xr, wr[r]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) depthwise_tile(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) unsigned char memory[];
  S* ws = reinterpret_cast<S*>(memory);
  E* xs = reinterpret_cast<E*>(memory + W_BYTES);
  const int thread = threadIdx.x;
  const Tile tile(p, BC, GW * TP, BH);

  // 1. Stage: AHEAD loads of a thread are on their way at once.
  {
    const Side inner = tile.inner_source(p, 0), outer = tile.outer_source(p);
    const E* from = p.x + tile.batch * p.source_batch + tile.c0;
    constexpr int GROUPS = BC / XV, PIECES = ROWS * COLUMNS * GROUPS, TURNS = ceil_div(PIECES, THREADS), AHEAD = 8;
#pragma unroll 1
    for (int turn = 0; turn < TURNS; turn += AHEAD) {
      Vector<E, XV> some[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int piece = thread + (turn + i) * THREADS, c = piece % GROUPS * XV, place = piece / GROUPS;
        const int row = place / COLUMNS, column = place - row * COLUMNS;
        const Index at0 = outer.at + row * outer.step, at1 = inner.at + column * inner.step + (PHASED ? at0 : 0);
        const bool inside =
            row < ROWS && c < tile.channels && within(at0, p.outer.source) && within(at1, p.inner.source);
        some[i] = load_or_zero<XV>(from + (c + at0 * p.outer.source_pitch + at1 * p.inner.source_pitch), inside);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int piece = thread + (turn + i) * THREADS;
        if (piece < PIECES) store(xs + piece * XV, some[i]);
      }
    }
  }
  for (int i = thread; i < OUTER * K * BC; i += THREADS) {
    const int c = i % BC;
    ws[i] = c < tile.channels ? value(p.w + (p.tap_first + i / BC * p.tap_step + tile.c0 + c)) : S{};
  }
  __syncthreads();

  // 2. Multiply-accumulate.
  const int c = thread % LANES * VEC, column = thread / LANES % GW * TP, row = thread / LANES / GW;
  S acc[TP][VEC];
#pragma unroll
  for (int v = 0; v < VEC; ++v) {
    const S bias = p.bias && c + v < tile.channels ? value(p.bias + tile.c0 + c + v) : S{};
#pragma unroll
    for (int j = 0; j < TP; ++j) acc[j][v] = bias;
  }
  const S* taps = ws + c;
#pragma unroll 1
  for (int r = 0; r < OUTER; ++r) {
    const E* x = xs + ((row + r) * COLUMNS + column) * BC + c;
#pragma unroll 1
    for (int k = 0; k < K / KC; ++k) {
      add_taps<KC>(acc, x, taps);
      x += KC * BC;
      taps += KC * BC;
    }
    if constexpr (K % KC > 0) {
      add_taps<K % KC>(acc, x, taps);
      taps += K % KC * BC;
    }
  }

  // 3. Epilogue.
  const Side inner = tile.inner_target(p), outer = tile.outer_target(p);
  const Index at0 = outer.at + row * outer.step;
  if (c >= tile.channels || at0 >= p.outer.target) return;
  E* to = p.y + (tile.batch * p.target_batch + tile.c0 + c + at0 * p.outer.target_pitch);
#pragma unroll
  for (int j = 0; j < TP; ++j) {
    const Index at1 = inner.at + (column + j) * inner.step + (PHASED ? at0 : 0);
    if (at1 >= p.inner.target) break;
    Vector<E, VEC> result;
#pragma unroll
    for (int v = 0; v < VEC; ++v) result.at[v] = finish<ACTIVATION, E>(acc[j][v]);
    store(to + at1 * p.inner.target_pitch, result);
  }
}
