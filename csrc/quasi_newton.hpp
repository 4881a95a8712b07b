// Sinkhorn iterations accelerated by a quasi-Newton method on the dual, guarded (course.hpp).
//
// The state is psi, as in solve.hpp; phi = 1/(K b psi) makes the rows exact. A sweep at psi gives the columns' sums q_j = psi_j sum_i
// a_i phi_i K_ij, relative to b, hence the error sum_j b_j |1 - q_j| of the plan and the gradient b (1 - q) of the dual by gamma = log psi.
// A plain step is -log q. A quasi-Newton step is the direction of limited-memory BFGS from the last steps and the changes of the plain
// step along them, with the plain step itself as the direction that it corrects: near the solution -log q is the gradient in the metric
// 1/b, and far from it, where 1 - q grows like the exponential of the distance, it still is a distance. Vectors are held times sqrt(b)
// (steps) or divided by it (gradients), so that no mass divides and inner products are plain.
//
// Where plain iterations crawl, the problem is solved roughly at larger eps first, each a quarter of the one before. Every stage ends
// with a plain half-step: the columns of the plan are exact, and the error of its rows is no larger than that of the columns was.
#pragma once
#include "course.hpp"
#include "solve.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct QuasiNewton : Solver<T> {
  using Base = Solver<T>;
  using Base::a, Base::b, Base::cost, Base::eps, Base::F, Base::G, Base::K, Base::phi, Base::psi, Base::next_phi, Base::next_psi, Base::v,
      Base::team, Base::row_shift, Base::column_shift, Base::none;

  // Of the state: plain is the next psi, residual the plain step, gradient that of D/eps. Those of the trial point are next_psi, trial and
  // trial_gradient.
  static constexpr T most_cosine_cost = 2, lost_beyond = sizeof(T) == 4 ? T(40) : T(200);  // exp of that is a little less than `wide`
  T *point, *plain, *residual, *gradient, *trial, *trial_gradient, *dir, *root, *unroot, *steps[memory], *changes[memory];
  T inverse[memory];  // 1 / <step, change>; 0 where there is no pair
  int newest = 0;
  bool waiting = false;  // whether the newest pair is to be added to the next

  static size_t bytes(const Problem<T>& p) {
    const size_t n = round_up<T>(p.n), m = round_up<T>(p.m);
    return Base::bytes(p) + (7 + 2 * memory) * Arena::bytes<T>(m) + 2 * Arena::bytes<T>(m * Parts(int(n), int(m)).count);
  }

  // Whether the sum of a column may be lost where plain iterations start. A cosine cost is at most 2, others have no bound.
  static bool may_lose(const Problem<T>& p) {
    return !p.right || p.kind != Kind::cosine || most_cosine_cost > lost_beyond * p.eps;
  }

  QuasiNewton(const Cost<T>& cost, Arena& arena, const Team& team) : Base(cost, arena, team) {
    for (T** x : {&point, &plain}) *x = arena.take<T>(size_t(cost.cols) * cost.parts.count);  // these take turns with psi
    for (T** x : {&residual, &gradient, &trial, &trial_gradient, &dir, &root, &unroot}) *x = arena.take<T>(cost.cols);
    for (int s = 0; s < memory; ++s) steps[s] = arena.take<T>(cost.cols), changes[s] = arena.take<T>(cost.cols);
    std::memset(dir, 0, sizeof(T) * cost.cols);
    for (int j = 0; j < cost.cols; ++j) {
      root[j] = std::sqrt(b[j]);
      unroot[j] = b[j] > 0 ? 1 / root[j] : T(0);
    }
  }

  // Reads the cost, and takes its minima out of a dense one. Starts where plain iterations do, or from the minima of the columns where
  // the sum of a column would be lost there; or from the potentials that the problem brings along.
  void start() {
    const bool dense = !this->p.right;
    this->read_cost(may_lose(this->p));
    if (dense) this->shift_cost();
    T most = 0;
    for (int j = 0; j < cost.m; ++j)
      if (this->live_col(j)) most = std::max(most, column_shift[j]);
    const T share = T(most > lost_beyond * eps) - T(dense);
    for (int j = 0; j < cost.m; ++j)
      if (this->live_col(j)) G[j] = share * column_shift[j];
    if (!dense) {
      std::fill(row_shift, row_shift + cost.rows, T(0));
      std::fill(column_shift, column_shift + cost.cols, T(0));
    }
    this->begin();
  }

  void run(int64_t max_iter, T tol, int64_t& n_iter) {
    Course<T> course(this->p.eps, tol, max_iter);
    do {
      const bool finite = stage(course);
      n_iter = course.k;
      if (!finite) return;
    } while (course.advance() && change_eps(course.stage_eps()));
  }

 private:
  // The mean of (C - f - g)/eps under a b', but for forbidden pairs.
  T way() {
    this->potentials(next_phi, next_psi);
    double mean = 0;
    for (int i = 0; i < cost.n; ++i) {
      if (!(a[i] > 0)) continue;
      const T *c = cost.row(i), whole = dot(c, b, cost.cols);
      poll(cost.cols);
      if (std::isfinite(whole)) {
        mean += double(a[i]) * (double(whole) - next_phi[i]);
        continue;
      }
      for (int j = 0; j < cost.m; ++j)  // what a forbidden pair has of g is taken out below
        mean += double(a[i]) * b[j] * (c[j] == forbidden<T> ? double(next_psi[j]) : double(c[j]) - next_phi[i]);
    }
    for (int j = 0; j < cost.m; ++j)
      if (b[j] > 0) mean -= double(b[j]) * next_psi[j];
    return T(mean / eps);
  }

  bool change_eps(T next) {
    this->move_scalings();
    eps = next;
    this->scale = exponent_scale(eps);
    this->first_rows();
    return true;
  }

  void forget() {
    for (T& x : inverse) x = 0;
    waiting = false;
  }

  // Runs a stage to its end. False if something is not finite; the outputs say so.
  bool stage(Course<T>& course) {
    forget();
    std::memcpy(point, psi, sizeof(T) * cost.cols);
    while (!course.stage_is_over() || course.fresh) {
      T error, slope, range;
      const T reach = evaluate(error, slope, range);
      auto verdict = course.judge(reach <= Base::wide, error, slope);
      if (verdict == Course<T>::doubtful) verdict = course.decide(raise(), error);
      if (verdict == Course<T>::lost) {
        std::memcpy(psi, point, sizeof(T) * cost.cols);
        if (!this->log_iterate()) return false;
        forget();
        std::memcpy(point, psi, sizeof(T) * cost.cols);
        course.fresh = true;
        if (course.k >= course.cap) return true;
        continue;
      }
      if (verdict == Course<T>::rejected) {
        forget();
        plain_step(course);
        continue;
      }
      if (!course.fresh) remember();
      course.fresh = false;
      course.plain_range = range;
      std::swap(psi, point);
      std::swap(phi, next_phi);
      std::swap(plain, next_psi);
      std::swap(residual, trial);
      std::swap(gradient, trial_gradient);
      if (reach > Base::safe) absorb();
      if (course.asks_the_way()) course.knows_the_way(way());
      if (!course.stage_is_over() && !newton_step(course)) plain_step(course);
    }
    std::memcpy(psi, plain, sizeof(T) * cost.cols);
    return true;
  }

  // A sweep at `point`: next_phi; the plain step as a factor in next_psi and in `trial`, and its range; the gradient in trial_gradient and
  // its slope along `dir`; the error. Returns how far scalings spread.
  T evaluate(T& error, T& slope, T& range) {
    for (int j = 0; j < cost.cols; ++j) v[j] = b[j] * point[j];
    this->up = !this->up;
    sweep(team, cost, K, this->up, v, next_psi, [this](int i0, const T* s, T* w) __attribute__((always_inline)) {
      const band<T> mass = load_band(a + i0), scaling = mass != 0 ? 1 / load_band(s) : 1 - band<T>{};
      store_band(next_phi + i0, scaling);
      store_band(w, mass * scaling);
    });
    vec<T> missed{}, along{}, top{}, bottom{};
    for (int j = 0; j < cost.cols; j += lanes<T>) {
      const vec<T> total = load(next_psi + j), mass = load(b + j), q = load(point + j) * total, left = load(root + j) * (1 - q);
      const vec<T> step = mass != 0 ? log2<T>(q) * T(-ln2) : vec<T>{}, gap = left * load(root + j);
      store<T>(trial_gradient + j, left);
      store<T>(trial + j, load(root + j) * step);
      store<T>(next_psi + j, mass != 0 ? 1 / total : 1 - vec<T>{});
      missed += gap < 0 ? -gap : gap;
      along += left * load(dir + j);
      top = max(step, top);
      bottom = min(step, bottom);
    }
    error = sum<T>(missed);
    slope = sum<T>(along);
    range = max_of<T>(top) - min_of<T>(bottom);
    const T rows = this->spread(next_phi, cost.rows), cols = this->spread(next_psi, cost.cols);
    return rows > cols ? rows : cols + (rows - rows);  // NaN if either is
  }

  // That of D/eps by the step to the trial point.
  T raise() const {
    vec<T> by_rows{}, by_columns{};
    for (int i = 0; i < cost.rows; i += lanes<T>) by_rows += load(a + i) * log2<T>(load(next_phi + i) / load(phi + i));
    for (int j = 0; j < cost.cols; j += lanes<T>) by_columns += load(root + j) * load(dir + j);
    return sum<T>(by_rows) * T(ln2) + sum<T>(by_columns);
  }

  void absorb() {
    for (int j = 0; j < cost.cols; ++j) plain[j] /= psi[j];
    Base::absorb();
  }

  // Saves the step to `point` and the change of the residual along it.
  void remember() {
    if (!waiting) newest = (newest + 1) % memory;
    T *step = steps[newest], *change = changes[newest];
    if (!waiting) std::memset(step, 0, sizeof(T) * cost.cols), std::memset(change, 0, sizeof(T) * cost.cols);
    for (int j = 0; j < cost.cols; j += lanes<T>) {
      store<T>(step + j, load(step + j) + load(dir + j));
      store<T>(change + j, load(change + j) + (load(residual + j) - load(trial + j)));
    }
    const T size = dot(change, change, cost.cols);
    inverse[newest] = inverse_curvature(dot(step, change, cost.cols), dot(step, step, cost.cols), size);
    waiting = is_rounding(size);
  }

  void plain_step(Course<T>& course) {
    course.takes_plain();
    if (this->p.symmetric && course.mixes()) return mixed_step();
    std::memcpy(dir, residual, sizeof(T) * cost.cols);
    std::memcpy(point, plain, sizeof(T) * cost.cols);
  }

  // In place of a plain step, in the problem of a set with itself. There f = g at the solution, and near it a half-step H turns an error
  // into -s times that error, s an eigenvalue of the plan relative to the masses. With a positive definite kernel exp(-C/eps), as
  // distances have it, s is between 0 and 1. The step from g to (g + 8 H g + 8 H H g)/17 leaves (1 - 8 s + 8 s^2)/17 of an error: of all
  // such polynomials, which are 1 at s = -1, the least on [0, 1] (Chebyshev's). It is never above 1/17, whatever eps is. Half-steps
  // expand no distance in the maximum norm; so the steps converge for every symmetric cost, and where s < 0 slows them down,
  // quasi-Newton steps take over.
  void mixed_step() {
    for (int j = 0; j < cost.cols; j += lanes<T>) {
      const vec<T> f = load(F + j) + load(row_shift + j), g = load(G + j) + load(column_shift + j), x = log2<T>(load(psi + j));
      const vec<T> by_f = (f - g) * this->scale + (log2<T>(load(phi + j)) - x), by_g = log2<T>(load(plain + j)) - x;
      const vec<T> step = load(b + j) != 0 ? (by_f + by_g) * T(8. / 17) : vec<T>{};
      store<T>(point + j, load(psi + j) * exp2<T>(step));
      store<T>(dir + j, load(root + j) * step * T(ln2));
    }
  }

  // dir += factor x; returns the inner product of the new dir with y.
  T add(T factor, const T* x, const T* y) {
    vec<T> total[2] = {};
    const auto one = [&](int j, vec<T>& sum) __attribute__((always_inline)) {
      const vec<T> d = load(dir + j) + factor * load(x + j);
      store<T>(dir + j, d);
      sum += d * load(y + j);
    };
    int j = 0;
    for (; j + 2 * lanes<T> <= cost.cols; j += 2 * lanes<T>) one(j, total[0]), one(j + lanes<T>, total[1]);
    if (j < cost.cols) one(j, total[0]);
    return sum<T>(total[0] + total[1]);
  }

  // False where there is no ascent, or none is wanted.
  bool newton_step(Course<T>& course) {
    const int m = cost.cols;
    int pairs[memory], count = 0;  // from the newest to the oldest
    for (int i = 0; i < memory; ++i)
      if (const int s = (newest - i + memory) % memory; inverse[s] != 0) pairs[count++] = s;
    if (count == 0 || !course.wants_newton()) return false;
    // The two loops of limited-memory BFGS; each pass over `dir` also gives the inner product that the next one needs.
    T weight[memory], along = dot(steps[pairs[0]], residual, m);
    std::memcpy(dir, residual, sizeof(T) * m);
    for (int i = 0; i < count; ++i) {
      weight[i] = inverse[pairs[i]] * along;
      along = add(-weight[i], changes[pairs[i]], i + 1 < count ? steps[pairs[i + 1]] : changes[pairs[i]]);
    }
    for (int i = count - 1; i >= 0; --i)
      along = add(weight[i] - inverse[pairs[i]] * along, steps[pairs[i]], i > 0 ? changes[pairs[i - 1]] : gradient);
    course.slope = along;
    if (!(course.slope > 0)) {
      forget();
      return false;
    }
    vec<T> top{}, bottom{};
    for (int j = 0; j < m; j += lanes<T>) {
      const vec<T> x = load(dir + j) * load(unroot + j);
      top = max(x, top);
      bottom = min(x, bottom);
    }
    const T range = max_of<T>(top) - min_of<T>(bottom);
    course.takes_newton(range);
    if (range > Course<T>::most_range) {
      const T shorter = Course<T>::most_range / range;
      for (int j = 0; j < m; j += lanes<T>) store<T>(dir + j, load(dir + j) * shorter);
      course.slope *= shorter;
    }
    for (int j = 0; j < m; j += lanes<T>)
      store<T>(point + j, load(psi + j) * exp2<T>(load(dir + j) * load(unroot + j) * T(log2e)));
    return true;
  }
};

}  // namespace otloss::OTLOSS_LEVEL
