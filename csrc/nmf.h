// One multiplicative update of the rows p of factors, over the observed entries of a non-negative matrix.
//
//   p_f *= (sum over entries of v y_f) / (sum of <p, y> y_f + n reg p_f + eps)        for n entries
#pragma once
#include <cstdint>

#include "csr.h"

namespace lspm {

namespace cpu {
// factors: (rows, K). other_factors: (columns, K). values: (entries). failed: the first row with an index
// that is none, which stays as it was; -1 where there is none.
void nmf_update(float* factors, const float* other_factors, const Csr& csr, const float* values,
                int64_t* failed, int64_t k, float reg, float eps, int threads);
}  // namespace cpu

namespace cuda {
// The same for k of at most 1024 on GPU `device`, queued on `stream`, a cudaStream_t; an index that is none
// counts as a row of zeros. A failure of CUDA throws std::runtime_error.
void nmf_update(float* factors, const float* other_factors, const Csr& csr, const float* values, int64_t k,
                float reg, float eps, int device, void* stream);
}  // namespace cuda

}  // namespace lspm
