// What goes in and what comes out, for one problem. Plain pointers, no level, no Python.
//
// A problem is a dense cost (right == nullptr, left = C of n x m) or a pair of feature sets (left = x of n x d,
// right = y of m x d) with a kind of cost between them, with masses a, b that sum to 1. In the KL gauge its plan is
//   T_ij = a_i b_j exp((f_i + g_j - C_ij) / eps).
// A constant of a row or column of C changes f_i or g_j alone. The minima of the rows, then of the columns, are taken out of a dense
// cost first: an offset of the cost is then no part of any sum, and costs no digits. Potentials are those of the cost that is left.
// A dense cost of +inf forbids a pair, and stays +inf. Its kernel is exactly 0, by exp2; wherever the cost itself is a factor, the
// kernel decides whether it counts. The minimum of a row or column is 0 if every point with mass is forbidden. If such a point has no
// mass itself, its potential is 0 before the gauge; if it has, the outputs are not finite.
// A solve may keep the cost of features for the gradient, which then spares a product.
#pragma once
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "stop.hpp"

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace otloss {

// The cost C_ij of features: 1 - cos(x_i, y_j), |x_i - y_j|^2 or -<x_i, y_j>.
enum class Kind : int { cosine, sqeuclidean, dot };

template <class T> struct Problem {
  const T *left, *right, *a, *b;
  int n, m, d;
  T eps;
  const T* kept;  // the cost n x m of the features, or null
  const T *row_shift = nullptr, *column_shift = nullptr;  // what solve took out of a dense cost, or null
  Kind kind = Kind::cosine;
  bool relaxed = false;  // whether a marginal has a penalty in place of a constraint (penalty.hpp); masses then have any totals
  T inverse_rho_a = 0, inverse_rho_b = 0;  // 0 for a constraint
  const T* start = nullptr;  // potentials of the columns to start from, of the cost as it was given, or null
  bool symmetric = false;    // see is_symmetric; only where it is made use of
};

// Whether a problem is that of a set with itself: the same masses, and the same features or a symmetric cost.
template <class T> bool is_symmetric(const Problem<T>& p) {
  const auto same = [](const T* x, const T* y, size_t count) { return x == y || std::memcmp(x, y, sizeof(T) * count) == 0; };
  if (p.n != p.m || !same(p.a, p.b, p.n)) return false;
  if (p.right) return same(p.left, p.right, size_t(p.n) * p.d);
  constexpr int tile = 32;  // rows and columns that stay in the cache
  for (int i0 = 0; i0 < p.n; i0 += tile) {
    for (int j0 = 0; j0 <= i0; j0 += tile)
      for (int i = i0; i < std::min(i0 + tile, p.n); ++i)
        for (int j = j0; j < std::min(j0 + tile, i); ++j)
          if (p.left[size_t(i) * p.m + j] != p.left[size_t(j) * p.m + i]) return false;
    poll(int64_t(tile) * i0);
  }
  return true;
}

template <class T> struct Solution {
  T *f, *g, *cost, *value, *error;
  int64_t* n_iter;
  T* kept;  // n x m, or null
  T *row_shift, *column_shift;  // null where nothing is taken out of the cost
};

// Gradients of the loss by each output; a null vector stands for zero.
template <class T> struct Upstream {
  T cost, value;
  const T *f, *g;
};

template <class T> struct Gradient {
  T *left, *right, *a, *b;  // left == nullptr: the gradient of the cost is not wanted
  T* residual;
  T* rho = nullptr;  // by both penalties, 0 for a constraint; null where there is none
};

// Conjugate-gradient steps of all adjoint systems so far, each one sweep. The benchmarks read it.
inline int64_t adjoint_steps = 0;

// A mass not above this counts as no mass: the reciprocal of a larger one is representable with room to spare.
template <class T> constexpr T dead_mass = sizeof(T) == 4 ? T(1e-30) : T(1e-290);

// Asks for large pages in what lies whole within a range: first touches are then few, and small pages scattered over memory
// do not collide in the second-level cache. Values are not touched.
constexpr size_t large_page = size_t(2) << 20;
inline void want_large_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + large_page - 1) / large_page * large_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / large_page * large_page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Throws std::bad_alloc with a message that says how many bytes of scratch the system has refused.
[[noreturn]] void no_scratch(size_t bytes);

