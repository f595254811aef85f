// kernel_grad_mma.cu -- gradient of a convolution's kernel, any rank, on tensor cores, sm_80 and newer.
//
//   dw[r,c,f] = sum over b,p of  x[b, p*stride + r*dilation - pad, c] * dy[b,p,f]
//   x reads as zero outside its bounds.
//
// Twin   cuconv/reference/conv.py::kernel_grad      Plan  cuconv/plan/conv.py
// Test   tests/test_kernel_grad_mma.py
//
// The product, its arrays and SPLIT are those of kernel_grad_simt.cu:  M = taps * C/G rows (r,c), N = F/G columns,
// K = B*P positions. Real elements; of float see mma.cuh: PRECISION.
//
// Work split
//   blockIdx.x   split of the positions, group, tile of BM rows, tile of BN columns; columns fastest
//   one warp     WM x WN sums; one thread copies VECX positions or channels at ROWS rows of x, and LOADS vectors of dy,
//                a step
//
//   Every split sums its positions in their order and has its own place in `sums`; reduce_splits.cu adds them up in
//   theirs. No atomics: the same bits on every run.
//
// Shared memory, STAGES of one step each, swizzled (mma.cuh); a table of taps behind them where a thread has many
//   channels_last    xs [BK][BM]   ws [BK][BN], dy in the place of w: what is contiguous in memory are rows and columns
//   channels_first   xs [BM][BK]   ws [BN][BK]: there it is positions
//   Copies run STAGES - 1 steps ahead and never pass through registers, except where fewer than 4 bytes are together:
//   those are fetched before a product and stored behind it. Copies fill padding with zeros. One barrier a step.
//   16-bit results wait there for stores of whole vectors at the end; all others go from registers to memory.

#include "mma.cuh"

// Set by the plan, besides those of mma.cuh: CHANNELS_FIRST SPLIT ONE_TAP   STAGES   VECX VECD VECW   MIN_BLOCKS
// ONE_TAP: C/G is a multiple of BM, so that all rows of a tile belong to one tap.
using Result = conditional<SPLIT, S, E>;

// Copies of x: rows from one of a thread to its next. In channels_last the SHARE threads of a position lie side by side
// and read neighbouring channels; in channels_first neighbours have neighbouring positions.
constexpr int SHARE = THREADS * (CHANNELS_FIRST ? VECX : 1) / BK;
constexpr int ROW_STEP = CHANNELS_FIRST ? SHARE : SHARE * VECX;
constexpr int ROWS = BM / ROW_STEP;
static_assert(ROWS * ROW_STEP == BM && SHARE * BK == THREADS * (CHANNELS_FIRST ? VECX : 1),
              "threads must share the copies of x evenly");

// Copies of dy: positions, of channels_first filters, from one of a thread to its next.
constexpr int VECTORS_D = (CHANNELS_FIRST ? BK : BN) / VECD;  // of one row of ws
constexpr int D_STEP = THREADS / VECTORS_D;
constexpr int LOADS = (CHANNELS_FIRST ? BN : BK) / D_STEP;
static_assert(LOADS * D_STEP == (CHANNELS_FIRST ? BN : BK) && D_STEP * VECTORS_D == THREADS,
              "threads must share the copies of dy evenly");

constexpr bool X_COPIED = VECX * sizeof(E) >= 4, D_COPIED = VECD * sizeof(E) >= 4;
// Where a thread has rows of many taps, these stand in shared memory, one for the rows that are copied together.
constexpr bool TABLE = !ONE_TAP && ROWS > 4;
constexpr int TOGETHER = CHANNELS_FIRST ? 1 : VECX;

// Bytes of a row of xs and ws, and how they are read: words where no instruction loads or transposes fragments.
constexpr bool WORDS = sizeof(E) == 8 || (sizeof(E) == 4 && !CHANNELS_FIRST);
constexpr int XS_ROW = CHANNELS_FIRST ? X_ROW : BM * sizeof(E);
constexpr int WS_ROW = CHANNELS_FIRST ? X_ROW : W_ROW;
static_assert(XS_ROW >= (WORDS ? 128 : 64) && WS_ROW >= (WORDS ? 128 : 64), "rows are too short for their swizzle");

static_assert(sizeof(Result) >= 4 || BM * W_ROW <= STAGES * STAGE_BYTES, "the stages must hold a tile of results");

