// cross_entropy_forward and cross_entropy_backward.
#include <pybind11/stl.h>

#include "bindings.h"
#include "cross_entropy.h"

namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

// A call: its shape, and the arguments that forward and backward share.
struct CrossEntropyCall {
  lspm::CrossEntropyShape shape;
  const void *logits, *target;
  const float* weight;

  CrossEntropyCall(const TensorView& x, const TensorView& t, const OptionalView& w, int64_t ignore_index,
                   int reduction, float smoothing) {
    check_first(x, "logits");
    if (x.dim() != 2) TensorView::refuse("logits", "have 2 dimensions");
    if (reduction < 0 || reduction > 2) TensorView::refuse("reduction", "be 0, 1 or 2");
    shape = {x.size(0),
             x.size(1),
             ignore_index,
             smoothing,
             static_cast<lspm::Reduction>(reduction),
             x.dtype(),
             t.dtype() != DType::i64};
    const auto& s = shape;
    logits = x.contiguous("logits", x, s.dtype, s.rows * s.classes);
    target = t.contiguous("target", x, s.probabilities ? s.dtype : DType::i64,
                          s.probabilities ? s.rows * s.classes : s.rows);
    weight = static_cast<const float*>(optional(w, "weight", x, DType::f32, s.classes));
  }
};

void cross_entropy_forward(const TensorView& logits, const TensorView& target, const OptionalView& weight,
                           const TensorView& loss, const OptionalView& statistics,
                           [[maybe_unused]] const OptionalView& row_losses, int64_t ignore_index,
                           int reduction, float smoothing, [[maybe_unused]] int threads) {
  const CrossEntropyCall call(logits, target, weight, ignore_index, reduction, smoothing);
  const auto& s = call.shape;
  void* pl = loss.contiguous("loss", logits, s.dtype, s.losses());
  auto* ps = static_cast<float*>(optional(statistics, "statistics", logits, DType::f32, s.statistics()));
#ifdef LSPM_CUDA
  auto* pr = static_cast<float*>(optional(row_losses, "row_losses", logits, DType::f32, 2 * s.rows));
  if (!statistics || !row_losses) TensorView::refuse("statistics", "be there, and row_losses");
  py::gil_scoped_release unlocked;
  backend::cross_entropy_forward(call.logits, call.target, call.weight, pl, ps, pr, s, WHERE(logits, 0));
#else
  py::gil_scoped_release unlocked;
  backend::cross_entropy_forward(call.logits, call.target, call.weight, pl, ps, s, threads);
#endif
}

void cross_entropy_backward(const TensorView& dloss, const TensorView& logits, const TensorView& target,
                            const OptionalView& weight, const TensorView& statistics,
                            const TensorView& dlogits, int64_t ignore_index, int reduction, float smoothing,
                            [[maybe_unused]] int threads) {
  const CrossEntropyCall call(logits, target, weight, ignore_index, reduction, smoothing);
  const auto& s = call.shape;
  void* pdl = dloss.contiguous("dloss", logits, s.dtype, s.losses());
  auto* ps = static_cast<float*>(statistics.contiguous("statistics", logits, DType::f32, s.statistics()));
  void* pdx = dlogits.contiguous("dlogits", logits, s.dtype, s.rows * s.classes);
  py::gil_scoped_release unlocked;
  backend::cross_entropy_backward(pdl, call.logits, call.target, call.weight, ps, pdx, s,
                                  WHERE(logits, threads));
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy_forward", &cross_entropy_forward, py::arg("logits"), py::arg("target"),
        py::arg("weight").none(true), py::arg("loss"), py::arg("statistics").none(true),
        py::arg("row_losses").none(true), py::arg("ignore_index"), py::arg("reduction"), py::arg("smoothing"),
        py::arg("threads"));
  m.def("cross_entropy_backward", &cross_entropy_backward, py::arg("dloss"), py::arg("logits"),
        py::arg("target"), py::arg("weight").none(true), py::arg("statistics"), py::arg("dlogits"),
        py::arg("ignore_index"), py::arg("reduction"), py::arg("smoothing"), py::arg("threads"));
}
