// The best items of each query: products of packed tiles, and what passes a row's threshold is kept.
//
// A thread owns a block of queries, and packs the items for it, some kBlockBytes at a time, into the panels
// of gemm.h. Of a tile of scores, which stays in the first-level cache, one comparison a vector finds those
// that may still be among a row's k best; few are. They are gathered until there are twice as many as needed,
// and the better half remains and raises the threshold. So a row takes 16 k bytes, whatever the number of
// items. Few queries are split over parts of the items instead, whose best are merged. Sums are in the same
// order in every tile and keys are ordered totally, so neither blocks nor threads change a bit. Floor: 2 *
// dim operations a score; for one query the bytes of items.
#include "top_k_scores.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/gemm_bf16.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kTileQueries = 2 * kTileRows;
constexpr int64_t kBlockQueries = 9 * kTileQueries;  // packing is then 1 % of the products
constexpr int64_t kBlockBytes = 128 * 1024;          // of packed items: an eighth of a second-level cache
constexpr int64_t kBytesAhead = 8 * 1024;            // of items that are fetched before they are packed
constexpr int64_t kStateBytes = 4 << 20;             // of what a block keeps of its rows, where k is large

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// A score and its item as one number, the better one the larger: scores in the high half, ordered as
// integers, and in the low half the complement of the index.
using Key = uint64_t;

Key key_of(float score, int64_t index) {
  const float positive = score + 0.0f;  // the two zeros are equal
  uint32_t bits;
  std::memcpy(&bits, &positive, sizeof bits);
  bits = score != score ? ~0u : bits >> 31 ? ~bits : bits | 0x80000000u;
  return Key(bits) << 32 | uint32_t(~index);
}
float score_of(Key key) {
  uint32_t bits = uint32_t(key >> 32);
  if (bits == ~0u) return kNaN;
  bits = bits >> 31 ? bits & 0x7fffffffu : ~bits;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}
int64_t index_of(Key key) { return uint32_t(~key); }

// Keeps the k largest of [first, last), or all of them, in order; returns how many.
int64_t sort_best(Key* first, Key* last, int64_t k) {
  if (last - first > k) std::nth_element(first, first + k, last, std::greater<>());
  last = std::min(last, first + k);
  std::sort(first, last, std::greater<>());
  return last - first;
}

// The best items so far of a block of queries. Items come in ascending order.
class Best {
 public:
  Best(const Exclusions& exclusions, int64_t first_query, int64_t queries, int64_t first_item, int64_t k)
      : k_(k), room_(k + std::max<int64_t>(k, 8)), rows_(queries), keys_(new Key[queries * room_]) {
    if (!exclusions.indptr) return;
    const int64_t* const indptr = exclusions.indptr + first_query;
    const auto list = [&](int64_t q) { return exclusions.indices + indptr[q]; };
    int64_t unsorted = 0;
    for (int64_t q = 0; q < queries; ++q)
      if (!std::is_sorted(list(q), list(q + 1))) unsorted += indptr[q + 1] - indptr[q];
    sorted_.reserve(unsorted);  // what points into it must stay
    for (int64_t q = 0; q < queries; ++q) {
      Row& row = rows_[q];
      row.excluded = list(q), row.last_excluded = list(q + 1);
      if (!std::is_sorted(row.excluded, row.last_excluded)) {
        const auto begin = sorted_.insert(sorted_.end(), row.excluded, row.last_excluded);
        std::sort(begin, sorted_.end());
        row.excluded = &*begin, row.last_excluded = row.excluded + (sorted_.end() - begin);
      }
      row.excluded = std::lower_bound(row.excluded, row.last_excluded, first_item);
    }
  }

  // Takes what a row has of a panel of scores: those of `live` lanes that pass its threshold.
  void take(int64_t q, F a, F b, uint32_t live, int64_t first_item) {
    Row& row = rows_[q];
    const F least = broadcast(row.least);
    uint32_t passing = (not_at_most(a, least) | not_at_most(b, least) << kLanes) & live;
    if (__builtin_expect(passing == 0, 1)) return;
    float scores[kPanel];
    store(scores, a);
    store(scores + kLanes, b);
    for (; passing; passing &= passing - 1) {
      const int lane = __builtin_ctz(passing);
      add(row, q, scores[lane], first_item + lane);
    }
  }

  // The k best keys of a row, in order, or as many as there are; returns their number.
  int64_t finish(int64_t q, const Key*& keys) {
    Key* const first = keys_.get() + q * room_;
    keys = first;
    return sort_best(first, first + rows_[q].count, k_);
  }

 private:
  struct Row {
    float least = kNaN;  // what a score must not be at most; NaN as long as anything passes
    int64_t count = 0;
    const int64_t *excluded = nullptr, *last_excluded = nullptr;  // from the last item seen on
  };

