"""A BERT so small that the tests of the model layer can look at all of it."""

import torch
from tiny_gpt import make_tokens

from lspm_models import language_models
from lspm_models.models.bert import BertConfig

BERT = BertConfig(61, 24, layers=3, heads=4, width=48, hidden=80, pooler=True)


def make_bert(config=BERT, **arguments):
    """A masked language model with weights so large that each part of it shows in the logits."""
    torch.manual_seed(0)
    task = language_models.make_task(config, **arguments)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.ndim == 1 else 0.3)
    return task


def make_inputs():
    """Tokens, a mask that hides the end of the first text, and types of two parts."""
    tokens = make_tokens()
    mask, types = torch.ones_like(tokens), torch.zeros_like(tokens)
    mask[0, 17:], types[:, 9:] = 0, 1
    return tokens, mask, types


def make_targets(tokens):
    """Every fourth token is to be found."""
    return torch.where(torch.arange(tokens.numel()).view(tokens.shape) % 4 == 1, tokens.roll(1, 1), -100)


def masked_step(task, tokens):
    """The loss, and its gradient of each parameter that learns.

    A bias of keys does not: it adds one number to all scores of a query, and its gradient is rounding.
    """
    task.zero_grad()
    loss = task.loss(tokens, make_targets(tokens))
    loss.backward()
    learned = [p for name, p in task.named_parameters() if p.requires_grad and "key.bias" not in name]
    return loss.detach(), [parameter.grad for parameter in learned]
