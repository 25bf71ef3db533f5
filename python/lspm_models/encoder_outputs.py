"""From an encoder to what a person reads: the tokens that may stand where one is hidden, and likenesses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lspm_models.data.mask_tokenizer import MaskTokenizer
from lspm_models.language_models import name_of
from lspm_models.models.bert import Bert, BertConfig
from lspm_models.pretrained import Pretrained
from lspm_models.run_folder import RunCheckpoint
from lspm_models.sources import open_source
from lspm_models.tasks.masked_language_modelling import MaskedLanguageModelling

BATCH = 64  # sentences at once


def filled(path: str | Path, texts: Sequence[str], top: int, device: str | torch.device) -> Iterator[str]:
    """Yields, for each hidden token of each text, a line with the most probable tokens.

    Args:
        path: a run folder, one checkpoint in it, or Hugging Face's folder, of a BERT.
        texts: with [MASK], or what the tokenizer calls it, where a token is hidden.
        top: tokens per line.
        device: where the model shall be.

    Raises:
        ValueError: there is no BERT with its head, or a text has no hidden token, or is too long.
    """
    source = _opened(path)
    tokenizer, task = source.tokenizer(), source.task().to(device)
    for text in texts:
        probabilities = mask_probabilities(task, tokenizer, text)
        for place, row in enumerate(probabilities, 1):
            values, ids = row.topk(min(top, int((row > 0).sum())))
            found = (
                f"{_shown(tokenizer.decode([i]))} {p:.1%}" for p, i in zip(values, ids.tolist(), strict=True)
            )
            which = f"{place} of {len(probabilities)}:  " if len(probabilities) > 1 else ""
            yield f"{text}   {which}{'  '.join(found)}"


@torch.no_grad()
def mask_probabilities(task: MaskedLanguageModelling, tokenizer: MaskTokenizer, text: str) -> Tensor:
    """(N, V) float32: what may stand at each of N hidden tokens; special tokens have 0.

    Raises:
        ValueError: a text has no hidden token, or is too long.
    """
    ids = tokenizer.encode_masked(text)
    if tokenizer.marks.mask not in ids:
        raise ValueError(f"predict: text must hold {tokenizer.mask_name}, got {text!r}")
    tokens = _padded([ids], tokenizer, task.config)[0].to(task.head_weight.device)
    features = task.model(tokens)[tokens == tokenizer.marks.mask]
    special = torch.from_numpy(tokenizer.special).to(features.device)
    return task.head(features).float().masked_fill(special, -torch.inf).softmax(-1)


def similarities(path: str | Path, texts: Sequence[str], device: str | torch.device) -> Iterator[str]:
    """Yields the lines of a table: the cosine of the mean features of each text with those of each other."""
    source = _opened(path)
    tokenizer, model = source.tokenizer(), source.model().to(device)
    features = sentence_features(model, tokenizer, texts)
    yield " ".join(f"{index + 1:>6}" for index in range(len(texts)))
    for index, row in enumerate((features @ features.T).tolist()):
        yield " ".join(f"{value:6.3f}" for value in row) + f"   {index + 1} {texts[index]}"


@torch.no_grad()
def sentence_features(model: Bert, tokenizer: MaskTokenizer, sentences: Sequence[str]) -> Tensor:
    """(N, C) float32: the mean of each sentence's features, marks included, of length 1.

    Raises:
        ValueError: a sentence is too long.

    Source: Reimers and Gurevych, Sentence-BERT, 2019, section 3.
    """
    marks, device = tokenizer.marks, model.embedding.weight.device
    rows = [[marks.begin, *ids.tolist(), marks.separator] for ids in tokenizer.encode_batch(sentences)]
    found = []
    for start in range(0, len(rows), BATCH):
        tokens, mask = _padded(rows[start : start + BATCH], tokenizer, model.config)
        tokens, mask = tokens.to(device), mask.to(device)
        features = model(tokens, mask).float() * mask[..., None]
        found.append(F.normalize(features.sum(1) / mask.sum(1, keepdim=True), dim=-1))
    return torch.cat(found)


def _padded(
    rows: Sequence[Sequence[int]], tokenizer: MaskTokenizer, config: BertConfig
) -> tuple[Tensor, Tensor]:
    """(B, T) ids and the mask that shows them."""
    most = max(map(len, rows))
    if most > config.context:
        raise ValueError(f"predict: text must be at most {config.context} tokens with its marks, got {most}")
    ids = np.full((len(rows), most), tokenizer.marks.padding)
    for row, given in zip(ids, rows, strict=True):
        row[: len(given)] = given
    lengths = torch.tensor([len(row) for row in rows])
    return torch.from_numpy(ids), torch.arange(most) < lengths[:, None]


def _opened(path: str | Path) -> RunCheckpoint | Pretrained:
    source = open_source(path)
    if not isinstance(source.config, BertConfig):
        got = f"a {name_of(source.config)} in {path}; see generate.py --prompt"
        raise ValueError(f"predict: text must have a BERT, got {got}")
    return source


def _shown(token: str) -> str:
    """A token as it is, or in quotes where its beginning or its end would not show."""
    return token if token and token.strip() == token and token.isprintable() else repr(token)
