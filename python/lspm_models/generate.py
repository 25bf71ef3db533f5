"""Generation: tokens that a language model believes come next, one by one, by a key-value cache."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

import lspm_kernels
from lspm_kernels.recording import Recording
from lspm_models.models.cache import KeyValueCache
from lspm_models.tasks.language_modelling import LanguageModelling


@torch.no_grad()
def generate(
    task: LanguageModelling,
    prompt: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    first: Collection[int] = (),
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
        max_new_tokens: how many tokens are added at most.
        temperature: 0 takes the most probable token.
        temperature, top_k, top_p, min_p, repetition_penalty: see lspm_kernels.sample. The penalty is for the
            tokens of the text so far, of which the prompt is part.
        seed: the same seed gives the same tokens; None draws from torch's own generator.
        first: the first new token is one of these; none: any.
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
    _check_counts(max_new_tokens=max_new_tokens, sequences=sequences, top_k=1 if top_k is None else top_k)
    _check_sampling(temperature, top_p, min_p, repetition_penalty, seed)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    choice = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    choice["repetition_penalty"] = repetition_penalty
    reader = _Reader(task, sequences, text.shape[1] + max_new_tokens, use_cache)
    results: list[list[int]] = [[] for _ in range(sequences)]
    unfinished = set(range(sequences))
    mode = task.training
    task.eval()
    try:
        for step in range(max_new_tokens):
            logits = reader.logits(text).expand(sequences, -1)
            if first and step == 0:
                logits = _only(logits, first)
            text = text.expand(sequences, -1)
            chosen = _choose(logits, text, choice, generator)
            text = torch.cat([text, chosen], dim=1)
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
        tokens = text[:, seen:]
        if self.cache is None or tokens.shape != (self.sequences, 1):
            return _last_logits(self.task, tokens, self.cache)
        if self.step is None:
            self.step = _Step(self.task, self.cache)
        return self.step.logits(tokens)

    def _begin(self, start: int) -> None:
        self.start, self.step = start, None
        config = self.task.config
        self.cache = KeyValueCache(config.layers, self.sequences, self.capacity) if self.use_cache else None


class _Step:
    """Logits after one more token, by the model or, once they have proven to be all of it, by its kernels.

    Of a model of a hundred million weights Python takes as long as the kernels that it calls. So the first
    step is recorded, and the next one, of another token, made both ways: where a replay gives the same bits
    it makes all that follow. What torch computes, and what hooks do, is in no recording: a model that has
    either, or is compiled, goes on by itself, and so does one whose parts or weights are replaced meanwhile.
    Values that change in place are those that kernels read.
    """

    def __init__(self, task: LanguageModelling, cache: KeyValueCache):
        self.task, self.cache = task, cache
        self.tokens: Tensor | None = None  # (B, 1), of the recording
        self.recording = Recording()
        self.found: Tensor | None = None  # logits, of the recording
        parts = list(task.modules())
        self.hooks = [modules._global_forward_hooks, modules._global_forward_pre_hooks]
        self.hooks += chain.from_iterable((part._forward_hooks, part._forward_pre_hooks) for part in parts)
        held = chain.from_iterable((part._modules, part._parameters, part._buffers) for part in parts)
        self.holders = list(filter(None, held))  # most are empty, and a step may take 100 microseconds
        self.held = list(self._held())  # which keeps them, so that their ids stay theirs
        self.ids, self.training = list(map(id, self.held)), task.training
        self.dtype = task.head_weight.dtype  # which changes in place, as by task.half()
        is_more = any(map(_has_another_forward, parts))
        self.is_proven: bool | None = False if is_more else None  # None: not tried yet

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, V) of tokens (B, 1), until the next call."""
        if self.is_proven is not False:
            is_same = list(map(id, self._held())) == self.ids and self.task.training == self.training
            is_same = is_same and self.task.head_weight.dtype == self.dtype
            if not is_same or any(self.hooks) or not tokens.is_cpu:
                self.is_proven = False
        if self.is_proven is False:
            return _last_logits(self.task, tokens, self.cache)
        if self.tokens is None:
            self.tokens = tokens.clone()
            with self.recording:
                self.found = _last_logits(self.task, self.tokens, self.cache)
            self.is_proven = False if self.recording.missed else None
            return self.found
        is_another = not (self.tokens == tokens).any()
        self.tokens.copy_(tokens)
        if self.is_proven:
            self.recording.replay()
            self.cache.advance(tokens)
            return self.found
        if is_another:
            self.recording.replay()
        logits = _last_logits(self.task, tokens, self.cache)
        if is_another:
            self.is_proven = torch.equal(logits, self.found)
        return logits

    def _held(self) -> Iterator[nn.Module | Tensor | None]:
        """What the model consists of: its parts and their tensors."""
        return chain.from_iterable(map(dict.values, self.holders))


def _has_another_forward(module: nn.Module) -> bool:
    """Whether a module is wrapped or compiled, and so may be more than its class."""
    return "forward" in vars(module) or module._compiled_call_impl is not None


def _last_logits(task: LanguageModelling, tokens: Tensor, cache: KeyValueCache | None) -> Tensor:
    """(B, V) of the token after tokens (B, T)."""
    return task.head(task.model(tokens, cache)[:, -1])


def _only(logits: Tensor, tokens: Collection[int]) -> Tensor:
    """Logits by which no token but these is chosen."""
    kept = torch.tensor(sorted(tokens), device=logits.device)
    if not 0 <= int(kept[0]) <= int(kept[-1]) < logits.shape[-1]:
        raise ValueError(f"generate: first must be ids in [0, {logits.shape[-1]}), got {sorted(tokens)}")
    return torch.full_like(logits, -math.inf).index_copy(-1, kept, logits[:, kept])


def _choose(logits: Tensor, text: Tensor, choice: dict, generator: torch.Generator | None) -> Tensor:
    """(B, 1) ids."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    chosen = lspm_kernels.sample(logits, previous=text, seed=seed, **choice)[:, None]
    if (chosen < 0).any():
        most = logits.amax(-1)  # NaN where any logit is
        broken = most[~(most.abs() < math.inf)][0]
        raise ValueError(f"generate: logits must be below infinity, one of them finite, got {broken}")
    return chosen


def _as_text(prompt: Sequence[int] | Tensor, task: LanguageModelling) -> Tensor:
    """(1, T) on the model's device."""
    text = torch.as_tensor(prompt, dtype=torch.int64, device=task.head_weight.device)
    context = task.config.context
    if text.ndim != 1 or not 1 <= text.shape[0] <= context:
        got = len(text) if text.ndim == 1 else f"shape {tuple(text.shape)}"
        raise ValueError(f"generate: prompt must be 1 to {context} tokens, the context, got {got}")
    return text[None]


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"generate: {name} must be an integer of at least 1, got {value!r}")


def _check_sampling(
    temperature: float, top_p: float | None, min_p: float | None, repetition_penalty: float, seed: int | None
) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"generate: temperature must be finite and at least 0, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"generate: min_p must be in [0, 1], got {min_p}")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"generate: repetition_penalty must be finite and above 0, got {repetition_penalty}")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64):
        raise ValueError(f"generate: seed must be in [0, 2**64), got {seed}")
