// mf_sgd and bpr: tables as (rows, factors), contiguous; ratings in the order of their blocks.
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <type_traits>

#include "bindings.h"
#include "bpr.h"
#include "mf_sgd.h"

namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

using lspm::MfSgdRatings;

template <class T>
T* data(const TensorView& view, const char* name, const TensorView& beside, DType dtype, int64_t n) {
  return static_cast<T*>(view.contiguous(name, beside, dtype, n));
}
float* floats(const OptionalView& view, const char* name, const TensorView& beside, int64_t n) {
  return static_cast<float*>(optional(view, name, beside, DType::f32, n));
}

MfSgdRatings ratings_of(const TensorView& users, const TensorView& items, const TensorView& ratings,
                        const OptionalView& weights, const TensorView& beside) {
  const int64_t n = ratings.numel();
  return {data<int32_t>(users, "users", beside, DType::i32, n),
          data<int32_t>(items, "items", beside, DType::i32, n),
          data<float>(ratings, "ratings", beside, DType::f32, n), floats(weights, "weight", beside, n),
          nullptr};
}

int64_t grid_of(const TensorView& offsets) {
  const int64_t grid = std::llround(std::sqrt(double(offsets.numel() - 1)));
  if (grid < 1 || grid * grid + 1 != offsets.numel())
    TensorView::refuse("offsets", "have grid ** 2 + 1 elements");
  return grid;
}

const int64_t* starts_of(const TensorView& view, const char* name, const TensorView& beside, int64_t n,
                         [[maybe_unused]] int64_t end) {
  const auto* starts = data<int64_t>(view, name, beside, DType::i64, n + 1);
#ifndef LSPM_CUDA  // whose kernels keep to what there is, as nothing is read on a GPU
  for (int64_t i = 0; i < n; ++i)
    if (starts[i] > starts[i + 1]) TensorView::refuse(name, "not decrease");
  if (starts[0] != 0 || starts[n] != end)
    TensorView::refuse(name, "run from 0 to the number of what it parts");
#endif
  return starts;
}

// Runs an update, which on a CPU gives the place of ids that are of no row, or -1.
template <class Update>
void run(const int32_t* users, const int32_t* items, Update update) {
  int64_t stray = -1;
  {
    py::gil_scoped_release unlocked;
    if constexpr (std::is_void_v<decltype(update())>)
      update();
    else
      stray = update();
  }
  if (stray >= 0)
    throw std::invalid_argument("users and items must be ids of rows of the tables, got " +
                                std::to_string(users[stray]) + " and " + std::to_string(items[stray]));
}

void mf_sgd_update(const TensorView& user_factors, const TensorView& item_factors,
                   const OptionalView& user_bias, const OptionalView& item_bias,
                   const OptionalView& user_squares, const OptionalView& item_squares,
                   const TensorView& users, const TensorView& items, const TensorView& ratings,
                   const OptionalView& weight, const TensorView& offsets, const TensorView& loss,
                   const std::array<float, 9>& step, bool nonnegative, bool logistic, int64_t seed,
                   [[maybe_unused]] int threads) {
  check_first(user_factors, "user_factors");
  const lspm::MfSgdShape s{user_factors.size(0), item_factors.size(0), user_factors.size(1),
                           ratings.numel(),      grid_of(offsets),     user_factors.dtype()};
  if (s.dtype == DType::f16) TensorView::refuse("user_factors", "be float32 or bfloat16");
  if (!user_squares != !item_squares) TensorView::refuse("item_squares", "be there where user_squares is");
  const lspm::MfSgdTables tables{
      user_factors.contiguous("user_factors", user_factors, s.dtype, s.users * s.factors),
      item_factors.contiguous("item_factors", user_factors, s.dtype, s.items * s.factors),
      floats(user_bias, "user_bias", user_factors, s.users),
      floats(item_bias, "item_bias", user_factors, s.items),
      floats(user_squares, "user_squares", user_factors, s.users),
      floats(item_squares, "item_squares", user_factors, s.items)};
  MfSgdRatings of = ratings_of(users, items, ratings, weight, user_factors);
  of.offsets = starts_of(offsets, "offsets", user_factors, s.grid * s.grid, s.ratings);
  auto* sums = data<float>(loss, "loss", user_factors, DType::f32, s.grid * s.grid);
  const lspm::MfSgdStep by{step[0], step[1], step[2], step[3],     step[4],  step[5],
                           step[6], step[7], step[8], nonnegative, logistic, seed};
  run(of.users, of.items,
      [&] { return backend::mf_sgd_update(tables, of, sums, s, by, WHERE(user_factors, threads)); });
}

