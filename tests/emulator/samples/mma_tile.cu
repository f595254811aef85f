// mma_tile.cu -- matrix product of 16-bit numbers: cp.async into two stages, ldmatrix, mma.sync.
//
//   y[m,n] = sum over k of  a[m,k] * b[k,n]     a [M,K]   b [K,N]   y [M,N], float32; M % 32 == N % 16 == K % 16 == 0
//
// Work split:  a block of two warps computes 32 x 16 of y; a warp 16 x 16, two products wide.
// Shared memory, two stages:  as [2][32][PITCH_A]   bs [2][16][PITCH_B], rows padded so that ldmatrix has no conflict.
// ELEMENT is f16 or bf16.

#define TEXT(x) #x
#define MMA(type) "mma.sync.aligned.m16n8k16.row.col.f32." TEXT(type) "." TEXT(type) ".f32 "
using u16 = unsigned short;
using u32 = unsigned int;

constexpr int BM = 32, BN = 16, BK = 16;
#ifdef CONFLICTS
constexpr int PITCH_A = 16, PITCH_B = 64;
#else
constexpr int PITCH_A = BK + 8, PITCH_B = BN + 8;
#endif

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy16(void* to, const void* from, int bytes) {
#ifdef BUG_ZERO_FILL
  bytes = 16;
#endif
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

extern "C" __global__ void __launch_bounds__(64)
mma_tile(const u16* __restrict__ a, const u16* __restrict__ b, float* __restrict__ y, int N, int K, int rows) {
  __shared__ __align__(16) u16 as[2][BM][PITCH_A];
  __shared__ __align__(16) u16 bs[2][BK][PITCH_B];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;

  // Rows of `a` from `rows` on count as zero: the copy reads nothing and fills.
  const auto stage = [&](int k0, int s) {
    const int m = m0 + tid / 2, c = tid % 2 * 8;
    copy16(&as[s][tid / 2][c], m < rows ? a + (long long)m * K + k0 + c : a, m < rows ? 16 : 0);
    if (tid < 32) copy16(&bs[s][tid / 2][c], b + (long long)(k0 + tid / 2) * N + n0 + c, 16);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  float acc[2][4] = {};
  stage(0, 0);
  for (int k0 = 0, s = 0; k0 < K; k0 += BK, s ^= 1) {
    if (k0 + BK < K) {
      stage(k0 + BK, s ^ 1);
#ifdef BUG_WAIT_COUNT
      asm volatile("cp.async.wait_group 2;" ::: "memory");
#else
      asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
    } else {
      asm volatile("cp.async.wait_all;" ::: "memory");
    }
    __syncthreads();
    u32 fa[4], fb[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
                 : "r"(shared_address(&as[s][warp * 16 + lane % 16][lane / 16 * 8])) : "memory");
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fb[0]), "=r"(fb[1]), "=r"(fb[2]), "=r"(fb[3])
                 : "r"(shared_address(&bs[s][lane % 16][lane / 16 * 8])) : "memory");
    for (int j = 0; j < 2; ++j) {
#ifdef BUG_SWAPPED_OPERAND
      const u32 first = fb[2 * j + 1], second = fb[2 * j];
#else
      const u32 first = fb[2 * j], second = fb[2 * j + 1];
#endif
      asm volatile(MMA(ELEMENT) "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                   : "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])
                   : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(first), "r"(second));
    }
#ifndef BUG_MISSING_BARRIER
    __syncthreads();
#endif
  }
  for (int j = 0; j < 2; ++j)
    for (int i = 0; i < 4; ++i) {
      const int m = m0 + warp * 16 + lane / 4 + i / 2 * 8, n = n0 + j * 8 + lane % 4 * 2 + i % 2;
      y[(long long)m * N + n] = acc[j][i];
    }
}
