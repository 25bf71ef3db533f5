// What the files of bindings share: which backend they bind, and the check that every op begins with.
//
// They are compiled twice: as _C over lspm::cpu, and with LSPM_CUDA as _C_cuda over lspm::cuda.
#pragma once
#include <pybind11/pybind11.h>

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

inline void* optional(const lspm::OptionalView& view, const char* name, const lspm::TensorView& beside,
                      lspm::DType dtype, int64_t elements) {
  return view ? view->contiguous(name, beside, dtype, elements) : nullptr;
}

// One for each further file, called by the module's init.
void bind_attention(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_pool(pybind11::module_& m);
void bind_rotary(pybind11::module_& m);
