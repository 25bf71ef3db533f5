// Embedding bags. A thread takes some bags at a time and owns their outputs, whose sums stay in registers;
// rows are asked for before they are needed, as each is a place of its own in memory. The gradient of the
// table is written row by row from sorted indices, that of per_sample_weights bag by bag. Bytes, with rows of
// s bytes: forward s an index and s a bag; backward s a row of the table and, from the cache, s an index.
#include "cpu/bags.h"

namespace lspm::cpu {
namespace {

template <class T, class I>
void forward(const T* weight, const TypedBags<T, I>& bags, T* out, int threads) {
  const EmbeddingBagShape& s = bags.s;
  const int64_t ahead = rows_ahead<T>(s.dim);
  bags.for_each_run((s.indices + s.bags) * s.dim, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = bags.begin(b), count = bags.end(b) - begin;
      const float share = bags.share(b);
      const auto row = [&](int64_t i) {
        return bags.padded(begin + i) ? nullptr : weight + int64_t(bags.indices[begin + i]) * s.dim;
      };
      const auto later = [&](int64_t i) {
        return weight + int64_t(bags.indices[std::min(begin + i + ahead, s.indices - 1)]) * s.dim;
      };
      const auto store = [&](int64_t d, F sums, auto lanes) {
        lanes.store(out + b * s.dim + d, sums * share);
      };
      const auto with = [&](auto scale) { add_rows(s.dim, count, row, scale, later, store); };
      if (bags.weights)
        with([&](int64_t i) { return to_float(bags.weights[begin + i]); });
      else
        with([](int64_t) { return One{}; });
    }
  });
}

// Every row is written once: with its gradient, or with 0 behind the one before it.
template <class T, class I>
void backward_of_table(const T* dout, const TypedBags<T, I>& bags, T* dweight, int threads) {
  const EmbeddingBagShape& s = bags.s;
  const SortedBags<T, I> sorted(bags, threads);
  prepare_output(dweight, s.rows * s.dim);
  const auto clear = [&](int64_t from, int64_t to) {
    if (from < to) std::memset(dweight + from * s.dim, 0, (to - from) * s.dim * sizeof(T));
  };
  const int64_t none = sorted.count() ? sorted.row(0) : s.rows;
  parallel_for(none, none * s.dim, threads, clear);
  sorted.for_each_row(threads, [&](auto rows) {
    rows([&](int64_t first) {
      T* const to = dweight + sorted.row(first) * s.dim;
      const int64_t last = sorted.gradient(
          dout, first, [](int64_t) {}, [&](int64_t d, F sums, auto lanes) { lanes.store(to + d, sums); });
      clear(sorted.row(first) + 1, last < sorted.count() ? sorted.row(last) : s.rows);
      return last;
    });
  });
}

// That of an index is the product of its row with its bag's gradient.
template <class T, class I>
void backward_of_weights(const T* dout, const T* weight, const TypedBags<T, I>& bags, T* dweights,
                         int threads) {
  const EmbeddingBagShape& s = bags.s;
  const int64_t ahead = rows_ahead<T>(s.dim);
  bags.for_each_run(s.indices * s.dim, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      for (int64_t p = bags.begin(b); p < bags.end(b); ++p) {
        if (p + ahead < s.indices) prefetch_row(weight + int64_t(bags.indices[p + ahead]) * s.dim, s.dim);
        const T* const row = weight + int64_t(bags.indices[p]) * s.dim;
        WideSum products;
        if (!bags.padded(p))
          for_each_vector(s.dim, [&](int64_t d, auto lanes) {
            products.add(d, lanes.load(row + d) * lanes.load(dout + b * s.dim + d));
          });
        FirstLanes{1}.store(dweights + p, broadcast(float(products.total())));
      }
  });
}

}  // namespace

void embedding_bag_forward(const void* weight, const Bags& bags, void* out, const EmbeddingBagShape& shape,
                           int threads) {
  with_types(shape, [&](auto element, auto index) {
    using T = decltype(element);
    const TypedBags<T, decltype(index)> typed(bags, shape);
    typed.check("embedding_bag");
    forward(static_cast<const T*>(weight), typed, static_cast<T*>(out), threads);
  });
}

void embedding_bag_backward(const void* dout, const void* weight, const Bags& bags, void* dweight,
                            void* dweights, const EmbeddingBagShape& shape, int threads) {
  with_types(shape, [&](auto element, auto index) {
    using T = decltype(element);
    const TypedBags<T, decltype(index)> typed(bags, shape);
    typed.check("embedding_bag");
    const T* const gradient = static_cast<const T*>(dout);
    if (dweight) backward_of_table(gradient, typed, static_cast<T*>(dweight), threads);
    if (dweights)
      backward_of_weights(gradient, static_cast<const T*>(weight), typed, static_cast<T*>(dweights), threads);
  });
}

}  // namespace lspm::cpu
