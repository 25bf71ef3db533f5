// embedding_bag and its update; on a GPU they are given sorted places too.
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "embedding_bag.h"
#include "embedding_bag_update.h"

namespace py = pybind11;
using lspm::Bags;
using lspm::DType;
using lspm::EmbeddingBagShape;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

// A table of so many rows, its bags beside what has a row for each of them.
struct EmbeddingBagCall {
  EmbeddingBagShape shape;
  Bags bags;

  EmbeddingBagCall(int64_t rows, const TensorView& of_bags, const char* name, const TensorView& indices,
                   const OptionalView& offsets, const OptionalView& per_sample_weights, int64_t padding_idx,
                   bool mean) {
    check_first(of_bags, name);
    if (of_bags.dim() != 2) TensorView::refuse(name, "have 2 dimensions");
    const DType type = indices.dtype();
    if (type != DType::i32 && type != DType::i64) TensorView::refuse("indices", "be int32 or int64");
    const int64_t n = indices.numel(), count = of_bags.size(0), starts = offsets ? offsets->numel() : 0;
    shape = {rows, of_bags.size(1), count, n, padding_idx, starts, mean, of_bags.dtype(), type};
    if (offsets && starts != count && starts != count + 1)
      TensorView::refuse("offsets", "be one a bag, or one more");
    if (!offsets && (count ? n % count : n)) TensorView::refuse("indices", "be as many in each bag");
    if (mean && per_sample_weights) TensorView::refuse("per_sample_weights", "come with sums");
    bags = {indices.contiguous("indices", of_bags, type, n),
            optional(offsets, "offsets", of_bags, type, starts),
            optional(per_sample_weights, "per_sample_weights", of_bags, shape.dtype, n)};
  }

  void* table(const OptionalView& view, const char* name, const TensorView& beside, DType dtype) const {
    return optional(view, name, beside, dtype, shape.rows * shape.dim);
  }

  lspm::SortedPlaces sorted(const TensorView& beside, const TensorView& bag_of, const OptionalView& rows,
                            const OptionalView& order, const OptionalView& shares,
                            const OptionalView& parts) const {
    const int64_t n = shape.indices, chunks = (n + lspm::kSortedChunk - 1) / lspm::kSortedChunk;
    const auto floats = [&](const OptionalView& view, const char* name, int64_t count) {
      return static_cast<float*>(optional(view, name, beside, DType::f32, count));
    };
    return {optional(rows, "sorted_rows", beside, shape.index_dtype, n),
            static_cast<int64_t*>(optional(order, "order", beside, DType::i64, n)),
            static_cast<int32_t*>(bag_of.contiguous("bag_of", beside, DType::i32, n)),
            floats(shares, "shares", shape.mean ? shape.bags : 0),
            floats(parts, "parts", 2 * chunks * shape.dim)};
  }
};

void embedding_bag_forward(const TensorView& weight, const TensorView& indices, const OptionalView& offsets,
                           const OptionalView& per_sample_weights, const TensorView& out, int64_t padding_idx,
                           bool mean, [[maybe_unused]] int threads) {
  const EmbeddingBagCall call(weight.size(0), out, "out", indices, offsets, per_sample_weights, padding_idx,
                              mean);
  void* const table = call.table(weight, "weight", out, out.dtype());
  void* const sums = out.contiguous("out", out, out.dtype(), out.numel());
  py::gil_scoped_release unlocked;
  backend::embedding_bag_forward(table, call.bags, sums, call.shape, WHERE(out, threads));
}

void embedding_bag_backward(const TensorView& dout, const OptionalView& weight, const TensorView& indices,
                            const OptionalView& offsets, const OptionalView& per_sample_weights,
#ifdef LSPM_CUDA
                            const TensorView& bag_of, const OptionalView& sorted_rows,
                            const OptionalView& order, const OptionalView& shares, const OptionalView& parts,
#endif
                            const OptionalView& dweight, const OptionalView& dweights, int64_t padding_idx,
                            bool mean, [[maybe_unused]] int threads) {
  if (dweights && !(weight && per_sample_weights))
    TensorView::refuse("weight and per_sample_weights", "be there where dweights is");
  const OptionalView& like = dweight ? dweight : weight;
  if (!like) TensorView::refuse("dweight or dweights", "be there");
  const EmbeddingBagCall call(like->size(0), dout, "dout", indices, offsets, per_sample_weights, padding_idx,
                              mean);
  const DType type = dout.dtype();
  void* const gradient = dout.contiguous("dout", dout, type, dout.numel());
  void* const table = call.table(weight, "weight", dout, type);
  void* const of_table = call.table(dweight, "dweight", dout, type);
  void* const of_weights = optional(dweights, "dweights", dout, type, indices.numel());
#ifdef LSPM_CUDA
  const lspm::SortedPlaces sorted = call.sorted(dout, bag_of, sorted_rows, order, shares, parts);
  if (dweight && !(sorted_rows && order && shares && parts))
    TensorView::refuse("sorted_rows, order, shares and parts", "be there where dweight is");
  py::gil_scoped_release unlocked;
  backend::embedding_bag_backward(gradient, table, call.bags, sorted, of_table, of_weights, call.shape,
                                  WHERE(dout, threads));
#else
  py::gil_scoped_release unlocked;
  backend::embedding_bag_backward(gradient, table, call.bags, of_table, of_weights, call.shape, threads);
#endif
}