struct Params {
  const E* x;
  const E* dy;
  Result* dw;
  Index positions, chunk;  // of all, and of one split
  Index rows, columns;     // M, N of one group
  Index tiles_m, tiles_n;
  Index groups, channels;  // channels of x in one group
  Index in[RANK], out[RANK], taps[RANK], stride[RANK], dilation[RANK], pad[RANK];
};

// Where a row finds its inputs: as a distance from the first input of a window, on every axis and in x.
struct alignas(sizeof(Index) * (RANK == 1 ? 2 : 4)) Tap {
  Index offset, reach[RANK == 1 ? 1 : 3];
};

// ---- the product of a warp --------------------------------------------------------------------------------------

// Which sums a lane has. In channels_last words are read in runs: a lane's rows of 4 mma halves are neighbours, and its
// columns of 2 mma; of double the rows of 2 and the columns of one, so that a run has 16 bytes of results.
constexpr bool RUNS = WORDS && !CHANNELS_FIRST;
constexpr int X_RUN = RUNS ? smaller(16 / sizeof(E), 2 * TM) : 1, W_RUN = RUNS ? 8 / sizeof(E) : 1;

struct Owner : Warp {
  __device__ __forceinline__ explicit Owner(int thread) : Warp(thread) {}

  // Of the sums acc[i / 2][j / 2][i % 2 * 2 + j % 2].
  __device__ __forceinline__ int row(int i) const { return m + i / X_RUN * (8 * X_RUN) + lane / 4 * X_RUN + i % X_RUN; }
  __device__ __forceinline__ int column(int j) const {
    const int mma = j / 2;
    return n + mma / W_RUN * (8 * W_RUN) + (lane % 4 * 2 + j % 2) * W_RUN + mma % W_RUN;
  }
};

// The fragments of one mma's depth from position k on, from xs [BM][BK] and ws [BN][BK].
template <class T>
__device__ __forceinline__ void load_along(Word<T> (&a)[TM][4], Word<T> (&b)[TN][2], const unsigned char* memory,
                                           int stage, const Warp& warp, int k) {
  const int lane = warp.lane;
  if constexpr (sizeof(T) == 8) {
    const int x_at = swizzle<XS_ROW, true>(warp.m + lane / 4, lane % 4 * 8) ^ k * 8;
    const int w_at = X_BYTES + (swizzle<WS_ROW, true>(warp.n + lane / 4, lane % 4 * 8) ^ k * 8);
    const auto word = [&](int at) { return *reinterpret_cast<const Word<T>*>(memory + stage + at); };
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 4 positions each
#pragma unroll
      for (int i = 0; i < 2 * TM; ++i) a[i / 2][i % 2 + half * 2] = word((x_at ^ half * 32) + i * 8 * XS_ROW);
#pragma unroll
      for (int j = 0; j < TN; ++j) b[j][half] = word((w_at ^ half * 32) + j * 8 * WS_ROW);
    }
  } else {
    const unsigned start = ptx::shared_address(memory) + stage;
    const int x_at = swizzle<XS_ROW>(warp.m + lane % 16, lane / 16 * 16) ^ k * int(sizeof(T));
    const int w_at =
        X_BYTES + (swizzle<WS_ROW>(warp.n + lane / 16 * 8 + lane % 8, lane / 8 % 2 * 16) ^ k * int(sizeof(T)));
#pragma unroll
    for (int i = 0; i < TM; ++i) ptx::load_matrices(a[i], start + x_at + i * 16 * XS_ROW);
#pragma unroll
    for (int j = 0; j < TN; j += 2) {
      unsigned two[4];
      ptx::load_matrices(two, start + w_at + j * 8 * WS_ROW);
      b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
    }
  }
}

