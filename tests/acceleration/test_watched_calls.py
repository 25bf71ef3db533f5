"""Who watches torch's operators, or transforms them, meets those of the model as it was."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from acceleration.test_accelerate import ScaledNorm
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import lspm_kernels as lk

CLASSES = 4100


class Kernel(nn.Module):
    """A linear layer by (in, out)."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x):
        return x @ self.kernel


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """A language model of look-alikes, chains, attention and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 64)
        layers = ScaledNorm(64), Kernel(), Attention(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)
        self.layers = nn.Sequential(*layers, nn.LayerNorm(64))
        self.head = nn.Linear(64, CLASSES, bias=False)

    def forward(self, tokens):
        logits = self.head(self.layers(self.embedding(tokens)))
        return F.cross_entropy(logits.view(-1, CLASSES), tokens.view(-1))


def language():
    return Model(), torch.randint(CLASSES, (4, 128))


def images():
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, 8)), torch.randn(8, 3, 64, 64)


def attention():
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return layer, torch.randn(8, 128, 64)


def transformers():
    from transformers import LlamaConfig, LlamaModel

    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    return LlamaModel(LlamaConfig(**sizes, num_attention_heads=4)), torch.randint(99, (2, 128))


def counted(model, x):
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        y = y if isinstance(y, torch.Tensor) else y[0]
        if y.requires_grad:
            y.sum().backward()
    return counter.get_flop_counts().get("Global", {})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [language, images, attention, transformers])
def test_operations_are_counted_as_they_were(make, training):
    model, x = make()
    model.train(training)
    with torch.set_grad_enabled(training):
        expected = counted(model, x)
        assert expected or make is attention  # torch's layer is one operator, which it does not count
        assert lk.accelerate(model).replaced
        assert counted(model, x) == expected


def test_what_a_checkpoint_keeps_is_chosen_as_it_was():
    model, tokens = language()
    models, seen, gradients = [copy.deepcopy(model), model], [], []
    lk.accelerate(model)
    for m in models:
        seen.append([])

        def policy(ctx, operator, *args, operators=seen[-1], **kwargs):
            operators.append(operator)
            kept = operator is torch.ops.aten.mm.default
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = partial(create_selective_checkpoint_contexts, policy)
        checkpoint(m.train(), tokens, use_reentrant=False, context_fn=contexts).backward()
        gradients.append(m.head.weight.grad)
    assert seen[0] == seen[1]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("make", [lambda: ScaledNorm(64), Kernel, nn.GELU])
def test_forward_mode_derivatives_are_torchs(make):
    torch.manual_seed(0)
    model = nn.Sequential(make())
    plain = copy.deepcopy(model)
    x, dx = torch.randn(2, 512, 64)
    lk.accelerate(model)
    expected = torch.func.jvp(plain, (x,), (dx,))
    torch.testing.assert_close(torch.func.jvp(model, (x,), (dx,)), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, dx)
        found = torch.autograd.forward_ad.unpack_dual(model(dual))
    torch.testing.assert_close(tuple(found), expected)
