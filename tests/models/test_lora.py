"""LoRA: what an adapted model computes and learns, merging to the bit, and folders that peft reads."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from tiny_gpt import BOTH, CONFIG, LLAMA, make_task, make_tokens
from torch import nn

from lspm_kernels import use_backend
from lspm_models.adapter_folder import load_adapter, save_adapter
from lspm_models.hugging_face import save_pretrained
from lspm_models.models import lora
from lspm_models.models.lora import LoraLinear, add_lora, lora_layers
from oracle import compare

EVERY = ("*",)  # each linear layer, and an untied head


def adapted(config=CONFIG, targets=EVERY, **options):
    """A language model with adapters that show in the logits."""
    task = add_lora(make_task(config), 4, 8.0, targets=targets, **options)
    for layer in lora_layers(task).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return task


def bits(tensor):
    return tensor.detach().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).clone()


@pytest.mark.parametrize("name", BOTH)
def test_begins_as_the_model_that_it_is_made_of(name):
    tokens = make_tokens()
    task = add_lora(make_task(BOTH[name]), 4)
    assert torch.equal(task(tokens), make_task(BOTH[name])(tokens))
    layers = {"c_attn", "c_proj"} if name == "gpt" else {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {layer.split(".")[-1] for layer in lora_layers(task)} == layers
    assert len(lora_layers(task)) == CONFIG.layers * len(layers)


class Beside(nn.Module):
    """The formula of LoraLinear, written again."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer = self.layer
        return F.linear(x, layer.weight, layer.bias) + 2 * ((x @ layer.lora_A.T) @ layer.lora_B.T)


@pytest.mark.parametrize("name", BOTH)
def test_is_the_model_of_the_sums(name):
    """In every layer alone, as a kernel that takes the weights of several would leave an adapter out."""
    tokens = make_tokens(batch=1)
    kinds = dict.fromkeys(re.sub(r"\d", "*", layer) for layer in lora_layers(adapted(BOTH[name])))
    assert ("lm_head" in kinds) == (name == "llama")
    for targets in ([kind] for kind in kinds):
        ours, plain, sums = adapted(BOTH[name], targets), adapted(BOTH[name], targets), make_task(BOTH[name])
        sums.double()
        with torch.no_grad():
            for layer, found in lora_layers(plain).items():
                product = found.lora_B.double() @ found.lora_A.double()
                sums.get_submodule(layer).weight.add_(product, alpha=2.0)
                lora.replace(plain, layer, Beside(found))
        with use_backend("reference"):
            truth, eager = sums(tokens), plain(tokens)
            torch.testing.assert_close(eager.double(), truth, rtol=1e-4, atol=1e-4)  # plain PyTorch is right
            compare(targets[0], ours(tokens), truth, eager)
        compare(targets[0], ours(tokens), truth, eager)
        assert not torch.allclose(ours(tokens), make_task(BOTH[name])(tokens), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BOTH)
def test_merges_and_unmerges_to_the_same_bits(name, dtype):
    task, tokens = adapted(BOTH[name]).to(dtype).eval(), make_tokens()
    before, logits = {k: bits(v) for k, v in task.state_dict().items()}, task(tokens)
    lora.merge(task)
    changed = {k for k, v in task.state_dict().items() if not torch.equal(bits(v), before[k])}
    assert changed == {f"{layer}.weight" for layer in lora_layers(task)}
    merged = task(tokens)
    lora.merge(task)  # a second time changes nothing
    assert torch.equal(task(tokens), merged)
    with use_backend("reference"):
        exact = adapted(BOTH[name]).to(dtype).double()
        compare("logits", merged, exact(tokens), logits)
    lora.unmerge(task)
    assert {k: bits(v).equal(before[k]) for k, v in task.state_dict().items()} == dict.fromkeys(before, True)
    assert torch.equal(task(tokens), logits)
    lora.merge(task)
    plain = lora.remove_lora(task)
    assert torch.equal(plain(tokens), merged) and list(plain.state_dict()) == list(
        make_task(BOTH[name]).state_dict()
    )
    assert not lora_layers(plain) and all(parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize("name", BOTH)
def test_learns_its_two_matrices_and_nothing_else(name):
    task, tokens = adapted(BOTH[name]), make_tokens()
    before = {key: bits(value) for key, value in task.state_dict().items()}
    loss = task.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    fused = {key: value.grad for key, value in task.named_parameters() if value.grad is not None}
    assert list(fused) == list(lora.adapter_tensors(task))
    task.zero_grad()
    logits = task(tokens[:, :-1]).flatten(0, 1)  # of the head as a layer, not as a weight of a fused loss
    expected = F.cross_entropy(logits, tokens[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for key, gradient in fused.items():
        torch.testing.assert_close(gradient, task.get_parameter(key).grad, rtol=1e-4, atol=1e-6)
    torch.optim.AdamW((value for value in task.parameters() if value.requires_grad), lr=0.1).step()
    changed = {key for key, value in task.state_dict().items() if not torch.equal(bits(value), before[key])}
    assert changed == set(fused)


def test_drops_in_training_only():
    task, tokens = adapted(LLAMA, dropout=0.5), make_tokens()
    assert not torch.equal(task(tokens), task(tokens))
    assert not torch.equal(task.loss(tokens, tokens), task.loss(tokens, tokens))
    assert torch.equal(task.eval()(tokens), adapted(LLAMA)(tokens))


def test_a_model_in_evaluation_stays_there():
    assert not any(module.training for module in add_lora(make_task().eval(), 2, dropout=0.5).modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.0}, "rank must be a whole number of at least 1, got 2.0"),
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"targets": []}, "targets must match linear layers, got ()"),
        (
            {"targets": ["*attn.*", "*atn.c_attn"]},
            "targets must match linear layers, got '*atn.c_attn', which matches none; nearest: "
            "model.h.*.attn.c_attn, model.h.*.attn.c_proj, model.h.*.mlp.c_fc",
        ),
    ],
    ids=str,
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError) as error:
        add_lora(make_task(), **{"rank": 2, **arguments})
    assert str(error.value) == f"add_lora: {message}"


