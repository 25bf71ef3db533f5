"""AdamW: as torch.optim.AdamW wherever that says what is right, and what it has beside that."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import lspm_kernels as lk
import oracle

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = {
    "plain": {},
    "no decay": {"weight_decay": 0.0},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "other numbers": {"betas": (0.5, 0.7), "eps": 1e-3, "lr": 0.3},
    "lr as a tensor": {"lr": torch.tensor(0.02)},
}


def model(dtype=F32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.LayerNorm(65), nn.Linear(65, 7)).to(dtype)


def gradients(net, step):
    """The same for every model, before they are rounded to its dtype."""
    torch.manual_seed(step)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, dtype=torch.float64).to(p.dtype)


def trained(make, steps=5, dtype=F32, clip=None, **options):
    """A model after some steps of make(parameters, **options), and the optimizer."""
    net = model(dtype)
    optimizer = make(net.parameters(), **{"lr": 0.02} | options)
    for step in range(steps):
        gradients(net, step)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return net, optimizer


def parameters(net):
    return [p.detach().clone() for p in net.parameters()]


def compare(ours, truth, plain):
    for i, results in enumerate(zip(*map(parameters, (ours, truth, plain)), strict=True)):
        oracle.compare(f"parameter {i}", *results)


@pytest.mark.parametrize("clip", [None, 3.0, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_torchs(kind, clip):
    torchs, options = torch.optim.AdamW, KINDS[kind]
    truth, plain = (trained(torchs, dtype=d, clip=clip, **options)[0] for d in (torch.float64, F32))
    ours, optimizer = trained(lk.AdamW, clip_norm=clip, **options)
    compare(ours, truth, plain)
    assert isinstance(optimizer, torchs) and repr(optimizer).startswith("AdamW (")


def test_bfloat16_and_float16_alone_are_torchs():
    eps = {"eps": 1e-3}  # the default is 0 in float16
    for dtype in (BF16, F16):
        truth, plain = (
            trained(torch.optim.AdamW, dtype=d, clip=9.0, **eps)[0] for d in (torch.float64, dtype)
        )
        ours, optimizer = trained(lk.AdamW, dtype=dtype, clip_norm=9.0, **eps)
        compare(ours, truth, plain)
        states = optimizer.state.values()
        assert {s[name].dtype for s in states for name in ("exp_avg", "exp_avg_sq")} == {dtype}


def test_gradients_are_not_rewritten_and_the_norm_is_told():
    net = model()
    optimizer = lk.AdamW(net.parameters(), clip_norm=0.1)
    assert optimizer.grad_norm is None
    gradients(net, 0)
    before = [p.grad.clone() for p in net.parameters()]
    norm = optimizer.measure_grad_norm()
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))
    assert torch.equal(norm, optimizer.grad_norm) and norm.shape == () and norm.dtype == F32
    expected = nn.utils.clip_grad_norm_(net.parameters(), math.inf)
    torch.testing.assert_close(norm, expected)


def test_a_norm_that_was_measured_is_taken():
    nets = [model() for _ in range(2)]
    first, second = (lk.AdamW(net.parameters(), clip_norm=0.1) for net in nets)
    for net in nets:
        gradients(net, 0)
    first.step(grad_norm=first.measure_grad_norm())
    second.step()
    assert all(map(torch.equal, *map(parameters, nets)))
    before = parameters(nets[0])
    first.step(grad_norm=torch.tensor(math.inf))  # times 0, so nothing but decay and momentum
    assert first.grad_norm == math.inf and not all(map(torch.equal, before, parameters(nets[0])))
    first.clip_norm = None
    first.step()
    second.clip_norm = math.inf
    second.step()
    assert second.grad_norm < math.inf


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_does_what_it_does_in_torch(value):
    found = []
    for make, options in ((lk.AdamW, {"clip_norm": 1.0}), (torch.optim.AdamW, {})):
        net = model()
        optimizer = make(net.parameters(), lr=0.1, **options)
        gradients(net, 0)
        net[0].weight.grad[3, 5] = value
        if not options:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        found.append(parameters(net))
    torch.testing.assert_close(*found, equal_nan=True)
    assert found[0][0].isnan().sum() == (found[0][0].numel() if math.isnan(value) else 1)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_master_weights(dtype):
    """Parameters are the rounded masters, whose steps are those of float32 parameters."""
    net, optimizer = trained(lk.AdamW, dtype=dtype, master_weights=True, clip_norm=3.0)
    wide = copy.deepcopy(model(dtype)).float()
    reference = torch.optim.AdamW(wide.parameters(), lr=0.02)
    for step in range(5):
        gradients(net, step)
        for p, q in zip(net.parameters(), wide.parameters(), strict=True):
            q.grad = p.grad.float()
        nn.utils.clip_grad_norm_(wide.parameters(), 3.0)
        reference.step()
    for p, q in zip(net.parameters(), wide.parameters(), strict=True):
        state = optimizer.state[p]
        assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq", "master_param")} == {F32}
        assert torch.equal(p, state["master_param"].to(dtype))
        torch.testing.assert_close(state["master_param"], q.detach(), rtol=1e-6, atol=1e-6)


def test_stochastic_rounding_repeats_itself_by_torchs_generator():
    found = []
    for seed in (3, 3, 4):
        net = model(BF16)
        optimizer = lk.AdamW(net.parameters(), stochastic_rounding=True)
        gradients(net, 0)
        torch.manual_seed(seed)
        optimizer.step()
        found.append(torch.cat([p.flatten() for p in parameters(net)]))
    assert torch.equal(*found[:2]) and not torch.equal(*found[1:])
    with pytest.raises(
        NotImplementedError, match="adamw_: cpu needs bfloat16 for stochastic rounding, got fl"
    ):
        net = model(F16)
        gradients(net, 0)
        optimizer = lk.AdamW(net.parameters(), stochastic_rounding=True)
        with lk.use_backend("cpu"):
            optimizer.step()


def test_groups_of_several_dtypes_layouts_and_gradients():
    """A group per kind of option; half of the parameters never have a gradient; complex ones are pairs."""
    wide = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    weight, bias, half = wide.weight, wide.bias, nn.Parameter(torch.randn(50).bfloat16())
    pair, none = nn.Parameter(torch.randn(9, dtype=torch.complex64)), nn.Parameter(torch.ones(3))
    tensors = [weight, bias, half, pair]
    twins = [nn.Parameter(t.detach().clone()) for t in tensors]
    second = {"lr": 0.5, "betas": (0.5, 0.6)}
    ours = lk.AdamW([{"params": [weight, half, none]}, {"params": [bias, pair]} | second], clip_norm=2.0)
    theirs = torch.optim.AdamW([{"params": twins[::2]}, {"params": twins[1::2]} | second])
    for _ in range(3):
        for t in tensors:
            t.grad = torch.randn_like(t)
        norm = math.sqrt(
            sum(t.grad.abs().double().square().sum() for t in tensors)
        )  # torch's is of bfloat16's
        for a, b in zip(tensors, twins, strict=True):
            b.grad = a.grad * (2.0 / norm)
        ours.step()
        theirs.step()
    for a, b in zip(tensors, twins, strict=True):
        torch.testing.assert_close(a, b)
    assert ours.state[none] == {} and torch.equal(none, torch.ones(3))
    assert ours.state[weight]["exp_avg"].stride() == weight.stride()


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaler_unscales_and_skips(unscaled):
    found = []
    for make, options in ((lk.AdamW, {"clip_norm": 1.0}), (torch.optim.AdamW, {"fused": True})):
        net, scaler = model(), torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = make(net.parameters(), lr=0.1, **options)
        for step in range(3):
            optimizer.zero_grad()
            torch.manual_seed(step)
            scaler.scale(net(torch.randn(4, 33)).square().sum() * (math.inf if step == 1 else 1)).backward()
            before = parameters(net)
            if unscaled or "fused" in options:
                scaler.unscale_(optimizer)
            if "fused" in options:
                norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            assert all(map(torch.equal, before, parameters(net))) == (step == 1)
        norm = optimizer.grad_norm if "fused" not in options else norm
        found.append([*parameters(net), norm, *(s["step"] for s in optimizer.state.values())])
    torch.testing.assert_close(*found)
    assert found[0][-1] == 2


def test_what_it_cannot_do():
    one = [nn.Parameter(torch.ones(3, 2))]
    for name in ("capturable", "differentiable"):
        with pytest.raises(NotImplementedError, match=f"^AdamW: {name} must be False, got True$"):
            lk.AdamW(one, **{name: True})
        saved = torch.optim.AdamW(one, **{name: True}).state_dict()
        with pytest.raises(NotImplementedError, match=f"^AdamW: {name} must be False, got True$"):
            lk.AdamW(one).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"^AdamW: clip_norm must be greater than 0 or None, got 0.0$"):
        lk.AdamW(one, clip_norm=0.0)
    with pytest.raises(ValueError, match=r"^AdamW: stochastic_rounding must be False beside"):
        lk.AdamW([{"params": one, "master_weights": True}], stochastic_rounding=True)
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        lk.AdamW(one, lr=-1)
    one[0].grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(
        NotImplementedError, match=r"^AdamW: gradients must be dense.*, got torch.sparse_coo$"
    ):
        lk.AdamW(one).step()


def test_torch_compile_leaves_a_step_to_eager_mode():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    nets = [model() for _ in range(2)]
    optimizers = [lk.AdamW(net.parameters(), clip_norm=0.5) for net in nets]
    for place, run in enumerate((optimizers[0].step, torch.compile(optimizers[1].step, backend=counter))):
        for number in range(2):
            gradients(nets[place], number)
            run()
    assert all(map(torch.equal, *map(parameters, nets)))
    assert counter.frame_count == 0
