"""The key-value cache: the model gives the same logits as without it."""

import pytest
import torch
from tiny_gpt import CONFIG, LLAMA, TIED, make_task, make_tokens

from lspm_kernels import use_backend
from lspm_models.models.cache import KeyValueCache
from lspm_models.models.operations import FUSED, PLAIN
from oracle import compare


@pytest.mark.parametrize("pieces", [[1] * 24, [24], [7, 1, 1, 15], [5, 19]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("ops", [FUSED, PLAIN], ids=["fused", "plain"])
@torch.no_grad()
def test_cache_gives_the_logits_of_the_whole_text(pieces, dtype, ops):
    task, tokens = make_task(ops=ops).to(dtype), make_tokens(batch=3)
    cache = KeyValueCache(CONFIG.layers, batch=3, capacity=CONFIG.context)
    cached = torch.cat([task(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    whole = task(tokens)
    with use_backend("reference"):
        truth = make_task().to(dtype).double()(tokens)
    assert cache.length == CONFIG.context
    for t in range(CONFIG.context):
        compare(f"logits at {t}", cached[:, t], truth[:, t], whole[:, t])


@pytest.mark.parametrize("pieces", [[1] * 24, [24], [7, 1, 1, 15], [5, 19]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("ops", [FUSED, PLAIN], ids=["fused", "plain"])
@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["llama", "llama-tied"])
@torch.no_grad()
def test_cache_rotates_and_groups(pieces, dtype, ops, config):
    task, tokens = make_task(config, ops=ops).to(dtype), make_tokens(batch=3)
    cache = KeyValueCache(config.layers, batch=3, capacity=config.context)
    cached = torch.cat([task(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    assert all(held.shape[1] == config.key_value_heads for pair in cache.pairs for held in pair)
    with use_backend("reference"):
        truth = make_task(config).to(dtype).double()(tokens)
    compare("logits", cached, truth, task(tokens))


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt", "llama"])
@torch.no_grad()
def test_cache_shares_a_prompt_and_then_keeps_rows_apart(config):
    task, tokens = make_task(config), make_tokens(batch=2)
    tokens[1, :10] = tokens[0, :10]
    cache = KeyValueCache(CONFIG.layers, batch=2, capacity=CONFIG.context)
    prompt = task(tokens[:1, :10], cache)
    rest = task(tokens[:, 10:], cache)
    with use_backend("reference"):
        truth = make_task(config).double()(tokens)
    cached = torch.cat([prompt.expand(2, -1, -1), rest], dim=1)
    compare("logits", cached, truth, task(tokens))


@torch.no_grad()
def test_cache_is_written_in_place():
    task, tokens = make_task(), make_tokens()
    cache = KeyValueCache(CONFIG.layers, batch=2, capacity=CONFIG.context)
    task(tokens[:, :4], cache)
    assert [held.shape for pair in cache.pairs for held in pair] == 6 * [(2, 2, 24, 24)]  # (B, H, context, D)
    places = [held.data_ptr() for pair in cache.pairs for held in pair]
    task(tokens[:, 4:], cache)
    assert [held.data_ptr() for pair in cache.pairs for held in pair] == places


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["GPT", "Llama"])
def test_cache_refuses(config, request):
    task, tokens = make_task(config), make_tokens()
    name = request.node.callspec.id
    cache = KeyValueCache(CONFIG.layers, batch=2, capacity=8)
    with pytest.raises(
        ValueError, match=rf"^{name}: cache must be used under torch.no_grad\(\), got gradients en"
    ):
        task(tokens, cache)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"^KeyValueCache: tokens must fit the capacity of 8, got 24$"),
    ):
        task(tokens, cache)
