// ptx.cuh -- every inline-assembly instruction of the kernels, one small function each.
//
// Test   tests/test_ptx_wrappers.py: each against its definition, in the emulator and on a GPU
//
// Nothing else in kernels/ contains `asm`.

#pragma once

namespace ptx {

// The 16-bit types without their headers. Both conversions to 16 bits round to nearest, ties to even.
__device__ __forceinline__ float float_from_half(unsigned short h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ unsigned short half_from_float(float f) {
  unsigned short h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ unsigned short bfloat_from_float(float f) {
#if __CUDA_ARCH__ >= 800
  unsigned short b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b) : "f"(f));
  return b;
#else
  const unsigned bits = __float_as_uint(f);
  if (f != f) return 0x7fff;
  return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

}  // namespace ptx
