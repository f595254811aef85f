// read.cu -- reads x, 16 bytes an access, `passes` times, and writes one number a thread: the bandwidth of the L2 cache
// where x fits, else of the memory. The L1 caches are passed by.
//
//   sums[thread] = exclusive-or of every word that the thread has read, of one pass where `passes` is odd, else 0
//
// All threads of the grid together step through x, 4 vectors a thread at a time; n is a multiple of 4.

constexpr int THREADS = 512, VECTORS = 4;

extern "C" __global__ void __launch_bounds__(THREADS) read(const uint4* __restrict__ x, unsigned* __restrict__ sums,
                                                           long long n, int passes) {
  const long long threads = (long long)gridDim.x * THREADS;
  const long long thread = (long long)blockIdx.x * THREADS + threadIdx.x;
  unsigned sum = 0;
  for (int pass = 0; pass < passes; ++pass)
    for (long long i = thread; i < n; i += threads * VECTORS) {
      uint4 v[VECTORS];
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) v[j] = i + j * threads < n ? __ldcg(x + i + j * threads) : uint4{};
#pragma unroll
      for (int j = 0; j < VECTORS; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
  sums[thread] = sum;
}
