// collectives.h -- the instructions that a warp executes together.

#pragma once
#include "runtime.h"

namespace emulator {

inline bool takes_part(const Meeting& m, u32 lane) { return m.mask >> lane & 1; }

// ---- shuffles and votes -----------------------------------------------------------------------------------------

enum Shuffle { SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_BUTTERFLY, SHUFFLE_INDEX };
struct Shuffled {
  u32 value;
  bool in_range;
};

template <Shuffle MODE>
inline Shuffled shuffle(Thread& self, int site, u32 value, u32 by, u32 clamp_and_segment, u32 mask) {
  const u32 lane = self.lane, clamp = clamp_and_segment & 31, segment = clamp_and_segment >> 8 & 31;
  const int last = int((lane & segment) | (clamp & ~segment)), first = int(lane & segment);
  const int b = int(by & 31);
  int from = MODE == SHUFFLE_UP ? int(lane) - b : MODE == SHUFFLE_DOWN ? int(lane) + b
             : MODE == SHUFFLE_BUTTERFLY ? int(lane) ^ b : first | (b & ~int(segment));
  const bool in_range = MODE == SHUFFLE_UP ? from >= last : from <= last;
  if (!in_range) from = int(lane);
  struct Input {
    u32 value;
    int from;
  } in{value, from};
  u32 out = 0;
  meet(self, site, mask, &in, &out, [](Meeting& m) {
    for (u32 l = 0; l < 32; l++) {
      if (!takes_part(m, l)) continue;
      const int source = static_cast<const Input*>(m.in[l])->from;
      // A lane that is not named in the mask has no value to give: NaN, so that its use shows.
      *static_cast<u32*>(m.out[l]) =
          takes_part(m, u32(source)) ? static_cast<const Input*>(m.in[source])->value : 0xffffffffu;
    }
  });
  return {out, in_range};
}

inline u32 ballot(Thread& self, int site, bool predicate, u32 mask) {
  u32 out = 0;
  meet(self, site, mask, &predicate, &out, [](Meeting& m) {
    u32 votes = 0;
    for (u32 l = 0; l < 32; l++)
      if (takes_part(m, l)) votes |= u32(*static_cast<const bool*>(m.in[l])) << l;
    for (u32 l = 0; l < 32; l++)
      if (takes_part(m, l)) *static_cast<u32*>(m.out[l]) = votes;
  });
  return out;
}

template <class T>
inline u32 match_any(Thread& self, int site, T value, u32 mask) {
  u32 out = 0;
  meet(self, site, mask, &value, &out, [](Meeting& m) {
    for (u32 l = 0; l < 32; l++) {
      if (!takes_part(m, l)) continue;
      u32 equal = 0;
      for (u32 k = 0; k < 32; k++)
        if (takes_part(m, k) && *static_cast<const T*>(m.in[k]) == *static_cast<const T*>(m.in[l])) equal |= 1u << k;
      *static_cast<u32*>(m.out[l]) = equal;
    }
  });
  return out;
}

template <auto OPERATION, class T>
inline T reduce_lanes(Thread& self, int site, T value, u32 mask) {
  T out{};
  meet(self, site, mask, &value, &out, [](Meeting& m) {
    T sum{};
    bool first = true;
    for (u32 l = 0; l < 32; l++) {
      if (!takes_part(m, l)) continue;
      const T v = *static_cast<const T*>(m.in[l]);
      sum = first ? v : OPERATION(sum, v);
      first = false;
    }
    for (u32 l = 0; l < 32; l++)
      if (takes_part(m, l)) *static_cast<T*>(m.out[l]) = sum;
  });
  return out;
}

inline void sync_warp(Thread& self, int site, u32 mask) {
  meet(self, site, mask, nullptr, nullptr, [](Meeting&) {}, true);
}

// ---- matrices ---------------------------------------------------------------------------------------------------

// N matrices of 8 x 8 16-bit elements; lane 8 i + r gives the address of row r of matrix i.
template <int N, bool TRANSPOSED>
inline std::array<u32, N> load_matrices(Thread& self, int site, Space space, u64 address) {
  struct Row {
    u16 element[8];
  } row{};
  if (self.lane < 8 * N)
    if (const u8* p = access(self, site, space, address, sizeof row, READ)) std::memcpy(&row, p, sizeof row);
  std::array<u32, N> out{};
  meet(self, site, 0xffffffffu, &row, &out, [](Meeting& m) {
    for (u32 l = 0; l < 32; l++)
      for (u32 i = 0; i < N; i++) {
        u32 pair = 0;
        for (u32 e = 0; e < 2; e++) {
          const u32 r = TRANSPOSED ? 2 * (l % 4) + e : l / 4, c = TRANSPOSED ? l / 4 : 2 * (l % 4) + e;
          pair |= u32(static_cast<const Row*>(m.in[8 * i + r])->element[c]) << 16 * e;
        }
        (*static_cast<std::array<u32, N>*>(m.out[l]))[i] = pair;
      }
  });
  return out;
}

struct tf32 {
  u32 bits;
};
template <class T>
inline auto operand_value(T v) {
  if constexpr (std::is_same_v<T, tf32>) return std::bit_cast<f32>(v.bits & ~0x1fffu);  // the unit ignores these bits
  else if constexpr (std::is_same_v<T, f64>) return v;
  else return f32(wide(v));
}

// c + a[0] b[0] + a[1] b[1] + .. as tensor cores add them, here those of sm_80 to sm_89, the least exact of which cuconv
// makes use (Fasi et al., PeerJ CS 7:e330; Khattak and Mikaitis, arXiv 2512.07004): products are exact; all addends are
// cut off, towards zero, one bit behind the last one that a float with the largest exponent among them has; their sum,
// exact then, is cut off to a float. A product's exponent is the sum of its factors'. sm_90 keeps two bits and adds twice
// as many products at once.
struct Factor {
  f32 value;
  int exponent;  // of zero far below all others