def test_refuses_a_second_time_and_a_tied_layer():
    with pytest.raises(
        ValueError, match=r"^add_lora: model must have no adapters, got model\.h\.0\.attn\.c_attn, "
    ):
        add_lora(adapted(), 2)
    with pytest.raises(ValueError, match=r"got 'lm_head', which matches none; nearest: "):
        add_lora(make_task(), 2, targets=["lm_head"])  # a tied head is no layer
    tied = nn.ModuleDict({"table": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    tied["head"].weight = tied["table"].weight
    message = "targets must match layers with a weight of their own, got head, whose weight table has, too"
    with pytest.raises(ValueError, match=f"^add_lora: {message}$"):
        add_lora(tied, 2, targets=["head"])


@pytest.mark.parametrize("name", BOTH)
def test_a_folder_gives_the_adapters_back(name, tmp_path):
    task, tokens = adapted(BOTH[name], dropout=0.25), make_tokens()
    save_adapter(task, tmp_path / "a", "runs/base")
    save_adapter(task, tmp_path / "a", "runs/base")  # in place of the first
    again = load_adapter(make_task(BOTH[name]), tmp_path / "a").eval()
    assert torch.equal(again(tokens), task.eval()(tokens))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8.0, 0.25)
    first = "transformer.h.0.attn.c_attn" if name == "gpt" else "model.layers.0.self_attn.q_proj"
    assert (config["target_modules"][0], config["fan_in_fan_out"]) == (first, name == "gpt")
    assert config["base_model_name_or_path"] == "runs/base"


@pytest.mark.parametrize("name", BOTH)
def test_peft_computes_the_same_from_the_folder(name, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    task, tokens = adapted(BOTH[name]).eval(), make_tokens()
    save_pretrained(make_task(BOTH[name]), tmp_path / "base")
    save_adapter(task, tmp_path / "adapter", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(task(tokens), theirs(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_adapter(make_task(BOTH[name]), tmp_path / "theirs").eval()
    assert torch.equal(again(tokens), task(tokens))


def broken(folder, **changed):
    """The folder of an adapter with other values in its config, or other tensors."""
    from safetensors.torch import load_file, save_file

    save_adapter(adapted(targets=["*attn.c_attn"]), folder)
    path = folder / "adapter_config.json"
    tensors = changed.pop("tensors", None)
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    if tensors is not None:
        save_file(
            tensors(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors"
        )
    return folder


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"peft_type": "IA3"},
            r"load_adapter: peft_type of .*adapter_config\.json must be 'LORA', got 'IA3'",
        ),
        ({"use_dora": True}, r"load_adapter: use_dora of .* must be False, got True"),
        ({"r": None}, r"add_lora: rank must be a whole number of at least 1, got None"),
        ({"lora_alpha": "8"}, r"add_lora: alpha must be positive and finite, got 8"),
        (
            {"r": 3},
            r"load_adapter: model\.h\.0\.attn\.c_attn\.lora_A in .* must be .* \(3, 48\), got \(4, 48\)",
        ),
        (
            {"tensors": lambda found: {"base_model.model.h.9.attn.c_attn.lora_A.weight": torch.ones(4, 48)}},
            r"load_adapter: tensors of .* must be of linear layers of the model, got base_model.*h\.9.*",
        ),
        (
            {"tensors": lambda found: {k: v for k, v in found.items() if "h.1.attn.c_attn.lora_B" not in k}},
            r"load_adapter: model\.h\.1\.attn\.c_attn\.lora_B in .* must be of shape \(144, 4\), got None",
        ),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(given),
)
def test_refuses_a_folder(changed, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_adapter(make_task(), broken(tmp_path / "a", **changed))


def test_refuses_to_write_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"^save_adapter: task must have adapters, got none$"):
        save_adapter(make_task(), tmp_path / "a")
    with pytest.raises(ValueError, match=r"^json: .*adapter_config\.json must be there, got no such file$"):
        load_adapter(make_task(), tmp_path)


def test_print_shows_the_adapter():
    assert repr(LoraLinear(nn.Linear(3, 5), 2, 16)).startswith(
        "LoraLinear(\n  in_features=3, out_features=5, bias=True, rank=2, alpha=16"
    )
