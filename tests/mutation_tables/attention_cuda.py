"""Bugs in the CUDA kernels of attention."""

from functools import partial

from mutations import Mutation

TILES, FORWARD, BACKWARD, DECODE = (
    f"csrc/cuda/{name}" for name in
    ("attention_tiles.cuh", "attention.cu", "attention_backward.cu", "attention_decode.cu")
)  # fmt: skip
REFERENCE = "tests/ops/test_attention_cuda.py"
LAYOUTS = "tests/ops/test_attention_cuda_layouts.py"


def seen_by(words, file=REFERENCE):
    return file, "-x", "-m", "not long", "-k", f"check and ({words})"


in_tiles = partial(Mutation, file=TILES)
in_forward = partial(Mutation, file=FORWARD)
in_backward = partial(Mutation, file=BACKWARD)
in_decode = partial(Mutation, file=DECODE)

MUTATIONS = [
    in_tiles(
        name="attention cuda: the window ends one key too early",
        old="near(s.shift + s.right + 1)",
        new="near(s.shift + s.right)",
        tests=seen_by("causal"),
    ),
    in_tiles(
        name="attention cuda: scale lost where there are no extras",
        old="general ? kLog2e : shape.scale * kLog2e",
        new="kLog2e",
        tests=seen_by("plain"),
    ),
    in_tiles(
        name="attention cuda: copies not permuted as ldmatrix reads",
        old="(col ^ permuted % 8 * kChunk)",
        new="col",
        tests=seen_by("plain"),
    ),
    in_tiles(
        name="attention cuda: accumulators stored without permutation",
        old="(n ^ lane_row()) * kChunk",
        new="n * kChunk",
        tests=seen_by("plain"),
    ),
    in_tiles(
        name="attention cuda: 64 counters of dropout to 64 keys",
        old="uint32_t(key / 64 * 16 + 8 * odd",
        new="uint32_t(key / 64 * 64 + 8 * odd",
        tests=seen_by("dropout"),
    ),
    in_tiles(
        name="attention cuda: the lower words of dropout for all transposed rows",
        old="kRows == 1 && word ? x[2 + h]",
        new="false ? x[2 + h]",
        tests=seen_by("dropout"),
    ),
    in_tiles(
        name="attention cuda: huge maxima rounded before they are subtracted",
        old="if (fabsf(shift) > kLarge) {",
        new="if (false) {",
        tests=seen_by("huge"),
    ),
    in_tiles(
        name="attention cuda: pages in order",
        old="pages[page] * page_stride",
        new="page * page_stride",
        tests=seen_by("pages", LAYOUTS),
    ),
    in_forward(
        name="attention cuda: values multiplied before they have come",
        old="    ptx::cp_async_wait<0>();\n    __syncthreads();  // the values have come",
        new="    __syncthreads();  // the values have come",
        tests=seen_by("plain"),
    ),
    in_forward(
        name="attention cuda: keys copied over those that others still multiply",
        old="    __syncthreads();  // the values have come, and every warp is done with the keys\n",
        new="",
        tests=seen_by("plain"),
    ),
    in_forward(
        name="attention cuda: a sink is not in the denominator",
        old="if (sinks) all += ptx::ex2(fmaf(sink, kLog2e, -power));",
        new="",
        tests=seen_by("sinks"),
    ),
    in_backward(
        name="attention cuda: ds without the row's dot product",
        old="dp[i] = p * (dp[i] - row.dot);",
        new="dp[i] = p * dp[i];",
        tests=seen_by("plain"),
    ),
    in_backward(
        name="attention cuda: the gradient passes the cap whole",
        old="dp[i] *= cap_slope[i];",
        new="dp[i] *= 1.0f;",
        tests=seen_by("softcap"),
    ),
    in_backward(
        name="attention cuda: every head of a group with the first one's statistics",
        old="++head, row += head_rows;",
        new="++head;",
        tests=seen_by("plain"),
    ),
    in_backward(
        name="attention cuda: gradients stored over keys that others still multiply",
        old="  __syncthreads();  // every warp is done with the keys and values\n",
        new="",
        tests=seen_by("dims and not everything"),
    ),
    in_decode(
        name="attention cuda: parts added without their scales",
        old="sum += found[(begin + i) * apart + col] * own;",
        new="sum += found[(begin + i) * apart + col];",
        tests=seen_by("divided", LAYOUTS),
    ),
    in_decode(
        name="attention cuda: what warps found of a tile's keys joined without their scales",
        old="sum += from[w * apart + col] * ptx::ex2(from[w * apart + dim] - base_of(largest));",
        new="sum += from[w * apart + col];",
        tests=seen_by("divided", LAYOUTS),
    ),
    in_decode(
        name="attention cuda: every warp takes its keys for the first one's",
        old="return start + own_key + 8 * n",
        new="return start + 8 * n",
        tests=seen_by("divided", LAYOUTS),
    ),
]
