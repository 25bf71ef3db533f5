"""Bugs in mf and top_k_scores, and in what leads to them."""

import sys
from dataclasses import replace
from functools import partial

from mutations import Mutation

CPU = ("tests/ops/test_mf.py", "tests/ops/test_top_k_scores.py", "-x")


def build(isa):
    """Only this one, so that no module without the bug is left to run the tests."""
    setup = f"LSPM_ISAS={isa} LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
    return "sh", "-c", f"rm -rf lspm_kernels/_cpu && {setup}"


in_top_cuda = partial(
    Mutation,
    file="csrc/cuda/top_k_scores.cu",
    tests=("tests/ops/test_top_k_scores_cuda.py", "-x", "-k", "not asan"),
)
in_top = partial(Mutation, file="csrc/cpu/top_k_scores.cpp", tests=CPU, command=build("avx2"))
in_mf = partial(in_top, file="csrc/cpu/mf.cpp")
in_op = partial(Mutation, tests=CPU)
in_mf_cuda = partial(
    Mutation, file="csrc/cuda/mf.cu", tests=("tests/ops/test_mf_cuda.py", "-x", "-k", "not asan")
)

MUTATIONS = [
    in_top(
        name="top_k_scores, cpu: of equal scores the larger index first",
        old="| uint32_t(~index);",
        new="| uint32_t(index);",
    ),
    in_top(
        name="top_k_scores, cpu: the threshold is that of one too few",
        old="row.least = score_of(keys[k_ - 1]);",
        new="row.least = score_of(keys[0]);",
    ),
    in_top(
        name="top_k_scores, cpu: an exclusion is passed before its item comes",
        old="*row.excluded == item) return;",
        new="*row.excluded++ == item) return;",
    ),
    in_top(
        name="top_k_scores, cpu: exclusions are taken to be in order",
        old="if (!std::is_sorted(row.excluded, row.last_excluded)) {",
        new="if (false) {",
    ),
    in_top(
        name="top_k_scores, cpu: a NaN is a small number",
        old="bits = score != score ? ~0u : ",
        new="bits = score != score ? 0u : ",
    ),
    in_top(
        name="top_k_scores, cpu: lanes past the last item are items",
        old="here - n < kPanel ? (1u << (here - n)) - 1 : ~0u",
        new="~0u",
    ),
    in_top(
        name="top_k_scores, cpu: the order of a sum depends on the size of its tile",
        file="csrc/cpu/gemm.h",
        old="constexpr int kSums = kInOrder ? 1 : ",
        new="constexpr int kSums = ",
    ),
    in_top(
        name="top_k_scores, cpu: a long sum keeps its last chunk only",
        old="depth_of(chunk), chunk > 0);",
        new="depth_of(chunk), false);",
    ),
    in_top(
        name="top_k_scores, cpu: the first exclusions are not checked",
        old="for (begin += first, end += first; begin < end; ++begin) {",
        new="for (begin += first + 1, end += first; begin < end; ++begin) {",
    ),
    in_op(
        name="top_k_scores, op: a gradient is asked for in vain",
        file="lspm_kernels/ops/top_k_scores.py",
        old='    raise NotImplementedError(f"top_k_scores: {rule}")',
        new="    return None, None, None, None, None, None",
    ),
    in_mf(name="mf, cpu: later runs of a row are lost", old="total[v] += sum[v];", new="total[v] = sum[v];"),
    in_mf(
        name="mf, cpu: ids below 0 are not seen",
        old="if (begin == end || largest < uint64_t(rows_)) return true;",
        new="if (begin == end || int64_t(largest) < rows_) return true;",
    ),
    in_mf(
        name="mf, cpu: each histogram begins at the row's first place",
        old="        place += count;\n",
        new="        place += group + 1 < groups ? 0 : count;\n",
    ),
    in_mf(
        name="mf, cpu: rows past the last pair are not written",
        old="c + 1 < chunks ? row_at((c + 1) * kChunk) : rows;",
        new="row_at(std::min((c + 1) * kChunk, s.pairs));",
    ),
    in_mf(
        name="mf, cpu: no item's bias",
        old="if (item_bias) biases[j] += to_float(item_bias[items[p]]);",
        new="",
    ),
    in_op(
        name="mf, op: the gradients of the two biases exchanged",
        file="lspm_kernels/ops/mf.py",
        old="wanted = ctx.needs_input_grad[:4]",
        new="wanted = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[3:1:-1])",
    ),
    in_mf_cuda(
        name="mf, cuda: an id one past the last",
        old="uint64_t(id) < uint64_t(rows)",
        new="uint64_t(id) <= uint64_t(rows)",
    ),
    in_mf_cuda(
        name="mf, cuda: another row that is none counts as zeros",
        old="(known ? gradient : NAN)",
        new="gradient",
    ),
    in_mf_cuda(
        name="mf, cuda: only the last run of a group's pairs",
        old="total.add(run);",
        new="total = run;",
    ),
    in_mf_cuda(
        name="mf, cuda: warps' sums are read before they are there",
        old="      __syncthreads();\n      if (warp == 0 && first_group) {",
        new="      if (warp == 0 && first_group) {",
    ),
    in_mf_cuda(
        name="mf, cuda: vectors of gradients that are not aligned",
        old="aligned_for_vectors(table.others, table.dfactors)",
        new="aligned_for_vectors(table.others)",
    ),
    in_mf_cuda(
        name="mf, cuda: pairs in the order of users for both tables",
        file="lspm_kernels/ops/mf.py",
        old="order = ids.view(-1).sort",
        new="order = users.view(-1).sort",
    ),
    in_top_cuda(
        name="top_k_scores, cuda: of equal scores the larger index first",
        old="return Key(ordered) << 32 | uint32_t(~item);",
        new="return Key(ordered) << 32 | uint32_t(item + 1);",
    ),
    in_top_cuda(
        name="top_k_scores, cuda: a NaN is a small number",
        old="score != score ? ~0u : of_score >> 31",
        new="of_score >> 31",
    ),
    in_top_cuda(
        name="top_k_scores, cuda: the threshold is that of one too few",
        old="*threshold = keys[k - 1];",
        new="*threshold = keys[k > 1 ? k - 2 : 0];",
    ),
    in_top_cuda(
        name="top_k_scores, cuda: a query's room overflows",
        old="return *count > room - kItems;",
        new="return *count > room - kItems / 2;",
    ),
    in_top_cuda(
        name="top_k_scores, cuda: a warp's swaps not waited for",
        old="        __syncwarp();\n      }\n    if (lane == 0) {",
        new="      }\n    if (lane == 0) {",
    ),
    in_top_cuda(
        name="top_k_scores, cuda: keys sorted before all are there",
        old="    __syncthreads();  // all of the tile's keys are there\n",
        new="",
    ),
    in_top_cuda(
        name="top_k_scores, cuda: a long sum keeps its last piece only",
        old="piece ? sums[n][i] + part[0][n][i] : part[0][n][i]",
        new="part[0][n][i]",
    ),
    in_top_cuda(
        name="top_k_scores, cuda: a piece copied over the one that is read",
        old="      __syncthreads();  // this piece is there, and the one before has been read\n",
        new="",
    ),
    in_top_cuda(
        name="top_k_scores, cuda: queries of a single piece are in the first stage only",
        old="deep > 1 || loaded < 2",
        new="deep > 1",
    ),
    in_top_cuda(
        name="top_k_scores, cuda: the last item that a query excludes is not found",
        old="return low < end && exclusions",
        new="return low + 1 < end && exclusions",
    ),
    in_top_cuda(
        name="top_k_scores, cuda: the last part's best are not joined",
        old="for (int part = 0; part < parts; ++part) {",
        new="for (int part = 0; part < parts - 1; ++part) {",
    ),
    replace(
        in_top_cuda(
            name="top_k_scores, cuda: exclusions of all queries in one order",
            old="return indices[order[rows[order].argsort(stable=True)]]",
            new="return indices[order]",
        ),
        file="lspm_kernels/top_k_parts.py",
    ),
]
