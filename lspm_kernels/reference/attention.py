"""Scaled dot-product attention in plain PyTorch: what the kernels compute."""

import torch

from lspm_kernels.reference import philox


def attention(q, k, v, *, causal=False, window=None, top_left=False, bias=None, mask=None, alibi_slopes=None,
              softcap=0.0, dropout_p=0.0, seed=0, scale=None, sinks=None, return_lse=False, b=0):  # fmt: skip
    """softmax(q k^T * scale + ...) v in float32 at least, of batches from b on; see lspm_kernels."""
    wide = torch.promote_types(q.dtype, torch.float32)
    (B, H, T_q, D), (_, H_kv, T_k, _) = q.shape, k.shape
    k, v = (t.to(wide).repeat_interleave(H // max(H_kv, 1), dim=1) for t in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    apart = torch.arange(T_q, device=q.device)[:, None] + (0 if top_left else T_k - T_q)
    apart = apart - torch.arange(T_k, device=q.device)  # how far before the query a key stands
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide)[..., None, None] * apart.abs()
    left, right = window or (None, None)
    right = 0 if causal else T_k + T_q if right is None else right
    visible = (apart <= (T_k + T_q if left is None else left)) & (apart >= -right)
    for added in (bias, mask):
        if added is not None:
            visible = visible & (added if added.dtype == torch.bool else added != -torch.inf)
            scores = scores if added.dtype == torch.bool else scores + added
    scores, hidden = scores.masked_fill(~visible, -torch.inf), ~visible.any(-1)
    if sinks is None:  # a query that sees no key gives 0, and no gradient
        scores = scores.masked_fill(hidden[..., None], 0.0)
    else:
        scores = torch.cat([scores, sinks.to(wide).clamp(min=-1e30)[:, None, None].expand(B, H, T_q, 1)], -1)
    p = scores.softmax(-1)[..., :T_k] * visible
    if dropout_p:
        kept = philox.kept(seed, dropout_p, range(b, b + B), H, T_q, T_k, q.device)
        p = p * kept / (1 - dropout_p)
    out = (p @ v).to(q.dtype)
    lse = scores.logsumexp(-1).masked_fill(hidden & (sinks is None), -torch.inf)
    return (out, lse) if return_lse else out
