// A C entry to the CUDA kernel of nmf: returns what went wrong, or null.
#include "nmf.h"

#include "entry.h"

using lspm::Csr;

extern "C" {

const char* nmf_update(float* factors, const float* other_factors, const int64_t* indptr, const void* indices,
                       const float* values, Csr* csr, int64_t k, float reg, float eps, int device,
                       void* stream) {
  return message_of([&] {
    csr->indptr = indptr;
    csr->indices = indices;
    lspm::cuda::nmf_update(factors, other_factors, *csr, values, k, reg, eps, device, stream);
  });
}

Csr* nmf_matrix(int64_t rows, int64_t columns, int64_t entries, int wide) {
  static Csr csr;
  csr = {rows, columns, entries, nullptr, nullptr, wide != 0};
  return &csr;
}

}  // extern "C"
