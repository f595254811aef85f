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

// The address of shared memory as the instructions below take it.
__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// ---- asynchronous copies (sm_80) ---------------------------------------------------------------------------------

// Copies 4, 8 or 16 bytes to shared memory, or zeros there where `inside` does not hold; `from` is not read then.
template <int BYTES>
__device__ __forceinline__ void copy_async(unsigned to, const void* from, bool inside) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "an asynchronous copy has 4, 8 or 16 bytes");
  const int bytes = inside ? BYTES : 0;
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- matrices in a warp ------------------------------------------------------------------------------------------
// Fragments as in the PTX manual: of 16 x 8 sums a lane has rows lane/4 and lane/4 + 8, columns 2*(lane%4) and the next.

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// d += a b:  16 x 16 by 16 x 8 of 16-bit elements.
__device__ __forceinline__ void multiply_half(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_bfloat(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d += a b:  16 x 8 by 8 x 8 of TF32.
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d += a b:  16 x 8 by 8 x 8 of double, one fused multiply-add after the other; four smaller products before sm_90.
__device__ __forceinline__ void multiply_double(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
  for (int i = 0; i < 4; ++i)
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(d[i % 2 * 2]), "+d"(d[i % 2 * 2 + 1])
        : "d"(a[i]), "d"(b[i / 2]));
#endif
}

// ---- barriers in shared memory (sm_90) ---------------------------------------------------------------------------

// Before the first use: by one thread, then barriers_visible() by it, then __syncthreads().
__device__ __forceinline__ void barrier_init(unsigned barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barriers_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// One arrival, and `bytes` that the copy engine is to bring before the phase is over.
__device__ __forceinline__ void barrier_expect(unsigned barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits for the end of a phase: 0 the first, 1 the second or, of a new barrier, the one before the first; and so on.
__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
  unsigned over;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!over);
}

// ---- the copy engine (sm_90) -------------------------------------------------------------------------------------

// A box of the tensor of `map` to shared memory, from an element on whose coordinates stand innermost first. Its bytes
// count on `barrier`.
template <int AXES>
__device__ __forceinline__ void load_box(unsigned to, const void* map, unsigned barrier, const int (&at)[AXES]) {
  static_assert(AXES >= 3 && AXES <= 5, "a box has 3 to 5 axes");
  if constexpr (AXES == 3)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  else if constexpr (AXES == 4)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
}
// What this thread has stored to shared memory, made visible to the copy engine and to products of a warpgroup.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- products of a warpgroup (sm_90a) ----------------------------------------------------------------------------
// A warpgroup is four warps from a multiple of four on; all of it executes these.

// Registers of a thread from here on: more, as soon as there are, or fewer.
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Before a product whose sums other instructions have written.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING groups are under way. Nobody reads or moves the sums `d` before.
template <int PENDING, int ROWS, int SUMS>
__device__ __forceinline__ void products_wait(float (&d)[ROWS][SUMS]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < SUMS; ++j) asm volatile("" : "+f"(d[i][j])::"memory");
}

