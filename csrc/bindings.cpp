// The Python face of the kernels: checks every view, releases the GIL, calls. Outputs are allocated in
// Python. Compiled twice, as bindings.h says, under the same names.
#include "bindings.h"

#include <pybind11/stl.h>

#include <utility>

#include "cpu/isa.h"
#include "cpu/team.h"
#include "layer_norm.h"

namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

#ifdef LSPM_CUDA
#define MODULE_NAME _C_cuda
#else
#define MODULE_NAME _C
#endif

namespace {

// The shape of a call, from its (rows, cols) tensor and what it has of weight, bias or their gradients.
lspm::LayerNormShape layer_norm_shape(const TensorView& x, const OptionalView& weight,
                                      const OptionalView& bias, int64_t partials, bool centered) {
  check_first(x, "x");
  const int64_t cols = x.size(-1);
  const DType weight_dtype = weight ? weight->dtype() : bias ? bias->dtype() : DType::f32;
  if (weight_dtype != DType::f32 && weight_dtype != x.dtype())
    TensorView::refuse("weight", "have x's dtype or float32");
  return {cols ? x.numel() / cols : 0, cols, partials, x.dtype(), weight_dtype, centered};
}

// What the forward saves for the backward: (2, rows), the mean and rstd, or (1, rows), rstd alone in RMS
// norm.
struct Statistics {
  float *mean = nullptr, *rstd = nullptr;

  Statistics(const OptionalView& view, const TensorView& x, const lspm::LayerNormShape& s) {
    if (!view) return;
    rstd = static_cast<float*>(view->contiguous("statistics", x, DType::f32, (s.centered ? 2 : 1) * s.rows));
    if (s.centered) mean = std::exchange(rstd, rstd + s.rows);
  }
};

void layer_norm_forward(const TensorView& x, const OptionalView& residual, const OptionalView& weight,
                        const OptionalView& bias, const OptionalView& sum, const TensorView& y,
                        const OptionalView& statistics, float eps, bool centered,
                        [[maybe_unused]] int threads) {
  const auto s = layer_norm_shape(x, weight, bias, 0, centered);
  const int64_t n = s.rows * s.cols;
  void *px = x.contiguous("x", x, s.dtype, n), *pr = optional(residual, "residual", x, s.dtype, n);
  void* pw = optional(weight, "weight", x, s.weight_dtype, s.cols);
  void* pb = optional(bias, "bias", x, s.weight_dtype, s.cols);
  void *ps = optional(sum, "sum", x, s.dtype, n), *py = y.contiguous("y", x, s.dtype, n);
  const Statistics saved(statistics, x, s);
  if (!ps != !pr) TensorView::refuse("sum", "be there exactly where residual is");
  py::gil_scoped_release unlocked;
  backend::layer_norm_forward(px, pr, pw, pb, ps, py, saved.mean, saved.rstd, s, eps, WHERE(x, threads));
}

void layer_norm_backward(const TensorView& dy, const OptionalView& dsum, const TensorView& sum,
                         const TensorView& statistics, const OptionalView& weight, const TensorView& dx,
                         const OptionalView& dweight, const OptionalView& dbias, const TensorView& partial,
                         bool centered, [[maybe_unused]] int threads) {
  const auto s = layer_norm_shape(dy, weight ? weight : dweight, dbias, partial.size(0), centered);
  const int64_t n = s.rows * s.cols;
  void *pdy = dy.contiguous("dy", dy, s.dtype, n), *pds = optional(dsum, "dsum", dy, s.dtype, n);
  void* ps = sum.contiguous("sum", dy, s.dtype, n);
  const Statistics saved(statistics, dy, s);
  void *pw = optional(weight, "weight", dy, s.weight_dtype, s.cols),
       *pdx = dx.contiguous("dx", dy, s.dtype, n);
  void* pdw = optional(dweight, "dweight", dy, s.weight_dtype, s.cols);
  void* pdb = optional(dbias, "dbias", dy, s.weight_dtype, s.cols);
  auto* pp = static_cast<float*>(partial.contiguous("partial", dy, DType::f32, s.partials * 2 * s.cols));
  py::gil_scoped_release unlocked;
  backend::layer_norm_backward(pdy, pds, ps, saved.mean, saved.rstd, pw, pdx, pdw, pdb, pp, s,
                               WHERE(dy, threads));
}

#ifndef LSPM_CUDA
// Calls main(); kernels that it calls on that many threads begin no parallel region.
void run_in_team(const py::function& main, int threads) {
  py::gil_scoped_release unlocked;
  lspm::cpu::Team::run(threads, [&] {
    py::gil_scoped_acquire locked;
    main();
  });
}
#endif

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  lspm::init_tensor_api();
#ifndef LSPM_CUDA
  if (!lspm::cpu::isa_request())
    throw py::import_error(std::string("the operating system does not grant ") + lspm::cpu::isa_name());
  m.attr("isa") = lspm::cpu::isa_name();
  m.def("run_in_team", &run_in_team, py::arg("main"), py::arg("threads"));
#endif
  m.def("layer_norm_forward", &layer_norm_forward, py::arg("x"), py::arg("residual").none(true),
        py::arg("weight").none(true), py::arg("bias").none(true), py::arg("sum").none(true), py::arg("y"),
        py::arg("statistics").none(true), py::arg("eps"), py::arg("centered"), py::arg("threads"));
  m.def("layer_norm_backward", &layer_norm_backward, py::arg("dy"), py::arg("dsum").none(true),
        py::arg("sum"), py::arg("statistics"), py::arg("weight").none(true), py::arg("dx"),
        py::arg("dweight").none(true), py::arg("dbias").none(true), py::arg("partial"), py::arg("centered"),
        py::arg("threads"));
  bind_attention(m);
#ifndef LSPM_CUDA
  bind_activation(m);
  bind_adamw(m);
  bind_attention_with_kv_cache(m);
  bind_embedding(m);
  bind_linear(m);
  bind_sample(m);
#endif
  bind_batch_norm_act(m);
  bind_cross_entropy(m);
  bind_embedding_bag(m);
  bind_mf_als(m);
  bind_mf_sgd(m);
  bind_pool(m);
  bind_recommender(m);
  bind_rotary(m);
  bind_conv2d(m);
}
