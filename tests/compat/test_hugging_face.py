"""compat.hugging_face: models of transformers with "lspm" equal the same models with "eager"."""

import hugging_face_models as models
import pytest
import torch
import transformers
from hugging_face_models import inputs, logits_and_gradients, prompts, three

import oracle

pytestmark = pytest.mark.usefixtures("registered", "one_thread", "wide_softmax")
MODELS = "gpt2 bert llama mistral gemma2 gpt_oss qwen2 qwen2_moe gemma3 modernbert vit whisper t5".split()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, padded, dtype, calls):
    if padded and name in ("vit", "whisper"):
        pytest.skip("takes no mask")
    if name == "t5" and dtype == torch.bfloat16:
        pytest.skip("scores have no scale: how one of them is rounded decides, in eager as in ours")
    ours, truth, plain = three(models.build(name), dtype)
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


@pytest.mark.parametrize("name", ["git", "git of an image", "pegasus_x"])
def test_models_that_do_not_support_sdpa_see_what_eager_sees(name, calls):
    """For lack of a mask only those that do support it are causal by what their attention tells."""
    ids, _ = prompts()
    given = {"decoder_input_ids": ids[:, :6]} if name == "pegasus_x" else {}
    if name == "git of an image":  # what it hides is no window
        given["pixel_values"] = torch.randn(2, 3, 32, 32)
    found = []
    for model in three(models.build(name.split()[0]), torch.float32):
        with torch.no_grad():
            floats = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in given.items()}
            found.append(model(input_ids=ids, **floats).logits)
    assert calls or name == "git"
    oracle.compare("logits", *found)


@pytest.mark.parametrize("way", ["dynamic", "static", pytest.param("compiled", marks=pytest.mark.long)])
@pytest.mark.parametrize("kept", [1, 3])
def test_queries_are_cut_before_layers_that_share_keys(kept, way):
    """Not the first query stands at the first key then, though nothing is padding."""
    ids, _ = prompts()
    found = []
    for model in three(models.build("gemma4"), torch.float32):
        cache = transformers.StaticCache(model.config, max_cache_len=32) if way == "static" else None
        forward = torch.compile(model, backend="eager") if way == "compiled" else model
        with torch.no_grad():
            found.append(forward(ids, cache=cache, logits_to_keep=kept).logits)
    oracle.compare("logits", *found)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("name", "gpt2 llama mistral gemma2 gpt_oss qwen2 gemma3 whisper".split())
def test_generate(name, padded, cache, chunk):
    """A window of 6, so that a cache of it is full before the second chunk of the prompt."""
    if name == "whisper" and (padded or chunk):
        pytest.skip("takes no mask")
    ids, mask = prompts(padded)
    found = []
    for model in three(models.build(name), torch.float32):
        given = {"input_ids": ids, "attention_mask": mask}
        if name == "whisper":
            features = torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(4))
            given = {"input_features": features.to(model.dtype), "decoder_input_ids": ids}
        made = model.generate(
            **given, max_new_tokens=4, do_sample=False, cache_implementation=cache, output_logits=True,
            prefill_chunk_size=chunk, return_dict_in_generate=True,
        )  # fmt: skip
        found.append((made.sequences, torch.stack(made.logits)))
    (ours, actual), (truths, truth), (_, plain) = found
    assert torch.equal(ours, truths)
    assert truth.isfinite().all()
    oracle.compare("logits", actual, truth, plain.to(actual.dtype))


def test_masks_arrive_in_a_form_the_kernel_likes(calls):
    model = models.llama().eval()
    model.set_attn_implementation("lspm")
    ids, mask = prompts()
    with torch.no_grad():
        model(ids, attention_mask=mask)
    assert [(c["mask"], c["causal"], c["k"].shape[1]) for c in calls] == [(None, True, 2)] * 2
    calls.clear()
    ids, mask = prompts(5)
    with torch.no_grad():
        model(ids, attention_mask=mask)
    assert [(c["mask"].dtype, tuple(c["mask"].shape), c["window"]) for c in calls] == [
        (torch.bool, (2, 1, 1, 17), (None, 0))
    ] * 2
    calls.clear()
    with torch.no_grad():
        model.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids))
    assert all(c["mask"] is None for c in calls)
    assert [c["causal"] for c in calls] == [True, True, False, False, False, False]


def test_dropout_in_training_alone_and_the_same_under_checkpointing(calls):
    model = models.gpt2(attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
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
