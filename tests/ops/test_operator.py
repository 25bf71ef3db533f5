"""Operator: what torch.compile, export, autocast, torch.func and fake tensors make of layer norm."""

import pytest
import torch
import torch.nn.functional as F
from ops.test_layer_norm import DTYPES, FORMS, tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import layer_norm as reference


@pytest.mark.every_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_compile(form, mode):
    torch._dynamo.reset()

    def around(f):
        return lambda x, r, w, b: f(x.sin(), r, w * 2, b)

    ours, theirs = map(around, FORMS[form])
    compiled_function = torch.compile(ours, fullgraph=True, backend=mode)
    for shape in ((6, 40), (9, 40), (3, 2, 40)):
        oracle.check(compiled_function, theirs, tensors(shape))
    with torch.no_grad():
        oracle.check(compiled_function, theirs, tensors(), gradients=False)


def test_compile_sees_the_forced_backend():
    torch._dynamo.reset()
    function = torch.compile(lambda *t: lk.add_layer_norm(*t)[0], fullgraph=True, backend="aot_eager")
    with lk.use_backend("reference"):
        expected = function(*tensors())
    torch.manual_seed(0)
    torch.testing.assert_close(function(*tensors()), expected)
    with lk.use_backend("cuda"), pytest.raises(Exception, match="cuda needs"):
        function(*tensors())


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_opcheck(dtype):
    x, residual, weight, bias = (t.requires_grad_() for t in tensors(dtype=dtype))
    lspm = torch.ops.lspm
    torch.library.opcheck(lspm.layer_norm.default, (x, weight, bias, 1e-5, True, "cpu"))
    torch.library.opcheck(lspm.layer_norm.default, (x, None, None, 1e-5, False, "cpu"))
    torch.library.opcheck(lspm.add_layer_norm.default, (x, residual, weight, bias, 1e-5, True, "cpu"))
    y, total, saved = (t.detach() for t in lspm.add_layer_norm(x, residual, weight, bias, 1e-5, True, "cpu"))
    weight, bias = weight.detach(), bias.detach()
    backward = lspm.layer_norm_backward.default
    torch.library.opcheck(backward, (y, None, total, saved, weight, bias, True, True, "cpu"))
    torch.library.opcheck(backward, (y, y, total, saved, weight, None, False, True, "cpu"))


@pytest.mark.every_backend
@pytest.mark.parametrize("form", FORMS)
def test_second_derivative_is_an_error(form, backend_of_test):
    x, residual, weight, bias = (t.requires_grad_() for t in tensors())
    outputs = FORMS[form][0](x, residual, weight, bias)
    y = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    for output in (y, torch.ops.lspm.layer_norm(x, weight, bias, 1e-5, True, backend_of_test)[0]):
        (gradient,) = torch.autograd.grad(output.pow(2).sum(), x, create_graph=True)
        with pytest.raises(
            NotImplementedError, match="layer_norm_backward: a second derivative is not implemented"
        ):
            torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("form", FORMS)
def test_a_tangent_is_not_lost_in_silence(form):
    x, *others = tensors()
    with forward_ad.dual_level():
        FORMS[form][0](x, *others)  # without a tangent it runs as ever
        with pytest.raises(NotImplementedError, match="jvp"):
            FORMS[form][0](forward_ad.make_dual(x, torch.ones_like(x)), *others)


def test_func_transforms():
    def loss(f):
        return lambda *t: f(*t)[0].pow(3).sum()

    x, residual, weight, bias = tensors()
    many = torch.randn(3, 6, 40)
    batched = (0, None, None, None)
    for transform, arguments in (
        (lambda f: torch.func.grad(loss(f), argnums=(0, 2)), (x, residual, weight, bias)),
        (lambda f: torch.vmap(f, in_dims=batched), (many, residual, weight, bias)),
        (lambda f: torch.vmap(torch.func.grad(loss(f)), in_dims=batched), (many, residual, weight, bias)),
    ):
        actual = transform(lk.add_layer_norm)(*arguments)
        torch.testing.assert_close(
            actual, transform(reference.add_layer_norm)(*arguments), rtol=1e-4, atol=1e-4
        )


