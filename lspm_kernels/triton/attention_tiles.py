"""What the Triton kernels of attention share: tiles and their sizes, windows, scores and their gradients."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

HIDDEN = tl.constexpr(float("-inf"))
_LOG2E = tl.constexpr(1.4426950408889634)


class Heads(NamedTuple):
    """A tensor (batch, heads, rows, dim) with a contiguous last dimension, as csrc/heads.h has it."""

    data: object
    batch: object  # with pages: the stride from page to page
    head: object
    row: object
    starts: object  # (batch + 1), the row at which each sequence begins, or None
    pages: object  # (batch, page_columns), where the rows of each sequence lie, or None
    page_columns: object
    page_rows: object  # constexpr, so that dividing by it takes a shift or a product; None: all in one page


class Head(NamedTuple):
    """The rows of one head of one sequence. None of it is None: Triton 3.6 returns no such tuple."""

    data: object
    row: object
    start: object  # where there are many pages: in which row of them the sequence begins
    pages: object  # or, without pages, data once more
    page: object


class Scores(NamedTuple):
    """A tensor (batch, heads, queries, keys) with strides of 0 where it is broadcast; data None: absent."""

    data: object
    batch: object
    head: object
    row: object
    key: object


class Extras(NamedTuple):
    """What is added to the scores."""

    bias: Scores
    mask: Scores
    slopes: Scores
    sinks: object


class Scalars(NamedTuple):
    scale: object
    softcap: object  # None: no cap
    kept: object  # what dropout multiplies the kept probabilities by


def as_heads(t, starts=None, pages=None):
    """A tensor as the kernels take it; with starts and a batch of 1 its sequences are packed."""
    batch = 0 if starts is not None and t.shape[0] == 1 else t.stride(0)
    columns = None if pages is None else pages.stride(0)
    page_rows = None if pages is None or pages.shape[1] == 1 else tl.constexpr(t.shape[2])
    return Heads(t, batch, *t.stride()[1:3], starts, pages, columns, page_rows)


def as_scores(t):
    """A tensor (B|1, H|1, T_q|1, T_k|1), with strides of 0 where it is 1."""
    if t is None:
        return Scores(None, 0, 0, 0, 0)
    strides = (stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True))
    return Scores(t.view(torch.uint8) if t.dtype == torch.bool else t, *strides)


@triton.jit
def plane_of(tensor, b, h):
    """Where a head begins."""
    return tensor.data + b.to(tl.int64) * tensor.batch + h.to(tl.int64) * tensor.head


@triton.jit
def head_of(tensor, b, h):
    """Head h of sequence b."""
    data = tensor.data + h.to(tl.int64) * tensor.head
    start = 0
    if tensor.starts is not None:
        start = tl.load(tensor.starts + b)
    pages = tensor.data
    if tensor.pages is not None:
        pages = tensor.pages + b.to(tl.int64) * tensor.page_columns
    if tensor.page_rows is None:
        if tensor.pages is not None:
            b = tl.load(pages)
        data += b.to(tl.int64) * tensor.batch
        if tensor.starts is not None:
            data += start.to(tl.int64) * tensor.row
    return Head(data, tensor.row, start, pages, tensor.batch)


@triton.jit
def rows_of(tensor, b, rows):
    """How many rows sequence b has, of at most `rows`."""
    if tensor.starts is not None:
        rows = tl.load(tensor.starts + b + 1) - tl.load(tensor.starts + b)
    return rows


@triton.jit
def sizes_of(b, q, k, key_counts, queries, keys, shift):
    """The queries, keys and shift of sequence b."""
    if key_counts is not None:
        keys = tl.load(key_counts + b)
    else:
        keys = rows_of(k, b, keys)
    queries = rows_of(q, b, queries)
    if q.starts is not None or k.starts is not None or key_counts is not None:
        shift = keys - queries
    return queries, keys, shift


@triton.jit
def rows_begin(tensor, b, h, heads, packed, queries):
    """Where the rows of a head of sequence b begin in lse and the like: csrc/attention_shape.h's row()."""
    if tensor.starts is not None:
        at = h.to(tl.int64) * packed + tl.load(tensor.starts + b)
    else:
        at = (b * heads + h).to(tl.int64) * queries
    return at


