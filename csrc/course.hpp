// The decisions of an accelerated solve (quasi_newton.hpp), for one problem. Single problems and lanes share them.
//
// With gamma = g/eps the dual is D(gamma) = eps (<a, -log K e^gamma b> + <b, gamma>): concave, and one sweep gives f and the gradient
// b - T'1. A plain iteration raises D/eps by KL(b | T'1) >= error^2 / 2 at least (Pinsker), on which its proof of convergence rests.
//
// The guard: a quasi-Newton step d is kept only if it raises D/eps by error^2 / 2 too. The slopes t0, t1 of D at its ends prove that,
// mostly: along the step |D'''| <= w |D''|, w the range max d - min d, since the third central moment of d in a row of the plan is at
// most w times its variance. So D'' changes by a factor e^w at most, and with c = 1/2 - w/12 <= 1/w - 1/(e^w - 1)
//   D(1) - D(0) >= c t0 + (1 - c) t1.
// Where the slopes do not prove it, the raise itself tells, <a, log phi(1)/phi(0)> + <b, d>, unless it would drown in rounding. A step
// that fails costs its sweep, and a plain one follows; no more than a tenth of the sweeps may be lost so.
//
// Quasi-Newton steps begin where plain ones are slow, measured by the ratio of two errors. Where a plain step moves gamma far, it is
// taken: points of little mass then have far to go, and plain iterations bring them there at once.
//
// Larger eps are tried where plain iterations crawl: far from the solution, slow, and with a long way to go at their pace. The way is
// the mean of (C - f - g)/eps under a b', which is KL(ab'|T).
#pragma once
#include "problem.hpp"

namespace otloss::OTLOSS_LEVEL {

constexpr int memory = 8;         // steps that are remembered
constexpr int patience = 20;      // sweeps at the problem's eps before larger ones are tried
constexpr int stage_factor = 4;   // between the eps of two stages
constexpr int stage_sweeps = 50;  // most of a stage with a larger eps

// Of a pair: whether its change is rounding. Such a pair waits, and is added to the next; near a permutation, where plain steps hardly
// change the residual, only many of them together tell anything. The changes are differences of one residual after the other, so
// that the rounding of their sum is that of its ends.
template <class T> bool is_rounding(T change) {
  constexpr T noise = 8 * std::numeric_limits<T>::epsilon();
  return change <= noise * noise;
}

// 1 / <step, change> of a pair, 0 if it tells nothing: its curvature is not positive, or the change is rounding.
template <class T> T inverse_curvature(T along, T step, T change) {
  return along > 0 && along * along > T(1e-10) * step * change && !is_rounding(change) ? 1 / along : T(0);
}

template <class T> struct Course {
  static constexpr T most_range = 6;        // a longer quasi-Newton step is shortened
  static constexpr T most_plain_range = 3;  // a longer plain step is taken
  static constexpr T coarse_goal = T(0.05);
  static constexpr T raise_noise = 16 * std::numeric_limits<T>::epsilon();

  enum Verdict { kept, doubtful, rejected, lost };

  T eps, tol, goal, error = 0, rate = 0, slope = 0, range = 0, plain_range = 0, way = -1;
  int64_t max_iter, k = 0, first = 0, cap, wasted = 0;
  int level = 0;  // stages with a larger eps that are still to come, this one included
  bool watching, fresh = true, newton = false, going = false;

  Course() = default;
  Course(T eps, T tol, int64_t max_iter)
      : eps(eps), tol(tol), goal(tol), max_iter(max_iter), cap(max_iter), watching(max_iter >= int64_t(4) * patience) {}

  // After a sweep at the trial point: trusted tells whether its sums are, trial_slope is that of D along the step. If the answer is
  // doubtful, decide() has the last word.
  Verdict judge(bool trusted, T trial_error, T trial_slope) {
    ++k;
    if (!newton) {
      if (!trusted) return lost;
      if (!fresh) rate = trial_error / error;
    } else {
      const T c = T(0.5) - range / 12, enough = error * error / 2;
      if (!trusted) return reject();
      if (!(c * slope + (1 - c) * trial_slope >= enough)) return enough > raise_noise ? doubtful : reject();
    }
    error = trial_error;
    return kept;
  }
  // raise: of D/eps, by the step.
  Verdict decide(T raise, T trial_error) {
    if (!(raise >= error * error / 2)) return reject();
    error = trial_error;
    return kept;
  }

  // Whether to look for a quasi-Newton step: plain ones are short and slow, and at their rate eight more would not do.
  bool wants_newton() const {
    return plain_range <= most_plain_range && rate > T(0.3) && 10 * wasted + 7 <= k && (going || !soon(power(8)));
  }

  // Whether a set with itself takes mixed steps for plain ones (quasi_newton.hpp): until quasi-Newton steps have begun, or five steps
  // show that they leave too much.
  bool mixes() const { return !going && (k - first < 5 || rate <= T(0.5)); }

  // Takes the quasi-Newton step that was found, with this range.
  void takes_newton(T found) {
    newton = going = true;
    range = std::min(found, most_range);
  }
  void takes_plain() { newton = false; }

  bool asks_the_way() const { return way < 0 && crawls(); }
  void knows_the_way(T found) {
    way = std::max(found, T(0));
    for (T factor = stage_factor; factor <= way / 2 && level < 16; factor *= stage_factor) ++level;
    if (level == 0) watching = false;
  }

  bool stage_is_over() const { return error < goal || k >= cap || leaves_early(); }

  // Moves on to the next stage, if there is one.
  bool advance() {
    if (watching ? !leaves_early() : level == 0) return false;
    if (!watching) --level;
    watching = going = newton = false;
    fresh = true;
    rate = 0;
    first = k;
    goal = level ? std::max(tol, coarse_goal) : tol;
    cap = level ? std::min(k + stage_sweeps, max_iter / 2) : max_iter;
    return true;
  }

  T stage_eps() const {
    T e = eps;
    for (int i = 0; i < level; ++i) e *= stage_factor;
    return e;
  }

 private:
  Verdict reject() {
    ++wasted;
    return rejected;
  }

  // Far from the solution and slow at the problem's own eps, at a rate at which eighty plain iterations would not do.
  bool crawls() const {
    return watching && k - first >= patience && error > coarse_goal && rate > T(0.7) && !soon(power(80));
  }
  // Twenty plain steps would not go the way.
  bool leaves_early() const { return way >= 0 && crawls() && 20 * plain_range <= way; }

  T power(int count) const { return std::pow(rate, T(count)); }
  bool soon(T factor) const { return factor < 1 && error * factor <= goal; }
};

}  // namespace otloss::OTLOSS_LEVEL
