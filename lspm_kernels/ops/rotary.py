"""Rotary position embedding of queries and keys, in half style or interleaved."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, triton
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import rotary as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# On a GPU cuda comes first: on an H200 both move the bytes at 0.9 of a copy's rate, but Triton's launches
# take longer, with the gradient as long as the kernels.
BACKENDS = tuple(
    Backend(name, device, _FLOATS, kernel("rotary_forward"), kernel("rotary_backward"), missing)
    for name, device, kernel, missing in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing),
        ("cuda", "cuda", compiled.cuda_kernel, compiled.cuda_missing),
        ("triton", "cuda", triton.kernel, triton.missing),
    )
)


def _rotate(kernel, x, cos, sin, offsets, offset, interleaved):
    """What kernel(x, cos, sin, offsets, out, offset, interleaved) fills; kernel None leaves it empty."""
    out = torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype, device=x.device)
    if kernel is not None and out.numel():
        offsets = None if offsets is None else offsets.contiguous()
        known = cos.contiguous(), sin.contiguous(), offsets
        kernel(checks.rows(x), *known, out.transpose(1, 2), offset, interleaved)
    return out


def _forward(row, *args, saves=True):
    return _rotate(row and row.forward, *args)


def _backward(row, *args, saves=True):
    return _rotate(row and row.backward, *args)


_rotary_backward = Operator(
    "rotary_backward(Tensor dout, Tensor cos, Tensor sin, Tensor? offsets, SymInt offset, bool interleaved)"
    " -> Tensor",
    BACKENDS,
    _backward,
)


def _save(ctx, inputs, output):
    _, cos, sin, offsets, ctx.offset, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin, offsets)


def _gradient(ctx, dout):
    return _rotary_backward(ctx.row, dout, *ctx.saved_tensors, ctx.offset, ctx.interleaved), *[None] * 5


_rotary = Operator(
    "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? offsets, SymInt offset, bool interleaved) -> Tensor",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offsets: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotary position embedding: each pair (a, b) of a row becomes (a cos - b sin, b cos + a sin).

    x is read where it lies, whatever its strides, as long as the last dimension is contiguous; so views of
    packed projections, and (B, T, H, D).transpose(1, 2), cost no copy. The gradient is the rotation by the
    negative angle.

    Args:
        x: (B, H, T, D), float32, bfloat16 or float16; the rotation is computed in float32.
        cos, sin: (S, R / 2), x's dtype or float32, without a gradient: the cosine and sine of the angle of
            each position and pair. The first R of D dimensions are rotated, the others passed through.
        interleaved: pair i is dimensions 2 i and 2 i + 1 (GPT-J); else i and R / 2 + i (GPT-NeoX, Llama).
        offsets: the position of row 0, an int, or int64 (B,) for one of each sequence: row t reads
            cos[offset + t]. None is 0. A tensor on a GPU is read for its check, which waits for the GPU;
            within torch.compile, under torch.func and while a CUDA graph is captured nothing can be read, and
            what lies outside of cos becomes NaN.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        out: (B, H, T, D), x's dtype; out.transpose(1, 2) is contiguous.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device; a position is no row of cos.
        NotImplementedError: the backend asked for does not take this call.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), equation 34.
    """
    check("rotary", x, cos, sin)
    last = cos.shape[0] - x.shape[2]
    offset, offsets = _check_offsets(offsets, x, last)
    row = dispatch.pick("rotary", BACKENDS, backend, x)
    if offsets is not None and (row is None or row.device != "cpu"):  # the CPU kernel checks them itself
        _check_values(offsets, last)
    if row is None:
        start = offset if offsets is None else offsets
        return reference.rotary(x, cos, sin, interleaved=interleaved, offsets=start)
    return _rotary(row, x, cos, sin, offsets, offset, bool(interleaved))


def check(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError unless x (B, H, T, D) can be rotated by rows of cos and sin."""
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be a floating-point tensor (B, H, T, D), got {checks.kind(x)}")
    if not isinstance(cos, Tensor) or cos.dim() != 2:
        raise ValueError(f"{op}: cos must be a tensor (S, R / 2), got {checks.shape(cos)}")
    if not isinstance(sin, Tensor) or sin.shape != cos.shape:
        raise ValueError(
            f"{op}: sin must be a tensor of cos's shape {tuple(cos.shape)}, got {checks.shape(sin)}"
        )
    T, D = x.shape[2:]
    if not 1 <= cos.shape[1] <= D // 2:
        raise ValueError(f"{op}: cos must have 1 to D / 2 = {D // 2} columns, got {cos.shape[1]}")
    if cos.shape[0] < T:
        raise ValueError(f"{op}: cos must have a row for each of T = {T} positions, got {cos.shape[0]}")
    if cos.dtype not in (x.dtype, torch.float32):
        rule = " or ".join(dict.fromkeys(map(str, (x.dtype, torch.float32))))
        raise ValueError(f"{op}: cos must have dtype {rule}, got {cos.dtype}")
    if sin.dtype != cos.dtype:
        raise ValueError(f"{op}: sin must have cos's dtype {cos.dtype}, got {sin.dtype}")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.device != x.device:
            raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {t.device}")
        if t.requires_grad and torch.is_grad_enabled():  # one that is not computed must not look like 0
            raise ValueError(f"{op}: {name} must be without a gradient, got requires_grad=True")


def _check_offsets(offsets, x, last):
    """The position of row 0 as a number and as a tensor, of which one holds."""
    if offsets is None:
        return 0, None
    if isinstance(offsets, Tensor):
        if offsets.dtype != torch.int64:
            raise ValueError(f"rotary: offsets must have dtype torch.int64, got {offsets.dtype}")
        if offsets.shape != x.shape[:1]:
            raise ValueError(
                f"rotary: offsets must have the shape (B,) = ({x.shape[0]},), got {tuple(offsets.shape)}"
            )
        if offsets.device != x.device:
            raise ValueError(f"rotary: offsets must be on x's device {x.device}, got {offsets.device}")
        return 0, offsets
    number = checks.whole(offsets)
    if number is None:
        raise ValueError(f"rotary: offsets must be None, an int or a tensor, got {type(offsets).__name__}")
    if not 0 <= offsets <= last:
        raise ValueError(_outside(last, offsets))
    return number, None


def _check_values(offsets, last):
    """Checks what a tensor of offsets holds, where it holds anything that can be read here."""
    if not offsets.numel() or not checks.readable(offsets):
        return
    for value in torch.stack(offsets.aminmax()).tolist():
        if not 0 <= value <= last:
            raise ValueError(_outside(last, value))


def _outside(last, value):
    return f"rotary: offsets must lie in 0 to S - T = {last}, got {value}"
