"""conv2d as every part of torch meets it: what compiles, exports, transforms and differentiates."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import conv2d as reference


def tensors(N=2):
    return [torch.randn(N, 8, 7, 6), torch.randn(16, 8, 3, 3) / 8, torch.randn(16), torch.randn(N, 16, 7, 6)]


def around(f, **options):
    """f amid other operations."""
    return lambda x, w, b, r: f(x.sin(), w * 2, b, 1, 1, residual=r, **options)


@pytest.mark.parametrize(
    ("mode", "activation", "scaled"),
    [("aot_eager", None, False), ("aot_eager", "silu", True), ("inductor", "relu", False)],
)
def test_compile(mode, activation, scaled):
    torch._dynamo.reset()
    options = {"activation": activation, "scale": torch.rand(16) + 0.5 if scaled else None}
    ours = torch.compile(around(lk.conv2d, **options), fullgraph=True, backend=mode)
    for N in (2, 3):
        oracle.check(ours, around(reference.conv2d, **options), tensors(N))
    with torch.no_grad():
        oracle.check(ours, around(reference.conv2d, **options), tensors(), gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, weight, bias, residual = (t.to(dtype).requires_grad_() for t in tensors())
    geometry = [1, 1, 1, 1, 1, 1, 1]
    bias = bias.detach().float().requires_grad_()
    op = torch.ops.lspm.conv2d.default
    torch.library.opcheck(op, (x, weight, None, bias, residual, [7, 6], geometry, 1, False, "cpu"))
    torch.library.opcheck(op, (x, weight, None, None, None, [7, 6], geometry, 0, True, "cpu"))
    backward = torch.ops.lspm.conv2d_backward.default
    dz, x, weight = residual.detach(), x.detach(), weight.detach()
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward, (dz, x, weight, geometry, *wanted, "cpu"))


def test_only_the_gradients_that_are_wanted():
    x, weight, bias, _ = tensors()
    for wanted in (x, weight, bias):
        wanted.requires_grad_()
        (gradient,) = torch.autograd.grad(lk.conv2d(x, weight, bias).pow(2).sum(), wanted)
        (expected,) = torch.autograd.grad(F.conv2d(x, weight, bias).pow(2).sum(), wanted)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
        wanted.requires_grad_(False)


def test_second_derivative_is_an_error():
    x, weight, bias, _ = (t.requires_grad_() for t in tensors())
    direct = torch.ops.lspm.conv2d(
        x, weight, None, bias, None, [5, 4], [1, 1, 0, 0, 1, 1, 1], 0, False, "cpu"
    )[0]
    for y in (lk.conv2d(x, weight, bias), direct):
        (gradient,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="conv2d_backward: a second derivative is not implem"):
            torch.autograd.grad(gradient.sum(), x)


def test_func_transforms():
    def loss(f):
        return lambda *t: f(*t).pow(3).sum()

    x, weight, bias, _ = tensors()
    many = torch.randn(3, 2, 8, 7, 6)
    batched = (0, None, None)
    for transform, arguments in (
        (lambda f: torch.func.grad(loss(f), argnums=(0, 1, 2)), (x, weight, bias)),
        (lambda f: torch.vmap(f, in_dims=batched), (many, weight, bias)),
        (lambda f: torch.vmap(torch.func.grad(loss(f)), in_dims=batched), (many, weight, bias)),
    ):
        actual, expected = transform(lk.conv2d)(*arguments), transform(F.conv2d)(*arguments)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_autocast_computes_in_its_dtype():
    x, weight, bias, residual = (t.requires_grad_() for t in tensors())
    for f in (lk.conv2d, torch.compile(lk.conv2d, fullgraph=True)):
        weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = f(x, weight, bias, 1, 1, residual=residual)
            assert y.dtype == F.conv2d(x, weight, bias).dtype == torch.bfloat16
        y.float().sum().backward()
        assert weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::lspm_kernels.dispatch.FallbackWarning")
def test_autocast_leaves_float64_and_weights_that_are_no_floats_alone():
    x, weight = (t.detach().double() for t in tensors()[:2])
    with torch.autocast("cpu", torch.bfloat16):
        for f in (lk.conv2d, partial(lk.conv2d_batch_norm, training=True)):
            assert f(x, weight).dtype == F.conv2d(x, weight).dtype == torch.float64
            with pytest.raises(ValueError, match=r"weight must have x's dtype .*, got torch\.int64"):
                f(x.float(), weight.long())


def test_export_checkpoint_fake_and_meta():
    class Module(torch.nn.Module):
        def forward(self, *t):
            return lk.conv2d(*t)

    arguments = tensors()[:3]
    program = torch.export.export(Module(), tuple(arguments))
    assert "lspm.conv2d" in str(program.graph)
    torch.testing.assert_close(program.module()(*arguments), lk.conv2d(*arguments))
    oracle.check(lambda *t: checkpoint(lk.conv2d, *t, use_reentrant=False), F.conv2d, arguments)
    with FakeTensorMode() as mode:
        assert lk.conv2d(*[mode.from_tensor(t) for t in arguments]).shape == (2, 16, 5, 4)
    assert lk.conv2d(*[t.to("meta") for t in arguments]).is_meta
