"""Embedding bags: a program gathers the rows of one bag; the gradient of the table is summed in two steps.

Forward: a program owns a bag and a block of columns. It gathers tiles of rows, and adds each tile to sums in
float32 that a fixed tree adds up at the end: so many rows are on their way at once, and the order is one.

Backward: a stable sort puts the places of a row side by side, in the order of the indices. The sorted places
are cut into chunks, so that a row that stands in most bags does not hold up all others. A program owns the
part of a row's places that lies in one chunk: where that is all of them it writes the row, else a partial
sum, and the program of the chunk in which the row begins adds up those. So each sum has one owner and one
order, and there are no atomics. Rows in no bag are cleared beforehand.

Bytes: forward a row for each index and each bag; backward a row for each index and each row of the table,
rows that stand in bags twice; an int64 of an index is sorted beside its place.
"""

import torch
import triton
import triton.language as tl

_TILE = 512  # elements: 8 a thread, as ptxas spills some of 16
_WARPS = 2
# Columns of a tile, at least and at most. On sm_90 sums of fewer go through shared memory by a stmatrix whose
# lanes write the same words twice.
_DIM = 32, 128
_CHUNK = 64  # sorted places
# Fused, the lanes of a warp that add a product to each other's get sums that differ in the last bit.
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def _is_padding(index, padding_idx):
    return (index >= 0) & (index == padding_idx)  # below 0 it is none, and such an index is wrong


@triton.jit
def _is_row(index, rows):
    return (index >= 0) & (index < rows)


@triton.jit
def _bounds(offsets, bag, bags, offset_count, count, length):
    """Where a bag begins and ends, and whether offsets say so rightly: else it is empty."""
    if offsets is None:
        begin, end = bag * length, (bag + 1) * length
    else:
        begin = tl.load(offsets + bag).to(tl.int64)
        end = tl.load(offsets + bag + 1, mask=bag + 1 < offset_count, other=count).to(tl.int64)
    right = (begin >= 0) & (begin <= end) & (end <= count)
    right &= ((bag > 0) | (begin == 0)) & ((bag + 1 < bags) | (end == count))
    return begin, tl.where(right, end, begin), right


