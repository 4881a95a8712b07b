// Solving one problem: which iterations, and the outputs.
#pragma once
#include "quasi_newton.hpp"

namespace otloss::OTLOSS_LEVEL {

// What is asked of the state in which a solve has ended.
template <class T> void write_solution(Solver<T>& s, const Solution<T>& out) {
  const Cost<T>& cost = s.cost;
  const Problem<T>& p = s.p;
  const Team& team = s.team;
  cost.copy_cost_to(out.kept);

  T *f = s.F, *g = s.G;  // dead entries: one half-step from the live ones
  s.potentials(f, g);
  if (p.symmetric)  // f = g, of the cost as it was given; to first order the error is the same, half on either side
    for (int i = 0; i < cost.n; ++i) {
      const T half = ((f[i] + s.row_shift[i]) + (g[i] + s.column_shift[i])) / 2;
      f[i] = half - s.row_shift[i], g[i] = half - s.column_shift[i];
    }
  for (int j = cost.m; j < cost.cols; ++j) g[j] = 0;
  T *f_all = s.next_phi, *g_all = s.next_psi;
  if (s.dead_rows) log_rows(team, cost, p.eps, g, s.log_b, f_all);
  if (s.dead_cols) log_cols(team, cost, p.eps, f, s.log_a, g_all, s.peak, s.total);
  double shift = 0;
  for (int i = 0; i < cost.n; ++i) {
    if (s.a[i] == 0) f[i] = f_all[i];
    shift -= 0.5 * double(s.a[i]) * f[i];
  }
  for (int j = 0; j < cost.m; ++j) {
    if (s.b[j] == 0) g[j] = g_all[j];
    shift += 0.5 * double(s.b[j]) * g[j];
  }
  if (p.symmetric) {
    shift = 0;
    for (int i = 0; i < cost.n; ++i) shift += 0.5 * double(s.a[i]) * (double(s.row_shift[i]) - s.column_shift[i]);
  }
  for (int i = 0; i < cost.n; ++i) out.f[i] = f[i] += T(shift);
  for (int j = 0; j < cost.m; ++j) out.g[j] = g[j] -= T(shift);
  if (out.row_shift) {
    std::memcpy(out.row_shift, s.row_shift, sizeof(T) * cost.n);
    std::memcpy(out.column_shift, s.column_shift, sizeof(T) * cost.m);
  }

  // With rho and sigma, the sums of b k by rows and of a k by columns, and C without its minima r and c:
  //   <T, C> + <T1, r> + <T'1, c>;   <T, C> + eps KL(T|ab') = <T1, f + r> + <T'1, g + c> - eps (sum T - 1);
  //   the marginals' error |T1 - a| + |T'1 - b|.
  T *rho = s.phi, *sharp_of = s.sharp, *sigma = s.psi;
  team.each(cost.parts.count, [&](int part) {
    T* columns = sigma + size_t(part) * cost.cols;
    std::memset(columns, 0, sizeof(T) * cost.cols);
    for (int i0 = cost.parts.begin(part); i0 < cost.parts.end(part); i0 += block) {
      vec<T> t[block] = {}, tc[block] = {};
      for (int j = 0; j < cost.cols; j += lanes<T>) {
        const vec<T> b = load(s.b + j), gj = load(g + j);
        vec<T> down = load(columns + j);
        repeat<block>(OTLOSS_EACH(r) {
          const vec<T> c = load(cost.row(i0 + r) + j), k = exp2<T>(min(splat(bound<T>), ((f[i0 + r] + gj) - c) * s.scale));
          t[r] += k * b;
          tc[r] += k * b * c;
          down += s.a[i0 + r] * k;
        });
        store<T>(columns + j, down);
      }
      T all[pad_to<T>];
      const auto keep = [&](vec<T>* sum, T* to) {
        sums<T, block>(sum, all);
        std::memcpy(to + i0, all, sizeof(T) * block);
      };
      keep(t, rho), keep(tc, sharp_of);
    }
  });
  add_parts(sigma, cost.parts.count, cost.cols);
  double sharp = 0, potential = 0, mass = 0, missed = 0;
  for (int i = 0; i < cost.n; ++i) {
    if (s.a[i] == 0) continue;  // its sums may have overflowed
    const double row = double(s.a[i]) * rho[i], r = s.row_shift[i];
    sharp += s.a[i] * double(sharp_of[i]) + row * r;
    potential += row * (f[i] + r);
    mass += row;
    missed += std::fabs(row - s.a[i]);
  }
  for (int j = 0; j < cost.m; ++j) {
    if (s.b[j] == 0) continue;
    const double column = double(s.b[j]) * sigma[j], c = s.column_shift[j];
    sharp += column * c;
    potential += column * (g[j] + c);
    missed += std::fabs(column - s.b[j]);
  }
  *out.cost = T(sharp);
  *out.value = T(potential - p.eps * (mass - 1));
  *out.error = T(missed);
}

template <class T>
void solve(const Problem<T>& p, Arena& arena, const Team& team, bool accelerate, int64_t max_iter, T tol, const Solution<T>& out) {
  arena.reset(Cost<T>::bytes(p, false) + (accelerate ? QuasiNewton<T>::bytes(p) : Solver<T>::bytes(p)));
  const Cost<T> cost(p, arena, true, false);
  if (accelerate) {
    QuasiNewton<T> s(cost, arena, team);
    s.start();
    s.run(max_iter, tol, *out.n_iter);
    write_solution(s, out);
  } else {
    Solver<T> s(cost, arena, team);
    s.read_cost(!p.right);
    if (!p.right) s.shift_cost();
    s.run(max_iter, tol, *out.n_iter, [](int64_t) {});
    write_solution(s, out);
  }
}

}  // namespace otloss::OTLOSS_LEVEL
