// conv_wgmma_first.cu -- channels_first convolution of any rank as an implicit matrix product on the tensor cores of
// sm_90, by warpgroups.
//
//   y[b,f,p] = act( bias[f] + sum over r,c of  w[r,c,f] * x[b, c, p*stride + r*dilation - pad] )
//   x reads as zero outside its bounds.
//
// Twin   cuconv/reference/conv.py::conv, transpose.py::conv_transpose      Plan  cuconv/plan/wgmma_first.py
// Test   tests/test_conv_wgmma_first.py
//
// conv_wgmma.cu with rows and columns exchanged, so that results leave as they lie in memory: the rows of a tile are BM
// filters, its columns BN positions. A step of its sum is one tap and BK channels. Both operands lie across the sum:
// a row of w is 64 filters of one channel; x comes in strips, SPAN positions of the last axis by BK channels. `spans`
// strips lie side by side on the last axis, each with others of the `box` on the other axes and of `items` batch items.
// 16-bit elements, stride 1 on the last axis. UPSAMPLED as in conv_simt.cu, but for the last axis, which is as it is.
//
// Arrays, C-contiguous   x [B, C, L..]   w [R.., C/G, F], of UPSAMPLED [G, taps.., C/G, columns]   bias [F]   y [B, F, P..]
//
// Work split
//   blockIdx.x   every gridDim.x-th tile; filters fastest, in bands, so that blocks share x in the L2 cache
//   warpgroups   two multiply, GM x GN sums each, of one tile or, where that is a whole tile, in turns of two; one thread
//                of the third asks the copy engine for operands
//
// Shared memory, STAGES of one step each:  ws [BM / 64][BK][64]   xs [BN / SPAN][BK][SPAN], swizzled within their rows;
//   then 16 rows of y for each warp that multiplies, two barriers a stage: it is full, and it is empty again; and one for
//   the turn of each warpgroup.
//   Strips that no copy fills, for want of positions, stay zero.

#include "conv.cuh"
#include "warpgroups.cuh"

// Set by the plan, besides those of conv.cuh: BM BN BK   GM GN (of a warpgroup)   SPAN STAGES VECY ACTIVATION
static_assert(SPAN == 64 || SPAN == 32 || SPAN == 16, "a row of a strip is what a swizzle spans");
constexpr int GROUPS_N = BN / GN, SHARERS = BM / GM * GROUPS_N;  // warpgroups that share a tile
constexpr bool IN_TURNS = SHARERS == 1;                          // each has tiles of its own, as in conv_wgmma.cu
static_assert((IN_TURNS || SHARERS == CONSUMERS) && GM % 64 == 0 && GN % 64 == 0, "two warpgroups, 64 rows at a time");
constexpr int TM = GM / 64;  // products of a warpgroup at one k
constexpr int W_ROW_BYTES = 64 * sizeof(E), SLICE_BYTES = BK * W_ROW_BYTES, SLICES = BM / 64;
constexpr int ROW_BYTES = SPAN * sizeof(E), STRIP_BYTES = BK * ROW_BYTES, STRIPS = BN / SPAN;
constexpr int W_BYTES = SLICES * SLICE_BYTES, STAGE_BYTES = W_BYTES + STRIPS * STRIP_BYTES;
constexpr int Y_PITCH = 64 + 8;  // the padding spreads what a warp writes over the banks
constexpr int Y_BYTES = CONSUMERS * 4 * 16 * Y_PITCH * sizeof(E);

struct WarpgroupParams {
  Map x_map, w_map;  // axes: positions of the last axis, channels, the other axes, items; columns, channels, taps
  const E* x;        // read through their maps, as w
  const E* w;
  const E* bias;  // null: none
  E* y;
  Index tiles, tiles_m, tiles_n, band;  // of a group in m (filters) and n; a band has so many of m
  Index groups, channels, columns;      // channels and filters of one group
  Index group_columns, group_taps;      // from one group's w to the next, on the axes of its map
  Index taps, steps, batch, items;
  Index spans, beside;                // strips side by side on the last axis, and those that come with each
  Index box[RANK], boxes[RANK];       // of positions; on the last axis those of all spans
  Index out[RANK], kernel[RANK], stride[RANK], dilation[RANK], pad[RANK];
#if UPSAMPLED
  Index full[RANK], up[RANK], phases[RANK], shift[RANK];
#endif
};

// A tile: its group, its first filter, item and position.
struct Tile {
  Index g, m0, b0, at[RANK];

