"""Attention over a cache in plain PyTorch, one sequence after the other: what the kernels compute."""

import torch

from lspm_kernels.reference.attention import attention


def attention_with_kv_cache(q, k_cache, v_cache, begins, counts, block_table=None, *, alibi_slopes=None,
                            return_lse=False, **options):  # fmt: skip
    """Each sequence's attention to rows begins[b] to begins[b] + counts[b] of its cache, or of its pages."""
    if not len(q):
        return attention(q, k_cache[:0], v_cache[:0], return_lse=return_lse, **options)
    found, rows = [], max(k_cache.shape[2], 1)
    for b, (begin, count) in enumerate(zip(begins, counts, strict=True)):
        if block_table is None:
            k, v = k_cache[b], v_cache[b]
        else:
            pages = block_table[b, : -(-(begin + count) // rows)]  # others may name none
            k, v = (cache[pages].transpose(0, 1).flatten(1, 2) for cache in (k_cache, v_cache))
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        keys, values = (x[None, :, begin : begin + count] for x in (k, v))
        found.append(
            attention(q[b : b + 1], keys, values, alibi_slopes=slopes, return_lse=True, b=b, **options)
        )
    out, lse = (torch.cat(parts) for parts in zip(*found, strict=True))
    return (out, lse) if return_lse else out
