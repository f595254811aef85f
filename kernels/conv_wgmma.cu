// conv_wgmma.cu -- convolution of any rank as an implicit matrix product on the tensor cores of sm_90, by warpgroups.
//
//   y[b,p,f] = act( bias[f] + sum over r,c of  x[b, p*stride + r*dilation - pad, c] * w[r,c,f] )
//   x reads as zero outside its bounds.
//
// Twin   cuconv/reference/conv.py::conv, transpose.py::conv_transpose      Plan  cuconv/plan/wgmma.py
// Test   tests/test_conv_wgmma.py
//
// The rows of a tile are the positions of a box, `box` of them on each axis of a view of y; its columns are BN filters.
// A step of its sum is one tap and BK channels, for which x is the same box elsewhere: the copy engine brings it, at any
// stride, and zeros for what lies outside of x on any axis. UPSAMPLED and SPLIT as in conv_simt.cu. 16-bit elements; or
// float, of which products see TF32: the copy engine rounds them (their maps say so), products ignore the other 13 bits.
//
// The view      its axes, outermost first
//   reload      batch items, then the axes of y. Each step has a box of its own.
//   HALO        one axis of y, batch items, the other axes. A box is longer on the first of them and serves all taps there
//               that are whole steps of the stride apart, or each class of them its own. A tap is `tap_rows` rows behind
//               the one before, a multiple of 8: then the swizzle repeats, so that a descriptor may begin there. Whether
//               it may begin at other rows the manual leaves open, and no GPU has told yet.
//   PHASE       a HALO of a dilation, at stride 1, in strands: position q * strands + r - offset is the q-th of strand r,
//               which is the last axis. Taps are neighbours in a strand. The first `ragged` strands of x are longer than
//               the others by one input, so each kind has a map of its own, and no box has both.
//
// Arrays, C-contiguous   x [B, L.., C]   w [R.., C/G, F], of UPSAMPLED [G, taps.., C/G, columns]
//   of float [G, taps.., columns, C/G], packed   bias [F]   y [B, P.., F]
//
// Work split
//   blockIdx.x   every gridDim.x-th tile; parts of K slowest, columns fastest, in bands, so that blocks share rows of x in
//                the L2 cache. STATIONARY: all tiles of a block have the same columns
//   warpgroups   two multiply, GM x GN sums each, of one tile or, where that is a whole tile, in turns of two; one thread
//                of the third asks the copy engine for operands
//
// Shared memory   two rings, swizzled within their rows: ws [w_stages][BN / 64, rounded up][BK][64], of float
//   [w_stages][BN][BK]; xs [stages][stage_rows][BK]. STATIONARY: ws has a stage for each step, filled once. Then 16 rows
//   of y for each warp that multiplies, two barriers a stage: it is full, and it is empty again; and one for the turn of
//   each warpgroup. Rows of xs that no box fills, for want of positions, stay zero.

#include "conv.cuh"
#include "warpgroups.cuh"

