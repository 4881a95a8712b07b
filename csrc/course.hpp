// The decisions of an accelerated solve (quasi_newton.hpp), for one problem. Single problems and lanes share them.
//
// With gamma = g/eps the dual is D(gamma) = eps (<a, -log K e^gamma b> + <b, gamma>): concave, and one sweep gives f and the gradient
// b - T'1. A plain iteration raises D/eps by KL(b | T'1) >= error^2 / 2 at least (Pinsker), on which its proof of convergence rests.
//
// The guard: a quasi-Newton step d is kept only if it raises D/eps by error^2 / 2 too, which is proved by the slopes t0, t1 of D at
// its ends. Along the step |D'''| <= w |D''|, w the range max d - min d, since the third central moment of d in a row of the plan is
// at most w times its variance. So D'' changes by a factor e^w at most, and with c = 1/2 - w/12 <= 1/w - 1/(e^w - 1)
//   D(1) - D(0) >= c t0 + (1 - c) t1.
// No difference of values of D is taken: in float32 it would drown. A step that fails costs its sweep, and a plain one follows; no
// more than a tenth of the sweeps may be lost so.
#pragma once
#include "problem.hpp"

namespace otloss::OTLOSS_LEVEL {

constexpr int memory = 8;         // steps that are remembered
constexpr int patience = 8;       // sweeps at the problem's eps before larger ones are tried
constexpr int stage_factor = 4;   // between the eps of two stages
constexpr int stage_sweeps = 50;  // most of a stage with a larger eps
constexpr int most_shortened = 8, rest_sweeps = 4;  // after so many shortened steps in a row come so many plain ones

// 1 / <step, change> of a pair, 0 if it tells nothing: its curvature is not positive, or the change is rounding.
template <class T> T inverse_curvature(T along, T step, T change) {
  constexpr T noise = 8 * std::numeric_limits<T>::epsilon();
  return along > 0 && along * along > T(1e-10) * step * change && change > noise * noise ? 1 / along : T(0);
}

template <class T> struct Course {
  static constexpr T most_range = 4;   // a longer step is shortened
  static constexpr T coarse_goal = T(0.05);

  enum Verdict { kept, rejected, lost };

  T eps, tol, goal, error = 0, rate = 0, slope = 0, range = 0;
  int64_t max_iter, k = 0, first = 0, cap, wasted = 0;
  int shortened = 0, rest = 0;
  int level = 0;  // stages with a larger eps that are still to come, this one included
  bool watching, fresh = true, newton = false, going = false;

  Course() = default;
  // mean: the mean cost of a b', after its minima.
  Course(T eps, T tol, int64_t max_iter, T mean) : eps(eps), tol(tol), goal(tol), max_iter(max_iter), cap(max_iter) {
    for (T e = eps * stage_factor; e <= mean / 2 && level < 16; e *= stage_factor) ++level;
    watching = level > 0 && max_iter >= 4 * patience;
    if (!watching) level = 0;
  }

  // After a sweep at the trial point: reach tells whether its sums are to be trusted, trial_slope is that of D along the step.
  Verdict judge(bool trusted, T trial_error, T trial_slope) {
    ++k;
    if (newton) {
      const T c = T(0.5) - range / 12;
      if (!trusted || !(c * slope + (1 - c) * trial_slope >= error * error / 2)) {
        ++wasted;
        return rejected;
      }
    } else if (!trusted) {
      return lost;
    } else if (!fresh) {
      rate = trial_error / error;
    }
    error = trial_error;
    return kept;
  }

  // Whether to look for a quasi-Newton step: plain ones are slow, and at their rate ten more would not do.
  bool wants_newton() const {
    return rest == 0 && rate > T(0.3) && 10 * wasted + 5 <= k && (going || rate >= 1 || error * ten_times(rate) > goal);
  }

  // Whether to take the quasi-Newton step that was found, with this range. Steps that must be shortened again and again may have
  // far to go in points of little mass, which plain iterations reach at once.
  bool takes_newton(T found) {
    if (!(found > most_range)) shortened = 0;
    else if (++shortened > most_shortened) {
      shortened = 0;
      rest = rest_sweeps;
      return false;
    }
    newton = going = true;
    range = std::min(found, most_range);
    return true;
  }

  void takes_plain() {
    newton = false;
    if (rest > 0) --rest;
  }

  // Far from the solution and slow at the problem's own eps, at a rate at which forty plain iterations would not do.
  bool leaves_early() const {
    if (!watching || k - first < patience || !(error > coarse_goal) || !(rate > T(0.7))) return false;
    const T ten = ten_times(rate);
    return rate >= 1 || error * (ten * ten * (ten * ten)) > goal;
  }
  bool stage_is_over() const { return error < goal || k >= cap || leaves_early(); }

  // Moves on to the next stage, if there is one.
  bool advance() {
    if (watching ? !leaves_early() : level == 0) return false;
    if (!watching) --level;
    watching = going = newton = false;
    shortened = rest = 0;
    fresh = true;
    rate = 0;
    first = k;
    goal = level ? std::max(tol, coarse_goal) : tol;
    cap = level ? std::min(k + stage_sweeps, max_iter / 2) : max_iter;
    return true;
  }

  static T ten_times(T x) {  // x^10
    const T two = x * x, four = two * two;
    return four * four * two;
  }

  T stage_eps() const {
    T e = eps;
    for (int i = 0; i < level; ++i) e *= stage_factor;
    return e;
  }
};

}  // namespace otloss::OTLOSS_LEVEL
