"""compat.liger_kernel: Liger-Kernel's norms, MLPs and rotary embedding, beside plain PyTorch."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import oracle
from lspm_kernels.compat.liger_kernel import transformers as liger
from lspm_kernels.compat.liger_kernel.transformers import functional

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16])
CONFIG = SimpleNamespace(hidden_size=16, intermediate_size=24, hidden_act="silu")


def plain_rms_norm(x, weight, eps, offset, casting_mode):
    wide = x.to(torch.promote_types(x.dtype, F32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        return (normed.to(x.dtype) * (offset + weight)).to(x.dtype)
    return (normed * (offset + weight.to(wide.dtype))).to(x.dtype)


@DTYPES
@pytest.mark.parametrize("mode", ["llama", "gemma"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset, mode, dtype):
    x, residual, weight = (
        torch.randn(3, 5, 24).to(dtype),
        torch.randn(3, 5, 24).to(dtype),
        torch.randn(24).to(dtype),
    )
    oracle.check(
        lambda x, w: functional.liger_rms_norm(x, w, 1e-6, offset, mode),
        lambda x, w: plain_rms_norm(x, w, 1e-6, offset, mode),
        [x, weight],
    )
    oracle.check(
        lambda x, r, w: functional.liger_fused_add_rms_norm(x, r, w, 1e-6, offset, mode),
        lambda x, r, w: (plain_rms_norm(x + r, w, 1e-6, offset, mode), x + r),
        [x, residual, weight],
    )


def test_norm_modules():
    x = torch.randn(5, 24)
    norm = liger.LigerRMSNorm(24, offset=1.0, casting_mode="gemma", init_fn="zeros")
    assert torch.allclose(norm(x), F.rms_norm(x, (24,), eps=1e-6), atol=1e-6)
    assert norm.weight.eq(0).all()
    assert repr(norm) == "LigerRMSNorm(weight_shape=(24,), eps=1e-06, offset=1.0)"
    bare = liger.LigerRMSNorm(24, elementwise_affine=False)
    assert bare.weight is None
    assert torch.allclose(bare(x), F.rms_norm(x, (24,), eps=1e-6), atol=1e-6)
    y, total = liger.LigerFusedAddRMSNorm(24)(x, x)
    assert torch.equal(total, x + x)
    assert torch.allclose(y, F.rms_norm(total, (24,), eps=1e-6), atol=1e-6)
    layer = liger.LigerLayerNorm(24)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert layer.bias.eq(0).all()
    assert not liger.LigerLayerNorm(24, bias=True).bias.eq(0).any()
    assert torch.allclose(layer(x), F.layer_norm(x, (24,), eps=1e-6), atol=1e-6)
    half = liger.LigerRMSNorm(24)(x.to(BF16))
    oracle.compare("float32 beside bfloat16", half, F.rms_norm(x.to(BF16).double(), (24,), eps=1e-6), half)


@DTYPES
def test_layer_norm_and_gated_linear_units(dtype):
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((3, 24), (24,), (24,)))
    oracle.check(
        lambda x, w, b: functional.liger_layer_norm(x, w, b, 1e-6),
        lambda x, w, b: F.layer_norm(x, (24,), w, b, 1e-6),
        [x, weight, bias],
    )
    a, b = torch.randn(3, 24).to(dtype), torch.randn(3, 24).to(dtype)
    oracle.check(functional.liger_swiglu, lambda a, b: F.silu(a) * b, [a, b])
    oracle.check(functional.liger_geglu, lambda a, b: F.gelu(a, approximate="tanh") * b, [a, b])


def test_mlps():
    x = torch.randn(5, 16)
    mlp = liger.LigerSwiGLUMLP(CONFIG)
    assert list(mlp.state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    truth = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert torch.allclose(mlp(x), truth, atol=1e-6)
    assert liger.LigerSwiGLUMLP(CONFIG, 40).up_proj.weight.shape == (40, 16)
    experts = liger.LigerQwen3MoeSwiGLUMLP(CONFIG, 40)
    assert isinstance(experts, liger.LigerSwiGLUMLP)
    assert experts.up_proj.weight.shape == (40, 16)
    mlp = liger.LigerBlockSparseTop2MLP(CONFIG)
    assert list(mlp.state_dict()) == ["w1.weight", "w2.weight", "w3.weight"]
    assert torch.allclose(mlp(x), mlp.w2(F.silu(mlp.w1(x)) * mlp.w3(x)), atol=1e-6)
    mlp = liger.LigerPhi3SwiGLUMLP(CONFIG)
    assert list(mlp.state_dict()) == ["gate_up_proj.weight", "down_proj.weight"]
    gate, up = mlp.gate_up_proj(x).chunk(2, -1)
    assert torch.allclose(mlp(x), mlp.down_proj(F.silu(gate) * up), atol=1e-6)
    mlp = liger.LigerGEGLUMLP(CONFIG)
    truth = mlp.down_proj(F.gelu(mlp.gate_proj(x), approximate="tanh") * mlp.up_proj(x))
    assert torch.allclose(mlp(x), truth, atol=1e-6)


def test_mlps_that_keep_less():
    x = torch.randn(2, 37, 16, requires_grad=True)
    gelu = SimpleNamespace(**{**vars(CONFIG), "hidden_act": "gelu_pytorch_tanh"})
    for made, plain in (
        (liger.LigerMLP(CONFIG), liger.LigerSwiGLUMLP(CONFIG)),
        (liger.LigerTiledSwiGLUMLP(CONFIG), liger.LigerSwiGLUMLP(CONFIG)),
        (liger.LigerTiledGEGLUMLP(gelu, num_shards=5), liger.LigerGEGLUMLP(gelu)),
    ):
        plain.load_state_dict(made.state_dict())
        given = [(m(x), [x, *m.parameters()]) for m in (made, plain)]
        assert torch.allclose(given[0][0], given[1][0], atol=1e-6)
        found = [torch.autograd.grad(y.square().sum(), wanted) for y, wanted in given]
        for ours, theirs in zip(*found, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert liger.LigerTiledSwiGLUMLP(CONFIG)(x[0, :0]).shape == (0, 16)


@pytest.mark.parametrize("bias", [False, True])
def test_falcon_h1s_mlps_have_multipliers(bias):
    x, config = torch.randn(5, 16), SimpleNamespace(**vars(CONFIG), mlp_bias=bias, mlp_multipliers=[0.5, 3])
    mlp = liger.LigerFalconH1SwiGLUMLP(config)
    assert ("up_proj.bias" in mlp.state_dict()) == bias
    truth = 3 * mlp.down_proj(F.silu(0.5 * mlp.gate_proj(x)) * mlp.up_proj(x))
    assert torch.allclose(mlp(x), truth, atol=1e-6)
    if not bias:
        other = liger.LigerFalconH1MLP(config)
        other.load_state_dict(mlp.state_dict())
        assert torch.equal(other(x), mlp(x))


@DTYPES
def test_experts(dtype):
    """Of 5 experts one has no token; a token's two are never the same."""
    config = SimpleNamespace(**vars(CONFIG), num_local_experts=5, moe_intermediate_size=8)
    experts = liger.LigerExperts(config)
    assert {n: p.shape for n, p in experts.named_parameters()} == {
        "gate_up_proj": (5, 16, 16),
        "down_proj": (5, 16, 8),
    }
    index = torch.rand(2, 7, 4).argsort(-1)[..., :2] + 1

    def plain(x, weights, gate_up, down):
        gate, up = torch.einsum("btc,eic->btei", x, gate_up).chunk(2, -1)
        each = torch.einsum("btei,eci->btec", F.silu(gate) * up, down)
        chosen = each.gather(2, index[..., None].expand(-1, -1, -1, 16))
        return (weights[..., None].to(x.dtype) * chosen).sum(2)

    def ours(x, weights, gate_up, down):
        parameters = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(experts, parameters, (x, index, weights))

    shapes = (2, 7, 16), (2, 7, 2), (5, 16, 16), (5, 16, 8)
    oracle.check(ours, plain, [torch.randn(shape).to(dtype) for shape in shapes])


