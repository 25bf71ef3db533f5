"""Bugs in mf_als and nmf, and in what leads to them."""

from functools import partial

from mutations import Mutation

from mutation_tables.image_ops import build

CPU = ("tests/ops/test_mf_als.py", "tests/ops/test_mf_als_errors.py", "tests/ops/test_nmf.py", "-x")

in_als = partial(Mutation, file="csrc/cpu/mf_als.cpp", tests=CPU, command=build("base"))
in_cholesky = partial(in_als, file="csrc/cpu/cholesky.h")
in_rows = partial(in_als, file="csrc/cpu/csr_rows.h")
in_nmf = partial(in_als, file="csrc/cpu/nmf.cpp")
in_op = partial(Mutation, file="lspm_kernels/ops/mf_als.py", tests=CPU)
in_nmf_cuda = partial(
    Mutation, file="csrc/cuda/nmf.cu", tests=("tests/ops/test_nmf_cuda.py", "-x", "-k", "not asan")
)
in_als_cuda = partial(
    Mutation, file="csrc/cuda/mf_als.cu", tests=("tests/ops/test_mf_als_cuda.py", "-x", "-k", "not asan")
)
in_rows_cuda = partial(in_als_cuda, file="csrc/cuda/csr_rows.cuh")
in_entries_cuda = partial(in_als_cuda, file="csrc/cuda/mf_als.cuh")
in_loss_cuda = partial(in_als_cuda, file="csrc/cuda/mf_als_loss.cu")
in_loss_triton = partial(
    Mutation,
    file="lspm_kernels/triton/mf_als.py",
    tests=("tests/ops/test_mf_als_triton.py", "-x", "-k", "loss or none"),
)
in_checks = partial(in_op, file="lspm_kernels/csr_checks.py")

