// Penalties on the marginals (relaxed.hpp), accelerated by the quasi-Newton method of quasi_newton.hpp under the guard of course.hpp.
//
// Here one function of y, the columns' scalings, is maximised: the dual with its best f for g, and with the best t of f + d_a t, g - t.
// That t makes the totals of a exp(-f/rho_a) and b exp(-g/rho_b) equal, and is in closed form:
//   t (d_a/rho_a + 1/rho_b) = log sum a exp(-f/rho_a) - log sum b exp(-g/rho_b).
// The rows are then exact. The gradient of the dual over eps is s - q, the marginal that g asks for less that of the plan, of total 0;
// both are taken as shares of the mass of the plan. A plain step is d_b log(s/q), which is near the gradient in the metric 1/s. Pairs of
// steps and changes of the plain step are kept as they are, and inner products have the weights s of the state: these change on the way.
//
// Along a step d of range w the guard holds as it stands there: of all exponentials in the dual none moves by more than w max(1,
// eps/rho_b), since d less t has both signs.
//
// With totals equal the dual is a constant less (eps + rho_a + rho_b) times the mass, which gives its raise. A side under a constraint has
// <a, f> instead of the term with its rho, and fixes the mass.
#pragma once
#include "course.hpp"
#include "relaxed.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct RelaxedNewton : Relaxed<T> {
  using Base = Relaxed<T>;
  using Base::cost, Base::eps, Base::rows, Base::columns, Base::log_b, Base::b;

  // Of the state, and of the trial point, which is columns.x: the plain step in bits, the gradient, the weights s, log2 of the mass.
  struct Point {
    T *step, *gradient, *weight;
    double mass = 0;
  };
  Point state, trial;
  T *y, *dir, *steps[memory], *changes[memory];  // y of the state
  bool paired[memory] = {}, waiting = false;  // waiting: whether the newest pair is to be added to the next
  int newest = 0;

  static size_t bytes(const Problem<T>& p) { return Base::bytes(p) + (8 + 2 * memory) * Arena::bytes<T>(round_up<T>(p.m)); }

  RelaxedNewton(const Cost<T>& cost, Arena& arena, const Team& team) : Base(cost, arena, team) {
    for (Point* point : {&state, &trial})
      for (T** x : {&point->step, &point->gradient, &point->weight}) *x = arena.take<T>(cost.cols);
    for (T** x : {&y, &dir}) *x = arena.take<T>(cost.cols);
    for (int s = 0; s < memory; ++s) steps[s] = arena.take<T>(cost.cols), changes[s] = arena.take<T>(cost.cols);
    std::memset(dir, 0, sizeof(T) * cost.cols);
  }

  void run(int64_t max_iter, T tol, int64_t& n_iter) {
    this->start();
    Course<T> course(eps, tol, max_iter);
    course.watching = false;  // all at the problem's eps
    while (!course.stage_is_over() || course.fresh) {
      T error, slope, range, noise;
      const bool finite = evaluate(error, slope, range, noise);
      auto verdict = course.judge(finite, error, slope);
      if (verdict == Course<T>::doubtful) verdict = course.decide(raise(), error);
      if (verdict == Course<T>::rejected) {
        forget();
        plain_step(course);
        continue;
      }
      if (!course.fresh) remember();
      course.fresh = false;
      course.plain_range = range;
      course.goal = std::max(tol, noise);
      std::swap(rows.x, rows.next_x);
      std::swap(state, trial);
      this->centre();
      if (verdict != Course<T>::lost) this->renew();
      std::memcpy(y, columns.x, sizeof(T) * cost.cols);
      if (verdict == Course<T>::lost) break;  // not finite: the outputs say so
      if (!course.stage_is_over() && !newton_step(course)) plain_step(course);
    }
    n_iter = course.k;
    columns.move_by(y, state.step);
    std::swap(y, columns.x);
  }

 private:
  void forget() {
    std::fill(paired, paired + memory, false);
    waiting = false;
  }

  // A sweep at the trial point, to which the constant is added. False if something is not finite. The error is known to `noise`.
  bool evaluate(T& error, T& slope, T& range, T& noise) {
    this->iterate();
    const Penalty<T>&of_a = rows.penalty, &of_b = columns.penalty;
    const Asked asked_of_rows = this->ask(rows, rows.next_x, this->asked), asked_of_columns = this->ask(columns, columns.x, trial.weight);
    const double row_total = asked_of_rows.total(rows.whole), column_total = asked_of_columns.total(columns.whole);
    noise = rounding(rows, rows.next_x, this->asked) + rounding(columns, columns.x, trial.weight);
    const double move = (row_total - column_total) / (of_a.slack * of_a.soft + of_b.slack);
    const T lifted = T(of_a.soft * move);
    rows.move(rows.next_x, lifted);
    columns.move(columns.x, T(-move));
    columns.move(columns.level, lifted);
    trial.mass = column_total + move * of_b.slack;
    const T share = T(std::exp2(asked_of_columns.share - column_total)), mass = T(trial.mass);
    vec<T> missed{}, along{}, top{}, bottom{};
    for (int j = 0; j < cost.cols; j += lanes<T>) {
      const vec<T> at = load(columns.x + j), level = load(columns.level + j), asked = load(trial.weight + j) * share;
      const vec<T> step = load(b + j) != 0 ? columns.lean * load(columns.from + j) - columns.soft * level - at : vec<T>{};
      const vec<T> gap = asked - exp2<T>((at + level) + (load(log_b + j) - mass));
      store<T>(trial.weight + j, asked);
      store<T>(trial.step + j, step);
      store<T>(trial.gradient + j, gap);
      missed += gap < 0 ? -gap : gap;
      along += gap * load(dir + j);
      top = max(step, top);
      bottom = min(step, bottom);
    }
    error = sum<T>(missed);
    slope = sum<T>(along) * T(ln2 * std::exp2(trial.mass - state.mass));
    range = width(top, bottom);
    return std::isfinite(move) && std::isfinite(error);
  }

  // The mean relative error of the marginal that a side asks for, by rounding of its scalings and of what it is made from.
  T rounding(const typename Base::Side& side, const T* x, const T* marginal) const {
    const auto size = [](vec<T> z) __attribute__((always_inline)) { return z < 0 ? -z : z; };
    double total, rounded;
    two_sums<T>(side.padded, total, rounded, [&](int i, vec<T>& one, vec<T>& other) __attribute__((always_inline)) {
      const vec<T> at = load(x + i), mass = load(marginal + i);
      one += mass;
      other += mass * (size(at) + size(side.bend * at) + size(side.tilt * load(side.from + i)));
    });
    return T(ln2 / 2 * std::numeric_limits<T>::epsilon() * rounded / total);
  }

  // Of a step in bits: by how much the exponentials of the dual move, at most.
  T width(vec<T> top, vec<T> bottom) const { return T(ln2 * std::max(1., columns.penalty.slack)) * (max_of<T>(top) - min_of<T>(bottom)); }

  // That of the dual over eps by the step to the trial point, as a share of the mass.
  T raise() const {
    double total = 0, growth = trial.mass - state.mass, rate = 1;
    const auto side = [&](const typename Base::Side& of, const T* before, const T* after) {
      if (of.penalty.slack > 0) {
        rate += 1 / of.penalty.slack;
        return;
      }
      growth = 0;
      double change, unused;
      two_sums<T>(of.padded, change, unused, [&](int i, vec<T>& one, vec<T>&) __attribute__((always_inline)) {
        one += load(of.mass + i) * (load(after + i) - load(before + i));
      });
      total += change * ln2 / of.whole;
    };
    side(rows, rows.x, rows.next_x);
    side(columns, y, columns.x);
    return T(total - std::expm1(growth * ln2) * rate);
  }

  // Saves the step to the trial point and the change of the plain step along it.
  void remember() {
    if (!waiting) newest = (newest + 1) % memory;
    T *step = steps[newest], *change = changes[newest];
    if (!waiting) std::memset(step, 0, sizeof(T) * cost.cols), std::memset(change, 0, sizeof(T) * cost.cols);
    for (int j = 0; j < cost.cols; j += lanes<T>) {
      store<T>(step + j, load(step + j) + load(dir + j));
      store<T>(change + j, load(change + j) + (load(state.step + j) - load(trial.step + j)));
    }
    paired[newest] = true;
    waiting = is_rounding(inner(change, change));
  }

  // The trial point, from `dir`.
  void go() {
    std::memcpy(columns.x, y, sizeof(T) * cost.cols);
    columns.move_by(columns.x, dir);
  }

  void plain_step(Course<T>& course) {
    course.takes_plain();
    std::memcpy(dir, state.step, sizeof(T) * cost.cols);
    go();
  }

  T inner(const T* x, const T* z) const {
    vec<T> total{};
    for (int j = 0; j < cost.cols; j += lanes<T>) total += load(state.weight + j) * load(x + j) * load(z + j);
    return sum<T>(total);
  }
  void add(T factor, const T* x) {
    for (int j = 0; j < cost.cols; j += lanes<T>) store<T>(dir + j, load(dir + j) + factor * load(x + j));
  }

  // False where there is no ascent, or none is wanted.
  bool newton_step(Course<T>& course) {
    if (!course.wants_newton()) return false;
    int pairs[memory], count = 0;  // from the newest to the oldest
    T inverse[memory], weight[memory];
    for (int i = 0; i < memory; ++i) {
      const int s = (newest - i + memory) % memory;
      if (!paired[s]) continue;
      inverse[count] = inverse_curvature(inner(steps[s], changes[s]), inner(steps[s], steps[s]), inner(changes[s], changes[s]));
      if (inverse[count] != 0) pairs[count++] = s;
    }
    if (count == 0) return false;
    // The two loops of limited-memory BFGS.
    std::memcpy(dir, state.step, sizeof(T) * cost.cols);
    for (int i = 0; i < count; ++i) {
      weight[i] = inverse[i] * inner(steps[pairs[i]], dir);
      add(-weight[i], changes[pairs[i]]);
    }
    for (int i = count - 1; i >= 0; --i) add(weight[i] - inverse[i] * inner(changes[pairs[i]], dir), steps[pairs[i]]);
    vec<T> top{}, bottom{}, along{};
    for (int j = 0; j < cost.cols; j += lanes<T>) {
      const vec<T> x = load(dir + j);
      along += x * load(state.gradient + j);
      top = max(x, top);
      bottom = min(x, bottom);
    }
    course.slope = sum<T>(along) * T(ln2);
    if (!(course.slope > 0)) {
      forget();
      return false;
    }
    const T range = width(top, bottom);
    course.takes_newton(range);
    if (range > Course<T>::most_range) {
      const T shorter = Course<T>::most_range / range;
      for (int j = 0; j < cost.cols; j += lanes<T>) store<T>(dir + j, load(dir + j) * shorter);
      course.slope *= shorter;
    }
    go();
    return true;
  }
};

template <class T>
void solve_relaxed(const Problem<T>& p, Arena& arena, const Team& team, bool accelerate, int64_t max_iter, T tol, const Solution<T>& out) {
  arena.reset(Cost<T>::bytes(p, false) + (accelerate ? RelaxedNewton<T>::bytes(p) : Relaxed<T>::bytes(p)));
  const Cost<T> cost(p, arena, true, false);
  const auto run = [&](auto s) {
    s.run(max_iter, tol, *out.n_iter);
    write_relaxed(s, out);
  };
  if (accelerate) run(RelaxedNewton<T>(cost, arena, team));
  else run(Relaxed<T>(cost, arena, team));
}

}  // namespace otloss::OTLOSS_LEVEL
