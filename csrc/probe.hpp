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

// GFLOP/s of the three products of one problem with features: the cost and the two contractions of its gradient.
template <class T> double probe_products(Arena& arena, int n, int m, int d) {
  const size_t inputs = Arena::bytes<T>(size_t(n) * d) + Arena::bytes<T>(size_t(m) * d);
  Problem<T> p{nullptr, nullptr, nullptr, nullptr, n, m, d, T(1), nullptr, nullptr, nullptr};
  Arena features;
  features.reset(inputs);
  T *x = features.take<T>(size_t(n) * d), *y = features.take<T>(size_t(m) * d);
  for (size_t i = 0; i < size_t(n) * d; ++i) x[i] = 1;
  for (size_t i = 0; i < size_t(m) * d; ++i) y[i] = 1;
  p.left = x, p.right = y;
  arena.reset(Cost<T>::bytes(p, true));
  const Cost<T> cost(p, arena, true, true);
  const Gradient<T> out{};
  const double took = fastest([&] {
    for (int i0 = 0; i0 < cost.n; i0 += tile_rows) {
      for (int i = i0; i < std::min(i0 + tile_rows, cost.rows); i += block) cost.fill(i);
      cost.backward(cost.row(i0), i0, tile_rows, out);
    }
  });
  return 6. * n * m * d / took * 1e-9;
}

}  // namespace otloss::OTLOSS_LEVEL
