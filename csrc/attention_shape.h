// What a call of attention is beside its tensors.
#pragma once
#include <cstdint>

#include "heads.h"

namespace lspm {

struct AttentionShape {
  int64_t batch, heads, kv_heads, queries, keys;  // heads is a multiple of kv_heads
  int64_t head_dim, value_dim;                    // 1 to 256
  DType dtype;                                    // of q, k, v, out and their gradients: f32, bf16 or f16
  int64_t left, right;                            // of the window; below 0: all
  int64_t shift;
  float scale, softcap;  // softcap 0: none
  double dropout;        // the share that is dropped, which is compared with 32 bits
  uint64_t seed;

  // Sequences of unequal lengths, of which `queries` and `keys` are the longest; then shift is keys - queries
  // of each. Null where all are as long. Starts have an end behind the last.
  const int32_t *query_starts = nullptr, *key_starts = nullptr;  // (batch + 1)
  const int32_t* key_counts = nullptr;                           // (batch), before key_starts
  int64_t packed = 0;  // rows of q to a head where there are query_starts

  LSPM_HOST_DEVICE int64_t group() const { return heads / kv_heads; }  // query heads to a key head

  // The shape of one sequence.
  LSPM_HOST_DEVICE AttentionShape of(int64_t batch) const {
    AttentionShape s = *this;
    if (query_starts) s.queries = query_starts[batch + 1] - query_starts[batch];
    if (key_counts)
      s.keys = key_counts[batch];
    else if (key_starts)
      s.keys = key_starts[batch + 1] - key_starts[batch];
    if (query_starts || key_starts || key_counts) s.shift = s.keys - s.queries;
    return s;
  }

  // Query i sees the keys [first_key(i), end_key(i)), none where that is empty. Both grow with i.
  LSPM_HOST_DEVICE int64_t first_key(int64_t query) const {
    const int64_t first = query + shift - left;
    return left < 0 || first < 0 ? 0 : first;
  }
  LSPM_HOST_DEVICE int64_t end_key(int64_t query) const {
    const int64_t end = query + shift + right + 1;
    return right < 0 || end > keys ? keys : end < 0 ? 0 : end;
  }

  // Rows of q in all, and of these a query's: lse, (batch, heads, queries) or packed (heads, rows), lies so.
  LSPM_HOST_DEVICE int64_t rows() const { return heads * (query_starts ? packed : batch * queries); }
  LSPM_HOST_DEVICE int64_t row(int64_t batch, int64_t head, int64_t query) const {
    return query_starts ? head * packed + query_starts[batch] + query
                        : (batch * heads + head) * queries + query;
  }
};

}  // namespace lspm
