// The cost of one problem, as padded rows in scratch, and the gradient of the inputs from the gradient of the cost.
//
// For features, with the scaled rows xh, yh of points.hpp and G the gradient of C,
//   cosine        C = 1 - xh yh',                       xh = x/|x|, where zero rows stay zero
//   sqeuclidean   C_ij = sum_k (xh_ik - yh_jk)^2,       xh = x - c, with one c for x and y
//   dot           C = -xh yh',                          xh = x
//   gx_i = (w_i xh_i - sum_j G_ij yh_j) s_i, and gy likewise by columns, with
//   cosine        w_i = sum_j G_ij <xh_i, yh_j> = sum_j G_ij (1 - C_ij),   s_i = 1 / |x_i|
//   sqeuclidean   w_i = sum_j G_ij,                                        s_i = 2
//   dot           w_i = 0,                                                 s_i = 1
// A zero row under the cosine cost has gradient exactly 0. Whoever forms G also forms the weights w, while C is at hand. The
// products are then finished in registers, and each entry of gx and gy is written once.
//
// Rounding, with u = 2^-24 or 2^-53 and sums of d terms: a cosine cost is known to about (d + 4) u; a squared distance to (d + 2) u of
// itself, so that it is never negative, and 0 between equal points, wherever the points lie; a product to d u sum_k |x_ik y_jk|. The
// terms of a gradient are known to about u of themselves. Under squared distances those are G_ij (x_i - c) and G_ij (y_j - c): c keeps
// them as small as the points lie apart, where a difference in each term would double the work.
//
// G is contracted in chunks of rows that fit in the second-level cache. A sum over more than `most_depth` terms is taken in chunks
// too, which add up in the gradient. For features no (n, m) gradient leaves the scratch.
// The padding of rows and columns may hold any finite number.
#pragma once
#include "points.hpp"
#include "pool.hpp"

