"""Checks of what attention, packed or over a cache, is given; messages as in checks.py."""

import itertools
from numbers import Real

import torch
from torch import Tensor

from lspm_kernels import checks

_LARGEST = torch.finfo(torch.float32).max
_FAR = 2**62  # a side of a window that hides nothing; kernels add places to it in 64 bits


def head_sizes(op: str, given: dict[str, Tensor], max_dim: int, paged: bool = False) -> None:
    """Checks the sizes and devices of queries, keys and values; pages of a cache need not be q's batch."""
    for name, x in given.items():
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise ValueError(
                f"{op}: {name} must be a floating-point tensor (B, H, T, D), got {checks.kind(x)}"
            )
        if not 1 <= x.shape[-1] <= max_dim:
            raise ValueError(f"{op}: {name} must have a head dim of 1 to {max_dim}, got {x.shape[-1]}")
    (_, k_name, v_name), (q, k, v) = given.keys(), given.values()
    B, H, _, D = q.shape
    N, H_kv, T_k, _ = k.shape
    if N != B and not paged:
        raise ValueError(f"{op}: {k_name} must have q's batch size {B}, got {N}")
    if k.shape[-1] != D:
        raise ValueError(f"{op}: {k_name} must have q's head dim {D}, got {k.shape[-1]}")
    if (H_kv == 0 and H > 0) or (H_kv > 0 and H % H_kv):
        raise ValueError(f"{op}: {k_name} must have a number of heads that divides q's {H}, got {H_kv}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{op}: {v_name} must have {k_name}'s batch, heads and length {N, H_kv, T_k}, got"
            f" {tuple(v.shape[:-1])}"
        )
    checks.beside(op, "q", q.device, **{k_name: k, v_name: v})


def dtype_of(op: str, q: Tensor, given: dict[str, Tensor]) -> None:
    """Raises ValueError unless all have q's dtype."""
    for name, x in given.items():
        if x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must have q's dtype {q.dtype}, got {x.dtype}")


def without_gradient(op: str, given: dict[str, Tensor]) -> None:
    """Raises ValueError where a gradient is wanted that there is not."""
    for name, x in given.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} must be without a gradient, got requires_grad=True")


def scale(op: str, value: float | Tensor | None, dim: int) -> float:
    """Checks the scale of scores; gives it as a number, for None what heads of `dim` have."""
    if value is None:
        return dim**-0.5
    known = isinstance(value, Real | torch.SymFloat)
    if isinstance(value, Tensor) and value.numel() == 1:
        without_gradient(op, {"scale": value})
        known = True
    elif known and not isinstance(value, int | torch.SymFloat):
        value = float(value)  # a NumPy number may be too narrow for the comparison
    if not known or not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{op}: scale must be a finite number, got {value!r}")
    return float(value)


def heads(
    op: str, q: Tensor, k: Tensor, v: Tensor, max_dim: int, paged: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks queries, keys and values; gives them in autocast's dtype where that is on."""
    head_sizes(op, {"q": q, "k": k, "v": v}, max_dim, paged)
    if checks.autocasts(q.device):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype in (dtype, torch.float64) else x.to(dtype) for x in (q, k, v))
    dtype_of(op, q, {"k": k, "v": v})
    return q, k, v


def sides(
    op: str, causal: bool, window: tuple[int | None, int | None] | None
) -> tuple[int | None, int | None]:
    """Checks a window; gives its two sides, the right one 0 where causal."""
    if window is None:
        return None, 0 if causal else None
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"{op}: window must be a pair (left, right), got {window!r}")
    numbers = tuple(map(checks.whole, window))
    for side, number in zip(window, numbers, strict=True):
        if side is not None and (number is None or number < 0):
            raise ValueError(f"{op}: window must have sides that are None or at least 0, got {tuple(window)}")
    left, right = (None if side is None or side >= _FAR else side for side in numbers)
    return left, 0 if causal else right


def options(
    op: str, heads: tuple[int, int], device: torch.device, *, causal, window, alibi_slopes, sinks, softcap
) -> tuple[int | None, int | None, Tensor | None, Tensor | None]:
    """Checks what the three forms of attention of (B, H) heads share; gives left, right, slopes, sinks."""
    left, right = sides(op, causal, window)
    slopes = per_head(op, "alibi_slopes", alibi_slopes, device, (heads[1:], heads))
    if slopes is not None:
        without_gradient(op, {"alibi_slopes": slopes})
    sinks = per_head(op, "sinks", sinks, device, (heads[1:],))
    checks.number(op, "softcap", softcap, 0.0, float("inf"))
    return left, right, slopes, sinks