@DTYPES
@pytest.mark.parametrize("batch", [1, 2])
def test_rotary_by_complex_numbers(batch, dtype):
    q, k = torch.randn(2, 7, 4, 12).to(dtype), torch.randn(2, 7, 2, 12).to(dtype)
    freqs = torch.polar(torch.ones(batch, 7, 6), torch.rand(batch, 7, 6) * 6)

    def plain(*given):
        wide = torch.complex128 if given[0].dtype == torch.float64 else torch.complex64
        pairs = [t.to(wide.to_real()).unflatten(-1, (-1, 2)).contiguous() for t in given]
        made = [torch.view_as_complex(t) * freqs[:, :, None].to(wide) for t in pairs]
        return tuple(torch.view_as_real(t).flatten(3).to(given[0].dtype) for t in made)

    oracle.check(lambda q, k: liger.liger_llama4_text_rotary_pos_emb(q, k, freqs), plain, [q, k])
    alone = liger.liger_llama4_text_rotary_pos_emb(q, k, freqs[0])
    for given in (freqs[0], freqs[0, :, None], freqs[:1, :, None]):
        assert all(map(torch.equal, liger.liger_llama4_vision_rotary_pos_emb(q, k, given), alone))
    real = liger.liger_llama4_vision_rotary_pos_emb(q, k, freqs[0].real)[0]
    assert torch.allclose(real, q * freqs[0].real.repeat_interleave(2, -1)[:, None].to(dtype), atol=0.05)


def rotate(x, cos, sin):
    """transformers' apply_rotary_pos_emb of x (B, H, T, D), over the columns that cos has."""
    turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None], passed], -1)


