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
            for name in ("LigerSwiGLUMLP", "LigerBlockSparseTop2MLP", "LigerPhi3SwiGLUMLP")
        ),
        (lambda: liger.liger_rotary_pos_emb(*[torch.ones(2, 1, 3, 4)] * 2, *[torch.ones(3, 3, 4)] * 2),
         ValueError, "liger_rotary_pos_emb: cos must be a tensor (1 or 2, T, R), got (3, 3, 4)"),
    ],
)  # fmt: skip
def test_bad_input(attempt, kind, message):
    with pytest.raises(kind) as error:
        attempt()
    assert str(error.value) == message
