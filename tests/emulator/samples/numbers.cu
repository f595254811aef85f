// numbers.cu -- scalar arithmetic, one element a thread, against the same formula in NumPy.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

extern "C" __global__ void half_math(const u16* a, const u16* b, const u16* c, u16* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  u16* row = y + (long long)i * 8;
  asm("fma.rn.f16 %0, %1, %2, %3;" : "=h"(row[0]) : "h"(a[i]), "h"(b[i]), "h"(c[i]));
  asm("add.f16 %0, %1, %2;" : "=h"(row[1]) : "h"(a[i]), "h"(b[i]));
  asm("mul.f16 %0, %1, %2;" : "=h"(row[2]) : "h"(a[i]), "h"(b[i]));
  asm("max.f16 %0, %1, %2;" : "=h"(row[3]) : "h"(a[i]), "h"(b[i]));
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(a[i]));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(row[4]) : "f"(wide * 1.001f));
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(row[5]) : "f"(wide * 1.001f));
  const u32 aa = a[i] | (u32)b[i] << 16, bb = b[i] | (u32)c[i] << 16, cc = c[i] | (u32)a[i] << 16;
  u32 packed;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(packed) : "r"(aa), "r"(bb), "r"(cc));
  row[6] = (u16)packed;
  row[7] = (u16)(packed >> 16);
}

extern "C" __global__ void bfloat_math(const u16* a, const u16* b, const u16* c, u16* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  u16* row = y + (long long)i * 2;
  asm("fma.rn.bf16 %0, %1, %2, %3;" : "=h"(row[0]) : "h"(a[i]), "h"(b[i]), "h"(c[i]));
  const float wide = __uint_as_float((u32)a[i] << 16) + __uint_as_float((u32)b[i] << 16);
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(row[1]) : "f"(wide));
}

extern "C" __global__ void double_math(const double* a, const double* b, double* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  y[4 * i] = fma(a[i], b[i], 1.);
  y[4 * i + 1] = a[i] / b[i];
  y[4 * i + 2] = exp(a[i]);
  y[4 * i + 3] = sqrt(fabs(a[i]));
}

extern "C" __global__ void float_math(const float* a, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float v = a[i];
  float* row = y + (long long)i * 8;
  row[0] = expf(v);
  row[1] = tanhf(v);
  row[2] = erff(v);
  row[3] = 1.f / (1.f + expf(-v));
  row[4] = log1pf(fabsf(v));
  row[5] = rsqrtf(fabsf(v) + 1.f);
  row[6] = sinf(v);
  row[7] = (float)(int)v;
}

extern "C" __global__ void integer_math(const int* a, const int* b, long long* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int p = a[i], q = b[i];
  long long* row = y + (long long)i * 12;
  row[0] = (long long)p * q;
  row[1] = __mulhi(p, q);
  row[2] = p / q;
  row[3] = p % q;
  row[4] = __popc(p);
  row[5] = __clz(p);
  row[6] = (int)__funnelshift_l(p, q, 9);
  row[7] = (int)__byte_perm(p, q, 0x7531);
  row[8] = p >> (q & 31);
  row[9] = (int)((u32)p << (q & 31));
  row[10] = (signed char)p;
  int field;
  asm("bfe.s32 %0, %1, 5, 9;" : "=r"(field) : "r"(p));
  row[11] = field;
}