  Factor(f32 v = 0) : value(v), exponent(v ? std::ilogb(v) : -2000) {}
};
inline f64 power_of_two(int n) { return std::bit_cast<f64>(u64(n + 1023) << 52); }

template <int N>
inline f32 sum_of_products(Factor c, const Factor* a, const Factor* b) {
  f64 products[N], plain = c.value;
  int largest = c.exponent;
  for (int k = 0; k < N; k++) {
    products[k] = f64(a[k].value) * b[k].value;
    plain += products[k];
    largest = std::max(largest, a[k].exponent + b[k].exponent);
  }
  if (largest < -1000 || !std::isfinite(plain)) return plain;  // zeros with their signs, infinities, NaN
  const f64 units = power_of_two(24 - largest);
  s64 sum = s64(c.value * units);
  for (f64 product : products) sum += s64(product * units);
  const f64 exact = f64(sum) * power_of_two(largest - 24);
  const f32 near = exact;
  return std::isinf(near) || std::fabs(near) <= std::fabs(exact) ? near : neighbour(near, exact < 0);
}

// D [M, 8] = A [M, K] B [K, 8] + C [M, 8]; In: elements of A and B, Out: of C and D. With g = lane / 4, t = lane % 4
// and E elements of A in a register, all shapes share one layout:
//   A  register i, element e:  row g + 8 (i % (M / 8)), column E t + e + 4 E (i / (M / 8))
//   B  register i, element e:  row E t + e + 4 E i,     column g
//   D  element j:              row g + 8 (j / 2),       column 2 t + j % 2
template <class In, class Out, int M, int K>
struct Mma {
  static constexpr int E = sizeof(In) == 2 ? 2 : 1, ROWS = M / 8;
  std::array<In, M * K / 32> a;
  std::array<In, K * 8 / 32> b;
  std::array<Out, M * 8 / 32> c;

  static void combine(Meeting& m) {
    constexpr bool EXACT = std::is_same_v<In, f64>;  // one fused multiply-add after the other
    using Value = std::conditional_t<EXACT, f64, Factor>;
    Value a[M][K], b[8][K];
    std::conditional_t<EXACT, f64, f32> c[M][8];
    for (int l = 0; l < 32; l++) {
      const Mma& in = *static_cast<const Mma*>(m.in[l]);
      const int g = l / 4, t = l % 4;
      for (int n = 0; n < int(in.a.size()); n++) {
        const int i = n / E, e = n % E;
        a[g + 8 * (i % ROWS)][E * t + e + 4 * E * (i / ROWS)] = operand_value(in.a[n]);
      }
      for (int n = 0; n < int(in.b.size()); n++) b[g][E * t + n % E + 4 * E * (n / E)] = operand_value(in.b[n]);
      for (int j = 0; j < int(in.c.size()); j++) c[g + 8 * (j / 2)][2 * t + j % 2] = wide(in.c[j]);
    }
    constexpr int TOGETHER = std::min(K, 4 * E);
    for (int i = 0; i < M; i++)
      for (int j = 0; j < 8; j++)
        for (int k = 0; k < K; k += EXACT ? 1 : TOGETHER)
          if constexpr (EXACT) c[i][j] = std::fma(a[i][k], b[j][k], c[i][j]);
          else c[i][j] = sum_of_products<TOGETHER>(c[i][j], a[i] + k, b[j] + k);
    for (int l = 0; l < 32; l++) {
      auto& out = *static_cast<std::array<Out, M * 8 / 32>*>(m.out[l]);
      const int g = l / 4, t = l % 4;
      for (int j = 0; j < int(out.size()); j++) out[j] = narrow<Out>(f64(c[g + 8 * (j / 2)][2 * t + j % 2]));
    }
  }
};

// Fragments arrive as registers; their bits are the elements in order.
template <class In, class Out, int M, int K, class A, class B, class C>
inline C mma(Thread& self, int site, A a, B b, C c) {
  using Shape = Mma<In, Out, M, K>;
  const Shape in{std::bit_cast<decltype(Shape::a)>(a), std::bit_cast<decltype(Shape::b)>(b),
                 std::bit_cast<decltype(Shape::c)>(c)};
  decltype(Shape::c) out{};
  meet(self, site, 0xffffffffu, &in, &out, Shape::combine);
  return std::bit_cast<C>(out);
}

}  // namespace emulator
