// separable.cu -- separable convolution of any rank, channels last: what lies between its two halves stays in shared
// memory. On tensor cores, sm_80 and newer, 16-bit elements.
//
//   y[b,p,f]     = act( bias[f] + sum over k of  z[b,p,k] * w[k,f] )
//   z[b,p,c*M+m] = sum over r of  x[b, p*stride + r*dilation - pad, c] * taps[r,c,m],  rounded to an element
//   x reads as zero outside its bounds.
//
// Twin   cuconv/reference/separable.py::separable_conv      Plan  cuconv/plan/separable.py
// Test   tests/test_separable_kernels.py
//
// Arrays, C-contiguous   x [B, L.., C]   taps [R.., C, M]   w [C*M, F]   bias [F] or null   y [B, P.., F]
//
// Groups. TP outputs of the innermost axis, `phases` apart (depthwise.cuh: phase order), are one group: neighbours in
// it share inputs, SG inputs from one output to the next. A row of outputs is padded to whole groups.
//
// Work split
//   blockIdx.x   tile of BM / TP groups, tile of BN filters; filters fastest, so neighbours share inputs
//   a step       BK channels of z. A thread computes TP outputs x VEC channels of the next step's z at a time, and is
//                one of a warp that adds this step's product to WM x WN sums. Half of the warps of every scheduler
//                begin with the one, half with the other, so that both units have work.
//
// Shared memory   two stages of  zs [BM][BK]   ws [BK][BN]   (mma.cuh: xs is zs, swizzled); at the end the tile of y
//   places [BM / TP]; if STAGED, two stages of  xs [rows][BK]: all inputs of the tile, which lie in `rows` positions of
//   x one after the other, padding aside. Otherwise inputs are read from x itself, once a tap or window.
//   Row j * GROUPS + g of zs is output j of group g: neighbouring groups are neighbouring rows, which the swizzle keeps
//   in different banks. Channels behind the last are zero in zs and ws. Copies run one step ahead of what reads them;
//   one barrier a step.

#include "depthwise.cuh"
#include "mma.cuh"

// Set by the plan, besides those of mma.cuh: ACTIVATION   MULTIPLIER   UNIT 1 for an innermost dilation of 1
//   VEC channels of z that a thread has, XV of x that they read   TP outputs of it   SG   KC taps at a time, KT left over
//   ROLLING 1 for more taps than that, whose windows stay in registers
//   STAGED   VECX, VECW, VECY elements of an access to x where it is staged, w and y
static_assert(sizeof(E) == 2, "the sums of z are rounded to what tensor cores multiply");
static_assert(VEC % XV == 0, "a multiplier repeats whole channels");
static_assert(!ROLLING || (SG == 1 && KC % TP == 0), "slots of a window repeat after TP taps");
constexpr int GROUPS = BM / TP;
constexpr int VECTORS_K = BK / VEC;
constexpr int VECTORS_N = BN / VECW;
constexpr int W_STEP = THREADS / VECTORS_N;  // rows of w from one copy of a thread to its next
constexpr int VECTORS_X = BK / VECX;
static_assert(!STAGED || (VECX > 1 && BK * sizeof(E) == 128 && MULTIPLIER == 1), "rows of xs fill the banks");
static_assert(BM % TP == 0 && BK % VEC == 0, "whole groups and vectors");
static_assert(VECTORS_N <= THREADS && THREADS % VECTORS_N == 0 && BK % W_STEP == 0, "threads share the copies of w");
constexpr int Y_PITCH = BN + 8;  // the padding spreads what a warp writes over the banks

struct Params {
  const E* x;
  const E* taps;
  const E* w;
  const E* bias;  // null: none
  E* y;
  Index groups, tiles_n;
  Index inputs, rows;               // positions of x, and those of a tile
  Index channels, middle, filters;  // C, C*M, F
  Index phases, row_groups;         // of the innermost axis; row_groups: of one row
  Index outer, chunks;              // taps of the other axes together; KC taps of the innermost
  Index in[RANK], out[RANK], stride[RANK], dilation[RANK], pad[RANK];
  Index span[RANK];  // taps * dilation
};

// Where a group reads and writes.
struct Place {
  Index from, at[RANK];  // the position of x, as index and coordinates, that tap 0 of its first output reads
  Index to, outputs;     // index of y of that output; outputs that exist
};

