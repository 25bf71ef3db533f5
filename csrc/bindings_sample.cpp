// sample_forward, which is a CPU's only.
#include <pybind11/stl.h>

#include "bindings.h"
#include "sample.h"

#ifndef LSPM_CUDA
namespace py = pybind11;
using lspm::DType;
using lspm::OptionalView;
using lspm::TensorView;

namespace {

void sample_forward(const TensorView& logits, const OptionalView& temperatures, const OptionalView& previous,
                    const TensorView& tokens, const OptionalView& logprobs, float temperature, int64_t top_k,
                    double top_p, float min_p, float repetition_penalty, bool gumbel, int64_t seed,
                    int threads) {
  check_first(logits, "logits");
  if (logits.dim() != 2) TensorView::refuse("logits", "have 2 dimensions");
  if (logits.size(1) < 1 || logits.size(1) >= 1 << 21)
    TensorView::refuse("logits", "be of 1 to 2097151 tokens");
  if (top_k < 1) refuse_value("top_k", "be at least 1", top_k);
  const int64_t rows = logits.size(0), seen = previous && rows ? previous->numel() / rows : 0;
  const lspm::SampleShape s{rows, logits.size(1), seen, logits.dtype()};
  const lspm::SampleOptions o{temperature, top_k, top_p, min_p, repetition_penalty, gumbel, uint64_t(seed)};
  const void* px = logits.contiguous("logits", logits, s.dtype, rows * s.tokens);
  auto* pt = static_cast<const float*>(optional(temperatures, "temperatures", logits, DType::f32, rows));
  auto* pp = static_cast<const int64_t*>(optional(previous, "previous", logits, DType::i64, rows * seen));
  auto* out = static_cast<int64_t*>(tokens.contiguous("tokens", logits, DType::i64, rows));
  auto* pl = static_cast<float*>(optional(logprobs, "logprobs", logits, DType::f32, rows));
  py::gil_scoped_release unlocked;
  lspm::cpu::sample_forward(px, pt, pp, out, pl, s, o, threads);
}

}  // namespace

void bind_sample(py::module_& m) {
  m.def("sample_forward", &sample_forward, py::arg("logits"), py::arg("temperatures").none(true),
        py::arg("previous").none(true), py::arg("tokens"), py::arg("logprobs").none(true),
        py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
        py::arg("repetition_penalty"), py::arg("gumbel"), py::arg("seed"), py::arg("threads"));
}
#endif
