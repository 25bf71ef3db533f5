"""One training step of a GPT on our kernels, against the very same model on plain PyTorch.

GPT-2 at 2 x 512 tokens is also timed against transformers', eager and compiled; its goals are of the better.
"""

import sys
import tomllib
import warnings
from collections.abc import Iterator

import command
import machine
import torch
from training import THEIRS, TINY, VARIANTS, Training, goals

import harness
from lspm_kernels import FallbackWarning
from lspm_models.language_models import CONFIGS as SHAPES

CONFIGS = machine.ROOT / "python" / "configs"
BATCHES = (  # sequences and tokens of each
    ("llama_demo", 4, 256),
    ("gpt_demo", 8, 256),
    ("gpt2_124m", 1, 256),
    ("gpt2_124m", 2, 512),
)
GPU_BATCHES = {"gpt_demo": (64, 256), "gpt2_124m": (16, 1024)}


def measure(training: Training, device: str, smoke: bool) -> list[dict]:
    """Checks losses and gradients; times both sides in turn; takes the memory of each by itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)  # plain PyTorch would be timed against itself
            ours = training.results("lspm", device)
    except FallbackWarning as fallback:
        raise harness.WrongError(str(fallback)) from None
    truth, plain = training.results("torch", device, exact=True), training.results("torch", device)
    harness.compare("lspm", ours, truth, plain)
    del ours, truth, plain
    theirs = THEIRS if training.tokens == 512 and device == "cpu" else ()
    variants = (*VARIANTS, *theirs)
    memory = {variant: training.peak_bytes(variant, device) for variant in variants}
    turns = {variant: harness.repeated(training.step(variant, device), device) for variant in variants}
    calls = 1 if smoke else harness.calls_per_turn(turns)
    seconds = harness.interleave(turns, calls, rounds=1 if smoke else None)
    rows = harness.summarise(str(training), ["lspm"], seconds)
    for row in rows:
        row["rate"] = training.batch * training.tokens / row["median_us"] * 1e6
        row |= {"unit": "tokens/s", "peak_bytes": memory[row["variant"]], "goals": []}
    if theirs:
        rows[0]["goals"] = goals(training, rows[0], min(memory[name] for name in theirs))
    return rows


def cases(smoke: bool = False) -> Iterator[Training]:
    for dtype in (torch.float32, torch.bfloat16):
        if smoke:
            yield Training("tiny", TINY, dtype, batch=1, tokens=TINY.context)
        else:
            yield from (training(name, dtype, *size) for name, *size in BATCHES)


def gpu_cases() -> Iterator[Training]:
    yield from (training(name, torch.bfloat16, *size) for name, size in GPU_BATCHES.items())


def training(name: str, dtype: torch.dtype, batch: int, tokens: int) -> Training:
    config = tomllib.loads((CONFIGS / f"{name}.toml").read_text())
    shape = SHAPES[config["model"].pop("model", "gpt")]
    return Training(name, shape(config["data"]["vocabulary_size"], **config["model"]), dtype, batch, tokens)


if __name__ == "__main__":
    sys.exit(command.main("gpt", __doc__, cases, measure, gpu_cases))
