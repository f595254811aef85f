// conv.cuh -- what the kernels of convolutions share: parameters, the walk through taps and channels, places in y.

#pragma once

#include "activations.cuh"
#include "positions.cuh"

// Set by the plan, besides those of positions.cuh: CHANNELS_FIRST UPSAMPLED SPLIT; conv_halo.cu defines HALO
// SPLIT: a part of K has sums of its own, as large as y, which conv_reduce.cu adds up.
using Y = conditional<SPLIT, S, E>;

struct Params {
  const E* x;
  const E* w;
  const E* bias;  // null: none
  Y* y;
  Index positions, columns, depth;  // M, N, K of one group
  Index tiles_m, tiles_n;
  Index groups, channels;  // channels of x in one group
  Index w_pitch, w_group;
  Index in[RANK], out[RANK], stride[RANK], dilation[RANK], pad[RANK];
  Index span[RANK];  // taps * dilation
#if SPLIT
  Index chunk, total;  // of a part: values of k, in conv_halo.cu panels; of y: elements
#endif
#ifdef HALO
  Index taps, outer;  // of the last axis, and of all others together
  Index strands, run, unit, rows_t, gap, places;  // see there
#endif
#if UPSAMPLED
  Index full[RANK], up[RANK], phases[RANK], shift[RANK];
#endif
};

// The k of one slot: its channel, and its tap as the distance from the first input of a window.
struct Depth {
  Index channel, reach[RANK];
};

// Carries whole taps out of the channel of `d`. Behind the last k, reach[0] is span[0] or more.
__device__ __forceinline__ void settle(Depth& d, const Params& p) {
  while (d.channel >= p.channels) {
    d.channel -= p.channels;
#pragma unroll
    for (int a = RANK - 1; a >= 0; --a) {
      d.reach[a] += p.dilation[a];
      if (a == 0 || d.reach[a] < p.span[a]) break;
      d.reach[a] = 0;
    }
  }
}

// Part of an index of y: rows of the product have one, columns the other, and their sum is a place.
struct Place {
  Index offset;
#if UPSAMPLED
  Index at[RANK];
#endif
};

// Where results of a group go: y[b, p, f], or y[b, q*up + rho + shift, c]. P has what is read of Params.
template <class P>
struct ResultOf {
  const P& p;
  Index group_filters, first_filter, filters, step_l, step_f;

  __device__ __forceinline__ ResultOf(const P& p, Index g) : p(p) {
    group_filters = p.columns;
#if UPSAMPLED
    group_filters /= volume(p.phases);
#endif
    first_filter = g * group_filters;
    filters = p.groups * group_filters;
    step_l = CHANNELS_FIRST ? 1 : filters;
    step_f = CHANNELS_FIRST ? volume(size()) : 1;
  }
#if UPSAMPLED
  __device__ __forceinline__ const Index (&size() const)[RANK] { return p.full; }
#else
  __device__ __forceinline__ const Index (&size() const)[RANK] { return p.out; }
#endif

  // Of row m of the product.
  __device__ __forceinline__ Place row(Index m) const {
    Index at[RANK];
    const Index b = split(m, p.out, at);
    return place(b, at);
  }

  // Of batch item b and coordinates among positions.
  __device__ __forceinline__ Place place(Index b, Index (&at)[RANK]) const {
    Place row;
#if UPSAMPLED
#pragma unroll
    for (int a = 0; a < RANK; ++a) row.at[a] = at[a] = at[a] * p.up[a] + p.shift[a];
#endif
    row.offset = b * filters * volume(size()) + linear(at, size()) * step_l;
    return row;
  }

  // Of column n; `f` becomes its filter among all.
  __device__ __forceinline__ Place column(Index n, Index& f) const {
    Place column{};
    f = n;
#if UPSAMPLED
    f = n % group_filters;
    split(n / group_filters, p.phases, column.at);
    column.offset = linear(column.at, size()) * step_l;
#endif
    f += first_filter;
    column.offset += f * step_f;
    return column;
  }

  // Whether that row and column meet inside of y.
  __device__ __forceinline__ bool exists(const Place& row, const Place& column) const {
    bool inside = true;
#if UPSAMPLED
#pragma unroll
    for (int a = 0; a < RANK; ++a) inside = inside && within(row.at[a] + column.at[a], p.full[a]);
#endif
    return inside;
  }
};
using Result = ResultOf<Params>;
