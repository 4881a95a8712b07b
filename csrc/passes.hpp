// The passes over an (n, m) matrix that solve, adjoint and unroll share.
//
//   sweep     s = K v and, with weights w_i made from s_i, acc = K' w: one read of K, since a block of rows is still in
//             the first-level cache when its share of K' w is added. A Sinkhorn iteration and a CG step are each one sweep.
//             Floor: n m sizeof(T) bytes at the rate of the cache that holds K, 2 n m fused multiply-adds.
//   log_rows  f_i = -eps log sum_j b_j exp((g_j - C_ij)/eps)   a half-step in the log-domain, for every row, dead or not
//   log_cols  g_j = -eps log sum_i a_i exp((f_i - C_ij)/eps)   likewise for every column
// Both give +inf to a point that is forbidden to every point with mass; no_reach makes it 0 where the point itself has none.
#pragma once
#include "cost.hpp"

namespace otloss::OTLOSS_LEVEL {

// Rows begin .. end - 1 of a sweep: weight(i0, s, w) turns the `block` row sums s into row weights w, and acc += K' w. Where two
// blocks fit in the first-level cache the next one is fetched while the shares of this one are added.
template <class T, class Weight>
OTLOSS_INLINE void sweep_rows(const T* K, int begin, int end, int cols, int ld, bool up, const T* v, T* acc, Weight weight) {
  const bool ahead = 2 * size_t(block) * ld * sizeof(T) <= 40 << 10;
  for (int step = 0; step < end - begin; step += block) {
    const int i0 = up ? end - block - step : begin + step;
    const T* k = K + i0 * std::ptrdiff_t(ld);
    vec<T> part[block] = {}, u[block];
    for (int j = 0; j < cols; j += lanes<T>) {
      const vec<T> x = load(v + j);
      repeat<block>(OTLOSS_EACH(r) { part[r] += load(k + r * size_t(ld) + j) * x; });
    }
    T s[pad_to<T>], w[block];
    sums<T, block>(part, s);
    weight(i0, s, w);
    repeat<block>(OTLOSS_EACH(r) { u[r] = splat<T>(w[r]); });
    const T* next = k + (up ? -block : block) * std::ptrdiff_t(ld);
    const auto add = [=](int j) __attribute__((always_inline)) {
      vec<T> total[2] = {load(acc + j), {}};  // two chains
      repeat<block>(OTLOSS_EACH(r) { total[r % 2] += load(k + r * size_t(ld) + j) * u[r]; });
      store<T>(acc + j, total[0] + total[1]);
    };
    if (ahead)
      for (int j = 0; j < cols; j += lanes<T>) {
        repeat<block>(OTLOSS_EACH(r) { __builtin_prefetch(next + r * size_t(ld) + j); });  // past the end it does nothing
        add(j);
      }
    else
      for (int j = 0; j < cols; j += lanes<T>) add(j);
    poll_after_block(int64_t(block) * cols);
  }
}

// Adds to acc, which holds the share of part 0, the shares of parts 1, 2, .. that lie behind it, in this order.
template <class T> void add_parts(T* acc, int count, int cols) {
  for (int part = 1; part < count; ++part)
    for (int j = 0; j < cols; j += lanes<T>) store<T>(acc + j, load(acc + j) + load(acc + size_t(part) * cols + j));
}

// acc = K' w, in the first `cols` of parts.count x cols. Sweeps that follow each other go `up` and down in turn: a matrix a
// little larger than the cache is then found there for the most part, not missed throughout.
template <class T, class Weight>
OTLOSS_INLINE void sweep(const Team& team, const Cost<T>& cost, const T* K, bool up, const T* v, T* acc, Weight weight) {
  const Parts parts = cost.parts;
  const int cols = cost.cols, ld = cost.ld;
  team.each(parts.count, [=](int step) {
    const int part = up ? parts.count - 1 - step : step;
    T* share = acc + size_t(part) * cols;
    std::memset(share, 0, sizeof(T) * cols);
    sweep_rows(K, parts.begin(part), parts.end(part), cols, ld, up, v, share, weight);
  });
  add_parts(acc, parts.count, cols);
}

template <class T> OTLOSS_INLINE vec<T> exponent(const T* c, const T* g, int j, T f, T scale) {
  return ((f + load(g + j)) - load(c + j)) * scale;
}

// exp(x / eps) = exp2(x * scale)
template <class T> T exponent_scale(T eps) { return T(log2e / double(eps)); }

// The largest exponent (of 2) that a pair with mass can have; a pair without may have more, and 0 * 2^bound is 0.
template <class T> constexpr T bound = sizeof(T) == 4 ? 86 : 860;

template <class T> void log_rows(const Team& team, const Cost<T>& cost, T eps, const T* g, const T* log_b, T* f) {
  const T scale = exponent_scale(eps), back = T(ln2) * eps;
  team.each(cost.parts.count, [&](int part) {
    for (int i = cost.parts.begin(part); i < std::min(cost.n, cost.parts.end(part)); ++i) {
      const T* c = cost.row(i);
      vec<T> top = splat<T>(-std::numeric_limits<T>::infinity()), total{};
      for (int j = 0; j < cost.cols; j += lanes<T>) top = max(exponent(c, g, j, T(0), scale) + load(log_b + j), top);
      const T most = max_of<T>(top), peak = most == -forbidden<T> ? T(0) : most;
      for (int j = 0; j < cost.cols; j += lanes<T>) total += exp2<T>(exponent(c, g, j, T(0), scale) + load(log_b + j) - peak);
      f[i] = -back * (peak + std::log2(sum<T>(total)));
      poll_after_row(i, cost.cols);
    }
  });
}

// peak and total are scratch of `cols`.
template <class T> void log_cols(const Team& team, const Cost<T>& cost, T eps, const T* f, const T* log_a, T* g, T* peak, T* total) {
  constexpr int width = 512;
  const T scale = exponent_scale(eps), back = T(ln2) * eps, none = -std::numeric_limits<T>::infinity();
  team.each((cost.cols + width - 1) / width, [&](int strip) {
    const int begin = strip * width, end = std::min(cost.cols, begin + width);
    for (int j = begin; j < end; ++j) peak[j] = none, total[j] = 0;
    const auto each = [&](int first, int last, auto add) __attribute__((always_inline)) {
      for (int i = first; i < last; ++i) {
        if (log_a[i] == none) continue;
        const T* c = cost.row(i);
        for (int j = begin; j < end; j += lanes<T>) add(j, (f[i] - load(c + j)) * scale + log_a[i]);
        poll_after_row(i, width);
      }
    };
    each(0, cost.n, [&](int j, vec<T> z) __attribute__((always_inline)) { store<T>(peak + j, max(z, load(peak + j))); });
    for (int j = begin; j < end; ++j) peak[j] = peak[j] == none ? T(0) : peak[j];
    for (int i0 = 0; i0 < cost.n; i0 += chain_rows) {
      alignas(64) T some[width] = {};
      each(i0, std::min(cost.n, i0 + chain_rows), [&](int j, vec<T> z) __attribute__((always_inline)) {
        store<T>(some + j - begin, load(some + j - begin) + exp2<T>(z - load(peak + j)));
      });
      for (int j = begin; j < end; ++j) total[j] += some[j - begin];
    }
    for (int j = begin; j < end; ++j) g[j] = j < cost.m ? -back * (peak[j] + std::log2(total[j])) : T(0);
  });
}

// Potentials of points without mass that are forbidden to every point with mass become 0.
template <class T> void no_reach(T* potential, const T* log_mass, int count) {
  for (int i = 0; i < count; ++i)
    if (potential[i] == forbidden<T> && log_mass[i] == -forbidden<T>) potential[i] = 0;
}

// log2 of a mass, -inf where there is none or in the padding. Returns whether a real entry is dead.
template <class T> bool log_masses(const T* mass, int count, int padded, T* out) {
  bool dead = false;
  for (int i = 0; i < padded; ++i) {
    const bool none = i >= count || mass[i] <= dead_mass<T>;
    out[i] = none ? -std::numeric_limits<T>::infinity() : std::log2(mass[i]);
    dead |= none && i < count;
  }
  return dead;
}

}  // namespace otloss::OTLOSS_LEVEL
