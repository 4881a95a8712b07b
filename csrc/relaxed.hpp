// Solving a problem with penalties on its marginals (penalty.hpp).
//
// With d = rho/(rho + eps), 1 for a constraint, one iteration is
//   f_i = -d_a eps log sum_j b_j exp((g_j - C_ij)/eps),   g_j = -d_b eps log sum_i a_i exp((f_i - C_ij)/eps),
// and then f + t, g - t with the t that makes the totals of a exp(-f/rho_a) and b exp(-g/rho_b) equal. It is the best one for the
// dual, and leaves the plan as it is. The start is g = 0. The error is the L1 distance of both marginals from those that the
// potentials ask for, relative to the mass of the plan. After an iteration the columns differ by what t has changed, in closed form;
// the rows are known from the next sweep.
//
// As in solve.hpp, K_ij = exp((F_i + G_j - C_ij)/eps) is kept. The scalings are kept as logarithms of base 2, x and y: then
// f = F + eps ln2 x, a power by d is a product, and no scaling overflows. A sweep takes a 2^x and b 2^y, both divided by their
// largest entry. F_i = min_j C_ij - G_j, so no entry of K is above 1 and every row has a 1. A point that is far from all others sends
// next to nothing, whatever its scaling: a mass may vanish here. A sum that is lost, because all its terms have underflowed, is made
// again from the cost, in the log-domain. When more sums are lost than just after K was built, K is built again with the G that would
// give the columns their marginals.
#pragma once
#include "penalty.hpp"
#include "solve.hpp"

