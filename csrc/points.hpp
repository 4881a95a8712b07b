// One of the two sets of features of a problem, as the products read it.
//
// Scaled rows xh_i = factor_i rows_i are what cost.hpp computes with: for the cosine cost the unit row x_i / |x_i|, else x_i or
// x_i - c. `rows` are the features as they were given. Only where there is a centre c, a row is shorter than a vector, or its square
// overflows or vanishes, are all rows copied; a row that could not be squared is scaled in the copy. Zero rows under the cosine cost
// have factor 0. Scaled rows stand where a product reads them, in the order in which it does: one after the other for the left side
// of a product, transposed in panels for the right side, and in panels for the gradient.
#pragma once
#include "gemm.hpp"

namespace otloss::OTLOSS_LEVEL {

// The centre c that is taken out of the points under squared distances; null if it is 0. c_k is the middle of the entries k of all
// points with mass, if these lie between c_k / 2 and 2 c_k, and else 0. So x_ik - c_k is exact for them (Sterbenz), and at most 3/2
// of the range of the entries k.
template <class T> const T* centre_of(const Problem<T>& p, Arena& arena) {
  T *low = arena.take<T>(p.d), *high = arena.take<T>(p.d);
  for (int k = 0; k < p.d; ++k) low[k] = std::numeric_limits<T>::infinity(), high[k] = -low[k];
  const auto read = [=, d = p.d](const T* x, const T* mass, int count) {
    for (int i = 0; i < count; ++i, x += d) {
      poll_after_row(i, d);
      if (!(mass[i] > dead_mass<T>)) continue;
      int k = 0;
      for (; k + lanes<T> <= d; k += lanes<T>) {
        store<T>(low + k, min(load(x + k), load(low + k)));
        store<T>(high + k, max(load(x + k), load(high + k)));
      }
      for (; k < d; ++k) {
        low[k] = min(x[k], low[k]);
        high[k] = max(x[k], high[k]);
      }
    }
  };
  read(p.left, p.a, p.n), read(p.right, p.b, p.m);
  bool any = false;
  for (int k = 0; k < p.d; ++k) {
    const T lo = low[k], hi = high[k];
    const bool far = lo > 0 ? hi <= 3 * lo : hi < 0 && lo >= 3 * hi;
    low[k] = far ? lo / 2 + hi / 2 : T(0);
    any |= far;
  }
  return any ? low : nullptr;
}

template <class T> struct Points {
  const T* rows;
  size_t stride;
  int count, d, width;  // width: entries of a row that may be read; those beyond d are 0
  T *factor, *scale;    // scale_i = 1 / |x_i|, or what cost.hpp says of the other kinds

  T *units = nullptr, *packed = nullptr;  // scaled rows, one after the other and in panels

  static size_t bytes(int count, int d) {
    const size_t width = std::max(d, lanes<T>);
    return 2 * Arena::bytes<T>(count * width) + Arena::bytes<T>(count * (width + lanes<T>)) + 2 * Arena::bytes<T>(padded(count));
  }

  Points() = default;
  // `unpacked` and `pack`: which scaled rows are wanted.
  Points(const T* x, int count, int d, Kind kind, const T* centre, bool unpacked, bool pack, Arena& arena)
      : rows(x), stride(d), count(count), d(d), width(std::max(d, lanes<T>)), factor(arena.take<T>(padded(count))),
        scale(arena.take<T>(padded(count))) {
    for (int i = count; i < padded(count); ++i) factor[i] = 0;
    T* room = arena.take<T>(size_t(count) * width);
    if (unpacked) units = arena.take<T>(size_t(count) * width);
    if (pack) packed = arena.take<T>(size_t(count) * (width + lanes<T>));
    if (d < width || centre) copy(room);
    for (int i = 0; centre && i < count; ++i)
      for (int k = 0; k < d; ++k) room[size_t(i) * width + k] -= centre[k];
    for (int i = 0; i < count; ++i) {
      poll_after_row(i, width);
      if (kind != Kind::cosine) {
        factor[i] = 1, scale[i] = kind == Kind::sqeuclidean ? 2 : 1;
        continue;
      }
      const T total = squared_length(i);
      constexpr T small = sizeof(T) == 4 ? T(1e-20) : T(1e-200), large = 1 / small;
      if (total > small && total < large) factor[i] = scale[i] = 1 / std::sqrt(total);
      else rescale(i, room);
    }
    for (int i = 0; unpacked && i < count; ++i) {
      write_row(i, [=](int k, auto) { return units + size_t(i) * width + std::min(k, width - lanes<T>); });
      poll_after_row(i, width);
    }
    for (int i = 0; pack && i < count; ++i) {
      write_row(i, [=](int k, auto NV) { return unit<NV>(k, i); });
      poll_after_row(i, width);
    }
  }

  const T* row(int i) const { return rows + size_t(i) * stride; }

  // Entries k .. of scaled row i, in the panel of NV vectors of columns that starts at column k. The next row follows. In the last
  // panel of a width that is no multiple of the lanes stand the last entries of the row.
  template <int NV> OTLOSS_INLINE T* unit(int k, int i) const { return packed + size_t(k) * count + size_t(i) * NV * lanes<T>; }

  // panel[k ld + r] = entry k of scaled row first + r, for `lanes` rows; 0 where there is no such row.
  void pack_transposed(int first, T* panel, size_t ld) const {
    const vec<T> factors = load(factor + first);
    const auto square = [&](int k) __attribute__((always_inline)) {
      vec<T> v[lanes<T>];
      if (first + lanes<T> <= count) repeat<lanes<T>>(OTLOSS_EACH(r) { v[r] = load(row(first + r) + k); });
      else repeat<lanes<T>>(OTLOSS_EACH(r) { v[r] = first + r < count ? load(row(first + r) + k) : vec<T>{}; });
      transpose<T>(v);
      repeat<lanes<T>>(OTLOSS_EACH(r) { store<T>(panel + (k + r) * ld, v[r] * factors); });
    };
    int k = 0;
    for (; k + lanes<T> <= width; k += lanes<T>) square(k);
    if (k < width) square(width - lanes<T>);
  }

  // Writes scaled row i to where place(k, number of vectors) says. The last vector holds the last entries of the row.
  template <class Place> OTLOSS_INLINE void write_row(int i, Place place) const {
    const T* x = row(i);
    int k = 0;
    for (; k + nv * lanes<T> <= width; k += nv * lanes<T>) {
      T* to = place(k, std::integral_constant<int, nv>{});
      repeat<nv>(OTLOSS_EACH(v) { store<T>(to + v * lanes<T>, load(x + k + v * lanes<T>) * factor[i]); });
    }
    for (; k < width; k += lanes<T>)
      store<T>(place(k, std::integral_constant<int, 1>{}), load(x + std::min(k, width - lanes<T>)) * factor[i]);
  }

 private:
  static int padded(int count) { return (count / most_lanes + 1) * most_lanes; }

  T squared_length(int i) const {
    const T* x = row(i);
    vec<T> squares{}, more{};
    int k = 0;
    for (; k + 2 * lanes<T> <= width; k += 2 * lanes<T>) {
      const vec<T> u = load(x + k), v = load(x + k + lanes<T>);
      squares += u * u;
      more += v * v;
    }
    if (k + lanes<T> <= width) squares += load(x + k) * load(x + k), k += lanes<T>;
    if (k < width) {
      T last[lanes<T>];
      if (i + 1 == count) std::memcpy(last, x + k, sizeof(T) * (width - k));  // behind other rows there is another row
      const vec<T> tail = first_lanes<T>(width - k) ? load(i + 1 == count ? last : x + k) : vec<T>{};
      more += tail * tail;
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
