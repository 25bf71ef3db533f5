"""Dropout and the residual addition behind it, in one pass that stores no mask."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, triton
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import dropout as reference

_OP = "dropout"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# No row has a backward: the gradient of x is dropout of that of the output. Nor CUDA C++: see bias_act.
BACKENDS = (
    Backend("cpu", "cpu", _FLOATS, compiled.cpu_kernel("dropout_forward"), None, compiled.nothing_missing),
    Backend("triton", "cuda", _FLOATS, triton.kernel("dropout_forward"), None, triton.missing),
)


def _forward(row, x, residual, seed, p, scale, saves=True):
    x = x.contiguous()
    out = torch.empty_like(x)
    if row is not None and x.numel():
        row.forward(x, None if residual is None else residual.contiguous(), out, p, scale, int(seed))
    return out


def _save(ctx, inputs, output):
    _, _, seed, ctx.p, ctx.scale = inputs
    ctx.save_for_backward(seed)


def _gradient(ctx, dout):
    (seed,) = ctx.saved_tensors
    wants_dx, wants_dresidual = ctx.needs_input_grad[:2]
    dx = drop(ctx.row, dout, None, seed, ctx.p, ctx.scale) if wants_dx else None
    return dx, dout if wants_dresidual else None, None, None, None


def scale_of(p: float) -> float:
    """What multiplies the elements that are kept."""
    return 1 / (1 - p) if p < 1 else 0.0


drop = Operator(
    "dropout(Tensor x, Tensor? residual, Tensor seed, float p, float scale) -> Tensor",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def dropout(
    x: Tensor,
    p: float = 0.5,
    *,
    residual: Tensor | None = None,
    training: bool = True,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Dropout, with a residual addition where wanted: out = residual + x * kept / (1 - p).

    No mask is stored: the backward draws it again, and keeps the seed alone. What is dropped counts as 0,
    be it infinite or NaN. Second derivatives are right.

    Args:
        x: of any shape, float32, bfloat16 or float16; the product and the sum are taken in float32.
        p: the share of elements that is dropped, from 0 to 1.
        residual: of x's shape, or None; of two dtypes, the output takes the one torch promotes them to.
        training: False drops nothing: out = residual + x, or x itself.
        seed: which elements are dropped depends on it and their places in x alone. None draws one from
            torch's default generator.
        backend: "cpu", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        out: of x's shape and dtype. The same bits on every backend, instruction set and number of threads.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: the backend asked for does not take this call.

    Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting" (2014);
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"{_OP}: x must be a floating-point tensor, got {checks.kind(x)}")
    if residual is not None:
        x, residual = checks.residual(_OP, residual, x)
    checks.probability(_OP, "p", p)
    if seed is not None:
        checks.integer(_OP, "seed", seed, 0)
    row = dispatch.pick(_OP, BACKENDS, backend, x)
    if not training or not p:
        return x if residual is None else residual + x
    seed = checks.seed(_OP, seed)
    if row is None:
        return reference.dropout(x, p, residual=residual, seed=seed)
    return drop(row, x, residual, seed, float(p), scale_of(p))
