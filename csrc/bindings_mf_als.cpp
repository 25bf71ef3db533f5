// mf_als and nmf: two factors, and the entries of a sparse matrix between their rows.
#include <pybind11/stl.h>

#include "bindings.h"
#include "mf_als.h"
#include "nmf.h"

namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

// The factors' and the entries' views after their checks.
struct Views {
  lspm::Csr csr;
  int64_t k;
  float *factors, *other_factors;

  Views(const TensorView& x, const TensorView& y, const TensorView& indptr, const TensorView& indices) {
    check_first(x, "factors");
    for (const auto& [view, name] : {std::pair{&x, "factors"}, std::pair{&y, "other_factors"}})
      if (view->dim() != 2) TensorView::refuse(name, "have 2 dimensions");
    const int64_t rows = x.size(0), columns = y.size(0);
    k = x.size(1);
    const DType type = indices.dtype();
    if (type != DType::i64 && type != DType::i32) TensorView::refuse("indices", "be int32 or int64");
    const auto* starts = static_cast<const int64_t*>(indptr.contiguous("indptr", x, DType::i64, rows + 1));
    csr = {rows,
           columns,
           indices.numel(),
           starts,
           indices.contiguous("indices", x, type, indices.numel()),
           type == DType::i64};
    factors = static_cast<float*>(x.contiguous("factors", x, DType::f32, rows * k));
    other_factors = static_cast<float*>(y.contiguous("other_factors", x, DType::f32, columns * k));
  }
};

void mf_als_update(const TensorView& factors, const TensorView& other_factors, const TensorView& indptr,
                   const TensorView& indices, const OptionalView& values, const OptionalView& weight,
                   [[maybe_unused]] const TensorView& failed, float reg, float reg_exponent, float alpha,
                   bool implicit, int64_t steps, [[maybe_unused]] int threads,
                   [[maybe_unused]] const OptionalView& gram) {
  const Views v(factors, other_factors, indptr, indices);
  auto* pv = static_cast<float*>(optional(values, "values", factors, DType::f32, v.csr.entries));
  auto* pw = static_cast<float*>(optional(weight, "weight", factors, DType::f32, v.csr.entries));
  if (steps < 0) refuse_value("steps", "be 0 or more", steps);
  const lspm::MfAlsOptions options = {reg, reg_exponent, alpha, implicit, steps};
#ifdef LSPM_CUDA  // whose kernels say nothing of rows that failed, as nothing is read on a GPU
  auto* pg = static_cast<float*>(optional(gram, "gram", factors, DType::f32, v.k * v.k));
  if (implicit != bool(pg)) TensorView::refuse("gram", "be there where implicit");
  py::gil_scoped_release unlocked;
  backend::mf_als_update(v.factors, v.other_factors, v.csr, pv, pw, pg, v.k, options,
                         WHERE(factors, threads));
#else
  auto* pf = static_cast<int64_t*>(failed.contiguous("failed", factors, DType::i64, 2));
  py::gil_scoped_release unlocked;
  backend::mf_als_update(v.factors, v.other_factors, v.csr, pv, pw, pf, v.k, options, threads);
#endif
}

void mf_als_loss(const TensorView& factors, const TensorView& other_factors, const TensorView& indptr,
                 const TensorView& indices, const OptionalView& values, const OptionalView& weight,
                 const TensorView& loss, float reg, float reg_exponent, float alpha, bool implicit,
                 [[maybe_unused]] int threads, [[maybe_unused]] const OptionalView& grams,
                 [[maybe_unused]] const OptionalView& scratch) {
  const Views v(factors, other_factors, indptr, indices);
  auto* pv = static_cast<float*>(optional(values, "values", factors, DType::f32, v.csr.entries));
  auto* pw = static_cast<float*>(optional(weight, "weight", factors, DType::f32, v.csr.entries));
  auto* pl = static_cast<float*>(loss.contiguous("loss", factors, DType::f32, 1));
  const lspm::MfAlsOptions options = {reg, reg_exponent, alpha, implicit, 0};
#ifdef LSPM_CUDA
  auto* pg = static_cast<float*>(optional(grams, "grams", factors, DType::f32, 2 * v.k * v.k));
  const int64_t places = 2 * backend::kMfAlsLossParts + v.csr.columns;
  auto* ps = static_cast<int64_t*>(optional(scratch, "scratch", factors, DType::i64, places));
  if (implicit != bool(pg)) TensorView::refuse("grams", "be there where implicit");
  if (!ps) TensorView::refuse("scratch", "be there");
  py::gil_scoped_release unlocked;
  backend::mf_als_loss(v.factors, v.other_factors, v.csr, pv, pw, pg, ps, pl, v.k, options,
                       WHERE(factors, threads));
#else
  py::gil_scoped_release unlocked;
  backend::mf_als_loss(v.factors, v.other_factors, v.csr, pv, pw, pl, v.k, options, threads);
#endif
}

void nmf_update(const TensorView& factors, const TensorView& other_factors, const TensorView& indptr,
                const TensorView& indices, const TensorView& values, const TensorView& failed, float reg,
                float eps, [[maybe_unused]] int threads) {
  const Views v(factors, other_factors, indptr, indices);
  auto* pv = static_cast<float*>(values.contiguous("values", factors, DType::f32, v.csr.entries));
  [[maybe_unused]] auto* pf = static_cast<int64_t*>(failed.contiguous("failed", factors, DType::i64, 1));
  py::gil_scoped_release unlocked;
#ifdef LSPM_CUDA  // whose kernel says nothing of rows that failed, as nothing is read on a GPU
  backend::nmf_update(v.factors, v.other_factors, v.csr, pv, v.k, reg, eps, WHERE(factors, threads));
#else
  backend::nmf_update(v.factors, v.other_factors, v.csr, pv, pf, v.k, reg, eps, threads);
#endif
}

}  // namespace

void bind_mf_als(py::module_& m) {
  m.def("mf_als_loss", &mf_als_loss, py::arg("factors"), py::arg("other_factors"), py::arg("indptr"),
        py::arg("indices"), py::arg("values").none(true), py::arg("weight").none(true), py::arg("loss"),
        py::arg("reg"), py::arg("reg_exponent"), py::arg("alpha"), py::arg("implicit"), py::arg("threads"),
        py::arg("grams").none(true) = py::none(), py::arg("scratch").none(true) = py::none());
  m.def("mf_als_update", &mf_als_update, py::arg("factors"), py::arg("other_factors"), py::arg("indptr"),
        py::arg("indices"), py::arg("values").none(true), py::arg("weight").none(true), py::arg("failed"),
        py::arg("reg"), py::arg("reg_exponent"), py::arg("alpha"), py::arg("implicit"), py::arg("steps"),
        py::arg("threads"), py::arg("gram").none(true) = py::none());
  m.def("nmf_update", &nmf_update, py::arg("factors"), py::arg("other_factors"), py::arg("indptr"),
        py::arg("indices"), py::arg("values"), py::arg("failed"), py::arg("reg"), py::arg("eps"),
        py::arg("threads"));
}
