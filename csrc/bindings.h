// What the files of bindings share: which backend they bind, and the check that every op begins with.
//
// They are compiled twice: as _C over lspm::cpu, and with LSPM_CUDA as _C_cuda over lspm::cuda.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "heads.h"
#include "tensor_view.h"

#ifdef LSPM_CUDA
#define LSPM_BACKEND cuda
constexpr int kDeviceType = 2;
#define WHERE(view, threads) (view).device_index(), (view).stream()
#else
#define LSPM_BACKEND cpu
constexpr int kDeviceType = 1;
#define WHERE(view, threads) threads
#endif
namespace lspm::LSPM_BACKEND {}
namespace backend = lspm::LSPM_BACKEND;

inline void check_first(const lspm::TensorView& x, const char* name) {
  if (x.t.device.device_type != kDeviceType)
    lspm::TensorView::refuse(name, "be on the device of this module");
  if (x.dtype() > lspm::DType::f16) lspm::TensorView::refuse(name, "be float32, bfloat16 or float16");
}

[[noreturn]] inline void refuse_value(const char* name, const std::string& rule, int64_t value) {
  throw std::invalid_argument(std::string(name) + " must " + rule + ", got " + std::to_string(value));
}

// x as (batch, heads, rows, dim), of q's dtype.
inline lspm::HeadsView heads_view(const lspm::TensorView& x, const char* name, const lspm::TensorView& q,
                                  int64_t batch, int64_t heads, int64_t rows, int64_t dim) {
  if (x.dim() != 4 || x.size(0) != batch || x.size(1) != heads || x.size(2) != rows || x.size(3) != dim)
    lspm::TensorView::refuse(name, "have the shape that the contract names");
  if (dim > 1 && x.stride(3) != 1) lspm::TensorView::refuse(name, "have a contiguous last dimension");
  return {x.data(name, q, q.dtype()), x.stride(0), x.stride(1), x.stride(2)};
}

inline void* optional(const lspm::OptionalView& view, const char* name, const lspm::TensorView& beside,
                      lspm::DType dtype, int64_t elements) {
  return view ? view->contiguous(name, beside, dtype, elements) : nullptr;
}

// One for each further file, called by the module's init.
using Bind = void(pybind11::module_& m);
Bind bind_activation, bind_adamw, bind_attention, bind_attention_with_kv_cache, bind_batch_norm_act,
    bind_conv2d, bind_cross_entropy, bind_embedding, bind_embedding_bag, bind_linear, bind_mf_als,
    bind_mf_sgd, bind_pool, bind_recommender, bind_rotary, bind_sample;
