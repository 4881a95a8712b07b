// Fixed-width vectors for one instruction level.
//
// Each level includes this file once, in a translation unit that has set OTLOSS_LEVEL (a namespace), OTLOSS_VECTOR_BYTES
// and the compiler's target before. All the code below is therefore compiled for that target, and no other level uses it.
//
// exp2(x) = 2^k 2^r, where k = round(x), |r| <= 1/2 and 2^r = 1 + r q(r). The polynomial q is near-minimax, by Chebyshev
// interpolation. Its relative error is 5e-9 at degree 6 and 9e-18 at degree 11. A result below the smallest normal number is
// 0. A large result saturates, at 2^127 or 2^1023. NaN stays NaN. Exponents carry the factor log2(e) from the start:
// exp(x/eps) = exp2(x log2(e)/eps).
#pragma once
#include "problem.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct Simd;

template <> struct Simd<float> {
  using I = int32_t;
  static constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits hold
  static constexpr float low = -127.f, high = 127.f;  // at `low` the bits of the exponent are 0, so the result is 0
  static constexpr int mantissa = 23, bias = 127, degree = 6;
  static constexpr float q[] = {0.69314718802622878f, 0.24022650760568127f, 0.055503571142190778f, 0.0096180825572778515f,
                                0.0013390863364671234f, 0.00015453162945120690f};
};
template <> struct Simd<double> {
  using I = int64_t;
  static constexpr double magic = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double low = -1023., high = 1023.;
  static constexpr int mantissa = 52, bias = 1023, degree = 11;
  static constexpr double q[] = {0.69314718055994530942,   0.2402265069591009822,     0.055504108664821594339,   0.0096181291076068885273,
                                 0.001333355814641693531,  0.00015403530441736050155, 0.000015252733829836118394, 1.3215442587921689653e-6,
                                 1.0178062445845773521e-7, 7.0725859492692236999e-9,  4.4549605981865183938e-10};
};
constexpr double log2e = 1.4426950408889634074, ln2 = 0.69314718055994530942;

