"""Language modelling: from features to the next token."""

import torch.nn.functional as F
from torch import Tensor, nn

from lspm_models.models.cache import KeyValueCache
from lspm_models.models.gpt import GPT, GPTConfig

IGNORE_INDEX = -100


class LanguageModelling(nn.Module):
    """A GPT with a head that is its table of token embeddings.

    In Hugging Face's GPT2LMHeadModel the model is called `transformer` instead, and the table is stored a
    second time as `lm_head.weight`.
    """

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    @property
    def config(self) -> GPTConfig:
        """The model's."""
        return self.model.config

    def head(self, features: Tensor) -> Tensor:
        """Logits (..., V) of features (..., C)."""
        return F.linear(features, self.model.wte.weight)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each of tokens (B, T); see GPT.forward."""
        return self.head(self.model(tokens, cache))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats, in float32; without the logits of all tokens at once.

        Args:
            tokens: (B, T) int64 ids.
            targets: (B, T) int64, the id that follows each token, or -100 where none counts.

        Returns:
            A scalar; NaN where no target counts, as of torch's cross_entropy.

        Raises:
            ValueError: targets have another shape than tokens.
        """
        if targets.shape != tokens.shape:
            shapes = f"{tuple(tokens.shape)}, got {tuple(targets.shape)}"
            raise ValueError(f"LanguageModelling.loss: targets must have the shape of tokens {shapes}")
        features, table = self.model(tokens), self.model.wte.weight
        return self.model.ops.linear_cross_entropy(features, table, targets, ignore_index=IGNORE_INDEX)
