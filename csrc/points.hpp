// One of the two sets of features of a problem, as the products read it.
//
// The unit row xh_i = x_i / |x_i| is factor_i rows_i. `rows` are the features as they were given, so no copy of them is written.
// A panel is packed with the factors on the way. Only where a row is shorter than a vector, or its square overflows or vanishes,
// are all rows copied; a row that could not be squared is scaled in the copy. Zero rows have factor 0.
#pragma once
#include "gemm.hpp"

namespace otloss::OTLOSS_LEVEL {

template <class T> struct Points {
  const T* rows;
  size_t stride;
  int count, d, width;  // width: entries of a row that may be read; those beyond d are 0
  T *factor, *scale;    // scale_i = 1 / |x_i|

  static size_t bytes(int count, int d) {
    return Arena::bytes<T>(size_t(count) * std::max(d, lanes<T>)) + 2 * Arena::bytes<T>(padded(count));
  }

  Points() = default;
  Points(const T* x, int count, int d, Arena& arena)
      : rows(x), stride(d), count(count), d(d), width(std::max(d, lanes<T>)), factor(arena.take<T>(padded(count))),
        scale(arena.take<T>(padded(count))) {
    for (int i = count; i < padded(count); ++i) factor[i] = 0;
    T* room = arena.take<T>(size_t(count) * width);
    if (d < width) copy(room);
    const mask tail = beyond(d);
    for (int i = 0; i < count; ++i) {
      const T total = squared_length(row(i), tail);
      constexpr T small = sizeof(T) == 4 ? T(1e-20) : T(1e-200), large = 1 / small;
      if (total > small && total < large) factor[i] = scale[i] = 1 / std::sqrt(total);
      else rescale(i, room);
    }
  }

  const T* row(int i) const { return rows + size_t(i) * stride; }

  // panel[r][..] = the entries k .. of unit row first + r, NV vectors wide.
  template <int NV> OTLOSS_INLINE void pack(int first, int depth, int k, T* panel) const {
    for (int r = 0; r < depth; ++r) {
      const T* x = row(first + r) + k;
      repeat<NV>(OTLOSS_EACH(v) { store<T>(panel + (r * NV + v) * lanes<T>, load(x + v * lanes<T>) * factor[first + r]); });
    }
  }

  // panel[k ld + r] = entry k of row first + r, for `lanes` rows; 0 where there is no such row.
  void pack_transposed(int first, T* panel, size_t ld) const {
    const auto square = [&](int k) __attribute__((always_inline)) {
      vec<T> v[lanes<T>];
      if (first + lanes<T> <= count) repeat<lanes<T>>(OTLOSS_EACH(r) { v[r] = load(row(first + r) + k); });
      else repeat<lanes<T>>(OTLOSS_EACH(r) { v[r] = first + r < count ? load(row(first + r) + k) : vec<T>{}; });
      transpose<T>(v);
      repeat<lanes<T>>(OTLOSS_EACH(r) { store<T>(panel + (k + r) * ld, v[r]); });
    };
    int k = 0;
    for (; k + lanes<T> <= width; k += lanes<T>) square(k);
    if (k < width) square(width - lanes<T>);
  }

 private:
  static int padded(int count) { return (count / most_lanes + 1) * most_lanes; }
  using mask = typename vec_of<T>::ints;

  // The lanes of the last vector of a row that no vector before it has.
  static mask beyond(int d) {
    mask lane{};
    for (int k = 0; k < lanes<T>; ++k) lane[k] = k;
    const int left = d % lanes<T>;
    return lane >= (left && d > lanes<T> ? lanes<T> - left : 0);
  }

  T squared_length(const T* x, mask tail) const {
    vec<T> squares{}, more{};
    int k = 0;
    for (; k + 2 * lanes<T> <= width; k += 2 * lanes<T>) {
      const vec<T> u = load(x + k), v = load(x + k + lanes<T>);
      squares += u * u;
      more += v * v;
    }
    if (k + lanes<T> <= width) squares += load(x + k) * load(x + k), k += lanes<T>;
    if (k < width) {
      const vec<T> v = tail ? load(x + width - lanes<T>) : vec<T>{};
      more += v * v;
    }
    return sum<T>(squares + more);
  }

  void copy(T* to) {
    for (int i = 0; i < count; ++i) {
      std::memcpy(to + size_t(i) * width, row(i), sizeof(T) * d);
      for (int k = d; k < width; ++k) to[size_t(i) * width + k] = 0;
    }
    rows = to, stride = width;
  }

  // Row i is first divided by its largest entry, so that no square overflows or vanishes.
  void rescale(int i, T* room) {
    T top = 0, nothing = 0, squares = 0;
    for (int k = 0; k < d; ++k) {
      top = std::max(top, std::fabs(row(i)[k]));
      nothing += row(i)[k] - row(i)[k];  // NaN if an entry is not finite; the maximum may hide that
    }
    factor[i] = scale[i] = nothing;
    if (nothing != 0 || top <= dead_mass<T>) return;
    if (rows != room) copy(room);
    T* x = room + size_t(i) * stride;
    for (int k = 0; k < d; ++k) x[k] /= top, squares += x[k] * x[k];
    const T inverse = 1 / std::sqrt(squares);
    factor[i] = inverse, scale[i] = inverse / top;
  }
};

}  // namespace otloss::OTLOSS_LEVEL
