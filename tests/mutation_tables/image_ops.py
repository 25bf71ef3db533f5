"""Bugs in max_pool2d and global_avg_pool, on every backend and in what leads to them."""

import sys
from functools import partial

from mutations import Mutation

CPU = ("tests/ops/test_max_pool2d.py", "tests/ops/test_global_avg_pool.py", "-x")


def build(isa):
    """Only this one, so that no module without the bug is left to run the tests."""
    setup = f"LSPM_ISAS={isa} LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
    return "sh", "-c", f"rm -rf lspm_kernels/_cpu && {setup}"


in_max = partial(Mutation, file="csrc/cpu/max_pool2d.cpp", tests=CPU, command=build("base"))
in_axis = partial(in_max, file="csrc/pool_axis.h")
in_mean = partial(in_max, file="csrc/cpu/global_avg_pool.cpp")
in_op = partial(Mutation, file="lspm_kernels/ops/max_pool2d.py", tests=CPU)
in_cuda = partial(Mutation, tests=("tests/ops/test_image_cuda.py", "-x", "-k", "not asan and pool"))
in_max_cuda = partial(in_cuda, file="csrc/cuda/max_pool2d.cu")
in_mean_cuda = partial(in_cuda, file="csrc/cuda/global_avg_pool.cu")
in_triton = partial(
    Mutation,
    file="lspm_kernels/triton/max_pool2d.py",
    tests=("tests/ops/test_image_triton.py", "-x", "-k", "sm_80 and pool and not spills"),
)

MUTATIONS = [
    in_max(name="max_pool2d, cpu: a NaN is passed over", old=" | (value != value)", new=""),
    in_max(name="max_pool2d, cpu: the last of equal ones", old="value > best[v]", new="value >= best[v]"),
    in_max(
        name="max_pool2d, cpu: every window passes its gradient to all its taps",
        old="lanes.load(positions + at + v * kLanes) == tap ? gradient : F{}",
        new="gradient",
    ),
    in_max(
        name="max_pool2d, cpu: subnormal bfloat16 rounded to 0",
        file="csrc/cpu/simd.h",
        old="inline void store_unchanged(bf16* p, F v) { store(&p->bits, reinterpret_cast<U>(v) >> 16); }",
        new="inline void store_unchanged(bf16* p, F v) { store(p, v); }",
        command=build("avx512_bf16"),
    ),
    in_axis(
        name="max_pool2d: a window's first tap one too late where it begins before the image",
        old="(dilation - 1 - at) / dilation",
        new="(dilation - at) / dilation",
    ),
    in_axis(
        name="max_pool2d: elements between the taps of a dilated window taken for taps",
        old="distance % dilation ? -1 : distance / dilation",
        new="distance / dilation",
    ),
    in_mean(
        name="global_avg_pool, cpu: what eight pixels leave over is left out",
        old="for (; p < pixels; ++p) add",
        new="for (; false; ++p) add",
    ),
    in_mean(
        name="global_avg_pool, cpu: what additions lose is lost",
        old="return lost == lost ? sum + lost : sum;",
        new="return lost == lost ? sum : sum;",
    ),
    in_mean(
        name="global_avg_pool, cpu: the gradient not divided",
        old="+ begin / s.pixels * s.channels + c) / float(s.pixels)",
        new="+ begin / s.pixels * s.channels + c) / 1.0f",
    ),
    in_op(
        name="max_pool2d, op: a last window that begins past the image is kept",
        old="windows - 1 if ceil_mode and (windows - 1) * stride >= n + padding else windows",
        new="windows",
    ),
    in_op(
        name="max_pool2d, op: bytes for windows of more taps than they count",
        old="window[0] * window[1] <= 256",
        new="window[0] * window[1] <= 512",
    ),
    in_max_cuda(
        name="max_pool2d, cuda: threads past the last element",
        old="if (index >= owned) return;\n  const Place own(index, channels / kWidth, rows.out",
        new="const Place own(index, channels / kWidth, rows.out",
    ),
    in_max_cuda(name="max_pool2d, cuda: a NaN is passed over", old=" || value != value", new=""),
    in_max_cuda(
        name="max_pool2d, cuda: vectors of channels that are not aligned",
        old="aligned_for_vectors(dy, positions, dx)",
        new="true",
    ),
    in_mean_cuda(name="global_avg_pool, cuda: a barrier lost", old="  __syncthreads();\n", new=""),
    in_mean_cuda(
        name="global_avg_pool, cuda: sums of one row of threads left out",
        old="row < kRows; ++row",
        new="row < kRows - 1; ++row",
    ),
    in_triton(
        name="max_pool2d, triton: a window takes the row below the image",
        old="(i >= 0) & (i < height)",
        new="(i >= 0) & (i <= height)",
    ),
    in_triton(
        name="max_pool2d, triton: one window too few gathered",
        old="for u in range((KERNEL_H - 1) * DILATION_H // STRIDE_H + 1):",
        new="for u in range((KERNEL_H - 1) * DILATION_H // STRIDE_H):",
    ),
    in_triton(
        name="global_avg_pool, triton: only the first block of pixels",
        file="lspm_kernels/triton/global_avg_pool.py",
        old="for start in range(0, pixels, PIXELS):",
        new="for start in range(0, PIXELS, PIXELS):",
    ),
]
