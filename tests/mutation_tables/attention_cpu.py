"""Bugs in the CPU kernels of attention, seen by the build for the base instruction set."""

import sys
from functools import partial

from mutations import Mutation

# Only this one build, so that no module without the bug is left to run the tests.
BUILD = (
    f"rm -rf lspm_kernels/_cpu && LSPM_ISAS=base LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
)
in_kernel = partial(
    Mutation,
    file="csrc/cpu/attention.cpp",
    tests=("tests/ops/test_attention.py", "-x"),
    command=("sh", "-c", BUILD),
)

MUTATIONS = [
    in_kernel(
        name="attention: the causal mask one key too far",
        file="csrc/attention.h",
        old="last + 1 < keys ? last + 1 : keys",
        new="last + 2 < keys ? last + 2 : keys",
    ),
    in_kernel(
        name="attention: the causal mask aligned top-left",
        file="csrc/attention.h",
        old="query + keys - queries",
        new="query",
    ),
    in_kernel(
        name="attention: the scale lost in the forward",
        old="t.q.row_stride, s.scale, w.q, count",
        new="t.q.row_stride, 1.0f, w.q, count",
    ),
    in_kernel(
        name="attention: the scale lost in dq",
        old="load(sums + r * dq_row + d) * s.scale",
        new="load(sums + r * dq_row + d)",
    ),
    in_kernel(
        name="attention: delta lost",
        old="row < rows ? delta[row] : 0.0f",
        new="0.0f",
    ),
    in_kernel(
        name="attention: what was summed is not moved to the new maximum",
        old="store(out + d, load(out + d) * shrink[r])",
        new="store(out + d, load(out + d))",
    ),
    in_kernel(
        name="attention: the sum is not moved to the new maximum",
        old="sum[r] = sum[r] * shrink[r] + lspm::sum(total)",
        new="sum[r] = sum[r] + lspm::sum(total)",
    ),
    in_kernel(
        name="attention: columns that the mask hides keep their p in the forward",
        old="first_lanes(exp(load(score + n) * scale - max[r]), sees - n, F{})",
        new="exp(load(score + n) * scale - max[r])",
    ),
    in_kernel(
        name="attention: query heads read the wrong key head",
        old="const int64_t kv = h / s.group()",
        new="const int64_t kv = h % s.kv_heads",
    ),
    in_kernel(
        name="attention: dq starts anew with every key tile",
        old="rows, D, columns, key > 0)",
        new="rows, D, columns, false)",
    ),
    in_kernel(
        name="attention: dq of a query that sees no key is not written",
        old="std::fill_n(t.dq.at<T>(b, h, i + r), D, T{})",
        new="void()",
    ),
    in_kernel(
        name="attention: the key tiles take no turns",
        old="while (turns[i].load(std::memory_order_acquire) != turn) std::this_thread::yield();",
        new="(void)i, (void)turn;",
    ),
    in_kernel(
        name="attention: rows are taken to lie one after the other",
        old="pack_left(t.q.at<const T>(b, h, begin), t.q.row_stride",
        new="pack_left(t.q.at<const T>(b, h, begin), s.head_dim",
    ),
]
