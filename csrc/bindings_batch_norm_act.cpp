// batch_norm_act: the statistics of a batch, the forward, the sums that the backward needs, the backward.
#include <pybind11/stl.h>

#include <cmath>
#include <string>

#include "batch_norm_act.h"
#include "bindings.h"

namespace py = pybind11;
using lspm::BatchNormActChannels;
using lspm::BatchNormActShape;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

// x is (..., channels).
BatchNormActShape shape_of(const TensorView& x, int64_t partials, float eps, int activation) {
  check_first(x, "x");
  if (activation < 0 || activation > int(lspm::Activation::gelu))
    TensorView::refuse("activation", "be 0 to 4");
  const int64_t channels = x.size(-1);
  return {channels ? x.numel() / channels : 0, channels, partials, x.dtype(),
          lspm::Activation(activation),        eps};
}

float* vector(const TensorView& t, const char* name, const TensorView& x, int64_t elements) {
  return static_cast<float*>(t.contiguous(name, x, DType::f32, elements));
}

BatchNormActChannels channels_of(const OptionalView& weight, const OptionalView& bias, const TensorView& mean,
                                 const TensorView& variance, const TensorView& x, int64_t channels) {
  const auto may_lack = [&](const OptionalView& t, const char* name) {
    return t ? vector(*t, name, x, channels) : nullptr;
  };
  return {may_lack(weight, "weight"), may_lack(bias, "bias"), vector(mean, "mean", x, channels),
          vector(variance, "variance", x, channels)};
}

#ifndef LSPM_CUDA
void check_running(const BatchNormActChannels& known, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    const bool mean = std::isfinite(known.mean[c]);
    if (mean && std::isfinite(known.variance[c]) && known.variance[c] >= 0) continue;
    throw std::invalid_argument(
        std::string("batch_norm_act: ") +
        (mean ? "running_var must be finite and not negative" : "running_mean must be finite") + ", got " +
        std::to_string(mean ? known.variance[c] : known.mean[c]) + " in channel " + std::to_string(c));
  }
}
#endif

void batch_norm_act_statistics(const OptionalView& x, const TensorView& partial, const TensorView& mean,
                               const TensorView& variance, [[maybe_unused]] int threads) {
  if (partial.dim() != 3) TensorView::refuse("partial", "have 3 dimensions");
  if (x && !x->numel()) TensorView::refuse("x", "have elements, or be None where partial is filled");
  const int64_t partials = partial.size(0), channels = partial.size(2);
  const TensorView& first = x ? *x : partial;
  auto s = shape_of(first, partials, 0, 0);
  if (!x) s.rows = 0;
  void* px = optional(x, "x", first, s.dtype, s.rows * channels);
  float *pp = vector(partial, "partial", first, 3 * partials * channels),
        *pm = vector(mean, "mean", first, channels), *pv = vector(variance, "variance", first, channels);
  py::gil_scoped_release unlocked;
  backend::batch_norm_act_statistics(px, pp, pm, pv, s, WHERE(first, threads));
}

void batch_norm_act_forward(const TensorView& x, const OptionalView& residual, const OptionalView& weight,
                            const OptionalView& bias, const TensorView& mean, const TensorView& variance,
                            const TensorView& y, float eps, int activation, [[maybe_unused]] bool running,
                            [[maybe_unused]] int threads) {
  const auto s = shape_of(x, 0, eps, activation);
  const int64_t n = s.rows * s.channels;
  void *px = x.contiguous("x", x, s.dtype, n), *pr = optional(residual, "residual", x, s.dtype, n);
  const auto known = channels_of(weight, bias, mean, variance, x, s.channels);
  void* py = y.contiguous("y", x, s.dtype, n);
#ifndef LSPM_CUDA
  if (running) check_running(known, s.channels);
#endif
  py::gil_scoped_release unlocked;
  backend::batch_norm_act_forward(px, pr, known, py, s, WHERE(x, threads));
}

void batch_norm_act_sums(const TensorView& dy, const TensorView& x, const OptionalView& beside,
                         const OptionalView& weight, const OptionalView& bias, const TensorView& mean,
                         const TensorView& variance, const OptionalView& dresidual, const TensorView& partial,
                         const TensorView& sums, float eps, int activation, [[maybe_unused]] int threads) {
  const auto s = shape_of(dy, partial.size(0), eps, activation);
  const int64_t n = s.rows * s.channels;
  void *pdy = dy.contiguous("dy", dy, s.dtype, n), *px = x.contiguous("x", dy, s.dtype, n);
  void* pb = optional(beside, "beside", dy, s.dtype, n);
  const auto known = channels_of(weight, bias, mean, variance, dy, s.channels);
  void* pd = optional(dresidual, "dresidual", dy, s.dtype, n);
  float* pp = vector(partial, "partial", dy, 2 * s.partials * s.channels);
  float* ps = vector(sums, "sums", dy, 2 * s.channels);
  py::gil_scoped_release unlocked;
  backend::batch_norm_act_sums({pdy, px, pb}, known, pd, pp, ps, s, WHERE(dy, threads));
}

void batch_norm_act_backward(const TensorView& dy, const TensorView& x, const OptionalView& beside,
                             const OptionalView& weight, const OptionalView& bias, const TensorView& mean,
                             const TensorView& variance, const OptionalView& sums, const TensorView& dx,
                             float eps, int activation, [[maybe_unused]] int threads) {
  const auto s = shape_of(dy, 0, eps, activation);
  const int64_t n = s.rows * s.channels;
  void *pdy = dy.contiguous("dy", dy, s.dtype, n), *px = x.contiguous("x", dy, s.dtype, n);
  void* pb = optional(beside, "beside", dy, s.dtype, n);
  const auto known = channels_of(weight, bias, mean, variance, dy, s.channels);
  const float* ps = sums ? vector(*sums, "sums", dy, 2 * s.channels) : nullptr;
  void* pdx = dx.contiguous("dx", dy, s.dtype, n);
  py::gil_scoped_release unlocked;
  backend::batch_norm_act_backward({pdy, px, pb}, known, ps, pdx, s, WHERE(dy, threads));
}

}  // namespace

void bind_batch_norm_act(py::module_& m) {
  m.def("batch_norm_act_statistics", &batch_norm_act_statistics, py::arg("x").none(true), py::arg("partial"),
        py::arg("mean"), py::arg("variance"), py::arg("threads"));
  m.def("batch_norm_act_forward", &batch_norm_act_forward, py::arg("x"), py::arg("residual").none(true),
        py::arg("weight").none(true), py::arg("bias").none(true), py::arg("mean"), py::arg("variance"),
        py::arg("y"), py::arg("eps"), py::arg("activation"), py::arg("running"), py::arg("threads"));
  m.def("batch_norm_act_sums", &batch_norm_act_sums, py::arg("dy"), py::arg("x"),
        py::arg("beside").none(true), py::arg("weight").none(true), py::arg("bias").none(true),
        py::arg("mean"), py::arg("variance"), py::arg("dresidual").none(true), py::arg("partial"),
        py::arg("sums"), py::arg("eps"), py::arg("activation"), py::arg("threads"));
  m.def("batch_norm_act_backward", &batch_norm_act_backward, py::arg("dy"), py::arg("x"),
        py::arg("beside").none(true), py::arg("weight").none(true), py::arg("bias").none(true),
        py::arg("mean"), py::arg("variance"), py::arg("sums").none(true), py::arg("dx"), py::arg("eps"),
        py::arg("activation"), py::arg("threads"));
}
