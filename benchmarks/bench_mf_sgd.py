"""A pass of stochastic gradient descent over ratings, against the same updates in PyTorch, and LIBMF's own.

PyTorch's side takes as many ratings at once as share no row, which gives the same values. LIBMF (mf-train on
PATH, built with -DUSEAVX) factorises without biases and with a rate for each row; Surprise (pip install
scikit-surprise) takes the same steps one by one. On every side a pass is timed that follows others.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import command
import machine
import sgd_passes
import torch

import harness
import lspm_kernels
from lspm_kernels.ops import mf_sgd as table

MOST_OF_TORCH = 2_000_000  # ratings; more take it minutes
GOALS = harness.Goal("libmf", 2.0), harness.Goal("surprise", 15.0)
STEP = {"mean": 3.0, "lr": 0.005, "reg": 0.02}


def measure(run: sgd_passes.Pass, device: str, smoke: bool) -> list[dict]:
    """Checks one pass, then times passes in turn."""
    torch.manual_seed(0)
    blocks = sgd_passes.drawn(run.users, run.items, run.ratings, grid=64 if device == "cuda" else None)
    tables, on_device = [t.to(device) for t in run.tables()], blocks.to(device)
    kernels = [row.name for row in table.BACKENDS if row.device == device and row.missing() is None]
    passes: dict[str, Callable] = {
        f"lspm-{name}": partial(lspm_kernels.mf_sgd_, *tables, on_device, **STEP, backend=name)
        for name in kernels
    }
    if run.ratings <= MOST_OF_TORCH:
        waves = [tuple(t.to(device) for t in group) for group in sgd_passes.groups_of(blocks)]
        if run.dtype == torch.float32:  # bfloat16 is rounded at random
            sgd_passes.check(kernels, tables, on_device, waves, **STEP)
        passes["torch"] = lambda: sgd_passes.torch_pass(*tables, waves, **STEP)
    turns = {name: sgd_passes.warm(harness.repeated(f, device)) for name, f in passes.items()}
    if device == "cpu" and not smoke:
        turns |= sgd_passes.others(run, blocks)
    threads = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        seconds = harness.interleave(turns, calls=1, rounds=1 if smoke else None)
    finally:
        torch.set_num_threads(threads)
    rows = harness.summarise(str(run), [f"lspm-{name}" for name in kernels], seconds)
    for row in rows:
        row |= {"rate": run.ratings / row["median_us"], "unit": "M updates/s", "peak_bytes": None}
        judged = GOALS if run.dtype == torch.float32 else ()
        row["goals"] = [goal.judge(row) for goal in judged if goal.what in row["speedup"]]
    return rows


def cases(smoke: bool = False) -> Iterator[sgd_passes.Pass]:
    if smoke:
        yield sgd_passes.Pass("tiny", 50, 40, 1000, factors=8, threads=1)
        return
    for name, factors, threads in itertools.product(sgd_passes.SHAPES, (32, 64, 128), (1, 2)):
        yield sgd_passes.Pass(name, *sgd_passes.SHAPES[name], factors, threads)
    yield sgd_passes.Pass("ml-1m", *sgd_passes.SHAPES["ml-1m"], 64, 2, torch.bfloat16)


def gpu_cases() -> list[sgd_passes.Pass]:
    return [sgd_passes.Pass("ml-1m", *sgd_passes.SHAPES["ml-1m"], factors, 1) for factors in (64, 128)]


if __name__ == "__main__":
    machine.keep_freed_memory()
    sys.exit(command.main("mf_sgd", __doc__, cases, measure, gpu_cases))
