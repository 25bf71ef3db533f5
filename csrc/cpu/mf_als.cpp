// Alternating least squares. A thread owns runs of rows. Cholesky: a row's y, scaled by the root of their
// weight, are copied tile by tile into the first-level cache, and each tile is added to the row's matrix from
// registers; n K^2 operations besides K^3 / 3. Conjugate gradient: kTileHeight rows in step, so that Y'Y is
// read once for all of them, and 4 n K operations a step on rows y that stay in the cache from step to step.
// Bytes: 4 n K where other_factors comes from memory. After Hu, Koren and Volinsky (2008), and for conjugate
// gradient Takacs, Pilaszy and Tikk (2011).
#include "mf_als.h"

#include <cmath>

#include "cpu/cholesky.h"
#include "cpu/csr_rows.h"

namespace lspm::cpu {
namespace {

// Rows of a tile: as many as half of a first-level cache of 48 KiB holds, but enough to spread over them the
// reading and writing of the sums; and with narrow vectors, which come without fused multiply-add, few, since
// rounding errors grow with a sum's length.
int64_t tile_depth(int64_t stride) {
  constexpr int64_t kMost = std::min(256, kLanes * kLanes);
  return std::clamp<int64_t>(6144 / stride / kLanes * kLanes, std::min<int64_t>(32, kMost), kMost);
}
// One vector more than the rows have: a power of two would put them into few sets of the cache.
int64_t tile_stride(int64_t k) { return whole_vectors(k) + kLanes; }

struct Problem {
  const Csr& csr;
  const float *values, *weight;
  int64_t k;
  const MfAlsOptions& options;

  int64_t stride() const { return whole_vectors(k); }
  // What y y' is multiplied by, and y on the right side, in the lanes of entries from `entry` on.
  F of_matrix(int64_t entry, int64_t end) const {
    const F v = values_at(values, entry, end);
    return options.implicit ? v * options.alpha : weight ? values_at(weight, entry, end) : ones(entry, end);
  }
  F of_side(int64_t entry, int64_t end) const {
    const F v = values_at(values, entry, end);
    if (options.implicit) return v * options.alpha + ones(entry, end);
    return weight ? v * values_at(weight, entry, end) : v;
  }
  // What the entries' terms are, less what an implicit objective has of them anyway.
  F loss(F product, int64_t entry, int64_t end) const {
    const F v = values_at(values, entry, end);
    const F away = (options.implicit ? ones(entry, end) : v) - product;
    if (options.implicit) return of_side(entry, end) * away * away - product * product;
    return of_matrix(entry, end) * away * away;
  }
  float reg(int64_t count) const {
    if (options.reg_exponent == 0) return options.reg;
    return float(options.reg * std::pow(double(count), double(options.reg_exponent)));
  }

 private:
  static F ones(int64_t entry, int64_t end) { return values_at(nullptr, entry, end); }
};

// Y'Y of `rows` rows of k floats, the whole symmetric matrix. Rows are added up in parts that do not depend
// on the number of threads, and the parts in order.
Floats gram(const float* from, int64_t rows, int64_t k, int threads) {
  const int64_t stride = whole_vectors(k), size = stride * stride, ld = tile_stride(k);
  const int64_t depth = tile_depth(ld), part = std::max<int64_t>(4 * depth, (rows + 15) / 16);
  const int64_t parts = std::max<int64_t>((rows + part - 1) / part, 1);
  const Floats sums = zeros(parts * size);
  parallel_for(parts, rows * k * k / 16, threads, [&](int64_t begin, int64_t end) {
    const Floats tile = zeros(depth * ld);
    for (; begin < end; ++begin)
      for (int64_t row = begin * part, last = std::min(rows, row + part); row < last; row += depth) {
        const int64_t n = std::min(depth, last - row);
        for (int64_t i = 0; i < n; ++i) load_row(from + (row + i) * k, k, tile.get() + i * ld);
        float* const to = sums.get() + begin * size;
        add_outer_products<false>(tile.get(), ld, n, to, to, stride, 0, stride, stride);
      }
  });
  Floats total = zeros(size);
  for (int64_t r = 0; r < stride; ++r)
    for (int64_t c = r; c < stride; ++c) {
      float sum = 0;
      for (int64_t p = 0; p < parts; ++p) sum += sums[p * size + r * stride + c];
      total[r * stride + c] = total[c * stride + r] = sum;
    }
  return total;
}

class Cholesky {
 public:
  Cholesky(const Problem& p, const float* gram)
      : p_(p),
        gram_(gram),
        n_(p.stride()),
        ld_(tile_stride(p.k)),
        depth_(tile_depth(ld_)),
        matrix_(zeros(n_ * ld_)),
        tile_(zeros(depth_ * ld_)),
        side_(zeros(n_)),
        inverse_(zeros(n_)) {}

