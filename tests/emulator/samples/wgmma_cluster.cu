// wgmma_cluster.cu -- matrix product of bfloat16 by pairs of blocks that share what they load.
//
//   y[m,n] = sum over k of  a[m,k] * b[n,k]     a [M,K]   b [N,K]   y [M,N], float32
//
// Maps:  a  boxes of 64 rows x 64     b  boxes of 32 rows x 64, both under the 128-byte swizzle
// Work split
//   blockIdx.x   128 rows of y; the two blocks of a cluster take the same 64 columns, tile after tile
//   threads      0 to 127 produce: one of them asks for boxes; 128 to 383 are two warpgroups of 64 rows each
//   of b         each block brings half of a tile, to both
// Shared memory, dynamic:  as [STAGES][128][64]   bs [STAGES][64][64]
//
// A stage is empty when the warpgroups of both blocks have let it go, for both blocks write to it.

#include "sm90.cuh"

constexpr int STAGES = 3, BM = 128, BN = 64, BK = 64, ROW_BYTES = BK * 2;
constexpr int STAGE_BYTES = (BM + BN) * ROW_BYTES;

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    wgmma_cluster(const __grid_constant__ Map a, const __grid_constant__ Map b, float* __restrict__ y, int M, int N,
                  int K) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ u64 full[STAGES], empty[STAGES];
  const int group = threadIdx.x / 128, m0 = blockIdx.x * BM, steps = (K + BK - 1) / BK, tiles = (N + BN - 1) / BN;
  const u32 rank = cluster_rank();
  unsigned char* const as = memory;
  unsigned char* const bs = memory + STAGES * BM * ROW_BYTES;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      init(&full[s], 1);
#ifdef BUG_OWN_RELEASE
      init(&empty[s], 2);
#else
      init(&empty[s], 4);
#endif
    }
    fence_init();
  }
  cluster_sync();

  if (group == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) {
      for (int i = 0; i < tiles * steps; ++i) {
        const int s = i % STAGES, n0 = i / steps * BN, k0 = i % steps * BK;
        if (i >= STAGES) wait(&empty[s], i / STAGES - 1 & 1);
        arrive_expecting(&full[s], STAGE_BYTES);
        for (int half = 0; half < 2; ++half)
          load_box(as + (s * BM + half * 64) * ROW_BYTES, &a, k0, m0 + half * 64, &full[s]);
        load_box_to(3, bs + (s * BN + rank * 32) * ROW_BYTES, &b, k0, n0 + rank * 32, &full[s]);
      }
    }
  } else {
    take_registers<240>();
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    for (int tile = 0; tile < tiles; ++tile) {
      float acc[32];
      for (int step = 0; step < steps; ++step) {
        const int i = tile * steps + step, s = i % STAGES;
        wait(&full[s], i / STAGES & 1);
        const u64 at_a = descriptor(shared_address(as + (s * BM + (group - 1) * 64) * ROW_BYTES));
        const u64 at_b = descriptor(shared_address(bs + s * BN * ROW_BYTES));
        fence_products();
        if (step == 0) multiply<0>(acc, at_a, at_b);
        else multiply<1>(acc, at_a, at_b);
        for (int k = 1; k < 4; ++k) multiply<1>(acc, at_a + k * 2, at_b + k * 2);
        commit_products();
        wait_products<0>();
        if (threadIdx.x % 128 == 0) {
          arrive(&empty[s]);
#ifndef BUG_OWN_RELEASE
          arrive_at(&empty[s], rank ^ 1);
#endif
        }
      }
      for (int j = 0; j < 32; ++j) {
        const int m = m0 + (group - 1) * 64 + warp * 16 + lane / 4 + j / 2 % 2 * 8;
        const int n = tile * BN + j / 4 * 8 + lane % 4 * 2 + j % 2;
        if (m < M && n < N) y[(long long)m * N + n] = acc[j];
      }
    }
  }
  // The other block may still write to this one's memory and arrive at its barriers.
#ifndef BUG_EARLY_EXIT
  cluster_sync();
#endif
}
