"""FlashAttention-2's functions, over lspm_kernels.attention and its packed and cached forms.

Names, arguments, their order and defaults are FlashAttention-2's, so that another import is the whole change.
Tensors are (B, T, H, D) and read where they lie: no input is copied.
"""

from functools import partial

from torch import Tensor

from lspm_kernels import checks
from lspm_kernels.compat.flash_attn.forward_only import forward_only
from lspm_kernels.compat.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from lspm_kernels.compat.flash_attn.windows import window_of
from lspm_kernels.ops.attention import attention
from lspm_kernels.ops.attention_with_kv_cache import attention_with_kv_cache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of (B, T, H, D) tensors: lspm_kernels.attention, whose docstring has the formula.

    Args:
        q: (B, T_q, H, D), float32, bfloat16 or float16. D from 1 to 256.
        k, v: (B, T_k, H_kv, D); H is a multiple of H_kv.
        dropout_p: the share of probabilities that is dropped, its seed drawn from torch's default generator.
        softmax_scale: D ** -0.5 where None.
        causal: the last query stands at the last key (bottom-right), whatever T_q and T_k are.
        window_size: (left, right): keys before and behind its place that a query sees; -1: all.
        softcap: scores stay within (-softcap, softcap); 0: no cap.
        alibi_slopes: (H,) or (B, H).
        deterministic: taken and not needed: every result has the same bits in every run.
        return_attn_probs: return (out, softmax_lse, None) instead.

    Returns:
        out: (B, T_q, H, D), contiguous. softmax_lse is (B, H, T_q) float32, with a gradient, and -inf where a
        query sees no key. The third of the tuple, which FlashAttention-2 keeps for its own tests, is None.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.

    Source: Dao, "FlashAttention-2" (2023), and its package flash_attn.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise ValueError(f"flash_attn_func: {name} must be a tensor (B, T, H, D), got {checks.shape(x)}")
    result = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        causal=causal,
        window=window_of(window_size),
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        dropout_p=dropout_p,
        scale=softmax_scale,
        return_lse=return_attn_probs,
    )
    if not return_attn_probs:
        return result.transpose(1, 2)
    out, lse = result
    return out.transpose(1, 2), lse, None


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_func of the three tensors in qkv (B, T, 3, H, D), none copied."""
    if not isinstance(qkv, Tensor) or qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"flash_attn_qkvpacked_func: qkv must be a tensor (B, T, 3, H, D), got {checks.shape(qkv)}"
        )
    return flash_attn_func(
        *qkv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_func of q (B, T_q, H, D) and the two tensors in kv (B, T_k, 2, H_kv, D), none copied."""
    if not isinstance(kv, Tensor) or kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(
            f"flash_attn_kvpacked_func: kv must be a tensor (B, T, 2, H_kv, D), got {checks.shape(kv)}"
        )
    return flash_attn_func(
        q, *kv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | list[int] | Tensor = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to a cache, in place, and attends to it: lspm_kernels.attention_with_kv_cache.

    Args:
        q: (B, T_q, H, D).
        k_cache, v_cache: (B, S, H_kv, D), or pages (N, S, H_kv, D) with a block_table.
        k, v: (B, T, H_kv, D), or None: what is appended behind cache_seqlens.
        rotary_cos, rotary_sin: (positions, R / 2); q and k are rotated by them.
        cache_seqlens: an int, or int32 or int64 (B,); None: the cache is full.
        cache_batch_idx, cache_leftpad: (B,). block_table: (B, P).
        softmax_scale, causal, window_size, softcap, alibi_slopes: flash_attn_func's.
        num_splits: taken and not needed: how keys are divided depends on their number alone.
        return_softmax_lse: return (out, softmax_lse) instead.

    Returns:
        out: (B, T_q, H, D), contiguous, without a backward. softmax_lse is (B, H, T_q) float32.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the cache is too small.
        NotImplementedError: from the backward.

    Source: Dao, "FlashAttention-2" (2023), and its package flash_attn.
    """
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    for name, x in given.items():
        if x is not None and (not isinstance(x, Tensor) or x.dim() != 4):
            raise ValueError(
                f"flash_attn_with_kvcache: {name} must be a tensor (B, T, H, D), got {checks.shape(x)}"
            )
    function = partial(
        attention_with_kv_cache, cache_seqlens=cache_seqlens, block_table=block_table,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, cos=rotary_cos, sin=rotary_sin,
        interleaved=rotary_interleaved, causal=causal, window=window_of(window_size), softcap=softcap,
        alibi_slopes=alibi_slopes, scale=softmax_scale, return_lse=return_softmax_lse,
    )  # fmt: skip
    inputs = {name: x if x is None else x.transpose(1, 2) for name, x in given.items()}
    result = forward_only("flash_attn_with_kvcache", function, inputs)
    if not return_softmax_lse:
        return result.transpose(1, 2)
    return result[0].transpose(1, 2), result[1]
