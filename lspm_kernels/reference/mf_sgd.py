"""What mf_sgd means, in plain PyTorch: one rating after the other."""

import torch
from torch import Tensor


def mf_sgd(
    user_factors, item_factors, user_bias, item_bias, user_squares, item_squares, users, items, ratings,
    weight=None, *, mean=0.0, lr, reg=(0.0,) * 4, l1=(0.0, 0.0), nonnegative=False, logistic=False,
) -> Tensor:  # fmt: skip
    """One pass over the ratings in their order, in place; gives the loss. lr: of factors and of biases."""
    total = torch.zeros((), dtype=torch.float64)
    sides = (user_factors, user_bias, user_squares), (item_factors, item_bias, item_squares)
    for n, ids in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        w, rating = 1.0 if weight is None else weight[n], ratings[n].to(user_factors.dtype)
        old = [factors[i].clone() for (factors, _, _), i in zip(sides, ids, strict=True)]
        score = (
            mean
            + old[0] @ old[1]
            + sum(b[i] for (_, b, _), i in zip(sides, ids, strict=True) if b is not None)
        )
        if logistic:
            loss = torch.nn.functional.softplus(score) - rating * score
            score = score.sigmoid()
        else:
            loss = (rating - score) ** 2
        total += w * loss
        e = w * (rating - score)
        for k, ((factors, bias, squares), i) in enumerate(zip(sides, ids, strict=True)):
            step = e * old[1 - k] - reg[k] * old[k]
            rate, bias_rate = lr  # by small factors' gradients, a bias's rate would be huge
            if squares is not None:
                squares[i] += (step * step).mean()
                rate = lr[0] / squares[i].sqrt() if squares[i] > 0 else lr[0]
            new = old[k] + rate * step
            new = new.sign() * (new.abs() - rate * l1[k]).clamp(min=0) if l1[k] else new
            factors[i] = new.clamp(min=0) if nonnegative else new
            if bias is not None:
                bias[i] += bias_rate * (e - reg[2 + k] * bias[i])
    return total
