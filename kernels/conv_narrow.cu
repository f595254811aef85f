// conv_narrow.cu -- convolution of few input channels, any rank, channels last: as fast as y can be stored.
//
//   y[b,p,f] = act( bias[f] + sum over r,c of  x[b, p*stride + r*dilation - pad, c] * w[r,c,f] )
//   x reads as zero outside its bounds.
//
// Twin   cuconv/reference/conv.py::conv      Plan  cuconv/plan/narrow.py
// Test   tests/test_conv_narrow.py
//
// Arrays, C-contiguous   x [B, in.., C]   w [taps.., C, F]   bias [F] or null   y [B, out.., F]
// 16-bit elements on tensor cores (sm_80 and newer), float on the ordinary units.
//
// What an output reads at one tap of the outer axes is a single run of R*C elements; the run of its neighbour begins
// PITCH = STRIDE*C elements later. So a tile of x is kept as it lies in memory, and fragments of the matrix of windows
// are read from where they are (C = 2, R = 3, STRIDE = 1):
//
//     xs          | l0c0 l0c1 l1c0 l1c1 l2c0 l2c1 l3c0 l3c1 ..
//     output p     [------------- R*C -----------]
//     output p+1            [------------- R*C -----------]
//
// Where the innermost axis is dilated, each of its taps has a run of its own, C elements, REACH from the one before.
//
// Work split
//   blockIdx.x   walker, tile of BN filters; tiles of filters fastest, so neighbours share rows of x
//   one block    its BN filters at tile after tile of BM positions of the innermost axis, `walkers` tiles apart
//   one warp     WM x WN sums at a time, every WARPS_M * WM positions of the tile
//
// Shared memory
//   ws    the weights of the block's filters. Tensor cores: the fragments as their lanes want them, [STEPS][BN/16][32]
//         of 16 bytes; else [TAPS*R*C][BN]
//   bs    [BN] bias
//   xs    2 x [COPIES][LINES][ROW]: the inputs of this tile and of the next, zero outside of x
//
// Tensor cores take two neighbouring k from one word, so a run must begin at an even element. Where PITCH is odd, every
// second one does not: COPIES = 2 keeps one copy for each kind, one of them shifted by an element. Where none does,
// FRONT = 1 lets runs begin an element early. A tap thus has KE >= FRONT + R*C values of k: as few as are even, or a
// multiple of 8, so that all lanes read the same tap. Those that are no weight are zero in both factors, so that a NaN
// does not pass to an output that does not read it.
// The columns of a product are filters in an order that gives a lane P neighbouring ones, for one access to y.

#include "activations.cuh"
#include "fragments.cuh"
#include "positions.cuh"

// Set by the plan, besides those of positions.cuh: ACTIVATION   CHANNELS   INNER taps of the innermost axis in a run,
//   BESIDE runs in a row, REACH elements apart, TAPS runs in all   STRIDE of the innermost axis   BM BN WM WN WARPS_M
//   LEAD elements of a row of xs before its first run   FRONT KE COPIES   ROW, COPY elements of a row and of a copy
//   HELD 1 for fragments of w in registers   VECX VECW VECY   MIN_BLOCKS
constexpr bool TENSOR = sizeof(E) == 2;
constexpr int WARPS_N = BN / WN, THREADS = WARPS_M * WARPS_N * 32;
static_assert(BM % (WARPS_M * WM) == 0 && BN % WN == 0, "warps must divide the tile");

constexpr int PITCH = STRIDE * CHANNELS;
constexpr int RUN = INNER * CHANNELS;
static_assert(TENSOR ? KE >= FRONT + RUN && KE % 2 == 0 : KE == RUN, "a tap must have its run, in pairs");
constexpr int STEPS = ceil_div(TAPS * KE, 16);  // of tensor cores
static_assert(!TENSOR || COPIES == 2 || (PITCH % 2 == 0 && (LEAD - FRONT) % 2 == 0), "pairs of k must be words");
static_assert(TENSOR || (COPIES == 1 && FRONT == 0), "only pairs of k need copies");
static_assert(!TENSOR || REACH % 2 == 0, "all runs of a position must begin at even elements, or none");

// Rows of x that a tile reads, and how far from the first run that of a tap begins.
constexpr int LINES = TAPS / BESIDE;
__device__ __forceinline__ constexpr int place_of(int tap) { return tap / BESIDE * ROW + tap % BESIDE * REACH; }

