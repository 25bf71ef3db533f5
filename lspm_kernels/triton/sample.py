"""Tokens drawn from logits: thresholds are found by counting and adding up what lies above, never by sorting.

A program owns a row and walks it tile by tile. One walk finds the largest score; top-k and top-p divide what
is left of the range of keys by four at each walk, and so take up to 16 each; the draw takes two. Only the
first need come from memory, the others find a row in the second-level cache; weights are computed anew in
each, and nothing is stored but the draw. Every operation rounds in one way, and sums are of integers: the
draws are those of the CPU's kernel, bit for bit.
"""

import torch
import triton
import triton.language as tl

from lspm_kernels.triton.hashing import words_of

_TILE, _WARPS = 2048, 16
_PENALISED = 256  # previous tokens
# Fused, a product would be added unrounded; left to itself, ptxas takes 64 registers and spills.
_OPTIONS = {"enable_fp_fusion": False, "maxnreg": 128}


@triton.jit
def _exp(x):
    """exact_exp of csrc/cpu/exact.h."""
    near = tl.maximum(x, -30.0)
    n = (near * 1.44269504 + 12582912.0) - 12582912.0  # the nearest integer
    r = near - n * 0.693145752 - n * 1.42860677e-6
    p = r * 1.38368382e-3 + 8.37482207e-3
    p = p * r + 4.16682260e-2
    p = p * r + 1.66664201e-1
    p = p * r + 4.99999921e-1
    p = p * r + 1.0
    p = p * r + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -27.5, 0.0, p * power)


