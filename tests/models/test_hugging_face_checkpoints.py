"""Folders of Hugging Face's transformers: the same logits, weights there and back, and clear refusals."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from tiny_gpt import BOTH, CONFIG, LLAMA, make_task, make_tokens

from lspm_models.data.tokenizers import ByteBpe, Characters, load_tokenizer, save_tokenizer
from lspm_models.hugging_face import HuggingFaceFolder, load_pretrained, save_pretrained
from oracle import compare

transformers = pytest.importorskip("transformers")
TEXT = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip


def gpt2(kind="GPT2LMHeadModel", **options):
    config = transformers.GPT2Config(n_embd=48, n_layer=3, n_head=2, n_positions=24, **TEXT, **options)
    return getattr(transformers, kind)(config)


def llama(kind="LlamaForCausalLM", **options):
    options = {"max_position_embeddings": 24, "num_key_value_heads": 2, **options}
    return getattr(transformers, kind)(transformers.LlamaConfig(**SIZES, **TEXT, **options))


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True, num_key_value_heads=1, head_dim=16),
    "llama3": lambda: llama(rope_parameters=LLAMA3),
    "linear": lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}),
}


def saved(model, folder, **options):
    """A model of random weights, biases and norms too, and its folder."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(folder, **options)
    return model.eval()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers(name, tmp_path):
    theirs, tokens = saved(MODELS[name](), tmp_path / "hf"), make_tokens()
    ours, plain = load_pretrained(tmp_path / "hf")(tokens), theirs(tokens).logits
    compare("logits", ours, theirs.double()(tokens).logits, plain)


@pytest.mark.parametrize("kind", ["GPT2Model", "LlamaModel"])
@torch.no_grad()
def test_a_model_without_its_head_has_a_tied_one(kind, tmp_path):
    tied = {} if kind == "GPT2Model" else {"tie_word_embeddings": True}
    theirs = saved((gpt2 if kind == "GPT2Model" else llama)(kind, **tied), tmp_path / "hf")
    ours, tokens = load_pretrained(tmp_path / "hf"), make_tokens()
    truth = theirs.double()(tokens).last_hidden_state
    compare("features", ours.model(tokens), truth, theirs.float()(tokens).last_hidden_state)
    assert ours.head_weight is ours.model.embedding.weight


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shards", [None, 20_000], ids=["one", "shards"])
def test_there_and_back_is_bit_exact(name, shards, tmp_path):
    theirs = saved(MODELS[name](), tmp_path / "hf", max_shard_size="20KB" if shards else "1GB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == bool(shards)
    ours = load_pretrained(tmp_path / "hf")
    save_pretrained(ours, tmp_path / "ours", shard_bytes=shards)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == bool(shards)
    again = load_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    for key, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    back = type(theirs).from_pretrained(tmp_path / "ours")
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key
    assert torch.equal(back(make_tokens()).logits, theirs(make_tokens()).logits)


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
@torch.no_grad()
def test_a_model_of_ours_runs_in_transformers(config, tmp_path):
    ours, tokens = make_task(config), make_tokens()
    save_pretrained(ours, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    plain = theirs(tokens).logits
    compare("logits", ours(tokens), theirs.double()(tokens).logits, plain)


def test_half_precision_loads_as_its_values(tmp_path):
    theirs = saved(llama().bfloat16(), tmp_path / "hf")
    ours = load_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(ours[key], tensor.float()) for key, tensor in theirs.state_dict().items())


def test_buffers_of_old_checkpoints_are_passed_over(tmp_path):
    from safetensors.torch import load_file, save_file

    saved(gpt2(), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    extra = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24),
        "transformer.h.0.attn.masked_bias": torch.ones(()),
    }
    save_file(tensors | extra | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, path)
    assert load_pretrained(tmp_path / "hf").config == replace(CONFIG)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, path)
    message = (
        r"hugging_face: lm_head.weight must equal transformer.wte.weight where tie_word_embeddings is true"
    )
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "hf")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG, {"model_type": "bloom"}, "model_type must be one of gpt2, llama, bert, got 'bloom' in"),
        (CONFIG, {"activation_function": "relu"}, "activation_function must be 'gelu_new' or 'gel"),
        (CONFIG, {"n_inner": 100}, "n_inner must be 4 n_embd (192), got 100 in"),
        (CONFIG, {"scale_attn_weights": False}, "scale_attn_weights must be True, got False in"),
        (CONFIG, {"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False in"),
        (CONFIG, {"n_layer": "3"}, "GPTConfig: layers must be a positive integer, got '3'"),
        (CONFIG, {"n_layer": 10**12}, "must have tensors, got 1000000000000 for 40 tensors"),
        (CONFIG, {"layer_norm_epsilon": "x"}, "hugging_face: eps must be a number, got 'x' in"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu' in"),
        (LLAMA, {"attention_bias": True}, "attention_bias must be False, got True in"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias must be False, got True in"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window must be None, got 4096 in"),
        (LLAMA, {"quantization_config": {"a": 1}}, "quantization_config must be None, got {'a': 1} in"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be one of default, linear, ll"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear"}}, "factor must be given for rope_type linear"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn"}}, "rope_type must be one of default, linear, ll"),
        (LLAMA, {"rope_parameters": {"rope_theta": 10**400}}, "theta must be a number, got 1000"),
        (LLAMA, {"num_key_value_heads": 3}, "heads must be a multiple of key_value_heads (3), got 4"),
        (LLAMA, {"hidden_size": 10**12}, "model.embed_tokens.weight must have the config's shape (61, 1000"),
        (LLAMA, {"num_hidden_layers": 2}, "must hold no other tensors, got model.layers.2."),
        (LLAMA, {"num_hidden_layers": 4}, "and 6 more, got none of them"),
    ],
    ids=str,
)  # fmt: skip
def test_refuses_what_it_does_not_compute(config, options, message, tmp_path):
    save_pretrained(make_task(config), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path / "hf")
    assert message in str(error.value)
    assert str(tmp_path / "hf") in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "json: .*config.json must be there, got no such file"),
        ("config.json", "{", "json: .*config.json must be JSON, got "),
        ("config.json", "[" * 100_000, "json: .*config.json must be JSON, got "),
        ("config.json", "[]", "json: .*config.json must be an object, got list"),
        ("model-00001-of-00009.safetensors", None, "00001-of-00009.* must be there, got no such file"),
        ("model-00001-of-00009.safetensors", "short", "must be a whole safetensors file, got "),
        ("model.safetensors.index.json", None, "must hold model.safetensors or .*json, got neither"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}', "must name files beside it"),
        ("model.safetensors.index.json", '{"weight_map": 3}', "weight_map of .* must be an object, got 3"),
    ],
)  # fmt: skip
def test_refuses_files_that_are_missing_or_damaged(name, content, message, tmp_path):
    save_pretrained(make_task(CONFIG), tmp_path / "hf", shard_bytes=50_000)
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    shards[0].rename(tmp_path / "hf" / "model-00001-of-00009.safetensors")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shards[0].name, "model-00001-of-00009.safetensors"))
    load_pretrained(tmp_path / "hf")
    if content is None:
        (tmp_path / "hf" / name).unlink()
    else:
        (tmp_path / "hf" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "hf")


