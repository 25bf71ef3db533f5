"""One training step of a GPT on our kernels, against the very same model on plain PyTorch."""

import sys
import warnings
from collections.abc import Iterator

import command
import torch
from training import TINY, VARIANTS, Training

import harness
from lspm_kernels import FallbackWarning
from lspm_models.models.gpt import GPTConfig

DEMO = GPTConfig(vocabulary_size=4096, context=256, layers=6, heads=6, width=192)
GPT2 = GPTConfig(vocabulary_size=50257, context=1024, layers=12, heads=12, width=768)


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
    memory = {variant: training.peak_bytes(variant, device) for variant in VARIANTS}
    turns = {variant: harness.repeated(training.step(variant, device), device) for variant in VARIANTS}
    calls = 1 if smoke else harness.calls_per_turn(turns)
    seconds = harness.interleave(turns, calls, rounds=1 if smoke else None)
    rows = harness.summarise(str(training), ["lspm"], seconds)
    for row in rows:
        row["rate"] = training.batch * training.tokens / row["median_us"] * 1e6
        row |= {"unit": "tokens/s", "peak_bytes": memory[row["variant"]], "goals": []}
    return rows


def cases(smoke: bool = False) -> Iterator[Training]:
    for dtype in (torch.float32, torch.bfloat16):
        if smoke:
            yield Training("tiny", TINY, dtype, batch=1, tokens=TINY.context)
        else:
            yield Training("demo", DEMO, dtype, batch=8, tokens=256)
            yield Training("gpt2-124m", GPT2, dtype, batch=1, tokens=256)


if __name__ == "__main__":
    sys.exit(command.main("gpt", __doc__, cases, measure))
