// C entries to the CUDA kernels of mf_als: each returns what went wrong, or null.
#include "mf_als.h"

#include "entry.h"

using lspm::Csr;
using lspm::MfAlsOptions;

extern "C" {

// The entries and what goes with each, in device memory; null for ones.
struct Entries {
  const int64_t* indptr;
  const void* indices;
  const float *values, *weight;
  int64_t rows, columns, count, wide;

  Csr csr() const { return {rows, columns, count, indptr, indices, wide != 0}; }
};

const char* mf_als_update(float* factors, const float* other_factors, const Entries* of, const float* gram,
                          int64_t k, const MfAlsOptions* options, int device, void* stream) {
  return message_of([&] {
    lspm::cuda::mf_als_update(factors, other_factors, of->csr(), of->values, of->weight, gram, k, *options,
                              device, stream);
  });
}

const char* mf_als_loss(const float* factors, const float* other_factors, const Entries* of,
                        const float* grams, int64_t* scratch, float* loss, int64_t k,
                        const MfAlsOptions* options, int device, void* stream) {
  return message_of([&] {
    lspm::cuda::mf_als_loss(factors, other_factors, of->csr(), of->values, of->weight, grams, scratch, loss,
                            k, *options, device, stream);
  });
}

}  // extern "C"
