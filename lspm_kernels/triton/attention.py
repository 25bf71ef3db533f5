"""Attention with online softmax, forward and backward (Dao, "FlashAttention-2", 2023).

A program of the forward owns a tile of queries of one head: their maxima, denominators and sums of values
stay in registers while tiles of keys and values pass through shared memory. In the backward one kernel owns a
tile of keys and goes through the queries of all heads that read it (dk, dv), one owns a tile of queries (dq,
delta), and one a tile of the bias (its gradient); so each sum has one owner and one order, and there are no
atomics. Tiles that the window hides whole are never read. Bytes moved: q and out once, k and v once for each
tile of queries, from the L2 cache where a head's fit. Programs behind the end of a sequence return at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lspm_kernels.triton.attention_tiles import (
    BACKWARD,
    FORWARD,
    HIDDEN,
    ON_SM_90,
    REGISTERS,
    Extras,
    Scalars,
    as_heads,
    as_scores,
    exp,
    gradients,
    head_of,
    kept,
    keys_seen,
    load_rows,
    queries_seeing,
    row_statistics,
    rows_begin,
    rows_of,
    scores,
    scores_at,
    sizes_of,
    store_rows,
)

# Fused, the lanes of a warp that add a product to each other's get sums that differ in the last bit, and all
# of them store theirs to one shared address: the result would depend on which lane comes last. And a score
# less the maximum must be 0 where it is the maximum. The products of tiles are fused nevertheless.
_EXACT = {"enable_fp_fusion": False}
# float32 products are taken in float32: "tf32" keeps 10 bits of a factor, which is 2^13 times the error of
# plain PyTorch. For 16-bit factors this changes nothing.
_PRECISION = tl.constexpr("ieee")
# What a call may change without a kernel of its own; None, for what is absent, does make one.
_VARIABLE = ["packed", "heads", "group", "queries", "keys", "left", "right", "shift", "seed", "threshold"]


@triton.jit(do_not_specialize=_VARIABLE)
def _forward_kernel(
    q, k, v, extras, out, lse, statistics, key_counts, packed, heads, group, queries, keys, left, right,
    shift, seed, threshold, scalars, D: tl.constexpr, DV: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, M)
    first = (tiles - 1 - tl.program_id(0) % tiles) * M  # the longest first, where attention is causal
    head = tl.program_id(0) // tiles
    b, h = head // heads, head % heads
    queries, keys, shift = sizes_of(b, q, k, key_counts, queries, keys, shift)
    if q.starts is not None and first >= queries:
        return
    window = (queries, keys, left, right, shift)
    row = first + tl.arange(0, M)
    q_tile = load_rows(head_of(q, b, h), first, queries, M, D, DIM)
    k_head, v_head = head_of(k, b, h // group), head_of(v, b, h // group)
    maximum = tl.full((M,), HIDDEN, tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, DIM_V), tl.float32)
    begin, end = keys_seen(first, tl.minimum(first + M, queries) - 1, window)
    row_begin, row_end = keys_seen(row, row, window)
    for start in range(begin // N * N, end, N):
        k_tile = load_rows(k_head, start, keys, N, D, DIM, k.page_rows, k.starts is not None)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=_PRECISION)
        score, _ = scores(product, b, h, first, start, row_begin, row_end, window, extras, scalars, False)
        largest = tl.maximum(maximum, tl.max(score, 1))
        zero = tl.where(largest == HIDDEN, 0.0, largest)  # all hidden so far: exp(-inf - 0) is 0
        p = exp(score - zero[:, None])
        shrink = exp(maximum - zero)
        total = total * shrink + tl.sum(p, 1)
        if threshold is not None:
            p = tl.where(kept(b, h, first, start, seed, threshold, M, N), p, 0.0)
        v_tile = load_rows(v_head, start, keys, N, DV, DIM_V, v.page_rows, v.starts is not None)
        p = p.to(v_tile.dtype)
        sums = tl.dot(p, v_tile, sums * shrink[:, None], input_precision=_PRECISION)
        maximum = largest
    sees = row_begin < row_end
    if extras.mask.data is not None or extras.bias.data is not None:
        sees = sees & (total != 0.0)
    common = maximum
    if extras.sinks is not None:
        sink = tl.load(extras.sinks + h)
        common = tl.maximum(maximum, sink)
    part = tl.where(sees, exp(maximum - common), 0.0)
    total = tl.where(sees, total * part, 0.0)
    if extras.sinks is not None:
        total += exp(sink - common)
    at = rows_begin(q, b, h, heads, packed, queries) + row
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    tl.store(lse + at, tl.where(total == 0.0, HIDDEN, common + tl.log(total)), mask=row < queries)
    tl.store(statistics + at, tl.where(total == 0.0, 0.0, common), mask=row < queries)
    tl.store(statistics + heads.to(tl.int64) * packed + at, inverse, mask=row < queries)
    sums *= tl.where(sees, part * inverse * scalars.kept, 0.0)[:, None]
    store_rows(head_of(out, b, h), first, queries, sums, DV, DIM_V)


@triton.jit(do_not_specialize=_VARIABLE)
def _dots_kernel(
    dout, out, dlse, dots, packed, heads, queries, DV: tl.constexpr, DIM_V: tl.constexpr, M: tl.constexpr
):
    """The dot product of each row of dout with that of out, less dlse."""
    tiles = tl.cdiv(queries, M)
    first = tl.program_id(0) % tiles * M
    head = tl.program_id(0) // tiles
    b, h = head // heads, head % heads
    queries = rows_of(dout, b, queries)
    if dout.starts is not None and first >= queries:
        return
    row = first + tl.arange(0, M)
    dout_tile = load_rows(head_of(dout, b, h), first, queries, M, DV, DIM_V).to(tl.float32)
    out_tile = load_rows(head_of(out, b, h), first, queries, M, DV, DIM_V).to(tl.float32)
    dot = tl.sum(dout_tile * out_tile, 1)
    at = rows_begin(dout, b, h, heads, packed, queries) + row
    if dlse is not None:
        dot -= tl.load(dlse + at, mask=row < queries, other=0.0)
    tl.store(dots + at, dot, mask=row < queries)


@triton.jit(do_not_specialize=_VARIABLE)
def _dkdv_kernel(
    dout, q, k, v, extras, statistics, dots, key_counts, dk, dv, packed, heads, group, queries, keys, left,
    right, shift, seed, threshold, scalars, D: tl.constexpr, DV: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(keys, N)
    first = tl.program_id(0) % tiles * N
    kv_head = tl.program_id(0) // tiles
    b, kv = kv_head // (heads // group), kv_head % (heads // group)
    queries, keys, shift = sizes_of(b, q, k, key_counts, queries, keys, shift)
    if (k.starts is not None or key_counts is not None) and first >= keys:
        return
    window = (queries, keys, left, right, shift)
    k_tile = load_rows(head_of(k, b, kv), first, keys, N, D, DIM)
    v_tile = load_rows(head_of(v, b, kv), first, keys, N, DV, DIM_V)
    dk_sums = tl.zeros((N, DIM), tl.float32)
    dv_sums = tl.zeros((N, DIM_V), tl.float32)
    all_rows = heads.to(tl.int64) * packed
    begin, end = queries_seeing(first, tl.minimum(first + N, keys) - 1, window)
    key = first + tl.arange(0, N)
    key_begin, key_end = queries_seeing(key, key, window)
    for h in range(kv * group, kv * group + group):
        q_head, dout_head = head_of(q, b, h), head_of(dout, b, h)
        rows = rows_begin(q, b, h, heads, packed, queries)
        for start in range(begin // M * M, end, M):
            row = start + tl.arange(0, M)
            q_tile = load_rows(q_head, start, queries, M, D, DIM)
            dout_tile = load_rows(dout_head, start, queries, M, DV, DIM_V)
            maximum, share, dot = row_statistics(statistics, dots, all_rows, rows + row, row < queries)
            # Transposed, so that p and ds lie as the products below want their left factors.
            product = tl.dot(k_tile, tl.trans(q_tile), input_precision=_PRECISION)  # (N, M)
            dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision=_PRECISION)
            _, dropped, _, ds, cap_slope = gradients(
                product, dp, b, h, start, first, key_begin, key_end, maximum, share, dot, window, extras,
                seed, threshold, scalars, True,
            )  # fmt: skip
            dv_sums = tl.dot(dropped.to(dout_tile.dtype), dout_tile, dv_sums, input_precision=_PRECISION)
            ds = (ds * cap_slope).to(q_tile.dtype)
            dk_sums = tl.dot(ds, q_tile, dk_sums, input_precision=_PRECISION)
    store_rows(head_of(dk, b, kv), first, keys, dk_sums * scalars.scale, D, DIM)
    store_rows(head_of(dv, b, kv), first, keys, dv_sums, DV, DIM_V)


@triton.jit(do_not_specialize=_VARIABLE)
def _dq_kernel(
    dout, dlse, q, k, v, extras, statistics, dots, key_counts, dq, delta, packed, heads, group, queries, keys,
    left, right, shift, seed, threshold, scalars, D: tl.constexpr, DV: tl.constexpr, DIM: tl.constexpr,
    DIM_V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(queries, M)
    first = (tiles - 1 - tl.program_id(0) % tiles) * M
    head = tl.program_id(0) // tiles
    b, h = head // heads, head % heads
    queries, keys, shift = sizes_of(b, q, k, key_counts, queries, keys, shift)
    if q.starts is not None and first >= queries:
        return
    window = (queries, keys, left, right, shift)
    row = first + tl.arange(0, M)
    q_tile = load_rows(head_of(q, b, h), first, queries, M, D, DIM)
    dout_tile = load_rows(head_of(dout, b, h), first, queries, M, DV, DIM_V)
    all_rows = heads.to(tl.int64) * packed
    at = rows_begin(q, b, h, heads, packed, queries) + row
    maximum, share, dot = row_statistics(statistics, dots, all_rows, at, row < queries)
    k_head, v_head = head_of(k, b, h // group), head_of(v, b, h // group)
    dq_sums = tl.zeros((M, DIM), tl.float32)
    total = tl.zeros((M,), tl.float32)
    begin, end = keys_seen(first, tl.minimum(first + M, queries) - 1, window)
    row_begin, row_end = keys_seen(row, row, window)
    for start in range(begin // N * N, end, N):
        k_tile = load_rows(k_head, start, keys, N, D, DIM)
        v_tile = load_rows(v_head, start, keys, N, DV, DIM_V)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=_PRECISION)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=_PRECISION)
        p, _, dp, ds, cap_slope = gradients(
            product, dp, b, h, first, start, row_begin, row_end, maximum, share, dot, window, extras, seed,
            threshold, scalars, False,
        )  # fmt: skip
        total += tl.sum(p * dp, 1)
        dq_sums = tl.dot((ds * cap_slope).to(k_tile.dtype), k_tile, dq_sums, input_precision=_PRECISION)
    store_rows(head_of(dq, b, h), first, queries, dq_sums * scalars.scale, D, DIM)
    if dlse is not None:
        total -= tl.load(dlse + at, mask=row < queries, other=0.0)
    tl.store(delta + at, total, mask=row < queries)


@triton.jit(do_not_specialize=[*_VARIABLE, "batch", "bias_batches", "bias_heads"])
def _dbias_kernel(
    dout, q, k, v, extras, statistics, dots, dbias, bias_batches, bias_heads, batch, packed, heads, group,
    queries, keys, left, right, shift, seed, threshold, scalars, ONE_ROW: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A tile of the bias, through all batches, heads and (ONE_ROW) queries whose scores it is added to."""
    window = (queries, keys, left, right, shift)
    key_tiles = tl.cdiv(keys, N)
    first = tl.program_id(0) % key_tiles * N
    owner = tl.program_id(0) // key_tiles
    key = first + tl.arange(0, N)
    begin, end = queries_seeing(first, tl.minimum(first + N, keys) - 1, window)
    begin = begin // M * M
    first_row = 0
    if not ONE_ROW:
        row_tiles = tl.cdiv(queries, M)
        first_row = owner % row_tiles * M
        owner = owner // row_tiles
        begin = tl.maximum(begin, first_row)
        end = tl.minimum(end, first_row + M)
    all_rows = heads.to(tl.int64) * packed
    sums = tl.zeros((M, N), tl.float32)
    for b in range(owner // bias_heads, batch, bias_batches):
        for h in range(owner % bias_heads, heads, bias_heads):
            k_tile = load_rows(head_of(k, b, h // group), first, keys, N, D, DIM)
            v_tile = load_rows(head_of(v, b, h // group), first, keys, N, DV, DIM_V)
            rows = rows_begin(q, b, h, heads, packed, queries)
            for start in range(begin, end, M):
                row = start + tl.arange(0, M)
                q_tile = load_rows(head_of(q, b, h), start, queries, M, D, DIM)
                dout_tile = load_rows(head_of(dout, b, h), start, queries, M, DV, DIM_V)
                maximum, share, dot = row_statistics(statistics, dots, all_rows, rows + row, row < queries)
                row_begin, row_end = keys_seen(row, row, window)
                product = tl.dot(q_tile, tl.trans(k_tile), input_precision=_PRECISION)
                dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=_PRECISION)
                _, _, _, ds, _ = gradients(
                    product, dp, b, h, start, first, row_begin, row_end, maximum, share, dot, window, extras,
                    seed, threshold, scalars, False,
                )  # fmt: skip
                sums += ds
    b, h = owner // bias_heads, owner % bias_heads
    if ONE_ROW:
        at = scores_at(dbias, b, h, key * 0, key)
        tl.store(at, tl.sum(sums, 0), mask=key < keys)
    else:
        row = first_row + tl.arange(0, M)
        at = scores_at(dbias, b, h, row[:, None], key[None, :])
        tl.store(at, sums, mask=(row < queries)[:, None] & (key < keys)[None, :])


def _tile(kernel, dims, q, extras, scalars, threshold):
    dim = max(dims["DIM"], dims["DIM_V"])
    added = any(t.data is not None for t in (extras.bias, extras.mask))
    scored = added or scalars.softcap is not None or threshold is not None
    key = next(d for d in (64, 128, 256) if dim <= d), q.element_size(), scored
    if triton.runtime.driver.active.get_current_target().arch == 90 and (kernel, *key) in ON_SM_90:
        return ON_SM_90[kernel, *key]
    return (FORWARD if kernel == "forward" else BACKWARD)[key]


def _options(tile):
    """A tile as a kernel's options."""
    # Left to itself, ptxas aims at one more block per multiprocessor and spills for it.
    registers = min(255, REGISTERS // (32 * tile.num_warps))
    return {**tile._asdict(), "maxnreg": registers, **_EXACT}


class _Sequences(NamedTuple):
    query_starts: object
    key_starts: object
    key_counts: object
    pages: object
    queries: int  # of the longest
    keys: int


def _arguments(q, k, v, bias, mask, slopes, sinks, sequences, window, scalars):
    """The sequences and how many; q, k, v and extras, sizes, scalars and head dimensions of the kernels."""
    (B, H, T_q, D), (_, H_kv, T_k, _) = q.shape, k.shape
    s = _Sequences(*sequences) if sequences else _Sequences(None, None, None, None, T_q, T_k)
    packed = B * T_q  # rows of a head
    if s.query_starts is not None:
        B, packed = len(s.query_starts) - 1, T_q
    left, right, shift, seed = window
    scale, softcap, dropout = scalars
    everything = s.queries + s.keys  # no further than that, so that places stay within 32 bits
    left, right = (None if side < 0 else min(side, everything) for side in (left, right))
    drops = (seed, min(int(dropout * 2**32), 2**32 - 1)) if dropout else (None, None)
    dims = {"D": D, "DV": v.shape[-1]}
    dims |= {
        wide: max(16, triton.next_power_of_2(dims[dim])) for dim, wide in (("D", "DIM"), ("DV", "DIM_V"))
    }
    keys_and_values = (as_heads(x, s.key_starts, s.pages) for x in (k, v))
    extras = Extras(as_scores(bias), as_scores(mask), as_scores(slopes), sinks)
    return (
        s,
        B,
        (as_heads(q, s.query_starts), *keys_and_values, extras),
        (packed, H, H // H_kv, s.queries, s.keys, left, right, shift, *drops),
        Scalars(scale, softcap or None, 1 / (1 - dropout)),
        dims,
    )


def forward(q, k, v, bias, mask, slopes, sinks, out, lse, statistics, sequences, window, scalars):
    """Attention as csrc/attention.h has it: fills out, lse and statistics.

    Args:
        q, k, v, out: (B, H, T_q, D), (B, H_kv, T_k, D), (B, H_kv, T_k, Dv), (B, H, T_q, Dv), the last
            dimension contiguous; with a batch of 1 where sequences are packed, and k and v (pages, H_kv,
            page_rows, D) where there are pages.
        bias, mask: (B|1, H|1, T_q|1, T_k|1), or None.
        slopes, sinks: (B, H, 1, 1) and (H,), float32, or None.
        lse, statistics: (B, H, T_q) and (2, B, H, T_q), float32, contiguous; packed without B.
        sequences: None, or query_starts (B + 1), key_starts (B + 1, or B beside key_counts), key_counts (B,)
            and pages (B, P), each int32 and contiguous or None, and the most queries and keys of a sequence.
        window: left, right (below 0: all), shift (of no use with sequences), seed.
        scalars: scale, softcap (0: none), dropout.
    """
    s, B, inputs, sizes, scalars, dims = _arguments(
        q, k, v, bias, mask, slopes, sinks, sequences, window, scalars
    )
    tile = _tile("forward", dims, q, inputs[-1], scalars, sizes[-1])
    with torch.cuda.device_of(q):
        _forward_kernel[(B * q.shape[1] * triton.cdiv(s.queries, tile.M),)](
            *inputs, as_heads(out, s.query_starts), lse, statistics, s.key_counts, *sizes, scalars, **dims,
            **_options(tile),
        )  # fmt: skip


def backward(
    dout, dlse, q, k, v, bias, mask, slopes, sinks, out, statistics, dq, dk, dv, dbias, delta, sequences,
    window, scalars,
):  # fmt: skip
    """The gradients of `forward`, without pages: fills dq, dk, dv and delta, as csrc/attention.h has them.

    Args:
        dout, dq, dk, dv: as out, q, k and v. Rows of dk and dv that are of no sequence stay as they are.
        dlse, delta: as lse and statistics; dlse or None.
        dbias: of bias's shape, float32, contiguous, with a key dimension of T_k; or None.
    """
    s, B, inputs, sizes, scalars, dims = _arguments(
        q, k, v, bias, mask, slopes, sinks, sequences, window, scalars
    )
    packed, H, group = sizes[:3]
    tile, dq_tile = (_tile(kernel, dims, q, inputs[-1], scalars, sizes[-1]) for kernel in ("dkdv", "dq"))
    query_tiles, key_tiles = triton.cdiv(s.queries, tile.M), triton.cdiv(s.keys, tile.N)
    dout, dq, out = (as_heads(x, s.query_starts) for x in (dout, dq, out))
    dk, dv = (as_heads(x, s.key_starts) for x in (dk, dv))
    delta, dots = delta
    inputs = (*inputs, statistics, dots)
    with torch.cuda.device_of(q):
        _dots_kernel[(B * H * query_tiles,)](
            dout, out, dlse, dots, packed, H, s.queries, DV=dims["DV"], DIM_V=dims["DIM_V"], M=tile.M,
            **_EXACT,
        )  # fmt: skip
        if s.keys:
            grid = (B * (H // group) * key_tiles,)
            _dkdv_kernel[grid](dout, *inputs, s.key_counts, dk, dv, *sizes, scalars, **dims, **_options(tile))
        _dq_kernel[(B * H * triton.cdiv(s.queries, dq_tile.M),)](
            dout, dlse, *inputs, s.key_counts, dq, delta, *sizes, scalars, **dims, **_options(dq_tile)
        )
        if dbias is not None:
            tile = tile._replace(M=16)  # the sums of a tile take registers beside all the rest
            batches, heads, rows, _ = dbias.shape
            grid = (batches * heads * triton.cdiv(rows, tile.M) * key_tiles,)
            _dbias_kernel[grid](
                dout, *inputs, as_scores(dbias), batches, heads, B, *sizes, scalars, ONE_ROW=rows == 1,
                **dims, **_options(tile),
            )  # fmt: skip
