// One register-blocked product: out (+)= alpha * A B + beta on a tile of `mr` rows and NV vectors of columns.
//
// A is read as scalars at any strides (row, depth), so that a matrix, its transpose and a packed panel all serve; B is
// read as rows of vectors. 8 x 2 vectors keep 16 accumulators in flight, enough to hide the latency of two FMA pipes.
#pragma once
#include "simd.hpp"

namespace otloss::OTLOSS_LEVEL {

constexpr int mr = OTLOSS_VECTOR_BYTES == 64 ? 8 : 4;  // 32 registers or 16
constexpr int nv = 2;

template <class T, int NV, bool Add>
OTLOSS_INLINE void tile(int depth, const T* A, size_t row, size_t step, const T* B, size_t ldb, T* out, size_t ldo,
                        T alpha, T beta) {
  vec<T> acc[mr][NV] = {};
  for (int k = 0; k < depth; ++k) {
    vec<T> b[NV];
    repeat<NV>(OTLOSS_EACH(v) { b[v] = load(B + k * ldb + v * lanes<T>); });
    repeat<mr>(OTLOSS_EACH(r) {
      const vec<T> a = splat<T>(A[r * row + k * step]);
      repeat<NV>(OTLOSS_EACH(v) { acc[r][v] += a * b[v]; });
    });
  }
  repeat<mr>(OTLOSS_EACH(r) {
    repeat<NV>(OTLOSS_EACH(v) {
      T* o = out + r * ldo + v * lanes<T>;
      store<T>(o, Add ? load(o) + alpha * acc[r][v] : alpha * acc[r][v] + beta);
    });
  });
}

// rows is a multiple of mr, cols of the lanes; column j of B and of out starts at B(j) and out + j.
template <bool Add, class T, class Panel>
OTLOSS_INLINE void gemm(int rows, int cols, int depth, const T* A, size_t row, size_t step, Panel B, size_t ldb, T* out,
                        size_t ldo, T alpha, T beta) {
  for (int i = 0; i < rows; i += mr) {
    int j = 0;
    for (; j + nv * lanes<T> <= cols; j += nv * lanes<T>)
      tile<T, nv, Add>(depth, A + i * row, row, step, B(j), ldb, out + i * ldo + j, ldo, alpha, beta);
    if (j < cols) tile<T, 1, Add>(depth, A + i * row, row, step, B(j), ldb, out + i * ldo + j, ldo, alpha, beta);
  }
}

}  // namespace otloss::OTLOSS_LEVEL
