"""A step of AdamW on a list of parameters, clipping included: as we and PyTorch take it.

Beside bfloat16 weights with float32 masters stands what PyTorch does for them: gradients are copied to
float32, a step changes the masters, and these are copied back.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import harness
import lspm_kernels

CLIP = 1.0


def parameters(shapes: list[tuple], dtype: torch.dtype, device: str) -> list[Tensor]:
    """The same for every variant, with gradients."""
    generator, params = torch.Generator().manual_seed(0), []
    for shape in shapes:
        value, grad = (torch.randn(shape, generator=generator).mul_(0.02) for _ in range(2))
        params.append(value.to(device, dtype))
        params[-1].grad = grad.to(device, dtype)
    return params


def lspms(params: list[Tensor], clip: bool) -> Callable[[], None]:
    """The step: with float32 masters where parameters have fewer bits."""
    return lspm_kernels.AdamW(params, clip_norm=CLIP if clip else None, master_weights=True).step


def torchs(params: list[Tensor], clip: bool, **how: bool) -> Callable[[], None]:
    """The same by torch.optim.AdamW(fused=True) or (foreach=True)."""
    copies, grads = params[0].dtype == torch.bfloat16, [p.grad for p in params]
    wide = [p.float() for p in params] if copies else params
    for p, grad in zip(wide, grads, strict=True):
        p.grad = grad.to(p.dtype)
    optimizer = torch.optim.AdamW(wide, **how)

    @torch.no_grad()
    def step() -> None:
        if copies:
            torch._foreach_copy_([p.grad for p in wide], grads)
        if clip:
            torch.nn.utils.clip_grad_norm_(wide, CLIP)
        optimizer.step()
        if copies:
            torch._foreach_copy_(params, wide)

    return step


def check(shapes: list[tuple], dtype: torch.dtype, clip: bool, device: str) -> None:
    """Raises WrongError unless what two steps of ours make obeys the tests' rule."""
    found = []
    for make, of, how in (
        (lspms, dtype, {}),
        (torchs, torch.float64, {"fused": True}),
        (torchs, dtype, {"fused": True}),
    ):
        found.append([p.to(of) for p in parameters(shapes, dtype, device)])
        for p, other in zip(found[-1], parameters(shapes, dtype, device), strict=True):
            p.grad = other.grad.to(of)
        step = make(found[-1], clip, **how)
        step(), step()
    harness.compare("lspm", *found)
