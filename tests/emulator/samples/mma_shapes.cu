// mma_shapes.cu -- one product y = a b of every remaining shape of mma.sync, fragments loaded element by element.
//
// Arrays:  a [M,K]   b [K,8]   y [M,8], row-major; one warp. With g = lane / 4 and t = lane % 4.

using u32 = unsigned int;

extern "C" __global__ void mma_tf32(const float* a, const float* b, float* y) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto tf32 = [](float v) {
    u32 r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
    return r;
  };
  const u32 a0 = tf32(a[g * 8 + t]), a1 = tf32(a[(g + 8) * 8 + t]);
  const u32 a2 = tf32(a[g * 8 + t + 4]), a3 = tf32(a[(g + 8) * 8 + t + 4]);
  const u32 b0 = tf32(b[t * 8 + g]), b1 = tf32(b[(t + 4) * 8 + g]);
  float d[4] = {};
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  for (int i = 0; i < 4; ++i) y[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

extern "C" __global__ void mma_f64(const double* a, const double* b, double* y) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  double d[2] = {};
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(d[0]), "+d"(d[1]) : "d"(a[g * 4 + t]), "d"(b[t * 8 + g]));
  for (int i = 0; i < 2; ++i) y[g * 8 + 2 * t + i] = d[i];
}

extern "C" __global__ void mma_f16_sums(const unsigned short* a, const unsigned short* b, unsigned short* y) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const u32* rows = (const u32*)a;
  const u32 a0 = rows[g * 4 + t], a1 = rows[(g + 8) * 4 + t];
  const u32 b0 = b[2 * t * 8 + g] | (u32)b[(2 * t + 1) * 8 + g] << 16;
  u32 d[2] = {};
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%0,%1};"
               : "+r"(d[0]), "+r"(d[1]) : "r"(a0), "r"(a1), "r"(b0));
  ((u32*)y)[g * 4 + t] = d[0];
  ((u32*)y)[(g + 8) * 4 + t] = d[1];
}

extern "C" __global__ void mma_tf32_k4(const float* a, const float* b, float* y) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const float a0 = a[g * 4 + t], a1 = a[(g + 8) * 4 + t], b0 = b[t * 8 + g];
  float d[4] = {};
  asm volatile("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b0)));
  for (int i = 0; i < 4; ++i) y[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

#if __CUDA_ARCH__ >= 900
// Element i of a: row g + 8 (i % 2), column t + 4 (i / 2).   Element i of b: row t + 4 i, column g.
template <int K>
__device__ __forceinline__ void mma_f64_rows(const double* a, const double* b, double* y) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  double p[K / 2], q[K / 4], d[4] = {};
  for (int i = 0; i < K / 2; ++i) p[i] = a[(g + i % 2 * 8) * K + t + i / 2 * 4];
  for (int i = 0; i < K / 4; ++i) q[i] = b[(t + 4 * i) * 8 + g];
  if constexpr (K == 4)
    asm volatile("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3]) : "d"(p[0]), "d"(p[1]), "d"(q[0]));
  if constexpr (K == 8)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
                 : "d"(p[0]), "d"(p[1]), "d"(p[2]), "d"(p[3]), "d"(q[0]), "d"(q[1]));
  if constexpr (K == 16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7,%8,%9,%10,%11}, {%12,%13,%14,%15}, {%0,%1,%2,%3};"
                 : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
                 : "d"(p[0]), "d"(p[1]), "d"(p[2]), "d"(p[3]), "d"(p[4]), "d"(p[5]), "d"(p[6]), "d"(p[7]),
                   "d"(q[0]), "d"(q[1]), "d"(q[2]), "d"(q[3]));
  for (int i = 0; i < 4; ++i) y[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
extern "C" __global__ void mma_f64_k4(const double* a, const double* b, double* y) { mma_f64_rows<4>(a, b, y); }
extern "C" __global__ void mma_f64_k8(const double* a, const double* b, double* y) { mma_f64_rows<8>(a, b, y); }
extern "C" __global__ void mma_f64_k16(const double* a, const double* b, double* y) { mma_f64_rows<16>(a, b, y); }
#endif
