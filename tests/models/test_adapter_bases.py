"""Adapters and the weights that they learned beside: others are refused, the same but rounded are not."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora import adapted
from tiny_gpt import BOTH, CONFIG, make_task, make_tokens

from lspm_models import language_models
from lspm_models.adapter_folder import load_adapter, save_adapter
from lspm_models.models import lora
from lspm_models.models.lora import lora_layers


@pytest.mark.parametrize("name", BOTH)
def test_other_weights_are_refused(name, tmp_path):
    save_adapter(adapted(BOTH[name]), tmp_path / "a")
    other = make_task(BOTH[name])
    first, weight = next(other.named_parameters())
    with torch.no_grad():
        weight[-1, -1] += 1e-3
    begin = (
        rf"load_adapter: weights of task must be those that the adapters in {tmp_path}/a/adapter_model"
        rf"\.safetensors learned beside, got others in {first}"
    )
    hint = r"; strict=False takes them all the same"
    with pytest.raises(ValueError, match=f"^{begin}{hint}$"):
        load_adapter(other, tmp_path / "a")
    assert not lora_layers(other)
    assert lora_layers(load_adapter(other, tmp_path / "a", strict=False))
    torch.manual_seed(7)
    with pytest.raises(ValueError, match=rf"^{begin} and \d+ more{hint}$"):
        load_adapter(language_models.make_task(BOTH[name]), tmp_path / "a")


def test_merged_adapters_belong_to_the_weights_without_them(tmp_path):
    task, tokens = adapted().eval(), make_tokens()
    logits = task(tokens)
    lora.merge(task)
    save_adapter(task, tmp_path / "a")
    assert torch.equal(load_adapter(make_task(), tmp_path / "a").eval()(tokens), logits)


def test_weights_that_are_rounded_are_the_same(tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    assert lora_layers(load_adapter(make_task().bfloat16(), tmp_path / "a"))
    near, far = make_task(CONFIG), make_task(CONFIG)
    with torch.no_grad():
        near.model.wte.weight *= 1 + 2e-7
        far.model.wte.weight *= 1 + 1e-5
    assert lora_layers(load_adapter(near, tmp_path / "a"))
    with pytest.raises(ValueError, match=r"got others in model\.wte\.weight;"):
        load_adapter(far, tmp_path / "a")


@pytest.mark.parametrize("sample", ["", "[]", '{"eps": 0}', '{"eps": 0, "weights": {"model.wte.weight": 3}}'])
def test_a_damaged_sample_is_an_error_and_a_missing_one_is_none(sample, tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, metadata={"base_sample": sample})
    with pytest.raises(ValueError, match=r"^checkpoint: base_sample of .* must be as it was written, got "):
        load_adapter(make_task(), tmp_path / "a")
    save_file(tensors, path, metadata={"format": "pt"})  # as peft's
    assert lora_layers(load_adapter(make_task(), tmp_path / "a"))
