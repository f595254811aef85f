// tables.cu -- constants and globals of the module, and a local array that is indexed at run time.
//
//   y[i] = taps[i % 4] * x[order[i % 8]], with order the 8 numbers of the row in descending index;  x [8], y [n]

__constant__ float taps[4] = {1.f, -2.f, 0.5f, 4.f};
__device__ int calls;

extern "C" __global__ void tables(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float local[8];
  for (int k = 0; k < 8; ++k) local[k] = x[7 - k];
  if (i >= n) return;
#ifdef BUG_CONSTANT_BOUND
  y[i] = taps[i % 5] * local[i % 8];
#else
  y[i] = taps[i % 4] * local[i % 8];
#endif
  atomicAdd(&calls, 1);
}
