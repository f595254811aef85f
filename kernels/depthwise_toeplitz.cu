// depthwise_toeplitz.cu -- depthwise convolution of 16-bit elements on tensor cores: many taps, stride 1, any dilation.
//
//   y[b,p,c] = act( bias[c] + sum over r of  x[b, p + r*dilation - pad, c] * w[r,c] )   along one axis or two; or, with
//   taps in reverse and first = pad - (K-1)*dilation, the transpose.
//
// Twin   cuconv/reference/depthwise.py      Plan  cuconv/plan/depthwise_toeplitz.py
// Test   tests/test_depthwise_toeplitz.py
//
// Arrays, C-contiguous   x [B, L.., C] or [B, C, L..]   w [R.., C, 1]   bias [C] or null   y [B, P.., C] or [B, C, P..]
//
// Of one channel, 8 neighbouring outputs in each of 16 strips are a product: row n of the left factor holds inputs of
// strip n as they lie, the right one the taps in a band, a Toeplitz matrix. PHASE + 7 + K inputs make STEPS of 16:
//
//     input     0   1   2   3 ..  8   9                   K = 3, PHASE = 0
//     output 0  w0  w1  w2
//            1      w0  w1  w2
//            7                    w1  w2
//
// All that a lane needs of the matrix are pairs of neighbouring taps: pair u = (w[u-7-PHASE], w[u-6-PHASE]), zeros
// beside the taps. Of an outer axis, each tap is a matrix of its own, and strips are the positions of that axis.
// A zero beside the band meets inputs that an output does not read. Where one of those is not finite, the sum is not a
// number: such sums are taken again, of their own taps alone.
//
// Work split
//   blockIdx.x as in depthwise_tiles.cuh, in tiles of BC channels. A tile has 16 strips of NB * 8 outputs: in one axis
//   strips follow each other, in two each is a row. A warp takes one channel of the tile after the other.
//
// Shared memory
//   xs [BC][CHANNEL]  the inputs of a channel, a strip PITCH elements after the other; then, in their place, its sums.
//                     Strips begin 16 bytes times an odd number apart, so 8 rows of a fragment lie in different banks.
//                     VEC channels are followed by SKEW elements: the pairs of positions that a warp has of its
//                     vectors of channels go to different banks.
//   ws [BC][PAIRS]    pairs of taps      bs [BC]  bias

#include "depthwise_tiles.cuh"
#include "fragments.cuh"

// Set by the plan: ELEMENT INDEX ACTIVATION   CHANNELS_FIRST   SEQUENCE 1 for one axis   PHASED 1 for phases in place
//   of an outer axis   OUTER taps of the outer axis, K of the inner   PHASE inputs before the first that are staged,
//   for alignment   BC   NB blocks of 8 outputs of a strip   VEC neighbouring elements of an access to x and w, YV to
//   y: channels, or positions of channels_first
constexpr int THREADS = 128, WARPS = THREADS / 32, STRIPS = 16;
constexpr int BLOCKS = sizeof(INDEX) == 4 ? 5 : 4;  // of a multiprocessor: 96 registers, or 128, and nothing spills
constexpr int STEPS = ceil_div(PHASE + 7 + K, 16);
constexpr int OUTPUTS = NB * 8;                  // of a strip
constexpr int READ = (NB - 1) * 8 + STEPS * 16;  // elements of a strip that fragments hold
constexpr int PITCH = SEQUENCE ? OUTPUTS : READ + 8;
constexpr int ROWS = SEQUENCE ? STRIPS : STRIPS + OUTER - 1;
constexpr int CHANNEL = ceil_div((ROWS - 1) * PITCH + READ, 16) * 16;  // elements of a channel
constexpr int NEEDED = (SEQUENCE ? (STRIPS - 1) * PITCH : 0) + OUTPUTS + PHASE + K - 1;  // of a row; the rest is zero
constexpr int CV = CHANNELS_FIRST ? 1 : VEC;  // channels of an access
constexpr int GROUPS = BC / CV;
constexpr int SKEW = CHANNELS_FIRST ? 0 : larger(8, 64 / GROUPS);
constexpr int BAND = STEPS * 16 + 8;  // pairs of a tap of the outer axis
constexpr int PAIRS = OUTER * BAND + 1;
static_assert(sizeof(E) == 2, "tensor cores take 16-bit elements");
static_assert(NB % 2 == 1, "strips begin an odd number of 16 bytes apart, and halves of fragments come in pairs");
static_assert(BC % CV == 0 && BC % WARPS == 0 && THREADS % GROUPS == 0, "threads must share the tile evenly");
static_assert(SEQUENCE == 0 || OUTER == 1, "one axis has no outer taps");
static_assert(CHANNELS_FIRST || PHASE == 0, "channels do not shift positions");

