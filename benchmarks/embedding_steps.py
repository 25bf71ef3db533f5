"""A training step of a table, forward and row-wise Adagrad: as we, PyTorch and FBGEMM take it."""

from collections.abc import Callable

import torch
from bench_embedding_bag import DIM, LENGTH, indices
from torch import Tensor

import harness
import lspm_kernels

LR, EPS = 0.01, 1e-8


def fused(rows: int) -> Callable[[Tensor, Tensor], None]:
    bag = lspm_kernels.FusedEmbeddingBag(rows, DIM, mode="sum", optimizer="adagrad", lr=LR, eps=EPS)
    return lambda taken, dout: bag(taken).backward(dout)


def torchs(rows: int) -> Callable[[Tensor, Tensor], None]:
    bag = torch.nn.EmbeddingBag(rows, DIM, mode="sum", sparse=True)
    optimizer = torch.optim.Adagrad(bag.parameters(), lr=LR, eps=EPS)

    def step(taken: Tensor, dout: Tensor) -> None:
        optimizer.zero_grad()
        bag(taken).backward(dout)
        optimizer.step()

    return step


def fbgemms(rows: int) -> Callable[[Tensor, Tensor], None]:
    from fbgemm_gpu import split_table_batched_embeddings_ops_training as tables
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    place = (rows, DIM, tables.EmbeddingLocation.HOST, tables.ComputeDevice.CPU)
    exact = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": LR, "eps": EPS}
    bag = tables.SplitTableBatchedEmbeddingBagsCodegen([place], **exact)
    return lambda taken, dout: bag(taken.flatten(), torch.arange(0, taken.numel() + 1, LENGTH)).backward(dout)


def check(rows: int, kind: str) -> None:
    """Raises WrongError unless a step obeys the tests' rule, on a table of fewer rows."""
    rows = min(rows, 10_000)
    taken = indices(rows, 256, kind, torch.device("cpu"))
    found = []
    for dtype, backend in (
        (torch.float32, "cpu"),
        (torch.float64, "reference"),
        (torch.float32, "reference"),
    ):
        generator = torch.Generator().manual_seed(0)
        weight, dout = (torch.randn(n, DIM, generator=generator).to(dtype) for n in (rows, 256))
        state = torch.ones(rows, dtype=dtype)
        options = {"lr": LR, "eps": EPS, "backend": backend}
        found.append([lspm_kernels.embedding_bag_adagrad_(weight, state, dout, taken, **options), state])
    harness.compare("lspm-cpu", *found)
