// The passes over an (n, m) matrix that solve, adjoint and unroll share.
//
//   sweep     s = K v and, with weights w_i made from s_i, acc = K' w: one read of K, since a block of rows is still in
//             the first-level cache when its share of K' w is added. A Sinkhorn iteration and a CG step are each one sweep.
//   log_rows  f_i = -eps log sum_j b_j exp((g_j - C_ij)/eps)   a half-step in the log-domain, for every row, dead or not
//   log_cols  g_j = -eps log sum_i a_i exp((f_i - C_ij)/eps)   likewise for every column
#pragma once
#include "cost.hpp"

namespace otloss::OTLOSS_LEVEL {

// weight(i0, s, w) turns the `block` row sums s into row weights w. acc must be zero on entry. Sweeps that follow each other
// go `up` and down in turn: a matrix a little larger than the cache is then found there for the most part, not missed throughout.
template <class T, class Weight>
OTLOSS_INLINE void sweep(const T* K, int rows, int cols, int ld, bool up, const T* v, T* acc, Weight weight) {
  for (int step = 0; step < rows; step += block) {
    const int i0 = up ? rows - block - step : step;
    const T* k = K + size_t(i0) * ld;
    vec<T> part[block] = {};
    for (int j = 0; j < cols; j += lanes<T>) {
      const vec<T> x = load(v + j);
      repeat<block>(OTLOSS_EACH(r) { part[r] += load(k + r * size_t(ld) + j) * x; });
    }
    T s[block], w[block];
    repeat<block>(OTLOSS_EACH(r) { s[r] = sum<T>(part[r]); });
    weight(i0, s, w);
    vec<T> u[block];
    repeat<block>(OTLOSS_EACH(r) { u[r] = splat<T>(w[r]); });
    for (int j = 0; j < cols; j += lanes<T>) {
      vec<T> total[2] = {load(acc + j), {}};  // two chains
      repeat<block>(OTLOSS_EACH(r) { total[r % 2] += load(k + r * size_t(ld) + j) * u[r]; });
      store<T>(acc + j, total[0] + total[1]);
    }
  }
}

template <class T> OTLOSS_INLINE vec<T> exponent(const T* c, const T* g, int j, T f, T inverse_eps) {
  return ((f + load(g + j)) - load(c + j)) * inverse_eps;
}

// The largest exponent that a pair with mass can have; a pair without may have more, and 0 * e^bound is 0.
template <class T> constexpr T bound = sizeof(T) == 4 ? 60 : 600;

template <class T> void log_rows(const Cost<T>& cost, const T* g, const T* log_b, T* f) {
  const T ie = 1 / cost.p.eps;
  for (int i = 0; i < cost.n; ++i) {
    const T* c = cost.row(i);
    vec<T> top = splat<T>(-std::numeric_limits<T>::infinity()), total{};
    for (int j = 0; j < cost.cols; j += lanes<T>) top = max(exponent(c, g, j, T(0), ie) + load(log_b + j), top);
    const T peak = max_of<T>(top);
    for (int j = 0; j < cost.cols; j += lanes<T>) total += exp<T>(exponent(c, g, j, T(0), ie) + load(log_b + j) - peak);
    f[i] = -cost.p.eps * (peak + std::log(sum<T>(total)));
  }
}

// peak and total are scratch of `cols`.
template <class T> void log_cols(const Cost<T>& cost, const T* f, const T* log_a, T* g, T* peak, T* total) {
  const T ie = 1 / cost.p.eps, none = -std::numeric_limits<T>::infinity();
  for (int j = 0; j < cost.cols; ++j) peak[j] = none, total[j] = 0;
  for (int pass = 0; pass < 2; ++pass)
    for (int i = 0; i < cost.n; ++i) {
      if (log_a[i] == none) continue;
      const T* c = cost.row(i);
      for (int j = 0; j < cost.cols; j += lanes<T>) {
        const vec<T> z = (f[i] - load(c + j)) * ie + log_a[i], top = load(peak + j);
        if (pass == 0) store<T>(peak + j, max(z, top));
        else store<T>(total + j, load(total + j) + exp<T>(z - top));
      }
    }
  for (int j = 0; j < cost.m; ++j) g[j] = -cost.p.eps * (peak[j] + std::log(total[j]));
  for (int j = cost.m; j < cost.cols; ++j) g[j] = 0;
}

// log of a mass, -inf where there is none or in the padding. Returns whether a real entry is dead.
template <class T> bool log_masses(const T* mass, int count, int padded, T* out) {
  bool dead = false;
  for (int i = 0; i < padded; ++i) {
    const bool none = i >= count || mass[i] < dead_mass<T>;
    out[i] = none ? -std::numeric_limits<T>::infinity() : std::log(mass[i]);
    dead |= none && i < count;
  }
  return dead;
}

}  // namespace otloss::OTLOSS_LEVEL
