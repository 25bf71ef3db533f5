"""From a trained recommender to what a person reads: titles, a table of metrics, and how groups fare."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lspm_models import recommender_metrics as metrics
from lspm_models.data.interactions import Interactions
from lspm_models.files import replaced, write_atomically
from lspm_models.recommender_job import Trained

AGES = (18, 25, 35, 45, 50, 56)  # the groups of MovieLens-1M
MOST_GROUPS = 12  # a feature with more values is no grouping
PAIRS = 1 << 16  # predicted at once


@dataclass(frozen=True)
class Evaluation:
    """How a trained model is evaluated."""

    k: int = field(default=10, metadata={"help": "items recommended to each user"})
    groups: tuple[str, ...] = field(
        default=(),
        metadata={"help": "features of users to compare by", "default": "gender and age, if known"},
    )

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"output: k must be at least 1, got {self.k}")


@dataclass(frozen=True)
class Recommending:
    """What is recommended, and to whom."""

    user: str | None = field(default=None, metadata={"help": "id of the user", "default": "needed"})
    count: int = field(default=10, metadata={"help": "items to recommend"})
    seen: bool = field(default=False, metadata={"help": "also what the user has rated already"})

    def __post_init__(self) -> None:
        if self.user is None:
            raise ValueError("output: --user must be the id of a user, got none")
        if self.count < 1:
            raise ValueError(f"output: count must be at least 1, got {self.count}")


def top_items(trained: Trained, users: Tensor, count: int, seen: Interactions | None) -> Tensor:
    """Ranks the whole catalogue for users (U,), as metrics.top_items does."""
    model, device = trained.model, device_of(trained)
    if hasattr(model, "products"):
        return metrics.top_products(model.products(users.to(device)), users, count, seen)
    return metrics.top_items(lambda some: model.scores(some.to(device)).cpu(), users, count, seen)


@torch.no_grad()
def recommendations(trained: Trained, output: Recommending, report: Callable[[str], None]) -> None:
    """Reports what a user liked most, and what is recommended.

    Raises:
        ValueError: the user is not known.
    """
    known = trained.training
    user = known.user_ids.internal([output.user], "recommend: user")
    ranked = top_items(trained, user, output.count, None if output.seen else known)[0]
    items = ranked[ranked >= 0]
    rated = (known.users == user).nonzero()[:, 0]
    best = known.items[rated[known.ratings[rated].argsort(descending=True, stable=True)]].tolist()
    liked = "; ".join(known.title(item) for item in list(dict.fromkeys(best))[:3])
    report(f"user {output.user}, {len(rated)} ratings{', the best of ' * bool(liked)}{liked}")
    if not len(items):
        report("nothing is left to recommend: the user has rated everything")
        return
    device = device_of(trained)
    predicted = trained.model.predict(user.expand(len(items)).to(device), items.to(device)).tolist()
    width = max(len(known.title(int(item))) for item in items)
    for place, (item, value) in enumerate(zip(items.tolist(), predicted, strict=True), 1):
        shown = meaning(value, trained.predicts)
        report(f"{place:>3}  {known.title(item):<{width}}  {shown}{genres(known, item)}")


def meaning(value: float, predicts: str) -> str:
    """Returns a prediction as people read it."""
    return f"{value:.0%}" if predicts == "clicks" else f"{value:.2f}"


def genres(known: Interactions, item: int) -> str:
    """Returns what kind of thing an item is, in brackets, where that is known."""
    found = [", ".join(table.labels(item)) for table in known.item_features.categories.values()]
    return "".join(f"  ({labels})" for labels in found if labels)


def device_of(trained: Trained) -> torch.device:
    """Returns where the model is; one that is no module is on the CPU."""
    parameters = getattr(trained.model, "parameters", lambda: iter(()))()
    return next(iter(parameters), torch.zeros(())).device


@torch.no_grad()
def report_quality(trained: Trained, output: Evaluation, report: Callable[[str], None]) -> None:
    """Evaluates on the ratings set aside; writes metrics.json, groups.csv and groups.png into the run folder.

    Raises:
        ValueError: a group is no feature of the users.
    """
    groups = user_groups(trained.training, output.groups)
    predicted = predictions(trained)
    of_users, found = quality(trained, predicted, output.k)
    report(f"set aside  {len(trained.held_out):,} ratings of {len(trained.held_out.users.unique()):,} users")
    for name, value in found.items():
        report(f"{name:<18} {value:.4f}")
    kept = {name: None if math.isnan(value) else value for name, value in found.items()}  # JSON has no NaN
    write_atomically(trained.folder / "metrics.json", json.dumps(kept, indent=2).encode() + b"\n")
    rows = group_rows(trained, predicted, of_users, groups)
    if not rows:
        return
    report("")
    columns = [name for name in rows[0] if name not in ("feature", "group")]
    report(f"{'':<22}" + "".join(f"{name:>14}" for name in columns))
    for row in rows:
        values = [f"{row[name]:>14,}" if name in COUNTS else f"{row[name]:>14.4f}" for name in columns]
        report(f"{row['feature'] + ' ' + row['group']:<22}" + "".join(values))
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(rows)
    write_atomically(trained.folder / "groups.csv", text.getvalue().encode())
    draw_groups(rows, trained.folder / "groups.png")
    report(f"\nfiles      {trained.folder}/metrics.json, groups.csv, groups.png")


COUNTS = ("users", "ratings")


def predictions(trained: Trained) -> Tensor:
    """Returns what the model predicts of the ratings set aside, (N,)."""
    device = device_of(trained)
    pairs = zip(trained.held_out.users.split(PAIRS), trained.held_out.items.split(PAIRS), strict=True)
    return torch.cat([trained.model.predict(*(part.to(device) for part in pair)).cpu() for pair in pairs])


def quality(trained: Trained, predicted: Tensor, k: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Returns metrics of the users with a liked item set aside, beside `users` and `ranked`, and of all."""
    training, held_out = trained.training, trained.held_out
    ratings, liked = held_out.ratings, held_out.ratings >= trained.data.positive
    found: dict[str, float] = {}
    if trained.predicts == "ratings":
        found |= {"RMSE": metrics.rmse(predicted, ratings), "MAE": metrics.mae(predicted, ratings)}
        mean = training.ratings.mean().expand(len(ratings))
        found["RMSE of the mean"] = metrics.rmse(mean, ratings)
    if trained.predicts == "clicks":
        found["log-loss"] = metrics.log_loss(predicted, liked)
    found["AUC"] = metrics.auc(predicted, liked)
    relevant = held_out.subset(liked)
    users = relevant.users.unique()
    of_users: dict[str, Tensor] = {"users": users}
    if len(users):
        ranked = top_items(trained, users, k, training)
        of_users |= metrics.ranking_metrics(ranked, users, relevant)
        of_users |= {"novelty": metrics.novelty(ranked, training), "ranked": ranked}
        names = {"map": "MAP", "ndcg": "NDCG", "mrr": "MRR", "hit_rate": "hit rate"}
        for name in ("precision", "recall", "map", "ndcg", "hit_rate", "mrr"):
            found[f"{names.get(name, name)}@{k}"] = of_users[name].mean().item()
        found[f"coverage@{k}"] = metrics.coverage(ranked, len(training.item_ids))
        found[f"novelty@{k}, bits"] = of_users["novelty"].nanmean().item()
    return of_users, found


