// conv_halo.cu -- convolution of any rank on tensor cores that loads an input once for all taps of the last axis.
//
//   y[b,p,f] = act( bias[f] + sum over r,c of  x[b, p*stride + r*dilation - pad, c] * w[r,c,f] )
//   x reads as zero outside its bounds.
//
// Twin   cuconv/reference/conv.py::conv, transpose.py::conv_transpose      Plan  cuconv/plan/halo.py
// Test   tests/test_conv_halo.py
//
// The product, its arrays (channels last) and UPSAMPLED are those of conv_simt.cu. 16-bit elements, whole vectors of 8.
//
// Runs. The last axis is taken in strands, p = q * strands + r: the q of one r are a run, and what a run reads lies
// `unit` inputs apart. Its rows are j = 0, 1, ..: position q and tap t read row j = q * rows_p + t * rows_t. One strand
// is the axis itself; with dilation / gcd(stride, dilation) strands, phase order, a tap is one row whatever the dilation.
// The M of the product are (b, other axes, r, q) with q < run; where the axis is no multiple of the strands, the last q
// of some r do not exist.
//
// Work split
//   blockIdx.x   part of the panels, group, tile of BM positions, tile of BN columns; columns fastest
//   a panel      BK channels and one tap of the other axes; its steps are the taps of the last axis
//   one warp     WM x WN sums; all threads copy the next panel's rows of x, and every step one tile of w
//
// Shared memory   ws [STAGES][BK][BN] (mma.cuh: swizzled)   xs [2][rows_p * places][BK]   sources [rows_p * places]
//                 reaches [outer]
//   A row of xs has 16 bytes of padding, so that 8 rows from any one on meet no bank twice: a tap is an offset.
//   Rows of equal j modulo rows_p are neighbours, so the positions of a stride are, too. Runs begin a multiple of 8
//   rows, `gap` more than their positions, behind one another. At the end the tile of y.

#define HALO
#include "conv_mma.cuh"

// Set by the plan, besides those of conv_mma.cuh: STAGES   ROWS_P (p.rows_p)   WHOLE (channels are whole steps)   MIN_BLOCKS
constexpr int VECTORS_K = BK / CHUNK, X_STEP = THREADS / VECTORS_K;
constexpr int PITCH = X_ROW + 16;
static_assert(sizeof(E) == 2 && !CHANNELS_FIRST && X_STEP % 8 == 0, "threads must share rows of x evenly");

constexpr int VECTORS_N = BN / CHUNK;
constexpr int W_STEP = larger(1, THREADS / VECTORS_N);  // rows of w from one copy of a thread to its next
constexpr int LOADS = ceil_div(BK, W_STEP);
constexpr bool ALL_LOAD = BK % W_STEP == 0;
static_assert(VECTORS_N <= THREADS && THREADS % VECTORS_N == 0, "threads must share the copies of w evenly");

