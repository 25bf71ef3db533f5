// Matrix factorisation's prediction. Forward: a thread owns blocks of pairs; a vector of pairs is multiplied
// at a time, whose sums over lanes are then taken together, and the rows of later pairs are on their way
// meanwhile. Backward, once for each table: a stable counting sort puts the pairs of a row side by side, each
// with its other id and its gradient, and a thread owns whole rows: a row's sum stays in registers and is
// written once. The sorted order is the same for any number of threads, so is every sum.
// Bytes per pair, where no cache helps: forward 2 rows, backward 2 rows; and the gradients, written once.
#include "mf.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace lspm::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // pairs whose ids are checked before the first of them is used
constexpr int64_t kAhead = 16;    // pairs from a prefetch to its use: some 100 lines of rows of 64 floats
constexpr int64_t kMostLines = 8;
constexpr int64_t kRun = 256;     // pairs in one sum; longer ones are sums of such sums, which round less
constexpr int64_t kChunk = 4096;  // rows and pairs that a thread takes at once
constexpr int64_t kGroupPairs = 16384;  // for which another histogram is worth its memory

template <class T>
void prefetch_row(const T* row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < std::min(dim, kMostLines * kLine); d += kLine) prefetch(row + d);
}

// The first position of ids that are none.
class Unknown {
 public:
  Unknown(const char* name, const int64_t* ids, int64_t rows) : name_(name), ids_(ids), rows_(rows) {}

  // Whether all of [begin, end) are rows.
  bool known(int64_t begin, int64_t end) {
    uint64_t largest = 0;
    for (int64_t p = begin; p < end; ++p) largest = std::max(largest, uint64_t(ids_[p]));
    if (begin == end || largest < uint64_t(rows_)) return true;
    while (uint64_t(ids_[begin]) < uint64_t(rows_)) ++begin;
    first_.report(begin);
    return false;
  }
  void refuse() const {
    if (const int64_t first = first_.get(); first >= 0)
      throw std::invalid_argument(std::string("mf: ") + name_ + " must be from 0 to " +
                                  std::to_string(rows_ - 1) + ", got " + std::to_string(ids_[first]));
  }

 private:
  const char* name_;
  const int64_t* ids_;
  int64_t rows_;
  First first_;
};

template <class T>
F product(const T* a, const T* b, int64_t dim) {
  F total{};
  for_each_pair<T>(0, dim, [&](int64_t d, auto lanes) {  // beyond the end a single vector loads zeros
    add_product(total, lanes.load(a + d), lanes.load(b + d));
  });
  return total;
}

template <class T>
struct Forward {
  const T *user_factors, *item_factors, *user_bias, *item_bias;
  const int64_t *users, *items;
  float mean;
  T* ratings;
  int64_t dim;

  explicit Forward(const MfTables<const void>& t)
      : user_factors(static_cast<const T*>(t.user_factors)),
        item_factors(static_cast<const T*>(t.item_factors)),
        user_bias(static_cast<const T*>(t.user_bias)),
        item_bias(static_cast<const T*>(t.item_bias)) {}

  void run(int64_t begin, int64_t end) const {
    for (; begin < end; begin += kLanes) {
      const int64_t here = std::min<int64_t>(kLanes, end - begin);
      F products[kLanes] = {};
      float biases[kLanes] = {};
      for (int64_t j = 0; j < here; ++j) {
        const int64_t p = begin + j, later = std::min(p + kAhead, end - 1);
        prefetch_row(user_factors + users[later] * dim, dim);
        prefetch_row(item_factors + items[later] * dim, dim);
        products[j] = product(user_factors + users[p] * dim, item_factors + items[p] * dim, dim);
        if (user_bias) biases[j] += to_float(user_bias[users[p]]);
        if (item_bias) biases[j] += to_float(item_bias[items[p]]);
      }
      const F found = sums_of(products) + load(biases) + mean;
      if (here == kLanes)
        store(ratings + begin, found);
      else
        FirstLanes{int(here)}.store(ratings + begin, found);
    }
  }
};

template <class T>
void forward(const MfTables<const void>& tables, const int64_t* users, const int64_t* items, float mean,
             void* ratings, const MfShape& s, int threads) {
  Forward<T> job(tables);
  job.users = users, job.items = items;
  job.mean = mean;
  job.ratings = static_cast<T*>(ratings);
  job.dim = s.dim;
  Unknown unknown_users("users", users, s.users), unknown_items("items", items, s.items);
  const int64_t blocks = (s.pairs + kBlock - 1) / kBlock;
  parallel_for(blocks, s.pairs * (s.dim + 1), threads, [&](int64_t block, int64_t last) {
    for (; block < last; ++block) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, s.pairs);
      const bool known = unknown_users.known(begin, end);
      if (unknown_items.known(begin, end) && known) job.run(begin, end);
    }
  });
  unknown_users.refuse();
  unknown_items.refuse();
}

// What a row's gradient needs of one of its pairs.
struct Part {
  int32_t other;
  float gradient;
};

// The pairs in the order of their rows, and in their own order within a row.
struct Sorted {
  std::unique_ptr<int64_t[]> begins;  // of each row, and the end of all
  std::unique_ptr<Part[]> parts;

