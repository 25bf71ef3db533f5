"""Bugs in batch_norm_act, on every backend and in what leads to them."""

import sys
from functools import partial

from mutations import Mutation

TESTS = ("tests/ops/test_batch_norm_act.py", "-x", "-k", "not every_instruction")


def build(isa):
    """Only this one, so that no module without the bug is left to run the tests."""
    setup = f"LSPM_ISAS={isa} LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
    return "sh", "-c", f"rm -rf lspm_kernels/_cpu && {setup}"


in_cpu = partial(Mutation, file="csrc/cpu/batch_norm_act.cpp", tests=TESTS, command=build("base"))
in_binding = partial(
    in_cpu, file="csrc/bindings_batch_norm_act.cpp", tests=("tests/ops/test_batch_norm_act_errors.py", "-x")
)
in_op = partial(Mutation, file="lspm_kernels/ops/batch_norm_act.py", tests=TESTS)
in_ranks = partial(in_op, tests=("tests/ops/test_batch_norm_act_ranks.py", "-x", "-k", "eager and not aot"))
in_cuda = partial(
    Mutation,
    file="csrc/cuda/batch_norm_act.cu",
    tests=("tests/ops/test_batch_norm_act_cuda.py", "-x", "-k", "not asan"),
)
in_triton = partial(
    Mutation,
    file="lspm_kernels/triton/batch_norm_act.py",
    tests=("tests/ops/test_batch_norm_act_triton.py", "-x", "-k", "sm_80 and not spills"),
)

MUTATIONS = [
    in_cpu(
        name="batch_norm_act, cpu: what lies between the means of runs lost",
        old="deviations[c] + counts[c] * between * between",
        new="deviations[c]",
    ),
    in_cpu(
        name="batch_norm_act, cpu: a last line that is shorter meets columns in the order of pairs",
        old="body(kOne, at + i, all + i,",
        new="body(kOne, at + i, i,",
    ),
    in_cpu(
        name="batch_norm_act, cpu: no shift by the mean of a run's first rows",
        old="means[c] = shift[c] = shift[c] / first;",
        new="means[c] = shift[c] = 0;",
    ),
    in_cpu(
        name="batch_norm_act, cpu: y added to what the activation saw",
        old="z = other;  // y, which is positive where z is",
        new="z += other;",
    ),
    in_cpu(
        name="batch_norm_act, cpu: dx without the mean of the gradients",
        old="taken.gradient - g - taken.deviation * p",
        new="taken.gradient - taken.deviation * p",
    ),
    in_binding(
        name="batch_norm_act, binding: a negative running_var admitted",
        old=" && known.variance[c] >= 0",
        new="",
    ),
    in_op(
        name="batch_norm_act, op: the slope of relu6 taken for that of relu",
        old="ctx.options[1] == _RELU",
        new="ctx.options[1] in (_RELU, 2)",
    ),
    in_op(
        name="batch_norm_act, op: the running variance keeps the batch's bias",
        file="lspm_kernels/reference/batch_norm_act.py",
        old="variance * (count / (count - 1))",
        new="variance",
    ),
    in_ranks(
        name="batch_norm_act, ranks: the sums of all divided by the rows of one",
        old=", group) * share",
        new=", group)",
    ),
    in_ranks(
        name="batch_norm_act, ranks: every rank counted as one",
        file="lspm_kernels/batch_norm.py",
        old="torch.full_like(mean, count)",
        new="torch.ones_like(mean)",
    ),
    in_cuda(
        name="batch_norm_act, cuda: barrier before shared memory is written again lost",
        old="  __syncthreads();  // the previous call has read its values\n",
        new="",
    ),
    in_cuda(
        name="batch_norm_act, cuda: a run up to the last row",
        old="end = begin + rows_per_run < rows ? begin + rows_per_run : rows;",
        new="end = rows;",
    ),
    in_cuda(
        name="batch_norm_act, cuda: channels past the last one",
        old="own_runs = col < channels ? runs : 0;\n  double sums[2] = {};\n",
        new="own_runs = runs;\n  double sums[2] = {};\n",
    ),
    in_triton(
        name="batch_norm_act, triton: rows past the last one in the variance",
        old="deviation = tl.where(inside, value - shift[None, :], 0.0)",
        new="deviation = value - shift[None, :]",
    ),
    in_triton(
        name="batch_norm_act, triton: dx without the mean of the gradients",
        old="grad -= (_load(sums, col, known) / rows)[None, :]",
        new="pass",
    ),
]
