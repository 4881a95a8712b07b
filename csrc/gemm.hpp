// One register-blocked product: out = alpha * A B + beta, or out += alpha * A B.
//
// A tile of the product has R rows and NV vectors of columns. A is read as scalars, with any stride by row and by depth, so
// it may be a matrix, its transpose or a packed panel. B is read as rows of vectors. A tile of 8 x 2 vectors keeps 16
// accumulators in flight, which is enough to hide the latency of two FMA pipes.
#pragma once
#include "simd.hpp"

namespace otloss::OTLOSS_LEVEL {

constexpr int mr = OTLOSS_VECTOR_BYTES == 64 ? 8 : 4;  // for 32 vector registers, or for 16
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

// The product for R rows and all columns. Column j of B starts at B(j), and column j of out starts at out + j.
template <int R, bool Add, class T, class Panel>
OTLOSS_INLINE void strip(int cols, int depth, const T* A, size_t row, size_t step, Panel B, size_t ldb, T* out, size_t ldo,
                         T alpha, T beta) {
  int j = 0;
  for (; j + nv * lanes<T> <= cols; j += nv * lanes<T>) tile<R, T, nv, Add>(depth, A, row, step, B(j), ldb, out + j, ldo, alpha, beta);
  if (j < cols) tile<R, T, 1, Add>(depth, A, row, step, B(j), ldb, out + j, ldo, alpha, beta);
}

// The whole product. cols is a multiple of the lanes. A and out have room for `rows` rounded up to a multiple of mr. If strips
// of mr and of mr - 1 rows can add up to `rows` (49 = 7 x 7), no row of padding is computed.
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
