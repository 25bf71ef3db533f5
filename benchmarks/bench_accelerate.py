"""Models of transformers and torchvision before and after lspm_kernels.accelerate, in one line each."""

import itertools
import sys
import warnings
from collections.abc import Iterator

import command
import torch
import zoo
from drop_ins import VARIANTS, ZOO, DropIn

import harness
from lspm_kernels import FallbackWarning

F32, BF16 = torch.float32, torch.bfloat16
INFERENCE, TRAINING = "inference", "training-step"
SPEEDUPS = {  # x the better of torch's two ways
    ("gpt2", TRAINING, F32): 1.6,
    ("gpt2", TRAINING, BF16): 2.0,
    ("bert", INFERENCE, F32): 1.5,
    ("bert", TRAINING, F32): 1.5,
    ("vit", INFERENCE, BF16): 1.4,
    ("resnet50", INFERENCE, F32): 1.3,
    ("resnet50", TRAINING, F32): 1.2,
}
NO_SLOWER = 0.97  # x eager: what is measured twice differs by as much
COMPILED = ZOO + "llama", ZOO + "resnet18"


def measure(case: DropIn, device: str, smoke: bool) -> list[dict]:
    """Checks outputs and gradients; times all sides in turn, and takes the memory of each."""
    is_one_of_many = case.name.startswith(ZOO)
    brief = smoke or (is_one_of_many and case.name not in COMPILED)
    variants = VARIANTS[:2] if brief else VARIANTS
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)  # plain PyTorch would be timed against itself
        steps = {variant: case.step(variant) for variant in variants}
        found = [step(logits=True) for step in (steps["lspm"], case.step("exact"), steps["torch"])]
        harness.compare("lspm", *map(harness.one_gradient, found))
    del found
    turns = {variant: harness.repeated(step, device) for variant, step in steps.items()}
    memory = {} if smoke or is_one_of_many else {variant: case.peak_bytes(variant) for variant in variants}
    seconds = harness.interleave(turns, 1 if smoke else harness.calls_per_turn(turns), 1 if smoke else None)
    rows = harness.summarise(str(case), ["lspm"], seconds)
    for row in rows:
        row |= {"rate": None, "unit": None, "peak_bytes": memory.get(row["variant"]), "goals": []}
    if not smoke:
        bound = SPEEDUPS.get((case.name, case.mode, case.dtype), NO_SLOWER if is_one_of_many else None)
        what, ratio = "better", min(rows[0]["speedup"].values())
        if is_one_of_many:
            what, ratio = "speedup", rows[0]["speedup"]["torch"]
        if bound is not None:
            rows[0]["goals"] = [{"what": what, "bound": bound, "got": ratio, "met": ratio >= bound}]
    return rows


def cases(smoke: bool = False) -> Iterator[DropIn]:
    if smoke:
        yield from (DropIn(name, TRAINING, F32, smoke=True) for name in ("gpt2", "bert"))
        return
    for name in ("gpt2", "bert", "vit", "resnet50"):
        for mode in (INFERENCE, TRAINING):
            yield from (DropIn(name, mode, dtype) for dtype in (F32, BF16))
    for name, dtype, mode in itertools.product(zoo.names(), (F32, BF16), (INFERENCE, TRAINING)):
        if (name, dtype, mode) != ("faster_rcnn", BF16, INFERENCE):  # torchvision's nms has no bfloat16
            yield DropIn(ZOO + name, mode, dtype)


if __name__ == "__main__":
    sys.exit(command.main("accelerate", __doc__, cases, measure))
