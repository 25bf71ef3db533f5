"""A GPT and a Llama so small that the tests of the model layer can look at all of them."""

import inspect
import textwrap
from dataclasses import replace

import torch

from lspm_models import language_models
from lspm_models.models.gpt import GPTConfig
from lspm_models.models.llama import LlamaConfig
from oracle import compare

CONFIG = GPTConfig(vocabulary_size=61, context=24, layers=3, heads=2, width=48)
LLAMA = LlamaConfig(61, 24, layers=3, heads=4, key_value_heads=2, width=48, hidden=80, theta=100.0)
TIED = replace(LLAMA, tied=True, head_size=16, key_value_heads=1)
BOTH = {"gpt": CONFIG, "llama": LLAMA, "llama-tied": TIED}


def make_task(config=CONFIG, **arguments):
    """A language model with weights so large that each part of it shows in the logits."""
    torch.manual_seed(0)
    task = language_models.make_task(config, **arguments)
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            norm = "ln_" in name or "norm" in name
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if norm else 0.3)
    return task


def make_tokens(batch=2, length=CONFIG.context):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CONFIG.vocabulary_size, (batch, length), generator=generator)


def step(task, tokens):
    """The loss, and its gradient of each parameter."""
    task.zero_grad()
    loss = task.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in task.parameters()]


def check_step(ours, truth, eager, dtype):
    """dtype is what was computed in. A loss is one number, whose error in eager mode may be 0 by luck."""
    torch.testing.assert_close(ours[0].to(dtype), truth[0].to(dtype))

    def in_units_of_the_largest(gradients):
        pairs = zip(gradients, truth[1], strict=True)
        return torch.cat([(g / t.abs().max()).flatten() for g, t in pairs])

    ours, eager = (in_units_of_the_largest(gradients).to(dtype) for _, gradients in (ours, eager))
    compare("gradients", ours, in_units_of_the_largest(truth[1]), eager)


def train_on_real_text(config, steps=30):
    """The losses of a character model on the source of a module of the standard library."""
    text = torch.tensor(list(inspect.getsource(textwrap).encode()))
    torch.manual_seed(0)
    task = language_models.make_task(config)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - config.context, (32,))
        block = torch.stack([text[s : s + config.context + 1] for s in starts])
        loss = task.loss(block[:, :-1], block[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def check_that_no_token_looks_ahead(config):
    """Another token changes the logits of its own place and of later ones alone."""
    task, tokens = make_task(config), make_tokens(batch=1)
    logits = task(tokens)
    for changed in range(1, config.context):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % config.vocabulary_size
        assert torch.equal(task(other)[:, :changed], logits[:, :changed])
        assert not torch.equal(task(other)[:, changed], logits[:, changed])
