// Calls every kernel of the level in use, for the compiler's sanitizers to watch: make sanitize, make sanitize-threads.
//
//   driver [seed [seconds]]
//
// Problems are random: sizes at the borders of vectors and blocks, masses and costs at the ends of their ranges. Several threads call at
// once. What a call writes has to be the same, bit for bit, with any number of threads; where inputs are ordinary it has to be finite.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../csrc/batch.hpp"

using namespace otloss;

namespace {

using Clock = std::chrono::steady_clock;

struct Random {
  std::mt19937_64 engine;

  int64_t below(int64_t count) { return int64_t(engine() % uint64_t(count)); }
  bool one_in(int64_t count) { return below(count) == 0; }
  double normal() { return std::normal_distribution<double>()(engine); }
  double uniform() { return std::uniform_real_distribution<double>()(engine); }
  template <class V> V of(std::initializer_list<V> values) { return values.begin()[below(int64_t(values.size()))]; }
  int size() {
    if (one_in(2)) return 1 + int(below(300));
    return of({1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 66, 127, 128, 129, 255, 256, 257, 300});
  }
};

[[noreturn]] void fail(const char* what) { throw std::runtime_error(what); }

template <class T> Address address(std::vector<T>& x) { return x.empty() ? 0 : reinterpret_cast<Address>(x.data()); }

// What the entries of a problem are like.
enum Values { ordinary, equal_rows, forbidden_pairs, subnormal, signed_zeros, huge, tiny, mixed, constant, kinds_of_values };

template <class T> std::vector<T> entries(Random& random, Values like, size_t rows, size_t columns, bool may_forbid) {
  std::vector<T> x(rows * columns);
  for (T& v : x) {
    v = T(random.normal());
    if (like == forbidden_pairs && may_forbid && random.one_in(5)) v = std::numeric_limits<T>::infinity();
    if (like == subnormal) v *= std::numeric_limits<T>::denorm_min() * 100;
    if (like == signed_zeros) v = random.one_in(2) ? T(0) : T(-0.0);
    if (like == huge) v *= T(1e30);
    if (like == tiny) v *= T(1e-30);
    if (like == mixed) v *= T(std::pow(10., random.of({-30, -3, 0, 3, 30})));
    if (like == constant) v = T(1);
  }
  for (size_t i = 0; like == equal_rows && i < x.size(); ++i) x[i] = x[i % columns];
  return x;
}

// Masses of total 1, for `count` problems; some without mass, or all on one point.
template <class T> std::vector<T> masses(Random& random, int64_t count, int n, bool live) {
  std::vector<T> a(size_t(count * n));
  for (int64_t k = 0; k < count; ++k) {
    T* of = a.data() + k * n;
    const int64_t like = live ? 0 : random.below(6);
    double total = 0;
    for (int i = 0; i < n; ++i) {
      double mass = std::exp(random.normal());
      if (like == 1 && random.one_in(3)) mass = 0;
      if (like == 2) mass *= random.of({1e-28, 1e-20, 1e-6, 1.});
      if (like == 3 && random.one_in(2)) mass = std::numeric_limits<T>::denorm_min();
      if (like == 4) mass = 1;
      of[i] = T(mass);
    }
    if (like == 5 || of[0] == 0) of[0] = T(like == 5 ? 1e20 : 1);
    for (int i = 0; i < n; ++i) total += of[i];
    for (int i = 0; i < n; ++i) of[i] = T(of[i] / total);
  }
  return a;
}

// One batch of problems and all that the kernels write for it.
template <class T> class Batch {
 public:
  explicit Batch(Random& random) : random_(random) {
    n = random.size(), m = random.one_in(8) ? n : random.size();
    features = random.one_in(2);
    d = features ? random.one_in(2) ? 1 + int(random.below(20)) : random.size() : 0;
    if (random.one_in(80)) n = 600 + int(random.below(300)), m = 1000 + int(random.below(200)), d = features ? 3 : 0;  // in parts
    const int64_t most = std::max<int64_t>(1, 15'000 / (int64_t(n) * m));
    count = n > 300 ? 1 : 1 + random.below(std::min<int64_t>(most, 35));
    like = random.one_in(3) ? Values(random.below(kinds_of_values)) : ordinary;
    live = random.one_in(2);
    relaxed = random.one_in(4);
    one_left = random.one_in(6), one_right = features && random.one_in(6);
    kind = int(random.below(3));
    eps = like == ordinary ? random.of({0.02, 0.1, 1.}) : random.of({1e-3, 0.05, 1., 1e20});
    if (features && kind == 2) eps *= std::sqrt(double(d));  // products of many features are large

    left = entries<T>(random, like, size_t(one_left ? 1 : count) * n, features ? d : m, !features);
    if (features) right = entries<T>(random, like, size_t(one_right ? 1 : count) * m, d, false);
    a = masses<T>(random, count, n, live), b = masses<T>(random, count, m, live);
    if (random.one_in(10) && n == m) {  // of a set with itself
      b = a;
      if (features) right = left, one_right = one_left;
    }
    if (relaxed) {
      const int sides = 1 + int(random.below(3));
      if (sides & 1) rho_a = rates();
      if (sides & 2) rho_b = rates();
      if (random.one_in(2))
        for (T& mass : a) mass *= T(2.5);
    }
    if (random.one_in(3)) start = entries<T>(random, ordinary, size_t(count), m, false);
    keeps = features && random.one_in(2);
    accelerate = random.one_in(2), adjoint = !random.one_in(4), need_cost = !random.one_in(4);
    max_iter = 1 + random.below(n > 300 ? 4 : 40), tol = random.of({0., 1e-3, 1e-6});
    w = entries<T>(random, ordinary, 1, count, false), v = entries<T>(random, ordinary, 1, count, false);
    if (random.one_in(3)) p = entries<T>(random, ordinary, count, n, false);
    if (random.one_in(3)) q = entries<T>(random, ordinary, count, m, false);
  }

  // All kernels, with so many threads. Returns what they have written.
  std::vector<std::vector<T>> run(int threads) {
    std::vector<T> f(count * n), g(count * m), cost(count), value(count), error(count), residual(count);
    std::vector<T> kept(keeps ? count * n * m : 0), rows(features || relaxed ? 0 : count * n), columns(rows.empty() ? 0 : count * m);
    std::vector<int64_t> n_iter(count);
    Inputs in{address(left), address(right), address(a), address(b), count, n, m, d, eps, address(kept), address(rows), address(columns),
              kind, address(rho_a), address(rho_b), one_left, one_right};
    solve<T>(in, address(start), accelerate, max_iter, tol, address(f), address(g), address(cost), address(value), address(n_iter),
             address(error), threads);
    const double worst = worst_error<T>(address(f), n, address(g), m, address(cost), address(error), count);
    if (like == ordinary && !std::isfinite(worst)) fail("a solution is not finite");

    std::vector<std::vector<T>> out{f, g, cost, value, error, kept, rows, columns};
    std::vector<T> by_left, by_right, by_a(count * n), by_b(count * m), by_rho(relaxed ? 2 * count : 0);
    const auto gradients = [&](bool wanted) {
      by_left.assign(wanted ? size_t(count) * n * (features ? d : m) : 0, T(0));
      by_right.assign(wanted && features ? size_t(count) * m * d : 0, T(0));
      return GradientAddresses{address(by_left), address(by_right), address(by_a), address(by_b), address(residual), address(by_rho)};
    };
    const auto keep = [&] {
      out.insert(out.end(), {by_left, by_right, by_a, by_b, by_rho});
      if (like != ordinary) return;
      for (size_t k = out.size() - 5; k < out.size(); ++k)
        for (T x : out[k])
          if (!std::isfinite(x)) fail("a gradient is not finite");
    };
    implicit<T>(in, address(f), address(g), {address(w), address(v), address(p), address(q)}, adjoint, gradients(need_cost), threads);
    keep();
    if (!relaxed) {
      in.kept = in.row_shift = in.column_shift = 0;
      unrolled<T>(in, address(n_iter), {address(w), address(v), 0, 0}, gradients(need_cost), threads);
      keep();
    }
    for (int64_t steps : n_iter) cost.push_back(T(steps));
    out.push_back(cost);
    return out;
  }

  void masses_as_given() {
    const Form forms[] = {Form::uniform, Form::masses, Form::logs};
    const auto given = [&](std::vector<T> mass, Form form) {
      for (T& x : mass) x = form == Form::logs ? std::log(x) + T(3) : form == Form::masses ? 2 * x : x;
      return mass;
    };
    const Form of_a = forms[random_.below(3)], of_b = forms[random_.below(3)];
    std::vector<T> given_a = given(a, of_a), given_b = given(b, of_b), share_a(a.size()), share_b(b.size()), out(a.size());
    const Side left{address(given_a), int(of_a), n, address(share_a)}, right{address(given_b), int(of_b), m, address(share_b)};
    const int found = normalise<T>(left, right, count, 10.);
    if (live && !relaxed && found != int(Sound::all_live)) fail("masses are not valid");
    by_given<T>(left, count, address(given_a), address(out));
  }

  int64_t count, n, m, d, max_iter;
  double eps, tol;
  bool features, live, relaxed, one_left, one_right, keeps, accelerate, adjoint, need_cost;
  int kind;
  Values like;
  std::vector<T> left, right, a, b, rho_a, rho_b, start, w, v, p, q;

 private:
  std::vector<T> rates() {
    std::vector<T> rho(count);
    // Ordinary ones are not so small beside the cost of many features that exp(cost/rho) has no number.
    const double unit = !features || kind == 0 ? 1 : kind == 1 ? double(d) : std::sqrt(double(d));
    for (T& x : rho) x = like == ordinary ? T((0.1 + random_.uniform()) * unit) : random_.of({T(1e-3), T(1), T(1e6)});
    return rho;
  }
  Random& random_;
};

template <class T> void check(Random& random, int most_threads) {
  Batch<T> batch(random);
  batch.masses_as_given();
  const auto want = batch.run(1), got = batch.run(1 + int(random.below(most_threads)));
  for (size_t k = 0; k < want.size(); ++k)
    if (!want[k].empty() && std::memcmp(want[k].data(), got[k].data(), sizeof(T) * want[k].size()) != 0) fail("threads change a result");
}

// Random batches until a time, or a number of them. What goes wrong ends the program, with the seed of the batch.
void work(uint64_t seed, Clock::time_point end, int64_t batches, std::atomic<int64_t>& done) {
  for (int64_t k = 0; k < batches && Clock::now() < end; ++k, ++done) {
    Random random{std::mt19937_64(seed + k)};
    try {
      if (random.one_in(2)) check<float>(random, 4);
      else check<double>(random, 4);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: batch of seed %" PRIu64 "\n", error.what(), seed + k);
      std::_Exit(1);
    }
  }
}

// A long call that a signal ends: once the handler has run a call of its own. The next one is as ever.
int asked = 0;
bool ask() {
  std::atomic<int64_t> done{0};
  work(asked, Clock::time_point::max(), 1, done);
  return ++asked == 2;
}
void stopped(int threads) {
  const int n = 600, count = 3;
  std::vector<float> cost(count * n * n), a(count * n, 1.f / n), f(count * n), g(count * n), out(3 * count);
  std::vector<int64_t> n_iter(count);
  for (size_t i = 0; i < cost.size(); ++i) cost[i] = float(i * i % 1013) / 1013;
  const Inputs in{address(cost), 0, address(a), address(a), count, n, n, 0, 0.01, 0, 0, 0, 0, 0, 0, false, false};
  const Address results = address(out);
  signal_wants_stop = ask, asked = 0;
  try {
    solve<float>(in, 0, false, int64_t(1) << 40, 0., address(f), address(g), results, results + 4 * count, address(n_iter),
                 results + 8 * count, threads);
    std::fprintf(stderr, "a call was not stopped\n");
    std::_Exit(1);
  } catch (const Stopped&) {
  }
  signal_wants_stop = nullptr;
}

void probes() {
  const double rates[] = {probe_read<float>(1 << 14), probe_read<double>(1 << 14), probe_products<float>(49, 50, 17, 3),
                          probe_products<double>(65, 33, 20, 3), probe_fma<float>(), probe_fma<double>()};
  for (double rate : rates)
    if (!(rate > 0)) std::fprintf(stderr, "a rate is not positive\n"), std::_Exit(1);
}

}  // namespace

int main(int count, char** arguments) {
  const uint64_t seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : std::random_device()();
  const double seconds = count > 2 ? std::atof(arguments[2]) : 20;
  if (!active_level()) return std::printf("%s\n", level_problem()), 0;
  std::printf("level %s, seed %" PRIu64 ": ", active_level()->name, seed);
  std::fflush(stdout);
  const auto begin = Clock::now();
  const auto at = [&](double share) { return begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(share * seconds)); };
  std::atomic<int64_t> done{0};
  const auto callers = [&](uint64_t first, double share) {
    std::vector<std::thread> threads;
    for (uint64_t k = 0; k < 3; ++k) threads.emplace_back([&, k] { work(first + k * 1'000'000, at(share), INT64_MAX, done); });
    for (std::thread& thread : threads) thread.join();
  };
  probes();
  callers(seed, 0.5);
  stopped(1), stopped(3);
  const pid_t child = fork();  // whose pool is a new one
  if (child == 0) {
    work(seed + 10'000'000, at(2), 20, done);
    std::_Exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  if (status != 0) return std::fprintf(stderr, "the forked child failed\n"), 1;
  callers(seed + 20'000'000, 1);
  std::printf("%" PRId64 " batches of problems\n", done.load());
}
