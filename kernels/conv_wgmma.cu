// conv_wgmma.cu -- convolution of any rank as an implicit matrix product on the tensor cores of sm_90, by warpgroups.
//
//   y[b,p,f] = act( bias[f] + sum over r,c of  x[b, p*stride + r*dilation - pad, c] * w[r,c,f] )
//   x reads as zero outside its bounds.
//
// Twin   cuconv/reference/conv.py::conv, transpose.py::conv_transpose      Plan  cuconv/plan/wgmma.py
// Test   tests/test_conv_wgmma.py
//
// The rows of a tile are the positions of a box, `box` of them on each axis and of `items` batch items; its columns are
// BN filters. A step of its sum is one tap and BK channels, for which x is the same box elsewhere: the copy engine
// brings it, at any stride, and zeros for what lies outside of x on any axis. 16-bit elements. UPSAMPLED as in
// conv_simt.cu.
//
// Arrays, C-contiguous   x [B, L.., C]   w [R.., C/G, F], of UPSAMPLED [G, taps.., C/G, columns]   bias [F]   y [B, P.., F]
//
// Work split
//   blockIdx.x   every gridDim.x-th tile; columns fastest, in bands, so that blocks share rows of x in the L2 cache
//   warpgroups   two multiply, GM x GN sums each; one thread of the third asks the copy engine for operands
//
// Shared memory, STAGES of one step each:  xs [BM][BK]   ws [BN / 64, rounded up][BK][64], swizzled within their rows;
//   then 16 rows of y for each warp that multiplies, and two barriers a stage: it is full, and it is empty again.
//   Rows of xs that no box fills, for want of positions, stay zero.

#include "conv.cuh"

// Set by the plan, besides those of conv.cuh: BM BN BK   GM GN (of a warpgroup)   STAGES ACTIVATION
constexpr int GROUP = 128;  // threads of a warpgroup
constexpr int ROW_BYTES = BK * sizeof(E), W_ROW_BYTES = 64 * sizeof(E);
static_assert(ROW_BYTES == 128 || ROW_BYTES == 64, "a row is what a swizzle spans");
constexpr int GROUPS_N = BN / GN, CONSUMERS = BM / GM * GROUPS_N, THREADS = (CONSUMERS + 1) * GROUP;
static_assert(CONSUMERS == 2 && GM % 64 == 0, "two warpgroups multiply 64 rows at a time");
constexpr int TM = GM / 64;                             // products of a warpgroup at one k
constexpr int SLICE_BYTES = BK * W_ROW_BYTES;           // 64 columns of ws
constexpr int SLICES = ceil_div(BN, 64);
static_assert(GROUPS_N == 1 || GN % 64 == 0, "a slice belongs to one warpgroup");
constexpr int X_BYTES = BM * ROW_BYTES, W_BYTES = SLICES * SLICE_BYTES, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int Y_PITCH = 64 + 8;                         // the padding spreads what a warp writes over the banks
constexpr int Y_BYTES = CONSUMERS * 4 * 16 * Y_PITCH * sizeof(E);

// Registers of a thread, of the 168 that all have at first.
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(GROUP * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) <= 65536, "more registers than there are");

struct alignas(64) Map {
  unsigned char bytes[128];
};
struct WarpgroupParams {
  Map x_map, w_map;  // axes: channels, positions, items; columns, channels, taps
  const E* x;        // read through their maps, as w
  const E* w;
  const E* bias;  // null: none
  E* y;
  Index tiles, tiles_m, tiles_n, band;    // of a group in m and n; a band has so many of n
  Index groups, channels, columns;        // channels and columns of one group
  Index group_columns, group_taps;        // from one group's w to the next, on the axes of its map
  Index taps, steps, batch, items, rows;  // rows: positions of a box
  Index box[RANK], boxes[RANK];
  Index out[RANK], kernel[RANK], stride[RANK], dilation[RANK], pad[RANK];
#if UPSAMPLED
  Index full[RANK], up[RANK], phases[RANK], shift[RANK];
#endif
};

// A tile: its group, its first column, item and position.
struct Tile {
  Index g, n0, b0, at[RANK];

  __device__ __forceinline__ Tile(const WarpgroupParams& p, Index tile) {
    const Index in_group = p.tiles_m * p.tiles_n;
    g = tile / in_group;
    tile %= in_group;
    const Index first = tile / (p.tiles_m * p.band) * p.band, left = p.tiles_n - first;
    const Index wide = left < p.band ? left : p.band;
    tile -= first * p.tiles_m;
    n0 = (first + tile % wide) * BN;
    b0 = split(tile / wide, p.boxes, at) * p.items;
#pragma unroll
    for (int a = 0; a < RANK; ++a) at[a] *= p.box[a];
  }
};

