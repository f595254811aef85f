// conv_taps.cu -- convolution to few filters, any rank, channels last: as fast as x can be read.
//
//   y[b,p,f] = act( bias[f] + sum over r,c of  x[b, p*stride + r*dilation - pad, c] * w[r,c,f] )
//   x reads as zero outside its bounds.
//
// Twin   cuconv/reference/conv.py::conv      Plan  cuconv/plan/taps.py
// Test   tests/test_conv_taps.py
//
// Arrays, C-contiguous   x [B, in.., G*C]   w [taps.., C, G*F]   bias [G*F] or null   y [B, out.., G*F]
// 16-bit elements on tensor cores (sm_80 and newer), float on the ordinary units. C and F are those of one of G groups.
//
// With few filters, a product whose rows are windows has few columns and reads every input once a tap for them. Here the
// rows are inputs, and taps make columns:
//
//   z[l,(r,f)] = sum over c of  x[b,l,c] * w[r,c,f]                             one product, which reads an input once
//   y[b,p,f]   = act( bias[f] + sum over r of  z[p*stride + r*dilation - pad, (r,f)] )    from shared memory, r ascending
//
// A tile of outputs has BZ x BP x BQ positions, `phases` apart, where phases = dilation / gcd(stride, dilation); so the
// inputs that it reads are `dilation` apart, and those of neighbours STEP = stride / gcd(stride, dilation) of them:
// SPAN = STEP * (B - 1) + TAPS of an axis, without holes. Where tiles meet, z is computed twice.
//
// Work split
//   blockIdx.x   group (fastest), walker
//   one block    the group's filters at tile after tile, `walkers` tiles apart
//   one warp     z at WM inputs of the tile at a time, every WARPS * WM of them
//   one lane     WM / 8 of those inputs, 8 apart, at LANE channels (16 bytes) of each chunk of four times as many; then
//                VECY neighbouring filters of an output
//
// x goes straight from memory to fragments: which k a column of a fragment has is free, as long as the weights have the
// same. So 4 lanes read 64 neighbouring bytes, and a lane's 16 bytes are what it has of two products.
//
// Shared memory
//   ws    weights of the group as lanes want them, in vectors of 16 bytes. Tensor cores: [CHUNKS][COLUMNS/8][32] of LANE
//         channels of a column; else [CHUNKS][LANE][COLUMNS/4][4] of 4 columns, the last index a lane's channel
//   bs    [FILTERS] bias
//   zs    BUFFERS x [COLUMNS][PITCH] sums; 2 spare a barrier: while some warps finish a tile, others begin the next

#include "activations.cuh"
#include "fragments.cuh"
#include "positions.cuh"

// Set by the plan, besides those of positions.cuh: ACTIVATION   CHANNELS FILTERS of a group   BZ BP BQ
//   TAPS_Z TAPS_P TAPS_Q   STEP_Z STEP_P STEP_Q, where an axis is missing 1   WARPS WM   AHEAD chunks of x that are
//   under way together   PITCH BUFFERS   VECX VECY   MIN_BLOCKS
constexpr bool TENSOR = sizeof(E) == 2;
constexpr int THREADS = WARPS * 32;

// Of the three numbers that the plan sets for a constant of axes, that of one of RANK axes.
__device__ __forceinline__ constexpr int of_axis(int axis, int z, int p, int q) {
  return axis == RANK - 1 ? q : axis == RANK - 2 ? p : z;
}
__device__ __forceinline__ constexpr int tile_of(int axis) { return of_axis(axis, BZ, BP, BQ); }
__device__ __forceinline__ constexpr int taps_of(int axis) { return of_axis(axis, TAPS_Z, TAPS_P, TAPS_Q); }
__device__ __forceinline__ constexpr int step_of(int axis) { return of_axis(axis, STEP_Z, STEP_P, STEP_Q); }
__device__ __forceinline__ constexpr int span_of(int axis) {
  return step_of(axis) * (tile_of(axis) - 1) + taps_of(axis);
}