// Set by the plan, besides those of conv.cuh: BM BN BK   GM GN (of a warpgroup)   ACTIVATION
// HALO (0, or 1 + the axis whose taps share inputs)   PHASE STATIONARY
constexpr int AXES = RANK + 1 + PHASE;  // of the view
static_assert(HALO <= RANK && (HALO || !PHASE), "strands are of the halo's axis");
constexpr int ROW_BYTES = BK * sizeof(E);
static_assert(ROW_BYTES == 128 || ROW_BYTES == 64, "a row is what a swizzle spans");
constexpr int GROUPS_N = BN / GN, SHARERS = BM / GM * GROUPS_N;  // warpgroups that share a tile
constexpr bool IN_TURNS = SHARERS == 1;                          // each has tiles of its own
static_assert((IN_TURNS || SHARERS == CONSUMERS) && GM % 64 == 0, "two warpgroups multiply 64 rows at a time");
static_assert(!IN_TURNS || !SPLIT, "parts of K differ in their stages, which the other warpgroup must know");
constexpr int TM = GM / 64;               // products of a warpgroup at one k
constexpr int STEP = 32 / sizeof(E);      // values of k of a product
constexpr bool K_MAJOR = sizeof(E) == 4;  // rows of ws are columns of the product: TF32 has no transposed operand
constexpr int SLICE = K_MAJOR ? BN : 64;  // columns that a copy brings
constexpr int SLICES = ceil_div(BN, SLICE), SLICE_BYTES = SLICE * ROW_BYTES, W_BYTES = SLICES * SLICE_BYTES;
static_assert(GROUPS_N == 1 || GN % 64 == 0, "a slice belongs to one warpgroup");
constexpr int W_K_BYTES = K_MAJOR ? sizeof(E) : 128;  // from one k to the next
constexpr int W_COLUMN = K_MAJOR, W_CHANNEL = !K_MAJOR;  // axes of its map
// A warp's 16 rows of y, 128 bytes each; the padding spreads what it writes over the banks.
constexpr int Y_COLUMNS = 128 / sizeof(Y), Y_VECTOR = 16 / sizeof(Y), Y_PITCH = Y_COLUMNS + 8;
constexpr int Y_BYTES = CONSUMERS * 4 * 16 * Y_PITCH * sizeof(Y);

struct WarpgroupParams {
  Map x_map[1 + PHASE], w_map;  // axes: channels, those of the view, innermost first; columns, channels, taps, of float
                                // channels first
  const E* x;                   // read through their maps, as w
  const E* w;
  const E* bias;  // null: none
  Y* y;
  Index tiles, tiles_m, tiles_n, band;  // of a group in m and n; a band has so many of n
  Index groups, channels, columns;      // channels and columns of one group
  Index group_columns, group_taps;      // from one group's w to the next, on the axes of its map
  Index stages, w_stages, stage_rows;   // of the rings
  Index pieces, piece, piece_rows;      // x comes to a stage in pieces, each so many positions of the first axis
  Index chunks, loads;                  // of channels; stages of x that one class of taps comes in
  Index part_loads, part_tiles, total;  // of a part of K: stages of x, tiles; of y: elements
  Index halo_taps, tap_rows;
  Index batch, rows;                    // rows: positions of a box
  Index out[RANK];
  // Of the view, but that `boxes` begin with items. On the halo's axis `taps` are classes; halo_taps are all of them.
  Index box[AXES], boxes[AXES], taps[AXES], tap_pitch[AXES], stride[AXES], dilation[AXES], pad[AXES];
#if PHASE
  Index strands, offset, ragged, ragged_boxes;  // boxes: on the axis of strands
#endif
#if UPSAMPLED
  Index full[RANK], up[RANK], phases[RANK], shift[RANK];
#endif
};

// A tile: its group, its first column, and where its box begins; and of its part of K, which stages of x, from where on.
struct Tile {
  Index g, n0, at[AXES], part = 0, load = 0, loads;

  __device__ __forceinline__ Tile(const WarpgroupParams& p, Index tile) {
    loads = p.part_loads;
    if constexpr (SPLIT) {
      part = tile / p.part_tiles;
      tile %= p.part_tiles;
      load = part * loads;
      const Index left = p.taps[0] * p.loads - load;
      if (left < loads) loads = left;
    }
    if constexpr (STATIONARY) {
      const Index all = p.groups * p.tiles_n, column = tile % all;
      g = column / p.tiles_n;
      n0 = column % p.tiles_n * BN;
      tile /= all;
    } else {
      const Index in_group = p.tiles_m * p.tiles_n;
      g = tile / in_group;
      tile %= in_group;
      const Index first = tile / (p.tiles_m * p.band) * p.band, left = p.tiles_n - first;
      const Index wide = left < p.band ? left : p.band;
      tile -= first * p.tiles_m;
      n0 = (first + tile % wide) * BN;
      tile /= wide;
    }
    split(tile, p.boxes, at);
    if constexpr (HALO > 0) {  // boxes of one item after the other, as in reload
      const Index item = at[0];
      at[0] = at[1], at[1] = item;
    }
#if PHASE
    const Index behind = at[RANK + 1] - p.ragged_boxes;
#endif
#pragma unroll
    for (int a = 0; a < AXES; ++a) at[a] *= p.box[a];
#if PHASE
    if (behind >= 0) at[RANK + 1] = p.ragged + behind * p.box[RANK + 1];
#endif
  }

