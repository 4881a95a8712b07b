// Problems with short rows (n, m <= short_rows), one to each lane of a vector.
//
// A row of 49 entries fills a vector unit badly, and every sum over it ends in shuffles. Here entry (i, j) of `lanes` problems is
// one vector, so all sums are vertical and nothing is padded. The cost and the products stay with each problem (cost.hpp): its
// matrix is laid out row by row (`staged`), and a square transposition at a time turns L such matrices into one of vectors.
//
// The method is that of solve.hpp and adjoint.hpp, with a mask where those have an if. A lane computes what its own problem
// says and never looks at another lane, so results do not depend on who shares the vector; lanes left over hold a trivial
// problem. What is rare is not done here at all: a problem with an empty mass, one that needs an iteration in the log-domain,
// one whose rows lost their sums, is handed to the kernel for single problems.
#pragma once
#include "adjoint.hpp"
#include "solve.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> using mask = typename vec_of<T>::ints;

template <class T> OTLOSS_INLINE bool any(mask<T> x) {
  int64_t words[OTLOSS_VECTOR_BYTES / 8], all = 0;
  std::memcpy(words, &x, sizeof(x));
  for (int64_t word : words) all |= word;
  return all != 0;
}

// The lanes' problems side by side: matrices n x stride and vectors, an entry of which is one vector.
template <class T> struct Lanes {
  using V = vec<T>;
  static constexpr int L = lanes<T>;
  static_assert(L <= most_lanes);
  static constexpr int most_rows = 8, most_columns = 12;  // vectors that a solve or a gradient may take

  const Problem<T>* p;
  const int count, n, m, stride;
  T *staged, *C, *a, *b;
  mask<T> out{};  // lanes that are left to the kernel for single problems
  Arena& arena;

  static size_t bytes(const Problem<T>& p) {
    const size_t matrix = size_t(p.n) * (p.m | 1) + L;
    return L * Arena::bytes<T>(size_t(round_up<T>(p.n)) * leading<T>(p.m)) + 2 * Arena::bytes<T>(matrix * L) +
           most_rows * Arena::bytes<T>(p.n * L) + most_columns * Arena::bytes<T>(p.m * L) + Cost<T>::bytes(p, true);
  }

  Lanes(const Problem<T>* p, int count, Arena& arena)
      : p(p), count(count), n(p->n), m(p->m), stride(p->m | 1), arena(arena) {
    arena.reset(bytes(*p));
    staged = arena.take<T>(L * step());
    C = matrix();
    a = rows(), b = columns();
    for (int lane = 0; lane < L; ++lane) {
      const bool used = lane < count;
      for (int i = 0; i < n; ++i) put(a, i, lane, used ? p[lane].a[i] : 1 / T(n));
      for (int j = 0; j < m; ++j) put(b, j, lane, used ? p[lane].b[j] : 1 / T(m));
      if (!used) out[lane] = -1;
    }
    for (int i = 0; i < n; ++i) out |= ~(at(a, i) >= dead_mass<T>);
    for (int j = 0; j < m; ++j) out |= ~(at(b, j) >= dead_mass<T>);
  }

  T* matrix() const {  // with room for a square beyond the last row; what is not an entry is 0
    T* x = arena.take<T>((size_t(n) * stride + L) * L);
    std::memset(x + size_t(n) * stride * L, 0, sizeof(T) * L * L);
    if (stride > m)
      for (int i = 0; i < n; ++i) set(x, i, m, V{});
    return x;
  }
  T* rows() const { return arena.take<T>(size_t(n) * L); }
  T* columns() const { return arena.take<T>(size_t(m) * L); }
  size_t step() const { return Arena::bytes<T>(size_t(round_up<T>(n)) * leading<T>(m)) / sizeof(T); }
  OTLOSS_INLINE V entry(const T* x, int i, int j) const { return load(x + (size_t(i) * stride + j) * L); }
  OTLOSS_INLINE void set(T* x, int i, int j, V v) const { store<T>(x + (size_t(i) * stride + j) * L, v); }
  static OTLOSS_INLINE V at(const T* x, int i) { return load(x + size_t(i) * L); }
  static OTLOSS_INLINE void set(T* x, int i, V v) { store<T>(x + size_t(i) * L, v); }
  static OTLOSS_INLINE T get(const T* x, int i, int lane) { return x[size_t(i) * L + lane]; }
  static OTLOSS_INLINE void put(T* x, int i, int lane, T value) { x[size_t(i) * L + lane] = value; }
  static OTLOSS_INLINE V absolute(V x) { return x < 0 ? -x : x; }
  static OTLOSS_INLINE V square_root(V x) {
    for (int lane = 0; lane < L; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
  }

  // C from the problems' inputs; kept[lane] gets a copy where it is wanted.
  template <class Keep> void fill(Keep keep) {
    for (int lane = 0; lane < count; ++lane) {
      const size_t mark = arena.used();
      const Cost<T> cost(p[lane], arena, true, false, staged + lane * step());
      for (int i0 = 0; i0 < n; i0 += block) cost.fill(i0);
      keep(lane, cost);
      arena.rewind(mark);
    }
    for (int lane = count; lane < L; ++lane) std::memset(staged + lane * step(), 0, sizeof(T) * step());
    const int ld = leading<T>(m);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < m; j += L) {  // what goes beyond a row is overwritten by the next
        V square[L];
        repeat<L>(OTLOSS_EACH(lane) { square[lane] = load(staged + lane * step() + size_t(i) * ld + j); });
        transpose<T>(square);
        repeat<L>(OTLOSS_EACH(k) { set(C, i, j + k, square[k]); });
      }
  }

  // The matrices of x back to `staged`, for the products of each problem. Padding gets what follows a row in x.
  void stage(const T* x) const {
    const int ld = leading<T>(m);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < m; j += L) {
        V square[L];
        repeat<L>(OTLOSS_EACH(k) { square[k] = entry(x, i, j + k); });
        transpose<T>(square);
        repeat<L>(OTLOSS_EACH(lane) { store<T>(staged + lane * step() + size_t(i) * ld + j, square[lane]); });
      }
  }

  // s = K v and, with weights w_i = weight(i, s_i), acc = K' w: one read of K, as in passes.hpp.
  template <class Weight> OTLOSS_INLINE void sweep(const T* K, const T* v, T* acc, Weight weight) const {
    std::memset(acc, 0, sizeof(T) * m * L);
    int i = 0;
    for (; i + 8 <= n; i += 8) sweep_rows<8>(K, i, v, acc, weight);
    if (n & 4) sweep_rows<4>(K, i, v, acc, weight), i += 4;
    if (n & 2) sweep_rows<2>(K, i, v, acc, weight), i += 2;
    if (n & 1) sweep_rows<1>(K, i, v, acc, weight);
  }
  template <int R, class Weight> OTLOSS_INLINE void sweep_rows(const T* K, int i, const T* v, T* acc, Weight weight) const {
    V part[R] = {};
    for (int j = 0; j < m; ++j) {
      const V x = at(v, j);
      repeat<R>(OTLOSS_EACH(r) { part[r] += entry(K, i + r, j) * x; });
    }
    repeat<R>(OTLOSS_EACH(r) { part[r] = weight(i + r, part[r]); });
    for (int j = 0; j < m; ++j) {
      V total[2] = {at(acc, j), {}};  // two chains
      repeat<R>(OTLOSS_EACH(r) { total[r % 2] += entry(K, i + r, j) * part[r]; });
      set(acc, j, total[0] + total[1]);
    }
  }
};