// Vectors of a row of xs; the last run of a tile ends in the last one.
constexpr int VECTORS = ceil_div(LEAD - FRONT + (BM - 1) * PITCH + (BESIDE - 1) * REACH + KE, VECX);
constexpr int PIECES = ceil_div(LINES * VECTORS, THREADS);  // of a thread
static_assert(VECTORS * VECX + COPIES - 1 <= ROW && LINES * ROW <= COPY, "xs must hold what a tile reads");
static_assert(ROW % VECX == 0 && ROW % (4 / sizeof(E)) == 0 && COPY % VECX == 0, "rows of xs must keep vectors whole");
constexpr bool COPIED = COPIES == 1 && VECX * sizeof(E) >= 4;

// Elements by which a copy of xs is shifted; copy 1 is read at odd positions.
__device__ __forceinline__ constexpr int shift_of(int copy) { return COPIES == 2 ? (LEAD + copy) & 1 : 0; }

struct Params {
  const E* x;
  const E* w;
  const E* bias;  // null: none
  E* y;
  Index filters, tiles, tiles_q, tiles_n, walkers;  // tiles_q: tiles of one row of outputs
  Index in[RANK], out[RANK], stride[RANK], dilation[RANK], pad[RANK], kernel[RANK];
};

// ---- products ---------------------------------------------------------------------------------------------------
// The sums of a warp, WM positions by WN filters; of a lane ROWS positions, and GROUPS times P neighbouring filters.

// On tensor cores: of 16 x 8 sums a lane has rows lane/4 and lane/4 + 8, columns 2*(lane%4) and the next.
template <class T, bool = TENSOR>
struct Product {
  static constexpr int TM = WM / 16, TN = WN / 8;
  static constexpr int P = larger(VECY, 2);  // P / 2 fragments make 4 * P columns
  static_assert(!TENSOR || (WM % 16 == 0 && WN % 16 == 0 && WN % (4 * P) == 0), "a warp must have whole fragments");
  static constexpr int ROWS = 2 * TM, GROUPS = WN / (4 * P);
  static constexpr int W_BYTES = STEPS * BN * 32;

  int lane, n;
  float acc[TM][TN][4];
  unsigned held[HELD ? STEPS : 1][TN][2];

  __device__ __forceinline__ Product(int lane, int n) : lane(lane), n(n) {}

  __device__ __forceinline__ int row(int i) const { return i * 8 + lane / 4; }
  __device__ __forceinline__ int filter(int group) const { return n + group * 4 * P + lane % 4 * P; }
  __device__ __forceinline__ float& sum(int i, int group, int v) {
    return acc[i / 2][group * (P / 2) + v / 2][i % 2 * 2 + v % 2];
  }

