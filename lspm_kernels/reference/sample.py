"""Tokens drawn from logits in plain PyTorch, by way of a sort: what the kernels compute, bit for bit."""

import torch
from torch import Tensor

from lspm_kernels.reference.philox_words import words_of
from lspm_kernels.reference.sample_numbers import exp, exponentials, share, units_of


def weights(
    logits: Tensor, temperature: Tensor, top_k: int, top_p: float, min_p: float, penalty: float, previous=None
) -> Tensor:
    """(rows, V), float32: probabilities of tokens that stay over the largest one's, 0 of all others."""
    scores, V = logits.to(torch.float32), logits.shape[1]
    if previous is not None:
        seen = torch.zeros(len(scores), V + 1, dtype=torch.bool, device=scores.device)
        seen = seen.scatter(1, previous.clamp(min=-1) % (V + 1), True)[:, :V]
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    best = scores.amax(1, keepdim=True)
    w = exp((scores - best) * (1 / temperature.clamp(2.0**-126, 2.0**126)))
    w = w.masked_fill(scores < scores.topk(min(top_k, V)).values[:, -1:], 0)
    ordered = w.sort(1, descending=True).values
    above = units_of(ordered).cumsum(1) - units_of(ordered)
    needed = share(units_of(w).sum(1, keepdim=True), int(top_p * 2**62)).clamp(min=1)
    w = w.masked_fill(w < ordered.masked_fill(above >= needed, 1).amin(1, keepdim=True), 0)
    w = w.masked_fill(w < min_p, 0)
    w = torch.where(temperature == 0, torch.zeros_like(w).scatter(1, scores.argmax(1, keepdim=True), 1.0), w)
    return w.masked_fill(~((best.abs() < torch.inf) & (temperature >= 0)), 0)


def sample(weights: Tensor, seed: Tensor, gumbel: bool) -> tuple[Tensor, Tensor]:
    """The token that each row of weights draws and the log of its probability; -1 and NaN where all are 0."""
    rows, units = torch.arange(len(weights), device=weights.device), units_of(weights)
    total, zero = units.sum(1), torch.zeros_like(rows)
    high, low, *_ = words_of([zero, rows, rows >> 32, zero], seed)
    tokens = (units.cumsum(1) <= share(total, high >> 1 << 31 | low >> 1)[:, None]).sum(1)
    if gumbel:
        tokens = (weights / exponentials(seed, *weights.shape, weights.device)).argmax(1)
    unit = units.gather(1, tokens.clamp(max=weights.shape[1] - 1)[:, None])[:, 0]
    return tokens.where(total > 0, -1), (unit.double() / total).log().float()
