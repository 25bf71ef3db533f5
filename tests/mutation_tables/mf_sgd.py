"""Bugs in mf_sgd and bpr, on every backend."""

import sys
from functools import partial

from mutations import Mutation

CPU = ("tests/ops/test_mf_sgd.py", "tests/ops/test_bpr.py", "-x")


def build(isa):
    """Only this one, so that no module without the bug is left to run the tests."""
    setup = f"LSPM_ISAS={isa} LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
    return "sh", "-c", f"rm -rf lspm_kernels/_cpu && {setup}"


in_cpu = partial(Mutation, file="csrc/cpu/mf_sgd.cpp", tests=CPU, command=build("base"))
in_bpr_cpu = partial(in_cpu, file="csrc/cpu/bpr.cpp")
in_square_cpu = partial(in_cpu, file="csrc/cpu/latin_square.h")
in_bits = partial(in_cpu, file="csrc/random_bits.h")
in_cuda = partial(
    Mutation,
    file="csrc/cuda/mf_sgd.cu",
    tests=("tests/ops/test_square_cuda.py", "-x", "-k", "not asan"),
)
in_bpr_cuda = partial(in_cuda, file="csrc/cuda/bpr.cu")
in_square_cuda = partial(in_cuda, file="csrc/cuda/latin_square.cuh")
in_triton = partial(
    Mutation,
    file="lspm_kernels/triton/mf_sgd.py",
    tests=("tests/ops/test_square_triton.py", "-x", "-k", "sm_80"),
)
in_bpr_triton = partial(in_triton, file="lspm_kernels/triton/bpr.py")

MUTATIONS = [
    in_cpu(
        name="mf_sgd, cpu: L1 draws a factor past 0",
        old="v < -shrink ? v + shrink : v == v ? zero : v",
        new="v + shrink",
    ),
    in_cpu(
        name="mf_sgd, cpu: an item's L2 is its user's",
        old="shrink_i = lr_i * i.l2",
        new="shrink_i = lr_i * u.l2",
    ),
    in_cpu(
        name="mf_sgd, cpu: lr divided by the squares and not by their root",
        old="step.lr / std::sqrt(*s.squares)",
        new="step.lr / *s.squares",
    ),
    in_square_cpu(
        name="mf_sgd and bpr, cpu: blocks that share items run at once",
        old="      items.wait(item, turn);\n",
        new="",
    ),
    in_bits(
        name="mf_sgd: both rows of a rating rounded by the same bits",
        old="(x ^ x >> 16) & 0xffffu}",
        new="x >> 16}",
    ),
    in_bits(
        name="bpr: items drawn from half of the part",
        old="random_bits(seed, place) >> 32) *",
        new="random_bits(seed, place) >> 33) *",
    ),
    in_bpr_cpu(
        name="bpr, cpu: an item against itself",
        old="if (i != of.items[j] && !has_seen",
        new="if (!has_seen",
    ),
    in_cuda(
        name="mf_sgd, cuda: a bias learns with the rate of factors",
        old="p.bias += step.lr_bias * ",
        new="p.bias += step.lr * ",
    ),
    in_cuda(
        name="mf_sgd, cuda: an item's row is not handed on to the rating after",
        old="    if (pair.item == before.item) rows.item = from.item;\n",
        new="",
    ),
    in_cuda(
        name="mf_sgd, cuda: an item one past the last",
        file="csrc/cuda/latin_square.cuh",
        old="uint32_t(id) < uint64_t(rows)",
        new="uint32_t(id) <= uint64_t(rows)",
    ),
    in_square_cuda(
        name="mf_sgd and bpr, cuda: the 33rd pair is the first again",
        old="n + 1 < kWarp ? mine : ahead",
        new="mine",
    ),
    in_square_cuda(
        name="mf_sgd and bpr, cuda: vectors of rows that are not aligned",
        old="if (aligned && cols % kWidth == 0)",
        new="if (cols % kWidth == 0)",
    ),
    in_bpr_cuda(
        name="bpr, cuda: the other item's row is not handed on to the pair after",
        old="      if (id == before.other) row = from.other;\n",
        new="",
    ),
    in_bpr_cuda(
        name="bpr, cuda: the last item that a user has seen is drawn",
        old="const int64_t end = clamped(of.seen_indptr[user + 1], begin, shape.seen);",
        new="const int64_t end = clamped(of.seen_indptr[user + 1] - 1, begin, shape.seen);",
    ),
    in_triton(
        name="mf_sgd, triton: nothing between the reads of a rating and its writes",
        old="        tl.debug_barrier()  # several threads read an element, and one writes it\n",
        new="",
    ),
    in_triton(
        name="mf_sgd, triton: the second diagonal has the first one's blocks",
        old="block = step * grid + tl.program_id(0)",
        new="block = tl.program_id(0)",
    ),
    in_bpr_triton(
        name="bpr, triton: the other item moves as the item does",
        old="r - (g * p + lr * l2_item * r)",
        new="r + (g * p - lr * l2_item * r)",
    ),
]