__device__ __forceinline__ int x_at(int channel) { return channel * CHANNEL + channel / CV * SKEW; }
constexpr int X_ELEMENTS = BC * CHANNEL + GROUPS * SKEW;

// Words of (a.at[0], b.at[0]), (a.at[1], b.at[1]), ..
template <int N>
__device__ __forceinline__ void zip(unsigned (&word)[N], const Vector<E, N>& a, const Vector<E, N>& b) {
  if constexpr (N == 1) {
    word[0] = a.at[0].bits | unsigned(b.at[0].bits) << 16;
  } else {
    unsigned low[N / 2], high[N / 2];
    memcpy(low, &a, sizeof low);
    memcpy(high, &b, sizeof high);
#pragma unroll
    for (int i = 0; i < N; ++i) word[i] = __byte_perm(low[i / 2], high[i / 2], i % 2 ? 0x7632 : 0x5410);
  }
}
// The vectors of which `word` was made.
template <int N>
__device__ __forceinline__ void unzip(Vector<E, N>& a, Vector<E, N>& b, const unsigned (&word)[N]) {
  if constexpr (N == 1) {
    a.at[0].bits = word[0], b.at[0].bits = word[0] >> 16;
  } else {
    unsigned low[N / 2], high[N / 2];
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      low[i / 2] = __byte_perm(word[i], word[i + 1], 0x5410);
      high[i / 2] = __byte_perm(word[i], word[i + 1], 0x7632);
    }
    memcpy(&a, low, sizeof low);
    memcpy(&b, high, sizeof high);
  }
}

