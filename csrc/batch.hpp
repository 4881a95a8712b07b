// The kernels on batches of problems: addresses in, results written in place. No Python.
//
// An address is an integer (Tensor.data_ptr()), 0 for "none". The caller vouches for shape, dtype and contiguity.
#pragma once
#include <stdexcept>

#include "dispatch.hpp"
#include "pool.hpp"

namespace otloss {

using Address = uintptr_t;

template <class T> T* at(Address base, int64_t offset) { return base ? reinterpret_cast<T*>(base) + offset : nullptr; }

struct Inputs {
  Address left, right, a, b;
  int64_t count, n, m, d;
  double eps;
  Address kept;  // where solve leaves the cost of features for the gradient, or 0
  Address row_shift, column_shift;  // where solve leaves what it takes out of a dense cost, or 0
  int kind;  // of the cost of features
  Address rho_a, rho_b;  // penalties on the marginals, each 0 for a constraint
  bool one_left, one_right;  // all problems share them

  bool short_rows() const { return n <= otloss::short_rows && m <= otloss::short_rows; }
  template <class T> Problem<T> problem(int64_t i) const {
    const int64_t size = right ? n * d : n * m;
    const auto inverse = [i](Address rho) { return rho ? 1 / *at<T>(rho, i) : T(0); };
    return {at<T>(left, one_left ? 0 : i * size), at<T>(right, one_right ? 0 : i * m * d), at<T>(a, i * n), at<T>(b, i * m), int(n), int(m), int(d), T(eps),
            at<T>(kept, i * n * m), at<T>(row_shift, i * n), at<T>(column_shift, i * m), Kind(kind), rho_a || rho_b, inverse(rho_a),
            inverse(rho_b)};
  }
};

// Where the gradients of the loss by the outputs stand: B, B, B x n and B x m numbers, each 0 for none.
struct UpstreamAddresses {
  Address cost, value, f, g;

  template <class T> Upstream<T> upstream(const Inputs& in, int64_t i) const {
    return {cost ? *at<T>(cost, i) : T(0), value ? *at<T>(value, i) : T(0), at<T>(f, i * in.n), at<T>(g, i * in.m)};
  }
};

// Where the gradients by the inputs go, each in the shape of its input; left and right are 0 where they are not wanted, the
// residual where there is no linear system.
struct GradientAddresses {
  Address left, right, a, b, residual;
  Address rho;  // B x 2, 0 where there are no penalties

  template <class T> Gradient<T> gradient(const Inputs& in, int64_t i) const {
    return {at<T>(left, i * in.n * (in.right ? in.d : in.m)), at<T>(right, i * in.m * in.d), at<T>(a, i * in.n), at<T>(b, i * in.m),
            at<T>(residual, i), at<T>(rho, 2 * i)};
  }
  // Gradients by cost or features are usually fresh memory, written once.
  template <class T> void expect(const Inputs& in) const {
    if (left) want_large_pages(at<T>(left, 0), sizeof(T) * in.count * in.n * (in.right ? in.d : in.m));
    if (right) want_large_pages(at<T>(right, 0), sizeof(T) * in.count * in.m * in.d);
  }
};

inline const Level& level() {
  if (!active_level()) throw std::runtime_error(level_problem());
  return *active_level();
}

// Waking a thread costs about as much as passing a few hundred thousand times over an entry.
inline int useful(int threads, double entries) { return entries < 2e5 ? 1 : threads; }

// One problem a thread; where large ones are fewer than the threads, one after another, each by all threads. What is computed
// is the same.
template <class Task> void each_problem(const Inputs& in, int threads, double passes, Task task) {
  threads = useful(threads, double(in.count) * in.n * in.m * passes);
  const bool together = in.count < threads && in.n * in.m >= 2 * part_entries;
  parallel(in.count, together ? 1 : threads, [&](int64_t i, Arena& scratch) {
    task(i, scratch, Team(int(in.n), int(in.m), int(in.d), together ? threads : 1));
  });
}

// Problems with short rows in groups, one to a lane: full ones, or as full as leaves no thread idle. A lane's result is its own.
template <class Task> void each_group(const Inputs& in, int lanes, int threads, double passes, Task task) {
  threads = useful(threads, double(in.count) * in.n * in.m * passes);
  const auto share = [](int64_t count, int64_t among) { return (count + among - 1) / among; };
  const int64_t rounds = share(in.count, int64_t(lanes) * threads), size = rounds ? share(in.count, rounds * threads) : 1;
  parallel(share(in.count, size), threads, [&](int64_t group, Arena& scratch) {
    const int64_t first = group * size;
    task(first, int(std::min(size, in.count - first)), scratch);
  });
}

template <class T>
void solve(const Inputs& in, Address start, bool accelerate, int64_t max_iter, double tol, Address f, Address g, Address cost, Address value,
           Address n_iter, Address error, int threads) {
  const auto& kernel = kernels_of<T>(level());
  const auto solution = [&](int64_t i) -> Solution<T> {
    return {at<T>(f, i * in.n), at<T>(g, i * in.m), at<T>(cost, i), at<T>(value, i), at<T>(error, i), at<int64_t>(n_iter, i),
            at<T>(in.kept, i * in.n * in.m), at<T>(in.row_shift, i * in.n), at<T>(in.column_shift, i * in.m)};
  };
  const auto problem = [&](int64_t i) {
    Problem<T> p = in.problem<T>(i);
    p.kept = p.row_shift = p.column_shift = nullptr;  // still to be written
    p.start = at<T>(start, i * in.m);
    p.symmetric = accelerate && !p.relaxed && is_symmetric(p);
    return p;
  };
  if (in.short_rows())
    return each_group(in, kernel.lanes, threads, double(max_iter) + 10, [&](int64_t first, int count, Arena& scratch) {
      Problem<T> problems[most_lanes];
      Solution<T> solutions[most_lanes];
      for (int k = 0; k < count; ++k) problems[k] = problem(first + k), solutions[k] = solution(first + k);
      kernel.solve_lanes(problems, count, scratch, accelerate, max_iter, T(tol), solutions);
    });
  each_problem(in, threads, double(max_iter) + 10, [&](int64_t i, Arena& scratch, const Team& team) {
    kernel.solve(problem(i), scratch, team, accelerate, max_iter, T(tol), solution(i));
  });
}

template <class T>
void implicit(const Inputs& in, Address f, Address g, const UpstreamAddresses& up, bool adjoint, const GradientAddresses& out,
              int threads) {
  const auto& kernel = kernels_of<T>(level());
  out.expect<T>(in);
  if (in.short_rows() && !up.f && !up.g)
    return each_group(in, kernel.lanes, threads, 30, [&](int64_t first, int count, Arena& scratch) {
      Problem<T> problems[most_lanes];
      const T *fs[most_lanes], *gs[most_lanes];
      Upstream<T> upstream[most_lanes];
      Gradient<T> gradient[most_lanes];
      for (int k = 0; k < count; ++k) {
        const int64_t i = first + k;
        problems[k] = in.problem<T>(i);
        fs[k] = at<T>(f, i * in.n), gs[k] = at<T>(g, i * in.m);
        upstream[k] = up.upstream<T>(in, i);
        gradient[k] = out.gradient<T>(in, i);
      }
      kernel.implicit_lanes(problems, count, scratch, fs, gs, upstream, adjoint, gradient);
    });
  each_problem(in, threads, 30, [&](int64_t i, Arena& scratch, const Team& team) {
    kernel.implicit(in.problem<T>(i), scratch, team, at<T>(f, i * in.n), at<T>(g, i * in.m),
                    up.upstream<T>(in, i), adjoint, out.gradient<T>(in, i));
  });
}

template <class T>
void unrolled(const Inputs& in, Address n_iter, const UpstreamAddresses& up, const GradientAddresses& out, int threads) {
  const auto& kernel = kernels_of<T>(level());
  out.expect<T>(in);
  parallel(in.count, useful(threads, double(in.count) * in.n * in.m * 100), [&](int64_t i, Arena& scratch) {
    kernel.unrolled(in.problem<T>(i), scratch, *at<int64_t>(n_iter, i), up.upstream<T>(in, i), out.gradient<T>(in, i));
  });
}

// Masses of one side of all problems: as they were given, and of total 1.
struct Side {
  Address given;
  int form;
  int64_t n;
  Address share;

