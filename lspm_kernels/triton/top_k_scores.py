"""The best items of each query, on tiles of queries by items, without the matrix of scores.

A program owns a tile of queries and walks the items tile by tile. A score and its item make one integer, the
better one the larger; where a tile holds any that is better than the last of its query's best so far, bitonic
merges take the best of both. What a query excludes lies sorted and is looked up by bisection, only then.
Scores have one order of additions and integers one order, so results are the same under any schedule.
"""

import torch
import triton
import triton.language as tl

from lspm_kernels import top_k_parts

_QUERIES, _ITEMS, _WARPS = 16, 64, 8
_BYTES = 64  # of a row at a time: with 128, 32 values of float32, registers are spilled
_LEAST = 16  # keys of a query, at least
_NONE = tl.constexpr(-(2**63))  # before every key


@triton.jit
def _keys(scores, item):
    """Larger scores first, NaN before all; of equal ones the smaller item."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # the two zeros are equal
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(scores == scores, ordered, 0x7FFFFFFF)  # noqa: PLR0124
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - item)


@triton.jit
def _excluded(excluded, first, last, item, steps):
    """Whether items (1, N) are among the sorted [first, last) of each query."""
    low = first[:, None] + item * 0
    high = last[:, None] + item * 0
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        less = tl.load(excluded + middle, mask=searching, other=0) < item
        low = tl.where(searching & less, middle + 1, low)
        high = tl.where(searching & (less == 0), middle, high)
    inside = low < last[:, None]
    return inside & (tl.load(excluded + low, mask=inside, other=-1) == item)


@triton.jit(do_not_specialize=["count", "items_count", "steps"])
def _forward_kernel(
    queries, items, item_bias, indptr, excluded, scores, indices, count, items_count, dim, k, query_stride,
    item_stride, steps, KEYS: tl.constexpr, QUERIES: tl.constexpr, ITEMS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    exists = query < count
    if indptr is not None:
        first = tl.load(indptr + query, mask=exists, other=0)
        last = tl.load(indptr + query + 1, mask=exists, other=0)
    best = tl.full((QUERIES, KEYS), _NONE, tl.int64)
    for start in range(0, items_count, ITEMS):
        item = start + tl.arange(0, ITEMS).to(tl.int64)
        live = item < items_count
        total = tl.zeros((QUERIES, ITEMS), tl.float32)
        for begin in range(0, dim, DIM):
            d = begin + tl.arange(0, DIM)
            inside = d < dim
            a = tl.load(
                queries + query[:, None] * query_stride + d[None, :],
                mask=exists[:, None] & inside[None, :],
                other=0.0,
            )
            b = tl.load(
                items + item[None, :] * item_stride + d[:, None],
                mask=live[None, :] & inside[:, None],
                other=0.0,
            )
            total = tl.dot(a, b, total, input_precision="ieee")
        if item_bias is not None:
            total += tl.load(item_bias + item, mask=live, other=0.0)[None, :]
        keys = tl.where(live[None, :] & exists[:, None], _keys(total, item[None, :]), _NONE)
        least = tl.min(best, 1)
        if tl.max((keys > least[:, None]).to(tl.int32)) > 0:
            if indptr is not None:
                keys = tl.where(_excluded(excluded, first, last, item[None, :], steps), _NONE, keys)
            both = tl.join(best, keys if KEYS == ITEMS else tl.topk(keys, KEYS))
            best = tl.topk(tl.reshape(both, (QUERIES, 2 * KEYS)), KEYS)
    place = tl.arange(0, KEYS)
    found = best != _NONE
    ordered = (best >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    score = tl.where(ordered == 0x7FFFFFFF, float("nan"), bits.to(tl.float32, bitcast=True))
    at = query[:, None] * k + place[None, :]
    wanted = exists[:, None] & (place < k)[None, :]
    tl.store(scores + at, tl.where(found, score, float("-inf")), mask=wanted)
    tl.store(indices + at, tl.where(found, 0xFFFFFFFF - (best & 0xFFFFFFFF), -1), mask=wanted)


def forward(queries, items, item_bias, exclude_indptr, exclude_indices, scores, indices):
    """The contract is that of csrc/top_k_scores.h, but that an exclusion that is none excludes nothing.

    Args:
        queries, items: with a contiguous last dimension.
    """
    count, k = scores.shape
    if not count:
        return
    excluded, steps = None, 0
    if exclude_indptr is not None:
        excluded = top_k_parts.in_order(exclude_indptr, exclude_indices)
        steps = max(1, len(excluded).bit_length())
    KEYS = max(_LEAST, triton.next_power_of_2(k))
    numbers = count, len(items), queries.shape[1], k, queries.stride(0), items.stride(0), steps
    tensors = queries, items, item_bias, exclude_indptr, excluded, scores, indices
    tile = {
        "KEYS": KEYS,
        "QUERIES": _QUERIES,
        "ITEMS": max(_ITEMS, KEYS),
        "DIM": _BYTES // items.element_size(),
        "num_warps": _WARPS,
        "maxnreg": 208,
    }
    with torch.cuda.device_of(queries):
        _forward_kernel[(triton.cdiv(count, _QUERIES),)](*tensors, *numbers, **tile)