// The stages, one after the other: where the next one lies, its barriers, and the parity of the round it is in.
struct Ring {
  unsigned start, barriers, stage = 0, parity = 0;

  __device__ __forceinline__ unsigned memory() const { return start + stage * STAGE_BYTES; }
  __device__ __forceinline__ unsigned full() const { return barriers + stage * 8; }
  __device__ __forceinline__ unsigned empty() const { return full() + STAGES * 8; }
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// What a descriptor says besides the address, in units of 16 bytes: the swizzle, from 8 rows to the next 8, and of w from
// 64 columns to the next 64.
constexpr unsigned long long SWIZZLE_128 = 1ull << 62, SWIZZLE_64 = 2ull << 62;
constexpr unsigned long long X_SWIZZLE = ROW_BYTES == 128 ? SWIZZLE_128 : SWIZZLE_64;
constexpr unsigned long long X_LAYOUT = X_SWIZZLE | (8 * ROW_BYTES / 16ull) << 32 | 1ull << 16;
constexpr unsigned long long W_LAYOUT = SWIZZLE_128 | (8 * W_ROW_BYTES / 16ull) << 32 | (SLICE_BYTES / 16ull) << 16;

__device__ __forceinline__ void multiply_tiles(float (&acc)[GN / 2], unsigned long long x, unsigned long long w, half_t) {
  ptx::multiply_tiles_half<GN>(acc, x, w);
}
__device__ __forceinline__ void multiply_tiles(float (&acc)[GN / 2], unsigned long long x, unsigned long long w,
                                               bfloat_t) {
  ptx::multiply_tiles_bfloat<GN>(acc, x, w);
}

// Asks for the operands of all tiles of this block.
__device__ __forceinline__ void produce(const WarpgroupParams& p, Ring ring) {
  for (Index number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    const Tile tile(p, number);
    Index tap[RANK] = {};
    int from[RANK + 2], w_from[3];
    from[RANK + 1] = tile.b0;
    for (Index r = 0; r < p.taps; ++r) {
      w_from[2] = tile.g * p.group_taps + r;
#pragma unroll
      for (int a = 0; a < RANK; ++a) from[RANK - a] = tile.at[a] * p.stride[a] + tap[a] * p.dilation[a] - p.pad[a];
      for (w_from[1] = 0; w_from[1] < p.channels; w_from[1] += BK) {
        from[0] = tile.g * p.channels + w_from[1];
        ptx::barrier_wait(ring.empty(), ring.parity ^ 1);
        ptx::barrier_expect(ring.full(), p.rows * ROW_BYTES + W_BYTES);
        ptx::load_box(ring.memory(), &p.x_map, ring.full(), from);
#pragma unroll
        for (int j = 0; j < SLICES; ++j) {
          w_from[0] = tile.g * p.group_columns + tile.n0 + j * 64;
          ptx::load_box(ring.memory() + X_BYTES + j * SLICE_BYTES, &p.w_map, ring.full(), w_from);
        }
        ring.next();
      }
#pragma unroll
      for (int a = RANK - 1; a >= 0; --a) {
        if (++tap[a] < p.kernel[a]) break;
        tap[a] = 0;
      }
    }
  }
}

// The sums of one tile.
__device__ __forceinline__ void multiply(float (&acc)[TM][GN / 2], const WarpgroupParams& p, Ring& ring, int row, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < TM; ++i)
#pragma unroll
    for (int j = 0; j < GN / 2; ++j) acc[i][j] = 0;
  unsigned before = 0;  // what is to be emptied, once the products of the step before are made
  for (Index step = 0; step < p.steps; ++step) {
    const unsigned long long x = X_LAYOUT | (ring.memory() + row * ROW_BYTES) >> 4;
    const unsigned long long w = W_LAYOUT | (ring.memory() + X_BYTES + column / 64 * SLICE_BYTES) >> 4;
    ptx::barrier_wait(ring.full(), ring.parity);
    ptx::products_fence();
#pragma unroll
    for (int k = 0; k < BK; k += 16)
#pragma unroll
      for (int i = 0; i < TM; ++i)
        multiply_tiles(acc[i], x + (i * 64 * ROW_BYTES + k * sizeof(E)) / 16, w + k * W_ROW_BYTES / 16, E{});
    ptx::products_commit();
    ptx::products_wait<1>(acc);
    if (step > 0 && lane == 0) ptx::barrier_arrive(before);
    before = ring.empty();
    ring.next();
  }
  ptx::products_wait<0>(acc);
  if (lane == 0) ptx::barrier_arrive(before);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_wgmma(const __grid_constant__ WarpgroupParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int thread = threadIdx.x;
  const unsigned start = ptx::shared_address(memory);
  Ring ring{start, start + STAGES * STAGE_BYTES + Y_BYTES};
  if (thread == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      ptx::barrier_init(ring.full() + stage * 8, 1);
      ptx::barrier_init(ring.empty() + stage * 8, CONSUMERS * 4);  // each warp that multiplies
    }
    ptx::barriers_visible();
  }
  const int spare = (BM - int(p.rows)) * (ROW_BYTES / 16);  // vectors of a stage that no box fills
  for (int at = thread; at < STAGES * spare; at += THREADS) {
    const int place = at / spare * STAGE_BYTES + int(p.rows) * ROW_BYTES + at % spare * 16;
    store(reinterpret_cast<E*>(memory + place), Vector<E, 8>{});
  }
  ptx::fence_async();
  __syncthreads();

