// All kernels of one level. A file csrc/level_*.cpp sets OTLOSS_LEVEL, OTLOSS_VECTOR_BYTES and the target, then includes this.
#pragma once
#include "lanes_adjoint.hpp"
#include "lanes_quasi_newton.hpp"
#include "masses.hpp"
#include "probe.hpp"
#include "solution.hpp"
#include "unroll.hpp"

namespace otloss::OTLOSS_LEVEL {

#define OTLOSS_STRING(x) #x
#define OTLOSS_NAME(x) OTLOSS_STRING(x)

template <class T> constexpr Kernels<T> kernels = {solve<T>, implicit_gradient<T>, solve_lanes<T>, implicit_lanes<T>, lanes<T>,
                                              unrolled_gradient<T>, normalise<T>, by_given<T>, probe_read<T>, probe_fma<T>, probe_products<T>};

const Level& level() {
  static const Level self{OTLOSS_NAME(OTLOSS_LEVEL), kernels<float>, kernels<double>};
  return self;
}

}  // namespace otloss::OTLOSS_LEVEL
