// The penalty on one marginal of a problem, rho KL(T1 | a) with KL(p | q) = sum p log(p/q) - p + q, or a constraint in its place.
//
// At the solution T1 = a exp(-f/rho). A half-step is that under a constraint times rho/(rho + eps), and the diagonal of the adjoint
// system is that under a constraint divided by it. A constraint is the limit 1/rho = 0. otloss/backends/relaxed.py has the formulas.
//
// Single problems and lanes share the functions below, which are never inlined: a compiler may contract a product and a sum in one
// copy and not in another, and a lane's result must not depend on its place. Vectors of a lane have the stride of the lanes.
#pragma once
#include "simd.hpp"

namespace otloss::OTLOSS_LEVEL {

#define OTLOSS_ALONE __attribute__((noinline))

template <class T> struct Penalty {
  double inverse, soft, slack;  // 1/rho, rho/(rho + eps), eps/rho

  Penalty() : Penalty(0) {}
  explicit Penalty(T inverse, T eps = 1) : inverse(inverse), soft(1 / (1 + double(eps) * inverse)), slack(double(eps) * inverse) {}

  // The marginal that a potential asks for, per mass.
  double share(double f) const { return std::exp(-f * inverse); }
  // The derivative by the mass of the penalty's part of the dual: rho (1 - exp(-f/rho)), or f.
  double slope(double f) const { return inverse > 0 ? -std::expm1(-f * inverse) / inverse : f; }
  // KL(p | q) per q, from p/q.
  static double divergence(double ratio) {
    if (!(ratio > 0)) return 1 - ratio;
    return ratio * (ratio < 0.5 ? std::log(ratio) : std::log1p(ratio - 1)) - (ratio - 1);
  }
};

// The marginal that a side asks for: the largest share of a point, in bits; and the sums over points of mass times 2^(share_i - share),
// and of mass times that less one. Where rho is large only the latter keeps digits.
struct Asked {
  double share, most, less;

  // Its total, in bits. whole is the mass of the side.
  OTLOSS_ALONE double total(double whole) const {
    const double change = less / whole;
    return share + (change > -0.5 ? std::log1p(change) * log2e + std::log2(whole) : std::log2(most));
  }
};

// The constant t of an iteration in bits; the rows' share after it; and by how much it has moved the columns' marginal asked for away from
// that of the plan, divided by 2^share.
struct Constant {
  double bits, share, gap;

  template <class T>
  OTLOSS_ALONE static Constant of(const Asked& rows, double whole_a, const Penalty<T>& of_a, const Asked& columns, double whole_b,
                                  const Penalty<T>& of_b) {
    const double total = columns.total(whole_b), bits = (rows.total(whole_a) - total) / (of_a.slack + of_b.slack);
    const double share = rows.share - bits * of_a.slack;
    return {bits, share, std::exp2(total - share) * std::fabs(std::expm1(bits * ln2 * of_b.slack))};
  }
};

// Sums over one side of a plan, whose marginal is `sums` per mass. A point without mass takes no part: its sum may have overflowed.
struct SideSums {
  double potential = 0, mass = 0, missed = 0, penalty = 0, sharp = 0;

  // missed: the L1 distance from the marginal asked for. sharp: the transport cost, from that of a row per mass.
  template <class T>
  OTLOSS_ALONE static SideSums of(int count, int stride, const T* mass, const T* sums, const T* sharp, const T* potential,
                                  const Penalty<T>& penalty) {
    SideSums all;
    for (int i = 0; i < count * stride; i += stride) {
      const double a = mass[i], ratio = sums[i], f = potential[i];
      if (a == 0) continue;
      all.potential += a * ratio * f;
      all.mass += a * ratio;
      all.missed += a * std::fabs(ratio - penalty.share(f));
      if (penalty.inverse > 0) all.penalty += a * Penalty<T>::divergence(ratio) / penalty.inverse;
      if (sharp) all.sharp += a * sharp[i];
    }
    return all;
  }
};

// <T, C> + eps KL(T|ab') = <T1, f> + <T'1, g> - eps (sum T - sum a sum b)
template <class T>
OTLOSS_ALONE void write_sums(const SideSums& rows, const SideSums& columns, double whole_a, double whole_b, double eps,
                             const Solution<T>& out) {
  *out.cost = T(rows.sharp);
  *out.value = T(rows.potential + columns.potential - eps * (rows.mass - whole_a * whole_b) + rows.penalty + columns.penalty);
  *out.error = T((rows.missed + columns.missed) / (rows.mass <= dead_mass<T> ? 1 : rows.mass));
}

// The share of the multipliers V along the vector of ones: the sum of the right-hand side over that of the system, with eps divided out
// of both. of_rows is <T, R> + <T1, f>, of_columns is <T'1, g>.
template <class T> struct Ones {
  double of_rows = 0, of_columns = 0, mass = 0, by_p = 0, by_q = 0;

  OTLOSS_ALONE void add_rows(int count, int stride, const T* marginal, const T* reduced, const T* f) {
    for (int i = 0; i < count * stride; i += stride) of_rows += double(marginal[i]) * (double(reduced[i]) + f[i]);
  }
  OTLOSS_ALONE void add_columns(int count, int stride, const T* marginal, const T* g) {
    for (int j = 0; j < count * stride; j += stride) of_columns += double(marginal[j]) * g[j], mass += marginal[j];
  }
  OTLOSS_ALONE T share(const Penalty<T>& of_a, const Penalty<T>& of_b, double w) const {
    const double of_a_share = of_a.inverse * of_a.soft, weight = of_b.inverse + of_a_share;
    const double sum = w * (of_a_share * of_rows - of_b.inverse * of_columns) - by_p + of_a.soft * by_q;
    return mass > 0 ? T(sum / (weight * mass)) : T(0);
  }
};

// The gradients by the masses of a side and by its penalty. `sent` is the marginal of the plan, `other` the mass of the other side.
// upstream is the gradient by the potential, or null; w and value are those by the transport cost and the value. `sent` and
// `multiplier` have the stride.
template <class T>
OTLOSS_ALONE void by_side(int count, int stride, const Penalty<T>& of, const T* mass, const T* sent, const T* potential,
                          const T* multiplier, const T* upstream, double w, double value, double eps, double other, T* by_mass,
                          T* by_rho) {
  double total = 0;
  for (int k = 0; k < count; ++k) {
    const int i = k * stride;
    const double a = mass[k], f = potential[k], share = of.share(f), pull = w * f + multiplier[i], marginal = sent[i];
    by_mass[k] = T((share == 0 ? 0 : share / of.soft * pull) + value * (of.slope(f) - eps * (share - other)));
    const double direct = upstream ? eps * of.soft * upstream[k] : 0;
    total += ((marginal > 0 ? marginal * pull : 0) + direct) * f * of.inverse * of.inverse;
    if (a > dead_mass<T>) total += value * a * Penalty<T>::divergence(marginal / a);
  }
  *by_rho = of.inverse > 0 ? T(total) : T(0);
}

}  // namespace otloss::OTLOSS_LEVEL
