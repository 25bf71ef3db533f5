"""Bayesian personalised ranking: matrix factorisation of what users chose, in place."""

import math

import torch
from torch import Tensor

from lspm_kernels import checks, checks_of_memory, compiled, dispatch, triton
from lspm_kernels.dispatch import Backend, Limit
from lspm_kernels.operator import InPlaceOperator
from lspm_kernels.rating_blocks import RatingBlocks, parts_on_gpu, parts_to_draw_from, sort_ratings
from lspm_kernels.reference import bpr as reference

_IN_REGISTERS = Limit("at most 512 factors", lambda p: p.shape[1] <= 512, lambda p: p.shape[1])

# On a GPU cuda comes first, as it fetches rows ahead: predicted, not measured.
BACKENDS = tuple(
    Backend(name, device, (torch.float32,), kernel("bpr_update"), None, missing, limits)
    for name, device, kernel, missing, limits in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing, ()),
        ("cuda", "cuda", compiled.cuda_kernel, compiled.cuda_missing, (_IN_REGISTERS,)),
        ("triton", "cuda", triton.kernel, triton.missing, ()),
    )
)


def _update(row, *args):
    row.forward(*args)


_bpr = InPlaceOperator(
    "bpr(Tensor(a!) user_factors, Tensor(b!) item_factors, Tensor(c!)? item_bias, Tensor users, Tensor items,"
    " Tensor offsets, Tensor part_items, Tensor part_offsets, Tensor? seen_indptr, Tensor? seen,"
    " Tensor(d!) loss, Tensor(e!) skipped, float[] step, int seed) -> ()",
    BACKENDS,
    _update,
)