// Scratch of one thread: a bump allocator that grows to the largest problem seen. Call reset() first, with all the bytes that
// will be taken, and trim() with the number of threads when a call is done. If reset() throws, the scratch is empty.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() { release(); }
  void reset(size_t bytes) {
    bytes += 1024 * gap;
    if (bytes > size_) {
      release();
      const size_t size = (bytes + large_page - 1) / large_page * large_page;
      data_ = static_cast<char*>(::operator new(size, std::align_val_t(large_page), std::nothrow));
      if (!data_) no_scratch(size);
      size_ = used_ = size;
      want_large_pages(data_, size_);
    }
    rewind(0);
  }
  void trim(int threads) {
    if (size_ > keep / threads) release();
  }
  size_t used() const { return used_; }
  void rewind(size_t used) {  // gives back what was taken since
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(data_ + used, used_ - used);
    std::memset(data_ + used, 0xff, used_ - used);  // NaN, for whoever reads what was not written
    __asan_poison_memory_region(data_ + used, used_ - used);
#endif
    used_ = used;
  }
  // Always inline: a copy of its own would be shared by all levels, whatever instructions it was compiled to.
  template <class T> inline __attribute__((always_inline)) T* take(size_t count) {
    T* p = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes<T>(count) + gap;
    if (used_ > size_) throw std::bad_alloc();
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(p, count * sizeof(T));
#endif
    return p;
  }
  template <class T> static constexpr inline __attribute__((always_inline)) size_t bytes(size_t count) { return (count * sizeof(T) + 63) / 64 * 64; }

 private:
  static constexpr size_t keep = size_t(256) << 20;  // a thread that has more than its share of this gives it back
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t gap = 64;  // behind all that is taken, so that a sanitizer sees what reads or writes there
#else
  static constexpr size_t gap = 0;
#endif
  void release() {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(data_, size_);
#endif
    if (data_) ::operator delete(data_, std::align_val_t(large_page));
    data_ = nullptr;
    size_ = used_ = 0;
  }
  char* data_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

class Team;

// About how many entries of a matrix one part of a large problem has; up to twice as many are not split.
constexpr int64_t part_entries = int64_t(1) << 18;

constexpr int short_rows = 64, most_lanes = 16;

// How the masses of a side were given, and what was found of them.
enum class Form : int { uniform, masses, logs };
enum class Sound : int { invalid, some_dead, all_live };

// The kernels of one level for one precision.
template <class T> struct Kernels {
  void (*solve)(const Problem<T>&, Arena&, const Team&, bool accelerate, int64_t max_iter, T tol, const Solution<T>&);
  void (*implicit)(const Problem<T>&, Arena&, const Team&, const T* f, const T* g, const Upstream<T>&, bool adjoint, const Gradient<T>&);
  // Up to `lanes` problems of one shape, n and m at most short_rows; no loss on f or g.
  void (*solve_lanes)(const Problem<T>*, int count, Arena&, bool accelerate, int64_t max_iter, T tol, const Solution<T>*);
  void (*implicit_lanes)(const Problem<T>*, int count, Arena&, const T* const* f, const T* const* g, const Upstream<T>*, bool adjoint,
                         const Gradient<T>*);
  int lanes;
  void (*unrolled)(const Problem<T>&, Arena&, int64_t n_iter, const Upstream<T>&, const Gradient<T>&);
  Sound (*normalise)(const T* given, Form, int n, T* out, double& log_total);
  void (*by_given)(const T* given, Form, int n, const T* a, const T* by_a, T* out);
  double (*probe_read)(Arena&, int64_t bytes);
  double (*probe_fma)();
  double (*probe_products)(Arena&, int n, int m, int d, int part);
};

struct Level {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
};

}  // namespace otloss
