"""What convolutions and poolings over images check of their arguments, and the sizes of what they give."""

import torch
from torch import Tensor

from lspm_kernels import checks
from lspm_kernels.reference import batch_norm_act as reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = tuple(reference.ACTIVATIONS)


def pair(op: str, name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    """An int, or one for rows and one for columns, as two; ValueError unless both are at least `least`."""
    if type(value) is int and value >= least:
        return value, value
    both = tuple(map(checks.whole, value if isinstance(value, tuple | list) else (value,)))
    if len(both) == 1:
        both *= 2
    if len(both) != 2 or any(v is None or v < least for v in both):
        raise ValueError(f"{op}: {name} must be an integer of at least {least}, or two, got {value!r}")
    return both


def image(op: str, x: Tensor) -> None:
    """Raises ValueError unless x is (N, C, H, W) or (C, H, W), of a floating-point dtype."""
    if not isinstance(x, Tensor) or x.dim() not in (3, 4) or not x.dtype.is_floating_point:
        raise ValueError(
            f"{op}: x must be a floating-point tensor (N, C, H, W) or (C, H, W), got {checks.kind(x)}"
        )


def weight(op: str, x: Tensor, w: Tensor, groups: int) -> None:
    """Raises ValueError unless w (K, C / groups, R, S) fits x (N, C, H, W)."""
    if not isinstance(w, Tensor) or w.dim() != 4 or 0 in w.shape:
        raise ValueError(
            f"{op}: weight must be a tensor (K, C / groups, R, S), none of them 0, got {checks.shape(w)}"
        )
    if checks.whole(groups) is None or groups < 1 or w.shape[0] % groups:
        raise ValueError(f"{op}: groups must divide weight's {w.shape[0]} filters, got {groups!r}")
    if x.shape[1] != w.shape[1] * groups:
        raise ValueError(
            f"{op}: x must have weight's {w.shape[1]} channels times groups {groups}, got {x.shape[1]}"
        )
    if w.dtype != x.dtype:
        raise ValueError(f"{op}: weight must have x's dtype {x.dtype}, got {w.dtype}")
    if w.device != x.device:
        raise ValueError(f"{op}: weight must be on x's device {x.device}, got {w.device}")


def padding(op: str, value, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]):
    """((above, on the left), (rows added in all, columns)), of an int, two, "valid" or "same"."""
    if value == "valid":
        return (0, 0), (0, 0)
    if value == "same":
        if stride != (1, 1):
            raise ValueError(f"{op}: padding 'same' must come with a stride of 1, got {stride}")
        both = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return (both[0] // 2, both[1] // 2), both
    if isinstance(value, str):
        raise ValueError(f"{op}: padding must be 'same', 'valid', an integer or two, got {value!r}")
    first = pair(op, "padding", value, 0)
    return first, (2 * first[0], 2 * first[1])


def out_size(op: str, x: Tensor, kernel, stride, added, dilation) -> tuple[int, int]:
    """The rows and columns of the output; ValueError where there is none."""
    sizes = tuple(
        (x.shape[2 + i] + added[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    if min(sizes) < 1:
        padded = tuple(x.shape[2 + i] + added[i] for i in range(2))
        reach = tuple(dilation[i] * (kernel[i] - 1) + 1 for i in range(2))
        raise ValueError(f"{op}: x with its padding must be at least the kernel's {reach}, got {padded}")
    return sizes


def empty_image(x: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """(N, channels, H', W') beside x, channels last; not a view, for those may not be changed in place."""
    shape = x.shape[0], channels, *size
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def geometry(op: str, x: Tensor, w: Tensor, stride, padding_, dilation, groups: int):
    """Checks a convolution; gives (H', W') and (stride, padding, dilation, groups) as seven numbers."""
    weight(op, x, w, groups)
    kernel = tuple(w.shape[2:])
    stride, dilation = pair(op, "stride", stride, 1), pair(op, "dilation", dilation, 1)
    first, added = padding(op, padding_, kernel, stride, dilation)
    size = out_size(op, x, kernel, stride, added, dilation)
    return size, (*stride, *first, *dilation, checks.whole(groups))


def grouped(geometry):
    """geometry()'s seven numbers as stride, padding, dilation and groups, as the kernels take them."""
    return (geometry[:2], geometry[2:4], geometry[4:6], geometry[6])


def vectors(op: str, x: Tensor, filters: int, **given: Tensor | None) -> None:
    """Raises ValueError unless each is None or holds a value for each filter."""
    for name, t in given.items():
        if t is not None:
            checks.parameter(op, name, t, filters, x.device, tuple(dict.fromkeys((torch.float32, x.dtype))))


def residual(op: str, t: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless t is None or a tensor of y's shape and x's dtype."""
    if t is None:
        return
    if not isinstance(t, Tensor) or tuple(t.shape) != shape:
        raise ValueError(f"{op}: residual must be a tensor of y's shape {shape}, got {checks.shape(t)}")
    if t.dtype != x.dtype:
        raise ValueError(f"{op}: residual must have x's dtype {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{op}: residual must be on x's device {x.device}, got {t.device}")


def activation(op: str, name: str | None) -> int:
    """The number of an activation; ValueError where there is none of that name."""
    checks.one_of(op, "activation", name, ACTIVATIONS)
    return ACTIVATIONS.index(name)
