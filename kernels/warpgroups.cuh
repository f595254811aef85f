// warpgroups.cuh -- what kernels share whose warpgroups multiply while the copy engine brings operands, on sm_90a.

#pragma once

#include "common.cuh"

constexpr int GROUP = 128;  // threads of a warpgroup

// Of two warpgroups that multiply and one that asks for copies: registers of a thread, of the 168 that all have at first.
constexpr int CONSUMERS = 2, THREADS = (CONSUMERS + 1) * GROUP;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(GROUP * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) <= 65536, "more registers than there are");

// A tensor map, as a parameter of a kernel.
struct alignas(64) Map {
  unsigned char bytes[128];
};

// Stages, one after the other: where the next one lies, its barriers, and the parity of the round it is in.
struct Ring {
  unsigned start, stage_bytes, barriers, stages;
  bool turns = true;  // else it is filled once, and read again and again
  unsigned stage = 0, parity = 0;

  __device__ __forceinline__ unsigned memory() const { return start + stage * stage_bytes; }
  __device__ __forceinline__ unsigned full() const { return barriers + stage * 8; }
  __device__ __forceinline__ unsigned empty() const { return full() + stages * 8; }
  __device__ __forceinline__ void next() {
    if (++stage == stages) stage = 0, parity ^= turns;
  }
  // Passes over stages that another warpgroup takes.
  __device__ __forceinline__ void skip(unsigned count) {
    stage += count;
    parity ^= turns && stage / stages % 2;
    stage %= stages;
  }
  // Before the first use, by one thread: a stage is full when its copies have come, empty when each warp of the
  // warpgroups that share it has left it.
  __device__ __forceinline__ void init(int warpgroups = CONSUMERS) const {
    for (unsigned i = 0; i < stages; ++i) {
      ptx::barrier_init(barriers + i * 8, 1);
      ptx::barrier_init(barriers + (stages + i) * 8, warpgroups * 4);
    }
    ptx::barriers_visible();
  }
};

// What a descriptor says besides the address, in units of 16 bytes: the swizzle; from 8 rows to the next 8; and of rows
// that lie across the sum, from what the swizzle spans of them to the next.
constexpr unsigned long long SWIZZLE_128 = 1ull << 62, SWIZZLE_64 = 2ull << 62, SWIZZLE_32 = 3ull << 62;
__device__ __forceinline__ constexpr unsigned long long layout(unsigned long long swizzle, unsigned eight_rows, unsigned beyond) {
  return swizzle | (unsigned long long)(eight_rows / 16) << 32 | (unsigned long long)(beyond / 16) << 16;
}

// d += a b, by the type of the elements (the last argument); see ptx.cuh.
template <bool A_ACROSS, int SUMS>
__device__ __forceinline__ void multiply_tiles(float (&d)[SUMS], unsigned long long a, unsigned long long b, half_t) {
  ptx::multiply_tiles_half<2 * SUMS, A_ACROSS>(d, a, b);
}
template <bool A_ACROSS, int SUMS>
__device__ __forceinline__ void multiply_tiles(float (&d)[SUMS], unsigned long long a, unsigned long long b, bfloat_t) {
  ptx::multiply_tiles_bfloat<2 * SUMS, A_ACROSS>(d, a, b);
}
template <bool A_ACROSS, int SUMS>
__device__ __forceinline__ void multiply_tiles(float (&d)[SUMS], unsigned long long a, unsigned long long b, float) {
  ptx::multiply_tiles_tf32<2 * SUMS>(d, a, b);
}
