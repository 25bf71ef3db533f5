"""Attention over packed sequences in plain PyTorch, one after the other: what the kernels compute."""

import torch

from lspm_kernels.reference.attention import attention


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *, alibi_slopes=None, block_table=None,
                     return_lse=False, **options):  # fmt: skip
    """Each sequence's attention; lspm_kernels.attention_varlen says what the arguments are."""
    (q_ends, k_ends), dim_v = (starts.tolist() for starts in (cu_seqlens_q, cu_seqlens_k)), v.shape[-1]
    outs, lses = (
        [q[:0, :, :1].expand(0, q.shape[1], dim_v)],
        [q[:0, :, 0].float().T],
    )
    for b in range(len(q_ends) - 1):
        begin, end = k_ends[b], k_ends[b + 1]
        if block_table is None:
            keys, values = k[begin:end], v[begin:end]
        else:
            pages = block_table[b, : -(-(end - begin) // max(k.shape[1], 1))]  # others may name none
            keys, values = (x[pages].flatten(0, 1)[: end - begin] for x in (k, v))
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        out, lse = attention(
            *(x.transpose(0, 1)[None] for x in (q[q_ends[b] : q_ends[b + 1]], keys, values)),
            alibi_slopes=slopes,
            return_lse=True,
            b=b,
            **options,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return (torch.cat(outs), torch.cat(lses, 1)) if return_lse else torch.cat(outs)
