// adjoint.hpp for problems with short rows, one to a lane (lanes.hpp): every mass is live, there is no loss on f or g, and so
// M = T by rows over their sums.
#pragma once
#include "adjoint.hpp"
#include "lanes.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct LaneAdjoint : Lanes<T> {
  using Base = Lanes<T>;
  using Base::L, Base::n, Base::m, Base::a, Base::b, Base::C, Base::fallback, Base::at, Base::get, Base::put, Base::set, Base::entry;
  using Vec = vec<T>;
  const T eps, scale;
  const bool solve, relaxed;
  Penalty<T> of_a[L], of_b[L];
  Vec soft_a = splat<T>(1), soft_b = soft_a, shrink = soft_a;  // d_a, d_b and d_a d_b
  Vec pull_a{}, pull_b{};                                      // w eps/rho
  Vec w{}, level{};  // upstream, by lane: of the transport cost, and of it and the value
  Vec rhs_scale{};  // the largest entry of the right-hand side, by which it is divided
  // As in adjoint.hpp; for columns `best` becomes the multiplier V, for rows `fu` becomes U.
  T *M, *A, *y, *f, *fu, *S, *h, *v, *g, *root, *unroot, *z, *res, *dir, *work, *best;

  LaneAdjoint(const Problem<T>* p, int count, Arena& arena, const T* const* f_in, const T* const* g_in, const Upstream<T>* up, bool solve)
      : Base(p, count, arena), eps(p->eps), scale(exponent_scale(p->eps)), solve(solve), relaxed(p->relaxed) {
    M = this->matrix();
    for (T** x : {&A, &y, &f, &fu}) *x = this->rows();
    for (T** x : {&S, &h, &g, &root, &unroot, &z, &res, &dir, &work, &best, &v}) {
      *x = this->columns();
      std::memset(*x, 0, sizeof(T) * m * L);
    }
    std::memset(fu, 0, sizeof(T) * n * L);
    for (int lane = 0; lane < L; ++lane) {
      const bool used = lane < count;
      for (int i = 0; i < n; ++i) put(f, i, lane, used ? f_in[lane][i] : T(0));
      for (int j = 0; j < m; ++j) put(g, j, lane, used ? g_in[lane][j] : T(0));
      if (used) w[lane] = up[lane].cost, level[lane] = up[lane].cost + up[lane].value;
      if (used && relaxed) {
        const Penalty<T> a(p[lane].inverse_rho_a, eps), b(p[lane].inverse_rho_b, eps);
        soft_a[lane] = T(a.soft), soft_b[lane] = T(b.soft), shrink[lane] = T(a.soft * b.soft);
        pull_a[lane] = T(w[lane] * a.slack), pull_b[lane] = T(w[lane] * b.slack);
        of_a[lane] = a, of_b[lane] = b;
      }
    }
  }

  // Computes M, A, S and the right-hand side; C becomes R.
  void assemble() {
    for (int i = 0; i < n; ++i) {
      Vec total{}, sharp{};
      const Vec fi = at(f, i);
      for (int j = 0; j < m; ++j) {
        const Vec reduced = (entry(C, i, j) - fi) - at(g, j), e = at(b, j) * exp2<T>(-reduced * scale);
        set(C, i, j, reduced);
        set(M, i, j, e);
        total += e;
        sharp += e * masked(e, reduced);
      }
      fallback |= ~((total > Adjoint<T>::least) & (total < 1 / Adjoint<T>::least));
      const Vec factor = 1 / total, mass = at(a, i) * total, slope = mass * w;
      Vec average = w * sharp * factor, rest = mass * average;
      if (relaxed) {
        if (solve) set(fu, i, sharp * factor);
        average -= pull_a * fi;
        rest = soft_a * (mass * average);
      }
      set(A, i, mass);
      set(y, i, average);
      for (int j = 0; j < m; ++j) {
        const Vec e = entry(M, i, j) * factor, reduced = masked(e, entry(C, i, j));
        set(M, i, j, e);
        set(C, i, j, reduced);
        set(S, j, at(S, j) + mass * e);
        set(h, j, at(h, j) + e * (slope * reduced - rest));
      }
    }
    if (!relaxed) return;
    Vec top{};
    for (int j = 0; j < m; ++j) top = max(at(S, j), top);
    for (int j = 0; j < m; ++j) {
      fallback |= ~(at(S, j) > dead_mass<T> * top);  // it counts as a column without mass
      set(h, j, soft_b * (at(h, j) - pull_b * at(S, j) * at(g, j)));
    }
  }

  // See along_ones in relaxed_adjoint.hpp.
  Vec along_ones() const {
    Vec share{};
    for (int lane = 0; lane < L; ++lane) {
      if (fallback[lane]) continue;
      Ones<T> ones;
      ones.add_rows(n, L, A + lane, fu + lane, f + lane);
      ones.add_columns(m, L, S + lane, g + lane);
      share[lane] = ones.share(of_a[lane], of_b[lane], w[lane]);
    }
    return share;
  }

  // See by_masses in relaxed_adjoint.hpp.
  void by_masses(int lane, const T* f_in, const T* g_in, T value, const Gradient<T>& out) const {
    const Problem<T>& q = this->p[lane];
    double whole_a = 0, whole_b = 0;
    for (int i = 0; i < n; ++i) whole_a += q.a[i];
    for (int j = 0; j < m; ++j) whole_b += q.b[j];
    const T w_cost = solve ? w[lane] : T(0);
    by_side<T>(n, L, of_a[lane], q.a, A + lane, f_in, fu + lane, nullptr, w_cost, value, eps, whole_b, out.a, out.rho);
    by_side<T>(m, L, of_b[lane], q.b, S + lane, g_in, best + lane, nullptr, w_cost, value, eps, whole_a, out.b, out.rho + 1);
  }

  void normal(const T* x, T* to) {
    this->sweep(M, x, to, [this](int i, Vec s) __attribute__((always_inline)) {
      set(fu, i, s);
      return s * at(A, i);
    });
  }

  Vec inner(const T* x, const T* z) const {
    Vec total[2] = {};
    int j = 0;
    for (; j + 2 <= m; j += 2) total[0] += at(x, j) * at(z, j), total[1] += at(x, j + 1) * at(z, j + 1);
    if (j < m) total[0] += at(x, j) * at(z, j);
    return total[0] + total[1];
  }

  Vec project(T* x) const {
    const Vec along = inner(x, root) / inner(root, root);
    for (int j = 0; j < m; ++j) set(x, j, at(x, j) - along * at(root, j));
    return along;
  }

  // Adjoint::conjugate_gradients, lane by lane. Returns the squared sizes of the right-hand sides; the multipliers V are in
  // `best`.
  Vec conjugate_gradients() {
    constexpr T target = Adjoint<T>::cg_target, noise = Adjoint<T>::cg_noise;
    const int cap = Adjoint<T>::cg_cap(n, m);
    for (int j = 0; j < m; ++j) {
      const Vec mass = Base::square_root(at(S, j));
      set(root, j, mass);
      set(unroot, j, mass > 0 ? 1 / mass : Vec{});
      set(res, j, at(h, j) * at(unroot, j));
    }
    Vec along = project(res);
    if (relaxed) project(res);
    for (int j = 0; j < m; ++j) rhs_scale = max(max(at(res, j), -at(res, j)), rhs_scale);
    rhs_scale = rhs_scale == 0 ? rhs_scale + 1 : rhs_scale;
    for (int j = 0; j < m; ++j) set(res, j, at(res, j) / rhs_scale);
    project(res);
    Vec terms{};
    for (int i = 0; i < n; ++i) terms += at(A, i) * (at(y, i) / rhs_scale) * (at(y, i) / rhs_scale);
    Vec start = inner(res, res), size = start;
    if (relaxed) {
      along /= rhs_scale;
      size += along * along * inner(root, root);
      terms = soft_b * soft_b * terms + size;
    }
    const mask<T> trivial = start <= noise * noise * terms;
    start = trivial ? Vec{} : start;
    size = trivial ? Vec{} : size;
    Vec norm = start, least = start;
    mask<T> active = ~(trivial | fallback), last{}, steps{};
    std::memcpy(dir, res, sizeof(T) * m * L);
    for (int k = 0; k < cap; ++k) {
      active &= (norm > target * target * start) & (k - last < Adjoint<T>::cg_patience);
      if (!any<T>(active)) break;
      steps -= active;
      poll(int64_t(n) * m * Base::L);
      for (int j = 0; j < m; ++j) set(v, j, at(unroot, j) * at(dir, j));
      normal(v, work);
      for (int j = 0; j < m; ++j) set(work, j, at(dir, j) - at(unroot, j) * (shrink * at(work, j)));
      project(work);
      const Vec curvature = inner(dir, work);
      active &= curvature > 0;
      const Vec step = active ? norm / curvature : Vec{};
      for (int j = 0; j < m; ++j) {
        set(z, j, active ? at(z, j) + step * at(dir, j) : at(z, j));
        set(res, j, active ? at(res, j) - step * at(work, j) : at(res, j));
      }
      const Vec next = inner(res, res), turn = active ? next / norm : Vec{};
      for (int j = 0; j < m; ++j) set(dir, j, active ? at(res, j) + turn * at(dir, j) : at(dir, j));
      norm = active ? next : norm;
      const mask<T> better = active & (norm < least);
      least = better ? norm : least;
      last = better ? mask<T>{} + k : last;
      for (int j = 0; j < m; ++j) set(best, j, better ? at(z, j) : at(best, j));
    }
    for (int lane = 0; lane < Base::L; ++lane) __atomic_fetch_add(&adjoint_steps, int64_t(steps[lane]), __ATOMIC_RELAXED);
    for (int j = 0; j < m; ++j) set(best, j, at(unroot, j) * at(best, j) * rhs_scale);
    return size;
  }

  // Computes the multipliers, V in `best` and U in `fu`, and returns the residual of each lane.
  Vec multipliers() {
    const Vec ones = relaxed ? along_ones() : Vec{}, start = conjugate_gradients();
    for (int j = 0; relaxed && j < m; ++j) set(best, j, at(best, j) + ones);
    normal(best, work);
    const Vec few = inner(root, root) * (Adjoint<T>::tiny / T(m));
    for (int j = 0; j < m; ++j) {
      const Vec wanted = at(h, j) + shrink * at(work, j), mass = at(S, j);
      set(res, j, (wanted - mass * at(best, j)) * at(unroot, j) / rhs_scale);
      set(best, j, (mass < few) & (mass > Adjoint<T>::countable) ? wanted / mass : at(best, j));
    }
    project(res);
    for (int i = 0; i < n; ++i) set(fu, i, soft_a * (at(y, i) - at(fu, i)));
    return start == 0 ? Vec{} : Base::square_root(inner(res, res) / start);
  }

  // Turns M into the gradient by the cost. Its weights (cost.hpp) by rows are left in `y`, by columns in `h`.
  template <Weights W> void gradient() {
    const T ie = solve ? 1 / eps : T(0);
    std::memset(h, 0, sizeof(T) * m * L);
    for (int i = 0; i < n; ++i) {
      const Vec mass = at(A, i), slope = mass * ie, flat = mass * (at(fu, i) * ie + level), direct = -w * slope;
      const Vec near = 1 - at(f, i);
      Vec weight{};
      for (int j = 0; j < m; ++j) {
        const Vec reduced = entry(C, i, j), e = entry(M, i, j) * (at(best, j) * slope + (reduced * direct + flat));
        set(M, i, j, e);
        if constexpr (W != Weights::none) {
          const Vec term = W == Weights::totals ? e : e * (near - at(g, j) - reduced);  // 1 - C is the cosine
          set(h, j, at(h, j) + term), weight += term;
        }
      }
      set(y, i, weight);
    }
  }
};

