"""Whole texts as rows of tokens: batches of similar lengths, padded behind each end with -1."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lspm_models.data.mask_tokenizer import MaskTokenizer
from lspm_models.data.tokenizers import Tokenizer

PADDING = -1  # no id, so that a batch tells its lengths
POOL = 32  # batches whose rows are sorted by length together: little padding, and still batches by chance


@dataclass(frozen=True)
class Sequences:
    """Rows of token ids of any length, and what each shall give.

    Args:
        tokens: N arrays of ids.
        targets: (N,) or (N, K) int64.
    """

    tokens: Sequence[np.ndarray]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each row has, (N,) int64."""
        return np.array([len(row) for row in self.tokens], np.int64)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns tokens (B, T) int64, as wide as the longest row, and targets (B,) or (B, K) int64."""
        rows = [self.tokens[index] for index in indices]
        return padded(rows), torch.from_numpy(self.targets[indices])

    def fingerprint(self) -> bytes:
        """Returns a hash of all rows and targets."""
        digest = hashlib.blake2b(self.lengths.tobytes(), digest_size=16)
        for row in self.tokens:
            digest.update(np.asarray(row, np.int64).tobytes())
        digest.update(np.ascontiguousarray(self.targets).tobytes())
        return digest.digest()


def padded(rows: Sequence[np.ndarray]) -> Tensor:
    """Returns rows of ids as (B, T) int64, -1 behind the end of each."""
    tokens = np.full((len(rows), max(map(len, rows))), PADDING, np.int64)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(tokens)


def begin_and_end(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids before and behind a whole text: what a model has read around the texts it learned."""
    begin = [tokenizer.marks.begin] if isinstance(tokenizer, MaskTokenizer) else tokenizer.prompt(None)
    return begin, [tokenizer.end_of_text]


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[list[np.ndarray], list[int]]:
    """Returns the rows of whole texts, and of how many tokens each was cut.

    Args:
        texts: as they are.
        tokenizer: what encodes them.
        length: tokens of a row at most.

    Raises:
        ValueError: length leaves room for nothing.
    """
    begin, end = begin_and_end(tokenizer)
    room = length - len(begin) - len(end)
    if room < 1:
        raise ValueError(f"data: length must be at least {len(begin) + len(end) + 1}, got {length}")
    encoded = tokenizer.encode_batch(texts)
    rows = [np.concatenate([begin, ids[:room], end]).astype(np.int32) for ids in encoded]
    return rows, [max(len(ids) - room, 0) for ids in encoded]


class SequenceBatches:
    """Training batches; the whole state is how many were drawn.

    In every epoch all rows come once, in a new order, the last batch filled up with the epoch's first rows.
    Every process draws the rows of all and keeps its own share.

    Args:
        sequences: the rows.
        batch_size: rows per batch and process.
        seed: of the orders.
        process: which share this process keeps, of `processes`.
    """

    def __init__(
        self, sequences: Sequences, batch_size: int, *, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        self._sequences, self._lengths = sequences, sequences.lengths
        self._batch_size, self._seed = batch_size, seed
        self._process, self._processes = process, processes
        self._drawn, self._epoch, self._batches = 0, -1, np.empty((0, 0), np.int64)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Returns what Sequences.batch gives."""
        step = self._batch_size * self._processes
        count = -(-len(self._sequences) // step)
        epoch, place = divmod(self._drawn, count)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch, count, step)
        self._drawn += 1
        return self._sequences.batch(self._batches[place, self._process :: self._processes])

    def state(self) -> dict:
        """Returns the place in the row of batches, as JSON can hold it."""
        return {"drawn": self._drawn, "seed": self._seed}

    def restore(self, state: dict) -> None:
        """Continues exactly where state() was taken."""
        self._drawn, self._seed, self._epoch = state["drawn"], state["seed"], -1

    def _shuffled(self, epoch: int, count: int, step: int) -> np.ndarray:
        generator = np.random.default_rng([self._seed, epoch])
        order = np.resize(generator.permutation(len(self._sequences)), count * step)
        for first in range(0, len(order), POOL * step):
            pool = order[first : first + POOL * step]
            pool[:] = pool[np.argsort(self._lengths[pool], kind="stable")]
        return generator.permutation(order.reshape(count, step))


class SequenceData:
    """The training and validation batches that fit() asks for.

    Args:
        training: rows to learn from.
        held_out: rows to validate on; may be none.
        batch_size: rows per batch and process.
        validation_batches: batches at most per evaluation.
        seed: of the order of training rows.
        process: which share this process trains on, of `processes`.
    """

    def __init__(
        self,
        training: Sequences,
        held_out: Sequences,
        batch_size: int,
        *,
        validation_batches: int = 16,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.held_out = held_out
        self.training = SequenceBatches(training, batch_size, seed=seed, process=process, processes=processes)
        fingerprints = training.fingerprint() + held_out.fingerprint()
        self.fingerprint = hashlib.blake2b(fingerprints, digest_size=16).hexdigest()
        self._batch_size, self._most = batch_size, validation_batches * batch_size

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the same evenly spread rows every time."""
        count = min(self._most, len(self.held_out))
        chosen = np.linspace(0, len(self.held_out) - 1, count).astype(np.int64)
        yield from (self.held_out.batch(indices) for indices in self._batches(chosen))

    def all_held_out(self) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Yields every row that was set aside: places (B,) among them, tokens and targets."""
        for indices in self._batches(np.arange(len(self.held_out))):
            yield indices, *self.held_out.batch(indices)

    def _batches(self, chosen: np.ndarray) -> Iterator[np.ndarray]:
        order = chosen[np.argsort(self.held_out.lengths[chosen], kind="stable")]
        yield from (
            order[first : first + self._batch_size] for first in range(0, len(order), self._batch_size)
        )
