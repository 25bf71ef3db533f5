"""The head of a language model and the loss of its logits, as one: see logits.py."""

import sys

import torch
from torch import Tensor, nn

from lspm_kernels import checks
from lspm_kernels.acceleration import logits, lookalike_layers
from lspm_kernels.acceleration.lookalikes import meaning
from lspm_kernels.acceleration.options import Options
from lspm_kernels.acceleration.swap import Swap, is_swapped, original
from lspm_kernels.dispatch import admitting
from lspm_kernels.nn import calls
from lspm_kernels.ops.linear_cross_entropy import BACKENDS

_LEAST_CLASSES = 4096  # below, the matrix is small beside what else a step keeps
_LOSSES = {"cross_entropy", "CrossEntropyLoss", "loss_function"}


class Head(lookalike_layers.Linear):
    """A linear layer that gives Logits in the forward of its Owner."""

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling() or not logits.is_collecting():
            return super().forward(*args, **kwargs)
        if calls.watched() or not calls.unhooked(self):
            return super().forward(*args, **kwargs)
        x = args[0] if len(args) == 1 and not kwargs else None
        weight, bias = self.weight, self.bias
        if type(x) is not Tensor or not x.requires_grad:
            return super().forward(*args, **kwargs)
        dtype = x.dtype
        if checks.autocasts(x.device):
            dtype = torch.get_autocast_dtype(x.device.type)
        elif dtype != weight.dtype:
            return super().forward(*args, **kwargs)
        if not admitting("linear_cross_entropy", BACKENDS, x):
            return super().forward(*args, **kwargs)
        return logits.Logits.of(x, weight, bias, dtype)


class Owner:
    """A model that computes its loss."""

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        if not is_swapped(self):  # FSDP reads all outputs, when it may have freed the weight
            return super().forward(*args, **kwargs)
        with logits.collected():
            return logits.settled(super().forward(*args, **kwargs))


def rule(model: nn.Module, path: str, module: nn.Module, options: Options) -> Swap | str | None:
    """For heads, and for the models that own one."""
    if original(module) is nn.Linear:
        if any(_is_owner(outer) and _is_head(module, outer) for outer in _ancestors(model, path)):
            return Swap(Head, "head, whose loss needs no logits", meaning(module))
    elif _is_owner(module) and any(_is_head(inner, module) for inner in module.modules()):
        return Swap(Owner, "model whose loss needs no logits")
    return None


def _is_head(module, owner) -> bool:
    """Whether a module gives a number for each of the many rows of one of its owner's embeddings."""
    if original(module) is not nn.Linear or module.out_features < _LEAST_CLASSES or meaning(module) is None:
        return False
    tables = (inner for inner in owner.modules() if isinstance(inner, nn.Embedding))
    return any(table.num_embeddings == module.out_features for table in tables)


def _is_owner(module) -> bool:
    """Whether a module's forward computes a loss of classes, by what its code calls."""
    transformers = sys.modules.get("transformers")
    forward = original(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    names = set() if code is None else _LOSSES.intersection(code.co_names)
    if transformers is not None and isinstance(module, getattr(transformers, "PreTrainedModel", ())):
        return bool(names)
    losses = any(isinstance(child, nn.CrossEntropyLoss) for child in module.children())
    return losses or bool(names & {"cross_entropy", "CrossEntropyLoss"})


def _ancestors(model, path) -> list[nn.Module]:
    parts = path.split(".")[:-1]
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
