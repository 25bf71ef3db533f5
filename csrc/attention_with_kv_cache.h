// What attention_with_kv_cache does before it attends: new keys and values go into the cache, in place, and
// queries and keys are rotated on the way, as rotary.h has it.
#pragma once
#include "heads.h"

namespace lspm {

struct AppendShape {
  int64_t batch, heads, kv_heads, queries, keys;  // of each sequence; keys: the new ones
  int64_t head_dim, value_dim;
  int64_t half;       // pairs that are rotated: 1 to head_dim / 2, or 0 where there are no cos and sin
  DType dtype;        // of all but the tables
  DType table_dtype;  // of cos and sin: dtype or f32
  bool interleaved;
  bool steps;  // query i is rotated by the position of key i, else each by that of key 0

  int64_t elements() const { return batch * (kv_heads * keys * (head_dim + value_dim) + turned()); }
  int64_t turned() const { return half ? heads * queries * head_dim : 0; }
};

namespace cpu {
// q: (batch, heads, queries, head_dim); turned: the same, rotated, an output. Where half is 0 neither is
// looked at. k, v: (batch, kv_heads, keys, dim), which become rows [counts[b] - keys, counts[b]) of sequence
// b of the caches. counts: (batch). cos, sin: (positions, half), of which row i is that of key i of the
// cache; or null.
void attention_with_kv_cache_append(const HeadsView& q, const HeadsView& k, const HeadsView& v,
                                    const HeadsView& turned, const HeadsView& k_cache,
                                    const HeadsView& v_cache, const int32_t* counts, const void* cos,
                                    const void* sin, const AppendShape& shape, int threads);
}  // namespace cpu

}  // namespace lspm
