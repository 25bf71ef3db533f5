"""Bugs in sample, and in what it is drawn by."""

import sys
from functools import partial

from mutations import Mutation

CPU = ("tests/ops/test_sample.py", "tests/ops/test_sample_edges.py", "-x")


def build(isa):
    """Only this one, so that no module without the bug is left to run the tests."""
    setup = f"LSPM_ISAS={isa} LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
    return "sh", "-c", f"rm -rf lspm_kernels/_cpu && {setup}"


in_cpu = partial(Mutation, file="csrc/cpu/sample.cpp", tests=CPU, command=build("avx2"))
in_exact = partial(in_cpu, file="csrc/cpu/exact.h")
in_reference = partial(Mutation, file="lspm_kernels/reference/sample.py", tests=CPU)
in_op = partial(Mutation, file="lspm_kernels/ops/sample.py", tests=CPU)
in_triton = partial(
    Mutation,
    file="lspm_kernels/triton/sample.py",
    tests=("tests/ops/test_sample_triton.py", "-x", "-k", "filter or race"),
)

MUTATIONS = [
    in_exact(
        name="sample, cpu: products are added unrounded where there is an instruction for it",
        old='  asm("" : "+v"(v));\n',
        new="",
    ),
    in_exact(
        name="sample, cpu: exponential numbers near 0 have the bits of large ones",
        old="v < 0.25f ? -v : ",
        new="v < 0.0f ? -v : ",
    ),
    in_cpu(
        name="sample, cpu: the bits behind the point are not summed",
        old="(uint64_t(high_[i]) << 16) + low_[i]",
        new="uint64_t(high_[i]) << 16",
    ),
    in_cpu(
        name="sample, cpu: what lay above the weights that are left is forgotten",
        old="high = middle, passed = more;",
        new="high = middle;",
    ),
    in_cpu(
        name="sample, cpu: of the k best only those above the last are kept",
        old="      count = o_.top_k;",
        new="      count = above;",
    ),
    in_cpu(
        name="sample, cpu: a lane past the last token passes",
        old="passing &= (1u << lanes.n) - 1;",
        new="passing &= (2u << lanes.n) - 1;",
    ),
    in_cpu(
        name="sample, cpu: zeros past the last token are its logits",
        old="v = first_lanes(v, lanes.n, least);",
        new="v = first_lanes(v, lanes.n, F{});",
    ),
    in_cpu(
        name="sample, cpu: a vector without a NaN in its first lanes is whole",
        old="broken |= not_at_most(v, most);",
        new="broken = not_at_most(v, most);",
    ),
    in_cpu(
        name="sample, cpu: of equal quotients the last one wins",
        old="token = std::min<int64_t>(token, winner[i] + i)",
        new="token = winner[i]",
    ),
    in_cpu(
        name="sample, cpu: the first token is padding",
        old="if (*token < 0) continue;",
        new="if (*token <= 0) continue;",
    ),
    in_cpu(
        name="sample, cpu: the penalty makes a negative logit more probable",
        old="v < 0 ? v * o_.penalty : v / o_.penalty",
        new="v / o_.penalty",
    ),
    in_cpu(
        name="sample, cpu: every row draws by the same bits",
        old="U x[4] = {{}, U{} + uint32_t(row),",
        new="U x[4] = {{}, {},",
    ),
    in_reference(
        name="sample, reference: top-p goes by what a token reaches, not by what is above it",
        old="cumsum(1) - units_of(ordered)",
        new="cumsum(1)",
    ),
    in_reference(
        name="sample, reference: ties at the top-k's threshold go",
        old="scores < scores.topk",
        new="scores <= scores.topk",
    ),
    in_op(
        name="sample, op: a gradient is asked for in vain",
        old='    raise NotImplementedError(f"sample: {rule}")',
        new="    return (None,) * 11",
    ),
    in_triton(
        name="sample, triton: half of top_p",
        old="needed = tl.maximum(_share(units, high.to(tl.int64), low.to(tl.int64)), 1)",
        new="needed = tl.maximum(_share(units, high.to(tl.int64), low.to(tl.int64)) // 2, 1)",
    ),
    in_triton(
        name="sample, triton: the place of a tile is forgotten",
        old="tl.where(here, before, base)",
        new="base",
    ),
    in_triton(
        name="sample, triton: every tile races by the bits of the first",
        old="quotient = tl.div_rn(w, _exponential(words_of(seed, number, start, TILE)))",
        new="quotient = tl.div_rn(w, _exponential(words_of(seed, number, 0, TILE)))",
    ),
    in_triton(
        name="sample, triton: NaN is no number that breaks a row",
        old='tl.where(score < float("inf"), score, float("inf"))',
        new="score",
    ),
]
