// Problems with short rows (n, m <= short_rows), one to each lane of a vector.
//
// A row of 49 entries fills a vector unit badly, and every sum over it ends in shuffles. Here entry (i, j) of `lanes` problems is
// one vector, so all sums are vertical and nothing is padded. The cost and the products stay with each problem (cost.hpp): its
// matrix is laid out row by row (`staged`), and a square transposition at a time turns L such matrices into one of vectors.
//
// The methods, in lanes_solve.hpp and lanes_adjoint.hpp, are those of solve.hpp and adjoint.hpp with a mask where those have an
// if. A lane computes what its own problem says and never looks at another lane, so results do not depend on who shares the
// vector; lanes left over hold a trivial problem. Rare cases are not handled here: a problem with a point without mass,
// one that needs an iteration in the log-domain, and one whose rows lost their sums go to the kernel for single problems.
#pragma once
#include "cost.hpp"

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
  using Vec = vec<T>;
  static constexpr int L = lanes<T>;
  static_assert(L <= most_lanes);
  static constexpr int most_rows = 8, most_columns = 32;  // vectors that a solve or a gradient may take

  const Problem<T>* p;
  const int count, n, m, stride;
  T *staged, *C, *a, *b;
  mask<T> fallback{};  // lanes whose problem is left to the kernel for single problems
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
      if (!used) fallback[lane] = -1;
    }
    for (int i = 0; i < n; ++i) fallback |= ~(at(a, i) > dead_mass<T>);
    for (int j = 0; j < m; ++j) fallback |= ~(at(b, j) > dead_mass<T>);
  }

  T* matrix() const {  // with room for a square beyond the last row; what is not an entry is 0
    T* x = arena.take<T>((size_t(n) * stride + L) * L);
    std::memset(x + size_t(n) * stride * L, 0, sizeof(T) * L * L);
    if (stride > m)
      for (int i = 0; i < n; ++i) set(x, i, m, Vec{});
    return x;
  }
  T* rows() const { return arena.take<T>(size_t(n) * L); }
  T* columns() const { return arena.take<T>(size_t(m) * L); }
  size_t step() const { return Arena::bytes<T>(size_t(round_up<T>(n)) * leading<T>(m)) / sizeof(T); }
  OTLOSS_INLINE Vec entry(const T* x, int i, int j) const { return load(x + (size_t(i) * stride + j) * L); }
  OTLOSS_INLINE void set(T* x, int i, int j, Vec v) const { store<T>(x + (size_t(i) * stride + j) * L, v); }
  static OTLOSS_INLINE Vec at(const T* x, int i) { return load(x + size_t(i) * L); }
  static OTLOSS_INLINE void set(T* x, int i, Vec v) { store<T>(x + size_t(i) * L, v); }
  static OTLOSS_INLINE T get(const T* x, int i, int lane) { return x[size_t(i) * L + lane]; }
  static OTLOSS_INLINE void put(T* x, int i, int lane, T value) { x[size_t(i) * L + lane] = value; }
  static OTLOSS_INLINE Vec absolute(Vec x) { return x < 0 ? -x : x; }
  static OTLOSS_INLINE Vec square_root(Vec x) {
    for (int lane = 0; lane < L; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
  }

  // C from the problems' inputs; kept[lane] gets a copy where it is wanted.
  template <class Keep> void fill(Keep keep) {
    for (int lane = 0; lane < count; ++lane) {
      const size_t mark = arena.used();
      const Cost<T> cost(p[lane], arena, true, false, staged + lane * step());
      cost.fill(0, n);
      keep(lane, cost);
      arena.rewind(mark);
      poll(int64_t(n) * m * (1 + p->d / 16));
    }
    for (int lane = count; lane < L; ++lane) std::memset(staged + lane * step(), 0, sizeof(T) * step());
    const int ld = leading<T>(m);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < m; j += L) {  // what goes beyond a row is overwritten by the next
        Vec square[L];
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
        Vec square[L];
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
    Vec part[R] = {};
    for (int j = 0; j < m; ++j) {
      const Vec x = at(v, j);
      repeat<R>(OTLOSS_EACH(r) { part[r] += entry(K, i + r, j) * x; });
    }
    repeat<R>(OTLOSS_EACH(r) { part[r] = weight(i + r, part[r]); });
    for (int j = 0; j < m; ++j) {
      Vec total[2] = {at(acc, j), {}};  // two chains
      repeat<R>(OTLOSS_EACH(r) { total[r % 2] += entry(K, i + r, j) * part[r]; });
      set(acc, j, total[0] + total[1]);
    }
  }
};

}  // namespace otloss::OTLOSS_LEVEL
