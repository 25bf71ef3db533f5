"""Attention over sequences of unequal lengths that lie packed, one behind the other."""

from torch import Tensor

from lspm_kernels import attention_checks, checks, dispatch
from lspm_kernels.ops import attention as dense
from lspm_kernels.reference import attention_varlen as reference

BACKENDS = dense.BACKENDS
_OP = "attention_varlen"


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of B packed sequences; lspm_kernels.attention has the formula and the options.

    Sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q and cu_seqlens_k[b] to cu_seqlens_k[b + 1]
    of k and v; its last query stands at its last key. Nothing is padded and nothing copied: views of packed
    projections, with a contiguous last dimension, are read where they lie.

    Args:
        q: (rows of q, H, D), float32, bfloat16 or float16. D from 1 to 256.
        k: (rows of k, H_kv, D); H is a multiple of H_kv.
        v: (rows of k, H_kv, Dv). Dv from 1 to 256.
        cu_seqlens_q, cu_seqlens_k: (B + 1,), int32 or int64, from 0 to the number of rows. They are read for
            their check; on a GPU that waits for it. Within torch.compile they are checked on the CPU alone.
        max_seqlen_q, max_seqlen_k: at least the longest sequence; None finds it, outside of torch.compile. A
            tensor of one integer will do too, there.
        causal, window, softcap, scale: as attention's.
        alibi_slopes: (H,) or (B, H).
        dropout_p, seed: as attention's; (b, h, row and column within the sequence) choose what is dropped.
        sinks: (H,), with a gradient.
        block_table: (B, P), int32 or int64, without a gradient: k and v are pages then, (N, S, H_kv, D) and
            (N, S, H_kv, Dv), and key i of sequence b is row i % S of page block_table[b, i // S].
        return_lse: return the logarithms of the denominators too; they have a gradient.
        backend: as attention's.

    Returns:
        out: (rows of q, H, Dv), contiguous, q's dtype. With return_lse (out, lse), lse (H, rows of q)
        float32, -inf where a query sees no key and there is no sink.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: the backend asked for does not take this call.

    Source: Dao, "FlashAttention-2" (2023), whose flash_attn_varlen_func this is with attention's options.
    """
    dims = 3 if block_table is None else 4
    for name, x, dim in (("q", q, 3), ("k", k, dims), ("v", v, dims)):
        if not isinstance(x, Tensor) or x.dim() != dim:
            rule = "(rows, heads, dim)" if dim == 3 else "(pages, rows, heads, dim)"
            raise ValueError(f"{_OP}: {name} must be a tensor {rule}, got {checks.shape(x)}")
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    q, k, v = (x if x.dim() == 4 else x[None] for x in (q, k, v))
    q, k, v = attention_checks.heads(_OP, q, k, v, dense.MAX_DIM, paged=block_table is not None)
    starts_q, max_q, _ = attention_checks.starts(
        _OP, "cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, q.shape[2], q.device
    )
    rows = k.shape[2] if block_table is None else None
    starts_k, max_k, lengths = attention_checks.starts(
        _OP, "cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, rows, q.device
    )
    if starts_q.numel() != starts_k.numel():
        raise ValueError(
            f"{_OP}: cu_seqlens_k must have as many elements as cu_seqlens_q, {starts_q.numel()}, got"
            f" {starts_k.numel()}"
        )
    heads = starts_q.numel() - 1, q.shape[1]
    if block_table is not None:
        attention_checks.without_gradient(_OP, {"q": q, "k": k, "v": v})
        block_table, pages = attention_checks.block_table(_OP, block_table, heads[0], q.device)
        if lengths is not None:
            attention_checks.pages(_OP, pages, lengths, k)
    left, right, slopes, sinks = attention_checks.options(
        _OP, heads, q.device, causal=causal, window=window, alibi_slopes=alibi_slopes, sinks=sinks,
        softcap=softcap,
    )  # fmt: skip
    checks.number(_OP, "dropout_p", dropout_p, 0.0, 1.0)
    seed = checks.seed(_OP, seed) if dropout_p else None
    scale = attention_checks.scale(_OP, scale, q.shape[-1])
    first = dense.first_for(q, max_q)
    row = dispatch.pick(_OP, BACKENDS, backend, q, k, v, heads, None, first=first)
    if row is None:
        q, k, v = ((x[0] if dim == 3 else x).transpose(-3, -2) for x, dim in ((q, 3), (k, dims), (v, dims)))
        return reference.attention_varlen(
            q, k, v, starts_q, starts_k, block_table=block_table, window=(left, right), alibi_slopes=slopes,
            softcap=softcap, dropout_p=dropout_p, seed=seed, scale=scale, sinks=sinks, return_lse=return_lse,
        )  # fmt: skip
    if block_table is None:
        sequences = starts_q, starts_k, None, None, max_q, max_k
    else:
        sequences = starts_q, None, starts_k.diff(), block_table, max_q, max_k
    out, lse = dense.run(
        row, q, k, v, None, None, slopes, sinks, heads, sequences, left, right, False, seed, scale,
        float(softcap), float(dropout_p),
    )  # fmt: skip
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out
