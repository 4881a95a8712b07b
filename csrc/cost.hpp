// The cost of one problem, as padded rows in scratch, and the gradient of the inputs from the gradient of the cost.
//
// For features, C = 1 - xh yh' with xh = x/|x| and yh = y/|y|, where zero rows stay zero. The gradient G of C comes in tiles of
// rows. Each tile is contracted at once: gxh = -G yh and gyh = -G' xh. The derivative of the normalisation then gives
// gx = (gxh - xh <xh, gxh>) / |x|, which is exactly 0 for a zero row. For features no (n, m) gradient leaves the scratch.
// The padding of rows and columns may hold any finite number.
#pragma once
#include "gemm.hpp"
#include "pool.hpp"

namespace otloss::OTLOSS_LEVEL {

constexpr int block = mr;      // rows that every pass over an (n, m) matrix handles at once
constexpr int tile_rows = 32;  // rows of a gradient that are contracted at once
constexpr int chain_rows = 4096;  // about how many rows, or in unroll.hpp columns, are summed in one chain

template <class T> using band = typename band_of<T, block>::type;
template <class T> OTLOSS_INLINE band<T> load_band(const T* p) {
  return *reinterpret_cast<const typename band_of<T, block>::unaligned*>(p);
}
template <class T> OTLOSS_INLINE void store_band(T* p, band<T> v) {
  *reinterpret_cast<typename band_of<T, block>::unaligned*>(p) = v;
}

// Rows and columns are padded to a multiple of this.
template <class T> constexpr int pad_to = lanes<T> > block ? lanes<T> : block;
template <class T> constexpr int round_up(int k) { return (k + pad_to<T> - 1) / pad_to<T> * pad_to<T>; }
// The stride of a row, an odd number of cache lines. With an even number, a column of a tile would fall into a few cache sets.
template <class T> constexpr int leading(int m) {
  const int line = 64 / sizeof(T), w = (round_up<T>(m) + line - 1) / line * line;
  return w / line % 2 ? w : w + line;
}

// Splits the rows of a large matrix into parts, for the threads of a team. A sum over rows is taken within each part first, then
// over the parts. A tall matrix is split too: float32 loses 3e-5 of a sum of 65,000 rows that is taken in one chain.
struct Parts {
  int rows, size, count;
  Parts(int rows, int cols) : rows(rows) {
    const int64_t wanted = std::max<int64_t>(std::min<int64_t>(int64_t(rows) * cols / part_entries, rows / 64), rows / chain_rows);
    size = wanted <= 1 ? rows : int((rows / wanted + tile_rows - 1) / tile_rows * tile_rows);
    count = (rows + size - 1) / size;
  }
  int begin(int part) const { return part * size; }
  int end(int part) const { return std::min(rows, (part + 1) * size); }
};

// c - row - column, rounded once: what the first difference loses (Knuth's TwoSum) is put back.
template <class V> OTLOSS_INLINE V shifted(V c, V row, V column) {
  const V left = c - row, back = left - c, lost = (c - (left - back)) - (row + back);
  return (left - column) + lost;
}

template <class T> struct Cost {
  const Problem<T>& p;
  const int n, m;
  const int rows, cols, ld, depth, feature_stride;  // padded n and m, row stride of C; padded d, row stride of the features
  const Parts parts;
  T* C;  // rows x ld

  // The scratch that a constructor may take, in bytes.
  static size_t bytes(const Problem<T>& p, bool gradient) {
    const size_t n = round_up<T>(p.n), m = round_up<T>(p.m), k = round_up<T>(p.d), feature_stride = leading<T>(p.d);
    size_t need = Arena::bytes<T>(n * leading<T>(p.m));
    if (!p.right) return need;
    const size_t features = Arena::bytes<T>(n * feature_stride) + Arena::bytes<T>(m * feature_stride);
    need += features + Arena::bytes<T>(k * (m + lanes<T>)) + Arena::bytes<T>(n) + Arena::bytes<T>(m);
    return gradient ? need + features : need;
  }

  // `product` says that `fill` will be called. `gradient` says that `backward` and `write_feature_grads` will be called.
  // C stands at `place` if that is given.
  Cost(const Problem<T>& p, Arena& arena, bool product, bool gradient, T* place = nullptr)
      : p(p), n(p.n), m(p.m), rows(round_up<T>(p.n)), cols(round_up<T>(p.m)), ld(leading<T>(p.m)), depth(round_up<T>(p.d)),
        feature_stride(leading<T>(p.d)), parts(rows, cols) {
    C = place ? place : arena.take<T>(size_t(rows) * ld);
    product = product && !p.kept;
    if (!p.right || !(product || gradient)) return;
    xh_ = arena.take<T>(size_t(rows) * feature_stride);
    yh_ = arena.take<T>(size_t(cols) * feature_stride);
    x_inverse_ = arena.take<T>(rows);
    y_inverse_ = arena.take<T>(cols);
    normalise(p.left, n, rows, xh_, x_inverse_);
    normalise(p.right, m, cols, yh_, y_inverse_);
    if (product) {
      panels_ = arena.take<T>(size_t(depth) * (cols + lanes<T>));
      pack();
    }
    if (!gradient) return;
    gx_ = arena.take<T>(size_t(rows) * feature_stride);
    gy_ = arena.take<T>(size_t(cols) * feature_stride);
    std::memset(gy_, 0, sizeof(T) * cols * feature_stride);
  }

  T* row(int i) const { return C + size_t(i) * ld; }

  // Fills rows i0 .. i0 + block - 1.
  void fill(int i0) const {
    if (p.right && !p.kept) {
      const T *panels = panels_;
      const int k = depth;
      strip<block, false>(cols, p.d, xh_ + size_t(i0) * feature_stride, feature_stride, 1,
                          [=](int j) { return panels + size_t(j) * k; }, panel_ld, row(i0), ld, T(-1), T(1));
      return;
    }
    for (int i = i0; i < i0 + block; ++i) {
      const int have = i < n ? m : 0;
      if (have) std::memcpy(row(i), (p.right ? p.kept : p.left) + size_t(i) * m, sizeof(T) * m);
      for (int j = 0; p.row_shift && j < have; ++j) row(i)[j] = shifted(row(i)[j], p.row_shift[i], p.column_shift[j]);
      for (int j = have; j < cols; ++j) row(i)[j] = 0;
    }
  }

  // Copies C without its padding to `to`, for a later gradient. Does nothing if `to` is null.
  void copy_cost_to(T* to) const {
    for (int i = 0; to && i < n; ++i) std::memcpy(to + size_t(i) * m, row(i), sizeof(T) * m);
  }

  // gxh[rows] = -G yh. G is the gradient by rows i0 .. i0 + count - 1 of C, with row stride ld. Its padding is read but does not
  // enter any result. For a dense cost, G itself is the result and is copied to out.left.
  void backward_rows(const T* G, int i0, int count, const Gradient<T>& out) const {
    count = std::min(count, n - i0);
    if (!p.right) {
      for (int r = 0; r < count; ++r) std::memcpy(out.left + size_t(i0 + r) * m, G + size_t(r) * ld, sizeof(T) * m);
      return;
    }
    const T* yh = yh_;
    gemm<false>(count, depth, m, G, ld, 1, [=](int k) { return yh + k; }, feature_stride, gx_ + size_t(i0) * feature_stride,
                feature_stride, T(-1), T(0));
  }

  // gyh[columns] -= G' xh, for columns j0 .. j0 + width - 1 of the same rows. A dense cost has no right input.
  void backward_columns(const T* G, int i0, int count, int j0, int width) const {
    if (!p.right) return;
    const T* xh = xh_ + size_t(i0) * feature_stride;
    gemm<true>(std::min(width, m - j0), depth, std::min(count, n - i0), G + j0, 1, ld, [=](int k) { return xh + k; }, feature_stride,
               gy_ + size_t(j0) * feature_stride, feature_stride, T(-1), T(0));
  }

  void backward(const T* G, int i0, int count, const Gradient<T>& out) const {
    backward_rows(G, i0, count, out);
    backward_columns(G, i0, count, 0, m);
  }

  // Writes the gradients of the features, from those of the unit rows. Call it after every tile has been contracted.
  void write_feature_grads(const Gradient<T>& out) const {
    if (!p.right) return;
    denormalise(n, xh_, x_inverse_, gx_, out.left);
    denormalise(m, yh_, y_inverse_, gy_, out.right);
  }

 private:
  static constexpr int panel_ld = nv * lanes<T>;

  void normalise(const T* x, int count, int padded, T* xh, T* inverse) const {
    constexpr T small = sizeof(T) == 4 ? T(1e-20) : T(1e-200), large = 1 / small;
    const int whole = p.d / lanes<T> * lanes<T>;
    for (int i = 0; i < count; ++i, x += p.d, xh += feature_stride) {
      vec<T> squares{}, more{};
      std::memset(xh + whole, 0, sizeof(T) * (depth - whole));
      std::memcpy(xh + whole, x + whole, sizeof(T) * (p.d - whole));
      int k = 0;
      for (; k + 2 * lanes<T> <= whole; k += 2 * lanes<T>) {
        const vec<T> u = load(x + k), v = load(x + k + lanes<T>);
        squares += u * u;
        more += v * v;
      }
      if (k < whole) squares += load(x + k) * load(x + k);
      if (whole < depth) more += load(xh + whole) * load(xh + whole);
      const T total = sum<T>(squares + more);
      if (total > small && total < large) {
        const T inv = inverse[i] = 1 / std::sqrt(total);
        for (k = 0; k < whole; k += lanes<T>) store<T>(xh + k, load(x + k) * inv);
        if (whole < depth) store<T>(xh + whole, load(xh + whole) * inv);
      } else {
        std::memcpy(xh, x, sizeof(T) * whole);
        inverse[i] = rescale(xh);
      }
    }
    std::memset(xh, 0, sizeof(T) * (padded - count) * feature_stride);
    for (int i = count; i < padded; ++i) inverse[i] = 0;
  }

  // Scales a row to unit length and returns the factor. The row is first divided by its largest entry, so that no square
  // overflows or vanishes.
  T rescale(T* xh) const {
    vec<T> top{}, squares{}, nothing{};
    for (int k = 0; k < depth; k += lanes<T>) {
      const vec<T> v = load(xh + k);
      top = max(max(v, -v), top);
      nothing += v - v;  // NaN if an entry is not finite; the maximum may hide that
    }
    const T scale = max_of<T>(top), unscale = scale > dead_mass<T> ? 1 / scale : T(0);
    for (int k = 0; k < depth; k += lanes<T>) {
      const vec<T> u = load(xh + k) * unscale;
      squares += u * u;
    }
    const T length = std::sqrt(sum<T>(squares)), inv = (length > 0 ? 1 / length : T(0)) + sum<T>(nothing);
    for (int k = 0; k < depth; k += lanes<T>) store<T>(xh + k, load(xh + k) * unscale * inv);
    return unscale * inv;
  }

  // Writes yh transposed, in panels of nv vectors of columns. This is B in the product that makes the cost.
  void pack() const {
    for (int j = 0; j < cols; j += lanes<T>) {
      const int within = j % panel_ld;
      T* panel = panels_ + size_t(j - within) * depth + within;
      for (int k = 0; k < depth; k += lanes<T>) {
        vec<T> square[lanes<T>];
        repeat<lanes<T>>(OTLOSS_EACH(r) { square[r] = load(yh_ + size_t(j + r) * feature_stride + k); });
        transpose<T>(square);
        repeat<lanes<T>>(OTLOSS_EACH(r) { store<T>(panel + size_t(k + r) * panel_ld, square[r]); });
      }
    }
  }

  void denormalise(int count, const T* xh, const T* inverse, const T* gh, T* out) const {
    for (int i = 0; i < count; ++i, xh += feature_stride, gh += feature_stride, out += p.d) {
      const T along = dot(xh, gh, depth);
      int k = 0;
      for (; k + lanes<T> <= p.d; k += lanes<T>) store<T>(out + k, (load(gh + k) - load(xh + k) * along) * inverse[i]);
      for (; k < p.d; ++k) out[k] = (gh[k] - xh[k] * along) * inverse[i];
    }
  }

  T *xh_ = nullptr, *yh_ = nullptr, *panels_ = nullptr;
  T *x_inverse_ = nullptr, *y_inverse_ = nullptr, *gx_ = nullptr, *gy_ = nullptr;
};

}  // namespace otloss::OTLOSS_LEVEL