def test_gradients_of_many_at_once():
    x, residual, weight, bias = (t.requires_grad_() for t in tensors())
    outputs, inputs = lk.add_layer_norm(x, residual, weight, bias), (x, residual, weight)
    many = [torch.randn(3, *y.shape) for y in outputs]
    each = [torch.autograd.grad(outputs, inputs, dys, retain_graph=True) for dys in zip(*many, strict=True)]
    found = torch.autograd.grad(outputs, inputs, many, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(found, tuple(map(torch.stack, zip(*each, strict=True))))
    found = torch.autograd.grad(outputs[0], inputs[2:], many[:1], is_grads_batched=True)
    assert found[0].shape == (3, *weight.shape)

    def function(x):
        return lk.layer_norm(x, weight, bias).mean(-1)

    found, expected = (torch.autograd.functional.jacobian(function, x, vectorize=v) for v in (True, False))
    torch.testing.assert_close(found, expected)


def test_autocast_computes_in_the_dtype_of_x():
    x, _, weight, bias = (t.requires_grad_() for t in tensors())
    linear = torch.nn.Linear(40, 40)
    for f in (lk.layer_norm, torch.compile(lk.layer_norm, fullgraph=True)):
        weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = f(linear(x), weight, bias)
            assert y.dtype == F.layer_norm(linear(x), (40,), weight, bias).dtype == torch.bfloat16
            assert f(x, weight, bias).dtype == torch.float32
            total = lk.add_layer_norm(linear(x), x, weight, bias)[1]
            assert total.dtype == (linear(x) + x).dtype == torch.float32
        y.float().sum().backward()
        assert weight.grad.dtype == torch.float32


def test_export_checkpoint_fake_and_meta():
    class Module(torch.nn.Module):
        def forward(self, *t):
            return lk.add_layer_norm(*t)

    arguments = tensors()
    program = torch.export.export(Module(), tuple(arguments))
    assert "lspm.add_layer_norm" in str(program.graph)
    torch.testing.assert_close(program.module()(*arguments), lk.add_layer_norm(*arguments))
    oracle.check(
        lambda *t: checkpoint(lk.add_layer_norm, *t, use_reentrant=False),
        *FORMS["add_layer_norm"][1:],
        arguments,
    )
    with FakeTensorMode() as mode:
        assert lk.add_layer_norm(*[mode.from_tensor(t) for t in arguments])[0].shape == (6, 40)
    assert lk.add_layer_norm(*[t.to("meta") for t in arguments])[0].is_meta


CALLS = {
    "conv2d": lambda x: lk.conv2d(x, torch.ones(8, 8, 3, 3)),
    "conv2d_batch_norm": lambda x: lk.conv2d_batch_norm(x, torch.ones(8, 8, 3, 3), training=True),
    "batch_norm_act": lambda x: lk.batch_norm_act(x, training=True),
    "max_pool2d": lambda x: lk.max_pool2d(x, 2),
    "global_avg_pool": lk.global_avg_pool,
    "layer_norm": lk.layer_norm,
    "rms_norm": lk.rms_norm,
    "rotary": lambda x: lk.rotary(x, torch.ones(6, 3), torch.ones(6, 3)),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_output_may_be_changed_in_place(name):
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    (expected,) = torch.autograd.grad((CALLS[name](x) * 3).sin().sum(), x)
    y = CALLS[name](x)
    y.mul_(3)
    assert torch.equal(torch.autograd.grad(y.sin().sum(), x)[0], expected)


def test_attentions_output_may_be_changed_in_place_where_no_backward_reads_it():
    q = torch.randn(2, 3, 5, 8)
    assert torch.equal(lk.attention(q, q, q).mul_(3), lk.attention(q, q, q) * 3)
    y = lk.attention(q.requires_grad_(), q, q)
    y.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def opposite(x):
    """x, in memory that has its negative, which is_neg() tells alone; as the imag of a conj() may be."""
    return torch._neg_view(-x)


def test_memory_of_the_opposite_numbers():
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(5, 5)
    assert torch.equal(lk.layer_norm(opposite(x), opposite(weight)), lk.layer_norm(x, weight))
    q = torch.randn(1, 2, 5, 8)
    turned = torch.complex(bias, -bias).conj().imag
    assert turned.is_neg()
    assert torch.equal(lk.attention(q, q, q, bias=turned), lk.attention(q, q, q, bias=bias))
    leaves, dout = [x.clone().requires_grad_() for _ in range(2)], torch.randn(3, 8)
    lk.layer_norm(torch._neg_view(leaves[0])).backward(opposite(dout))
    lk.layer_norm(-leaves[1]).backward(dout)
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    caches = [q.clone(), opposite(q)]
    new = torch.ones(1, 2, 1, 8)
    outs = [lk.attention_with_kv_cache(new, c, c.clone(), new, new, cache_seqlens=3) for c in caches]
    assert torch.equal(*outs) and torch.equal(*caches) and caches[0][0, 0, 3, 0] == 1
    parameters = [torch.ones(8, requires_grad=True) for _ in range(2)]
    for p, grad in zip(parameters, (weight, opposite(weight)), strict=True):
        p.grad = grad
        lk.AdamW([p]).step()
    assert torch.equal(*parameters) and not torch.equal(parameters[0], torch.ones(8))


def test_vmap_over_no_sample():
    x = torch.ones(0, 3, 8)
    assert torch.vmap(lk.layer_norm)(x).shape == (0, 3, 8)
    y, total = torch.vmap(lk.add_layer_norm, (0, 1))(x, torch.ones(3, 0, 8))
    assert y.shape == total.shape == (0, 3, 8)
    gradient = torch.vmap(torch.func.grad(lambda t: lk.layer_norm(t).sum()))(x)
    assert gradient.shape == (0, 3, 8)


def test_an_eps_that_wants_a_gradient_is_refused():
    x, eps = torch.ones(3, 8), torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError) as error:
        lk.rms_norm(x, eps=eps)
    assert str(error.value) == "rms_norm: eps must be without a gradient, got requires_grad=True"
    with torch.no_grad():
        assert torch.equal(lk.rms_norm(x, eps=eps), lk.rms_norm(x, eps=0.5))


@pytest.mark.parametrize("name", ["layer_norm", "attention", "attention_with_kv_cache"])
def test_a_trace_holds_what_kernels_do(name):
    """torch.jit.trace sees calls of the dispatcher alone, and repeats no other."""
    call = {
        "attention": lambda x: lk.attention(x, x, x, causal=True),
        "layer_norm": lk.layer_norm,
        "attention_with_kv_cache": lambda x: lk.attention_with_kv_cache(
            x, torch.ones(1, 2, 9, 8), torch.ones(1, 2, 9, 8), x, x, cache_seqlens=2, causal=True
        ),
    }[name]
    with torch.no_grad():
        traced = torch.jit.trace(call, torch.randn(1, 2, 5, 8), check_trace=False)
        x = torch.randn(1, 2, 5, 8)
        torch.testing.assert_close(traced(x), call(x))
    if name != "attention_with_kv_cache":
        x.requires_grad_()
        gradients = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (traced, call)]
        torch.testing.assert_close(*gradients)
