"""The next token of one text and of eight, against PyTorch's sort, as Hugging Face's generate draws it."""

import functools
import itertools
import sys
from collections.abc import Iterator

import command
import pytest
import torch
from torch import Tensor

import lspm_kernels
from harness import FORWARD, Case, Goal
from lspm_kernels.ops import sample as table

ROWS, TOKENS = (1, 8), (50257, 151936)  # GPT-2's and Qwen's
KINDS = {
    "all": {},
    "top_p": {"top_p": 0.95},
    "top_k-top_p": {"top_k": 50, "top_p": 0.95},
    "gumbel": {"method": "gumbel"},
}
SETTINGS = {"temperature": 0.8, "seed": 1, "return_logprob": True}


def draw(logits: Tensor, backend: str, **options) -> tuple[Tensor, Tensor]:
    return lspm_kernels.sample(logits, backend=backend, **SETTINGS, **options)


def ours(logits: Tensor, backend: str, options: dict) -> Tensor:
    return draw(logits, backend, **options)[1]


def left(logits: Tensor, top_k: int | None = None, top_p: float | None = None, method: str = "") -> Tensor:
    """Scores of what stays, by transformers' warpers, but that equal ones stay together under top-p too."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / SETTINGS["temperature"]
    if top_k is not None:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered = scores.sort().values
        removed = (ordered.softmax(-1).cumsum(-1) <= 1 - top_p).sum(-1, keepdim=True)
        scores = scores.masked_fill(scores < ordered.gather(1, removed), -torch.inf)
    return scores


def in_torch(logits: Tensor, options: dict) -> Tensor:
    return left(logits, **options).softmax(-1).multinomial(1)


def meaning(logits: Tensor, options: dict, dtype: torch.dtype) -> Tensor:
    """The log-probability of the token that the seed draws, by way of the sort."""
    drawn = draw(logits.to(dtype), "reference", **options)[0]
    return left(logits, **options).log_softmax(-1).gather(1, drawn[:, None])[:, 0]


def case(dtype: torch.dtype, rows: int, tokens: int, kind: str) -> Case:
    options, elements = KINDS[kind], rows * tokens
    return Case(
        "sample", FORWARD, dtype, f"{rows}x{tokens}-{kind}",
        lambda: [(torch.randn(rows, tokens) * 3).to(dtype)], table, functools.partial(ours, options=options),
        {"torch": functools.partial(in_torch, options=options)}, bytes=elements * dtype.itemsize,
        flops=elements * (4 if "top_k" in options else 35), roof="read",
        goals=(Goal("speedup", 5.0),), compiled=False,
        meaning=functools.partial(meaning, options=options, dtype=dtype),
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    kinds = (torch.float32, torch.bfloat16), (2,) if smoke else ROWS, (600,) if smoke else TOKENS, KINDS
    yield from itertools.starmap(case, itertools.product(*kinds))


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_sample(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("sample", __doc__, cases, gpu_cases=cases))
