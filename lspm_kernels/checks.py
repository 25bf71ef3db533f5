"""Checks of arguments that several ops make: a message names the op, the argument, the rule and the value."""

import itertools

import torch
from torch import Tensor
from torch.nn import Parameter


def shape(t: object) -> tuple[int, ...] | str:
    """What a message shows of an argument that should have been a tensor of another shape."""
    return tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__


def broadcasts(t: object, sizes: tuple[int, ...]) -> bool:
    """Whether t is a tensor that broadcasts to sizes."""
    return (
        isinstance(t, Tensor)
        and t.dim() <= len(sizes)
        and all(n in (1, size) for n, size in zip(reversed(t.shape), reversed(sizes), strict=False))
    )


def parameter(
    op: str, name: str, t: Tensor, cols: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raises ValueError unless t holds `cols` values on x's device, in one of dtypes."""
    if not isinstance(t, Tensor) or t.dim() != 1 or t.numel() != cols:
        raise ValueError(f"{op}: {name} must be a tensor of shape ({cols},), got {shape(t)}")
    if t.dtype not in dtypes:
        rule = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise ValueError(f"{op}: {name} must have dtype {rule}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{op}: {name} must be on x's device {device}, got {t.device}")


def like(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """Raises ValueError unless t has x's shape and device."""
    if not isinstance(t, Tensor) or t.shape != x.shape:
        raise ValueError(f"{op}: {name} must be a tensor of x's shape {tuple(x.shape)}, got {shape(t)}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {t.device}")


def heads(op: str, q: Tensor, k: Tensor, v: Tensor, max_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Checks queries, keys and values; gives them in autocast's dtype where that is on."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
            got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{op}: {name} must be a floating-point tensor (B, H, T, D), got {got}")
        if not 1 <= x.shape[-1] <= max_dim:
            raise ValueError(f"{op}: {name} must have a head dim of 1 to {max_dim}, got {x.shape[-1]}")
    B, H, _, D = q.shape
    _, H_kv, T_k, _ = k.shape
    if k.shape[0] != B:
        raise ValueError(f"{op}: k must have q's batch size {B}, got {k.shape[0]}")
    if k.shape[-1] != D:
        raise ValueError(f"{op}: k must have q's head dim {D}, got {k.shape[-1]}")
    if (H_kv == 0 and H > 0) or (H_kv > 0 and H % H_kv):
        raise ValueError(f"{op}: k must have a number of heads that divides q's {H}, got {H_kv}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{op}: v must have k's batch, heads and length {B, H_kv, T_k}, got {tuple(v.shape[:-1])}"
        )
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise ValueError(f"{op}: {name} must be on q's device {q.device}, got {x.device}")
    if q.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype in (dtype, torch.float64) else x.to(dtype) for x in (q, k, v))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must have q's dtype {q.dtype}, got {x.dtype}")
    return q, k, v


def window(
    op: str, causal: bool, sides: tuple[int | None, int | None] | None
) -> tuple[int | None, int | None]:
    """Checks a window; gives its two sides, the right one 0 where causal."""
    if sides is None:
        return None, 0 if causal else None
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        raise ValueError(f"{op}: window must be a pair (left, right), got {sides!r}")
    for side in sides:
        if side is not None and (not isinstance(side, int) or side < 0):
            raise ValueError(f"{op}: window must have sides that are None or at least 0, got {tuple(sides)}")
    return sides[0], 0 if causal else sides[1]


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
    if not broadcasts(t, sizes):
        raise ValueError(f"{op}: {name} must broadcast to (B, H, T_q, T_k) = {sizes}, got {shape(t)}")
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
        raise ValueError(f"{op}: {name} must have shape {' or '.join(map(str, allowed))}, got {shape(t)}")
    if not t.is_floating_point():
        raise ValueError(f"{op}: {name} must have a floating-point dtype, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{op}: {name} must be on q's device {device}, got {t.device}")
    if t.device.type == "cpu" and readable(t) and t.isnan().any():
        raise ValueError(f"{op}: {name} must not be NaN, got {t.detach().tolist()}")
    return t


def readable(t: Tensor) -> bool:
    """Whether the values of t can be read here: not while something traces, transforms or captures."""
    if torch.compiler.is_compiling() or type(t) not in (Tensor, Parameter) or t.is_meta:
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def integers(
    op: str, name: str, t: Tensor, size: int | None, device: torch.device
) -> tuple[Tensor, list[int] | None]:
    """Checks a vector of int32 or int64; gives it as int32, contiguous, and what it holds where readable."""
    if not isinstance(t, Tensor) or t.dim() != 1 or (size is not None and t.numel() != size):
        rule = "a tensor of one dimension" if size is None else f"a tensor of shape ({size},)"
        raise ValueError(f"{op}: {name} must be {rule}, got {shape(t)}")
    if t.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {name} must have dtype torch.int32 or torch.int64, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{op}: {name} must be on q's device {device}, got {t.device}")
    values = t.tolist() if readable(t) else None
    return t.to(torch.int32).contiguous(), values


def starts(
    op: str, name: str, t: Tensor, longest_name: str, longest: int | None, x: Tensor
) -> tuple[Tensor, int]:
    """Checks the cumulative lengths of sequences packed in x (1, H, rows, D); gives them and the longest."""
    t, ends = integers(op, name, t, None, x.device)
    rows = x.shape[2]
    if t.numel() == 0:
        raise ValueError(f"{op}: {name} must have an element more than there are sequences, got none")
    if longest is not None and (not isinstance(longest, int | torch.SymInt) or longest < 0):
        raise ValueError(f"{op}: {longest_name} must be an integer of at least 0, got {longest!r}")
    if ends is None:
        if longest is None:
            raise ValueError(f"{op}: {longest_name} must be given where {name} cannot be read, got None")
        return t, longest
    lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    if ends[0] != 0:
        raise ValueError(f"{op}: {name} must begin with 0, got {ends[0]}")
    for b, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{op}: {name} must not decrease, got {ends[b]} before {ends[b + 1]}")
    if ends[-1] != rows:
        raise ValueError(f"{op}: {name} must end with the number of rows {rows}, got {ends[-1]}")
    found = max(lengths, default=0)
    if longest is not None and longest < found:
        raise ValueError(f"{op}: {longest_name} must be at least the longest sequence {found}, got {longest}")
    return t, found


def number(op: str, name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError unless low <= value < high."""
    if not isinstance(value, int | float) or not low <= value < high:
        rule = (
            f"be at least {low:g} and below {high:g}"
            if high < float("inf")
            else f"be finite and at least {low:g}"
        )
        raise ValueError(f"{op}: {name} must {rule}, got {value!r}")


def seed(op: str, value: int | None) -> int:
    """A seed as kernels take it, an int64; one of torch's default generator where value is None."""
    if value is None:
        if torch.compiler.is_compiling():
            raise ValueError(f"{op}: seed must be given where torch.compile traces a dropout, got None")
        return int(torch.randint(2**63 - 1, ()))
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{op}: seed must be an integer from 0 to 2 ** 63 - 1, got {value!r}")
    return value
