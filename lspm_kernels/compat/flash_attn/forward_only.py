"""What FlashAttention-2 computes forward alone, though its inputs require gradients."""

import torch
from torch import Tensor


class _ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op: str, result: Tensor, *inputs: Tensor) -> Tensor:
        ctx.op = op
        return result.view_as(result)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> None:
        raise NotImplementedError(f"{ctx.op}: there is no backward through a cache or its pages")


def forward_only(op: str, function, inputs: dict[str, Tensor | None]) -> Tensor | tuple[Tensor, ...]:
    """function(**inputs) of detached tensors; a backward through its first result raises.

    Upstream's call goes through in a model that was not put under no_grad, and so does this.

    Raises:
        NotImplementedError: from the backward.
    """
    wanted = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    if not wanted or not torch.is_grad_enabled():
        return function(**inputs)
    result = function(**{name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()})
    if isinstance(result, Tensor):
        return _ForwardOnly.apply(op, result, *wanted)
    return (_ForwardOnly.apply(op, result[0], *wanted), *result[1:])
