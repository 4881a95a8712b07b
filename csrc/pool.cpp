#include "pool.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
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
using Clock = std::chrono::steady_clock;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The floating-point mode of a thread.
#if defined(__SSE2__)
using Mode = unsigned;
constexpr Mode no_subnormals = 0x8040;
Mode mode() { return _mm_getcsr(); }
void set_mode(Mode to) { _mm_setcsr(to); }
#elif defined(__aarch64__) && defined(__GNUC__)
using Mode = uint64_t;
constexpr Mode no_subnormals = 1u << 24;
Mode mode() {
  Mode now;
  asm volatile("mrs %0, fpcr" : "=r"(now));
  return now;
}
void set_mode(Mode to) { asm volatile("msr fpcr, %0" : : "r"(to)); }
#else
using Mode = int;
constexpr Mode no_subnormals = 0;
Mode mode() { return 0; }
void set_mode(Mode) {}
#endif

class InMode {
 public:
  explicit InMode(Mode to) : before_(mode()) { set_mode(to); }
  ~InMode() { set_mode(before_); }
  InMode(const InMode&) = delete;

 private:
  const Mode before_;
};

// Numbers below the least normal one count as 0 while a kernel runs. At small eps, sums over far entries of K end there, and many
// processors take a hundred cycles for each such number. No result depends on them: what is trusted is larger by 1e10 and more.
Mode fast() { return mode() | no_subnormals; }

// One outermost call of parallel().
struct Call {
  std::atomic<bool> stop{false};  // read by all of its threads
  const Mode mode_before = mode();
  Clock::time_point next_look{};
};

// What a thread is at.
struct Here {
  Call* call;       // that it works for, or null
  bool calling;     // whether the call is its own
  Arena* scratch;   // in place of the thread's own, or null
  int64_t entries;  // since poll() has last looked
};
thread_local Here here{};

Arena& scratch() {
  thread_local Arena arena;
  return here.scratch ? *here.scratch : arena;
}

constexpr auto patience = std::chrono::milliseconds(50);

// Handlers of signals may call kernels. This call may hold the pool, and uses the scratch: theirs run on one thread, with another.
bool ask() {
  Arena spare;
  const Here outer = std::exchange(here, Here{nullptr, false, &spare, 0});
  const InMode before(outer.call->mode_before);
  const bool wanted = signal_wants_stop && signal_wants_stop();
  here = outer;
  return wanted;
}

bool is_to_stop() {
  Call& call = *here.call;
  if (call.stop.load(std::memory_order_relaxed) || !here.calling) return call.stop;
  const auto now = Clock::now();
  if (call.next_look == Clock::time_point{}) call.next_look = now + patience;
  if (now < call.next_look) return false;
  if (ask()) call.stop = true;
  call.next_look = Clock::now() + patience;
  return call.stop;
}

void look() {
  if (is_to_stop()) throw Stopped{};
}

class Pool {
 public:
  void run(int64_t count, int threads, const Task& task) {
    const Turn turn(*this);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const int helpers = grow(threads - 1);
      task_ = &task;
      call_ = here.call;
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
    while (!done_.wait_for(lock, patience, [&] { return busy_ == 0; })) {
      lock.unlock();
      is_to_stop();
      lock.lock();
    }
    if (error_) std::rethrow_exception(error_);
    if (call_->stop) throw Stopped{};
  }

 private:
  // Calls of several threads take turns.
  struct Turn {
    Pool& pool;
    explicit Turn(Pool& pool) : pool(pool) {
      std::unique_lock<std::mutex> lock(pool.mutex_);
      while (pool.taken_ && !pool.free_.wait_for(lock, patience, [&] { return !pool.taken_; })) {
        lock.unlock();
        look();
        lock.lock();
      }
      pool.taken_ = true;
    }
    ~Turn() {
      {
        std::lock_guard<std::mutex> lock(pool.mutex_);
        pool.taken_ = false;
      }
      pool.free_.notify_one();
    }
  };

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
        here.call = call_;
      }
      work();
      here.call = nullptr;
      scratch().trim(threads);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void work() {
    const InMode kernels(fast());
    try {
      for (int64_t i; (i = next_.fetch_add(1)) < count_;) (*task_)(i, scratch());
    } catch (...) {
      next_ = count_;
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      call_->stop = true;
    }
  }

  std::mutex mutex_;
  bool taken_ = false;  // whether it is someone's turn
  std::condition_variable free_, start_, done_;
  std::vector<std::thread> threads_;
  const Task* task_ = nullptr;
  Call* call_ = nullptr;
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

// Runs tasks for the call that the thread is at. A handler's call (ask) keeps off the pool.
void run(int64_t count, int threads, const Task& task) {
  if (threads > 1 && !here.scratch) return pool().run(count, threads, task);
  const InMode kernels(fast());
  for (int64_t i = 0; i < count; ++i) task(i, scratch());
}

class NoScratch : public std::bad_alloc {
 public:
  explicit NoScratch(size_t bytes) { std::snprintf(text_, sizeof(text_), "cannot allocate %zu bytes of scratch for one thread", bytes); }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[80];
};

}  // namespace

void no_scratch(size_t bytes) { throw NoScratch(bytes); }

bool (*signal_wants_stop)() = nullptr;

void poll(int64_t entries) {
  if ((here.entries += entries + 64) < poll_entries) return;  // the work around small matrices counts too
  here.entries = 0;
  if (here.call) look();
}

void parallel(int64_t count, int threads, const Task& task) {
  if (threads > count) threads = static_cast<int>(count);
  // A task that spreads its problem over the threads calls this function again, while it still uses its scratch.
  if (here.call) return run(count, threads, task);
  Call call;
  struct Calling {
    const int threads;
    ~Calling() {
      here.call = nullptr, here.calling = false;
      scratch().trim(threads);
    }
  } const calling{std::max(threads, 1)};
  here.call = &call, here.calling = true;
  run(count, threads, task);
}

void Team::spread(int count, void (*call)(const void*, int), const void* context) const {
  parallel(count, threads_, [=](int64_t i, Arena&) {
    call(context, static_cast<int>(i));
    poll(part_);
  });
}

}  // namespace otloss
