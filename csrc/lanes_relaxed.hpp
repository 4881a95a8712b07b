// relaxed.hpp for problems with short rows, one to a lane (lanes.hpp). Where a sum is lost, where a start is given, and where quasi-Newton
// steps are allowed and plain iterations are slow, the problem goes to the kernel for single problems.
#pragma once
#include "lanes_solve.hpp"
#include "relaxed.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct LaneRelaxed : LaneSolver<T> {
  using Base = LaneSolver<T>;
  using Base::L, Base::n, Base::m, Base::a, Base::b, Base::C, Base::K, Base::F, Base::G, Base::v, Base::eps, Base::scale, Base::fallback,
      Base::at, Base::get, Base::set, Base::entry;
  using Vec = vec<T>;
  using Mask = mask<T>;

  static constexpr int most_plain = 60;  // iterations, where quasi-Newton steps are allowed

  // As Relaxed::Side. The origins are F and G.
  struct Side {
    int count;
    const T *mass, *origin;
    T *x, *next_x, *log_mass, *level;
    Penalty<T> penalty[L];
    double whole[L] = {};
    Vec soft{}, lean{}, tilt{}, bend{};

    Vec bits(const T* scalings, int i) const { return tilt * at(origin, i) + bend * at(scalings, i); }
    Vec top(const T* scalings) const {
      Vec most = at(scalings, 0) + at(log_mass, 0);
      for (int i = 1; i < count; ++i) most = max(at(scalings, i) + at(log_mass, i), most);
      return most;
    }
  };
  Side by_rows, by_columns;
  T *asked, *sums;
  Vec share{}, gap{}, lift{};  // Relaxed::asked_share and on

  LaneRelaxed(const Problem<T>* p, int count, Arena& arena) : Base(p, count, arena) {
    T *log_a = this->rows(), *log_b = this->columns();
    by_rows = {n, a, F, this->phi, this->next_phi, log_a, this->rows()};
    by_columns = {m, b, G, this->psi, this->next_psi, log_b, this->columns()};
    asked = this->rows(), sums = this->columns();
    for (int lane = 0; lane < L; ++lane) {
      const bool used = lane < count;
      by_rows.penalty[lane] = Penalty<T>(used ? p[lane].inverse_rho_a : T(1), p->eps);
      by_columns.penalty[lane] = Penalty<T>(used ? p[lane].inverse_rho_b : T(1), p->eps);
    }
    for (Side* side : {&by_rows, &by_columns}) {
      for (int i = 0; i < side->count; ++i) {
        set(side->log_mass, i, log2<T, fine<T>>(at(side->mass, i)));
        for (int lane = 0; lane < L; ++lane) side->whole[lane] += get(side->mass, i, lane);
      }
      for (int lane = 0; lane < L; ++lane) {
        const Penalty<T>& of = side->penalty[lane];
        side->soft[lane] = T(of.soft), side->lean[lane] = T(-log2e * of.inverse * of.soft);
        side->tilt[lane] = T(-log2e * of.inverse), side->bend[lane] = T(-of.slack);
      }
    }
  }

  // See Relaxed::run. n_iter by lane.
  void run(bool accelerate, int64_t max_iter, T tol, int64_t* n_iter) {
    start();
    const int64_t most = accelerate ? std::min<int64_t>(most_plain, max_iter) : max_iter;
    for (int lane = 0; lane < L; ++lane) n_iter[lane] = fallback[lane] ? 0 : most;
    Mask active = ~fallback;
    for (int64_t k = 0; k < most && any<T>(active); ++k) {
      poll(int64_t(n) * m * L);
      const Mask lost = active & iterate(), done = k > 0 ? active & ~lost & (error() < tol) : Mask{};
      fallback |= lost;
      active &= ~(lost | done);
      for (int lane = 0; lane < L; ++lane)
        if (lost[lane] || done[lane]) n_iter[lane] = lost[lane] ? 0 : k;
      take(active);
    }
    if (most < max_iter) fallback |= active;
  }

  // See Relaxed::write.
  void write(int lane, const T* f, const T* g, const T* of_rows, const T* sharp, const T* of_columns, const Solution<T>& out) const {
    for (int i = 0; i < n; ++i) out.f[i] = get(f, i, lane);
    for (int j = 0; j < m; ++j) out.g[j] = get(g, j, lane);
    const SideSums row_sums = SideSums::of<T>(n, L, a + lane, of_rows + lane, sharp + lane, f + lane, by_rows.penalty[lane]);
    const SideSums column_sums = SideSums::of<T>(m, L, b + lane, of_columns + lane, nullptr, g + lane, by_columns.penalty[lane]);
    write_sums(row_sums, column_sums, by_rows.whole[lane], by_columns.whole[lane], this->p->eps, out);
  }

 private:
  void start() {
    this->find_minima();
    for (int j = 0; j < m; ++j) set(G, j, at(this->column_shift, j)), set(by_columns.x, j, -at(G, j) * scale);
    this->first_rows(~Mask{});
    for (int i = 0; i < n; ++i) set(by_rows.x, i, by_rows.lean * at(F, i));
    lift = by_rows.top(by_rows.x);
  }

  // See Relaxed::iterate. Returns the lanes with a lost sum.
  Mask iterate() {
    constexpr T least = Relaxed<T>::least;
    const Vec above = by_columns.top(by_columns.x);
    for (int j = 0; j < m; ++j) set(v, j, exp2<T>(at(by_columns.x, j) + at(by_columns.log_mass, j) - above));
    Mask missing{};
    Vec top = splat<T>(-std::numeric_limits<T>::infinity());
    this->sweep(K, v, sums, [&](int i, Vec s) __attribute__((always_inline)) {
      const Vec level = log2<T, fine<T>>(s) + above, x = by_rows.lean * at(F, i) - by_rows.soft * level;
      const Vec weight = x + at(by_rows.log_mass, i) - lift;
      missing |= ~(s >= least);
      top = max(weight, top);
      set(by_rows.level, i, level);
      set(by_rows.next_x, i, x);
      return exp2<T>(weight);
    });
    missing |= ~(top <= Relaxed<T>::lost_bits / 2);
    for (int j = 0; j < m; ++j) {
      const Vec s = at(sums, j), level = log2<T, fine<T>>(s) + lift;
      missing |= ~(s >= least);
      set(by_columns.level, j, level);
      set(by_columns.next_x, j, by_columns.lean * at(G, j) - by_columns.soft * level);
    }
    return missing;
  }

  Vec error() const {
    Vec off = gap, mass{};
    for (int i = 0; i < n; ++i) {
      const Vec row = exp2<T>((at(by_rows.x, i) + at(by_rows.level, i)) + (at(by_rows.log_mass, i) - share));
      off += Base::absolute(row - at(asked, i));
      mass += row;
    }
    return off / mass;
  }

  // See Relaxed::ask.
  void ask(const Side& side, T* marginal, Vec& share, Vec& most, Vec& less) const {
    share = side.bits(side.next_x, 0);
    for (int i = 1; i < side.count; ++i) share = max(side.bits(side.next_x, i), share);
    most = less = Vec{};
    for (int i = 0; i < side.count; ++i) {
      Vec power, below;
      exp2_less_one<T>(side.bits(side.next_x, i) - share, power, below);
      const Vec mass = at(side.mass, i), part = mass * power;
      most += part;
      less += mass * below;
      if (marginal) set(marginal, i, part);
    }
  }

  // Takes the iteration in some lanes; the others stay as they are.
  void take(Mask active) {
    if (!any<T>(active)) return;
    Vec shares[2], most[2], less[2], bits{};
    ask(by_rows, asked, shares[0], most[0], less[0]);
    ask(by_columns, nullptr, shares[1], most[1], less[1]);
    for (int lane = 0; lane < L; ++lane) {
      if (!active[lane]) continue;
      const Asked of_rows{shares[0][lane], most[0][lane], less[0][lane]}, of_columns{shares[1][lane], most[1][lane], less[1][lane]};
      const Constant t = Constant::of(of_rows, by_rows.whole[lane], by_rows.penalty[lane], of_columns, by_columns.whole[lane],
                                      by_columns.penalty[lane]);
      bits[lane] = T(t.bits), share[lane] = T(t.share), gap[lane] = T(t.gap);
    }
    for (int i = 0; i < n; ++i) set(by_rows.x, i, active ? at(by_rows.next_x, i) + bits : at(by_rows.x, i));
    for (int j = 0; j < m; ++j) set(by_columns.x, j, active ? at(by_columns.next_x, j) - bits : at(by_columns.x, j));
    centre(active);
    lift = by_rows.top(by_rows.x);
  }

  // See Relaxed::centre.
  void centre(Mask active) {
    const Vec top = by_columns.top(by_columns.x), bits = active & (Base::absolute(top) > Relaxed<T>::most_drift) ? top : Vec{};
    if (!any<T>(bits != 0)) return;
    const Vec by = T(ln2) * eps * bits;
    for (int i = 0; i < n; ++i) set(F, i, at(F, i) - by), set(by_rows.x, i, at(by_rows.x, i) + bits);
    for (int j = 0; j < m; ++j) set(G, j, at(G, j) + by), set(by_columns.x, j, at(by_columns.x, j) - bits);
  }
};

