"""Checks of what embedding takes beside a table: tokens, positions, token types and a norm."""

import torch
from torch import Tensor

from lspm_kernels import checks

_INTEGERS = (torch.int32, torch.int64)


def lookups(
    op: str,
    tokens: Tensor,
    weight: Tensor,
    position_weight: Tensor | None,
    positions: Tensor | int,
    token_type_weight: Tensor | None,
    token_types: Tensor | None,
) -> tuple[Tensor | None, int, Tensor | None]:
    """Checks all but what ids hold, which the kernels check before they write.

    Returns:
        positions and token_types of each token, None where there are none; where the first token stands.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() == 0 or tokens.dtype not in _INTEGERS:
        rule = "an int32 or int64 tensor of one dimension or more"
        raise ValueError(f"{op}: tokens must be {rule}, got {checks.kind(tokens)}")
    places, first = (positions, 0) if isinstance(positions, Tensor) else (None, positions)
    if position_weight is not None:
        _table(op, "position_weight", position_weight, weight)
        if places is None:
            _first(op, first, tokens.shape[-1], position_weight.shape[0])
        else:
            places = _ids(op, "positions", places, tokens)
    elif places is not None or first != 0:
        raise ValueError(f"{op}: position_weight must be there beside positions, got None")
    if (token_types is None) != (token_type_weight is None):
        lacking, other = ("token_types", "token_type_weight")[:: 1 if token_types is None else -1]
        raise ValueError(f"{op}: {lacking} must be there beside {other}, got None")
    if token_types is not None:
        _table(op, "token_type_weight", token_type_weight, weight)
        token_types = _ids(op, "token_types", token_types, tokens)
    checks.beside(
        op, "weight", weight.device, tokens=tokens, position_weight=position_weight, positions=places,
        token_type_weight=token_type_weight, token_types=token_types,
    )  # fmt: skip
    return places, first, token_types


def _table(op, name, t, weight):
    if not isinstance(t, Tensor) or t.dim() != 2 or t.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: {name} must be a tensor (N, {weight.shape[1]}), got {checks.shape(t)}")
    if t.dtype != weight.dtype:
        raise ValueError(f"{op}: {name} must have weight's dtype {weight.dtype}, got {t.dtype}")


def _ids(op, name, ids, tokens):
    if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS:
        raise ValueError(f"{op}: {name} must be an int32 or int64 tensor, got {checks.kind(ids)}")
    if not checks.broadcasts(ids, tokens.shape):
        rule = f"broadcast to tokens' shape {tuple(tokens.shape)}"
        raise ValueError(f"{op}: {name} must {rule}, got {tuple(ids.shape)}")
    return ids.to(tokens.dtype).expand(tokens.shape)


def _first(op, first, length, rows):
    if not isinstance(first, int | torch.SymInt) or first < 0 or first + length > rows:
        rule = f"be ids, or where {length} tokens begin among {rows} positions"
        raise ValueError(f"{op}: positions must {rule}, got {first!r}")


def norm(op: str, weight: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    """Raises ValueError unless a layer norm of weight's columns can take these."""
    cols, device = weight.shape[1], weight.device
    if norm_weight is not None:
        checks.parameter(op, "norm_weight", norm_weight, cols, device, (weight.dtype, torch.float32))
        if norm_bias is not None:  # the kernels read both as one type
            checks.parameter(op, "norm_bias", norm_bias, cols, device, (norm_weight.dtype,))
    elif norm_bias is not None:
        raise ValueError(f"{op}: norm_weight must be there beside norm_bias, got None")
