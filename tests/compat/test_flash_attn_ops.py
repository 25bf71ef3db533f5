"""compat.flash_attn's norms and losses, beside plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

import oracle
from lspm_kernels.compat.flash_attn import flash_attn_func, flash_attn_interface
from lspm_kernels.compat.flash_attn.layers import rotary
from lspm_kernels.compat.flash_attn.losses.cross_entropy import CrossEntropyLoss
from lspm_kernels.compat.flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from lspm_kernels.compat.flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16])


def plain_norm(x, weight, bias, residual, x1, weight1, bias1, *, rms, rowscale, zero_centered, eps=1e-6):
    dtype = x.dtype
    wide = torch.promote_types(dtype, F32)
    x = x if rowscale is None else x * rowscale[..., None].to(dtype)
    x = x if x1 is None else x + x1
    total = x if residual is None else (x + residual).to(residual.dtype)

    def norm(weight, bias):
        weight = weight.to(wide) + zero_centered
        if rms:
            return F.rms_norm(total.to(wide), total.shape[-1:], weight, eps).to(dtype)
        bias = None if bias is None else bias.to(wide)
        return F.layer_norm(total.to(wide), total.shape[-1:], weight, bias, eps).to(dtype)

    outputs = [norm(weight, bias)] + ([] if weight1 is None else [norm(weight1, bias1)])
    return *outputs, total


NORMS = {
    "alone": {},
    "residual": {"residual": True},
    "residual, zero-centred": {"residual": True, "zero_centered": True},
    "rowscale": {"residual": True, "rowscale": True},
    "parallel": {"residual": True, "x1": True, "second": True},
}


@DTYPES
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("case", NORMS)
def test_norms(case, rms, dtype):
    has = NORMS[case]
    x, residual, x1 = (torch.randn(3, 5, 24).to(dtype) for _ in range(3))
    weight, bias, weight1, bias1 = (torch.randn(24).to(dtype) for _ in range(4))
    given = [x, weight, None if rms else bias, residual if "residual" in has else None]
    given += [x1 if "x1" in has else None, weight1 if "second" in has else None]
    given += [bias1 if "second" in has and not rms else None]
    rowscale = torch.rand(3, 5) if "rowscale" in has else None
    zero_centered = "zero_centered" in has
    function = rms_norm_fn if rms else layer_norm_fn

    def ours(*t):
        options = {"rowscale": rowscale, "prenorm": True, "zero_centered_weight": zero_centered}
        return function(*t, **options)

    options = {"rms": rms, "rowscale": rowscale, "zero_centered": zero_centered}
    oracle.check(ours, lambda *t: plain_norm(*t, **options), given)


def test_a_residual_in_float32_and_the_dtype_of_the_output():
    x, weight, residual = torch.randn(4, 16).to(BF16), torch.randn(16).to(BF16), torch.randn(4, 16)
    y, total = rms_norm_fn(x, weight, None, residual=residual, prenorm=True)
    assert (y.dtype, total.dtype) == (BF16, F32)
    assert torch.equal(total, x + residual)
    truth = F.rms_norm(total.double(), (16,), weight.double(), 1e-6)
    oracle.compare("y", y, truth, truth.to(BF16))
    y, total = rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True, out_dtype=F32)
    assert (y.dtype, total.dtype) == (F32, F32)
    assert torch.equal(total, x.float())
    assert rms_norm_fn(x, weight, None, prenorm=True)[1] is x


def test_dropout_comes_before_the_addition():
    x, residual, weight = torch.randn(64, 32), torch.randn(64, 32), torch.ones(32)
    _, total = layer_norm_fn(x, weight, None, residual=residual, dropout_p=0.25, prenorm=True)
    dropped = torch.isclose(total, residual)
    assert 0.2 < dropped.float().mean() < 0.3
    assert torch.allclose((total - residual)[~dropped], (x / 0.75)[~dropped], atol=1e-5)
    norm = RMSNorm(32, dropout_p=0.25)
    assert not torch.equal(norm(x), norm(x))
    assert torch.allclose(norm.eval()(x), F.rms_norm(x, (32,), norm.weight, 1e-5), atol=1e-6)
    assert list(norm.state_dict()) == ["weight"]
    assert RMSNorm(8, zero_centered_weight=True).weight.eq(0).all()


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"return_dropout_mask": True}, NotImplementedError,
         "layer_norm_fn: return_dropout_mask must be False, as masks are drawn again and never stored,"
         " got True"),
        ({"out": torch.ones(2, 4)}, NotImplementedError,
         "layer_norm_fn: out must be None, as results have memory of their own, got a tensor"),
        ({"residual_out": torch.ones(2, 4)}, NotImplementedError,
         "layer_norm_fn: residual_out must be None, as results have memory of their own, got a tensor"),
        ({"is_rms_norm": True}, ValueError, "rms_norm_fn: bias must be None for an RMS norm, got (4,)"),
        ({"bias1": torch.ones(4)}, ValueError,
         "layer_norm_fn: bias1 must be None where weight1 is, got (4,)"),
        ({"rowscale": torch.ones(2), "x1": torch.ones(2, 4)}, ValueError,
         "layer_norm_fn: rowscale must be None beside x1, got (2,)"),
        ({"rowscale": torch.ones(3)}, ValueError,
         "layer_norm_fn: rowscale must be a tensor of shape (2,), got (3,)"),
        ({"residual": torch.ones(3, 4)}, ValueError,
         "layer_norm_fn: residual must be a tensor of x's shape (2, 4), got (3, 4)"),
    ],
)  # fmt: skip
def test_bad_norms(options, kind, message):
    with pytest.raises(kind) as error:
        layer_norm_fn(torch.ones(2, 4), torch.ones(4), torch.ones(4), **options)
    assert str(error.value) == message


LOSSES = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "label_smoothing": 0.1},
    "z": {"lse_square_scale": 0.02, "label_smoothing": 0.1},
    "scaled": {"logit_scale": 0.25, "lse_square_scale": 0.02},
}


def plain_loss(
    logits, target, *, reduction="mean", label_smoothing=0.0, lse_square_scale=0.0, logit_scale=1.0
):
    wide = logits.to(torch.promote_types(logits.dtype, F32)) * logit_scale
    losses = F.cross_entropy(wide, target, reduction="none", label_smoothing=label_smoothing)
    z = lse_square_scale * wide.logsumexp(-1).square()
    losses = torch.where(target == -100, 0, losses + z)
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (target != -100).sum()}[reduction]


@DTYPES
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", LOSSES)
def test_cross_entropy(case, inplace, dtype):
    logits, target = 3 * torch.randn(9, 37).to(dtype), torch.randint(37, (9,))
    target[4] = -100
    loss = CrossEntropyLoss(**LOSSES[case], inplace_backward=inplace)
    plain = lambda t: plain_loss(t, target, **LOSSES[case])  # noqa: E731
    oracle.check(lambda t: loss(t * 1, target), lambda t: plain(t * 1), [logits])


def test_the_gradient_takes_the_memory_of_the_logits():
    logits, target = torch.randn(9, 37, requires_grad=True), torch.randint(37, (9,))
    hidden = logits * 1
    (gradient,) = torch.autograd.grad(CrossEntropyLoss(inplace_backward=True)(hidden, target), hidden)
    assert gradient.data_ptr() == hidden.data_ptr()
    hidden = logits * 1
    kept = hidden.detach().clone()
    loss = CrossEntropyLoss()(hidden, target)
    first, again = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(hidden, kept)
    loss = CrossEntropyLoss(inplace_backward=True)(hidden, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_z_loss_is_returned_without_a_gradient():
    logits, target = torch.randn(9, 37, requires_grad=True), torch.randint(37, (9,))
    loss, z = CrossEntropyLoss(lse_square_scale=0.1, return_z_loss=True)(logits, target)
    assert not z.requires_grad
    assert torch.allclose(z, 0.1 * logits.logsumexp(-1).square().mean())
    assert torch.allclose(loss, F.cross_entropy(logits, target) + z)
    assert CrossEntropyLoss(return_z_loss=True)(logits, target)[1] == 0
    lse = logits.logsumexp(-1).detach()
    losses, _ = cross_entropy_loss(logits, target, precomputed_lse=lse)
    assert torch.allclose(losses, F.cross_entropy(logits, target, reduction="none"), atol=1e-6)


def test_cross_entropy_compiles_and_runs_on_plain_pytorch():
    logits, target = torch.randn(9, 37, dtype=torch.float64), torch.randint(37, (9,))
    loss = CrossEntropyLoss(lse_square_scale=0.02)
    with pytest.warns(match="cross_entropy_loss runs on plain PyTorch"):
        found = loss(logits, target)
    assert torch.allclose(found, plain_loss(logits, target, lse_square_scale=0.02))
    torch._dynamo.reset()
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain = lambda t: plain_loss(t, target, lse_square_scale=0.02)  # noqa: E731
    oracle.check(lambda t: whole(t, target), plain, [logits.float()])


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"process_group": "world"}, NotImplementedError,
         "cross_entropy_loss: process_group must be None, as logits are not divided among processes,"
         " got 'world'"),
        ({"reduction": "max"}, ValueError,
         "CrossEntropyLoss: reduction must be one of mean, none, sum, got 'max'"),
        ({"logit_scale": 0.0}, ValueError, "cross_entropy_loss: logit_scale must be above 0, got 0.0"),
        ({"label_smoothing": 2}, ValueError,
         "cross_entropy_loss: label_smoothing must be from 0 to 1, got 2"),
    ],
)  # fmt: skip
def test_bad_losses(options, kind, message):
    with pytest.raises(kind) as error:
        CrossEntropyLoss(**options)(torch.ones(2, 4), torch.tensor([0, 1]))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "logits, target, message",
    [
        (torch.ones(4), torch.tensor(1),
         "cross_entropy_loss: logits must be a floating-point tensor (N, C), got (4,) torch.float32"),
        (torch.ones(2, 4), torch.tensor([1]),
         "cross_entropy_loss: target must be classes of shape (2,), got (1,) torch.int64"),
        (torch.ones(2, 4), torch.tensor([1, 4]),
         "cross_entropy_loss: target must be from 0 to 3 or -100, got 4"),
    ],
)  # fmt: skip
def test_bad_logits(logits, target, message):
    with pytest.raises(ValueError) as error:
        CrossEntropyLoss()(logits, target)
    assert str(error.value) == message


def test_the_attention_functions_are_where_they_were():
    assert flash_attn_func is flash_attn_interface.flash_attn_func
    assert rotary.apply_rotary_emb_func is rotary.apply_rotary_emb
