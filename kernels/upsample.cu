// upsample.cu -- enlarging by whole factors along up to three axes at once.
//
//   y[b,p,c] = sum over t0,t1,t2 of  w0[p0,t0] * w1[p1,t1] * w2[p2,t2] * x[b, first(p) + t, c]
//   first(p) = p / s - TAPS / 2 + (p % s >= s / 2), the sum first + t clipped to 0 .. n - 1.
//   An axis with TAPS 1 is copied, y[p] = x[p / s]: the nearest input, or an axis that keeps its size (s = 1).
//
// Twin   cuconv/reference/upsample.py::upsample      Plan  cuconv/plan/upsample.py::plan_upsample
// Test   tests/test_upsample_kernels.py
//
// Arrays, C-contiguous:  x [batch,n0,n1,n2,channels]   y [batch,n0*s0,n1*s1,n2*s2,channels]
//   w0, w1, w2  [short*s,TAPS], from cuconv/interpolation.py::window_weights; null where TAPS is 1
//   These are not the axes of the user: channels_first is a batch of B * C with one channel, complex numbers are two
//   channels, axes that keep their size belong to the batch or to the channels.
//
// Work split
//   one thread   VECTOR neighbours of a row (p2, c) of y, for one p1, and the outputs of `run` inputs along axis 0,
//                which it walks: the TAPS0 rows that an output needs stay in registers, already summed along axes 1 and
//                2, and each further input row is loaded once for s0 outputs
//   neighbours   differ in (p2, c) first, so that a warp writes one run of y
//   ROWWISE 0: the vector is channels of one position, loaded as one. 1: it spans positions, loaded one by one.
//
// Shared memory: none.

#include "upsample.cuh"

// Set by the plan:  FROM TO (elements of x and y)   TAPS0 TAPS1 TAPS2   VECTOR ROWWISE   INDEX
using Index = INDEX;
using Weight = Sum<TO>;
constexpr int THREADS = 128;
constexpr bool COPIES = TAPS0 == 1 && TAPS1 == 1 && TAPS2 == 1;
constexpr int COLUMNS = ROWWISE ? VECTOR : 1;  // positions of a thread along axis 2
static_assert(sizeof(TO) * VECTOR <= 16, "wider than an access");

// Copied elements keep their bits; others become sums.
template <bool SAME>
struct value_of {
  using type = FROM;
};
template <>
struct value_of<false> {
  using type = Weight;
};
using Value = typename value_of<COPIES>::type;

struct Params {
  const FROM* x;
  const Weight* w0;
  const Weight* w1;
  const Weight* w2;
  TO* y;
  Index n0, n1, n2;
  Index s0, s1, s2;
  Index channels;
  Index run;       // inputs of axis 0 that a thread walks
  Index segments;  // ceil(n0 / run)
  Index threads;   // those with work
};

__device__ __forceinline__ Index clip(Index i, Index n) { return i < 0 ? 0 : i < n ? i : n - 1; }

template <int TAPS>
__device__ __forceinline__ void load_weights(const Weight* table, Index i, Index k, Index n, Index s,
                                             Weight (&w)[TAPS]) {
  constexpr int WIDE = sizeof(Weight) == 4 && TAPS % 4 == 0 ? 4 : 2;
  const Weight* row = table + (table_row(i, n, TAPS / 2) * s + k) * TAPS;
#pragma unroll
  for (int t = 0; t < TAPS; t += WIDE) {
    const Vector<Weight, WIDE> part = load<WIDE>(row + t);
#pragma unroll
    for (int j = 0; j < WIDE; ++j) w[t + j] = part.at[j];
  }
}

// Where a thread's outputs take their inputs along axes 1 and 2.
struct Columns {
  const FROM* x;  // of the batch item
  Index row0, row1;
  Index first1;
  Index from2[COLUMNS][TAPS2];  // elements from the beginning of a row
  const Weight* w1;
  Weight w2[COLUMNS][TAPS2];
};

// The sum along axes 1 and 2 in input row i of axis 0. V is Value; a template, so that copies need no arithmetic on it.
template <class V>
__device__ __forceinline__ void gather(const Params& p, const Columns& at, Index i, V (&sum)[VECTOR]) {
  if constexpr (!COPIES) {
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) sum[e] = 0;
  }
#pragma unroll 1  // up to 10 * 10 loads otherwise
  for (int t1 = 0; t1 < TAPS1; ++t1) {
    const FROM* row = at.x + clip(i, p.n0) * at.row0 + clip(at.first1 + t1, p.n1) * at.row1;
    V inner[VECTOR];
#pragma unroll
    for (int t2 = 0; t2 < TAPS2; ++t2) {
#pragma unroll
      for (int column = 0; column < COLUMNS; ++column) {
        constexpr int N = VECTOR / COLUMNS;
        const Vector<FROM, N> v = load<N>(row + at.from2[column][t2]);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const int e = column * N + j;
          if constexpr (COPIES) {
            inner[e] = v.at[j];
          } else {
            const V x = widen(v.at[j]);
            if constexpr (TAPS2 == 1) inner[e] = x;
            else if (t2 == 0) inner[e] = at.w2[column][0] * x;
            else multiply_add(inner[e], at.w2[column][t2], x);
          }
        }
      }
    }
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
      if constexpr (TAPS1 == 1) sum[e] = inner[e];
      else multiply_add(sum[e], load<1>(at.w1 + t1).at[0], inner[e]);
    }
  }
}

