// upsample_grad.cu -- the gradient of enlarging by whole factors, along up to three axes at once.
//
//   dx[b,i,c] = sum over p0,p1,p2 of  w0[p0,i0] * w1[p1,i1] * w2[p2,i2] * dy[b,p,c]
//   over the TAPS * s outputs p = (i - TAPS / 2) * s + s / 2 .. of each axis, those outside 0 .. n * s - 1 left out.
//   An axis with TAPS 1 was copied: the s outputs p = i * s .. with weight 1.
//
// Twin   cuconv/reference/upsample.py::upsample_input_grad      Plan  cuconv/plan/upsample.py::plan_upsample_grad
// Test   tests/test_upsample_kernels.py
//
// Arrays, C-contiguous:  dy [batch,n0*s0,n1*s1,n2*s2,channels]   dx [batch,n0,n1,n2,channels]
//   w0 [short*s0,TAPS0], from cuconv/interpolation.py::window_weights: for each output, its window of inputs
//   w1, w2 [short,TAPS*s], from cuconv/interpolation.py::share_weights: for each input, its share of every output
//   The axes are those of upsample.cu.
//
// Work split
//   one thread   VECTOR channels of one (i1, i2), for `run` inputs along axis 0. It walks the outputs along axis 0,
//                sums each row of them along axes 1 and 2 once, and adds that to the TAPS0 inputs that have a share in
//                it; an input is stored when its last output has been added. The order of every sum is fixed
//   neighbours   differ in (i2, c) first, so that a warp reads runs of dy
//
// Shared memory: none.

#include "upsample.cuh"

// Set by the plan:  FROM TO (elements of dy and dx)   TAPS0 TAPS1 TAPS2   VECTOR   INDEX
using Index = INDEX;
using Weight = Sum<TO>;
constexpr int THREADS = 128;
static_assert(sizeof(FROM) * VECTOR <= 16 && sizeof(TO) * VECTOR <= 16, "wider than an access");

struct Params {
  const FROM* dy;
  const Weight* w0;
  const Weight* w1;
  const Weight* w2;
  TO* dx;
  Index n0, n1, n2;
  Index s0, s1, s2;
  Index channels;
  Index run;       // inputs of axis 0 that a thread walks
  Index segments;  // ceil(n0 / run)
  Index threads;   // those with work
};

// The outputs of one axis that hold a share of input i, and their weights.
template <int TAPS>
struct Shares {
  Index begin, end;
  const Weight* w;  // of output `begin`

  __device__ __forceinline__ Shares(const Weight* table, Index i, Index n, Index s) : w(table) {
    const Index first = TAPS > 1 ? (i - TAPS / 2) * s + s / 2 : i * s, count = TAPS * s;
    begin = first < 0 ? 0 : first;
    end = first + count < n * s ? first + count : n * s;
    if constexpr (TAPS > 1) w += table_row(i, n, TAPS) * count + (begin - first);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) upsample_grad(const __grid_constant__ Params p) {
  const Index id = Index(blockIdx.x) * THREADS + threadIdx.x;
  if (id >= p.threads) return;

  // 1. Place: the vector within a row of dx, then i1, then the part of axis 0, then the batch item.
  const Index row = p.n2 * p.channels, vectors = row / VECTOR;
  const Index v = id % vectors * VECTOR;
  Index rest = id / vectors;
  const Index i1 = rest % p.n1;
  rest /= p.n1;
  const Index i_begin = rest % p.segments * p.run, b = rest / p.segments;
  const Index i_end = i_begin + p.run < p.n0 ? i_begin + p.run : p.n0;
  const Index i2 = v / p.channels, c = v - i2 * p.channels;

  const Shares<TAPS1> shares1(p.w1, i1, p.n1, p.s1);
  const Shares<TAPS2> shares2(p.w2, i2, p.n2, p.s2);
  const Index dy_row1 = p.n2 * p.s2 * p.channels, dy_row0 = p.n1 * p.s1 * dy_row1;
  const FROM* dy = p.dy + b * p.n0 * p.s0 * dy_row0 + c;
  TO* dx = p.dx + (b * p.n0 + i_begin) * p.n1 * row + i1 * row + v;

  // 2. Walk along axis 0. acc[t] belongs to input i - TAPS0 / 2 + 1 + t for the outputs from the middle of input i to
  //    that of the next; then its first one is complete.
  Weight acc[TAPS0][VECTOR] = {};
#pragma unroll 1
  for (Index i = i_begin - TAPS0 / 2; i < i_end + TAPS0 / 2 - (TAPS0 > 1); ++i) {
    const Index middle = i * p.s0 + (TAPS0 > 1 ? p.s0 / 2 : 0);
    const Index end = middle + p.s0 < p.n0 * p.s0 ? middle + p.s0 : p.n0 * p.s0;
#pragma unroll 1
    for (Index out = middle < 0 ? 0 : middle; out < end; ++out) {
      Weight sum[VECTOR] = {};
#pragma unroll 1
      for (Index p1 = shares1.begin; p1 < shares1.end; ++p1) {
        const FROM* from = dy + out * dy_row0 + p1 * dy_row1;
        Weight inner[VECTOR] = {};
#pragma unroll 4
        for (Index p2 = shares2.begin; p2 < shares2.end; ++p2) {
          const Vector<FROM, VECTOR> part = load<VECTOR>(from + p2 * p.channels);
          Weight w = 1;
          if constexpr (TAPS2 > 1) w = load<1>(shares2.w + (p2 - shares2.begin)).at[0];
#pragma unroll
          for (int e = 0; e < VECTOR; ++e) {
            if constexpr (TAPS2 > 1) multiply_add(inner[e], w, widen(part.at[e]));
            else inner[e] += widen(part.at[e]);
          }
        }
        Weight w = 1;
        if constexpr (TAPS1 > 1) w = load<1>(shares1.w + (p1 - shares1.begin)).at[0];
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
          if constexpr (TAPS1 > 1) multiply_add(sum[e], w, inner[e]);
          else sum[e] += inner[e];
        }
      }
      if constexpr (TAPS0 > 1) {
        const bool next = out >= (i + 1) * p.s0;
        const Weight* w = p.w0 + (table_row(i + next, p.n0, TAPS0 / 2) * p.s0 + out - (i + next) * p.s0) * TAPS0;
#pragma unroll
        for (int t = 0; t < TAPS0; t += 2) {
          const Vector<Weight, 2> pair = load<2>(w + t);
#pragma unroll
          for (int e = 0; e < VECTOR; ++e) {
            multiply_add(acc[t][e], pair.at[0], sum[e]);
            multiply_add(acc[t + 1][e], pair.at[1], sum[e]);
          }
        }
      } else {
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) acc[0][e] += sum[e];
      }
    }
    if (i - TAPS0 / 2 + (TAPS0 > 1) >= i_begin) {
      Vector<TO, VECTOR> result;
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) result.at[e] = narrow<TO>(acc[0][e]);
      store<VECTOR>(dx, result);
      dx += p.n1 * row;
    }
#pragma unroll
    for (int t = 0; t < TAPS0; ++t) {
#pragma unroll
      for (int e = 0; e < VECTOR; ++e) acc[t][e] = t + 1 < TAPS0 ? acc[t + 1 < TAPS0 ? t + 1 : t][e] : Weight(0);
    }
  }
}
