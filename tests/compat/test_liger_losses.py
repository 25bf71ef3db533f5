"""compat.liger_kernel: Liger-Kernel's losses, beside plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

import oracle
from lspm_kernels.compat.liger_kernel import transformers as liger
from lspm_kernels.compat.liger_kernel.transformers import losses

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16])

LOSSES = {
    "plain": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1},
    "none": {"reduction": "none", "softcap": 3.0},
    "z": {"lse_square_scale": 0.02, "softcap": 3.0, "label_smoothing": 0.1},
    "weighted": {"weight": True, "label_smoothing": 0.1},
    "weighted z": {"weight": True, "lse_square_scale": 0.02},
}


def plain_loss(
    logits, target, weight=None, reduction="mean", label_smoothing=0.0, lse_square_scale=0.0, softcap=None
):
    """Liger's: the z-loss is not weighted, and is divided by the number of rows."""
    wide = logits.to(torch.promote_types(logits.dtype, F32))
    wide = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    weight = None if weight is None else weight.to(wide.dtype)
    loss = F.cross_entropy(wide, target, weight, reduction=reduction, label_smoothing=label_smoothing)
    z = (lse_square_scale * wide.logsumexp(-1).square()).where(target != -100, 0)
    rows = (target != -100).sum()
    return loss + {"none": z, "sum": z.sum(), "mean": z.sum() / rows}[reduction]


def case_of(name):
    options, target = dict(LOSSES[name]), torch.randint(37, (9,))
    target[4] = -100
    weight = torch.rand(37) + 0.5 if options.pop("weight", False) else None
    return options, target, weight


@DTYPES
@pytest.mark.parametrize("case", LOSSES)
def test_cross_entropy(case, dtype):
    options, target, weight = case_of(case)
    loss = liger.LigerCrossEntropyLoss(weight, **options)
    oracle.check(
        lambda t: loss(t, target),
        lambda t: plain_loss(t, target, weight, **options).to(t.dtype),
        [3 * torch.randn(9, 37).to(dtype)],
    )


@DTYPES
@pytest.mark.parametrize("case", LOSSES)
def test_fused_linear_cross_entropy(case, dtype):
    options, target, weight = case_of(case)
    loss = liger.LigerFusedLinearCrossEntropyLoss(weight, **options)
    wide = torch.promote_types(dtype, F32)
    oracle.check(
        lambda w, x, b: loss(w, x, target, b),
        lambda w, x, b: plain_loss(F.linear(x, w, b), target, weight, **options).to(
            torch.promote_types(x.dtype, wide)
        ),
        [torch.randn(37, 16).to(dtype), torch.randn(9, 16).to(dtype), torch.randn(37).to(dtype)],
    )


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("rows", [9, 0])
def test_of_rows_that_are_all_ignored_the_loss_is_0(rows, case):
    """Liger divides row by row; torch's mean of nothing is NaN."""
    options, _, weight = case_of(case)
    target = torch.full((rows,), -100)
    x, head = torch.randn(rows, 16, requires_grad=True), torch.randn(37, 16, requires_grad=True)
    loss = liger.LigerCrossEntropyLoss(weight, **options)(x @ head.t(), target)
    fused = liger.LigerFusedLinearCrossEntropyLoss(weight, return_z_loss=True, **options)
    fused = fused(head, x, target)
    alone = liger.LigerFusedLinearCrossEntropyLoss(weight, **options)(head, x, target)
    for value in (loss, fused.loss, alone):
        assert value.detach().count_nonzero() == 0
        assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(value.sum(), [x, head]))
    assert fused.z_loss.count_nonzero() == 0


