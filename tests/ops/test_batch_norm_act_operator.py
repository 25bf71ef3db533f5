"""batch_norm_act as every part of torch meets it: what compiles, exports, transforms and differentiates."""

import pytest
import torch
from ops.test_batch_norm_act import function, tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lspm_kernels as lk
import oracle
from lspm_kernels.reference import batch_norm_act as reference

LSPM = torch.ops.lspm


@pytest.mark.parametrize("mode", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compile(training, mode):
    torch._dynamo.reset()

    def around(f):
        def call(x, r, w, b, mean, variance):
            options = {"residual": r, "activation": "relu", "training": training}
            return f(x.sin(), w * 2, b, mean, variance, **options).cos()

        return call

    ours, theirs = map(around, (lk.batch_norm_act, reference.batch_norm_act))
    ours = torch.compile(ours, fullgraph=True, backend=mode)
    for shape in ((3, 40, 5, 5), (5, 40, 5, 4)):
        running = torch.rand(2, 2, 40)
        forms = [
            lambda *t, f=f, r=r: f(*t, *r.to(t[0].dtype).unbind())
            for f, r in zip((ours, theirs), running.clone().fill_(0.5), strict=True)
        ]
        oracle.check(*forms, tensors(shape))
        given = tensors(shape)
        for f, r in zip((ours, theirs), running[:1].expand(2, 2, 40).clone().unbind(), strict=True):
            means = [t.clone() for t in r]
            with torch.no_grad():
                f(*given, *means)
            if f is ours:
                first = means
        torch.testing.assert_close(first, means)  # updated in place by the compiled function too


@pytest.mark.parametrize("activation", range(5))
def test_opcheck(activation):
    x, residual, weight, bias = (t.requires_grad_() for t in tensors((3, 8, 4, 4)))
    mean, variance = LSPM.batch_norm_act_statistics(x.detach(), "cpu").unbind()
    mean, variance = mean.clone(), variance.clone()
    given = (weight, bias, mean, variance)
    for beside in (residual, None):
        for training in (True, False):
            options = (None, 1e-5, activation, training, "", "cpu")
            torch.library.opcheck(LSPM.batch_norm_act.default, (x, beside, *given, *options))
    torch.library.opcheck(LSPM.batch_norm_act_statistics.default, (x.detach(), "cpu"))
    x, residual, *given = (t.detach() for t in (x, residual, *given))
    for wants in (True, False):
        arguments = (x, x, residual, *given, 1e-5, activation, wants, "cpu")
        torch.library.opcheck(LSPM.batch_norm_act_sums.default, arguments)
    for sums in (torch.randn(2, 8), None):
        arguments = (x, x, residual, *given, sums, 1e-5, activation, "cpu")
        torch.library.opcheck(LSPM.batch_norm_act_backward.default, arguments)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_second_derivative_is_an_error(training):
    inputs = [t.requires_grad_() for t in tensors((3, 8, 4, 4))]
    for activation in (None, "silu"):
        y = function(lk.batch_norm_act, training, activation)(*inputs)
        (gradient,) = torch.autograd.grad(y.pow(2).sum(), inputs[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"batch_norm_act_\w+: a second derivative is not"):
            torch.autograd.grad(gradient.sum(), inputs[0])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_func_transforms(training):
    x, residual, weight, bias = tensors((3, 8, 4, 4))
    many = torch.randn(2, 3, 8, 4, 4)
    found = []
    for f in (lk.batch_norm_act, reference.batch_norm_act):
        call = function(f, training, "relu", running=not training)
        loss = lambda *t, call=call: call(*t).pow(3).sum()  # noqa: E731
        batched = (0, None, None, None)
        found.append([
            *torch.func.grad(loss, argnums=(0, 1, 2, 3))(x, residual, weight, bias),
            torch.vmap(call, in_dims=batched)(many, residual, weight, bias),
            torch.vmap(torch.func.grad(loss), in_dims=batched)(many, residual, weight, bias),
        ])  # fmt: skip
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_export_checkpoint_fake_and_meta():
    class Module(torch.nn.BatchNorm2d):
        def forward(self, x, residual):
            running = self.running_mean, self.running_var
            options = {"residual": residual, "activation": "relu", "training": self.training}
            return lk.batch_norm_act(x, self.weight, self.bias, *running, **options)

    x, residual, weight, bias = tensors((3, 40, 5, 5))
    program = torch.export.export(Module(40).eval(), (x, residual))
    assert "lspm.batch_norm_act" in str(program.graph)
    torch.testing.assert_close(program.module()(x, residual), Module(40).eval()(x, residual))
    ours, theirs = (function(f, activation="relu") for f in (lk.batch_norm_act, reference.batch_norm_act))
    saved = lambda *t: checkpoint(ours, *t, use_reentrant=False)  # noqa: E731
    oracle.check(saved, theirs, [x, residual, weight, bias])
    for training in (True, False):
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(t) for t in (x, weight, bias, weight, bias)]
            y = lk.batch_norm_act(*fake, training=training)
            assert y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last)
        meta = [t.to("meta") for t in (x, weight, bias, weight, bias)]
        assert lk.batch_norm_act(*meta, training=training).is_meta


def test_autocast_computes_in_the_dtype_of_x():
    x, _, weight, bias = tensors((3, 40, 5, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert lk.batch_norm_act(x, weight, bias, training=True).dtype == torch.float32
        assert lk.batch_norm_act(x.bfloat16(), weight, bias, training=True).dtype == torch.bfloat16
