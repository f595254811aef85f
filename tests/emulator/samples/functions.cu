// functions.cu -- calls, bytes and long integers: what the compiler makes of ordinary CUDA C.
//
// Test   tests/test_emulator.py

__shared__ int table[32];

__device__ __noinline__ int weigh(int v, int depth) {
  if (depth == 0) return table[v & 31];
  return 3 * weigh(v + 1, depth - 1) + table[depth];
}

struct Pair {
  double value;
  int sign;
};

__device__ __noinline__ Pair split(double v) { return {v < 0 ? -v : v, v < 0 ? -1 : 1}; }

// y[i] = a weight of i, found through calls;  z[i] = x[i]^1.7, with the sign of x[i]
extern "C" __global__ void calls(const double* x, int* y, double* z) {
  const int i = threadIdx.x;
  if (i < 32) table[i] = i;
  __syncthreads();
  y[i] = weigh(i, 3);
  const Pair p = split(x[i]);
  z[i] = p.sign * pow(p.value, 1.7);
}

// y[i] = the largest of three neighbours of x, through bytes of shared memory.
extern "C" __global__ void bytes(const unsigned char* x, signed char* y, int n) {
  __shared__ unsigned char xs[66];
  const int i = threadIdx.x;
  xs[i + 1] = x[i];
  if (i == 0) xs[0] = xs[65] = 0;
#ifndef BUG_MISSING_BARRIER
  __syncthreads();
#endif
  const int m = max(max(int(xs[i]), int(xs[i + 1])), int(xs[i + 2]));
#ifdef BUG_BYTE_BOUND
  if (i <= n) y[i] = (signed char)m;
#else
  if (i < n) y[i] = (signed char)m;
#endif
}

// (high, low) of a * b + c in 128 bits
extern "C" __global__ void wide_product(const unsigned long long* a, const unsigned long long* b,
                                        const unsigned long long* c, unsigned long long* y) {
  const int i = threadIdx.x;
  const unsigned __int128 p = (unsigned __int128)a[i] * b[i] + c[i];
  y[2 * i] = (unsigned long long)(p >> 64);
  y[2 * i + 1] = (unsigned long long)p;
}