constexpr int TAPS = TAPS_Z * TAPS_P * TAPS_Q, COLUMNS = TAPS * FILTERS;
constexpr int ROWS = (STEP_Z * (BZ - 1) + TAPS_Z) * (STEP_P * (BP - 1) + TAPS_P) * (STEP_Q * (BQ - 1) + TAPS_Q);
constexpr int LANE = 16 / sizeof(E), CHUNK = 4 * LANE;  // channels
constexpr int CHUNKS = ceil_div(CHANNELS, CHUNK);
static_assert(CHUNKS % AHEAD == 0, "chunks must be fetched in whole parts");
static_assert(CHANNELS % VECX == 0 && LANE % VECX == 0, "accesses to x must not leave a group");
static_assert(FILTERS % VECY == 0, "accesses to y must not leave a position");
static_assert(ceil_div(ROWS, WM) * WM <= PITCH, "zs must hold what warps write");

struct Params {
  const E* x;
  const E* w;
  const E* bias;  // null: none
  E* y;
  Index groups, tiles, walkers;
  Index in[RANK], out[RANK], stride[RANK], dilation[RANK], pad[RANK];
  Index phases[RANK], parts[RANK];  // parts: tiles of all phases
};

// ---- products ---------------------------------------------------------------------------------------------------
// The sums of a warp, WM inputs by all columns.

using Slice = Vector<E, LANE>;  // channels of one input

// On tensor cores: of 16 x 8 sums a lane has rows lane/4 and lane/4 + 8, columns 2*(lane%4) and the next.
template <class T, bool = TENSOR>
struct Product {
  static constexpr int TM = WM / 16, TN = ceil_div(COLUMNS, 8);
  static_assert(!TENSOR || WM % 16 == 0, "a warp must have whole fragments");
  static constexpr int VECTORS = CHUNKS * TN * 32;  // of ws

  float acc[TM][TN][4] = {};

  // Column and channel of element e of a vector of ws.
  static __device__ __forceinline__ void weight(int vector, int e, int& n, int& c) {
    const int lane = vector % 32;
    n = vector / 32 % TN * 8 + lane / 4;
    c = vector / 32 / TN * CHUNK + lane % 4 * LANE + e;
  }

  __device__ __forceinline__ void multiply(const Slice (&x)[WM / 8], const unsigned char* ws, int chunk, int lane) {
#pragma unroll
    for (int j = 0; j < TN; ++j) {
      const uint4 b = reinterpret_cast<const uint4*>(ws)[(chunk * TN + j) * 32 + lane];
      const unsigned half[2][2] = {{b.x, b.y}, {b.z, b.w}};
#pragma unroll
      for (int i = 0; i < TM; ++i) {
        unsigned words[2][4];
        memcpy(words[0], &x[2 * i], 16);
        memcpy(words[1], &x[2 * i + 1], 16);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const unsigned a[4] = {words[0][2 * e], words[1][2 * e], words[0][2 * e + 1], words[1][2 * e + 1]};
          multiply_add(acc[i][j], a, half[e], T{});
        }
      }
    }
  }

  // To zs, from the warp's first row on.
  __device__ __forceinline__ void put(float* zs, int lane) {
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int n = j * 8 + lane % 4 * 2 + e % 2;
          if (n < COLUMNS) zs[n * PITCH + i * 16 + e / 2 * 8 + lane / 4] = acc[i][j][e];
        }
  }
};

// On the ordinary units: 4 lanes have the channels of an input, and its sums when they have been added.
template <class T>
struct Product<T, false> {
  static constexpr int TM = WM / 8, TN = ceil_div(COLUMNS, 4);
  static constexpr int VECTORS = CHUNKS * LANE * TN * 4;

  float acc[TM][TN * 4] = {};

  static __device__ __forceinline__ void weight(int vector, int e, int& n, int& c) {
    n = vector / 4 % TN * 4 + e;
    c = vector / 4 / TN / LANE * CHUNK + vector % 4 * LANE + vector / 4 / TN % LANE;
  }