// Solves up to `lanes` problems of one shape. Sets the lanes that are left to the kernel for single problems, and the iterations of each
// that count.
template <class T>
void solve_relaxed_lanes(const Problem<T>* p, int count, Arena& arena, bool accelerate, int64_t max_iter, T tol, const Solution<T>* outs,
                         mask<T>& fallback, int64_t* n_iter) {
  using Vec = vec<T>;
  LaneRelaxed<T> s(p, count, arena);
  s.fill([&](int lane, const Cost<T>& cost) { cost.copy_cost_to(outs[lane].kept); });
  for (int lane = 0; lane < count; ++lane)
    if (p[lane].start) s.fallback[lane] = -1;  // whether a start is worth it takes a sweep of its own
  s.run(accelerate, max_iter, tol, n_iter);
  T *f = s.by_rows.next_x, *g = s.by_columns.next_x, *of_rows = s.by_rows.level, *sharp = s.asked, *of_columns = s.sums;
  const Vec back = T(ln2) * s.eps;
  for (int i = 0; i < s.n; ++i) s.set(f, i, s.at(s.F, i) + back * s.at(s.by_rows.x, i));
  for (int j = 0; j < s.m; ++j) s.set(g, j, s.at(s.G, j) + back * s.at(s.by_columns.x, j)), s.set(of_columns, j, Vec{});
  for (int i = 0; i < s.n; ++i) {
    const Vec fi = s.at(f, i), ai = s.at(s.a, i);
    Vec t{}, tc{};
    for (int j = 0; j < s.m; ++j) {
      const Vec c = s.entry(s.C, i, j), k = exp2<T>(min(splat(bound<T>), ((fi + s.at(g, j)) - c) * s.scale)), kb = k * s.at(s.b, j);
      t += kb;
      tc += kb * masked(kb, c);
      s.set(of_columns, j, s.at(of_columns, j) + k * ai);
    }
    s.set(of_rows, i, t);
    s.set(sharp, i, tc);
  }
  for (int lane = 0; lane < count; ++lane) {
    if (s.fallback[lane]) continue;
    s.write(lane, f, g, of_rows, sharp, of_columns, outs[lane]);
    *outs[lane].n_iter = n_iter[lane];
  }
  fallback = s.fallback;
}

}  // namespace otloss::OTLOSS_LEVEL
