"""What the Triton kernels of attention share: tiles of tensors, windows, scores and their gradients."""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

HIDDEN = tl.constexpr(float("-inf"))


class Heads(NamedTuple):
    """A tensor (batch, heads, rows, dim) with a contiguous last dimension."""

    data: object
    batch: object
    head: object
    row: object


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


@triton.jit
def head_of(tensor, b, h):
    """Where a head begins."""
    return tensor.data + b.to(tl.int64) * tensor.batch + h.to(tl.int64) * tensor.head


@triton.jit
def place_of_rows(tensor, first, row, DIM: tl.constexpr):
    return first + row.to(tl.int64)[:, None] * tensor.row + tl.arange(0, DIM)[None, :]  # (rows, DIM)


@triton.jit
def inside_rows(row, rows, D: tl.constexpr, DIM: tl.constexpr):
    inside = (row < rows)[:, None]
    if D < DIM:
        inside = inside & (tl.arange(0, DIM) < D)[None, :]
    return inside


@triton.jit
def load_rows(tensor, first, row, rows, D: tl.constexpr, DIM: tl.constexpr):
    """Rows of a head, (len(row), DIM); zeros from the last row and column on."""
    return tl.load(place_of_rows(tensor, first, row, DIM), mask=inside_rows(row, rows, D, DIM), other=0.0)


@triton.jit
def store_rows(tensor, first, row, rows, value, D: tl.constexpr, DIM: tl.constexpr):
    value = value.to(tensor.data.dtype.element_ty)
    tl.store(place_of_rows(tensor, first, row, DIM), value, mask=inside_rows(row, rows, D, DIM))


@triton.jit
def keys_seen(first, last, window):
    """The keys [begin, end) that queries first to last see, or some of them."""
    _, keys, left, right, shift = window
    begin = keys * 0
    end = keys
    if left is not None:
        begin = tl.maximum(first + shift - left, 0)
    if right is not None:
        end = tl.minimum(tl.maximum(last + shift + right + 1, 0), keys)
    return begin, end


@triton.jit
def queries_seeing(first, last, window):
    """The queries [begin, end) that see keys first to last, or some of them."""
    queries, _, left, right, shift = window
    begin = queries * 0
    end = queries
    if right is not None:
        begin = tl.maximum(first - shift - right, 0)
    if left is not None:
        end = tl.minimum(tl.maximum(last - shift + left + 1, 0), queries)
    return begin, end


@triton.jit
def scores_at(tensor, b, h, query, key):
    at = b.to(tl.int64) * tensor.batch + h.to(tl.int64) * tensor.head
    return tensor.data + at + query.to(tl.int64) * tensor.row + key.to(tl.int64) * tensor.key


@triton.jit
def scores(product, b, h, query, key, window, extras, scalars):
    """Turns products into scores, -inf where hidden; and what of a score's gradient the cap leaves.

    query and key are indices, (M, 1) and (1, N), or (1, M) and (N, 1) of transposed products.
    """
    queries, keys, left, right, shift = window
    score = product * scalars.scale
    cap_slope = 1.0
    if scalars.softcap is not None:
        part = libdevice.tanh(score / scalars.softcap)
        cap_slope = 1.0 - part * part
        score = part * scalars.softcap
    visible = (query < queries) & (key < keys)
    if left is not None:
        visible = visible & (key >= query + shift - left)
    if right is not None:
        visible = visible & (key <= query + shift + right)
    if extras.slopes.data is not None:
        score -= tl.load(head_of(extras.slopes, b, h)) * tl.abs(query + shift - key).to(tl.float32)
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
def kept(b, h, query, key, seed, threshold):
    """Which elements dropout keeps. Each draws a word of its own, of four: simple, at four times the cost."""
    nothing = query * 0 + key * 0
    counter = key // 64 * 16 + key % 16 + nothing, query + nothing, h + nothing, b + nothing
    w0, w1, w2, w3 = tl.philox(seed, *counter)
    word = key // 16 % 4
    drawn = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return drawn >= threshold.to(tl.uint32)


@triton.jit
def row_statistics(statistics, dots, head, all_rows, row, queries):
    """Of each row the maximum, the inverse of the denominator, and dots."""
    at = head.to(tl.int64) * queries + row
    inside = row < queries
    maximum = tl.load(statistics + at, mask=inside, other=0.0)
    share = tl.load(statistics + all_rows + at, mask=inside, other=0.0)
    return maximum, share, tl.load(dots + at, mask=inside, other=0.0)


@triton.jit
def gradients(
    product, dp, b, h, query, key, maximum, share, dot, window, extras, seed, threshold, scalars
):  # fmt: skip
    """p, p as dropout leaves it, dp as it is for p, ds before the cap, and what the cap leaves of ds."""
    score, cap_slope = scores(product, b, h, query, key, window, extras, scalars)
    p = tl.exp(score - maximum) * share
    dropped = p
    if threshold is not None:
        keep = tl.where(kept(b, h, query, key, seed, threshold), scalars.kept, 0.0)
        dropped = p * keep
        dp = dp * keep
    return p, dropped, dp, p * (dp - dot), cap_slope