def user_groups(training: Interactions, wanted: tuple[str, ...] = ()) -> dict[str, tuple[list[str], Tensor]]:
    """Returns by feature the names of groups of users, and which each user is in, (U,) int64, -1 for none.

    Categories are groups; ages fall into those of MovieLens-1M, other numbers into quarters.

    Raises:
        ValueError: users have no such feature, or it has too many values.
    """
    features = training.user_features
    names = wanted or [
        n for n in ("gender", "sex", "age") if n in features.categories or n in features.numbers
    ]
    groups = {}
    for name in names:
        if name in features.numbers:
            groups[name] = _ranges(name, features.numbers[name])
        elif name in features.categories:
            table = features.categories[name]
            if len(table.names) > MOST_GROUPS and wanted:
                raise ValueError(
                    f"groups: {name} must have at most {MOST_GROUPS} values, got {len(table.names)}"
                )
            if len(table.names) <= MOST_GROUPS:
                counts = table.offsets.diff()
                first = table.values[table.offsets[:-1].clamp(max=max(0, len(table.values) - 1))]
                groups[name] = list(table.names), torch.where(counts > 0, first, -1)
        else:
            known = ", ".join([*features.categories, *features.numbers]) or "none"
            raise ValueError(f"groups: users must have the feature, of {known}, got {name!r}")
    return groups