// One output of its own taps alone; x begins at its first input, w at the pair of its first tap.
__device__ __forceinline__ float sum_of_taps(const E* x, const unsigned* w, float sum) {
#pragma unroll 1
  for (int r = 0; r < OUTER; ++r)
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
      E tap;
      tap.bits = (unsigned short)w[r * BAND + k];
      multiply_add(sum, widen(x[r * PITCH + k]), widen(tap));
    }
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) depthwise_toeplitz(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) unsigned char memory[];
  E* xs = reinterpret_cast<E*>(memory);
  unsigned* ws = reinterpret_cast<unsigned*>(xs + X_ELEMENTS);
  float* bs = reinterpret_cast<float*>(ws + BC * PAIRS);
  const int thread = threadIdx.x, lane = thread % 32;

  const Tile tile(p, BC, SEQUENCE ? STRIPS * OUTPUTS : OUTPUTS, STRIPS);
  const Index c0 = tile.c0;
  const int channels = tile.channels;

  // 1. Stage: inputs, taps and bias, zeros outside of them.
  {
    const Side inner = tile.inner_source(p, PHASE), outer = tile.outer_source(p);
    const E* from = p.x + tile.batch * p.source_batch + c0 * p.source_channel;
    // Pieces of a channel, or of a vector of channels: VEC positions, or two.
    constexpr int WIDTH = CHANNELS_FIRST ? VEC : 2, IN_ROW = SEQUENCE ? CHANNEL : READ;
    constexpr int PIECES = (SEQUENCE ? 1 : ROWS) * IN_ROW / WIDTH;
    constexpr int TURNS = ceil_div(PIECES * GROUPS, THREADS), AHEAD = 4;
#pragma unroll 1
    for (int turn = 0; turn < TURNS; turn += AHEAD) {
      Vector<E, VEC> a[AHEAD], b[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int piece = thread + (turn + i) * THREADS;
        const int group = CHANNELS_FIRST ? piece / PIECES : piece % GROUPS;
        const int place = (CHANNELS_FIRST ? piece % PIECES : piece / GROUPS) * WIDTH;
        const int row = SEQUENCE ? 0 : place / IN_ROW, column = place - row * IN_ROW;
        const Index at0 = outer.at + row * outer.step, at1 = inner.at + column * inner.step + (PHASED ? at0 : 0);
        const bool inside = piece < PIECES * GROUPS && group * CV < channels && within(at0, p.outer.source) &&
                            column < NEEDED;
        const E* piece_from =
            from + (group * CV * p.source_channel + at0 * p.outer.source_pitch + at1 * p.inner.source_pitch);
        a[i] = load_or_zero<VEC>(piece_from, inside && within(at1, p.inner.source));
        if constexpr (!CHANNELS_FIRST)
          b[i] = load_or_zero<VEC>(piece_from + inner.step * p.inner.source_pitch,
                                   inside && column + 1 < NEEDED && within(at1 + inner.step, p.inner.source));
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int piece = thread + (turn + i) * THREADS;
        if (piece >= PIECES * GROUPS) continue;
        const int group = CHANNELS_FIRST ? piece / PIECES : piece % GROUPS;
        const int place = (CHANNELS_FIRST ? piece % PIECES : piece / GROUPS) * WIDTH;
        const int row = SEQUENCE ? 0 : place / IN_ROW, column = place - row * IN_ROW;
        E* channel = xs + x_at(group * CV) + row * PITCH + column;
        if constexpr (CHANNELS_FIRST) {
          store(channel, a[i]);
        } else {
          unsigned word[VEC];
          zip(word, a[i], b[i]);
          unsigned* to = reinterpret_cast<unsigned*>(channel);
#pragma unroll
          for (int v = 0; v < VEC; ++v) to[v * (CHANNEL / 2)] = word[v];
        }
      }
    }
  }
#pragma unroll 1
  for (int piece = thread; piece < OUTER * BAND * GROUPS; piece += THREADS) {
    const int group = piece % GROUPS, pair = piece / GROUPS, r = pair / BAND, k = pair - r * BAND - 7 - PHASE;
    const E* from = p.w + (p.tap_first + (r * K + k) * p.tap_step + c0 + group * CV);
    const bool exists = group * CV < channels;
    unsigned word[CV];
    zip(word, load_or_zero<CV>(from, exists && within(k, K)),
        load_or_zero<CV>(from + p.tap_step, exists && within(k + 1, K)));
#pragma unroll
    for (int v = 0; v < CV; ++v) ws[(group * CV + v) * PAIRS + pair] = word[v];
  }
  for (int c = thread; c < BC; c += THREADS) bs[c] = p.bias && c < channels ? value(p.bias + c0 + c) : 0.f;
  __syncthreads();

  // 2. Multiply-accumulate and finish, a channel at a time.
  // Lanes 0-15 give the strips of the first half of a fragment, lanes 16-31 those of its second.
  const unsigned fragments = ptx::shared_address(xs) + (lane % 16 * PITCH + lane / 16 * 8) * sizeof(E);
  const int strip = lane / 4, column = lane % 4 * 2;  // of the sums acc[..][0]