  void add(Row& row, int64_t q, float score, int64_t item) {
    while (row.excluded != row.last_excluded && *row.excluded < item) ++row.excluded;
    if (row.excluded != row.last_excluded && *row.excluded == item) return;
    Key* const keys = keys_.get() + q * room_;
    keys[row.count++] = key_of(score, item);
    if (row.count < room_) return;
    std::nth_element(keys, keys + k_ - 1, keys + room_, std::greater<>());
    row.count = k_;
    row.least = score_of(keys[k_ - 1]);  // a later item that is equal comes after it
  }

  const int64_t k_, room_;
  std::vector<Row> rows_;
  std::unique_ptr<Key[]> keys_;
  std::vector<int64_t> sorted_;
};

template <class Element>
std::unique_ptr<Element[]> scratch(int64_t elements) {
  return std::unique_ptr<Element[]>(new Element[elements]);
}

// A call. Where the dimension is longer than a left side is deep, it is taken in chunks.
template <class T>
struct Job {
  using Operand = OperandOf<T>;
  const T *queries, *items;
  const float* item_bias;
  const TopKScoresShape& shape;

  int64_t chunks() const { return std::max<int64_t>(1, (shape.dim + kMaxDepth - 1) / kMaxDepth); }
  int64_t depth_of(int64_t chunk) const { return std::min(kMaxDepth, shape.dim - chunk * kMaxDepth); }

  // Scores of queries [first_query, last_query) and items [begin, end) go to `best`.
  void run(int64_t first_query, int64_t last_query, int64_t begin, int64_t end, Best& best) const {
    [[maybe_unused]] const TileRegisters registers;
    const int64_t depth = std::min(kMaxDepth, shape.dim), panel = panel_size(depth);
    const int64_t fitting = kBlockBytes / int64_t(sizeof(Operand)) / std::max<int64_t>(1, shape.dim);
    // One tile of queries meets each panel while that is in the first-level cache.
    const bool one_tile = last_query - first_query <= kTileQueries;
    const int64_t block = one_tile ? kPanel : std::clamp(fitting / kPanel, int64_t{1}, int64_t{16}) * kPanel;
    const int64_t row_bytes = shape.dim * int64_t(sizeof(T));
    const int64_t ahead = std::max(kPanel, kBytesAhead / std::max<int64_t>(1, row_bytes));
    constexpr int64_t kLeft = round_up(kTileQueries, 32) * kStride<Operand>;
    const auto left = scratch<Operand>(chunks() * kLeft);
    const auto right = scratch<Operand>(chunks() * block / kPanel * panel);
    std::vector<float> bias(block);
    alignas(64) float c[round_up(kTileQueries, 32) * kPanel];
    const auto pack_queries = [&](int64_t q, int64_t rows) {
      for (int64_t chunk = 0; chunk < chunks(); ++chunk)
        pack_left(queries + q * shape.query_stride + chunk * kMaxDepth, shape.query_stride, 1.0f,
                  left.get() + chunk * kLeft, rows, depth_of(chunk));
    };
    if (one_tile) pack_queries(first_query, last_query - first_query);
    for (; begin < end; begin += block) {
      if (one_tile)
        for (int64_t n = begin + ahead; n < std::min(begin + ahead + kPanel, end); ++n)
          for (int64_t at = 0; at < row_bytes; at += 64)
            prefetch(reinterpret_cast<const char*>(items + n * shape.item_stride) + at);
      const int64_t here = std::min(block, end - begin);
      for (int64_t chunk = 0; chunk < chunks(); ++chunk)
        pack_right_transposed(items + begin * shape.item_stride + chunk * kMaxDepth, shape.item_stride,
                              right.get() + chunk * (block / kPanel) * panel, panel, depth_of(chunk), here);
      if (item_bias) std::copy_n(item_bias + begin, here, bias.data());
      for (int64_t q = first_query; q < last_query; q += kTileQueries) {
        const int64_t rows = std::min(kTileQueries, last_query - q);
        if (!one_tile) pack_queries(q, rows);
        for (int64_t n = 0; n < here; n += kPanel) {
          for (int64_t chunk = 0; chunk < chunks(); ++chunk)
            multiply_in_order(left.get() + chunk * kLeft, right.get() + (chunk * block + n) / kPanel * panel,
                              panel, c, kPanel, rows, kPanel, depth_of(chunk), chunk > 0);
          const uint32_t live = here - n < kPanel ? (1u << (here - n)) - 1 : ~0u;
          const F low = load(&bias[n]), high = load(&bias[n + kLanes]);
          for (int64_t r = 0; r < rows; ++r)
            best.take(q - first_query + r, load(c + r * kPanel) + low, load(c + r * kPanel + kLanes) + high,
                      live, begin + n);
        }
      }
    }
  }
};

