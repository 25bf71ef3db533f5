"""Scaled dot-product attention over heads, with fewer key heads than query heads where wanted."""

import torch
from torch import Tensor

from lspm_kernels import attention_checks, attention_limits, checks, compiled, dispatch, split_kv, triton
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import attention as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KERNELS = "attention_forward", "attention_backward"
MAX_DIM = 256
_ALL = -1  # what a kernel takes for a side of the window that has no bound

_SPLITS, _BACKWARD = split_kv.attention_forward, compiled.cuda_kernel("attention_backward")
# On a GPU triton comes first: on an H200, for which Triton has wgmma, it takes 0.7 to 0.9 times as long.
BACKENDS = (
    Backend("cpu", "cpu", _FLOATS, *map(compiled.cpu_kernel, _KERNELS), compiled.nothing_missing),
    Backend(
        "triton", "cuda", _FLOATS, *map(triton.kernel, _KERNELS), triton.missing, attention_limits.TRITON
    ),
    Backend("cuda", "cuda", _FLOATS[1:], _SPLITS, _BACKWARD, compiled.cuda_missing, attention_limits.CUDA),
)


def first_for(q: Tensor, queries: int) -> str | None:
    """The row that is faster than those before it where queries are few: only cuda divides their keys."""
    # On a CPU a graph that is traced with any number of queries must not be bound to one side of that many.
    return "cuda" if q.is_cuda and queries <= split_kv.MOST_ROWS else None


def empty_rows(x, dim):
    """(B, H, T, dim) beside x (B, H, T, D), laid out so that transpose(1, 2) is contiguous."""
    B, H, T, _ = x.shape
    # Not a view of a tensor: an output that is one may not be changed in place.
    return torch.empty_permuted((B, H, T, dim), (0, 2, 1, 3), dtype=x.dtype, device=x.device)


def _window(q, k, left, right, top_left, seed):
    shift = 0 if top_left else k.shape[2] - q.shape[2]
    return left, right, shift, 0 if seed is None else int(seed)


