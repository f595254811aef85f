// kernel_grad_wgmma.cu -- gradient of a convolution's kernel, any rank, on the tensor cores of sm_90, by warpgroups.
//
//   dw[r,c,f] = sum over b,p of  x[b, p*stride + r*dilation - pad, c] * dy[b,p,f]
//   x reads as zero outside its bounds.
//
// Twin   cuconv/reference/conv.py::kernel_grad      Plan  cuconv/plan/kernel_grad_wgmma.py
// Test   tests/test_kernel_grad_wgmma.py
//
// The product is that of kernel_grad_mma.cu: rows are channels of x, columns filters, and the sum runs over positions. It
// runs across shared memory in both operands, where a position is a row of 64 channels or filters. 16-bit elements.
//
// A step is a box of positions. The copy engine brings it once for dy, and for x as BOXES boxes of the same order of
// positions, from which all TAPS taps of a block read: a tap begins so many rows into one of them. Rows come in eights,
// the period of the swizzle, so taps do as well. With a box for each tap that is always so. In a longer box, a halo, it
// is where 8 "strands" lie innermost, whose taps are the same: batch items, places on another axis, or residues of a
// dilation; or where the dilation is a multiple of 8. Axes of a map may stand in any order, so the plan says what the
// axes are, and the kernel knows positions on RANK of them, batch among them. HALO is the one with the taps of a block.
//
// Arrays, C-contiguous   x [B, L.., C]   dy [B, P.., F]   dw [R.., C/G, F], of SPLIT [splits, R.., C/G, F] in float
//
// Work split
//   blockIdx.x   split of the boxes, TAPS taps, group, tile of BM channels, tile of BN filters; filters fastest
//   warpgroups   two multiply, and share the channels, the taps or the filters of a block; one thread of the third asks
//                the copy engine for operands
//
//   Every split sums its positions in their order and has its own place in `sums`; reduce_splits.cu adds them up in
//   theirs. No atomics: the same bits on every run.
//
// Shared memory, STAGES of one step each:  xs [SLICES][BOXES][rows of a box][64]   ds [BN / 64, rounded up][rows][64],
//   swizzled within their rows; then two barriers a stage: it is full, and it is empty again.

#include "positions.cuh"
#include "warpgroups.cuh"

// Set by the plan: ELEMENT INDEX RANK (axes of positions)   HALO SPLIT   BM BN BK TAPS   SHARED BOXES STAGES
constexpr int CHANNELS = 0, FILTERS = 1, TAPS_OF_BLOCK = 2;  // what warpgroups share: a value of SHARED
constexpr int PARTS_C = SHARED == CHANNELS ? 2 : 1, PARTS_T = SHARED == TAPS_OF_BLOCK ? 2 : 1;
constexpr int SLICES = BM / 64, SLICES_D = ceil_div(BN, 64);
constexpr int GC = SLICES / PARTS_C, GT = ceil_div(TAPS, PARTS_T), GN = SHARED == FILTERS ? BN / 2 : BN;
static_assert(SLICES * 64 == BM && GC * PARTS_C == SLICES, "a warpgroup has whole slices of channels");
static_assert(GN == BN || GN % 64 == 0, "a warpgroup has whole slices of filters");
constexpr int PRODUCTS = GC * GT;          // of a warpgroup, at 16 positions
static_assert(PRODUCTS * GN / 2 <= 192, "a thread has registers for 192 sums");
constexpr int ROW_BYTES = 64 * sizeof(E), D_BYTES = BK * ROW_BYTES;
static_assert(BK % 16 == 0, "a product has 16 positions");
using Result = conditional<SPLIT, S, E>;