def test_damage_to_the_weights_is_one_clear_error_or_other_weights(tmp_path):
    save_pretrained(make_task(replace(LLAMA, layers=1)), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    refused = 0
    damaged = [whole[:end] for end in range(0, len(whole), 997)]
    for at in [*range(8), *range(8, 8 + length, 7)]:
        damaged += [whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :] for bits in (1, 255)]
    for content in damaged:
        path.write_bytes(content)
        try:
            load_pretrained(tmp_path / "hf")
        except ValueError as error:
            assert str(tmp_path / "hf") in str(error)
            refused += 1
    assert refused > 0.9 * len(damaged)


def test_save_refuses(tmp_path):
    task = make_task()
    with pytest.raises(ValueError, match=r"^save_pretrained: folder must be a new one, got "):
        save_pretrained(task, tmp_path)
    with pytest.raises(ValueError, match=r"^save_pretrained: task must have biases, .*, got bias=False$"):
        save_pretrained(make_task(replace(CONFIG, bias=False)), tmp_path / "a")
    with pytest.raises(ValueError, match=r"^save_pretrained: tokenizer must be byte-level BPE, got charac"):
        save_pretrained(task, tmp_path / "a", Characters("ab"))
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_of_ours_goes_there_and_back(tmp_path, bpe):
    task = make_task(replace(CONFIG, vocabulary_size=bpe.vocabulary_size))
    save_pretrained(task, tmp_path / "hf", bpe)
    text = "def été(x):\n    return 12 * x  # <|endoftext|> 床"
    assert isinstance(bpe, ByteBpe)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.eos_token_id == bpe.end_of_text
    assert theirs("def f(x): return 1")["input_ids"] == bpe.encode("def f(x): return 1")
    again = HuggingFaceFolder(tmp_path / "hf").tokenizer()
    save_tokenizer(again, tmp_path / "tokenizer.json")
    for tokenizer in (again, load_tokenizer(tmp_path / "tokenizer.json")):
        assert (tokenizer.end_of_text, tokenizer.stops) == (bpe.end_of_text, (bpe.end_of_text,))
        assert tokenizer.encode(text) == bpe.encode(text)
        assert tokenizer.decode([*bpe.encode(text), bpe.end_of_text]) == text
        assert tokenizer.prompt(None) == [bpe.end_of_text]
