// copy.cu -- y = x, 16 bytes an access, VECTORS independent loads a thread before the first store.
//
// A block copies 256 * VECTORS vectors; the last one what is left.

// Set by the experiment: VECTORS

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) copy(const uint4* __restrict__ x, uint4* __restrict__ y, long long n) {
  const long long first = (long long)blockIdx.x * THREADS * VECTORS + threadIdx.x;
  uint4 v[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
    if (first + i * THREADS < n) v[i] = x[first + i * THREADS];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i)
    if (first + i * THREADS < n) y[first + i * THREADS] = v[i];
}
