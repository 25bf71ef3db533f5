"""200 steps of a tiny GPT on our kernels, against the very same steps on plain PyTorch and in float64.

Our losses may be at most twice as far from float64's as plain PyTorch's are: as far as rounding takes them.
"""

import dataclasses
import inspect
import sys
import textwrap
import tomllib
from collections.abc import Iterator

import command
import machine
import torch
from convergence import SIDES, Convergence
from training import TINY

import harness
from lspm_models.data.text import TextConfig
from lspm_models.models.gpt import GPTConfig

STEPS = 200
LAST = 20  # steps whose mean is the loss at the end


def measure(run: Convergence, device: str, smoke: bool) -> list[dict]:
    """Trains each side, and holds our losses to the oracle's rule."""
    losses = {side: run.losses(side, device) for side in SIDES}
    truth = losses["float64"]
    harness.compare("lspm", [losses["lspm"]], [truth], [losses["torch"]])
    columns = {"case": str(run)}
    for side in ("lspm", "torch", "float64"):
        columns[f"loss at the end, {side}"] = f"{losses[side][-LAST:].double().mean():.6f}"
    for side in SIDES[:-1]:
        columns[f"{side} from float64, at most"] = f"{(losses[side] - truth).abs().max():.1e}"
    columns["lspm from torch, at most"] = f"{(losses['lspm'] - losses['torch']).abs().max():.1e}"
    curves = {side: curve.tolist() for side, curve in losses.items()}
    return [{"case": str(run), "variant": f"lspm-{device}", "columns": columns, "losses": curves}]


def cases(smoke: bool = False) -> Iterator[Convergence]:
    for dtype in (torch.float32, torch.bfloat16):
        yield dataclasses.replace(tiny(20) if smoke else gpt_tiny(STEPS), dtype=dtype)


def tiny(steps: int) -> Convergence:
    """On the characters of one module."""
    text = TextConfig(corpus=(inspect.getfile(textwrap),), tokenizer="character", vocabulary_size=128)
    return Convergence("tiny", TINY, text, torch.float32, steps, batch=4)


def gpt_tiny(steps: int) -> Convergence:
    config = tomllib.loads((machine.ROOT / "python" / "configs" / "gpt_tiny.toml").read_text())
    text, training = TextConfig(**config["data"]), config["training"]
    shape = GPTConfig(text.vocabulary_size, **config["model"])
    options = {"batch": training["batch_size"], "learning_rate": training["learning_rate"]}
    return Convergence("gpt_tiny", shape, text, torch.float32, steps, **options)


if __name__ == "__main__":
    sys.exit(command.main("convergence", __doc__, cases, measure))
