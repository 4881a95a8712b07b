// The cost of one problem as padded rows in scratch, and the way back from its gradient.
//
// Features: with xh = x/|x|, yh = y/|y| (zero rows stay zero), C = 1 - xh yh'. The gradient G of C arrives in blocks of
// rows and is contracted at once,  gxh = -G yh,  gyh = -G' xh,  then through the normalisation:
// gx = (gxh - xh <xh, gxh>) / |x|, exactly 0 for a zero row. No (n, m) gradient ever leaves the scratch.
#pragma once
#include "gemm.hpp"

namespace otloss::OTLOSS_LEVEL {

constexpr int block = 8;       // rows handled at once in every pass over an (n, m) matrix
constexpr int tile_rows = 32;  // rows of a gradient contracted at once

template <class T> constexpr int unit = lanes<T> > block ? lanes<T> : block;
template <class T> constexpr int round_up(int k) { return (k + unit<T> - 1) / unit<T> * unit<T>; }
// An even number of cache lines per row would send a column of a tile to a few cache sets.
template <class T> constexpr int leading(int m) {
  const int line = 64 / sizeof(T), w = (round_up<T>(m) + line - 1) / line * line;
  return w / line % 2 ? w : w + line;
}

template <class T> struct Cost {
  const Problem<T>& p;
  const int n, m, rows, cols, ld, depth;  // rows, cols: padded n, m
  T* C;                                   // rows x ld

  static size_t bytes(const Problem<T>& p, bool gradient) {
    const size_t n = round_up<T>(p.n), m = round_up<T>(p.m), k = round_up<T>(p.d);
    size_t need = Arena::bytes<T>(n * leading<T>(p.m));
    if (!p.right) return need;
    const size_t sides = Arena::bytes<T>(n * k) + Arena::bytes<T>(m * k);
    need += sides + Arena::bytes<T>(p.d * (m + lanes<T>)) + Arena::bytes<T>(n) + Arena::bytes<T>(m);
    return gradient ? need + sides : need;
  }

  Cost(const Problem<T>& p, Arena& arena, bool gradient)
      : p(p), n(p.n), m(p.m), rows(round_up<T>(p.n)), cols(round_up<T>(p.m)), ld(leading<T>(p.m)), depth(round_up<T>(p.d)) {
    C = arena.take<T>(size_t(rows) * ld);
    if (!p.right) return;
    xh_ = arena.take<T>(size_t(rows) * depth);
    yh_ = arena.take<T>(size_t(cols) * depth);
    panels_ = arena.take<T>(size_t(p.d) * (cols + lanes<T>));
    x_inverse_ = arena.take<T>(rows);
    y_inverse_ = arena.take<T>(cols);
    normalise(p.left, n, rows, xh_, x_inverse_);
    normalise(p.right, m, cols, yh_, y_inverse_);
    for (int j0 = 0; j0 < cols; j0 += nv * lanes<T>) {
      const int w = cols - j0 < nv * lanes<T> ? cols - j0 : nv * lanes<T>;
      for (int k = 0; k < p.d; ++k)
        for (int j = 0; j < w; ++j) panels_[size_t(j0) * p.d + size_t(k) * panel_ld() + j] = yh_[size_t(j0 + j) * depth + k];
    }
    if (!gradient) return;
    gx_ = arena.take<T>(size_t(rows) * depth);
    gy_ = arena.take<T>(size_t(cols) * depth);
    std::memset(gy_, 0, sizeof(T) * cols * depth);
  }

  T* row(int i) const { return C + size_t(i) * ld; }

  // Fills rows i0 .. i0 + block - 1; padding is 0.
  void fill(int i0) const {
    if (p.right) {
      const T *panels = panels_;
      const int d = p.d;
      gemm<false>(block, cols, d, xh_ + size_t(i0) * depth, depth, 1, [=](int j) { return panels + size_t(j) * d; }, panel_ld(),
                  row(i0), ld, T(-1), T(1));
      if (cols > m || i0 + block > n)
        for (int r = 0; r < block; ++r) {
          T* c = row(i0 + r);
          for (int j = i0 + r < n ? m : 0; j < cols; ++j) c[j] = 0;
        }
    } else {
      for (int r = 0; r < block; ++r) {
        const int have = i0 + r < n ? m : 0;
        if (have) std::memcpy(row(i0 + r), p.left + size_t(i0 + r) * m, sizeof(T) * m);
        for (int j = have; j < cols; ++j) row(i0 + r)[j] = 0;
      }
    }
  }

  // Takes the gradient of rows i0 .. i0 + count - 1 (count a multiple of `block`; G has leading dimension ld, padding 0).
  void pull(const T* G, int i0, int count, const Gradient<T>& out) const {
    if (!p.right) {
      for (int r = 0; r < count && i0 + r < n; ++r) std::memcpy(out.left + size_t(i0 + r) * m, G + size_t(r) * ld, sizeof(T) * m);
      return;
    }
    const T *xh = xh_ + size_t(i0) * depth, *yh = yh_;
    gemm<false>(count, depth, cols, G, ld, 1, [=](int k) { return yh + k; }, depth, gx_ + size_t(i0) * depth, depth, T(-1), T(0));
    gemm<true>(cols, depth, count, G, 1, ld, [=](int k) { return xh + k; }, depth, gy_, depth, T(-1), T(0));
  }

  void finish(const Gradient<T>& out) const {
    if (!p.right) return;
    denormalise(n, xh_, x_inverse_, gx_, out.left);
    denormalise(m, yh_, y_inverse_, gy_, out.right);
  }

 private:
  static constexpr int panel_ld() { return nv * lanes<T>; }

  // Scaled by the largest entry first, so that no square overflows or vanishes.
  void normalise(const T* x, int count, int padded, T* xh, T* inverse) const {
    for (int i = 0; i < padded; ++i, xh += depth) {
      std::memset(xh, 0, sizeof(T) * depth);
      if (i < count) std::memcpy(xh, x + size_t(i) * p.d, sizeof(T) * p.d);
      inverse[i] = 0;
      vec<T> top{};
      for (int k = 0; k < depth; k += lanes<T>) {
        const vec<T> v = load(xh + k);
        top = max(max(v, -v), top);
      }
      const T scale = max_of<T>(top), unscale = scale > dead_mass<T> ? 1 / scale : T(0);
      vec<T> squares{}, nothing{};
      for (int k = 0; k < depth; k += lanes<T>) {
        const vec<T> v = load(xh + k), u = v * unscale;
        squares += u * u;
        nothing += v - v;  // NaN if an entry is not finite, which the maximum may hide
      }
      const T length = std::sqrt(sum<T>(squares));
      const T inv = (length > 0 ? 1 / length : T(0)) + sum<T>(nothing);
      for (int k = 0; k < depth; k += lanes<T>) store<T>(xh + k, load(xh + k) * unscale * inv);
      inverse[i] = unscale * inv;
    }
  }

  void denormalise(int count, const T* xh, const T* inverse, const T* gh, T* out) const {
    for (int i = 0; i < count; ++i, xh += depth, gh += depth, out += p.d) {
      const T along = dot(xh, gh, depth);
      for (int k = 0; k < p.d; ++k) out[k] = (gh[k] - xh[k] * along) * inverse[i];
    }
  }

  T *xh_ = nullptr, *yh_ = nullptr, *panels_ = nullptr;  // unit rows; yh transposed, in panels of columns
  T *x_inverse_ = nullptr, *y_inverse_ = nullptr, *gx_ = nullptr, *gy_ = nullptr;
};

}  // namespace otloss::OTLOSS_LEVEL
