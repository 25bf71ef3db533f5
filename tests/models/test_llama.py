"""Llama: our kernels against the reference, in a step and over a training run; what the model promises."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from tiny_gpt import (
    LLAMA,
    TIED,
    check_step,
    check_that_no_token_looks_ahead,
    make_task,
    make_tokens,
    step,
    train_on_real_text,
)

from lspm_kernels import use_backend
from lspm_models import language_models
from lspm_models.models.llama import Llama, LlamaConfig
from lspm_models.models.operations import FUSED, PLAIN
from oracle import compare


@pytest.mark.parametrize("ops", [FUSED, PLAIN], ids=["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["head", "tied"])
def test_agrees_with_the_reference(ops, dtype, config):
    tokens = make_tokens()
    ours = make_task(config, ops=ops).to(dtype)
    eager = make_task(config).to(dtype)
    truth = make_task(config).to(dtype).double()
    logits, our_step = ours(tokens), step(ours, tokens)
    with use_backend("reference"):
        compare("logits", logits, truth(tokens), eager(tokens))
        check_step(our_step, step(truth, tokens), step(eager, tokens), dtype)


def test_autocast_is_as_accurate_as_the_reference_under_it():
    tokens = make_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        ours, logits = step(make_task(LLAMA), tokens), make_task(LLAMA)(tokens)
        with use_backend("reference"):
            eager = step(make_task(LLAMA), tokens)
    with use_backend("reference"):
        truth = step(make_task(LLAMA).double(), tokens)
    assert (logits.dtype, ours[0].dtype) == (torch.bfloat16, torch.float32)
    check_step(ours, truth, eager, torch.bfloat16)


@pytest.mark.long
def test_compiles_to_one_graph():
    task, tokens = make_task(LLAMA), make_tokens()
    eager = step(task, tokens)
    task.loss = torch.compile(task.loss, fullgraph=True)
    compiled = step(task, tokens)
    with use_backend("reference"):
        truth = step(make_task(LLAMA).double(), tokens)
    check_step(compiled, truth, eager, torch.float32)


def test_gradient_checkpointing_changes_nothing():
    tokens = make_tokens()
    loss, gradients = step(make_task(LLAMA), tokens)
    loss_again, gradients_again = step(make_task(LLAMA, gradient_checkpointing=True), tokens)
    assert torch.equal(loss_again, loss)
    for a, b in zip(gradients_again, gradients, strict=True):
        assert torch.equal(a, b)


def test_trains_like_the_reference():
    config = LlamaConfig(128, 32, layers=2, heads=4, key_value_heads=2, width=64, hidden=176, tied=True)
    ours = train_on_real_text(config)
    with use_backend("reference"):
        reference = train_on_real_text(config)
    assert ours[0] > 4.6  # log(128) = 4.85, less what a tied head gains where characters repeat
    assert ours[-5:].mean() < 3.0  # 3.04 is the entropy of this text's characters
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)


def test_later_tokens_never_change_earlier_logits():
    check_that_no_token_looks_ahead(LLAMA)


def test_names_are_those_of_hugging_face():
    layer = [
        "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    layers = [f"model.layers.{i}.{name}.weight" for i in range(LLAMA.layers) for name in layer]
    names = ["model.embed_tokens.weight", *layers, "model.norm.weight"]
    assert list(make_task(LLAMA).state_dict()) == [*names, "lm_head.weight"]
    assert list(make_task(TIED).state_dict()) == names


def llama(weights, tokens, config):
    """The logits of one text by Llama's formulas, a head and a place at a time, from a float64 state dict."""

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.eps).sqrt() * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T

    def rotated(x):
        half = config.head_size // 2
        pairs = torch.complex(x[:, :half].contiguous(), x[:, half:].contiguous())
        # the angles as the model has them, rounded to float32
        frequencies = 1 / config.theta ** (torch.arange(half, dtype=torch.float32) * 2 / config.head_size)
        angles = torch.arange(len(x), dtype=torch.float32)[:, None] * frequencies
        pairs = pairs * torch.complex(angles.cos().double(), angles.sin().double())
        return torch.cat((pairs.real, pairs.imag), -1)

    x = weights["model.embed_tokens.weight"][tokens]
    future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for layer in range(config.layers):
        h = f"model.layers.{layer}"
        y = norm(x, f"{h}.input_layernorm")
        q, k, v = (linear(y, f"{h}.self_attn.{n}_proj").split(config.head_size, -1) for n in "qkv")
        results = []
        for head in range(config.heads):
            group = head * config.key_value_heads // config.heads
            scores = rotated(q[head]) @ rotated(k[group]).T / config.head_size**0.5
            results.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[group])
        x = x + linear(torch.cat(results, -1), f"{h}.self_attn.o_proj")
        y = norm(x, f"{h}.post_attention_layernorm")
        gate, up = linear(y, f"{h}.mlp.gate_proj"), linear(y, f"{h}.mlp.up_proj")
        x = x + linear(gate * gate.sigmoid() * up, f"{h}.mlp.down_proj")
    head = "model.embed_tokens" if config.tied else "lm_head"
    return linear(norm(x, "model.norm"), head)


