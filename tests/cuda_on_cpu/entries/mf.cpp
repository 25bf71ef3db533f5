// C entries to the CUDA kernels of mf: each returns what went wrong, or null.
#include "mf.h"

#include "entry.h"

using lspm::MfShape;

extern "C" {

const char* mf_forward(const void* user_factors, const void* item_factors, const void* user_bias,
                       const void* item_bias, const int64_t* users, const int64_t* items, void* ratings,
                       float mean, const MfShape* shape, int device, void* stream) {
  return message_of([&] {
    lspm::cuda::mf_forward({user_factors, item_factors, user_bias, item_bias}, users, items, mean, ratings,
                           *shape, device, stream);
  });
}

const char* mf_backward(const void* dratings, const void* user_factors, const void* item_factors,
                        const int64_t* users, const int64_t* items, void* duser_factors, void* ditem_factors,
                        void* duser_bias, void* ditem_bias, const MfShape* shape, int device, void* stream) {
  return message_of([&] {
    lspm::cuda::mf_backward(dratings, {user_factors, item_factors, nullptr, nullptr}, users, items,
                            {duser_factors, ditem_factors, duser_bias, ditem_bias}, *shape, device, stream);
  });
}

// sizes: pairs, users, items, dim.
MfShape* mf_shape(const int64_t* n, int dtype) {
  static MfShape shape;
  shape = {n[0], n[1], n[2], n[3], static_cast<lspm::DType>(dtype)};
  return &shape;
}

}  // extern "C"
