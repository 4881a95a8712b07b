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

}  // namespace otloss
