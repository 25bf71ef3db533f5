"""Which calls kernels take; all others are torch's, and so are those for which torch takes less time."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.modules.module import _has_any_global_hook

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
_ORDINARY = frozenset({Tensor, Parameter, type(None)})
_is_compiling = torch.compiler.is_compiling
_transforms_active = torch._C._are_functorch_transforms_active
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_grad_enabled = torch.is_grad_enabled


def plain(x: object, *others: Tensor | None) -> bool:
    """Whether x is of numbers that kernels take, and it and the others are but strided memory.

    What is `watched` is torch's; so are, by their class, fake tensors, as those of torch.export.
    """
    if type(x) not in _ORDINARY or x is None or x.dtype not in FLOATS:
        return False
    if x.is_nested or x.layout is not torch.strided:
        return False
    for other in others:
        if type(other) not in _ORDINARY or (other is not None and other.layout is not torch.strided):
            return False
    return _is_compiling() or not watched()


def watched() -> bool:
    """Whether what is called is followed by what knows torch's operators, and kernels little or not at all.

    That are torch.func's transforms, forward-mode derivatives, TorchScript's traces, and modes that see each
    operator, as those that count FLOPs or choose what a checkpoint keeps.
    """
    return _transforms_active() or forward_ad._current_level >= 0 or _is_tracing() or _dispatch_modes() > 0


def alike(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the parameters have x's dtype and are where it is."""
    dtype, device = x.dtype, x.device
    return all(p is None or (p.dtype is dtype and p.device == device) for p in parameters)


def records(*tensors: Tensor | None) -> bool:
    """Whether a gradient of any of them is wanted."""
    return _is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def channels_last(x: Tensor) -> bool:
    """Whether an image lies in channels_last memory and in no other: else torch gives contiguous ones."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def known(module: nn.Module, kinds: set[type]) -> bool:
    """Whether calling a module does what one of these classes does, and nothing else."""
    if getattr(type(module), "lspm_original", type(module)) not in kinds or _has_any_global_hook():
        return False
    return unhooked(module)


def parametrized(module: nn.Module) -> bool:
    """Whether a look at a parameter computes it: a second one would do so again, with what that changes."""
    return "parametrizations" in module._modules


def unhooked(module: nn.Module) -> bool:
    """Whether calling a module calls nothing but its forward, which finds its parameters as they are."""
    return not (
        parametrized(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
