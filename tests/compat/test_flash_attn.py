"""compat.flash_attn: FlashAttention-2's signatures and what they mean."""

import inspect

import pytest
import torch

import oracle
from lspm_kernels.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from lspm_kernels.compat.flash_attn import flash_attn_interface as flash_attn
from lspm_kernels.reference import attention as reference
from lspm_kernels.reference import philox

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,"
    " deterministic=False, return_attn_probs=False)"
)
SLOPES = torch.linspace(0.1, 1.0, 8)
# Arguments of FlashAttention-2, and what they mean to the reference.
OPTIONS = {
    "none": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (9, 4)}, {"window": (9, 4)}),
    "window to the left, a list": ({"window_size": [20, -1]}, {"window": (20, None)}),
    "window to the right, a tensor": ({"window_size": torch.tensor([-1, 3])}, {"window": (None, 3)}),
    "causal window": ({"window_size": (12, 5), "causal": True}, {"window": (12, 0)}),
    "scale": ({"softmax_scale": 0.3}, {"scale": 0.3}),
    "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "slopes": ({"alibi_slopes": SLOPES[:4], "causal": True}, {"alibi_slopes": SLOPES[:4], "causal": True}),
    "slopes of a batch": (
        {"alibi_slopes": SLOPES.view(2, 4), "deterministic": True},
        {"alibi_slopes": SLOPES.view(2, 4)},
    ),
}


def tensors(dtype, T_q=40, T_k=50, H_kv=2):
    return [torch.randn(2, T, H, 16).to(dtype) for T, H in ((T_q, 4), (T_k, H_kv), (T_k, H_kv))]


def meant(q, k, v, **options):
    """The reference on (B, T, H, D) tensors."""
    out = reference.attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    return (out[0].transpose(1, 2), out[1]) if options.get("return_lse") else out.transpose(1, 2)


@pytest.mark.parametrize(
    ("function", "head"),
    [
        (flash_attn_func, "(q, k, v, "),
        (flash_attn_qkvpacked_func, "(qkv, "),
        (flash_attn_kvpacked_func, "(q, kv, "),
    ],
)
def test_signatures_are_flash_attentions(function, head):
    parameters = inspect.signature(function).parameters.values()
    bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    assert str(bare) == head + TAIL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, dtype):
    given, means = OPTIONS[options]
    oracle.check(lambda *t: flash_attn_func(*t, **given), lambda *t: meant(*t, **means), tensors(dtype))


@pytest.mark.parametrize("T_q, T_k", [(50, 20), (1, 30)])
def test_causal_is_bottom_right(T_q, T_k):
    oracle.check(
        lambda *t: flash_attn_func(*t, causal=True),
        lambda *t: meant(*t, causal=True),
        tensors(torch.float32, T_q, T_k),
    )


def test_packed():
    qkv = torch.randn(2, 40, 3, 4, 16)
    oracle.check(
        lambda qkv: flash_attn_qkvpacked_func(qkv, 0.0, 0.2, True, (7, -1), 3.0, SLOPES[:4]),
        lambda qkv: meant(
            *qkv.unbind(2), scale=0.2, window=(7, 0), softcap=3.0, alibi_slopes=SLOPES[:4].to(qkv.dtype)
        ),
        [qkv],
    )
    q, kv = torch.randn(2, 30, 4, 16), torch.randn(2, 40, 2, 2, 16)
    oracle.check(
        lambda q, kv: flash_attn_kvpacked_func(q, kv, 0.0, 0.2, True, (7, -1), 3.0, SLOPES[:4], False, True)[
            :2
        ],
        lambda q, kv: meant(
            q, *kv.unbind(2), scale=0.2, window=(7, 0), softcap=3.0, alibi_slopes=SLOPES[:4], return_lse=True
        ),
        [q, kv],
    )


def test_return_attn_probs_gives_three():
    given = tensors(torch.bfloat16)
    out, lse, s_dmask = flash_attn_func(*given, causal=True, return_attn_probs=True)
    assert out.shape == (2, 40, 4, 16)
    assert (lse.shape, lse.dtype, s_dmask) == ((2, 4, 40), torch.float32, None)
    assert torch.equal(out, flash_attn_func(*given, causal=True))
    assert flash_attn_qkvpacked_func(torch.randn(2, 5, 3, 4, 16), return_attn_probs=True)[2] is None
    oracle.check(
        lambda *t: flash_attn_func(*t, return_attn_probs=True)[:2],
        lambda *t: meant(*t, return_lse=True),
        tensors(torch.float32),
    )