  // Of its strands.
  __device__ __forceinline__ const Map& x_map(const WarpgroupParams& p) const {
#if PHASE
    return p.x_map[at[RANK + 1] >= p.ragged];
#else
    return p.x_map[0];
#endif
  }

  // Whether its row m is of y, and where: in item b at `to`.
  __device__ __forceinline__ bool position(const WarpgroupParams& p, Index m, Index& b, Index (&to)[RANK]) const {
    Index in[AXES];
    split(m, p.box, in);
#pragma unroll
    for (int a = 0; a < AXES; ++a) in[a] += at[a];
    b = in[HALO > 0];
#pragma unroll
    for (int a = 0; a < RANK; ++a) to[a] = in[a == HALO - 1 ? 0 : a < HALO ? a + 2 : a + 1];
    bool inside = m < p.rows && b < p.batch;
#if PHASE
    const Index r = in[RANK + 1];
    to[HALO - 1] = to[HALO - 1] * p.strands + r - p.offset;
    inside = inside && r < (at[RANK + 1] < p.ragged ? p.ragged : p.strands);
#endif
#pragma unroll
    for (int a = 0; a < RANK; ++a) inside = inside && within(to[a], p.out[a]);
    return inside;
  }
};

constexpr unsigned long long X_LAYOUT = layout(ROW_BYTES == 128 ? SWIZZLE_128 : SWIZZLE_64, 8 * ROW_BYTES, 16);
constexpr unsigned long long W_LAYOUT = K_MAJOR ? X_LAYOUT : layout(SWIZZLE_128, 8 * 128, SLICE_BYTES);

// Asks for the operands of a tile, each as soon as there is room for it.
template <bool X, bool W>
__device__ __forceinline__ void produce(const WarpgroupParams& p, const Tile& tile, Ring& xs, Ring& ws) {
  Index tap[AXES];
  int from[AXES + 1], w_from[3];
  split(tile.load / p.chunks, p.taps, tap);
  w_from[W_CHANNEL] = tile.load % p.chunks * BK;
  for (Index left = tile.loads; left > 0; --left) {
    if constexpr (X) {
      from[0] = tile.g * p.channels + w_from[W_CHANNEL];
#pragma unroll
      for (int a = 0; a < AXES; ++a) from[AXES - a] = tile.at[a] * p.stride[a] + tap[a] * p.dilation[a] - p.pad[a];
      ptx::barrier_wait(xs.empty(), xs.parity ^ 1);
      ptx::barrier_expect(xs.full(), p.pieces * p.piece_rows * ROW_BYTES);
#pragma unroll 1
      for (Index i = 0; i < p.pieces; ++i, from[AXES] += p.piece * p.stride[0])
        ptx::load_box(xs.memory() + i * p.piece_rows * ROW_BYTES, &tile.x_map(p), xs.full(), from);
      xs.next();
    }
    if constexpr (W) {
      Index r = tile.g * p.group_taps;
#pragma unroll
      for (int a = 0; a < AXES; ++a) r += tap[a] * p.tap_pitch[a];
      for (Index t = tap[0]; t < p.halo_taps; t += p.taps[0]) {
        w_from[2] = r + (t - tap[0]) * p.tap_pitch[0];
        if constexpr (!STATIONARY) ptx::barrier_wait(ws.empty(), ws.parity ^ 1);
        ptx::barrier_expect(ws.full(), W_BYTES);
#pragma unroll
        for (int j = 0; j < SLICES; ++j) {
          w_from[W_COLUMN] = tile.g * p.group_columns + tile.n0 + j * SLICE;
          ptx::load_box(ws.memory() + j * SLICE_BYTES, &p.w_map, ws.full(), w_from);
        }
        ws.next();
      }
    }
    w_from[W_CHANNEL] += BK;
    if (w_from[W_CHANNEL] < p.channels) continue;
    w_from[W_CHANNEL] = 0;
#pragma unroll
    for (int a = AXES - 1; a >= 0; --a) {
      if (++tap[a] < p.taps[a]) break;
      tap[a] = 0;
    }
  }
}

