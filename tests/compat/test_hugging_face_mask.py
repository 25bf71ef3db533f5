"""compat.hugging_face_mask: what WindowMask says equals what transformers writes, and nothing is written."""

import subprocess
import sys

import hugging_face_models as models
import pytest
import torch
from hugging_face_models import prompts, transformers

import lspm_kernels as lk
from lspm_kernels.compat import hugging_face
from lspm_kernels.compat.hugging_face_mask import WindowMask, window_mask

masks = transformers.masking_utils
pytestmark = pytest.mark.usefixtures("registered")
WINDOW = 6
# How a prompt arrives: at once, in parts that fill a cache of the window before, at and after their end, and
# token by token.
PARTS = [(17,), (3, 2, 12), (5, 1, 4, 1, 6), (6, 5, 6), (1,) * 9, (4, 1)]


def mistral():
    options = {**models.GROUPED, **models.TEXT, "attn_implementation": "lspm"}
    return transformers.MistralConfig(sliding_window=WINDOW, **options)


def caches(config):
    return {
        "none": lambda: None,
        "sliding": lambda: transformers.DynamicCache(config=config),
        "full": transformers.DynamicCache,
        "static": lambda: transformers.StaticCache(config=config, max_cache_len=20),
        "static, shorter than the window": lambda: transformers.StaticCache(config=config, max_cache_len=4),
        "static, full": lambda: transformers.StaticCache(config=llama(), max_cache_len=20),
    }


def llama():
    return transformers.LlamaConfig(**models.GROUPED, **models.TEXT, attn_implementation="lspm")


def meaning(mask, key_length):
    """The bool mask that attention_forward would have attention see."""
    B, _, T_q, _ = mask.shape
    keys, window, padding = mask.arguments(torch.empty(B, 4, T_q, 8), torch.empty(B, 2, key_length, 8))
    left, right = (key_length if side is None else side for side in window)
    apart = torch.arange(T_q)[:, None] + keys - T_q - torch.arange(keys)
    seen = ((apart <= left) & (apart >= -right)).expand(B, 1, T_q, keys)
    seen = seen if padding is None else seen & padding
    return torch.nn.functional.pad(seen, (0, key_length - keys))


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("padded", [0, 2, 5])
@pytest.mark.parametrize("cache", list(caches(None)))
@pytest.mark.parametrize("make", ["create_causal_mask", "create_sliding_window_causal_mask"])
def test_the_window_equals_what_transformers_writes(make, cache, padded, parts):
    config = mistral()
    if cache == "static, shorter than the window":
        parts = tuple(parts[:1]) if parts[0] <= 4 else (3, 1)
    past = caches(config)[cache]()
    _, mask = prompts(padded)
    seen, found = 0, 0
    for part in parts[:1] if past is None else parts:
        seen += part
        x = torch.zeros(2, part, 64)
        given = getattr(masks, make)(config, x, mask[:, :seen], past)
        config._attn_implementation = "eager"
        written = getattr(masks, make)(config, x, mask[:, :seen], past) == 0
        config._attn_implementation = "lspm"
        states = torch.zeros(2, 2, part, 16)
        keys = states if past is None else past.update(states, states, 0)[0]
        assert written.shape == (2, 1, part, keys.shape[2])
        if isinstance(given, WindowMask):  # read after the cache has grown, as a layer would
            found += 1
            assert part > 1 or not cache.startswith("static")
            assert torch.equal(meaning(given, keys.shape[2]), written)
            assert torch.equal(given.written(), written)
        elif given is None:  # causal from the first key, or a lone query that sees all
            causal = torch.ones_like(written).tril() if part > 1 else torch.ones_like(written)
            assert torch.equal(causal, written)
        else:  # a step over a static cache
            assert part == 1 and cache.startswith("static") and torch.equal(given, written)
    if (make == "create_sliding_window_causal_mask" and parts[0] > WINDOW) or (padded and parts[0] > 1):
        assert found


