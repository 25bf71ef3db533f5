"""Bugs in cross_entropy, on every backend and in what leads to it."""

import sys
from functools import partial

from mutations import Mutation

CPU = ("tests/ops/test_cross_entropy.py", "-x")


def build(isa):
    """Only this one, so that no module without the bug is left to run the tests."""
    setup = f"LSPM_ISAS={isa} LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
    return "sh", "-c", f"rm -rf lspm_kernels/_cpu && {setup}"


in_cpu = partial(Mutation, file="csrc/cpu/cross_entropy.cpp", tests=CPU, command=build("base"))
in_sums = partial(in_cpu, file="csrc/cpu/softmax_sums.h")
in_op = partial(Mutation, file="lspm_kernels/ops/cross_entropy.py", tests=CPU)
in_cuda = partial(
    Mutation,
    file="csrc/cuda/cross_entropy.cu",
    tests=("tests/ops/test_image_cuda.py", "-x", "-k", "not asan and not pool"),
)
in_triton = partial(
    Mutation,
    file="lspm_kernels/triton/cross_entropy.py",
    tests=("tests/ops/test_image_triton.py", "-x", "-k", "sm_80 and not pool and not spills"),
)

MUTATIONS = [
    in_sums(
        name="cross_entropy, cpu: sums are not brought to a larger logit",
        old="if (largest > s.largest) s.exps *= std::exp(double(s.largest) - shift);",
        new="",
    ),
    in_sums(
        name="cross_entropy, cpu: sums relative to -inf",
        old="largest == -std::numeric_limits<float>::infinity() ? 0.0f : largest",
        new="largest",
    ),
    in_sums(
        name="cross_entropy, cpu: zeros past a row's end taken for its logits",
        old="return max(first_lanes(v, lanes.n, top), top);",
        new="return max(v, top);",
    ),
    in_cpu(
        name="cross_entropy, cpu: weights in the order of memory beside bfloat16",
        old="return weight ? q * lanes.load_ordered(weight + c) : q;",
        new="return weight ? q * lanes.load(weight + c) : q;",
    ),
    in_cpu(
        name="cross_entropy, cpu: a class one past the last",
        old="classes[row] < shape.classes",
        new="classes[row] <= shape.classes",
    ),
    in_cpu(
        name="cross_entropy, cpu: the last of several wrong classes is named",
        file="csrc/cpu/parallel.h",
        old="while (uint64_t(place) < uint64_t(seen) &&",
        new="while (place != seen &&",
    ),
    in_cpu(
        name="cross_entropy, cpu: the mean over rows, whatever they weigh",
        old="return {(log - (double(get(x + target)) - sums.largest)) * hit + smoothed, weight};",
        new="return {(log - (double(get(x + target)) - sums.largest)) * hit + smoothed, 1};",
    ),
    in_cpu(
        name="cross_entropy, cpu: the gradient of the target's class is not smoothed",
        old="scale * (1 - s.smoothing) * this->weight_of(target)",
        new="scale * this->weight_of(target)",
    ),
    in_op(
        name="cross_entropy, op: a target's gradient silently 0",
        old="not _differentiates(target, weight)",
        new="True",
    ),
    in_op(
        name="cross_entropy, op: rows of images in the order of channels",
        old="t = t.movedim(1, -1)",
        new="t = t.transpose(1, -1)",
    ),
    in_cuda(
        name="cross_entropy, cuda: sums are not brought to a larger logit",
        old="exps *= __expf(past - shift());",
        new="exps *= past == -INFINITY ? 0.0f : 1.0f;",
    ),
    in_cuda(name="cross_entropy, cuda: a barrier lost", old="  __syncthreads();\n", new=""),
    in_cuda(
        name="cross_entropy, cuda: a class below 0 read",
        old="classes[row] >= 0 && classes[row] < count",
        new="classes[row] < count",
    ),
    in_cuda(
        name="cross_entropy, cuda: rows past the last one stored",
        old="if (threadIdx.x > 0 || row >= rows) return;",
        new="if (threadIdx.x > 0) return;",
    ),
    in_cuda(
        name="cross_entropy, cuda: rows that are not aligned read as vectors",
        old="return -int(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kWidth);",
        new="return 0;",
    ),
    in_triton(
        name="cross_entropy, triton: a class below 0 read",
        old="(wanted >= 0) & (wanted < classes)",
        new="(wanted < classes)",
    ),
    in_triton(
        name="cross_entropy, triton: sums relative to -inf",
        old='tl.where(seen == float("-inf"), 0.0, seen)',
        new="seen",
    ),
    in_triton(
        name="cross_entropy, triton: products are not brought to a larger logit",
        old="q * (shift - next_shift) + tl.sum(product, 1)",
        new="tl.sum(product, 1)",
    ),
]
