"""LoRA: linear layers that stay as they are, each beside a learned product of two thin matrices.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2022. lora_A and lora_B are peft's.
"""

import json
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lspm_models.models.freezing import matching

TARGETS = ("*attn.*",)  # of GPT's attn and of Llama's self_attn
SAMPLE = 4  # weights of each tensor
# A sum that another machine merged differs in its last bits, and a model in bfloat16 from its float32.
ROUNDINGS = 8


class LoraLinear(nn.Linear):
    """x W^T + bias + alpha / rank dropout(x) A^T B^T, of which A and B are learned.

    It begins as the layer that it is made of: B is 0.

    Args:
        linear: W (N, K) and bias, which are taken over, not copied, and get no gradient.
        rank: R of A (R, K) and B (N, R), which have W's dtype.
        alpha: see above.
        dropout: probability of dropping, in training, a feature on its way to A.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super(nn.Linear, self).__init__()  # without weights of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("weight", linear.weight)
        self.register_parameter("bias", linear.bias)
        self.requires_grad_(False)
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as torch.nn.Linear's weight
        self.register_buffer("unmerged", None, persistent=False)  # W, while the product is in the weight

    @property
    def is_merged(self) -> bool:
        """Whether the product is in the weight."""
        return self.unmerged is not None

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) of x (..., K)."""
        return self.adapted(F.linear(x, self.weight, self.bias), x)

    def adapted(self, out: Tensor, x: Tensor) -> Tensor:
        """What the layer gives of x, where `out` is what it would without an adapter."""
        return out if self.is_merged else out + F.linear(self._reduced(x), self.lora_B)

    def as_one_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x' and W' whose product x' W'^T is what the layer gives without its bias: for a fused loss."""
        if self.is_merged:
            return x, self.weight
        return torch.cat((x, self._reduced(x)), -1), torch.cat((self.weight, self.lora_B), 1)

    def merge(self) -> None:
        """Adds the product to the weight, and keeps what it was; until unmerge, A and B do not learn."""
        if not self.is_merged:
            self.unmerged = self.weight.detach().clone()
            with torch.no_grad():
                self.weight.copy_(merged(self.weight, self.lora_A, self.lora_B, self.scale))

    def unmerge(self) -> None:
        """Gives the weight back the bits that it had."""
        if self.is_merged:
            with torch.no_grad():
                self.weight.copy_(self.unmerged)
            self.unmerged = None

    def extra_repr(self) -> str:
        """What print() shows of a layer."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"

    def _reduced(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(self.dropout(x), self.lora_A)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight + scale B A, in float32 at least and rounded once to weight's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale).to(weight.dtype)


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float = 16.0,
    dropout: float = 0.0,
    *,
    targets: Sequence[str] = TARGETS,
) -> nn.Module:
    """Puts a LoraLinear in place of linear layers of a model, and freezes all else.

    Args:
        model: it is changed.
        rank, alpha, dropout: see LoraLinear.
        targets: patterns, as of fnmatch, of the names of layers of type torch.nn.Linear.

    Returns:
        model.

    Raises:
        ValueError: an argument breaks its rule, the model has adapters, a pattern matches no linear layer, or
            a layer whose weight another module has, too, such as a tied head.
    """
    check_lora("add_lora: ", rank, alpha, dropout)
    if lora_layers(model):
        raise ValueError(
            f"add_lora: model must have no adapters, got {', '.join(list(lora_layers(model))[:3])}"
        )
    linears = {name: module for name, module in model.named_modules() if name and type(module) is nn.Linear}
    chosen = matching("add_lora: targets must match linear layers", targets, linears)
    if not chosen:
        raise ValueError(f"add_lora: targets must match linear layers, got {tuple(targets)}")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for name in chosen:
        if others := [owner for owner in owners[id(linears[name].weight)] if owner != name]:
            rule = "add_lora: targets must match layers with a weight of their own"
            raise ValueError(f"{rule}, got {name}, whose weight {others[0]} has, too")
    model.requires_grad_(False)
    for name in chosen:
        replace(model, name, LoraLinear(linears[name], rank, alpha, dropout))
    return model


def check_lora(prefix: str, rank: int, alpha: float, dropout: float) -> None:
    """Raises ValueError unless rank, alpha and dropout obey their rules; prefix stands before their names."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{prefix}rank must be a whole number of at least 1, got {rank}")
    if not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
        raise ValueError(f"{prefix}alpha must be positive and finite, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{prefix}dropout must be in [0, 1), got {dropout}")


def merge(model: nn.Module) -> None:
    """Adds each adapter's product to its weight: the model then costs what it cost without adapters."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Takes back what merge did, to the same bits."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def remove_lora(model: nn.Module) -> nn.Module:
    """Puts torch.nn.Linear back in the place of each adapter, with the weight as it is: after merge, the sum.

    All parameters get gradients again.

    Returns:
        model.
    """
    for name, layer in lora_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        replace(model, name, linear)
    return model.requires_grad_(True)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Returns the adapters of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns A and B of each adapter as they are called in the model's state dict."""
    return {
        f"{name}.{matrix}": getattr(layer, matrix).detach()
        for name, layer in lora_layers(model).items()
        for matrix in ("lora_A", "lora_B")
    }


def base_sample(model: nn.Module) -> str:
    """Returns a few weights of each tensor but adapters, as JSON: enough to tell a base from another."""
    adapters, layers = adapter_tensors(model), lora_layers(model)
    tensors = {name: t for name, t in model.state_dict().items() if name not in adapters}
    tensors |= {f"{name}.weight": layer.unmerged for name, layer in layers.items() if layer.is_merged}
    sample, eps = {}, 0.0
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.is_floating_point():
            eps = max(eps, torch.finfo(tensor.dtype).eps)
            places = torch.arange(SAMPLE, device=tensor.device) * (tensor.numel() - 1) // (SAMPLE - 1)
            sample[name] = tensor.detach().reshape(-1)[places].tolist()
    return json.dumps({"eps": eps, "weights": sample})


def differing(sample: str, other: str) -> list[str]:
    """Returns the names of tensors in which two samples differ by more than they are rounded."""
    one, two = json.loads(sample), json.loads(other)
    near = ROUNDINGS * max(one["eps"], two["eps"])
    ours, theirs = one["weights"], two["weights"]

    def differ(name: str) -> bool:
        if name not in ours or name not in theirs:
            return True
        most = near * max(map(abs, ours[name]))
        return not all(abs(a - b) <= most for a, b in zip(ours[name], theirs[name], strict=True))

    return [name for name in dict.fromkeys((*ours, *theirs)) if differ(name)]


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module.train(model.get_submodule(name).training))