  Form as() const { return Form(form); }
};

// What holds of the masses of every problem; totals may differ by a factor of about 1 + tolerance.
template <class T> int normalise(const Side& a, const Side& b, int64_t count, double tolerance) {
  const auto& kernel = kernels_of<T>(level());
  Sound all = Sound::all_live;
  for (int64_t i = 0; i < count; ++i) {
    double total[2] = {};
    const Sound of_a = kernel.normalise(at<T>(a.given, i * a.n), a.as(), int(a.n), at<T>(a.share, i * a.n), total[0]);
    const Sound of_b = kernel.normalise(at<T>(b.given, i * b.n), b.as(), int(b.n), at<T>(b.share, i * b.n), total[1]);
    all = std::min({all, of_a, of_b});
    const bool both = a.as() != Form::uniform && b.as() != Form::uniform;
    if (both && !(std::abs(total[0] - total[1]) <= tolerance)) all = Sound::invalid;
  }
  return int(all);
}

template <class T> void by_given(const Side& side, int64_t count, Address by_share, Address out) {
  const auto& kernel = kernels_of<T>(level());
  for (int64_t i = 0, n = side.n; i < count; ++i)
    kernel.by_given(at<T>(side.given, i * n), side.as(), int(n), at<T>(side.share, i * n), at<T>(by_share, i * n), at<T>(out, i * n));
}

// The largest error; NaN where a potential or a cost is not finite.
template <class T> double worst_error(Address f, int64_t n, Address g, int64_t m, Address cost, Address error, int64_t count) {
  using I = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr I exponent = sizeof(T) == 4 ? I(0x7f800000) : I(0x7ff0000000000000);
  const auto finite = [](Address values, int64_t size) {
    I bad = 0;
    for (int64_t i = 0; i < size; ++i) {
      I bits;
      std::memcpy(&bits, at<T>(values, i), sizeof(T));
      bad |= (bits & exponent) == exponent;
    }
    return bad == 0;
  };
  if (!finite(f, count * n) || !finite(g, count * m) || !finite(cost, count)) return std::numeric_limits<double>::quiet_NaN();
  T worst = 0;
  for (int64_t i = 0; i < count; ++i) worst = std::max(worst, *at<T>(error, i));
  return worst;
}

template <class T> double probe_read(int64_t bytes) {
  Arena scratch;
  return kernels_of<T>(level()).probe_read(scratch, bytes);
}
template <class T> double probe_fma() { return kernels_of<T>(level()).probe_fma(); }
template <class T> double probe_products(int n, int m, int d, int part) {
  Arena scratch;
  return kernels_of<T>(level()).probe_products(scratch, n, m, d, part);
}

}  // namespace otloss