  __device__ __forceinline__ Tile(const WarpgroupParams& p, Index tile) {
    const Index in_group = p.tiles_m * p.tiles_n;
    g = tile / in_group;
    tile %= in_group;
    const Index first = tile / (p.tiles_n * p.band) * p.band, left = p.tiles_m - first;
    const Index wide = left < p.band ? left : p.band;
    tile -= first * p.tiles_n;
    m0 = (first + tile % wide) * BM;
    b0 = split(tile / wide, p.boxes, at) * p.items;
#pragma unroll
    for (int a = 0; a < RANK; ++a) at[a] *= p.box[a];
  }

  // Whether its column n is of y, and where: in item b at `to`.
  __device__ __forceinline__ bool position(const WarpgroupParams& p, int n, Index& b, Index (&to)[RANK]) const {
    const Index strip = n / SPAN, span = strip / p.beside;
    Index other = strip % p.beside;
    bool inside = span < p.spans;
    to[RANK - 1] = at[RANK - 1] + span * SPAN + n % SPAN;
#pragma unroll
    for (int a = RANK - 2; a >= 0; --a) {
      to[a] = at[a] + other % p.box[a];
      other /= p.box[a];
    }
    b = b0 + other;
#pragma unroll
    for (int a = 0; a < RANK; ++a) inside = inside && to[a] < p.out[a];
    return inside && b < p.batch;
  }
};