  // Solves row, whose entries name `rows`; false where its matrix is not positive definite.
  bool solve(int64_t row, const float* const* rows, float* x) {
    const int64_t begin = p_.csr.indptr[row], end = p_.csr.indptr[row + 1], count = end - begin;
    const float reg = p_.reg(count);
    if (!gram_ && !(reg > 0) && count < p_.k) return false;  // whatever rounding would make of it
    float* const matrix = matrix_.get();
    start(matrix);
    std::fill_n(side_.get(), n_, 0.0f);
    for (int64_t entry = begin; entry < end; entry += depth_) {
      const int64_t depth = std::min(depth_, end - entry);
      for (int64_t i = 0; i < depth; i += kLanes)
        copy(rows + (entry - begin) + i, entry + i, end, std::min<int64_t>(kLanes, depth - i), i);
      add_outer_products<false>(tile_.get(), ld_, depth, matrix, matrix, ld_, 0, n_, n_);
    }
    for (int64_t i = 0; i < n_; ++i) matrix[i * ld_ + i] = i < p_.k ? matrix[i * ld_ + i] + reg : 1.0f;
    if (!factorise(matrix, ld_, n_, inverse_.get())) return false;
    cpu::solve(matrix, ld_, n_, inverse_.get(), side_.get());
    store_row(side_.get(), p_.k, x);
    return true;
  }

 private:
  void start(float* matrix) const {
    for (int64_t r = 0, n = n_, ld = ld_; r < n; ++r)
      for (int64_t c = r / kLanes * kLanes; c < n; c += kLanes)
        store(matrix + r * ld + c, gram_ ? load(gram_ + r * n + c) : F{});
  }

  void copy(const float* const* rows, int64_t entry, int64_t end, int64_t n, int64_t at) {
    float scales[kLanes];
    const F weights = p_.of_matrix(entry, end);
    for (int i = 0; i < kLanes; ++i) scales[i] = std::sqrt(weights[i]);
    float* to = tile_.get() + at * ld_;
    for (int64_t i = 0, size = n_, ld = ld_; i < n; ++i, to += ld)
      for (int64_t c = 0; c < size; c += kLanes) store(to + c, load(rows[i] + c) * scales[i]);
    add_scaled<1>(rows, {p_.of_side(entry, end)}, {side_.get()}, n_);
  }

  const Problem& p_;
  const float* const gram_;
  const int64_t n_, ld_, depth_;
  const Floats matrix_, tile_, side_, inverse_;
};

class ConjugateGradient {
 public:
  ConjugateGradient(const Problem& p, const float* gram)
      : p_(p), gram_(gram), n_(p.stride()), room_(zeros((4 * kTileHeight + 1) * n_)) {}

