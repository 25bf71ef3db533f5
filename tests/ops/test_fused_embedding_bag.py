"""FusedEmbeddingBag: an embedding bag whose backward is the optimizer's step."""

import copy
import io
import pickle

import pytest
import torch

import lspm_kernels as lk
from lspm_kernels.ops import embedding_bag_update as updates

OPTIMIZERS = {"sgd": [], "adagrad": ["state_sum"], "adam": ["exp_avg", "exp_avg_sq", "step"]}
EACH = pytest.mark.parametrize("optimizer", OPTIMIZERS)
INDICES = torch.tensor([[1, 4, 4], [2, 1, 8]])


def module(optimizer="adagrad", **options):
    return lk.FusedEmbeddingBag(9, 5, mode="sum", optimizer=optimizer, lr=0.1, **options)


def train(bag, steps=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        indices = torch.randint(9, (4, 3), generator=generator)
        bag(indices).sin().sum().backward()


def tensors(bag):
    return [t.clone() for t in bag.state_dict().values()]


@EACH
def test_a_backward_is_a_step(optimizer):
    bag = module(optimizer, weight_decay=0.1, padding_idx=8)
    weight, out = bag.weight.detach().clone(), bag(INDICES)
    assert torch.equal(out, lk.embedding_bag(weight, INDICES, padding_idx=8)) and out.requires_grad
    dout = torch.randn(2, 5)
    out.backward(dout)
    states = {"sgd": [], "adagrad": [torch.zeros(9)], "adam": [torch.zeros(9, 5), torch.zeros(9, 5)]}[
        optimizer
    ]
    settings = {"sgd": {}, "adagrad": {"eps": 1e-8}, "adam": {"step": 1}}[optimizer]
    function = getattr(updates, f"embedding_bag_{optimizer}_")
    function(weight, *states, dout, INDICES, lr=0.1, weight_decay=0.1, padding_idx=8, **settings)
    for name, expected in zip(["weight", *OPTIMIZERS[optimizer]], [weight, *states], strict=False):
        assert torch.equal(getattr(bag, name), expected), name
    assert bag.weight.grad is None and not list(filter(lambda p: p.requires_grad, bag.parameters()))


def test_it_learns_what_torchs_module_learns():
    ours = lk.FusedEmbeddingBag(9, 5, mode="mean", optimizer="sgd", lr=0.1)
    theirs = torch.nn.EmbeddingBag(9, 5, mode="mean", _weight=ours.weight.detach().clone())
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    indices, offsets = INDICES.flatten(), torch.tensor([0, 0, 4])
    for _ in range(3):
        for bag in (ours, theirs):
            optimizer.zero_grad()
            bag(indices, offsets).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight.detach())
    assert isinstance(ours, torch.nn.EmbeddingBag) and "optimizer=sgd, lr=0.1" in repr(ours)


@EACH
def test_state_dict_copies_and_pickles_go_on_alike(optimizer):
    bag = module(optimizer)
    train(bag)
    assert [*bag.state_dict()] == ["weight", *OPTIMIZERS[optimizer]]
    file = io.BytesIO()
    torch.save(bag.state_dict(), file)
    file.seek(0)
    loaded = module(optimizer)
    loaded.load_state_dict(torch.load(file))
    others = [copy.deepcopy(bag), pickle.loads(pickle.dumps(bag)), loaded]
    for one in (bag, *others):
        train(one, seed=1)
    for other in others:
        assert all(map(torch.equal, tensors(bag), tensors(other)))
        train(other, 1)
    assert not torch.equal(bag.weight, others[0].weight)  # they share nothing


def test_nothing_changes_in_evaluation_or_without_gradients():
    bag = module("adam")
    before = tensors(bag)
    bag.eval()
    assert not bag(INDICES).requires_grad
    bag.train()
    with torch.no_grad():
        assert not bag(INDICES).requires_grad
    bag(INDICES).sum()  # no backward
    assert all(map(torch.equal, tensors(bag), before))


def test_weights_have_the_gradient_of_the_table_as_it_was():
    for training in (True, False):
        bag = module("sgd").train(training)
        weights, table = torch.randn(2, 3, requires_grad=True), bag.weight.clone()
        bag(INDICES, per_sample_weights=weights).sum().backward()
        torch.testing.assert_close(weights.grad, table[INDICES].sum(-1))
        assert torch.equal(bag.weight, table) is not training
    outs = [bag.train()(INDICES, per_sample_weights=weights).sum() for _ in range(2)]
    outs[0].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outs[1].backward()


