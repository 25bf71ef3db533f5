"""Inputs that a backward computes again of what an earlier op has saved, instead of keeping them too.

An op whose output is cheap to compute sets on its ctx, which is the output's grad_fn: `remake`, a function of
its saved tensors that gives the output with the same bits, or None; and `takes_remade`, whether its own
backward, which comes last, needs the output as well.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lspm_kernels import checks

_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def admits(x: Tensor) -> bool:
    """Whether what is saved may depend on where x comes from.

    Not in a trace; nor where hooks see what is saved, as those of torch.utils.checkpoint, which must see the
    same in every run of a forward.
    """
    return checks.plain(x) and _hooks is not None and _hooks(False) is None


def remade(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor | None, ...]]:
    """A function that gives x, and the tensors to keep for it: x itself, where no op can make it again.

    An x that was changed in place has another grad_fn.
    """
    if admits(x) and getattr(x.grad_fn, "remake", None) is not None:
        return partial(remake, x.grad_fn), x.grad_fn.saved_tensors
    return _itself, (x,)


def remake(node: torch.autograd.graph.Node, *saved: Tensor | None) -> Tensor:
    """The output of `node`, made once for all who ask until its own backward."""
    x = node.remade
    if x is None:
        x = node.remake(*saved)
        if node.takes_remade:
            node.remade = x
    return x


def _itself(x: Tensor) -> Tensor:
    return x