  template <class T>
  Sorted(const int64_t* ids, const int64_t* others, const T* gradients, int64_t pairs, int64_t rows,
         int threads)
      : begins(new int64_t[rows + 1]), parts(new Part[pairs]) {
    const int64_t groups =
        std::clamp<int64_t>(std::min(pairs / kGroupPairs, 4 * pairs / (rows + 1)), 1, std::max(threads, 1));
    const std::unique_ptr<int64_t[]> places(new int64_t[groups * rows]());
    const auto each = [&](auto body) {
      parallel_for(groups, pairs, threads, [&](int64_t group, int64_t last) {
        for (; group < last; ++group)
          body(places.get() + group * rows, pairs * group / groups, pairs * (group + 1) / groups);
      });
    };
    each([&](int64_t* counts, int64_t p, int64_t end) {
      for (; p < end; ++p) ++counts[ids[p]];
    });
    int64_t place = 0;
    for (int64_t row = 0; row < rows; ++row) {
      begins[row] = place;
      for (int64_t group = 0; group < groups; ++group) {
        int64_t& at = places[group * rows + row];
        const int64_t count = at;
        at = place;
        place += count;
      }
    }
    begins[rows] = pairs;
    each([&](int64_t* next, int64_t p, int64_t end) {
      for (; p < end; ++p) parts[next[ids[p]]++] = {int32_t(others[p]), to_float(gradients[p])};
    });
  }
};

// The gradient of one table. `others` are the factors of the other one.
template <class T>
struct Backward {
  const T* others;
  T *dfactors, *dbias;
  int64_t dim, pairs;
  const Part* parts;

  // Columns [d, d + kVectors vectors) of a row, whose parts are [begin, end).
  template <int kVectors, class Lanes>
  void columns(int64_t d, int64_t begin, int64_t end, T* out, Lanes lanes) const {
    F total[kVectors] = {};
    do {
      F sum[kVectors] = {};
      for (const int64_t stop = std::min(begin + kRun, end); begin < stop; ++begin) {
        prefetch_row(others + parts[std::min(begin + kAhead, pairs - 1)].other * dim, dim);
        const T* const row = others + parts[begin].other * dim + d;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
          sum[v] += lanes.load(row + v * kLanes) * broadcast(parts[begin].gradient);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[v] += sum[v];
    } while (begin < end);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) lanes.store(out + d + v * kLanes, total[v]);
  }

  template <int kVectors>
  int64_t whole(int64_t d, int64_t begin, int64_t end, T* out) const {
    for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes)
      columns<kVectors>(d, begin, end, out, AllLanes{});
    return d;
  }

  void row(int64_t r, int64_t begin, int64_t end) const {
    if (dfactors) {
      T* const out = dfactors + r * dim;
      int64_t d = whole<8>(0, begin, end, out);
      d = whole<4>(d, begin, end, out);
      d = whole<1>(d, begin, end, out);
      if (d < dim) columns<1>(d, begin, end, out, FirstLanes{int(dim - d)});
    }
    if (!dbias) return;
    double sum = 0;
    for (; begin < end; ++begin) sum += parts[begin].gradient;
    FirstLanes{1}.store(dbias + r, broadcast(float(sum)));
  }
};

template <class T>
void one_table(const T* dratings, const int64_t* ids, const int64_t* other_ids, const void* others,
               void* dfactors, void* dbias, int64_t rows, const MfShape& s, int threads) {
  if (!dfactors && !dbias) return;
  const Sorted sorted(ids, other_ids, dratings, s.pairs, rows, threads);
  const Backward<T> job{static_cast<const T*>(others),
                        static_cast<T*>(dfactors),
                        static_cast<T*>(dbias),
                        s.dim,
                        s.pairs,
                        sorted.parts.get()};
  prepare_output(job.dfactors, rows * s.dim);
  const int64_t* const begins = sorted.begins.get();
  // The first row that has at least `work` pairs and rows before it.
  const auto row_at = [&](int64_t work) {
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      (begins[middle] + middle < work ? low : high) = begins[middle] + middle < work ? middle + 1 : middle;
    }
    return low;
  };
  const int64_t chunks = (s.pairs + rows + kChunk - 1) / kChunk;
  parallel_claim(chunks, (s.pairs + rows) * (s.dim + 1), threads, [&](auto next, int) {
    for (int64_t c = next(); c < chunks; c = next()) {
      const int64_t end = c + 1 < chunks ? row_at((c + 1) * kChunk) : rows;
      for (int64_t r = row_at(c * kChunk); r < end; ++r) job.row(r, begins[r], begins[r + 1]);
    }
  });
}

template <class T>
void backward(const void* dratings, const MfTables<const void>& tables, const int64_t* users,
              const int64_t* items, const MfTables<void>& gradients, const MfShape& s, int threads) {
  Unknown unknown_users("users", users, s.users), unknown_items("items", items, s.items);
  parallel_for(s.pairs, s.pairs, threads, [&](int64_t begin, int64_t end) {
    unknown_users.known(begin, end);
    unknown_items.known(begin, end);
  });
  unknown_users.refuse();
  unknown_items.refuse();
  const T* const dr = static_cast<const T*>(dratings);
  one_table(dr, users, items, tables.item_factors, gradients.user_factors, gradients.user_bias, s.users, s,
            threads);
  one_table(dr, items, users, tables.user_factors, gradients.item_factors, gradients.item_bias, s.items, s,
            threads);
}

}  // namespace

void mf_forward(const MfTables<const void>& tables, const int64_t* users, const int64_t* items, float mean,
                void* ratings, const MfShape& shape, int threads) {
  const auto run = shape.dtype == DType::f32    ? &forward<float>
                   : shape.dtype == DType::bf16 ? &forward<bf16>
                                                : &forward<f16>;
  run(tables, users, items, mean, ratings, shape, threads);
}

void mf_backward(const void* dratings, const MfTables<const void>& tables, const int64_t* users,
                 const int64_t* items, const MfTables<void>& gradients, const MfShape& shape, int threads) {
  const auto run = shape.dtype == DType::f32    ? &backward<float>
                   : shape.dtype == DType::bf16 ? &backward<bf16>
                                                : &backward<f16>;
  run(dratings, tables, users, items, gradients, shape, threads);
}

}  // namespace lspm::cpu
