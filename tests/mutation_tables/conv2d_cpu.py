"""Bugs in the CPU kernels of conv2d, in its op and in what conv2d_batch_norm makes of it."""

import sys
from functools import partial

from mutations import Mutation

BUILD = (
    "env", "LSPM_CUDA=0", "LSPM_ISAS=avx512_bf16,avx2,base", sys.executable, "setup.py", "-q", "build_ext",
    "--inplace",
)  # fmt: skip
TESTS = ("tests/ops/test_conv2d.py", "-x")
NORM_TESTS = ("tests/ops/test_conv2d_batch_norm.py", "-x")
in_tiles = partial(Mutation, file="csrc/cpu/conv2d_tiles.h", tests=TESTS, command=BUILD)
in_kernel = partial(Mutation, file="csrc/cpu/conv2d.cpp", tests=TESTS, command=BUILD)
in_epilogue = partial(Mutation, file="csrc/cpu/conv2d_epilogue.h", tests=TESTS, command=BUILD)
DEPTHWISE = {
    "tests": ("tests/ops/test_conv2d_depthwise.py", "-x"),
    "command": tuple(part.replace(",avx2,base", "") for part in BUILD),
}
in_plan = partial(Mutation, file="csrc/cpu/conv2d_depthwise.h", **DEPTHWISE)
in_depthwise = partial(Mutation, file="csrc/cpu/conv2d_depthwise.cpp", **DEPTHWISE)
in_depthwise_weight = partial(Mutation, file="csrc/cpu/conv2d_depthwise_weight.cpp", **DEPTHWISE)
in_winograd = partial(Mutation, file="csrc/cpu/conv2d_winograd.h", tests=TESTS, command=BUILD)
in_packed = partial(
    Mutation, file="lspm_kernels/packed_conv2d.py", tests=("tests/ops/test_packed_conv2d.py", "-x")
)
in_recomputation = partial(
    Mutation, file="lspm_kernels/recomputation.py", tests=("tests/ops/test_recomputation.py", "-x")
)
in_weights = partial(Mutation, file="csrc/cpu/conv2d_backward_weight.cpp", tests=TESTS, command=BUILD)
in_op = partial(Mutation, file="lspm_kernels/ops/conv2d.py", tests=TESTS)

