// solve.hpp for problems with short rows, one to a lane (lanes.hpp).
#pragma once
#include "lanes.hpp"
#include "solve.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct LaneSolver : Lanes<T> {
  using Base = Lanes<T>;
  using Base::L, Base::n, Base::m, Base::a, Base::b, Base::C, Base::fallback, Base::at, Base::get, Base::put, Base::set, Base::entry;
  using Vec = vec<T>;
  Vec eps, scale;  // of each lane: a stage may have another eps than the problem
  T *K, *F, *G, *phi, *psi, *next_phi, *next_psi, *v, *row_shift, *column_shift;

  LaneSolver(const Problem<T>* p, int count, Arena& arena) : Base(p, count, arena), eps(splat<T>(p->eps)), scale(splat<T>(exponent_scale(p->eps))) {
    K = this->matrix();
    for (T** x : {&F, &phi, &next_phi, &row_shift}) *x = this->rows();
    for (T** x : {&G, &psi, &next_psi, &v, &column_shift}) *x = this->columns();
    for (int i = 0; i < n; ++i) set(phi, i, splat<T>(1)), set(row_shift, i, Vec{});
    for (int j = 0; j < m; ++j) set(psi, j, splat<T>(1)), set(G, j, Vec{}), set(column_shift, j, Vec{});
  }

  // See Solver::read_cost and shift_cost.
  void find_minima() {
    for (int j = 0; j < m; ++j) set(column_shift, j, splat<T>(std::numeric_limits<T>::infinity()));
    for (int i = 0; i < n; ++i) {
      Vec top = -entry(C, i, 0);
      for (int j = 1; j < m; ++j) top = max(-entry(C, i, j), top);
      set(row_shift, i, minimum<T>(-top));
      for (int j = 0; j < m; ++j) set(column_shift, j, min(entry(C, i, j) + top, at(column_shift, j)));
    }
    for (int j = 0; j < m; ++j) set(column_shift, j, minimum<T>(at(column_shift, j)));
  }
  void shift_cost() {
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < m; ++j) set(C, i, j, shifted<T>(entry(C, i, j), at(row_shift, i), at(column_shift, j)));
  }

  // See Solver::run. n_iter by lane.
  void run(int64_t max_iter, T tol, int64_t* n_iter) {
    for (int j = 0; j < m; ++j) set(G, j, -at(column_shift, j));
    begin();
    for (int lane = 0; lane < L; ++lane) n_iter[lane] = max_iter;
    mask<T> active = ~fallback;
    for (int64_t k = 0; k < max_iter && any<T>(active); ++k) {
      poll(int64_t(n) * m * L);
      Vec missed, reach;
      iterate(missed, reach);
      const mask<T> done = k > 0 ? active & (missed < tol) : mask<T>{}, lost = active & ~done & ~(reach <= Solver<T>::wide);
      if (any<T>(done | lost)) {
        for (int lane = 0; lane < L; ++lane)
          if (done[lane]) n_iter[lane] = k;
        fallback |= lost;
        active &= ~(done | lost);
      }
      if (any<T>(~active)) {  // the others stay as they are
        for (int i = 0; i < n; ++i) set(next_phi, i, active ? at(next_phi, i) : at(phi, i));
        for (int j = 0; j < m; ++j) set(next_psi, j, active ? at(next_psi, j) : at(psi, j));
      }
      std::swap(phi, next_phi);
      std::swap(psi, next_psi);
      if (const mask<T> far = active & (reach > Solver<T>::safe); any<T>(far)) absorb(far);
    }
  }

  // f and g of the state.
  void potentials(T* f, T* g) const {
    for (int i = 0; i < n * L; ++i) f[i] = F[i] + eps[i % L] * std::log(phi[i]);
    for (int j = 0; j < m * L; ++j) g[j] = G[j] + eps[j % L] * std::log(psi[j]);
  }

 protected:
  // See Solver::first_rows.
  void first_rows(mask<T> where) {
    for (int i = 0; i < n; ++i) set(F, i, where ? lowest(G, i) : at(F, i));
    build(where);
  }
  OTLOSS_INLINE Vec lowest(const T* g, int i) const {
    Vec top = at(g, 0) - entry(C, i, 0);
    for (int j = 1; j < m; ++j) top = max(at(g, j) - entry(C, i, j), top);
    return -top;
  }

  // See Solver::begin. Vectors, not loops over lanes, as in write_solutions.
  void begin() {
    if (this->p->start) {
      using Wide = typename band_of<double, L>::type;
      const auto wide = [](Vec x) __attribute__((always_inline)) { return __builtin_convertvector(x, Wide); };
      const auto low_dual = [&](const T* g) __attribute__((always_inline)) {
        Wide total{};
        for (int i = 0; i < n; ++i) total += wide(at(a, i)) * wide(lowest(g, i));
        for (int j = 0; j < m; ++j) total += wide(at(b, j)) * wide(at(g, j));
        return total;
      };
      Wide mean{};
      Vec least = splat<T>(1);
      for (int j = 0; j < m; ++j) {
        for (int lane = 0; lane < L; ++lane) put(v, j, lane, lane < this->count ? this->p[lane].start[j] : T(0));
        set(v, j, at(v, j) - at(column_shift, j));
        mean += wide(at(b, j)) * wide(at(v, j));
        least = min(at(b, j), least);
      }
      const Vec constant = __builtin_convertvector(mean, Vec), room = eps * T(-ln2) * log2<T>(least);
      for (int j = 0; j < m; ++j) set(v, j, at(v, j) - constant);
      const Wide bound = low_dual(G) - wide(room), found = low_dual(v);
      mask<T> better{};
      for (int lane = 0; lane < L; ++lane) better[lane] = -int(found[lane] >= bound[lane]);  // not so for NaN
      for (int j = 0; j < m; ++j) set(G, j, better ? at(v, j) : at(G, j));
    }
    first_rows(~mask<T>{});
  }

  void build(mask<T> where) {
    int count = 0;
    for (int lane = 0; lane < L; ++lane) count -= int(where[lane]);
    if (4 * count <= L) {
      for (int lane = 0; lane < L; ++lane)
        if (where[lane]) build_lane(lane);
      return;
    }
    for (int i = 0; i < n; ++i) {
      const Vec f = at(F, i);
      for (int j = 0; j < m; ++j) {
        const Vec k = exp2<T>(((f + at(G, j)) - entry(C, i, j)) * scale);
        set(K, i, j, where ? k : entry(K, i, j));
      }
    }
  }

  // One lane alone, a vector of its columns at a time.
  void build_lane(int lane) {
    for (int i = 0; i < n; ++i)
      for (int j0 = 0; j0 < m; j0 += L) {
        const int width = std::min(L, m - j0);
        Vec g{}, c{};
        for (int j = 0; j < width; ++j) g[j] = get(G, j0 + j, lane), c[j] = C[(size_t(i) * this->stride + j0 + j) * L + lane];
        const Vec k = exp2<T>(((get(F, i, lane) + g) - c) * scale[lane]);
        for (int j = 0; j < width; ++j) K[(size_t(i) * this->stride + j0 + j) * L + lane] = k[j];
      }
  }

  void iterate(Vec& missed, Vec& reach) {
    Vec top = splat<T>(1), bottom = top, nothing{}, miss{};
    const auto spread = [&](Vec s) __attribute__((always_inline)) {
      top = max(s, top);
      bottom = min(s, bottom);
      nothing += s * T(0);  // NaN where a scaling is not finite
    };
    for (int j = 0; j < m; ++j) set(v, j, at(b, j) * at(psi, j));
    this->sweep(K, v, next_psi, [&](int i, Vec s) __attribute__((always_inline)) {
      const Vec mass = at(a, i), scaling = 1 / s;
      miss += mass * Base::absolute(at(phi, i) * s - 1);
      set(next_phi, i, scaling);
      spread(scaling);
      return mass * scaling;
    });
    for (int j = 0; j < m; ++j) {
      const Vec scaling = 1 / at(next_psi, j);
      set(next_psi, j, scaling);
      spread(scaling);
    }
    missed = miss;
    reach = max(top, 1 / bottom) + nothing;
  }

  void absorb(mask<T> where) {
    move_scalings(where);
    build(where);
  }

  // The scalings go into the potentials.
  void move_scalings(mask<T> where) {
    const auto move = [&](T* x, T* scaling, int size) {
      for (int i = 0; i < size; ++i)
        for (int lane = 0; lane < L; ++lane)
          if (where[lane]) {
            put(x, i, lane, get(x, i, lane) + eps[lane] * std::log(get(scaling, i, lane)));
            put(scaling, i, lane, T(1));
          }
    };
    move(F, phi, n);
    move(G, psi, m);
  }
};

