// Measures what one core can do. The benchmarks compare the kernels with these rates.
#pragma once
#include "cost.hpp"

namespace otloss::OTLOSS_LEVEL {

// Seconds of the fastest of several runs. Other work on the machine slows some runs, and the fastest shows what is attainable.
template <class Run> double fastest(Run run) {
  using clock = std::chrono::steady_clock;
  double best = 1e30;
  for (int k = 0; k < 25; ++k) {
    const auto start = clock::now();
    run();
    best = std::min(best, std::chrono::duration<double>(clock::now() - start).count());
  }
  return best;
}

// GB/s of adding up a working set of `bytes` bytes again and again.
template <class T> double probe_read(Arena& arena, int64_t bytes) {
  constexpr int chains = 8;
  const int64_t step = chains * lanes<T>, count = std::max<int64_t>(1, bytes / int64_t(sizeof(T)) / step) * step;
  arena.reset(Arena::bytes<T>(count));
  T* data = arena.take<T>(count);
  std::memset(data, 0, sizeof(T) * count);
  const int repeats = int(std::max<int64_t>(1, (int64_t(8) << 20) / (count * int64_t(sizeof(T)))));
  T sink = 0;
  const double took = fastest([&] {
    vec<T> total[chains] = {};
    for (int k = 0; k < repeats; ++k)
      for (int64_t i = 0; i < count; i += step) repeat<chains>(OTLOSS_EACH(c) { total[c] += load(data + i + c * lanes<T>); });
    repeat<chains>(OTLOSS_EACH(c) { sink += sum<T>(total[c]); });
  });
  return sink == 0 ? double(repeats) * count * sizeof(T) / took * 1e-9 : 0;
}

// GFLOP/s of independent fused multiply-adds in registers.
template <class T> double probe_fma() {
  constexpr int chains = OTLOSS_VECTOR_BYTES == 64 ? 16 : 8, steps = 200000;
  volatile T factor = T(0.5), addend = T(1);
  T sink = 0;
  const double took = fastest([&] {
    const vec<T> x = splat<T>(factor), y = splat<T>(addend);
    vec<T> total[chains];  // the chains differ, else the compiler would compute one for all
    repeat<chains>(OTLOSS_EACH(c) { total[c] = splat<T>(T(c)); });
    for (int k = 0; k < steps; ++k) repeat<chains>(OTLOSS_EACH(c) { total[c] = total[c] * x + y; });
    vec<T> all{};
    repeat<chains>(OTLOSS_EACH(c) { all += total[c]; });
    sink += sum<T>(all);
  });
  return sink > 0 ? 2. * steps * chains * lanes<T> / took * 1e-9 : 0;
}

// GFLOP/s of the products of one problem with features, which is in the cache. Part 0 is the cost with all that makes it from the
// features, 1 the gradient by x from that by the cost, 2 the gradient by y; 3 is all of these.
template <class T> double probe_products(Arena& arena, int n, int m, int d, int part) {
  const size_t x_size = size_t(n) * d, y_size = size_t(m) * d;
  Arena inputs;
  inputs.reset(2 * (Arena::bytes<T>(x_size) + Arena::bytes<T>(y_size)) + Arena::bytes<T>(n) + Arena::bytes<T>(m));
  T *x = inputs.take<T>(x_size), *y = inputs.take<T>(y_size), *gx = inputs.take<T>(x_size), *gy = inputs.take<T>(y_size);
  T *w_rows = inputs.take<T>(n), *w_columns = inputs.take<T>(m);
  for (size_t i = 0; i < x_size; ++i) x[i] = 1;
  for (size_t i = 0; i < y_size; ++i) y[i] = 1;
  for (int i = 0; i < n; ++i) w_rows[i] = 1;
  for (int j = 0; j < m; ++j) w_columns[j] = 1;
  const Problem<T> p{x, y, nullptr, nullptr, n, m, d, T(1), nullptr};
  const Gradient<T> out{gx, gy, nullptr, nullptr, nullptr};
  const size_t need = Cost<T>::bytes(p, true);
  arena.reset(2 * need);
  const Cost<T> cost(p, arena, true, true);
  for (int i = 0; i < cost.rows; i += block) cost.fill(i);
  const size_t mark = arena.used();
  const double flops = (part == 3 ? 6. : 2.) * n * m * d;
  const int repeats = int(std::max(1., 1e7 / flops));
  const double took = fastest([&] {
    for (int k = 0; k < repeats; ++k) {
      if (part == 0 || part == 3) {
        arena.rewind(mark);
        const Cost<T> again(p, arena, true, false);
        for (int i = 0; i < n; i += block) again.fill(i);
      }
      const int step = cost.chunk_rows();
      for (int i0 = 0; i0 < n; i0 += step) {
        if (part == 1 || part == 3) cost.pull_rows(cost.row(i0), i0, step, w_rows, out);
        if (part == 2 || part == 3) cost.pull_columns(cost.row(i0), i0, step, 0, m, w_columns, out);
      }
    }
  });
  return flops * repeats / took * 1e-9;
}

}  // namespace otloss::OTLOSS_LEVEL
