// cluster.cu -- two blocks of a cluster read each other's shared memory, then take one box of a tensor that the first
// asks for on behalf of both. The size of the cluster is compiled in, so an ordinary launch starts it.
//
//   seen[block] = 1000 + the number of the neighbour, as it stood in the neighbour's shared memory
//   out[block] = the box at (0, 0, 0), BOX_BYTES of it, as it lies in the block's shared memory
//
// Dynamic shared memory   at least BOX_BYTES and 1008 to reach a multiple of 1024, as much as the experiment likes

#include "instructions.cuh"

// Set by the experiment: BOX_BYTES

struct alignas(64) Map {
  unsigned char bytes[128];
};

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128, 1)
    cluster(const __grid_constant__ Map map, unsigned* __restrict__ seen, unsigned* __restrict__ out) {
  extern __shared__ unsigned char memory[];
  __shared__ alignas(8) unsigned long long barrier;
  __shared__ unsigned mine;
  // The same offset in both blocks, for theirs are laid out alike.
  const unsigned skipped = (1024 - ptx::shared_address(memory) % 1024) % 1024;
  const unsigned* const tile = reinterpret_cast<const unsigned*>(memory + skipped);
  if (threadIdx.x == 0) {
    mine = 1000 + blockIdx.x;
    ptx::barrier_init(ptx::shared_address(&barrier), 1);
    ptx::make_visible();
    ptx::barrier_expect(ptx::shared_address(&barrier), BOX_BYTES);
  }
  __syncthreads();
  ptx::cluster_sync();
  if (threadIdx.x == 0) {
    seen[blockIdx.x] = ptx::read_of(ptx::shared_address(&mine), ptx::cluster_rank() ^ 1);
    if (ptx::cluster_rank() == 0)
      ptx::load_box_to_all(ptx::shared_address(tile), &map, ptx::shared_address(&barrier), 0, 0, 0, 3);
  }
  ptx::barrier_wait(ptx::shared_address(&barrier), 0);
  for (int i = threadIdx.x; i < BOX_BYTES / 4; i += blockDim.x) out[blockIdx.x * (BOX_BYTES / 4) + i] = tile[i];
  ptx::cluster_sync();  // no block leaves while another may read its memory
}