MUTATIONS = [
    in_tiles(
        name="conv2d cpu: no zeros to the right of the image",
        old="std::fill_n(to + end * pitch, (width - end) * pitch, O{});",
        new="",
    ),
    in_tiles(
        name="conv2d cpu: rows above the image read",
        old="if (row < 0 || row >= c.height) {",
        new="if (row >= c.height) {",
    ),
    in_tiles(
        name="conv2d cpu: a point is filled up with what was there",
        old="std::fill(at, to + depth, O{});",
        new="",
    ),
    in_tiles(
        name="conv2d cpu: taps of another order taken for rows of them",
        old="c.taps[t].column != c.taps[t / n * n].column + t % n)",
        new="false)",
    ),
    in_tiles(
        name="conv2d cpu: the last of an odd run dropped", old="if (d < end) step(0, One::load_last);", new=""
    ),
    in_tiles(
        name="conv2d cpu: one long sum",
        old="std::is_same_v<O, float> ? 64 : 1024",
        new="1 << 20",
    ),
    in_tiles(
        name="conv2d cpu: the tap's weights are those of the tap before it upside down",
        old="const T* from = weight + tap.filter;",
        new="const T* from = weight + c.taps[c.taps.size() - 1 - (&tap - c.taps.data())].filter;",
    ),
    in_epilogue(
        name="conv2d cpu: residual dropped", old="if (residual) v += lanes.load(residual + out + i);", new=""
    ),
    in_epilogue(
        name="conv2d cpu: scale after shift",
        old="          if (scale) v *= lanes.load(scale + filter + i);\n"
        "          if (shift) v += lanes.load(shift + filter + i);\n",
        new="          if (shift) v += lanes.load(shift + filter + i);\n"
        "          if (scale) v *= lanes.load(scale + filter + i);\n",
    ),
    in_tiles(
        name="conv2d cpu: the gradient of x takes taps that reach no pixel",
        file="csrc/cpu/correlation.h",
        old="if (row % s.stride_h == 0 && column % s.stride_w == 0)",
        new="if (row % s.stride_h == 0)",
    ),
    in_epilogue(
        name="conv2d cpu: statistics of what is not rounded",
        old="const F d = rounded<T>(load(tile + r * kPanel + i)) - first;",
        new="const F d = load(tile + r * kPanel + i) - first;",
        tests=NORM_TESTS,
    ),
    in_epilogue(
        name="conv2d cpu: statistics around zero",
        old="if (!count_) store(first_ + i, rounded<T>(load(tile + i)));",
        new="if (!count_) store(first_ + i, F{});",
        tests=NORM_TESTS,
    ),
    in_weights(
        name="conv2d cpu: every block of pixels begins the sums anew",
        old="b > first_block",
        new="false",
    ),
    in_weights(
        name="conv2d cpu: parts of the sums dropped",
        old="for (int64_t part = 1; part < parts; ++part)",
        new="for (int64_t part = 1; part < 1; ++part)",
    ),
    in_weights(
        name="conv2d cpu: phases of the stride mixed up",
        old="column % w_.c.stride_w) * phase_",
        new="0) * phase_",
    ),
    in_winograd(
        name="conv2d cpu: a tile's inner rows change sides",
        old="const F sum = b + d, difference = d - b;",
        new="const F sum = b + d, difference = b - d;",
    ),
    in_winograd(
        name="conv2d cpu: an infinity reaches a whole tile",
        old="return sum(zero_if_finite) == 0.0f;",
        new="return true;",
    ),
    in_winograd(
        name="conv2d cpu: tiles beyond the last column are written",
        old="std::min(2 * here, c.columns - 2 * column)",
        new="2 * here",
    ),
    in_plan(
        name="depthwise cpu: pixels right of the image are those of the next row",
        old="here >= 0 && here < c.width ?",
        new="here >= 0 ?",
    ),
    in_plan(
        name="depthwise cpu: lanes read the channels of the first group",
        old="(filter + i) / c.filters * depth - first",
        new="0 * i",
    ),
    in_depthwise(
        name="depthwise cpu: weights of pairs in the order of memory",
        old="lanes.store(block + i, lanes.load_ordered(block + i));",
        new="lanes.store(block + i, lanes.load(block + i));",
    ),
    in_depthwise(
        name="depthwise cpu: the residual of the first pixel for all",
        old="lanes.load(residual + at)",
        new="lanes.load(residual + out + filter)",
    ),
    in_depthwise_weight(
        name="depthwise cpu: parts of the weight's gradient dropped",
        old="for (int64_t part = 1; part < parts; ++part)",
        new="for (int64_t part = 1; part < 1; ++part)",
    ),
    in_depthwise_weight(
        name="depthwise cpu: pixels at the end of a row dropped from the weight's gradient",
        old="if (j < columns)",
        new="if (columns < j)",
    ),
    in_packed(
        name="PackedConv2d: weights that change are not packed again",
        old="stale = versions != self._versions",
        new="stale = self._versions is None",
    ),
    in_packed(
        name="PackedConv2d: a copy keeps what was packed",
        old='dict.fromkeys(("_versions", "_packed", "_epilogue", "_last"))',
        new="{}",
    ),
    in_recomputation(
        name="recomputation: checkpoints see other tensors in the second run",
        old="return checks.plain(x) and _hooks is not None and _hooks(False) is None",
        new="return checks.plain(x)",
    ),
    in_recomputation(
        name="recomputation: an output made for nobody is kept", old="if node.takes_remade:", new="if True:"
    ),
    in_op(
        name="conv2d: ReLU's slope forgotten",
        old='if ctx.activation == "relu":',
        new='if ctx.activation == "":',
    ),
    in_op(
        name="conv2d: the bias is not scaled",
        old="moved = bias if scale is None else bias * scale",
        new="moved = bias",
    ),
    Mutation(
        name="conv2d_batch_norm: folded without eps",
        file="lspm_kernels/ops/conv2d_batch_norm.py",
        old="torch.rsqrt(running_var.float() + eps)",
        new="torch.rsqrt(running_var.float())",
        tests=NORM_TESTS,
    ),
    Mutation(
        name="conv2d_batch_norm: folded with the bias twice",
        file="lspm_kernels/ops/conv2d_batch_norm.py",
        old="running_mean.float() - bias",
        new="running_mean.float() + bias",
        tests=NORM_TESTS,
    ),
]
