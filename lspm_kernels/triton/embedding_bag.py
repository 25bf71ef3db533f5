"""Embedding bags: a program gathers the rows of one bag; the gradient of the table is summed in two steps.

Forward: a program owns a bag and a block of columns. It gathers tiles of rows, and adds each tile to sums in
float32 that a fixed tree adds up at the end: so many rows are on their way at once, and the order is one.

Backward: the places of a row are summed as bags.py says, and each row is written once. Rows in no bag are
cleared beforehand.

Bytes: forward a row for each index and each bag; backward a row for each index and each row of the table,
rows that stand in bags twice; an int64 of an index is sorted beside its place.
"""

import torch
import triton
import triton.language as tl

from lspm_kernels.sorted_bags import bags_of
from lspm_kernels.triton.bags import (
    CHUNK,
    begins_at,
    bounds,
    has_gradient,
    is_padding,
    is_row,
    last_row_of,
    sizes,
    sorted_terms,
    sum_of_part,
    sum_of_parts,
    tile_of,
)


@triton.jit(do_not_specialize=["rows", "bags", "offset_count", "count", "length", "padding_idx"])
def _forward_kernel(
    weight, indices, offsets, scales, out, rows, dim, bags, offset_count, count, length, padding_idx,
    MEAN: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DIM + tl.arange(0, DIM)
    begin, end, right = bounds(offsets, bag, bags, offset_count, count, length)
    total = tl.zeros((ENTRIES, DIM), tl.float32)
    taken = tl.zeros((ENTRIES,), tl.int32)
    for start in range(begin, end, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        index = tl.load(indices + place, mask=place < end, other=0).to(tl.int64)
        own = (place < end) & ~is_padding(index, padding_idx)
        known = own & is_row(index, rows)
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


@triton.jit(do_not_specialize=["rows", "count", "padding_idx"])
def _parts_kernel(
    dout, ordered, order, bag_of, scales, shares, parts, dweight, rows, dim, count, padding_idx,
    CHUNK: tl.constexpr, ENTRIES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DIM + tl.arange(0, DIM)
    row = tl.load(ordered + first).to(tl.int64)
    begins = begins_at(ordered, first, row)
    if (begins | (first % CHUNK == 0)) & has_gradient(row, rows, padding_idx):
        sums, goes_on = sum_of_part(
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
    row, end, begins = last_row_of(chunk, ordered, ends, CHUNK)
    if begins & (end > (chunk + 1) * CHUNK) & has_gradient(row, rows, padding_idx):
        sums = sum_of_parts(parts, chunk, end, dim, d, CHUNK, ENTRIES, DIM)
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
    own = exists & ~is_padding(index, padding_idx)
    known = own & is_row(index, rows) & (bag >= 0)
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
        tile = tile_of(dim)
        grid = bags, triton.cdiv(dim, tile["DIM"])
        tables = weight, indices, offsets, per_sample_weights, out
        numbers = len(weight), dim, *sizes(indices, offsets, bags), padding_idx
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
            tile = tile_of(dim)
            grid = (triton.cdiv(count, tile["ENTRIES"]),)
            given = dout, weight, indices, bags_of(indices, offsets, bags), dweights
            _weights_kernel[grid](*given, len(weight), dim, count, padding_idx, **tile)


def _table(dout, indices, offsets, per_sample_weights, dweight, padding_idx, mean):
    (rows, dim), count, tile = dweight.shape, indices.numel(), tile_of(dweight.shape[1])
    terms, parts, ends = sorted_terms(dout, indices, offsets, per_sample_weights, padding_idx, mean)
    blocks = triton.cdiv(dim, tile["DIM"])
    # How many parts there are the GPU alone knows; the program of a place that begins none ends at once.
    _parts_kernel[(count, blocks)](*terms, parts, dweight, rows, dim, count, padding_idx, CHUNK=CHUNK, **tile)
    if len(ends):
        given = parts, terms[1], ends, dweight, rows, dim, padding_idx
        _rows_kernel[(len(ends), blocks)](*given, CHUNK=CHUNK, **tile)
