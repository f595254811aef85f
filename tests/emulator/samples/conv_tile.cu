// conv_tile.cu -- 1-D convolution through a shared tile, with a mistake to plant in each of its phases.
//
//   y[b,p,f] = sum over r,c of  x[b, p + r, c] * w[r,c,f]
//
// Arrays:  x [B,L,C]   w [R,C,F]   y [B,P,F]   with P = L - R + 1
// Work split:  blockIdx.x is (b, tile of BP positions); a thread computes one position of F filters.
// Shared memory:  xs [BP + R - 1][C]   ws [R * C * F]

constexpr int BP = 32, R = 3, C = 4, F = 8, ROWS = BP + R - 1;

extern "C" __global__ void __launch_bounds__(BP)
conv_tile(const float* __restrict__ x, const float* __restrict__ w, float* __restrict__ y, int L, int P) {
  __shared__ float xs[ROWS * C];
  __shared__ float ws[R * C * F];
  const int tiles = (P + BP - 1) / BP;
  const int b = blockIdx.x / tiles, p0 = blockIdx.x % tiles * BP, p = p0 + threadIdx.x;
  x += (long long)b * L * C;
  y += (long long)b * P * F;

  // 1. Stage.
#ifdef BUG_UNINITIALISED
  constexpr int STAGED = (ROWS - 1) * C;
#else
  constexpr int STAGED = ROWS * C;
#endif
  for (int i = threadIdx.x; i < STAGED; i += BP) {
    const int l = p0 + i / C;
#ifdef BUG_GLOBAL_BOUND
    xs[i] = l <= L ? x[(long long)l * C + i % C] : 0.f;
#else
    xs[i] = l < L ? x[(long long)l * C + i % C] : 0.f;
#endif
  }
  for (int i = threadIdx.x; i < R * C * F; i += BP) ws[i] = w[i];
#ifdef BUG_SHARED_BOUND
  if (threadIdx.x == 0) xs[ROWS * C] = 0.f;
#endif
#if defined(BUG_DIVERGENT_BARRIER)
  if (p < P) __syncthreads();
#elif defined(BUG_EARLY_EXIT)
  if (p >= P) return;
  __syncthreads();
#elif !defined(BUG_MISSING_BARRIER)
  __syncthreads();
#endif

  // 2. Multiply-accumulate.
  float acc[F] = {};
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      for (int f = 0; f < F; ++f) acc[f] += xs[(threadIdx.x + r) * C + c] * ws[(r * C + c) * F + f];

  // 3. Epilogue.
  if (p < P)
    for (int f = 0; f < F; f += 4)
      *(float4*)(y + (long long)p * F + f) = make_float4(acc[f], acc[f + 1], acc[f + 2], acc[f + 3]);
}
