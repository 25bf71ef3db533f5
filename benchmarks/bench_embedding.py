"""What stands before the blocks of GPT-2 and of BERT, and its gradients, against PyTorch's several ops."""

import functools
import itertools
import sys
from collections.abc import Iterator

import command
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels
from harness import FORWARD, TRAINING, Case, Goal
from lspm_kernels.ops import embedding as table
from lspm_kernels.reference import embedding as reference

BATCH, P, SEED = 2, 0.1, 1
# Rows of tokens, rows of positions, D, T; BERT has two types of tokens and a norm.
MODELS = {"gpt2": (50257, 1024, 768, 512), "bert": (30522, 512, 768, 512)}
SMOKE = {"gpt2": (99, 40, 64, 16), "bert": (99, 40, 64, 16)}


@functools.cache
def tokens(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.randint(rows, (BATCH, length), generator=torch.Generator().manual_seed(0)).to(device)


def torchs(length: int, weight: Tensor, positions: Tensor, *others: Tensor) -> Tensor:
    taken = tokens(len(weight), length, weight.device)
    x = F.embedding(taken, weight) + positions[:length]
    if others:
        types, norm_weight, norm_bias = others
        x = F.layer_norm(x + F.embedding(taken % 2, types), norm_weight.shape, norm_weight, norm_bias)
    return F.dropout(x, P)


def called(function, length: int, weight: Tensor, positions: Tensor, *others: Tensor, **options) -> Tensor:
    taken = tokens(len(weight), length, weight.device)
    if others:
        options |= dict(zip(("token_type_weight", "norm_weight", "norm_bias"), others, strict=True))
        options["token_types"] = taken % 2
    return function(taken, weight, position_weight=positions, dropout_p=P, seed=SEED, **options)


def case(model: str, mode: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> Case:
    rows, places, dim, length = sizes
    tables = [(rows, dim), (places, dim)] + [(2, dim), (dim,), (dim,)] * (model == "bert")
    out = BATCH * length * dim
    # Forward a row for each token, the positions once and the output. Backward the gradient of the output
    # read, and each table's written, whole; beside a norm the rows are read again.
    moved = 2 * out + length * dim
    if mode == TRAINING:
        moved += out + (rows + places) * dim + (out + length * dim) * (model == "bert")
    ours, meaning = (functools.partial(called, f.embedding, length) for f in (lspm_kernels, reference))
    return Case(
        "embedding", mode, dtype, f"{model}-{BATCH}x{length}x{dim}",
        lambda: [torch.randn(size).to(dtype) for size in tables], table, ours,
        {"torch": functools.partial(torchs, length)}, bytes=moved * dtype.itemsize,
        flops=30 * out * (1 + (mode == TRAINING)), roof="copy", goals=(Goal("speedup", 2.0),),
        meaning=meaning,
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    for mode, dtype in itertools.product((FORWARD, TRAINING), (torch.float32, torch.bfloat16)):
        for model, sizes in (SMOKE if smoke else MODELS).items():
            yield case(model, mode, dtype, sizes)


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_embedding(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("embedding", __doc__, cases))