  // Takes p.options.steps steps for up to kTileHeight rows x, each k floats that lie at to[i].
  void solve(const int64_t* numbers, const float* const* const* rows, float* const* to, int64_t count) {
    float *const x = room_.get(), *const r = x + kTileHeight * n_, *const p = r + kTileHeight * n_;
    float* const q = p + kTileHeight * n_;
    // <r, r>, or 0 where there is nothing more to gain; how much of it is rounding; the steepest way so far.
    float left[kTileHeight], least[kTileHeight], steepest[kTileHeight] = {};
    for (int64_t i = 0; i < count; ++i) load_row(to[i], p_.k, x + i * n_);
    times_gram(x, r, count);
    for (int64_t i = 0; i < count; ++i) {
      float *const mine = r + i * n_, reg = p_.reg(p_.csr.count(numbers[i]));
      each(mine, [&](int64_t c) { return -(load(mine + c) + load(x + i * n_ + c) * reg); });
      add_entries<true>(numbers[i], rows[i], x + i * n_, mine);
      each(p + i * n_, [&](int64_t c) { return load(mine + c); });
      left[i] = dot(mine, mine);
      least[i] = std::max(kStepEpsilon * kStepEpsilon * left[i], kStepLost);
    }
    for (int64_t step = 0; step < p_.options.steps; ++step) {
      times_gram(p, q, count);
      for (int64_t i = 0; i < count; ++i) {
        float *const xi = x + i * n_, *const ri = r + i * n_, *const pi = p + i * n_, *const qi = q + i * n_;
        if (left[i] < least[i]) continue;
        const float reg = p_.reg(p_.csr.count(numbers[i]));
        each(qi, [&](int64_t c) { return load(qi + c) + load(pi + c) * reg; });
        add_entries<false>(numbers[i], rows[i], pi, qi);
        const float curvature = dot(pi, qi), slope = curvature / dot(pi, pi), length = left[i] / curvature;
        steepest[i] = std::fmax(steepest[i], slope);
        if (slope <= kStepEpsilon * steepest[i]) {
          left[i] = 0;
          continue;
        }
        each(xi, [&](int64_t c) { return load(xi + c) + load(pi + c) * length; });
        each(ri, [&](int64_t c) { return load(ri + c) - load(qi + c) * length; });
        const float before = left[i];
        left[i] = dot(ri, ri);
        const float share = left[i] / before;
        each(pi, [&](int64_t c) { return load(ri + c) + load(pi + c) * share; });
      }
    }
    for (int64_t i = 0; i < count; ++i) store_row(x + i * n_, p_.k, to[i]);
  }

 private:
  static constexpr int64_t kPart = 64;  // entries added up by themselves: of thousands, rounding would tell

  // to = from Y'Y, of as many rows; 0 where there is no Y'Y.
  void times_gram(const float* from, float* to, int64_t count) const {
    if (!gram_) std::fill_n(to, count * n_, 0.0f);
    for (int64_t d = 0, most = tile_depth(1); gram_ && d < n_; d += most)
      product_rows<false>(from + d, n_, 1, gram_ + d * n_, n_, std::min(most, n_ - d), d ? to : nullptr, to,
                          n_, n_);
  }

  // to += the sum of w <y, p> y over the row's entries; kRest: b minus that sum.
  template <bool kRest>
  void add_entries(int64_t row, const float* const* rows, const float* p, float* to) const {
    const int64_t begin = p_.csr.indptr[row], end = p_.csr.indptr[row + 1];
    float* const part = room_.get() + 4 * kTileHeight * n_;
    for (int64_t first = begin; first < end; first += kPart) {
      const int64_t last = std::min(first + kPart, end);
      std::fill_n(part, n_, 0.0f);
      for (int64_t entry = first; entry < last; entry += kLanes, rows += kLanes) {
        const F scaled = p_.of_matrix(entry, end) * dots(rows, p, n_);
        add_scaled<1>(rows, {kRest ? p_.of_side(entry, end) - scaled : scaled}, {part}, n_);
      }
      each(to, [&](int64_t c) { return load(to + c) + load(part + c); });
    }
  }

  template <class Of>
  void each(float* to, Of of) const {
    for (int64_t c = 0, n = n_; c < n; c += kLanes) store(to + c, of(c));
  }
  float dot(const float* a, const float* b) const {
    WideSum products;
    for (int64_t c = 0, n = n_; c < n; c += kLanes) products.add(c, load(a + c) * load(b + c));
    return float(products.total());
  }

  const Problem& p_;
  const float* const gram_;
  const int64_t n_;
  const Floats room_;
};

// What a thread does with its runs of rows.
class Worker {
 public:
  Worker(const Problem& p, const Rows& table, const float* gram, float* factors, First& no_row,
         First& not_definite)
      : p_(p),
        table_(table),
        factors_(factors),
        no_row_(no_row),
        not_definite_(not_definite),
        exact_(p.options.steps ? nullptr : new Cholesky(p, gram)),
        stepped_(p.options.steps ? new ConjugateGradient(p, gram) : nullptr) {}

  void operator()(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (p_.csr.count(row) == 0) {
        std::fill_n(factors_ + row * p_.k, p_.k, 0.0f);
      } else if (const size_t at = rows_.size(); !table_.append(row, rows_)) {
        rows_.resize(at);
        no_row_.report(row);
      } else {
        numbers_[waiting_] = row;
        starts_[waiting_++] = at;
      }
      if (waiting_ == (exact_ ? 1 : kTileHeight) || row + 1 == end) solve();
    }
  }