// The sums of one tile. `turn`: the barrier of the warpgroup that multiplies next, if they take turns.
__device__ __forceinline__ void multiply(float (&acc)[TM][GN / 2], const WarpgroupParams& p, const Tile& tile, Ring& xs,
                                         Ring& ws, int row, int column, unsigned turn) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < TM; ++i)
#pragma unroll
    for (int j = 0; j < GN / 2; ++j) acc[i][j] = 0;
  // What is to be emptied, once the products of the step before are made; 0: nothing.
  unsigned x_before = 0, w_before = 0;
  const auto give_back = [&] {
    if (lane == 0 && x_before) ptx::barrier_arrive(x_before);
    if (lane == 0 && w_before) ptx::barrier_arrive(w_before);
  };
  Index first = 0, load = tile.load;  // of the taps that share x; a stage of x of this class
  if constexpr (HALO > 0 && SPLIT) first = load / p.loads, load %= p.loads;
  for (Index left = tile.loads; left > 0; ++first, load = 0)
    for (; left > 0 && (!HALO || load < p.loads); ++load, --left) {
      unsigned long long x = X_LAYOUT | (xs.memory() + row * ROW_BYTES) >> 4;
      ptx::barrier_wait(xs.full(), xs.parity);
      for (Index tap = first; tap < (HALO ? p.halo_taps : 1); tap += HALO ? p.taps[0] : 1) {
        const unsigned long long w = W_LAYOUT | (ws.memory() + column * ROW_BYTES) >> 4;
        ptx::barrier_wait(ws.full(), ws.parity);
        ptx::products_fence();
#pragma unroll
        for (int k = 0; k < BK; k += STEP)
#pragma unroll
          for (int i = 0; i < TM; ++i)
            multiply_tiles<false>(acc[i], x + (i * 64 * ROW_BYTES + k * sizeof(E)) / 16, w + k * W_K_BYTES / 16, E{});
        ptx::products_commit();
        ptx::products_wait<1>(acc);
        give_back();
        x_before = 0, w_before = STATIONARY ? 0 : ws.empty();
        ws.next();
        x += p.tap_rows * (ROW_BYTES / 16);
      }
      x_before = xs.empty();
      xs.next();
    }
  if (IN_TURNS && lane == 0) ptx::barrier_arrive(turn);
  ptx::products_wait<0>(acc);
  give_back();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) conv_wgmma(const __grid_constant__ WarpgroupParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int thread = threadIdx.x;
  const unsigned start = ptx::shared_address(memory);
  const unsigned x_bytes = p.stage_rows * ROW_BYTES, x_start = p.w_stages * W_BYTES;  // behind ws
  const unsigned y_start = x_start + p.stages * x_bytes, barriers = start + y_start + Y_BYTES;
  Ring xs{start + x_start, x_bytes, barriers, unsigned(p.stages), true};
  Ring ws{start, W_BYTES, barriers + unsigned(p.stages) * 16, unsigned(p.w_stages), !STATIONARY};
  const unsigned turns = barriers + unsigned(p.stages + p.w_stages) * 16;
  if (thread == 0) {
    if constexpr (IN_TURNS)
      for (int group = 0; group < CONSUMERS; ++group) ptx::barrier_init(turns + group * 8, 4);
    xs.init(SHARERS);
    ws.init(SHARERS);
  }
  const int filled = p.pieces * p.piece_rows * (ROW_BYTES / 16), spare = p.stage_rows * (ROW_BYTES / 16) - filled;
  for (int at = thread; at < p.stages * spare; at += THREADS)  // vectors that no box fills
    *reinterpret_cast<uint4*>(memory + x_start + at / spare * x_bytes + (filled + at % spare) * 16) = uint4{};
  ptx::fence_async();
  __syncthreads();

  if (thread >= CONSUMERS * GROUP) {
    // 1. Stage.
    ptx::give_registers<PRODUCER_REGISTERS>();
    if (thread == CONSUMERS * GROUP)
      for (Index number = blockIdx.x; number < p.tiles; number += gridDim.x) {
        const Tile tile(p, number);
        if (!STATIONARY || number == blockIdx.x) produce<true, true>(p, tile, xs, ws);
        else produce<true, false>(p, tile, xs, ws);
      }
  } else {
    ptx::take_registers<CONSUMER_REGISTERS>();
    const int group = __shfl_sync(~0u, thread / GROUP, 0);  // the same for a warp, as the compiler can tell now
    const int warp = thread / 32, lane = thread % 32;
    // Of the tile: this warpgroup's first ones.
    const int row = IN_TURNS ? 0 : group / GROUPS_N * GM, column = IN_TURNS ? 0 : group % GROUPS_N * GN;
    Y* const ys = reinterpret_cast<Y*>(memory + y_start) + warp * 16 * Y_PITCH;
    // In turns one warpgroup multiplies while the other stores: it begins when the other has waited for all operands of
    // its tile, and passes over their stages.
    unsigned turn_parity = !group;
    const Index begin = IN_TURNS ? group : 0, step = IN_TURNS ? CONSUMERS : 1;
    const auto pass = [&] { xs.skip(p.part_loads), ws.skip(p.halo_taps * p.loads); };
    if (begin > 0) pass();
    for (Index number = blockIdx.x + begin * gridDim.x; number < p.tiles; number += step * gridDim.x) {
      const Tile tile(p, number);
      float acc[TM][GN / 2];

      // 2. Multiply-accumulate.
      if constexpr (IN_TURNS) ptx::barrier_wait(turns + group * 8, turn_parity);
      multiply(acc, p, tile, xs, ws, row, column, turns + (1 - group) * 8);
      if constexpr (IN_TURNS) turn_parity ^= 1, pass();

      // 3. Epilogue: bias and activation in registers; then each warp turns 16 rows of 128 bytes into whole vectors.
      const ResultOf result(p, tile.g);
      Y* const y = p.y + tile.part * p.total;
#pragma unroll
      for (int i = 0; i < TM; ++i) {
        Place place[4];  // of the rows that this lane stores
        bool inside[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          Index item, at[RANK];
          inside[r] = tile.position(p, row + i * 64 + warp % 4 * 16 + r * 4 + lane / 8, item, at);
          place[r] = result.place(item, at);
        }
#pragma unroll
        for (int q = 0; q < GN; q += Y_COLUMNS) {
          const Index n0 = tile.n0 + column + q;
#pragma unroll
          for (int j = 0; j < smaller(Y_COLUMNS, GN - q); j += 8) {
            float bias[2] = {};
            const Index n = n0 + j + lane % 4 * 2;
            if (p.bias && n < p.columns) {
              Index f;
              result.column(n, f);
              bias[0] = widen(p.bias[f]), bias[1] = widen(p.bias[f + 1]);
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              Vector<Y, 2> two;
#pragma unroll
              for (int e = 0; e < 2; ++e)
                two.at[e] = finish<ACTIVATION, Y>(acc[i][(q + j) / 2 + half * 2 + e] + bias[e]);
              store(ys + (lane / 4 + half * 8) * Y_PITCH + j + lane % 4 * 2, two);
            }
          }
          __syncwarp();
          const Index n = n0 + lane % 8 * Y_VECTOR;
          const Index stored = GN - q < Y_COLUMNS && n0 + GN - q < p.columns ? n0 + GN - q : p.columns;
          Index f;
          const Place vector = result.column(n, f);
#pragma unroll
          for (int r = 0; r < 4; ++r)
            if (inside[r] && n < stored && result.exists(place[r], vector))
              store(y + place[r].offset + vector.offset,
                    read<Y_VECTOR>(ys + (r * 4 + lane / 8) * Y_PITCH + lane % 8 * Y_VECTOR));
          __syncwarp();
        }
      }
    }
  }
}
