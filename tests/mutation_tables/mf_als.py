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
        old="if (curvature <= 0) {",
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
    in_nmf_cuda(
        name="nmf, cuda: a column one past the last",
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
]