@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("make", ["create_bidirectional_mask", "create_bidirectional_sliding_window_mask"])
def test_windows_to_both_sides(make, padded):
    config, x, mask = mistral(), torch.zeros(2, 17, 64), prompts(padded)[1]
    given = getattr(masks, make)(config, x, mask)
    config._attn_implementation = "eager"
    written = getattr(masks, make)(config, x, mask)
    if make == "create_bidirectional_mask" and not padded:
        assert given is None and written is None
    else:
        assert torch.equal(meaning(given, 17), (written == 0).expand(2, 1, 17, 17))


def some(b, h, q, k):
    return k == 2


def unproven():
    """Arguments under which a mask is more than a window with padding, or must not depend on what is seen."""
    sliding = "create_sliding_window_causal_mask"
    yield "or mask", sliding, {"or_mask_function": some}
    yield "and mask", sliding, {"and_mask_function": some}
    yield "a window as a mask of the caller", sliding, {"and_mask_function": masks.sliding_window_overlay(3)}
    yield "blocks", sliding, {"block_sequence_ids": torch.arange(17).expand(2, 17) // 5}
    yield "packed", sliding, {"position_ids": torch.arange(17).expand(2, 17) % 8, "attention_mask": None}
    yield "chunks", "create_chunked_causal_mask", {}


@pytest.mark.parametrize(("make", "options"), [pytest.param(*x[1:], id=x[0]) for x in unproven()])
def test_what_is_no_window_is_written(make, options):
    config, x, mask = mistral(), torch.zeros(2, 17, 64), prompts()[1]
    config.attention_chunk_size = WINDOW
    given = {"attention_mask": mask, "past_key_values": None, **options}
    ours = getattr(masks, make)(config, x, **given)
    config._attn_implementation = "sdpa"
    theirs = getattr(masks, make)(config, x, **given)
    assert type(ours) is torch.Tensor
    assert torch.equal(ours, theirs)


def test_what_older_versions_and_traces_ask_is_passed_on():
    written = masks.sdpa_mask(
        2, 9, 9, mask_function=masks.sliding_window_causal_mask_function(3), local_size=3
    )
    given = {
        "batch_size": 2, "q_length": 9, "kv_length": 9, "local_size": 3,
        "mask_function": masks.sliding_window_causal_mask_function(3),
    }  # fmt: skip
    assert isinstance(window_mask(masks, **given), WindowMask)
    chunks = masks.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64))
    for function in (masks.sliding_window_causal_mask_function(4), chunks):
        assert not isinstance(window_mask(masks, **given | {"mask_function": function}), WindowMask)
    traced = torch.compile(lambda: window_mask(masks, **given), backend="eager", fullgraph=True)()
    assert type(traced) is torch.Tensor and torch.equal(traced, written)
    with pytest.raises(TypeError, match="q_length"):  # sdpa_mask's own
        window_mask(masks, **{k: v for k, v in given.items() if k != "q_length"})


def example():
    given = {"batch_size": 2, "q_length": 9, "kv_length": 9, "local_size": 3}
    return window_mask(masks, mask_function=masks.sliding_window_causal_mask_function(3), **given)


def test_whatever_touches_a_mask_meets_it_written():
    written, x = example().written(), torch.randn(2, 1, 9, 9)
    assert torch.equal(example()[..., :4], written[..., :4])
    assert torch.equal(~example(), ~written)
    assert torch.equal(example() & written, written) and torch.equal(written & example(), written)
    assert torch.equal(example() | written, written)
    assert torch.equal(x.masked_fill(example(), 0.0), x.masked_fill(written, 0.0))
    assert torch.equal(torch.where(example(), x, 0.0), torch.where(written, x, 0.0))
    assert torch.equal(torch.cat([example(), example()]), torch.cat([written, written]))
    assert torch.equal(example().to(torch.float32), written.float())
    mask = example()
    q = torch.randn(2, 1, 9, 8)
    before, _ = hugging_face.attention_forward(torch.nn.Module(), q, q, q, mask)
    assert mask._written is None and mask.contiguous() is mask
    mask[:, :, 3:, 3:].fill_(False)
    after, _ = hugging_face.attention_forward(torch.nn.Module(), q, q, q, mask)
    expected = lk.attention(q, q, q, mask=mask.written())
    assert not torch.equal(before, after) and torch.equal(after, expected.transpose(1, 2))