constexpr int PLACES_AT = larger(2 * STAGE_BYTES, BM * Y_PITCH * int(sizeof(E)));
constexpr int XS_AT = ceil_div(PLACES_AT + GROUPS * int(sizeof(Place)), 128) * 128;

__device__ __forceinline__ Place place_of(Index group, const Params& p) {
  constexpr int LAST = RANK - 1;
  Index n = group;
  Index q = take(n, p.row_groups);
  const Index phase = take(q, p.phases);
  Index at[RANK], size[RANK];
#pragma unroll
  for (int a = 0; a < RANK; ++a) size[a] = a == LAST ? 1 : p.out[a];
  const Index b = split(n, size, at);
  at[LAST] = phase + q * TP * p.phases;
  Place place;
  place.to = (b * volume(p.out) + linear(at, p.out)) * p.filters;
  place.outputs = (p.out[LAST] - at[LAST] + p.phases - 1) / p.phases;
#pragma unroll
  for (int a = 0; a < RANK; ++a) place.at[a] = at[a] * p.stride[a] - p.pad[a];
  place.from = b * volume(p.in) + linear(place.at, p.in);
  if (group >= p.groups) place.at[0] = NOWHERE, place.outputs = 0;
  return place;
}

// ---- depthwise --------------------------------------------------------------------------------------------------

// Elements from one position to the next where inputs are read, and positions from one tap to the next.
__device__ __forceinline__ Index pitch(const Params& p) { return STAGED ? BK : p.channels; }
__device__ __forceinline__ Index spacing(const Params& p) { return UNIT ? 1 : p.dilation[RANK - 1]; }

// XV channels of one; zeros where `inside` does not hold.
template <bool WHOLE>
__device__ __forceinline__ Vector<E, XV> input(const E* from, bool inside) {
  if constexpr (!STAGED) return WHOLE ? load<XV>(from) : load_or_zero<XV>(from, inside);
  using Word = typename word_of<sizeof(E) * XV>::type;
  Word word{};
  if (WHOLE || inside) word = *reinterpret_cast<const Word*>(from);
  Vector<E, XV> v;
  memcpy(&v, &word, sizeof v);
  return v;
}

// acc += N taps of a row of inputs; `from` and `at`, its coordinate, are those of tap 0 of the first output.
template <int N, bool WHOLE>
__device__ __forceinline__ void add_taps(S (&acc)[TP][VEC], const E* from, Index at, const E* taps, const Params& p) {
  const Index dilation = spacing(p), step = dilation * pitch(p);
  S w[N][VEC];
#pragma unroll
  for (int r = 0; r < N; ++r) widen_vector(w[r], load<VEC>(taps + r * p.middle));
  // Windows that do not overlap leave inputs out.
  constexpr bool APART = SG >= N;
#pragma unroll
  for (int k = 0; k < (APART ? TP * N : (TP - 1) * SG + N); ++k) {
    const int i = APART ? k / N * SG + k % N : k;
    S x[XV];
    widen_vector(x, input<WHOLE>(from, within(at, p.in[RANK - 1])));
    const int next = APART && (k + 1) % N == 0 ? SG - (N - 1) : 1;
    from += next * step;
    at += next * dilation;
#pragma unroll
    for (int r = 0; r < N; ++r)
      if (i >= r && (i - r) % SG == 0 && (i - r) / SG < TP) add_products(acc[(i - r) / SG], x, w[r]);
  }
}
template <int N>
__device__ __forceinline__ void add_taps(S (&acc)[TP][VEC], const E* from, Index at, const E* taps, const Params& p) {
  constexpr int LAST = (TP - 1) * SG + N - 1;
  if (at >= 0 && at + LAST * spacing(p) < p.in[RANK - 1]) add_taps<N, true>(acc, from, at, taps, p);
  else add_taps<N, false>(acc, from, at, taps, p);
}

