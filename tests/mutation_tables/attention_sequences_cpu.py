"""Bugs in attention of packed sequences and over caches, seen by the build for the base instruction set."""

from dataclasses import replace
from functools import partial

from mutation_tables.attention_cpu import in_kernel

in_packed = partial(in_kernel, tests=("tests/ops/test_attention_varlen.py", "-x"))
in_cache = partial(in_kernel, tests=("tests/ops/test_attention_with_kv_cache.py", "-x"))
in_errors = partial(in_kernel, tests=("tests/ops/test_attention_varlen_errors.py", "-x"))
in_append = partial(
    in_kernel,
    file="csrc/bindings_attention_with_kv_cache.cpp",
    tests=("tests/ops/test_attention_with_kv_cache_errors.py", "-x"),
)
APPEND = "csrc/cpu/attention_with_kv_cache.cpp"

MUTATIONS = [
    in_packed(
        name="packed: the shift of the longest sequence for all",
        file="csrc/attention_shape.h",
        old="s.shift = s.keys - s.queries;",
        new="s.shift = keys - queries;",
    ),
    in_packed(
        name="packed: the rows of lse as of a dense batch",
        file="csrc/attention_shape.h",
        old="return query_starts ? head * packed + query_starts[batch] + query",
        new="return query_starts ? head * packed + query",
    ),
    in_packed(
        name="packed: a sequence begins where the batch does",
        file="csrc/heads.h",
        old="if (starts) row += starts[batch];",
        new="if (starts) row += starts[0];",
    ),
    in_packed(
        name="packed: turns of the longest sequence",
        file="csrc/cpu/attention_backward.cpp",
        old="KeyTiles(s, i % tiles * kBackwardQueries).first",
        new="KeyTiles(all, i % tiles * kBackwardQueries).first",
    ),
    in_packed(
        name="packed: keys that no query has are not written",
        file="csrc/cpu/attention_backward.cpp",
        old="const int64_t last = std::min(tiles_of_it, whole ? key_tiles : first + 1);",
        new="const int64_t last = s.queries ? std::min(tiles_of_it, whole ? key_tiles : first + 1) : 0;",
    ),
    in_packed(
        name="packed: dots of the first sequence alone",
        file="csrc/cpu/attention_backward.cpp",
        old="const AttentionShape s = all.of(b);\n      const int64_t first = item",
        new="const AttentionShape s = all.of(0);\n      const int64_t first = item",
    ),
    in_packed(
        name="packed: dropout of the first sequence for all",
        file="csrc/cpu/scores.h",
        old="x[3] += uint32_t(t.batch);",
        new="x[3] += uint32_t(s.query_starts ? 0 : t.batch);",
    ),
    in_cache(
        name="cache: a tile read as if its pages lay one behind the other",
        file="csrc/heads.h",
        old="return pages && left < rows ? left : rows;",
        new="return left < 0 ? left : rows;",
    ),
    in_cache(
        name="cache: the table's row of another sequence",
        file="csrc/heads.h",
        old="pages[batch * page_columns + row / page_rows]",
        new="pages[row / page_rows]",
    ),
    in_cache(
        name="cache: the sum of values starts anew with every page",
        file="csrc/cpu/attention_decode.cpp",
        old="sums[r][c] = lanes.load(out + r * out_stride + d + c * kWidth);",
        new="sums[r][c] = V{};",
    ),
    in_cache(
        name="cache: all heads of a chunk read as its first",
        file="csrc/cpu/attention_decode.cpp",
        old="return first_head[row] + head_offset;",
        new="return first_head[row];",
    ),
    in_cache(
        name="cache: the last heads of a sequence left out",
        file="csrc/cpu/attention_decode.cpp",
        old="parts = (all.kv_heads + share - 1) / share;",
        new="parts = all.kv_heads / share;",
    ),
    in_cache(
        name="cache: dims left in the order of pairs",
        file="csrc/cpu/attention_decode.cpp",
        old="lanes.store_ordered(out + d, lanes.load(out + d));",
        new="lanes.store(out + d, lanes.load(out + d));",
    ),
    in_cache(
        name="cache: the keys appended are not counted",
        file="lspm_kernels/ops/attention_with_kv_cache.py",
        old="return table, _with_new(counts, new), begins, max(",
        new="return table, counts, begins, max(",
    ),
    in_cache(
        name="cache: the padding is taken for keys",
        file="lspm_kernels/ops/attention_with_kv_cache.py",
        old="counts = counts - begins",
        new="pass",
    ),
    in_cache(
        name="cache: every query rotated as the first",
        file=APPEND,
        old="turn_to(s.steps ? at : first)",
        new="turn_to(first)",
    ),
    in_cache(
        name="cache: every key rotated as the first of its thread",
        file=APPEND,
        old="position == taken",
        new="taken >= 0",
    ),
    in_cache(
        name="cache: one row of v for all new keys",
        file=APPEND,
        old="t.v.at<const T>(b, 0, i)",
        new="t.v.at<const T>(b, 0, 0)",
    ),
    in_cache(
        name="cache: what is appended leaves no trace for autograd",
        file="lspm_kernels/ops/attention_with_kv_cache.py",
        old="torch.autograd.graph.increment_version(cache)",
        new="pass",
    ),
    in_append(
        name="binding: keys appended to a page past the last",
        old="page < 0 || page >= batches",
        new="page < 0 || page > batches",
    ),
    in_append(
        name="binding: keys appended without an angle",
        old="s.half && first > last",
        new="s.half && first > positions",
    ),
    in_errors(
        name="binding: pages past the last admitted",
        file="csrc/bindings_attention.cpp",
        old="page < 0 || page >= k.size(0)",
        new="page < 0 || page > k.size(0)",
    ),
    in_errors(
        name="binding: sequences past the rows admitted",
        file="csrc/bindings_attention.cpp",
        old="if (starts[batch] != rows)",
        new="if (starts[batch] < rows)",
    ),
]
MUTATIONS = [replace(m, name=f"attention, {m.name}") for m in MUTATIONS]
