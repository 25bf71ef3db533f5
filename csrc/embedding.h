// The rows of up to three tables that stand for a token, added up, normalised and dropped of: what comes
// before the first block of a transformer.
//
//   s[r] = weight[tokens[r]] + position_weight[positions[r]] + token_type_weight[token_types[r]]
//   out[r] = dropout((s[r] - mean) * rstd * norm_weight + norm_bias)
//
// Where there is a norm, s is rounded to its dtype before the statistics are taken, as in layer_norm.h, whose
// backward takes it. That of a table is embedding_bag.h's, of bags of one index.
#pragma once
#include <cstdint>

#include "dropout.h"

namespace lspm {

// A table, or null, and which of its rows each row of out takes.
struct Lookup {
  const void *table, *ids;  // ids null: row first + r % length
  int64_t rows;             // of the table
  const char* name;         // of ids, for messages
};

struct EmbeddingShape {
  int64_t rows, dim;      // of out
  int64_t length, first;  // of the positions that are not given
  DType dtype;            // of tables and out: f32, bf16 or f16
  DType id_dtype;         // i32 or i64
  DType norm_dtype;       // norm_weight, norm_bias: dtype or f32
  float eps;
  Drops drops;
};

namespace cpu {
// lookups: tokens, positions, token types; only the first has no null table. norm_weight: (dim), or null for
// no norm, where norm_bias, mean and rstd are null too. norm_bias: or null. mean, rstd: (rows), or null.
// Throws std::invalid_argument, before anything is written, where an id lies outside its table.
void embedding_forward(const Lookup (&lookups)[3], const void* norm_weight, const void* norm_bias, void* out,
                       float* mean, float* rstd, const EmbeddingShape& shape, int threads);
}  // namespace cpu

}  // namespace lspm