// numbers: lr, eps, beta1, beta2 and weight_decay.
void embedding_bag_update(const TensorView& weight, const OptionalView& first, const OptionalView& second,
                          const TensorView& dout, const TensorView& indices, const OptionalView& offsets,
                          const OptionalView& per_sample_weights,
#ifdef LSPM_CUDA
                          const TensorView& bag_of, const TensorView& sorted_rows, const TensorView& order,
                          const TensorView& shares, const TensorView& parts,
#endif
                          int64_t padding_idx, bool mean, int optimizer, const std::array<double, 5>& numbers,
                          int64_t step, const std::optional<uint64_t>& seed, [[maybe_unused]] int threads) {
  if (optimizer < 0 || optimizer > 2) refuse_value("optimizer", "be 0, 1 or 2", optimizer);
  const EmbeddingBagCall call(weight.size(0), dout, "dout", indices, offsets, per_sample_weights, padding_idx,
                              mean);
  const DType type = dout.dtype();
  const auto& [lr, eps, beta1, beta2, weight_decay] = numbers;
  const lspm::RowStep how{lspm::RowOptimizer(optimizer),
                          lr,
                          eps,
                          beta1,
                          beta2,
                          weight_decay,
                          step,
                          seed.has_value(),
                          seed.value_or(0)};
  if (seed && type != DType::bf16) TensorView::refuse("weight", "be bfloat16 where there is a seed");
  if (bool(first) != (optimizer > 0) || bool(second) != (optimizer == 2))
    TensorView::refuse("first and second", "be there where the optimizer has them");
  void* const table = call.table(weight, "weight", dout, type);
  const int64_t rows = call.shape.rows, states = optimizer == 2 ? rows * call.shape.dim : rows;
  auto* const m = static_cast<float*>(optional(first, "first", dout, DType::f32, states));
  auto* const v = static_cast<float*>(optional(second, "second", dout, DType::f32, states));
  void* const gradient = dout.contiguous("dout", dout, type, dout.numel());
#ifdef LSPM_CUDA
  const lspm::SortedPlaces sorted = call.sorted(dout, bag_of, sorted_rows, order, shares, parts);
  py::gil_scoped_release unlocked;
  backend::embedding_bag_update(table, m, v, gradient, call.bags, sorted, call.shape, how,
                                WHERE(dout, threads));
#else
  py::gil_scoped_release unlocked;
  backend::embedding_bag_update(table, m, v, gradient, call.bags, call.shape, how, threads);
#endif
}
}  // namespace

void bind_embedding_bag(py::module_& m) {
  m.def("embedding_bag_forward", &embedding_bag_forward, py::arg("weight"), py::arg("indices"),
        py::arg("offsets").none(true), py::arg("per_sample_weights").none(true), py::arg("out"),
        py::arg("padding_idx"), py::arg("mean"), py::arg("threads"));
  m.def("embedding_bag_backward", &embedding_bag_backward, py::arg("dout"), py::arg("weight").none(true),
        py::arg("indices"), py::arg("offsets").none(true), py::arg("per_sample_weights").none(true),
#ifdef LSPM_CUDA
        py::arg("bag_of"), py::arg("sorted_rows").none(true), py::arg("order").none(true),
        py::arg("shares").none(true), py::arg("parts").none(true),
#endif
        py::arg("dweight").none(true), py::arg("dweights").none(true), py::arg("padding_idx"),
        py::arg("mean"), py::arg("threads"));
  m.def("embedding_bag_update", &embedding_bag_update, py::arg("weight"), py::arg("first").none(true),
        py::arg("second").none(true), py::arg("dout"), py::arg("indices"), py::arg("offsets").none(true),
        py::arg("per_sample_weights").none(true),
#ifdef LSPM_CUDA
        py::arg("bag_of"), py::arg("sorted_rows"), py::arg("order"), py::arg("shares"), py::arg("parts"),
#endif
        py::arg("padding_idx"), py::arg("mean"), py::arg("optimizer"), py::arg("numbers"), py::arg("step"),
        py::arg("seed").none(true), py::arg("threads"));
}