@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["head", "tied"])
def test_computes_the_formulas_of_llama(config):
    [tokens] = make_tokens(batch=1)
    with use_backend("reference"):
        task = make_task(config).double()
        torch.testing.assert_close(task(tokens[None])[0], llama(task.state_dict(), tokens, config))


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LlamaConfig(49_152, 8192, 30, 9, 3, width=576, hidden=1536, tied=True), 134_515_008),  # SmolLM2
        (LlamaConfig(32_000, 4096, 32, 32, 32, width=4096, hidden=11_008), 6_738_415_616),  # Llama 2 7B
        (LlamaConfig(128_256, 8192, 32, 32, 8, width=4096, hidden=14_336), 8_030_261_248),  # Llama 3 8B
    ],
    ids=["smollm2", "llama2", "llama3"],
)
def test_has_as_many_parameters_as_the_published(config, count):
    with torch.device("meta"):
        task = language_models.make_task(config)
    assert sum(parameter.numel() for parameter in task.parameters()) == count


def test_begins_as_gpt2_does():
    torch.manual_seed(0)
    config = LlamaConfig(500, 400, layers=8, heads=2, key_value_heads=1, width=128, hidden=256)
    for name, parameter in language_models.make_task(config).named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all()
        else:  # 16 additions to the residual
            deviation = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(deviation, rel=0.03)


def test_config_survives_a_dictionary():
    assert LlamaConfig(**asdict(LLAMA)) == LLAMA
    for config in (LLAMA, TIED):
        assert language_models.from_settings(language_models.to_settings(config), "there") == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "LlamaConfig: layers must be a positive integer, got 0"),
        ({"hidden": 2.0}, "LlamaConfig: hidden must be a positive integer, got 2.0"),
        ({"key_value_heads": 3}, "LlamaConfig: heads must be a multiple of key_value_heads (3), got 4"),
        ({"head_size": 0, "width": 50}, "LlamaConfig: width must be a multiple of heads (4), got 50"),
        ({"head_size": 7}, "LlamaConfig: head_size must be even and positive, got 7"),
        ({"tied": 1}, "LlamaConfig: tied must be true or false, got 1"),
        ({"eps": 0.0}, "LlamaConfig: eps must be positive and finite, got 0.0"),
        ({"theta": math.inf}, "LlamaConfig: theta must be positive and finite, got inf"),
        ({"rope_scaling": "x"}, "LlamaConfig: rope_scaling must be one of none, linear, llama3, got 'x'"),
        ({"rope_low": 4.0}, "LlamaConfig: rope_low must be less than rope_high (4.0), got 4.0"),
    ],
    ids=str,
)
def test_config_refuses(arguments, message):
    with pytest.raises(ValueError) as error:
        replace(LLAMA, **arguments)
    assert str(error.value) == message


def test_model_refuses():
    with pytest.raises(ValueError, match=r"^Llama: tokens must be in \[0, 61\), got 61$"):
        make_task(LLAMA)(torch.tensor([[0, 61]]))
    with pytest.raises(ValueError, match=r"^Llama: tokens must fit the context of 24, got 25$"):
        Llama(LLAMA)(torch.zeros(1, 25, dtype=torch.int64))
