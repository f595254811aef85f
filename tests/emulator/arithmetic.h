// arithmetic.h -- values of PTX: types, conversions, and every operation that has no side effect.
//
// 16-bit floats are computed in double and rounded once. The sum of an exact product and a third number does not fit in
// a double; it is rounded to odd there, after which a second rounding to fewer than 52 bits gives the correct result.

#pragma once
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace emulator {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f16 = _Float16;
using f32 = float;
using f64 = double;
struct bf16 {
  u16 bits;
};
template <class H>
struct Packed {
  H low, high;
};
using f16x2 = Packed<f16>;
using bf16x2 = Packed<bf16>;

template <class T>
constexpr bool is_half = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T>
constexpr bool is_float = is_half<T> || std::is_floating_point_v<T>;
template <int BYTES>
using bits_of = std::conditional_t<BYTES <= 2, std::conditional_t<BYTES == 1, u8, u16>,
                                   std::conditional_t<BYTES == 4, u32, u64>>;

// The same bits as another type; integers are truncated, or extended by their own sign.
template <class To, class From>
inline To as(From v) {
  if constexpr (std::is_same_v<To, From>) return v;
  else if constexpr (std::is_integral_v<To> && std::is_integral_v<From>) return static_cast<To>(v);
  else if constexpr (std::is_integral_v<From>) return std::bit_cast<To>(static_cast<bits_of<sizeof(To)>>(v));
  else return as<To>(std::bit_cast<bits_of<sizeof(From)>>(v));
}

// ---- floats -----------------------------------------------------------------------------------------------------

enum Rounding { NEAREST, TO_ZERO, DOWN, UP };

inline f64 wide(f64 v) { return v; }
inline f64 wide(f32 v) { return v; }
inline f64 wide(f16 v) { return v; }
inline f64 wide(bf16 v) { return std::bit_cast<f32>(u32(v.bits) << 16); }

// a + b, rounded to odd when it is not exact.
inline f64 add_to_odd(f64 a, f64 b) {
  const f64 sum = a + b, other = sum - a;
  const f64 lost = (a - (sum - other)) + (b - other);
  const u64 bits = std::bit_cast<u64>(sum);
  if (lost == 0 || !std::isfinite(sum) || !std::isfinite(lost) || (bits & 1)) return sum;
  return std::bit_cast<f64>((lost > 0) == (sum > 0) ? bits + 1 : bits - 1);
}

// The number of T next to r, away from zero or towards it; infinity and the largest number are neighbours.
template <class T>
inline T neighbour(T r, bool up) {
  using Bits = bits_of<sizeof(T)>;
  const Bits bits = std::bit_cast<Bits>(r), sign = Bits(1) << (8 * sizeof(T) - 1);
  if (!(bits & ~sign)) return std::bit_cast<T>(Bits(up ? 1 : sign | 1));
  return std::bit_cast<T>(Bits(up == !(bits & sign) ? bits + 1 : bits - 1));
}

// `near`, the nearest number of T to v, made the neighbour that the rounding asks for.
template <Rounding R, class T>
inline T direct(T near, long double v) {
  const long double n = wide(near);
  if (R == NEAREST || std::isnan(v) || std::isinf(v) || n == v) return near;
  const bool up = R == UP || (R == TO_ZERO && v < 0);
  return up ? n < v ? neighbour(near, true) : near : n > v ? neighbour(near, false) : near;
}

template <class T>
inline T narrow(f64 v);
template <class T, Rounding R>
inline T narrow_directed(f64 v) {
  return direct<R>(narrow<T>(v), v);
}

template <class T>
inline T narrow(f64 v) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (std::isnan(v)) return {0x7fff};
    u32 bits = std::bit_cast<u32>(direct<TO_ZERO>(static_cast<f32>(v), v));
    if (f64(std::bit_cast<f32>(bits)) != v) bits |= 1;
    return {u16((u64(bits) + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    return static_cast<T>(v);
  }
}

// Subnormal numbers become zero; bfloat16 has the exponents of float.
template <class T>
inline T flush(T v) {
  const f64 w = wide(v);
  const f64 least = std::is_same_v<T, f16> ? 0x1p-14 : std::is_same_v<T, f64> ? 0x1p-1022 : 0x1p-126;
  return std::fabs(w) < least ? narrow<T>(std::copysign(0., w)) : v;
}

template <class T>
inline T saturate(T v) {
  const f64 w = wide(v);
  return narrow<T>(w > 0 ? (w < 1 ? w : 1.) : 0.);
}
template <class T>
inline T relu(T v) {
  return wide(v) < 0 ? narrow<T>(0.) : v;
}

// tf32 keeps 10 of the 23 bits of the fraction.
template <bool TIES_AWAY>
inline u32 round_tf32(f32 v) {
  const u32 bits = std::bit_cast<u32>(v);
  if (!std::isfinite(v)) return bits;
  return (bits + (TIES_AWAY ? 0x1000 : 0xfff + (bits >> 13 & 1))) & ~0x1fffu;
}

// ---- arithmetic -------------------------------------------------------------------------------------------------

// Integers wrap around: computed without a sign in 64 bits.
template <class T>
inline T add(T a, T b) {
  if constexpr (std::is_integral_v<T>) return T(u64(a) + u64(b));
  else if constexpr (is_half<T>) return narrow<T>(wide(a) + wide(b));
  else return a + b;
}
template <class T>
inline T sub(T a, T b) {
  if constexpr (std::is_integral_v<T>) return T(u64(a) - u64(b));
  else if constexpr (is_half<T>) return narrow<T>(wide(a) - wide(b));
  else return a - b;
}
template <class T>
inline T mul(T a, T b) {
  if constexpr (std::is_integral_v<T>) return T(u64(a) * u64(b));
  else if constexpr (is_half<T>) return narrow<T>(wide(a) * wide(b));
  else return a * b;
}
template <class T>
inline T fma(T a, T b, T c) {
  if constexpr (is_half<T>) return narrow<T>(add_to_odd(wide(a) * wide(b), wide(c)));
  else return std::fma(a, b, c);
}
template <Rounding R>
inline f32 fma_directed(f32 a, f32 b, f32 c) {
  return narrow_directed<f32, R>(add_to_odd(f64(a) * b, c));
}

// a + b or a - b with the carry that came in; the carry that goes out is in `carry`.
template <bool SUBTRACT, class T>
inline T with_carry(T a, T b, bool in, bool& carry) {
  using Wide = unsigned __int128;
  const Wide sum = SUBTRACT ? Wide(a) - b - in : Wide(a) + b + in;
  carry = sum >> (8 * sizeof(T)) & 1;
  return T(sum);
}

template <class T>
struct Double;
template <>
struct Double<u16> { using type = u32; };
template <>
struct Double<s16> { using type = s32; };
template <>
struct Double<u32> { using type = u64; };
template <>
struct Double<s32> { using type = s64; };
template <>
struct Double<u64> { using type = unsigned __int128; };
template <>
struct Double<s64> { using type = __int128; };

template <class T>
inline auto mul_wide(T a, T b) {
  using D = typename Double<T>::type;
  return D(a) * D(b);
}
template <class T>
inline T mul_high(T a, T b) {
  return T(mul_wide(a, b) >> (8 * sizeof(T)));
}

template <class T>
inline T div(T a, T b) {
  if constexpr (!std::is_integral_v<T>) return a / b;
  else if (b == 0) return T(-1);
  else return std::is_signed_v<T> && b == T(-1) ? T(0 - u64(a)) : T(a / b);
}
template <class T>
inline T rem(T a, T b) {
  return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}
template <class T>
inline T neg(T a) {
  if constexpr (std::is_integral_v<T>) return T(0 - u64(a));
  else if constexpr (is_half<T>) return as<T>(u16(as<u16>(a) ^ 0x8000));
  else return -a;
}
template <class T>
inline T abs(T a) {
  if constexpr (std::is_integral_v<T>) return a < 0 ? neg(a) : a;
  else if constexpr (is_half<T>) return as<T>(u16(as<u16>(a) & 0x7fff));
  else return std::fabs(a);
}

// A number wins over NaN, and +0 over -0 in max, as PTX defines it.
template <bool MAXIMUM, bool NAN_WINS, class T>
inline T extremum(T a, T b) {
  if constexpr (std::is_integral_v<T>) return (a < b) == MAXIMUM ? b : a;
  else {
    const f64 x = wide(a), y = wide(b);
    if (std::isnan(x) || std::isnan(y)) {
      if (NAN_WINS || (std::isnan(x) && std::isnan(y))) return narrow<T>(std::numeric_limits<f64>::quiet_NaN());
      return std::isnan(x) ? b : a;
    }
    if (x == y) return std::signbit(x) == MAXIMUM ? b : a;
    return (x < y) == MAXIMUM ? b : a;
  }
}
template <class T>
inline T min(T a, T b) { return extremum<false, false>(a, b); }
template <class T>
inline T max(T a, T b) { return extremum<true, false>(a, b); }
template <class T>
inline T min_nan(T a, T b) { return extremum<false, true>(a, b); }
template <class T>
inline T max_nan(T a, T b) { return extremum<true, true>(a, b); }

inline f64 upper_half(f64 v) { return std::bit_cast<f64>(std::bit_cast<u64>(v) >> 32 << 32); }
template <class T>
inline T rcp(T a) { return T(1) / a; }
template <class T>
inline T sqrt(T a) { return std::sqrt(a); }
template <class T>
inline T rsqrt(T a) { return T(1 / std::sqrt(f64(a))); }
template <class T>
inline T ex2(T a) { return narrow<T>(std::exp2(wide(a))); }
inline f32 lg2(f32 a) { return std::log2(a); }
inline f32 sin(f32 a) { return std::sin(a); }
inline f32 cos(f32 a) { return std::cos(a); }
template <class T>
inline T tanh(T a) { return narrow<T>(std::tanh(wide(a))); }
template <class T>
inline T copysign(T sign, T value) { return std::copysign(value, sign); }

// ---- bits -------------------------------------------------------------------------------------------------------

// A shift by the width or more gives 0, or the sign.
template <class T>
inline T shl(T a, u32 by) { return by >= 8 * sizeof(T) ? T(0) : T(u64(a) << by); }
template <class T>
inline T shr(T a, u32 by) { return by >= 8 * sizeof(T) ? T(a < 0 ? -1 : 0) : T(a >> by); }

template <bool RIGHT, bool WRAP>
inline u32 funnel(u32 low, u32 high, u32 by) {
  by = WRAP ? by & 31 : by < 32 ? by : 32;
  const u64 both = u64(high) << 32 | low;
  return u32(RIGHT ? both >> by : both << by >> 32);
}
inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 r = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
inline u32 prmt(u32 a, u32 b, u32 selector) {
  const u64 both = u64(b) << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    const u32 s = selector >> 4 * i & 15;
    u32 byte = both >> 8 * (s & 7) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * i;
  }
  return r;
}
template <class T>
inline T mask_of(u32 length) { return length >= 8 * sizeof(T) ? T(-1) : T((u64(1) << length) - 1); }
template <class T>
inline T bfi(T insert, T into, u32 at, u32 length) {
  const T mask = shl(mask_of<T>(length & 255), at & 255);
  return T((into & ~mask) | (shl(insert, at & 255) & mask));
}
template <class T>
inline T bfe(T a, u32 at, u32 length) {
  at &= 255, length &= 255;
  using U = std::make_unsigned_t<T>;
  U field = U(shr(U(a), at) & mask_of<U>(length));
  const u32 top = at + length - 1, width = 8 * sizeof(T);
  if (std::is_signed_v<T> && length && length < width && shr(U(a), top < width ? top : width - 1) & 1)
    field |= U(~mask_of<U>(length));
  return T(field);
}
template <class T>
inline u32 popc(T a) { return u32(std::popcount(a)); }
template <class T>
inline u32 clz(T a) { return u32(std::countl_zero(a)); }
// Position of the highest bit that differs from the sign, or -1; SHIFT: of how far it is from the top.
template <bool SHIFT, class T>
inline u32 bfind(T a) {
  using U = std::make_unsigned_t<T>;
  const U bits = std::is_signed_v<T> && a < 0 ? U(~U(a)) : U(a);
  if (bits == 0) return 0xffffffffu;
  return SHIFT ? u32(std::countl_zero(bits)) : u32(8 * sizeof(T) - 1 - std::countl_zero(bits));
}
inline u32 brev(u32 a) {
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i);
  return r;
}
inline u64 brev(u64 a) { return u64(brev(u32(a))) << 32 | brev(u32(a >> 32)); }

