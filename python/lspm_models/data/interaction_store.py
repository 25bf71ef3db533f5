"""Interactions in a run folder: tensors in safetensors, names in JSON."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from lspm_models.checkpoint import read_tensors
from lspm_models.data.interactions import Categories, Features, Ids, Interactions
from lspm_models.files import replaced, write_atomically, write_tensors

COLUMNS = ("users", "items", "ratings", "weights", "timestamps")


def save_interactions(interactions: Interactions, folder: Path) -> None:
    """Writes ratings.safetensors and catalogue.json into a folder."""
    tensors = {name: getattr(interactions, name) for name in COLUMNS}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    names: dict = {"titles": interactions.titles, "skipped": interactions.skipped}
    for side in ("user", "item"):
        features = getattr(interactions, f"{side}_features")
        names[f"{side}_ids"] = getattr(interactions, f"{side}_ids").names
        names[f"{side}_categories"] = {name: found.names for name, found in features.categories.items()}
        for name, found in features.categories.items():
            tensors |= {f"{side}/{name}/values": found.values, f"{side}/{name}/offsets": found.offsets}
        tensors |= {f"{side}/{name}/numbers": tensor for name, tensor in features.numbers.items()}
    with replaced(Path(folder) / "ratings.safetensors") as partial:
        write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    write_atomically(Path(folder) / "catalogue.json", json.dumps(names, ensure_ascii=False).encode())


def load_interactions(folder: Path) -> Interactions:
    """Reads what save_interactions() wrote.

    Raises:
        ValueError: it is not there, or damaged.
    """
    path = Path(folder) / "catalogue.json"
    tensors = read_tensors(Path(folder) / "ratings.safetensors")
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        sides = {side: _features(side, names[f"{side}_categories"], tensors) for side in ("user", "item")}
        return Interactions(
            user_ids=Ids(names["user_ids"]),
            item_ids=Ids(names["item_ids"]),
            user_features=sides["user"],
            item_features=sides["item"],
            titles=None if names["titles"] is None else tuple(names["titles"]),
            skipped=names["skipped"],
            **{name: tensors.get(name) for name in COLUMNS},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"ratings: {path} must hold the names of a run's ratings, got {error!r:.120}"
        ) from error


def _features(side: str, names: dict[str, list[str]], tensors: dict[str, Tensor]) -> Features:
    categories = {
        name: Categories(tuple(values), tensors[f"{side}/{name}/values"], tensors[f"{side}/{name}/offsets"])
        for name, values in names.items()
    }
    numbers = {
        key.split("/", 1)[1].removesuffix("/numbers"): tensor.to(torch.float32)
        for key, tensor in sorted(tensors.items())
        if key.startswith(f"{side}/") and key.endswith("/numbers")
    }
    return Features(categories, numbers)
