// stream.cu -- boxes of a tensor of 3 axes through the copy engine, STAGES deep: what it brings a second.
//
//   box k of boxes0 * boxes1 * boxes2 starts at (k % boxes0 * step0, k / boxes0 % boxes1 * step1, the rest * step2)
//   sums[block] = number of boxes it has brought, over all passes
//
// The blocks of the grid take boxes in turn. One thread asks, one warp waits and lets go; nobody reads the bytes.

#include "instructions.cuh"

// Set by the experiment: STAGES BOX_BYTES

struct alignas(64) Map {
  unsigned char bytes[128];
};

extern "C" __global__ void __launch_bounds__(64) stream(const __grid_constant__ Map map, unsigned* __restrict__ sums,
                                                        int boxes0, int boxes1, int boxes2, int step0, int step1,
                                                        int step2, int passes) {
  extern __shared__ unsigned char memory[];
  __shared__ alignas(8) unsigned long long full[STAGES], empty[STAGES];
  const unsigned tile = (ptx::shared_address(memory) + 1023) / 1024 * 1024;
  const int count = boxes0 * boxes1 * boxes2;
  const int mine = (count - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x) * passes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      ptx::barrier_init(ptx::shared_address(&full[i]), 1);
      ptx::barrier_init(ptx::shared_address(&empty[i]), 32);
    }
    ptx::make_visible();
  }
  __syncthreads();
  if (threadIdx.x == 32) {
    const int once = mine / passes;
    for (int i = 0; i < mine; ++i) {
      const int slot = i % STAGES, round = i / STAGES;
      if (round) ptx::barrier_wait(ptx::shared_address(&empty[slot]), (round - 1) & 1);
      const int k = int(blockIdx.x) + i % once * int(gridDim.x);
      ptx::barrier_expect(ptx::shared_address(&full[slot]), BOX_BYTES);
      ptx::load_box(tile + slot * BOX_BYTES, &map, ptx::shared_address(&full[slot]), k % boxes0 * step0,
                    k / boxes0 % boxes1 * step1, k / (boxes0 * boxes1) * step2);
    }
  }
  if (threadIdx.x < 32) {
    for (int i = 0; i < mine; ++i) {
      ptx::barrier_wait(ptx::shared_address(&full[i % STAGES]), i / STAGES & 1);
      ptx::barrier_arrive(ptx::shared_address(&empty[i % STAGES]));
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = mine;
  }
}
