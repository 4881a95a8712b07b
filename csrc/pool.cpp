#include "pool.hpp"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

namespace otloss {
namespace {

using Task = std::function<void(int64_t, Arena&)>;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Numbers below the least normal one count as 0 while a kernel runs. At small eps, sums over far entries of K end there, and many
// processors take a hundred cycles for each such number. No result depends on them: what is trusted is larger by 1e10 and more.
class NoSubnormals {
 public:
#if defined(__SSE2__)
  NoSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~NoSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__) && defined(__GNUC__)
  NoSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | 1u << 24));
  }
  ~NoSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

Arena& scratch() {
  thread_local Arena arena;
  return arena;
}

class Pool {
 public:
  void run(int64_t count, int threads, const Task& task) {
    std::lock_guard<std::mutex> turn(turn_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const int helpers = grow(threads - 1);
      task_ = &task;
      count_ = count;
      next_ = 0;
      error_ = nullptr;
      wanted_ = busy_ = helpers;
      ++round_;
    }
    start_.notify_all();
    work();
    watch([&] { return busy_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return busy_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // Starts threads until there are `helpers` of them, or as many as the system gives. Returns how many may be used.
  int grow(int helpers) {
    try {
      while (static_cast<int>(threads_.size()) < helpers)
        threads_.emplace_back(&Pool::serve, this, static_cast<int>(threads_.size()), round_.load());
    } catch (const std::system_error&) {
      helpers = static_cast<int>(threads_.size());
    }
    return helpers;
  }

  // Spins for a moment before the caller sleeps. The parts of one problem follow each other within microseconds, and a
  // sleeping thread takes longer to wake.
  template <class Condition> static void watch(Condition done) {
    for (int spin = 0; spin < 4000 && !done(); ++spin) relax();
  }

  void serve(int self, uint64_t seen) {
    for (;;) {
      int threads = 1;
      watch([&] { return round_ != seen; });
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (self >= wanted_) continue;
        threads = wanted_ + 1;
      }
      work();
      scratch().trim(threads);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void work() {
    const NoSubnormals mode;
    try {
      for (int64_t i; (i = next_.fetch_add(1)) < count_;) (*task_)(i, scratch());
    } catch (...) {
      next_ = count_;
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> threads_;
  const Task* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::exception_ptr error_;
  std::atomic<uint64_t> round_{0};
  int wanted_ = 0;
  std::atomic<int> busy_{0};
};

// A pool is never destroyed. At exit its threads may still wait on it, and in a forked child its threads no longer exist.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  static const bool once = [] {
    current = new Pool;
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, [] { current = new Pool; });
#endif
    return true;
  }();
  (void)once;
  return *current;
}

}  // namespace

void parallel(int64_t count, int threads, const Task& task) {
  // A task that spreads its problem over the threads calls this function again, while it still uses its scratch. Only the
  // outermost call therefore trims the scratch.
  thread_local int depth = 0;
  if (threads > count) threads = static_cast<int>(count);
  struct Call {
    const int threads;
    ~Call() {
      if (--depth == 0) scratch().trim(threads);
    }
  } const call{std::max(threads, 1)};
  ++depth;
  if (threads > 1) return pool().run(count, threads, task);
  const NoSubnormals mode;
  for (int64_t i = 0; i < count; ++i) task(i, scratch());
}

void Team::spread(int count, void (*call)(const void*, int), const void* context) const {
  parallel(count, threads_, [=](int64_t i, Arena&) { call(context, static_cast<int>(i)); });
}

}  // namespace otloss
