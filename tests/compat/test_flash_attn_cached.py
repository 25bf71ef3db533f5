"""compat.flash_attn: packed sequences and caches, in FlashAttention-2's signatures."""

import inspect

import pytest
import torch

import lspm_kernels as lk
import oracle
from lspm_kernels.compat.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from lspm_kernels.reference import attention as dense
from lspm_kernels.reference import attention_varlen as reference

LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,"
    " deterministic=False, return_attn_probs=False"
)
CACHED = (
    "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,"
    " cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,"
    " window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,"
    " return_softmax_lse=False)"
)
ENDS_Q, ENDS_K = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 20, 23, 60], [0, 31, 40, 90]))
SLOPES = torch.linspace(0.1, 1.0, 12).view(3, 4)


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (flash_attn_varlen_func, f"(q, k, v, {LENGTHS}, {OPTIONS}, block_table=None)"),
        (flash_attn_varlen_qkvpacked_func, f"(qkv, cu_seqlens, max_seqlen, {OPTIONS})"),
        (flash_attn_varlen_kvpacked_func, f"(q, kv, {LENGTHS}, {OPTIONS})"),
        (flash_attn_with_kvcache, CACHED),
    ],
)
def test_signatures_are_flash_attentions(function, signature):
    parameters = inspect.signature(function).parameters.values()
    bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    assert str(bare) == signature


def packed(dtype=torch.float32):
    return [torch.randn(rows, heads, 16).to(dtype) for rows, heads in ((60, 4), (90, 2), (90, 2))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("given", "means"),
    [
        ({}, {}),
        ({"causal": True, "softmax_scale": 0.3}, {"causal": True, "scale": 0.3}),
        ({"window_size": [9, -1], "softcap": 3.0}, {"window": (9, None), "softcap": 3.0}),
        (
            {"window_size": torch.tensor([5, 2]), "alibi_slopes": SLOPES},
            {"window": (5, 2), "alibi_slopes": SLOPES},
        ),
    ],
    ids=["none", "causal", "window and cap", "slopes"],
)  # fmt: skip
def test_packed_sequences(given, means, dtype):
    oracle.check(
        lambda *t: flash_attn_varlen_func(*t, ENDS_Q, ENDS_K, 37, 50, **given, return_attn_probs=True)[:2],
        lambda *t: reference.attention_varlen(*t, ENDS_Q, ENDS_K, **means, return_lse=True),
        packed(dtype),
    )


def test_sequences_in_one_tensor():
    options, means = (0.0, 0.2, True, (7, -1), 3.0, SLOPES), {"scale": 0.2, "window": (7, 0), "softcap": 3.0}
    oracle.check(
        lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, ENDS_K, 50, *options),
        lambda qkv: reference.attention_varlen(
            *qkv.unbind(1), ENDS_K, ENDS_K, **means, alibi_slopes=SLOPES.to(qkv.dtype)
        ),
        [torch.randn(90, 3, 4, 16)],
    )
    oracle.check(
        lambda q, kv: flash_attn_varlen_kvpacked_func(q, kv, ENDS_Q, ENDS_K, 37, 50, *options, False, True)[
            :2
        ],
        lambda q, kv: reference.attention_varlen(
            q, *kv.unbind(1), ENDS_Q, ENDS_K, **means, alibi_slopes=SLOPES.to(q.dtype), return_lse=True
        ),
        [torch.randn(60, 4, 16), torch.randn(90, 2, 2, 16)],
    )


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (
            flash_attn_varlen_qkvpacked_func,
            (torch.zeros(90, 2, 4, 16), ENDS_K, 50),
            "qkv must be a tensor (rows, 3, H, D), got (90, 2, 4, 16)",
        ),
        (
            flash_attn_varlen_kvpacked_func,
            (torch.zeros(60, 4, 16), None, ENDS_Q, ENDS_K, 37, 50),
            "kv must be a tensor (rows, 2, H_kv, D), got NoneType",
        ),
    ],
)
def test_bad_tensors_of_sequences(function, args, message):
    with pytest.raises(ValueError) as raised:
        function(*args)
    assert str(raised.value) == f"{function.__name__}: {message}"


def test_what_packed_sequences_return():
    q, k, v = packed()
    out, lse, s_dmask = flash_attn_varlen_func(q, k, v, ENDS_Q, ENDS_K, 37, 50, return_attn_probs=True)
    assert (out.shape, lse.shape, lse.dtype, s_dmask) == ((60, 4, 16), (4, 60), torch.float32, None)
    assert torch.equal(out, flash_attn_varlen_func(q, k, v, ENDS_Q, ENDS_K, 37, 50))
    torch.manual_seed(3)
    first = flash_attn_varlen_func(q, k, v, ENDS_Q, ENDS_K, 37, 50, 0.4)
    torch.manual_seed(3)
    assert torch.equal(first, flash_attn_varlen_func(q, k, v, ENDS_Q, ENDS_K, 37, 50, dropout_p=0.4))


