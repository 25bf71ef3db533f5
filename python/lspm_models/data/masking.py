"""Masked text for training: random blocks of tokens, some of which are hidden."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lspm_models.data.mask_tokenizer import MaskTokenizer
from lspm_models.data.text import TextBlocks, TextConfig, TextData
from lspm_models.data.tokens import Tokens
from lspm_models.options import option
from lspm_models.tasks.language_modelling import IGNORE_INDEX

HIDDEN, OTHER = 0.8, 0.9  # up to the first a mask stands for a chosen token, up to the second any token


@dataclass(frozen=True)
class MaskedTextConfig(TextConfig):
    """Which text, how it becomes tokens, and how many are hidden."""

    masked: float = option(0.15, "share of the tokens that is hidden and to be found")
    whole_words: bool = option(False, "hide all tokens of a word or none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.masked < 1:
            raise ValueError(f"data: masked must be greater than 0 and less than 1, got {self.masked}")


class Masking:
    """BERT's: of each token that is chosen, 80% become the mask, 10% another token, 10% stay as they are.

    Tokens, or words, are chosen each by itself with one probability, at least one of each text; the
    tokenizer's special tokens never.

    Args:
        tokenizer: says which tokens are special, and what a word is.
        share: the probability of being chosen.
        whole_words: all tokens of a word are chosen, or none; see MaskTokenizer.joins.

    Source: Devlin et al., BERT, 2019, section 3.1.
    """

    def __init__(self, tokenizer: MaskTokenizer, share: float, *, whole_words: bool = False) -> None:
        self._tokenizer, self._share, self._whole_words = tokenizer, share, whole_words
        self._ordinary = np.flatnonzero(~tokenizer.special)

    @property
    def special(self) -> np.ndarray:
        """(V,) bool: the tokenizer's."""
        return self._tokenizer.special

    def hide(self, ids: np.ndarray, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Returns (B, T + 2) int64 inputs, between the marks of a text, and targets: -100 but where chosen.

        The same rows get the same masks, however they lie in batches.
        """
        marks, draws = self._tokenizer.marks, generator.random((*ids.shape, 3))
        chance = draws[..., 0]
        if self._whole_words:
            joined = self._tokenizer.joins(ids)
            begins = np.maximum.accumulate(np.where(joined, 0, np.arange(ids.shape[1])), axis=1)
            chance = np.take_along_axis(chance, begins, axis=1)
        chance = np.where(self._tokenizer.special[ids], np.inf, chance)
        least = chance.min(axis=1, keepdims=True)
        chosen = (chance < self._share) | ((chance == least) & np.isfinite(least))
        any_token = self._ordinary[(draws[..., 2] * len(self._ordinary)).astype(np.int64)]
        stand_ins = np.where(draws[..., 1] < HIDDEN, marks.mask, any_token)
        inputs = np.where(chosen & (draws[..., 1] < OTHER), stand_ins, ids)
        targets = np.where(chosen, ids, IGNORE_INDEX)
        return (
            _between(inputs, marks.begin, marks.separator),
            _between(targets, IGNORE_INDEX, IGNORE_INDEX),
        )


class MaskedBlocks:
    """Blocks of tokens at random places with random masks; the whole state is two generators'.

    Args:
        blocks: the places.
        masking: what hides tokens.
        seed: of the masks.
        process: which share of the masks this process draws, of `processes`.
    """

    def __init__(
        self, blocks: TextBlocks, masking: Masking, *, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        self._blocks, self._masking = blocks, masking
        self._process, self._processes = process, processes
        self._generator = np.random.default_rng([seed, 1])  # not the places' own numbers

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets; see Masking.hide."""
        ids, _ = self._blocks.next_batch()
        # Every process draws the seeds of all, so that one state serves all.
        seeds = self._generator.integers(1 << 63, size=self._processes)
        return self._masking.hide(ids.numpy(), np.random.default_rng(seeds[self._process]))

    def state(self) -> dict:
        """Returns the generators' states, as JSON can hold them."""
        return {"places": self._blocks.state(), "masks": self._generator.bit_generator.state}

    def restore(self, state: dict) -> None:
        """Continues exactly where state() was taken."""
        self._blocks.restore(state["places"])
        self._generator.bit_generator.state = state["masks"]


class MaskedTextData:
    """The masked blocks that fit() asks for; those of validation are masked the same way every time.

    Args:
        tokens: the ids of a corpus.
        masking: what hides tokens.
        context: tokens per sequence, of which the marks around a text are two.
        batch_size, validation_batches, seed, process, processes: as TextData's.

    Raises:
        ValueError: the context has no room for a token, or the corpus is too short.
    """

    def __init__(
        self,
        tokens: Tokens,
        masking: Masking,
        context: int,
        batch_size: int,
        *,
        validation_batches: int = 16,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if context < 3:
            raise ValueError(f"model: context must be at least 3, a token between two marks, got {context}")
        self._text = TextData(
            tokens,
            context - 2,
            batch_size,
            validation_batches=validation_batches,
            seed=seed,
            process=process,
            processes=processes,
        )
        self._masking, self._tokens = masking, tokens
        self.fingerprint = tokens.fingerprint
        self.training = MaskedBlocks(
            self._text.training, masking, seed=seed, process=process, processes=processes
        )

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the same evenly spread blocks with the same masks every time."""
        generator = np.random.default_rng(0)
        for ids, _ in self._text.validation():
            yield self._masking.hide(ids.numpy(), generator)

    def unigram_accuracy(self) -> float | None:
        """The share of validation's hidden tokens that the training text's most frequent token is, if any."""
        counts = np.bincount(self._tokens.ids[: self._tokens.boundary])
        counts[self._masking.special[: len(counts)]] = 0
        hidden = [targets[targets != IGNORE_INDEX] for _, targets in self.validation()]
        return float((torch.cat(hidden) == int(counts.argmax())).double().mean()) if hidden else None


def _between(ids: np.ndarray, begin: int, end: int) -> Tensor:
    return torch.from_numpy(np.pad(ids, ((0, 0), (1, 1)), constant_values=((0, 0), (begin, end))))
