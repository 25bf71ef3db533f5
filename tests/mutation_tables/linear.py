"""Bugs in linear."""

from functools import partial

from mutations import Mutation

from mutation_tables.cross_entropy import build

CPU = ("tests/ops/test_linear.py", "-x")
in_cpu = partial(Mutation, file="csrc/cpu/linear.cpp", tests=CPU, command=build("base"))
in_op = partial(Mutation, file="lspm_kernels/ops/linear.py", tests=CPU)
in_triton = partial(
    Mutation,
    file="lspm_kernels/triton/linear.py",
    tests=("tests/ops/test_linear_triton.py", "-x", "-k", "sm_80 and not spills", "-m", "not long"),
)

MUTATIONS = [
    in_cpu(
        name="linear, cpu: every output has the scales of the first beside it",
        old="* scale[o * shape.groups()]",
        new="* scale[0]",
    ),
    in_cpu(
        name="linear, cpu: all groups have the first one's scale",
        old="begin += shape.group, ++scale)",
        new="begin += shape.group)",
    ),
    in_cpu(
        name="linear, cpu: rows of the weight taken for contiguous",
        old="const W* const from = w + o * shape.weight_stride + i;",
        new="const W* const from = w + o * shape.inputs + i;",
    ),
    in_cpu(
        name="linear, cpu: x in memory's order beside bfloat16",
        old="PairLanes<float>{}.store(to + i, lanes.load_ordered(to + i));",
        new="PairLanes<float>{}.store(to + i, PairLanes<float>{}.load(to + i));",
        command=build("avx2"),
    ),
    in_cpu(
        name="linear, cpu: a block past the last output",
        old="std::min<int64_t>(kLanes, shape.outputs - output)",
        new="int64_t{kLanes}",
    ),
    in_op(
        name="linear: gradients are lost",
        old="or _differentiates(x, weight, bias)):",
        new="):",
    ),
    in_op(
        name="linear: autocast's dtype is not taken",
        old="(x,) = checks.autocast(x)",
        new="pass",
    ),
    in_op(
        name="quantize_int8: a scale to a row where groups are wanted",
        old="size = group_size or K",
        new="size = K",
    ),
    in_triton(
        name="linear, triton: columns past the last",
        old="inside = (column < inputs - start)[None, :]",
        new="inside = (column < COLUMNS)[None, :]",
    ),
    in_triton(
        name="linear, triton: all groups have the first one's scale",
        old="scales + output * groups + group",
        new="scales + output * groups",
    ),
    in_triton(
        name="linear, triton: scales of rows are lost",
        old="if scales is not None and not GROUPED:",
        new="if scales is not None and GROUPED:",
    ),
]
