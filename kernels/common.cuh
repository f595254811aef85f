// common.cuh -- what every kernel file shares: the dimension key, the types of elements and sums, vector accesses.
//
// Dimension key (all kernel files, all comments)
//   B batch            C input channels     F filters (output channels)     G groups     M depth multiplier
//   L | H W | D H W    input positions      P | P Q | Z P Q  output positions
//   R | R S | T R S    filter taps
// Tile constants: first letter = level (B block, W warp, T thread), second = dimension.
//
// Header-free CUDA C: NVRTC needs no include path. Built-in types and math functions only.

#pragma once

#include "ptx.cuh"

__device__ __forceinline__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ __forceinline__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ constexpr int larger(int a, int b) { return a < b ? b : a; }

// 0 <= at < size, in one comparison.
__device__ __forceinline__ bool within(int at, int size) { return unsigned(at) < unsigned(size); }
__device__ __forceinline__ bool within(long long at, long long size) {
  return (unsigned long long)at < (unsigned long long)size;
}

template <bool CONDITION, class Then, class Else>
struct choose {
  using type = Then;
};
template <class Then, class Else>
struct choose<false, Then, Else> {
  using type = Else;
};
template <bool CONDITION, class Then, class Else>
using conditional = typename choose<CONDITION, Then, Else>::type;

// ---- elements ---------------------------------------------------------------------------------------------------
// The types of cuconv/plan/types.py::ELEMENTS. 16-bit elements are summed in float.

struct half_t {
  unsigned short bits;
};
struct bfloat_t {
  unsigned short bits;
};
template <class R>
struct alignas(2 * sizeof(R)) complex_t {
  R re, im;
};

template <class E>
struct sum_of {
  using type = E;
};
template <>
struct sum_of<half_t> {
  using type = float;
};
template <>
struct sum_of<bfloat_t> {
  using type = float;
};
template <class E>
using Sum = typename sum_of<E>::type;

template <class E>
__device__ __forceinline__ E widen(E v) { return v; }
__device__ __forceinline__ float widen(half_t v) { return ptx::float_from_half(v.bits); }
__device__ __forceinline__ float widen(bfloat_t v) { return __uint_as_float(unsigned(v.bits) << 16); }

// The nearest element, ties to even.
template <class E>
__device__ __forceinline__ E narrow(Sum<E> v) { return v; }
template <>
__device__ __forceinline__ half_t narrow<half_t>(float v) { return {ptx::half_from_float(v)}; }
template <>
__device__ __forceinline__ bfloat_t narrow<bfloat_t>(float v) { return {ptx::bfloat_from_float(v)}; }

// acc += a * b, fused.
__device__ __forceinline__ void multiply_add(float& acc, float a, float b) { acc = fmaf(a, b, acc); }
__device__ __forceinline__ void multiply_add(double& acc, double a, double b) { acc = fma(a, b, acc); }
template <class R>
__device__ __forceinline__ void multiply_add(complex_t<R>& acc, complex_t<R> a, complex_t<R> b) {
  multiply_add(acc.re, a.re, b.re);
  multiply_add(acc.im, a.re, b.im);
  multiply_add(acc.re, -a.im, b.im);
  multiply_add(acc.im, a.im, b.re);
}

template <class R>
__device__ __forceinline__ R add(R a, R b) { return a + b; }
template <class R>
__device__ __forceinline__ complex_t<R> add(complex_t<R> a, complex_t<R> b) { return {a.re + b.re, a.im + b.im}; }

// The conjugate; of a real number the number.
template <class R>
__device__ __forceinline__ R conjugate(R a) { return a; }
template <class R>
__device__ __forceinline__ complex_t<R> conjugate(complex_t<R> a) { return {a.re, -a.im}; }

// ---- vectors ----------------------------------------------------------------------------------------------------

template <class E, int N>
struct alignas(sizeof(E) * N) Vector {
  E at[N];
};

template <int BYTES>
struct word_of;
template <>
struct word_of<2> {
  using type = unsigned short;
};
template <>
struct word_of<4> {
  using type = unsigned;
};
template <>
struct word_of<8> {
  using type = uint2;
};
template <>
struct word_of<16> {
  using type = uint4;
};

// One access of N elements, at most 16 bytes. `from` is aligned to that; memory that this kernel does not write.
template <int N, class E>
__device__ __forceinline__ Vector<E, N> load(const E* from) {
  using Word = typename word_of<sizeof(E) * N>::type;
  const Word word = __ldg(reinterpret_cast<const Word*>(from));
  Vector<E, N> v;
  memcpy(&v, &word, sizeof v);
  return v;
}

// The same where `inside` holds, otherwise zeros; all bits zero are the number 0 in every type.
template <int N, class E>
__device__ __forceinline__ Vector<E, N> load_or_zero(const E* from, bool inside) {
  using Word = typename word_of<sizeof(E) * N>::type;
  Word word{};
  if (inside) word = __ldg(reinterpret_cast<const Word*>(from));
  Vector<E, N> v;
  memcpy(&v, &word, sizeof v);
  return v;
}

// The same from memory that this kernel writes too, such as shared memory.
template <int N, class E>
__device__ __forceinline__ Vector<E, N> read(const E* from) {
  using Word = typename word_of<sizeof(E) * N>::type;
  const Word word = *reinterpret_cast<const Word*>(from);
  Vector<E, N> v;
  memcpy(&v, &word, sizeof v);
  return v;
}

template <int N, class E>
__device__ __forceinline__ void store(E* to, const Vector<E, N>& v) {
  using Word = typename word_of<sizeof(E) * N>::type;
  Word word;
  memcpy(&word, &v, sizeof v);
  *reinterpret_cast<Word*>(to) = word;
}
