"""A step of AdamW on GPT-2's 148 tensors, with and without clipping, against PyTorch's fused and foreach."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import adamw_steps
import command
import torch

import harness

W = 768
BLOCK = [(W,)] * 6 + [(3 * W,), (3 * W, W), (W, W), (4 * W,), (4 * W, W), (W, 4 * W)]
SHAPES = {"gpt2-124m": [(50257, W), (1024, W), *BLOCK * 12, (W,), (W,)], "tiny": [(70, 48), (48,), (1,)]}
# Read and written of an element: in float32 a gradient, and the parameter and both moments twice; in bfloat16
# a gradient and a parameter, and in float32 the master and both moments twice.
BYTES = 28


@dataclass(frozen=True)
class Step:
    dtype: torch.dtype  # bfloat16 with float32 masters
    clip: bool
    name: str

    def __str__(self) -> str:
        kind = "float32" if self.dtype == torch.float32 else "bfloat16-master"
        return f"adamw/step/{kind}/{self.name}{'-clip' * self.clip}"


def measure(step: Step, device: str, smoke: bool) -> list[dict]:
    """Checks two steps on small tensors; then times all in turn."""
    adamw_steps.check(SHAPES["tiny"], step.dtype, step.clip, device)
    mine = "lspm-cpu" if device == "cpu" else "lspm-triton"
    makers = {mine: adamw_steps.lspms}
    makers |= {"torch": partial(adamw_steps.torchs, fused=True)}
    makers |= {"foreach": partial(adamw_steps.torchs, foreach=True)}
    turns = {}
    for name, make in makers.items():
        params = adamw_steps.parameters(SHAPES[step.name], step.dtype, device)
        turns[name] = harness.repeated(make(params, step.clip), device)
    moved = (BYTES + step.clip * step.dtype.itemsize) * sum(p.numel() for p in params)
    copy = partial(harness.MEMORY["copy"](device), moved)
    turns["roof"] = harness.repeated(copy, device)
    seconds = harness.interleave(turns, 1, rounds=1 if smoke else None)
    rows = harness.summarise(str(step), [mine], seconds, "copy")
    for row in rows:
        judged = step.clip and row["variant"] == "lspm-cpu" and not smoke
        row |= {"unit": "GB/s", "peak_bytes": None, "rate": moved / row["median_us"] / 1e3}
        row["goals"] = [harness.Goal("speedup", 1.15).judge(row)] if judged else []
    return rows


def cases(smoke: bool = False) -> Iterator[Step]:
    for dtype in (torch.float32, torch.bfloat16):
        yield from (Step(dtype, clip, "tiny" if smoke else "gpt2-124m") for clip in (True, False))


if __name__ == "__main__":
    sys.exit(command.main("adamw", __doc__, cases, measure))
