"""Bugs in dropout, on every backend and in what leads to it."""

import sys
from functools import partial

from mutations import Mutation

TESTS = ("tests/ops/test_dropout.py", "-x")
TRITON = ("tests/ops/test_dropout_triton.py", "-x", "-k", "sm_80 and not spills")
# Only this one, so that no module without the bug is left to run the tests.
SETUP = f"LSPM_ISAS=base LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
BUILD = ("sh", "-c", f"rm -rf lspm_kernels/_cpu && {SETUP}")

in_kernel = partial(Mutation, file="csrc/cpu/dropout.cpp", tests=TESTS, command=BUILD)
in_op = partial(Mutation, file="lspm_kernels/ops/dropout.py", tests=TESTS)
in_triton = partial(Mutation, file="lspm_kernels/triton/dropout.py", tests=TRITON)

MUTATIONS = [
    in_kernel(
        name="dropout, cpu: words of bfloat16 in the order of memory",
        old="if constexpr (lanes.kApart) unzip(first, second);",
        new="",
    ),
    in_kernel(
        name="dropout, cpu: the end of a range draws the words of the beginning",
        old="for_each_word(drop.seed, 0, whole, end,",
        new="for_each_word(drop.seed, 0, 0, end - whole,",
    ),
    in_kernel(
        name="dropout, cpu: no residual in whole blocks",
        old="if constexpr (kResidual) value += lanes.load(residual + i);\n        write",
        new="write",
    ),
    in_kernel(
        name="dropout, cpu: what is dropped multiplied by 0",
        file="csrc/cpu/dropout.h",
        old="word >= threshold ? unfused(v * scale) : F{}",
        new="unfused(v * (word >= threshold ? broadcast(scale) : F{}))",
    ),
    in_kernel(
        name="dropout, cpu: a word at the threshold dropped",
        file="csrc/dropout.h",
        old="return uint32_t(std::min(p * 4294967296.0, 4294967295.0));",
        new="return uint32_t(std::min(p * 4294967296.0, 4294967295.0)) & 0xffff0000u;",
    ),
    in_kernel(
        name="dropout, cpu: the upper half of the seed lost",
        file="csrc/cpu/philox.h",
        old="second = uint32_t(seed >> 32);",
        new="second = 0;",
    ),
    in_kernel(
        name="dropout, binding: a residual of another size read",
        file="csrc/bindings_embedding.cpp",
        old='optional(residual, "residual", x, type, n)',
        new='optional(residual, "residual", x, type, residual ? residual->numel() : 0)',
    ),
    in_op(
        name="dropout, op: the backward draws others",
        old="dx = drop(ctx.row, dout, None, seed, ctx.p, ctx.scale)",
        new="dx = drop(ctx.row, dout, None, seed + 1, ctx.p, ctx.scale)",
    ),
    in_op(
        name="dropout, op: no gradient of the residual",
        old="dout if wants_dresidual else None",
        new="None",
    ),
    in_op(
        name="dropout, op: a residual that is not contiguous read as if it were",
        old="None if residual is None else residual.contiguous()",
        new="None if residual is None else residual.as_strided(x.shape, x.stride())",
    ),
    in_triton(
        name="dropout, triton: every block has the words of the first",
        old="words_of(seed, first * 0, first, BLOCK)",
        new="words_of(seed, first * 0, first * 0, BLOCK)",
    ),
    in_triton(
        name="dropout, triton: words of four elements in the order in which they are drawn",
        file="lspm_kernels/triton/hashing.py",
        old="tl.join(tl.join(w0, w2), tl.join(w1, w3))",
        new="tl.join(tl.join(w0, w1), tl.join(w2, w3))",
    ),
    in_triton(
        name="dropout, triton: a signed threshold",
        old="drawn >= threshold.to(tl.uint32)",
        new="drawn.to(tl.int32, bitcast=True) >= threshold.to(tl.int32)",
    ),
]
