"""Cross entropy in plain PyTorch: what the kernels compute."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of torch's function, in float32 at least, rounded to logits' dtype."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = F.cross_entropy(
        logits.to(wide),
        target.to(wide if target.is_floating_point() else torch.int64),
        None if weight is None else weight.to(wide),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.to(logits.dtype)
