"""What transformers are built from: norms, attention, MLPs and the block.

Each residual addition and the norm after it are one kernel. Names in a state dict are those of Hugging Face's
models, which differ: a block takes them beside its parts.
"""

import math

from torch import Tensor, nn

from lspm_models.models.cache import KeyValueCache
from lspm_models.models.lora import LoraLinear
from lspm_models.models.operations import Operations

Rotation = tuple[Tensor, Tensor]  # cosines and sines (T, D / 2), beside a cache of places from 0 on


def check_positive(config: object, *names: str) -> None:
    """Raises ValueError unless each field is a whole number of at least 1."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{type(config).__name__}: {name} must be a positive integer, got {value!r}")


def check_eps(config: object) -> None:
    """Raises ValueError unless what is added in norms is positive and finite."""
    if not 0 < config.eps < math.inf:
        raise ValueError(f"{type(config).__name__}: eps must be positive and finite, got {config.eps}")


def check_heads(config: object) -> None:
    """Raises ValueError unless features divide among the heads."""
    if config.width % config.heads:
        rule = f"a multiple of heads ({config.heads})"
        raise ValueError(f"{type(config).__name__}: width must be {rule}, got {config.width}")


def check_dropout(config: object) -> None:
    """Raises ValueError unless the probability of dropping is one, and below 1."""
    if not 0 <= config.dropout < 1:
        raise ValueError(f"{type(config).__name__}: dropout must be in [0, 1), got {config.dropout}")


def project(layer: nn.Module, x: Tensor, ops: Operations) -> Tensor:
    """A linear layer by ops, an adapter behind it; any other by itself, such as one that keeps fewer bits."""
    if type(layer) not in (nn.Linear, LoraLinear):
        return layer(x)
    out = ops.linear(x, layer.weight, layer.bias)
    return out if type(layer) is nn.Linear else layer.adapted(out, x)


class LayerNorm(nn.LayerNorm):
    """Layer norm of dropout(x) + residual, which comes back beside it; of x alone without a residual."""

    def __init__(self, width: int, eps: float, bias: bool, dropout: float, ops: Operations):
        super().__init__(width, eps=eps, bias=bias)
        self.dropout, self.ops = dropout, ops

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if residual is not None and self.training and self.dropout:
            x, residual = self.ops.dropout(x, self.dropout, residual=residual), None
        if residual is None:
            return self.ops.layer_norm(x, self.weight, self.bias, self.eps), x
        return self.ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """As LayerNorm, of RMS norm and without dropout."""

    def __init__(self, width: int, eps: float, ops: Operations):
        super().__init__(width, eps=eps)
        self.ops = ops

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return self.ops.rms_norm(x, self.weight, self.eps), x
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention; subclasses have the projections.

    Args:
        layer: which one of the cache's.
        ops: kernels.
    """

    def __init__(self, layer: int, ops: Operations):
        super().__init__()
        self.layer, self.ops = layer, ops

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache | None, rotation: Rotation | None
    ) -> Tensor:
        """(B, T, H D) of q (B, H, T, D) and k, v (B, H_kv, T, D), which go into the cache, behind its own."""
        if cache is not None:
            tables = dict(zip(("cos", "sin"), rotation or (), strict=False))
            given = q, *cache.pair(self.layer, k, v), k, v
            out = self.ops.attention_with_kv_cache(*given, cache_seqlens=cache.past, causal=True, **tables)
        else:
            if rotation is not None:
                q, k = self.ops.rotary(q, *rotation), self.ops.rotary(k, *rotation)
            out = self.ops.attention(q, k, v, causal=True)
        return out.transpose(1, 2).flatten(2)


class PackedAttention(Attention):
    """GPT-2's: one projection to queries, keys and values."""

    def __init__(self, width: int, heads: int, bias: bool, layer: int, ops: Operations):
        super().__init__(layer, ops)
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(
        self, x: Tensor, cache: KeyValueCache | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        B, T, C = x.shape
        packed = project(self.c_attn, x, self.ops).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = packed.transpose(1, 3).unbind(2)  # (B, H, T, D), views
        return project(self.c_proj, self.attend(q, k, v, cache, rotation), self.ops)


class GroupedAttention(Attention):
    """Llama's: several heads of queries share one of keys and values; no biases."""

    def __init__(
        self, width: int, heads: int, key_value_heads: int, head_size: int, layer: int, ops: Operations
    ):
        super().__init__(layer, ops)
        self.head_size = head_size
        self.q_proj = nn.Linear(width, heads * head_size, bias=False)
        self.k_proj = nn.Linear(width, key_value_heads * head_size, bias=False)
        self.v_proj = nn.Linear(width, key_value_heads * head_size, bias=False)
        self.o_proj = nn.Linear(heads * head_size, width, bias=False)

    def forward(
        self, x: Tensor, cache: KeyValueCache | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        packed = (project(layer, x, self.ops) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (p.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for p in packed)
        return project(self.o_proj, self.attend(q, k, v, cache, rotation), self.ops)


def are_linear(*layers: nn.Module) -> bool:
    """Whether weight and bias are all there is: a layer may keep fewer bits, or have an adapter beside."""
    return all(
        type(layer) is nn.Linear or (isinstance(layer, LoraLinear) and layer.is_merged) for layer in layers
    )


class MLP(nn.Module):
    """Two linear layers with GELU, in its tanh form, between them."""

    def __init__(self, width: int, bias: bool, ops: Operations):
        super().__init__()
        self.ops = ops
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not are_linear(self.c_fc, self.c_proj):
            hidden = self.ops.bias_act(project(self.c_fc, x, self.ops), None, "gelu_tanh")
            return project(self.c_proj, hidden, self.ops)
        layers = self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias
        return self.ops.mlp(x, *layers, activation="gelu_tanh")


class GatedMLP(nn.Module):
    """SwiGLU between linear layers. Source: Shazeer, GLU Variants Improve Transformer, 2020."""

    def __init__(self, width: int, hidden: int, ops: Operations):
        super().__init__()
        self.ops = ops
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not are_linear(self.gate_proj, self.up_proj, self.down_proj):
            gate, up = (project(layer, x, self.ops) for layer in (self.gate_proj, self.up_proj))
            return project(self.down_proj, self.ops.swiglu(gate, up), self.ops)
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return self.ops.gated_mlp(x, *weights, activation="silu")


class Block(nn.Module):
    """Attention, then MLP, each after a norm and beside a residual.

    It takes and gives (x, residual) whose sum is the residual stream: the addition, and what is dropped of x
    before it, are left to the norm that follows, in the next block or at the end.

    Args:
        parts: norm, attention, norm and MLP, in this order, by the names that they have in the state dict.
    """

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        cache: KeyValueCache | None = None,
        rotation: Rotation | None = None,
    ) -> tuple[Tensor, Tensor]:
        norm, attention, next_norm, mlp = self._modules.values()
        x, residual = norm(x, residual)
        x, residual = next_norm(attention(x, cache, rotation), residual)
        return mlp(x), residual