def test_a_mask_of_other_lengths_is_refused_and_a_bias_is_added():
    q = torch.randn(2, 1, 9, 8)
    with pytest.raises(ValueError, match=r"^attention: mask must broadcast to"):
        hugging_face.attention_forward(torch.nn.Module(), q, q[:, :, :8], q[:, :, :8], example())
    bias = torch.randn(1, 1, 9, 9)
    out, _ = hugging_face.attention_forward(torch.nn.Module(), q, q, q, example(), position_bias=bias)
    expected = lk.attention(q, q, q, window=(2, 0), bias=bias)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_a_compiled_layer_takes_a_window():
    layer = torch.compile(
        lambda q, mask: hugging_face.attention_forward(torch.nn.Module(), q, q, q, mask)[0],
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    mask, q = example(), torch.randn(2, 1, 9, 8)
    out = layer(q, mask)
    assert mask._written is None
    torch.testing.assert_close(out.transpose(1, 2), lk.attention(q, q, q, window=(2, 0)))


@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("name", "mistral gemma2 gpt_oss qwen2 qwen2_moe gemma3 modernbert".split())
def test_models_hand_over_the_window(name, padded, calls, monkeypatch):
    """No mask is written in training, over caches and in parts; attention gets the window of its layer."""
    sdpa_mask, wrote = masks.sdpa_mask, []
    monkeypatch.setattr(masks, "sdpa_mask", lambda **given: (wrote.append(sdpa_mask(**given)), wrote[-1])[1])
    model = models.build(name).train()
    model.set_attn_implementation("lspm")
    ids, mask = prompts(padded)
    window = (4, 4) if name == "modernbert" else (5, 0)
    model(ids, attention_mask=mask).logits.sum().backward()
    shape = (2, 1, 1, 17) if padded else None
    found = [(c["window"], c["mask"] if c["mask"] is None else tuple(c["mask"].shape)) for c in calls]
    assert (window, shape) in found and {s for _, s in found} == {shape}
    if name != "modernbert":
        for cache in ("dynamic", "static"):
            calls.clear()
            model.generate(
                ids, attention_mask=mask, max_new_tokens=3, do_sample=False, cache_implementation=cache,
                prefill_chunk_size=7,
            )  # fmt: skip
            assert any(c["window"] == window and c["q"].shape[2] == 7 for c in calls)
            assert all(c["mask"] is None or c["mask"].shape[2] == 1 for c in calls)
    assert all(w is None or w.shape[2] == 1 for w in wrote)  # a step over a static cache has one query


MEMORY = """
import resource, torch, transformers
from lspm_kernels.compat import hugging_face
hugging_face.register()
torch.set_num_threads(1)
model = transformers.{name}ForCausalLM(transformers.{name}Config(
    vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
    num_key_value_heads=1, head_dim=8, sliding_window=64, pad_token_id=0, max_position_embeddings=9000))
model.set_attn_implementation("lspm")
def run(T, padded):
    mask = torch.ones(1, T, dtype=torch.long)
    mask[0, :padded] = 0
    model(torch.ones(1, T, dtype=torch.long), attention_mask=mask).logits.sum().backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
run(64, 5)
before = peak()
run(8192, 0)
run(8192, 5)
print(peak() - before)
"""


@pytest.mark.parametrize("name", ["Mistral", pytest.param("Gemma2", marks=pytest.mark.long)])
def test_memory_is_linear_in_the_length(name):
    code = MEMORY.format(name=name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64  # MiB; a mask of one byte to a score alone would be 64