namespace otloss::OTLOSS_LEVEL {

// The sums of two functions, f(i, one, other) for i = 0, lanes, .. below count: in chains of vectors, whose totals are added in
// float64.
template <class T, class F> OTLOSS_INLINE void two_sums(int count, double& one, double& other, F f) {
  constexpr int chain = 64 * lanes<T>;
  one = other = 0;
  for (int i0 = 0; i0 < count; i0 += chain) {
    vec<T> first{}, second{};
    for (int i = i0; i < std::min(count, i0 + chain); i += lanes<T>) f(i, first, second);
    one += sum<T>(first), other += sum<T>(second);
  }
}

template <class T> struct Relaxed : Solver<T> {
  using Base = Solver<T>;
  using Base::a, Base::b, Base::cost, Base::p, Base::eps, Base::scale, Base::F, Base::G, Base::K, Base::log_a, Base::log_b, Base::v, Base::team,
      Base::next_psi, Base::peak, Base::total, Base::none;

  // A sum below `least`, which is 2^-lost_bits, is lost.
  static constexpr T lost_bits = sizeof(T) == 4 ? 66 : 332, least = sizeof(T) == 4 ? T(0x1p-66) : T(0x1p-332);

  // One side of the problem. `from` is F or G, and 0 without mass; x and next_x are the scalings; level_i is the log2 of the sum that
  // a half-step of the side has, sum_j K_ij b_j 2^y_j for a row.
  struct Side {
    Penalty<T> penalty;
    int count, padded;
    const T *mass, *log_mass;
    T *origin, *from, *x, *next_x, *level;
    double whole = 0;  // the mass
    T soft, lean;      // a half-step is x = lean from - soft level
    T tilt, bend;      // the log2 of the share that is asked for is tilt from + bend x
    int lost = 0;

    Side(T inverse, T eps, int count, int padded, const T* mass, const T* log_mass, T* origin)
        : penalty(inverse, eps), count(count), padded(padded), mass(mass), log_mass(log_mass), origin(origin), soft(T(penalty.soft)),
          lean(T(-log2e * penalty.inverse * penalty.soft)), tilt(T(-log2e * penalty.inverse)), bend(T(-penalty.slack)) {
      for (int i = 0; i < count; ++i) whole += mass[i];
    }
    // The largest mass 2^x of these scalings, in bits.
    T top(const T* scalings) const {
      vec<T> most = splat<T>(none);
      for (int i = 0; i < padded; i += lanes<T>) most = max(load(scalings + i) + load(log_mass + i), most);
      return max_of<T>(most);
    }
    void move(T* scalings, T bits) const {
      for (int i = 0; i < padded; i += lanes<T>) store<T>(scalings + i, load(scalings + i) + bits);
    }
    void move_origin(T by) {
      for (int i = 0; i < padded; ++i) origin[i] += by, from[i] = mass[i] != 0 ? origin[i] : T(0);
    }
    void move_by(T* scalings, const T* bits) const {
      for (int i = 0; i < padded; i += lanes<T>) store<T>(scalings + i, load(scalings + i) + load(bits + i));
    }
  };
  static constexpr T most_drift = 32;

  Side rows, columns;
  T* asked;             // the rows' marginal that f asks for, divided by 2^asked_share
  T asked_share = 0;
  double gap = 0;       // by how much the columns' marginal differs from what g asks for, divided likewise
  T lift = 0;           // about the largest a 2^x
  int tolerated = 0;    // how many sums were lost just after K was built
  bool renewed = false; // whether K was built again after the last sweep

  static size_t bytes(const Problem<T>& p) {
    return Base::bytes(p) + 5 * Arena::bytes<T>(round_up<T>(p.n)) + 4 * Arena::bytes<T>(round_up<T>(p.m));
  }

  Relaxed(const Cost<T>& cost, Arena& arena, const Team& team)
      : Base(cost, arena, team), rows(cost.p.inverse_rho_a, eps, cost.n, cost.rows, a, log_a, F),
        columns(cost.p.inverse_rho_b, eps, cost.m, cost.cols, b, log_b, G) {
    for (Side* side : {&rows, &columns})
      for (T** x : {&side->from, &side->x, &side->next_x, &side->level}) *x = arena.take<T>(side->padded);
    asked = arena.take<T>(cost.rows);
  }

  // Runs to the error `tol` or for max_iter iterations.
  void run(int64_t max_iter, T tol, int64_t& k) {
    start();
    for (k = 0; k < max_iter; ++k) {
      iterate();
      if (k > 0 && error() < tol) return;
      if (!take()) {
        ++k;
        return;  // not finite: the outputs say so
      }
      renew();
    }
  }

  // f and g of the state for live entries; 0 elsewhere.
  void potentials(T* f, T* g) const {
    potential(rows, rows.x, f);
    potential(columns, columns.x, g);
  }

 protected:
  T back() const { return T(ln2) * eps; }

  void potential(const Side& side, const T* x, T* f) const {
    for (int i = 0; i < side.padded; ++i) f[i] = side.mass[i] != 0 ? side.from[i] + back() * x[i] : T(0);
  }

  // K has entries of 1 in every row and every column: F and G are the minima of the rows of C and then those of its columns. The start
  // is g = 0, or the potentials that are given, unless the dual of 0 is larger by eps.
  void start() {
    this->read_cost(true);
    for (int j = 0; j < cost.m; ++j)
      if (this->live_col(j)) G[j] = this->column_shift[j];
    this->first_rows();
    for (Side* side : {&rows, &columns}) side->move_origin(0);
    for (int i = 0; i < cost.rows; ++i) rows.x[i] = rows.lean * rows.from[i];
    begin_at(nullptr);
    lift = rows.top(rows.x);
    if (!p.start) return;
    const double cold = dual_after_rows();
    begin_at(p.start);
    if (!(dual_after_rows() >= cold - double(eps))) begin_at(nullptr);  // so too for NaN
  }

  void begin_at(const T* g) {
    for (int j = 0; j < cost.cols; ++j) columns.x[j] = ((g && columns.mass[j] != 0 ? g[j] : T(0)) - columns.from[j]) * scale;
  }

  // The dual at g and the rows' next potentials, by one sweep.
  double dual_after_rows() {
    iterate();
    double dual = 0;
    for (int i = 0; i < cost.n; ++i) {
      if (a[i] == 0) continue;
      const double whole = double(rows.from[i]) - double(back()) * rows.level[i], f = rows.penalty.soft * whole;
      dual += a[i] * (rows.penalty.slope(f) - eps * std::exp((f - whole) / eps));
    }
    for (int j = 0; j < cost.m; ++j)
      if (b[j] != 0) dual += b[j] * columns.penalty.slope(double(columns.from[j]) + double(back()) * columns.x[j]);
    return dual;
  }

  // One iteration from columns.x into next_x, but for the constant.
  void iterate() {
    const T above = columns.top(columns.x), lifted = lift;
    for (int j = 0; j < cost.cols; j += lanes<T>) store<T>(v + j, exp2<T>(load(columns.x + j) + load(log_b + j) - above));
    this->up = !this->up;
    sweep(team, cost, K, this->up, v, next_psi, [this, above, lifted](int i0, const T* s, T* w) __attribute__((always_inline)) {
      T level[pad_to<T>], weight[pad_to<T>] = {};
      for (int r = 0; r < block; r += lanes<T>) store<T>(level + r, log2<T, fine<T>>(load(s + r)) + above);
      for (int r = 0; r < block; ++r)
        if (this->live_row(i0 + r) && !(s[r] >= least)) level[r] = log_row(i0 + r);
      const band<T> bits = load_band(level), next = rows.lean * load_band(rows.from + i0) - rows.soft * bits;
      const band<T> x = load_band(a + i0) != 0 ? next : band<T>{};
      store_band(rows.level + i0, bits);
      store_band(rows.next_x + i0, x);
      store_band(weight, x + load_band(log_a + i0) - lifted);
      for (int r = 0; r < block; r += lanes<T>) store<T>(weight + r, exp2<T>(load(weight + r)));
      store_band(w, load_band(weight));
    });
    const bool all = !(rows.top(rows.next_x) - lifted <= lost_bits / 2);  // so large that what has underflowed in K may count
    rows.lost = columns.lost = 0;
    for (int i = 0; i < cost.n; ++i) rows.lost += a[i] != 0 && !(rows.level[i] - above >= -lost_bits);
    for (int j = 0; j < cost.m; ++j) columns.lost += b[j] != 0 && (all || !(next_psi[j] >= least));
    for (int j = 0; j < cost.cols; j += lanes<T>) store<T>(columns.level + j, log2<T, fine<T>>(load(next_psi + j)) + lifted);
    if (columns.lost) find_columns(all);
    for (int j = 0; j < cost.cols; j += lanes<T>) {
      const vec<T> next = columns.lean * load(columns.from + j) - columns.soft * load(columns.level + j);
      store<T>(columns.next_x + j, load(b + j) != 0 ? next : vec<T>{});
    }
  }

  // The level of a row, from its cost.
  T log_row(int i) const {
    const T* c = cost.row(i);
    const auto bits = [&](int j) __attribute__((always_inline)) {
      return exponent(c, G, j, F[i], scale) + (load(columns.x + j) + load(log_b + j));
    };
    vec<T> top = splat<T>(none), sums{};
    for (int j = 0; j < cost.cols; j += lanes<T>) top = max(bits(j), top);
    const T most = max_of<T>(top);
    for (int j = 0; j < cost.cols; j += lanes<T>) sums += exp2<T>(bits(j) - most);
    return most + std::log2(sum<T>(sums));
  }

  // The levels of columns whose sums are lost, or of all.
  void find_columns(bool all) {
    T *f = this->next_phi, *g = this->psi;
    potential(rows, rows.next_x, f);
    log_cols(team, cost, eps, f, log_a, g, peak, total);
    for (int j = 0; j < cost.m; ++j)
      if (b[j] != 0 && (all || !(next_psi[j] >= least))) columns.level[j] = (G[j] - g[j]) * scale;
  }

  // The error of the state, after the sweep that starts from it.
  T error() const {
    double off, mass;
    two_sums<T>(cost.rows, off, mass, [&](int i, vec<T>& missed, vec<T>& whole) __attribute__((always_inline)) {
      const vec<T> row = exp2<T>((load(rows.x + i) + load(rows.level + i)) + (load(log_a + i) - asked_share)), away = row - load(asked + i);
      missed += away < 0 ? -away : away;
      whole += row;
    });
    return T((off + gap) / mass);
  }

  // What a side asks for with the scalings x. The marginal over 2^share is left in `marginal`, if that is not null.
  Asked ask(const Side& side, const T* x, T* marginal) const {
    const auto bits = [&](int i) __attribute__((always_inline)) { return side.tilt * load(side.from + i) + side.bend * load(x + i); };
    vec<T> top = splat<T>(none);
    for (int i = 0; i < side.padded; i += lanes<T>) top = max(load(side.mass + i) != 0 ? bits(i) : splat<T>(none), top);
    const T share = max_of<T>(top);
    Asked all{share, 0, 0};
    two_sums<T>(side.padded, all.most, all.less, [&](int i, vec<T>& one, vec<T>& other) __attribute__((always_inline)) {
      vec<T> power, below;
      exp2_less_one<T>(bits(i) - share, power, below);
      const vec<T> mass = load(side.mass + i), part = mass * power;
      one += part;
      other += mass * below;
      if (marginal) store<T>(marginal + i, part);
    });
    return all;
  }

  // Takes the iteration, and adds the constant. False if something is not finite.
  bool take() {
    for (Side* side : {&rows, &columns}) std::swap(side->x, side->next_x);
    const Asked of_rows = ask(rows, rows.x, asked), of_columns = ask(columns, columns.x, nullptr);
    const Constant t = Constant::of(of_rows, rows.whole, rows.penalty, of_columns, columns.whole, columns.penalty);
    asked_share = T(t.share), gap = t.gap;
    rows.move(rows.x, T(t.bits)), columns.move(columns.x, T(-t.bits));
    centre();
    return std::isfinite(t.bits);
  }

  // Moves a large constant of the scalings into F and G, where it costs them no digits. K stays.
  void centre() {
    const T bits = columns.top(columns.x);
    if (std::fabs(bits) > most_drift) {
      columns.move(columns.x, -bits), columns.move_origin(back() * bits);
      rows.move(rows.x, bits), rows.move_origin(-back() * bits);
    }
    lift = rows.top(rows.x);
  }

  // Builds K again around the state, if more sums were lost than just after it was built.
  void renew() {
    const int lost = rows.lost + columns.lost;
    if (renewed) tolerated = lost;
    renewed = lost > tolerated;
    if (renewed) absorb();
  }

  void absorb() {
    T* f = this->next_phi;
    potential(rows, rows.x, f);
    for (int j = 0; j < cost.m; ++j)
      if (b[j] != 0) {
        const T next = G[j] - back() * columns.level[j];
        columns.x[j] -= (next - G[j]) * scale;
        G[j] = next;
      }
    this->first_rows();
    for (Side* side : {&rows, &columns}) side->move_origin(0);
    for (int i = 0; i < cost.n; ++i)
      if (a[i] != 0) rows.x[i] = (f[i] - F[i]) * scale;
    lift = rows.top(rows.x);
  }
};

// Writes the state in which a solve has ended, and what is asked of it.
template <class T> void write_relaxed(Relaxed<T>& s, const Solution<T>& out) {
  const Cost<T>& cost = s.cost;
  const Problem<T>& p = s.p;
  cost.copy_cost_to(out.kept);
  const Penalty<T>&of_a = s.rows.penalty, &of_b = s.columns.penalty;

  T *f = s.F, *g = s.G, *f_all = s.next_phi, *g_all = s.next_psi;
  s.potentials(f, g);
  if (s.dead_rows) log_rows(s.team, cost, p.eps, g, s.log_b, f_all), no_reach(f_all, s.log_a, cost.n);
  if (s.dead_cols) log_cols(s.team, cost, p.eps, f, s.log_a, g_all, s.peak, s.total), no_reach(g_all, s.log_b, cost.m);
  for (int i = 0; i < cost.n; ++i) out.f[i] = f[i] = s.a[i] == 0 ? T(of_a.soft) * f_all[i] : f[i];
  for (int j = 0; j < cost.m; ++j) out.g[j] = g[j] = s.b[j] == 0 ? T(of_b.soft) * g_all[j] : g[j];

  s.sum_plan(f, g);
  const SideSums of_rows = SideSums::of<T>(cost.n, 1, s.a, s.phi, s.sharp, f, of_a);
  const SideSums of_columns = SideSums::of<T>(cost.m, 1, s.b, s.psi, nullptr, g, of_b);
  write_sums(of_rows, of_columns, s.rows.whole, s.columns.whole, p.eps, out);
}

}  // namespace otloss::OTLOSS_LEVEL
