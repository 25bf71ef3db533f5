"""Bugs in embedding, on every backend and in what leads to it."""

import sys
from functools import partial

from mutations import Mutation

TESTS = ("tests/ops/test_embedding.py", "tests/ops/test_embedding_errors.py", "-x")
OPERATOR = ("tests/ops/test_embedding.py", "tests/ops/test_embedding_operator.py", "-x")
TRITON = ("tests/ops/test_embedding_triton.py", "-x", "-k", "not spills")
# Only this one, so that no module without the bug is left to run the tests.
SETUP = f"LSPM_ISAS=base LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
BUILD = ("sh", "-c", f"rm -rf lspm_kernels/_cpu && {SETUP}")

in_kernel = partial(Mutation, file="csrc/cpu/embedding.cpp", tests=TESTS, command=BUILD)
in_op = partial(Mutation, file="lspm_kernels/ops/embedding.py", tests=OPERATOR)
in_triton = partial(Mutation, file="lspm_kernels/triton/embedding.py", tests=TRITON)

MUTATIONS = [
    in_kernel(
        name="embedding, cpu: an id that is a table's length taken",
        old="id >= lookup.rows",
        new="id > lookup.rows",
    ),
    in_kernel(
        name="embedding, cpu: tokens alone checked",
        old="for (const Lookup& lookup : lookups) Ids{lookup, shape}.check();",
        new="Ids{lookups[0], shape}.check();",
    ),
    in_kernel(
        name="embedding, cpu: places go on from one sequence to the next",
        old="s.first + r % s.length",
        new="s.first + r",
    ),
    in_kernel(
        name="embedding, cpu: the statistics see the sum before it is rounded",
        old="const auto v = lanes.rounded(sum(i, lanes));",
        new="const auto v = sum(i, lanes);",
    ),
    in_kernel(name="embedding, cpu: eps lost", old="/ dim + s.eps)", new="/ dim)"),
    in_kernel(
        name="embedding, cpu: every row drops what the first drops",
        old="factors(r * dim, dim, w.factors)",
        new="factors(0, dim, w.factors)",
    ),
    in_kernel(
        name="embedding, cpu: what is dropped multiplied by 0",
        file="csrc/cpu/dropout.h",
        old="return factor != 0 ? v * factor : F{};",
        new="return v * factor;",
    ),
    in_kernel(
        name="embedding, cpu: rows that begin within a block drop what it begins with",
        file="csrc/cpu/dropout.h",
        old="return room + first - begin;",
        new="return room;",
    ),
    in_kernel(
        name="embedding, binding: positions beyond their table read",
        file="csrc/bindings_embedding.cpp",
        old="s.first + s.length > rows",
        new="s.first > rows",
    ),
    in_op(
        name="embedding, op: the padding's row has a gradient",
        old="of_table(0, tokens, wants[1], ctx.padding_idx)",
        new="of_table(0, tokens, wants[1])",
    ),
    in_op(
        name="embedding, op: gradients of positions from the first on",
        old="ids = torch.arange(ctx.first, ctx.first + T,",
        new="ids = torch.arange(0, T,",
    ),
    in_op(
        name="embedding, op: the norm's gradients without dropout's scale",
        old="of_norm = [(grad * scale).to(",
        new="of_norm = [grad.to(",
    ),
    in_op(
        name="embedding, op: the gradient below the norm without dropout's scale",
        old="scaled = norm_weight.float() * scale if ctx.p",
        new="scaled = norm_weight.float() if ctx.p",
    ),
    in_op(
        name="embedding, op: the sum normalised twice",
        old="*tensors[:6], None, None, None, -1,",
        new="*tensors[:8], None, -1,",
    ),
    in_op(
        name="embedding, op: tables kept without a norm",
        old="tensors = tokens, None, positions, None, token_types, None, None, None",
        new="tensors = [*tensors[:7], output[0]]",
    ),
    in_op(
        name="embedding, op: p of 1 divides by 0",
        file="lspm_kernels/ops/dropout.py",
        old="return 1 / (1 - p) if p < 1 else 0.0",
        new='return 1 / (1 - p) if p < 1 else float("inf")',
    ),
    in_triton(
        name="embedding, triton: an id outside a table is read",
        old="known = (own >= 0) & (own < rows)",
        new="known = own < rows",
    ),
    in_triton(
        name="embedding, triton: the mean of columns that are none",
        old="tl.sum(tl.where(col < dim, value, 0.0), 0) / dim",
        new="tl.sum(value, 0) / COLS",
    ),
    in_triton(
        name="embedding, triton: rows that begin within a counter's elements drop by whole ones",
        old="ALIGNED=dim % 64 == 0",
        new="ALIGNED=True",
    ),
    in_triton(
        name="embedding, triton: the second word of four for the third",
        file="lspm_kernels/triton/hashing.py",
        old="tl.where(word == 2, w2, w3)",
        new="tl.where(word == 2, w1, w3)",
    ),
]
