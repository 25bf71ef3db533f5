// Appends to a cache of keys and values. A thread owns whole positions of a sequence: the angles of one are
// prepared once for all heads of q and k, and each row is read once and written once, where it will stay.
#include "attention_with_kv_cache.h"

#include <cstring>

#include "cpu/parallel.h"
#include "cpu/rotation.h"

namespace lspm::cpu {
namespace {

struct AppendViews {
  const HeadsView &q, &k, &v, &turned, &k_cache, &v_cache;
};

template <class T, class W, bool kInterleaved>
void append(const AppendViews& t, const int32_t* counts, const W* cos, const W* sin, const AppendShape& s,
            int threads) {
  const int64_t queries = s.half ? s.queries : 0, steps = std::max(queries, s.keys);
  parallel_for(s.batch * steps, s.elements(), threads, [&](int64_t begin, int64_t end) {
    Rotation<T, kInterleaved> rotation(s.half, s.head_dim);
    int64_t taken = -1;
    const auto turn_to = [&](int64_t position) {
      if (!s.half || position == taken) return;
      rotation.take(cos + position * s.half, sin + position * s.half, 1.0f);
      taken = position;
    };
    for (; begin < end; ++begin) {
      const int64_t b = begin / steps, i = begin % steps, first = counts[b] - s.keys, at = first + i;
      if (i < s.keys) {
        turn_to(at);
        rotation.template rows<false>(t.k.at<const T>(b, 0, i), t.k.head_stride, t.k_cache.at<T>(b, 0, at),
                                      t.k_cache.head_stride, s.kv_heads);
        const T* from = t.v.at<const T>(b, 0, i);
        T* to = t.v_cache.at<T>(b, 0, at);
        for (int64_t h = 0; h < s.kv_heads; ++h, from += t.v.head_stride, to += t.v_cache.head_stride)
          std::memcpy(to, from, s.value_dim * sizeof(T));
      }
      if (i < queries) {
        turn_to(s.steps ? at : first);
        rotation.template rows<false>(t.q.at<const T>(b, 0, i), t.q.head_stride, t.turned.at<T>(b, 0, i),
                                      t.turned.head_stride, s.heads);
      }
    }
  });
}

}  // namespace

void attention_with_kv_cache_append(const HeadsView& q, const HeadsView& k, const HeadsView& v,
                                    const HeadsView& turned, const HeadsView& k_cache,
                                    const HeadsView& v_cache, const int32_t* counts, const void* cos,
                                    const void* sin, const AppendShape& shape, int threads) {
  const AppendViews views{q, k, v, turned, k_cache, v_cache};
  with_types(shape.dtype, shape.table_dtype, [&](auto type, auto table_type) {
    using T = decltype(type);
    using W = decltype(table_type);
    const auto run = shape.interleaved ? &append<T, W, true> : &append<T, W, false>;
    run(views, counts, static_cast<const W*>(cos), static_cast<const W*>(sin), shape, threads);
  });
}

}  // namespace lspm::cpu