def test_the_longest_sequence_may_be_a_tensor():
    """As lengths.max() gives it; FlashAttention-2's operators take it for an int."""
    q, k, v = packed()
    longest = ENDS_Q.diff().max(), ENDS_K.diff().max()
    out = flash_attn_varlen_func(q, k, v, ENDS_Q, ENDS_K, *longest)
    assert torch.equal(out, flash_attn_varlen_func(q, k, v, ENDS_Q, ENDS_K, 37, 50))
    with pytest.raises(ValueError, match="max_seqlen_q must be at least the longest sequence 37, got 36"):
        flash_attn_varlen_func(q, k, v, ENDS_Q, ENDS_K, longest[0] - 1, longest[1])
    with pytest.raises(ValueError, match=r"max_seqlen_k must be an integer of at least 0, got 50\.0"):
        flash_attn_varlen_func(q, k, v, ENDS_Q, ENDS_K, longest[0], longest[1].float())


def test_unpadding_a_batch_changes_nothing():
    q, k, v = torch.randn(3, 2, 30, 4, 16)
    ends = torch.tensor([0, 30, 60], dtype=torch.int32)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attn_varlen_func(*flat, ends, ends, 30, 30, causal=True)
    assert torch.equal(out.view(2, 30, 4, 16), flash_attn_func(q, k, v, causal=True))


def test_a_cache_that_grows():
    k_cache, v_cache = torch.zeros(2, 40, 2, 16), torch.zeros(2, 40, 2, 16)
    q, k, v = (torch.randn(2, 33, heads, 16) for heads in (4, 2, 2))
    at, outs = torch.tensor([0, 0], dtype=torch.int32), []
    for begin, end in ((0, 30), (30, 31), (31, 33)):
        now = slice(begin, end)
        outs.append(
            flash_attn_with_kvcache(
                q[:, now], k_cache, v_cache, k[:, now], v[:, now], cache_seqlens=at, causal=True
            )
        )
        at = at + (end - begin)
    assert torch.equal(k_cache[:, :33], k) and torch.equal(v_cache[:, :33], v)
    meant = dense.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)
    torch.testing.assert_close(torch.cat(outs, 1), meant, rtol=1e-5, atol=1e-5)


def test_pages_and_rotation_are_those_of_attention_with_kv_cache():
    pages = torch.randn(2, 9, 16, 2, 16)
    table, at = torch.randperm(9)[:8].view(2, 4).int(), torch.tensor([10, 44], dtype=torch.int32)
    q, k, v = torch.randn(2, 2, 4, 16), torch.randn(2, 2, 2, 16), torch.randn(2, 2, 2, 16)
    cos, sin = torch.rand(64, 4), torch.rand(64, 4)
    mine, theirs = pages.clone(), pages.clone()
    out, lse = flash_attn_with_kvcache(
        q, *mine, k, v, cos, sin, at, block_table=table, causal=True, window_size=(30, -1), num_splits=4,
        return_softmax_lse=True,
    )  # fmt: skip
    meant = lk.attention_with_kv_cache(
        *(x.transpose(1, 2) for x in (q, *theirs, k, v)), cos=cos, sin=sin, interleaved=True,
        cache_seqlens=at, block_table=table, causal=True, window=(30, None), return_lse=True,
    )  # fmt: skip
    assert torch.equal(out, meant[0].transpose(1, 2)) and torch.equal(lse, meant[1])
    assert out.is_contiguous() and torch.equal(mine, theirs) and not torch.equal(mine, pages)


ROOM = "cache_seqlens must be from 0 to the cache's room of 40 less 1 new keys, got 40"


def test_bad_arguments():
    cache = torch.zeros(2, 40, 2, 16)
    new, kv = cache[:, :1], flash_attn_with_kvcache
    for message, call in {
        "flash_attn_with_kvcache: q must be a tensor (B, T, H, D), got (4, 16)": lambda: kv(
            cache[0, :4, 0], cache, cache
        ),
        "flash_attn_with_kvcache: k must be a tensor (B, T, H, D), got int": lambda: kv(new, cache, cache, 3),
        "attention_varlen: cu_seqlens_k must end with the number of rows 90, got 60": lambda: (
            flash_attn_varlen_func(*packed(), ENDS_Q, ENDS_Q, 37, 50)
        ),
        f"attention_with_kv_cache: {ROOM}": lambda: kv(new, cache, cache, new, new, cache_seqlens=40),
    }.items():
        with pytest.raises(ValueError) as raised:
            call()
        assert str(raised.value) == message


@pytest.mark.parametrize("returns_lse", [False, True])
def test_a_cache_in_a_model_outside_no_grad(returns_lse):
    q, k, v = (torch.randn(1, 3, 2, 16) for _ in range(3))
    q.requires_grad_()
    table, ends = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    calls = {
        "flash_attn_varlen_func": lambda q: flash_attn_varlen_func(
            q[0], k, v, ends, ends, 3, 3, block_table=table, return_attn_probs=returns_lse
        ),
        "flash_attn_with_kvcache": lambda q: flash_attn_with_kvcache(q, k, v, return_softmax_lse=returns_lse),
    }
    for name, call in calls.items():
        plain, wanted = ([out] if torch.is_tensor(out := call(x)) else out for x in (q.detach(), q))
        assert all(a is b or torch.equal(a, b) for a, b in zip(plain, wanted, strict=True))
        with pytest.raises(NotImplementedError, match=f"^{name}: there is no backward through a cache"):
            wanted[0].sum().backward()
