"""Modules of lspm_kernels.nn and of torch.nn beside each other, for tests of the former."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

import lspm_kernels as lk
import oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST = torch.channels_last


def pair(name: str, *args, train: bool = True, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Our module and torch's of that name, of the same arguments, with the same parameters."""
    theirs, ours = getattr(nn, name)(*args, **kwargs), getattr(lk.nn, name)(*args, **kwargs)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3 if p.dim() < 2 else p.shape[1:].numel() ** -0.5)
    for buffer in theirs.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(train), theirs.train(train)


def is_ours(module: nn.Module, *args, **kwargs) -> bool:
    """Whether a call is a kernel's: on a CPU those of Triton refuse it."""
    with lk.use_backend("triton"):
        try:
            module(*args, **kwargs)
        except NotImplementedError as error:
            return "triton needs a tensor on cuda" in str(error)
    return False


def check(
    ours: nn.Module,
    theirs: nn.Module,
    inputs: Sequence[Tensor],
    *others,
    dtype: torch.dtype | None = None,
    taken: bool = True,
    gradients: bool = True,
    **kwargs,
) -> None:
    """Holds outputs and gradients, of inputs and parameters in dtype or theirs, to the oracle's rule."""
    dtype = dtype or inputs[0].dtype
    names = [name for name, _ in theirs.named_parameters()]
    tensors = [*inputs, *(p.detach().to(dtype) for p in theirs.parameters())]

    def call(module) -> Callable:
        def run(*given):
            kind, count = given[0].dtype, len(inputs)
            floats = {n: b.to(kind, copy=True) for n, b in theirs.named_buffers() if b.is_floating_point()}
            state = dict(zip(names, given[count:], strict=True)) | floats
            options = {k: _as(v, kind) for k, v in kwargs.items()}
            y = functional_call(module, state, (*given[:count], *others), options)
            return y[0] if isinstance(y, tuple) else y

        return run

    assert is_ours(Called(call(ours)), *tensors) == taken
    oracle.check(call(ours), call(theirs), tensors, gradients=gradients)


class Called(nn.Module):
    """A function as a module; with tensors that want gradients, as the oracle's do."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*(t.detach().requires_grad_() for t in tensors))


def _as(value, dtype):
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def same(ours: nn.Module, theirs: nn.Module, *args, **kwargs) -> None:
    """Both give the same bits, by torch's forward."""
    assert not is_ours(ours, *args, **kwargs)
    torch.manual_seed(1)
    actual = ours(*args, **kwargs)
    torch.manual_seed(1)
    expected = theirs(*args, **kwargs)
    pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    for a, b in pairs:
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))