void bpr_update(const TensorView& user_factors, const TensorView& item_factors, const OptionalView& item_bias,
                const TensorView& users, const TensorView& items, const TensorView& offsets,
                const TensorView& part_items, const TensorView& part_offsets, const OptionalView& seen_indptr,
                const OptionalView& seen, const TensorView& loss, const TensorView& skipped,
                const std::array<float, 4>& step, int64_t seed, [[maybe_unused]] int threads) {
  check_first(user_factors, "user_factors");
  const TensorView& first = user_factors;
  const int64_t grid = grid_of(offsets), n = users.numel();
  const lspm::BprShape s{first.size(0), item_factors.size(0), first.size(1),           n,
                         grid,          part_items.numel(),   seen ? seen->numel() : 0};
  auto* up = data<float>(first, "user_factors", first, DType::f32, s.users * s.factors);
  auto* ip = data<float>(item_factors, "item_factors", first, DType::f32, s.items * s.factors);
  float* bias = floats(item_bias, "item_bias", first, s.items);
  lspm::BprPairs of{};
  of.users = data<int32_t>(users, "users", first, DType::i32, n);
  of.items = data<int32_t>(items, "items", first, DType::i32, n);
  of.offsets = starts_of(offsets, "offsets", first, grid * grid, n);
  of.part_items = data<int32_t>(part_items, "part_items", first, DType::i32, part_items.numel());
  of.part_offsets = starts_of(part_offsets, "part_offsets", first, grid, part_items.numel());
#ifndef LSPM_CUDA
  for (int64_t i = 0; i < part_items.numel(); ++i)
    if (uint32_t(of.part_items[i]) >= uint64_t(s.items))
      TensorView::refuse("part_items", "be below the items");
#endif
  if (!seen_indptr != !seen) TensorView::refuse("seen", "be there where seen_indptr is");
  if (seen) {
    of.seen = data<int32_t>(*seen, "seen", first, DType::i32, seen->numel());
    of.seen_indptr = starts_of(*seen_indptr, "seen_indptr", first, s.users, seen->numel());
  }
  auto* sums = data<float>(loss, "loss", first, DType::f32, grid * grid);
  auto* without = data<int32_t>(skipped, "skipped", first, DType::i32, grid * grid);
  const lspm::BprStep by{step[0], step[1], step[2], step[3], seed};
  run(of.users, of.items,
      [&] { return backend::bpr_update(up, ip, bias, of, sums, without, s, by, WHERE(first, threads)); });
}

#ifndef LSPM_CUDA
void mf_sgd_blocks(const TensorView& users, const TensorView& items, const TensorView& ratings,
                   const OptionalView& weight, const TensorView& user_part, const TensorView& item_part,
                   const TensorView& users_out, const TensorView& items_out, const TensorView& ratings_out,
                   const OptionalView& weight_out, const TensorView& offsets, int threads) {
  check_first(ratings, "ratings");
  const MfSgdRatings of = ratings_of(users, items, ratings, weight, ratings);
  const int64_t n = ratings.numel(), grid = grid_of(offsets);
  const auto* up = data<uint8_t>(user_part, "user_part", ratings, DType::u8, user_part.numel());
  const auto* ip = data<uint8_t>(item_part, "item_part", ratings, DType::u8, item_part.numel());
  const MfSgdRatings to = ratings_of(users_out, items_out, ratings_out, weight_out, ratings);
  if (!to.weights != !of.weights) TensorView::refuse("weight_out", "be there where weight is");
  auto* starts = data<int64_t>(offsets, "offsets", ratings, DType::i64, grid * grid + 1);
  py::gil_scoped_release unlocked;
  for (const auto& [part, size] : {std::pair{up, user_part.numel()}, std::pair{ip, item_part.numel()}})
    for (int64_t i = 0; i < size; ++i)
      if (part[i] >= grid) TensorView::refuse("user_part and item_part", "be below the grid");
  for (int64_t j = 0; j < n; ++j)
    if (uint32_t(of.users[j]) >= uint64_t(user_part.numel()) ||
        uint32_t(of.items[j]) >= uint64_t(item_part.numel()))
      TensorView::refuse("users and items", "be ids of rows of the tables");
  lspm::cpu::mf_sgd_blocks(of, up, ip, const_cast<int32_t*>(to.users), const_cast<int32_t*>(to.items),
                           const_cast<float*>(to.ratings), const_cast<float*>(to.weights), starts, n, grid,
                           threads);
}
#endif

}  // namespace

void bind_mf_sgd(py::module_& m) {
  m.def("mf_sgd_update", &mf_sgd_update, py::arg("user_factors"), py::arg("item_factors"),
        py::arg("user_bias").none(true), py::arg("item_bias").none(true), py::arg("user_squares").none(true),
        py::arg("item_squares").none(true), py::arg("users"), py::arg("items"), py::arg("ratings"),
        py::arg("weight").none(true), py::arg("offsets"), py::arg("loss"), py::arg("step"),
        py::arg("nonnegative"), py::arg("logistic"), py::arg("seed"), py::arg("threads"));
  m.def("bpr_update", &bpr_update, py::arg("user_factors"), py::arg("item_factors"),
        py::arg("item_bias").none(true), py::arg("users"), py::arg("items"), py::arg("offsets"),
        py::arg("part_items"), py::arg("part_offsets"), py::arg("seen_indptr").none(true),
        py::arg("seen").none(true), py::arg("loss"), py::arg("skipped"), py::arg("step"), py::arg("seed"),
        py::arg("threads"));
#ifndef LSPM_CUDA
  m.def("mf_sgd_blocks", &mf_sgd_blocks, py::arg("users"), py::arg("items"), py::arg("ratings"),
        py::arg("weight").none(true), py::arg("user_part"), py::arg("item_part"), py::arg("users_out"),
        py::arg("items_out"), py::arg("ratings_out"), py::arg("weight_out").none(true), py::arg("offsets"),
        py::arg("threads"));
#endif
}
