"""flash_attn.bert_padding: from padded batches to packed sequences, as flash_attn_varlen_func takes them."""

import torch
from torch import Tensor

from lspm_kernels import checks


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices]: rows (Z, ...) of input (N, ...)."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros (first_axis_dim, ...) with values (Z, ...) at rows indices."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of a padded batch that count, one sequence behind the other.

    Args:
        hidden_states: (B, T, ...).
        attention_mask: (B, T), bool or integers: 1 where a row counts.
        unused_mask: the same, of rows that are kept besides, or None.

    Returns:
        rows (Z, ...); their places among B T; cu_seqlens (B + 1,), int32; the longest sequence; the number of
        rows that attention_mask has of each sequence (B,), int32.

    Raises:
        ValueError: a mask is not (B, T).
    """
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is None and name == "unused_mask":
            continue
        if not isinstance(mask, Tensor) or mask.shape != hidden_states.shape[:2]:
            rule = f"a tensor of shape {tuple(hidden_states.shape[:2])}"
            raise ValueError(f"unpad_input: {name} must be {rule}, got {checks.shape(mask)}")
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, int(lengths.max()), attention_mask.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The batch (B, T, ...) that unpad_input's rows (Z, ...) and places came from, with zeros elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
