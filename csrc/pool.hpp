// A private pool of threads.
//
// No OpenMP: its runtime does not survive a fork, and data loaders fork. The pool is rebuilt in a forked child; calls
// from several Python threads take turns. Which thread takes which index is free, so a task must depend on its index alone.
#pragma once
#include <cstdint>
#include <functional>

#include "problem.hpp"

namespace otloss {

// Runs task(i, scratch of the thread) for i = 0 .. count - 1 on up to `threads` threads, the caller's included.
// The first exception a task throws is thrown here, after all threads have stopped.
void parallel(int64_t count, int threads, const std::function<void(int64_t, Arena&)>& task);

// The threads that a kernel may spread one problem's parts over. Parts are fixed by the problem's shape, never by the threads.
class Team {
 public:
  explicit Team(int threads = 1) : threads_(threads) {}
  // task(i) for i = 0 .. count - 1. Kernels compiled for different instructions call this: only the pointer crosses over.
  template <class Task> void each(int count, const Task& task) const {
    if (threads_ <= 1 || count <= 1)
      for (int i = 0; i < count; ++i) task(i);
    else
      spread(count, [](const void* context, int i) { (*static_cast<const Task*>(context))(i); }, &task);
  }

 private:
  void spread(int count, void (*call)(const void*, int), const void* context) const;
  int threads_;
};

}  // namespace otloss
