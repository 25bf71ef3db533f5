"""Language modelling: from features to the next token."""

import torch
from torch import Tensor, nn

import lspm_kernels
from lspm_models.models.blocks import project
from lspm_models.models.cache import KeyValueCache
from lspm_models.models.lora import LoraLinear
from lspm_models.models.transformer import Decoder

IGNORE_INDEX = -100


class LanguageModelling(nn.Module):
    """A GPT or a Llama with a head: the model's table of token embeddings where the config says `tied`.

    Names are those of Hugging Face's LlamaForCausalLM. In its GPT2LMHeadModel the model is called
    `transformer` instead, and the table is stored a second time as `lm_head.weight`.
    """

    def __init__(self, model: Decoder):
        super().__init__()
        self.model = model
        self.logits = None  # of read_only_, in place of a tied head
        if not self.config.tied:
            self.lm_head = nn.Linear(*reversed(model.embedding.weight.shape), bias=False)
            nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def config(self):
        """The model's."""
        return self.model.config

    @property
    def head_weight(self) -> Tensor:
        """(V, C)."""
        return self.model.embedding.weight if self.config.tied else self.lm_head.weight

    def head(self, features: Tensor) -> Tensor:
        """Logits (..., V) of features (..., C)."""
        if not self.config.tied:
            return project(self.lm_head, features, self.model.ops)
        if self.logits is None:
            return self.model.ops.linear(features, self.head_weight)
        return self.logits(features)

    def read_only_(self, dtype: torch.dtype, group_size: int | None = None) -> "LanguageModelling":
        """Makes it a model for generation alone: the weights of linear layers, and of the head, in dtype.

        Args:
            dtype, group_size: as lspm_kernels.weight_only_ takes them; the table of embeddings stays.
        """
        if self.config.tied:
            self.logits = nn.Linear(*reversed(self.head_weight.shape), bias=False, device="meta")
            self.logits.weight = self.head_weight
        lspm_kernels.weight_only_(self, dtype, group_size=group_size)
        return self

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each of tokens (B, T); see Decoder.forward."""
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
        features, weight = self.model(tokens), self.head_weight
        if not self.config.tied and isinstance(self.lm_head, LoraLinear):
            features, weight = self.lm_head.as_one_product(features)
        return self.model.ops.linear_cross_entropy(features, weight, targets, ignore_index=IGNORE_INDEX)
