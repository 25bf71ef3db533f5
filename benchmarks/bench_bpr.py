"""A pass of Bayesian personalised ranking, against the same updates in PyTorch.

PyTorch's side takes as many pairs at once as share no row, which gives the same values, items drawn before.
"""

import sys
from collections.abc import Iterator

import command
import machine
import sgd_passes
import torch
from torch import Tensor

import harness
import lspm_kernels
from lspm_kernels.reference.bpr import DRAWS, random_bits

LR, REG = 0.05, 0.01


def groups(blocks: lspm_kernels.RatingBlocks) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Users, items and the items drawn, in groups that share no row."""
    parts, bounds = blocks.part_items.tolist(), blocks.part_offsets.tolist()
    part_of = {item: n for n in range(len(bounds) - 1) for item in parts[bounds[n] : bounds[n + 1]]}
    others, kept = [], []
    for n, item in enumerate(blocks.items.tolist()):
        first, last = bounds[part_of[item]], bounds[part_of[item] + 1]
        draws = (parts[first + (random_bits(0, n * DRAWS + k) * (last - first) >> 32)] for k in range(DRAWS))
        if (other := next((j for j in draws if j != item), None)) is not None:
            others.append(other)
            kept.append(n)
    triples = blocks.users[kept], blocks.items[kept], torch.tensor(others, dtype=torch.int32)
    order, sizes = sgd_passes.waves(triples[0], triples[1] + blocks.num_users, triples[2] + blocks.num_users)
    return list(zip(*(t[order].split(sizes) for t in triples), strict=True))


def torch_pass(p: Tensor, q: Tensor, bias: Tensor, triples: list) -> None:
    for users, items, others in triples:
        u, i, j, b, c = p[users], q[items], q[others], bias[items], bias[others]
        g = torch.sigmoid(c - b - (u * (i - j)).sum(1))
        p[users] = u + LR * (g[:, None] * (i - j) - REG * u)
        q[items], q[others] = i + LR * (g[:, None] * u - REG * i), j + LR * (-g[:, None] * u - REG * j)
        bias[items], bias[others] = b + LR * (g - REG * b), c + LR * (-g - REG * c)


def measure(run: sgd_passes.Pass, device: str, smoke: bool) -> list[dict]:
    """Checks one pass, then times passes in turn."""
    torch.manual_seed(0)
    blocks = sgd_passes.drawn(run.users, run.items, run.ratings)
    p, q, _, bias = run.tables()
    triples, tables = groups(blocks), [p, q, bias]
    results = {d: [t.to(d, copy=True) for t in tables] for d in (torch.float64, torch.float32)}
    for copies in results.values():
        torch_pass(*copies, triples)
    ours = [t.clone() for t in tables]
    lspm_kernels.bpr_(*ours, blocks, lr=LR, reg=REG)
    harness.compare("lspm-cpu", ours, results[torch.float64], results[torch.float32])
    turns = {
        "lspm-cpu": harness.repeated(lambda: lspm_kernels.bpr_(*tables, blocks, lr=LR, reg=REG), device),
        "torch": harness.repeated(lambda: torch_pass(*tables, triples), device),
    }
    rows = harness.summarise(str(run), ["lspm-cpu"], harness.interleave(turns, 1, 1 if smoke else None))
    for row in rows:
        rate = run.ratings / row["median_us"]
        row |= {"rate": rate, "unit": "M updates/s", "peak_bytes": None, "goals": []}
    return rows


def cases(smoke: bool = False) -> Iterator[sgd_passes.Pass]:
    if smoke:
        yield sgd_passes.Pass("tiny", 50, 40, 1000, factors=8, threads=1, op="bpr")
        return
    for factors in (64, 128):
        yield sgd_passes.Pass("ml-1m", *sgd_passes.SHAPES["ml-1m"], factors, 2, op="bpr")


if __name__ == "__main__":
    machine.keep_freed_memory()
    sys.exit(command.main("bpr", __doc__, cases, measure))
