"""Question answering: from the features of a question and a text to the part of the text that answers it.

Source: Devlin et al., BERT, 2019, sections 4.2 and 4.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lspm_kernels import cross_entropy
from lspm_models.tasks.sequence_classification import encode


class QuestionAnswering(nn.Module):
    """A language model without its head, and a linear layer to the logits of an answer's two ends.

    The first token stands for no answer. Names are those of Hugging Face's BertForQuestionAnswering and its
    GPT-2's and Llama's but for the model's own.

    Args:
        model: gives the features.
        longest: tokens of an answer at most, where one is chosen.
    """

    unit = "window"
    metric_names = ("accuracy",)

    def __init__(self, model: nn.Module, longest: int = 30) -> None:
        super().__init__()
        if longest < 1:
            raise ValueError(f"QuestionAnswering: longest must be at least 1, got {longest}")
        self.model, self.longest = model, longest
        self.qa_outputs = nn.Linear(model.config.width, 2)
        nn.init.normal_(self.qa_outputs.weight, std=0.02)  # as GPT-2 and BERT draw theirs
        nn.init.zeros_(self.qa_outputs.bias)

    @property
    def config(self):
        """The model's."""
        return self.model.config

    def forward(self, tokens: Tensor, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T) float32 of the first and of the last token; -inf behind the end of a row.

        Args:
            tokens: (B, T) int64, -1 behind the end of each row.
            contexts: (B, 2) int64: first and last token of the text that is asked about.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        features, _ = encode(self.model, tokens, (places >= contexts[:, :1]).long())
        logits = self.qa_outputs(features).float().masked_fill((tokens < 0)[:, :, None], -torch.inf)
        return logits[:, :, 0], logits[:, :, 1]

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean of both ends' mean cross-entropies in nats, in float32.

        Args:
            tokens: (B, T) int64, -1 behind the end of each row.
            targets: (B, 4) int64: first and last token of the answer, both 0 for none, and of the text.
        """
        return _loss(self(tokens, targets[:, 2:]), targets)

    def evaluate(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and of how many rows of how many the most probable answer, or none, is the right one."""
        logits = self(tokens, targets[:, 2:])
        scores, spans, none = best_spans(*logits, targets[:, 2:], self.longest)
        spans = spans.masked_fill((none > scores)[:, None], 0)
        right = (spans == targets[:, :2]).all(1).sum()
        return _loss(logits, targets), torch.stack([right, torch.full_like(right, len(targets))])

    def metrics(self, sums: list[float]) -> dict[str, float]:
        """Returns the share of rows whose answer is right to the token."""
        right, count = sums
        return {"accuracy": right / count}


def _loss(logits: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    first, last = logits
    return (cross_entropy(first, targets[:, 0]) + cross_entropy(last, targets[:, 1])) / 2


def best_spans(first: Tensor, last: Tensor, contexts: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable answers in the contexts of rows.

    Args:
        first, last: logits (B, T).
        contexts: (B, 2) int64, the first and the last token of each row that may be part of an answer.
        longest: tokens of an answer at most.

    Returns:
        The sums (B,) of an answer's two logits, its tokens (B, 2), and the sums (B,) for no answer.
    """
    places = torch.arange(first.shape[1], device=first.device)
    outside = (places < contexts[:, :1]) | (places > contexts[:, 1:])
    begin, end = (logits.masked_fill(outside, -torch.inf) for logits in (first, last))
    longest = min(longest, first.shape[1])
    ends = F.pad(end, (0, longest - 1), value=-torch.inf).unfold(1, longest, 1)  # (B, T, longest)
    scores, index = (begin[:, :, None] + ends).flatten(1).max(1)
    start = index // longest
    return scores, torch.stack([start, start + index % longest], 1), first[:, 0] + last[:, 0]
