"""Masked language modelling: from features to the tokens that were hidden."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lspm_kernels.reference.bias_act import ACTIVATIONS
from lspm_models.models.bert import Bert
from lspm_models.models.blocks import LayerNorm, project
from lspm_models.tasks.language_modelling import IGNORE_INDEX


class Predictions(nn.Module):
    """What the head adds to the table of token embeddings: a layer before it, and a bias."""

    def __init__(self, model: Bert):
        super().__init__()
        config = model.config
        self.activation, self.ops = config.activation, model.ops
        dense = nn.Linear(config.width, config.width)
        nn.init.normal_(dense.weight, std=0.02)
        nn.init.zeros_(dense.bias)
        norm = LayerNorm(config.width, config.eps, True, 0.0, model.ops)
        self.transform = nn.ModuleDict({"dense": dense, "LayerNorm": norm})
        self.bias = nn.Parameter(torch.zeros(config.vocabulary_size))

    def forward(self, features: Tensor) -> Tensor:
        """What the table is multiplied with (..., C), of features (..., C)."""
        x = ACTIVATIONS[self.activation](project(self.transform["dense"], features, self.ops))
        return self.transform["LayerNorm"](x)[0]


class MaskedLanguageModelling(nn.Module):
    """A BERT with a head whose matrix is the model's table of token embeddings.

    Names are those of Hugging Face's BertForMaskedLM, in which the model is called `bert` and the bias and
    the table are stored a second time as `cls.predictions.decoder`. A pooler stays as it is: no loss here
    depends on it.
    """

    metric_names = ("accuracy",)

    def __init__(self, model: Bert):
        super().__init__()
        self.model = model
        self.cls = nn.ModuleDict({"predictions": Predictions(model)})
        if model.config.pooler:
            model.pooler.requires_grad_(False)

    @property
    def config(self):
        """The model's."""
        return self.model.config

    @property
    def head_weight(self) -> Tensor:
        """(V, C)."""
        return self.model.embedding.weight

    def head(self, features: Tensor) -> Tensor:
        """Logits (..., V) of features (..., C)."""
        predictions = self.cls["predictions"]
        return F.linear(predictions(features), self.head_weight, predictions.bias)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) of the token at each place; see Bert.forward."""
        return self.head(self.model(tokens, mask, token_types))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats, in float32; the head sees no token but those that count.

        Args:
            tokens: (B, T) int64 ids.
            targets: (B, T) int64, the id that was hidden, or -100 where none counts.

        Returns:
            A scalar; NaN where no target counts.

        Raises:
            ValueError: targets have another shape than tokens.
        """
        features, targets = self._counted(tokens, targets)
        return self._loss(self.cls["predictions"](features), targets)

    def evaluate(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and how many hidden tokens were found, of how many."""
        features, targets = self._counted(tokens, targets)
        hidden, predictions = self.cls["predictions"](features), self.cls["predictions"]
        found = F.linear(hidden, self.head_weight, predictions.bias).argmax(-1) == targets
        sums = torch.stack([found.sum(), (targets != IGNORE_INDEX).sum()])
        return self._loss(hidden, targets), sums

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """The share of hidden tokens that were found."""
        return {"accuracy": sums[0] / max(sums[1], 1)}

    def _counted(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, C) and targets (N,) of the places that count."""
        if targets.shape != tokens.shape:
            shapes = f"{tuple(tokens.shape)}, got {tuple(targets.shape)}"
            raise ValueError(f"MaskedLanguageModelling.loss: targets must have the shape of tokens {shapes}")
        features, targets = self.model(tokens).flatten(0, 1), targets.flatten()
        if torch.compiler.is_compiling():  # a graph has no sizes that depend on values
            return features, targets
        places = (targets != IGNORE_INDEX).nonzero().flatten()
        return features.index_select(0, places), targets[places]

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        bias, loss = self.cls["predictions"].bias, self.model.ops.linear_cross_entropy
        return loss(hidden, self.head_weight, targets, bias=bias, ignore_index=IGNORE_INDEX)
