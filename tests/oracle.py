"""The one tolerance rule: a kernel may err at most twice as much as plain PyTorch does in the same dtypes.

The truth is the reference in float64; its error in the inputs' own dtypes is what plain PyTorch achieves. To
twice that comes eps * max(1, max |truth|), one rounding of the largest value. Gradients are held to the same.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def check(
    ours: Callable, reference: Callable, tensors: Sequence[Tensor | None], *, gradients: bool = True
) -> None:
    """Compares ours(*tensors) with reference(*tensors): every output, and the gradient of every tensor.

    Both take the same tensors (None for an absent one) and return a tensor or a tuple of them.
    """
    actual = outputs_and_gradients(ours, tensors, gradients)
    plain = outputs_and_gradients(reference, tensors, gradients)
    wide = [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    truth = outputs_and_gradients(reference, wide, gradients)
    for name in truth:
        compare(name, actual[name], truth[name], plain[name])


def compare(name: str, actual: Tensor, truth: Tensor, plain: Tensor) -> None:
    """Raises AssertionError unless `actual` obeys the rule; where plain is not finite, it must be alike."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, expected {plain.dtype}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(plain)), f"{name}: {kind.__name__} differs from plain PyTorch's"
    finite = plain.isfinite() & truth.isfinite()
    if not finite.any():
        return
    actual, plain, truth = actual[finite].double(), plain[finite], truth[finite]
    allowed = 2 * (plain.double() - truth).abs().max()
    allowed += torch.finfo(plain.dtype).eps * truth.abs().max().clamp(min=1)
    error = (actual - truth).abs().max()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def outputs_and_gradients(
    function: Callable, tensors: Sequence[Tensor | None], gradients: bool = True
) -> dict:
    """{"output 0": ..., "gradient 0": ...} of function(*tensors), under fixed gradients of its outputs."""
    leaves = [t if t is None else t.detach().requires_grad_(gradients) for t in tensors]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if gradients:
        wanted = [t for t in leaves if t is not None]
        weights = [_weights(output) for output in outputs]
        grads = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
        for i, (leaf, grad) in enumerate(zip(wanted, grads, strict=True)):
            found[f"gradient {i}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def _weights(output: Tensor) -> Tensor:
    """Gradients for an output: the same for every dtype, before they are rounded to it."""
    generator = torch.Generator("cpu").manual_seed(output.numel())
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float32, device="cpu")
    return weights.to(torch.bfloat16).to(output.dtype).to(output.device)
