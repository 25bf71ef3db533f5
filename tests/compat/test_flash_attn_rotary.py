"""compat.flash_attn.layers.rotary, beside plain PyTorch."""

import pytest
import torch

import oracle
from lspm_kernels.compat.flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

CU_SEQLENS = torch.tensor([0, 2])


def tables(rows=12, pairs=4):
    angles = torch.outer(torch.arange(rows), 10000 ** (-torch.arange(pairs) / pairs))
    return angles.cos(), angles.sin()


def plain(x, cos, sin, positions, interleaved=False):
    """x (B, T, H, D) with the positions (B, T) of its rows."""
    cos, sin = (t.to(x.dtype)[positions][:, :, None] for t in (cos, sin))
    turned, passed = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    both = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
    return torch.cat([turned, passed], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([1, 5], dtype=torch.int32)], ids=["0", "3", "each"])
def test_batches(offsets, interleaved):
    x, (cos, sin) = torch.randn(2, 7, 3, 10), tables()
    first = offsets[:, None] if isinstance(offsets, torch.Tensor) else torch.full((2, 1), offsets)
    positions = first + torch.arange(7)
    oracle.check(
        lambda x: apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets),
        lambda x: plain(x, cos, sin, positions, interleaved),
        [x],
    )


@pytest.mark.parametrize("offsets", [2, torch.tensor([1, 0, 4])], ids=["2", "each"])
def test_packed_sequences(offsets):
    x, (cos, sin) = torch.randn(9, 3, 8), tables()
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    first = offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * 3
    positions = torch.tensor([[first[0] + t for t in range(4)] + [first[2] + t for t in range(5)]])
    oracle.check(
        lambda x: apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets, cu_seqlens=cu_seqlens, max_seqlen=5),
        lambda x: plain(x[None], cos, sin, positions)[0],
        [x],
    )


def test_in_place():
    x, (cos, sin) = torch.randn(2, 7, 3, 8), tables()
    positions = torch.arange(7).expand(2, 7)
    truth = plain(x, cos, sin, positions)
    given = x.clone()
    assert apply_rotary_emb(given, cos, sin, inplace=True) is given
    assert torch.allclose(given, truth, atol=1e-6)
    oracle.check(
        lambda x: apply_rotary_emb(x * 1, cos, sin, inplace=True),
        lambda x: plain(x, cos, sin, positions),
        [x],
    )


def test_packed_projections():
    (cos, sin), positions = tables(), torch.arange(7).expand(2, 7)
    qkv = torch.randn(2, 7, 3, 4, 8)

    def both(qkv):
        q, k = (plain(qkv[:, :, i], cos, sin, positions) for i in range(2))
        return torch.stack([q, k, qkv[:, :, 2]], 2)

    oracle.check(lambda t: apply_rotary_emb_qkv_(t * 1, cos, sin), both, [qkv])
    heads = torch.randn(2, 7, 4 + 2 * 2, 8)  # grouped: 4 of q, 2 of k, 2 of v
    oracle.check(
        lambda t: apply_rotary_emb_qkv_(t * 1, cos, sin, num_heads_q=4),
        lambda t: torch.cat([plain(t[:, :, :6], cos, sin, positions), t[:, :, 6:]], 2),
        [heads],
    )
    kv = torch.randn(2, 7, 2, 4, 8)
    oracle.check(
        lambda t: apply_rotary_emb_kv_(t * 1, cos, sin),
        lambda t: torch.stack([plain(t[:, :, 0], cos, sin, positions), t[:, :, 1]], 2),
        [kv],
    )


def test_the_module_grows_its_tables():
    rotary, (cos, sin) = RotaryEmbedding(8), tables(20)
    assert not rotary.state_dict()
    for steps, offset in ((5, 0), (9, 0), (1, 12)):
        qkv = torch.randn(2, steps, 3, 4, 8)
        positions = offset + torch.arange(steps).expand(2, steps)
        truth = plain(qkv[:, :, 1], cos, sin, positions)
        found = rotary(qkv.clone(), seqlen_offset=offset)
        assert torch.allclose(found[:, :, 1], truth, atol=1e-6)
        assert torch.equal(found[:, :, 2], qkv[:, :, 2])
    q, kv = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 2, 8)
    starts = torch.tensor([2, 7])
    positions = starts[:, None] + torch.arange(5)
    turned, found = rotary(q.clone(), kv.clone(), seqlen_offset=starts, max_seqlen=12)
    assert torch.allclose(turned, plain(q, cos, sin, positions), atol=1e-6)
    assert torch.allclose(found[:, :, 0], plain(kv[:, :, 0], cos, sin, positions), atol=1e-6)


def test_half_types_have_angles_of_float32():
    rotary = RotaryEmbedding(8).to(torch.bfloat16)
    rotary(torch.randn(1, 300, 3, 2, 8).to(torch.bfloat16))
    assert torch.equal(rotary._cos_cached, tables(300)[0].to(torch.bfloat16))


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: apply_rotary_emb(torch.ones(2, 3, 4), *tables()), ValueError,
         "apply_rotary_emb: x must be a tensor (B, T, H, D), got (2, 3, 4)"),
        (lambda: apply_rotary_emb(torch.ones(2, 3, 1, 8), *tables(), cu_seqlens=CU_SEQLENS), ValueError,
         "apply_rotary_emb: x must be a tensor (rows, H, D) beside cu_seqlens, got (2, 3, 1, 8)"),
        (lambda: apply_rotary_emb(torch.ones(3, 1, 8), *tables(), cu_seqlens=CU_SEQLENS), ValueError,
         "apply_rotary_emb: cu_seqlens must end with the 3 rows of x, got 2"),
        (lambda: apply_rotary_emb(torch.ones(3, 1, 8), *tables(), cu_seqlens=torch.tensor([0])), ValueError,
         "apply_rotary_emb: cu_seqlens must be a tensor (B + 1,), got (1,)"),
        (lambda: apply_rotary_emb_qkv_(torch.ones(2, 3, 2, 4, 8), *tables()), ValueError,
         "apply_rotary_emb_qkv_: qkv must be a tensor (B, T, 3, H, D) or (B, T, H_q + 2 H_kv, D),"
         " got (2, 3, 2, 4, 8)"),
        (lambda: apply_rotary_emb_qkv_(torch.ones(2, 3, 8, 8), *tables()), ValueError,
         "apply_rotary_emb_qkv_: num_heads_q must leave an even number of 8 heads for k and v, got None"),
        (lambda: apply_rotary_emb_kv_(torch.ones(2, 3, 3, 4, 8), *tables()), ValueError,
         "apply_rotary_emb_kv_: kv must be a tensor (B, T, 2, H_kv, D), got (2, 3, 3, 4, 8)"),
        (lambda: RotaryEmbedding(8, scale_base=512), NotImplementedError,
         "RotaryEmbedding: scale_base must be None, as xPos is not carried, got 512"),
        (lambda: RotaryEmbedding(8)(torch.ones(1, 3, 3, 1, 8), None, torch.tensor([1])), ValueError,
         "RotaryEmbedding: max_seqlen must be given beside a tensor of offsets, got None"),
    ],
)  # fmt: skip
def test_bad_input(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message
