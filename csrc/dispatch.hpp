// The level of instructions in use: the best this machine has, or the one named by OTLOSS_CPU_LEVEL (v4, v3, baseline).
#pragma once
#include "problem.hpp"

namespace otloss {

const Level* active_level();      // nullptr where OTLOSS_CPU_LEVEL cannot be had
const char* level_problem();      // why not, or ""

template <class T> const Kernels<T>& kernels_of(const Level&);
template <> inline const Kernels<float>& kernels_of<float>(const Level& l) { return l.f32; }
template <> inline const Kernels<double>& kernels_of<double>(const Level& l) { return l.f64; }

}  // namespace otloss
