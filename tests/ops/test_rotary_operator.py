"""rotary as every part of torch meets it: what compiles, exports, transforms and differentiates."""

import pytest
import torch
from ops.test_rotary import BF16, F32, STYLES, bound, tables
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import rotary as reference


def around(f, cos_sin, **options):
    """f amid other operations, of x and offsets."""

    def function(x, offsets):
        wide = [t.to(x.dtype) for t in cos_sin]
        return f(x.sin(), *wide, offsets=offsets, **options)

    return function


OFFSETS = {
    "none": lambda B: [None],
    "numbers": lambda B: [3, 4, 5],
    "a tensor": lambda B: [torch.arange(B) * 9],
}


@STYLES
@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("kind", OFFSETS)
def test_compile(kind, mode, interleaved):
    torch._dynamo.reset()
    given = tables(40, 16)
    theirs = around(reference.rotary, given, interleaved=interleaved)
    ours = torch.compile(around(lk.rotary, given, interleaved=interleaved), fullgraph=True, backend=mode)
    for shape in ((2, 3, 5, 16), (2, 3, 6, 16), (3, 2, 7, 24)):
        for offsets in OFFSETS[kind](shape[0]):
            forms = [lambda x, f=f, o=offsets: f(x, o) for f in (ours, theirs)]
            oracle.check(*forms, [torch.randn(shape)])
    if kind == "a tensor":
        with pytest.raises(ValueError, match="rotary: offsets must lie in 0 to S - T = 35, got 36"):
            ours(torch.randn(2, 3, 5, 16), torch.tensor([0, 36]))


@STYLES
def test_opcheck(interleaved):
    x, offsets = torch.randn(2, 3, 5, 16, requires_grad=True), torch.tensor([2, 4])
    for starts, start in ((None, 3), (offsets, 0)):
        given = (*tables(9, 12), starts, start, interleaved, "cpu")
        torch.library.opcheck(torch.ops.lspm.rotary.default, (x, *given))
        torch.library.opcheck(torch.ops.lspm.rotary_backward.default, (x.detach(), *given))


def test_second_derivative_is_an_error():
    x, given = torch.randn(2, 3, 5, 16, requires_grad=True), tables(5, 16)
    for out in (lk.rotary(x, *given), torch.ops.lspm.rotary(x, *given, None, 0, False, "cpu")):
        (gradient,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
        with pytest.raises(
            NotImplementedError, match="rotary_backward: a second derivative is not implemented"
        ):
            torch.autograd.grad(gradient.sum(), x)


def test_func_transforms():
    cos_sin, offsets = tables(9, 12), torch.tensor([4, 1])
    for function in (lk.rotary, reference.rotary):
        one = bound(function, cos_sin, offsets=offsets)
        x = torch.randn(3, 2, 4, 5, 16, generator=torch.Generator().manual_seed(1))
        many = torch.tensor([[0, 1], [2, 3], [4, 0]])
        found = [
            torch.func.grad(lambda x, f=one: f(x).pow(3).sum())(x[0]),
            torch.vmap(one)(x),
            torch.vmap(torch.func.grad(lambda x, f=one: f(x).pow(3).sum()))(x),
            torch.vmap(lambda x, o, f=function: f(x, *cos_sin, offsets=o))(x, many),
        ]
        if function is lk.rotary:
            actual = found
    for ours, theirs in zip(actual, found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_export_checkpoint_fake_and_meta():
    class Module(torch.nn.Module):
        def forward(self, *t, offsets=None):
            return lk.rotary(*t, offsets=offsets)

    given = (torch.randn(2, 3, 5, 16), *tables(9, 12))
    for offsets in (None, 4, torch.tensor([4, 0])):
        program = torch.export.export(Module(), given, {"offsets": offsets})
        assert "lspm.rotary" in str(program.graph)
        expected = lk.rotary(*given, offsets=offsets)
        torch.testing.assert_close(program.module()(*given, offsets=offsets), expected)
    saved = bound(lambda *t: checkpoint(lk.rotary, *t, use_reentrant=False), given[1:])
    oracle.check(saved, bound(reference.rotary, given[1:]), given[:1])
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (*given, torch.tensor([4, 0]))]
        assert lk.rotary(*fake[:3], offsets=fake[3]).stride() == (240, 16, 48, 1)
    assert lk.rotary(*[t.to("meta") for t in given]).is_meta


def test_autocast_computes_in_the_dtype_of_x():
    x, cos_sin = torch.randn(2, 3, 5, 16), tables(5, 16)
    with torch.autocast("cpu", BF16):
        assert lk.rotary(x, *cos_sin).dtype == F32
        assert lk.rotary(x.bfloat16(), *cos_sin).dtype == BF16
