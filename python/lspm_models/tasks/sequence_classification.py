"""Classification of whole texts: from the features of tokens to a text's class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lspm_kernels import cross_entropy
from lspm_models.models.transformer import Decoder
from lspm_models.tasks.language_modelling import IGNORE_INDEX

POOLINGS = ("last", "mean", "first")


def encode(model: nn.Module, tokens: Tensor, token_types: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features of padded rows, those of a row alone.

    Args:
        model: a decoder, no token of which sees the padding behind it; or an encoder, called with tokens, a
            mask (B, T) bool that is true at tokens, and token_types.
        tokens: (B, T) int64 ids, -1 behind the end of each row.
        token_types: (B, T) int64, what part of its row a token is of.

    Returns:
        (B, T, C), without meaning behind the ends, and lengths (B,).
    """
    inside = tokens >= 0
    ids, lengths = tokens.clamp(min=0), inside.sum(1)
    if isinstance(model, Decoder):
        return model(ids), lengths
    return model(ids, None if bool(inside.all()) else inside, token_types), lengths


class SequenceClassification(nn.Module):
    """A language model without its head, a pool over the tokens, and a linear layer.

    Names, and where biases are, are those of Hugging Face's GPT2ForSequenceClassification and its Llama's
    with pooling "last", and of its BertForSequenceClassification with "first", in which the layer is called
    `classifier`.

    Args:
        model: gives the features.
        classes: how many.
        pooling: "last": the last token's features, "mean": the mean of all tokens', "first": what an
            encoder's pooler makes of the first token's.
        dropout: probability of dropping, in training, one of the features pooled.
        label_smoothing: probability that the targets give to all classes alike, in training.
        language_modelling: weight, in training, of the loss of each token's next one, which keeps a small set
            of texts from being learned by heart; of a decoder whose head is its table of embeddings.

    Raises:
        ValueError: pooling is another, classes are fewer than 2, or the model has no such head.

    Source: Radford et al., Improving Language Understanding by Generative Pre-Training, 2018, equation 5.
    """

    unit = "text"
    metric_names = ("accuracy", "f1")

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        *,
        pooling: str = "last",
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        language_modelling: float = 0.0,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            known = ", ".join(POOLINGS)
            raise ValueError(f"SequenceClassification: pooling must be one of {known}, got {pooling!r}")
        if pooling == "first" and isinstance(model, Decoder):
            name = type(model).__name__
            raise ValueError(
                f"SequenceClassification: pooling of a {name}, whose first token sees no other, must be "
                "last or mean, got 'first'"
            )
        if classes < 2:
            raise ValueError(f"SequenceClassification: classes must be at least 2, got {classes}")
        if language_modelling and not (isinstance(model, Decoder) and model.config.tied):
            got = f"{language_modelling} of a {type(model).__name__}"
            raise ValueError(
                "SequenceClassification: language_modelling must be 0 of a model without a tied head for the "
                f"next token, got {got}"
            )
        self.model, self.classes, self.pooling = model, classes, pooling
        self.label_smoothing, self.language_modelling = label_smoothing, language_modelling
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(model.config.width, classes, bias=pooling == "first")
        nn.init.normal_(self.score.weight, std=0.02)  # as GPT-2 and BERT draw theirs
        if self.score.bias is not None:
            nn.init.zeros_(self.score.bias)

    @property
    def config(self):
        """The model's."""
        return self.model.config

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, classes) of tokens (B, T) int64, -1 behind the end of each text."""
        return self._logits(*encode(self.model, tokens))

    def _logits(self, features: Tensor, lengths: Tensor) -> Tensor:
        return self.score(self.dropout(self.pooled(features, lengths)))

    def pooled(self, features: Tensor, lengths: Tensor) -> Tensor:
        """One feature vector (B, C) for each text out of (B, T, C)."""
        if self.pooling == "last":
            return features[torch.arange(len(features), device=features.device), lengths - 1]
        if self.pooling == "first":
            return self.model.pooled(features)
        inside = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
        return features.masked_fill(~inside[:, :, None], 0).sum(1) / lengths[:, None].to(features.dtype)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats, in float32, to classes (B,) int64, with that to the next tokens."""
        features, lengths = encode(self.model, tokens)
        logits = self._logits(features, lengths).float()
        loss = cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        if not self.language_modelling:
            return loss
        following = tokens[:, 1:].masked_fill(tokens[:, 1:] < 0, IGNORE_INDEX)
        weight, of_tokens = self.model.embedding.weight, self.model.ops.linear_cross_entropy
        return loss + self.language_modelling * of_tokens(
            features[:, :-1], weight, following, ignore_index=IGNORE_INDEX
        )

    def evaluate(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy without smoothing, and the counts of true and predicted classes."""
        logits = self(tokens).float()
        pairs = targets * self.classes + logits.argmax(1)
        return cross_entropy(logits, targets), torch.bincount(pairs, minlength=self.classes**2)

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Returns the share of texts whose most probable class is right, and the mean of the classes' F1.

        A class that is neither there nor predicted does not count.
        """
        counts = torch.tensor(sums, dtype=torch.float64).view(self.classes, self.classes)
        right, either = counts.diagonal(), counts.sum(0) + counts.sum(1)
        return {
            "accuracy": (right.sum() / counts.sum()).item(),
            "f1": (2 * right / either).nanmean().item(),
        }