def bpr_(
    user_factors: Tensor,
    item_factors: Tensor,
    item_bias: Tensor | None,
    users: Tensor | RatingBlocks,
    items: Tensor | None = None,
    *,
    seen: tuple[Tensor, Tensor] | None = None,
    lr: float,
    reg: float | tuple[float, float, float] = 0.0,
    seed: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One pass of Bayesian personalised ranking, in place. For each pair of a user u and an item i, an item j
    is drawn that the user has not seen, and with x = b_i - b_j + <p_u, q_i - q_j> and g = sigmoid(-x)

    p_u += lr * (g * (q_i - q_j) - reg * p_u), q_i += lr * (g * p_u - reg * q_i),
    q_j += lr * (-g * p_u - reg * q_j), b_i += lr * (g - reg * b_i), b_j += lr * (-g - reg * b_j),

    all from the values before. As mf_sgd_ it goes through the blocks of a Latin square, with the same bits on
    any number of threads. Item j is drawn from those of i's part of the square alone: give other blocks at
    times, by rating_blocks(seed=...), so that every item meets every other, and of few items fewer parts: of
    pairs without blocks, a part has 16 items or more if there are as many.

    Args:
        user_factors, item_factors: (U, K) and (I, K) float32, contiguous.
        item_bias: (I,) float32, or None.
        users: (n,) ids of rows, int32 or int64, with `items` (n,); or RatingBlocks, whose ratings and weight
            say nothing here.
        seen: (U + 1,) int64 and (m,) int32: the items of user u, ascending, from seen[0][u] to seen[0][u + 1]
            in seen[1]; they are never j. None: only i is not. After eight draws a pair is skipped.
        lr: the learning rate.
        reg: L2, or that of user factors, item factors and item biases.
        seed: of what is drawn; another one for each pass.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        The sum over pairs of log(1 + exp(-x)), before each update, a float32, and how many were skipped, an
        int64; both on the CPU.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, an id is outside its table, or a
            table requires a gradient.
        NotImplementedError: the backend asked for does not take this call.

    Source: Rendle et al., "BPR: Bayesian personalized ranking from implicit feedback" (2009).
    """
    for name, t, dims in (("user_factors", user_factors, 2), ("item_factors", item_factors, 2)):
        _check_table(name, t, user_factors, dims)
    if user_factors.shape[1] != item_factors.shape[1] or not user_factors.shape[1]:
        got = f"{user_factors.shape[1]} and {item_factors.shape[1]}"
        raise ValueError(
            f"bpr_: user_factors and item_factors must have as many columns, 1 or more, got {got}"
        )
    sizes = user_factors.shape[0], item_factors.shape[0]
    if item_bias is not None:
        _check_table("item_bias", item_bias, user_factors, 1)
        if item_bias.shape[0] != sizes[1]:
            raise ValueError(f"bpr_: item_bias must have {sizes[1]} elements, got {item_bias.shape[0]}")
    tables = {"user_factors": user_factors, "item_factors": item_factors, "item_bias": item_bias}
    checks_of_memory.apart("bpr_", tables)
    regs = list(reg) if isinstance(reg, tuple | list) else [reg] * 3
    if len(regs) != 3:
        raise ValueError(f"bpr_: reg must be a number or 3 numbers, got {reg!r}")
    for name, value in (("lr", lr), *(("reg", value) for value in regs)):
        checks.number("bpr_", name, value, 0, math.inf)
    if not lr:
        raise ValueError(f"bpr_: lr must be positive, got {lr!r}")
    checks.integer("bpr_", "seed", seed, 0)
    blocks = _blocks(users, items, sizes)
    indptr, indices = (None, None) if seen is None else _seen(seen, sizes[0])
    for name, t in (("users", blocks.users), ("seen[0]", indptr), ("seen[1]", indices)):
        if t is not None and t.device != user_factors.device:
            got = f"{user_factors.device}, got {t.device}"
            raise ValueError(f"bpr_: {name} must be on user_factors' device {got}")
    row = dispatch.pick("bpr", BACKENDS, backend, user_factors)
    tables = user_factors, item_factors, item_bias
    if row is None:
        with torch.no_grad():
            lists = _lists(blocks, indptr, indices, sizes[0])
            loss, skipped = reference.bpr(
                *tables, blocks.users, blocks.items, *lists, lr=lr, reg=regs, seed=seed
            )
        return loss.float(), torch.tensor(skipped)
    losses = torch.zeros(blocks.offsets.numel() - 1, dtype=torch.float32, device=user_factors.device)
    skips = torch.zeros_like(losses, dtype=torch.int32)
    of = blocks.users, blocks.items, blocks.offsets, blocks.part_items, blocks.part_offsets
    _bpr(row, *tables, *of, indptr, indices, losses, skips, [float(v) for v in (lr, *regs)], seed)
    return losses.to("cpu", torch.float64).sum().float(), skips.cpu().sum()


def _check_table(name, t, first, dims):
    if not isinstance(t, Tensor) or t.dim() != dims or not t.is_floating_point():
        rule = f"a tensor of {dims} dimensions" if dims == 2 else "a vector"
        raise ValueError(f"bpr_: {name} must be {rule}, got {checks.shape(t)}")
    if t.dtype != first.dtype or t.device != first.device:
        got = f"{t.dtype} on {t.device}"
        raise ValueError(
            f"bpr_: {name} must be {first.dtype} on {first.device} as user_factors is, got {got}"
        )
    if not t.is_contiguous():
        raise ValueError(f"bpr_: {name} must be contiguous, as it changes in place, got strides {t.stride()}")


def _blocks(users, items, sizes):
    if not isinstance(users, RatingBlocks):
        for name, t in (("users", users), ("items", items)):
            if not isinstance(t, Tensor):
                raise ValueError(f"bpr_: {name} must be a tensor, got {type(t).__name__}")
        pairs = users.cpu(), items.cpu(), torch.ones(users.numel(), dtype=torch.float32, device="cpu")
        grid = parts_to_draw_from(sizes[1], *([parts_on_gpu(*sizes)] if users.is_cuda else []))
        return sort_ratings("bpr_", *pairs, None, *sizes, grid).to(users.device)
    if items is not None:
        raise ValueError("bpr_: items must be None beside RatingBlocks, which hold them")
    users.check_rows("bpr_", *sizes)
    return users


def _seen(seen, users):
    if not isinstance(seen, tuple | list) or len(seen) != 2 or not all(isinstance(t, Tensor) for t in seen):
        raise ValueError(f"bpr_: seen must be two tensors, got {type(seen).__name__}")
    indptr, indices = seen
    if indptr.shape != (users + 1,) or indptr.dtype != torch.int64:
        got = f"{tuple(indptr.shape)} {indptr.dtype}"
        raise ValueError(f"bpr_: seen[0] must be ({users + 1},) torch.int64, got {got}")
    if indices.dim() != 1 or indices.dtype != torch.int32:
        got = f"{tuple(indices.shape)} {indices.dtype}"
        raise ValueError(f"bpr_: seen[1] must be a vector of torch.int32, got {got}")
    if indptr[0] != 0 or indptr[-1] != indices.numel() or (indptr.diff() < 0).any():
        rule = f"ascend from 0 to seen[1]'s {indices.numel()} elements"
        raise ValueError(f"bpr_: seen[0] must {rule}, got {indptr[0]} to {indptr[-1]}")
    if not checks.readable(indices):
        return indptr.contiguous(), indices.contiguous()
    falls = indices.diff() < 0
    begins = indptr[(indptr > 0) & (indptr < indices.numel())]
    falls[begins - 1] = False
    if falls.any():
        place = int(falls.nonzero()[0])
        got = f"{indices[place]} before {indices[place + 1]}"
        raise ValueError(f"bpr_: seen[1] must ascend among the items of a user, got {got}")
    return indptr.contiguous(), indices.contiguous()


def _lists(blocks, indptr, indices, users):
    """For each pair the items of its part, and for each user those seen: what the reference takes."""
    bounds = zip(blocks.part_offsets[:-1].tolist(), blocks.part_offsets[1:].tolist(), strict=True)
    parts = [blocks.part_items[a:b].tolist() for a, b in bounds]
    part_of = {item: part for part in parts for item in part}
    seen = [set() for _ in range(users)]
    if indptr is not None:
        bounds = zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)
        seen = [set(indices[a:b].tolist()) for a, b in bounds]
    return [part_of[i] for i in blocks.items.tolist()], seen
