// Fixed-width vectors for one instruction level.
//
// Included once per level, inside a translation unit that has set OTLOSS_LEVEL (a namespace), OTLOSS_VECTOR_BYTES and
// the compiler's target beforehand; everything below therefore compiles for that target and nothing leaks to another.
//
// exp(x) = 2^k exp(r) with k = round(x / ln 2), r = x - k ln 2 in two parts, |r| <= ln 2 / 2, and exp(r) by its Taylor
// series (degree 7: 5e-9; degree 13: 4e-18). Below the smallest normal number the result is 0, above the largest it
// saturates (e^88 or e^709), NaN stays NaN.
#pragma once
#include "problem.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct Simd;

template <> struct Simd<float> {
  using I = int32_t;
  static constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  static constexpr float low = -87.3f, high = 88.f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr int mantissa = 23, bias = 127, degree = 7;
};
template <> struct Simd<double> {
  using I = int64_t;
  static constexpr double magic = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double low = -708.3, high = 709., ln2_hi = 6.93145751953125e-1, ln2_lo = 1.42860682030941723212e-6;
  static constexpr int mantissa = 52, bias = 1023, degree = 13;
};

template <class T> struct vec_of {
  typedef T type __attribute__((vector_size(OTLOSS_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(OTLOSS_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  typedef typename Simd<T>::I ints __attribute__((vector_size(OTLOSS_VECTOR_BYTES)));
};
template <class T> using vec = typename vec_of<T>::type;
template <class T> constexpr int lanes = OTLOSS_VECTOR_BYTES / sizeof(T);

#define OTLOSS_INLINE inline __attribute__((always_inline))

// f(0), .., f(N - 1) written out, with constant indices: an array of vectors so indexed stays in registers.
template <int N, int K = 0, class F> OTLOSS_INLINE void repeat(F f) {
  if constexpr (K < N) {
    f(std::integral_constant<int, K>{});
    repeat<N, K + 1>(f);
  }
}
#define OTLOSS_EACH(index) [&](auto index) __attribute__((always_inline))

template <class T> OTLOSS_INLINE vec<T> load(const T* p) { return *reinterpret_cast<const typename vec_of<T>::unaligned*>(p); }
template <class T> OTLOSS_INLINE void store(T* p, vec<T> v) { *reinterpret_cast<typename vec_of<T>::unaligned*>(p) = v; }
template <class T> OTLOSS_INLINE vec<T> splat(T s) { return s - vec<T>{}; }
template <class V> OTLOSS_INLINE V max(V a, V b) { return a > b ? a : b; }  // b where either is NaN
template <class V> OTLOSS_INLINE V min(V a, V b) { return a < b ? a : b; }

// Horizontal sum by halving: a fixed order.
template <class T, int N> struct Halve {
  typedef T V __attribute__((vector_size(N * sizeof(T))));
  typedef T H __attribute__((vector_size(N / 2 * sizeof(T))));
  static OTLOSS_INLINE T sum(V v) {
    H lo, hi;
    __builtin_memcpy(&lo, &v, sizeof(H));
    __builtin_memcpy(&hi, reinterpret_cast<char*>(&v) + sizeof(H), sizeof(H));
    return Halve<T, N / 2>::sum(lo + hi);
  }
};
template <class T> struct Halve<T, 2> {
  typedef T V __attribute__((vector_size(2 * sizeof(T))));
  static OTLOSS_INLINE T sum(V v) { return v[0] + v[1]; }
};
template <class T> OTLOSS_INLINE T sum(vec<T> v) { return Halve<T, lanes<T>>::sum(v); }

template <class T> OTLOSS_INLINE T max_of(vec<T> v) {
  T x = v[0];
  for (int i = 1; i < lanes<T>; ++i) x = x > v[i] ? x : v[i];
  return x;
}
template <class T> OTLOSS_INLINE T min_of(vec<T> v) { return -max_of<T>(-v); }

template <class T> constexpr T inverse_factorial(int k) {
  T r = 1;
  for (int i = 2; i <= k; ++i) r /= i;
  return r;
}
template <class T, int K> OTLOSS_INLINE vec<T> taylor(vec<T> r) {  // sum_{k >= K} r^(k-K) / k!, up to the degree
  if constexpr (K == Simd<T>::degree) return splat<T>(inverse_factorial<T>(K));
  else return taylor<T, K + 1>(r) * r + inverse_factorial<T>(K);
}
template <class T> OTLOSS_INLINE vec<T> exp(vec<T> x) {
  using S = Simd<T>;
  using I = typename vec_of<T>::ints;
  const vec<T> c = min(splat<T>(S::high), x), t = c * T(1.4426950408889634) + S::magic, k = t - S::magic;
  const vec<T> y = taylor<T, 0>((c - k * S::ln2_hi) - k * S::ln2_lo);
  const I scale = ((I)t + S::bias) << S::mantissa;  // the magic number's own bits are shifted out
  return x < splat<T>(S::low) ? vec<T>{} : y * (vec<T>)scale;
}
template <class T> OTLOSS_INLINE T exp(T x) { return exp<T>(splat<T>(x))[0]; }

template <class T> OTLOSS_INLINE T dot(const T* x, const T* y, int n) {  // n is a multiple of the lanes
  vec<T> s0{}, s1{};
  int j = 0;
  for (; j + 2 * lanes<T> <= n; j += 2 * lanes<T>) {
    s0 += load(x + j) * load(y + j);
    s1 += load(x + j + lanes<T>) * load(y + j + lanes<T>);
  }
  if (j < n) s0 += load(x + j) * load(y + j);
  return sum<T>(s0 + s1);
}

}  // namespace otloss::OTLOSS_LEVEL
