// One token of each row of logits, drawn from what temperature, top-k, top-p and min-p leave of its softmax.
//
//   score = logit of a token, of those in `previous` logit / penalty, or logit * penalty where it is negative
//   w = exp((score - largest score) / temperature); u = floor(2 ** 40 * w), and 0 where w < exp(-27.5)
//
// A token stays where its score is at least the k-th largest; then where the u of all tokens of a larger w
// sum to less than top_p of those of all that have stayed; then where w >= min_p. Equal ones stay together.
// What stays is drawn with a probability in proportion to u, or by an exponential race of w, which is
// Gumbel's maximum. A temperature of 0 takes the largest score, of equal ones the first.
//
// Sums are of integers, and exp and log of operations that round in one way, so tokens are the same for any
// order of sums, number of threads, instruction set and backend. Random bits depend on seed and row alone.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace lspm {

struct SampleShape {
  int64_t rows, tokens;  // from 1 to 2 ** 21 - 1 tokens, so that their u and its product with 31 bits fit
  int64_t previous;      // tokens of a row that the penalty is for
  DType dtype;           // of logits: f32, bf16 or f16
};

struct SampleOptions {
  float temperature;  // where no tensor has it
  int64_t top_k;      // from 1 on
  double top_p;       // above 0; 1: all
  float min_p, penalty;
  bool gumbel;
  uint64_t seed;
};

namespace cpu {
// logits: (rows, tokens). temperature: (rows), or null. previous: (rows, shape.previous), below 0 where there
// is none, or null. drawn: (rows). log_probability: (rows), or null: of the token among those that stay.
// A row without a distribution, as it has a NaN, infinity or no number above -infinity or its temperature is
// negative or NaN, gives -1 and NaN. A previous token from `tokens` on throws std::invalid_argument before
// anything is written.
void sample_forward(const void* logits, const float* temperature, const int64_t* previous, int64_t* drawn,
                    float* log_probability, const SampleShape& shape, const SampleOptions& options,
                    int threads);
}  // namespace cpu

}  // namespace lspm
