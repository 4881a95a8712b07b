// A private pool of threads.
//
// The pool replaces OpenMP, whose runtime does not survive a fork, and data loaders fork. A forked child builds a new pool.
// Calls from several Python threads take turns. Any thread may take any index, so a task must depend on its index alone.
#pragma once
#include <cstdint>
#include <functional>

#include "problem.hpp"

namespace otloss {

// Runs task(i, scratch of the thread) for i = 0 .. count - 1 on up to `threads` threads. The calling thread is one of them.
// The first exception that a task throws is thrown again here, after all threads have stopped; the others stop at their next poll().
void parallel(int64_t count, int threads, const std::function<void(int64_t, Arena&)>& task);

// The threads over which a kernel may spread the parts of one problem. The parts depend on the problem's shape, never on the
// number of threads.
class Team {
 public:
  Team(int n, int m, int d, int threads = 1)
      : threads_(threads), part_(entries(n, m, 1 + d / 16)) {}
  // Runs task(i) for i = 0 .. count - 1. Kernels of every instruction level call this, so the pool gets only plain pointers.
  template <class Task> void each(int count, const Task& task) const {
    if (threads_ <= 1 || count <= 1)
      for (int i = 0; i < count; ++i) task(i), poll(part_);
    else
      spread(count, [](const void* context, int i) { (*static_cast<const Task*>(context))(i); }, &task);
  }

 private:
  static int64_t entries(int n, int m, int panels) { return int64_t(std::min(double(poll_entries), double(n) * m * panels)); }
  void spread(int count, void (*call)(const void*, int), const void* context) const;
  int threads_;
  int64_t part_;  // about the entries of a part, as poll() counts them
};

}  // namespace otloss
