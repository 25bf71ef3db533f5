"""bias_act, swiglu, mlp and gated_mlp as every part of torch meets them."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import bias_act, mlp, swiglu

BF16 = torch.bfloat16
# Ours, the reference, the shapes that follow x's, and the operator with its options; x is (..., 8).
OPS = {
    "bias_act": (lk.bias_act, bias_act.bias_act, [(8,)], "bias_act", (4,)),
    "swiglu": (lk.swiglu, swiglu.swiglu, [(-1, 8)], "swiglu", (3,)),
    "swiglu_packed": (lk.swiglu, swiglu.swiglu, [], "swiglu", (None, 3)),
    "mlp": (lk.mlp, mlp.mlp, [(12, 8), (12,), (5, 12), (5,)], "mlp", (4,)),
    "gated_mlp": (lk.gated_mlp, mlp.gated_mlp, [(12, 8), (12, 8), (5, 12)], "gated_mlp", (3,)),
}
EACH = pytest.mark.parametrize("op", OPS)


def tensors(op, shape=(6, 8)):
    def made(size):
        return torch.randn(shape if size == (-1, 8) else size)

    return [torch.randn(shape), *map(made, OPS[op][2])]


@EACH
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compile(op, mode):
    torch._dynamo.reset()
    ours, theirs = (lambda x, *others, f=f: f(x.sin(), *others) for f in OPS[op][:2])
    compiled = torch.compile(ours, fullgraph=True, backend=mode)
    for shape in ((6, 8),) if mode == "inductor" else ((6, 8), (9, 8), (3, 2, 8)):  # 9: sizes are symbols
        oracle.check(compiled, theirs, tensors(op, shape))
    with torch.no_grad():
        oracle.check(compiled, theirs, tensors(op), gradients=False)


@EACH
def test_opcheck(op):
    _, _, _, name, options = OPS[op]
    given = [t.requires_grad_() for t in tensors(op)]
    torch.library.opcheck(getattr(torch.ops.lspm, name).default, (*given, *options, "cpu"))


def test_opcheck_of_what_the_backward_calls():
    (x, bias), lspm = tensors("bias_act"), torch.ops.lspm
    for given in (
        (x, x, bias, 4, True, True, False),
        (x, x, bias, 5, False, False, True),
        (x, x, None, 1, False, True, False),
    ):
        torch.library.opcheck(lspm.bias_act_backward.default, (*given, "cpu"))
    half = x[:, :4]
    for given in ((x, x, x, 3, True, True), (x, x, x, 4, False, False), (half, x, None, 5, True, False)):
        torch.library.opcheck(lspm.swiglu_backward.default, (*given, "cpu"))


@EACH
def test_second_derivative_is_an_error(op):
    given = [t.requires_grad_() for t in tensors(op)]
    (gradient,) = torch.autograd.grad(OPS[op][0](*given).pow(2).sum(), given[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="_backward: a second derivative is not implemented"):
        torch.autograd.grad(gradient.sum(), given[0])


@EACH
def test_func_transforms(op):
    given, found = tensors(op), []
    many = torch.randn(3, 6, 8)
    dims = (0, *[None] * (len(given) - 1))
    for f in OPS[op][:2]:
        gradient = torch.func.grad(lambda *t, f=f: f(*t).pow(3).sum(), argnums=tuple({0, len(given) - 1}))
        found.append([gradient(*given), torch.vmap(f, dims)(many, *given[1:])])
        found[-1].append(torch.vmap(gradient, dims)(many, *given[1:]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


@EACH
def test_export_checkpoint_fake_and_meta(op):
    ours, theirs, _, name, _ = OPS[op]

    class Module(torch.nn.Module):
        def forward(self, *t):
            return ours(*t)

    given = tensors(op)
    program = torch.export.export(Module(), tuple(given))
    assert f"lspm.{name}" in str(program.graph)
    torch.testing.assert_close(program.module()(*given), ours(*given))
    oracle.check(lambda *t: checkpoint(ours, *t, use_reentrant=False), theirs, given)
    expected = ours(*given)
    with FakeTensorMode() as mode:
        fake = ours(*[mode.from_tensor(t) for t in given])
    assert fake.shape == expected.shape and fake.stride() == expected.stride()
    assert ours(*[t.to("meta") for t in given]).is_meta


@EACH
def test_an_output_may_be_changed_in_place(op):
    given = [t.requires_grad_() for t in tensors(op)]
    expected = torch.autograd.grad((OPS[op][0](*given) * 3).sin().sum(), given)
    y = OPS[op][0](*given)
    y.mul_(3)
    assert all(map(torch.equal, torch.autograd.grad(y.sin().sum(), given), expected))


@pytest.mark.parametrize("op", ["bias_act", "swiglu_packed"])
def test_autocast_computes_in_the_dtype_of_x_as_gelu_does(op):
    ours, (x, *others) = OPS[op][0], tensors(op)
    others = [t.requires_grad_() for t in others]
    linear = torch.nn.Linear(8, 8)
    for f in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", BF16):
            assert f(x, *others).dtype == F.gelu(x).dtype == torch.float32
            y = f(linear(x), *others)
            assert y.dtype == F.gelu(linear(x)).dtype == BF16
        y.float().sum().backward()
        assert all(t.grad.dtype == torch.float32 for t in (*others, linear.weight))


@pytest.mark.parametrize("op", ["mlp", "gated_mlp"])
def test_autocast_computes_products_in_its_dtype_as_linear_does(op):
    ours, theirs = OPS[op][:2]

    def under(f):
        def function(*t):
            with torch.autocast("cpu", BF16):
                return f(*t)

        return function

    given = tensors(op)
    exact = [t.to(BF16).float() for t in given]  # so that the truth is of what both are computed of
    assert under(ours)(*given).dtype == BF16
    for f in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        actual = oracle.outputs_and_gradients(under(f), exact)
        plain = oracle.outputs_and_gradients(under(theirs), exact)
        truth = oracle.outputs_and_gradients(theirs, [t.double() for t in exact])
        for name, value in actual.items():
            assert value.dtype == (BF16 if name.startswith("output") else torch.float32)
            oracle.compare(name, value.to(BF16), truth[name], plain[name].to(BF16))


@pytest.mark.parametrize("op, count", [(lk.mlp, 3), (lk.gated_mlp, 5)])
def test_the_backward_takes_the_memory_of_what_it_spends(op, count, most_allocated):
    rows, dim, hidden = 256, 8, 512
    x, wide = torch.randn(rows, dim), torch.randn(hidden, dim)
    given = [x, wide, None if count == 3 else wide.clone(), torch.randn(dim, hidden)]
    leaves = [t.requires_grad_() for t in given if t is not None]
    outer = (None,) if count == 3 else ()
    peak = most_allocated(lambda: torch.autograd.grad(op(*given, *outer).sum(), leaves))
    assert (count - 0.5) * 4 * rows * hidden < peak < (count + 0.5) * 4 * rows * hidden