// The same from xs [BK][BM] and ws [BK][BN].
template <class T>
__device__ __forceinline__ void load_across(Word<T> (&a)[TM][4], Word<T> (&b)[TN][2], const unsigned char* memory,
                                            int stage, const Warp& warp, int k) {
  const int lane = warp.lane;
  if constexpr (sizeof(T) == 2) {
    const unsigned start = ptx::shared_address(memory) + stage;
    const int x_at = swizzle<XS_ROW>(lane / 16 * 8 + lane % 8, warp.m * 2 + lane / 8 % 2 * 16);
    const int w_at = X_BYTES + swizzle<WS_ROW>(lane % 16, warp.n * 2 + lane / 16 * 16);
#pragma unroll
    for (int i = 0; i < TM; ++i) ptx::load_matrices_transposed(a[i], start + (x_at ^ i * 32) + k * XS_ROW);
#pragma unroll
    for (int j = 0; j < TN; j += 2) {
      unsigned two[4];
      ptx::load_matrices_transposed(two, start + (w_at ^ j * 16) + k * WS_ROW);
      b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
    }
  } else {
    // Which row of the product an mma calls its first one is free: lane / 4 has a run of them, one access.
    constexpr int SIZE = sizeof(T);
    const int x_at = swizzle<XS_ROW, true>(lane % 4, (warp.m + lane / 4 * X_RUN) * SIZE);
    const int w_at = X_BYTES + swizzle<WS_ROW, true>(lane % 4, (warp.n + lane / 4 * W_RUN) * SIZE);
    const auto words = [&](int at) { return reinterpret_cast<const Word<T>*>(memory + stage + at); };
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 4 positions each
#pragma unroll
      for (int i = 0; i < 2 * TM; i += X_RUN) {
        const auto run = read<X_RUN>(words((x_at ^ i * 8 * SIZE) + (k + half * 4) * XS_ROW));
#pragma unroll
        for (int e = 0; e < X_RUN; ++e) a[(i + e) / 2][(i + e) % 2 + half * 2] = run.at[e];
      }
#pragma unroll
      for (int j = 0; j < TN; j += W_RUN) {
        const auto run = read<W_RUN>(words((w_at ^ j * 8 * SIZE) + (k + half * 4) * WS_ROW));
#pragma unroll
        for (int e = 0; e < W_RUN; ++e) b[j + e][half] = run.at[e];
      }
    }
  }
}