@triton.jit
def place_of_rows(
    head, first, rows, ROWS: tl.constexpr, DIM: tl.constexpr, PAGE_ROWS: tl.constexpr, STARTS: tl.constexpr
):
    """Where `ROWS` rows from the first on lie, (ROWS, DIM)."""
    row = first + tl.arange(0, ROWS)
    data = head.data
    if PAGE_ROWS is not None:
        if not STARTS and PAGE_ROWS % ROWS == 0:  # a whole tile lies in one page
            page = tl.load(head.pages + first // PAGE_ROWS)
            data += page.to(tl.int64) * head.page
        else:
            inside = row < rows
            if STARTS:
                row += head.start
            page = tl.load(head.pages + row // PAGE_ROWS, mask=inside, other=0)
            data += (page.to(tl.int64) * head.page)[:, None]
        row %= PAGE_ROWS
    return data + row.to(tl.int64)[:, None] * head.row + tl.arange(0, DIM)[None, :]


@triton.jit
def inside_rows(first, rows, ROWS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr):
    inside = (first + tl.arange(0, ROWS) < rows)[:, None]
    if D < DIM:
        inside = inside & (tl.arange(0, DIM) < D)[None, :]
    return inside


@triton.jit
def load_rows(
    head, first, rows, ROWS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, PAGE_ROWS: tl.constexpr = None,
    STARTS: tl.constexpr = False,
):  # fmt: skip
    """ROWS rows of a head from the first on, (ROWS, DIM); zeros behind the last of `rows` and column D.

    PAGE_ROWS: where they lie on pages of so many; STARTS: and the sequence does not begin with a page.
    """
    places = place_of_rows(head, first, rows, ROWS, DIM, PAGE_ROWS, STARTS)
    return tl.load(places, mask=inside_rows(first, rows, ROWS, D, DIM), other=0.0)


@triton.jit
def store_rows(head, first, rows, value, D: tl.constexpr, DIM: tl.constexpr):
    value = value.to(head.data.dtype.element_ty)
    places = place_of_rows(head, first, rows, value.shape[0], DIM, None, False)
    tl.store(places, value, mask=inside_rows(first, rows, value.shape[0], D, DIM))


@triton.jit
def exp(x):
    """e^x, but 0 below 2^-126: tl.exp takes three instructions more for those."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def keys_seen(first, last, window):
    """The keys [begin, end) that queries first to last see, or some of them; none where first is no query."""
    queries, keys, left, right, shift = window
    begin = keys * 0
    end = keys
    if left is not None:
        begin = tl.maximum(first + shift - left, 0)
    if right is not None:
        end = tl.minimum(tl.maximum(last + shift + right + 1, 0), keys)
    return begin, tl.where(first < queries, end, 0)


@triton.jit
def queries_seeing(first, last, window):
    """The queries [begin, end) that see keys first to last, or some of them; none where first is no key."""
    queries, keys, left, right, shift = window
    begin = queries * 0
    end = queries
    if right is not None:
        begin = tl.maximum(first - shift - right, 0)
    if left is not None:
        end = tl.minimum(tl.maximum(last - shift + left + 1, 0), queries)
    return begin, tl.where(first < keys, end, 0)


@triton.jit
def scores_at(tensor, b, h, query, key):
    return plane_of(tensor, b, h) + query.to(tl.int64) * tensor.row + key.to(tl.int64) * tensor.key


@triton.jit
def scores(
    product, b, h, first_query, first_key, begin, end, window, extras, scalars, TRANSPOSED: tl.constexpr
):
    """Turns a tile of products into scores, -inf where hidden; and what of a score's gradient the cap leaves.

    A tile is (queries, keys), and begin and end say what keys_seen does of each query; or (keys, queries)
    where TRANSPOSED, and they say what queries_seeing does of each key.
    """
    _, _, left, right, shift = window
    row = tl.arange(0, product.shape[0])[:, None]
    column = tl.arange(0, product.shape[1])[None, :]
    if TRANSPOSED:
        query, key = first_query + column, first_key + row
        other = query
        bound = right
    else:
        query, key = first_query + row, first_key + column
        other = key
        bound = left
    score = product * scalars.scale
    cap_slope = 1.0
    if scalars.softcap is not None:
        part = libdevice.tanh(score / scalars.softcap)
        cap_slope = 1.0 - part * part
        score = part * scalars.softcap
    visible = other < end[:, None]
    if bound is not None:
        visible = visible & (other >= begin[:, None])
    if extras.slopes.data is not None:
        score -= tl.load(plane_of(extras.slopes, b, h)) * tl.abs(query + shift - key).to(tl.float32)
    if extras.bias.data is not None:
        score += tl.load(scores_at(extras.bias, b, h, query, key), mask=visible, other=0.0).to(tl.float32)
    if extras.mask.data is not None:
        mask = tl.load(scores_at(extras.mask, b, h, query, key), mask=visible, other=0)
        if mask.dtype == tl.uint8:
            visible = visible & (mask != 0)
        else:
            score += mask.to(tl.float32)
    return tl.where(visible, score, HIDDEN), cap_slope


@triton.jit
def kept(b, h, first_query, first_key, seed, threshold, M: tl.constexpr, N: tl.constexpr):
    """Which elements of a tile dropout keeps, (M, N); first_key is a multiple of N.

    A counter gives the words of four keys that lie 16 apart, and is drawn once for those of them in the tile.
    """
    query = (first_query + tl.arange(0, M))[:, None]
    counter = first_key // 64 * 16 + tl.arange(0, max(16, N // 4))[None, :]
    nothing = query * 0 + counter * 0
    w0, w1, w2, w3 = tl.philox(seed, counter + nothing, query + nothing, h + nothing, b + nothing)
    threshold = threshold.to(tl.uint32)
    if N < 64:
        second = first_key // 32 % 2 == 1
        w0, w1 = tl.where(second, w2, w0), tl.where(second, w3, w1)
    if N == 16:
        keep = tl.where(first_key // 16 % 2 == 1, w1, w0) >= threshold
    elif N == 32:
        words = tl.join(w0 >= threshold, w1 >= threshold)  # (M, 16, 2)
        keep = tl.reshape(tl.permute(words, (0, 2, 1)), (M, N))
    else:
        even = tl.join(w0 >= threshold, w2 >= threshold)
        odd = tl.join(w1 >= threshold, w3 >= threshold)
        words = tl.reshape(tl.join(even, odd), (M, N // 64, 16, 2, 2))  # (.., word // 2, word % 2)
        keep = tl.reshape(tl.permute(words, (0, 1, 3, 4, 2)), (M, N))
    return keep


@triton.jit
def row_statistics(statistics, dots, all_rows, at, inside):
    """Of each row the maximum, the inverse of the denominator, and dots."""
    maximum = tl.load(statistics + at, mask=inside, other=0.0)
    share = tl.load(statistics + all_rows + at, mask=inside, other=0.0)
    return maximum, share, tl.load(dots + at, mask=inside, other=0.0)


@triton.jit
def gradients(
    product, dp, b, h, first_query, first_key, begin, end, maximum, share, dot, window, extras, seed,
    threshold, scalars, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """p, p as dropout leaves it, dp as it is for p, ds before the cap, and what the cap leaves of ds."""
    score, cap_slope = scores(
        product, b, h, first_query, first_key, begin, end, window, extras, scalars, TRANSPOSED
    )
    axis: tl.constexpr = 0 if TRANSPOSED else 1
    p = exp(score - tl.expand_dims(maximum, axis)) * tl.expand_dims(share, axis)
    dropped = p
    if threshold is not None:
        M: tl.constexpr = product.shape[1 - axis]
        N: tl.constexpr = product.shape[axis]
        keep = kept(b, h, first_query, first_key, seed, threshold, M, N)
        if TRANSPOSED:
            keep = tl.trans(keep)
        keep = tl.where(keep, scalars.kept, 0.0)
        dropped = p * keep
        dp = dp * keep
    return p, dropped, dp, p * (dp - tl.expand_dims(dot, axis)), cap_slope


class Tile(NamedTuple):
    """Queries and keys of a tile, and how a program works on it."""

    M: int
    N: int
    num_warps: int
    num_stages: int


# By the wider head dimension, the bytes of an element and whether scores are more than products within a
# window: a bias, mask, cap or dropout takes registers of its own. The largest tiles that no compiler tried
# spills, and whose stages fit the 163 KiB of shared memory of sm_80; with few warps, as those for which a
# tile has no rows left repeat the work of others. Predicted to be fast; where measured, see ON_SM_90.
FORWARD = {
    (64, 2, False): Tile(128, 64, 4, 2),
    (128, 2, False): Tile(128, 64, 8, 2),
    (256, 2, False): Tile(64, 32, 8, 2),
    (64, 4, False): Tile(64, 32, 8, 2),
    (128, 4, False): Tile(16, 32, 8, 1),
    (256, 4, False): Tile(16, 16, 8, 1),
    (64, 2, True): Tile(128, 64, 8, 2),
    (128, 2, True): Tile(128, 32, 8, 2),
    (256, 2, True): Tile(64, 32, 8, 2),
    (64, 4, True): Tile(32, 32, 8, 1),
    (128, 4, True): Tile(16, 32, 8, 1),
    (256, 4, True): Tile(16, 16, 8, 1),
}
BACKWARD = {
    (64, 2, False): Tile(32, 64, 4, 2),
    (128, 2, False): Tile(32, 64, 4, 1),
    (256, 2, False): Tile(32, 32, 4, 1),
    (64, 4, False): Tile(32, 32, 8, 1),
    (128, 4, False): Tile(16, 16, 4, 1),
    (256, 4, False): Tile(16, 16, 8, 1),
    (64, 2, True): Tile(16, 64, 4, 2),
    (128, 2, True): Tile(32, 32, 4, 1),
    (256, 2, True): Tile(16, 32, 8, 1),
    (64, 4, True): Tile(16, 32, 8, 1),
    (128, 4, True): Tile(16, 16, 8, 1),
    (256, 4, True): Tile(16, 16, 8, 1),
}
# By the kernel too: the fastest on an H200 of some 40 that do not spill, causal, with 4096 queries and keys,
# tried once by hand; benchmarks/results/nvidia-h200.json has attention with these tiles.
# With the tiles above, a forward of 64 and of 128 dimensions takes 1.1 and 1.3 times as long, dk and dv of 64
# dimensions 1.1 times, dq 2.2 and 3.1 times.
ON_SM_90 = {
    ("forward", 64, 2, False): Tile(64, 64, 4, 3),
    ("forward", 128, 2, False): Tile(64, 64, 4, 3),
    ("dkdv", 64, 2, False): Tile(64, 64, 4, 2),
    ("dq", 64, 2, False): Tile(64, 64, 4, 3),
    ("dq", 128, 2, False): Tile(128, 64, 8, 3),
}
REGISTERS = 65536  # of a multiprocessor
