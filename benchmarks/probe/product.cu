// product.cu -- one product of a warpgroup on bfloat16 in shared memory under the 128-byte swizzle.
//
//   out[m, n] = sum over k < 64 of A[m, k] B[n, k],   m, n < 64
//
//   A is rows of 64 elements, 128 bytes: row m, element k; where TRANSPOSED_A, row k, element m. It may have more rows
//   than the product needs, up to ROWS: `a_fixed` is the descriptor but for the tile's address, and `skip` is the number
//   of rows by which its start is moved. The same of B, with n in the place of m, and 64 rows.
//
//   FROM_MAP    A comes through the copy engine, ROWS rows from (0, row) on of the tensor of `map`; else the block
//               stores it with the swizzle computed: the 16-byte piece p of row r lies at piece p ^ (r % 8).
//   STAGE_ONLY  out is that tile A, its bytes as they lie, ROWS * 128 of them; no product.
//
// A step of 16 in k is 32 bytes along the rows, or 16 rows where transposed.

#include "instructions.cuh"

// Set by the experiment: ROWS TRANSPOSED_A TRANSPOSED_B FROM_MAP STAGE_ONLY

struct alignas(64) Map {
  unsigned char bytes[128];
};

__device__ __forceinline__ void store_rows(uint4* tile, const uint4* from, int rows) {
  for (int i = threadIdx.x; i < rows * 8; i += blockDim.x) tile[i / 8 * 8 + (i % 8 ^ i / 8 % 8)] = from[i];
}

extern "C" __global__ void __launch_bounds__(128, 1)
    product(const __grid_constant__ Map map, const uint4* __restrict__ a, const uint4* __restrict__ b,
            float* __restrict__ out, unsigned long long a_fixed, unsigned long long b_fixed, int skip, int row) {
  __shared__ alignas(1024) uint4 tile_a[ROWS * 8];
  __shared__ alignas(1024) uint4 tile_b[64 * 8];
  __shared__ alignas(8) unsigned long long barrier;
#if FROM_MAP
  if (threadIdx.x == 0) {
    ptx::barrier_init(ptx::shared_address(&barrier), 1);
    ptx::make_visible();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::barrier_expect(ptx::shared_address(&barrier), ROWS * 128);
    ptx::load_box(ptx::shared_address(tile_a), &map, ptx::shared_address(&barrier), 0, row);
  }
  ptx::barrier_wait(ptx::shared_address(&barrier), 0);
#else
  store_rows(tile_a, a, ROWS);
#endif
#if STAGE_ONLY
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * 8; i += blockDim.x) reinterpret_cast<uint4*>(out)[i] = tile_a[i];
#else
  store_rows(tile_b, b, 64);
  ptx::fence_async();
  __syncthreads();

  // Descriptors hold addresses in units of 16 bytes.
  unsigned long long at_a = a_fixed | (ptx::shared_address(tile_a) + skip * 128) >> 4;
  unsigned long long at_b = b_fixed | ptx::shared_address(tile_b) >> 4;
  float acc[32] = {};
  ptx::product_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    ptx::product_64x64x16<TRANSPOSED_A, TRANSPOSED_B>(acc, at_a, at_b);
    at_a += (TRANSPOSED_A ? 16 * 128 : 32) >> 4;
    at_b += (TRANSPOSED_B ? 16 * 128 : 32) >> 4;
  }
  ptx::product_commit();
  ptx::product_wait();

  const int lane = threadIdx.x % 32, m = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    const int n = j / 4 * 8 + lane % 4 * 2 + j % 2;
    out[(m + j / 2 % 2 * 8) * 64 + n] = acc[j];
  }
#endif
}
