"""AdamW's step over many tensors, and the norm of their gradients, in plain PyTorch: what the kernels do."""

import torch
from torch import Tensor


@torch.no_grad()
def adamw_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor], master_params: list[Tensor], scale: Tensor | None, steps: list[int],
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, maximize: bool,
) -> None:  # fmt: skip
    """Changes all but the gradients; computes in float32 where a parameter has fewer bits."""
    for i, (param, step) in enumerate(zip(params, steps, strict=True)):
        wide = torch.promote_types(param.dtype, torch.float32)
        sign = -1.0 if maximize else 1.0
        g = grads[i].to(wide) * (sign if scale is None else sign * scale.to(wide))
        x = (master_params[i] if master_params else param).to(wide)
        mean = exp_avgs[i].to(wide).lerp(g, 1 - beta1)
        square = beta2 * exp_avg_sqs[i].to(wide) + (1 - beta2) * g.square()
        exp_avgs[i].copy_(mean)
        exp_avg_sqs[i].copy_(square)
        if max_exp_avg_sqs:
            square = torch.maximum(max_exp_avg_sqs[i].to(wide), square)
            max_exp_avg_sqs[i].copy_(square)
        root = (square / (1 - beta2**step)).sqrt() + eps
        x = x - (lr * weight_decay * x + lr / (1 - beta1**step) * mean / root)
        if master_params:
            master_params[i].copy_(x)
        param.copy_(x)


@torch.no_grad()
def adamw_norm(grads: list[Tensor]) -> Tensor:
    """The root of the sum of all squares, which are added up in float64."""
    return sum(g.double().square().sum() for g in grads).sqrt().float()
