"""Scaled dot-product attention over heads, with fewer key heads than query heads where wanted."""

import torch
from torch import Tensor

from lspm_kernels import compiled, dispatch
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import attention as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIM = 256


def _cpu_forward(*args):
    compiled.cpu.attention_forward(*args, torch.get_num_threads())


def _cpu_backward(*args):
    compiled.cpu.attention_backward(*args, torch.get_num_threads())


BACKENDS = (Backend("cpu", "cpu", _FLOATS, _cpu_forward, _cpu_backward, compiled.nothing_missing),)


def _rows(x):
    """x with a contiguous last dimension: itself wherever it can be."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def _empty_rows(x, dim):
    """(B, H, T, dim) beside x (B, H, T, D), laid out so that transpose(1, 2) is contiguous."""
    B, H, T, _ = x.shape
    return x.new_empty(B, T, H, dim).transpose(1, 2)


def _forward(row, q, k, v, causal, scale, saves=True):
    out = _empty_rows(q, v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if row is not None and lse.numel():
        row.forward(_rows(q), _rows(k), _rows(v), out, lse, causal, scale)
    return out, lse


def _backward(row, dout, q, k, v, out, lse, causal, scale, saves=True):
    dq, dk, dv = (_empty_rows(x, x.shape[-1]) for x in (q, k, v))
    if row is not None and lse.numel():
        q, k, v, dout = _rows(q), _rows(k), _rows(v), _rows(dout)
        row.backward(dout, q, k, v, out, lse, dq, dk, dv, torch.empty_like(lse), causal, scale)
    elif row is not None:
        dk.zero_()
        dv.zero_()
    return dq, dk, dv


_attention_backward = Operator(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool causal,"
    " float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
    BACKENDS,
    _backward,
)


def _save(ctx, inputs, output):
    q, k, v, ctx.causal, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)


def _gradient(ctx, dout, _dlse):
    return *_attention_backward(ctx.row, dout, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None


_attention = Operator(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> (Tensor out, Tensor lse)",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every query to the keys it sees: out = softmax(q k^T * scale) v.

    Tensors are read where they lie, whatever their strides, as long as the last dimension is contiguous; so
    views of packed projections, and (B, T, H, D).transpose(1, 2), cost no copy. Memory is linear in T_q and
    T_k.

    Args:
        q: (B, H, T_q, D), float32, bfloat16 or float16; sums are taken in float32. D from 1 to 256.
        k: (B, H_kv, T_k, D); H is a multiple of H_kv, and query head h reads key head h // (H / H_kv).
        v: (B, H_kv, T_k, Dv). Dv from 1 to 256.
        causal: the last query sees all keys, each query before it one less. A query that sees no key gives 0,
            and no gradient.
        scale: D ** -0.5 where None.
        backend: "cpu" or "reference"; None takes the first that admits the call.

    Returns:
        out: (B, H, T_q, Dv), q's dtype; out.transpose(1, 2) is contiguous, so that joining the heads,
        out.transpose(1, 2).reshape(B, T_q, H * Dv), is a view.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        NotImplementedError: the backend asked for does not take this call.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; Dao, "FlashAttention-2" (2023).
    """
    q, k, v = _check(q, k, v)
    row = dispatch.pick("attention", BACKENDS, backend, q, k, v)
    if row is None:
        return reference.attention(q, k, v, causal=causal, scale=scale)
    return _attention(row, q, k, v, bool(causal), q.shape[-1] ** -0.5 if scale is None else float(scale))[0]


def _check(q, k, v):
    """Checks the tensors; gives them in autocast's dtype where autocast is on, as torch's own op does."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"attention: {name} must be a floating-point tensor (B, H, T, D), got {got}")
        if not 1 <= x.shape[-1] <= _MAX_DIM:
            raise ValueError(f"attention: {name} must have a head dim of 1 to {_MAX_DIM}, got {x.shape[-1]}")
    B, H, _, D = q.shape
    _, H_kv, T_k, _ = k.shape
    if k.shape[0] != B:
        raise ValueError(f"attention: k must have q's batch size {B}, got {k.shape[0]}")
    if k.shape[-1] != D:
        raise ValueError(f"attention: k must have q's head dim {D}, got {k.shape[-1]}")
    if (H_kv == 0 and H > 0) or (H_kv > 0 and H % H_kv):
        raise ValueError(f"attention: k must have a number of heads that divides q's {H}, got {H_kv}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"attention: v must have k's batch, heads and length {B, H_kv, T_k}, got {tuple(v.shape[:-1])}"
        )
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise ValueError(f"attention: {name} must be on q's device {q.device}, got {x.device}")
    if q.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype in (dtype, torch.float64) else x.to(dtype) for x in (q, k, v))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"attention: {name} must have q's dtype {q.dtype}, got {x.dtype}")
    return q, k, v
