"""accelerate on models of transformers: outputs and gradients by the oracle's rule, and everything back."""

import copy

import hugging_face_models as models
import pytest
import torch
from hugging_face_models import inputs, logits_and_gradients, prompts

import lspm_kernels as lk
import oracle
from lspm_kernels.acceleration import rotations, sums
from lspm_kernels.acceleration.logits import Logits

pytestmark = pytest.mark.usefixtures("one_thread", "wide_softmax", "of_all_sizes")
MODELS = "gpt2 bert llama gemma2 qwen2 gemma3 modernbert vit whisper t5".split()
ROTATED = {"rotary", "add_rms_norm"}
OWN = {name: {"add_layer_norm"} for name in ("gpt2", "bert", "vit", "whisper")}
OWN |= {name: ROTATED for name in ("llama", "gemma2", "qwen2", "gemma3")}
OWN |= {"modernbert": {"rotary", "add_layer_norm"}, "t5": set()}
CLASSES = 5000  # enough for a head to keep its logits to itself


@pytest.fixture
def of_all_sizes(monkeypatch):
    """Kernels take what is too small to pay, too."""
    for module, name in ((rotations, "_LEAST"), (rotations, "_LEAST_IN_INFERENCE_MODE"), (sums, "_LEAST")):
        monkeypatch.setattr(module, name, 1)


def three(name, dtype):
    """The model itself, which is made faster, its float64 and its plain copy."""
    model = models.build(name).to(dtype).eval()
    return model, copy.deepcopy(model).double(), copy.deepcopy(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, dtype):
    if name == "t5" and dtype == torch.bfloat16:
        pytest.skip("scores have no scale: how one of them is rounded decides, in eager as in ours")
    ours, truth, plain = three(name, dtype)
    padded = 0 if name in ("vit", "whisper") else 5
    batches = [inputs(name, padded) for _ in range(6)]
    before = logits_and_gradients(ours, batches, padded)
    report = lk.accelerate(ours)
    assert ("config" in report.replaced) == (name != "gemma2")  # eager: sdpa has no softcap
    own = {what.split()[-1] for what in report.replaced.values() if what.startswith("its own forward")}
    assert own == OWN[name]
    truth.set_attn_implementation("eager")
    actual, truth, plain = (logits_and_gradients(m, batches, padded) for m in (ours, truth, plain))
    for parameter in truth:
        oracle.compare(parameter, actual[parameter], truth[parameter], plain[parameter])
    lk.restore(ours)
    for parameter, value in logits_and_gradients(ours, batches, padded).items():
        assert torch.equal(value, before[parameter]), parameter


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "whisper", "t5"])
def test_generate(name, cache):
    ours, _, plain = three(name, torch.float32)
    ids, mask = prompts(0 if name == "whisper" else 5)
    given = {"input_ids": ids, "attention_mask": mask}
    if name == "whisper":
        features = torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(4))
        given = {"input_features": features, "decoder_input_ids": ids}
    lk.accelerate(ours)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    found = [m.generate(**given, **options) for m in (ours, plain)]
    assert torch.equal(*found)


def labelled(name, **options):
    text = {**models.TEXT, "vocab_size": CLASSES}
    models_text, models.TEXT = models.TEXT, text
    try:
        return models.build(name, **options).train()
    finally:
        models.TEXT = models_text


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def losses(model, ids, labels, **options):
    out = model(input_ids=ids, labels=labels, **options)
    grads = torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)
    return out, {"loss": out.loss.detach(), **dict(zip(map(str, range(len(grads))), grads, strict=True))}


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 11}])
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "gemma2"])
def test_a_loss_needs_no_logits(name, options, monkeypatch):
    model = without_dropout(labelled(name))
    if name == "gpt2":
        model.config.attn_pdrop = 0.0
        for block in model.transformer.h:
            block.attn.attn_dropout.p = 0.0
    if name == "bert" and options:
        options = {}
    ids = torch.randint(3, 97, (2, 17))
    labels = ids.masked_fill(torch.rand(2, 17) < 0.3, -100)
    truth, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    report = lk.accelerate(model)
    assert "head, whose loss needs no logits" in report.replaced.values()
    made, tensor = [], Logits.tensor
    monkeypatch.setattr(Logits, "tensor", lambda self: (made.append(self.shape), tensor(self))[1])
    out, actual = losses(model, ids, labels, **options)
    # Gemma 2 bounds its logits by tanh, which is no linear layer: there they are a tensor.
    assert bool(made) == (name == "gemma2")
    (_, truth), (expected, plain) = (losses(m, ids, labels, **options) for m in (truth, plain))
    for key, value in truth.items():
        if value is not None:
            oracle.compare(key, actual[key], value, plain[key])
    torch.testing.assert_close(torch.as_tensor(out.logits.detach()), expected.logits.detach())
    assert out.logits.shape == expected.logits.shape
    lk.restore(model)
    assert isinstance(model(input_ids=ids, labels=labels).logits, torch.Tensor)


