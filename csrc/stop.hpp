// How a call ends before it is done: when a signal wants it (Ctrl-C), or when another thread of it has failed.
//
// Kernels call poll() between pieces of work. It counts entries of matrices, and looks only after about 0.1 ms of them: short calls
// never look, and long ones do so for free. What it has to throw ends the whole call; the pool and the scratch serve the next one.
#pragma once
#include <cstdint>

namespace otloss {

// Thrown by poll(), on every thread of the call.
struct Stopped {};

// After work on so many entries. Throws Stopped if the call is to end.
void poll(int64_t entries);

// Whether a signal wants the call of this thread to end: asked on the calling thread, not before a call has run for 50 ms and then
// every 50 ms. It may run anything, other calls too, and must not throw. The module sets it.
extern bool (*signal_wants_stop)();

constexpr int64_t poll_entries = int64_t(1) << 18;  // after which poll() looks

// Within a piece of work: after row i, of `width` entries, and after a block of so many entries if it is large.
inline __attribute__((always_inline)) void poll_after_row(int i, int64_t width) {
  if (i % 64 == 63) poll(64 * width);
}
inline __attribute__((always_inline)) void poll_after_block(int64_t entries) {
  if (entries >= poll_entries) poll(entries);
}

}  // namespace otloss
