"""Bugs in the CPU kernels of layer norm and in what leads to them."""

import sys
from functools import partial

from mutations import Mutation

BUILD = ("env", "LSPM_CUDA=0", sys.executable, "setup.py", "-q", "build_ext", "--inplace")
TESTS = ("tests/ops/test_layer_norm.py", "-x")
in_kernel = partial(Mutation, file="csrc/cpu/layer_norm.cpp", tests=TESTS, command=BUILD)
in_op = partial(Mutation, file="lspm_kernels/ops/layer_norm.py", tests=TESTS)

MUTATIONS = [
    in_kernel(
        name="cpu: the statistics see the sum before it is rounded",
        old="v = lanes.rounded(v + lanes.load(residual + i));",
        new="v = v + lanes.load(residual + i);",
    ),
    in_kernel(name="cpu: eps lost", old="/ cols + eps))", new="/ cols))"),
    in_kernel(
        name="cpu: lanes beyond the row counted into the variance",
        file="csrc/cpu/row_statistics.h",
        old="const F d = lanes.keep(lanes.load(centers_ + groups_ * kLanes + i) - mean);",
        new="const F d = lanes.load(centers_ + groups_ * kLanes + i) - mean;",
    ),
    in_kernel(
        name="cpu: what lies between the means of groups counted once",
        file="csrc/cpu/row_statistics.h",
        old="between * float(kGroup)",
        new="between",
    ),
    in_kernel(
        name="cpu: float32 weights read in the order of memory beside bfloat16",
        file="csrc/cpu/pairs.h",
        old="unzip(v.first, v.second);",
        new="(void)0;",
    ),
    in_kernel(name="cpu: dsum dropped", old="if (dsum) v += lanes.load(dsum + row);", new=""),
    in_kernel(
        name="cpu: dx without the mean of the gradients",
        old="(g - g_mean[k] - normal * gn_mean[k])",
        new="(g - normal * gn_mean[k])",
    ),
    in_kernel(
        name="cpu: a run loses its last row",
        old="std::min(from + run, s.rows)",
        new="std::min(from + run, s.rows) - (run > 16)",
    ),
    in_kernel(
        name="cpu: the last run is not added",
        file="csrc/cpu/runs.h",
        old="p < runs; ++p)",
        new="p + 1 < runs; ++p)",
    ),
    in_op(
        name="op: weights that are not contiguous read as if they were",
        old="        weight, bias = _contiguous(weight), _contiguous(bias)\n",
        new="",
    ),
    in_op(
        name="op: dsum forgotten where y has no gradient",
        old="        return dsum, dsum, None, None, None, None\n",
        new="        return None, None, None, None, None, None\n",
    ),
    Mutation(
        name="operator: gradients of half of the arguments",
        file="lspm_kernels/operator.py",
        old="wants_grad = wants_grad or a.requires_grad",
        new="wants_grad = a.requires_grad",
        tests=TESTS,
    ),
]
