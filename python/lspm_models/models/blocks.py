"""What decoders are built from: norms, attention, MLPs, the block, and the model around its blocks.

Each residual addition and the norm after it are one kernel. Names in a state dict are those of Hugging Face's
models, which differ: a block takes them beside its parts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lspm_models.models.cache import KeyValueCache
from lspm_models.models.operations import Operations

Rotation = tuple[Tensor, Tensor]  # cosines and sines (T, D / 2)


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


def project(layer: nn.Module, x: Tensor, ops: Operations) -> Tensor:
    """A linear layer by ops; any other by itself, such as one that keeps its weight in fewer bits."""
    return ops.linear(x, layer.weight, layer.bias) if type(layer) is nn.Linear else layer(x)


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
        """(B, T, H D) of q (B, H, T, D) and k, v (B, H_kv, T, D), behind those in the cache."""
        if rotation is not None:
            q, k = self.ops.rotary(q, *rotation), self.ops.rotary(k, *rotation)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.ops.attention(q, k, v, causal=True).transpose(1, 2).flatten(2)


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


class MLP(nn.Module):
    """Two linear layers with GELU, in its tanh form, between them."""

    def __init__(self, width: int, bias: bool, ops: Operations):
        super().__init__()
        self.ops = ops
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.c_fc) is not nn.Linear:  # its weight is kept in fewer bits, which the layer reads
            return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
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
        if type(self.gate_proj) is not nn.Linear:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
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


class Decoder(nn.Module):
    """Features of each token from the tokens up to it.

    A subclass has `config`, with vocabulary_size and context, `embedding`, `blocks` and `norm`.

    Args:
        ops: kernels.
        gradient_checkpointing: keep only each block's inputs for the backward, which runs the blocks again.
    """

    def __init__(self, ops: Operations, gradient_checkpointing: bool):
        super().__init__()
        self.ops, self.gradient_checkpointing = ops, gradient_checkpointing

    @property
    def parameter_count(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initialize(self, outputs: tuple[str, ...]) -> None:
        """GPT-2's: normal with deviation 0.02, 0 in biases, 1 in norms.

        Args:
            outputs: names of the layers that add to the residual, whose deviation is over sqrt(additions).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                additions = 2 * len(self.blocks) if name.split(".")[-2] in outputs else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(additions))

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Features after the final norm.

        Under autocast the residual stream has autocast's dtype, as in a model whose parameters have it.

        Args:
            tokens: (B, T) int64 ids; T, and the cache's length, together at most the context.
            cache: the tokens before these; it is extended by them. Only under torch.no_grad().

        Returns:
            (B, T, C).

        Raises:
            ValueError: tokens or cache break a rule above.
        """
        if cache is not None and torch.is_grad_enabled():
            raise ValueError(f"{self._name}: cache must be used under torch.no_grad(), got gradients enabled")
        past = cache.length if cache is not None else 0
        x, residual = self._embed(tokens, past), None
        rotation = self.rotation(past, past + tokens.shape[1], cache)
        for block in self.blocks:
            if self.gradient_checkpointing and cache is None:
                x, residual = checkpoint(block, x, residual, None, rotation, use_reentrant=False)
            else:
                x, residual = block(x, residual, cache, rotation)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x, residual)[0]

    def rotation(self, past: int, end: int, cache: KeyValueCache | None) -> Rotation | None:
        """Cosines and sines of places from past to end, which a cache may keep; None: no rotation."""

    def embedded(self, tokens: Tensor, past: int) -> Tensor:
        """Embeddings (B, T, C) of tokens whose first one stands at `past`, with what tells their places."""
        return self.ops.embedding(tokens, self.embedding.weight)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _embed(self, tokens: Tensor, past: int) -> Tensor:
        if tokens.dtype != torch.int64 or tokens.ndim != 2:
            got = f"{tuple(tokens.shape)} {str(tokens.dtype).removeprefix('torch.')}"
            raise ValueError(f"{self._name}: tokens must be (B, T) int64, got {got}")
        end = past + tokens.shape[1]
        if end > self.config.context:
            raise ValueError(f"{self._name}: tokens must fit the context of {self.config.context}, got {end}")
        try:
            x = self.embedded(tokens, past)
        except (IndexError, ValueError):  # the look-up checks each id anyway; this says which was wrong
            least, most = tokens.aminmax()
            if 0 <= least and most < self.config.vocabulary_size:
                raise
            wrong = least if least < 0 else most
            raise ValueError(
                f"{self._name}: tokens must be in [0, {self.config.vocabulary_size}), got {wrong}"
            ) from None
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
