// adamw.
#ifndef LSPM_CUDA
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "adamw.h"
#include "bindings.h"

namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

using TensorList = std::vector<TensorView>;

// Whether the elements lie side by side, in any order of the dimensions.
bool has_no_gaps(const TensorView& x) {
  const int64_t count = x.numel();
  for (int64_t side = 1; side < count;) {
    int d = 0;
    while (d < x.dim() && (x.size(d) == 1 || x.stride(d) != side)) ++d;
    if (d == x.dim()) return false;
    side *= x.size(d);
  }
  return true;
}

bool lies_as(const TensorView& x, const TensorView& other) {
  if (x.dim() != other.dim()) return false;
  bool same = true;
  for (int d = 0; d < x.dim(); ++d)
    same = same && x.size(d) == other.size(d) && (x.size(d) == 1 || x.stride(d) == other.stride(d));
  return same;
}

// The i-th of a list, or null where there is no list.
void* data(const TensorList& views, size_t i, const char* name, const TensorList& params, DType dtype) {
  if (views.empty()) return nullptr;
  if (views.size() != params.size()) TensorView::refuse(name, "be as many as params");
  const int64_t elements = params[i].numel();
  if (views[i].numel() != elements || (elements && !lies_as(views[i], params[i])))
    TensorView::refuse(name, "have the sizes and strides of params");
  return views[i].data(name, params[0], dtype);
}

// numbers: lr, beta1, beta2, eps and weight_decay.
void adamw_update(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                  const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                  const TensorList& master_params, const OptionalView& scale,
                  const std::vector<int64_t>& steps, const std::array<double, 5>& numbers, bool maximize,
                  const std::optional<uint64_t>& seed, int threads) {
  if (params.empty()) return;
  check_first(params[0], "params");
  const auto count = params.size();
  for (const auto* views : {&grads, &exp_avgs, &exp_avg_sqs})
    if (views->size() != count) TensorView::refuse("grads, exp_avgs and exp_avg_sqs", "be as many as params");
  if (steps.size() != count) TensorView::refuse("steps", "be as many as params");
  const auto& [lr, beta1, beta2, eps, weight_decay] = numbers;
  const lspm::AdamwStep step{
      params[0].dtype(), exp_avgs[0].dtype(), lr, beta1, beta2, eps, weight_decay, maximize,
      seed.has_value(),  seed.value_or(0)};
  if (step.state_dtype != step.dtype && step.state_dtype != DType::f32)
    TensorView::refuse("exp_avgs", "be of params' dtype or float32");
  if (!master_params.empty() && (step.dtype == DType::f32 || step.state_dtype != DType::f32))
    TensorView::refuse("master_params", "be there beside half params and float32 exp_avgs alone");
  if (seed && (step.dtype != DType::bf16 || !master_params.empty()))
    TensorView::refuse("params", "be bfloat16 without master_params where there is a seed");
  std::vector<lspm::AdamwTensor> tensors;
  for (size_t i = 0; i < count; ++i) {
    if (!has_no_gaps(params[i])) TensorView::refuse("params", "have no gaps");
    tensors.push_back({data(params, i, "params", params, step.dtype),
                       data(grads, i, "grads", params, step.dtype),
                       data(exp_avgs, i, "exp_avgs", params, step.state_dtype),
                       data(exp_avg_sqs, i, "exp_avg_sqs", params, step.state_dtype),
                       data(max_exp_avg_sqs, i, "max_exp_avg_sqs", params, step.state_dtype),
                       static_cast<float*>(data(master_params, i, "master_params", params, DType::f32)),
                       params[i].numel(), steps[i]});
  }
  const auto* factor = static_cast<const float*>(optional(scale, "scale", params[0], DType::f32, 1));
  py::gil_scoped_release unlocked;
  lspm::cpu::adamw_update(tensors.data(), int64_t(count), factor, step, threads);
}

void adamw_norm(const TensorList& grads, const TensorView& norm, int threads) {
  if (grads.empty()) TensorView::refuse("grads", "be one tensor or more");
  check_first(grads[0], "grads");
  std::vector<lspm::AdamwGrad> tensors;
  for (const auto& grad : grads) {
    if (!has_no_gaps(grad)) TensorView::refuse("grads", "have no gaps");
    tensors.push_back({grad.data("grads", grads[0], grads[0].dtype()), grad.numel()});
  }
  auto* const result = static_cast<float*>(norm.contiguous("norm", grads[0], DType::f32, 1));
  py::gil_scoped_release unlocked;
  lspm::cpu::adamw_norm(tensors.data(), int64_t(tensors.size()), grads[0].dtype(), result, threads);
}

// Adds 1 to each of the steps, float32 as torch has them, and tells them: in torch 148 additions take longer
// than small tensors' step.
void adamw_count(const TensorList& steps, const TensorView& counts) {
  if (steps.empty()) return;
  check_first(steps[0], "steps");
  auto* const told = static_cast<int64_t*>(counts.contiguous("counts", steps[0], DType::i64, steps.size()));
  for (size_t i = 0; i < steps.size(); ++i) {
    auto* const step = static_cast<float*>(steps[i].contiguous("steps", steps[0], DType::f32, 1));
    told[i] = int64_t(*step += 1);
  }
}

}  // namespace

void bind_adamw(py::module_& m) {
  m.def("adamw_count", &adamw_count, py::arg("steps"), py::arg("counts"));
  m.def("adamw_norm", &adamw_norm, py::arg("grads"), py::arg("norm"), py::arg("threads"));
  m.def("adamw_update", &adamw_update, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"),
        py::arg("exp_avg_sqs"), py::arg("max_exp_avg_sqs"), py::arg("master_params"),
        py::arg("scale").none(true), py::arg("steps"), py::arg("numbers"), py::arg("maximize"),
        py::arg("seed").none(true), py::arg("threads"));
}
#endif