  // Puts the block's weights where `fragments` finds them. A thread takes 4 filters at two values of k, the 4 words in
  // an order that depends on the filters: so the words of a warp lie in different banks.
  static __device__ __forceinline__ void put_weights(unsigned char* ws, const E* w, Index filters, Index n0,
                                                     int thread) {
    constexpr int V = smaller(VECW, 4);
    for (int at = thread; at < STEPS * 8 * (BN / 4); at += THREADS) {
      const int pair = at % 8 + at / (2 * BN) * 8, q = at % (2 * BN) / 8;
      const int tap = 2 * pair / KE, k = 2 * pair % KE - FRONT;
      unsigned word[4] = {};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool weight = within(k + e, RUN) && tap < TAPS;
#pragma unroll
        for (int v = 0; v < 4; v += V) {
          const Index f = n0 + q * 4 + v, from = Index(tap * RUN + k + e) * filters + f;
          const Vector<E, V> some = load_or_zero<V>(w + from, weight && f < filters);
#pragma unroll
          for (int u = 0; u < V; ++u) word[v + u] |= unsigned(some.at[u].bits) << 16 * e;
        }
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int turned = u ^ (q & 3);
        const unsigned low = turned & 1 ? word[1] : word[0], high = turned & 1 ? word[3] : word[2];
        const int f = q * 4 + turned, part = f % (4 * P);
        const int j = f / (4 * P) * (P / 2) + part % P / 2, column = part / P * 2 + part % 2;
        const int to = ((pair / 8 * (BN / 16) + j / 2) * 32 + column * 4 + pair % 4) * 4 + j % 2 * 2 + pair % 8 / 4;
        reinterpret_cast<unsigned*>(ws)[to] = turned & 2 ? high : low;
      }
    }
  }

  __device__ __forceinline__ void fragments(unsigned (&b)[TN][2], const unsigned char* ws, int step) const {
#pragma unroll
    for (int j = 0; j < TN; j += 2) {
      const uint4 two = reinterpret_cast<const uint4*>(ws)[(step * (BN / 16) + n / 16 + j / 2) * 32 + lane];
      b[j][0] = two.x, b[j][1] = two.y, b[j + 1][0] = two.z, b[j + 1][1] = two.w;
    }
  }
  __device__ __forceinline__ void hold(const unsigned char* ws) {
    if constexpr (HELD)
#pragma unroll
      for (int step = 0; step < STEPS; ++step) fragments(held[step], ws, step);
  }

  // Two neighbouring values of k: how far behind the start of a run they lie in xs, and the bits that count.
  struct Pair {
    int at;
    unsigned bits;
  };
  // Those of this lane, `first` + 2*(lane%4) and the next; nearly all of it is known to the compiler.
  __device__ __forceinline__ Pair pair(int first) const {
    int tap = first / KE, k = first % KE + lane % 4 * 2;
    if (first % KE >= FRONT && first % KE + 8 <= FRONT + RUN && tap < TAPS) return {place_of(tap) + k, ~0u};
    if (first % KE + 8 > KE) {  // not the same tap for all lanes
      tap += k / KE;
      k %= KE;
    }
    const unsigned low = within(k - FRONT, RUN) ? 0xffff : 0, high = within(k + 1 - FRONT, RUN) ? 0xffff0000 : 0;
    if (tap >= TAPS) return {place_of(TAPS - 1) + KE - 2, 0};  // as a neighbouring lane: no further bank
    return {place_of(tap) + k, low | high};
  }

  // The sums of the positions from m on.
  __device__ __forceinline__ void multiply(const E* xs, const unsigned char* ws, const float* bs, int m) {
    __syncwarp();  // lets the compiler keep nothing of ws and bs but what is held: registers are few
#pragma unroll
    for (int group = 0; group < GROUPS; ++group)
#pragma unroll
      for (int v = 0; v < P; ++v) {
        const float bias = bs[filter(group) + v];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) sum(i, group, v) = bias;
      }
    const int copy = COPIES == 2 ? lane / 4 % 2 : 0;
    const E* run = xs + (copy * COPY + shift_of(copy) + LEAD - FRONT + (m + lane / 4) * PITCH);
#pragma unroll(STEPS <= 16 ? STEPS : 4)
    for (int step = 0; step < STEPS; ++step) {
      const Pair two[2] = {pair(step * 16), pair(step * 16 + 8)};
      unsigned a[TM][4], b[TN][2];
#pragma unroll
      for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          a[i][e] = *reinterpret_cast<const unsigned*>(run + (two[e / 2].at + (i * 16 + e % 2 * 8) * PITCH)) &
                    two[e / 2].bits;
      if constexpr (!HELD) fragments(b, ws, step);
#pragma unroll
      for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) {
          if constexpr (HELD)
            multiply_add(acc[i][j], a[i], held[step][j], T{});
          else
            multiply_add(acc[i][j], a[i], b[j], T{});
        }
    }
  }
};

// Turns of a loop to write out: all, or a part that leaves no rest, if there is one.
__device__ __forceinline__ constexpr int turn_of(int turns) {
  for (int count = 16; turns > 16 && count >= 6; --count)
    if (turns % count == 0) return count;
  return smaller(turns, 16);
}

// On the ordinary units: 4 lanes for positions, 8 lanes for 4 filters each.
template <class T>
struct Product<T, false> {
  static constexpr int TM = WM / 4, P = 4;
  static constexpr int ROWS = TM, GROUPS = larger(1, WN / 32);
  static_assert(TENSOR || (WM % 4 == 0 && WN % 32 == 0), "a warp must have whole vectors");
  static constexpr int W_BYTES = TAPS * RUN * BN * sizeof(T);
  static constexpr int UNROLLED = turn_of(RUN);

  int lane, n;
  float acc[TM][GROUPS][4];

  __device__ __forceinline__ Product(int lane, int n) : lane(lane), n(n) {}

  __device__ __forceinline__ int row(int i) const { return i * 4 + lane / 8; }
  __device__ __forceinline__ int filter(int group) const { return n + group * 32 + lane % 8 * 4; }
  __device__ __forceinline__ float& sum(int i, int group, int v) { return acc[i][group][v]; }

  static __device__ __forceinline__ void put_weights(unsigned char* ws, const E* w, Index filters, Index n0,
                                                     int thread) {
    constexpr int IN_ROW = BN / VECW;
    for (int at = thread; at < TAPS * RUN * IN_ROW; at += THREADS) {
      const int k = at / IN_ROW, f = at % IN_ROW * VECW;
      store(reinterpret_cast<E*>(ws) + k * BN + f, load_or_zero<VECW>(w + (k * filters + n0 + f), n0 + f < filters));
    }
  }
  __device__ __forceinline__ void hold(const unsigned char*) {}

