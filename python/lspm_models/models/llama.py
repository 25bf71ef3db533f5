"""Llama: rotary positions, RMS norms, grouped attention, SwiGLU, no biases.

Source: Touvron et al., LLaMA: Open and Efficient Foundation Language Models, 2023; grouped heads: Ainslie et
al., GQA, 2023. Names in the state dict are those of Hugging Face's LlamaModel.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from lspm_models.models.blocks import (
    Block,
    GatedMLP,
    GroupedAttention,
    RMSNorm,
    Rotation,
    check_eps,
    check_positive,
)
from lspm_models.models.cache import KeyValueCache
from lspm_models.models.operations import FUSED, Operations
from lspm_models.models.transformer import Decoder

ROPE_SCALINGS = ("none", "linear", "llama3")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama.

    Args:
        vocabulary_size: number of token ids.
        context: most tokens that are seen at once.
        layers: number of blocks.
        heads: heads of queries of a block.
        key_value_heads: heads of keys and values, which divide heads.
        width: C, features of a token.
        hidden: features between the layers of an MLP.
        head_size: D, features of a head, even; 0: width / heads.
        tied: the head is the table of token embeddings.
        eps: added to the mean square in norms.
        theta: base of the rotation's wavelengths.
        rope_scaling: "none"; "linear": angles are divided by rope_factor; "llama3": only those of waves that
            are long against rope_context are, and those between in part.
        rope_factor: what angles are divided by.
        rope_low, rope_high, rope_context: waves longer than rope_context / rope_low are divided, waves
            shorter than rope_context / rope_high are not.

    Raises:
        ValueError: a value breaks its rule.
    """

    vocabulary_size: int
    context: int
    layers: int
    heads: int
    key_value_heads: int
    width: int
    hidden: int
    head_size: int = 0
    tied: bool = False
    eps: float = 1e-5
    theta: float = 10_000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_context: int = 8192

    def __post_init__(self):
        check_positive(
            self, "vocabulary_size", "context", "layers", "heads", "key_value_heads", "width", "hidden",
            "rope_context",
        )  # fmt: skip
        if self.heads % self.key_value_heads:
            raise ValueError(
                f"LlamaConfig: heads must be a multiple of key_value_heads ({self.key_value_heads}), "
                f"got {self.heads}"
            )
        if self.head_size == 0:
            if self.width % self.heads:
                raise ValueError(
                    f"LlamaConfig: width must be a multiple of heads ({self.heads}), got {self.width}"
                )
            object.__setattr__(self, "head_size", self.width // self.heads)
        if type(self.head_size) is not int or self.head_size < 2 or self.head_size % 2:
            raise ValueError(f"LlamaConfig: head_size must be even and positive, got {self.head_size!r}")
        if type(self.tied) is not bool:
            raise ValueError(f"LlamaConfig: tied must be true or false, got {self.tied!r}")
        check_eps(self)
        if self.rope_scaling not in ROPE_SCALINGS:
            known = ", ".join(ROPE_SCALINGS)
            raise ValueError(f"LlamaConfig: rope_scaling must be one of {known}, got {self.rope_scaling!r}")
        for name in ("theta", "rope_factor", "rope_low", "rope_high"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"LlamaConfig: {name} must be positive and finite, got {getattr(self, name)}"
                )
        if self.rope_low >= self.rope_high:
            raise ValueError(
                f"LlamaConfig: rope_low must be less than rope_high ({self.rope_high}), got {self.rope_low}"
            )


class Llama(Decoder):
    """Features of each token from the tokens up to it.

    Args:
        config: its shape.
        ops: FUSED, our kernels, or PLAIN, the same model on plain PyTorch.
        gradient_checkpointing: keep only each block's inputs for the backward, which runs the blocks again.
    """

    embedding = property(lambda self: self.embed_tokens)
    blocks = property(lambda self: self.layers)

    def __init__(self, config: LlamaConfig, *, ops: Operations = FUSED, gradient_checkpointing: bool = False):
        super().__init__(ops, gradient_checkpointing)
        self.config = config
        heads = config.heads, config.key_value_heads, config.head_size
        self.embed_tokens = nn.Embedding(config.vocabulary_size, config.width)
        self.layers = nn.ModuleList(
            Block(
                input_layernorm=RMSNorm(config.width, config.eps, ops),
                self_attn=GroupedAttention(config.width, *heads, layer, ops),
                post_attention_layernorm=RMSNorm(config.width, config.eps, ops),
                mlp=GatedMLP(config.width, config.hidden, ops),
            )
            for layer in range(config.layers)
        )
        self.norm = RMSNorm(config.width, config.eps, ops)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights as GPT-2 does."""
        self.initialize(outputs=("o_proj", "down_proj"))

    def rotation(self, places: int, cache: KeyValueCache | None) -> Rotation:
        """Cosines and sines (places or the cache's capacity, D / 2)."""
        device = self.embed_tokens.weight.device
        if cache is None:
            return _angles(self.config, places, device)
        if cache.rotation is None:
            cache.rotation = _angles(self.config, cache.capacity, device)
        return cache.rotation


def _angles(config: LlamaConfig, positions: int, device: torch.device) -> Rotation:
    # In float32 whatever the model's dtype, as transformers has it: weights were trained with these angles.
    pairs = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / config.theta ** (pairs / config.head_size)
    scaled = frequencies / config.rope_factor
    if config.rope_scaling == "linear":
        frequencies = scaled
    elif config.rope_scaling == "llama3":
        waves = config.rope_context / (2 * math.pi / frequencies)  # that fit into the context
        kept = ((waves - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)
        frequencies = (1 - kept) * scaled + kept * frequencies
    places = torch.arange(positions, dtype=torch.float32, device=device)
    angles = places[:, None] * frequencies  # not a matmul, which autocast would round
    return angles.cos(), angles.sin()
