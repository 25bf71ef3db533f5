"""compat.hugging_face: models of transformers with "lspm" equal the same models with "eager"."""

import copy
import re
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

import oracle
from lspm_kernels.compat import hugging_face

transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 97,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}


def gpt2(**options):
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **TEXT, **options)
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(max_position_embeddings=64, **SIZES, **TEXT)
    return transformers.BertForMaskedLM(config)


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, **TEXT, **options))


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=6, **GROUPED, **TEXT))


def gemma2():
    config = transformers.Gemma2Config(
        sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=9, **GROUPED, **TEXT
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss():
    config = transformers.GptOssConfig(
        sliding_window=6,
        num_local_experts=2,
        num_experts_per_tok=1,
        experts_implementation="eager",
        **GROUPED,
        **TEXT,
    )
    return transformers.GptOssForCausalLM(config)


def vit():
    config = transformers.ViTConfig(image_size=32, patch_size=8, initializer_range=0.1, **SIZES)
    return transformers.ViTForImageClassification(config)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=97, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, init_std=0.1,
        max_source_positions=30, max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=None, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


MODELS = [gpt2, bert, llama, mistral, gemma2, gpt_oss, vit, whisper, t5]


@pytest.fixture(autouse=True)
def registered():
    hugging_face.register()


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def wide_softmax(monkeypatch):
    """Eager takes softmax in float32 even of float64, so that its mask's least number is -inf, then NaN."""
    softmax = F.softmax
    monkeypatch.setattr(
        F,
        "softmax",
        lambda x, dim=None, dtype=None: softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype),
    )


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of lspm_kernels.attention that models make."""
    seen, attention = [], hugging_face.attention
    monkeypatch.setattr(
        hugging_face,
        "attention",
        lambda q, k, v, **options: (seen.append({"q": q, "k": k, **options}), attention(q, k, v, **options))[
            1
        ],
    )
    return seen


def three(model, dtype):
    """The model with lspm in dtype, with eager in float64, and with eager in dtype."""
    model = model.to(dtype).eval()
    models = model, copy.deepcopy(model).double(), copy.deepcopy(model)
    for m, implementation in zip(models, ("lspm", "eager", "eager"), strict=True):
        m.set_attn_implementation(implementation)
    return models


def prompts(padded=0):
    ids = torch.randint(3, 97, (2, 17))
    mask = torch.ones_like(ids)
    ids[0, :padded] = mask[0, :padded] = 0
    return ids, mask


def inputs(name, padded):
    ids, mask = prompts(padded)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 60), "decoder_input_ids": ids}
    if name == "t5":
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, 3:9]}
    return {"input_ids": ids, "attention_mask": mask}


def logits_and_gradients(model, batches, padded):
    """The logits, and the gradients of each parameter, of all batches and layers beside each other.

    A bias has 16 numbers, sinks have 4: in one batch their largest rounding error is a matter of luck.
    """
    found = defaultdict(list)
    for batch in batches:
        given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
        logits = model(**given).logits
        if padded and logits.shape[1] == given["attention_mask"].shape[1]:
            logits = logits[given["attention_mask"].bool()]  # what padding gives is nobody's
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
        model.zero_grad()
        (logits * weights.to(logits.dtype)).sum().backward()
        found["logits"].append(logits.detach().flatten())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[re.sub(r"\.\d+\.", ".N.", name)].append(parameter.grad.flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("build", MODELS)
def test_logits_and_gradients(build, padded, dtype, calls):
    name = build.__name__
    if padded and name in ("vit", "whisper"):
        pytest.skip("takes no mask")
    if name == "t5" and dtype == torch.bfloat16:
        pytest.skip("scores have no scale: how one of them is rounded decides, in eager as in ours")
    ours, truth, plain = three(build(), dtype)
    batches = [inputs(name, padded) for _ in range(6)]
    actual = logits_and_gradients(ours, batches, padded)
    assert calls
    count = len(calls)
    truth, plain = (logits_and_gradients(m, batches, padded) for m in (truth, plain))
    assert len(calls) == count
    assert actual.keys() == truth.keys() == plain.keys()
    for parameter in truth:
        assert truth[parameter].isfinite().all(), parameter
        oracle.compare(parameter, actual[parameter], truth[parameter], plain[parameter])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("build", [gpt2, llama, mistral, gemma2, whisper])
def test_generate(build, padded, cache):
    if build is whisper and padded:
        pytest.skip("takes no mask")
    ids, mask = prompts(padded)
    found = []
    for model in three(build(), torch.float32):
        given = {"input_ids": ids, "attention_mask": mask}
        if build is whisper:
            features = torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(4))
            given = {"input_features": features.to(model.dtype), "decoder_input_ids": ids}
        made = model.generate(
            **given, max_new_tokens=4, do_sample=False, cache_implementation=cache, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        found.append((made.sequences, torch.stack(made.logits)))
    (ours, actual), (truths, truth), (_, plain) = found
    assert torch.equal(ours, truths)
    assert truth.isfinite().all()
    oracle.compare("logits", actual, truth, plain.to(actual.dtype))


def test_masks_arrive_in_a_form_the_kernel_likes(calls):
    model = llama().eval()
    model.set_attn_implementation("lspm")
    ids, mask = prompts()
    with torch.no_grad():
        model(ids, attention_mask=mask)
    assert [(c["mask"], c["causal"], c["k"].shape[1]) for c in calls] == [(None, True, 2)] * 2
    calls.clear()
    ids, mask = prompts(5)
    with torch.no_grad():
        model(ids, attention_mask=mask)
    assert [(c["mask"].dtype, tuple(c["mask"].shape), c["causal"]) for c in calls] == [
        (torch.bool, (2, 1, 17, 17), False)
    ] * 2
    calls.clear()
    with torch.no_grad():
        model.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids))
    assert all(c["mask"] is None for c in calls)
    assert [c["causal"] for c in calls] == [True, True, False, False, False, False]


def test_dropout_in_training_alone_and_the_same_under_checkpointing(calls):
    model = gpt2(attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    model.set_attn_implementation("lspm")
    ids, _ = prompts()
    model.eval()
    model(ids)
    assert {c["dropout_p"] for c in calls} == {0.0}
    calls.clear()
    model.train()
    losses, gradients = [], []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.transformer.wte.weight.grad.clone())
    assert {c["dropout_p"] for c in calls} == {0.5}
    assert losses[0] == losses[1]
    assert torch.equal(*gradients)
    torch.manual_seed(6)
    assert model(ids, labels=ids, use_cache=False).loss.item() != losses[0]
