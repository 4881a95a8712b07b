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
// S^1/2; one step is one sweep over M. Dead rows have A_i = 0, dead columns are left out. relaxed_adjoint.hpp has what penalties on the marginals change.
#pragma once
#include "relaxed_adjoint.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct Adjoint {
  static constexpr T least = sizeof(T) == 4 ? T(1e-10) : T(1e-100);  // a row's sum that is trusted, or its reciprocal

  const Problem<T>& p;
  const Cost<T>& cost;
  const Team& team;
  const Upstream<T>& up;
  const bool solve;
  const Penalty<T> of_a, of_b;
  T *M, *A, *rho, *y, *log_a, *f, *fu, *pf;                                                        // rows
  T *S, *h, *V, *g, *log_b, *log_c, *live, *qg, *root, *unroot, *z, *res, *dir, *work, *v, *best;  // columns

  static size_t bytes(const Problem<T>& p) {
    const size_t n = round_up<T>(p.n), m = round_up<T>(p.m);
    return Arena::bytes<T>(n * leading<T>(p.m)) + 7 * Arena::bytes<T>(n) + 13 * Arena::bytes<T>(m) +
           3 * Arena::bytes<T>(m * Parts(int(n), int(m)).count);
  }

  Adjoint(const Cost<T>& cost, Arena& arena, const Team& team, const T* f_in, const T* g_in, const Upstream<T>& up, bool solve)
      : p(cost.p), cost(cost), team(team), up(up), solve(solve), of_a(p.inverse_rho_a, p.eps), of_b(p.inverse_rho_b, p.eps) {
    M = arena.take<T>(size_t(cost.rows) * cost.ld);
    for (T** x : {&A, &rho, &y, &log_a, &f, &fu, &pf}) *x = arena.take<T>(cost.rows);
    const auto columns = [&](int parts, std::initializer_list<T**> vectors) {
      for (T** x : vectors) {
        *x = arena.take<T>(size_t(cost.cols) * parts);
        std::memset(*x, 0, sizeof(T) * cost.cols * parts);
      }
    };
    columns(1, {&V, &g, &log_b, &log_c, &live, &qg, &root, &unroot, &z, &res, &dir, &v, &best});
    columns(cost.parts.count, {&S, &h, &work});  // sums over rows, by parts
    log_masses(p.a, cost.n, cost.rows, log_a);
    log_masses(p.b, cost.m, cost.cols, log_b);
    for (int i = 0; i < cost.rows; ++i) {
      f[i] = i < cost.n ? f_in[i] : T(0);
      pf[i] = solve && up.f && i < cost.n ? T(of_a.soft) * up.f[i] : T(0);
      A[i] = rho[i] = y[i] = fu[i] = 0;
    }
    for (int j = 0; j < cost.m; ++j) {
      live[j] = log_b[j] != none ? T(1) : T(0);
      log_c[j] = live[j] != 0 ? log_b[j] : T(0);
      g[j] = g_in[j];
      qg[j] = solve && up.g ? (live[j] != 0 ? up.g[j] / p.b[j] : up.g[j]) : T(0);
    }
    if (p.relaxed) relax_columns(*this);
    for (int j = cost.m; j < cost.cols; ++j) log_c[j] = none;
  }

  // Computes M, A, S and the right-hand side, block by block as the rows of the cost are filled. C becomes R.
  void assemble() {
    normalise_dead_columns();
    team.each(cost.parts.count, [&](int part) {
      T *mass = S + size_t(part) * cost.cols, *rhs = h + size_t(part) * cost.cols;
      for (int i0 = cost.parts.begin(part); i0 < cost.parts.end(part); i0 += block) {
        assemble_block(i0, mass, rhs);
        poll_after_block(cost.block_work());
      }
    });
    add_parts(S, cost.parts.count, cost.cols);
    add_parts(h, cost.parts.count, cost.cols);
    const double pull = up.cost * p.eps * of_b.inverse;
    for (int j = 0; p.relaxed && j < cost.m; ++j) h[j] = T(of_b.soft * (h[j] - pull * S[j] * g[j]));
  }

  // g_j of a dead column is such that sum_i a_i k_ij = 1. Rounding of huge costs puts it, hence that sum, off by any factor; c_j
  // takes the factor back.
  void normalise_dead_columns() {
    const T known = 1 / (4096 * std::numeric_limits<T>::epsilon()), scale = exponent_scale(p.eps);
    bool lost = false;
    for (int j = 0; j < cost.m; ++j) lost |= live[j] == 0 && !(std::fabs(g[j]) < known * p.eps);
    if (!lost) return;
    T *peak = work, *total = v;
    for (int j = 0; j < cost.cols; ++j) peak[j] = none, total[j] = 0;
    for (int pass = 0; pass < 2; ++pass)
      for (int i0 = 0; i0 < cost.n; i0 += block) {
        cost.fill(i0);
        for (int i = i0; i < std::min(i0 + block, cost.n); ++i)
          for (int j = 0; j < cost.m && log_a[i] != none; ++j) {
            const T z = log_a[i] - ((cost.row(i)[j] - f[i]) - g[j]) * scale;
            if (pass == 0) peak[j] = std::max(peak[j], z);
            else total[j] += std::exp2(z - peak[j]);
          }
        poll(cost.block_work());
      }
    for (int j = 0; j < cost.m; ++j)
      if (live[j] == 0 && peak[j] > none) log_c[j] = -(peak[j] + std::log2(total[j]));
    for (int j = 0; j < cost.cols; ++j) peak[j] = total[j] = 0;
  }

  void assemble_block(int i0, T* mass, T* rhs) {
    const T scale = exponent_scale(p.eps), w = up.cost;
    T factor[block] = {}, Aw[block] = {}, rest[block] = {};
    cost.fill(i0);
    for (int r = 0; r < block && i0 + r < cost.n; ++r) {
      const int i = i0 + r;
      T *R = cost.row(i), *k = M + size_t(i) * cost.ld;
      vec<T> total{}, cost_sum{};
      for (int j = 0; j < cost.cols; j += lanes<T>) {
        const vec<T> reduced = (load(R + j) - f[i]) - load(g + j), e = exp2<T>(min(splat(bound<T>), load(log_c + j) - reduced * scale));
        const vec<T> alive = e * load(live + j);
        store<T>(R + j, reduced);
        store<T>(k + j, e);
        total += alive;
        cost_sum += alive * masked(alive, reduced);
      }
      T row = sum<T>(total), sharp = sum<T>(cost_sum);
      rho[i] = row;
      A[i] = row * exp2<T>(splat(log_a[i]))[0];
      if (!(row > least && row < 1 / least)) rescue(i, row, sharp);
      factor[r] = 1 / row;
      T q_sum = 0;
      if (solve && up.g) q_sum = dot(k, qg, cost.cols);
      y[i] = (w * sharp - p.eps * q_sum) * factor[r];
      Aw[r] = A[i] * w;
      // In a row without mass rho_i is 1 by definition. The computed one may be anything, by rounding of huge costs.
      rest[r] = A[i] * y[i] + p.eps * (log_a[i] != none ? rho[i] : T(1)) * pf[i];
      if (p.relaxed) {
        if (solve) fu[i] = sharp * factor[r];
        y[i] -= T(w * p.eps * of_a.inverse) * f[i];
        rest[r] = T(of_a.soft) * A[i] * y[i] + p.eps * pf[i];
      }
    }
    T *R = cost.row(i0), *k = M + size_t(i0) * cost.ld;
    for (int j = 0; j < cost.cols; j += lanes<T>) {
      vec<T> s = load(mass + j), t = load(rhs + j);
      repeat<block>(OTLOSS_EACH(r) {
        const size_t at = r * size_t(cost.ld) + j;
        const vec<T> e = i0 + r < cost.n ? load(k + at) * factor[r] : vec<T>{};
        store<T>(k + at, e);
        s += A[i0 + r] * e;
        t += e * (Aw[r] * masked(e, load(R + at)) - rest[r]);
      });
      store<T>(mass + j, s);
      store<T>(rhs + j, t);
    }
  }

  // Computes a row again, scaled by its largest entry with mass. Its sum has overflowed or was lost in rounding.
  void rescue(int i, T& row, T& sharp) {
    const T scale = exponent_scale(p.eps);
    T *R = cost.row(i), *k = M + size_t(i) * cost.ld;
    vec<T> top = splat<T>(none), total{}, cost_sum{};
    for (int j = 0; j < cost.cols; j += lanes<T>) top = max(load(log_b + j) - load(R + j) * scale, top);
    const T peak = max_of<T>(top);
    if (row == 0 && peak == none) {  // forbidden to every column with mass: the row stays 0, and so does its potential
      row = 1;
      if (p.relaxed) pf[i] = 0;
      return;
    }
    for (int j = 0; j < cost.cols; j += lanes<T>) {
      const vec<T> e = exp2<T>(min(splat(bound<T>), load(log_c + j) - load(R + j) * scale - peak)), alive = e * load(live + j);
      store<T>(k + j, e);
      total += alive;
      cost_sum += alive * masked(alive, load(R + j));
    }
    row = sum<T>(total);
    sharp = sum<T>(cost_sum);
    const T log_rho = peak + std::log2(row);
    rho[i] = exp2<T>(splat(log_rho))[0];
    A[i] = exp2<T>(splat(log_rho + log_a[i]))[0];
  }

  // out = M' A M x; U's share M x is left in fu.
  void normal(const T* x, T* out) {
    up_ = !up_;
    sweep(team, cost, M, up_, x, out, [this](int i0, const T* s, T* w) __attribute__((always_inline)) {
      store_band(fu + i0, load_band(s));
      store_band(w, load_band(s) * load_band(A + i0));
    });
  }

  // Takes the share along root out of x, and returns it.
  T project(T* x) const {
    const T size = dot(root, root, cost.cols), along = size > 0 ? dot(x, root, cost.cols) / size : T(0);
    for (int j = 0; j < cost.cols; ++j) x[j] -= along * root[j];
    return along;
  }

  static constexpr T cg_target = sizeof(T) == 4 ? T(5e-7) : T(1e-12), cg_noise = 8 * std::numeric_limits<T>::epsilon();
  static constexpr int cg_patience = 60;
  static constexpr int cg_cap(int64_t n, int64_t m) { return int(std::min<int64_t>(10 * (n + m), 2000)); }

  // Conjugate gradients from 0; keeps the best iterate and gives up when it stops improving. The right-hand side is divided by
  // its largest entry, `rhs_scale`: its square might not exist. Returns its squared size, 0 if there is nothing to solve.
  T conjugate_gradients() {
    const int m = cost.cols, cap = cg_cap(cost.n, cost.m);
    const T shrink = T(of_a.soft * of_b.soft);
    for (int j = 0; j < m; ++j) {
      root[j] = std::sqrt(S[j]) * live[j];
      unroot[j] = root[j] > 0 ? 1 / root[j] : T(0);
      res[j] = h[j] * unroot[j];
    }
    T along = project(res);
    if (p.relaxed) project(res);  // what is taken out may be larger by far than what is left, and so may its rounding
    rhs_scale = 0;
    for (int j = 0; j < m; ++j) rhs_scale = std::max(rhs_scale, std::fabs(res[j]));
    if (rhs_scale == 0) rhs_scale = 1;
    for (int j = 0; j < m; ++j) res[j] /= rhs_scale;
    project(res);  // products of a tiny loss were lost above
    const T start = dot(res, res, m);
    T norm = start, least = start, terms = 0;
    for (int i = 0; i < cost.n; ++i) terms += A[i] * (y[i] / rhs_scale) * (y[i] / rhs_scale);
    T size = start;
    if (p.relaxed) {
      along /= rhs_scale;
      size += along * along * dot(root, root, m);
      terms = T(of_b.soft * of_b.soft) * terms + size;
    }
    if (start <= cg_noise * cg_noise * terms) return 0;  // h is the rounding of terms that cancel: V = 0 solves it
    for (int j = 0; j < m; ++j) dir[j] = res[j];
    for (int k = 0, last = 0; k < cap && norm > cg_target * cg_target * start && k - last < cg_patience; ++k) {
      for (int j = 0; j < m; ++j) v[j] = unroot[j] * dir[j];
      normal(v, work);
      __atomic_fetch_add(&adjoint_steps, 1, __ATOMIC_RELAXED);
      for (int j = 0; j < m; ++j) work[j] = dir[j] - unroot[j] * (shrink * work[j]);
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
    for (int j = 0; j < m; ++j) V[j] = unroot[j] * best[j] * rhs_scale;
    return size;
  }

  // A live column's V takes a Jacobi step where its mass is below `tiny` of the mean, but not below what is still exact.
  static constexpr T tiny = T(1e-4), countable = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();

  // V by conjugate gradients, then U and the V of dead columns by one more sweep, which also shows the true residual. Conjugate
  // gradients see sqrt(S) V, and leave the V of a tiny mass with an error that is not tiny. A Jacobi step from the same sweep mends
  // it. U does not feel that step, since tiny masses hardly count in it.
  T multipliers() {
    const T ones = p.relaxed ? along_ones(*this) : T(0), start = conjugate_gradients(), shrink = T(of_a.soft * of_b.soft);
    for (int j = 0; p.relaxed && j < cost.m; ++j) V[j] += live[j] * ones;
    normal(V, work);
    const T few = tiny * dot(root, root, cost.cols) / T(cost.m);
    for (int j = 0; j < cost.cols; ++j) {
      const T wanted = h[j] + shrink * work[j];
      res[j] = live[j] != 0 ? (wanted - S[j] * V[j]) * unroot[j] / rhs_scale : T(0);
      if (live[j] != 0 ? S[j] < few && S[j] > countable : S[j] > 0) V[j] = wanted / S[j];
    }
    project(res);
    const T left = dot(res, res, cost.cols);
    for (int i = 0; i < cost.n; ++i) fu[i] = T(of_a.soft) * (y[i] - fu[i]);  // U
    return start == 0 ? T(0) : std::sqrt(left / start);
  }

  void contract(const Gradient<T>& out) {
    for (int j = 0; j < cost.cols; ++j)
      work[j] = solve && up.g && j < cost.m && S[j] > 0 ? T(of_b.soft) * up.g[j] / S[j] : T(0);
    T *w_rows = y, *w_columns = h;  // weights, those of the columns by parts
    std::memset(w_columns, 0, sizeof(T) * cost.cols * cost.parts.count);
    const Weights weights = weights_of(p);
    const bool whole = cost.parts.count == 1;  // then each chunk is contracted both ways while it is in the cache
    team.each(cost.parts.count, [&](int part) {
      T* w = w_columns + size_t(part) * cost.cols;
      const int end = std::min(cost.n, cost.parts.end(part)), step = whole ? cost.chunk_rows() : cost.parts.size;
      for (int i0 = cost.parts.begin(part); i0 < end; i0 += step) {
        const int count = std::min(step, end - i0);
        for (int i = i0; i < i0 + count; i += rows_at_once) {
          if (weights == Weights::none) gradient_rows<Weights::none>(i, w_rows, w);
          else if (weights == Weights::cosines) gradient_rows<Weights::cosines>(i, w_rows, w);
          else gradient_rows<Weights::totals>(i, w_rows, w);
          poll_after_block(int64_t(rows_at_once) * cost.cols);
        }
        const T* G = M + size_t(i0) * cost.ld;
        cost.pull_rows(G, i0, count, w_rows, out);
        if (whole) cost.pull_columns(G, i0, count, 0, cost.m, w, out);
      }
    });
    if (whole) return;
    add_parts(w_columns, cost.parts.count, cost.cols);
    constexpr int width = 256;
    team.each((cost.m + width - 1) / width,
              [&](int strip) { cost.pull_columns(M, 0, cost.n, strip * width, width, w_columns, out); });
  }

  // Rows i0, .. of M become the gradient of those rows of the cost. W: the weights of cost.hpp that are wanted. Potentials: whether
  // there is a loss on f or g.
  static constexpr int rows_at_once = OTLOSS_VECTOR_BYTES == 64 ? 4 : 2;
  template <Weights W> void gradient_rows(int i0, T* w_rows, T* w_columns) {
    if (solve && (up.f || up.g)) gradient_rows<W, true>(i0, w_rows, w_columns);
    else gradient_rows<W, false>(i0, w_rows, w_columns);
  }
  template <Weights W, bool Potentials> void gradient_rows(int i0, T* w_rows, T* w_columns) {
    const T ie = solve ? 1 / p.eps : T(0), w = up.cost;
    vec<T> slope[rows_at_once], level[rows_at_once], direct[rows_at_once], near[rows_at_once], weight[rows_at_once] = {};
    repeat<rows_at_once>(OTLOSS_EACH(r) {
      const T mass = A[i0 + r];
      slope[r] = splat<T>(mass * ie);
      level[r] = splat<T>(mass * (fu[i0 + r] * ie + (w + up.value)));
      direct[r] = splat<T>(-w * mass * ie);
      near[r] = splat<T>(1 - f[i0 + r]);
    });
    for (int j = 0; j < cost.cols; j += lanes<T>) {
      const vec<T> alive = load(live + j), v = load(V + j), gj = load(g + j);
      vec<T> columns{};
      repeat<rows_at_once>(OTLOSS_EACH(r) {
        T* k = M + size_t(i0 + r) * cost.ld + j;
        const vec<T> e = load(k), reduced = masked(e, load(cost.row(i0 + r) + j));
        vec<T> bracket = v * slope[r] + (reduced * direct[r] + level[r]);
        if constexpr (Potentials) bracket = (bracket + pf[i0 + r]) * alive + A[i0 + r] * load(work + j);
        else bracket *= alive;
        const vec<T> gradient = e * bracket;
        store<T>(k, gradient);
        if constexpr (W != Weights::none) {
          const vec<T> term = W == Weights::totals ? gradient : gradient * (near[r] - gj - reduced);  // 1 - C is the cosine
          weight[r] += term, columns += term;
        }
      });
      if constexpr (W != Weights::none) store<T>(w_columns + j, load(w_columns + j) + columns);
    }
    repeat<rows_at_once>(OTLOSS_EACH(r) { w_rows[i0 + r] = sum<T>(weight[r]); });
  }

 private:
  T rhs_scale = 0;
  static constexpr T none = -std::numeric_limits<T>::infinity();
  bool up_ = false;
};

template <class T>
void implicit_gradient(const Problem<T>& p, Arena& arena, const Team& team, const T* f, const T* g, const Upstream<T>& up,
                       bool adjoint, const Gradient<T>& out) {
  arena.reset(Cost<T>::bytes(p, out.left) + Adjoint<T>::bytes(p));
  const bool needs_plan = adjoint || out.left || p.relaxed;
  const Cost<T> cost(p, arena, needs_plan, out.left);
  Adjoint<T> s(cost, arena, team, f, g, up, adjoint);
  const T w = (adjoint ? up.cost : T(0)) + up.value;
  *out.residual = 0;
  if (needs_plan) s.assemble();
  if (adjoint) *out.residual = s.multipliers();
  if (p.relaxed) {
    by_masses(s, out);
    if (out.left) s.contract(out);
    return;
  }
  for (int i = 0; i < p.n; ++i) out.a[i] = s.fu[i] + w * (f[i] + (p.row_shift ? p.row_shift[i] : T(0)));
  for (int j = 0; j < p.m; ++j) out.b[j] = s.V[j] + w * (g[j] + (p.row_shift ? p.column_shift[j] : T(0)));
  if (out.left) s.contract(out);
}

}  // namespace otloss::OTLOSS_LEVEL
