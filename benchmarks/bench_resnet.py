"""ResNets on our kernels, in evaluation and in training, against torchvision's in channels_last."""

import sys
import warnings
from collections.abc import Iterator

import command
import torch
from resnets import SMALL, Run

import harness
from lspm_kernels import FallbackWarning

SPEEDUPS = {("inference", torch.float32): 1.35, ("inference", torch.bfloat16): 2.5}
SMALL_SPEEDUP, MEMORY = 1.5, 75.0  # of images below SMALL; percent of torch's peak in training
SPEEDUPS |= {("training-step", torch.float32): 1.25, ("training-step", torch.bfloat16): 1.8}


def measure(run: Run, device: str, smoke: bool) -> list[dict]:
    """Checks features and gradients; times all sides in turn, and takes the memory of each."""
    variants = ("lspm", "torch") if smoke else run.variants
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)  # plain PyTorch would be timed against itself
        steps = {variant: run.step(variant, device=device) for variant in variants}
        found = steps["lspm"](), run.step("torch", True, device)(), steps["torch"]()
        harness.compare("lspm", *map(harness.one_gradient, found))
    turns = {variant: harness.repeated(step, device) for variant, step in steps.items()}
    memory = {variant: run.peak_bytes(variant, device) for variant in ("lspm", "torch")}
    seconds = harness.interleave(turns, 1 if smoke else harness.calls_per_turn(turns), 1 if smoke else None)
    rows = harness.summarise(str(run), ["lspm"], seconds)
    for row in rows:
        row |= {"rate": run.batch / row["median_us"] * 1e6, "unit": "images/s"}
        row |= {"peak_bytes": memory.get(row["variant"]), "goals": []}
    if not smoke and device == "cpu":
        rows[0]["goals"] = goals(run, rows[0]["speedup"], memory)
    return rows


def goals(run: Run, speedup: dict[str, float], memory: dict[str, int]) -> list[dict]:
    """What is asked for against the better of torch's two ways, against OpenVINO, and of memory."""
    best = min(speedup["torch"], speedup.get("compile", float("inf")))
    small = run.mode != "inference" and run.size < SMALL
    found = [("speedup", SMALL_SPEEDUP if small else SPEEDUPS[run.mode, run.dtype], best)]
    if "openvino" in speedup:
        found.append(("openvino", 1.0, speedup["openvino"]))
    found = [{"what": w, "bound": bound, "got": got, "met": got >= bound} for w, bound, got in found]
    if run.mode != "inference":
        share = 100 * memory["lspm"] / memory["torch"]
        found.append({"what": "memory", "bound": MEMORY, "got": share, "met": share <= MEMORY})
    return found


def cases(smoke: bool = False) -> Iterator[Run]:
    for dtype in (torch.float32, torch.bfloat16):
        if smoke:
            yield Run("training-step", "resnet18", dtype, 2, 32)
            continue
        yield from (Run("inference", "resnet50", dtype, batch, 224) for batch in (1, 8))
        yield Run("training-step", "resnet50", dtype, 8, 224)
        yield Run("training-step", "resnet18", dtype, 64, 32)


def gpu_cases() -> Iterator[Run]:
    for mode in ("inference", "training-step"):
        yield Run(mode, "resnet50", torch.bfloat16, 128, 224)


if __name__ == "__main__":
    sys.exit(command.main("resnet", __doc__, cases, measure, gpu_cases))