// d += a b:  64 x 16 by 16 x N of 16-bit elements, 64 x 8 by 8 x N of TF32, in shared memory, which their descriptors tell
// of. Rows of a lie along memory, with A_ACROSS its columns, and rows of b do, of TF32 its columns. Of floats the lower 13
// bits are cut off. A thread has sums 4j ..: row lane / 4 of its warp's 16 at columns 8j + lane % 4 * 2 and the next, then
// row lane / 4 + 8 at the same.
#define CUCONV_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CUCONV_SUMS_16(i) CUCONV_SUMS_4(i), CUCONV_SUMS_4(i + 4), CUCONV_SUMS_4(i + 8), CUCONV_SUMS_4(i + 12)
#define CUCONV_SUMS_32 CUCONV_SUMS_16(0)
#define CUCONV_NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define CUCONV_NAMES_64 CUCONV_NAMES_32 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CUCONV_SUMS_64 CUCONV_SUMS_32, CUCONV_SUMS_16(16)
#define CUCONV_NAMES_96 CUCONV_NAMES_64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define CUCONV_SUMS_96 CUCONV_SUMS_64, CUCONV_SUMS_16(32)
#define CUCONV_NAMES_128 CUCONV_NAMES_96 \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CUCONV_SUMS_128 CUCONV_SUMS_96, CUCONV_SUMS_16(48)
#define CUCONV_NAMES_160 CUCONV_NAMES_128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define CUCONV_SUMS_160 CUCONV_SUMS_128, CUCONV_SUMS_16(64)
#define CUCONV_NAMES_192 CUCONV_NAMES_160 \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define CUCONV_SUMS_192 CUCONV_SUMS_160, CUCONV_SUMS_16(80)
#define CUCONV_NAMES_256 CUCONV_NAMES_192 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define CUCONV_SUMS_256 CUCONV_SUMS_192, CUCONV_SUMS_16(96), CUCONV_SUMS_16(112)
#define CUCONV_MULTIPLY_TILES_OF(COLUMNS, TYPE, A, B, DEPTH, ORDERS)                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS DEPTH ".f32." TYPE "." TYPE " {" CUCONV_NAMES_##COLUMNS   \
               "}, %" #A ", %" #B ", 1, 1, 1" ORDERS ";"                                                              \
               : CUCONV_SUMS_##COLUMNS                                                                                \
               : "l"(a), "l"(b))
#define CUCONV_MULTIPLY_TILES(TYPE, DEPTH, ORDERS)                                                                    \
  static_assert(N % 32 == 0 && N <= 256 && N != 224, "a product of a warpgroup has no such number of columns here");  \
  if constexpr (N == 32)                                                                                              \
    CUCONV_MULTIPLY_TILES_OF(32, TYPE, 16, 17, DEPTH, ORDERS);                                                        \
  else if constexpr (N == 64)                                                                                         \
    CUCONV_MULTIPLY_TILES_OF(64, TYPE, 32, 33, DEPTH, ORDERS);                                                        \
  else if constexpr (N == 96)                                                                                         \
    CUCONV_MULTIPLY_TILES_OF(96, TYPE, 48, 49, DEPTH, ORDERS);                                                        \
  else if constexpr (N == 128)                                                                                        \
    CUCONV_MULTIPLY_TILES_OF(128, TYPE, 64, 65, DEPTH, ORDERS);                                                       \
  else if constexpr (N == 160)                                                                                        \
    CUCONV_MULTIPLY_TILES_OF(160, TYPE, 80, 81, DEPTH, ORDERS);                                                       \
  else if constexpr (N == 192)                                                                                        \
    CUCONV_MULTIPLY_TILES_OF(192, TYPE, 96, 97, DEPTH, ORDERS);                                                       \
  else                                                                                                                \
    CUCONV_MULTIPLY_TILES_OF(256, TYPE, 128, 129, DEPTH, ORDERS)
template <int N, bool A_ACROSS = false>
__device__ __forceinline__ void multiply_tiles_half(float (&d)[N / 2], unsigned long long a, unsigned long long b) {
  if constexpr (A_ACROSS) {
    CUCONV_MULTIPLY_TILES("f16", "k16", ", 1, 1");
  } else {
    CUCONV_MULTIPLY_TILES("f16", "k16", ", 0, 1");
  }
}
template <int N, bool A_ACROSS = false>
__device__ __forceinline__ void multiply_tiles_bfloat(float (&d)[N / 2], unsigned long long a, unsigned long long b) {
  if constexpr (A_ACROSS) {
    CUCONV_MULTIPLY_TILES("bf16", "k16", ", 1, 1");
  } else {
    CUCONV_MULTIPLY_TILES("bf16", "k16", ", 0, 1");
  }
}
template <int N>
__device__ __forceinline__ void multiply_tiles_tf32(float (&d)[N / 2], unsigned long long a, unsigned long long b) {
  CUCONV_MULTIPLY_TILES("tf32", "k8", "");
}

}  // namespace ptx