struct WarpgroupParams {
  Map x_map, d_map;  // axes: channels or filters, then those of positions, innermost first
  const E* x;        // read through their maps
  const E* dy;
  Result* dw;
  Index boxes, chunk;                        // of all positions, and of one split
  Index tiles_c, tiles_n;
  Index groups, channels, columns, filters;  // channels and columns of one group, filters of all
  Index taps, count;                         // on the axis HALO; elements of dw
  Index steps, gap;                          // a line of x has 16 * steps rows; to the next from its last 16, by 16 bytes
  Index stage_bytes, x_bytes;                // of a stage, and of a box of x
  Index parts[RANK], part_step[RANK], part_taps[RANK];  // taps of other blocks: how many, what they add in x, and to r
  Index counts[RANK], x_step[RANK], x_from[RANK], d_step[RANK];  // boxes, and coordinates from one to the next
  Index box_from[BOXES];                     // of a box of x on HALO
  Index tap_from[TAPS];                      // of a tap in a slice of xs, in units of 16 bytes
};

// The next box, or whatever has a number on every axis.
__device__ __forceinline__ void advance(Index (&at)[RANK], const Index (&count)[RANK]) {
#pragma unroll
  for (int a = RANK - 1; a >= 0; --a) {
    if (++at[a] < count[a]) break;
    at[a] = 0;
  }
}

// What a block computes: its first channel and filter within its group, its taps, and its boxes.
struct Tile {
  Index g, c0, n0, part[RANK], number, first, end;

  __device__ __forceinline__ explicit Tile(const WarpgroupParams& p) {
    Index tile = blockIdx.x;
    n0 = tile % p.tiles_n * BN, tile /= p.tiles_n;
    c0 = tile % p.tiles_c * BM, tile /= p.tiles_c;
    g = tile % p.groups, tile /= p.groups;
    number = split(tile, p.parts, part);
    first = number * p.chunk;
    end = p.boxes - first < p.chunk ? p.boxes : first + p.chunk;
  }
};

// Asks for the operands of all steps.
__device__ __forceinline__ void produce(const WarpgroupParams& p, const Tile& tile, Ring ring) {
  Index at[RANK];
  split(tile.first, p.counts, at);
  for (Index box = tile.first; box < tile.end; ++box) {
    int x_from[RANK + 1], d_from[RANK + 1];
#pragma unroll
    for (int a = 0; a < RANK; ++a) {
      x_from[a + 1] = at[a] * p.x_step[a] + p.x_from[a] + tile.part[a] * p.part_step[a];
      d_from[a + 1] = at[a] * p.d_step[a];
    }
    const int on_halo = x_from[HALO + 1];
    unsigned to = ring.memory();
    ptx::barrier_wait(ring.empty(), ring.parity ^ 1);
    ptx::barrier_expect(ring.full(), p.stage_bytes);
#pragma unroll
    for (int c = 0; c < SLICES; ++c) {
      x_from[0] = tile.g * p.channels + tile.c0 + c * 64;
#pragma unroll
      for (int i = 0; i < BOXES; ++i, to += p.x_bytes) {
        x_from[HALO + 1] = on_halo + p.box_from[i];
        ptx::load_box(to, &p.x_map, ring.full(), x_from);
      }
    }
#pragma unroll
    for (int j = 0; j < SLICES_D; ++j, to += D_BYTES) {
      d_from[0] = tile.g * p.columns + tile.n0 + j * 64;
      ptx::load_box(to, &p.d_map, ring.full(), d_from);
    }
    ring.next();
    advance(at, p.counts);
  }
}

// The sums of a warpgroup, from its first slice, tap and column on.
__device__ __forceinline__ void multiply(float (&acc)[PRODUCTS][GN / 2], const WarpgroupParams& p, const Tile& tile,
                                         Ring ring, int slice, int tap, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < PRODUCTS; ++i)
#pragma unroll
    for (int j = 0; j < GN / 2; ++j) acc[i][j] = 0;
  unsigned tap_from[GT];
