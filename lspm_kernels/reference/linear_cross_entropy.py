"""A linear layer and its cross entropy in plain PyTorch: what the kernels compute."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The loss and lse, in float32 at least, of logits in hidden's dtype."""
    wide, classes = torch.promote_types(hidden.dtype, torch.float32), target.to(torch.int64)
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    logits = logits.to(wide)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    counts = classes != ignore_index
    weights = torch.ones(len(weight), dtype=wide) if class_weight is None else class_weight.to(wide)
    weights = weights.to(logits.device)
    share = weights[classes.where(counts, 0)].where(counts, 0)
    lse = logits.logsumexp(-1).where(counts, 0)
    options = {"ignore_index": ignore_index, "reduction": "none", "label_smoothing": label_smoothing}
    rows = logits.reshape(-1, len(weight)), classes.reshape(-1)
    losses = F.cross_entropy(*rows, weights, **options).view(target.shape)
    if z_loss:
        losses = losses + z_loss * share * lse.square()
    reduced = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / share.sum()}
    return reduced[reduction], lse
