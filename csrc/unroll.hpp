// The exact derivative of the K plain iterations that were run, in O(K (n + m)) memory.
//
// First the iterations are run again and their potentials are kept. If no mass is zero, they run by scaling. Else they run in
// the log-domain, which also gives the potentials of the entries without mass. Then the derivative goes backwards through them.
//
// Let L = w <T, C> + v value, D_ij = w C_ij + v (f_i + g_j), k_ij = exp((f_i + g_j - C_ij)/eps) and rho_i = sum_j b_j k_ij.
// The derivative starts from
//   lambda = (D o T)1/eps, kappa = (D o T)'1/eps, dC = (w + v) T - D o T/eps,
//   da_i = sum_j D_ij b_j k_ij - eps v (rho_i - 1), db likewise.
// Then, for k = K .. 1, first the line of Q and then the line of P. Row i of P needs only lambda_i, so one pass over the rows
// does both:
//   Q_ij = a_i exp((f^k_i + g^k_j     - C_ij)/eps):  lambda -= Q kappa,    dC += Q kappa_j,    da_i -= eps (Q kappa)_i / a_i
//   P_ij = b_j exp((f^k_i + g^(k-1)_j - C_ij)/eps):  kappa  = -P' lambda,  dC += P lambda_i,   db_j -= eps (P' lambda)_j / b_j
#pragma once
#include "solve.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T>
void unrolled_gradient(const Problem<T>& p, Arena& arena, int64_t n_iter, const Upstream<T>& up, const Gradient<T>& out) {
  const size_t rows = round_up<T>(p.n), cols = round_up<T>(p.m);
  arena.reset(Cost<T>::bytes(p, out.left) + Solver<T>::bytes(p) + Arena::bytes<T>((n_iter + 1) * rows) +
              Arena::bytes<T>((n_iter + 1) * cols) + 2 * Arena::bytes<T>(rows) + 5 * Arena::bytes<T>(cols));
  const Cost<T> cost(p, arena, true, out.left);
  const Team alone(p.n, p.m, p.d);
  Solver<T> s(cost, arena, alone);
  T *f = arena.take<T>((n_iter + 1) * rows), *g = arena.take<T>((n_iter + 1) * cols);
  T *lambda = arena.take<T>(rows), *da = arena.take<T>(rows);
  T *kappa = arena.take<T>(cols), *next = arena.take<T>(cols), *db = arena.take<T>(cols);
  T *some = arena.take<T>(cols), *more = arena.take<T>(cols);  // column sums over one part of the rows
  std::memset(f, 0, sizeof(T) * (n_iter + 1) * rows);
  std::memset(g, 0, sizeof(T) * (n_iter + 1) * cols);

  s.read_cost(false);
  if (s.dead_rows || s.dead_cols || n_iter == 0) {
    for (int64_t k = 1; k <= n_iter; ++k) {
      log_rows(alone, cost, p.eps, g + (k - 1) * cols, s.log_b, f + k * rows);
      no_reach(f + k * rows, s.log_a, cost.n);
      log_cols(alone, cost, p.eps, f + k * rows, s.log_a, g + k * cols, s.peak, s.total);
      no_reach(g + k * cols, s.log_b, cost.m);
    }
  } else {
    int64_t ran;
    s.run(n_iter, T(0), ran, [&](int64_t k) { s.potentials(f + k * rows, g + k * cols); });
    if (ran < n_iter) s.potentials(f + n_iter * rows, g + n_iter * cols);  // a value was not finite: the results must show it
  }

  const T ie = 1 / p.eps, scale = s.scale, w = up.cost, v = up.value;
  T* D = s.K;  // the gradient of the cost overwrites the kernel
  for (size_t j = 0; j < cols; ++j) kappa[j] = some[j] = more[j] = 0, db[j] = v * p.eps;
  // The sum of a row is taken in chains of `chain_rows` columns. With a single chain of 25,000 vectors at the baseline level,
  // float32 lost 1e-5 of sums that nearly cancel.
  // Column sums are taken part by part, as in a sweep. visit(i) adds the terms of row i to `some` and `more`.
  const auto by_parts = [&](int count, T* total, T* other, auto visit) __attribute__((always_inline)) {
    for (int part = 0; part < cost.parts.count; ++part) {
      for (int i = cost.parts.begin(part); i < std::min(count, cost.parts.end(part)); ++i) visit(i), poll_after_block(cost.cols);
      for (size_t j = 0; j < cols; ++j) total[j] += some[j], some[j] = 0;
      for (size_t j = 0; other && j < cols; ++j) other[j] += more[j], more[j] = 0;
      poll(2 * int64_t(cost.parts.size) * cost.cols);
    }
  };
  const T *fk = f + n_iter * rows, *gk = g + n_iter * cols;
  by_parts(cost.rows, kappa, db, [&](int i) __attribute__((always_inline)) {
    const T* c = cost.row(i);
    vec<T> lift{}, share{};
    for (int j0 = 0; j0 < cost.cols; j0 += chain_rows) {
      vec<T> lifted{}, shared{};
      for (int j = j0; j < std::min(cost.cols, j0 + chain_rows); j += lanes<T>) {
        const vec<T> k = exp2<T>(min(splat(bound<T>), exponent(c, gk, j, fk[i], scale))), kb = k * load(s.b + j), ka = k * s.a[i];
        const vec<T> outer = w * load(c + j) + v * (fk[i] + load(gk + j)), t = ka * load(s.b + j), none{};
        const vec<T> d = t != 0 ? outer : none;  // not 0 * inf
        lifted += kb != 0 ? kb * outer : none;
        shared += kb;
        store<T>(D + size_t(i) * cost.ld + j, t * ((w + v) - d * ie));
        store<T>(some + j, load(some + j) + t * d * ie);
        store<T>(more + j, load(more + j) + (ka != 0 ? ka * (outer - v * p.eps) : none));
      }
      lift += lifted, share += shared;
    }
    lambda[i] = s.a[i] > 0 ? s.a[i] * sum<T>(lift) * ie : T(0);  // not 0 * inf
    da[i] = sum<T>(lift) - p.eps * v * (sum<T>(share) - 1);
  });
  for (int64_t k = n_iter; k >= 1; --k) {
    const T *fk = f + k * rows, *gk = g + k * cols, *g0 = gk - cols;
    for (size_t j = 0; j < cols; ++j) next[j] = 0;
    by_parts(cost.n, next, nullptr, [&](int i) __attribute__((always_inline)) {
      const T *c = cost.row(i), a = s.a[i];
      T* d = D + size_t(i) * cost.ld;
      vec<T> back{};
      for (int j0 = 0; j0 < cost.cols; j0 += chain_rows) {
        vec<T> chain{};
        for (int j = j0; j < std::min(cost.cols, j0 + chain_rows); j += lanes<T>) {
          const vec<T> t = exp2<T>(min(splat(bound<T>), exponent(c, gk, j, fk[i], scale))) * load(kappa + j);
          chain += t;
          if (a > 0) store<T>(d + j, load(d + j) + a * t);  // not 0 * inf
        }
        back += chain;
      }
      const T total = sum<T>(back), l = a > 0 ? lambda[i] - a * total : T(0);
      lambda[i] = 0;
      da[i] -= p.eps * total;
      for (int j = 0; j < cost.cols; j += lanes<T>) {
        const vec<T> k = exp2<T>(min(splat(bound<T>), exponent(c, g0, j, fk[i], scale)));
        store<T>(d + j, load(d + j) + k * load(s.b + j) * l);  // mass first: where it is 0, k * l may overflow
        store<T>(some + j, load(some + j) + k * l);
      }
    });
    for (size_t j = 0; j < cols; ++j) {
      db[j] -= p.eps * next[j];
      kappa[j] = s.b[j] > 0 ? -s.b[j] * next[j] : T(0);
    }
  }

  // The potential of an entry without mass is about as large as the costs, and these may be of any size. If rounding of the
  // potential may move an exponent by 1/256 or more, the gradient of that mass is lost and counts as 0. A gradient of such a
  // mass that is not finite counts as 0 too.
  const T reach = p.eps / (128 * std::numeric_limits<T>::epsilon());
  const auto by_mass = [&](T mass, T potential, T grad) {
    return mass > 0 || (std::fabs(potential) < reach && std::isfinite(grad)) ? grad : T(0);
  };
  for (int i = 0; i < p.n; ++i) out.a[i] = by_mass(s.a[i], fk[i], da[i]);
  for (int j = 0; j < p.m; ++j) out.b[j] = by_mass(s.b[j], gk[j], db[j]);
  if (!out.left) return;
  T *w_rows = lambda, *w_columns = kappa;  // the weights of cost.hpp
  for (int i = 0; i < cost.n; ++i) w_rows[i] = 0;
  for (size_t j = 0; j < cols; ++j) w_columns[j] = 0;
  // term(gradient, cost) is what an entry adds to the weights.
  const auto weigh = [&](auto term) __attribute__((always_inline)) {
    by_parts(cost.n, w_columns, nullptr, [&](int i) __attribute__((always_inline)) {
      vec<T> weight{};
      for (int j = 0; j < cost.cols; j += lanes<T>) {
        const vec<T> t = term(load(D + size_t(i) * cost.ld + j), load(cost.row(i) + j));
        weight += t;
        store<T>(some + j, load(some + j) + t);
      }
      w_rows[i] = sum<T>(weight);
    });
  };
  const Weights weights = weights_of(p);
  if (weights == Weights::cosines) weigh([](vec<T> gradient, vec<T> c) __attribute__((always_inline)) { return gradient * (1 - c); });
  if (weights == Weights::totals) weigh([](vec<T> gradient, vec<T>) __attribute__((always_inline)) { return gradient; });
  const int step = cost.chunk_rows();
  for (int i0 = 0; i0 < cost.n; i0 += step) {
    const T* G = D + size_t(i0) * cost.ld;
    cost.pull_rows(G, i0, step, w_rows, out);
    cost.pull_columns(G, i0, step, 0, cost.m, w_columns, out);
  }
}

}  // namespace otloss::OTLOSS_LEVEL
