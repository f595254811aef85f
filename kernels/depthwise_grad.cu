// depthwise_grad.cu -- kernel gradient (and bias gradient) of a depthwise convolution: any rank, layout, stride,
// dilation, multiplier, kernel size.
//
//   dw[r,c,m] = sum over b,p of  conj(x[b, p*stride + r*dilation - pad, c]) * dy[b,p,c*M+m]
//   db[c*M+m] = sum over b,p of  dy[b,p,c*M+m]
//
// Twin   cuconv/reference/depthwise.py      Plan  cuconv/plan/depthwise.py::plan_kernel_grad
// Test   tests/test_depthwise_kernels.py
//
// Arrays, C-contiguous   x [B, L.., C] or [B, C, L..]   dy [B, P.., C*M] or [B, C*M, P..]
//   partial [splits, R.., C, M] and bias_partial [splits, C*M] or null, of the sum type; reduce_splits.cu adds them up.
//
// Work split
//   A block sums KC taps of the walked axis (depthwise.cuh; the last axis of channels_last, the last but one of
//   channels_first) under one tap of each other axis, for a tile of TX channel vectors, over `share` units. A unit is
//   TP outputs in phase order: (TP-1)*SG + KC inputs and TP of dy are read for TP * KC products. Thread (ty, tx) owns
//   VEC channels and every (THREADS / TX)-th unit of the block, so that the threads of a warp read neighbouring
//   channels, or, for channels_first with TX = 1, neighbouring positions of the last axis.
//   blockIdx.x: (split, tap of outer axis 0, of outer axis 1, chunk of taps, tile of channels), tile fastest.
//
// Shared memory   sums [THREADS][VEC]: the threads of a column are added in a tree of fixed shape.

#include "depthwise.cuh"

// Set by the plan: ELEMENT INDEX CHANNELS_FIRST   VEC channels of dy   XV channels of x they meet   TX   TP   KC   SG
constexpr int THREADS = 128;
constexpr int TY = THREADS / TX;
static_assert(THREADS % TX == 0 && (TX & (TX - 1)) == 0, "the tree of sums halves");

struct Params {
  const E* x;
  const E* dy;
  S* partial;
  S* bias_partial;
  Index vectors, tiles, multiplier, filters, weights;  // weights: elements of w
  Index chunks, units, share;
  Index phases, groups;                          // of the walked axis
  Index source_batch, target_batch, source_channel, target_channel;
  Axis walk, outer[2];
};

// Adds the products of TP outputs, of which the first `outputs` exist.
template <bool WHOLE>
__device__ __forceinline__ void add_unit(S (&dw)[KC][VEC], S (&db)[VEC], bool with_bias, const E* x, Index x_step,
                                         Index at, Index step, Index source, const E* dy, Index dy_step,
                                         Index outputs) {
  S gradient[TP][VEC];
#pragma unroll
  for (int j = 0; j < TP; ++j)
    widen_vector(gradient[j], WHOLE ? load<VEC>(dy + j * dy_step) : load_or_zero<VEC>(dy + j * dy_step, j < outputs));
  if (with_bias)
#pragma unroll
    for (int j = 0; j < TP; ++j)
#pragma unroll
      for (int v = 0; v < VEC; ++v) db[v] = add(db[v], gradient[j][v]);
  // Windows that do not overlap leave inputs out.
  constexpr bool APART = SG >= KC;
#pragma unroll
  for (int k = 0; k < (APART ? TP * KC : (TP - 1) * SG + KC); ++k) {
    const int i = APART ? k / KC * SG + k % KC : k;
    S input[XV];
    widen_vector(input, load_or_zero<XV>(x + i * x_step, within(at + i * step, source)));
#pragma unroll
    for (int v = 0; v < XV; ++v) input[v] = conjugate(input[v]);
#pragma unroll
    for (int r = 0; r < KC; ++r) {
      const int j = (i - r) / SG;
      // An output that does not exist has no products, whatever its input would be.
      if (i >= r && (i - r) % SG == 0 && j < TP && (WHOLE || j < outputs)) add_products(dw[r], input, gradient[j]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) depthwise_grad(const __grid_constant__ Params p) {
  __shared__ alignas(16) S sums[THREADS][VEC];
  Index block = blockIdx.x;
  const Index vector = take(block, p.tiles) * TX + threadIdx.x % TX;
  const Index chunk = take(block, p.chunks), t1 = take(block, p.outer[1].taps), t0 = take(block, p.outer[0].taps);
  const Index split = block;
  const Index channel = vector * VEC, last = p.units - split * p.share;
  const Index end = vector < p.vectors ? split * p.share + (last < p.share ? last : p.share) : 0;
  const bool with_bias = p.bias_partial && chunk == 0 && t1 == 0 && t0 == 0;

  S dw[KC][VEC] = {}, db[VEC] = {};
  for (Index unit = split * p.share + threadIdx.x / TX; unit < end; unit += TY) {
    Index n = unit, at1 = 0;
    if constexpr (CHANNELS_FIRST) at1 = take(n, p.outer[1].target);
    const Index phase = take(n, p.phases), group = take(n, p.groups);
    if constexpr (!CHANNELS_FIRST) at1 = take(n, p.outer[1].target);
    const Index at0 = take(n, p.outer[0].target), batch = n;
    const Index source0 = at0 * p.outer[0].stride + t0 * p.outer[0].dilation - p.outer[0].pad;
    const Index source1 = at1 * p.outer[1].stride + t1 * p.outer[1].dilation - p.outer[1].pad;
    const bool inside = within(source0, p.outer[0].source) && within(source1, p.outer[1].source);
    const Index target = phase + group * TP * p.phases;
    const Index outputs = (p.walk.target - target + p.phases - 1) / p.phases;
    if (outputs <= 0 || !(inside || with_bias)) continue;
    const Index at = target * p.walk.stride + chunk * KC * p.walk.dilation - p.walk.pad;
    const E* x = p.x + batch * p.source_batch + channel / p.multiplier * p.source_channel +
                 source0 * p.outer[0].source_pitch + source1 * p.outer[1].source_pitch + at * p.walk.source_pitch;
    const E* dy = p.dy + batch * p.target_batch + channel * p.target_channel + at0 * p.outer[0].target_pitch +
                  at1 * p.outer[1].target_pitch + target * p.walk.target_pitch;
    const Index x_step = p.walk.dilation * p.walk.source_pitch, dy_step = p.phases * p.walk.target_pitch;
    const Index source = inside ? p.walk.source : 0;
    if (outputs >= TP) add_unit<true>(dw, db, with_bias, x, x_step, at, p.walk.dilation, source, dy, dy_step, outputs);
    else add_unit<false>(dw, db, with_bias, x, x_step, at, p.walk.dilation, source, dy, dy_step, outputs);
  }

  const bool writes = threadIdx.x < TX && vector < p.vectors;
#pragma unroll
  for (int r = 0; r < KC; ++r) {
    add_over_block<THREADS, TX>(dw[r], sums);
    const Index tap = chunk * KC + r;
    if (writes && tap < p.walk.taps) {
      S* to = p.partial + split * p.weights + t0 * p.outer[0].tap_pitch + t1 * p.outer[1].tap_pitch +
              tap * p.walk.tap_pitch + channel;
#pragma unroll
      for (int v = 0; v < VEC; ++v) to[v] = dw[r][v];
    }
  }
  if (with_bias) {
    add_over_block<THREADS, TX>(db, sums);
    if (writes)
#pragma unroll
      for (int v = 0; v < VEC; ++v) p.bias_partial[split * p.filters + channel + v] = db[v];
  }
}
