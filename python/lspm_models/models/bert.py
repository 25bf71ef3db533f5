"""BERT: token types, post-norm blocks that see both sides, GELU.

Source: Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers, 2019. Names in the state dict
are those of Hugging Face's BertModel.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lspm_kernels.reference.bias_act import ACTIVATIONS
from lspm_models.models.blocks import (
    LayerNorm,
    are_linear,
    check_dropout,
    check_eps,
    check_heads,
    check_positive,
    project,
)
from lspm_models.models.operations import FUSED, Operations
from lspm_models.models.transformer import Transformer, ids_of, in_autocast


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT.

    Args:
        vocabulary_size: number of token ids.
        context: most tokens that are seen at once.
        layers: number of blocks.
        heads: attention heads of a block.
        width: C, features of a token; a multiple of heads.
        hidden: features between the layers of an MLP; 0: 4 width.
        token_types: parts that a text may have, such as a question and what is asked about.
        dropout: probability of dropping, in training, an embedding, a probability of attention, or what is
            added to the residual.
        activation: of the MLPs and of the head: "gelu", "gelu_tanh", "relu" or "silu".
        eps: added to the variance in norms.
        pooler: a layer on the first token's features, for tasks on whole texts.

    Raises:
        ValueError: a value breaks its rule.
    """

    tied: ClassVar[bool] = True  # the head is the table of token embeddings
    vocabulary_size: int
    context: int
    layers: int
    heads: int
    width: int
    hidden: int = 0
    token_types: int = 2
    dropout: float = 0.0
    activation: str = "gelu"
    eps: float = 1e-12
    pooler: bool = False

    def __post_init__(self):
        check_positive(self, "vocabulary_size", "context", "layers", "heads", "width", "token_types")
        check_heads(self)
        if self.hidden == 0:
            object.__setattr__(self, "hidden", 4 * self.width)
        check_positive(self, "hidden")
        check_dropout(self)
        if self.activation not in ACTIVATIONS:
            rule = f"one of {', '.join(ACTIVATIONS)}"
            raise ValueError(f"BertConfig: activation must be {rule}, got {self.activation!r}")
        if type(self.pooler) is not bool:
            raise ValueError(f"BertConfig: pooler must be true or false, got {self.pooler!r}")
        check_eps(self)


class Embeddings(nn.Module):
    """What a token is, where it stands and which part it is of, summed and normed."""

    def __init__(self, config: BertConfig, ops: Operations):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embeddings = nn.Embedding(config.context, config.width)
        self.token_type_embeddings = nn.Embedding(config.token_types, config.width)
        self.LayerNorm = LayerNorm(config.width, config.eps, True, 0.0, ops)
        self.ops, self.dropout = ops, config.dropout

    def forward(self, tokens: Tensor, token_types: Tensor | None) -> Tensor:
        """(B, T, C) of tokens and their types (B, T), 0 where None."""
        types, norm = self.token_type_embeddings.weight, self.LayerNorm
        kinds = torch.zeros_like(tokens) if token_types is None else token_types
        with ids_of(
            "Bert", tokens=(tokens, len(self.word_embeddings.weight)), token_types=(kinds, len(types))
        ):
            return self.ops.embedding(
                tokens, self.word_embeddings.weight, position_weight=self.position_embeddings.weight,
                token_type_weight=types, token_types=kinds, norm_weight=norm.weight, norm_bias=norm.bias,
                eps=norm.eps, dropout_p=self.dropout if self.training else 0.0,
            )  # fmt: skip


class SelfAttention(nn.Module):
    """Attention of every token to every token that the mask shows."""

    def __init__(self, config: BertConfig, ops: Operations):
        super().__init__()
        self.ops, self.heads, self.dropout = ops, config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        projections = self.query, self.key, self.value
        packed = (project(layer, x, self.ops) for layer in projections)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in packed)  # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        return self.ops.attention(q, k, v, mask=mask, dropout_p=dropout).transpose(1, 2).flatten(2)


class Output(nn.Module):
    """The last layer of attention or of an MLP, and the norm of its sum with what that read."""

    def __init__(self, features: int, config: BertConfig, ops: Operations):
        super().__init__()
        self.dense = nn.Linear(features, config.width)
        self.LayerNorm = LayerNorm(config.width, config.eps, True, config.dropout, ops)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """The norm of what the last layer gave, dropped of, and the residual."""
        return self.LayerNorm(x, residual)[0]


class Layer(nn.Module):
    """Attention, then MLP, each with a norm behind the sum with what it read."""

    def __init__(self, config: BertConfig, ops: Operations):
        super().__init__()
        self.ops, self.activation = ops, config.activation
        output = Output(config.width, config, ops)
        self.attention = nn.ModuleDict({"self": SelfAttention(config, ops), "output": output})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.width, config.hidden)})
        self.output = Output(config.hidden, config, ops)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        output = self.attention["output"]
        x = output.add(project(output.dense, self.attention["self"](x, mask), self.ops), x)
        return self.output.add(self.mlp(x), x)

    def mlp(self, x: Tensor) -> Tensor:
        """(B, T, C)."""
        first, last = self.intermediate["dense"], self.output.dense
        if not are_linear(first, last):
            hidden = ACTIVATIONS[self.activation](project(first, x, self.ops))
            return project(last, hidden, self.ops)
        layers = first.weight, first.bias, last.weight, last.bias
        return self.ops.mlp(x, *layers, activation=self.activation)


class Bert(Transformer):
    """Features of each token from all tokens of its text.

    Args:
        config: its shape.
        ops: FUSED, our kernels, or PLAIN, the same model on plain PyTorch.
        gradient_checkpointing: keep only each block's inputs for the backward, which runs the blocks again.
    """

    embedding = property(lambda self: self.embeddings.word_embeddings)
    blocks = property(lambda self: self.encoder["layer"])

    def __init__(self, config: BertConfig, *, ops: Operations = FUSED, gradient_checkpointing: bool = False):
        super().__init__(ops, gradient_checkpointing)
        self.config = config
        self.embeddings = Embeddings(config, ops)
        layers = nn.ModuleList(Layer(config, ops) for _ in range(config.layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        if config.pooler:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.width, config.width)})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights as BERT does."""
        self.initialize(outputs=())

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Features after the last norm.

        Args:
            tokens: (B, T) int64 ids; T at most the context.
            mask: (B, T), bool, or integers as tokenizers give them: true where a token is to be seen, false
                where there is padding; None: all. What stands at padding is of no use.
            token_types: (B, T) int64, from 0 to below config.token_types; None: all 0.

        Returns:
            (B, T, C).

        Raises:
            ValueError: an argument breaks a rule above.
        """
        for name, given in (("mask", mask), ("token_types", token_types)):
            if given is not None and given.shape != tokens.shape:
                shapes = f"{tuple(tokens.shape)}, got {tuple(given.shape)}"
                raise ValueError(f"Bert: {name} must have the shape of tokens {shapes}")
        self.check(tokens)
        x = in_autocast(self.embeddings(tokens, token_types))
        visible = None if mask is None else mask.bool()[:, None, None]  # (B, 1, 1, T)
        for block in self.blocks:
            if self.gradient_checkpointing:
                x = checkpoint(block, x, visible, use_reentrant=False)
            else:
                x = block(x, visible)
        return x

    def pooled(self, features: Tensor) -> Tensor:
        """(B, C) of features (B, T, C): what the pooler makes of the first token's."""
        if not self.config.pooler:
            raise ValueError("Bert: pooled must be of a model with a pooler, got pooler=False")
        return torch.tanh(project(self.pooler["dense"], features[:, 0], self.ops))