#pragma unroll 1
  for (int c = thread / 32; c < channels; c += WARPS) {
    const float bias = bs[c];
    const unsigned* taps = ws + c * PAIRS;
    float acc[NB][4];
#pragma unroll
    for (int j = 0; j < NB; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[j][e] = bias;
#pragma unroll 1
    for (int r = 0; r < OUTER; ++r) {
      const unsigned from = fragments + (x_at(c) + r * PITCH) * sizeof(E);
      const unsigned* band = taps + r * BAND + 7 - strip + column;
      unsigned halves[NB + 2 * STEPS - 1][2];  // of fragments: 8 inputs of strips 0-7 and of strips 8-15
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
#pragma unroll
        for (int i = s ? NB + 2 * s - 1 : 0; i < NB + 2 * s; i += 2) {
          unsigned four[4];
          ptx::load_matrices(four, from + i * 8 * sizeof(E));
          halves[i][0] = four[0], halves[i][1] = four[1], halves[i + 1][0] = four[2], halves[i + 1][1] = four[3];
        }
        const unsigned b[2] = {band[s * 16], band[s * 16 + 8]};
#pragma unroll
        for (int j = 0; j < NB; ++j) {
          const int i = j + 2 * s;
          const unsigned a[4] = {halves[i][0], halves[i][1], halves[i + 1][0], halves[i + 1][1]};
          multiply_add(acc[j], a, b, E{});
        }
      }
    }
    E* channel = xs + x_at(c);
    bool finite = true;
#pragma unroll
    for (int j = 0; j < NB; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) finite = finite && acc[j][e] == acc[j][e];
    if (!finite)
#pragma unroll 1
      for (int i = 0; i < NB * 4; ++i) {
        const int at = (strip + i % 4 / 2 * 8) * PITCH + i / 4 * 8 + column + i % 2;
        const float sum = sum_of_taps(channel + at + PHASE, taps + 7 + PHASE, bias);
#pragma unroll
        for (int j = 0; j < NB * 4; ++j)
          if (j == i && acc[j / 4][j % 4] != acc[j / 4][j % 4]) acc[j / 4][j % 4] = sum;
      }
    __syncwarp();  // nobody reads the inputs of this channel any more
#pragma unroll
    for (int j = 0; j < NB; ++j)
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const Vector<E, 2> two{finish<ACTIVATION, E>(acc[j][e]), finish<ACTIVATION, E>(acc[j][e + 1])};
        store(channel + (strip + e / 2 * 8) * PITCH + j * 8 + column, two);
      }
  }
  __syncthreads();

  // 3. Store.
  const Side inner = tile.inner_target(p), outer = tile.outer_target(p);
  E* to = p.y + tile.batch * p.target_batch + c0 * p.target_channel;
  constexpr int WIDTH = CHANNELS_FIRST ? YV : 2, PIECES = STRIPS * OUTPUTS / WIDTH;
#pragma unroll 2
  for (int piece = thread; piece < PIECES * GROUPS; piece += THREADS) {
    const int group = CHANNELS_FIRST ? piece / PIECES : piece % GROUPS;
    const int place = (CHANNELS_FIRST ? piece % PIECES : piece / GROUPS) * WIDTH;
    const int row = SEQUENCE ? 0 : place / OUTPUTS, column = place - row * OUTPUTS;
    const Index at0 = outer.at + row * outer.step, at1 = inner.at + column * inner.step + (PHASED ? at0 : 0);
    const bool inside = group * CV < channels && at0 < p.outer.target;
    const E* channel = xs + x_at(group * CV) + row * PITCH + column;
    E* piece_to = to + (group * CV * p.target_channel + at0 * p.outer.target_pitch + at1 * p.inner.target_pitch);
    if constexpr (CHANNELS_FIRST) {
      if (inside && at1 < p.inner.target) store(piece_to, read<YV>(channel));
    } else {
      unsigned word[VEC];
#pragma unroll
      for (int v = 0; v < VEC; ++v) word[v] = *reinterpret_cast<const unsigned*>(channel + v * CHANNEL);
      Vector<E, VEC> a, b;
      unzip(a, b, word);
      if (inside && at1 < p.inner.target) store(piece_to, a);
      if (inside && at1 + inner.step < p.inner.target) store(piece_to + inner.step * p.inner.target_pitch, b);
    }
  }
}
