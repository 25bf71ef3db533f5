"""Attention over packed sequences in plain PyTorch, one after the other: what the kernels compute."""

import torch

from lspm_kernels.reference.attention import attention


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *, alibi_slopes=None, return_lse=False, **options):
    """Each sequence's attention; lspm_kernels.attention_varlen says what the arguments are."""
    (q_ends, k_ends), dim_v = (starts.tolist() for starts in (cu_seqlens_q, cu_seqlens_k)), v.shape[-1]
    outs, lses = [q.new_empty(0, q.shape[1], dim_v)], [q.new_empty(q.shape[1], 0, dtype=torch.float32)]
    for b in range(len(q_ends) - 1):
        parts = q[q_ends[b] : q_ends[b + 1]], *(x[k_ends[b] : k_ends[b + 1]] for x in (k, v))
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        out, lse = attention(
            *(x.transpose(0, 1)[None] for x in parts),
            alibi_slopes=slopes,
            return_lse=True,
            b=b,
            **options,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return (torch.cat(outs), torch.cat(lses, 1)) if return_lse else torch.cat(outs)
