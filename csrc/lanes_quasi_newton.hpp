// quasi_newton.hpp for problems with short rows, one to a lane (lanes.hpp). Each lane has its own course, hence its own stage and eps.
#pragma once
#include "lanes_solve.hpp"
#include "solution.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct LaneQuasiNewton : LaneSolver<T> {
  using Base = LaneSolver<T>;
  using Base::L, Base::n, Base::m, Base::a, Base::b, Base::C, Base::K, Base::F, Base::G, Base::phi, Base::psi, Base::next_phi,
      Base::next_psi, Base::v, Base::row_shift, Base::column_shift, Base::eps, Base::scale, Base::fallback, Base::at, Base::get, Base::put,
      Base::set, Base::entry;
  using Vec = vec<T>;
  using Mask = mask<T>;

  T *point, *plain, *residual, *trial, *dir, *root, *unroot, *steps[memory], *changes[memory];
  Vec inverse[memory] = {};
  Course<T> course[L];
  Mask active;
  int newest = 0;

  LaneQuasiNewton(const Problem<T>* p, int count, Arena& arena) : Base(p, count, arena) {
    for (T** x : {&point, &plain, &residual, &trial, &dir, &root, &unroot}) *x = this->columns();
    for (int s = 0; s < memory; ++s) {
      steps[s] = this->columns(), changes[s] = this->columns();
      for (int j = 0; j < m; ++j) set(steps[s], j, Vec{}), set(changes[s], j, Vec{});
    }
    for (int j = 0; j < m; ++j) {
      set(root, j, Base::square_root(at(b, j)));
      set(unroot, j, 1 / at(root, j));
      for (T* x : {residual, dir}) set(x, j, Vec{});
      for (T* x : {plain, point}) set(x, j, splat<T>(1));
    }
  }

  // The minima go out of a dense cost, or of features into the potentials.
  void start() {
    this->find_minima();
    const bool dense = !this->p->right;
    if (dense) this->shift_cost();
    for (int i = 0; i < n; ++i) {
      set(F, i, dense ? Vec{} : at(row_shift, i));
      if (!dense) set(row_shift, i, Vec{});
    }
    for (int j = 0; j < m; ++j) {
      set(G, j, dense ? Vec{} : at(column_shift, j));
      if (!dense) set(column_shift, j, Vec{});
    }
    this->build(~Mask{});
  }

  void run(int64_t max_iter, T tol, const Solution<T>* outs) {
    plan(max_iter, tol);
    active = ~fallback;
    while (any<T>(active)) {
      Vec error, reach, slope{};
      evaluate(error, reach);
      for (int j = 0; j < m; ++j) slope += at(trial, j) * at(dir, j);
      Mask kept{}, rejected{}, fresh{}, far{}, over{}, newton{};
      for (int lane = 0; lane < L; ++lane) {
        if (!active[lane]) continue;
        Course<T>& c = course[lane];
        const auto verdict = c.judge(reach[lane] <= Solver<T>::wide, error[lane], slope[lane]);
        if (verdict == Course<T>::lost) {
          fallback[lane] = -1, active[lane] = 0;
          continue;
        }
        if (verdict == Course<T>::rejected) rejected[lane] = -1;
        else kept[lane] = -1, fresh[lane] = -int(c.fresh), c.fresh = false;
        if (c.stage_is_over()) over[lane] = -1;
        else if (kept[lane] && reach[lane] > Solver<T>::safe) far[lane] = -1;
      }
      remember(kept & ~fresh, rejected | fresh);
      keep(kept);
      if (any<T>(over)) next_stage(over, outs);
      if (any<T>(far)) {
        for (int j = 0; j < m; ++j) set(plain, j, far ? at(plain, j) / at(psi, j) : at(plain, j));
        this->absorb(far);
      }
      for (int lane = 0; lane < L; ++lane)
        if (active[lane] && !over[lane] && !rejected[lane] && course[lane].wants_newton()) newton[lane] = -1;
      if (any<T>(newton)) newton_step(newton);
      plain_step(active & ~over & ~newton);
    }
  }

 private:
  // Every lane's course, from the mean cost of a b' with the potentials of the start taken out.
  void plan(int64_t max_iter, T tol) {
    Vec mean{};
    for (int i = 0; i < n; ++i) {
      Vec row{};
      for (int j = 0; j < m; ++j) row += ((entry(C, i, j) - at(F, i)) - at(G, j)) * at(b, j);
      mean += row * at(a, i);
    }
    for (int lane = 0; lane < L; ++lane) course[lane] = Course<T>(this->p->eps, tol, max_iter, mean[lane]);
  }

  // See QuasiNewton::evaluate.
  void evaluate(Vec& error, Vec& reach) {
    Vec top = splat<T>(1), bottom = top, nothing{}, missed{};
    const auto spread = [&](Vec s) __attribute__((always_inline)) {
      top = max(s, top);
      bottom = min(s, bottom);
      nothing += s * T(0);
    };
    for (int j = 0; j < m; ++j) set(v, j, at(b, j) * at(point, j));
    this->sweep(K, v, next_psi, [&](int i, Vec s) __attribute__((always_inline)) {
      const Vec scaling = 1 / s;
      set(next_phi, i, scaling);
      spread(scaling);
      return at(a, i) * scaling;
    });
    for (int j = 0; j < m; ++j) {
      const Vec total = at(next_psi, j), scaling = 1 / total, left = at(root, j) * (1 - at(point, j) * total);
      set(trial, j, left);
      set(next_psi, j, scaling);
      spread(scaling);
      missed += Base::absolute(left * at(root, j));
    }
    error = missed;
    reach = max(top, 1 / bottom) + nothing;
  }

  // Saves the steps of some lanes and the changes of their gradients; clears the memory of others.
  void remember(Mask some, Mask cleared) {
    newest = (newest + 1) % memory;
    Vec along{}, step{}, change{};
    for (int j = 0; j < m; ++j) {
      const Vec s = some ? at(dir, j) : Vec{}, y = some ? at(residual, j) - at(trial, j) : Vec{};
      set(steps[newest], j, s);
      set(changes[newest], j, y);
      along += s * y;
      step += s * s;
      change += y * y;
    }
    for (Vec& x : inverse) x = cleared ? Vec{} : x;
    for (int lane = 0; lane < L; ++lane) inverse[newest][lane] = inverse_curvature(along[lane], step[lane], change[lane]);
  }

  // The trial becomes the state of some lanes.
  void keep(Mask kept) {
    if (any<T>(~kept)) {
      for (int i = 0; i < n; ++i) set(next_phi, i, kept ? at(next_phi, i) : at(phi, i));
      for (int j = 0; j < m; ++j) {
        set(point, j, kept ? at(point, j) : at(psi, j));
        set(next_psi, j, kept ? at(next_psi, j) : at(plain, j));
        set(trial, j, kept ? at(trial, j) : at(residual, j));
      }
    }
    std::swap(phi, next_phi);
    std::swap(psi, point);
    std::swap(plain, next_psi);
    std::swap(residual, trial);
  }

  void next_stage(Mask over, const Solution<T>* outs) {
    for (int j = 0; j < m; ++j) set(psi, j, over ? at(plain, j) : at(psi, j));
    Mask moving{};
    for (int lane = 0; lane < L; ++lane) {
      if (!over[lane]) continue;
      *outs[lane].n_iter = course[lane].k;
      if (course[lane].advance()) moving[lane] = -1;
      else active[lane] = 0;
    }
    if (!any<T>(moving)) return;
    this->move_scalings(moving);
    for (int lane = 0; lane < L; ++lane)
      if (moving[lane]) {
        eps[lane] = course[lane].stage_eps();
        scale[lane] = exponent_scale(eps[lane]);
        for (Vec& x : inverse) x[lane] = 0;
      }
    this->first_rows(moving);
    for (int j = 0; j < m; ++j) set(plain, j, moving ? splat<T>(1) : at(plain, j));
  }

  // Lanes that are not in `where` and do not take a quasi-Newton step stay at the state.
  void plain_step(Mask where) {
    for (int lane = 0; lane < L; ++lane)
      if (where[lane]) course[lane].takes_plain();
    Mask newton{};
    for (int lane = 0; lane < L; ++lane) newton[lane] = -int(active[lane] && course[lane].newton);
    if (!any<T>(~newton)) return;
    const bool some = any<T>(where);
    for (int j = 0; j < m; ++j) {
      const Vec now = at(psi, j), next = where ? at(plain, j) : now;
      set(point, j, newton ? at(point, j) : next);
      set(dir, j, newton ? at(dir, j) : some ? at(root, j) * log2<T>(next / now) * T(ln2) : Vec{});
    }
  }

  // Takes quasi-Newton steps in some lanes, and takes those out of `some` that get none.
  void newton_step(Mask& some) {
    const auto slot = [this](int i) { return (newest - i + memory) % memory; };  // from the newest to the oldest
    const auto add = [this](Vec factor, const T* x, const T* y) __attribute__((always_inline)) {
      Vec total[2] = {};
      for (int j = 0; j < m; ++j) {
        const Vec d = at(dir, j) + factor * at(x, j);
        set(dir, j, d);
        total[j % 2] += d * at(y, j);
      }
      return total[0] + total[1];
    };
    Vec weight[memory], slope{}, top{}, bottom{}, shorter{}, pairs{};
    for (int j = 0; j < m; ++j) {
      set(dir, j, at(residual, j));
      slope += at(steps[newest], j) * at(residual, j);
    }
    for (int i = 0; i < memory; ++i) {
      weight[i] = inverse[slot(i)] * slope;
      slope = add(-weight[i], changes[slot(i)], i + 1 < memory ? steps[slot(i + 1)] : changes[slot(i)]);
    }
    for (int i = memory - 1; i >= 0; --i)
      slope = add(weight[i] - inverse[slot(i)] * slope, steps[slot(i)], i > 0 ? changes[slot(i - 1)] : residual);
    for (int j = 0; j < m; ++j) {
      const Vec x = at(dir, j) * at(unroot, j);
      top = max(x, top);
      bottom = min(x, bottom);
    }
    for (const Vec& x : inverse) pairs += x;
    for (int lane = 0; lane < L; ++lane) {
      const T range = top[lane] - bottom[lane];
      Course<T>& c = course[lane];
      shorter[lane] = range > Course<T>::most_range ? Course<T>::most_range / range : T(1);
      if (!some[lane]) continue;
      if (pairs[lane] > 0 && slope[lane] > 0) {
        if (c.takes_newton(range)) c.slope = slope[lane] * shorter[lane];
        else some[lane] = 0;
      } else {
        some[lane] = 0;
        for (Vec& x : inverse) x[lane] = 0;
      }
    }
    for (int j = 0; j < m; ++j) {
      const Vec d = at(dir, j) * shorter;
      set(dir, j, d);
      set(point, j, at(psi, j) * exp2<T>(d * at(unroot, j) * T(log2e)));
    }
  }
};

