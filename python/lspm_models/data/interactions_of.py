"""Interactions out of what people have at hand: a sparse matrix, columns, a data frame."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lspm_models.data.interactions import Ids, Interactions
from lspm_models.data.rating_files import from_frame

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc)


def interactions_of(ratings: Any) -> Interactions:
    """Returns the ratings as Interactions; those that are stay themselves.

    Args:
        ratings: a sparse matrix of SciPy or torch, users by items, whose entries are the ratings, explicit
            zeros too, and whose ids are the numbers of all rows and columns, also of empty ones; 2 to 4
            columns (users, items[, ratings[, weights]]); or a frame, as of from_frame.

    Raises:
        ValueError: it is none of these, or broken.
    """
    if isinstance(ratings, Interactions):
        return ratings
    sparse = isinstance(ratings, torch.Tensor) and ratings.layout != torch.strided
    if (sparse or hasattr(ratings, "tocoo")) and len(ratings.shape) != 2:
        raise ValueError(
            f"interactions: ratings must be a matrix of users by items, got {tuple(ratings.shape)}"
        )
    if sparse:
        return _of_torch(ratings.detach().cpu())
    if hasattr(ratings, "tocoo"):
        matrix = ratings.tocoo()
        return _of_entries(matrix.row, matrix.col, matrix.data, matrix.shape)
    if isinstance(ratings, tuple | list) and 2 <= len(ratings) <= 4:
        return Interactions.from_arrays(*ratings)
    if hasattr(ratings, "collect"):
        raise ValueError(f"interactions: ratings must be collected, got a {type(ratings).__name__}")
    if isinstance(ratings, dict) or hasattr(ratings, "columns"):
        return from_frame(ratings)
    rule = "Interactions, a sparse matrix, 2 to 4 columns or a data frame"
    raise ValueError(f"interactions: ratings must be {rule}, got {type(ratings).__name__}")


def _of_torch(matrix: torch.Tensor) -> Interactions:
    if matrix.layout in _COMPRESSED:
        by_row = matrix.layout == torch.sparse_csr
        begins = matrix.crow_indices() if by_row else matrix.ccol_indices()
        long = torch.repeat_interleave(torch.arange(len(begins) - 1), begins.diff())
        users, items = (long, matrix.col_indices()) if by_row else (matrix.row_indices(), long)
    else:
        matrix = matrix.coalesce()  # entries of one place are one rating to torch
        users, items = matrix.indices()
    return _of_entries(users.numpy(), items.numpy(), matrix.values().numpy(), tuple(matrix.shape))


def _of_entries(
    users: np.ndarray, items: np.ndarray, values: np.ndarray, shape: tuple[int, ...]
) -> Interactions:
    checked = Interactions.from_arrays(users, items, values)
    places = (torch.from_numpy(np.asarray(ids, np.int64)) for ids in (users, items))
    return replace(
        checked, **dict(zip(("users", "items"), places, strict=True)),
        user_ids=Ids(range(shape[0])), item_ids=Ids(range(shape[1])),
    )  # fmt: skip
