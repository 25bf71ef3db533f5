"""FlashAttention-2's functions of packed sequences, over lspm_kernels.attention_varlen."""

from functools import partial

from torch import Tensor

from lspm_kernels import checks
from lspm_kernels.compat.flash_attn.forward_only import forward_only
from lspm_kernels.compat.flash_attn.windows import window_of
from lspm_kernels.ops.attention_varlen import attention_varlen


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of packed sequences: lspm_kernels.attention_varlen, whose docstring says what they are.

    Args:
        q: (rows of q, H, D). k, v: (rows of k, H_kv, D), or pages (N, S, H_kv, D) with a block_table.
        cu_seqlens_q, cu_seqlens_k: (B + 1,), int32 or int64, from 0 to the number of rows.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        block_table: (B, P), int32 or int64; then there is no backward.
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes: flash_attn_func's.
        return_attn_probs: return (out, softmax_lse, None) instead.

    Returns:
        out: (rows of q, H, D), contiguous. softmax_lse is (H, rows of q) float32.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: from the backward, with a block_table.

    Source: Dao, "FlashAttention-2" (2023), and its package flash_attn.
    """
    function = partial(
        attention_varlen, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, causal=causal, window=window_of(window_size), alibi_slopes=alibi_slopes,
        softcap=softcap, dropout_p=dropout_p, scale=softmax_scale, return_lse=return_attn_probs,
        block_table=block_table,
    )  # fmt: skip
    inputs = {"q": q, "k": k, "v": v}
    result = (
        function(**inputs)
        if block_table is None
        else forward_only("flash_attn_varlen_func", function, inputs)
    )
    return (*result, None) if return_attn_probs else result


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_varlen_func of the three tensors in qkv (rows, 3, H, D), none copied."""
    if not isinstance(qkv, Tensor) or qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(
            f"flash_attn_varlen_qkvpacked_func: qkv must be a tensor (rows, 3, H, D), got {checks.shape(qkv)}"
        )
    return flash_attn_varlen_func(
        *qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_varlen_func of q (rows of q, H, D) and the two tensors in kv (rows of k, 2, H_kv, D)."""
    if not isinstance(kv, Tensor) or kv.dim() != 4 or kv.shape[1] != 2:
        raise ValueError(
            f"flash_attn_varlen_kvpacked_func: kv must be a tensor (rows, 2, H_kv, D), got {checks.shape(kv)}"
        )
    return flash_attn_varlen_func(
        q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip
