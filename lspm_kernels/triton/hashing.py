"""The hash by which csrc/random_bits.h draws random bits of a place."""

import triton
import triton.language as tl


@triton.jit
def random_bits(seed, place):
    """32 random bits, as an int64."""
    factor = tl.full((), 0xD6E8FEB86659FD93, tl.uint64)
    x = seed.to(tl.uint64) + place.to(tl.uint64) * tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    x = (x ^ (x >> 32)) * factor
    return (((x ^ (x >> 32)) * factor) >> 32).to(tl.int64)
