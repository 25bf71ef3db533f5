"""The smallest task that fit() can train, a table of next-token scores with dropout, and text to train it on.

Run as a program, it trains in a folder, and kills itself with SIGKILL when a named function is called for the
n-th time: `tiny_task.py FOLDER STEPS [module.function:n]`.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lspm_models.data.text import TextData
from lspm_models.data.tokens import Tokens
from lspm_models.distributed import Processes
from lspm_models.fit_config import FitConfig
from lspm_models.train import fit


class Table(nn.Module):
    """Scores of the next token from the token before: an embedding, a norm, dropout, a linear layer."""

    def __init__(self, vocabulary_size=16, width=8, dropout=0.2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocabulary_size)

    def loss(self, inputs, targets):
        logits = self.head(self.dropout(self.norm(self.embedding(inputs))))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def table(**options):
    """A table with the same weights every time."""
    torch.manual_seed(7)
    return Table(**options)


def counting(batch_size=4, validation_batches=2, **options):
    """Text that counts 0..15 again and again, with an error here and there."""
    ids = np.arange(2000) % 16
    ids[::7] = 3
    return TextData(
        Tokens(ids, 1500, "counting"), 8, batch_size, validation_batches=validation_batches, **options
    )


def configuration(**options):
    """A short run on the CPU that evaluates and saves every few steps."""
    chosen = {"steps": 12, "batch_size": 4, "evaluate_every": 4, "checkpoint_every": 3, "device": "cpu"}
    return FitConfig(**{**chosen, "learning_rate": 1e-2, **options})


def _kill_at(moment):
    """Replaces a function by one that kills this process when it is called the n-th time."""
    name, count = moment.rsplit(":", 1)
    module, attribute = name.rsplit(".", 1)
    module = importlib.import_module(module)
    original, calls = getattr(module, attribute), iter(range(1, 1_000_000))

    def dying(*arguments, **keywords):
        if next(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)

    setattr(module, attribute, dying)


if __name__ == "__main__":
    folder, steps, *moment = sys.argv[1:]
    if moment:
        _kill_at(moment[0])
    group = Processes.join()
    data = counting(process=group.rank, processes=group.count)
    task = table(dropout=0.2 if group.count == 1 else 0.0)  # each process would drop other values
    fit(task, data, configuration(steps=int(steps)), Path(folder), resume=True, processes=group)
