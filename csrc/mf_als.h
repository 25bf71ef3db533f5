// One half sweep of alternating least squares: each row x of factors is solved for given other_factors Y.
//
// Explicit: (sum over entries of w y y' + l I) x = sum of w v y. Implicit, with the confidence 1 + alpha v:
// (Y'Y + sum of alpha v y y' + l I) x = sum of (1 + alpha v) y. l = reg * n ** reg_exponent for n entries.
#pragma once
#include <cfloat>
#include <cstdint>

#include "csr.h"

namespace lspm {

struct MfAlsOptions {
  float reg, reg_exponent, alpha;
  bool implicit;
  int64_t steps;  // of conjugate gradient; 0: Cholesky
};

// Conjugate gradient stops where r has come down to this part of the first one, or the curvature to that of
// the steepest, which rounding alone leaves; and where <r, r> is so small that products lose bits.
constexpr float kStepEpsilon = FLT_EPSILON, kStepLost = FLT_MIN / FLT_EPSILON;

namespace cpu {
// factors: (rows, K). other_factors: (columns, K). values, weight: (entries), or null for ones.
// failed: the first row with an index that is none, and the first whose matrix is not positive definite; both
// stay as they were; -1 where there is none.
void mf_als_update(float* factors, const float* other_factors, const Csr& csr, const float* values,
                   const float* weight, int64_t* failed, int64_t k, const MfAlsOptions& options, int threads);
// loss: the objective of all rows and columns, rounded to float; NaN where an index is none.
void mf_als_loss(const float* factors, const float* other_factors, const Csr& csr, const float* values,
                 const float* weight, float* loss, int64_t k, const MfAlsOptions& options, int threads);
}  // namespace cpu

namespace cuda {
// The same on GPU `device`, queued on `stream`, a cudaStream_t, for k of at most 512 by conjugate gradient
// and 248 by Cholesky. An index that is none counts as a row of zeros; a row whose matrix is not positive
// definite becomes NaN. gram: Y'Y where implicit, or null. A failure of CUDA throws std::runtime_error.
void mf_als_update(float* factors, const float* other_factors, const Csr& csr, const float* values,
                   const float* weight, const float* gram, int64_t k, const MfAlsOptions& options, int device,
                   void* stream);
// For k of at most 1024. grams: X'X and then Y'Y where implicit, or null. scratch: 2 * kMfAlsLossParts
// + columns zeros.
constexpr int kMfAlsLossParts = 1024;
void mf_als_loss(const float* factors, const float* other_factors, const Csr& csr, const float* values,
                 const float* weight, const float* grams, int64_t* scratch, float* loss, int64_t k,
                 const MfAlsOptions& options, int device, void* stream);
}  // namespace cuda

}  // namespace lspm
