// registers.cu -- one warpgroup gives registers up, two take them: as a kernel with a producer and consumers does.
//
//   out[block, t] = sum over i < COUNT and r < rounds of x[r, t] * (i + r), in float; t < 256 a thread of the consumers
//
// The COUNT sums of a thread are alive at the same time.
//
// 3 * 128 threads of at most 168 registers at the start; then 24 and twice 240.

#include "instructions.cuh"

constexpr int COUNT = 192;  // more than 168, less than 240

extern "C" __global__ void __launch_bounds__(384, 1) registers(const float* __restrict__ x, float* __restrict__ out, int rounds) {
  if (threadIdx.x < 128) {
    ptx::give_registers<24>();
  } else {
    ptx::take_registers<240>();
    const int thread = threadIdx.x - 128;
    float acc[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) acc[i] = 0;
    for (int round = 0; round < rounds; ++round) {
      const float v = x[round * 256 + thread];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) acc[i] = fmaf(v, float(i + round), acc[i]);
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum += acc[i];
    out[blockIdx.x * 256 + thread] = sum;
  }
}
