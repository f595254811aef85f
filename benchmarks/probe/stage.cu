// stage.cu -- reads x into shared memory by cp.async, 16 bytes a thread, STAGES steps deep: the way of sm_80.
//
//   sums[thread] = exclusive-or of every word that the thread has brought, of one pass where `passes` is odd, else 0
//
// A step is 256 vectors; the blocks of the grid take steps in turn. n is a multiple of 256.

#include "instructions.cuh"

// Set by the experiment: STAGES

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) stage(const uint4* __restrict__ x, unsigned* __restrict__ sums,
                                                            long long n, int passes) {
  __shared__ uint4 tile[STAGES][THREADS];
  const long long steps = n / THREADS, mine = (steps - blockIdx.x + gridDim.x - 1) / gridDim.x;
  const long long total = mine * passes;
  unsigned sum = 0;
  auto bring = [&](long long k) {
    if (k < total) {
      const long long step = blockIdx.x + k % mine * gridDim.x;
      ptx::copy16(ptx::shared_address(&tile[k % STAGES][threadIdx.x]), x + step * THREADS + threadIdx.x);
    }
    ptx::copy_commit();  // an empty group too: waiting counts groups
  };
  for (int k = 0; k < STAGES - 1; ++k) bring(k);
  for (long long k = 0; k < total; ++k) {
    bring(k + STAGES - 1);
    ptx::copy_wait<STAGES - 1>();
    const uint4 v = tile[k % STAGES][threadIdx.x];  // what this thread itself brought
    sum ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  sums[(long long)blockIdx.x * THREADS + threadIdx.x] = sum;
}
