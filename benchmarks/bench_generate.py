"""Generation by a GPT-2 of random weights, token by token, against Hugging Face's loop on the same weights.

A generated token reads every weight once, so what reading them takes is the roof. Hugging Face's side stays
in float32 beside ours in bfloat16 and in 8-bit integers, as that is its fastest on a CPU; beside the latter
runs CTranslate2 with 8-bit integers, too, where it is installed.
"""

import sys
from collections.abc import Iterator
from functools import partial

import command
import machine
import torch
from generation import NEW_TOKENS, SMALL, Generation, by_ctranslate2

import harness
from lspm_models.generate import generate
from lspm_models.sources import WEIGHTS

GOALS = {"float32": 1.3, "bfloat16": 2.5, "int8": 4.0}  # x Hugging Face
GOAL_OF_INT8 = 2.0  # x CTranslate2


def measure(run: Generation, device: str, smoke: bool) -> list[dict]:
    """Checks the prompt's logits, then times both loops in turn."""
    theirs, task, prompt = run.models()
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    turns = {
        "lspm": lambda: generate(task, prompt[0], max_new_tokens=NEW_TOKENS, temperature=0),
        "hugging face": lambda: theirs.generate(prompt, **options),
    }
    peer = by_ctranslate2(theirs, prompt) if run.weights == "int8" else None
    goals = [harness.Goal("hugging face", GOALS[run.weights]), harness.Goal("roof", 75)]
    if peer is not None:
        turns["ctranslate2"] = peer
        goals.append(harness.Goal("ctranslate2", GOAL_OF_INT8))
    turns = {name: harness.repeated(turn, device) for name, turn in turns.items()}
    read = NEW_TOKENS * sum(weight.nbytes for weight in task.buffers())
    turns["roof"] = harness.repeated(partial(machine.read_roof(device), read), device)
    seconds = harness.interleave(turns, 1, rounds=1 if smoke else None)
    rows = harness.summarise(str(run), ["lspm"], seconds, "read")
    for row in rows:
        row |= {"rate": NEW_TOKENS / row["median_us"] * 1e6, "unit": "tokens/s", "peak_bytes": None}
        row["goals"] = [goal.judge(row) for goal in goals if row["variant"] == "lspm" and not smoke]
    return rows


def cases(smoke: bool = False) -> Iterator[Generation]:
    for weights in WEIGHTS:
        yield Generation("tiny", weights, SMALL) if smoke else Generation("gpt2_124m", weights)


if __name__ == "__main__":
    machine.keep_freed_memory()
    sys.exit(command.main("generate", __doc__, cases, measure))
