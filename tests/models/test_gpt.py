"""GPT: our kernels against the reference, in a step and over a training run, and what the model promises."""

import copy
import math
import pickle
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pretrain
import pytest
import torch
from tiny_gpt import (
    CONFIG,
    check_step,
    check_that_no_token_looks_ahead,
    make_task,
    make_tokens,
    step,
    train_on_real_text,
)

from lspm_kernels import use_backend
from lspm_models.models.gpt import GPT, GPTConfig
from lspm_models.models.operations import FUSED, PLAIN
from oracle import compare

CONFIGS = Path(pretrain.__file__).parent / "configs"
SHORT = GPTConfig(vocabulary_size=128, context=32, layers=2, heads=2, width=64)


@pytest.mark.parametrize("ops", [FUSED, PLAIN], ids=["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_agrees_with_the_reference(ops, dtype, bias):
    config, tokens = replace(CONFIG, bias=bias), make_tokens()
    ours = make_task(config, ops=ops).to(dtype)
    eager = make_task(config).to(dtype)
    truth = make_task(config).to(dtype).double()
    logits, our_step = ours(tokens), step(ours, tokens)
    with use_backend("reference"):
        compare("logits", logits, truth(tokens), eager(tokens))
        check_step(our_step, step(truth, tokens), step(eager, tokens), dtype)


@pytest.mark.parametrize("ops", [FUSED, PLAIN], ids=["fused", "plain"])
def test_autocast_is_as_accurate_as_the_reference_under_it(ops):
    tokens = make_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(make_task(ops=ops), tokens)
        logits = make_task(ops=ops)(tokens)
        with use_backend("reference"):
            eager = step(make_task(), tokens)
    with use_backend("reference"):
        truth = step(make_task().double(), tokens)
    assert logits.dtype == torch.bfloat16
    assert ours[0].dtype == torch.float32
    check_step(ours, truth, eager, torch.bfloat16)


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.long)])
def test_compiles_to_one_graph(autocast):
    task, tokens = make_task(), make_tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager = step(task, tokens)
        task.loss = torch.compile(task.loss, fullgraph=True)
        compiled = step(task, tokens)
    with use_backend("reference"):
        truth = step(make_task().double(), tokens)
    check_step(compiled, truth, eager, torch.bfloat16 if autocast else torch.float32)


def test_gradient_checkpointing_changes_nothing():
    tokens = make_tokens()
    loss, gradients = step(make_task(), tokens)
    loss_again, gradients_again = step(make_task(gradient_checkpointing=True), tokens)
    assert torch.equal(loss_again, loss)
    for a, b in zip(gradients_again, gradients, strict=True):
        assert torch.equal(a, b)


def test_gradient_checkpointing_runs_each_block_twice():
    task = make_task(gradient_checkpointing=True)
    runs = []
    for layer, block in enumerate(task.model.h):
        block.ln_2.register_forward_hook(lambda *_, layer=layer: runs.append(layer))
    step(task, make_tokens())
    assert runs == [0, 1, 2, 2, 1, 0]


def test_trains_like_the_reference():
    ours = train_on_real_text(SHORT)
    with use_backend("reference"):
        reference = train_on_real_text(SHORT)
    assert ours[0] > 4.7  # log(128) = 4.85: it begins with no idea
    assert (
        ours[-5:].mean() < 3.0
    )  # less than 3.04, the entropy of this text's characters: it sees the context
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)


def test_later_tokens_never_change_earlier_logits():
    check_that_no_token_looks_ahead(CONFIG)


def test_names_are_those_of_hugging_face():
    layer = [
        *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"),
        *("attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias"),
        *("mlp.c_proj.weight", "mlp.c_proj.bias"),
    ]
    layers = [f"h.{i}.{name}" for i in range(CONFIG.layers) for name in layer]
    gpt2_model = ["wte.weight", "wpe.weight", *layers, "ln_f.weight", "ln_f.bias"]
    gpt2_lm_head_model = [f"transformer.{name}" for name in gpt2_model] + ["lm_head.weight"]

    task = make_task()
    assert list(task.model.state_dict()) == gpt2_model
    ours = [name.replace("model.", "transformer.", 1) for name in task.state_dict()]
    assert [*ours, "lm_head.weight"] == gpt2_lm_head_model


