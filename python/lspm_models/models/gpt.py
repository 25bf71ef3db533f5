"""GPT-2: learned positions, pre-norm blocks of packed attention and GELU, a tied head.

Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019. Names in the state dict are
those of Hugging Face's GPT2Model. Its Conv1D keeps c_attn, c_proj and c_fc as (inputs, outputs): our
torch.nn.Linear weights of these names are the transposes.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lspm_models.models.blocks import (
    MLP,
    Block,
    LayerNorm,
    PackedAttention,
    check_dropout,
    check_eps,
    check_heads,
    check_positive,
)
from lspm_models.models.operations import FUSED, Operations
from lspm_models.models.transformer import Decoder


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

    tied: ClassVar[bool] = True  # the head is the table of token embeddings
    vocabulary_size: int
    context: int
    layers: int
    heads: int
    width: int
    dropout: float = 0.0
    bias: bool = True
    eps: float = 1e-5

    def __post_init__(self):
        check_positive(self, "vocabulary_size", "context", "layers", "heads", "width")
        check_heads(self)
        check_dropout(self)
        if type(self.bias) is not bool:
            raise ValueError(f"GPTConfig: bias must be true or false, got {self.bias!r}")
        check_eps(self)


class GPT(Decoder):
    """Features of each token from the tokens up to it.

    Args:
        config: its shape.
        ops: FUSED, our kernels, or PLAIN, the same model on plain PyTorch.
        gradient_checkpointing: keep only each block's inputs for the backward, which runs the blocks again.
    """

    embedding = property(lambda self: self.wte)
    blocks = property(lambda self: self.h)
    norm = property(lambda self: self.ln_f)

    def __init__(self, config: GPTConfig, *, ops: Operations = FUSED, gradient_checkpointing: bool = False):
        super().__init__(ops, gradient_checkpointing)
        self.config = config
        width, bias, dropout = config.width, config.bias, config.dropout
        self.wte = nn.Embedding(config.vocabulary_size, width)
        self.wpe = nn.Embedding(config.context, width)
        self.h = nn.ModuleList(
            Block(
                ln_1=LayerNorm(width, config.eps, bias, dropout, ops),
                attn=PackedAttention(width, config.heads, bias, layer, ops),
                ln_2=LayerNorm(width, config.eps, bias, dropout, ops),
                mlp=MLP(width, bias, ops),
            )
            for layer in range(config.layers)
        )
        self.ln_f = LayerNorm(width, config.eps, bias, dropout, ops)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights as GPT-2 does."""
        self.initialize(outputs=("c_proj",))

    def embedded(self, tokens: Tensor, past: int | Tensor) -> Tensor:
        """With learned positions, and dropped of in training."""
        p = self.config.dropout if self.training else 0.0
        tables = {"position_weight": self.wpe.weight, "positions": past}
        return self.ops.embedding(tokens, self.wte.weight, **tables, dropout_p=p)
