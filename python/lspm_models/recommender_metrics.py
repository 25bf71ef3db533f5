"""How good recommendations are: errors of ratings, rankings of the whole catalogue, breadth and novelty."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import lspm_kernels
from lspm_models.data.interactions import Interactions, offsets_of

MOST_SCORES = 1 << 24  # scores at once, 64 MiB


def rmse(predicted: Tensor, ratings: Tensor) -> float:
    """The root of the mean squared error of predictions (N,)."""
    return (predicted.double() - ratings.double()).square().mean().sqrt().item()


def mae(predicted: Tensor, ratings: Tensor) -> float:
    """The mean absolute error of predictions (N,)."""
    return (predicted.double() - ratings.double()).abs().mean().item()


def log_loss(probabilities: Tensor, labels: Tensor) -> float:
    """The mean of -log p of what happened, in nats; of probabilities (N,) and labels (N,) 0 or 1.

    Probabilities are clipped by the least step of float64, as scikit-learn does.
    """
    eps = torch.finfo(torch.float64).eps
    p = probabilities.double().clamp(eps, 1 - eps)
    return -torch.where(labels > 0, p.log(), (1 - p).log()).mean().item()


def auc(scores: Tensor, labels: Tensor) -> float:
    """The probability that a positive has a higher score than a negative; equal scores count one half.

    From ranks (Mann and Whitney, 1947): (R+ - P(P + 1) / 2) / (P N) with the sum of the positives' mean ranks
    R+. NaN where all labels are equal.
    """
    _, places, counts = scores.unique(return_inverse=True, return_counts=True)  # sorted
    last = counts.cumsum(0).double()
    mean_ranks = last - (counts.double() - 1) / 2
    positive = labels > 0
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    above = mean_ranks[places[positive]].sum().item() - positives * (positives + 1) / 2
    return above / (positives * negatives)


def top_items(
    scores: Callable[[Tensor], Tensor], users: Tensor, count: int, seen: Interactions | None = None
) -> Tensor:
    """Ranks the whole catalogue for each user.

    Args:
        scores: gives (B, I) of users (B,); called for as many users as MOST_SCORES allows.
        users: (U,) int64 internal ids.
        count: items to keep.
        seen: ratings whose items are left out for their users.

    Returns:
        (U, count) int64, the best first; -1 behind the last where a user has not seen fewer.
    """
    parts, step = [], 1
    offsets, order = (None, None) if seen is None else seen.by_user()
    position = 0
    while position < len(users):
        chunk = users[position : position + step]
        found = scores(chunk).float()
        if seen is not None:
            rows, places = spread(offsets, chunk)
            found = found.index_put((rows, seen.items[order[places]]), found.new_tensor(-torch.inf))
        values, items = found.topk(min(count, found.shape[1]), dim=1)
        items = torch.where(values > -torch.inf, items, -1)
        parts.append(torch.nn.functional.pad(items, (0, count - items.shape[1]), value=-1))
        position += len(chunk)
        step = max(1, MOST_SCORES // found.shape[1])
    return torch.cat(parts)


def top_products(
    products: tuple[Tensor, Tensor, Tensor | None],
    users: Tensor,
    count: int,
    seen: Interactions | None = None,
) -> Tensor:
    """Ranks the whole catalogue as top_items does, where scores are products: without a matrix of scores.

    Args:
        products: vectors of the users (U, D) and of all items (I, D), and (I,) what is added to an item's
            scores, or None.
        users, count, seen: as top_items has them.
    """
    of_users, of_items, bias = products
    lists = None, None
    if seen is not None:
        offsets, order = seen.by_user()
        _, places = spread(offsets, users)
        counts = offsets[users + 1] - offsets[users]
        lists = (t.to(of_users.device) for t in (offsets_of(counts), seen.items[order[places]]))
    indptr, indices = lists
    _, items = lspm_kernels.top_k_scores(
        of_users, of_items, min(count, len(of_items)), item_bias=bias, exclude_indptr=indptr,
        exclude_indices=indices,
    )  # fmt: skip
    return torch.nn.functional.pad(items.to(users.device), (0, count - items.shape[1]), value=-1)


def spread(offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the entries of some rows of a table that `offsets` cuts.

    Args:
        offsets: (N + 1,) int64.
        rows: (B,) int64.

    Returns:
        For every entry, row after row: where its row stands in `rows`, and its place in the table.
    """
    counts = offsets[rows + 1] - offsets[rows]
    within = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    begins = counts.cumsum(0) - counts
    places = torch.arange(len(within), device=rows.device) - begins[within] + offsets[rows][within]
    return within, places


