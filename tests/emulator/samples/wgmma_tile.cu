// wgmma_tile.cu -- matrix product of bfloat16 as sm_90 wants it: the copy engine fills stages, a warpgroup multiplies,
// the copy engine takes the result away.
//
//   y[m,n] = sum over k of  a[m,k] * b[n,k]     a [M,K]   b [N,K]   y [M,N], float32; rows and columns outside are zero
//
// Maps:  a, b  boxes of 64 x 64 under the 128-byte swizzle     y  boxes of 64 x 64 without one
// Work split:  a block computes 64 rows of y, 64 columns at a time; threads 0 to 127 multiply, thread 128 asks for
//              boxes.
// Shared memory:  as, bs [STAGES][64][64]   ys [64][64]   full, empty [STAGES]

#include "sm90.cuh"

constexpr int STAGES = 2, TILE = 64, TILE_BYTES = TILE * TILE * 2;

// Products that are under way while the next one is asked for, and the stages that are kept for them.
#ifdef PIPELINED
constexpr int UNDER_WAY = 1;
#else
constexpr int UNDER_WAY = 0;
#endif
#ifdef BUG_EARLY_RELEASE
constexpr int KEPT = 0;
#else
constexpr int KEPT = UNDER_WAY;
#endif

extern "C" __global__ void __launch_bounds__(160)
    wgmma_tile(const __grid_constant__ Map a, const __grid_constant__ Map b, const __grid_constant__ Map y, int N,
               int K) {
  __shared__ alignas(1024) u16 as[STAGES][TILE * TILE];
  __shared__ alignas(1024) u16 bs[STAGES][TILE * TILE];
  __shared__ alignas(128) float ys[TILE][TILE];
  __shared__ u64 full[STAGES], empty[STAGES];
  const int m0 = blockIdx.x * TILE, steps = (K + TILE - 1) / TILE, tiles = (N + TILE - 1) / TILE;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      init(&full[s], 1);
      init(&empty[s], 4);  // one arrival a warp
    }
#ifndef BUG_INIT_FENCE
    fence_init();
#endif
  }
  __syncthreads();

  if (threadIdx.x == 128) {
    for (int i = 0; i < tiles * steps; ++i) {
      const int s = i % STAGES, n0 = i / steps * TILE, k0 = i % steps * TILE;
#ifndef BUG_EMPTY_WAIT
      if (i >= STAGES) wait(&empty[s], i / STAGES - 1 & 1);
#endif
#if defined BUG_FEW_BYTES
      arrive_expecting(&full[s], TILE_BYTES);
#elif defined BUG_MANY_BYTES
      arrive_expecting(&full[s], 2 * TILE_BYTES + 16);
#else
      arrive_expecting(&full[s], 2 * TILE_BYTES);
#endif
      load_box(as[s], &a, k0, m0, &full[s]);
      load_box(bs[s], &b, k0, n0, &full[s]);
    }
  }
  if (threadIdx.x < 128) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int tile = 0; tile < tiles; ++tile) {
      float acc[32];
      for (int j = 0; j < 32; ++j) acc[j] = 0;
      for (int step = 0; step < steps; ++step) {
        const int i = tile * steps + step, s = i % STAGES;
#if defined BUG_PARITY
        wait(&full[s], i / STAGES + 1 & 1);
#elif !defined BUG_FULL_WAIT
        wait(&full[s], i / STAGES & 1);
#endif
#ifndef BUG_PRODUCT_FENCE
        fence_products();
#endif
        for (int k = 0; k < 4; ++k) {
#ifdef BUG_K_STEP
          const u32 skipped = k * 16;
#else
          const u32 skipped = k * 32;
#endif
#ifdef BUG_DESCRIPTOR
          const u32 stride = 512;
#else
          const u32 stride = 1024;
#endif
          const u32 at_a = shared_address(as[s]) + skipped, at_b = shared_address(bs[s]) + skipped;
          multiply<1>(acc, descriptor(at_a, stride), descriptor(at_b));
        }
#ifndef BUG_COMMIT
        commit_products();
#endif
#ifndef BUG_PRODUCT_WAIT
        wait_products<UNDER_WAY>();
#endif
        if (step >= KEPT && lane == 0) arrive(&empty[(i - KEPT) % STAGES]);
      }
#ifndef BUG_PRODUCT_WAIT
      wait_products<0>();
#endif
      if (KEPT && lane == 0) arrive(&empty[(tile * steps + steps - 1) % STAGES]);

      // The tile before must have been read before this one overwrites it.
#ifndef BUG_STORE_READ
      if (threadIdx.x == 0) wait_until_read<0>();
#endif
      asm volatile("bar.sync 1, 128;" ::: "memory");
      for (int j = 0; j < 32; ++j)
        ys[warp * 16 + lane / 4 + j / 2 % 2 * 8][j / 4 * 8 + lane % 4 * 2 + j % 2] = acc[j];
#ifndef BUG_ENGINE_FENCE
      fence_engines();
#endif
#ifndef BUG_STORE_BARRIER
      asm volatile("bar.sync 1, 128;" ::: "memory");
#endif
      if (threadIdx.x == 0) {
        store_box(&y, tile * TILE, m0, ys);
        commit_stores();
      }
    }
#ifndef BUG_LAST_STORE
    if (threadIdx.x == 0) wait_until_read<0>();
#endif
  }
}
