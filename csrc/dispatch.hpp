// The instruction level in use. It is the best that this machine has, or the one that OTLOSS_CPU_LEVEL names (v4, v3, baseline).
#pragma once
#include "problem.hpp"

namespace otloss {

const Level* active_level();      // nullptr if the level that OTLOSS_CPU_LEVEL names cannot be used
const char* level_problem();      // the reason, or ""

template <class T> const Kernels<T>& kernels_of(const Level&);
template <> inline const Kernels<float>& kernels_of<float>(const Level& l) { return l.f32; }
template <> inline const Kernels<double>& kernels_of<double>(const Level& l) { return l.f64; }

}  // namespace otloss