// ---- the kernel -------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) kernel_grad_mma(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char memory[];

  Index tile = blockIdx.x;
  const Index n0 = tile % p.tiles_n * BN;  // first column
  tile /= p.tiles_n;
  const Index m0 = tile % p.tiles_m * BM;  // first row
  tile /= p.tiles_m;
  const Index g = tile % p.groups, part = tile / p.groups;
  const int thread = threadIdx.x;

  const Index filters = p.groups * p.columns;
  const Index step_l = CHANNELS_FIRST ? 1 : p.groups * p.channels;
  const Index step_c = CHANNELS_FIRST ? volume(p.in) : 1;
  const Index step_b = p.groups * p.channels * volume(p.in);
  const Index first = part * p.chunk;  // position
  const Index count = p.positions - first < p.chunk ? p.positions - first : p.chunk;

  // The rows of this thread. A row behind the last one reaches outside of x.
  const auto tap_of = [&](Index m) {
    Index reach[RANK];
    split(m / p.channels, p.taps, reach);
#pragma unroll
    for (int a = 0; a < RANK; ++a) reach[a] *= p.dilation[a];
    Tap tap{linear(reach, p.in) * step_l + m % p.channels * step_c};
#pragma unroll
    for (int a = 0; a < RANK; ++a) tap.reach[a] = reach[a];
    if (m >= p.rows) tap.reach[0] = NOWHERE;
    return tap;
  };
  // In channels_last positions change places: threads that write 128 bytes together differ in the bit of the position
  // that turns whole halves of them.
  constexpr int BIT = WORDS ? 1 : 2;
  const int q = thread / SHARE, swapped = (q >> BIT ^ q) & 1;
  const int k = CHANNELS_FIRST ? thread % (BK / VECX) * VECX : q ^ (swapped | swapped << BIT);
  const int row0 = CHANNELS_FIRST ? thread / (BK / VECX) : thread % SHARE * VECX;
  Tap* const table = reinterpret_cast<Tap*>(memory + STAGES * STAGE_BYTES);
  Tap taps[TABLE || ONE_TAP ? 1 : ROWS];
  if constexpr (TABLE) {
    for (int i = thread; i < BM / TOGETHER; i += THREADS) table[i] = tap_of(m0 + i * TOGETHER);
    __syncthreads();
  } else {
#pragma unroll
    for (int i = 0; i < (ONE_TAP ? 1 : ROWS); ++i) taps[i] = tap_of(m0 + row0 + i * ROW_STEP);
  }

  // The position of this thread: the first input of its window, and that one's index in x. From step to step it moves
  // by BK, which is added axis by axis as one adds digits: an axis that is full goes back by all its outputs, and the
  // one before it goes on by one.
  Index window[RANK], full[RANK], back[RANK], move[RANK], wrap[RANK];
  Index origin = split(first + k, p.out, window) * step_b, stride_b = split(Index(BK), p.out, move) * step_b;
  {
    Index pitch = step_l;
#pragma unroll
    for (int a = RANK - 1; a >= 0; --a) {
      back[a] = p.out[a] * p.stride[a];
      full[a] = back[a] - p.pad[a];
      window[a] = window[a] * p.stride[a] - p.pad[a];
      move[a] *= p.stride[a];
      origin += window[a] * pitch;
      stride_b += move[a] * pitch;
      wrap[a] = (a == 0 ? step_b : p.stride[larger(a - 1, 0)] * pitch * p.in[a]) - back[a] * pitch;
      pitch *= p.in[a];
    }
    origin += g * p.channels * step_c;
    if constexpr (ONE_TAP) {
      origin += taps[0].offset;
#pragma unroll
      for (int a = 0; a < RANK; ++a) window[a] += taps[0].reach[a], full[a] += taps[0].reach[a];
    }
  }
  Index x_left = count - k;  // positions from this thread's first one on

  // The vectors of dy of this thread.
  const int d_row = thread / VECTORS_D, d_column = thread % VECTORS_D * VECD;
  const Index out_size = volume(p.out);
  const Index d_pitch = CHANNELS_FIRST ? out_size : filters;
  Index d_left = count - (CHANNELS_FIRST ? d_column : d_row);  // positions
  const Index n_left = p.columns - n0 - (CHANNELS_FIRST ? d_row : d_column);
  if (n_left <= 0) d_left = 0;
  const E* d_from = p.dy + (g * p.columns + n0) * (CHANNELS_FIRST ? out_size : 1);
  Index d_at = 0;  // in channels_first, the position in its batch item
  if constexpr (CHANNELS_FIRST) {
    d_at = (first + d_column) % out_size;
    d_from += (first + d_column) / out_size * filters * out_size + d_at + d_row * out_size;
  } else {
    d_from += (first + d_row) * filters + d_column;
  }
  const Index d_items = CHANNELS_FIRST ? BK / out_size : 0, d_rest = CHANNELS_FIRST ? BK % out_size : 0;

  // 1. Stage: from global to shared memory.
  Transfer<VECX, X_COPIED> xr[ROWS];
  Transfer<VECD, D_COPIED> dr[LOADS];
  // Where they go: the swizzle repeats after 8 rows.
  const auto x_to = [&](int i) {
    if constexpr (!CHANNELS_FIRST)
      return swizzle<XS_ROW, WORDS>(k, row0 * int(sizeof(E))) ^ i * ROW_STEP * int(sizeof(E));
    const int turned = ROW_STEP % 8 ? i * ROW_STEP : 0;
    return swizzle<XS_ROW, WORDS>(row0 + turned, k * int(sizeof(E))) + (i * ROW_STEP - turned) * XS_ROW;
  };
  const auto d_to = [&](int i) {
    const int turned = D_STEP % 8 ? i * D_STEP : 0;
    return X_BYTES + swizzle<WS_ROW, WORDS>(d_row + turned, d_column * int(sizeof(E))) + (i * D_STEP - turned) * WS_ROW;
  };
  const auto fetch = [&](int stage) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      bool inside = x_left > 0;
      Index offset = i * ROW_STEP * step_c;
      if constexpr (ONE_TAP) {
#pragma unroll
        for (int a = 0; a < RANK; ++a) inside &= within(window[a], p.in[a]);
      } else {
        const Tap tap = TABLE ? table[(row0 + i * ROW_STEP) / TOGETHER] : taps[TABLE ? 0 : i];
#pragma unroll
        for (int a = 0; a < RANK; ++a) inside &= within(window[a] + tap.reach[a], p.in[a]);
        offset = tap.offset;
      }
      xr[i].fetch(memory + stage + x_to(i), p.x + (origin + offset), inside);
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
      const bool inside = CHANNELS_FIRST ? d_left > 0 && i * D_STEP < n_left : i * D_STEP < d_left;
      dr[i].fetch(memory + stage + d_to(i), d_from + i * D_STEP * d_pitch, inside);
    }
    x_left -= BK;
    d_left -= BK;
    origin += stride_b;
    bool carry = false;