#pragma unroll
  for (int t = 0; t < GT; ++t) tap_from[t] = p.tap_from[smaller(tap + t, TAPS - 1)];  // a tap too many is not stored
  const unsigned slice_bytes = BOXES * p.x_bytes;
  const unsigned long long x_layout = layout(SWIZZLE_128, 8 * ROW_BYTES, 16);
  const unsigned long long d_layout = layout(SWIZZLE_128, 8 * ROW_BYTES, D_BYTES);
  unsigned before = 0;  // what is to be emptied, once the products of the step before are made
  for (Index box = tile.first; box < tile.end; ++box) {
    unsigned long long x = x_layout | (ring.memory() + slice * slice_bytes) >> 4;
    unsigned long long d = d_layout | (ring.memory() + SLICES * slice_bytes + column / 64 * D_BYTES) >> 4;
    ptx::barrier_wait(ring.full(), ring.parity);
    ptx::products_fence();
    int left = p.steps;  // products until the next line
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
#pragma unroll
      for (int i = 0; i < PRODUCTS; ++i)
        multiply_tiles<true>(acc[i], x + (i / GT * (slice_bytes / 16) + tap_from[i % GT]), d + k * ROW_BYTES / 16, E{});
      x += --left ? 16 * ROW_BYTES / 16 : p.gap;
      if (!left) left = p.steps;
    }
    ptx::products_commit();
    ptx::products_wait<1>(acc);
    if (box > tile.first && lane == 0) ptx::barrier_arrive(before);
    before = ring.empty();
    ring.next();
  }
  ptx::products_wait<0>(acc);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel_grad_wgmma(const __grid_constant__ WarpgroupParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int thread = threadIdx.x;
  const unsigned start = ptx::shared_address(memory);
  const Ring ring{start, unsigned(p.stage_bytes), start + STAGES * unsigned(p.stage_bytes), STAGES};
  if (thread == 0) ring.init();
  __syncthreads();
  const Tile tile(p);

  if (thread >= CONSUMERS * GROUP) {
    // 1. Stage.
    ptx::give_registers<PRODUCER_REGISTERS>();
    if (thread == CONSUMERS * GROUP) produce(p, tile, ring);
  } else {
    // 2. Multiply-accumulate.
    ptx::take_registers<CONSUMER_REGISTERS>();
    const int group = __shfl_sync(~0u, thread / GROUP, 0);  // the same for a warp, as the compiler can tell now
    const int slice = SHARED == CHANNELS ? group * GC : 0, tap = SHARED == TAPS_OF_BLOCK ? group * GT : 0;
    const int column = SHARED == FILTERS ? group * GN : 0;
    float acc[PRODUCTS][GN / 2];
    multiply(acc, p, tile, ring, slice, tap, column);

    // 3. Epilogue: four lanes have a whole sector of floats. The only place that tests the edges of dw.
    const int warp = thread / 32 % 4, lane = thread % 32;
    Index r = tap;
#pragma unroll
    for (int a = 0; a < RANK; ++a) r += tile.part[a] * p.part_taps[a];
    Result* const dw = p.dw + tile.number * p.count + tile.g * p.columns;
#pragma unroll
    for (int i = 0; i < PRODUCTS; ++i) {
      const int t = i % GT;
      if (tap + t >= TAPS || tile.part[HALO] * TAPS + tap + t >= p.taps) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Index c = tile.c0 + (slice + i / GT) * 64 + warp * 16 + half * 8 + lane / 4;
        if (c >= p.channels) continue;
        Result* const row = dw + ((r + t) * p.channels + c) * p.filters;
#pragma unroll
        for (int j = 0; j < GN; j += 8) {
          const Index n = tile.n0 + column + j + lane % 4 * 2;
          if (n >= p.columns) continue;
          Vector<Result, 2> two;
#pragma unroll
          for (int e = 0; e < 2; ++e) two.at[e] = narrow<Result>(acc[i][j / 2 + half * 2 + e]);
          store(row + n, two);
        }
      }
    }
  }
}