@triton.jit
def _exponential(word):
    """exact_exponential of csrc/cpu/exact.h."""
    v = ((word >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2 ** -31
    v = tl.minimum(v, 0.99999994)
    bits = (1.0 - v).to(tl.int32, bitcast=True) + 0x4AFB0D
    n = ((bits >> 23) - 127).to(tl.float32)
    t = tl.where(v < 0.25, -v, ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0)
    p = t * 7.0376836292e-2 - 1.1514610310e-1
    p = p * t + 1.1676998740e-1
    p = p * t - 1.2420140846e-1
    p = p * t + 1.4249322787e-1
    p = p * t - 1.6668057665e-1
    p = p * t + 2.0000714765e-1
    p = p * t - 2.4999993993e-1
    p = p * t + 3.3333331174e-1
    square = t * t
    rest = p * t * square - n * 2.12194440e-4 - square * 0.5
    return -(t + rest + n * 0.693359375)


@triton.jit
def _units(w):
    return (w * 1099511627776.0).to(tl.int64)  # 2 ** 40


@triton.jit
def _share(total, high, low):
    """total * (high * 2 ** 31 + low) / 2 ** 62, rounded down."""
    a, b = total >> 31, total & 0x7FFFFFFF
    return high * a + ((high * b + low * a + ((low * b) >> 31)) >> 31)


@triton.jit
def _scores(row, at, count):
    return tl.load(row + at, mask=at < count, other=float("-inf")).to(tl.float32)


@triton.jit
def _weights(row, at, count, largest, inverse, least):
    score = _scores(row, at, count)
    w = _exp((score - largest) * inverse)
    return w if least is None else tl.where(score >= least, w, 0.0)


@triton.jit
def _key(score):
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # the two zeros are equal
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _threshold(
    row, count, largest, inverse, least, low, high, needed, WEIGHTS: tl.constexpr, TILE: tl.constexpr
):
    """The least key from (low, high] that fewer than `needed` are above: tokens, or units of weights."""
    low, high = low.to(tl.int64), high.to(tl.int64)
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        a = low + step
        b, c = tl.minimum(a + step, high), tl.minimum(a + 2 * step, high)
        above_a = tl.zeros((TILE,), tl.int64)
        above_b = tl.zeros((TILE,), tl.int64)
        above_c = tl.zeros((TILE,), tl.int64)
        for start in range(0, count, TILE):
            at = start + tl.arange(0, TILE)
            if WEIGHTS:
                w = _weights(row, at, count, largest, inverse, least)
                key, measure = w.to(tl.int32, bitcast=True), _units(w)
            else:
                key, measure = _key(_scores(row, at, count)), (at < count).to(tl.int64)
            above_a += tl.where(key > a.to(tl.int32), measure, 0)
            above_b += tl.where(key > b.to(tl.int32), measure, 0)
            above_c += tl.where(key > c.to(tl.int32), measure, 0)
        few_a, few_b, few_c = tl.sum(above_a) < needed, tl.sum(above_b) < needed, tl.sum(above_c) < needed
        low = tl.where(few_a, low, tl.where(few_b, a, tl.where(few_c, b, c)))
        high = tl.where(few_a, a, tl.where(few_b, b, tl.where(few_c, c, high)))
    return high.to(tl.int32)


@triton.jit
def _kept(row, at, count, largest, inverse, least, limit):
    """Weights, 0 of what does not stay."""
    w = _weights(row, at, count, largest, inverse, least)
    return tl.where(w >= limit, w, 0.0)


@triton.jit
def _sum(row, count, largest, inverse, least, limit, TILE: tl.constexpr):
    """The units of what stays."""
    units = tl.zeros((TILE,), tl.int64)
    for start in range(0, count, TILE):
        units += _units(_kept(row, start + tl.arange(0, TILE), count, largest, inverse, least, limit))
    return tl.sum(units)


@triton.jit
def _race(row, number, count, largest, inverse, least, limit, seed, TILE: tl.constexpr):
    """Weights over exponential numbers: the largest quotient is each token's with its own probability."""
    quotients = tl.zeros((TILE,), tl.float32)
    winners = tl.full((TILE,), count, tl.int32)
    for start in range(0, count, TILE):
        at = start + tl.arange(0, TILE)
        w = _kept(row, at, count, largest, inverse, least, limit)
        quotient = tl.div_rn(w, _exponential(words_of(seed, number, start, TILE)))
        winners = tl.where(quotient > quotients, at, winners)
        quotients = tl.maximum(quotients, quotient)
    return tl.min(tl.where(quotients == tl.max(quotients), winners, count).to(tl.int64))


@triton.jit
def _inverse_transform(row, place, count, largest, inverse, least, limit, TILE: tl.constexpr):
    """The token within whose units a place lies."""
    before = tl.zeros((), tl.int64)
    begin, base = tl.zeros((), tl.int32), tl.zeros((), tl.int64)
    for start in range(0, count, TILE):
        w = _kept(row, start + tl.arange(0, TILE), count, largest, inverse, least, limit)
        units = tl.sum(_units(w))
        here = (before <= place) & (place < before + units)
        begin, base = tl.where(here, start, begin), tl.where(here, before, base)
        before += units
    w = _kept(row, begin + tl.arange(0, TILE), count, largest, inverse, least, limit)
    passed = base + tl.cumsum(_units(w), 0) <= place
    return (begin + tl.sum(passed.to(tl.int32))).to(tl.int64)


@triton.jit
def _least_score(row, count, largest, top_k, TILE: tl.constexpr):
    """The k-th largest score."""
    first = tl.full((), -2139095042, tl.int32)  # before the key of -infinity
    key = _threshold(row, count, largest, 1.0, None, first, _key(largest), top_k, False, TILE)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _nucleus(row, count, largest, inverse, least, limit, high, low, TILE: tl.constexpr):
    """The least weight that top-p leaves."""
    units = _sum(row, count, largest, inverse, least, limit, TILE)
    needed = tl.maximum(_share(units, high.to(tl.int64), low.to(tl.int64)), 1)
    first, last = limit.to(tl.int32, bitcast=True), tl.full((), 0x3F800000, tl.int32)
    key = _threshold(row, count, largest, inverse, least, first, last, needed, True, TILE)
    return key.to(tl.float32, bitcast=True)


@triton.jit
def _largest(row, count, TILE: tl.constexpr):
    """The largest score; infinity where any is, or is NaN."""
    best = tl.full((TILE,), float("-inf"), tl.float32)
    for start in range(0, count, TILE):
        score = _scores(row, start + tl.arange(0, TILE), count)
        best = tl.maximum(best, tl.where(score < float("inf"), score, float("inf")))
    return tl.max(best)


@triton.jit(do_not_specialize=["count", "top_k", "high", "low", "seed"])
def _forward_kernel(
    logits, temperatures, tokens, logprobs, count, temperature, top_k, high, low, min_p, seed,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, GUMBEL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * count
    largest = _largest(row, count, TILE)
    if temperatures is not None:
        temperature = tl.load(temperatures + number)
    token = tl.full((), -1, tl.int64)
    logprob = tl.full((), float("nan"), tl.float32)
    if (tl.abs(largest) < float("inf")) & (temperature >= 0.0):
        bounded = tl.minimum(tl.maximum(temperature, 1.1754943508222875e-38), 8.507059173023462e37)
        inverse = tl.div_rn(1.0, bounded)  # of 2 ** -126 to 2 ** 126
        if temperature == 0.0:
            limit = tl.full((), 1.0, tl.float32)
            token = _inverse_transform(row, 0, count, largest, inverse, largest, limit, TILE)
            logprob = tl.zeros((), tl.float32)
        else:
            least = None
            if TOP_K:
                least = _least_score(row, count, largest, top_k, TILE)
            limit = tl.full((), 4.547473508864641e-13, tl.float32)  # 2 ** -41: below every weight but 0
            if TOP_P:
                limit = _nucleus(row, count, largest, inverse, least, limit, high, low, TILE)
            limit = tl.maximum(limit, min_p)
            total = _sum(row, count, largest, inverse, least, limit, TILE)
            if GUMBEL:
                token = _race(row, number, count, largest, inverse, least, limit, seed, TILE)
            else:
                above, zero = (number >> 32).to(tl.int32), tl.zeros((), tl.int32)
                u, v, _, _ = tl.philox(seed, zero, number.to(tl.int32), above, zero)
                place = _share(total, (u >> 1).to(tl.int64), (v >> 1).to(tl.int64))
                token = _inverse_transform(row, place, count, largest, inverse, least, limit, TILE)
            unit = _units(_weights(row, token, count, largest, inverse, least))
            logprob = tl.log(unit.to(tl.float64) / total.to(tl.float64)).to(tl.float32)
    tl.store(tokens + number, token)
    if logprobs is not None:
        tl.store(logprobs + number, logprob)


@triton.jit(do_not_specialize=["count", "previous_count"])
def _penalty_kernel(logits, previous, scores, count, previous_count, penalty, TILE: tl.constexpr):
    """Writes what becomes of the logits of previous tokens; the same one more than once, but the same."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    token = tl.load(previous + row * previous_count + at, mask=at < previous_count, other=-1)
    known = (token >= 0) & (token < count)
    score = tl.load(logits + row * count + token, mask=known, other=0.0).to(tl.float32)
    score = tl.where(score < 0, score * penalty, tl.div_rn(score, penalty))
    tl.atomic_xchg(scores + row * count + token, score, mask=known, sem="relaxed")


def forward(
    logits, temperatures, previous, tokens, logprobs, temperature, top_k, top_p, min_p, penalty, gumbel, seed
):
    """The contract is that of csrc/sample.h, but that a previous token that is none has no effect."""
    rows, count = logits.shape
    share = int(top_p * 2**62)
    with torch.cuda.device_of(logits):
        if previous is not None and previous.shape[1]:
            scores = logits.to(torch.float32, copy=True)
            grid = (rows, triton.cdiv(previous.shape[1], _PENALISED))
            given = logits, previous, scores, count, previous.shape[1], penalty
            _penalty_kernel[grid](*given, TILE=_PENALISED, **_OPTIONS)
            logits = scores
        flags = {"TOP_K": top_k < count, "TOP_P": top_p < 1, "GUMBEL": gumbel}
        _forward_kernel[(rows,)](
            logits, temperatures, tokens, logprobs, count, temperature, min(top_k, count), share >> 31,
            share & 0x7FFFFFFF, min_p, seed, **flags, TILE=_TILE, num_warps=_WARPS, **_OPTIONS,
        )  # fmt: skip