#pragma unroll
    for (int a = RANK - 1; a >= 0; --a) {
      window[a] += move[a] + (carry ? p.stride[a] : 0);
      carry = window[a] >= full[a];
      if (carry) window[a] -= back[a], origin += wrap[a];
    }
    if constexpr (CHANNELS_FIRST) {
      d_from += d_items * filters * out_size + d_rest;
      d_at += d_rest;
      if (d_at >= out_size) d_at -= out_size, d_from += (filters - 1) * out_size;
    } else {
      d_from += BK * filters;
    }
  };
  const auto put = [&](int stage) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) xr[i].put(memory + stage + x_to(i));
#pragma unroll
    for (int i = 0; i < LOADS; ++i) dr[i].put(memory + stage + d_to(i));
  };

  // 2. Multiply-accumulate.
  const Owner own(thread);
  S acc[TM][TN][4] = {};
  Index left = (count + BK - 1) / BK;  // steps that are not multiplied
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (left > stage) {
      fetch(stage * STAGE_BYTES);
      put(stage * STAGE_BYTES);
    }
    ptx::copy_async_commit();
  }
  int stage = 0, ahead = (STAGES - 1) * STAGE_BYTES;  // what is multiplied, and what is filled meanwhile
  const auto next = [](int stage) { return stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES; };
  for (; left > 0; --left) {
    ptx::copy_async_wait<STAGES - 2>();
    __syncthreads();
    const bool more = left >= STAGES;
    if (more) fetch(ahead);
    ptx::copy_async_commit();
    multiply_step<E>(acc, [&](Word<E>(&a)[TM][4], Word<E>(&b)[TN][2], int part) {
      if constexpr (CHANNELS_FIRST)
        load_along<E>(a, b, memory, stage, own, part * DEPTH);
      else
        load_across<E>(a, b, memory, stage, own, part * DEPTH);
    });
    if (more) put(ahead);
    stage = next(stage);
    ahead = next(ahead);
  }

  // 3. Epilogue: the only place that tests the edges of dw.
  Result* const dw = p.dw + part * p.rows * filters + g * p.columns;
  if constexpr (sizeof(Result) >= 4) {
    // A lane has RUN neighbours of a row, and 4 lanes whole sectors.
    constexpr int RUN = 2 * W_RUN, WIDE = smaller(RUN, VECW);
#pragma unroll
    for (int i = 0; i < 2 * TM; ++i) {
      const Index m = m0 + own.row(i);
      if (m >= p.rows) continue;
#pragma unroll
      for (int j = 0; j < 2 * TN; j += RUN) {
#pragma unroll
        for (int e = 0; e < RUN; e += WIDE) {
          const Index n = n0 + own.column(j) + e;
          if (n >= p.columns) continue;
          Vector<Result, WIDE> v;
#pragma unroll
          for (int u = 0; u < WIDE; ++u)
            v.at[u] = narrow<Result>(acc[i / 2][j / 2 + (e + u) % W_RUN][i % 2 * 2 + (e + u) / W_RUN]);
          store(dw + m * filters + n, v);
        }
      }
    }
  } else {
    __syncthreads();
    const auto ys = [&](int row, int column) {
      return reinterpret_cast<E*>(memory + swizzle<W_ROW>(row, column * int(sizeof(E))));
    };
#pragma unroll
    for (int i = 0; i < 2 * TM; ++i)
#pragma unroll
      for (int j = 0; j < 2 * TN; j += 2) {
        const S* const two = &acc[i / 2][j / 2][i % 2 * 2];
        store(ys(own.row(i), own.column(j)), Vector<E, 2>{narrow<E>(two[0]), narrow<E>(two[1])});
      }
    __syncthreads();
    for (int at = thread * VECW; at < BM * BN; at += THREADS * VECW) {
      const int row = at / BN, column = at % BN;
      const Index m = m0 + row, n = n0 + column;
      if (m >= p.rows || n >= p.columns) continue;
      store(reinterpret_cast<E*>(dw) + m * filters + n, read<VECW>(ys(row, column)));
    }
  }
}
