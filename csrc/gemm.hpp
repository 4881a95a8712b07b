// One register-blocked product: out (+)= alpha * A B + beta on a tile of R rows and NV vectors of columns.
//
// A is read as scalars at any strides (row, depth), so that a matrix, its transpose and a packed panel all serve; B is
// read as rows of vectors. 8 x 2 vectors keep 16 accumulators in flight, enough to hide the latency of two FMA pipes.
#pragma once
#include "simd.hpp"

namespace otloss::OTLOSS_LEVEL {

constexpr int mr = OTLOSS_VECTOR_BYTES == 64 ? 8 : 4;  // 32 registers or 16
constexpr int nv = 2;

template <int R, class T, int NV, bool Add>
OTLOSS_INLINE void tile(int depth, const T* A, size_t row, size_t step, const T* B, size_t ldb, T* out, size_t ldo,
                        T alpha, T beta) {
  vec<T> acc[R][NV] = {};
  for (int k = 0; k < depth; ++k) {
    vec<T> b[NV];
    repeat<NV>(OTLOSS_EACH(v) { b[v] = load(B + k * ldb + v * lanes<T>); });
    repeat<R>(OTLOSS_EACH(r) {
      const vec<T> a = splat<T>(A[r * row + k * step]);
      repeat<NV>(OTLOSS_EACH(v) { acc[r][v] += a * b[v]; });
    });
  }
  repeat<R>(OTLOSS_EACH(r) {
    repeat<NV>(OTLOSS_EACH(v) {
      T* o = out + r * ldo + v * lanes<T>;
      store<T>(o, Add ? load(o) + alpha * acc[r][v] : alpha * acc[r][v] + beta);
    });
  });
}

// R rows, all columns; column j of B and of out starts at B(j) and out + j.
template <int R, bool Add, class T, class Panel>
OTLOSS_INLINE void strip(int cols, int depth, const T* A, size_t row, size_t step, Panel B, size_t ldb, T* out, size_t ldo,
                         T alpha, T beta) {
  int j = 0;
  for (; j + nv * lanes<T> <= cols; j += nv * lanes<T>) tile<R, T, nv, Add>(depth, A, row, step, B(j), ldb, out + j, ldo, alpha, beta);
  if (j < cols) tile<R, T, 1, Add>(depth, A, row, step, B(j), ldb, out + j, ldo, alpha, beta);
}

// cols is a multiple of the lanes; A and out have room for rows up to a multiple of mr. Where strips of mr and of mr - 1
// rows add up to `rows` (49 = 7 x 7), nothing is computed for padding.
template <bool Add, class T, class Panel>
OTLOSS_INLINE void gemm(int rows, int cols, int depth, const T* A, size_t row, size_t step, Panel B, size_t ldb, T* out,
                        size_t ldo, T alpha, T beta) {
  const int strips = (rows + mr - 1) / mr, spare = strips * mr - rows, full = spare <= strips ? strips - spare : strips;
  for (int s = 0, i = 0; s < strips; ++s) {
    if (s < full) strip<mr, Add>(cols, depth, A + i * row, row, step, B, ldb, out + i * ldo, ldo, alpha, beta), i += mr;
    else strip<mr - 1, Add>(cols, depth, A + i * row, row, step, B, ldb, out + i * ldo, ldo, alpha, beta), i += mr - 1;
  }
}

}  // namespace otloss::OTLOSS_LEVEL