def test_every_backward_is_a_step_of_its_own():
    bag, twice = module("adagrad"), module("adagrad")
    twice.load_state_dict(bag.state_dict())
    (bag(INDICES).sum() + bag(INDICES).sum()).backward()
    for _ in range(2):
        twice(INDICES).sum().backward()
    assert all(map(torch.equal, tensors(bag), tensors(twice)))
    out = twice(INDICES).sum()
    out.backward(retain_graph=True)
    out.backward()
    for _ in range(2):
        bag(INDICES).sum().backward()
    assert all(map(torch.equal, tensors(bag), tensors(twice)))


def test_indices_that_changed_since_and_second_derivatives_are_errors():
    bag, indices = module(), INDICES.clone()
    out = bag(indices).sum()
    indices[0, 0] = 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    weights = torch.randn(2, 3, requires_grad=True)
    out = bag(INDICES, per_sample_weights=weights).square().sum()
    (gradient,) = torch.autograd.grad(out, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_settings_may_change_between_steps():
    bag = module("sgd")
    before, bag.lr = bag.weight.clone(), 0.0
    train(bag)
    assert torch.equal(bag.weight, before)


def test_the_state_keeps_float32_wherever_the_table_goes():
    bag = module("adam")
    train(bag)
    moment, step = bag.exp_avg.clone(), bag.step
    bag.bfloat16()
    bag.stochastic_rounding = True
    assert bag.weight.dtype == torch.bfloat16 and torch.equal(bag.exp_avg, moment) and bag.step is step
    train(bag)
    assert bag.step == 4 and bag.double().exp_avg.dtype == torch.float64
    meta = module("adam", device="meta")
    assert meta.exp_avg.is_meta and meta.to_empty(device="cpu").exp_avg.shape == (9, 5)


def test_compile_leaves_it_to_eager_mode():
    torch._dynamo.reset()
    bag, plain = module(), module()
    plain.load_state_dict(bag.state_dict())
    compiled = torch.compile(lambda indices: bag(indices).sin().sum(), backend="aot_eager")
    compiled(INDICES).backward()
    plain(INDICES).sin().sum().backward()
    torch.testing.assert_close(tensors(bag), tensors(plain))


BAD = {
    "max_norm must be None, got 1.0": {"max_norm": 1.0},
    "scale_grad_by_freq must be False, got True": {"scale_grad_by_freq": True},
    "mode must be one of sum, mean, got 'max'": {"mode": "max"},
    "optimizer must be one of sgd, adagrad, adam, got 'lamb'": {"optimizer": "lamb"},
    "lr must be finite and at least 0, got inf": {"lr": float("inf")},
    "eps must be finite and at least 0, got -1": {"eps": -1},
    "weight_decay must be finite and at least 0, got nan": {"weight_decay": float("nan")},
    "betas must be at least 0 and below 1, got 1": {"betas": (0.9, 1)},
    "betas must be two numbers, got 0.9": {"betas": 0.9},
    "betas must be two numbers, got (0.9, 0.9, 0.9)": {"betas": (0.9, 0.9, 0.9)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError) as error:
        lk.FusedEmbeddingBag(9, 5, **BAD[message])
    assert str(error.value) == f"FusedEmbeddingBag: {message}"


def test_a_bad_call_changes_nothing():
    bag = module()
    before = tensors(bag)
    with pytest.raises(ValueError, match="embedding_bag: indices must be at least 0 and below 9, got 9"):
        bag(INDICES + 1)
    assert all(map(torch.equal, tensors(bag), before))


def test_rows_of_before_are_trained_on_or_refused():
    rows = torch.randn(9, 5)
    with pytest.raises(ValueError, match=r"^FusedEmbeddingBag: freeze must be False, as .*, got True$"):
        lk.FusedEmbeddingBag.from_pretrained(rows)
    bag = lk.FusedEmbeddingBag.from_pretrained(rows.clone(), freeze=False, mode="sum")
    bag(torch.tensor([[3, 4]])).sum().backward()
    assert not bag.weight.requires_grad
    assert (bag.weight != rows).any(1).nonzero().flatten().tolist() == [3, 4]
