// depthwise_grad_tile.cu -- gradients of kernel and bias of a depthwise convolution along channels-last sequences of
// stride 1 with many taps: every input is loaded once for all of them.
//
//   dw[r,c] = sum over b,p of  x[b, p + r*dilation - pad, c] * dy[b,p,c]      db[c] = sum over b,p of  dy[b,p,c]
//   Partial sums; reduce_splits.cu adds them up.
//
// Twin   cuconv/reference/depthwise.py      Plan  cuconv/plan/depthwise_grad.py::plan_grad_tile
// Test   tests/test_depthwise_grad_tile.py
//
// Arrays, C-contiguous   x [B, L, C]   dy [B, P, C]   partial [splits, K, C]   bias_partial [splits, C] or null
//
// Work split
//   A unit is BP outputs of one phase (depthwise.cuh) of one item. blockIdx.x: (split, tile of BC channels), tile
//   fastest; a block takes the units of its split one after the other. The threads of a block are BC / VEC for the
//   channels, TG for the taps, KC each, and PG for the outputs. One thread: KC taps of VEC channels over BP / PG
//   outputs, TP at a time: TP + KC - 1 inputs and TP gradients are read for TP * KC products, at offsets that the
//   compiler knows.
//
// Shared memory   xs [BP + TG * KC - 1][BC]   ys [BP][BC], zeros outside of x and dy; in the end, in their place,
//   sums [THREADS][VEC]: those of the PG parts are added in a tree of fixed shape.

#include "depthwise.cuh"

// Set by the plan: ELEMENT INDEX   K   BC   VEC channels of a thread   XV, YV of an access to x and dy
//   BP   TP   KC   TG   BLOCKS of a multiprocessor, whose registers they share
constexpr int THREADS = 128;
constexpr int LANES = BC / VEC, PG = THREADS / LANES / TG, EACH = BP / PG;
constexpr int COLUMNS = BP + TG * KC - 1;
static_assert(LANES * TG * PG == THREADS && EACH % TP == 0, "threads must share a unit evenly");
static_assert(TG * KC >= K, "every tap needs a thread");

struct Params {
  const E* x;
  const E* dy;
  S* partial;
  S* bias_partial;
  Index channels, channel_tiles;
  Index source, target, pad, dilation, tiles;  // L, P; tiles of a phase
  Index units, share;
};

// Puts COUNT positions of `array`, `step` apart from `at` on, to shared memory.
template <int COUNT, int V>
__device__ __forceinline__ void stage(E* to, const E* array, Index at, Index step, Index size, Index channels,
                                      int some) {
  constexpr int GROUPS = BC / V, PIECES = COUNT * GROUPS, AHEAD = 8;
#pragma unroll 1
  for (int first = threadIdx.x; first < PIECES; first += AHEAD * THREADS) {
    Vector<E, V> kept[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int piece = first + i * THREADS, c = piece % GROUPS * V;
      const Index position = at + piece / GROUPS * step;
      kept[i] = load_or_zero<V>(array + position * channels + c, piece < PIECES && c < some && within(position, size));
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (first + i * THREADS < PIECES) store(to + (first + i * THREADS) * V, kept[i]);
  }
}

// Adds the products of TP outputs, of which the first `outputs` exist. WHOLE: all do.
template <bool WHOLE>
__device__ __forceinline__ void add_outputs(S (&dw)[KC][VEC], S (&db)[VEC], const E* x, const E* y, int outputs) {
  S gradient[TP][VEC];
#pragma unroll
  for (int j = 0; j < TP; ++j) {
    widen_vector(gradient[j], read<VEC>(y + j * BC));
#pragma unroll
    for (int v = 0; v < VEC; ++v) db[v] = add(db[v], gradient[j][v]);
  }
#pragma unroll
  for (int i = 0; i < TP + KC - 1; ++i) {
    S input[VEC];
    widen_vector(input, read<VEC>(x + i * BC));
#pragma unroll
    for (int r = 0; r < KC; ++r)
      // An output that does not exist has no products, whatever its input would be.
      if (i >= r && i - r < TP && (WHOLE || i - r < outputs)) add_products(dw[r], input, gradient[i - r]);
  }
}

__device__ __forceinline__ void keep(S* to, const S (&sum)[VEC]) {
  Vector<S, VEC> some;
#pragma unroll
  for (int v = 0; v < VEC; ++v) some.at[v] = sum[v];
  store(to, some);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) depthwise_grad_tile(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) unsigned char memory[];
  E* xs = reinterpret_cast<E*>(memory);
  E* ys = xs + COLUMNS * BC;
  S(*sums)[VEC] = reinterpret_cast<S(*)[VEC]>(memory);
  const int thread = threadIdx.x, c = thread % LANES * VEC, group = thread / LANES % TG, part = thread / LANES / TG;
  Index split = blockIdx.x;
  const Index c0 = take(split, p.channel_tiles) * BC;
  const int channels = int(p.channels - c0 < BC ? p.channels - c0 : BC);
  const Index left = p.units - split * p.share, end = split * p.share + (left < p.share ? left : p.share);

  S dw[KC][VEC] = {}, db[VEC] = {};
#pragma unroll 1
  for (Index unit = split * p.share; unit < end; ++unit) {
    Index n = unit;
    const Index p0 = take(n, p.tiles) * BP, phase = take(n, p.dilation), batch = n;
    const Index at = phase + p0 * p.dilation;  // first output

    // 1. Stage.
    __syncthreads();  // the unit before has been read
    stage<COLUMNS, XV>(xs, p.x + batch * p.source * p.channels + c0, at - p.pad, p.dilation, p.source, p.channels,
                       channels);
    stage<BP, YV>(ys, p.dy + batch * p.target * p.channels + c0, at, p.dilation, p.target, p.channels, channels);
    __syncthreads();

    // 2. Multiply-accumulate.
    const Index exist = (p.target - at + p.dilation - 1) / p.dilation - part * EACH;
    const E* x = xs + (part * EACH + group * KC) * BC + c;
    const E* y = ys + part * EACH * BC + c;
#pragma unroll 1
    for (int j = 0; j < EACH && j < exist; j += TP) {
      if (j + TP <= exist) add_outputs<true>(dw, db, x + j * BC, y + j * BC, TP);
      else add_outputs<false>(dw, db, x + j * BC, y + j * BC, int(exist - j));
    }
  }

  // 3. The parts of the outputs, and store.
  const bool writes = part == 0 && c < channels;
#pragma unroll
  for (int r = 0; r < KC; ++r) {
    add_over_block<THREADS, LANES * TG>(dw[r], sums);
    const int tap = group * KC + r;
    if (writes && tap < K) keep(p.partial + ((split * K + tap) * p.channels + c0 + c), dw[r]);
  }
  if (p.bias_partial) {
    add_over_block<THREADS, LANES * TG>(db, sums);
    if (writes && group == 0) keep(p.bias_partial + (split * p.channels + c0 + c), db);
  }
}
