"""compat.apex: fused norms and FusedAdam, beside plain PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F

import oracle
from lspm_kernels.compat.apex.contrib.xentropy import SoftmaxCrossEntropyLoss
from lspm_kernels.compat.apex.normalization import (
    FusedLayerNorm,
    FusedRMSNorm,
    MixedFusedLayerNorm,
    MixedFusedRMSNorm,
)
from lspm_kernels.compat.apex.normalization import fused_layer_norm as fused
from lspm_kernels.compat.apex.optimizers import FusedAdam

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [24, (4, 6)])
def test_norms(shape, dtype):
    layer, rms = FusedLayerNorm(shape).to(dtype), FusedRMSNorm(shape, memory_efficient=True).to(dtype)
    sizes = tuple(layer.normalized_shape)
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((3, 5, *sizes), sizes, sizes))
    oracle.check(
        lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, x),
        lambda x, w, b: F.layer_norm(x, sizes, w, b, 1e-5),
        [x, weight, bias],
    )
    oracle.check(
        lambda x, w: torch.func.functional_call(rms, {"weight": w}, x),
        lambda x, w: F.rms_norm(x, sizes, w, 1e-5),
        [x, weight],
    )


def test_modules_are_torchs_in_all_but_the_forward():
    assert list(FusedLayerNorm(8).state_dict()) == ["weight", "bias"]
    assert list(FusedRMSNorm((2, 4)).state_dict()) == ["weight"]
    bare = FusedLayerNorm(8, elementwise_affine=False)
    x = torch.randn(3, 8)
    assert not bare.state_dict()
    assert torch.allclose(bare(x), F.layer_norm(x, (8,)), atol=1e-6)
    assert repr(FusedLayerNorm(8)) == "FusedLayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)"


@pytest.mark.parametrize("weights", [F32, BF16])
@pytest.mark.parametrize("inputs", [F32, BF16])
def test_mixed_norms_give_the_weights_dtype(inputs, weights):
    x = torch.randn(5, 24).to(inputs)
    for module, norm in ((MixedFusedLayerNorm(24), F.layer_norm), (MixedFusedRMSNorm(24), F.rms_norm)):
        y = module.to(weights)(x)
        assert y.dtype == weights
        truth = norm(x.double(), (24,), eps=1e-5)
        oracle.compare("y", y, truth, truth.to(weights))


NORMS = [FusedLayerNorm, FusedRMSNorm, MixedFusedLayerNorm, MixedFusedRMSNorm]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("kind", NORMS)
def test_autocast_takes_inputs_and_parameters_in_its_dtype(kind, dtype):
    """Outputs have that dtype, gradients those of what was given, and both the bits of a norm without it."""
    module, x = kind((4, 6)), torch.randn(5, 4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = module(x)
    same, given = kind((4, 6)).to(dtype), x.detach().to(dtype).requires_grad_()
    truth, dy = same(given), torch.randn(5, 4, 6).to(dtype)
    assert y.dtype == dtype and torch.equal(y, truth)
    found = torch.autograd.grad(y, [x, *module.parameters()], dy)
    expected = torch.autograd.grad(truth, [given, *same.parameters()], dy)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == F32 and torch.equal(ours, theirs.float())


def test_functions_are_the_modules_with_given_parameters():
    x, weight, bias = torch.randn(5, 4, 6).to(BF16), torch.randn(4, 6), torch.randn(4, 6)
    plain = F.layer_norm(x.float(), (4, 6), weight, bias, 1e-6)
    assert torch.allclose(
        fused.mixed_dtype_fused_layer_norm_affine(x, weight, bias, [4, 6]), plain, atol=1e-5
    )
    assert torch.equal(fused.fused_layer_norm_affine(x, weight, bias, torch.Size([4, 6])), plain.to(BF16))
    assert torch.allclose(
        fused.fused_layer_norm(x.float(), 6), F.layer_norm(x.float(), (6,), eps=1e-6), atol=1e-5
    )
    plain = F.rms_norm(x.float(), (4, 6), weight, 1e-6)
    assert torch.allclose(fused.mixed_dtype_fused_rms_norm_affine(x, weight, (4, 6)), plain, atol=1e-5)
    assert fused.fused_rms_norm_affine(x, weight, (4, 6)).dtype == BF16
    assert torch.allclose(
        fused.fused_rms_norm(x.float(), 6), F.rms_norm(x.float(), (6,), eps=1e-6), atol=1e-5
    )


def test_adam_is_torchs():
    for options, theirs in (
        ({}, {}),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ({"amsgrad": True},) * 2,
    ):
        start = [torch.randn(5, 3), torch.randn(7)]
        ours, plain = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
        pairs = (
            FusedAdam(ours, lr=0.01, **options),
            torch.optim.AdamW(plain, 0.01, **{"weight_decay": 0, **theirs}),
        )
        for _ in range(5):
            grads = [torch.randn_like(t) for t in start]
            for params, optimizer in zip((ours, plain), pairs, strict=True):
                for p, g in zip(params, grads, strict=True):
                    p.grad = g.clone()
                optimizer.step()
        for p, q in zip(ours, plain, strict=True):
            assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)
        without = FusedAdam(
            [torch.nn.Parameter(torch.ones(2))], adam_w_mode=False
        )  # the same without a decay
        assert without.param_groups[0]["weight_decay"] == 0


def test_adam_keeps_moments_of_half_types_in_float32():
    start, grads = torch.randn(64), [torch.randn(64).to(BF16) for _ in range(4)]
    p = torch.nn.Parameter(start.to(BF16))
    master = torch.nn.Parameter(start.to(BF16))
    wide = torch.nn.Parameter(start.to(BF16).float())
    optimizers = (
        FusedAdam([p]),
        FusedAdam([master], master_weights=True),
        torch.optim.AdamW([wide], weight_decay=0),
    )
    for g in grads:
        p.grad, master.grad, wide.grad = g.clone(), g.clone(), g.float()
        for optimizer in optimizers:
            optimizer.step()
    mine, kept, truth = optimizers[0].state[p], optimizers[1].state[master], optimizers[2].state[wide]
    for name in ("exp_avg", "exp_avg_sq"):
        assert mine[name].dtype == kept[name].dtype == F32
        assert torch.allclose(mine[name], truth[name], rtol=1e-5, atol=1e-8)
    assert torch.allclose(kept["master_param"], wide, rtol=1e-6, atol=1e-7)
    assert torch.equal(master, kept["master_param"].to(BF16))
    assert (p - wide).abs().max() <= 4 * 2**-8 * wide.abs().max()  # one rounding a step


def test_gradients_are_set_to_none_or_to_zero():
    p = torch.nn.Parameter(torch.ones(2))
    for kept in (False, True):
        p.grad = torch.ones(2)
        FusedAdam([p], set_grad_none=not kept).zero_grad()
        assert (p.grad is not None and p.grad.eq(0).all()) if kept else p.grad is None


@pytest.mark.parametrize("options", [{}, {"master_weights": True}])
def test_a_scaler_divides_its_scale_out(options):
    """As with torch's AdamW: a step whose gradients overflow leaves parameters as they are."""
    start = torch.randn(64)
    ours, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pairs = [
        (p, optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0))
        for p, optimizer in (
            (ours, FusedAdam([ours], lr=0.01, **options)),
            (plain, torch.optim.AdamW([plain], 0.01, weight_decay=0)),
        )
    ]
    for overflows in (False, True, False):
        slope = torch.randn(64)
        slope[3] = float("inf") if overflows else 1
        for p, optimizer, scaler in pairs:
            before = p.detach().clone()
            optimizer.zero_grad()
            scaler.scale((p * slope).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(p, before) == overflows
    assert torch.allclose(ours, plain, rtol=1e-6, atol=1e-7)


def test_a_copy_keeps_its_own_options():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdam([p], adam_w_mode=False, set_grad_none=False)
    copied = copy.deepcopy(optimizer)
    (twin,) = copied.param_groups[0]["params"]
    twin.grad = torch.ones(2)
    copied.step()
    copied.zero_grad()
    assert twin.grad.eq(0).all()
    assert not copied.adam_w_mode


@pytest.mark.parametrize("padding", [0, -100])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_cross_entropy_of_rows(dtype, padding):
    labels = torch.tensor([5, padding, 8, 3, padding, 1])
    options = {"ignore_index": padding, "label_smoothing": 0.1, "reduction": "none"}
    oracle.check(
        lambda x: SoftmaxCrossEntropyLoss.apply(x, labels, 0.1, padding),
        lambda x: F.cross_entropy(x.to(torch.promote_types(x.dtype, F32)), labels, **options).to(x.dtype),
        [torch.randn(6, 9).to(dtype)],
    )


def test_cross_entropy_of_rows_may_be_float32_and_leaves_class_0_out():
    x, labels = torch.randn(4, 9).to(BF16), torch.tensor([2, 0, 8, 1])
    losses = SoftmaxCrossEntropyLoss.apply(x, labels, half_to_float=True)
    plain = F.cross_entropy(x.float(), labels, reduction="none", ignore_index=0)
    assert losses.dtype == F32 and torch.allclose(losses, plain, atol=1e-5)


def adam(**options):
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    return FusedAdam([p], **options)


def decayed_later():
    optimizer = adam(adam_w_mode=False)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    optimizer.step()


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: adam(bias_correction=False), NotImplementedError,
         "FusedAdam: bias_correction must be True, as moments are corrected for their start at 0, got False"),
        (lambda: adam(capturable=True), NotImplementedError,
         "FusedAdam: capturable must be False, as steps are counted on the CPU, got True"),
        (lambda: adam(adam_w_mode=False, weight_decay=0.1), NotImplementedError,
         "FusedAdam: adam_w_mode must be True beside a weight_decay, as decay is decoupled"
         " (torch.optim.Adam has the other), got False with 0.1"),
        (decayed_later, NotImplementedError,
         "FusedAdam: adam_w_mode must be True beside a weight_decay, as decay is decoupled"
         " (torch.optim.Adam has the other), got False with 0.1"),
        (lambda: adam().step(scale=2.0), NotImplementedError,
         "FusedAdam.step: scale must be None, as gradients are those of the parameters, got 2.0"),
        (lambda: MixedFusedLayerNorm(4, elementwise_affine=False), ValueError,
         "MixedFusedLayerNorm: elementwise_affine must be True, got False"),
        (lambda: MixedFusedRMSNorm(4, elementwise_affine=False), ValueError,
         "MixedFusedRMSNorm: elementwise_affine must be True, got False"),
        (lambda: FusedLayerNorm((2, 4))(torch.ones(3, 4)), ValueError,
         "FusedLayerNorm: input must be a floating-point tensor (..., 2, 4), got (3, 4) torch.float32"),
        (lambda: FusedRMSNorm(4)(torch.ones(3, 4).int()), ValueError,
         "FusedRMSNorm: input must be a floating-point tensor (..., 4), got (3, 4) torch.int32"),
        (lambda: SoftmaxCrossEntropyLoss.apply(torch.ones(2, 4), torch.tensor([1, 4])), ValueError,
         "SoftmaxCrossEntropyLoss: target must be from 0 to 3 or 0, got 4"),
    ],
)  # fmt: skip
def test_bad_input(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message
