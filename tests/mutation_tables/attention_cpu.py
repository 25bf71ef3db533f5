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
        file="csrc/attention_shape.h",
        old="query + shift + right + 1;",
        new="query + shift + right + 2;",
    ),
    in_kernel(
        name="attention: the causal mask aligned top-left",
        file="lspm_kernels/ops/attention.py",
        old="0 if top_left else k.shape[2] - q.shape[2]",
        new="0",
    ),
    in_kernel(
        name="attention: the scale lost in the forward",
        old="t.q.row_stride, s.scale, w.q, count",
        new="t.q.row_stride, 1.0f, w.q, count",
    ),
    in_kernel(
        name="attention: the scale lost in dq",
        file="csrc/cpu/attention_backward.cpp",
        old="load(sums + r * dq_row + d) * s.scale",
        new="load(sums + r * dq_row + d)",
    ),
    in_kernel(
        name="attention: delta lost",
        file="csrc/cpu/attention_backward.cpp",
        old="inside ? t.dots[row] : 0.0f",
        new="0.0f",
    ),
    in_kernel(
        name="attention: what was summed is not moved to the new maximum",
        old="store(out + d, load(out + d) * shrink[r])",
        new="store(out + d, load(out + d))",
    ),
    in_kernel(
        name="attention: the sum is not moved to the new maximum",
        old="sum[r] = sum[r] * shrink[r] + total.total()",
        new="sum[r] = sum[r] + total.total()",
    ),
    in_kernel(
        name="attention: columns that the mask hides keep their p in the forward",
        old="put(first_lanes(exp(load(score + n) * scale - base[r]), sees - n, F{}))",
        new="put(exp(load(score + n) * scale - base[r]))",
    ),
    in_kernel(
        name="attention: query heads read the wrong key head",
        old="const int64_t kv = h / s.group()",
        new="const int64_t kv = h % s.kv_heads",
    ),
    in_kernel(
        name="attention: dq starts anew with every key tile",
        file="csrc/cpu/attention_backward.cpp",
        old="turn > seen.first)",
        new="false)",
    ),
    in_kernel(
        name="attention: dq of a query that sees no key is not written",
        file="csrc/cpu/attention_backward.cpp",
        old="std::fill_n(t.dq.at<T>(b, h, i + r), D, T{})",
        new="void()",
    ),
    in_kernel(
        name="attention: the key tiles take no turns",
        file="csrc/cpu/parallel.h",
        old="while (turns[i].load(std::memory_order_acquire) != turn) std::this_thread::yield();",
        new="(void)i, (void)turn;",
    ),
    in_kernel(
        name="attention: rows are taken to lie one after the other",
        old="pack_left(t.q.at<const T>(b, h, begin), t.q.row_stride",
        new="pack_left(t.q.at<const T>(b, h, begin), s.head_dim",
    ),
    in_kernel(
        name="attention: the window begins one key late",
        file="csrc/attention_shape.h",
        old="query + shift - left;",
        new="query + shift - left + 1;",
        tests=("tests/ops/test_attention_options.py", "-x"),
    ),
    in_kernel(
        name="attention: the columns that the window hides at a tile's begin are seen",
        file="csrc/cpu/scores.h",
        old="hidden > n ? first_lanes(broadcast(-kInfinity), hidden - n, v) : v",
        new="v",
        tests=("tests/ops/test_attention_options.py", "-x"),
    ),
    in_kernel(
        name="attention: the cap's slope lost",
        file="csrc/cpu/scores.h",
        old="1.0f - part * part",
        new="broadcast(1.0f)",
        tests=("tests/ops/test_attention_options.py", "-x"),
    ),
    in_kernel(
        name="attention: what is masked is seen and what is not is hidden",
        file="csrc/cpu/scores.h",
        old="select(dense ? at : lanes, score, broadcast(-kInfinity))",
        new="select(dense ? at : lanes, broadcast(-kInfinity), score)",
        tests=("tests/ops/test_attention_options.py", "-x"),
    ),
    in_kernel(
        name="attention: the backward draws another dropout",
        file="csrc/cpu/scores.h",
        old="x[3] += uint32_t(t.batch);",
        new="x[3] += uint32_t(t.batch + (s.dropout > 0 && t.rows > 32));",
        tests=("tests/ops/test_attention_options.py", "-x"),
    ),
    in_kernel(
        name="attention: what dropout keeps is not divided",
        file="csrc/cpu/scores.h",
        old="broadcast(float(1.0 / (1.0 - s.dropout)))",
        new="broadcast(1.0f)",
        tests=("tests/ops/test_attention_options.py", "-x"),
    ),
    in_kernel(
        name="attention: philox loses a round",
        file="csrc/cpu/philox.h",
        old="round < 10",
        new="round < 9",
        tests=("tests/ops/test_attention_options.py", "-x"),
    ),
    in_kernel(
        name="attention: a bias of many heads has the gradient of one",
        file="csrc/cpu/attention_backward.cpp",
        old="h < s.heads; h += heads",
        new="h < heads; h += heads",
        tests=("tests/ops/test_attention_options.py", "-x"),
    ),
    in_kernel(
        name="attention: the gradient of lse lost",
        file="csrc/cpu/attention_backward.cpp",
        old="renewed ? float(product - (t.dlse ? t.dlse[row] : 0.0f))",
        new="renewed ? float(product)",
        tests=("tests/ops/test_attention_options.py", "-x"),
    ),
    in_kernel(
        name="attention: the sink's share of the denominator lost in the backward",
        file="csrc/cpu/attention_backward.cpp",
        old="sums.total() + std::exp(double(sink) - zero)",
        new="sums.total()",
        tests=("tests/ops/test_attention_options.py", "-x"),
    ),
    in_kernel(
        name="attention: the dots of few queries are not moved to the new maximum",
        file="csrc/cpu/attention_backward.cpp",
        old="dot = dot * shrink + dots.total();",
        new="dot = dot + dots.total();",
        tests=("tests/ops/test_attention_options.py", "-x", "-k", "few"),
    ),
    in_kernel(
        name="attention: the dots of few queries without the gradient of lse",
        file="csrc/cpu/attention_backward.cpp",
        old="float(dot - (t.dlse ? t.dlse[row] : 0.0f));",
        new="float(dot);",
        tests=("tests/ops/test_attention_options.py", "-x", "-k", "few"),
    ),
]
