"""An optimizer's step with the gradient of a table of embeddings, in plain PyTorch: what the kernels do."""

import torch
from torch import Tensor

from lspm_kernels.reference.embedding_bag import shares


@torch.no_grad()
def embedding_bag_update_(
    weight: Tensor, states: tuple[Tensor, ...], dout: Tensor, indices: Tensor, offsets: Tensor | None,
    optimizer: str, lr: float, eps: float, betas: tuple[float, float], weight_decay: float, step: int, **bags
) -> Tensor:  # fmt: skip
    """Changes the rows that stand in bags, and no others, each once."""
    bag, share, _ = shares(weight, indices, offsets, **bags)
    flat, padding = indices.reshape(-1).long(), bags.get("padding_idx")
    taken = flat >= 0 if padding is None else flat != padding % weight.shape[0]
    rows, place = flat[taken].unique(return_inverse=True)
    terms = dout[bag[taken]] * share[taken, None]
    g = terms.new_zeros(len(rows), dout.shape[1]).index_add(0, place, terms)
    old = weight[rows].to(g.dtype)
    g = g + weight_decay * old
    if optimizer == "sgd":
        change = lr * g
    elif optimizer == "adagrad":
        (state_sum,) = states
        state_sum[rows] += g.square().sum(1) / max(1, g.shape[1])
        change = lr * g / (state_sum[rows].sqrt() + eps)[:, None]
    else:
        exp_avg, exp_avg_sq = states
        exp_avg[rows] = exp_avg[rows].lerp(g, 1 - betas[0])
        exp_avg_sq[rows] = exp_avg_sq[rows].lerp(g.square(), 1 - betas[1])
        root = (exp_avg_sq[rows] / (1 - betas[1] ** step)).sqrt() + eps
        change = lr / (1 - betas[0] ** step) * exp_avg[rows] / root
    weight[rows] = (old - change).to(weight.dtype)
    return weight
