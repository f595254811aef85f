// warp_sum.cu -- sums of rows by warp shuffles.   x [rows, n]   y [rows]; a block a row.

extern "C" __global__ void __launch_bounds__(128) warp_sum(const float* x, float* y, int n) {
  __shared__ float parts[4];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sum = 0.f;
  for (int i = threadIdx.x; i < n; i += 128) sum += x[(long long)blockIdx.x * n + i];
  for (int d = 16; d > 0; d /= 2) sum += __shfl_down_sync(0xffffffffu, sum, d);
  if (lane == 0) parts[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = __shfl_sync(0xffffffffu, parts[lane % 4], lane % 4);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
#if defined(BUG_CROSS_BLOCK)
    if (lane == 0) y[0] += sum;
#elif defined(ATOMIC)
    if (lane == 0) atomicAdd(y, sum);
#else
    if (lane == 0) y[blockIdx.x] = sum;
#endif
  }
}
