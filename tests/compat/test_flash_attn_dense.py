"""compat.flash_attn's dense layers and padding, beside plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

import oracle
from lspm_kernels.compat.flash_attn import bert_padding
from lspm_kernels.compat.flash_attn.ops.fused_dense import (
    FusedDense,
    FusedMLP,
    fused_dense_func,
    fused_mlp_func,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
def test_dense_layers(dtype):
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((3, 5, 16), (24, 16), (24,)))
    oracle.check(fused_dense_func, F.linear, [x, weight, bias])
    out, bias_out = torch.randn(8, 24).to(dtype), torch.randn(8).to(dtype)
    for name, act in (("gelu_approx", lambda t: F.gelu(t, approximate="tanh")), ("relu", F.relu)):
        oracle.check(
            lambda x, w, v, b, c, name=name: fused_mlp_func(x, w, v, b, c, activation=name),
            lambda x, w, v, b, c, act=act: F.linear(act(F.linear(x, w, b)), v, c),
            [x, weight, out, bias, bias_out],
        )


def test_dense_modules():
    x = torch.randn(3, 16)
    dense = FusedDense(16, 8, return_residual=True)
    y, same = dense(x)
    assert same is x
    assert torch.allclose(y, F.linear(x, dense.weight, dense.bias), atol=1e-6)
    mlp = FusedMLP(16, return_residual=True)
    assert list(mlp.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert mlp.fc1.weight.shape == (64, 16) and mlp.fc2.weight.shape == (16, 64)
    y, same = mlp(x)
    assert same is x
    assert torch.allclose(y, mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh")), atol=1e-6)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: FusedMLP(4, activation="sqrelu"), NotImplementedError,
         "FusedMLP: activation must be 'gelu_approx' or 'relu', got 'sqrelu'"),
        (lambda: FusedMLP(4, activation="tanh"), ValueError,
         "FusedMLP: activation must be 'gelu_approx' or 'relu', got 'tanh'"),
        (lambda: FusedMLP(4, checkpoint_lvl=2), NotImplementedError,
         "FusedMLP: checkpoint_lvl must be 0 or 1, as what the activation reads is kept"
         " (torch.utils.checkpoint keeps nothing), got 2"),
        (lambda: FusedMLP(4, checkpoint_lvl=3), ValueError,
         "FusedMLP: checkpoint_lvl must be 0 or 1, got 3"),
        (lambda: FusedDense(4, 4)(torch.ones(2, 4), process_group="world"), NotImplementedError,
         "fused_dense_func: process_group must be None, as rows are not divided among processes,"
         " got 'world'"),
    ],
)  # fmt: skip
def test_bad_dense_layers(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message


def test_unpadding_and_padding_are_each_others_inverse():
    x, mask = torch.randn(3, 6, 4, 2, requires_grad=True), torch.arange(6) < torch.tensor([[6], [2], [4]])
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(rows, x[mask])
    assert cu_seqlens.tolist() == [0, 6, 8, 12] and cu_seqlens.dtype == torch.int32
    assert longest == 6 and used.tolist() == [6, 2, 4]
    padded = bert_padding.pad_input(rows, indices, 3, 6)
    assert torch.equal(padded, x * mask[..., None, None])
    (gradient,) = torch.autograd.grad(padded.square().sum(), x)
    assert torch.equal(gradient, 2 * x * mask[..., None, None])
    unused = torch.zeros_like(mask, dtype=torch.int32)
    unused[1, 2] = 1
    _, indices, cu_seqlens, _, used = bert_padding.unpad_input(x, mask.int(), unused)
    assert cu_seqlens.tolist() == [0, 6, 9, 13] and used.tolist() == [6, 2, 4]
    with pytest.raises(ValueError) as error:
        bert_padding.unpad_input(x, mask[:, :5])
    assert str(error.value) == "unpad_input: attention_mask must be a tensor of shape (3, 6), got (3, 5)"