def gpt2(weights, tokens, heads, eps=1e-5):
    """The logits of one text by the formulas of GPT-2, a head at a time, from a state dict in float64."""

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))

    x = weights["model.wte.weight"][tokens] + weights["model.wpe.weight"][: len(tokens)]
    future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for layer in range(CONFIG.layers):
        h = f"model.h.{layer}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=-1)
        results = []
        for a, b, c in zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True):
            scores = (a @ b.T / a.shape[-1] ** 0.5).masked_fill(future, -math.inf)
            results.append(scores.softmax(-1) @ c)
        x = x + linear(torch.cat(results, dim=-1), f"{h}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return norm(x, "model.ln_f") @ weights["model.wte.weight"].T


def test_computes_the_formulas_of_gpt2():
    [tokens] = make_tokens(batch=1)
    with use_backend("reference"):
        task = make_task().double()
        torch.testing.assert_close(task(tokens[None])[0], gpt2(task.state_dict(), tokens, CONFIG.heads))


@pytest.mark.parametrize(("name", "count"), [("gpt2_124m", 124_439_808), ("gpt2_355m", 354_823_168)])
def test_gpt2_has_as_many_parameters(name, count):
    config = tomllib.loads((CONFIGS / f"{name}.toml").read_text())
    with torch.device("meta"):
        model = GPT(GPTConfig(config["data"]["vocabulary_size"], **config["model"]))
    assert model.parameter_count == count
    assert model.h[11].mlp.c_fc.weight.shape == (4 * model.config.width, model.config.width)


def test_begins_as_gpt2_does():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocabulary_size=500, context=400, layers=8, heads=2, width=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "ln_" in name:
            assert (parameter == 1).all()
        else:  # 16 additions to the residual
            deviation = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(deviation, rel=0.03)
            assert abs(parameter.mean().item()) < 4 * deviation / parameter.numel() ** 0.5


def test_dropout_is_for_training_only():
    task, tokens = make_task(replace(CONFIG, dropout=0.5)), make_tokens()
    assert not torch.equal(task(tokens), task(tokens))
    assert torch.equal(task.eval()(tokens), make_task()(tokens))


def test_copies_and_pickles_give_the_same_logits():
    task, tokens = make_task(), make_tokens()
    for other in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert torch.equal(other(tokens), task(tokens))


def test_config_survives_a_dictionary():
    assert GPTConfig(**asdict(CONFIG)) == CONFIG


def test_loss_leaves_out_ignored_targets():
    task, tokens = make_task(), make_tokens(batch=1)
    targets = torch.full_like(tokens, -100)
    targets[0, 5] = 3
    expected = -task(tokens)[0, 5].log_softmax(-1)[3]
    torch.testing.assert_close(task.loss(tokens, targets), expected)
    assert task.loss(tokens, torch.full_like(tokens, -100)).isnan()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "GPTConfig: layers must be a positive integer, got 0"),
        ({"context": 2.0}, "GPTConfig: context must be a positive integer, got 2.0"),
        ({"heads": 5}, "GPTConfig: width must be a multiple of heads (5), got 48"),
        ({"dropout": 1.0}, "GPTConfig: dropout must be in [0, 1), got 1.0"),
        ({"bias": 1}, "GPTConfig: bias must be true or false, got 1"),
        ({"eps": 0.0}, "GPTConfig: eps must be positive and finite, got 0.0"),
    ],
)
def test_config_refuses(arguments, message):
    with pytest.raises(ValueError) as error:
        replace(CONFIG, **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[0, 61]]), "GPT: tokens must be in [0, 61), got 61"),
        (torch.tensor([[-1, 60]]), "GPT: tokens must be in [0, 61), got -1"),
        (torch.zeros(1, 25, dtype=torch.int64), "GPT: tokens must fit the context of 24, got 25"),
        (torch.zeros(4, dtype=torch.int64), "GPT: tokens must be (B, T) int64, got (4,) int64"),
        (torch.zeros(1, 4), "GPT: tokens must be (B, T) int64, got (1, 4) float32"),
    ],
)
def test_model_refuses(tokens, message):
    with pytest.raises(ValueError) as error:
        make_task()(tokens)
    assert str(error.value) == message


def test_loss_refuses_targets_of_another_shape():
    message = r"^LanguageModelling.loss: targets must have the shape of tokens \(2, 24\), got \(2, 23\)$"
    with pytest.raises(ValueError, match=message):
        make_task().loss(make_tokens(), make_tokens(length=23))
