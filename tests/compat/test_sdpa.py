"""compat.sdpa: torch.nn.functional.scaled_dot_product_attention's arguments and what they mean."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import oracle
from lspm_kernels.compat.sdpa import scaled_dot_product_attention

# Shapes of query, key and value, and arguments.
CASES = {
    "four dimensions": ((2, 4, 30, 16), (2, 4, 40, 16), (2, 4, 40, 24), {}),
    "causal from the top left": ((2, 4, 30, 16), (2, 4, 40, 16), (2, 4, 40, 16), {"is_causal": True}),
    "causal, fewer keys": ((2, 4, 30, 16), (2, 4, 20, 16), (2, 4, 20, 16), {"is_causal": True}),
    "scale": ((2, 4, 30, 16), (2, 4, 40, 16), (2, 4, 40, 16), {"scale": 0.4}),
    "three dimensions": ((4, 30, 16), (4, 40, 16), (4, 40, 16), {"is_causal": True}),
    "three dimensions, a mask for each": ((4, 30, 16), (4, 40, 16), (4, 40, 16), {"attn_mask": (4, 30, 40)}),
    "two dimensions": ((30, 16), (40, 16), (40, 16), {"attn_mask": (30, 40)}),
    "five dimensions": ((2, 3, 4, 10, 16), (2, 3, 4, 12, 16), (2, 3, 4, 12, 16), {"is_causal": True}),
    "five, a mask of two": ((2, 3, 4, 10, 16), (2, 3, 4, 12, 16), (2, 3, 4, 12, 16), {"attn_mask": (10, 12)}),
    "five, a mask of five": (
        (2, 3, 4, 10, 16), (2, 3, 4, 12, 16), (2, 3, 4, 12, 16), {"attn_mask": (2, 1, 4, 10, 12)},
    ),
    "five, a mask of four": (
        (2, 3, 4, 10, 16), (2, 3, 4, 12, 16), (2, 3, 4, 12, 16), {"attn_mask": (3, 1, 1, 12)},
    ),
    "mask of keys": ((2, 4, 30, 16), (2, 4, 40, 16), (2, 4, 40, 16), {"attn_mask": (2, 1, 1, 40)}),
    "mask of all": ((2, 4, 30, 16), (2, 4, 40, 16), (2, 4, 40, 16), {"attn_mask": (2, 4, 30, 40)}),
    "grouped heads": ((2, 4, 30, 16), (2, 2, 40, 16), (2, 2, 40, 16), {"enable_gqa": True}),
    "grouped heads, a mask": (
        (2, 4, 30, 16), (2, 2, 40, 16), (2, 2, 40, 16), {"enable_gqa": True, "attn_mask": (4, 30, 40)},
    ),
    "grouped heads, three dimensions": ((4, 30, 16), (2, 40, 16), (2, 40, 16), {"enable_gqa": True}),
    "one batch of keys": ((3, 4, 30, 16), (1, 4, 40, 16), (4, 40, 16), {"is_causal": True}),
    "one head of keys": ((3, 4, 30, 16), (3, 1, 40, 16), (3, 1, 40, 16), {}),
}  # fmt: skip


def torchs(*args, **options):
    with sdpa_kernel(SDPBackend.MATH):  # the only one that takes every dtype, shape and mask gradient
        return F.scaled_dot_product_attention(*args, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case, dtype):
    *shapes, options = CASES[case]
    given = [torch.randn(shape).to(dtype) for shape in shapes]
    options = dict(options)
    mask = options.pop("attn_mask", None)
    if mask is None:
        oracle.check(
            lambda *t: scaled_dot_product_attention(*t, **options), lambda *t: torchs(*t, **options), given
        )
        return
    visible = torch.rand(mask) < 0.7
    oracle.check(
        lambda *t: scaled_dot_product_attention(*t, visible, **options),
        lambda *t: torchs(*t, visible, **options),
        given,
    )
    added = torch.randn(mask).to(dtype).masked_fill(~visible, -torch.inf)
    oracle.check(
        lambda *t: scaled_dot_product_attention(*t, added, **options),
        lambda *t: torchs(*t, added.to(t[0].dtype), **options),
        given,
    )
    oracle.check(  # the mask is a tensor of its own here, and gets a gradient
        lambda *t: scaled_dot_product_attention(*t, **options),
        lambda *t: torchs(*t, **options),
        [*given, added],
    )


def test_a_query_that_sees_nothing_gives_0_as_in_torch():
    x = torch.randn(2, 4, 6, 16)
    visible = torch.ones(6, 6, dtype=torch.bool)
    visible[2] = False
    added = torch.zeros(6, 6).masked_fill(~visible, -torch.inf)
    for mask in (visible, added, added.clone().requires_grad_()):
        q, k, v = (x.clone().requires_grad_() for _ in range(3))
        out = scaled_dot_product_attention(q, k, v, mask)
        assert torch.equal(out[:, :, 2], torch.zeros(2, 4, 16))
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, mask)[:, :, 2], torch.zeros(2, 4, 16))
        out.sum().backward()
        assert torch.equal(q.grad[:, :, 2], torch.zeros(2, 4, 16))
        for t in (q, k, v, mask):
            assert t.grad is None or t.grad.isfinite().all()


def test_dropout_draws_from_torchs_generator():
    x = torch.randn(2, 4, 30, 16)
    outs = []
    for start in (5, 5, 6):
        torch.manual_seed(start)
        outs.append(scaled_dot_product_attention(x, x, x, None, 0.4))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_under_torch_compile():
    x = torch.randn(2, 4, 30, 16)
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(x, x, x, is_causal=True), scaled_dot_product_attention(x, x, x, is_causal=True)
    )
    outs = []
    for start in (5, 5, 6):
        torch.manual_seed(start)
        outs.append(compiled(x, x, x, None, 0.4))
    torch.manual_seed(5)
    assert torch.equal(outs[0], scaled_dot_product_attention(x, x, x, None, 0.4))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


X, MASK = torch.zeros(2, 4, 6, 16), torch.zeros(6, 6)
OP = "scaled_dot_product_attention: "


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((X[0, 0, 0], X, X), {}, OP + "query must be a tensor (..., T, D), got (16,)"),
        ((X, None, X), {}, OP + "key must be a tensor (..., T, D), got NoneType"),
        ((X, X, 1.0), {}, OP + "value must be a tensor (..., T, D), got float"),
        (
            (X, X, X, MASK),
            {"is_causal": True},
            OP + "attn_mask must be None where is_causal=True, got (6, 6)",
        ),
        (
            (X, X[:, :2], X[:, :2]),
            {},
            OP + "query, key and value must broadcast in all but the last 2 dimensions"
            " (enable_gqa=True admits fewer heads), got (2, 4), (2, 2), (2, 2)",
        ),
        (
            (X, X.expand(3, 2, 4, 6, 16)[:, :1].expand(3, 3, 4, 6, 16), X),
            {"enable_gqa": True},
            OP
            + "query, key and value must broadcast in all but the last 3 dimensions, got (2,), (3, 3), (2,)",
        ),
        (
            (X, X[:, :3], X[:, :3]),
            {"enable_gqa": True},
            "attention: k must have a number of heads that divides q's 4, got 3",
        ),
        (
            (X, X, X, MASK[:5]),
            {},
            OP + "attn_mask must broadcast to (..., H, T_q, T_k) = (2, 4, 6, 6), got (5, 6)",
        ),
        (
            (X[0], X[0], X[0], MASK[None, None]),
            {},
            OP + "attn_mask must broadcast to (..., H, T_q, T_k) = (4, 6, 6), got (1, 1, 6, 6)",
        ),
        (
            (X, X, X, "causal"),
            {},
            OP + "attn_mask must broadcast to (..., H, T_q, T_k) = (2, 4, 6, 6), got str",
        ),
        (
            (X, X, X, MASK.int()),
            {},
            "attention: mask must have dtype torch.bool or torch.float32, got torch.int32",
        ),
        ((X, X, X, None, 1.0), {}, "attention: dropout_p must be at least 0 and below 1, got 1.0"),
        ((X, X, X.bfloat16()), {}, "attention: v must have q's dtype torch.float32, got torch.bfloat16"),
    ],
)
def test_errors(args, options, message):
    with pytest.raises(ValueError) as raised:
        scaled_dot_product_attention(*args, **options)
    assert str(raised.value) == message
