"""Ratings in the order in which stochastic gradient descent goes through them."""

import dataclasses
import heapq
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lspm_kernels import checks, compiled

# Parts of a side. The fewer, the more ratings a row has in a block, which find it in a cache: with 64 factors
# 8 parts are twice as fast as 64, at MovieLens-20M's size. But no more threads than parts can work.
_PARTS = 8
# Rows side by side go to one part, where there are many: their biases are one cache line, which two threads
# would else take from each other at every rating, and their factors lie in fewer pages.
_SIDE_BY_SIDE, _LEAST_GROUPS = 16, 16
# Of few items in a part, bpr_ would find none that the user has not seen: of one, it would learn nothing.
_LEAST_TO_DRAW_FROM = 16


@dataclass(frozen=True)
class RatingBlocks:
    """Ratings sorted into the blocks of a Latin square, as rating_blocks() makes them.

    Block s * grid + i has ratings of users of part i and items of part (i + s) % grid: the blocks of one s
    have no row in common. mf_sgd_ gives, on any number of threads, what one thread gives that takes the
    ratings in the order in which they lie here.

    Attributes:
        users, items: (n,) int32.
        ratings: (n,) float32.
        weight: (n,) float32, or None.
        offsets: (grid ** 2 + 1,) int64: where the blocks begin.
        part_items, part_offsets: the items by parts, int32, and where the parts begin, (grid + 1,) int64.
        num_users, num_items: how many rows the tables must have at least.
    """

    users: Tensor
    items: Tensor
    ratings: Tensor
    weight: Tensor | None
    offsets: Tensor
    part_items: Tensor
    part_offsets: Tensor
    num_users: int
    num_items: int

    def __len__(self) -> int:
        return self.ratings.numel()

    def to(self, device: torch.device | str) -> "RatingBlocks":
        """The same on another device."""
        return self._each(lambda t: t.to(device))

    def copy(self) -> "RatingBlocks":
        """The same in memory of its own, as of ratings that lie in files."""
        return self._each(torch.clone)

    def check_rows(self, op: str, users: int, items: int) -> None:
        """Raises ValueError unless tables of so many rows have all that the ratings are of."""
        for name, needed, size in (("user", self.num_users, users), ("item", self.num_items, items)):
            if needed > size:
                rule = f"have the {needed} rows that the RatingBlocks are of"
                raise ValueError(f"{op}: {name}_factors must {rule}, got {size}")

    def _each(self, function: Callable[[Tensor], Tensor]) -> "RatingBlocks":
        tensors = {name: function(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return dataclasses.replace(self, **tensors)


def rating_blocks(
    users: Tensor,
    items: Tensor,
    ratings: Tensor,
    weight: Tensor | None = None,
    *,
    num_users: int | None = None,
    num_items: int | None = None,
    grid: int | None = None,
    seed: int | None = None,
    out: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
) -> RatingBlocks:
    """Sorts ratings for mf_sgd_, which then need not sort them at every pass.

    Users and items are dealt to parts by how many ratings they have, so that blocks are about as large.
    Within a block, ratings are sorted by user and then dealt like cards from eight hands, so that a user's
    row stays near while no rating waits for the one before it. Pairs that come twice are kept: they are two
    ratings.

    Args:
        users, items: (n,) int32 or int64 on the CPU: ids from 0 on.
        ratings: (n,) float32: finite.
        weight: (n,) float32, at least 0, or None for 1 each.
        num_users, num_items: rows of the tables; None: the largest id and 1.
        grid: parts of either side, from 1 to 256; as many threads can work at once. None: 8, the fastest on
            up to 8 threads, as fewer parts keep rows in the caches. On a GPU, 64 or more fill it.
        seed: of other parts, by which users and items are dealt as evenly; None: the most even ones.
        out: users, items, ratings and weight (or None) to write to, as memory-mapped files are.

    Returns:
        The blocks. Their order depends on the arguments alone.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, an id is outside its table, or a rating
            or weight is not finite.
    """
    return sort_ratings("rating_blocks", users, items, ratings, weight, num_users, num_items, grid, seed, out)


def sort_ratings(op, users, items, ratings, weight, num_users, num_items, grid, seed=None, out=None):
    """rating_blocks, as part of the op that messages name."""
    sizes = _check(op, users, items, ratings, weight, num_users, num_items)
    grid = _PARTS if grid is None else grid
    if not isinstance(grid, int) or not 1 <= grid <= 256:
        raise ValueError(f"{op}: grid must be an integer from 1 to 256, got {grid!r}")
    if seed is not None:
        checks.integer(op, "seed", seed, 0)
    users, items, ratings = users.to(torch.int32), items.to(torch.int32), ratings.contiguous()
    given = users.contiguous(), items.contiguous(), ratings, None if weight is None else weight.contiguous()
    out = (
        tuple(None if t is None else torch.empty_like(t) for t in given)
        if out is None
        else _check_out(op, out, given)
    )
    generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    parts = [_parts(t, size, grid, generator) for t, size in zip(given, sizes, strict=False)]
    # Whatever torch's default device is.
    offsets = torch.empty(grid * grid + 1, dtype=torch.int64, device="cpu")
    compiled.cpu.mf_sgd_blocks(*given, *parts, *out, offsets, torch.get_num_threads())
    part_items = parts[1].argsort(stable=True).to(torch.int32)
    part_offsets = torch.zeros(grid + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(torch.bincount(parts[1], minlength=grid), 0, out=part_offsets[1:])
    return RatingBlocks(*out, offsets, part_items, part_offsets, *sizes)


def parts_on_gpu(users: int, items: int) -> int:
    """Parts of either side for a GPU, whose blocks all work at once: from 8 for small tables to 64."""
    return min(max((users + items) // 2048, _PARTS), 64)


def parts_to_draw_from(items: int, most: int = _PARTS) -> int:
    """Parts of either side for bpr_, which draws from one: at most so many, of 16 items or more if it can."""
    return max(1, min(most, items // _LEAST_TO_DRAW_FROM))


def _parts(ids: Tensor, size: int, grid: int, generator: torch.Generator | None) -> Tensor:
    """The part of each row: those with the most ratings first, each to the part with the fewest so far.

    Rows without ratings count as a little, so that they too are spread. A generator mixes rows that have
    about as many. Of many rows, those side by side go together.
    """
    together = _SIDE_BY_SIDE if size >= _SIDE_BY_SIDE * _LEAST_GROUPS * grid else 1
    groups = -(-size // together)
    counts = torch.bincount(ids, minlength=groups * together).view(groups, together).sum(1)
    rank = counts
    if generator is not None:
        rank = (counts + 1) * (
            0.5 + 0.5 * torch.rand(groups, generator=generator, dtype=torch.float32, device="cpu")
        )
    order = rank.argsort(descending=True, stable=True)
    loads = [(0.0, part) for part in range(grid)]
    chosen = []
    for count in counts[order].tolist():
        load, part = loads[0]
        chosen.append(part)
        heapq.heapreplace(loads, (load + count + 0.125 * together, part))
    parts = torch.empty(groups, dtype=torch.uint8, device="cpu")
    parts[order] = torch.tensor(chosen, dtype=torch.uint8, device="cpu")
    return parts.repeat_interleave(together)[:size].contiguous()


def _check(op, users, items, ratings, weight, num_users, num_items):
    """Checks the ratings; gives how many rows the two tables have."""
    values = {"ratings": ratings} if weight is None else {"ratings": ratings, "weight": weight}
    for name, t in values.items():
        _check_vector(op, name, t, ratings, (torch.float32,))
        if t.numel() and not all(torch.isfinite(bound) for bound in t.aminmax()):
            raise ValueError(f"{op}: {name} must be finite, got {_first(t, ~torch.isfinite(t))}")
    if weight is not None and weight.numel() and weight.min() < 0:
        raise ValueError(f"{op}: weight must be at least 0, got {_first(weight, weight < 0)}")
    for name, t in (("users", users), ("items", items)):
        _check_vector(op, name, t, ratings, (torch.int32, torch.int64))
    return _size(op, "users", users, num_users), _size(op, "items", items, num_items)


def _check_vector(op, name, t, ratings, dtypes):
    if not isinstance(t, Tensor) or t.dim() != 1 or t.dtype not in dtypes or t.device.type != "cpu":
        got = f"{tuple(t.shape)} {t.dtype} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} must be a vector of {kinds} on the CPU, got {got}")
    if t.numel() != ratings.numel():
        raise ValueError(f"{op}: {name} must have {ratings.numel()} elements, got {t.numel()}")


def _size(op, name, ids, size):
    if size is not None:
        checks.integer(op, f"num_{name}", size, 0)
    low, high = (int(v) for v in ids.aminmax()) if ids.numel() else (0, -1)
    limit = 2**31 - 1 if size is None else size
    if low < 0 or high >= limit:
        got = low if low < 0 else high
        raise ValueError(f"{op}: {name} must be from 0 to {limit - 1}, got {got}")
    return high + 1 if size is None else size


def _check_out(op, out, given):
    if not isinstance(out, tuple | list) or len(out) != len(given):
        rule = "be tensors for users, items, ratings and weight"
        raise ValueError(f"{op}: out must {rule}, got {type(out).__name__}")
    for t, like in zip(out, given, strict=True):
        if (t is None) != (like is None) or (
            t is not None and (t.shape != like.shape or t.dtype != like.dtype or not t.is_contiguous())
        ):
            got = "None" if t is None else f"{tuple(t.shape)} {t.dtype}"
            rule = "be contiguous, int32 and float32 as users and items, ratings and weight are, and as long"
            raise ValueError(f"{op}: out must {rule}, got {got}")
    return out


def _first(t, where):
    return t[where][0].item()