@DTYPES
@pytest.mark.parametrize("batch", [1, 2])
def test_rotary(batch, dtype):
    q, k = torch.randn(2, 4, 7, 12).to(dtype), torch.randn(2, 2, 7, 12).to(dtype)
    angles = torch.rand(batch, 7, 4) * 6
    cos, sin = (torch.cat([t, t], -1).to(dtype) for t in (angles.cos(), angles.sin()))

    def plain(q, k):
        return rotate(q, cos.to(q.dtype), sin.to(q.dtype)), rotate(k, cos.to(q.dtype), sin.to(q.dtype))

    oracle.check(lambda q, k: liger.liger_rotary_pos_emb(q, k, cos, sin), plain, [q, k])
    four = [t[:, None] for t in (cos, sin)]
    assert all(map(torch.equal, functional.liger_rope(q, k, *four), functional.liger_rope(q, k, cos, sin)))
    once = [t[..., :4] for t in (cos, sin)]
    given = functional.liger_rope(q, k, *once, rotary_dim=8)
    assert all(map(torch.equal, given, functional.liger_rope(q, k, cos, sin)))


def call(function, **options):
    return lambda: function(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1]), **options)


FUSED = functional.liger_fused_linear_cross_entropy
LOGITS, CLASSES = torch.ones(2, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "attempt, kind, message",
    [
        (call(FUSED, accum_dtype=torch.float64), NotImplementedError,
         "liger_fused_linear_cross_entropy: accum_dtype must be None or torch.float32, got torch.float64"),
        (call(FUSED, reduction="max"), ValueError,
         "liger_fused_linear_cross_entropy: reduction must be one of mean, sum, none, got 'max'"),
        (lambda: functional.liger_cross_entropy(LOGITS, CLASSES, size_average=True), NotImplementedError,
         "liger_cross_entropy: size_average must be None, as reduction says it, got True"),
        (lambda: functional.liger_cross_entropy(LOGITS, CLASSES, reduce=True), NotImplementedError,
         "liger_cross_entropy: reduce must be None, as reduction says it, got True"),
        (lambda: functional.liger_cross_entropy(LOGITS, CLASSES, torch.ones(3)), ValueError,
         "liger_cross_entropy: weight must be a tensor of shape (4,), got (3,)"),
        (lambda: functional.liger_cross_entropy(LOGITS, CLASSES, softcap=0.0), ValueError,
         "liger_cross_entropy: softcap must be above 0 or None, got 0.0"),
        (lambda: liger.LigerCrossEntropyLoss(softcap=-1.0), ValueError,
         "LigerCrossEntropyLoss: softcap must be above 0 or None, got -1.0"),
        (lambda: liger.LigerCrossEntropyLoss(label_smoothing=2.0), ValueError,
         "LigerCrossEntropyLoss: label_smoothing must be from 0 to 1, got 2.0"),
        (lambda: liger.LigerRMSNorm(4, casting_mode="qwen"), ValueError,
         "LigerRMSNorm: casting_mode must be one of llama, gemma, none, got 'qwen'"),
        (lambda: liger.LigerRMSNorm(4, init_fn="randn"), ValueError,
         "LigerRMSNorm: init_fn must be 'ones' or 'zeros', got 'randn'"),
        (lambda: liger.LigerLayerNorm(4, impl="nvidia-cutile"), NotImplementedError,
         "LigerLayerNorm: impl must be None, as it chooses among Liger's kernels, got 'nvidia-cutile'"),
        *(
            (lambda name=name: getattr(liger, name)(SimpleNamespace(hidden_act="gelu")), ValueError,
             f"{name}: config must have hidden_act 'silu' or 'swish', got 'gelu'")
            for name in ("LigerSwiGLUMLP", "LigerBlockSparseTop2MLP", "LigerPhi3SwiGLUMLP", "LigerExperts",
                         "LigerFalconH1SwiGLUMLP")
        ),
        (lambda: liger.LigerFalconH1MLP(SimpleNamespace(mlp_bias=True)), ValueError,
         "LigerFalconH1MLP: config must have mlp_bias False, got True"),
        (lambda: liger.LigerTiledGEGLUMLP(CONFIG), ValueError,
         "LigerTiledGEGLUMLP: config must have hidden_act gelu, gelu_new, gelu_pytorch_tanh, got 'silu'"),
        (lambda: liger.liger_rotary_pos_emb(*[torch.ones(2, 1, 3, 4)] * 2, *[torch.ones(3, 3, 4)] * 2),
         ValueError, "liger_rotary_pos_emb: cos must be a tensor (1 or 2, T, R), got (3, 3, 4)"),
    ],
)  # fmt: skip
def test_bad_input(attempt, kind, message):
    with pytest.raises(kind) as error:
        attempt()
    assert str(error.value) == message