template <class T> struct vec_of {
  typedef T type __attribute__((vector_size(OTLOSS_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(OTLOSS_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  typedef typename Simd<T>::I ints __attribute__((vector_size(OTLOSS_VECTOR_BYTES)));
};
template <class T> using vec = typename vec_of<T>::type;
template <class T> constexpr int lanes = OTLOSS_VECTOR_BYTES / int(sizeof(T));

#define OTLOSS_INLINE inline __attribute__((always_inline))

// Calls f(0), .., f(N - 1), written out with constant indices. An array of vectors that is indexed so stays in registers.
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

// N values, one for each row of a block, for arithmetic on the sums of the rows.
template <class T, int N> struct band_of {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// The sum of a vector's lanes, by halving. The order of the additions is fixed.
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

// One round of adding up several vectors at once. Each vector holds partial sums in groups of G lanes. The round halves every
// group.
template <class T, int G, size_t... L> OTLOSS_INLINE vec<T> halve(vec<T> a, vec<T> b, std::index_sequence<L...>) {
  constexpr int half = lanes<T> / 2;
  return __builtin_shufflevector(a, b, (L < half ? 0 : lanes<T>) + L % half / (G / 2) * G + L % (G / 2)...) +
         __builtin_shufflevector(a, b, (L < half ? 0 : lanes<T>) + L % half / (G / 2) * G + L % (G / 2) + G / 2 ...);
}
// out[k] = the sum of the lanes of v[k], for k < N. `out` has room for max(N, lanes) values. The order of the additions is fixed.
// This takes fewer steps than N single sums.
template <class T, int N, int G = lanes<T>> OTLOSS_INLINE void sums(vec<T>* v, T* out) {
  if constexpr (G == 1) {
    repeat<N>(OTLOSS_EACH(k) { store<T>(out + k * lanes<T>, v[k]); });
  } else {
    constexpr int left = N > 1 ? N / 2 : 1;
    repeat<left>(OTLOSS_EACH(k) {
      v[k] = halve<T, G>(v[N > 1 ? 2 * k : 0], v[N > 1 ? 2 * k + 1 : 0], std::make_index_sequence<lanes<T>>{});
    });
    sums<T, left, G / 2>(v, out);
  }
}

// Transposes a square of vectors: lane k of v[i] becomes lane i of v[k]. `exchange` is one step on two of the vectors.
template <class T, int W, size_t... L> OTLOSS_INLINE void exchange(vec<T>& a, vec<T>& b, std::index_sequence<L...>) {
  const vec<T> low = __builtin_shufflevector(a, b, (L & W ? lanes<T> + L - W : L)...);
  b = __builtin_shufflevector(a, b, (L & W ? lanes<T> + L : L + W)...);
  a = low;
}
template <class T, int W = lanes<T> / 2> OTLOSS_INLINE void transpose(vec<T>* v) {
  repeat<lanes<T>>(OTLOSS_EACH(i) {
    if constexpr ((i & W) == 0) exchange<T, W>(v[i], v[i + W], std::make_index_sequence<lanes<T>>{});
  });
  if constexpr (W > 1) transpose<T, W / 2>(v);
}

template <class T, int W, size_t... L> OTLOSS_INLINE vec<T> rotate(vec<T> v, std::index_sequence<L...>) {
  return __builtin_shufflevector(v, v, (L + W) % lanes<T>...);
}
template <class T, int W = lanes<T> / 2> OTLOSS_INLINE T max_of(vec<T> v) {
  if constexpr (W == 0) return v[0];
  else return max_of<T, W / 2>(max(rotate<T, W>(v, std::make_index_sequence<lanes<T>>{}), v));
}
template <class T> OTLOSS_INLINE T min_of(vec<T> v) { return -max_of<T>(-v); }

template <class T, int K> OTLOSS_INLINE vec<T> horner(vec<T> r) {
  if constexpr (K == Simd<T>::degree - 1) return splat<T>(Simd<T>::q[K]);
  else return horner<T, K + 1>(r) * r + Simd<T>::q[K];
}
template <class T> OTLOSS_INLINE vec<T> exp2(vec<T> x) {
  using S = Simd<T>;
  using I = typename vec_of<T>::ints;
  const vec<T> c = min(splat<T>(S::high), max(splat<T>(S::low), x)), t = c + S::magic, r = c - (t - S::magic);
  const I scale = ((I)t + S::bias) << S::mantissa;  // the shift drops the bits of the magic number itself
  return (horner<T, 0>(r) * r + T(1)) * (vec<T>)scale;
}

// 2^x and 2^x - 1, the latter to about an ulp of itself.
template <class T> OTLOSS_INLINE void exp2_less_one(vec<T> x, vec<T>& power, vec<T>& less) {
  using S = Simd<T>;
  using I = typename vec_of<T>::ints;
  const vec<T> c = min(splat<T>(S::high), max(splat<T>(S::low), x)), t = c + S::magic, r = c - (t - S::magic);
  const vec<T> scale = (vec<T>)(((I)t + S::bias) << S::mantissa), grown = scale * (horner<T, 0>(r) * r);
  power = grown + scale;
  less = grown + (scale - 1);
}

// sum_k u^(k - K) / (2 k + 1) for K <= k < Terms
template <class T, int Terms, int K = 0> OTLOSS_INLINE vec<T> odd_series(vec<T> u) {
  if constexpr (K == Terms - 1) return splat<T>(T(1. / (2 * K + 1)));
  else return odd_series<T, Terms, K + 1>(u) * u + T(1. / (2 * K + 1));
}
// log2(x) of a positive normal number, by the series of log((1 + t)/(1 - t)) for a mantissa in [sqrt(1/2), sqrt(2)): absolute
// error 3e-8 with 5 terms. Other arguments give some finite number. `fine` terms leave only rounding.
template <class T> constexpr int fine = sizeof(T) == 4 ? 5 : 11;
template <class T, int Terms = 5> OTLOSS_INLINE vec<T> log2(vec<T> x) {
  using S = Simd<T>;
  using I = typename vec_of<T>::ints;
  const I bits = (I)x, fraction = bits & ((typename S::I(1) << S::mantissa) - 1);
  const vec<T> whole = (vec<T>)(fraction | (I{} + (typename S::I(S::bias) << S::mantissa)));
  const I upper = whole > T(1.4142135), exponent = ((bits >> S::mantissa) & (2 * S::bias + 1)) - S::bias - upper;  // true is -1
  const vec<T> m = upper ? whole * T(0.5) : whole, t = (m - 1) / (m + 1), u = t * t;
  return __builtin_convertvector(exponent, vec<T>) + t * T(2 / ln2) * odd_series<T, Terms>(u);
}

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