  __device__ __forceinline__ void multiply(const E* xs, const unsigned char* ws, const float* bs, int m) {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      const Vector<float, 4> bias = read<4>(bs + filter(group));
#pragma unroll
      for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int v = 0; v < 4; ++v) acc[i][group][v] = bias.at[v];
    }
    const E* run = xs + (LEAD + (m + lane / 8) * PITCH);
    const E* from = reinterpret_cast<const E*>(ws) + filter(0);
#pragma unroll 1
    for (int tap = 0; tap < TAPS; ++tap) {
      const E* const own = run + place_of(tap);
#pragma unroll(UNROLLED)
      for (int k = 0; k < RUN; ++k) {
        Vector<E, 4> b[GROUPS];
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) b[group] = read<4>(from + (k * BN + group * 32));
#pragma unroll
        for (int i = 0; i < TM; ++i) {
          const float a = widen(own[k + i * 4 * PITCH]);
#pragma unroll
          for (int group = 0; group < GROUPS; ++group)
#pragma unroll
            for (int v = 0; v < 4; ++v) ::multiply_add(acc[i][group][v], a, widen(b[group].at[v]));
        }
      }
      from += RUN * BN;
    }
  }
};

// ---- tiles of x --------------------------------------------------------------------------------------------------

// BM positions of the innermost axis: which of a row's tiles, which row, which item of the batch.
struct Tile {
  Index at[RANK], batch;

  __device__ __forceinline__ Tile(Index tile, const Params& p) {
    at[RANK - 1] = tile % p.tiles_q;
    batch = tile / p.tiles_q;
#pragma unroll
    for (int a = RANK - 2; a >= 0; --a) {
      at[a] = batch % p.out[a];
      batch /= p.out[a];
    }
  }
  // As many tiles further as `step` is from the first one.
  __device__ __forceinline__ void advance(const Tile& step, const Params& p) {
    Index carry = 0;
#pragma unroll
    for (int a = RANK - 1; a >= 0; --a) {
      const Index size = a == RANK - 1 ? p.tiles_q : p.out[a];
      at[a] += step.at[a] + carry;
      carry = at[a] >= size;
      if (carry) at[a] -= size;
    }
    batch += step.batch + carry;
  }
  // The first position, as an index among all outputs.
  __device__ __forceinline__ Index first(const Params& p) const {
    Index index = batch;
#pragma unroll
    for (int a = 0; a < RANK - 1; ++a) index = index * p.out[a] + at[a];
    return index * p.out[RANK - 1] + at[RANK - 1] * BM;
  }
};

// The inputs of a tile on their way to shared memory. Where they pass through registers and are many, they do so a few
// at a time behind the product.
struct Inputs {
  static constexpr bool AHEAD = COPIED || PIECES <= 8;
  Vector<E, VECX> v[COPIED || !AHEAD ? 1 : PIECES];
  Index corner[RANK], origin;  // of the tile: first input on every axis, innermost in elements, and its index in x

  __device__ __forceinline__ void begin(const Tile& tile, const Params& p) {
    origin = tile.batch;
#pragma unroll
    for (int a = 0; a < RANK; ++a) {
      corner[a] = a < RANK - 1 ? tile.at[a] * p.stride[a] - p.pad[a]
                               : (tile.at[a] * (BM * STRIDE) - p.pad[a]) * CHANNELS - LEAD;
      origin = origin * (a < RANK - 1 ? p.in[a] : p.in[a] * CHANNELS) + corner[a];
    }
  }
  // Whether a piece lies inside of x; `from` becomes its place.
  __device__ __forceinline__ bool find(int at, const Params& p, Index& from) const {
    const Index row = p.in[RANK - 1] * CHANNELS, along = at % VECTORS * VECX;
    bool inside = at < LINES * VECTORS && within(corner[RANK - 1] + along, row);
    Index line = at / VECTORS, pitch = row;
    from = along;
#pragma unroll
    for (int a = RANK - 2; a >= 0; --a) {
      const Index reach = line % p.kernel[a] * p.dilation[a];
      inside = inside && within(corner[a] + reach, p.in[a]);
      from += reach * pitch;
      pitch *= p.in[a];
      line /= p.kernel[a];
    }
    from += origin;
    return inside;
  }
  static __device__ __forceinline__ int place(int at) { return at / VECTORS * ROW + at % VECTORS * VECX; }