// Where a row of xs comes from: its index in x for the first tap of the other axes, and which of those taps it has.
struct Source {
  Index offset;
  unsigned taps;  // a bit each
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_halo(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char memory[];
  constexpr int LAST = RANK - 1;

  Index tile = blockIdx.x;
  const Index n0 = tile % p.tiles_n * BN;  // first column
  tile /= p.tiles_n;
  const Index m0 = tile % p.tiles_m * BM;  // first position
  tile /= p.tiles_m;
  const Index g = tile % p.groups, part = tile / p.groups;
  const int thread = threadIdx.x, lane = thread % 32;

  const int rows = ROWS_P * int(p.places), x_bytes = rows * PITCH;
  unsigned char* const xs = memory + STAGES * W_BYTES;
  Source* const sources = reinterpret_cast<Source*>(xs + 2 * x_bytes);
  Index* const reaches = reinterpret_cast<Index*>(sources + rows);  // elements of x to each tap of the other axes

  // Batch item, coordinates and q of position m.
  const auto locate = [&](Index m, Index (&at)[RANK]) {
    const Index q = m % p.run;
    Index sizes[RANK];
#pragma unroll
    for (int a = 0; a < RANK; ++a) sizes[a] = a == LAST ? p.strands : p.out[a];
    const Index b = split(m / p.run, sizes, at);
    at[LAST] += q * p.strands;
    return b;
  };

  // What the other axes' taps and this tile's rows are in x, once for all panels.
  const Index outer = RANK == 1 ? 1 : p.outer;
  Index taps_of[RANK];
#pragma unroll
  for (int a = 0; a < LAST; ++a) taps_of[a] = p.span[a] / p.dilation[a];
  const Index step_l = p.groups * p.channels;
  for (Index tap = thread; tap < outer; tap += THREADS) {
    Index at[RANK] = {}, rest = tap;
#pragma unroll
    for (int a = LAST - 1; a >= 0; --a) {
      at[a] = rest % taps_of[a] * p.dilation[a];
      rest /= taps_of[a];
    }
    reaches[tap] = linear(at, p.in) * step_l;
  }
  const Index final = (m0 + BM < p.positions ? m0 + BM : p.positions) - 1;  // last position of the tile
  for (int row = thread; row < rows; row += THREADS) {
    const int residue = row / int(p.places);
    const Index at = m0 % p.run + row % int(p.places);
    const Index run = m0 / p.run + at / (p.run + p.gap), j = at % (p.run + p.gap) * ROWS_P + residue;
    const Index last = run == final / p.run ? final % p.run : p.run - 1;  // q of the run in this tile
    Index first[RANK];
    const Index b = locate(run * p.run, first);
#pragma unroll
    for (int a = 0; a < RANK; ++a) first[a] = first[a] * p.stride[a] - p.pad[a];
    first[LAST] += j * p.unit;
    const bool read = run <= final / p.run && j <= last * ROWS_P + (p.taps - 1) * p.rows_t;
    Source source{(b * volume(p.in) + linear(first, p.in)) * step_l + g * p.channels, 0};
    if (read && within(first[LAST], p.in[LAST])) {
      for (Index tap = 0; tap < outer; ++tap) {
        Index rest = tap;
        bool inside = true;
#pragma unroll
        for (int a = LAST - 1; a >= 0; --a) {
          inside &= within(first[a] + rest % taps_of[a] * p.dilation[a], p.in[a]);
          rest /= taps_of[a];
        }
        source.taps |= unsigned(inside) << tap;
      }
    }
    sources[row] = source;
  }

  // The panels of this block.
  Index first = 0, panels = (p.channels + BK - 1) / BK * outer;
#if SPLIT
  first = part * p.chunk;
  panels = panels - first < p.chunk ? panels - first : p.chunk;
#endif

  // 1. Stage: from global to shared memory.
  const int column = thread % VECTORS_K * CHUNK;
  Index x_channel = first / outer * BK + column, x_tap = first % outer;
  // Of rows of 64 bytes, 8 threads write two that are 4 apart, which meet no bank twice.
  const int number = thread / VECTORS_K;
  const int x_row = VECTORS_K < 8 ? (number & ~7) + (number >> 1 & 3) + (number & 1) * 4 : number;
  const unsigned x_to = ptx::shared_address(xs) + x_row * PITCH + column * int(sizeof(E));
  const auto fetch_x = [&](int buffer) {
    const bool inside = WHOLE || x_channel < p.channels;
    const E* const from = p.x + (reaches[x_tap] + x_channel);
    unsigned to = x_to + buffer;
    for (int row = x_row; row < rows; row += X_STEP) {
      const Source source = sources[row];
      ptx::copy_async<16>(to, from + source.offset, inside && source.taps >> x_tap & 1);
      to += X_STEP * PITCH;
    }
    if (++x_tap == outer) x_tap = 0, x_channel += BK;
  };

  const int w_row = thread / VECTORS_N, w_column = thread % VECTORS_N * CHUNK;
  const bool w_inside = n0 + w_column < p.columns;
  // Elements from one tap of w to the next, and from the last one to the first one of the next channels.
  const Index taps = outer * p.taps, step_t = p.channels * p.w_pitch, back_t = BK * p.w_pitch - (taps - 1) * step_t;
  const Index channel = first / outer * BK + w_row;
  Index w_tap = first % outer * p.taps;
  Index w_left = w_inside ? p.channels - channel : 0;  // rows of w from this thread's first on
  const E* w_from = p.w + (g * p.w_group + w_tap * step_t + channel * p.w_pitch + n0 + w_column);
  const auto w_to = [&](int i) {
    const int turned = W_STEP % 8 ? i * W_STEP : 0;
    return swizzle<W_ROW>(w_row + turned, w_column * int(sizeof(E))) + (i * W_STEP - turned) * W_ROW;
  };
  const auto fetch_w = [&](int stage) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i)
      if (ALL_LOAD || w_row + i * W_STEP < BK)
        ptx::copy_async<16>(ptx::shared_address(memory) + stage + w_to(i), w_from + i * W_STEP * p.w_pitch,
                            WHOLE ? w_inside : i * W_STEP < w_left);
    const bool last = ++w_tap == taps;
    w_from += last ? back_t : step_t;
    if (last) w_tap = 0, w_left -= BK;
  };

  // 2. Multiply-accumulate.
  const Warp own(thread);
  unsigned x_at[TM];  // what this lane gives the address of, of each fragment
