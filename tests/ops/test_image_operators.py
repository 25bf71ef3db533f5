"""max_pool2d, global_avg_pool and cross_entropy as every part of torch meets them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import cross_entropy, global_avg_pool, max_pool2d

BF16 = torch.bfloat16
CLASSES = torch.arange(35).reshape(5, 7) % 3
# Ours and the reference as functions of images (N, 3, 5, 7).
OPS = {
    "max_pool2d": [lambda x, f=f: f(x, 3, 2, 1) for f in (lk.max_pool2d, max_pool2d.max_pool2d)],
    "global_avg_pool": [lk.global_avg_pool, global_avg_pool.global_avg_pool],
    "cross_entropy": [
        lambda x, f=f: f(x, CLASSES.expand(x.shape[0], 5, 7), label_smoothing=0.1)
        for f in (lk.cross_entropy, cross_entropy.cross_entropy)
    ],
}
WINDOW = [3, 3, 2, 2, 1, 1, 1, 1]
EACH = pytest.mark.parametrize("op", OPS)


def images(n=2, **options):
    return torch.randn(n, 3, 5, 7, **options)


@EACH
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compile(op, mode):
    torch._dynamo.reset()
    ours, theirs = OPS[op]
    compiled = torch.compile(lambda x: ours(x.sin()), fullgraph=True, backend=mode)
    for n in (2,) if mode == "inductor" else (2, 3):  # 3: with sizes that are symbols
        oracle.check(compiled, lambda x: theirs(x.sin()), [images(n)])


def test_compile_with_indices_and_probabilities():
    torch._dynamo.reset()
    pool = torch.compile(lambda x: lk.max_pool2d(x, 2, return_indices=True), fullgraph=True, backend="eager")
    x = images()
    assert all(map(torch.equal, pool(x), max_pool2d.max_pool2d(x, 2, return_indices=True)))
    loss = torch.compile(lk.cross_entropy, fullgraph=True, backend="eager")
    x, q = torch.randn(4, 5), torch.rand(4, 5)
    torch.testing.assert_close(loss(x, q), cross_entropy.cross_entropy(x, q))


def test_opcheck():
    ops, x = torch.ops.lspm, images(requires_grad=True)
    size = lk.max_pool2d(x, WINDOW[:2], WINDOW[2:4], WINDOW[4:6], WINDOW[6:]).shape[2:]
    for positioned in (False, True):
        torch.library.opcheck(ops.max_pool2d.default, (x, size, WINDOW, positioned, "cpu"))
    y, positions = ops.max_pool2d(x.detach(), size, WINDOW, True, "cpu")
    torch.library.opcheck(ops.max_pool2d_backward.default, (y, positions, [5, 7], WINDOW, "cpu"))
    torch.library.opcheck(ops.global_avg_pool.default, (x, "cpu"))
    torch.library.opcheck(ops.global_avg_pool_backward.default, (torch.randn(2, 3, 1, 1), 5, 7, "cpu"))
    logits, weight = torch.randn(4, 3, requires_grad=True), torch.rand(3)
    for target in (torch.tensor([0, 2, -100, 1]), torch.rand(4, 3)):
        for reduction in (0, 1):
            given = (logits, target, weight, -100, reduction, 0.1, "cpu")
            torch.library.opcheck(ops.cross_entropy.default, given)
        loss, statistics = ops.cross_entropy(logits.detach(), *given[1:])
        given = (loss, logits.detach(), target, weight, statistics, *given[3:])
        torch.library.opcheck(ops.cross_entropy_backward.default, given)


@EACH
def test_second_derivative_is_an_error(op):
    x = images(requires_grad=True)
    (gradient,) = torch.autograd.grad(OPS[op][0](x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op}_backward: a second derivative is not implemented"):
        torch.autograd.grad(gradient.sum(), x)


@EACH
def test_func_transforms(op):
    found = []
    for function in OPS[op]:
        x = torch.randn(4, 2, 3, 5, 7, generator=torch.Generator().manual_seed(1))
        gradient = torch.func.grad(lambda x, f=function: f(x).pow(3).sum())
        found.append([gradient(x[0]), torch.vmap(function)(x), torch.vmap(gradient)(x)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@EACH
def test_export_checkpoint_fake_and_meta(op):
    ours, theirs = OPS[op]

    class Module(torch.nn.Module):
        def forward(self, x):
            return ours(x)

    x = images()
    program = torch.export.export(Module(), (x,))
    assert f"lspm.{op}" in str(program.graph)
    torch.testing.assert_close(program.module()(x), ours(x))
    oracle.check(lambda x: checkpoint(ours, x, use_reentrant=False), theirs, [x])
    expected = ours(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = ours(mode.from_tensor(x))
    assert fake.shape == expected.shape and fake.stride() == expected.stride()
    if op != "cross_entropy":  # its target lies on the CPU
        assert ours(x.to("meta")).is_meta


def test_autocast():
    with torch.autocast("cpu", BF16):
        for op, (ours, _) in OPS.items():
            for dtype in (torch.float32, BF16):
                expected = torch.float32 if op == "cross_entropy" else dtype
                assert ours(images().to(dtype)).dtype == expected
        loss = lk.cross_entropy(torch.randn(4, 3).bfloat16(), torch.rand(4, 3).bfloat16())
        assert loss.dtype == torch.float32