  __device__ __forceinline__ void keep(E* xs, int at, const Vector<E, VECX>& some) const {
    if (at >= LINES * VECTORS) return;
#pragma unroll
    for (int copy = 0; copy < COPIES; ++copy) {
      E* to = xs + (copy * COPY + place(at));
      if (shift_of(copy) == 0)
        store(to, some);
      else
#pragma unroll
        for (int e = 0; e < VECX; ++e) to[e + 1] = some.at[e];
    }
  }

  __device__ __forceinline__ void fetch(E* xs, const Tile& tile, const Params& p, int thread) {
    begin(tile, p);
    if constexpr (AHEAD)
#pragma unroll(PIECES <= 8 ? PIECES : 4)
      for (int i = 0; i < PIECES; ++i) {
        const int at = thread + i * THREADS;
        Index from;
        const bool inside = find(at, p, from);
        if constexpr (COPIED) {
          if (at < LINES * VECTORS)
            ptx::copy_async<VECX * sizeof(E)>(ptx::shared_address(xs + place(at)), p.x + from, inside);
        } else {
          v[i] = load_or_zero<VECX>(p.x + from, inside);
        }
      }
    ptx::copy_async_commit();
  }
  __device__ __forceinline__ void put(E* xs, const Params& p, int thread) const {
    if constexpr (!COPIED)
#pragma unroll(AHEAD ? PIECES : 4)
      for (int i = 0; i < PIECES; ++i) {
        const int at = thread + i * THREADS;
        if constexpr (AHEAD) {
          keep(xs, at, v[i]);
        } else {
          Index from;
          const bool inside = find(at, p, from);
          keep(xs, at, load_or_zero<VECX>(p.x + from, inside));
        }
      }
  }
};

using Sums = Product<E>;
constexpr int STAGE = COPIES * COPY;  // elements
constexpr int B_BYTES = BN * sizeof(float);

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_narrow(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char ws[];
  float* bs = reinterpret_cast<float*>(ws + Sums::W_BYTES);
  E* xs = reinterpret_cast<E*>(ws + Sums::W_BYTES + B_BYTES);

  const int thread = threadIdx.x, warp = thread / 32;
  const Index n0 = Index(blockIdx.x) % p.tiles_n * BN;  // first filter
  Index number = Index(blockIdx.x) / p.tiles_n;
  Tile tile(number, p);
  const Tile step(p.walkers, p);

  // 1. The first tile, and what stays: weights and bias.
  Inputs inputs;
  inputs.fetch(xs, tile, p, thread);
  Sums::put_weights(ws, p.w, p.filters, n0, thread);
  for (int f = thread; f < BN; f += THREADS) bs[f] = p.bias && n0 + f < p.filters ? widen(p.bias[n0 + f]) : 0.f;
  inputs.put(xs, p, thread);
  ptx::copy_async_wait<0>();
  __syncthreads();
  Sums sums(thread % 32, warp % WARPS_N * WN);
  sums.hold(ws);

  for (int stage = 0; number < p.tiles; stage ^= STAGE) {
    // 2. The next tile of x starts its way.
    const Index start = tile.first(p), left = p.out[RANK - 1] - tile.at[RANK - 1] * BM;
    E* ahead = xs + (stage ^ STAGE);
    number += p.walkers;
    tile.advance(step, p);
    if (number < p.tiles) inputs.fetch(ahead, tile, p, thread);

    // 3. Multiply-accumulate, bias included; activation, and from registers to whole vectors of y.
#pragma unroll 1
    for (int m = warp / WARPS_N * WM; m < BM && m < left; m += WARPS_M * WM) {
      sums.multiply(xs + stage, ws, bs, m);
#pragma unroll
      for (int i = 0; i < Sums::ROWS; ++i) {
        const int row = m + sums.row(i);
        E* to = p.y + ((start + row) * p.filters + n0);
#pragma unroll
        for (int group = 0; group < Sums::GROUPS; ++group) {
          const int f = sums.filter(group);
#pragma unroll
          for (int v = 0; v < Sums::P; v += VECY) {
            Vector<E, VECY> some;
#pragma unroll
            for (int e = 0; e < VECY; ++e) some.at[e] = finish<ACTIVATION, E>(sums.sum(i, group, v + e));
            if (row < left && n0 + f + v < p.filters) store(to + f + v, some);
          }
        }
      }
    }

    // 4. The next tile of x is there, and nobody reads this one any more.
    if (number < p.tiles) inputs.put(ahead, p, thread);
    ptx::copy_async_wait<0>();
    __syncthreads();
  }
}
