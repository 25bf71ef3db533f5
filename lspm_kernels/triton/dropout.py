"""Dropout and a residual addition on blocks of elements, which draw their words in registers.

A program owns a block of consecutive elements and draws a counter once for four of them; csrc/dropout.h says
which word is whose. Bytes per element of a two-byte dtype: 4, with a residual 6.
"""

import torch
import triton
import triton.language as tl

from lspm_kernels.triton.hashing import words_of

_BLOCK = {"BLOCK": 1024, "num_warps": 4}  # two counters a thread
# Fused with the sum, a product would round otherwise than on a CPU.
_EXACT = {"enable_fp_fusion": False}


@triton.jit(do_not_specialize=["seed", "threshold"])
def _forward_kernel(x, residual, out, elements, seed, threshold, scale, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < elements
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value = dropped(value, words_of(seed, first * 0, first, BLOCK), threshold, scale)
    if residual is not None:
        value = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32) + value
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dropped(value, drawn, threshold, scale):
    return tl.where(drawn >= threshold.to(tl.uint32), value * scale, 0.0)


def threshold(p):
    """The words below which elements are dropped."""
    return min(int(p * 2**32), 2**32 - 1)


def forward(x, residual, out, p, scale, seed):
    """out = residual + dropout(x); the contract is that of csrc/dropout.h.

    Args:
        x, residual, out: of one shape and dtype, contiguous; residual or None.
        p: the share that is dropped.
        scale: what multiplies the rest.
        seed: an integer.
    """
    elements = x.numel()
    grid = (triton.cdiv(elements, _BLOCK["BLOCK"]),)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](x, residual, out, elements, seed, threshold(p), scale, **_EXACT, **_BLOCK)
