"""torch.nn.MultiheadAttention over lspm_kernels.attention."""

import torch
from torch import Tensor, nn

from lspm_kernels.nn import calls
from lspm_kernels.nn.linears import project
from lspm_kernels.ops.attention import MAX_DIM, attention

_DIMS = 2, 3  # of unbatched and of batched inputs
# A TransformerEncoderLayer of 64 features, 8x32 tokens: in training with its backward 1.7 times as fast as
# torch's, in evaluation 1.2, and 0.94 in bfloat16; in training of 4x16 0.73.
_LEAST, _LEAST_IN_TRAINING = 2**15, 2**14


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: on a CPU, where no weights are asked for, by lspm_kernels.attention.

    Weights are: they are what the kernel does not write. On an H200 attention/forward/bfloat16 is 0.6 to 0.7
    times as fast as torch's.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not need_weights and takes(self, query, key, value, key_padding_mask, attn_mask, is_causal):
            return attend(self, query, key, value, key_padding_mask, attn_mask, is_causal), None
        return super().forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )


def takes(module, query, key, value, key_padding_mask, attn_mask, is_causal) -> bool:
    """Whether attend computes what torch does, and in less time."""
    out, least = module.out_proj, _LEAST_IN_TRAINING if module.training else _LEAST
    if type(query) is not Tensor or query.numel() < least or any(map(calls.parametrized, (module, out))):
        return False
    given = query, key, value, *_weights(module), module.in_proj_bias, out.weight, out.bias
    if not (calls.plain(*given) and query.is_cpu and calls.alike(*given)):
        return False
    adds_keys = module.bias_k is not None or module.bias_v is not None or module.add_zero_attn
    if adds_keys or module.head_dim > MAX_DIM or module.dropout >= 1 or not key.numel():
        return False
    if query.dim() not in _DIMS or key.dim() != query.dim() or key.shape[:-1] != value.shape[:-1]:
        return False
    sizes = query.shape[-1], key.shape[-1], value.shape[-1]
    batch = None if query.dim() == 2 else 0 if module.batch_first else 1
    B = None if batch is None else query.shape[batch]
    if sizes != (module.embed_dim, module.kdim, module.vdim) or (B is not None and key.shape[batch] != B):
        return False
    length = 1 if batch == 0 else 0
    lengths = query.shape[length], key.shape[length]
    return _takes_masks(query, key_padding_mask, attn_mask, is_causal, module.num_heads, B, *lengths)


def _takes_masks(x, key_padding_mask, attn_mask, is_causal, heads, B, T, S) -> bool:
    if attn_mask is None:
        if is_causal:  # torch refuses it, or in evaluation forgets it
            return False
    elif attn_mask.shape != (T, S) and attn_mask.shape != ((B or 1) * heads, T, S):
        return False
    if key_padding_mask is not None and key_padding_mask.shape != ((S,) if B is None else (B, S)):
        return False
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    if not masks:
        return True
    kind = masks[0].dtype  # of two kinds torch warns
    if any(type(m) is not Tensor or m.device != x.device or m.dtype is not kind for m in masks):
        return False
    return (kind is torch.bool or kind in calls.FLOATS) and not calls.records(*masks)


def attend(module, query, key, value, key_padding_mask, attn_mask, is_causal) -> Tensor:
    """The output for what `takes` admits."""
    batched, H = query.dim() == 3, module.num_heads
    q, k, v = _projected(module, query, key, value)
    if not batched:
        q, k, v = (x[None] for x in (q, k, v))
    first = module.batch_first or not batched
    q, k, v = (x.permute(0, 2, 1, 3) if first else x.permute(1, 2, 0, 3) for x in (q, k, v))  # (B, H, T, D)
    # With both masks torch's is their sum; without the second, is_causal stands for the first.
    causal = is_causal and key_padding_mask is None
    mask = None if causal else _merged(attn_mask, key_padding_mask, len(q), H)
    if mask is not None and mask.dtype is not torch.bool and mask.dtype is not q.dtype:
        mask = mask.float()
    dropout = module.dropout if module.training else 0.0
    out = attention(q, k, v, causal=causal, top_left=causal, mask=mask, dropout_p=dropout)
    joined = out.transpose(1, 2) if first else out.permute(2, 0, 1, 3)
    joined = joined.reshape(*joined.shape[:2], module.embed_dim)
    y = project(joined, module.out_proj.weight, module.out_proj.bias)
    return y if batched else y[0]


def _weights(module) -> tuple[Tensor, ...]:
    if module._qkv_same_embed_dim:
        return (module.in_proj_weight,)
    return module.q_proj_weight, module.k_proj_weight, module.v_proj_weight


def _projected(module, query, key, value) -> list[Tensor]:
    """q, k and v, each (..., H, D): of what is one tensor by one product."""
    weights, bias, E = _weights(module), module.in_proj_bias, module.embed_dim
    heads = module.num_heads, module.head_dim
    if len(weights) == 1 and query is key and key is value:
        return list(project(query, weights[0], bias).unflatten(-1, (3, *heads)).unbind(-3))
    if len(weights) == 1 and key is value:
        weights = weights[0].split((E, 2 * E))
        biases = (None, None) if bias is None else bias.split((E, 2 * E))
        q = project(query, weights[0], biases[0]).unflatten(-1, heads)
        return [q, *project(key, weights[1], biases[1]).unflatten(-1, (2, *heads)).unbind(-3)]
    weights = weights[0].chunk(3) if len(weights) == 1 else weights
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    given = zip((query, key, value), weights, biases, strict=True)
    return [project(x, weight, bias).unflatten(-1, heads) for x, weight, bias in given]


def _merged(attn_mask, key_padding_mask, B, H) -> Tensor | None:
    """Both masks as attention takes one: True where a query sees, or what is added."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (B, H)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(B, 1, 1, -1))
    if not masks:
        return None
    if masks[0].dtype is torch.bool:
        return ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
    return masks[0] if len(masks) == 1 else masks[0] + masks[1]