// ---- comparison and conversion ----------------------------------------------------------------------------------

template <class T>
inline bool is_normal(T a) { return std::isnormal(a); }
template <class T>
inline bool is_subnormal(T a) { return std::fpclassify(a) == FP_SUBNORMAL; }

enum Comparison { EQ, NE, LT, LE, GT, GE };

template <Comparison C, bool UNORDERED, class T>
inline bool compare(T a, T b) {
  const auto test = [](auto x, auto y) {
    return C == EQ ? x == y : C == NE ? x != y : C == LT ? x < y : C == LE ? x <= y : C == GT ? x > y : x >= y;
  };
  if constexpr (is_float<T>) {
    const f64 x = wide(a), y = wide(b);
    return std::isnan(x) || std::isnan(y) ? UNORDERED : test(x, y);
  } else {
    return test(a, b);
  }
}

template <class To, class From>
inline To clamp(From v) {
  using L = std::numeric_limits<To>;
  const __int128 low = L::min(), high = L::max(), w = v;
  return To(w < low ? low : w > high ? high : w);
}

template <Rounding R>
inline f64 to_integer(f64 v) {
  return R == NEAREST ? std::nearbyint(v) : R == TO_ZERO ? std::trunc(v) : R == DOWN ? std::floor(v) : std::ceil(v);
}

// Float to integer: NaN gives 0, a value outside of the range its nearest end.
template <class To, Rounding R, class From>
inline To integer_from(From v) {
  using L = std::numeric_limits<To>;
  const f64 w = to_integer<R>(wide(v));
  if (std::isnan(w)) return 0;
  if (w <= f64(L::min())) return L::min();
  return w >= f64(L::max()) ? L::max() : To(w);
}

template <class To, Rounding R = NEAREST, class From>
inline To float_from(From v) {
  if constexpr (is_float<From>) return narrow_directed<To, R>(wide(v));
  else if constexpr (is_half<To>) return narrow_directed<To, R>(f64(v));
  else return direct<R>(To(v), (long double)v);
}

// An operation on both halves of a packed register.
template <class F, class P, class... More>
inline P both(F f, P first, More... more) {
  return {f(first.low, more.low...), f(first.high, more.high...)};
}

}  // namespace emulator