 private:
  void solve() {
    const float* const* rows[kTileHeight];
    float* to[kTileHeight];
    for (int64_t i = 0; i < waiting_; ++i) {
      rows[i] = rows_.data() + starts_[i];
      to[i] = factors_ + numbers_[i] * p_.k;
      if (exact_ && !exact_->solve(numbers_[i], rows[i], to[i])) not_definite_.report(numbers_[i]);
    }
    if (stepped_ && waiting_) stepped_->solve(numbers_, rows, to, waiting_);
    rows_.clear();
    waiting_ = 0;
  }

  const Problem& p_;
  const Rows& table_;
  float* const factors_;
  First &no_row_, &not_definite_;
  const std::unique_ptr<Cholesky> exact_;
  const std::unique_ptr<ConjugateGradient> stepped_;
  std::vector<const float*> rows_;  // that the waiting rows' entries name
  int64_t numbers_[kTileHeight], waiting_ = 0;
  size_t starts_[kTileHeight];
};

// The sum of term(i) over [0, n), each part in order and the parts in order: the same for any number of
// threads.
template <class Term>
double sum_in_parts(int64_t n, int64_t work, int threads, Term term) {
  constexpr int64_t kPart = 256;
  std::vector<double> sums((n + kPart - 1) / kPart);
  parallel_for(int64_t(sums.size()), work, threads, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      for (int64_t i = begin * kPart; i < std::min(n, (begin + 1) * kPart); ++i) sums[begin] += term(i);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

double square(const float* x, int64_t k) {
  double total = 0;
  for (int64_t i = 0; i < k; ++i) total += double(x[i]) * x[i];
  return total;
}

}  // namespace

void mf_als_update(float* factors, const float* other_factors, const Csr& csr, const float* values,
                   const float* weight, int64_t* failed, int64_t k, const MfAlsOptions& options,
                   int threads) {
  const Problem problem{csr, values, weight, k, options};
  check(csr);
  const Rows table(other_factors, k, csr, threads);
  const Floats whole = options.implicit ? gram(other_factors, csr.columns, k, threads) : nullptr;
  First no_row, not_definite;
  for_runs_of_rows(csr, k, threads,
                   [&] { return Worker(problem, table, whole.get(), factors, no_row, not_definite); });
  failed[0] = no_row.get();
  failed[1] = not_definite.get();
}

void mf_als_loss(const float* factors, const float* other_factors, const Csr& csr, const float* values,
                 const float* weight, float* loss, int64_t k, const MfAlsOptions& options, int threads) {
  const Problem problem{csr, values, weight, k, options};
  check(csr);
  const Rows table(other_factors, k, csr, threads);
  const int64_t stride = table.stride;
  std::vector<double> of_rows(csr.rows);
  First no_row;
  for_runs_of_rows(csr, k, threads, [&] {
    return [&, rows = std::vector<const float*>(), x = zeros(stride)](int64_t begin, int64_t end) mutable {
      for (int64_t row = begin; row < end; ++row) {
        rows.clear();
        load_row(factors + row * k, k, x.get());
        if (!table.append(row, rows)) no_row.report(row);
        of_rows[row] = problem.reg(csr.count(row)) * square(x.get(), k);
        const int64_t last = no_row.get() < 0 ? csr.indptr[row + 1] : 0;
        for (int64_t first = csr.indptr[row], entry = first; entry < last; entry += kLanes) {
          const F product = dots(rows.data() + (entry - first), x.get(), stride);
          of_rows[row] += sum(problem.loss(product, entry, last));
        }
      }
    };
  });
  double total = 0;
  for (const double of_row : of_rows) total += of_row;
  std::vector<int64_t> counts(options.reg_exponent == 0 ? 0 : csr.columns);
  if (no_row.get() >= 0) {
    *loss = NAN;
    return;
  }
  if (!counts.empty())
    for (int64_t entry = 0; entry < csr.entries; ++entry) ++counts[csr.column(entry)];
  total += sum_in_parts(csr.columns, csr.columns * k, threads, [&](int64_t i) {
    return problem.reg(counts.empty() ? 0 : counts[i]) * square(other_factors + i * k, k);
  });
  if (options.implicit) {  // <x, y> ** 2 over all rows and columns: the trace of X'X Y'Y
    const Floats a = gram(factors, csr.rows, k, threads), b = gram(other_factors, csr.columns, k, threads);
    for (int64_t i = 0; i < stride * stride; ++i) total += double(a[i]) * b[i];
  }
  *loss = float(total);
}

}  // namespace lspm::cpu
