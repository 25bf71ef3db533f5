"""embedding as every part of torch meets it."""

import pytest
import torch
from ops.test_embedding import bound, drawn, made
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import embedding as reference

BF16 = torch.bfloat16
OPTIONS = {"dropout_p": 0.3, "seed": 3}


def both(kind, tokens, **options):
    return (bound(f.embedding, kind, tokens, **OPTIONS, **options) for f in (lk, reference))


@pytest.mark.parametrize(
    ("mode", "kind"), [("aot_eager", "gpt"), ("aot_eager", "bert"), ("inductor", "bert")]
)
def test_compile(mode, kind):
    torch._dynamo.reset()
    made_once = torch.compile(
        lambda tokens, *t: bound(lk.embedding, kind, tokens, **OPTIONS)(*t), fullgraph=True, backend=mode
    )
    tensors = made(kind, 16)
    for shape in ((2, 5),) if mode == "inductor" else ((2, 5), (3, 9), (3, 11)):  # sizes are symbols
        tokens = drawn(*shape)
        theirs = bound(reference.embedding, kind, tokens, **OPTIONS)
        oracle.check(lambda *t, tokens=tokens: made_once(tokens, *t), theirs, tensors)


def test_compile_with_a_place_that_grows():
    torch._dynamo.reset()
    weight, table = made("gpt", 8)
    step = torch.compile(
        lambda tokens, first: lk.embedding(tokens, weight, position_weight=table, positions=first),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    for first in (0, 3, 4, 7):
        tokens = drawn(2, 1)
        assert torch.equal(step(tokens, first), weight[tokens] + table[first])


@pytest.mark.parametrize("kind", ["tokens", "gpt", "bert"])
def test_opcheck(kind):
    tokens, tensors = drawn(2, 5), [t.requires_grad_() for t in made(kind, 8)]
    weight, table, types, norm, bias = [*tensors, *[None] * (5 - len(tensors))]
    ids = None if types is None else tokens % 2
    given = tokens, weight, None, table, ids, types, norm, bias, torch.tensor(3), -1, 1, 1e-5, 0.3
    torch.library.opcheck(torch.ops.lspm.embedding.default, (*given, "cpu"))


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_second_derivative_is_an_error(kind):
    tensors = [t.requires_grad_() for t in made(kind, 8)]
    y = bound(lk.embedding, kind, drawn(2, 5))(*tensors)
    (gradient,) = torch.autograd.grad(y.pow(2).sum(), tensors[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="_backward: a second derivative is not implemented"):
        torch.autograd.grad(gradient.sum(), tensors[0])


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_func_transforms(kind):
    tokens, tensors, found = drawn(2, 5), made(kind, 8), []
    many = torch.randn(3, *tensors[0].shape)
    dims = (0, *[None] * (len(tensors) - 1))
    for f in both(kind, tokens):
        gradient = torch.func.grad(lambda *t, f=f: f(*t).pow(3).sum(), argnums=(0, len(tensors) - 1))
        found.append([gradient(*tensors), torch.vmap(f, dims)(many, *tensors[1:])])
        found[-1].append(torch.vmap(gradient, dims)(many, *tensors[1:]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


def test_export_checkpoint_fake_and_meta():
    tokens, tensors = drawn(2, 5), made("bert", 8)
    ours, theirs = both("bert", tokens)
    expected = ours(*tensors)

    class Module(torch.nn.Module):
        def forward(self, *t):
            return ours(*t)

    program = torch.export.export(Module(), tuple(tensors))
    assert "lspm.embedding" in str(program.graph)
    assert torch.equal(program.module()(*tensors), expected)
    oracle.check(lambda *t: checkpoint(ours, *t, use_reentrant=False), theirs, tensors)
    with FakeTensorMode() as mode:
        fake = bound(lk.embedding, "bert", mode.from_tensor(tokens))(*(mode.from_tensor(t) for t in tensors))
    assert fake.shape == expected.shape and fake.stride() == expected.stride()
    assert bound(lk.embedding, "bert", tokens.to("meta"))(*(t.to("meta") for t in tensors)).is_meta


def test_autocast_keeps_the_dtype_of_the_tables_as_torchs_embedding_does():
    tokens, tensors = drawn(2, 5), made("gpt", 8)
    ours, _ = both("gpt", tokens)
    with torch.autocast("cpu", BF16):
        y = ours(*tensors)
    assert y.dtype == torch.nn.functional.embedding(tokens, tensors[0]).dtype == torch.float32


def test_seeds_are_drawn_of_torchs_generator():
    tokens, weight = torch.zeros(40, dtype=torch.int64), torch.ones(1, 8)
    torch.manual_seed(3)
    first, second = (lk.embedding(tokens, weight, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(lk.embedding(tokens, weight, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_an_output_may_be_changed_in_place():
    tensors = [t.requires_grad_() for t in made("bert", 8)]
    ours, _ = both("bert", drawn(2, 5))
    expected = torch.autograd.grad((ours(*tensors) * 3).sin().sum(), tensors)
    y = ours(*tensors)
    y.mul_(3)
    assert all(map(torch.equal, torch.autograd.grad(y.sin().sum(), tensors), expected))