namespace otloss::OTLOSS_LEVEL {

constexpr int tile_rows = 32;  // parts of a matrix have a multiple of this many rows
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

template <class T> constexpr T forbidden = std::numeric_limits<T>::infinity();

// c - row - column, rounded once: what the first difference loses (Knuth's TwoSum) is put back. V is T or a vector of it.
template <class T, class V> OTLOSS_INLINE V shifted(V c, V row, V column) {
  const V left = c - row, back = left - c, lost = (c - (left - back)) - (row + back);
  return c == forbidden<T> ? c : (left - column) + lost;
}

// The cost where the kernel is not 0. Elsewhere it may be +inf, and 0 * inf is not a number.
template <class V> OTLOSS_INLINE V masked(V kernel, V cost) { return kernel != 0 ? cost : V{}; }

// A minimum over pairs with mass; 0 if all of them are forbidden.
template <class T, class V> OTLOSS_INLINE V minimum(V least) { return least == forbidden<T> ? V{} : least; }

// `count` in equal chunks of at most about `most`, each but the last a multiple of `unit`: the size of one.
constexpr int chunk_size(int count, int most, int unit) {
  const int chunks = std::max(1, (count + most - 1) / most);
  return ((count + chunks - 1) / chunks + unit - 1) / unit * unit;
}

// The weights w: none for a dense cost and for products, which take 0.
enum class Weights { none, cosines, totals };
template <class T> Weights weights_of(const Problem<T>& p) {
  if (!p.right || p.kind == Kind::dot) return Weights::none;
  return p.kind == Kind::cosine ? Weights::cosines : Weights::totals;
}

template <class T> struct Cost {
  const Problem<T>& p;
  const int n, m;
  const int rows, cols, ld;  // padded n and m, row stride of C
  const Parts parts;
  T* C;  // rows x ld

  // The scratch that a constructor may take, in bytes.
  static size_t bytes(const Problem<T>& p, bool gradient) {
    size_t need = Arena::bytes<T>(size_t(round_up<T>(p.n)) * leading<T>(p.m));
    if (!p.right) return need;
    const int width = std::max(p.d, lanes<T>);
    need += Points<T>::bytes(p.n, p.d) + Points<T>::bytes(p.m, p.d) + 2 * Arena::bytes<T>(p.d);
    need += Arena::bytes<T>(size_t(width) * (round_up<T>(p.m) + lanes<T>));
    if (gradient && p.d < width) need += Arena::bytes<T>(size_t(p.n) * width) + Arena::bytes<T>(size_t(p.m) * width);
    return need;
  }

  // `product` says that `fill` will be called. `gradient` says that `pull_rows` and `pull_columns` will be called.
  // C stands at `place` if that is given.
  Cost(const Problem<T>& p, Arena& arena, bool product, bool gradient, T* place = nullptr)
      : p(p), n(p.n), m(p.m), rows(round_up<T>(p.n)), cols(round_up<T>(p.m)), ld(leading<T>(p.m)), parts(rows, cols) {
    C = place ? place : arena.take<T>(size_t(rows) * ld);
    product = product && !p.kept;
    if (!p.right || !(product || gradient)) return;
    const T* centre = p.kind == Kind::sqeuclidean ? centre_of(p, arena) : nullptr;
    x_ = Points<T>(p.left, n, p.d, p.kind, centre, product, gradient, arena);
    y_ = Points<T>(p.right, m, p.d, p.kind, centre, false, gradient, arena);
    if (product) {
      panels_ = arena.take<T>(size_t(x_.width) * (cols + lanes<T>));
      for (int j = 0; j < filled(m); j += lanes<T>) {
        y_.pack_transposed(j, panel(j), panel_ld);
        poll_after_row(j / lanes<T>, int64_t(lanes<T>) * y_.width);
      }
      for (int j = filled(m); j < m; ++j) y_.write_row(j, [=](int k, auto) { return single(j) + std::min(k, y_.width - lanes<T>); });
    }
    if (gradient && p.d < x_.width) gx_ = arena.take<T>(size_t(n) * x_.width), gy_ = arena.take<T>(size_t(m) * x_.width);
  }

  T* row(int i) const { return C + size_t(i) * ld; }
  int64_t block_work() const { return int64_t(block) * cols * (1 + p.d / 16); }  // of filling a block of rows, as poll() counts it

  // Fills rows i0 .. i0 + count - 1; what is beyond the last row becomes 0.
  void fill(int i0, int count = block) const {
    const int have = std::max(0, std::min(count, n - i0));
    std::memset(row(i0 + have), 0, sizeof(T) * (count - have) * ld);
    if (p.right && !p.kept) {
      if (p.kind == Kind::cosine) return multiply<Kind::cosine>(i0, have);
      return p.kind == Kind::dot ? multiply<Kind::dot>(i0, have) : multiply<Kind::sqeuclidean>(i0, have);
    }
    for (int i = i0; i < i0 + have; ++i) {
      std::memcpy(row(i), (p.right ? p.kept : p.left) + size_t(i) * m, sizeof(T) * m);
      for (int j = 0; p.row_shift && j < m; ++j) row(i)[j] = shifted<T>(row(i)[j], p.row_shift[i], p.column_shift[j]);
      for (int j = m; j < cols; ++j) row(i)[j] = 0;
    }
  }

  // Copies C without its padding to `to`, for a later gradient. Does nothing if `to` is null.
  void copy_cost_to(T* to) const {
    for (int i = 0; to && i < n; ++i) {
      std::memcpy(to + size_t(i) * m, row(i), sizeof(T) * m);
      poll_after_row(i, m);
    }
  }

  // How many rows of a gradient are formed before they are contracted.
  int chunk_rows() const { return chunk_size(n, std::max(block, int((size_t(256) << 10) / (ld * sizeof(T)))), block); }

  // Writes the gradient of x_i for rows i0 .. i0 + count - 1, with the weights w[i]. G is the gradient by these rows of C, with row
  // stride ld. Its padding is read but does not enter any result. For a dense cost G is the result, and there are no weights.
  void pull_rows(const T* G, int i0, int count, const T* w, const Gradient<T>& out) const {
    count = std::min(count, n - i0);
    if (!p.right) {
      for (int r = 0; r < count; ++r) std::memcpy(out.left + size_t(i0 + r) * m, G + size_t(r) * ld, sizeof(T) * m);
      return;
    }
    const int step = chunk_size(m, most_depth, lanes<T>);
    for (int j = 0; j < m; j += step) {
      pull<false>(G + j, x_, i0, count, y_, j, std::min(step, m - j), w, gx_ ? gx_ : out.left, j == 0, j + step >= m);
      poll(int64_t(count) * step * (1 + p.d / 16));
    }
    for (int i = i0; gx_ && i < i0 + count; ++i) unpad(x_, i, gx_, out.left);
  }

  // Adds what the same rows of G say to the gradient of y_j, for columns j0 .. j0 + width - 1. w[j] are the weights of all rows.
  // All rows must come, in order; the last of them complete the gradient.
  void pull_columns(const T* G, int i0, int count, int j0, int width, const T* w, const Gradient<T>& out) const {
    if (!p.right) return;
    count = std::min(count, n - i0), width = std::min(width, m - j0);
    const int step = chunk_size(count, most_depth, block);
    for (int i = i0; i < i0 + count; i += step) {
      const int depth = std::min(step, i0 + count - i);
      pull<true>(G + size_t(i - i0) * ld + j0, y_, j0, width, x_, i, depth, w, gy_ ? gy_ : out.right, i == 0, i + depth == n);
      poll(int64_t(depth) * width * (1 + p.d / 16));
    }
    for (int j = j0; gy_ && i0 + count == n && j < j0 + width; ++j) unpad(y_, j, gy_, out.right);
  }

 private:
  static constexpr int panel_ld = nv * lanes<T>, most_depth = 256;

  // How many of `count` columns, or a little more, are done by panels. The few others are done one by one.
  static int filled(int count) { return count % lanes<T> <= few<T> ? count / lanes<T> * lanes<T> : round_up<T>(count); }
  T* panel(int j) const { return panels_ + size_t(j / panel_ld * panel_ld) * x_.width + j % panel_ld; }

  T* single(int j) const { return panels_ + size_t(j + lanes<T>) * x_.width; }  // scaled row j, one of the few, behind the panels

  // C for rows i0 .. i0 + count - 1.
  template <Kind K> void multiply(int i0, int count) const {
    constexpr bool Distances = K == Kind::sqeuclidean;
    constexpr T orthogonal = K == Kind::cosine ? 1 : 0;  // the cost of orthogonal rows, from which products are taken
    const int end = filled(m), depth = p.d;
    const size_t stride = ld;
    const int width = x_.width;
    const T* const x = x_.units;  // local: a store might change a member, for all that the compiler knows
    strips(count, [&](int i, auto R) __attribute__((always_inline)) {
      i += i0;
      T* to = row(i);
      const auto part = [&](int j, auto NV) __attribute__((always_inline)) {
        const auto write = [&](auto r, auto v, vec<T> sum) __attribute__((always_inline)) {
          store<T>(to + r * stride + j + v * lanes<T>, Distances ? sum : orthogonal - sum);
        };
        tile<R, NV, false, Distances>(depth, x + size_t(i) * width, width, panel(j), panel_ld, write);
      };
      int j = 0;
      for (; j + panel_ld <= end; j += panel_ld) part(j, std::integral_constant<int, nv>{});
      if (j < end) part(j, std::integral_constant<int, 1>{});
    });
    for (int i = i0; end < cols && i < i0 + count; i += block) {
      const int here = std::min(block, i0 + count - i);
      for (int r = 0; r < here; ++r) std::memset(row(i + r) + end, 0, sizeof(T) * (cols - end));
      for (int j = end; j < m; ++j) {
        T sums[block];
        dots<Distances>(here, depth, x + size_t(i) * width, width, single(j), sums);
        for (int r = 0; r < here; ++r) row(i + r)[j] = Distances ? sums[r] : orthogonal - sums[r];
      }
    }
  }

  // Copies the gradient of a short row. Under the cosine cost it has no part along the row; what rounding has left of one is taken
  // out: of one entry it is all.
  void unpad(const Points<T>& of, int i, const T* padded, T* out) const {
    const T *x = of.row(i), *g = padded + size_t(i) * of.width, factor = of.factor[i];
    if (p.kind != Kind::cosine) return void(std::memcpy(out + size_t(i) * p.d, g, sizeof(T) * p.d));
    T along = 0;
    for (int k = 0; k < p.d; ++k) along += g[k] * (x[k] * factor);
    for (int k = 0; k < p.d; ++k) out[size_t(i) * p.d + k] = g[k] - along * (x[k] * factor);
  }

  // grad_i = (w_i toh_i - sum_k G_ik fromh_k) scale_i for rows i0 .. i0 + count - 1 of `to`, over rows first .. first + depth - 1
  // of `from`; toh and fromh are scaled rows. G(i0, first) stands at G, which is read by rows or by columns. If this is not the `end`
  // of the sum, only the sum is left in grad. If it is not the beginning, the sum before it stands there.
  template <bool Columns>
  void pull(const T* G, const Points<T> to, int i0, int count, const Points<T> from, int first, int depth, const T* w, T* grad,
            bool begin, bool end) const {
    const int width = to.width, left = width % lanes<T>, done = left <= few<T> ? width - left : width;
    const size_t ldg = ld;
    const auto at = [&](int i) __attribute__((always_inline)) { return G + (Columns ? i : i * ldg); };
    strips(count, [&](int i, auto R) __attribute__((always_inline)) {
      const T *weight = w + i0 + i, *scale = to.scale + i0 + i;
      const auto part = [&](int k, auto NV) __attribute__((always_inline)) {
        const int start = std::min(k, width - lanes<T>);  // the last vector may go back over entries that are done
        T* g = grad + size_t(i0 + i) * width + start;
        const auto write = [&](auto r, auto v, vec<T> sum) __attribute__((always_inline)) {
          T* to_g = g + r * size_t(width) + v * lanes<T>;
          if (!begin) sum += load(to_g);
          if (end) sum = (load(to.template unit<NV>(k, i0 + i + r) + v * lanes<T>) * weight[r] - sum) * scale[r];
          store<T>(to_g, start < k ? first_lanes<T>(k - start) ? load(to_g) : sum : sum);
        };
        tile<R, NV, Columns>(depth, at(i), ldg, from.template unit<NV>(k, first), NV * lanes<T>, write);
      };
      int k = 0;
      for (; k + panel_ld <= done; k += panel_ld) part(k, std::integral_constant<int, nv>{});
      for (; k < done; k += lanes<T>) part(k, std::integral_constant<int, 1>{});
    });
    for (int k = done; k < width; ++k) {
      T column[most_depth], sums[wide * lanes<T>];
      for (int r = 0; r < depth; ++r) column[r] = from.row(first + r)[k] * from.factor[first + r];
      constexpr int step = Columns ? wide * lanes<T> : block;
      for (int i = 0; i < count; i += step) {
        const int here = std::min(step, count - i);
        if constexpr (Columns) weighted_rows(here, depth, at(i), ldg, column, sums);
        else dots(here, depth, at(i), ldg, column, sums);
        for (int r = i0 + i; r < i0 + i + here; ++r) {
          T &g = grad[size_t(r) * width + k], sum = begin ? sums[r - i0 - i] : g + sums[r - i0 - i];
          g = end ? (to.row(r)[k] * to.factor[r] * w[r] - sum) * to.scale[r] : sum;
        }
      }
    }
  }

  Points<T> x_, y_;
  T *panels_ = nullptr, *gx_ = nullptr, *gy_ = nullptr;
};

}  // namespace otloss::OTLOSS_LEVEL