@pytest.mark.parametrize("weight", [None, torch.rand(37)], ids=["", "weighted"])
def test_what_is_returned_beside_the_loss(weight):
    logits, target = torch.randn(9, 37), torch.randint(37, (9,))
    target[2], target[3], target[4] = logits[2].argmax(), logits[3].argmax(), -100
    asked = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
    found = liger.LigerCrossEntropyLoss(weight, lse_square_scale=0.1, **asked)(logits, target)
    counts = target != -100
    z = 0.1 * logits.logsumexp(-1).square()[counts].mean()
    assert torch.allclose(found.z_loss, z) and not found.z_loss.requires_grad
    assert torch.allclose(found.loss, F.cross_entropy(logits, target, weight) + z)
    predicted = logits.argmax(-1).where(counts, -1)
    assert torch.equal(found.predicted_tokens, predicted)
    assert found.token_accuracy == (predicted == target).sum() / 8
    each = liger.LigerCrossEntropyLoss(reduction="none", return_token_accuracy=True)(logits, target)
    assert torch.equal(each.token_accuracy, (predicted == target).float())
    linear = liger.LigerFusedLinearCrossEntropyLoss(weight, lse_square_scale=0.1, return_z_loss=True)
    found = linear(torch.eye(37), logits, target)
    assert torch.allclose(found.z_loss, z) and not found.z_loss.requires_grad
    assert torch.allclose(found.loss, F.cross_entropy(logits, target, weight) + z)


@DTYPES
@pytest.mark.parametrize("case", LOSSES)
def test_losses_scaled_by_the_probability_of_the_class(case, dtype):
    options, target, weight = case_of(case)
    reduction = options.pop("reduction", "mean")
    loss = liger.LigerFusedLinearCrossEntropyLoss(
        weight, reduction=reduction, use_token_scaling=True, return_z_loss=True, **options
    )

    def plain(w, x, b):
        logits, scale = (
            F.linear(x, w, b).to(torch.promote_types(x.dtype, F32)),
            options.get("lse_square_scale", 0.0),
        )
        capped = 3 * torch.tanh(logits / 3) if "softcap" in options else logits
        p = capped.softmax(-1).detach()[torch.arange(9), target.clamp(min=0)].where(target != -100, 0)
        z = p * scale * capped.logsumexp(-1).square()
        each = p * plain_loss(logits, target, weight, "none", **{**options, "lse_square_scale": 0.0})
        if reduction == "mean":
            each, z = each / (8 if weight is None else weight[target[target >= 0]].sum()), z / 8
        return each + z + z.detach() if reduction == "none" else (each + z + z.detach()).sum()

    def fused(w, x, b):
        found = loss(w, x, target, b)
        assert not found.z_loss.requires_grad
        return found.loss + found.z_loss

    given = [torch.randn(37, 16).to(dtype), torch.randn(9, 16).to(dtype), torch.randn(37).to(dtype)]
    oracle.check(fused, plain, given)


@DTYPES
@pytest.mark.parametrize("bytes_of_block", [1, 400, losses._BLOCK])
def test_tokens_of_a_linear_layer(monkeypatch, bytes_of_block, dtype):
    """By blocks of few rows or of all. Of whole numbers every product is exact, and some are equal."""
    monkeypatch.setattr(losses, "_BLOCK", bytes_of_block)
    x, weight, bias = (torch.randint(-2, 3, size).to(dtype) for size in ((9, 16), (37, 16), (37,)))
    target = F.linear(x, weight, bias).argmax(-1)
    target[::2], target[4] = 5, -100
    asked = {"return_token_accuracy": True, "return_predicted_tokens": True}
    for options in ({}, {"reduction": "none"}, {"softcap": 30.0, "use_token_scaling": True}):
        plain = {name: value for name, value in options.items() if name == "reduction"}
        truth = liger.LigerCrossEntropyLoss(**asked, **plain)(F.linear(x, weight, bias), target)
        found = liger.LigerFusedLinearCrossEntropyLoss(**asked, **options)(weight, x, target, bias)
        assert torch.equal(found.predicted_tokens, truth.predicted_tokens)
        assert torch.equal(found.token_accuracy, truth.token_accuracy)
        assert found.z_loss is None
    mixed = liger.LigerFusedLinearCrossEntropyLoss(return_predicted_tokens=True)
    assert torch.equal(mixed(weight.float(), x, target, bias).predicted_tokens, truth.predicted_tokens)
