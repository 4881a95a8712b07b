// The gradient of the converged problem, by its adjoint system.
//
// With R_ij = C_ij - f_i - g_j (reduced cost), k_ij = exp(-R_ij/eps), rho_i = sum_j k_ij b_j, T_ij = a_i b_j k_ij and the
// realised marginals A = T1, S = T'1, a loss with upstream w (transport cost), v (value), p (f), q (g) gives
//   [diag A  T; T'  diag S] [U; V] = [r; s],   r_i = w sum_j T_ij R_ij - eps sum_j a_i k_ij q_j,
//                                              s_j = w sum_i T_ij R_ij - eps sum_i b_j k_ij p_i,
//   dL/dC_ij = T_ij ((U_i + V_j - w R_ij)/eps + w + v) + p_i b_j k_ij / rho_i + q_j a_i k_ij / sigma_j,
//   dL/da_i = U_i + w f_i + v f_i,   dL/db_j = V_j + w g_j + v g_j.
//
// With the plan taken as a constant only T (w + v), v f and v g are left.
//
// Nothing is divided by a mass: the matrix kept is M_ij = c_j k_ij / rho_i with c_j = b_j, or 1 where b_j = 0. Its live
// columns are the row-normalised kernel, defined for rows without mass too; A_i M_ij is T, or a_i k_ij in a dead column,
// so S_j and V_j of a dead column come out of the same sums. Eliminating U_i = y_i - sum_j M_ij V_j leaves
//   (S - M' A M) V = h,   h = s - M' A y,   y_i = r_i / A_i,
// which conjugate gradients solve as (I - L'L) z = S^-1/2 h, L = A^1/2 M S^-1/2, in the complement of the null vector
// S^1/2; one step is one sweep over M. Dead rows have A_i = 0, dead columns are left out.
#pragma once
#include "passes.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct Adjoint {

  const Problem<T>& p;
  const Cost<T>& cost;
  const Upstream<T>& up;
  const bool solve;
  T *M, *A, *rho, *y, *log_a, *f, *fu, *pf;                                                 // rows
  T *S, *h, *V, *g, *log_b, *log_c, *live, *qg, *root, *unroot, *z, *res, *dir, *work, *v, *best;  // columns

  static size_t bytes(const Problem<T>& p) {
    const size_t n = round_up<T>(p.n), m = round_up<T>(p.m);
    return Arena::bytes<T>(n * leading<T>(p.m)) + 7 * Arena::bytes<T>(n) + 16 * Arena::bytes<T>(m);
  }

  Adjoint(const Cost<T>& cost, Arena& arena, const T* f_in, const T* g_in, const Upstream<T>& up, bool solve)
      : p(cost.p), cost(cost), up(up), solve(solve) {
    M = arena.take<T>(size_t(cost.rows) * cost.ld);
    for (T** x : {&A, &rho, &y, &log_a, &f, &fu, &pf}) *x = arena.take<T>(cost.rows);
    for (T** x : {&S, &h, &V, &g, &log_b, &log_c, &live, &qg, &root, &unroot, &z, &res, &dir, &work, &v, &best}) {
      *x = arena.take<T>(cost.cols);
      std::memset(*x, 0, sizeof(T) * cost.cols);
    }
    log_masses(p.a, cost.n, cost.rows, log_a);
    log_masses(p.b, cost.m, cost.cols, log_b);
    for (int i = 0; i < cost.rows; ++i) {
      f[i] = i < cost.n ? f_in[i] : T(0);
      pf[i] = solve && up.f && i < cost.n ? up.f[i] : T(0);
      fu[i] = 0;
    }
    for (int j = 0; j < cost.m; ++j) {
      live[j] = log_b[j] != none ? T(1) : T(0);
      log_c[j] = live[j] != 0 ? log_b[j] : T(0);
      g[j] = g_in[j];
      qg[j] = solve && up.g ? (live[j] != 0 ? up.g[j] / p.b[j] : up.g[j]) : T(0);
    }
    for (int j = cost.m; j < cost.cols; ++j) log_c[j] = none;
  }

  // M, A, S and the right-hand side, each row of cost as soon as it exists. C becomes R.
  void assemble() {
    const T ie = 1 / p.eps, w = up.cost;
    for (int i0 = 0; i0 < cost.rows; i0 += block) {
      cost.fill(i0);
      for (int i = i0; i < i0 + block; ++i) {
        T *R = cost.row(i), *k = M + size_t(i) * cost.ld;
        if (i >= cost.n) {
          for (int j = 0; j < cost.cols; ++j) k[j] = 0;
          A[i] = rho[i] = y[i] = 0;
          continue;
        }
        vec<T> top = splat<T>(none);
        for (int j = 0; j < cost.cols; j += lanes<T>) {
          const vec<T> reduced = (load(R + j) - f[i]) - load(g + j), e = reduced * -ie;
          store<T>(R + j, reduced);
          store<T>(k + j, e + load(log_c + j));
          top = max(e + load(log_b + j), top);
        }
        const T peak = max_of<T>(top);
        vec<T> total{};
        for (int j = 0; j < cost.cols; j += lanes<T>) {
          const vec<T> e = exp<T>(min(splat(bound<T>), load(k + j) - peak));
          store<T>(k + j, e);
          total += e * load(live + j);
        }
        const T row = sum<T>(total), log_rho = peak + std::log(row), scale = 1 / row;
        A[i] = exp<T>(log_rho + log_a[i]);
        rho[i] = exp<T>(log_rho);
        vec<T> cost_sum{}, q_sum{};
        for (int j = 0; j < cost.cols; j += lanes<T>) {
          const vec<T> e = load(k + j) * scale;
          store<T>(k + j, e);
          cost_sum += e * load(live + j) * load(R + j);
          q_sum += e * load(qg + j);
        }
        y[i] = w * sum<T>(cost_sum) - p.eps * sum<T>(q_sum);
        const T Aw = A[i] * w, rest = A[i] * y[i] + p.eps * rho[i] * pf[i];
        for (int j = 0; j < cost.cols; j += lanes<T>) {
          const vec<T> e = load(k + j);
          store<T>(S + j, load(S + j) + A[i] * e);
          store<T>(h + j, load(h + j) + e * (Aw * load(R + j) - rest));
        }
      }
    }
  }

  // out = M' A M x; U's share M x is left in fu.
  void normal(const T* x, T* out) {
    for (int j = 0; j < cost.cols; ++j) out[j] = 0;
    up_ = !up_;
    sweep(M, cost.rows, cost.cols, cost.ld, up_, x, out, [&](int i0, const T* s, T* w) __attribute__((always_inline)) {
      for (int r = 0; r < block; ++r) fu[i0 + r] = s[r], w[r] = s[r] * A[i0 + r];
    });
  }

  void project(T* x) const {
    const T along = dot(x, root, cost.cols) / dot(root, root, cost.cols);
    for (int j = 0; j < cost.cols; ++j) x[j] -= along * root[j];
  }

  // Conjugate gradients from 0; keeps the best iterate and gives up when it stops improving. Returns the squared size
  // of the right-hand side, 0 if there is nothing to solve.
  T conjugate_gradients() {
    const T target = sizeof(T) == 4 ? T(5e-7) : T(1e-12);
    const int m = cost.cols, patience = 60, size = 10 * (cost.n + cost.m), cap = size < 2000 ? size : 2000;
    for (int j = 0; j < m; ++j) {
      root[j] = std::sqrt(S[j]) * live[j];
      unroot[j] = root[j] > 0 ? 1 / root[j] : T(0);
      res[j] = h[j] * unroot[j];
    }
    project(res);
    const T start = dot(res, res, m);
    T norm = start, least = start, terms = 0;
    for (int i = 0; i < cost.n; ++i) terms += A[i] * y[i] * y[i];
    const T noise = 8 * std::numeric_limits<T>::epsilon();
    if (start <= noise * noise * terms) return 0;  // h is the rounding of terms that cancel: V = 0 solves it
    for (int j = 0; j < m; ++j) dir[j] = res[j];
    for (int k = 0, last = 0; k < cap && norm > target * target * start && k - last < patience; ++k) {
      for (int j = 0; j < m; ++j) v[j] = unroot[j] * dir[j];
      normal(v, work);
      for (int j = 0; j < m; ++j) work[j] = dir[j] - unroot[j] * work[j];
      project(work);
      const T curvature = dot(dir, work, m);
      if (!(curvature > 0)) break;
      const T step = norm / curvature;
      for (int j = 0; j < m; ++j) z[j] += step * dir[j], res[j] -= step * work[j];
      const T next = dot(res, res, m), turn = next / norm;
      for (int j = 0; j < m; ++j) dir[j] = res[j] + turn * dir[j];
      norm = next;
      if (norm < least) {
        least = norm;
        last = k;
        std::memcpy(best, z, sizeof(T) * m);
      }
    }
    for (int j = 0; j < m; ++j) V[j] = unroot[j] * best[j];
    return start;
  }

  // V by conjugate gradients, then U and the V of dead columns by one more sweep, which also shows the true residual.
  T multipliers() {
    const T start = conjugate_gradients();
    normal(V, work);
    T left = 0;
    for (int j = 0; j < cost.cols; ++j) {
      if (live[j] != 0) {
        res[j] = (h[j] + work[j] - S[j] * V[j]) * unroot[j];
      } else {
        res[j] = 0;
        if (S[j] > 0) V[j] = (h[j] + work[j]) / S[j];
      }
    }
    project(res);
    left = dot(res, res, cost.cols);
    for (int i = 0; i < cost.n; ++i) fu[i] = y[i] - fu[i];  // U
    return start == 0 ? T(0) : std::sqrt(left / start);
  }

  void contract(const Gradient<T>& out) {
    const T ie = solve ? 1 / p.eps : T(0), w = up.cost, direct = w + up.value;
    for (int j = 0; j < cost.cols; ++j) work[j] = solve && up.g && j < cost.m && S[j] > 0 ? up.g[j] / S[j] : T(0);
    for (int i0 = 0; i0 < cost.rows; i0 += tile_rows) {
      const int count = std::min(tile_rows, cost.rows - i0);
      for (int i = i0; i < i0 + count; ++i) {
        T* k = M + size_t(i) * cost.ld;
        const T *R = cost.row(i), u = fu[i] * ie + direct;
        for (int j = 0; j < cost.cols; j += lanes<T>) {
          const vec<T> bracket = (load(V + j) - w * load(R + j)) * ie + u;
          store<T>(k + j, load(k + j) * ((A[i] * bracket + pf[i]) * load(live + j) + A[i] * load(work + j)));
        }
      }
      cost.pull(M + size_t(i0) * cost.ld, i0, count, out);
    }
    cost.finish(out);
  }

 private:
  static constexpr T none = -std::numeric_limits<T>::infinity();
  bool up_ = false;
};

template <class T>
void implicit_gradient(const Problem<T>& p, Arena& arena, const T* f, const T* g, const Upstream<T>& up, bool adjoint,
                       const Gradient<T>& out) {
  arena.reset(Cost<T>::bytes(p, out.left) + Adjoint<T>::bytes(p));
  const Cost<T> cost(p, arena, out.left);
  Adjoint<T> s(cost, arena, f, g, up, adjoint);
  const T w = (adjoint ? up.cost : T(0)) + up.value;
  *out.residual = 0;
  if (adjoint || out.left) s.assemble();
  if (adjoint) *out.residual = s.multipliers();
  for (int i = 0; i < p.n; ++i) out.a[i] = s.fu[i] + w * f[i];
  for (int j = 0; j < p.m; ++j) out.b[j] = s.V[j] + w * g[j];
  if (out.left) s.contract(out);
}

}  // namespace otloss::OTLOSS_LEVEL