  if (thread >= CONSUMERS * GROUP) {
    // 1. Stage.
    ptx::give_registers<PRODUCER_REGISTERS>();
    if (thread == CONSUMERS * GROUP) produce(p, ring);
  } else {
    ptx::take_registers<CONSUMER_REGISTERS>();
    const int group = __shfl_sync(~0u, thread / GROUP, 0);  // the same for a warp, as the compiler can tell now
    const int warp = thread / 32, lane = thread % 32;
    const int row = group / GROUPS_N * GM, column = group % GROUPS_N * GN;  // of the tile: this warpgroup's first ones
    E* const ys = reinterpret_cast<E*>(memory + STAGES * STAGE_BYTES) + warp * 16 * Y_PITCH;
    for (Index number = blockIdx.x; number < p.tiles; number += gridDim.x) {
      const Tile tile(p, number);
      float acc[TM][GN / 2];

      // 2. Multiply-accumulate.
      multiply(acc, p, ring, row, column);

      // 3. Epilogue: bias and activation in registers; then each warp turns 16 rows of 64 columns into whole vectors.
      const ResultOf result(p, tile.g);
#pragma unroll
      for (int i = 0; i < TM; ++i) {
        Place place[4];  // of the rows that this lane stores
        bool inside[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          Index at[RANK];
          const Index m = row + i * 64 + warp % 4 * 16 + r * 4 + lane / 8, item = split(m, p.box, at);
          inside[r] = m < p.rows && tile.b0 + item < p.batch;
#pragma unroll
          for (int a = 0; a < RANK; ++a) {
            at[a] += tile.at[a];
            inside[r] = inside[r] && at[a] < p.out[a];
          }
          place[r] = result.place(tile.b0 + item, at);
        }
#pragma unroll
        for (int q = 0; q < GN; q += 64) {
          const Index n0 = tile.n0 + column + q;
#pragma unroll
          for (int j = 0; j < smaller(64, GN - q); j += 8) {
            float bias[2] = {};
            const Index n = n0 + j + lane % 4 * 2;
            if (p.bias && n < p.columns) {
              Index f;
              result.column(n, f);
              bias[0] = widen(p.bias[f]), bias[1] = widen(p.bias[f + 1]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              Vector<E, 2> two;
#pragma unroll
              for (int e = 0; e < 2; ++e)
                two.at[e] = finish<ACTIVATION, E>(acc[i][(q + j) / 2 + half * 2 + e] + bias[e]);
              store(ys + (lane / 4 + half * 8) * Y_PITCH + j + lane % 4 * 2, two);
            }
          }
          __syncwarp();
          const Index n = n0 + lane % 8 * 8, stored = GN - q < 64 && n0 + GN - q < p.columns ? n0 + GN - q : p.columns;
          Index f;
          const Place vector = result.column(n, f);
#pragma unroll
          for (int r = 0; r < 4; ++r)
            if (inside[r] && n < stored && result.exists(place[r], vector))
              store(p.y + place[r].offset + vector.offset, read<8>(ys + (r * 4 + lane / 8) * Y_PITCH + lane % 8 * 8));
          __syncwarp();
        }
      }
    }
  }
}
