"""torch.nn's layers, which become the classes of lspm_kernels.nn."""

from torch import nn

from lspm_kernels import nn as ours
from lspm_kernels import products
from lspm_kernels.acceleration.lookalikes import meaning
from lspm_kernels.acceleration.options import Options
from lspm_kernels.acceleration.swap import Swap, original

_LAYERS: dict[type[nn.Module], type] = {
    getattr(nn, name): getattr(ours, name) for name in ours.__all__ if hasattr(nn, name)
}
# What a subclass may override so that it computes something else.
_FORWARDS = (
    "forward",
    "__call__",
    "_conv_forward",
    "_check_input_dim",
    "_sa_block",
    "_ff_block",
    "merge_masks",
)

_TABLES = nn.Embedding, nn.EmbeddingBag
# Classes, a condition, and what is said of a module for which it holds.
_REFUSALS: tuple[tuple, ...] = (
    (nn.Linear, lambda m: not products.faster, "torch's product is as fast on this processor"),
    ((nn.LayerNorm, nn.RMSNorm), lambda m: len(m.normalized_shape) != 1, "it normalises several dimensions"),
    (nn.Conv2d, lambda m: m.padding_mode != "zeros", "its padding is not of zeros"),
    (
        nn.BatchNorm2d,
        lambda m: m.momentum is None or not m.track_running_stats,
        "it has no running statistics with a momentum",
    ),
    (nn.MaxPool2d, lambda m: m.return_indices, "it returns indices"),
    (_TABLES, lambda m: m.max_norm is not None, "it has a max_norm"),
    (_TABLES, lambda m: m.sparse, "its gradient is sparse"),
    (_TABLES, lambda m: m.scale_grad_by_freq, "it scales gradients by frequency"),
    (nn.EmbeddingBag, lambda m: m.mode == "max", "its mode is 'max'"),
    (nn.MultiheadAttention, lambda m: m.bias_k is not None or m.add_zero_attn, "it adds keys of its own"),
    ((nn.Dropout, nn.SiLU), lambda m: m.inplace, "it works in place"),
    (nn.LinearCrossEntropyLoss, lambda m: bool(m.out_features), "its loss has several dimensions"),
)


def rule(model: nn.Module, path: str, module: nn.Module, options: Options) -> Swap | str | None:
    """For torch.nn's layers and for subclasses that have their forwards."""
    cls = original(module)
    base = next((base for base in cls.__mro__ if base in _LAYERS), None)
    if base is None:
        return None
    if any(getattr(cls, name, None) is not getattr(base, name, None) for name in _FORWARDS):
        # It may be proven to be a norm, an activation or a linear layer by its numbers.
        return None if meaning(module) is not None else "its class overrides forward"
    return _refusal(module) or Swap(_LAYERS[base], f"torch.nn.{base.__name__}")


def _refusal(module) -> str | None:
    """Why a layer would never be another's than torch's."""
    return next((why for kinds, holds, why in _REFUSALS if isinstance(module, kinds) and holds(module)), None)
