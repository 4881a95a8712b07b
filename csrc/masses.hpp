// The masses of one side of one problem, as they were given: normalised to total 1, and the way back from the gradient by them.
//
// Masses m of total M become a = m / M, logarithms l become a = softmax(l). From h, the gradient by a,
//   dm = (h - <a, h>) / M,   dl = a (h - <a, h>).
// Totals are summed in float64, in an order that the number of points fixes.
#pragma once
#include "simd.hpp"

namespace otloss::OTLOSS_LEVEL {

// The sum of f(0), .., f(n - 1) in float64: eight sums of every eighth term, then their sum.
template <class F> OTLOSS_INLINE double sum_of(int n, F f) {
  double part[8] = {};
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) part[k] += f(i + k);
  for (int k = 0; i < n; ++i, ++k) part[k] += f(i);
  return ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
}

// exp(x) for x <= 0 to about an ulp. exp2 alone would multiply the rounding of x log2(e) by x: here k = round(x log2(e)), and
// x - k ln2 is computed with ln2 in two parts, the first of so few bits that k times it is exact.
template <class T> struct Ln2;
template <> struct Ln2<float> { static constexpr float high = 0.693359375f, low = -2.12194440e-4f; };
template <> struct Ln2<double> { static constexpr double high = 6.93147180369123816490e-1, low = 1.90821492927058770002e-10; };
template <class T> OTLOSS_INLINE vec<T> exp_below(vec<T> x) {
  using S = Simd<T>;
  const vec<T> c = max(splat<T>(2 * S::low), x), k = (c * T(log2e) + S::magic) - S::magic;
  const vec<T> y = exp2<T>(((c - k * Ln2<T>::high) - k * Ln2<T>::low) * T(log2e)) * exp2<T>(k);
  return x == x ? y : x;
}

template <class T> Sound normalise(const T* given, Form form, int n, T* out, double& log_total) {
  if (form == Form::uniform) {
    std::memcpy(out, given, sizeof(T) * n);
    return Sound::all_live;
  }
  const bool logs = form == Form::logs;
  double total, peak = 0;
  T least = 1;
  if (logs) {
    T largest = given[0];
    for (int i = 1; i < n; ++i) largest = given[i] > largest ? given[i] : largest;
    peak = largest;
    T block[lanes<T>];
    for (int i = 0; i < n; i += lanes<T>) {
      const int count = n - i < lanes<T> ? n - i : lanes<T>;
      for (int k = 0; k < lanes<T>; ++k) block[k] = k < count ? given[i + k] - largest : T(0);
      store<T>(block, exp_below<T>(load(block)));
      std::memcpy(out + i, block, sizeof(T) * count);
    }
    total = sum_of(n, OTLOSS_EACH(i) { return double(out[i]); });
  } else {
    for (int i = 0; i < n; ++i) {
      least = given[i] < least ? given[i] : least;
      out[i] = given[i];
    }
    total = sum_of(n, OTLOSS_EACH(i) { return double(given[i]); });
  }
  log_total = peak + std::log(total);
  const double inverse = 1 / total;
  bool all_live = true;
  for (int i = 0; i < n; ++i) {
    const T share = T(double(out[i]) * inverse);
    const bool live = share > dead_mass<T>;
    all_live = all_live && live;
    out[i] = live ? share : T(0);
  }
  const bool valid = least >= 0 && std::isfinite(log_total) && std::isfinite(T(total));
  return !valid ? Sound::invalid : all_live ? Sound::all_live : Sound::some_dead;
}

template <class T> void by_given(const T* given, Form form, int n, const T* a, const T* by_a, T* out) {
  const double mean = sum_of(n, OTLOSS_EACH(i) { return double(a[i]) * double(by_a[i]); });
  const double scale = form == Form::logs ? 1 : 1 / sum_of(n, OTLOSS_EACH(i) { return double(given[i]); });
  for (int i = 0; i < n; ++i) out[i] = T((double(by_a[i]) - mean) * (form == Form::logs ? double(a[i]) : scale));
}

}  // namespace otloss::OTLOSS_LEVEL