  __device__ __forceinline__ void multiply(const Slice (&x)[TM], const unsigned char* ws, int chunk, int lane) {
#pragma unroll
    for (int e = 0; e < LANE; ++e)
#pragma unroll
      for (int j = 0; j < TN; ++j) {
        const Vector<E, 4> b = read<4>(reinterpret_cast<const E*>(ws) + (((chunk * LANE + e) * TN + j) * 4 + lane % 4) * 4);
#pragma unroll
        for (int i = 0; i < TM; ++i)
#pragma unroll
          for (int v = 0; v < 4; ++v) ::multiply_add(acc[i][j * 4 + v], widen(x[i].at[e]), widen(b.at[v]));
      }
  }

  // Lanes exchange what they keep not: first every second column, then every second one of those that are left.
  __device__ __forceinline__ void put(float* zs, int lane) {
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
      for (int j = 0; j < TN; ++j) {
        float two[2];
#pragma unroll
        for (int v = 0; v < 2; ++v) two[v] = exchange(acc[i][j * 4 + 2 * v], acc[i][j * 4 + 2 * v + 1], lane, 1);
        const int n = j * 4 + lane % 4;
        const float sum = exchange(two[0], two[1], lane, 2);
        if (n < COLUMNS) zs[n * PITCH + i * 8 + lane / 4] = sum;
      }
  }
  static __device__ __forceinline__ float exchange(float even, float odd, int lane, int bit) {
    const float kept = lane & bit ? odd : even, given = lane & bit ? even : odd;
    return kept + __shfl_xor_sync(~0u, given, bit);
  }
};

using Sums = Product<E>;

// ---- tiles ------------------------------------------------------------------------------------------------------

struct Tile {
  Index first[RANK], batch;  // its first output on every axis

  __device__ __forceinline__ Tile(Index number, const Params& p) {
    batch = split(number, p.parts, first);
#pragma unroll
    for (int a = 0; a < RANK; ++a)
      first[a] = first[a] / p.phases[a] * tile_of(a) * p.phases[a] + first[a] % p.phases[a];
  }
};

// z at WM inputs of the tile, from row m on.
__device__ __forceinline__ void multiply(float* zs, const Tile& tile, int m, const unsigned char* ws, Index group,
                                         const Params& p, int lane) {
  Index origin[WM / 8];  // of a lane's inputs: their place in x, at its first channel
  bool inside[WM / 8];
#pragma unroll
  for (int i = 0; i < WM / 8; ++i) {
    int row = m + i * 8 + lane / 4, at[RANK];
    inside[i] = row < ROWS;
#pragma unroll
    for (int a = RANK - 1; a >= 0; --a) {
      at[a] = row % span_of(a);
      row /= span_of(a);
    }
    origin[i] = tile.batch;
#pragma unroll
    for (int a = 0; a < RANK; ++a) {
      const Index l = tile.first[a] * p.stride[a] - p.pad[a] + at[a] * p.dilation[a];
      inside[i] = inside[i] && within(l, p.in[a]);
      origin[i] = origin[i] * p.in[a] + l;
    }
    origin[i] = (origin[i] * p.groups + group) * CHANNELS + lane % 4 * LANE;
  }

  Sums sums;
#pragma unroll 1
  for (int chunk = 0; chunk < CHUNKS; chunk += AHEAD) {
    Slice x[AHEAD][WM / 8];
#pragma unroll
    for (int u = 0; u < AHEAD; ++u)
#pragma unroll
      for (int i = 0; i < WM / 8; ++i)
#pragma unroll
        for (int v = 0; v < LANE; v += VECX) {
          const int c = (chunk + u) * CHUNK + v;
          const bool channel = CHANNELS % CHUNK == 0 || c + lane % 4 * LANE < CHANNELS;
          store(x[u][i].at + v, load_or_zero<VECX>(p.x + (origin[i] + c), inside[i] && channel));
        }
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) sums.multiply(x[u], ws, chunk + u, lane);
  }
  sums.put(zs + m, lane);
}