MUTATIONS = [
    in_als(
        name="mf_als, cpu: a confidence without its 1",
        old="return v * options.alpha + ones(entry, end);",
        new="return v * options.alpha;",
    ),
    in_als(
        name="mf_als, cpu: a weight that the right side does not have",
        old="return weight ? v * values_at(weight, entry, end) : v;",
        new="return v;",
    ),
    in_als(
        name="mf_als, cpu: a row without entries kept",
        old="std::fill_n(factors_ + row * p_.k, p_.k, 0.0f);",
        new="",
    ),
    in_als(
        name="mf_als, cpu: a step of conjugate gradient where there is no curvature",
        old="if (slope <= kStepEpsilon * steepest[i]) {",
        new="if (false) {",
    ),
    in_als(
        name="mf_als, cpu: rows of fewer entries than K solved without regularisation",
        old="if (!gram_ && !(reg > 0) && count < p_.k) return false;",
        new="",
    ),
    in_als(
        name="mf_als, cpu: the loss counts no columns",
        old="++counts[csr.column(entry)]",
        new="counts[csr.column(entry)] = 1",
    ),
    in_cholesky(
        name="mf_als, cpu: a pivot that is nothing but rounding taken",
        old="if (!(pivot > inverse[b + r]) || ",
        new="if (!(pivot > 0) || ",
    ),
    in_cholesky(
        name="mf_als, cpu: earlier block rows not taken off",
        old="add_outer_products<true>(a, stride, b, a, a,",
        new="add_outer_products<true>(a, stride, 0, a, a,",
    ),
    in_rows(
        name="mf_als, cpu: an index not looked at",
        old="return uint64_t(column) < uint64_t(csr_.columns);",
        new="return column >= 0;",
    ),
    in_rows(
        name="mf_als, cpu: values past a row's end read",
        old="return first_lanes(broadcast(1.0f), n, F{});",
        new="return broadcast(1.0f);",
    ),
    in_rows(
        name="mf_als, cpu: the last row of a run solved in the next one too",
        old="work(first_row(i), first_row(i + 1));",
        new="work(first_row(i), std::min(first_row(i + 1) + 1, csr.rows));",
    ),
    in_nmf(
        name="nmf, cpu: regularised once for all entries",
        old="const float weight = float(last - first) * reg;",
        new="const float weight = reg;",
    ),
    in_op(
        name="mf_als, op: a regularisation that is never weighted",
        old="(float(reg), float(weighted_reg), float(alpha), bool(implicit))",
        new="(float(reg), 0.0, float(alpha), bool(implicit))",
    ),
    in_op(
        name="mf_als, op: a matrix that is not positive definite passed over",
        old="if not_definite >= 0:",
        new="if not_definite > 99:",
    ),
    in_checks(
        name="mf_als, checks: the last index too large",
        old="if low < 0 or high >= columns:",
        new="if low < 0 or high > columns:",
    ),
    in_rows_cuda(
        name="nmf and mf_als, cuda: a column one past the last",
        old="uint64_t(column) < uint64_t(csr.columns)",
        new="uint64_t(column) <= uint64_t(csr.columns)",
    ),
    in_nmf_cuda(
        name="nmf, cuda: the first sums of warps are overwritten by the second",
        old="      __syncthreads();  // every warp has read p, and the next part takes the place\n",
        new="",
    ),
    in_nmf_cuda(
        name="nmf, cuda: what is below the fraction is of one group of lanes",
        old="    below.add_groups();\n",
        new="",
    ),
    in_nmf_cuda(
        name="nmf, cuda: each entry of a long row once for each warp",
        old="group, kWarps * groups);",
        new="group, groups);",
    ),
    in_nmf_cuda(
        name="nmf, cuda: the regularisation of one entry",
        old="if (group == 0) fraction.update(p, row, of.k, float(begins[n + 1] - begins[n]) * reg, eps);",
        new="if (group == 0) fraction.update(p, row, of.k, reg, eps);",
    ),
    in_entries_cuda(
        name="mf_als, cuda: a weight that the right side does not have",
        old="return weight ? weight[entry] * value(entry) : value(entry);",
        new="return value(entry);",
    ),
    in_als_cuda(
        name="mf_als, cuda: rows y staged before those of another tile have been read",
        old="      __syncthreads();  // the rows before these, or another row's solution, have been read\n",
        new="",
    ),
    in_als_cuda(
        name="mf_als, cuda: only the last of a long row's sums",
        old="run = runs ? run + sum : sum;",
        new="run = sum;",
    ),
    in_als_cuda(
        name="mf_als, cuda: a pivot that is nothing but rounding taken",
        old="pivot > least_[first + c] && ",
        new="pivot > 0.0f && ",
    ),
    in_als_cuda(
        name="mf_als, cuda: a column of L read before it is there",
        old="      if (column_ == p && row_ > p) divide_own();\n      __syncthreads();\n",
        new="      if (column_ == p && row_ > p) divide_own();\n",
    ),
    in_als_cuda(
        name="mf_als, cuda: rows of fewer entries than K solved without regularisation",
        old="if (begin == end || lacking) {",
        new="if (begin == end) {",
    ),
    in_als_cuda(
        name="mf_als, cuda: Y'Y once for each warp",
        old="for (int first = team.rank * groups_; first < lanes; first += team.warps * groups_) {",
        new="for (int first = 0; first < lanes; first += groups_) {",
    ),
    in_als_cuda(
        name="mf_als, cuda: a step where there is no curvature",
        old="if (slope <= kStepEpsilon * steepest || left < least) break;",
        new="",
    ),
    in_als_cuda(
        name="mf_als, cuda: the next sums of warps overwrite what others still read",
        old="    __syncthreads();  // the next sums take the place\n",
        new="",
    ),
    in_loss_triton(
        name="mf_als_loss, triton: an index that is none is no term",
        old='        term = tl.where(named, term, float("nan"))\n',
        new="",
    ),
    in_loss_triton(
        name="mf_als_loss, triton: a column's entries not counted",
        old="counts.double() ** reg_exponent * squares",
        new="squares",
    ),
    in_loss_cuda(
        name="mf_als_loss, cuda: a block's last column is the next one's too",
        old="const int64_t groups = blockDim.y, columns",
        new="const int64_t groups = blockDim.y - 1, columns",
    ),
    in_loss_cuda(
        name="mf_als_loss, cuda: each warp of a long row adds its regularisation",
        old="if (rank == 0 && group == 0) total",
        new="if (group == 0) total",
    ),
    in_loss_cuda(
        name="mf_als_loss, cuda: an index that is none is no term",
        old="other ? of.loss(entry, product) : NAN",
        new="other ? of.loss(entry, product) : 0.0f",
    ),
    in_loss_cuda(
        name="mf_als_loss, cuda: the halves of a block's sums not waited for",
        old="    __syncthreads();\n    if (thread < half)",
        new="    if (thread < half)",
    ),
]
