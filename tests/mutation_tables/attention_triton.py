"""Bugs in the Triton kernels of attention."""

from mutations import Mutation

FILE = "lspm_kernels/triton/attention.py"
TILES = "lspm_kernels/triton/attention_tiles.py"
TESTS = "tests/ops/test_attention_triton.py"
SEQUENCES = "tests/ops/test_attention_sequences_triton.py"


def executed(name, case, old, new, file=FILE, tests=TESTS):
    """A bug that a test of this name sees on sm_80."""
    return Mutation(f"triton: attention: {name}", file, old, new, (tests, "-k", f"sm_80 and {case}"))


MUTATIONS = [
    executed("masked load without other", "decoding", "DIM), other=0.0)", "DIM))", TILES),
    executed(
        "window one key too wide",
        "decoding",
        "first + shift - left, 0)",
        "first + shift - left - 1, 0)",
        TILES,
    ),
    executed(
        "queries behind the window are read",
        "not_read",
        "    key_begin, key_end = ",
        "    end = queries\n    key_begin, key_end = ",
    ),
    executed("the sums of another maximum", "plain", "sums * shrink[:, None]", "sums"),
    executed("only one head of a group in dk and dv", "plain", "kv * group + group)", "kv * group + 1)"),
    executed(
        "dropout draws a word of another counter",
        "dropout",
        "first_key // 64 * 16",
        "first_key // 64 * 64",
        TILES,
    ),
    executed(
        "the words of a counter change places",
        "whatever_the_tile",
        "even = tl.join(w0 >= threshold, w2 >= threshold)",
        "even = tl.join(w2 >= threshold, w0 >= threshold)",
        TILES,
    ),
    executed(
        "what dropout drops has a gradient", "dropout", "        dp = dp * keep\n", "        dp = dp\n", TILES
    ),
    executed("no sink in the denominator", "sinks", "total += exp(sink - common)", "total += 0.0"),
    executed(
        "delta without the gradient of lse",
        "sinks",
        "total -= tl.load(dlse + at, mask=row < queries, other=0.0)",
        "total -= 0.0",
    ),
    executed("dk without the cap's slope", "softcap", "ds = (ds * cap_slope).to", "ds = ds.to"),
    executed(
        "dbias of one head alone",
        "bias and key",
        "range(owner % bias_heads, heads, bias_heads)",
        "range(owner % bias_heads, bias_heads, bias_heads)",
    ),
    executed(
        "sequences: the window of the longest",
        "packed_against and causal",
        "        shift = keys - queries\n",
        "        shift = queries * 0\n",
        TILES,
        SEQUENCES,
    ),
    executed(
        "sequences: the statistics of another",
        "packed_against and causal",
        "at = h.to(tl.int64) * packed + tl.load(tensor.starts + b)",
        "at = h.to(tl.int64) * packed",
        TILES,
        SEQUENCES,
    ),
    executed(
        "sequences: a tile's rows lie in the first of its pages",
        "cached and across",
        "page = tl.load(head.pages + row // PAGE_ROWS,",
        "page = tl.load(head.pages + (row * 0 + first) // PAGE_ROWS,",
        TILES,
        SEQUENCES,
    ),
    executed(
        "sequences: pages begin with the first key",
        "cached and padded",
        "                row += head.start\n",
        "                row += 0\n",
        TILES,
        SEQUENCES,
    ),
    Mutation(
        "triton: attention: a tile of more elements than registers",
        TILES,
        "(64, 2, False): Tile(128, 64, 4, 2)",
        "(64, 2, False): Tile(128, 128, 4, 2)",
        (TESTS, "-k", "sm_80 and spills and 64 and not scored"),
    ),
]
