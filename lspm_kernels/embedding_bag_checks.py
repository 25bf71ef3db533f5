"""Checks of bags of indices, which embedding_bag and its updates share."""

import itertools

import torch
from torch import Tensor

from lspm_kernels import checks, checks_of_memory
from lspm_kernels.dispatch import Limit

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Of a GPU's grid. The limits of an op's rows take weight, how many indices and bags there are, and the rest.
GRID = Limit(
    "fewer than 2 ** 31 indices and bags",
    lambda weight, indices, bags, *rest: indices < 2**31 and bags < 2**31,
    lambda weight, indices, bags, *rest: max(indices, bags),
)
_MODES = ("sum", "mean")
_INTEGERS = (torch.int32, torch.int64)


def table(op: str, weight: Tensor) -> None:
    """Raises ValueError unless weight is a table of floating-point rows."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"{op}: weight must be a floating-point tensor (N, D), got {checks.kind(weight)}")


def bags(
    op: str,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    mode: str,
    padding_idx: int | None,
    include_last_offset: bool,
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], int, bool, int]:
    """Checks all but what indices and offsets hold, which the kernels check before they write.

    Returns:
        indices, offsets and per_sample_weights as the kernels take them, flat and contiguous; how many bags;
        whether the mode is mean; padding_idx, -1 for None.
    """
    if not isinstance(indices, Tensor) or indices.dim() not in (1, 2):
        raise ValueError(
            f"{op}: indices must be a tensor (B, L), or (n,) with offsets, got {checks.shape(indices)}"
        )
    if indices.dtype not in _INTEGERS:
        raise ValueError(f"{op}: indices must have dtype torch.int32 or torch.int64, got {indices.dtype}")
    if (offsets is None) != (indices.dim() == 2):
        got = "None" if offsets is None else checks.shape(offsets)
        rule = "be there beside indices of one dimension and None beside two"
        raise ValueError(f"{op}: offsets must {rule}, got {got}")
    count = indices.shape[0]
    if offsets is not None:
        offsets = _offsets(op, offsets, bool(include_last_offset))
        count = offsets.numel() - bool(include_last_offset)
        if offsets.dtype != indices.dtype:
            indices, offsets = indices.long(), offsets.long()
    checks.one_of(op, "mode", mode, _MODES)
    if per_sample_weights is not None:
        per_sample_weights = _weights(op, weight, indices, per_sample_weights, mode)
    given = {"indices": indices, "offsets": offsets, "per_sample_weights": per_sample_weights}
    for name, t in given.items():
        if t is not None and t.device != weight.device:
            raise ValueError(f"{op}: {name} must be on weight's device {weight.device}, got {t.device}")
    tensors = indices.reshape(-1).contiguous(), offsets, per_sample_weights
    return tensors, count, mode == "mean", padding(op, padding_idx, weight.shape[0])


def _offsets(op, offsets, least):
    if not isinstance(offsets, Tensor) or offsets.dim() != 1 or offsets.numel() < least:
        rule = "be a tensor of one dimension" + ", not empty with include_last_offset" * least
        raise ValueError(f"{op}: offsets must {rule}, got {checks.shape(offsets)}")
    if offsets.dtype not in _INTEGERS:
        raise ValueError(f"{op}: offsets must have dtype torch.int32 or torch.int64, got {offsets.dtype}")
    return offsets.contiguous()


def _weights(op, weight, indices, per_sample_weights, mode):
    if not isinstance(per_sample_weights, Tensor) or per_sample_weights.shape != indices.shape:
        rule = f"a tensor of indices' shape {tuple(indices.shape)}"
        raise ValueError(f"{op}: per_sample_weights must be {rule}, got {checks.shape(per_sample_weights)}")
    if mode != "sum":
        raise ValueError(f'{op}: mode must be "sum" beside per_sample_weights, got {mode!r}')
    if per_sample_weights.dtype != weight.dtype:
        rule = f"have weight's dtype {weight.dtype}"
        raise ValueError(f"{op}: per_sample_weights must {rule}, got {per_sample_weights.dtype}")
    return per_sample_weights.reshape(-1).contiguous()


def padding(op: str, padding_idx: int | None, rows: int) -> int:
    """padding_idx as the kernels take it, -1 for None; raises ValueError unless it is a row."""
    if padding_idx is None:
        return -1
    row = checks.whole(padding_idx)
    if row is None or not -rows <= row < rows:
        rule = f"be None or at least {-rows} and below {rows}"
        raise ValueError(f"{op}: padding_idx must {rule}, got {padding_idx!r}")
    return row % rows


def values(op: str, rows: int, indices: Tensor, offsets: Tensor | None, count: int) -> None:
    """Raises ValueError unless indices and offsets hold what they may, where that can be read here."""
    if not checks.readable(indices):
        return
    n = indices.numel()
    places = [] if offsets is None else offsets.tolist()
    if places and places[0] != 0:
        raise ValueError(f"{op}: offsets must begin at 0, got {places[0]}")
    if len(places) > count and places[-1] != n:
        raise ValueError(f"{op}: offsets must end at the number of indices {n}, got {places[-1]}")
    for before, place in itertools.pairwise(places):
        if place < before:
            raise ValueError(f"{op}: offsets must not decrease, got {place}")
        if place > n:
            raise ValueError(f"{op}: offsets must not exceed the number of indices {n}, got {place}")
    if count == 0 and n:
        raise ValueError(f"{op}: indices must be none where there is no bag, got {n}")
    unknown = indices[(indices < 0) | (indices >= rows)]
    if unknown.numel():
        raise ValueError(f"{op}: indices must be at least 0 and below {rows}, got {unknown[0].item()}")


def step(
    op: str,
    weight: Tensor,
    states: dict[str, Tensor],
    dout: Tensor,
    count: int,
    lr: float,
    eps: float,
    betas: tuple[float, float],
    weight_decay: float,
    number: int,
) -> None:
    """Raises ValueError unless an optimizer can take step `number` with the gradient dout of `count` bags."""
    rule = "not require a gradient while gradients are recorded: call it under torch.no_grad()"
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: weight must {rule}")
    if not weight.is_contiguous():
        raise ValueError(f"{op}: weight must be contiguous, got strides {weight.stride()}")
    if not isinstance(dout, Tensor) or dout.shape != (count, weight.shape[1]):
        sizes = (count, weight.shape[1])
        raise ValueError(f"{op}: dout must be a tensor of shape {sizes}, got {checks.shape(dout)}")
    if dout.dtype != weight.dtype:
        raise ValueError(f"{op}: dout must have weight's dtype {weight.dtype}, got {dout.dtype}")
    for name, state in states.items():
        _state(op, name, state, weight, rule)
    for name, t in {"dout": dout, **states}.items():
        if t.device != weight.device:
            raise ValueError(f"{op}: {name} must be on weight's device {weight.device}, got {t.device}")
    checks_of_memory.apart(op, {"weight": weight, **states, "dout": dout})
    for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        checks.number(op, name, value, 0, float("inf"))
    checks.betas(op, betas)
    checks.integer(op, "step", number, 1)


def _state(op, name, state, weight, rule):
    sizes = tuple(weight.shape[:1] if name == "state_sum" else weight.shape)
    wide = torch.promote_types(weight.dtype, torch.float32)
    if not isinstance(state, Tensor) or state.shape != sizes:
        raise ValueError(f"{op}: {name} must be a tensor of shape {sizes}, got {checks.shape(state)}")
    if state.dtype != wide:
        raise ValueError(f"{op}: {name} must have dtype {wide}, got {state.dtype}")
    if not state.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {state.stride()}")
    if state.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} must {rule}")