// Solves up to `lanes` problems of one shape.
template <class T>
void solve_lanes(const Problem<T>* p, int count, Arena& arena, bool accelerate, int64_t max_iter, T tol, const Solution<T>* outs) {
  mask<T> fallback;
  const auto keep = [&](int lane, const Cost<T>& cost) { cost.copy_cost_to(outs[lane].kept); };
  if (accelerate) {
    LaneQuasiNewton<T> s(p, count, arena);
    s.fill(keep);
    s.start();
    s.run(max_iter, tol, outs);
    fallback = s.fallback;
    write_solutions(s, count, outs);
  } else {
    LaneSolver<T> s(p, count, arena);
    s.fill(keep);
    if (!p->right) {
      s.find_minima();
      s.shift_cost();
    }
    int64_t n_iter[lanes<T>];
    s.run(max_iter, tol, n_iter);
    for (int lane = 0; lane < count; ++lane) *outs[lane].n_iter = n_iter[lane];
    fallback = s.fallback;
    write_solutions(s, count, outs);
  }
  const Team alone;
  for (int lane = 0; lane < count; ++lane)
    if (fallback[lane]) solve(p[lane], arena, alone, accelerate, max_iter, tol, outs[lane]);
}

}  // namespace otloss::OTLOSS_LEVEL