def scores(
    op: str, q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Checks what is added to scores (B, H, T_q, T_k); gives it with four dimensions."""
    sizes = (*q.shape[:3], k.shape[2])
    dtypes = (torch.float32, q.dtype)
    if mask is not None and isinstance(mask, Tensor) and mask.requires_grad:
        raise ValueError(f"{op}: mask must not require a gradient, as only a bias has one, got one that does")
    return _scores(op, "bias", bias, q, sizes, dtypes), _scores(
        op, "mask", mask, q, sizes, (torch.bool, *dtypes)
    )


def _scores(op, name, t, q, sizes, dtypes):
    if t is None:
        return None
    if not checks.broadcasts(t, sizes):
        raise ValueError(f"{op}: {name} must broadcast to (B, H, T_q, T_k) = {sizes}, got {checks.shape(t)}")
    if t.dtype not in dtypes:
        rule = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise ValueError(f"{op}: {name} must have dtype {rule}, got {t.dtype}")
    if t.device != q.device:
        raise ValueError(f"{op}: {name} must be on q's device {q.device}, got {t.device}")
    return t[(None,) * (4 - t.dim())]


def per_head(
    op: str, name: str, t: Tensor | None, device: torch.device, allowed: tuple[tuple[int, ...], ...]
) -> Tensor | None:
    """Raises ValueError unless t is None or has one of the shapes allowed and, on a CPU, no NaN."""
    if t is None:
        return None
    if not isinstance(t, Tensor) or tuple(t.shape) not in allowed:
        raise ValueError(
            f"{op}: {name} must have shape {' or '.join(map(str, allowed))}, got {checks.shape(t)}"
        )
    if not t.is_floating_point():
        raise ValueError(f"{op}: {name} must have a floating-point dtype, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{op}: {name} must be on q's device {device}, got {t.device}")
    if t.device.type == "cpu" and checks.readable(t) and t.isnan().any():
        raise ValueError(f"{op}: {name} must not be NaN, got {t.detach().tolist()}")
    return t


def starts(
    op: str,
    name: str,
    t: Tensor,
    longest_name: str,
    longest: int | None,
    rows: int | None,
    device: torch.device,
) -> tuple[Tensor, int, list[int] | None]:
    """Checks the cumulative lengths of sequences packed in `rows` rows (None: any): gives them, the longest
    and, where they can be read, all lengths."""
    t, ends = checks.integers(op, name, t, None, device)
    if t.numel() == 0:
        raise ValueError(f"{op}: {name} must have an element more than there are sequences, got none")
    if isinstance(longest, Tensor) and longest.numel() == 1 and checks.readable(longest):
        longest = longest.item()  # what lengths.max() gives
    if longest is not None and ((number := checks.whole(longest)) is None or number < 0):
        raise ValueError(f"{op}: {longest_name} must be an integer of at least 0, got {longest!r}")
    if ends is None:
        if longest is None:
            raise ValueError(f"{op}: {longest_name} must be given where {name} cannot be read, got None")
        return t, number, None
    lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    if ends[0] != 0:
        raise ValueError(f"{op}: {name} must begin with 0, got {ends[0]}")
    for b, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{op}: {name} must not decrease, got {ends[b]} before {ends[b + 1]}")
    if rows is not None and ends[-1] != rows:
        raise ValueError(f"{op}: {name} must end with the number of rows {rows}, got {ends[-1]}")
    found = max(lengths, default=0)
    if longest is not None and longest < found:
        raise ValueError(f"{op}: {longest_name} must be at least the longest sequence {found}, got {longest}")
    return t, found, lengths


def block_table(
    op: str, table: Tensor, sequences: int, device: torch.device
) -> tuple[Tensor, list[list[int]] | None]:
    """Checks a table of pages (B, P); gives it as int32 and, where it can be read, its rows."""
    if not isinstance(table, Tensor) or table.dim() != 2 or table.shape[0] != sequences:
        raise ValueError(f"{op}: block_table must have shape ({sequences}, P), got {checks.shape(table)}")
    flat, values = checks.integers(op, "block_table", table.reshape(-1), None, device)
    P = table.shape[1]
    rows = None if values is None else [values[b * P : b * P + P] for b in range(sequences)]
    return flat.view(sequences, P), rows


def pages(op: str, rows: list[list[int]] | None, lengths: list[int], k: Tensor) -> None:
    """Raises ValueError unless each row of a block table names pages of k (N, H, S, D) for that many keys."""
    N, S = k.shape[0], k.shape[2]
    for row, length in zip(rows or (), lengths, strict=rows is not None):
        if length > len(row) * S:
            raise ValueError(
                f"{op}: block_table must have room for {length} keys, got {len(row)} pages of {S}"
            )
        checks.within(op, "block_table", row[: -(-length // max(S, 1))], 0, N - 1)