def hits(ranked: Tensor, users: Tensor, relevant: Interactions) -> Tensor:
    """Tells which ranked items are relevant.

    Args:
        ranked: (U, K) items, -1 for none.
        users: (U,) whose they are.
        relevant: pairs of users and items.

    Returns:
        (U, K) bool.
    """
    items = len(relevant.item_ids)
    wanted = (relevant.users * items + relevant.items).unique()  # sorted
    keys = users[:, None] * items + ranked
    places = torch.searchsorted(wanted, keys).clamp(max=len(wanted) - 1)
    return (wanted[places] == keys) & (ranked >= 0)


def ranking_metrics(ranked: Tensor, users: Tensor, relevant: Interactions) -> dict[str, Tensor]:
    """Returns the metrics at K of each user.

    With r_i whether the i-th of K items is relevant, and R relevant items in all:
    precision sum r_i / K; recall sum r_i / R; hit rate max r_i; MRR 1 / i of the first relevant one, or 0;
    MAP sum r_i precision@i / min(R, K); NDCG sum r_i / log2(i + 1), over that of the best order.

    Args:
        ranked: (U, K) items, the best first, -1 for none.
        users: (U,), each with at least one relevant item.
        relevant: pairs of users and items; duplicates count once.

    Returns:
        By name (U,) float64.

    Raises:
        ValueError: a user has no relevant item.
    """
    found = hits(ranked, users, relevant).double()
    pairs = (relevant.users * len(relevant.item_ids) + relevant.items).unique()
    totals = torch.bincount(pairs // len(relevant.item_ids), minlength=len(relevant.user_ids))[users]
    if (totals == 0).any():
        raise ValueError(f"metrics: users must have a relevant item, got {int((totals == 0).sum())} without")
    k = ranked.shape[1]
    places = torch.arange(1, k + 1, dtype=torch.float64)
    discounts = 1 / (places + 1).log2()
    best = totals.clamp(max=k)
    return {
        "precision": found.mean(1),
        "recall": found.sum(1) / totals,
        "map": (found * found.cumsum(1) / places).sum(1) / best,
        "ndcg": (found * discounts).sum(1) / discounts.cumsum(0)[best - 1],
        "hit_rate": found.amax(1),
        "mrr": (found / places).amax(1),
    }


def coverage(ranked: Tensor, items: int) -> float:
    """The share of the catalogue that is recommended to anybody."""
    return len(ranked[ranked >= 0].unique()) / items


def novelty(ranked: Tensor, training: Interactions) -> Tensor:
    """The mean self-information of what each user is recommended, in bits.

    -log2 of the share of all users who rated an item; one that nobody rated counts as rated by one.

    Returns:
        (U,) float64; NaN where nothing is recommended.

    Source: Zhou et al., Solving the apparent diversity-accuracy dilemma of recommender systems, 2010.
    """
    pairs = (training.items * len(training.user_ids) + training.users).unique()
    raters = torch.bincount(pairs // len(training.user_ids), minlength=len(training.item_ids))
    information = -(raters.clamp(min=1) / len(training.user_ids)).double().log2()
    there = ranked >= 0
    return (information[ranked.clamp(min=0)] * there).sum(1) / there.sum(1)
