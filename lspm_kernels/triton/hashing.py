"""Random bits of a place: the hash of csrc/random_bits.h, the words of csrc/cpu/philox.h and the rounding of
csrc/cpu/random_rounding.h."""

import triton
import triton.language as tl


@triton.jit
def random_bits(seed, place):
    """32 random bits, as an int64."""
    factor = tl.full((), 0xD6E8FEB86659FD93, tl.uint64)
    x = seed.to(tl.uint64) + place.to(tl.uint64) * tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    x = (x ^ (x >> 32)) * factor
    return (((x ^ (x >> 32)) * factor) >> 32).to(tl.int64)


@triton.jit
def words_of(seed, row, first, N: tl.constexpr):
    """The words of N elements of a row from `first` on.

    A counter gives those of four elements that lie 16 apart, so N and first are multiples of 64.
    """
    counter = first // 4 + tl.arange(0, N // 4)
    nothing = counter.to(tl.int32) * 0
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    low, high = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
    above = nothing
    if counter.dtype == tl.int64:
        above = (counter >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, counter.to(tl.int32), low + nothing, high + nothing, above)
    drawn = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    drawn = tl.reshape(drawn, (N // 64, 16, 2, 2))  # (.., word // 2, word % 2)
    return tl.reshape(tl.permute(drawn, (0, 2, 3, 1)), (N,))


@triton.jit
def word_of(seed, i):
    """The words of elements i, int64, of one row, wherever they lie: each draws four."""
    counter = i // 64 * 16 + i % 16
    low, nothing = counter.to(tl.int32), counter.to(tl.int32) * 0
    w0, w1, w2, w3 = tl.philox(seed, low, nothing, nothing, (counter >> 32).to(tl.int32))
    word = i // 16 % 4
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit
def rounded_at_random(value, seed, row, first, DIM: tl.constexpr):
    """A row's columns from `first` on as the bfloat16 above or below; what is not finite is as always.

    DIM and first are multiples of 64.
    """
    drawn = words_of(seed, row, first, DIM)
    bits = value.to(tl.uint32, bitcast=True)
    moved = ((bits + (drawn >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, value, moved)
