// The penalty on one marginal of a problem, rho KL(T1 | a) with KL(p | q) = sum p log(p/q) - p + q, or a constraint in its place.
//
// At the solution T1 = a exp(-f/rho). A half-step is that under a constraint times rho/(rho + eps), and the diagonal of the adjoint
// system is that under a constraint divided by it. A constraint is the limit 1/rho = 0. otloss/backends/relaxed.py has the formulas.
#pragma once
#include "simd.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct Penalty {
  double inverse, soft;  // 1/rho, and rho/(rho + eps)

  Penalty(T inverse, T eps) : inverse(inverse), soft(1 / (1 + double(eps) * double(inverse))) {}

  // The marginal that a potential asks for, per mass.
  double share(double f) const { return std::exp(-f * inverse); }
  // The derivative by the mass of the penalty's part of the dual: rho (1 - exp(-f/rho)), or f.
  double slope(double f) const { return inverse > 0 ? -std::expm1(-f * inverse) / inverse : f; }
  // KL(p | q) per q, from p/q.
  static double divergence(double ratio) { return ratio > 0 ? ratio * std::log1p(ratio - 1) - (ratio - 1) : 1 - ratio; }
};

}  // namespace otloss::OTLOSS_LEVEL
