// Sinkhorn by stabilised scaling (Schmitzer 2019).
//
// Keep K_ij = exp((F_i + G_j - C_ij)/eps) for absorbed potentials F, G and iterate on the scalings alone,
//   phi_i = 1 / sum_j K_ij b_j psi_j,    psi_j = 1 / sum_i a_i phi_i K_ij,     f = F + eps log phi,  g = G + eps log psi,
// one sweep over K and no exponential per iteration. The row sums of a sweep also give the error of the state before it,
//   sum_i a_i |phi_i (K b psi)_i - 1|,
// so the stop test is free. When a scaling leaves [1/safe, safe] it is absorbed into F, G and K is rebuilt; when a sum
// itself leaves [1/wide, wide], K no longer holds the entries that matter and the iteration is done again from the state
// before it in the log-domain. The first half-step starts from F_i = min_j C_ij, so that no row of K vanishes.
#pragma once
#include "passes.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct Solver {
  static constexpr T safe = sizeof(T) == 4 ? T(1e8) : T(1e40), wide = sizeof(T) == 4 ? T(1e20) : T(1e100);

  const Problem<T>& p;
  const Cost<T>& cost;
  T *K, *F, *G, *phi, *psi, *next_phi, *next_psi, *v, *log_a, *log_b, *a, *b, *peak, *total;
  bool dead_rows, dead_cols, up = false;

  static size_t bytes(const Problem<T>& p) {
    const size_t n = round_up<T>(p.n), m = round_up<T>(p.m);
    return Arena::bytes<T>(n * leading<T>(p.m)) + 5 * Arena::bytes<T>(n) + 8 * Arena::bytes<T>(m);
  }

  Solver(const Cost<T>& cost, Arena& arena) : p(cost.p), cost(cost) {
    K = arena.take<T>(size_t(cost.rows) * cost.ld);
    for (T** x : {&F, &phi, &next_phi, &log_a, &a}) *x = arena.take<T>(cost.rows);
    for (T** x : {&G, &psi, &next_psi, &v, &log_b, &b, &peak, &total}) *x = arena.take<T>(cost.cols);
    dead_rows = log_masses(p.a, cost.n, cost.rows, log_a);
    dead_cols = log_masses(p.b, cost.m, cost.cols, log_b);
    for (int i = 0; i < cost.rows; ++i) a[i] = live_row(i) ? p.a[i] : T(0), F[i] = none, phi[i] = 1;
    for (int j = 0; j < cost.cols; ++j) b[j] = live_col(j) ? p.b[j] : T(0), G[j] = live_col(j) ? T(0) : none, psi[j] = 1;
  }

  // Runs to the error `tol` (then true, with that error) or for max_iter iterations. record(k, f, g) sees every state.
  template <class Record> bool run(int64_t max_iter, T tol, int64_t& k, T& error, Record record) {
    first_rows();
    if (max_iter == 0)
      for (int i = 0; i < cost.n; ++i) F[i] = 0;
    for (k = 0; k < max_iter; ++k) {
      error = 0;
      bool good = iterate(error);
      if (k > 0 && error < tol) return true;
      if (good) {
        std::swap(phi, next_phi);
        std::swap(psi, next_psi);
        if (!(spread(phi, cost.rows) <= safe && spread(psi, cost.cols) <= safe)) absorb();
      } else if (!log_iterate()) {
        ++k;
        return false;  // not finite: the outputs say so
      }
      record(k + 1);
    }
    return false;
  }

  // f and g of the state for live entries; 0 elsewhere.
  void potentials(T* f, T* g) const {
    for (int i = 0; i < cost.n; ++i) f[i] = live_row(i) ? F[i] + p.eps * std::log(phi[i]) : T(0);
    for (int j = 0; j < cost.m; ++j) g[j] = live_col(j) ? G[j] + p.eps * std::log(psi[j]) : T(0);
  }

 private:
  static constexpr T none = -std::numeric_limits<T>::infinity();
  bool live_row(int i) const { return log_a[i] != none; }
  bool live_col(int j) const { return log_b[j] != none; }

  void build_row(int i) {
    const T ie = 1 / p.eps;
    T* k = K + size_t(i) * cost.ld;
    for (int j = 0; j < cost.cols; j += lanes<T>) store<T>(k + j, exp<T>(exponent(cost.row(i), G, j, F[i], ie)));
  }

  void first_rows() {
    for (int i0 = 0; i0 < cost.rows; i0 += block) {
      cost.fill(i0);
      for (int i = i0; i < i0 + block; ++i) {
        if (live_row(i)) {  // -inf in G keeps dead columns and the padding out of the minimum
          vec<T> top = splat<T>(none);
          for (int j = 0; j < cost.cols; j += lanes<T>) top = max(load(G + j) - load(cost.row(i) + j), top);
          F[i] = -max_of<T>(top);
        }
        build_row(i);
      }
    }
  }

  bool iterate(T& error) {
    for (int j = 0; j < cost.cols; ++j) v[j] = b[j] * psi[j], next_psi[j] = 0;
    T missed[block] = {};
    up = !up;  // the first goes up: the last rows of K were written last
    sweep(K, cost.rows, cost.cols, cost.ld, up, v, next_psi, [&](int i0, const T* s, T* w) __attribute__((always_inline)) {
      const T *mass = a + i0, *old = phi + i0;
      T* scaling = next_phi + i0;
      for (int r = 0; r < block; ++r) {
        const T miss = old[r] * s[r] - 1;
        missed[r] += mass[r] * (miss < 0 ? -miss : miss);
        scaling[r] = mass[r] != 0 ? 1 / s[r] : T(1);
        w[r] = mass[r] * scaling[r];
      }
    });
    for (int r = 0; r < block; ++r) error += missed[r];
    for (int j = 0; j < cost.cols; ++j) next_psi[j] = b[j] != 0 ? 1 / next_psi[j] : T(1);
    return spread(next_phi, cost.rows) <= wide && spread(next_psi, cost.cols) <= wide;
  }

  // The largest factor by which a scaling differs from 1 (it is 1 where there is no mass); NaN if one is.
  static T spread(const T* scaling, int count) {
    vec<T> top = splat<T>(1), bottom = top, nothing{};
    for (int i = 0; i < count; i += lanes<T>) {
      const vec<T> s = load(scaling + i);
      top = max(s, top);
      bottom = min(s, bottom);
      nothing += s * T(0);
    }
    const T most = max_of<T>(top), least = 1 / min_of<T>(bottom);
    return (most > least ? most : least) + sum<T>(nothing);
  }

  void absorb() {
    for (int i = 0; i < cost.n; ++i)
      if (live_row(i)) F[i] += p.eps * std::log(phi[i]);
    for (int j = 0; j < cost.m; ++j)
      if (live_col(j)) G[j] += p.eps * std::log(psi[j]);
    rebuild();
  }

  void rebuild() {
    for (int i = 0; i < cost.rows; ++i) phi[i] = 1;
    for (int j = 0; j < cost.cols; ++j) psi[j] = 1;
    for (int i = 0; i < cost.rows; ++i) build_row(i);
  }

  bool log_iterate() {
    for (int j = 0; j < cost.m; ++j) G[j] = live_col(j) ? G[j] + p.eps * std::log(psi[j]) : T(0);
    log_rows(cost, G, log_b, F);
    log_cols(cost, F, log_a, G, peak, total);
    T check = 0;
    for (int i = 0; i < cost.rows; ++i) {
      if (!live_row(i)) F[i] = none;
      else check += F[i] - F[i];
    }
    for (int j = 0; j < cost.cols; ++j) {
      if (!live_col(j)) G[j] = none;
      else check += G[j] - G[j];
    }
    rebuild();
    return check == 0;
  }
};

