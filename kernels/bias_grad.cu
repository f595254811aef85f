// bias_grad.cu -- the sum of an array over everything but its channels, in a fixed order.
//
//   out[split,f] = sum of dy over the part `split` of all (b, p). A second launch adds the parts up: for it they are a
//   dy [splits,F,1] of the sum type, of which there is a single part.
//
// Twin   cuconv/reference/bias_grad.py::bias_grad      Plan  cuconv/plan/bias_grad.py::plan_bias_grad
// Test   tests/test_bias_grad_kernels.py
//
// Arrays, C-contiguous:  dy [B,F,P] with P = 1 for channels_last   out [splits,F]
//
// Work split
//   blockIdx.x   (split, tile of channels), tile fastest
//   one thread   VECTOR neighbours of an item; an item is a run of at most THREADS * VECTOR elements of dy, of which a
//                block adds up `run`, so that each thread always stays with the same channels:
//                  F * P small    an item is `groups` batch items, whole
//                  F * P large    `local` channels of one batch item
//                  P large        a piece of one channel of one batch item; `segments` of them make it up
//
// Shared memory:  sums [groups][local][length], folded in halves: first the groups, then each channel's positions.

#include "common.cuh"

// Set by the plan:  ELEMENT OUT   VECTOR   THREADS   INDEX
using E = ELEMENT;
using Index = INDEX;
using S = Sum<E>;
constexpr int STORE = VECTOR * sizeof(S) <= 16 ? VECTOR : 16 / int(sizeof(S));  // elements of one shared access
static_assert(VECTOR * sizeof(E) <= 16, "wider than an access");
static_assert(THREADS * VECTOR * sizeof(S) <= 48 << 10, "beyond static shared memory");

struct Params {
  const E* dy;
  OUT* out;
  Index items, run;       // of one tile; of one block
  Index segments;         // items that lie `step` elements apart, then comes the next row
  Index row, step;        // elements
  Index tile_step;        // elements from tile to tile
  Index span, shrink;     // elements in a row from the first item on, and how many fewer for each further tile
  Index width;            // elements of an item
  Index groups, local, length;
  Index tiles, channels;
};

// Adds up the middle axis of sums [outer][count][inner]; the result stands in its place 0.
__device__ __forceinline__ void fold(S* sums, int outer, int count, int inner) {
  for (int left = count; left > 1;) {
    const int half = (left + 1) / 2, pairs = left - half;
    for (int i = threadIdx.x; i < outer * pairs * inner; i += THREADS) {
      const int at = (i / (pairs * inner) * count + i / inner % pairs) * inner + i % inner;
      sums[at] = add(sums[at], sums[at + half * inner]);
    }
    __syncthreads();
    left = half;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) bias_grad(const __grid_constant__ Params p) {
  __shared__ alignas(16) S sums[THREADS * VECTOR];

  const Index split = blockIdx.x / p.tiles, tile = blockIdx.x % p.tiles;
  const Index column = Index(threadIdx.x) * VECTOR;
  const Index begin = split * p.run, end = begin + p.run < p.items ? begin + p.run : p.items;

  // 1. Add up items, element by element.
  Index segment = begin % p.segments;
  const E* dy = p.dy + begin / p.segments * p.row + segment * p.step + tile * p.tile_step + column;
  Index left = column < p.width ? p.span - tile * p.shrink - column : 0;  // a row's elements from this thread's on
  const Index step = column < p.width ? p.step : 0;
  S acc[VECTOR] = {};
#pragma unroll 8  // loads under way
  for (Index item = begin; item < end; ++item) {
    const Vector<E, VECTOR> v = load_or_zero<VECTOR>(dy, left > segment * step);
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) acc[e] = add(acc[e], widen(v.at[e]));
    dy += p.step;
    if (++segment == p.segments) {
      segment = 0;
      dy += p.row - p.segments * p.step;
    }
  }

  // 2. Add up what belongs to one channel.
#pragma unroll
  for (int e = 0; e < VECTOR; e += STORE) {
    Vector<S, STORE> part;
#pragma unroll
    for (int j = 0; j < STORE; ++j) part.at[j] = acc[e + j];
    store<STORE>(sums + threadIdx.x * VECTOR + e, part);
  }
  __syncthreads();
  fold(sums, 1, int(p.groups), int(p.local * p.length));
  fold(sums, int(p.local), int(p.length), 1);

  // 3. Write.
  for (Index f = threadIdx.x; f < p.local && tile * p.local + f < p.channels; f += THREADS)
    p.out[split * p.channels + tile * p.local + f] = narrow<OUT>(sums[f * p.length]);
}