// One vector of outputs: number k of input i on axis 0, from the window that starts TAPS0 / 2 inputs before its middle.
template <class V>
__device__ __forceinline__ Vector<TO, VECTOR> interpolate(const Params& p, const V (&window)[TAPS0][VECTOR], Index i,
                                                          Index k) {
  Vector<TO, VECTOR> result;
  if constexpr (COPIES) {
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) result.at[e] = window[0][e];
  } else if constexpr (TAPS0 == 1) {
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) result.at[e] = narrow<TO>(window[0][e]);
  } else {
    Weight w[TAPS0];
    load_weights(p.w0, i, k, p.n0, p.s0, w);
#pragma unroll
    for (int e = 0; e < VECTOR; ++e) {
      V sum = w[0] * window[0][e];
#pragma unroll
      for (int t = 1; t < TAPS0; ++t) multiply_add(sum, w[t], window[t][e]);
      result.at[e] = narrow<TO>(sum);
    }
  }
  return result;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) upsample(const __grid_constant__ Params p) {
  const Index id = Index(blockIdx.x) * THREADS + threadIdx.x;
  if (id >= p.threads) return;

  // 1. Place: the vector within a row of y, then p1, then the part of axis 0, then the batch item.
  const Index row = p.n2 * p.s2 * p.channels, vectors = row / VECTOR;
  const Index v = id % vectors * VECTOR;
  Index rest = id / vectors;
  const Index p1 = rest % (p.n1 * p.s1);
  rest /= p.n1 * p.s1;
  const Index i_begin = rest % p.segments * p.run, b = rest / p.segments;
  const Index i_end = i_begin + p.run < p.n0 ? i_begin + p.run : p.n0;

  Columns at;
  at.row1 = p.n2 * p.channels;
  at.row0 = p.n1 * at.row1;
  at.x = p.x + b * p.n0 * at.row0;
  {
    const Index i = p1 / p.s1, k = p1 - i * p.s1;
    at.first1 = i;
    if constexpr (TAPS1 > 1) {
      at.first1 = i - TAPS1 / 2 + (k >= p.s1 / 2);
      at.w1 = p.w1 + (table_row(i, p.n1, TAPS1 / 2) * p.s1 + k) * TAPS1;
    }
  }
#pragma unroll
  for (int column = 0; column < COLUMNS; ++column) {
    const Index p2 = (v + column) / p.channels;
    const Index i = p2 / p.s2, k = p2 - i * p.s2, channel = v + column - p2 * p.channels;
    const Index first = TAPS2 > 1 ? i - TAPS2 / 2 + (k >= p.s2 / 2) : i;
#pragma unroll
    for (int t2 = 0; t2 < TAPS2; ++t2) at.from2[column][t2] = clip(first + t2, p.n2) * p.channels + channel;
    if constexpr (TAPS2 > 1) load_weights(p.w2, i, k, p.n2, p.s2, at.w2[column]);
  }

  // 2. Walk along axis 0. With input i + TAPS0 / 2 at its end, the window serves the outputs from the middle of input i
  //    to that of the next.
  const Index pitch = p.n1 * p.s1 * row, half = TAPS0 > 1 ? p.s0 / 2 : 0;
  const Index out_begin = i_begin * p.s0, out_end = i_end * p.s0;
  TO* y = p.y + (b * p.n0 + i_begin) * p.s0 * pitch + p1 * row + v;
  Value window[TAPS0][VECTOR];
#pragma unroll 1  // one copy of the loads
  for (Index i = i_begin - TAPS0 / 2 - TAPS0 / 2; i < i_end; ++i) {
#pragma unroll
    for (int t = 0; t + 1 < TAPS0; ++t) {
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) window[t][e] = window[t + 1][e];
    }
    gather(p, at, i + TAPS0 / 2, window[TAPS0 - 1]);
    if (TAPS0 > 1 && i < i_begin - 1) continue;  // not full yet
    const Index middle = i * p.s0 + half;
    Index out = middle < out_begin ? out_begin : middle;
    const Index end = middle + p.s0 < out_end ? middle + p.s0 : out_end;
#pragma unroll 1  // as many as the user likes
    for (; out < end; ++out) {
      const bool next = out >= (i + 1) * p.s0;
      store<VECTOR>(y, interpolate(p, window, i + next, out - (i + next) * p.s0));
      y += pitch;
    }
  }
}
