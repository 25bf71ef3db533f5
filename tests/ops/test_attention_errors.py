"""attention: what it says of arguments that it cannot take, and what the binding refuses."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import lspm_kernels as lk
from lspm_kernels import compiled
from lspm_kernels.ops import attention as ops


def bad(q=(2, 4, 40, 16), k=(2, 2, 50, 16), v=(2, 2, 50, 24)):
    return [torch.ones(x) if isinstance(x, tuple) else x for x in (q, k, v)]


BAD = {
    "q must be a floating-point tensor (B, H, T, D), got list": bad(q=[1.0]),
    "k must be a floating-point tensor (B, H, T, D), got (2, 50, 16) torch.float32": bad(k=(2, 50, 16)),
    "v must be a floating-point tensor (B, H, T, D), got (2, 2, 50, 24) torch.int64": bad(v=bad()[2].long()),
    "q must have a head dim of 1 to 256, got 257": bad(q=(2, 4, 40, 257), k=(2, 2, 50, 257)),
    "v must have a head dim of 1 to 256, got 0": bad(v=(2, 2, 50, 0)),
    "k must have q's batch size 2, got 3": bad(k=(3, 2, 50, 16), v=(3, 2, 50, 24)),
    "k must have q's head dim 16, got 8": bad(k=(2, 2, 50, 8)),
    "k must have a number of heads that divides q's 4, got 3": bad(k=(2, 3, 50, 16), v=(2, 3, 50, 24)),
    "v must have k's batch, heads and length (2, 2, 50), got (2, 2, 49)": bad(v=(2, 2, 49, 24)),
    "k must have q's dtype torch.float32, got torch.bfloat16": bad(k=torch.ones(2, 2, 50, 16).bfloat16()),
    "v must have q's dtype torch.float32, got torch.float64": bad(v=torch.ones(2, 2, 50, 24).double()),
    "k must be on q's device cpu, got meta": bad(k=torch.ones(2, 2, 50, 16, device="meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError) as error:
        lk.attention(*BAD[message])
    assert str(error.value) == f"attention: {message}"


def test_the_binding_refuses_what_would_touch_other_memory():
    q, k, v = torch.ones(2, 4, 40, 16), torch.ones(2, 2, 50, 16), torch.ones(2, 2, 50, 24)
    out, turned, lse = torch.empty(2, 4, 40, 24), torch.empty(2, 4, 24, 40).mT, torch.empty(2, 4, 40)
    saved, rest = torch.empty(2, 2, 4, 40), (q, k, v, out, lse)

    def forward(q, k, v, out, lse, bias=None, slopes=None, saved=saved, dropout=0.0):
        options = None, (-1, 0, 10, 0), (0.25, 0.0, dropout), 1
        compiled.cpu.attention_forward(q, k, v, bias, None, slopes, None, out, lse, saved, *options)

    for message, wrong in {
        "k must have the shape that the contract names": (q, k[..., :8], v, out, lse),
        "v must have the shape": (q, k, v[:, :, :49], out, lse),
        "out must have a contiguous last dimension": (q, k, v, turned, lse),
        "out must have the dtype that the contract names": (q, k, v, out.bfloat16(), lse),
        "lse must have another number of elements": (q, k, v, out, lse[:1]),
        "k must have a number of heads that divides q's": (q, k[:, :1].expand(2, 3, 50, 16), v, out, lse),
        "q, k and v must have 1 to 256 dims to a head": (torch.ones(2, 4, 40, 300), k, v, out, lse),
        "statistics must have another number of elements": (*rest, None, None, saved[:1]),
        "bias must broadcast to the scores": (*rest, torch.ones(1, 1, 39, 50)),
        "bias must have four dimensions": (*rest, torch.ones(50)),
        "bias must have a dtype that the contract names": (*rest, torch.ones(1, 1, 1, 50).bfloat16()),
        "slopes must have a dtype": (*rest, None, torch.ones(2, 4, 1, 1).double()),
        "dropout must be at least 0 and below 1": (*rest, None, None, saved, 1.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            forward(*wrong)


Q = torch.ones(2, 4, 40, 16)
BAD_OPTIONS = {
    "window must be a pair (left, right), got 5": {"window": 5},
    "window must have sides that are None or at least 0, got (-1, 0)": {"window": (-1, 0)},
    "bias must broadcast to (B, H, T_q, T_k) = (2, 4, 40, 40), got (3, 1, 1)": {"bias": torch.ones(3, 1, 1)},
    "mask must broadcast to (B, H, T_q, T_k) = (2, 4, 40, 40), got (39,)": {"mask": torch.ones(39)},
    "bias must have dtype torch.float32, got torch.float64": {"bias": torch.ones(40).double()},
    "mask must have dtype torch.bool or torch.float32, got torch.int64": {"mask": torch.ones(40).long()},
    "mask must not require a gradient, as only a bias has one, got one that does": {
        "mask": torch.ones(40, requires_grad=True)
    },
    "mask must be on q's device cpu, got meta": {"mask": torch.ones(40, device="meta")},
    "alibi_slopes must have shape (4,) or (2, 4), got (3,)": {"alibi_slopes": torch.ones(3)},
    "alibi_slopes must not be NaN, got [0.0, nan, 0.0, 0.0]": {
        "alibi_slopes": torch.tensor([0.0, float("nan"), 0.0, 0.0])
    },
    "alibi_slopes must be without a gradient, got requires_grad=True": {
        "alibi_slopes": torch.ones(4, requires_grad=True)
    },
    "sinks must have shape (4,), got (2, 4)": {"sinks": torch.ones(2, 4)},
    "sinks must have a floating-point dtype, got torch.int64": {"sinks": torch.ones(4).long()},
    "softcap must be finite and at least 0, got -1.0": {"softcap": -1.0},
    "softcap must be finite and at least 0, got nan": {"softcap": float("nan")},
    "scale must be a finite number, got 'half'": {"scale": "half"},
    "scale must be a finite number, got inf": {"scale": float("inf")},
    "scale must be a finite number, got nan": {"scale": float("nan")},
    "scale must be a finite number, got tensor([1., 1.])": {"scale": torch.ones(2)},
    "scale must be without a gradient, got requires_grad=True": {"scale": torch.ones((), requires_grad=True)},
    "dropout_p must be at least 0 and below 1, got 1.0": {"dropout_p": 1.0},
    "dropout_p must be at least 0 and below 1, got -0.1": {"dropout_p": -0.1},
    "seed must be an integer from 0 to 2 ** 63 - 1, got -3": {"dropout_p": 0.1, "seed": -3},
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options(message):
    with pytest.raises(ValueError) as error:
        lk.attention(Q, Q, Q, **BAD_OPTIONS[message])
    assert str(error.value) == f"attention: {message}"


def test_slopes_and_scale_that_train_elsewhere():
    slopes, scale = torch.ones(4, requires_grad=True), torch.tensor(0.25, requires_grad=True)
    with torch.no_grad():
        given = lk.attention(Q, Q, Q, alibi_slopes=slopes, scale=scale)
    assert torch.equal(given, lk.attention(Q, Q, Q, alibi_slopes=torch.ones(4), scale=0.25))


def test_what_cuda_leaves_to_triton(monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=99 * 1024)  # as GPUs of games have
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    (row,) = (row for row in ops.BACKENDS if row.name == "cuda")
    row = dataclasses.replace(row, device="cpu", missing=lambda: None)
    q = torch.ones(1, 2, 3, 16).half()
    bias = torch.ones(1, 1, 3, 3, requires_grad=True)
    assert row.refusal("attention", q, q, q, (1, 2), bias.detach()) is None
    with torch.no_grad():
        assert row.refusal("attention", q, q, q, (1, 2), bias) is None
    wide = torch.ones(1, 2, 3, 160).half()
    long = q[:, :1, :1].expand(1, 1, 2**30, 16)
    for needs, given in {
        "dtype bfloat16, float16, got float32": (q.float(), q, q, (1, 2), None),
        "a bias without a gradient, got one that requires it": (q, q, q, (1, 2), bias),
        "at most 65535 batches and heads, got 70000 and 2": (q, q, q, (70_000, 2), None),
        "head dims to 128, or 129 KiB of shared memory to a block, got 160 and 99 KiB": (
            wide, wide, wide, (1, 2), None
        ),
        "fewer than 2 ** 30 queries and keys, got 1073741824": (q, long, long, (1, 2), None),
    }.items():  # fmt: skip
        assert row.refusal("attention", *given) == f"attention: cuda needs {needs}"
    properties.shared_memory_per_block_optin = 163 * 1024
    assert row.refusal("attention", wide, wide, wide, (1, 2), None) is None
