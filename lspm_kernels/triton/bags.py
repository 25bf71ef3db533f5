"""What the Triton kernels of embedding_bag and its update share: bags, and sums over the places of a row.

A stable sort puts the places of a row side by side, in the order of the indices. The sorted places are cut
into chunks, so that a row that stands in most bags does not hold up all others. A program sums the part of a
row's places that lies in one chunk: where that is all of them it has the row's sum, else it leaves a partial
one, and the program of the chunk in which the row begins adds up those. So each sum has one owner and one
order, and there are no atomics.
"""

import torch
import triton
import triton.language as tl

from lspm_kernels.sorted_bags import bags_of

CHUNK = 64  # sorted places
_TILE = 512  # elements: 8 a thread, as ptxas spills some of 16
_WARPS = 2
# Columns of a tile. On sm_90 sums of fewer than 32 go through shared memory by a stmatrix whose lanes write
# the same words twice.
_LEAST, _MOST = 32, 128
# Fused, the lanes of a warp that add a product to each other's get sums that differ in the last bit.
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def is_padding(index, padding_idx):
    return (index >= 0) & (index == padding_idx)  # below 0 it is none, and such an index is wrong


@triton.jit
def is_row(index, rows):
    return (index >= 0) & (index < rows)


@triton.jit
def bounds(offsets, bag, bags, offset_count, count, length):
    """Where a bag begins and ends, and whether offsets say so rightly: else it is empty."""
    if offsets is None:
        begin, end = bag * length, (bag + 1) * length
    else:
        begin = tl.load(offsets + bag).to(tl.int64)
        end = tl.load(offsets + bag + 1, mask=bag + 1 < offset_count, other=count).to(tl.int64)
    right = (begin >= 0) & (begin <= end) & (end <= count)
    right &= ((bag > 0) | (begin == 0)) & ((bag + 1 < bags) | (end == count))
    return begin, tl.where(right, end, begin), right


@triton.jit(do_not_specialize=["bags", "offset_count", "count", "length", "padding_idx"])
def _shares_kernel(
    indices, offsets, shares, bags, offset_count, count, length, padding_idx, ENTRIES: tl.constexpr
):
    bag = tl.program_id(0).to(tl.int64)
    begin, end, _ = bounds(offsets, bag, bags, offset_count, count, length)
    taken = tl.zeros((ENTRIES,), tl.int32)
    for start in range(begin, end, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        index = tl.load(indices + place, mask=place < end, other=0).to(tl.int64)
        taken += ((place < end) & ~is_padding(index, padding_idx)).to(tl.int32)
    tl.store(shares + bag, 1.0 / tl.maximum(tl.sum(taken, 0), 1).to(tl.float32))


@triton.jit
def begins_at(ordered, place, row):
    """Whether those of a row begin at this sorted place."""
    return (place == 0) | (tl.load(ordered + place - 1, mask=place > 0, other=-1) != row)


@triton.jit
def has_gradient(row, rows, padding_idx):
    return is_row(row, rows) & (row != padding_idx)


@triton.jit
def sum_of_part(
    dout, ordered, order, bag_of, scales, shares, first, row, dim, count, d,
    CHUNK: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """What the places of a row from `first` to the end of its chunk add up to, and whether it goes on."""
    last = tl.minimum((first // CHUNK + 1) * CHUNK, count)
    near = first + tl.arange(0, CHUNK)
    same = tl.load(ordered + near, mask=near < last, other=-1) == row
    end = first + tl.sum(same.to(tl.int32), 0)
    total = tl.zeros((ENTRIES, DIM), tl.float32)
    for start in range(first, end, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        place = tl.load(order + at, mask=at < end, other=0)
        bag = tl.load(bag_of + place, mask=at < end, other=-1).to(tl.int64)
        inside = (bag >= 0)[:, None] & (d < dim)[None, :]
        value = tl.load(dout + bag[:, None] * dim + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if scales is not None:
            value *= tl.load(scales + place, mask=at < end, other=0.0).to(tl.float32)[:, None]
        if shares is not None:
            value *= tl.load(shares + bag, mask=bag >= 0, other=0.0)[:, None]
        total += value
    goes_on = (end == last) & (tl.load(ordered + end, mask=end < count, other=-1) == row)
    return tl.sum(total, 0), goes_on


@triton.jit
def last_row_of(chunk, ordered, ends, CHUNK: tl.constexpr):
    """The last row of a chunk, where its places end, and whether they begin in this chunk."""
    first = chunk * CHUNK
    row = tl.load(ordered + first + CHUNK - 1).to(tl.int64)
    begins = (tl.load(ordered + first) != row) | begins_at(ordered, first, row)
    return row, tl.load(ends + chunk), begins


@triton.jit
def sum_of_parts(parts, chunk, end, dim, d, CHUNK: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr):
    """What the parts of a row add up to that begins in a chunk and goes on to the sorted place `end`."""
    total = tl.zeros((ENTRIES, DIM), tl.float32)
    after = tl.cdiv(end, CHUNK)
    for start in range(chunk, after, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        part = 2 * at + (at == chunk).to(tl.int64)
        inside = (at < after)[:, None] & (d < dim)[None, :]
        total += tl.load(parts + part[:, None] * dim + d[None, :], mask=inside, other=0.0)
    return tl.sum(total, 0)


def sorted_terms(dout, indices, offsets, per_sample_weights, padding_idx, mean):
    """What sum_of_part takes first; room for parts; where the last row of each chunk but the last ends."""
    bags, dim = dout.shape
    shares = None
    if mean and bags:
        shares = dout.new_empty(bags, dtype=torch.float32)
        given = indices, offsets, shares, *sizes(indices, offsets, bags), padding_idx
        _shares_kernel[(bags,)](*given, ENTRIES=32, num_warps=1)
    ordered, order = indices.sort(stable=True)
    ends = torch.searchsorted(ordered, ordered[CHUNK - 1 : -1 : CHUNK].contiguous(), right=True)
    # Of each chunk, that of a row that began before it and that of one that goes on after it.
    parts = dout.new_empty(2 * len(ends) + 2, dim, dtype=torch.float32)
    bag_of = bags_of(indices, offsets, bags)
    return (dout, ordered, order, bag_of, per_sample_weights, shares), parts, ends


def sizes(indices, offsets, bags):
    """How many bags, offsets and indices, and how long a bag is that has no offset."""
    count = indices.numel()
    return bags, 0 if offsets is None else offsets.numel(), count, count // bags


def tile_of(dim, least=_LEAST, most=_MOST):
    cols = min(max(triton.next_power_of_2(dim), least), most)
    warps = _WARPS * max(1, cols // _TILE)
    return {"ENTRIES": max(1, _TILE // cols), "DIM": cols, "num_warps": warps, **_EXACT}
