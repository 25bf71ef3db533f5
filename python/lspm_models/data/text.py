"""Text for training: from a corpus to random blocks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lspm_models.data.corpus import NAMED, Corpus, open_corpus
from lspm_models.data.tokenizers import KINDS, Tokenizer, load_tokenizer, save_tokenizer
from lspm_models.data.tokens import Tokens, tokens_for
from lspm_models.progress import counted

SPLITS = ("auto", "document", "tail")


@dataclass(frozen=True)
class TextConfig:
    """Which text, and how it becomes tokens."""

    corpus: tuple[str, ...] = field(
        default=("stdlib",), metadata={"help": f"text files, folders, or names: {', '.join(NAMED)}"}
    )
    max_bytes: int | None = field(
        default=None,
        metadata={"help": "use about so many bytes, picked from all over the corpus", "default": "all"},
    )
    tokenizer: str = field(
        default="bpe",
        metadata={"help": "byte-level BPE, or one token per character", "choices": tuple(KINDS)},
    )
    vocabulary_size: int = field(default=8192, metadata={"help": "tokens at most"})
    tokenizer_sample: int = field(
        default=16_000_000, metadata={"help": "bytes of text the tokenizer learns from"}
    )
    validation: float = field(default=0.05, metadata={"help": "share of the corpus kept for validation"})
    split: str = field(
        default="auto",
        metadata={
            "help": "keep whole documents or the tail of the text; auto: documents where there are enough",
            "choices": SPLITS,
        },
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "corpus", tuple(self.corpus))
        if not self.corpus or "" in self.corpus:  # which as a path is the folder where the script runs
            raise ValueError("data: corpus must name a file, a folder or a corpus, got nothing")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"data: max_bytes must be at least 1, got {self.max_bytes}")
        if self.tokenizer_sample < 1:
            raise ValueError(f"data: tokenizer_sample must be at least 1, got {self.tokenizer_sample}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"data: validation must be at least 0 and less than 1, got {self.validation}")
        for name, choices in (("tokenizer", tuple(KINDS)), ("split", SPLITS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"data: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )


def prepare_text(
    config: TextConfig,
    folder: Path,
    report: Callable[[str], None] = lambda line: None,
    mark: Callable[[Tokenizer], Tokenizer] = lambda tokenizer: tokenizer,
) -> tuple[Tokenizer, Tokens]:
    """Makes the tokenizer and the token file of a run, or opens those its folder holds already.

    Args:
        config: which text, which tokenizer.
        folder: the run folder; gets tokenizer.json and tokens/.
        report: takes lines for the reader.
        mark: makes of a new tokenizer the one that the model needs.

    Raises:
        ValueError: the corpus or an option is not usable; the message names it.
    """
    corpus = open_corpus(config.corpus)
    if config.max_bytes is not None:
        corpus = corpus.subset(config.max_bytes)
    count = counted(len(corpus.documents), "document")
    skipped = f", {corpus.skipped} binary left out" if corpus.skipped else ""
    report(f"corpus     {corpus.name}: {count}, {corpus.size / 1e6:,.1f} MB{skipped}")
    path = Path(folder) / "tokenizer.json"
    if path.exists():
        tokenizer = load_tokenizer(path)
    else:
        tokenizer = mark(train_tokenizer(corpus, config))
        save_tokenizer(tokenizer, path)
    report(f"tokenizer  {tokenizer.kind.replace('_', ' ')}, {tokenizer.vocabulary_size:,} tokens")
    tokens = tokens_for(
        corpus,
        tokenizer,
        Path(folder) / "tokens",
        validation=config.validation,
        split=config.split,
        report=report,
    )
    return tokenizer, tokens


def train_tokenizer(corpus: Corpus, config: TextConfig) -> Tokenizer:
    """Learns a tokenizer from a bounded sample picked from all over the corpus."""
    sample = corpus.subset(config.tokenizer_sample)
    texts = (piece for document in sample.documents for piece in document.pieces())
    return KINDS[config.tokenizer].train(texts, config.vocabulary_size)


class TextBlocks:
    """Blocks of consecutive tokens at random places; the whole state is a generator's.

    Every process draws the places of all processes and keeps its own share, so one state serves all.

    Args:
        ids: (N,) token ids.
        block: tokens per sequence.
        batch_size: sequences per batch and process.
        seed: of the generator.
        process: which share this process keeps, of `processes`.
    """

    def __init__(
        self, ids: np.ndarray, block: int, batch_size: int, *, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        self._ids, self._block, self._batch_size = ids, block, batch_size
        self._process, self._processes = process, processes
        self._generator = np.random.default_rng(seed)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets, (batch_size, block) int64; targets are the inputs one token later."""
        starts = self._generator.integers(
            len(self._ids) - self._block, size=(self._processes, self._batch_size)
        )
        return _blocks(self._ids, starts[self._process], self._block)

    def state(self) -> dict:
        """Returns the generator's state, as JSON can hold it."""
        return self._generator.bit_generator.state

    def restore(self, state: dict) -> None:
        """Continues exactly where state() was taken."""
        self._generator.bit_generator.state = state


class TextData:
    """The training and validation blocks that fit() asks for.

    Args:
        tokens: the ids of a corpus.
        block: tokens per sequence.
        batch_size: sequences per batch and process.
        validation_batches: batches at most per evaluation.
        seed: of the training blocks.
        process: which share this process trains on, of `processes`.

    Raises:
        ValueError: the corpus is shorter than one block of training and, if wanted, one of validation.
    """

    def __init__(
        self,
        tokens: Tokens,
        block: int,
        batch_size: int,
        *,
        validation_batches: int = 16,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        count, boundary, needed = len(tokens.ids), tokens.boundary, block + 1  # a target for the last token
        if boundary < count:  # validation is wanted: each part gets at least one block
            boundary, needed = max(needed, min(boundary, count - needed)), 2 * needed
        if count < needed:
            parts = "one training and one validation block" if needed > block + 1 else "one block"
            raise ValueError(
                f"corpus: text must hold at least {needed} tokens ({parts} of {block}), got {count}"
            )
        self.fingerprint = tokens.fingerprint
        self.training = TextBlocks(
            tokens.ids[:boundary], block, batch_size, seed=seed, process=process, processes=processes
        )
        self._validation, self._block, self._batch_size = tokens.ids[boundary:], block, batch_size
        self._batches = validation_batches

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the same evenly spread, non-overlapping blocks every time."""
        available = max(0, (len(self._validation) - 1) // self._block)
        count = min(available, self._batches * self._batch_size)
        starts = np.linspace(0, available - 1, count).astype(np.int64) * self._block
        for first in range(0, count, self._batch_size):
            yield _blocks(self._validation, starts[first : first + self._batch_size], self._block)


def _blocks(ids: np.ndarray, starts: np.ndarray, block: int) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(np.stack([ids[start : start + block + 1] for start in starts]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