template <class T> struct LaneSolver : Lanes<T> {
  using Base = Lanes<T>;
  using Base::L, Base::n, Base::m, Base::a, Base::b, Base::C, Base::out, Base::at, Base::get, Base::put, Base::set, Base::entry;
  using V = vec<T>;
  const T eps, scale;
  T *K, *F, *G, *phi, *psi, *next_phi, *next_psi, *v;

  LaneSolver(const Problem<T>* p, int count, Arena& arena) : Base(p, count, arena), eps(p->eps), scale(exponent_scale(p->eps)) {
    K = this->matrix();
    for (T** x : {&F, &phi, &next_phi}) *x = this->rows();
    for (T** x : {&G, &psi, &next_psi, &v}) *x = this->columns();
    for (int i = 0; i < n; ++i) set(phi, i, splat<T>(1));
    for (int j = 0; j < m; ++j) set(psi, j, splat<T>(1)), set(G, j, V{});
  }

  // See Solver::run. n_iter, error and whether the error fell below tol, by lane.
  void run(int64_t max_iter, T tol, int64_t* n_iter, T* error, bool* stopped) {
    for (int i = 0; i < n; ++i) {
      V top = -entry(C, i, 0);
      for (int j = 1; j < m; ++j) top = max(-entry(C, i, j), top);
      set(F, i, -top);
    }
    build(~mask<T>{});
    if (max_iter == 0) std::memset(F, 0, sizeof(T) * n * L);
    for (int lane = 0; lane < L; ++lane) n_iter[lane] = max_iter, stopped[lane] = false;
    mask<T> active = ~out;
    for (int64_t k = 0; k < max_iter && any<T>(active); ++k) {
      V missed, reach;
      iterate(missed, reach);
      const mask<T> done = k > 0 ? active & (missed < tol) : mask<T>{}, lost = active & ~done & ~(reach <= Solver<T>::wide);
      if (any<T>(done | lost)) {
        for (int lane = 0; lane < L; ++lane)
          if (done[lane]) n_iter[lane] = k, error[lane] = missed[lane], stopped[lane] = true;
        out |= lost;
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
    for (int i = 0; i < n * L; ++i) f[i] = F[i] + eps * std::log(phi[i]);
    for (int j = 0; j < m * L; ++j) g[j] = G[j] + eps * std::log(psi[j]);
  }

 private:
  void build(mask<T> where) {
    for (int i = 0; i < n; ++i) {
      const V f = at(F, i);
      for (int j = 0; j < m; ++j) {
        const V k = exp2<T>(((f + at(G, j)) - entry(C, i, j)) * scale);
        set(K, i, j, where ? k : entry(K, i, j));
      }
    }
  }

  void iterate(V& missed, V& reach) {
    V top = splat<T>(1), bottom = top, nothing{}, miss{};
    const auto spread = [&](V s) __attribute__((always_inline)) {
      top = max(s, top);
      bottom = min(s, bottom);
      nothing += s * T(0);  // NaN where a scaling is not finite
    };
    for (int j = 0; j < m; ++j) set(v, j, at(b, j) * at(psi, j));
    this->sweep(K, v, next_psi, [&](int i, V s) __attribute__((always_inline)) {
      const V mass = at(a, i), scaling = 1 / s;
      miss += mass * Base::absolute(at(phi, i) * s - 1);
      set(next_phi, i, scaling);
      spread(scaling);
      return mass * scaling;
    });
    for (int j = 0; j < m; ++j) {
      const V scaling = 1 / at(next_psi, j);
      set(next_psi, j, scaling);
      spread(scaling);
    }
    missed = miss;
    reach = max(top, 1 / bottom) + nothing;
  }

  void absorb(mask<T> where) {
    const auto move = [&](T* x, T* scaling, int size) {
      for (int i = 0; i < size; ++i)
        for (int lane = 0; lane < L; ++lane)
          if (where[lane]) {
            put(x, i, lane, get(x, i, lane) + eps * std::log(get(scaling, i, lane)));
            put(scaling, i, lane, T(1));
          }
    };
    move(F, phi, n);
    move(G, psi, m);
    build(where);
  }
};

// Solves up to `lanes` problems of one shape.
template <class T>
void solve_lanes(const Problem<T>* p, int count, Arena& arena, int64_t max_iter, T tol, const Solution<T>* outs) {
  constexpr int L = lanes<T>;
  using V = vec<T>;
  mask<T> left;
  {
    LaneSolver<T> s(p, count, arena);
    s.fill([&](int lane, const Cost<T>& cost) { cost.keep(outs[lane].kept); });
    int64_t n_iter[L];
    T error[L];
    bool stopped[L];
    s.run(max_iter, tol, n_iter, error, stopped);
    left = s.out;

    T *f = s.next_phi, *g = s.next_psi;
    s.potentials(f, g);
    double shift[L] = {};
    for (int i = 0; i < s.n; ++i)
      for (int lane = 0; lane < L; ++lane) shift[lane] -= 0.5 * double(s.get(s.a, i, lane)) * s.get(f, i, lane);
    for (int j = 0; j < s.m; ++j)
      for (int lane = 0; lane < L; ++lane) shift[lane] += 0.5 * double(s.get(s.b, j, lane)) * s.get(g, j, lane);
    V move;
    for (int lane = 0; lane < L; ++lane) move[lane] = T(shift[lane]);
    for (int i = 0; i < s.n; ++i) s.set(f, i, s.at(f, i) + move);
    for (int j = 0; j < s.m; ++j) s.set(g, j, s.at(g, j) - move);

    double sharp[L] = {}, potential[L] = {}, mass[L] = {}, missed[L] = {};  // the sums of solve()
    for (int i = 0; i < s.n; ++i) {
      const V fi = s.at(f, i);
      V t{}, tc{}, tg{};
      for (int j = 0; j < s.m; ++j) {
        const V c = s.entry(s.C, i, j), gj = s.at(g, j), k = exp2<T>(((fi + gj) - c) * s.scale) * s.at(s.b, j);
        t += k;
        tc += k * c;
        tg += k * gj;
      }
      for (int lane = 0; lane < L; ++lane) {
        const double a = s.get(s.a, i, lane), row = t[lane];
        sharp[lane] += a * tc[lane];
        potential[lane] += a * (fi[lane] * row + tg[lane]);
        mass[lane] += a * row;
        missed[lane] += a * std::fabs(row - 1);
      }
    }
    for (int lane = 0; lane < count; ++lane) {
      if (left[lane]) continue;
      const Solution<T>& out = outs[lane];
      for (int i = 0; i < s.n; ++i) out.f[i] = s.get(f, i, lane);
      for (int j = 0; j < s.m; ++j) out.g[j] = s.get(g, j, lane);
      *out.n_iter = n_iter[lane];
      *out.cost = T(sharp[lane]);
      *out.value = T(potential[lane] - s.eps * (mass[lane] - 1));
      *out.error = stopped[lane] ? error[lane] : T(missed[lane]);
    }
  }
  const Team alone;
  for (int lane = 0; lane < count; ++lane)
    if (left[lane]) solve(p[lane], arena, alone, max_iter, tol, outs[lane]);
}

// See adjoint.hpp; every mass is live, there is no loss on f or g, and so M = T by rows over their sums.
template <class T> struct LaneAdjoint : Lanes<T> {
  using Base = Lanes<T>;
  using Base::L, Base::n, Base::m, Base::a, Base::b, Base::C, Base::out, Base::at, Base::get, Base::put, Base::set, Base::entry;
  using V = vec<T>;
  const T eps, scale;
  const bool solve;
  V w{}, level{};  // upstream, by lane: of the transport cost, and of it and the value
  T *M, *A, *y, *f, *fu, *S, *h, *v, *g, *root, *unroot, *z, *res, *dir, *work, *best;

  LaneAdjoint(const Problem<T>* p, int count, Arena& arena, const T* const* f_in, const T* const* g_in, const Upstream<T>* up, bool solve)
      : Base(p, count, arena), eps(p->eps), scale(exponent_scale(p->eps)), solve(solve) {
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
    }
  }

  // M, A, S and the right-hand side; C becomes R.
  void assemble() {
    for (int i = 0; i < n; ++i) {
      V total{}, sharp{};
      const V fi = at(f, i);
      for (int j = 0; j < m; ++j) {
        const V reduced = (entry(C, i, j) - fi) - at(g, j), e = at(b, j) * exp2<T>(-reduced * scale);
        set(C, i, j, reduced);
        set(M, i, j, e);
        total += e;
        sharp += e * reduced;
      }
      out |= ~((total > Adjoint<T>::least) & (total < 1 / Adjoint<T>::least));
      const V factor = 1 / total, mass = at(a, i) * total, average = w * sharp * factor, slope = mass * w, rest = mass * average;
      set(A, i, mass);
      set(y, i, average);
      for (int j = 0; j < m; ++j) {
        const V e = entry(M, i, j) * factor;
        set(M, i, j, e);
        set(S, j, at(S, j) + mass * e);
        set(h, j, at(h, j) + e * (slope * entry(C, i, j) - rest));
      }
    }
  }

  void normal(const T* x, T* to) {
    this->sweep(M, x, to, [this](int i, V s) __attribute__((always_inline)) {
      set(fu, i, s);
      return s * at(A, i);
    });
  }

  V inner(const T* x, const T* z) const {
    V total[2] = {};
    int j = 0;
    for (; j + 2 <= m; j += 2) total[0] += at(x, j) * at(z, j), total[1] += at(x, j + 1) * at(z, j + 1);
    if (j < m) total[0] += at(x, j) * at(z, j);
    return total[0] + total[1];
  }

  void project(T* x) const {
    const V along = inner(x, root) / inner(root, root);
    for (int j = 0; j < m; ++j) set(x, j, at(x, j) - along * at(root, j));
  }

  // Adjoint::conjugate_gradients, lane by lane. The squared sizes of the right-hand sides; V is left in `best`.
  V conjugate_gradients() {
    constexpr T target = Adjoint<T>::cg_target, noise = Adjoint<T>::cg_noise;
    const int cap = Adjoint<T>::cg_cap(n, m);
    for (int j = 0; j < m; ++j) {
      const V mass = Base::square_root(at(S, j));
      set(root, j, mass);
      set(unroot, j, mass > 0 ? 1 / mass : V{});
      set(res, j, at(h, j) * at(unroot, j));
    }
    project(res);
    V terms{};
    for (int i = 0; i < n; ++i) terms += at(A, i) * at(y, i) * at(y, i);
    V start = inner(res, res);
    const mask<T> trivial = start <= noise * noise * terms;
    start = trivial ? V{} : start;
    V norm = start, least = start;
    mask<T> active = ~(trivial | out), last{};
    std::memcpy(dir, res, sizeof(T) * m * L);
    for (int k = 0; k < cap; ++k) {
      active &= (norm > target * target * start) & (k - last < Adjoint<T>::cg_patience);
      if (!any<T>(active)) break;
      for (int j = 0; j < m; ++j) set(v, j, at(unroot, j) * at(dir, j));
      normal(v, work);
      for (int j = 0; j < m; ++j) set(work, j, at(dir, j) - at(unroot, j) * at(work, j));
      project(work);
      const V curvature = inner(dir, work);
      active &= curvature > 0;
      const V step = active ? norm / curvature : V{};
      for (int j = 0; j < m; ++j) {
        set(z, j, active ? at(z, j) + step * at(dir, j) : at(z, j));
        set(res, j, active ? at(res, j) - step * at(work, j) : at(res, j));
      }
      const V next = inner(res, res), turn = active ? next / norm : V{};
      for (int j = 0; j < m; ++j) set(dir, j, active ? at(res, j) + turn * at(dir, j) : at(dir, j));
      norm = active ? next : norm;
      const mask<T> better = active & (norm < least);
      least = better ? norm : least;
      last = better ? mask<T>{} + k : last;
      for (int j = 0; j < m; ++j) set(best, j, better ? at(z, j) : at(best, j));
    }
    for (int j = 0; j < m; ++j) set(best, j, at(unroot, j) * at(best, j));
    return start;
  }

  // V in `best`, U in `fu`; the residuals by lane.
  V multipliers() {
    const V start = conjugate_gradients();
    normal(best, work);
    for (int j = 0; j < m; ++j) set(res, j, (at(h, j) + at(work, j) - at(S, j) * at(best, j)) * at(unroot, j));
    project(res);
    for (int i = 0; i < n; ++i) set(fu, i, at(y, i) - at(fu, i));
    return start == 0 ? V{} : Base::square_root(inner(res, res) / start);
  }

  // M becomes the gradient by the cost.
  void gradient() {
    const T ie = solve ? 1 / eps : T(0);
    for (int i = 0; i < n; ++i) {
      const V mass = at(A, i), slope = mass * ie, flat = mass * (at(fu, i) * ie + level), direct = -w * slope;
      for (int j = 0; j < m; ++j)
        set(M, i, j, entry(M, i, j) * (at(best, j) * slope + (entry(C, i, j) * direct + flat)));
    }
  }
};

template <class T>
void implicit_lanes(const Problem<T>* p, int count, Arena& arena, const T* const* f, const T* const* g, const Upstream<T>* up,
                    bool adjoint, const Gradient<T>* outs) {
  const bool need_cost = outs->left;
  mask<T> left;
  {
    LaneAdjoint<T> s(p, count, arena, f, g, up, adjoint);
    vec<T> residual{};
    if (adjoint || need_cost) {
      s.fill([](int, const Cost<T>&) {});
      s.assemble();
    }
    if (adjoint) residual = s.multipliers();
    if (need_cost) {
      s.gradient();
      s.stage(s.M);
    }
    left = s.out;
    for (int lane = 0; lane < count; ++lane) {
      if (left[lane]) continue;
      const Gradient<T>& out = outs[lane];
      const T value = (adjoint ? up[lane].cost : T(0)) + up[lane].value;
      for (int i = 0; i < s.n; ++i) out.a[i] = s.get(s.fu, i, lane) + value * f[lane][i];
      for (int j = 0; j < s.m; ++j) out.b[j] = s.get(s.best, j, lane) + value * g[lane][j];
      *out.residual = residual[lane];
      if (!need_cost) continue;
      const size_t mark = arena.used();
      T* G = s.staged + lane * s.step();
      const Cost<T> cost(p[lane], arena, false, true, G);
      for (int i0 = 0; i0 < s.n; i0 += tile_rows) cost.pull(G + size_t(i0) * cost.ld, i0, tile_rows, out);
      cost.finish(out);
      arena.rewind(mark);
    }
  }
  const Team alone;
  for (int lane = 0; lane < count; ++lane)
    if (left[lane]) implicit_gradient(p[lane], arena, alone, f[lane], g[lane], up[lane], adjoint, outs[lane]);
}

}  // namespace otloss::OTLOSS_LEVEL