@triton.jit(do_not_specialize=["rows", "bags", "offset_count", "count", "length", "padding_idx"])
def _forward_kernel(
    weight, indices, offsets, scales, out, rows, dim, bags, offset_count, count, length, padding_idx,
    MEAN: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DIM + tl.arange(0, DIM)
    begin, end, right = _bounds(offsets, bag, bags, offset_count, count, length)
    total = tl.zeros((ENTRIES, DIM), tl.float32)
    taken = tl.zeros((ENTRIES,), tl.int32)
    for start in range(begin, end, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        index = tl.load(indices + place, mask=place < end, other=0).to(tl.int64)
        own = (place < end) & ~_is_padding(index, padding_idx)
        known = own & _is_row(index, rows)
        inside = known[:, None] & (d < dim)[None, :]
        value = tl.load(weight + index[:, None] * dim + d[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.where((known | ~own)[:, None], value, float("nan"))
        if scales is not None:
            value *= tl.load(scales + place, mask=own, other=0.0).to(tl.float32)[:, None]
        total += value
        taken += own.to(tl.int32)
    sums = tl.sum(total, 0)
    if MEAN:
        sums /= tl.maximum(tl.sum(taken, 0), 1).to(tl.float32)
    sums = tl.where(right, sums, float("nan"))
    tl.store(out + bag * dim + d, sums.to(out.dtype.element_ty), mask=d < dim)


@triton.jit(do_not_specialize=["bags", "offset_count", "count", "length", "padding_idx"])
def _shares_kernel(
    indices, offsets, shares, bags, offset_count, count, length, padding_idx, ENTRIES: tl.constexpr
):
    bag = tl.program_id(0).to(tl.int64)
    begin, end, _ = _bounds(offsets, bag, bags, offset_count, count, length)
    taken = tl.zeros((ENTRIES,), tl.int32)
    for start in range(begin, end, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        index = tl.load(indices + place, mask=place < end, other=0).to(tl.int64)
        taken += ((place < end) & ~_is_padding(index, padding_idx)).to(tl.int32)
    tl.store(shares + bag, 1.0 / tl.maximum(tl.sum(taken, 0), 1).to(tl.float32))


@triton.jit
def _begins_at(ordered, place, row):
    """Whether those of a row begin at this sorted place."""
    return (place == 0) | (tl.load(ordered + place - 1, mask=place > 0, other=-1) != row)


@triton.jit
def _has_gradient(row, rows, padding_idx):
    return _is_row(row, rows) & (row != padding_idx)


@triton.jit
def _sum_of_part(
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
def _last_row_of(chunk, ordered, ends, CHUNK: tl.constexpr):
    """The last row of a chunk, where its places end, and whether they begin in this chunk."""
    first = chunk * CHUNK
    row = tl.load(ordered + first + CHUNK - 1).to(tl.int64)
    begins = (tl.load(ordered + first) != row) | _begins_at(ordered, first, row)
    return row, tl.load(ends + chunk), begins


@triton.jit
def _sum_of_parts(parts, chunk, end, dim, d, CHUNK: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr):
    """What the parts of a row add up to that begins in a chunk and goes on to the sorted place `end`."""
    total = tl.zeros((ENTRIES, DIM), tl.float32)
    after = tl.cdiv(end, CHUNK)
    for start in range(chunk, after, ENTRIES):
        at = start + tl.arange(0, ENTRIES)
        part = 2 * at + (at == chunk).to(tl.int64)
        inside = (at < after)[:, None] & (d < dim)[None, :]
        total += tl.load(parts + part[:, None] * dim + d[None, :], mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["rows", "count", "padding_idx"])
def _parts_kernel(
    dout, ordered, order, bag_of, scales, shares, parts, dweight, rows, dim, count, padding_idx,
    CHUNK: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DIM + tl.arange(0, DIM)
    row = tl.load(ordered + first).to(tl.int64)
    begins = _begins_at(ordered, first, row)
    if (begins | (first % CHUNK == 0)) & _has_gradient(row, rows, padding_idx):
        sums, goes_on = _sum_of_part(
            dout, ordered, order, bag_of, scales, shares, first, row, dim, count, d, CHUNK, ENTRIES, DIM
        )
        if begins & ~goes_on:
            tl.store(dweight + row * dim + d, sums.to(dweight.dtype.element_ty), mask=d < dim)
        else:
            part = 2 * (first // CHUNK) + begins.to(tl.int64)
            tl.store(parts + part * dim + d, sums, mask=d < dim)


@triton.jit(do_not_specialize=["rows", "padding_idx"])
def _rows_kernel(
    parts, ordered, ends, dweight, rows, dim, padding_idx,
    CHUNK: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DIM + tl.arange(0, DIM)
    row, end, begins = _last_row_of(chunk, ordered, ends, CHUNK)
    if begins & (end > (chunk + 1) * CHUNK) & _has_gradient(row, rows, padding_idx):
        sums = _sum_of_parts(parts, chunk, end, dim, d, CHUNK, ENTRIES, DIM)
        tl.store(dweight + row * dim + d, sums.to(dweight.dtype.element_ty), mask=d < dim)


@triton.jit(do_not_specialize=["rows", "count", "padding_idx"])
def _weights_kernel(
    dout, weight, indices, bag_of, dweights, rows, dim, count, padding_idx,
    ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    exists = place < count
    index = tl.load(indices + place, mask=exists, other=0).to(tl.int64)
    bag = tl.load(bag_of + place, mask=exists, other=-1).to(tl.int64)
    own = exists & ~_is_padding(index, padding_idx)
    known = own & _is_row(index, rows) & (bag >= 0)
    total = tl.zeros((ENTRIES,), tl.float32)
    for start in range(0, dim, DIM):
        d = (start + tl.arange(0, DIM))[None, :]
        inside = known[:, None] & (d < dim)
        a = tl.load(weight + index[:, None] * dim + d, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(dout + bag[:, None] * dim + d, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 1)
    total = tl.where(known | ~own, total, float("nan"))
    tl.store(dweights + place, total.to(dweights.dtype.element_ty), mask=exists)


def forward(weight, indices, offsets, per_sample_weights, out, padding_idx, mean):
    """Sums or means of bags; the contract is that of csrc/embedding_bag.h, but that nothing is checked.

    An index that is none makes its bag NaN, and so do offsets that are none.
    """
    bags, dim = out.shape
    if out.numel():
        tile = _tile_of(dim)
        grid = bags, triton.cdiv(dim, tile["DIM"])
        tables = weight, indices, offsets, per_sample_weights, out
        numbers = len(weight), dim, *_sizes(indices, offsets, bags), padding_idx
        with torch.cuda.device_of(weight):
            _forward_kernel[grid](*tables, *numbers, MEAN=mean, **tile)


def backward(dout, weight, indices, offsets, per_sample_weights, dweight, dweights, padding_idx, mean):
    """The gradients that are not None, each written whole; an index that is none makes its weight's NaN."""
    (bags, dim), count = dout.shape, indices.numel()
    with torch.cuda.device_of(dout):
        if dweight is not None:
            dweight.zero_()
            if dweight.numel() and count:
                _table(dout, indices, offsets, per_sample_weights, dweight, padding_idx, mean)
        if dweights is not None and count:
            tile = _tile_of(dim)
            grid = (triton.cdiv(count, tile["ENTRIES"]),)
            given = dout, weight, indices, _bags_of(indices, offsets, bags), dweights
            _weights_kernel[grid](*given, len(weight), dim, count, padding_idx, **tile)


def _table(dout, indices, offsets, per_sample_weights, dweight, padding_idx, mean):
    (rows, dim), count, tile = dweight.shape, indices.numel(), _tile_of(dweight.shape[1])
    terms, parts, ends = _sorted_terms(dout, indices, offsets, per_sample_weights, padding_idx, mean)
    blocks = triton.cdiv(dim, tile["DIM"])
    # How many parts there are the GPU alone knows; the program of a place that begins none ends at once.
    _parts_kernel[(count, blocks)](
        *terms, parts, dweight, rows, dim, count, padding_idx, CHUNK=_CHUNK, **tile
    )
    if len(ends):
        given = parts, terms[1], ends, dweight, rows, dim, padding_idx
        _rows_kernel[(len(ends), blocks)](*given, CHUNK=_CHUNK, **tile)


def _sorted_terms(dout, indices, offsets, per_sample_weights, padding_idx, mean):
    """What _sum_of_part takes first; room for parts; where the last row of each chunk but the last ends."""
    bags, dim = dout.shape
    shares = None
    if mean and bags:
        shares = dout.new_empty(bags, dtype=torch.float32)
        sizes = _sizes(indices, offsets, bags)
        _shares_kernel[(bags,)](indices, offsets, shares, *sizes, padding_idx, ENTRIES=32, num_warps=1)
    ordered, order = indices.sort(stable=True)
    ends = torch.searchsorted(ordered, ordered[_CHUNK - 1 : -1 : _CHUNK].contiguous(), right=True)
    # Of each chunk, that of a row that began before it and that of one that goes on after it.
    parts = dout.new_empty(2 * len(ends) + 2, dim, dtype=torch.float32)
    bag_of = _bags_of(indices, offsets, bags)
    return (dout, ordered, order, bag_of, per_sample_weights, shares), parts, ends


def _bags_of(indices, offsets, bags):
    """The bag of each index, int32; -1 where it is in none."""
    count, device = indices.numel(), indices.device
    if offsets is None:
        return torch.arange(bags, dtype=torch.int32, device=device).repeat_interleave(count // bags)
    places = torch.arange(count, dtype=offsets.dtype, device=device)
    return torch.searchsorted(offsets[:bags], places, right=True, out_int32=True) - 1


def _sizes(indices, offsets, bags):
    """How many bags, offsets and indices, and how long a bag is that has no offset."""
    count = indices.numel()
    return bags, 0 if offsets is None else offsets.numel(), count, count // bags


def _tile_of(dim):
    cols = min(max(triton.next_power_of_2(dim), _DIM[0]), _DIM[1])
    return {"ENTRIES": _TILE // cols, "DIM": cols, "num_warps": _WARPS, **_EXACT}