def test_the_config_stays_that_of_other_models():
    model = models.build("llama").eval()
    config = model.config
    other = type(model)(config).eval()
    lk.accelerate(model)
    assert config._attn_implementation == other.config._attn_implementation == "sdpa"
    assert model.model.layers[0].self_attn.config is model.config is not config
    lk.restore(model)
    assert model.config is model.model.layers[0].self_attn.config is config


@pytest.mark.filterwarnings("ignore")
def test_what_is_set_in_a_config_is_set_after_it_is_restored():
    model, other = models.build("llama"), models.build("llama").config
    config, words = model.config, model.config.id2label
    lk.accelerate(model)
    config.rms_norm_eps = 1e-3  # as by another model, that shares it
    model.resize_token_embeddings(103)
    model.config.use_cache = False
    lk.restore(model)
    assert model.config is config
    assert (config.vocab_size, config.use_cache, config.rms_norm_eps) == (103, False, 1e-3)
    assert config.id2label is words
    assert config._attn_implementation == "sdpa"
    lk.accelerate(model)
    model.set_attn_implementation("eager")
    model.model.config = other
    lk.restore(model)
    assert config._attn_implementation == "eager"
    assert model.model.config is other


@pytest.mark.parametrize("name", ["eager", "flex_attention"])
def test_attention_that_was_chosen_stays(name):
    model = models.build("llama")
    model.config._attn_implementation = name
    report = lk.accelerate(model)
    assert report.left["config"] == f"its attention is {name!r}: only what is 'sdpa' is replaced"


def test_attention_that_was_chosen_for_a_part_stays():
    model = models.build("clip")
    model.config.text_config._attn_implementation = "eager"
    lk.accelerate(model)
    assert model.text_model.config._attn_implementation == "eager"
    assert model.text_model.config is model.config.text_config
    ours = model.config._attn_implementation, model.vision_model.config._attn_implementation
    assert ours == ("lspm_in_place_of_sdpa",) * 2
    lk.restore(model)
    assert model.vision_model.config._attn_implementation == model.config._attn_implementation == "sdpa"
    assert model.text_model.config._attn_implementation == "eager"


def test_attention_whose_name_is_asked_for_keeps_it():
    model = models.build("deepseek_v32").eval()
    ids, _ = prompts()
    before = model(ids).logits
    report = lk.accelerate(model)
    assert report.left["config"] == "its code does something else where its attention is not called 'sdpa'"
    torch.testing.assert_close(model(ids).logits, before)


def test_probabilities_that_are_asked_for_are_none_as_with_sdpa():
    model = models.build("gpt2").eval()
    ids, _ = prompts()
    before = model(ids, output_attentions=True)
    lk.accelerate(model)
    after = model(ids, output_attentions=True)
    assert (before.attentions is None) == (after.attentions is None)
    hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    assert model(ids.new_zeros(1, 3), use_cache=False).logits.shape == (1, 3, 97)


def test_saved_and_loaded_it_is_the_model(tmp_path):
    model = models.build("llama").eval()
    ids, _ = prompts()
    before = model(ids).logits
    lk.accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    torch.testing.assert_close(loaded(ids).logits, before)


def test_checkpointed_it_has_the_same_gradients():
    model = without_dropout(labelled("llama"))
    ids = torch.randint(3, 97, (2, 17))
    plain = copy.deepcopy(model)
    for m in (model, plain):
        m.gradient_checkpointing_enable()
    lk.accelerate(model)
    (_, actual), (_, expected) = losses(model, ids, ids), losses(plain, ids, ids)
    torch.testing.assert_close(actual, expected)


def test_float64_is_computed_as_before():
    model = models.build("llama").double().eval()
    ids, _ = prompts(5)
    before = model(ids).logits
    lk.accelerate(model)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_no_graph_is_broken(name):
    model = models.build(name).eval()
    ids, _ = prompts()
    expected = model(ids).logits
    lk.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