// Filters f to f + VECY - 1 of output `at` of the tile.
__device__ __forceinline__ void finish_output(const float* zs, const Tile& tile, int at, int f, const float* bs,
                                              Index group, const Params& p) {
  int place[RANK], row = 0;
#pragma unroll
  for (int a = RANK - 1; a >= 0; --a) {
    place[a] = at % tile_of(a);
    at /= tile_of(a);
  }
  Index index = tile.batch;
  bool exists = true;
#pragma unroll
  for (int a = 0; a < RANK; ++a) {
    const Index l = tile.first[a] + place[a] * p.phases[a];
    exists = exists && l < p.out[a];
    index = index * p.out[a] + l;
    row = row * span_of(a) + place[a] * step_of(a);
  }
  float sum[VECY];
#pragma unroll
  for (int v = 0; v < VECY; ++v) sum[v] = bs[f + v];
#pragma unroll
  for (int tap = 0; tap < TAPS; ++tap) {
    int reach = 0, rest = tap, pitch = 1;
#pragma unroll
    for (int a = RANK - 1; a >= 0; --a) {
      reach += rest % taps_of(a) * pitch;
      rest /= taps_of(a);
      pitch *= span_of(a);
    }
#pragma unroll
    for (int v = 0; v < VECY; ++v) sum[v] += zs[(tap * FILTERS + f + v) * PITCH + row + reach];
  }
  Vector<E, VECY> some;
#pragma unroll
  for (int v = 0; v < VECY; ++v) some.at[v] = finish<ACTIVATION, E>(sum[v]);
  if (exists) store(p.y + ((index * p.groups + group) * FILTERS + f), some);
}

constexpr int W_BYTES = Sums::VECTORS * 16, B_BYTES = ceil_div(FILTERS, 4) * 16;

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv_taps(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) unsigned char ws[];
  float* const bs = reinterpret_cast<float*>(ws + W_BYTES);
  float* const zs = reinterpret_cast<float*>(ws + W_BYTES + B_BYTES);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const Index group = Index(blockIdx.x) % p.groups, filters = p.groups * FILTERS;

  // 1. What stays: weights and bias.
  for (int at = thread; at < Sums::VECTORS; at += THREADS) {
    Vector<E, LANE> some;
#pragma unroll
    for (int e = 0; e < LANE; ++e) {
      int n, c;
      Sums::weight(at, e, n, c);
      const Index from = Index(n / FILTERS * CHANNELS + c) * filters + group * FILTERS + n % FILTERS;
      some.at[e] = load_or_zero<1>(p.w + from, n < COLUMNS && c < CHANNELS).at[0];
    }
    store(reinterpret_cast<E*>(ws) + at * LANE, some);
  }
  for (int f = thread; f < FILTERS; f += THREADS) bs[f] = p.bias ? widen(p.bias[group * FILTERS + f]) : 0.f;
  __syncthreads();

  int buffer = 0;
#pragma unroll 1
  for (Index number = Index(blockIdx.x) / p.groups; number < p.tiles; number += p.walkers) {
    const Tile tile(number, p);

    // 2. Multiply-accumulate: z of the tile.
#pragma unroll 1
    for (int m = warp * WM; m < ROWS; m += WARPS * WM) multiply(zs + buffer, tile, m, ws, group, p, lane);
    __syncthreads();

    // 3. Epilogue: sums over taps, bias, activation.
#pragma unroll 1
    for (int at = thread; at < BZ * BP * BQ * (FILTERS / VECY); at += THREADS)
      finish_output(zs + buffer, tile, at / (FILTERS / VECY), at % (FILTERS / VECY) * VECY, bs, group, p);
    if (BUFFERS == 1) __syncthreads();
    buffer = (BUFFERS - 1) * COLUMNS * PITCH - buffer;
  }
}