def _forward(
    row, q, k, v, bias, mask, slopes, sinks, query_starts, key_starts, seed, key_counts, pages, queries, keys,
    left, right, top_left, *scalars, saves=True,
):  # fmt: skip
    out = empty_rows(q, v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    statistics = lse.new_empty(2 if saves and key_counts is None else 0, *lse.shape)
    if row is not None and lse.numel():
        kept = statistics if len(statistics) else None if row.name == "cpu" else lse.new_empty(2, *lse.shape)
        uneven = query_starts is not None or key_counts is not None
        sequences = (query_starts, key_starts, key_counts, pages, queries, keys) if uneven else None
        window = _window(q, k, left, right, top_left, seed)
        row.forward(
            checks.rows(q), checks.rows(k), checks.rows(v), bias, mask, slopes, sinks, out, lse, kept,
            sequences, window, scalars,
        )  # fmt: skip
    return out, lse, statistics


def _backward(
    row, dout, dlse, q, k, v, bias, mask, slopes, sinks, query_starts, key_starts, seed, out, statistics,
    wants_dbias, queries, keys, left, right, top_left, *scalars, saves=True,
):  # fmt: skip
    dq, dk, dv = (empty_rows(x, x.shape[-1]) for x in (q, k, v))
    dbias = q.new_zeros(bias.shape if wants_dbias else 0, dtype=torch.float32)
    of_rows = wants_dbias and bias.shape[-1] == 1  # one bias for all scores of a row
    delta = torch.empty_like(statistics)
    if row is not None and delta.numel():
        packed = query_starts is not None
        sequences = (query_starts, key_starts, None, None, queries, keys) if packed else None
        window = _window(q, k, left, right, top_left, seed)
        row.backward(
            checks.rows(dout), None if dlse is None else dlse.contiguous(), checks.rows(q), checks.rows(k),
            checks.rows(v), bias, mask, slopes, sinks, out, statistics, dq, dk, dv,
            dbias if wants_dbias and not of_rows else None, delta, sequences, window, scalars,
        )  # fmt: skip
    elif row is not None:
        dk.zero_()
        dv.zero_()
        delta.zero_()
    # What a sink has of the softmax takes no part in the output, so its score's gradient is -p delta. These
    # cancel in their sum, which would leave it the rounding errors of the largest.
    dsink = None
    if sinks is not None:
        dsink = -(sinks.double()[:, None] - statistics[0]).exp() * statistics[1] * delta[0]  # (B, H, T_q)
    dsinks = delta.new_empty(0) if dsink is None else dsink.sum((0, 2)).float()
    if of_rows and dbias.numel():  # the gradients of a row's scores and of its sink sum to dlse
        total = torch.zeros_like(delta[0]) if dlse is None else dlse.masked_fill(statistics[1] == 0, 0.0)
        dbias = (total if dsink is None else total - dsink)[..., None].sum_to_size(dbias.shape).float()
    return dq, dk, dv, dbias, dsinks


_OPTIONS = "int left, int right, bool top_left, float scale, float softcap, float dropout"
_EXTRAS = ", ".join(f"Tensor? {x}" for x in "bias mask slopes sinks query_starts key_starts seed".split())

_attention_backward = Operator(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, {_EXTRAS}, Tensor out,"
    f" Tensor statistics, bool wants_dbias, SymInt queries, SymInt keys, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    BACKENDS,
    _backward,
)


def _save(ctx, inputs, output):
    *tensors, ctx.key_counts, _ = inputs[:12]
    ctx.options = inputs[12:]
    out, _, statistics = output
    ctx.save_for_backward(*tensors, out, statistics)
    ctx.mark_non_differentiable(statistics)


def _gradient(ctx, dout, dlse, _):
    if ctx.key_counts is not None:
        raise NotImplementedError("attention: the keys and values of a cache have no gradient")
    *inputs, out, statistics = ctx.saved_tensors
    bias, sinks = inputs[3], inputs[6]
    wants_dbias = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias, dsinks = _attention_backward(
        ctx.row, torch.zeros_like(out) if dout is None else dout, dlse, *inputs, out, statistics, wants_dbias,
        *ctx.options,
    )  # fmt: skip
    dbias = dbias.to(bias.dtype) if wants_dbias else None
    rest = [None] * (5 + len(ctx.options))
    return dq, dk, dv, dbias, None, None, None if sinks is None else dsinks, *rest


_attention = Operator(
    f"attention(Tensor q, Tensor k, Tensor v, {_EXTRAS}, Tensor? key_counts, Tensor? pages, SymInt queries,"
    f" SymInt keys, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor statistics)",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def run(row, q, k, v, bias, mask, slopes, sinks, heads, sequences, left, right, top_left, seed, *scalars):
    """(out, lse), of (B, H) heads: query_starts, key_starts, key_counts, pages, queries, keys of sequences,
    where packed ones are (1, H, rows, D), or None; scale, softcap, dropout."""
    if slopes is not None:
        slopes = slopes.float().expand(heads)[..., None, None]
    if sinks is not None:  # a softmax of nothing but -inf is NaN
        sinks = sinks.float().clamp(min=-1e30).contiguous()
    query_starts, key_starts, *rest = sequences or (None, None, None, None, q.shape[2], k.shape[2])
    window = (_ALL if side is None else side for side in (left, right))
    return _attention(
        row, q, k, v, bias, mask, slopes, sinks, query_starts, key_starts, seed, *rest, *window, top_left,
        *scalars,
    )[:2]  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    top_left: bool = False,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to the keys it sees: out = dropout(softmax(s)) v, where

        s = cap(q k^T * scale) - slope * |i - j| + bias + mask,    cap(s) = softcap * tanh(s / softcap)

    Tensors are read where they lie, whatever their strides, as long as the last dimension is contiguous; so
    views of packed projections, and (B, T, H, D).transpose(1, 2), cost no copy. Memory is linear in T_q and
    T_k, beside what bias, mask and a bias's gradient take themselves. A query that sees no key gives 0, and
    no gradient.

    Args:
        q: (B, H, T_q, D), float32, bfloat16 or float16; sums are taken in float32. D from 1 to 256.
        k: (B, H_kv, T_k, D); H is a multiple of H_kv, and query head h reads key head h // (H / H_kv).
        v: (B, H_kv, T_k, Dv). Dv from 1 to 256.
        causal: a query sees no key behind its own place. The last query stands at the last key.
        window: (left, right): how many keys before and behind its place a query sees; None: all.
        top_left: the first query stands at the first key instead, as with torch's is_causal.
        bias: float32 or q's dtype, broadcast to (B, H, T_q, T_k); it has a gradient. -inf hides.
        mask: broadcast to (B, H, T_q, T_k): bool, True where a query sees, or added as a bias without
            gradient, where -inf hides.
        alibi_slopes: (H,) or (B, H), without a gradient: what a step between the places of query and key
            takes from a score.
        softcap: scores stay within (-softcap, softcap); 0: no cap.
        dropout_p: the share of probabilities that is dropped, from 0 to below 1.
        seed: of dropout: which elements are dropped depends on it and their place alone. None draws one from
            torch's default generator.
        scale: D ** -0.5 where None.
        sinks: (H,): exp(sink) is added to each denominator of a head; it has a gradient. Below -1e30 it is
            taken as that.
        return_lse: return the logarithms of the denominators too; they have a gradient.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        out: (B, H, T_q, Dv), q's dtype; out.transpose(1, 2) is contiguous, so that joining the heads,
        out.transpose(1, 2).reshape(B, T_q, H * Dv), is a view. With return_lse (out, lse), lse (B, H, T_q)
        float32, -inf where a query sees no key and there is no sink.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: the backend asked for does not take this call.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; Dao, "FlashAttention-2" (2023);
    Press et al., "Train Short, Test Long" (2022), for the slopes; Xiao et al., "Efficient Streaming Language
    Models with Attention Sinks" (2024).
    """
    q, k, v = attention_checks.heads("attention", q, k, v, MAX_DIM)
    heads = tuple(q.shape[:2])
    bias, mask = attention_checks.scores("attention", q, k, bias, mask)
    left, right, slopes, sinks = attention_checks.options(
        "attention", heads, q.device, causal=causal, window=window, alibi_slopes=alibi_slopes, sinks=sinks,
        softcap=softcap,
    )  # fmt: skip
    checks.number("attention", "dropout_p", dropout_p, 0.0, 1.0)
    seed = checks.seed("attention", seed) if dropout_p else None
    scale = attention_checks.scale("attention", scale, q.shape[-1])
    first = first_for(q, q.shape[2])
    row = dispatch.pick("attention", BACKENDS, backend, q, k, v, heads, bias, first=first)
    if row is None:
        return reference.attention(
            q, k, v, window=(left, right), top_left=top_left, bias=bias, mask=mask, alibi_slopes=slopes,
            softcap=softcap, dropout_p=dropout_p, seed=seed, scale=scale, sinks=sinks, return_lse=return_lse,
        )  # fmt: skip
    out, lse = run(
        row, q, k, v, bias, mask, slopes, sinks, heads, None, left, right, bool(top_left), seed, scale,
        float(softcap), float(dropout_p),
    )  # fmt: skip
    return (out, lse) if return_lse else out