// Asks for the operands of all tiles of this block.
__device__ __forceinline__ void produce(const WarpgroupParams& p, Ring ring) {
  const unsigned copy = p.beside * STRIP_BYTES;
  for (Index number = blockIdx.x; number < p.tiles; number += gridDim.x) {
    const Tile tile(p, number);
    Index tap[RANK] = {};
    int from[RANK + 2], w_from[3];
    from[RANK + 1] = tile.b0;
    for (Index r = 0; r < p.taps; ++r) {
      w_from[2] = tile.g * p.group_taps + r;
#pragma unroll
      for (int a = 0; a < RANK - 1; ++a)
        from[RANK - a] = tile.at[a] * p.stride[a] + tap[a] * p.dilation[a] - p.pad[a];
      for (w_from[1] = 0; w_from[1] < p.channels; w_from[1] += BK) {
        ptx::barrier_wait(ring.empty(), ring.parity ^ 1);
        ptx::barrier_expect(ring.full(), W_BYTES + p.spans * copy);
#pragma unroll
        for (int j = 0; j < SLICES; ++j) {
          w_from[0] = tile.g * p.group_columns + tile.m0 + j * 64;
          ptx::load_box(ring.memory() + j * SLICE_BYTES, &p.w_map, ring.full(), w_from);
        }
        from[0] = tile.at[RANK - 1] + tap[RANK - 1] * p.dilation[RANK - 1] - p.pad[RANK - 1];
        from[1] = tile.g * p.channels + w_from[1];
        for (Index s = 0; s < p.spans; ++s, from[0] += SPAN)
          ptx::load_box(ring.memory() + W_BYTES + s * copy, &p.x_map, ring.full(), from);
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

// The sums of one tile. `turn`: the barrier of the warpgroup that multiplies next, if they take turns.
__device__ __forceinline__ void multiply(float (&acc)[TM][GN / 2], const WarpgroupParams& p, Ring& ring, int row,
                                         int column, unsigned turn) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < TM; ++i)
#pragma unroll
    for (int j = 0; j < GN / 2; ++j) acc[i][j] = 0;
  constexpr unsigned long long w_layout = layout(SWIZZLE_128, 8 * W_ROW_BYTES, SLICE_BYTES);
  constexpr unsigned long long x_layout =
      layout(SPAN == 64 ? SWIZZLE_128 : SPAN == 32 ? SWIZZLE_64 : SWIZZLE_32, 8 * ROW_BYTES, STRIP_BYTES);
  unsigned before = 0;  // what is to be emptied, once the products of the step before are made
  for (Index step = 0; step < p.steps; ++step) {
    const unsigned long long w = w_layout | (ring.memory() + row / 64 * SLICE_BYTES) >> 4;
    const unsigned long long x = x_layout | (ring.memory() + W_BYTES + column / SPAN * STRIP_BYTES) >> 4;
    ptx::barrier_wait(ring.full(), ring.parity);
    ptx::products_fence();
#pragma unroll
    for (int k = 0; k < BK; k += 16)
#pragma unroll
      for (int i = 0; i < TM; ++i)
        multiply_tiles<true>(acc[i], w + (i * SLICE_BYTES + k * W_ROW_BYTES) / 16, x + k * ROW_BYTES / 16, E{});
    ptx::products_commit();
    ptx::products_wait<1>(acc);
    if (step > 0 && lane == 0) ptx::barrier_arrive(before);
    before = ring.empty();
    ring.next();
  }
  if (IN_TURNS && lane == 0) ptx::barrier_arrive(turn);
  ptx::products_wait<0>(acc);
  if (lane == 0) ptx::barrier_arrive(before);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_wgmma_first(const __grid_constant__ WarpgroupParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int thread = threadIdx.x;
  const unsigned start = ptx::shared_address(memory);
  Ring ring{start, STAGE_BYTES, start + STAGES * STAGE_BYTES + Y_BYTES, STAGES};
  const unsigned turns = ring.barriers + STAGES * 16;
  if (thread == 0) {
    if constexpr (IN_TURNS)
      for (int group = 0; group < CONSUMERS; ++group) ptx::barrier_init(turns + group * 8, 4);
    ring.init(SHARERS);
  }
  const int filled = int(p.spans * p.beside) * STRIP_BYTES, spare = (STRIPS * STRIP_BYTES - filled) / 16;
  for (int at = thread; at < STAGES * spare; at += THREADS)
    store(reinterpret_cast<E*>(memory + at / spare * STAGE_BYTES + W_BYTES + filled + at % spare * 16), Vector<E, 8>{});
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
    // Of the tile: this warpgroup's first ones.
    const int row = IN_TURNS ? 0 : group / GROUPS_N * GM, column = IN_TURNS ? 0 : group % GROUPS_N * GN;
    E* const ys = reinterpret_cast<E*>(memory + STAGES * STAGE_BYTES) + warp * 16 * Y_PITCH;
    constexpr int ACROSS = smaller(32, 64 / VECY), DOWN = 32 / ACROSS;  // lanes that store a row, and rows at once
    unsigned turn_parity = !group;
    const Index begin = IN_TURNS ? group : 0, step = IN_TURNS ? CONSUMERS : 1;
    if (begin > 0) ring.skip(p.steps);
    for (Index number = blockIdx.x + begin * gridDim.x; number < p.tiles; number += step * gridDim.x) {
      const Tile tile(p, number);
      float acc[TM][GN / 2];

      // 2. Multiply-accumulate.
      if constexpr (IN_TURNS) ptx::barrier_wait(turns + group * 8, turn_parity);
      multiply(acc, p, ring, row, column, turns + (1 - group) * 8);
      if constexpr (IN_TURNS) turn_parity ^= 1, ring.skip(p.steps);

      // 3. Epilogue: bias and activation in registers; then each warp turns 16 rows of 64 columns into whole vectors.
      const ResultOf result(p, tile.g);
#pragma unroll
      for (int i = 0; i < TM; ++i) {
        const Index m = tile.m0 + row + i * 64 + warp % 4 * 16;
        float bias[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (const Index n = m + lane / 4 + half * 8; p.bias && n < p.columns) {
            Index f;
            result.column(n, f);
            bias[half] = widen(p.bias[f]);
          }
#pragma unroll
        for (int q = 0; q < GN; q += 64) {
#pragma unroll
          for (int j = 0; j < 64; j += 8)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              Vector<E, 2> two;
#pragma unroll
              for (int e = 0; e < 2; ++e)
                two.at[e] = finish<ACTIVATION, E>(acc[i][(q + j) / 2 + half * 2 + e] + bias[half]);
              store(ys + (lane / 4 + half * 8) * Y_PITCH + j + lane % 4 * 2, two);
            }
          __syncwarp();
#pragma unroll
          for (int c = lane % ACROSS * VECY; c < 64; c += ACROSS * VECY) {
            Index b, at[RANK];
            const bool inside = tile.position(p, column + q + c, b, at);
            const Place place = result.place(b, at);
#pragma unroll
            for (int r = lane / ACROSS; r < 16; r += DOWN) {
              Index f;
              const Place filter = result.column(m + r, f);
              if (inside && m + r < p.columns && result.exists(place, filter))
                store(p.y + place.offset + filter.offset, read<VECY>(ys + r * Y_PITCH + c));
            }
          }
          __syncwarp();
        }
      }
    }
  }
}
