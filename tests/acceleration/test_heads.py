"""Logits that nobody reads are never made, and are a tensor for whoever reads them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lspm_kernels as lk
import oracle
from lspm_kernels.acceleration.logits import Logits
from lspm_kernels.acceleration.swap import is_swapped

CLASSES = 4100
TOKENS = torch.randint(CLASSES, (3, 7), generator=torch.Generator().manual_seed(0))
LABELS = TOKENS.roll(-1, 1).index_fill(1, torch.tensor([6]), -1)


class Model(nn.Module):
    """A language model as many write one; `use` is what its forward does with its logits."""

    def __init__(self, use, bias=False):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 16)
        self.head = nn.Linear(16, CLASSES, bias=bias)
        self.use = use

    def forward(self, tokens, labels=None):
        logits = self.head(self.embedding(tokens).tanh())
        return self.use(F.cross_entropy, logits, labels)


def flat(cross_entropy, logits, labels):
    return logits, cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-1)


def shifted(cross_entropy, logits, labels):
    logits = logits[..., :-1, :].contiguous().float().to(labels.device)
    labels = labels[..., :-1].reshape(-1)
    loss = cross_entropy(logits.reshape(-1, CLASSES), labels, None, reduction="sum", label_smoothing=0.1)
    return {"loss": loss, "logits": logits}["loss"]


def weighted(cross_entropy, logits, labels):
    weight = torch.linspace(0.5, 2, CLASSES, dtype=logits.dtype)
    some = logits[:, 1:-1]
    return cross_entropy(some.reshape((-1, CLASSES)), labels[:, 1:-1].flatten(), weight=weight), some


def module(_, logits, labels):
    return nn.CrossEntropyLoss(ignore_index=-1)(
        logits.reshape(logits.shape[0] * logits.shape[1], -1), labels.view(-1)
    )


def scaled(cross_entropy, logits, labels):
    logits = 3 * torch.tanh(logits / 3) + 0.5
    return cross_entropy(logits.view(-1, CLASSES), labels.view(-1), ignore_index=-1)


def transposed(cross_entropy, logits, labels):
    return cross_entropy(logits.transpose(1, 2), labels, ignore_index=-1)


def probabilities(cross_entropy, logits, labels):
    target = F.one_hot(labels.clamp(min=0), CLASSES).to(logits.dtype)
    return cross_entropy(logits.view(-1, CLASSES), target.view(-1, CLASSES))


def read(cross_entropy, logits, labels):
    return [
        *flat(cross_entropy, logits, labels),
        logits.logsumexp(-1),
        logits[labels == 3],
        -logits,
        len(logits),
    ][:4]


def unused(cross_entropy, logits, labels):
    return cross_entropy(logits[..., :5].flatten(0, 1), labels.flatten() % 5), logits


def first_classes(cross_entropy, logits, labels):
    return cross_entropy(logits[0, :, :50], labels[0] % 50)


def written(cross_entropy, logits, labels):
    before = logits.view(-1, CLASSES)
    logits[..., 0] = -30.0
    return cross_entropy(before, labels.view(-1), ignore_index=-1), logits


NEVER = [flat, shifted, weighted]
ONCE = [module, scaled, transposed, probabilities, read, unused, first_classes, written]


@pytest.fixture
def made(monkeypatch):
    """The shapes of logits that became tensors."""
    shapes, tensor = [], Logits.tensor
    monkeypatch.setattr(Logits, "tensor", lambda self: (shapes.append(self.shape), tensor(self))[1])
    return shapes


def outcome(model, **options):
    outputs = model(TOKENS, LABELS)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    sums = sum(o.sum() for o in outputs if o.dim() < 2)
    grads = torch.autograd.grad(sums, list(model.parameters()))
    return [*(o.detach() for o in outputs), *grads]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("use", [*NEVER, *ONCE])
def test_a_loss_and_what_else_is_read(use, bias, made):
    ours = Model(use, bias).train()
    truth, plain = copy.deepcopy(ours).double(), copy.deepcopy(ours)
    report = lk.accelerate(ours)
    assert report.replaced["head"] == "head, whose loss needs no logits"
    found = ours(TOKENS, LABELS)
    assert not (use in NEVER and made)
    actual, truth, plain = map(outcome, (ours, truth, plain))
    for i, (value, true, other) in enumerate(zip(actual, truth, plain, strict=True)):
        oracle.compare(str(i), value, true, other)
    logits = found[0] if use in (flat, read) else found[-1] if use in (weighted, unused) else None
    assert logits is None or isinstance(logits, Tensor)
    # Of logits that no loss was computed of, another graph may still be made: they are a tensor.
    assert (type(logits) is Logits) == (use in (flat, read, weighted))


def test_logits_are_a_tensor_for_whoever_reads_them():
    model = Model(flat).train()
    plain = copy.deepcopy(model)
    lk.accelerate(model)
    logits, expected = model(TOKENS, LABELS)[0], plain(TOKENS, LABELS)[0]
    assert type(logits) is Logits
    assert (logits.shape, logits.dim(), logits.ndim, logits.device, logits.dtype) == (
        (3, 7, CLASSES), 3, 3, expected.device, torch.float32,
    )  # fmt: skip
    for function in (
        lambda x: x.argmax(-1), lambda x: torch.softmax(x, -1), lambda x: x + 1, lambda x: 1 - x, abs,
        lambda x: x @ x.mT, lambda x: x[0, 1, 2], lambda x: x[..., 0], lambda x: x[:, -1, :],
        lambda x: x[x > 0], lambda x: x.detach(), lambda x: torch.stack([x, x]), lambda x: x[None],
        lambda x: x.view(-1), lambda x: (x > 0).sum(), lambda x: x.half(), lambda x: x[0],
        lambda x: x.to(torch.float64), lambda x: x[1:, 2:],
        lambda x: copy.deepcopy(x.detach()), lambda x: x.float().bfloat16(),
        lambda x: torch.tensor(len(x)),
    ):  # fmt: skip
        actual, true = function(logits), function(expected)
        assert actual.dtype == true.dtype
        torch.testing.assert_close(actual, true)
    assert "tensor" in repr(logits)
    assert logits.requires_grad
    logits.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(model.head.weight.grad, plain.head.weight.grad)


@pytest.mark.parametrize("mode", ["eval", "no_grad", "a hook", "float64"])
def test_where_nothing_is_saved_logits_are_a_tensor(mode):
    model = Model(flat).train(mode != "eval")
    model = model.double() if mode == "float64" else model
    lk.accelerate(model)
    seen = []
    if mode == "a hook":
        model.head.register_forward_hook(lambda _module, _inputs, output: seen.append(type(output)))
    with torch.set_grad_enabled(mode != "no_grad"):
        assert type(model(TOKENS, LABELS)[0]) is Tensor
    assert seen == ([Tensor] if mode == "a hook" else [])


def test_a_head_alone_gives_a_tensor():
    model = Model(flat).train()
    lk.accelerate(model)
    assert type(model.head(torch.randn(2, 16, requires_grad=True))) is Tensor


def test_only_what_computes_a_loss_of_many_classes_owns_a_head():
    class Plain(Model):
        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    model = Plain(None)
    assert "head" not in str(lk.accelerate(model).replaced.get("head", ""))
    narrow = Model(flat)
    narrow.head = nn.Linear(16, 100)
    lk.accelerate(narrow)
    assert not is_swapped(narrow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, made):
    model = Model(flat).train()
    plain = copy.deepcopy(model)
    lk.accelerate(model)
    found = []
    for m in (model, plain):
        with torch.autocast("cpu", dtype):
            logits, loss = m(TOKENS, LABELS)
        found.append((loss, *torch.autograd.grad(loss, list(m.parameters()))))
        assert logits.dtype == dtype
    assert not made
    for actual, expected in zip(*found, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("of_head", [False, True])
def test_backward_hooks_are_called(of_head):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 5000, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model, seen = GPT2LMHeadModel(GPT2Config(**sizes)).train(), []
    lk.accelerate(model)
    hooked = model.lm_head if of_head else model
    hooked.register_full_backward_hook(lambda module, *_: seen.append(module))
    ids = torch.randint(5000, (2, 16))
    model(input_ids=ids, labels=ids, return_dict=False)[0].backward()
    assert seen == [hooked]


@pytest.mark.parametrize("changed", ["embedding", "head"])
def test_logits_are_those_of_the_weights_that_they_were_given_for(changed):
    model = Model(flat).train()
    lk.accelerate(model)
    (late, loss), (early, _) = model(TOKENS, LABELS), model(TOKENS, LABELS)
    expected = early.detach()
    loss.backward()
    torch.optim.SGD(model.get_submodule(changed).parameters(), 1.0).step()
    torch.testing.assert_close(early.detach(), expected, rtol=0, atol=0)
    rule = "read before what they are computed of changes"
    if changed == "embedding":  # the logits are of what it gave
        torch.testing.assert_close(late.detach(), expected)
    else:
        for read in (lambda: late.argmax(-1), lambda: flat(F.cross_entropy, late, LABELS)):
            with pytest.raises(RuntimeError, match=rule):
                read()


def test_a_gradient_of_logits_whose_loss_has_none_is_refused():
    model = Model(flat).train()
    lk.accelerate(model)
    logits, loss = model(TOKENS, LABELS)
    for ask in (
        logits.retain_grad,
        lambda: logits.register_hook(print),
        lambda: torch.autograd.grad(loss, logits, allow_unused=True),
        lambda: torch.autograd.grad(loss, [model.head.weight, logits], allow_unused=True),
    ):
        with pytest.raises(RuntimeError, match="must not be asked for a gradient once their loss"):
            ask()
    assert torch.autograd.grad(logits.sum(), model.head.weight)[0].isfinite().all()

    def kept(_, logits, labels):
        logits.retain_grad()
        return flat(F.cross_entropy, logits, labels)

    model.use = kept
    logits, loss = model(TOKENS, LABELS)
    loss.backward()
    assert logits.grad.abs().sum() > 0


def test_vmap_of_logits():
    model = Model(flat).train()
    plain = copy.deepcopy(model)
    lk.accelerate(model)
    found, expected = (m(TOKENS, LABELS)[0] for m in (model, plain))
    best = torch.vmap(lambda x: x.max(-1).values)
    with pytest.raises(RuntimeError, match=r"logits \+ 0 is a plain tensor"):
        best(found)  # whose gradient would be lost
    with torch.no_grad():
        torch.testing.assert_close(best(found), best(expected))
