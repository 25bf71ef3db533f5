"""Embeddings of tokens, with a layer norm and dropout, in plain PyTorch: what the kernels compute."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lspm_kernels.reference.dropout import dropout
from lspm_kernels.reference.layer_norm import layer_norm


def embedding(tokens: Tensor, weight: Tensor, *, positions: Tensor | int = 0, position_weight=None,
              token_types=None, token_type_weight=None, norm_weight=None, norm_bias=None, eps: float = 1e-5,
              dropout_p: float = 0.0, seed: int = 0, padding_idx: int | None = None) -> Tensor:  # fmt: skip
    """dropout(layer_norm(the rows' sum)), each where it is given, in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    y = F.embedding(tokens, weight, padding_idx).to(wide)
    if position_weight is not None:
        if isinstance(positions, int):
            positions = torch.arange(positions, positions + tokens.shape[-1], device=tokens.device)
        y = y + F.embedding(positions, position_weight)
    if token_type_weight is not None:
        y = y + F.embedding(token_types, token_type_weight)
    if norm_weight is not None:
        y = layer_norm(y.to(weight.dtype).to(wide), norm_weight, norm_bias, eps)
    if dropout_p:
        y = dropout(y, dropout_p, seed=seed)
    return y.to(weight.dtype)
