// Sinkhorn by stabilised scaling (Schmitzer 2019).
//
// Keep K_ij = exp((F_i + G_j - C_ij)/eps) for absorbed potentials F, G and iterate on the scalings alone,
//   phi_i = 1 / sum_j K_ij b_j psi_j,    psi_j = 1 / sum_i a_i phi_i K_ij,     f = F + eps log phi,  g = G + eps log psi,
// one sweep over K and no exponential per iteration. The row sums of a sweep also give the error of the state before it,
//   sum_i a_i |phi_i (K b psi)_i - 1|,
// so the stop test is free. When a scaling leaves [1/safe, safe] it is absorbed into F, G and K is rebuilt; when a sum
// itself leaves [1/wide, wide], K no longer holds the entries that matter and the iteration is done again from the state
// before it in the log-domain. The first half-step starts from F_i = min_j C_ij - G_j, so that no row of K vanishes.
//
// Of a dense cost the minima of the rows and columns are taken out first (problem.hpp); f = g = 0 is then G_j = -column_shift_j.
#pragma once
#include "passes.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct Solver {
  static constexpr T safe = sizeof(T) == 4 ? T(1e12) : T(1e40), wide = sizeof(T) == 4 ? T(1e20) : T(1e100);

  const Problem<T>& p;
  const Cost<T>& cost;
  const Team& team;
  T eps, scale;  // a stage may have another eps than the problem
  T *K, *F, *G, *phi, *psi, *next_phi, *next_psi, *v, *log_a, *log_b, *a, *b, *miss, *sharp, *peak, *total, *row_shift, *column_shift;
  bool dead_rows, dead_cols, up = false;

  static size_t bytes(const Problem<T>& p) {
    const size_t n = round_up<T>(p.n), m = round_up<T>(p.m);
    return Arena::bytes<T>(n * leading<T>(p.m)) + 8 * Arena::bytes<T>(n) + 6 * Arena::bytes<T>(m) +
           3 * Arena::bytes<T>(m * Parts(int(n), int(m)).count);
  }

  Solver(const Cost<T>& cost, Arena& arena, const Team& team) : p(cost.p), cost(cost), team(team), eps(p.eps), scale(exponent_scale(eps)) {
    K = arena.take<T>(size_t(cost.rows) * cost.ld);
    for (T** x : {&F, &phi, &next_phi, &log_a, &a, &miss, &sharp, &row_shift}) *x = arena.take<T>(cost.rows);
    for (T** x : {&G, &v, &log_b, &b, &peak, &total}) *x = arena.take<T>(cost.cols);
    // Sums and minima over rows are taken part by part.
    for (T** x : {&psi, &next_psi, &column_shift}) *x = arena.take<T>(size_t(cost.cols) * cost.parts.count);
    dead_rows = log_masses(p.a, cost.n, cost.rows, log_a);
    dead_cols = log_masses(p.b, cost.m, cost.cols, log_b);
    for (int i = 0; i < cost.rows; ++i) a[i] = live_row(i) ? p.a[i] : T(0), F[i] = none, phi[i] = 1, row_shift[i] = 0;
    for (int j = 0; j < cost.cols; ++j) b[j] = live_col(j) ? p.b[j] : T(0), G[j] = live_col(j) ? T(0) : none, psi[j] = 1, column_shift[j] = 0;
  }

  // Fills the rows of the cost, and finds the minima over what is live, rows first, if they are asked for.
  void read_cost(bool minima) {
    team.each(cost.parts.count, [&](int part) {
      T* low = column_shift + size_t(part) * cost.cols;
      if (minima) std::fill(low, low + cost.cols, -none);
      for (int i0 = cost.parts.begin(part); i0 < cost.parts.end(part); i0 += block) {
        cost.fill(i0);
        for (int i = i0; minima && i < std::min(i0 + block, cost.n); ++i) {
          T* c = cost.row(i);
          vec<T> top = splat<T>(none);  // -inf in G keeps dead columns and the padding out of the minimum
          for (int j = 0; j < cost.cols; j += lanes<T>) top = max(load(G + j) - load(c + j), top);
          row_shift[i] = minimum<T>(-max_of<T>(top));
          const bool counts = live_row(i);
          for (int j = 0; counts && j < cost.cols; j += lanes<T>) store<T>(low + j, min(load(c + j) - row_shift[i], load(low + j)));
        }
        poll_after_block(cost.block_work());
      }
    });
    if (!minima) return;
    for (int part = 1; part < cost.parts.count; ++part)
      for (int j = 0; j < cost.cols; ++j) column_shift[j] = std::min(column_shift[j], column_shift[size_t(part) * cost.cols + j]);
    for (int j = 0; j < cost.cols; ++j) column_shift[j] = j < cost.m ? minimum<T>(column_shift[j]) : T(0);
  }

  // Takes the minima out of the cost.
  void shift_cost() {
    each_block([&](int i0) {
      for (int i = i0; i < std::min(i0 + block, cost.n); ++i)
        for (int j = 0; j < cost.cols; j += lanes<T>)
          store<T>(cost.row(i) + j, shifted<T>(load(cost.row(i) + j), splat<T>(row_shift[i]), load(column_shift + j)));
    });
  }

  // Runs to the error `tol` or for max_iter iterations. record(k) sees every state.
  template <class Record> void run(int64_t max_iter, T tol, int64_t& k, Record record) {
    for (int j = 0; j < cost.m; ++j)
      if (live_col(j)) G[j] = -column_shift[j];
    begin();
    for (k = 0; k < max_iter; ++k) {
      T error;
      const T reach = iterate(error);
      if (k > 0 && error < tol) return;
      if (reach <= wide) {  // not so for NaN
        std::swap(phi, next_phi);
        std::swap(psi, next_psi);
        if (reach > safe) absorb();
      } else if (!log_iterate()) {
        ++k;
        return;  // not finite: the outputs say so
      }
      record(k + 1);
    }
  }

  // f and g of the state for live entries; 0 elsewhere.
  void potentials(T* f, T* g) const {
    for (int i = 0; i < cost.n; ++i) f[i] = live_row(i) ? F[i] + eps * std::log(phi[i]) : T(0);
    for (int j = 0; j < cost.m; ++j) g[j] = live_col(j) ? G[j] + eps * std::log(psi[j]) : T(0);
  }

  // The sums over the plan of f and g: of b k and b k C by rows in phi and sharp, of a k by columns in psi. Those of a point without
  // mass may overflow.
  void sum_plan(const T* f, const T* g) {
    T *rho = phi, *sharp_of = sharp, *sigma = psi;
    team.each(cost.parts.count, [&](int part) {
      T* columns = sigma + size_t(part) * cost.cols;
      std::memset(columns, 0, sizeof(T) * cost.cols);
      for (int i0 = cost.parts.begin(part); i0 < cost.parts.end(part); i0 += block) {
        vec<T> t[block] = {}, tc[block] = {};
        for (int j = 0; j < cost.cols; j += lanes<T>) {
          const vec<T> mass = load(b + j), gj = load(g + j);
          vec<T> down = load(columns + j);
          repeat<block>(OTLOSS_EACH(r) {
            const vec<T> c = load(cost.row(i0 + r) + j), k = exp2<T>(min(splat(bound<T>), ((f[i0 + r] + gj) - c) * scale));
            t[r] += k * mass;
            tc[r] += k * mass * masked(k, c);
            down += a[i0 + r] * k;
          });
          store<T>(columns + j, down);
        }
        T all[pad_to<T>];
        const auto keep = [&](vec<T>* sum, T* to) {
          sums<T, block>(sum, all);
          std::memcpy(to + i0, all, sizeof(T) * block);
        };
        keep(t, rho), keep(tc, sharp_of);
        poll_after_block(int64_t(block) * cost.cols);
      }
    });
    add_parts(sigma, cost.parts.count, cost.cols);
  }

  // task(first row) for every block of rows, part by part.
  template <class Row> void each_block(Row task) {
    team.each(cost.parts.count, [&](int part) {
      for (int i0 = cost.parts.begin(part); i0 < cost.parts.end(part); i0 += block) task(i0), poll_after_block(int64_t(block) * cost.cols);
    });
  }

 protected:
  static constexpr T none = -std::numeric_limits<T>::infinity();
  bool live_row(int i) const { return log_a[i] != none; }
  bool live_col(int j) const { return log_b[j] != none; }

  void build_row(int i) {
    T* k = K + size_t(i) * cost.ld;
    for (int j = 0; j < cost.cols; j += lanes<T>) store<T>(k + j, exp2<T>(exponent(cost.row(i), G, j, F[i], scale)));
  }

  // min_j C_ij - G_j.
  T lowest(int i) const {
    vec<T> top = splat<T>(none);
    for (int j = 0; j < cost.cols; j += lanes<T>) top = max(load(G + j) - load(cost.row(i) + j), top);
    return -max_of<T>(top);
  }

  void first_rows() {
    each_block([&](int i0) {
      for (int i = i0; i < i0 + block; ++i) {
        if (live_row(i)) F[i] = lowest(i);
        build_row(i);
      }
    });
  }

  // The first half-step from G, or from the potentials that the problem brings along, unless their dual is surely below that of G.
  // With F_i = lowest(i), <a, F> + <b, G> is at most the dual and at least that less eps log(1/b_j) of the smallest mass: a solution
  // is never left aside. The constant between F and G is free; without one, both are no larger than they have to be.
  void begin() {
    if (p.start) {
      const double before = low_dual();
      double mean = 0, least = 1;
      for (int j = 0; j < cost.m; ++j)
        if (live_col(j)) mean += double(b[j]) * (double(p.start[j]) - column_shift[j]), least = std::min(least, double(b[j]));
      for (int j = 0; j < cost.cols; ++j) v[j] = live_col(j) ? T(double(p.start[j]) - column_shift[j] - mean) : none;
      std::swap(G, v);
      if (!(low_dual() >= before + eps * std::log(least))) std::swap(G, v);  // not so for NaN
    }
    first_rows();
  }
  double low_dual() {
    each_block([&](int i0) {
      for (int i = i0; i < i0 + block; ++i)
        if (live_row(i)) F[i] = lowest(i);
    });
    double total = 0;
    for (int i = 0; i < cost.n; ++i)
      if (live_row(i)) total += double(a[i]) * F[i];
    for (int j = 0; j < cost.m; ++j)
      if (live_col(j)) total += double(b[j]) * G[j];
    return total;
  }

  // One iteration into next_phi, next_psi; the error of the state before it, and how far the new scalings spread.
  T iterate(T& error) {
    for (int j = 0; j < cost.cols; ++j) v[j] = b[j] * psi[j];
    up = !up;  // the first goes up: the last rows of K were written last
    sweep(team, cost, K, up, v, next_psi, [this](int i0, const T* s, T* w) __attribute__((always_inline)) {
      const band<T> sums = load_band(s), mass = load_band(a + i0), off = load_band(phi + i0) * sums - 1;
      const band<T> scaling = mass != 0 ? 1 / sums : 1 - band<T>{};
      store_band(miss + i0, mass * (off < 0 ? -off : off));
      store_band(next_phi + i0, scaling);
      store_band(w, mass * scaling);
    });
    vec<T> missed{};
    for (int i = 0; i < cost.rows; i += lanes<T>) missed += load(miss + i);
    error = sum<T>(missed);
    for (int j = 0; j < cost.cols; ++j) next_psi[j] = b[j] != 0 ? 1 / next_psi[j] : T(1);
    const T rows = spread(next_phi, cost.rows), cols = spread(next_psi, cost.cols);
    return rows > cols ? rows : cols + (rows - rows);  // NaN if either is
  }

  // The largest factor by which a scaling differs from 1 (it is 1 where there is no mass); NaN if one is.
  static T spread(const T* scaling, int count) {
    vec<T> top = splat<T>(1), bottom = top, nothing{};
    for (int i = 0; i < count; i += lanes<T>) {
      const vec<T> s = load(scaling + i);
      top = max(s, top);
      bottom = min(s, bottom);
      nothing += s * T(0);
    }
    const T most = max_of<T>(top), least = 1 / min_of<T>(bottom);
    return (most > least ? most : least) + sum<T>(nothing);
  }

  void absorb() {
    move_scalings();
    rebuild();
  }

  // Moves the scalings into F and G.
  void move_scalings() {
    for (int i = 0; i < cost.n; ++i)
      if (live_row(i)) F[i] += eps * std::log(phi[i]);
    for (int j = 0; j < cost.m; ++j)
      if (live_col(j)) G[j] += eps * std::log(psi[j]);
    reset_scalings();
  }
  void reset_scalings() {
    for (int i = 0; i < cost.rows; ++i) phi[i] = 1;
    for (int j = 0; j < cost.cols; ++j) psi[j] = 1;
  }

  void rebuild() {
    each_block([&](int i0) {
      for (int i = i0; i < i0 + block; ++i) build_row(i);
    });
  }

  bool log_iterate() {
    for (int j = 0; j < cost.m; ++j) G[j] = live_col(j) ? G[j] + eps * std::log(psi[j]) : T(0);
    log_rows(team, cost, eps, G, log_b, F);
    log_cols(team, cost, eps, F, log_a, G, peak, total);
    T check = 0;
    for (int i = 0; i < cost.rows; ++i) {
      if (!live_row(i)) F[i] = none;
      else check += F[i] - F[i];
    }
    for (int j = 0; j < cost.cols; ++j) {
      if (!live_col(j)) G[j] = none;
      else check += G[j] - G[j];
    }
    reset_scalings();
    rebuild();
    return check == 0;
  }
};

}  // namespace otloss::OTLOSS_LEVEL
