// Embeddings of tokens (Vaswani et al. 2017; Devlin et al. 2019). A thread owns whole rows of the output. The
// rows of the tables are added up in registers; that of the next token, a place of its own in memory, is
// asked for meanwhile. Beside a norm the sum stays in the cache for its second pass. Bytes, in sizes of T: a
// row of each table and one of the output.
#include "embedding.h"

#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/bags.h"
#include "cpu/dropout.h"
#include "cpu/row_statistics.h"
#include "cpu/runs.h"

namespace lspm::cpu {
namespace {

// Whose row each row of the output takes of a table.
struct Ids {
  const Lookup& lookup;
  const EmbeddingShape& s;

  int64_t operator[](int64_t r) const {
    if (!lookup.ids) return s.first + r % s.length;
    return s.id_dtype == DType::i64 ? static_cast<const int64_t*>(lookup.ids)[r]
                                    : static_cast<const int32_t*>(lookup.ids)[r];
  }
  void check() const {
    if (!lookup.ids) return;  // not by the table, which is null where it has no rows
    for (int64_t r = 0; r < s.rows; ++r)
      if (const int64_t id = (*this)[r]; id < 0 || id >= lookup.rows)
        throw std::invalid_argument("embedding: " + std::string(lookup.name) + " must be from 0 to " +
                                    std::to_string(lookup.rows - 1) + ", got " + std::to_string(id));
  }
};

template <class T>
struct Job {
  const Lookup (&lookups)[3];
  T* out;
  float *mean, *rstd;
  const EmbeddingShape& s;

  struct Scratch {
    const float *weight, *bias;  // of the norm, as ordered() has them
    T* sums;                     // the row
    float *centers, *factors;    // of RowStatistics and of Dropper
  };

  const T* row_of(int table, int64_t r) const {
    if (!lookups[table].table || r >= s.rows) return nullptr;
    return static_cast<const T*>(lookups[table].table) + Ids{lookups[table], s}[r] * s.dim;
  }

  template <bool kStream>
  void rows(int64_t begin, int64_t end, const Scratch& w) const {
    for (; begin < end; ++begin) row<kStream>(begin, w);
    if (kStream) stream_fence();
  }

  template <bool kStream>
  void row(int64_t r, const Scratch& w) const {
    const int64_t dim = s.dim;
    const T *const token = row_of(0, r), *const position = row_of(1, r), *const type = row_of(2, r);
    T* const out = this->out + r * dim;
    if (const T* const next = row_of(0, r + 1)) prefetch_row(next, dim);
    if (!position && !type && !w.weight && !w.factors) return copy<kStream>(token, out);
    const auto sum = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      auto v = lanes.load(token + i);
      if (position) v += lanes.load(position + i);
      if (type) v += lanes.load(type + i);
      return v;
    };
    const float* const factors = w.factors ? Dropper(s.drops).factors(r * dim, dim, w.factors) : nullptr;
    const auto finish = [&](int64_t i, auto v, auto lanes) __attribute__((always_inline)) {
      if (factors) v = dropped(v, lanes.load_ordered(factors + i));
      write<kStream>(out + i, v, lanes);
    };
    if (!w.weight)
      return for_each_pair<T>(0, dim, [&](int64_t i, auto lanes) { finish(i, sum(i, lanes), lanes); });
    const RowStatistics<T> seen(dim, true, w.centers, [&](int64_t i, auto lanes) {
      const auto v = lanes.rounded(sum(i, lanes));
      lanes.store(w.sums + i, v);
      return v;
    });
    const float m = seen.mean(), scale = float(1.0 / std::sqrt(double(seen.squares(m)) / dim + s.eps));
    if (mean) mean[r] = m, rstd[r] = scale;
    for_each_pair<T>(0, dim, [&](int64_t i, auto lanes) {
      auto v = (lanes.load(w.sums + i) - m) * scale * lanes.load(w.weight + i);
      if (w.bias) v += lanes.load(w.bias + i);
      finish(i, v, lanes);
    });
  }

  // As bits: a subnormal bfloat16 stays.
  template <bool kStream>
  void copy(const T* from, T* to) const {
    if constexpr (!kStream) {
      std::memcpy(to, from, s.dim * sizeof(T));
    } else {
      constexpr int64_t kVector = sizeof(F) / sizeof(T);
      for (int64_t i = 0; i < s.dim; i += kVector)
        stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
    }
  }
};

template <class T, class W>
void forward(const Lookup (&lookups)[3], const void* norm_weight, const void* norm_bias, void* out,
             float* mean, float* rstd, const EmbeddingShape& s, int threads) {
  const Job<T> job{lookups, static_cast<T*>(out), mean, rstd, s};
  const bool drops = s.drops.p > 0;
  const auto rows =
      streams(job.out, s.rows * s.dim, s.dim) ? &Job<T>::template rows<true> : &Job<T>::template rows<false>;
  parallel_for(s.rows, s.rows * s.dim, threads, [&](int64_t begin, int64_t end) {
    const int64_t dims = norm_weight ? s.dim : 0, centers = RowStatistics<T>::room(dims);
    const std::unique_ptr<float[]> floats(new float[2 * dims + centers + (drops ? s.dim + kDrawn : 0)]);
    const std::unique_ptr<T[]> sums(new T[dims]);
    float *const first = floats.get(), *const second = first + dims, *const third = second + dims;
    (job.*rows)(begin, end,
                {ordered<T>(static_cast<const W*>(norm_weight), dims, first),
                 ordered<T>(static_cast<const W*>(norm_bias), dims, second), sums.get(), third,
                 drops ? third + centers : nullptr});
  });
}

// Calls f(T{}, W{}) for the shape's two element types.
template <class Call>
void with_types(const EmbeddingShape& s, Call f) {
  const bool wide = s.norm_dtype == DType::f32;
  if (s.dtype == DType::f32) return f(float{}, float{});
  if (s.dtype == DType::bf16) return wide ? f(bf16{}, float{}) : f(bf16{}, bf16{});
  return wide ? f(f16{}, float{}) : f(f16{}, f16{});
}

}  // namespace

void embedding_forward(const Lookup (&lookups)[3], const void* norm_weight, const void* norm_bias, void* out,
                       float* mean, float* rstd, const EmbeddingShape& shape, int threads) {
  for (const Lookup& lookup : lookups) Ids{lookup, shape}.check();
  with_types(shape, [&](auto t, auto w) {
    forward<decltype(t), decltype(w)>(lookups, norm_weight, norm_bias, out, mean, rstd, shape, threads);
  });
}

}  // namespace lspm::cpu
