// The adjoint system of adjoint.hpp under penalties on the marginals (penalty.hpp).
//
// Let d = rho/(rho + eps), 1 for a constraint, p' = d_a p and q' = d_b q. Then
//   [diag A/d_a  T; T'  diag S/d_b] [U; V] = [r; s],   r_i = w (sum_j T_ij R_ij - eps A_i f_i/rho_a) - eps A_i sum_j T_ij q'_j/(A_i S_j),
// s likewise, and p', q' stand for p, q in dL/dC. The multipliers are U = d_a (y - M V) and (S - d_a d_b M' A M) V = d_b h, with
// h = s - d_a M' A y. Of this system the vector of ones is an eigenvector: that share of V is in closed form, and conjugate gradients
// find the rest, in the same complement. A column that sends next to nothing counts as dead; its c_j is b_j over the share
// exp(-g_j/rho_b) that it asks for, 1/exp(-g_j/rho_b) without mass.
#pragma once
#include "passes.hpp"
#include "penalty.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct Adjoint;

// The weights c of the columns, and q' over their marginals.
template <class T> void relax_columns(Adjoint<T>& s) {
  constexpr T none = -std::numeric_limits<T>::infinity();
  const double tilt = log2e * s.of_b.inverse;
  T top = none;
  for (int j = 0; j < s.cost.m; ++j) top = std::max(top, T(s.log_b[j] - tilt * s.g[j]));  // of the masses asked for, in bits
  for (int j = 0; j < s.cost.m; ++j) {
    const T lifted = T(tilt * s.g[j]), asked = s.log_b[j] - lifted;
    if (!(asked - top > std::log2(dead_mass<T>))) s.live[j] = 0, s.log_b[j] = none;
    if (s.live[j] == 0) s.log_c[j] = lifted;
    const T mass = s.live[j] != 0 ? std::exp2(asked) : T(1);
    s.qg[j] = s.solve && s.up.g && mass > dead_mass<T> ? T(s.of_b.soft) * s.up.g[j] / mass : T(0);
  }
}

// The share of V along the vector of ones.
template <class T> T along_ones(Adjoint<T>& s) {
  Ones<T> ones;
  for (int j = 0; j < s.cost.m; ++j) s.work[j] = s.live[j] * s.S[j];
  ones.add_rows(s.cost.n, 1, s.A, s.fu, s.f);
  ones.add_columns(s.cost.m, 1, s.work, s.g);
  for (int i = 0; i < s.cost.n; ++i) ones.by_p += s.pf[i];
  for (int j = 0; s.solve && s.up.g && j < s.cost.m; ++j)
    if (s.S[j] > 0) ones.by_q += s.of_b.soft * s.up.g[j];  // a column that no pair can reach has no potential
  return ones.share(s.of_a, s.of_b, s.up.cost);
}

// The gradients by masses and penalties.
template <class T> void by_masses(Adjoint<T>& s, const Gradient<T>& out) {
  const Problem<T>& p = s.p;
  double whole_a = 0, whole_b = 0;
  for (int i = 0; i < p.n; ++i) whole_a += p.a[i];
  for (int j = 0; j < p.m; ++j) whole_b += p.b[j];
  for (int j = 0; j < p.m; ++j) s.z[j] = s.live[j] * s.S[j];
  const T w = s.solve ? s.up.cost : T(0), value = s.up.value;
  const T *by_f = s.solve ? s.up.f : nullptr, *by_g = s.solve ? s.up.g : nullptr;
  by_side(p.n, 1, s.of_a, p.a, s.A, s.f, s.fu, by_f, w, value, p.eps, whole_b, out.a, out.rho);
  by_side(p.m, 1, s.of_b, p.b, s.z, s.g, s.V, by_g, w, value, p.eps, whole_a, out.b, out.rho + 1);
}

}  // namespace otloss::OTLOSS_LEVEL
