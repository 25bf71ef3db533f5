"""What bpr means, in plain PyTorch: one pair after the other."""

import torch
from torch import Tensor

DRAWS = 8
_WORD = 2**64 - 1


def random_bits(seed: int, place: int) -> int:
    """32 bits: the hash by which items are drawn."""
    x = (seed + place * 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ x >> 32) * 0xD6E8FEB86659FD93) & _WORD
    return (((x ^ x >> 32) * 0xD6E8FEB86659FD93) & _WORD) >> 32


def bpr(p, q, bias, users, items, parts: list[list[int]], seen: list[set], *, lr, reg, seed) -> Tensor:
    """One pass over the pairs in their order, in place; gives the loss and how many pairs were skipped.

    parts: for each pair the items it draws from; seen: for each user the items it does not draw.
    """
    total, skipped = torch.zeros((), dtype=p.dtype), 0
    for n, (u, i) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        drawn = [parts[n][random_bits(seed, n * DRAWS + k) * len(parts[n]) >> 32] for k in range(DRAWS)]
        j = next((j for j in drawn if j != i and j not in seen[u]), None)
        if j is None:
            skipped += 1
            continue
        user, item, other = p[u].clone(), q[i].clone(), q[j].clone()
        x = user @ (item - other) + (0 if bias is None else bias[i] - bias[j])
        g = torch.sigmoid(-x)
        p[u] += lr * (g * (item - other) - reg[0] * user)
        q[i] += lr * (g * user - reg[1] * item)
        q[j] += lr * (-g * user - reg[1] * other)
        if bias is not None:
            bias[i] += lr * (g - reg[2] * bias[i])
            bias[j] += lr * (-g - reg[2] * bias[j])
        total += torch.nn.functional.softplus(-x)
    return total, skipped
