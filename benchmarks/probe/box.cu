// box.cu -- one box of a tensor through the copy engine, written out byte for byte as it lies in shared memory.
//
// The tensor map is a by-value parameter. RANK coordinates, innermost first, may lie outside the tensor.

#include "instructions.cuh"

// Set by the experiment: RANK BOX_BYTES

struct alignas(64) Map {
  unsigned char bytes[128];
};

extern "C" __global__ void __launch_bounds__(128) box(const __grid_constant__ Map map, unsigned* __restrict__ out, int c0,
                                                      int c1, int c2) {
  __shared__ alignas(1024) unsigned tile[BOX_BYTES / 4];
  __shared__ alignas(8) unsigned long long barrier;
  for (int i = threadIdx.x; i < BOX_BYTES / 4; i += blockDim.x) tile[i] = 0xdeadbeef;
  ptx::fence_async();
  if (threadIdx.x == 0) {
    ptx::barrier_init(ptx::shared_address(&barrier), 1);
    ptx::make_visible();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::barrier_expect(ptx::shared_address(&barrier), BOX_BYTES);
    if (RANK == 2)
      ptx::load_box(ptx::shared_address(tile), &map, ptx::shared_address(&barrier), c0, c1);
    else
      ptx::load_box(ptx::shared_address(tile), &map, ptx::shared_address(&barrier), c0, c1, c2);
  }
  ptx::barrier_wait(ptx::shared_address(&barrier), 0);
  for (int i = threadIdx.x; i < BOX_BYTES / 4; i += blockDim.x) out[i] = tile[i];
}
