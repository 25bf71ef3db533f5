"""A GPT so small that the tests of the model layer can look at all of it."""

import torch

from lspm_models.models.gpt import GPT, GPTConfig
from lspm_models.tasks.language_modelling import LanguageModelling

CONFIG = GPTConfig(vocabulary_size=61, context=24, layers=3, heads=2, width=48)


def make_task(config=CONFIG, **arguments):
    """A language model with weights so large that each part of it shows in the logits."""
    torch.manual_seed(0)
    task = LanguageModelling(GPT(config, **arguments))
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if "ln_" in name else 0.3)
    return task


def make_tokens(batch=2, length=CONFIG.context):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CONFIG.vocabulary_size, (batch, length), generator=generator)
