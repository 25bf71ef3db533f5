"""Generation: tokens that a language model believes come next, one by one, by a key-value cache."""

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from lspm_models.models.cache import KeyValueCache
from lspm_models.tasks.language_modelling import LanguageModelling


def candidates(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that may come next and their probabilities.

    softmax(logits / temperature) is cut to the top_k most probable tokens and made to sum to one; of these,
    the nucleus stays: the most probable ones up to the first with which their sum reaches top_p.

    Args:
        logits: (B, V).
        temperature: positive; small sharpens, large flattens.
        top_k: tokens kept; all where None.
        top_p: probability kept; all where None.

    Returns:
        probabilities (B, K) float32, which sum to one, and ids (B, K) int64; where top_k or top_p is given,
        the most probable first.

    Source: top-k: Fan et al., Hierarchical Neural Story Generation, 2018; top-p: Holtzman et al., The Curious
    Case of Neural Text Degeneration, 2020.
    """
    logits = logits.float()
    if top_k is None and top_p is None:
        ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    else:
        size = logits.shape[-1]
        logits, ids = logits.topk(min(top_k or size, size))
    # The difference is at most 0, so that no temperature makes it overflow; below the smallest normal number,
    # a temperature would be rounded to 0.
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p is not None and top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < top_p)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, ids


@torch.no_grad()
def generate(
    task: LanguageModelling,
    prompt: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | Collection[int] | None = None,
    sequences: int = 1,
    stream: Callable[[int, int], bool | None] | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continues a prompt.

    Where a text outgrows the context, the model goes on with its last context // 2 tokens.

    Args:
        task: a language model; it runs in eval mode and gets its own mode back.
        prompt: (T,) ids, 1 <= T <= context.
        max_new_tokens: most tokens to add.
        temperature: 0 takes the most probable token; see candidates for others.
        top_k, top_p: see candidates.
        seed: the same seed gives the same tokens; None draws from torch's own generator.
        stop: this token, or each of these, ends a sequence, and is not part of it.
        sequences: how many continuations are made, in one batch.
        stream: called as stream(sequence, token) for each new token, in order; true ends the sequence, after
            this token.
        use_cache: False runs the whole text through the model for each token: slow, and the cache's oracle.

    Returns:
        The new tokens of each sequence.

    Raises:
        ValueError: an argument breaks its rule, or the model gives a logit that is NaN or positive infinity.
    """
    text = _as_text(prompt, task)
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    _check_counts(max_new_tokens=max_new_tokens, top_k=top_k, sequences=sequences)
    _check_sampling(temperature, top_p, seed)
    generator = None if seed is None else torch.Generator(text.device).manual_seed(seed)
    reader = _Reader(task, sequences, text.shape[1] + max_new_tokens, use_cache)
    results: list[list[int]] = [[] for _ in range(sequences)]
    unfinished = set(range(sequences))
    mode = task.training
    task.eval()
    try:
        for _ in range(max_new_tokens):
            logits = reader.logits(text).expand(sequences, -1)
            chosen = _choose(logits, temperature, top_k, top_p, generator)
            text = torch.cat([text.expand(sequences, -1), chosen], dim=1)
            for row, token in enumerate(chosen.flatten().tolist()):
                if row not in unfinished:
                    continue
                if token not in stops:
                    results[row].append(token)
                if token in stops or (stream is not None and stream(row, token)):
                    unfinished.remove(row)
            if not unfinished:
                break
    finally:
        task.train(mode)
    return results


class _Reader:
    """Logits after a growing text, of which the model sees as much as its context holds."""

    def __init__(self, task: LanguageModelling, sequences: int, most_tokens: int, use_cache: bool):
        self.task, self.sequences, self.use_cache = task, sequences, use_cache
        self.capacity = min(task.config.context, most_tokens)
        self._begin(0)

    def logits(self, text: Tensor) -> Tensor:
        """(B, V) logits of the token after text (B, T), which is longer than at the last call."""
        if text.shape[1] - self.start > self.task.config.context:
            # Positions count from 0: what is kept moves to the first ones, and so is run again.
            self._begin(text.shape[1] - max(1, self.task.config.context // 2))
        seen = self.start + (self.cache.length if self.cache is not None else 0)
        features = self.task.model(text[:, seen:], self.cache)
        return self.task.head(features[:, -1])

    def _begin(self, start: int) -> None:
        self.start = start
        config = self.task.config
        self.cache = KeyValueCache(config.layers, self.sequences, self.capacity) if self.use_cache else None


def _choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """(B, 1) ids."""
    most = logits.amax(-1, keepdim=True)  # NaN where any logit is
    if not (most < math.inf).all():
        raise ValueError(f"generate: logits must be below infinity, got {most[~(most < math.inf)][0]}")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities, ids = candidates(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return ids.gather(-1, probabilities.multinomial(1, generator=generator))


def _as_text(prompt: Sequence[int] | Tensor, task: LanguageModelling) -> Tensor:
    """(1, T) on the model's device."""
    text = torch.as_tensor(prompt, dtype=torch.int64, device=task.head_weight.device)
    context = task.config.context
    if text.ndim != 1 or not 1 <= text.shape[0] <= context:
        got = len(text) if text.ndim == 1 else f"shape {tuple(text.shape)}"
        raise ValueError(f"generate: prompt must be 1 to {context} tokens, the context, got {got}")
    return text[None]


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"generate: {name} must be at least 1, got {value}")


def _check_sampling(temperature: float, top_p: float | None, seed: int | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"generate: temperature must be finite and at least 0, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"generate: seed must be in [0, 2**64), got {seed}")
