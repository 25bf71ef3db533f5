// C entries to the CUDA kernels of attention: each returns what went wrong, or null.
#include "attention.h"

#include "entry.h"

using namespace lspm;

extern "C" {

const char* attention_forward(const HeadsView* q, const HeadsView* k, const HeadsView* v,
                              const AttentionExtras* extras, const HeadsView* out, float* lse,
                              float* statistics, float* scratch, int64_t splits, const AttentionShape* shape,
                              int device, void* stream) {
  return message_of([&] {
    cuda::attention_forward(*q, *k, *v, *extras, *out, lse, statistics, scratch, splits, *shape, device,
                            stream);
  });
}

const char* attention_backward(const HeadsView* dout, const float* dlse, const HeadsView* q,
                               const HeadsView* k, const HeadsView* v, const AttentionExtras* extras,
                               const HeadsView* out, const float* statistics, const HeadsView* dq,
                               const HeadsView* dk, const HeadsView* dv, float* delta,
                               const AttentionShape* shape, int device, void* stream) {
  return message_of([&] {
    cuda::attention_backward(*dout, dlse, *q, *k, *v, *extras, *out, statistics, *dq, *dk, *dv, delta, *shape,
                             device, stream);
  });
}

}  // extern "C"
