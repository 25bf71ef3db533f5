"""Bugs in the Triton kernels of layer norm."""

from functools import partial

from mutations import Mutation

FILE = "lspm_kernels/triton/layer_norm.py"
TESTS = "tests/ops/test_layer_norm_triton.py"
executed = partial(Mutation, file=FILE, tests=(TESTS, "-k", "sm_80 and not spills"))
compiled = partial(Mutation, file=FILE, tests=(TESTS, "-k", "sm_80 and spills"))

MUTATIONS = [
    executed(name="triton: masked load without other", old=", other=0.0)", new=")"),
    executed(
        name="triton: tile one column too wide",
        old="inside = _inside(row < rows, col < cols)",
        new="inside = _inside(row < rows, col <= cols)",
    ),
    executed(
        name="triton: columns past the last one in the variance",
        old="value = tl.where(inside, value - row_mean[:, None], 0.0)",
        new="value -= row_mean[:, None]",
    ),
    executed(
        name="triton: wide rows: columns past the last one in the variance",
        old="tl.where(col < cols, _load(x + row * cols, col, col < cols) - row_mean, 0.0)",
        new="_load(x + row * cols, col, col < cols) - row_mean",
    ),
    executed(name="triton: eps lost", old="value * value, 1) / cols + eps)", new="value * value, 1) / cols)"),
    executed(
        name="triton: sum not rounded before the norm",
        old="value = rounded.to(tl.float32)",
        new="value += _load(residual + start, at, inside)",
    ),
    executed(
        name="triton: sums of fused products",
        old='{"enable_fp_fusion": False}',
        new='{"enable_fp_fusion": True}',
    ),
    executed(
        name="triton: dsum dropped",
        old="        if dsum is not None:\n            grad += _load(dsum, at, inside)\n",
        new="",
    ),
    executed(
        name="triton: mean of the gradient dropped",
        old="grad -= (tl.sum(grad, 1) / cols)[:, None]",
        new="pass",
    ),
    executed(
        name="triton: rows of the next run",
        old="inside = _inside(row < end, col < cols)",
        new="inside = _inside(row < rows, col < cols)",
    ),
    executed(
        name="triton: runs overlap in partial",
        old="    at = run * 2 * cols + col\n    if DWEIGHT:\n        tl.store(partial + at, tl.sum(",
        new="    at = run * cols + col\n    if DWEIGHT:\n        tl.store(partial + at, tl.sum(",
    ),
    executed(name="triton: last run dropped", old="(run < runs)[:, None]", new="(run < runs - 1)[:, None]"),
    compiled(
        name="triton: weight in a layout of its own",
        old="            grad *= _load(weight, col, col < cols)[None, :]\n",
        new="            grad *= _load(weight, col[None, :], (col < cols)[None, :])\n",
    ),
    compiled(
        name="triton: more elements than registers", old="(16, 16) if aligned else (8, 8)", new="(16, 16)"
    ),
]