template <class T>
void implicit_lanes(const Problem<T>* p, int count, Arena& arena, const T* const* f, const T* const* g, const Upstream<T>* up,
                    bool adjoint, const Gradient<T>* grads) {
  const bool need_cost = grads->left;
  mask<T> fallback;
  {
    LaneAdjoint<T> s(p, count, arena, f, g, up, adjoint);
    vec<T> residual{};
    if (adjoint || need_cost || p->relaxed) {
      s.fill([](int, const Cost<T>&) {});
      s.assemble();
    }
    if (adjoint) residual = s.multipliers();
    if (need_cost) {
      const Weights weights = weights_of(*p);
      if (weights == Weights::none) s.template gradient<Weights::none>();
      else if (weights == Weights::cosines) s.template gradient<Weights::cosines>();
      else s.template gradient<Weights::totals>();
      s.stage(s.M);
    }
    fallback = s.fallback;
    for (int lane = 0; lane < count; ++lane) {
      if (fallback[lane]) continue;
      const Gradient<T>& grad = grads[lane];
      const T value = (adjoint ? up[lane].cost : T(0)) + up[lane].value;
      const Problem<T>& q = p[lane];
      if (q.relaxed) s.by_masses(lane, f[lane], g[lane], up[lane].value, grad);
      for (int i = 0; !q.relaxed && i < s.n; ++i) grad.a[i] = s.get(s.fu, i, lane) + value * (f[lane][i] + (q.row_shift ? q.row_shift[i] : T(0)));
      for (int j = 0; !q.relaxed && j < s.m; ++j) grad.b[j] = s.get(s.best, j, lane) + value * (g[lane][j] + (q.row_shift ? q.column_shift[j] : T(0)));
      *grad.residual = residual[lane];
      if (!need_cost) continue;
      const size_t mark = arena.used();
      T *G = s.staged + lane * s.step(), w_rows[short_rows], w_columns[short_rows];
      const Cost<T> cost(p[lane], arena, false, true, G);
      for (int i = 0; i < s.n; ++i) w_rows[i] = s.get(s.y, i, lane);
      for (int j = 0; j < s.m; ++j) w_columns[j] = s.get(s.h, j, lane);
      cost.pull_rows(G, 0, s.n, w_rows, grad);
      cost.pull_columns(G, 0, s.n, 0, s.m, w_columns, grad);
      arena.rewind(mark);
    }
  }
  const Team alone(p->n, p->m, p->d);
  for (int lane = 0; lane < count; ++lane)
    if (fallback[lane]) implicit_gradient(p[lane], arena, alone, f[lane], g[lane], up[lane], adjoint, grads[lane]);
}

}  // namespace otloss::OTLOSS_LEVEL