template <class T> void solve(const Problem<T>& p, Arena& arena, int64_t max_iter, T tol, const Solution<T>& out) {
  arena.reset(Cost<T>::bytes(p, false) + Solver<T>::bytes(p));
  const Cost<T> cost(p, arena, false);
  Solver<T> s(cost, arena);
  T error = 0;
  const bool stopped = s.run(max_iter, tol, *out.n_iter, error, [](int64_t) {});

  T *f = s.F, *g = s.G;  // dead entries: one half-step from the live ones
  s.potentials(f, g);
  for (int j = cost.m; j < cost.cols; ++j) g[j] = 0;
  T *f_all = s.next_phi, *g_all = s.next_psi;
  if (s.dead_rows) log_rows(cost, g, s.log_b, f_all);
  if (s.dead_cols) log_cols(cost, f, s.log_a, g_all, s.peak, s.total);
  double shift = 0;
  for (int i = 0; i < cost.n; ++i) {
    if (s.a[i] == 0) f[i] = f_all[i];
    shift -= 0.5 * double(s.a[i]) * f[i];
  }
  for (int j = 0; j < cost.m; ++j) {
    if (s.b[j] == 0) g[j] = g_all[j];
    shift += 0.5 * double(s.b[j]) * g[j];
  }
  for (int i = 0; i < cost.n; ++i) out.f[i] = f[i] += T(shift);
  for (int j = 0; j < cost.m; ++j) out.g[j] = g[j] -= T(shift);

  // <T, C>;  <T, C> + eps KL(T|ab') = <T1, f> + <T'1, g> - eps (sum T - 1);  |T1 - a|.
  const T ie = 1 / p.eps;
  double sharp = 0, potential = 0, mass = 0, missed = 0;
  for (int i = 0; i < cost.n; ++i) {
    const T* c = cost.row(i);
    vec<T> t{}, tc{}, tg{};
    for (int j = 0; j < cost.cols; j += lanes<T>) {
      const vec<T> k = exp<T>(exponent(c, g, j, f[i], ie)) * load(s.b + j);
      t += k;
      tc += k * load(c + j);
      tg += k * load(g + j);
    }
    const double row = sum<T>(t), a = s.a[i];
    sharp += a * sum<T>(tc);
    potential += a * (f[i] * row + sum<T>(tg));
    mass += a * row;
    missed += a * std::fabs(row - 1);
  }
  *out.cost = T(sharp);
  *out.value = T(potential - p.eps * (mass - 1));
  *out.error = stopped ? error : T(missed);
}

}  // namespace otloss::OTLOSS_LEVEL
