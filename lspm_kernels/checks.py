"""Checks of arguments that several ops make: a message names the op, the argument, the rule and the value."""

import numbers
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from lspm_kernels import compiled

_PLAIN = (Tensor, Parameter)


def shape(t: object) -> tuple[int, ...] | str:
    """What a message shows of an argument that should have been a tensor of another shape."""
    return tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__


def kind(t: object) -> str:
    """What a message shows of an argument that should have been a tensor of another kind."""
    return f"{tuple(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__


def floating(op: str, name: str, t: Tensor) -> None:
    """Raises ValueError unless t is of floating-point numbers, in one dimension or more."""
    if not isinstance(t, Tensor) or t.dim() == 0 or not t.is_floating_point():
        rule = "a floating-point tensor of one dimension or more"
        raise ValueError(f"{op}: {name} must be {rule}, got {kind(t)}")


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


def matrix(op: str, name: str, t: Tensor) -> None:
    """Raises ValueError unless t is a matrix of floating-point numbers."""
    if not isinstance(t, Tensor) or t.dim() != 2 or not t.is_floating_point():
        raise ValueError(f"{op}: {name} must be a floating-point tensor of two dimensions, got {kind(t)}")


def vector(op: str, name: str, t: Tensor, size: int | None, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises ValueError unless t is a vector of `size` elements, or of any number, in one of dtypes."""
    if not isinstance(t, Tensor) or t.dim() != 1 or (size is not None and len(t) != size):
        rule = "a tensor of one dimension" if size is None else f"a tensor of shape ({size},)"
        raise ValueError(f"{op}: {name} must be {rule}, got {shape(t)}")
    if t.dtype not in dtypes:
        rule = " or ".join(dict.fromkeys(map(str, dtypes)))
        raise ValueError(f"{op}: {name} must have dtype {rule}, got {t.dtype}")


def beside(op: str, first: str, device: torch.device, **others: Tensor | None) -> None:
    """Raises ValueError unless all others are on the device of `first`."""
    whose = f"{first}'" if first.endswith("s") else f"{first}'s"
    for name, t in others.items():
        if t is not None and t.device != device:
            raise ValueError(f"{op}: {name} must be on {whose} device {device}, got {t.device}")


def rows_of(op: str, name: str, ids: Tensor, count: int) -> None:
    """Raises ValueError unless all ids are from 0 to count - 1, where they can be read here."""
    unknown = ids[(ids < 0) | (ids >= count)] if readable(ids) else ids[:0]
    if unknown.numel():
        got = unknown.flatten()[0].item()
        raise ValueError(f"{op}: {name} must be from 0 to {count - 1}, got {got}")


def classes(op: str, target: Tensor, count: int, ignore_index: int) -> None:
    """Raises ValueError unless all are from 0 to count - 1 or ignored, where they can be read here."""
    if not readable(target):
        return
    unknown = target[(target != ignore_index) & ((target < 0) | (target >= count))]
    if unknown.numel():
        got = unknown.flatten()[0].item()
        raise ValueError(f"{op}: target must be from 0 to {count - 1} or {ignore_index}, got {got}")


def like(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """Raises ValueError unless t has x's shape and device."""
    if not isinstance(t, Tensor) or t.shape != x.shape:
        raise ValueError(f"{op}: {name} must be a tensor of x's shape {tuple(x.shape)}, got {shape(t)}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {t.device}")


def residual(op: str, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Checks what is added to x; gives x and t in the dtype that torch promotes them to."""
    like(op, "residual", t, x)
    if t.dtype == x.dtype:
        return x, t
    if not t.is_floating_point():
        raise ValueError(f"{op}: residual must be a floating-point tensor, got {kind(t)}")
    dtype = torch.promote_types(x.dtype, t.dtype)
    return x.to(dtype), t.to(dtype)


def rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension: itself wherever it can be."""
    if x.stride(-1) == 1 or x.size(-1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves an empty tensor as it is


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are but their data, and nothing traces or transforms what is done with them."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return all(t is None or (type(t) in _PLAIN and not (t.is_meta or t.is_neg())) for t in tensors)


def pixels(t: Tensor) -> Tensor:
    """t (N, C, H, W) as contiguous (N, H, W, C): its own memory wherever that is channels_last."""
    return t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def readable(t: Tensor) -> bool:
    """Whether the values of t can be read here: not where calls are traced, transformed or recorded."""
    if not plain(t) or compiled.recorded.get() is not None:
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


def within(op: str, name: str, values: list[int] | None, low: int, high: int) -> None:
    """Raises ValueError unless all values are from low to high."""
    for value in values or []:
        if not low <= value <= high:
            raise ValueError(f"{op}: {name} must be from {low} to {high}, got {value}")


def number(op: str, name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError unless low <= value < high."""
    if not isinstance(value, numbers.Real) or not low <= value < high:
        rule = f"be at least {low:g} and below {high:g}"
        if high == float("inf"):
            rule = f"be finite and at least {low:g}"
        raise ValueError(f"{op}: {name} must {rule}, got {value!r}")


def betas(op: str, values: tuple[float, float]) -> None:
    """Raises ValueError unless these are two numbers, each at least 0 and below 1."""
    if not isinstance(values, tuple | list) or len(values) != 2:
        raise ValueError(f"{op}: betas must be two numbers, got {values!r}")
    for beta in values:
        number(op, "betas", beta, 0, 1)


def eps(op: str, value: float | Tensor) -> float:
    """Gives what is added to a variance as a number; raises ValueError unless it is finite and at least 0."""
    if isinstance(value, Tensor) and value.numel() == 1:
        if value.requires_grad and torch.is_grad_enabled():  # one that is not computed must not look like 0
            raise ValueError(f"{op}: eps must be without a gradient, got requires_grad=True")
        value = value.item()
    number(op, "eps", value, 0.0, float("inf"))
    return float(value)


def rms_eps(op: str, x: Tensor, value: float | Tensor | None) -> float:
    """As eps; None is torch's, that of the dtype in which the statistics of x are taken."""
    if value is None:
        return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return eps(op, value)


def whole(value: object) -> int | None:
    """A whole number, also one of NumPy's, as an int, a SymInt as it is; None of all else, as of a bool."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def integer(op: str, name: str, value: int, least: int | None = None) -> None:
    """Raises ValueError unless value is a whole number of 64 bits, from `least` on where that is given."""
    low = -(2**63) if least is None else least
    # No trace is to be guarded by what holds of all that it can be given.
    if whole(value) is None or value < low or (isinstance(value, int) and value >= 2**63):
        rule = "of 64 bits" if least is None else f"from {least} to 2 ** 63 - 1"
        raise ValueError(f"{op}: {name} must be an integer {rule}, got {value!r}")


def one_of(op: str, name: str, value: str | None, known: Iterable[str | None]) -> None:
    """Raises ValueError unless value is one of the words that are known."""
    if not (value is None or isinstance(value, str)) or value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, known))}, got {value!r}")


def probability(op: str, name: str, value: float) -> None:
    """Raises ValueError unless 0 <= value <= 1."""
    if not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} must be from 0 to 1, got {value!r}")


def seed(op: str, value: int | None) -> Tensor:
    """A seed, an int64 on the CPU; one of torch's default generator where value is None."""
    if value is None:
        return torch.randint(2**63 - 1, (), device="cpu")
    integer(op, "seed", value, 0)
    return torch.tensor(value, dtype=torch.int64, device="cpu")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; of some, as of meta tensors, torch does not take the question."""
    kind = device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def autocast(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """x and others in autocast's dtype where that is on, as torch's own products take them."""
    if autocasts(x.device):
        dtype = torch.get_autocast_dtype(x.device.type)
        return tuple(
            t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
            for t in (x, *others)
        )
    return (x, *others)
