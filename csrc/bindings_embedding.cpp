// dropout and embedding, which the CPU has: on a GPU they are Triton's.
#ifndef LSPM_CUDA
#include <pybind11/stl.h>

#include "bindings.h"
#include "dropout.h"
#include "embedding.h"

namespace py = pybind11;
using lspm::Drops;
using lspm::DType;
using lspm::EmbeddingShape;
using lspm::Lookup;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

Drops drops_of(double p, double scale, uint64_t seed) {
  if (!(p >= 0 && p <= 1)) TensorView::refuse("p", "be from 0 to 1");
  return {p, float(scale), seed};
}

void dropout_forward(const TensorView& x, const OptionalView& residual, const TensorView& out, double p,
                     double scale, uint64_t seed, int threads) {
  check_first(x, "x");
  const Drops drops = drops_of(p, scale, seed);
  const int64_t n = x.numel();
  const DType type = x.dtype();
  void *px = x.contiguous("x", x, type, n), *pr = optional(residual, "residual", x, type, n);
  void* po = out.contiguous("out", x, type, n);
  py::gil_scoped_release unlocked;
  lspm::cpu::dropout_forward(px, pr, po, n, type, drops, threads);
}

// A table beside `out` and its ids, or none.
Lookup lookup_of(const OptionalView& table, const char* table_name, const OptionalView& ids, const char* name,
                 const TensorView& out, const EmbeddingShape& s) {
  if (!table) return {};
  if (table->dim() != 2 || table->size(1) != s.dim) TensorView::refuse(table_name, "have out's columns");
  const int64_t rows = table->size(0);
  if (!ids && (s.first < 0 || s.length < 1 || s.first + s.length > rows) && s.rows)
    TensorView::refuse("first", "leave length positions of the table");
  return {table->contiguous(table_name, out, s.dtype, rows * s.dim),
          optional(ids, name, out, s.id_dtype, s.rows), rows, name};
}

void embedding_forward(const TensorView& tokens, const TensorView& weight, const OptionalView& positions,
                       const OptionalView& position_weight, const OptionalView& token_types,
                       const OptionalView& token_type_weight, const OptionalView& norm_weight,
                       const OptionalView& norm_bias, const TensorView& out, const OptionalView& statistics,
                       int64_t first, int64_t length, float eps, double p, double scale, uint64_t seed,
                       int threads) {
  check_first(out, "out");
  const DType type = out.dtype(), ids = tokens.dtype();
  if (ids != DType::i32 && ids != DType::i64) TensorView::refuse("tokens", "be int32 or int64");
  if (token_type_weight && !token_types) TensorView::refuse("token_types", "be there beside their table");
  if (!norm_weight && (norm_bias || statistics)) TensorView::refuse("norm_weight", "be there in a norm");
  const DType norm = norm_weight ? norm_weight->dtype() : type;
  if (norm != DType::f32 && norm != type) TensorView::refuse("norm_weight", "have out's dtype or float32");
  const EmbeddingShape s{tokens.numel(),          weight.size(-1), length, first, type, ids, norm, eps,
                         drops_of(p, scale, seed)};
  const Lookup lookups[3] = {
      lookup_of(weight, "weight", tokens, "tokens", out, s),
      lookup_of(position_weight, "position_weight", positions, "positions", out, s),
      lookup_of(token_type_weight, "token_type_weight", token_types, "token_types", out, s)};
  void* pw = optional(norm_weight, "norm_weight", out, norm, s.dim);
  void* pb = optional(norm_bias, "norm_bias", out, norm, s.dim);
  void* po = out.contiguous("out", out, type, s.rows * s.dim);
  auto* mean = static_cast<float*>(optional(statistics, "statistics", out, DType::f32, 2 * s.rows));
  float* const rstd = mean ? mean + s.rows : nullptr;
  py::gil_scoped_release unlocked;
  lspm::cpu::embedding_forward(lookups, pw, pb, po, mean, rstd, s, threads);
}

}  // namespace

void bind_embedding(py::module_& m) {
  m.def("dropout_forward", &dropout_forward, py::arg("x"), py::arg("residual").none(true), py::arg("out"),
        py::arg("p"), py::arg("scale"), py::arg("seed"), py::arg("threads"));
  m.def("embedding_forward", &embedding_forward, py::arg("tokens"), py::arg("weight"),
        py::arg("positions").none(true), py::arg("position_weight").none(true),
        py::arg("token_types").none(true), py::arg("token_type_weight").none(true),
        py::arg("norm_weight").none(true), py::arg("norm_bias").none(true), py::arg("out"),
        py::arg("statistics").none(true), py::arg("first"), py::arg("length"), py::arg("eps"), py::arg("p"),
        py::arg("scale"), py::arg("seed"), py::arg("threads"));
}
#endif
