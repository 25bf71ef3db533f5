"""GPT-2: learned positions, pre-norm blocks; each residual addition and the norm after it are one kernel.

Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019. Names in the state dict are
those of Hugging Face's GPT2Model. Its Conv1D keeps c_attn, c_proj and c_fc as (inputs, outputs): our
torch.nn.Linear weights of these names are the transposes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lspm_models.models.cache import KeyValueCache
from lspm_models.models.operations import FUSED, Operations


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Args:
        vocabulary_size: number of token ids.
        context: most tokens that are seen at once.
        layers: number of blocks.
        heads: attention heads of a block.
        width: C, features of a token; a multiple of heads.
        dropout: probability of dropping, in training, an embedding or what a block adds; never in attention.
        bias: whether linear layers and norms have one.
        eps: added to the variance in norms.

    Raises:
        ValueError: a value breaks its rule.
    """

    vocabulary_size: int
    context: int
    layers: int
    heads: int
    width: int
    dropout: float = 0.0
    bias: bool = True
    eps: float = 1e-5

    def __post_init__(self):
        for name in ("vocabulary_size", "context", "layers", "heads", "width"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"GPTConfig: {name} must be a positive integer, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"GPTConfig: width must be a multiple of heads ({self.heads}), got {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTConfig: dropout must be in [0, 1), got {self.dropout}")
        if type(self.bias) is not bool:
            raise ValueError(f"GPTConfig: bias must be true or false, got {self.bias!r}")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"GPTConfig: eps must be positive and finite, got {self.eps}")


class LayerNorm(nn.LayerNorm):
    """Layer norm of x + residual, which comes back beside it; of x alone where there is no residual."""

    def __init__(self, config: GPTConfig, ops: Operations):
        super().__init__(config.width, eps=config.eps, bias=config.bias)
        self.ops = ops

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return self.ops.layer_norm(x, self.weight, self.bias, self.eps), x
        return self.ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig, layer: int, ops: Operations):
        super().__init__()
        self.heads, self.layer, self.ops = config.heads, layer, ops
        self.c_attn = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.c_proj = nn.Linear(config.width, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        B, T, C = x.shape
        packed = self.c_attn(x).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = packed.transpose(1, 3).unbind(2)  # (B, H, T, D), views
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = self.ops.attention(q, k, v, causal=True)
        return self.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Two linear layers with GELU, in its tanh form, between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Attention, then MLP, each after a norm and beside a residual.

    It takes and gives (x, residual) whose sum is the residual stream: the addition is left to the norm that
    follows, in the next block or at the end.
    """

    def __init__(self, config: GPTConfig, layer: int, ops: Operations):
        super().__init__()
        self.ln_1 = LayerNorm(config, ops)
        self.attn = Attention(config, layer, ops)
        self.ln_2 = LayerNorm(config, ops)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.ln_1(x, residual)
        x, residual = self.ln_2(self.attn(x, cache), residual)
        return self.mlp(x), residual


class GPT(nn.Module):
    """Features of each token from the tokens up to it.

    Args:
        config: its shape.
        ops: FUSED, our kernels, or PLAIN, the same model on plain PyTorch.
        gradient_checkpointing: keep only each block's inputs for the backward, which runs the blocks again.
    """

    def __init__(self, config: GPTConfig, *, ops: Operations = FUSED, gradient_checkpointing: bool = False):
        super().__init__()
        self.config, self.ops, self.gradient_checkpointing = config, ops, gradient_checkpointing
        self.wte = nn.Embedding(config.vocabulary_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer, ops) for layer in range(config.layers))
        self.ln_f = LayerNorm(config, ops)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's: normal with deviation 0.02; what adds to the residual is divided by sqrt(additions)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "ln_" in name:
                nn.init.ones_(parameter)
            else:
                additions = 2 * self.config.layers if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(additions))

    @property
    def parameter_count(self) -> int:
        """How many numbers are learned."""
        return sum(parameter.numel() for parameter in self.parameters())

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
            raise ValueError("GPT: cache must be used under torch.no_grad(), got gradients enabled")
        x = self._embed(tokens, cache.length if cache is not None else 0)
        residual = None
        for block in self.h:
            if self.gradient_checkpointing and cache is None:
                x, residual = checkpoint(block, x, residual, use_reentrant=False)
            else:
                x, residual = block(x, residual, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.ln_f(x, residual)[0]

    def _embed(self, tokens: Tensor, past: int) -> Tensor:
        if tokens.dtype != torch.int64 or tokens.ndim != 2:
            got = f"{tuple(tokens.shape)} {str(tokens.dtype).removeprefix('torch.')}"
            raise ValueError(f"GPT: tokens must be (B, T) int64, got {got}")
        end = past + tokens.shape[1]
        if end > self.config.context:
            raise ValueError(f"GPT: tokens must fit the context of {self.config.context}, got {end}")
        try:
            x = self.wte(tokens)
        except IndexError:  # the look-up checks each id anyway; this says which was wrong
            least, most = tokens.aminmax()
            wrong = least if least < 0 else most
            raise ValueError(
                f"GPT: tokens must be in [0, {self.config.vocabulary_size}), got {wrong}"
            ) from None
        x = self.dropout(x + self.wpe.weight[past:end])
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
