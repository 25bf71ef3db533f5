"""A training step of a table, forward and row-wise Adagrad, against PyTorch's sparse gradients and FBGEMM.

torch.optim.Adagrad keeps a number for each element, so only times are compared with it, and what is right by
the reference. FBGEMM (pip install fbgemm-gpu-cpu) has the same optimizer, and is timed where it is installed.
"""

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import command
import embedding_steps
import torch
from bench_embedding_bag import BATCHES, DIM, KINDS, LENGTH, indices

import harness

SETS = 6  # batches in turn: together their rows are more than a cache holds


@dataclass(frozen=True)
class Step:
    rows: int
    bags: int
    kind: str

    def __str__(self) -> str:
        return f"embedding_bag_update/training-step/float32/{self.rows}x{DIM}-B{self.bags}-{self.kind}"


def measure(step: Step, device: str, smoke: bool) -> list[dict]:
    """Checks a step of ours; then times all in turn."""
    embedding_steps.check(step.rows, step.kind)
    makers = {"lspm-cpu": embedding_steps.fused, "torch": embedding_steps.torchs}
    if importlib.util.find_spec("fbgemm_gpu"):
        makers["fbgemm"] = embedding_steps.fbgemms
    batches = [indices(step.rows, step.bags, step.kind, torch.device("cpu"), seed) for seed in range(SETS)]
    dout, turns = torch.randn(step.bags, DIM) / 100, {}
    for name, make in makers.items():
        function, turn = make(step.rows), iter(range(2**62))
        call = lambda f=function, t=turn: f(batches[next(t) % SETS], dout)  # noqa: E731
        turns[name] = harness.repeated(call, "cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse invariant checks")  # of torch's own optimizer
        seconds = harness.interleave(turns, 1, rounds=1 if smoke else None)
    hit = sum(batch.unique().numel() for batch in batches) / SETS
    moved = hit * (3 * 4 * DIM + 8) + 2 * step.bags * 4 * DIM + 2 * 8 * step.bags * LENGTH
    rows = harness.summarise(str(step), ["lspm-cpu"], seconds)
    about = {"unit": "GB/s", "peak_bytes": None}
    for row in rows:
        goal = [harness.Goal("speedup", 2.0).judge(row)] if row["variant"] == "lspm-cpu" and not smoke else []
        row.update(about | {"rate": moved / row["median_us"] / 1e3, "goals": goal})
    return rows


def cases(smoke: bool = False) -> Iterator[Step]:
    for bags in (4,) if smoke else BATCHES:
        yield from (Step(50 if smoke else 1_000_000, bags, kind) for kind in KINDS)


if __name__ == "__main__":
    sys.exit(command.main("embedding_bag_update", __doc__, cases, measure))