// What is asked of the states in which the lanes have ended: see write_solution.
template <class T> void write_solutions(LaneSolver<T>& s, int count, const Solution<T>* outs) {
  constexpr int L = lanes<T>;
  using Vec = vec<T>;

  T *f = s.next_phi, *g = s.next_psi;
  s.potentials(f, g);
  mask<T> symmetric{};
  for (int lane = 0; lane < count; ++lane) symmetric[lane] = -int(s.p[lane].symmetric);
  if (any<T>(symmetric))  // see write_solution
    for (int i = 0; i < s.n; ++i) {
      const Vec r = s.at(s.row_shift, i), c = s.at(s.column_shift, i), half = ((s.at(f, i) + r) + (s.at(g, i) + c)) * T(0.5);
      s.set(f, i, symmetric ? half - r : s.at(f, i));
      s.set(g, i, symmetric ? half - c : s.at(g, i));
    }
  // Vectors, not loops over lanes: a compiler may contract a product and a sum in some turns of a loop, and not in others.
  using Wide = typename band_of<double, L>::type;
  const auto wide = [](Vec x) __attribute__((always_inline)) { return __builtin_convertvector(x, Wide); };
  const auto size = [](Wide x) __attribute__((always_inline)) { return x < 0 ? -x : x; };
  Wide shift{};
  for (int i = 0; i < s.n; ++i) shift -= 0.5 * wide(s.at(s.a, i)) * wide(s.at(f, i));
  for (int j = 0; j < s.m; ++j) shift += 0.5 * wide(s.at(s.b, j)) * wide(s.at(g, j));
  if (any<T>(symmetric)) {
    Wide apart{};
    for (int i = 0; i < s.n; ++i) apart += 0.5 * wide(s.at(s.a, i)) * (wide(s.at(s.row_shift, i)) - wide(s.at(s.column_shift, i)));
    for (int lane = 0; lane < L; ++lane)
      if (symmetric[lane]) shift[lane] = apart[lane];
  }
  const Vec move = __builtin_convertvector(shift, Vec);
  for (int i = 0; i < s.n; ++i) s.set(f, i, s.at(f, i) + move);
  for (int j = 0; j < s.m; ++j) s.set(g, j, s.at(g, j) - move);

  Wide sharp{}, potential{}, mass{}, missed{};  // the sums of solve()
  T* sigma = s.v;
  for (int j = 0; j < s.m; ++j) s.set(sigma, j, Vec{});
  for (int i = 0; i < s.n; ++i) {
    const Vec fi = s.at(f, i), ai = s.at(s.a, i);
    Vec t{}, tc{};
    for (int j = 0; j < s.m; ++j) {
      const Vec c = s.entry(s.C, i, j), k = exp2<T>(((fi + s.at(g, j)) - c) * s.scale), kb = k * s.at(s.b, j);
      t += kb;
      tc += kb * masked(kb, c);
      s.set(sigma, j, s.at(sigma, j) + k * ai);
    }
    const Wide a = wide(ai), row = a * wide(t), r = wide(s.at(s.row_shift, i));
    sharp += a * wide(tc) + row * r;
    potential += row * (wide(fi) + r);
    mass += row;
    missed += size(row - a);
  }
  for (int j = 0; j < s.m; ++j) {
    const Wide b = wide(s.at(s.b, j)), column = b * wide(s.at(sigma, j)), c = wide(s.at(s.column_shift, j));
    sharp += column * c;
    potential += column * (wide(s.at(g, j)) + c);
    missed += size(column - b);
  }
  for (int lane = 0; lane < count; ++lane) {
    if (s.fallback[lane]) continue;
    const Solution<T>& out = outs[lane];
    for (int i = 0; i < s.n; ++i) out.f[i] = s.get(f, i, lane);
    for (int j = 0; j < s.m; ++j) out.g[j] = s.get(g, j, lane);
    for (int i = 0; out.row_shift && i < s.n; ++i) out.row_shift[i] = s.get(s.row_shift, i, lane);
    for (int j = 0; out.row_shift && j < s.m; ++j) out.column_shift[j] = s.get(s.column_shift, j, lane);
    *out.cost = T(sharp[lane]);
    *out.value = T(potential[lane] - s.eps[lane] * (mass[lane] - 1));
    *out.error = T(missed[lane]);
  }
}

}  // namespace otloss::OTLOSS_LEVEL
