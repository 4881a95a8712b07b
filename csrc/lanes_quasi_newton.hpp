// quasi_newton.hpp for problems with short rows, one to a lane (lanes.hpp). Each lane has its own course, hence its own stage and eps.
#pragma once
#include "lanes_relaxed.hpp"
#include "solution.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct LaneQuasiNewton : LaneSolver<T> {
  using Base = LaneSolver<T>;
  using Base::L, Base::n, Base::m, Base::a, Base::b, Base::C, Base::K, Base::F, Base::G, Base::phi, Base::psi, Base::next_phi,
      Base::next_psi, Base::v, Base::row_shift, Base::column_shift, Base::eps, Base::scale, Base::fallback, Base::at, Base::get, Base::put,
      Base::set, Base::entry;
  using Vec = vec<T>;
  using Mask = mask<T>;

  T *point, *plain, *residual, *gradient, *trial, *trial_gradient, *dir, *root, *unroot, *steps[memory], *changes[memory];
  T *last_phi, *last_psi;  // the scalings of lanes that are done, whose vectors run on
  Vec inverse[memory] = {};
  Course<T> course[L];
  Mask active, waiting = {};  // waiting: whose newest pair is to be added to the next
  int newest = 0;

  LaneQuasiNewton(const Problem<T>* p, int count, Arena& arena) : Base(p, count, arena) {
    for (T** x : {&point, &plain, &residual, &gradient, &trial, &trial_gradient, &dir, &root, &unroot, &last_psi}) *x = this->columns();
    last_phi = this->rows();
    for (int s = 0; s < memory; ++s) {
      steps[s] = this->columns(), changes[s] = this->columns();
      for (int j = 0; j < m; ++j) set(steps[s], j, Vec{}), set(changes[s], j, Vec{});
    }
    for (int i = 0; i < n; ++i) set(last_phi, i, splat<T>(1));
    for (int j = 0; j < m; ++j) {
      set(last_psi, j, splat<T>(1));
      set(root, j, Base::square_root(at(b, j)));
      set(unroot, j, 1 / at(root, j));
      for (T* x : {residual, gradient, dir}) set(x, j, Vec{});
      for (T* x : {plain, point}) set(x, j, splat<T>(1));
    }
  }

  // See QuasiNewton::start.
  void start() {
    using Single = QuasiNewton<T>;
    const bool dense = !this->p->right;
    if (Single::may_lose(*this->p)) this->find_minima();
    if (dense) this->shift_cost();
    Vec most{};
    for (int j = 0; j < m; ++j) most = max(at(column_shift, j), most);
    const Vec share = (most > Single::lost_beyond * this->p->eps ? splat<T>(1) : Vec{}) - T(dense);
    for (int j = 0; j < m; ++j) {
      set(G, j, share * at(column_shift, j));
      if (!dense) set(column_shift, j, Vec{});
    }
    for (int i = 0; !dense && i < n; ++i) set(row_shift, i, Vec{});
    this->begin();
  }

  void run(int64_t max_iter, T tol, const Solution<T>* outs) {
    for (Course<T>& c : course) c = Course<T>(this->p->eps, tol, max_iter);
    active = ~fallback;
    while (any<T>(active)) {
      poll(int64_t(n) * m * L);
      Vec error, reach, slope, range;
      evaluate(error, reach, slope, range);
      typename Course<T>::Verdict verdict[L] = {};
      bool doubt = false;
      for (int lane = 0; lane < L; ++lane) {
        if (!active[lane]) continue;
        verdict[lane] = course[lane].judge(reach[lane] <= Solver<T>::wide, error[lane], slope[lane]);
        doubt |= verdict[lane] == Course<T>::doubtful;
      }
      const Vec gain = doubt ? raise() : Vec{};
      Mask kept{}, rejected{}, fresh{}, far{}, over{}, newton{};
      bool lost = false;
      for (int lane = 0; lane < L; ++lane) {
        if (!active[lane]) continue;
        Course<T>& c = course[lane];
        if (verdict[lane] == Course<T>::doubtful) verdict[lane] = c.decide(gain[lane], error[lane]);
        if (verdict[lane] == Course<T>::lost) {
          fallback[lane] = -1, active[lane] = 0;
        } else if (verdict[lane] == Course<T>::rejected) {
          rejected[lane] = -1;
        } else {
          kept[lane] = -1, fresh[lane] = -int(c.fresh);
          c.fresh = false, c.plain_range = range[lane];
          lost |= c.asks_the_way();
        }
      }
      remember(kept & ~fresh, rejected | fresh);
      keep(~rejected);
      if (lost) find_the_way(kept);
      for (int lane = 0; lane < L; ++lane) {
        if (!active[lane]) continue;
        if (course[lane].stage_is_over()) over[lane] = -1;
        else if (kept[lane] && reach[lane] > Solver<T>::safe) far[lane] = -1;
      }
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
    std::swap(phi, last_phi);
    std::swap(psi, last_psi);
  }

 private:
  // See QuasiNewton::way.
  void find_the_way(Mask kept) {
    const auto potential = [this](const T* x, const T* scaling, int i) { return at(x, i) + eps * T(ln2) * log2<T>(at(scaling, i)); };
    for (int j = 0; j < m; ++j) set(v, j, potential(G, psi, j));
    Vec mean{};
    for (int i = 0; i < n; ++i) {
      const Vec f = potential(F, phi, i);
      Vec row{};
      for (int j = 0; j < m; ++j) {
        const Vec c = entry(C, i, j);
        row += (c == forbidden<T> ? Vec{} : (c - f) - at(v, j)) * at(b, j);
      }
      mean += row * at(a, i);
    }
    for (int lane = 0; lane < L; ++lane)
      if (kept[lane] && course[lane].asks_the_way()) course[lane].knows_the_way(mean[lane] / eps[lane]);
  }

  // See QuasiNewton::evaluate.
  void evaluate(Vec& error, Vec& reach, Vec& slope, Vec& range) {
    Vec top = splat<T>(1), bottom = top, nothing{}, missed{}, along{}, up{}, down{};
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
      const Vec total = at(next_psi, j), scaling = 1 / total, q = at(point, j) * total, left = at(root, j) * (1 - q);
      const Vec step = log2<T>(q) * T(-ln2);
      set(trial_gradient, j, left);
      set(trial, j, at(root, j) * step);
      set(next_psi, j, scaling);
      spread(scaling);
      missed += Base::absolute(left * at(root, j));
      along += left * at(dir, j);
      up = max(step, up);
      down = min(step, down);
    }
    error = missed;
    slope = along;
    range = up - down;
    reach = max(top, 1 / bottom) + nothing;
  }

  // See QuasiNewton::raise.
  Vec raise() const {
    Vec by_rows{}, by_columns{};
    for (int i = 0; i < n; ++i) by_rows += at(a, i) * log2<T>(at(next_phi, i) / at(phi, i));
    for (int j = 0; j < m; ++j) by_columns += at(root, j) * at(dir, j);
    return by_rows * T(ln2) + by_columns;
  }

  void forget(Mask where) {
    for (Vec& x : inverse) x = where ? Vec{} : x;
    waiting &= ~where;
  }

  // Saves the steps of some lanes and the changes of their residuals; clears the memory of others.
  void remember(Mask some, Mask cleared) {
    const T *last_step = steps[newest], *last_change = changes[newest];
    newest = (newest + 1) % memory;
    forget(cleared);
    Vec along{}, step{}, change{};
    for (int j = 0; j < m; ++j) {
      const Vec s = (some ? at(dir, j) : Vec{}) + (waiting ? at(last_step, j) : Vec{});
      const Vec y = (some ? at(residual, j) - at(trial, j) : Vec{}) + (waiting ? at(last_change, j) : Vec{});
      set(steps[newest], j, s);
      set(changes[newest], j, y);
      along += s * y;
      step += s * s;
      change += y * y;
    }
    for (int lane = 0; lane < L; ++lane) {
      inverse[newest][lane] = inverse_curvature(along[lane], step[lane], change[lane]);
      waiting[lane] = -int(some[lane] && is_rounding(change[lane]));
    }
  }

  // The trial becomes the state of some lanes.
  void keep(Mask kept) {
    if (any<T>(~kept)) {
      for (int i = 0; i < n; ++i) set(next_phi, i, kept ? at(next_phi, i) : at(phi, i));
      for (int j = 0; j < m; ++j) {
        set(point, j, kept ? at(point, j) : at(psi, j));
        set(next_psi, j, kept ? at(next_psi, j) : at(plain, j));
        set(trial, j, kept ? at(trial, j) : at(residual, j));
        set(trial_gradient, j, kept ? at(trial_gradient, j) : at(gradient, j));
      }
    }
    std::swap(phi, next_phi);
    std::swap(psi, point);
    std::swap(plain, next_psi);
    std::swap(residual, trial);
    std::swap(gradient, trial_gradient);
  }

  void next_stage(Mask over, const Solution<T>* outs) {
    for (int j = 0; j < m; ++j) set(psi, j, over ? at(plain, j) : at(psi, j));
    Mask moving{};
    for (int lane = 0; lane < L; ++lane) {
      if (!over[lane]) continue;
      *outs[lane].n_iter = course[lane].k;
      if (course[lane].advance()) {
        moving[lane] = -1;
      } else {
        active[lane] = 0;
        for (int i = 0; i < n; ++i) put(last_phi, i, lane, get(phi, i, lane));
        for (int j = 0; j < m; ++j) put(last_psi, j, lane, get(psi, j, lane));
      }
    }
    if (!any<T>(moving)) return;
    this->move_scalings(moving);
    for (int lane = 0; lane < L; ++lane)
      if (moving[lane]) {
        eps[lane] = course[lane].stage_eps();
        scale[lane] = exponent_scale(eps[lane]);
      }
    forget(moving);
    this->first_rows(moving);
    for (int j = 0; j < m; ++j) set(plain, j, moving ? splat<T>(1) : at(plain, j));
  }

  // Lanes that are not in `where` and do not take a quasi-Newton step stay at the state.
  void plain_step(Mask where) {
    for (int lane = 0; lane < L; ++lane)
      if (where[lane]) course[lane].takes_plain();
    Mask newton{};
    for (int lane = 0; lane < L; ++lane) newton[lane] = -int(active[lane] && course[lane].newton);
    if (!any<T>(active & ~newton)) return;
    for (int j = 0; j < m; ++j) {
      set(point, j, newton ? at(point, j) : where ? at(plain, j) : at(psi, j));
      set(dir, j, newton ? at(dir, j) : where ? at(residual, j) : Vec{});
    }
    Mask mixed{};
    for (int lane = 0; lane < this->count; ++lane) mixed[lane] = -int(where[lane] && this->p[lane].symmetric && course[lane].mixes());
    if (any<T>(mixed)) mixed_step(mixed);
  }

  // See QuasiNewton::mixed_step.
  void mixed_step(Mask where) {
    for (int j = 0; j < m; ++j) {
      const Vec f = at(F, j) + at(row_shift, j), g = at(G, j) + at(column_shift, j), x = log2<T>(at(psi, j));
      const Vec by_f = (f - g) * scale + (log2<T>(at(phi, j)) - x), by_g = log2<T>(at(plain, j)) - x;
      const Vec step = (by_f + by_g) * T(8. / 17);
      set(point, j, where ? at(psi, j) * exp2<T>(step) : at(point, j));
      set(dir, j, where ? at(root, j) * step * T(ln2) : at(dir, j));
    }
  }

  // Takes quasi-Newton steps in some lanes, and takes those out of `some` that get none.
  void newton_step(Mask& some) {
    int pairs[memory], count = 0;  // from the newest to the oldest; those that no lane has are left out
    Vec weights{};
    for (int i = 0; i < memory; ++i) {
      const int s = (newest - i + memory) % memory;
      const Vec weight = some ? inverse[s] : Vec{};
      if (any<T>(weight != 0)) pairs[count++] = s;
      weights += weight;
    }
    // dir = from + factor x; returns the inner product of dir with y. A lane gets the same from it wherever its pairs stand.
    const auto add = [this](const T* from, Vec factor, const T* x, const T* y) __attribute__((always_inline)) {
      Vec total[2] = {};
      for (int j = 0; j < m; ++j) {
        const Vec d = at(from, j) + factor * at(x, j);
        set(dir, j, d);
        total[j % 2] += d * at(y, j);
      }
      return total[0] + total[1];
    };
    const auto times = [](Vec inverse, Vec x) { return inverse != 0 ? inverse * x : Vec{}; };  // no pair stays none, whatever x is
    Vec weight[memory], slope{}, top{}, bottom{}, shorter{};
    Mask down{};  // whose direction is none of ascent
    if (count) {
      slope = add(residual, Vec{}, steps[pairs[0]], steps[pairs[0]]);
      for (int i = 0; i < count; ++i) {
        weight[i] = times(inverse[pairs[i]], slope);
        slope = add(dir, -weight[i], changes[pairs[i]], i + 1 < count ? steps[pairs[i + 1]] : changes[pairs[i]]);
      }
      for (int i = count - 1; i >= 0; --i)
        slope = add(dir, weight[i] - times(inverse[pairs[i]], slope), steps[pairs[i]], i > 0 ? changes[pairs[i - 1]] : gradient);
    }
    for (int j = 0; j < m; ++j) {
      const Vec x = at(dir, j) * at(unroot, j);
      top = max(x, top);
      bottom = min(x, bottom);
    }
    for (int lane = 0; lane < L; ++lane) {
      const T range = top[lane] - bottom[lane];
      Course<T>& c = course[lane];
      shorter[lane] = range > Course<T>::most_range ? Course<T>::most_range / range : T(1);
      if (!some[lane]) continue;
      if (weights[lane] > 0 && slope[lane] > 0) {
        c.takes_newton(range);
        c.slope = slope[lane] * shorter[lane];
      } else {
        some[lane] = 0;
        down[lane] = -int(weights[lane] > 0);
      }
    }
    forget(down);
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
  int64_t n_iter[lanes<T>] = {};
  const auto keep = [&](int lane, const Cost<T>& cost) { cost.copy_cost_to(outs[lane].kept); };
  if (p->relaxed) {
    solve_relaxed_lanes(p, count, arena, accelerate, max_iter, tol, outs, fallback, n_iter);
  } else if (accelerate) {
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
    s.run(max_iter, tol, n_iter);
    for (int lane = 0; lane < count; ++lane) *outs[lane].n_iter = n_iter[lane];
    fallback = s.fallback;
    write_solutions(s, count, outs);
  }
  const Team alone(p->n, p->m, p->d);
  for (int lane = 0; lane < count; ++lane)
    if (fallback[lane]) {
      const int64_t spent = p->relaxed ? n_iter[lane] : 0;
      solve(p[lane], arena, alone, accelerate, max_iter - spent, tol, outs[lane]);
      *outs[lane].n_iter += spent;
    }
}

}  // namespace otloss::OTLOSS_LEVEL