// The same for ROLLING: `window` has the inputs of all outputs but the last one at the first tap, then at the next;
// `from` and `at` are those of the last one's. Slots of it repeat after TP taps.
template <int N, bool WHOLE>
__device__ __forceinline__ void roll_taps(S (&acc)[TP][VEC], S (&window)[TP][XV], const E* from, Index at, const E* taps,
                                          const Params& p) {
#pragma unroll
  for (int r = 0; r < N; ++r) {
    S w[VEC];
    widen_vector(w, load<VEC>(taps + r * p.middle));
    widen_vector(window[(r + TP - 1) % TP], input<WHOLE>(from, within(at, p.in[RANK - 1])));
    from += spacing(p) * pitch(p);
    at += spacing(p);
#pragma unroll
    for (int j = 0; j < TP; ++j) add_products(acc[j], window[(r + j) % TP], w);
  }
}
template <int N>
__device__ __forceinline__ void roll_taps(S (&acc)[TP][VEC], S (&window)[TP][XV], const E* from, Index at, const E* taps,
                                          const Params& p) {
  if (at >= 0 && at + (N - 1) * spacing(p) < p.in[RANK - 1]) roll_taps<N, true>(acc, window, from, at, taps, p);
  else roll_taps<N, false>(acc, window, from, at, taps, p);
}

// acc += all taps of a row of inputs.
__device__ __forceinline__ void add_row(S (&acc)[TP][VEC], const E* from, Index at, const E* taps, const Params& p) {
  const Index step = spacing(p) * pitch(p);
  if constexpr (ROLLING) {
    S window[TP][XV];
#pragma unroll
    for (int j = 0; j < TP - 1; ++j) {
      widen_vector(window[j], input<false>(from, within(at, p.in[RANK - 1])));
      from += step;
      at += spacing(p);
    }
    for (Index chunk = 0; chunk < p.chunks; ++chunk) {
      roll_taps<KC>(acc, window, from, at, taps, p);
      from += KC * step;
      at += KC * spacing(p);
      taps += KC * p.middle;
    }
    if constexpr (KT > 0) roll_taps<KT>(acc, window, from, at, taps, p);
  } else {
    for (Index chunk = 0; chunk < p.chunks; ++chunk) {
      add_taps<KC>(acc, from, at, taps, p);
      from += KC * step;
      at += KC * spacing(p);
      taps += KC * p.middle;
    }
    if constexpr (KT > 0) add_taps<KT>(acc, from, at, taps, p);
  }
}

