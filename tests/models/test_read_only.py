"""Language models for generation alone, whose weights are kept in fewer bits."""

import pytest
import torch
from tiny_gpt import BOTH, CONFIG, make_task, make_tokens

import lspm_kernels as lk
from lspm_kernels import use_backend
from lspm_models.generate import generate
from oracle import compare


def written_out(weight, dtype):
    """What a layer computes with."""
    if dtype != torch.int8:
        return weight.to(dtype).float()
    small, scales = lk.quantize_int8(weight)
    return small * scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", BOTH)
def test_is_the_model_of_the_weights_as_they_are_kept(name, dtype):
    config, tokens = BOTH[name], make_tokens(batch=1, length=7)
    plain, ours = make_task(config), make_task(config)
    with torch.no_grad():
        head = written_out(plain.head_weight, dtype)
        for layer in plain.model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.copy_(written_out(layer.weight, dtype))
        with use_backend("reference"):
            expected = plain.model(tokens) @ head.T
            truth = plain.double().model(tokens) @ head.double().T
        compare("logits", ours.read_only_(dtype)(tokens), truth, expected)


@pytest.mark.parametrize("name", BOTH)
def test_generates(name):
    task = make_task(BOTH[name])
    before = generate(task, [1, 2, 3], max_new_tokens=30, temperature=0)
    assert generate(task.read_only_(torch.float32), [1, 2, 3], max_new_tokens=30, temperature=0) == before
    small = make_task(BOTH[name]).read_only_(torch.int8)
    (tokens,) = generate(small, [1, 2, 3], max_new_tokens=30, seed=1)
    assert len(tokens) == 30 and all(0 <= token < CONFIG.vocabulary_size for token in tokens)


def test_no_layer_is_left_out():
    for config in BOTH.values():
        task = make_task(config).read_only_(torch.int8)
        assert not any(type(module) is torch.nn.Linear for module in task.modules())
        assert task.head_weight.shape == (config.vocabulary_size, config.width)
