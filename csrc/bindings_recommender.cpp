// mf and top_k_scores.
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "bindings.h"
#include "mf.h"
#include "top_k_scores.h"

namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

const int64_t* ids(const TensorView& view, const char* name, const TensorView& beside, int64_t count) {
  return static_cast<const int64_t*>(view.contiguous(name, beside, DType::i64, count));
}

// What forward and backward of mf share.
struct MfCall {
  lspm::MfShape shape;
  lspm::MfTables<const void> tables;
  const int64_t *users, *items;

  MfCall(const TensorView& u, const TensorView& i, const OptionalView& user_bias,
         const OptionalView& item_bias, const TensorView& user_ids, const TensorView& item_ids) {
    check_first(u, "user_factors");
    if (u.dim() != 2) TensorView::refuse("user_factors", "have 2 dimensions");
    if (i.dim() != 2) TensorView::refuse("item_factors", "have 2 dimensions");
    shape = {user_ids.numel(), u.size(0), i.size(0), u.size(1), u.dtype()};
    const auto& s = shape;
    if (std::max(s.users, s.items) >= int64_t{1} << 31)
      TensorView::refuse("user_factors", "have fewer than 2 ** 31 rows, and item_factors");
    tables = {u.contiguous("user_factors", u, s.dtype, s.users * s.dim),
              i.contiguous("item_factors", u, s.dtype, s.items * s.dim),
              optional(user_bias, "user_bias", u, s.dtype, s.users),
              optional(item_bias, "item_bias", u, s.dtype, s.items)};
    users = ids(user_ids, "users", u, s.pairs);
    items = ids(item_ids, "items", u, s.pairs);
  }
};

void mf_forward(const TensorView& user_factors, const TensorView& item_factors, const OptionalView& user_bias,
                const OptionalView& item_bias, const TensorView& users, const TensorView& items,
                const TensorView& ratings, float mean, [[maybe_unused]] int threads) {
  const MfCall call(user_factors, item_factors, user_bias, item_bias, users, items);
  void* pr = ratings.contiguous("ratings", user_factors, call.shape.dtype, call.shape.pairs);
  py::gil_scoped_release unlocked;
  backend::mf_forward(call.tables, call.users, call.items, mean, pr, call.shape,
                      WHERE(user_factors, threads));
}

void mf_backward(const TensorView& dratings, const TensorView& user_factors, const TensorView& item_factors,
                 const TensorView& users, const TensorView& items, const OptionalView& duser_factors,
                 const OptionalView& ditem_factors, const OptionalView& duser_bias,
                 const OptionalView& ditem_bias, [[maybe_unused]] int threads) {
  const MfCall call(user_factors, item_factors, std::nullopt, std::nullopt, users, items);
  const auto& s = call.shape;
  void* pdr = dratings.contiguous("dratings", user_factors, s.dtype, s.pairs);
  const lspm::MfTables<void> gradients{
      optional(duser_factors, "duser_factors", user_factors, s.dtype, s.users * s.dim),
      optional(ditem_factors, "ditem_factors", user_factors, s.dtype, s.items * s.dim),
      optional(duser_bias, "duser_bias", user_factors, s.dtype, s.users),
      optional(ditem_bias, "ditem_bias", user_factors, s.dtype, s.items)};
  py::gil_scoped_release unlocked;
  backend::mf_backward(pdr, call.tables, call.users, call.items, gradients, s, WHERE(user_factors, threads));
}

// The rows of a matrix with a contiguous last dimension.
const void* rows(const TensorView& x, const char* name, const TensorView& beside) {
  if (x.dim() != 2) TensorView::refuse(name, "have 2 dimensions");
  if (x.size(1) > 1 && x.stride(1) != 1) TensorView::refuse(name, "have a contiguous last dimension");
  return x.data(name, beside, beside.dtype());
}

void top_k_scores_forward(const TensorView& queries, const TensorView& items, const OptionalView& item_bias,
                          const OptionalView& exclude_indptr, const OptionalView& exclude_indices,
                          const TensorView& scores, const TensorView& indices, [[maybe_unused]] int threads,
                          [[maybe_unused]] const OptionalView& scratch) {
  check_first(queries, "queries");
  const void *pq = rows(queries, "queries", queries), *pi = rows(items, "items", queries);
  if (scores.dim() != 2 || scores.size(0) != queries.size(0))
    TensorView::refuse("scores", "have a row for each query");
  if (items.size(1) != queries.size(1)) TensorView::refuse("items", "have the dimension of queries");
  if (items.size(0) >= int64_t{1} << 32) TensorView::refuse("items", "be fewer than 2 ** 32");
  const lspm::TopKScoresShape s{queries.size(0),   items.size(0),   queries.size(1), scores.size(1),
                                queries.stride(0), items.stride(0), queries.dtype()};
  auto* pb = static_cast<const float*>(optional(item_bias, "item_bias", queries, DType::f32, s.items));
  lspm::Exclusions x{};
  if (!exclude_indptr != !exclude_indices)
    TensorView::refuse("exclude_indices", "be there exactly where exclude_indptr is");
  if (exclude_indptr) {
    x.count = exclude_indices->numel();
    x.indptr = ids(*exclude_indptr, "exclude_indptr", queries, s.queries + 1);
    x.indices = ids(*exclude_indices, "exclude_indices", queries, x.count);
  }
  auto* ps = static_cast<float*>(scores.contiguous("scores", queries, DType::f32, s.queries * s.k));
  auto* pn = static_cast<int64_t*>(indices.contiguous("indices", queries, DType::i64, s.queries * s.k));
#ifdef LSPM_CUDA
  const int64_t parts = scratch ? scratch->size(0) : 1;
  auto* pp =
      static_cast<int64_t*>(optional(scratch, "scratch", queries, DType::i64, parts * s.queries * s.k));
  py::gil_scoped_release unlocked;
  backend::top_k_scores_forward(pq, pi, pb, x, pp, parts, ps, pn, s, WHERE(queries, threads));
#else
  py::gil_scoped_release unlocked;
  backend::top_k_scores_forward(pq, pi, pb, x, ps, pn, s, threads);
#endif
}

}  // namespace

void bind_recommender(py::module_& m) {
  m.def("mf_forward", &mf_forward, py::arg("user_factors"), py::arg("item_factors"),
        py::arg("user_bias").none(true), py::arg("item_bias").none(true), py::arg("users"), py::arg("items"),
        py::arg("ratings"), py::arg("mean"), py::arg("threads"));
  m.def("mf_backward", &mf_backward, py::arg("dratings"), py::arg("user_factors"), py::arg("item_factors"),
        py::arg("users"), py::arg("items"), py::arg("duser_factors").none(true),
        py::arg("ditem_factors").none(true), py::arg("duser_bias").none(true),
        py::arg("ditem_bias").none(true), py::arg("threads"));
  m.def("top_k_scores_forward", &top_k_scores_forward, py::arg("queries"), py::arg("items"),
        py::arg("item_bias").none(true), py::arg("exclude_indptr").none(true),
        py::arg("exclude_indices").none(true), py::arg("scores"), py::arg("indices"), py::arg("threads"),
        py::arg("scratch").none(true) = py::none());
}
