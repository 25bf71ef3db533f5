"""ResNets on our kernels, in evaluation and in training, against torchvision's in channels_last."""

import sys
import warnings
from collections.abc import Iterator

import command
import machine
import torch
from resnets import Run
from torch import Tensor

import harness
from lspm_kernels import FallbackWarning

SPEEDUPS = {("inference", torch.float32): 1.35, ("inference", torch.bfloat16): 2.5}
SPEEDUPS |= {("training-step", torch.float32): 1.25, ("training-step", torch.bfloat16): 1.8}


def features_and_gradient(results: list[Tensor]) -> list[Tensor]:
    """The gradient as one tensor: single ones of small norm weights have no digits of their own."""
    return [results[0], *([torch.cat([g.flatten() for g in results[1:]])] if results[1:] else [])]


def measure(run: Run, device: str, smoke: bool) -> list[dict]:
    """Checks features and gradients; times all sides in turn, and takes the memory of each."""
    variants = ("lspm", "torch") if smoke else ("lspm", "torch", "compile")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)  # plain PyTorch would be timed against itself
        steps = {variant: run.step(variant) for variant in variants}
        found = steps["lspm"](), run.step("torch", exact=True)(), steps["torch"]()
        harness.compare("lspm", *map(features_and_gradient, found))
    turns = {variant: harness.repeated(step, device) for variant, step in steps.items()}
    memory = {variant: machine.peak_bytes(step, device) for variant, step in steps.items()}
    seconds = harness.interleave(turns, 1 if smoke else harness.calls_per_turn(turns), 1 if smoke else None)
    rows = harness.summarise(str(run), ["lspm"], seconds)
    goal = harness.Goal("speedup", SPEEDUPS[run.mode, run.dtype])
    for row in rows:
        row |= {"rate": run.batch / row["median_us"] * 1e6, "unit": "images/s"}
        judged = row["variant"] == "lspm" and not smoke
        row |= {"peak_bytes": memory[row["variant"]], "goals": [goal.judge(row)] if judged else []}
    return rows


def cases(smoke: bool = False) -> Iterator[Run]:
    for dtype in (torch.float32, torch.bfloat16):
        if smoke:
            yield Run("training-step", "resnet18", dtype, 2, 32)
            continue
        yield from (Run("inference", "resnet50", dtype, batch, 224) for batch in (1, 8))
        yield Run("training-step", "resnet50", dtype, 8, 224)
        yield Run("training-step", "resnet18", dtype, 64, 32)


if __name__ == "__main__":
    sys.exit(command.main("resnet", __doc__, cases, measure))
