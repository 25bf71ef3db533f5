"""compat.flash_attn's older norms, and its activations, beside plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

import oracle
from lspm_kernels.compat.flash_attn.ops import layer_norm as layer
from lspm_kernels.compat.flash_attn.ops import rms_norm as rms
from lspm_kernels.compat.flash_attn.ops.activations import bias_gelu_impl, fast_gelu_impl, swiglu

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16])


def tensors(dtype, *shapes):
    return [torch.randn(shape).to(dtype) for shape in shapes]


@DTYPES
def test_norms(dtype):
    x, residual, weight, bias, scale = tensors(dtype, (3, 24), (3, 24), (24,), (24,), (24,))
    rowscale = torch.rand(3)

    def plain(norm):
        def function(x, r, s, w, *b):
            total = x * s * rowscale[:, None].to(x.dtype) + r
            return norm(total, (24,), w, *b, 1e-5), total

        return function

    options = {"rowscale": rowscale, "prenorm": True}
    oracle.check(
        lambda x, r, s, w, b: layer.dropout_add_layer_norm(x, r, w, b, 0.0, 1e-5, layerscale=s, **options),
        plain(F.layer_norm),
        [x, residual, scale, weight, bias],
    )
    oracle.check(
        lambda x, r, s, w: rms.dropout_add_rms_norm(x, r, w, None, 0.0, 1e-5, layerscale=s, **options),
        plain(F.rms_norm),
        [x, residual, scale, weight],
    )
    oracle.check(
        lambda x, w, b: layer.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: F.layer_norm(x, (24,), w, b, 1e-5),
        [x, weight, bias],
    )
    oracle.check(
        lambda x, w: rms.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (24,), w, 1e-5), [x, weight]
    )


@pytest.mark.parametrize("kind", [layer.DropoutAddLayerNorm, rms.DropoutAddRMSNorm])
def test_modules_drop_in_training_and_add(kind):
    x, residual = torch.randn(64, 32).to(BF16), torch.randn(64, 32)
    module = kind(32, prenorm=True, p=0.25, residual_in_fp32=True)
    assert torch.isclose(module(x, residual)[1], residual).float().mean() > 0.2
    y, total = module.eval()(x, residual)
    assert torch.equal(total, x + residual) and y.dtype == BF16
    assert module(x)[1].dtype == F32
    assert not isinstance(kind(32).eval()(x), tuple)


def test_modules_have_upstreams_parameters():
    assert list(layer.DropoutAddLayerNorm(8).state_dict()) == ["weight", "bias"]
    assert list(rms.DropoutAddRMSNorm(8).state_dict()) == list(rms.RMSNorm(8).state_dict()) == ["weight"]
    x = torch.randn(4, 8)
    assert torch.allclose(rms.RMSNorm(8, eps=1e-3)(x), F.rms_norm(x, (8,), eps=1e-3), atol=1e-6)


@DTYPES
def test_activations(dtype):
    x, y, bias = tensors(dtype, (3, 24), (3, 24), (24,))
    oracle.check(swiglu, lambda x, y: F.silu(x) * y, [x, y])
    oracle.check(fast_gelu_impl, lambda x: F.gelu(x, approximate="tanh"), [x])
    oracle.check(bias_gelu_impl, lambda x, b: F.gelu(x + b, approximate="tanh"), [x, bias])
