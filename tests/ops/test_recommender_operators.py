"""mf and top_k_scores as every part of torch meets them."""

import pytest
import torch
from ops.test_mf import bound, pairs, tables
from ops.test_top_k_scores import exclusions, identical
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import mf as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPE = (6, 9, 20, 50)
IDS = [torch.randint(n, (50,), generator=torch.Generator().manual_seed(0)) for n in SHAPE[:2]]
OURS, THEIRS = (bound(op, *IDS, mean=1.5) for op in (lk.mf, reference.mf))


@pytest.mark.parametrize("mode", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compile_mf(mode):
    torch._dynamo.reset()

    def step(u, i, users, items):
        return lk.mf(u.sin(), i, users, items, mean=0.5)

    compiled = torch.compile(step, fullgraph=True, backend=mode)
    for n in (50,) if mode == "inductor" else (50, 60):  # 60: with sizes that are symbols
        ids = pairs((*SHAPE[:3], n))
        oracle.check(
            lambda u, i, ids=ids: compiled(u, i, *ids),
            lambda u, i, ids=ids: reference.mf(u.sin(), i, *ids, mean=0.5),
            tables(SHAPE, F32)[:2],
        )


def test_compile_top_k_scores():
    torch._dynamo.reset()
    compiled = torch.compile(lk.top_k_scores, fullgraph=True, backend="aot_eager")
    for B in (4, 5, 6):
        q, i, lists = torch.randn(B, 8), torch.randn(30, 8), exclusions(B, 30, 9)
        options = {"exclude_indptr": lists[0], "exclude_indices": lists[1]}
        identical(compiled(q, i, 3, **options), lk.top_k_scores(q, i, 3, **options))


def test_opcheck():
    ops = torch.ops.lspm
    u, i, a, b = (t.requires_grad_() for t in tables(SHAPE, F32))
    torch.library.opcheck(ops.mf.default, (u, i, a, b, *IDS, 0.5, "cpu"))
    torch.library.opcheck(ops.mf.default, (u, i, None, None, *IDS, 0.5, "cpu"))
    given = torch.randn(50), u.detach(), i.detach(), *IDS
    for wanted in ((True,) * 4, (True, False, False, True)):
        torch.library.opcheck(ops.mf_backward.default, (*given, *wanted, "cpu"))
    q, lists = torch.randn(4, 20), exclusions(4, 9, 5)
    for bias, indptr, indices in ((None, None, None), (b.detach(), *lists)):
        torch.library.opcheck(ops.top_k_scores.default, (q, i.detach(), bias, indptr, indices, 3, "cpu"))


def test_second_derivative_is_an_error():
    u, i, *_ = (t.requires_grad_() for t in tables(SHAPE, F32))
    (gradient,) = torch.autograd.grad(lk.mf(u, i, *IDS).pow(2).sum(), u, create_graph=True)
    with pytest.raises(NotImplementedError, match="mf_backward: a second derivative is not implemented"):
        torch.autograd.grad(gradient.sum(), i)


def test_func_transforms():
    u, i, *_ = tables(SHAPE, F32)
    many = torch.randn(3, *u.shape)
    found = []
    for op in (OURS, THEIRS):
        gradient = torch.func.grad(lambda u, op=op: op(u, i).pow(2).sum())
        found.append([gradient(u), torch.vmap(lambda u, op=op: op(u, i))(many), torch.vmap(gradient)(many)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    q = torch.randn(3, 4, 20)
    mapped = torch.vmap(lambda q: lk.top_k_scores(q, i, 2))(q)
    identical([t.flatten(0, 1) for t in mapped], lk.top_k_scores(q.flatten(0, 1), i, 2))


def test_export_checkpoint_fake_and_meta():
    class Module(torch.nn.Module):
        def forward(self, u, i):
            return OURS(u, i), lk.top_k_scores(u, i, 2)

    u, i, *_ = tables(SHAPE, F32)
    program = torch.export.export(Module(), (u, i))
    assert "lspm.mf" in str(program.graph) and "lspm.top_k_scores" in str(program.graph)
    ratings, best = program.module()(u, i)
    assert torch.equal(ratings, OURS(u, i))
    identical(best, lk.top_k_scores(u, i, 2))
    oracle.check(lambda *t: checkpoint(OURS, *t, use_reentrant=False), THEIRS, [u, i])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (u, i)]
        assert OURS(*fake).shape == ratings.shape
        assert [t.shape for t in lk.top_k_scores(*fake, 2)] == [t.shape for t in best]
    assert all(t.is_meta for t in lk.top_k_scores(u.to("meta"), i.to("meta"), 2))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_autocast_leaves_the_dtype_as_it_is(dtype):
    u, i, *_ = tables(SHAPE, dtype)
    expected = OURS(u, i), lk.top_k_scores(u, i, 3)
    with torch.autocast("cpu", BF16):
        assert torch.equal(OURS(u, i), expected[0])
        identical(lk.top_k_scores(u, i, 3), expected[1])
