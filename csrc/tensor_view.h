// TensorView: what a kernel needs to know of a torch.Tensor, with no torch header.
//
// pybind11 converts a tensor argument to a TensorView through DLPack's C exchange API, which torch.Tensor
// offers as a capsule. The view borrows: it is valid during the call only.
#pragma once
#include <pybind11/pybind11.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "dlpack.h"
#include "dtype.h"

namespace lspm {

// torch.Tensor and its DLPack function table; set by init_tensor_api() when a module is imported.
inline PyTypeObject* tensor_type = nullptr;
inline const DLPackExchangeAPI* dlpack = nullptr;

inline void init_tensor_api() {
  pybind11::object type = pybind11::module_::import("torch").attr("Tensor");
  if (!pybind11::hasattr(type, "__dlpack_c_exchange_api__"))
    throw pybind11::import_error("this torch has no DLPack C exchange API: torch 2.13 or later is needed");
  pybind11::capsule capsule = type.attr("__dlpack_c_exchange_api__");
  dlpack = capsule.get_pointer<const DLPackExchangeAPI>();
  if (dlpack->version.major != 1) throw pybind11::import_error("this torch speaks another version of DLPack");
  tensor_type = reinterpret_cast<PyTypeObject*>(type.release().ptr());  // kept for good
}

struct TensorView {
  DLTensor t{};

  int dim() const { return t.ndim; }
  int64_t size(int d) const {
    if (d < 0) d += t.ndim;
    if (d < 0 || d >= t.ndim) throw std::invalid_argument("a tensor has too few dimensions");
    return t.shape[d];
  }
  int64_t stride(int d) const { return t.strides[d < 0 ? d + t.ndim : d]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < t.ndim; ++d) n *= t.shape[d];
    return n;
  }
  int device_index() const { return t.device.device_id; }

  // torch's current stream on this tensor's device, a cudaStream_t.
  void* stream() const {
    void* stream = nullptr;
    if (dlpack->current_work_stream(t.device.device_type, t.device.device_id, &stream) != 0)
      throw pybind11::error_already_set();
    return stream;
  }

  DType dtype() const {
    switch (t.dtype.code << 8 | t.dtype.bits) {
      case 0x220:
        return DType::f32;
      case 0x410:
        return DType::bf16;
      case 0x210:
        return DType::f16;
      case 0x040:
        return DType::i64;
      case 0x020:
        return DType::i32;
      case 0x608:
        return DType::b8;
      case 0x108:
        return DType::u8;
      case 0x008:
        return DType::i8;
      default:
        return DType::other;
    }
  }
  bool is_contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int d = t.ndim - 1; d >= 0 && expected; --d) {  // of no elements, strides say nothing
      if (t.shape[d] > 1 && t.strides[d] != expected) return false;
      expected *= t.shape[d];
    }
    return true;
  }

  // The data, after the checks that keep a kernel from touching what is not the tensor's. Python has checked
  // the same and said it better; these stand between a mistake there and the memory.
  void* data(const char* name, const TensorView& beside, DType expected) const {
    if (t.device.device_type != beside.t.device.device_type ||
        t.device.device_id != beside.t.device.device_id)
      refuse(name, "be on the device of the others");
    if (dtype() != expected) refuse(name, "have the dtype that the contract names");
    if (!t.data && numel()) refuse(name, "have data");  // a fake tensor has none
    return static_cast<char*>(t.data) + t.byte_offset;
  }
  void* contiguous(const char* name, const TensorView& beside, DType expected, int64_t elements) const {
    if (!is_contiguous()) refuse(name, "be contiguous");
    if (numel() != elements) refuse(name, "have another number of elements");
    return data(name, beside, expected);
  }

  [[noreturn]] static void refuse(const char* name, const char* rule) {
    throw std::invalid_argument(std::string(name) + " must " + rule);
  }
};

using OptionalView = std::optional<TensorView>;

}  // namespace lspm

namespace pybind11::detail {
template <>
struct type_caster<lspm::TensorView> {
  PYBIND11_TYPE_CASTER(lspm::TensorView, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    if (!PyObject_TypeCheck(source.ptr(), lspm::tensor_type)) return false;
    if (lspm::dlpack->dltensor_from_py_object_no_sync(source.ptr(), &value.t) != 0) throw error_already_set();
    return true;
  }
};
}  // namespace pybind11::detail
