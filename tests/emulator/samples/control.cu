// control.cu -- threads that wait for each other in every way the emulator knows, and some that wait in vain.

using u32 = unsigned int;
using u64 = unsigned long long;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Warp 0 produces, warp 1 consumes, through one slot and two mbarriers.   y[i] = 2 x[i] for 32 n elements.
// From sm_90 on a wait suspends the thread; before, it asks again and again.
#if __CUDA_ARCH__ >= 900
#define WAIT "try_wait"
#else
#define WAIT "test_wait"
#endif
extern "C" __global__ void __launch_bounds__(64) hand_over(const int* x, int* y, int n) {
  __shared__ int slot[32];
  __shared__ u64 full, empty;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(shared_address(&full)) : "memory");
    asm volatile("mbarrier.init.shared.b64 [%0], 32;" ::"r"(shared_address(&empty)) : "memory");
  }
  __syncthreads();
  const auto arrive = [](u64* bar) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}"
                 ::"r"(shared_address(bar)) : "memory");
  };
  const auto wait = [](u64* bar, u32 parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\n"
                 "mbarrier." WAIT ".parity.shared.b64 done, [%0], %1;\n@!done bra AGAIN;\n}"
                 ::"r"(shared_address(bar)), "r"(parity) : "memory");
  };
  for (int i = 0; i < n; ++i) {
    if (threadIdx.x < 32) {
#ifndef BUG_NO_EMPTY_WAIT
      if (i > 0) wait(&empty, (i - 1) & 1);
#endif
      slot[lane] = 2 * x[32 * i + lane];
      arrive(&full);
    } else {
#ifndef BUG_NO_FULL_WAIT
      wait(&full, i & 1);
#endif
      y[32 * i + lane] = slot[lane];
      arrive(&empty);
    }
  }
}

// Named barriers: each half of the block exchanges through its own part of a dynamic array.
extern "C" __global__ void __launch_bounds__(128) halves(const int* x, int* y) {
  extern __shared__ int part[];
  const int half = threadIdx.x / 64, i = threadIdx.x % 64;
  part[threadIdx.x] = x[threadIdx.x];
  asm volatile("bar.sync %0, 64;" ::"r"(half + 1) : "memory");
  y[threadIdx.x] = part[half * 64 + 63 - i];
}

// One warp hands values to another. It arrives at two barriers without waiting at either, so that the other may wait at
// them in the opposite order.
extern "C" __global__ void __launch_bounds__(64) arrive(const int* x, int* y) {
  __shared__ int part[32];
  if (threadIdx.x < 32) {
    part[threadIdx.x] = x[threadIdx.x];
    asm volatile("bar.arrive 3, 64;" ::: "memory");
    asm volatile("bar.arrive 4, 64;" ::: "memory");
    y[threadIdx.x] = 7;
  } else {
#ifdef BUG_NO_ARRIVAL
    y[threadIdx.x] = part[63 - threadIdx.x];
#endif
    asm volatile("bar.sync 4, 64;" ::: "memory");
    asm volatile("bar.sync 3, 64;" ::: "memory");
    y[threadIdx.x] = part[63 - threadIdx.x];
  }
}

// A value that one thread reads twice, before and after a barrier, and another one writes when both have happened.
extern "C" __global__ void __launch_bounds__(64) read_twice(const int* x, int* y) {
  __shared__ int value;
  if (threadIdx.x == 32) value = x[0];
  __syncthreads();
  if (threadIdx.x == 0) y[0] = value;
  __syncthreads();
  if (threadIdx.x == 0) y[1] = value;
#ifndef BUG_MISSING_BARRIER
  __syncthreads();
#endif
  if (threadIdx.x == 32) value = x[1];
  __syncthreads();
  if (threadIdx.x == 0) y[2] = value;
}

// Whether the lanes of one warp agree.   y [32, 4]
extern "C" __global__ void agree(const int* x, const long long* z, u32* y) {
  int same;
  u32* row = y + threadIdx.x * 4;
  row[0] = __match_all_sync(0xffffffffu, x[threadIdx.x], &same);
  row[1] = same;
  row[2] = __match_all_sync(0xffffffffu, z[threadIdx.x], &same);
  row[3] = same;
}

// Votes and matches of one warp.   y [32, 6]
extern "C" __global__ void votes(const int* x, u32* y) {
  const int v = x[threadIdx.x];
  u32* row = y + threadIdx.x * 6;
  row[0] = __ballot_sync(0xffffffffu, v > 0);
  row[1] = __any_sync(0xffffffffu, v > 100);
  row[2] = __all_sync(0xffffffffu, v < 100);
  row[3] = __match_any_sync(0xffffffffu, v);
  row[4] = __activemask();
  row[5] = __reduce_add_sync(0xffffffffu, v);
}

// Reductions at a barrier, and atomics on shared and global memory.   y [128, 3], totals [5]
extern "C" __global__ void __launch_bounds__(128) reductions(const int* x, int* y, u32* totals) {
  __shared__ u32 largest;
  const int v = x[threadIdx.x];
  if (threadIdx.x == 0) largest = 0;
  int* row = y + threadIdx.x * 3;
  row[0] = __syncthreads_count(v > 0);
  row[1] = __syncthreads_and(v > -3);
  row[2] = __syncthreads_or(v > 3);
  atomicMax(&largest, (u32)(v + 3));
  atomicInc(&totals[1], 100);
  atomicXor(&totals[2], 1u << threadIdx.x % 32);
  atomicCAS(&totals[3], 0u, 7u);
  if (v == 1) atomicExch(&totals[4], 9u);
  __syncthreads();
  if (threadIdx.x == 0) totals[0] = largest;
}

// Shuffles in every direction, within the warp and within segments of 8 lanes.   y [32, 6]
extern "C" __global__ void shuffles(const int* x, int* y) {
  const int v = x[threadIdx.x];
  int* row = y + threadIdx.x * 6;
  row[0] = __shfl_up_sync(0xffffffffu, v, 3);
  row[1] = __shfl_down_sync(0xffffffffu, v, 3);
  row[2] = __shfl_xor_sync(0xffffffffu, v, 5);
  row[3] = __shfl_sync(0xffffffffu, v, 1, 8);
  row[4] = __shfl_up_sync(0xffffffffu, v, 2, 8);
  row[5] = __shfl_down_sync(0xffffffffu, v, 2, 8);
}

// Lane 0 of each warp writes, the others read: ordered by __syncwarp.
extern "C" __global__ void warp_exchange(const int* x, int* y) {
  __shared__ int first[4];
  if (threadIdx.x % 32 == 0) first[threadIdx.x / 32] = x[threadIdx.x];
#ifndef BUG_MISSING_SYNCWARP
  __syncwarp();
#endif
  y[threadIdx.x] = first[threadIdx.x / 32];
}

extern "C" __global__ void never(volatile int* flag) {
  while (*flag == 0) {}
}

// Lanes 16 to 31 leave, the others wait for them.
extern "C" __global__ void partial_shuffle(int* y) {
  if (threadIdx.x >= 16) return;
  y[threadIdx.x] = __shfl_sync(0xffffffffu, (int)threadIdx.x, 31 - threadIdx.x);
}