void write(const Key* keys, int64_t count, int64_t k, float* scores, int64_t* indices) {
  for (int64_t i = 0; i < k; ++i) {
    scores[i] = i < count ? score_of(keys[i]) : -std::numeric_limits<float>::infinity();
    indices[i] = i < count ? index_of(keys[i]) : -1;
  }
}

[[noreturn]] void refuse(const std::string& argument, const std::string& rule, const std::string& got) {
  throw std::invalid_argument("top_k_scores: " + argument + " must " + rule + ", got " + got);
}

void check(const Exclusions& x, const TopKScoresShape& s, int threads) {
  if (!x.indptr) return;
  for (int64_t b = 0; b <= s.queries; ++b) {
    if (x.indptr[b] < 0 || x.indptr[b] > x.count)
      refuse("exclude_indptr",
             "be from 0 to the number of exclude_indices, which is " + std::to_string(x.count),
             std::to_string(x.indptr[b]));
    if (b > 0 && x.indptr[b] < x.indptr[b - 1])
      refuse("exclude_indptr", "not decrease",
             std::to_string(x.indptr[b]) + " after " + std::to_string(x.indptr[b - 1]));
  }
  const int64_t first = x.indptr[0], last = x.indptr[s.queries];
  First wrong;
  parallel_for(last - first, last - first, threads, [&](int64_t begin, int64_t end) {
    for (begin += first, end += first; begin < end; ++begin) {
      if (uint64_t(x.indices[begin]) < uint64_t(s.items)) continue;
      wrong.report(begin);
      return;
    }
  });
  if (const int64_t place = wrong.get(); place >= 0)
    refuse("exclude_indices", "be from 0 to " + std::to_string(s.items - 1),
           std::to_string(x.indices[place]));
}

template <class T>
void forward(const void* queries, const void* items, const float* item_bias, const Exclusions& exclusions,
             float* scores, int64_t* indices, const TopKScoresShape& s, int threads) {
  const Job<T> job{static_cast<const T*>(queries), static_cast<const T*>(items), item_bias, s};
  const int64_t k = std::min(s.k, s.items), panels = (s.items + kPanel - 1) / kPanel;
  // As many blocks as threads, or a multiple of it, where each has a tile of queries to itself.
  const int64_t fitting = kStateBytes / (16 * std::max<int64_t>(1, k)) / kTileQueries * kTileQueries;
  const int64_t most = std::clamp(fitting, kTileQueries, kBlockQueries);
  const int64_t wanted = round_up((s.queries + most - 1) / most, threads);
  const int64_t size = round_up((s.queries + wanted - 1) / wanted, kTileQueries);
  const int64_t blocks = (s.queries + size - 1) / size;
  const int64_t parts = std::clamp((threads + blocks - 1) / blocks, int64_t{1}, std::max<int64_t>(1, panels));
  std::vector<Key> merged(parts > 1 ? parts * s.queries * k : 0);
  std::vector<int64_t> counts(parts > 1 ? parts * s.queries : 0);
  const int64_t work = s.queries * s.items * std::max<int64_t>(1, s.dim / 8);
  parallel_claim(blocks * parts, work, threads, [&](auto next, int) {
    for (int64_t i = next(); i < blocks * parts; i = next()) {
      const int64_t part = i % parts, first = i / parts * size, last = std::min(first + size, s.queries);
      const int64_t begin = panels * part / parts * kPanel;
      Best best(exclusions, first, last - first, begin, k);
      job.run(first, last, begin, std::min(panels * (part + 1) / parts * kPanel, s.items), best);
      for (int64_t q = first; q < last; ++q) {
        const Key* keys;
        const int64_t count = best.finish(q - first, keys);
        if (parts == 1)
          write(keys, count, s.k, scores + q * s.k, indices + q * s.k);
        else
          std::copy_n(keys, counts[q * parts + part] = count, merged.data() + (q * parts + part) * k);
      }
    }
  });
  for (int64_t q = 0; parts > 1 && q < s.queries; ++q) {
    Key* const first = merged.data() + q * parts * k;
    Key* last = first;
    for (int64_t part = 0; part < parts; ++part)
      last = std::copy_n(first + part * k, counts[q * parts + part], last);
    write(first, sort_best(first, last, k), s.k, scores + q * s.k, indices + q * s.k);
  }
}

}  // namespace

void top_k_scores_forward(const void* queries, const void* items, const float* item_bias,
                          const Exclusions& exclusions, float* scores, int64_t* indices,
                          const TopKScoresShape& shape, int threads) {
  check(exclusions, shape, threads);
  if (shape.queries == 0 || shape.k == 0) return;
  const auto run = shape.dtype == DType::f32    ? &forward<float>
                   : shape.dtype == DType::bf16 ? &forward<bf16>
                                                : &forward<f16>;
  run(queries, items, item_bias, exclusions, scores, indices, shape, threads);
}

}  // namespace lspm::cpu