// Fills zs with the channels from k0 on, out of xs or of x.
__device__ __forceinline__ void fill(unsigned char* zs, const E* xs, const Place* places, Index k0, const Params& p) {
#pragma unroll 1
  for (int item = threadIdx.x; item < GROUPS * VECTORS_K; item += THREADS) {
    const int g = item / VECTORS_K, slot = item % VECTORS_K * VEC;
    const Index k = k0 + slot;
    S acc[TP][VEC] = {};
    if (k < p.middle) {
      const Place& place = places[g];
      const E* taps = p.taps + k;
      const E* base = STAGED ? xs + (place.from - places[0].from) * BK + slot
                             : p.x + (place.from * p.channels + k / MULTIPLIER);
      Index reach[RANK] = {};
      for (Index t = 0; t < p.outer; ++t) {
        bool inside = true;
#pragma unroll
        for (int a = 0; a < RANK - 1; ++a) inside = inside && within(place.at[a] + reach[a], p.in[a]);
        if (inside) add_row(acc, base + linear(reach, p.in) * pitch(p), place.at[RANK - 1], taps, p);
        taps += (p.chunks * KC + KT) * p.middle;
#pragma unroll
        for (int a = RANK - 2; a >= 0; --a) {
          reach[a] += p.dilation[a];
          if (a == 0 || reach[a] < p.span[a]) break;
          reach[a] = 0;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < TP; ++j) {
      Vector<E, VEC> z;
#pragma unroll
      for (int v = 0; v < VEC; ++v) z.at[v] = narrow<E>(acc[j][v]);
      store(reinterpret_cast<E*>(zs + swizzle<X_ROW>(j * GROUPS + g, slot * int(sizeof(E)))), z);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) separable(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char memory[];
  Place* places = reinterpret_cast<Place*>(memory + PLACES_AT);
  const int thread = threadIdx.x;
  const Index n0 = Index(blockIdx.x) % p.tiles_n * BN;           // first filter
  const Index group0 = Index(blockIdx.x) / p.tiles_n * GROUPS;  // first group

  // 1. Stage: from global to shared memory.
  const int w_row = thread / VECTORS_N, w_column = thread % VECTORS_N * VECW;
  const auto fetch_w = [&](int stage, Index k) {
    const E* w = p.w + ((k + w_row) * p.filters + n0 + w_column);
    const Index left = n0 + w_column < p.filters ? p.middle - (k + w_row) : 0;  // rows from this thread's first one on
#pragma unroll
    for (int i = 0; i < BK / W_STEP; ++i) {
      unsigned char* to = memory + stage + X_BYTES + swizzle<W_ROW>(w_row + i * W_STEP, w_column * int(sizeof(E)));
      const E* from = w + i * W_STEP * p.filters;
      const bool inside = i * W_STEP < left;
      if constexpr (VECW > 1) ptx::copy_async<VECW * sizeof(E)>(ptx::shared_address(to), from, inside);
      else store(reinterpret_cast<E*>(to), load_or_zero<1>(from, inside));
    }
  };
  // The channels from k on; where there are none it copies nothing.
  const auto fetch_x = [&](E* xs, Index k) {
    if constexpr (STAGED) {
      const Index channel = k + thread % VECTORS_X * VECX;
      if (k >= p.middle) return;
      for (int row = thread / VECTORS_X; row < p.rows; row += THREADS / VECTORS_X) {
        const Index at = places[0].from + row;
        const bool inside = within(at, p.inputs) && channel < p.channels;
        const E* from = p.x + (at * p.channels + channel);
        ptx::copy_async<VECX * sizeof(E)>(ptx::shared_address(xs + row * BK + (channel - k)), from, inside);
      }
    }
  };

  // 2. Multiply-accumulate: z of the step at k, and the product of the one before it.
  for (int g = thread; g < GROUPS; g += THREADS) places[g] = place_of(group0 + g, p);
  __syncthreads();
  E* const xs = reinterpret_cast<E*>(memory + XS_AT);
  const int x_stage = STAGED ? int(p.rows) * BK : 0;
  fetch_x(xs, 0);
  ptx::copy_async_commit();
  const Warp own(thread);
  float acc[TM][TN][4] = {};
  const int first = (thread / 32 + thread / 128) % 2;  // warps that are 4 apart share a scheduler
  int ahead = 0, x_at = 0;                             // where z of this step goes, and where its inputs are
  for (Index k = 0;; k += BK) {
    ptx::copy_async_wait<0>();
    __syncthreads();
    const bool more = k < p.middle;
    if (more) {
      fetch_w(ahead, k);
      fetch_x(xs + (x_stage - x_at), k + BK);
      ptx::copy_async_commit();
    }
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if (half != first) {
        if (more) fill(memory + ahead, xs + x_at, places, k, p);
      } else if (k > 0) {
        multiply<E>(acc, memory, STAGE_BYTES - ahead, own);
      }
    }
    if (!more) break;
    ahead = STAGE_BYTES - ahead;
    x_at = x_stage - x_at;
  }

  // 3. Epilogue: bias and activation in registers, then through shared memory to whole vectors of y.
  __syncthreads();
  E* ys = reinterpret_cast<E*>(memory);
#pragma unroll
  for (int j = 0; j < 2 * TN; j += 2) {
    float bias[2] = {};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Index f = n0 + own.column(j + e);
      if (p.bias && f < p.filters) bias[e] = widen(p.bias[f]);
    }
#pragma unroll
    for (int i = 0; i < 2 * TM; ++i) {
      Vector<E, 2> two;
#pragma unroll
      for (int e = 0; e < 2; ++e) two.at[e] = finish<ACTIVATION, E>(acc[i / 2][j / 2][i % 2 * 2 + e] + bias[e]);
      store(ys + own.row(i) * Y_PITCH + own.column(j), two);
    }
  }
  __syncthreads();
  for (int at = thread * VECY; at < BM * BN; at += THREADS * VECY) {
    const int row = at / BN, column = at % BN, j = row / GROUPS;
    const Place& place = places[row % GROUPS];
    const Index f = n0 + column;
    if (j < place.outputs && f < p.filters)
      store(p.y + (place.to + j * p.phases * p.filters + f), read<VECY>(ys + row * Y_PITCH + column));
  }
}