#pragma unroll
  for (int i = 0; i < TM; ++i) {
    const Index m = own.m + i * 16 + lane % 16;
    const Index place = m + (m0 % p.run + m) / p.run * p.gap;
    x_at[i] = ptx::shared_address(xs) + int(place) * PITCH + lane / 16 * 16;
  }
  const int w_at = swizzle<W_ROW>(lane % 16, own.n * 2 + lane / 16 * 16);
  float acc[TM][TN][4] = {};
  const auto multiply_tap = [&](int shift, int stage) {
    const unsigned ws = ptx::shared_address(memory) + stage;
#pragma unroll
    for (int k = 0; k < BK; k += DEPTH) {
      unsigned a[TM][4], b[TN][2];
#pragma unroll
      for (int i = 0; i < TM; ++i) ptx::load_matrices(a[i], x_at[i] + shift + k * 2);
#pragma unroll
      for (int j = 0; j < TN; j += 2) {
        unsigned two[4];
        ptx::load_matrices_transposed(two, ws + (w_at ^ j * 16) + k * W_ROW);
        b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) multiply_add(acc[i][j], a[i], b[j], E{});
    }
  };

  // From one tap to the next: its rows of a residue lie `step` behind, or where that is the last residue `turn` more.
  const int rest = int(p.rows_t % ROWS_P), turn = PITCH - x_bytes;
  const int step = int(p.rows_t / ROWS_P + rest * p.places) * PITCH;
  Index left = panels * p.taps;  // steps whose w is not fetched
  __syncthreads();
  if (panels > 0) fetch_x(0);
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (left > stage) fetch_w(stage * W_BYTES);
    ptx::copy_async_commit();
  }
  left -= STAGES - 1;
  const auto arrive = [] {  // the step that is multiplied next
    ptx::copy_async_wait<STAGES - 2>();
    __syncthreads();
  };
  int stage = 0, ahead = (STAGES - 1) * W_BYTES;  // what is multiplied, and what is filled meanwhile
  const auto next = [](int stage) { return stage == (STAGES - 1) * W_BYTES ? 0 : stage + W_BYTES; };
  arrive();
  for (Index panel = 0, buffer = 0; panel < panels; ++panel) {
    int shift = int(buffer), residue = 0;
    buffer = x_bytes - buffer;
    if (panel + 1 < panels) fetch_x(int(buffer));
#pragma unroll 1
    for (Index tap = p.taps; tap > 0; --tap) {
      if (left > 0) fetch_w(ahead);
      --left;
      ptx::copy_async_commit();
      multiply_tap(shift, stage);
      ahead = stage;
      stage = next(stage);
      shift += step;
      residue += rest;
      if (residue >= ROWS_P) {
        residue -= ROWS_P;
        shift += turn;
      }
      arrive();
    }
  }

  // 3. Epilogue.
  const Result result(p, g);
  store_tile(acc, memory, own, result, part, n0, [&](int i, Place& row) {
    Index at[RANK];
    const Index b = locate(m0 + i, at);
    const bool exists = m0 + i < p.positions && at[LAST] < p.out[LAST];
    row = result.place(b, at);
    return exists;
  });
}
