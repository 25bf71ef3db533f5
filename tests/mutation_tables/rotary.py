"""Bugs in rotary, on every backend and in what leads to them."""

import sys
from functools import partial

from mutations import Mutation

TESTS = ("tests/ops/test_rotary.py", "-x")


def build(isa):
    """Only this one, so that no module without the bug is left to run the tests."""
    setup = f"LSPM_ISAS={isa} LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
    return "sh", "-c", f"rm -rf lspm_kernels/_cpu && {setup}"


in_cpu = partial(Mutation, file="csrc/cpu/rotary.cpp", tests=TESTS, command=build("base"))
in_memory = partial(in_cpu, file="csrc/cpu/rotation.h", tests=("tests/test_asan.py",), command=())
in_binding = partial(in_cpu, file="csrc/bindings_rotary.cpp")
in_op = partial(Mutation, file="lspm_kernels/ops/rotary.py", tests=TESTS)
in_cuda = partial(
    Mutation, file="csrc/cuda/rotary.cu", tests=("tests/ops/test_rotary_cuda.py", "-x", "-k", "not asan")
)
in_triton = partial(
    Mutation,
    file="lspm_kernels/triton/rotary.py",
    tests=("tests/ops/test_rotary_triton.py", "-x", "-k", "sm_80 and not spills"),
)

MUTATIONS = [
    in_cpu(
        name="rotary, cpu: the gradient turned as the forward is",
        old="s.inverse ? -1.0f : 1.0f",
        new="1.0f",
    ),
    in_cpu(
        name="rotary, cpu: the offset of the first sequence for all",
        old="offsets[sequence]",
        new="offsets[0]",
    ),
    in_cpu(
        name="rotary, cpu: dims passed through are not written",
        file="csrc/cpu/rotation.h",
        old="std::memcpy(to + 2 * half, from + 2 * half,",
        new="std::memcpy(to + 2 * half, to + 2 * half,",
    ),
    in_cpu(
        name="rotary, cpu: float32 angles in the order of memory beside bfloat16",
        file="csrc/cpu/rotation.h",
        old="lanes.load_ordered(table + i)",
        new="lanes.load(table + i)",
    ),
    in_cpu(
        name="rotary, cpu: streamed though the halves fill no whole lines",
        old="streams(job.out, s.elements(), s.dim | run)",
        new="streams(job.out, s.elements(), 0)",
        command=build("avx2"),  # the base instruction set streams nothing
    ),
    in_memory(
        name="rotary, asan: whole vectors read where the last pairs are fewer",
        old="std::memcpy(room, from + 2 * i, bytes);",
        new="std::memcpy(room, from + 2 * i, sizeof room);",
    ),
    in_memory(
        name="rotary, asan: whole vectors written where the last pairs are fewer",
        old="std::memcpy(to + 2 * i, room, bytes);",
        new="std::memcpy(to + 2 * i, room, sizeof room);",
    ),
    in_binding(
        name="rotary, binding: one position past the table admitted",
        old="last = s.positions - s.rows;",
        new="last = s.positions - s.rows + 1;",
    ),
    in_op(
        name="rotary, op: offsets that are not contiguous read as if they were",
        old="None if offsets is None else offsets.contiguous()",
        new="None if offsets is None else offsets.as_strided(offsets.shape, (1,))",
    ),
    in_op(
        name="rotary, op: a copy of what could be read where it lies",
        file="lspm_kernels/checks.py",
        old="if x.stride(-1) == 1 or x.size(-1) == 1:",
        new="if x.is_contiguous():",
    ),
    in_cuda(
        name="rotary, cuda: single elements of a pair moved together",
        old="apart % kWide == 0 && aligned_for_vectors(x, cos, sin, out)",
        new="apart % kWide == 0",
    ),
    in_cuda(name="rotary, cuda: a position before the table read", old="position >= 0 && ", new=""),
    in_cuda(name="rotary, cuda: rows past the last one", old="if (index >= all_rows) return;", new=""),
    in_cuda(
        name="rotary, cuda: heads past the first of a thread left out",
        old="head += blockDim.y) {",
        new="head += heads) {",
    ),
    in_triton(name="rotary, triton: the gradient turned as the forward is", old="s = -s", new="pass"),
    in_triton(
        name="rotary, triton: heads past the last one stored",
        old="inside = (head < heads) & (col < half)",
        new="inside = col < half",
    ),
    in_triton(
        name="rotary, triton: a position past the table read",
        old=" & (position < positions)",
        new="",
    ),
    in_triton(
        name="rotary, triton: only the first block of pairs",
        old="for start in range(0, half, COLS):",
        new="for start in range(0, COLS, COLS):",
    ),
]
