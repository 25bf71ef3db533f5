"""Recording: kernels that are called again on the same tensors do what the ops do of what these then hold."""

import threading

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels
from lspm_kernels.recording import Recording, is_on


def step(x, weights):
    norm, weight, bias, small, scales = weights
    hidden = lspm_kernels.linear(lspm_kernels.layer_norm(x, norm), weight)
    return lspm_kernels.linear(lspm_kernels.bias_act(hidden, bias), small, scales=scales)


def make_weights():
    small = lspm_kernels.quantize_int8(torch.randn(40, 96))
    return torch.rand(64), torch.randn(96, 64), torch.randn(96), *small


@torch.no_grad()
def test_a_replay_gives_the_bits_of_the_ops():
    weights, x = make_weights(), torch.randn(3, 64)
    with Recording() as recording:
        y = step(x, weights)
    assert torch.equal(y, step(x, weights))
    for _ in range(3):
        x.copy_(torch.randn(3, 64))
        recording.replay()
        assert torch.equal(y, step(x, weights))


@torch.no_grad()
def test_a_replay_makes_nothing_of_torchs_again():
    x = torch.randn(3, 64)
    with Recording() as recording:
        y = lspm_kernels.layer_norm(F.relu(x))
    before = y.clone()
    x.copy_(torch.randn(3, 64))
    recording.replay()
    assert torch.equal(y, before)


@torch.no_grad()
@pytest.mark.parametrize("rotated", [False, True])
def test_a_replay_appends_to_a_cache_where_its_lengths_say(rotated):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16)
    caches, lengths = torch.randn(2, 2, 2, 8, 16), torch.tensor([2, 4], dtype=torch.int32)
    expected, angles = caches.clone(), torch.randn(8, 8)
    options = {"causal": True, **({"cos": angles.cos(), "sin": angles.sin()} if rotated else {})}
    with Recording() as recording:
        out = lspm_kernels.attention_with_kv_cache(q, *caches, k, v, cache_seqlens=lengths, **options)
    for step in range(4):
        given = q, *expected, k, v
        wanted = lspm_kernels.attention_with_kv_cache(*given, cache_seqlens=lengths, **options)
        assert torch.equal(out, wanted)
        assert torch.equal(caches, expected)
        lengths += 1
        for x in (q, k, v):
            x.normal_()
        if step < 3:
            recording.replay()
    with pytest.raises(ValueError, match="counts must be at least the new keys and within the cache, got 9"):
        recording.replay()


@torch.no_grad()
def test_calls_of_other_threads_and_after_the_block_are_not_recorded():
    x = torch.randn(3, 64)
    with Recording() as recording:
        thread = threading.Thread(target=lspm_kernels.layer_norm, args=(x,))
        thread.start()
        thread.join()
        assert is_on()
        assert recording.calls == []
        lspm_kernels.layer_norm(x)
    assert not is_on()
    lspm_kernels.layer_norm(x)
    assert len(recording.calls) == 1


def test_an_error_ends_the_recording():
    with pytest.raises(ValueError, match="layer_norm: x must be"), Recording():
        lspm_kernels.layer_norm(3)
    assert not is_on()