def test_dropout_draws_from_torchs_generator():
    q, k, v = tensors(torch.float32)
    torch.manual_seed(5)
    seed = int(torch.randint(2**63 - 1, ()))
    outs = []
    for start in (5, 5, 6):
        torch.manual_seed(start)
        outs.append(flash_attn_func(q, k, v, 0.4))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    truth = meant(q.double(), k.double(), v.double(), dropout_p=0.4, seed=seed)
    oracle.compare("out", outs[0], truth, meant(q, k, v, dropout_p=0.4, seed=seed))
    assert 0.5 < philox.kept(seed, 0.4, range(2), 4, 40, 50, q.device).float().mean() < 0.7


def test_nothing_is_copied(monkeypatch):
    seen = []
    monkeypatch.setattr(
        flash_attn, "attention", lambda q, k, v, **_: (seen.extend((q, k, v)), torch.empty(2, 4, 6, 16))[1]
    )
    qkv = torch.randn(2, 6, 3, 4, 16)
    flash_attn_qkvpacked_func(qkv)
    assert [x.data_ptr() for x in seen] == [qkv[:, :, i].data_ptr() for i in range(3)]
    assert all(x.shape == (2, 4, 6, 16) for x in seen)
    monkeypatch.undo()
    assert flash_attn_qkvpacked_func(qkv).is_contiguous()


X, QKV = torch.zeros(2, 6, 4, 16), torch.zeros(2, 6, 3, 4, 16)
PAIR = "window_size must be a pair (left, right), got "
INTEGERS = "window_size must have integers of at least -1, got "


@pytest.mark.parametrize(
    "q, k, v, message",
    [
        (X[0], X, X, "q must be a tensor (B, T, H, D), got (6, 4, 16)"),
        (X, None, X, "k must be a tensor (B, T, H, D), got NoneType"),
        (X, X, QKV, "v must be a tensor (B, T, H, D), got (2, 6, 3, 4, 16)"),
    ],
)
def test_bad_tensors(q, k, v, message):
    with pytest.raises(ValueError) as raised:
        flash_attn_func(q, k, v)
    assert str(raised.value) == f"flash_attn_func: {message}"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window_size": 3}, f"flash_attn_func: {PAIR}3"),
        ({"window_size": None}, f"flash_attn_func: {PAIR}None"),
        ({"window_size": (1, 2, 3)}, f"flash_attn_func: {PAIR}(1, 2, 3)"),
        ({"window_size": torch.ones(2)}, f"flash_attn_func: {PAIR}tensor([1., 1.])"),
        ({"window_size": (-2, 0)}, f"flash_attn_func: {INTEGERS}(-2, 0)"),
        ({"window_size": (1.5, 0)}, f"flash_attn_func: {INTEGERS}(1.5, 0)"),
        ({"dropout_p": 1.0}, "attention: dropout_p must be at least 0 and below 1, got 1.0"),
        (
            {"alibi_slopes": torch.ones(3)},
            "attention: alibi_slopes must have shape (4,) or (2, 4), got (3,)",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError) as raised:
        flash_attn_func(X, X, X, **options)
    assert str(raised.value) == message


def test_bad_packed_tensors():
    for function, args, message in (
        (flash_attn_qkvpacked_func, (X,), "qkv must be a tensor (B, T, 3, H, D), got (2, 6, 4, 16)"),
        (
            flash_attn_qkvpacked_func,
            (QKV[:, :, :2],),
            "qkv must be a tensor (B, T, 3, H, D), got (2, 6, 2, 4, 16)",
        ),
        (
            flash_attn_kvpacked_func,
            (X, QKV),
            "kv must be a tensor (B, T, 2, H_kv, D), got (2, 6, 3, 4, 16)",
        ),
    ):
        with pytest.raises(ValueError) as raised:
            function(*args)
        assert str(raised.value) == f"{function.__name__}: {message}"
