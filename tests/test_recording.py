"""Recording: kernels that are called again on the same tensors do what the ops do of what these then hold."""

import os
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lspm_kernels
from lspm_kernels import compiled
from lspm_kernels.recording import Recording


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
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_of_a_replay_share_the_work_of_each_kernel(threads):
    x, weight, rows = torch.randn(4, 512), torch.randn(700, 512), torch.randn(300, 700)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Recording() as recording:
            y = lspm_kernels.linear(x, weight)
            z = lspm_kernels.bias_act(rows)
    finally:
        torch.set_num_threads(before)
    for tensor in (x, rows):
        tensor.copy_(torch.randn(tensor.shape))
    recording.replay()
    assert torch.equal(y, lspm_kernels.linear(x, weight))
    assert torch.equal(z, lspm_kernels.bias_act(rows))


@torch.no_grad()
def test_replays_of_several_threads_do_not_meet():
    pairs = []
    for _ in range(2):
        x, weight = torch.randn(2, 512), torch.randn(600, 512)
        with Recording() as recording:
            y = lspm_kernels.linear(x, weight)
        pairs.append((recording, y, y.clone()))
        y.zero_()

    def replay(recording):
        for _ in range(50):
            recording.replay()

    threads = [threading.Thread(target=replay, args=(recording,)) for recording, *_ in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected) for _, y, expected in pairs)


@torch.no_grad()
def test_a_replay_within_a_replay():
    x = torch.randn(400, 300)
    with Recording() as inner:
        y = lspm_kernels.bias_act(x)
    with Recording() as outer:
        compiled.call(inner.replay)
        compiled.call(lambda: lspm_kernels.layer_norm(x))  # whose call it makes itself
        z = lspm_kernels.layer_norm(y)
    assert len(outer.calls) == 3
    x.copy_(torch.randn(400, 300))
    outer.replay()
    assert torch.equal(z, lspm_kernels.layer_norm(lspm_kernels.bias_act(x)))


@torch.no_grad()
def test_a_replay_makes_nothing_of_torchs_again():
    x = torch.randn(3, 64)
    with Recording() as recording:
        y = lspm_kernels.layer_norm(F.relu(x))
    assert recording.missed == ["relu"]
    before = y.clone()
    x.copy_(torch.randn(3, 64))
    recording.replay()
    assert torch.equal(y, before)


@torch.no_grad()
@pytest.mark.parametrize(
    ("function", "missed"),
    [
        (lambda x: x + 1, ["add"]),
        (lambda x: x.to(torch.float64), ["to"]),
        (lambda x: x.t().contiguous(), ["contiguous"]),
        (lambda x: x.mul_(2), ["mul_"]),
        (lambda x: torch.empty_like(x).fill_(x[0, 0]), ["fill_"]),
        (lambda x: torch.exp(x, out=x), ["exp"]),
        (lambda x: x.__setitem__(0, x[1]), ["__setitem__"]),
        (lambda x: torch.rand(3), ["rand"]),
        (lambda x: torch.topk(x, 2), ["topk"]),
        (lambda x: x[0, 0].item(), ["item"]),
        (lambda x: bool(x[0, 0]), ["__bool__"]),
        (lambda x: x.numpy(), ["numpy"]),
        (lambda x: x.view(-1)[3:].float().contiguous().unflatten(0, (-1, 1)).requires_grad, []),
        (lambda x: torch.empty_like(x).fill_(3).shape, []),
        (lambda x: compiled.call(lambda: x.mul_(2)), []),
    ],
)
def test_what_a_replay_misses_is_named(function, missed):
    x = torch.randn(3, 64)
    with Recording() as recording:
        function(lspm_kernels.layer_norm(x))
    assert recording.missed == missed
    function(x)
    assert recording.missed == missed


def test_gradients_are_missed():
    x, dy, weight = torch.randn(3, 64), torch.ones(3, 64), torch.randn(64, requires_grad=True)
    with Recording() as recording:
        lspm_kernels.layer_norm(x, weight).backward(dy)
    assert "backward" in recording.missed


@torch.no_grad()
def test_a_compiled_function_in_a_recording():
    def scaled(x):
        return lspm_kernels.layer_norm(x).view(x.shape[1], x.shape[0]) * 2

    x = torch.randn(3, 64)
    with Recording() as recording:
        y = torch.compile(scaled, backend="eager")(x)
    assert "mul" in recording.missed
    assert torch.equal(y, scaled(x))


@torch.no_grad()
def test_modes_that_would_miss_a_replay_are_named():
    with TorchDispatchMode(), Recording() as recording:
        pass
    assert recording.missed == ["what traces, transforms or intercepts calls"]


@torch.no_grad()
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_replay_after_a_fork_waits_for_no_thread():
    x = torch.randn(3, 64)  # so small that each kernel runs on one thread
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Recording() as recording:
            y = lspm_kernels.layer_norm(x)
    finally:
        torch.set_num_threads(before)
    recording.replay()
    expected = y.clone()
    y.zero_()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that hangs
        recording.replay()
        os._exit(0 if torch.equal(y, expected) else 3)
    assert os.waitpid(child, 0)[1] == 0


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
    assert recording.missed == []
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
    with pytest.raises(ValueError, match=r"^attention_with_kv_cache: cache_seqlens must be .*, got 8$"):
        recording.replay()


@torch.no_grad()
def test_calls_of_other_threads_and_after_the_block_are_not_recorded():
    x = torch.randn(3, 64)
    with Recording() as recording:
        thread = threading.Thread(target=lspm_kernels.layer_norm, args=(x,))
        thread.start()
        thread.join()
        assert recording.calls == []
        lspm_kernels.layer_norm(x)
    assert compiled.recorded.get() is None
    lspm_kernels.layer_norm(x)
    assert len(recording.calls) == 1


def test_an_error_ends_the_recording():
    with pytest.raises(ValueError, match="layer_norm: x must be"), Recording():
        lspm_kernels.layer_norm(3)
    assert compiled.recorded.get() is None