def _ranges(name: str, numbers: Tensor) -> tuple[list[str], Tensor]:
    known = numbers[~numbers.isnan()]
    if not len(known):
        return [], torch.full((len(numbers),), -1)
    edges = torch.tensor(AGES, dtype=torch.float32)
    if name != "age":
        edges = known.quantile(torch.tensor([0.25, 0.5, 0.75])).unique()
    bounds = [f"{edge:g}" for edge in edges.tolist()]
    labels = [f"below {bounds[0]}"]
    labels += [f"{low} to below {high}" for low, high in pairwise(bounds)]
    labels.append(f"{bounds[-1]} and more")
    places = torch.bucketize(numbers, edges, right=True)
    return labels, torch.where(numbers.isnan(), -1, places)


def group_rows(
    trained: Trained,
    predicted: Tensor,
    of_users: dict[str, Tensor],
    groups: dict[str, tuple[list[str], Tensor]],
) -> list[dict[str, Any]]:
    """Returns a row for each group with ratings set aside: error, and what its users are shown.

    The columns are the number of users and of ratings set aside; of predicted ratings the RMSE and the mean
    error, which is above 0 where the group is promised too much; recall and NDCG; novelty in bits, low where
    a group is shown what everybody knows; and the share of the catalogue that the group is shown.
    """
    held_out, rows = trained.held_out, []
    for feature, (labels, member) in groups.items():
        for label, name in enumerate(labels):
            theirs = member[held_out.users] == label
            if not theirs.any():
                continue
            row: dict[str, Any] = {"feature": feature, "group": name}
            row |= {"users": int((member == label).sum()), "ratings": int(theirs.sum())}
            if trained.predicts == "ratings":
                ratings = held_out.ratings[theirs]
                row["RMSE"] = metrics.rmse(predicted[theirs], ratings)
                row["mean error"] = (predicted[theirs] - ratings).double().mean().item()
            chosen = member[of_users["users"]] == label
            for metric in ("recall", "ndcg", "novelty"):
                row[metric] = of_users[metric][chosen].nanmean().item() if metric in of_users else math.nan
            ranked = of_users["ranked"][chosen] if "ranked" in of_users else torch.empty(0, dtype=torch.int64)
            row["coverage"] = metrics.coverage(ranked, len(held_out.item_ids))
            rows.append(row)
    return rows


def draw_groups(rows: list[dict[str, Any]], image: Path) -> None:
    """Draws bars of the groups, a panel for each column.

    Args:
        rows: as group_rows() gives them.
        image: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [name for name in rows[0] if name not in ("feature", "group", *COUNTS)]
    figure = Figure(figsize=(2.2 * len(columns) + 2, 0.32 * len(rows) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    labels = [f"{row['feature']} {row['group']} ({row['users']:,})" for row in rows]
    features = list(dict.fromkeys(row["feature"] for row in rows))
    colours = [f"C{features.index(row['feature'])}" for row in rows]
    for axes, name in zip(
        figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True
    ):
        axes.barh(range(len(rows)), [row[name] for row in rows], color=colours)
        axes.set(title=name, yticks=range(len(rows)), yticklabels=labels)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    with replaced(image) as partial:
        figure.savefig(partial, dpi=110, format="png")
