// Register-blocked pieces of a product A B, or of the squared distances between the rows of A and the columns of B.
//
// A tile has R rows and NV vectors of columns, whose sums stay in registers while it goes through the depth. A is read as
// scalars: A(r, k) is A[r lda + k], or A[k lda + r] where A is given by its columns. B is read as rows of vectors from a packed
// panel. A tile of 8 x 2 vectors keeps 16 sums in flight, which is enough to hide the latency of two FMA pipes.
#pragma once
#include "simd.hpp"

namespace otloss::OTLOSS_LEVEL {

constexpr int mr = OTLOSS_VECTOR_BYTES == 64 ? 8 : 6;  // rows of a tile, for 32 vector registers or for 16
constexpr int nv = 2;                                  // vectors of its columns
constexpr int block = OTLOSS_VECTOR_BYTES == 64 ? 8 : 4;  // rows that every pass over an (n, m) matrix handles at once

// a b, or with Distances (a - b)^2: what an entry of A and one of B add to a sum.
template <bool Distances, class V> OTLOSS_INLINE void add_term(V& sum, V a, V b) {
  if constexpr (Distances) {
    const V gap = a - b;
    sum += gap * gap;
  } else {
    sum += a * b;
  }
}

// Calls out(r, v, sum) for each vector of the tile.
template <int R, int NV, bool Columns, bool Distances = false, class T, class Out>
OTLOSS_INLINE void tile(int depth, const T* A, size_t lda, const T* B, size_t ldb, Out out) {
  vec<T> acc[R][NV] = {};
  for (int k = 0; k < depth; ++k) {
    vec<T> b[NV];
    repeat<NV>(OTLOSS_EACH(v) { b[v] = load(B + k * ldb + v * lanes<T>); });
    repeat<R>(OTLOSS_EACH(r) {
      const vec<T> a = splat<T>(Columns ? A[k * lda + r] : A[r * lda + k]);
      repeat<NV>(OTLOSS_EACH(v) { add_term<Distances>(acc[r][v], a, b[v]); });
    });
  }
  repeat<R>(OTLOSS_EACH(r) { repeat<NV>(OTLOSS_EACH(v) { out(r, v, acc[r][v]); }); });
}

template <class T> OTLOSS_INLINE typename vec_of<T>::ints first_lanes(int count) {
  typename vec_of<T>::ints lane{};
  for (int k = 0; k < lanes<T>; ++k) lane[k] = k;
  return lane < count;
}

// Calls strip(first row, number of rows) with constant numbers that add up to `rows`. Strips of mr and of mr - 1 rows are as
// fast as each other (49 = 7 x 7). Where they do not add up, a few smaller ones follow.
template <class Strip> OTLOSS_INLINE void strips(int rows, Strip strip) {
  const int count = (rows + mr - 1) / mr, spare = count * mr - rows, full = spare <= count ? count - spare : rows / mr;
  int i = 0;
  for (int s = 0; s < full; ++s, i += mr) strip(i, std::integral_constant<int, mr>{});
  if (spare <= count)
    for (; i < rows; i += mr - 1) strip(i, std::integral_constant<int, mr - 1>{});
  if ((rows - i) & 4) strip(i, std::integral_constant<int, 4>{}), i += 4;
  if ((rows - i) & 2) strip(i, std::integral_constant<int, 2>{}), i += 2;
  if ((rows - i) & 1) strip(i, std::integral_constant<int, 1>{});
}

// The few columns that a panel would be wasted on are done one by one. This is how many are few.
template <class T> constexpr int few = lanes<T> / 4;

// out[r] = sum_k A[r lda + k] v[k], or the sum of squared distances, for the rows of a block, of which `rows` exist.
template <bool Distances = false, class T> OTLOSS_INLINE void dots(int rows, int depth, const T* A, size_t lda, const T* v, T* out) {
  vec<T> acc[block] = {};
  const T* a[block];
  repeat<block>(OTLOSS_EACH(r) { a[r] = A + std::min(int(r), rows - 1) * lda; });
  int k = 0;
  for (; k + lanes<T> <= depth; k += lanes<T>) {
    const vec<T> x = load(v + k);
    repeat<block>(OTLOSS_EACH(r) { add_term<Distances>(acc[r], load(a[r] + k), x); });
  }
  T total[block > lanes<T> ? block : lanes<T>];
  sums<T, block>(acc, total);
  for (; k < depth; ++k)
    repeat<block>(OTLOSS_EACH(r) {
      if constexpr (Distances) total[r] += (a[r][k] - v[k]) * (a[r][k] - v[k]);
      else total[r] += a[r][k] * v[k];
    });
  for (int r = 0; r < rows; ++r) out[r] = total[r];
}

// out[c] = sum_k A[k lda + c] v[k] for `cols` columns. A may be read, and out written, up to `wide` vectors of columns at a time.
constexpr int wide = 4;
template <class T> OTLOSS_INLINE void weighted_rows(int cols, int depth, const T* A, size_t lda, const T* v, T* out) {
  const auto part = [&](int c, auto width) __attribute__((always_inline)) {
    const auto write = [=](int, int at, vec<T> sum) __attribute__((always_inline)) { store<T>(out + c + at * lanes<T>, sum); };
    tile<1, width, false>(depth, v, 0, A + c, lda, write);
  };
  int c = 0;
  for (; c + wide * lanes<T> <= cols; c += wide * lanes<T>) part(c, std::integral_constant<int, wide>{});
  for (; c < cols; c += lanes<T>) part(c, std::integral_constant<int, 1>{});
}

}  // namespace otloss::OTLOSS_LEVEL
