"""linear_cross_entropy as every part of torch meets it, what it refuses, and the memory it takes."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from ops.test_linear_cross_entropy import KINDS, made, ours, plain
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels import linear_cross_entropy_blocks as blocks
from lspm_kernels.ops import linear_cross_entropy as ops

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NOTHING = [False, False, False]
# Gradients made in the forward, and in the backward.
ONCE, AGAIN = {"reduction": "mean"}, {"reduction": "none", "return_lse": True}
EACH = pytest.mark.parametrize("options", [ONCE, AGAIN], ids=["once", "again"])


def example(options, rows=18):
    """[hidden, weight, bias], and our function of them and the plain one."""
    tensors, given = made((rows, 16, 50), "smoothed")
    return tensors, *(partial(form, **given, **options) for form in (ours, plain))


def one_number(function):
    def of(*tensors):
        found = function(*tensors)
        return sum((y * y).sum() for y in (found if isinstance(found, tuple) else (found,)))

    return of


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    "kind", [kind for kind, (_, options) in KINDS.items() if "return_lse" not in options]
)
def test_kept_logits_give_the_bits_of_those_that_are_made_again(kind, dtype, monkeypatch):
    torch.compiler.reset()  # each kind is another graph of the same function
    monkeypatch.setattr(blocks, "_WHOLE", 0)  # blocks of 16 classes
    tensors, options = made((70, 16, 75), kind, BF16, dtype)
    found = []
    for most, function in (
        (blocks._KEPT, ours),
        (blocks._KEPT, torch.compile(ours, fullgraph=True)),
        (0, ours),
    ):
        monkeypatch.setattr(blocks, "_KEPT", most)
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        (function(*leaves, **options) * 4).backward()
        found.append([t.grad for t in leaves if t is not None])
    for of_one in zip(*found, strict=True):
        assert all(torch.equal(gradient, of_one[0]) for gradient in of_one)


@EACH
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compile(options, mode):
    torch._dynamo.reset()
    tensors, our, theirs = example(options)
    whole = torch.compile(lambda h, w, b: our(h.sin(), w, b), fullgraph=True, backend=mode)
    oracle.check(whole, lambda h, w, b: theirs(h.sin(), w, b), tensors)


def test_opcheck():
    op, (hidden, weight, bias), options = torch.ops.lspm, *made((18, 16, 50), "weighted")
    bias, target, class_weight = torch.randn(50), options["target"], options["class_weight"]
    for now in (NOTHING, [True, True, True], [True, False, True]):
        leaves = [
            t.clone().requires_grad_(n or not any(now))
            for t, n in zip((hidden, weight, bias), now, strict=True)
        ]
        given = (*leaves, target, class_weight, -100, 1, 0.1, 0.01, 3.0, now, "cpu")
        torch.library.opcheck(op.linear_cross_entropy.default, given)
    leaves = [hidden, weight, bias]
    loss, lse, statistics, *_ = op.linear_cross_entropy(*leaves, *given[3:-2], NOTHING, "cpu")
    given = (loss, lse, *leaves, target, class_weight, statistics, *given[5:-2], [True, False, True], "cpu")
    torch.library.opcheck(op.linear_cross_entropy_backward.default, given)
    given = (loss, *leaves, *(torch.randn_like(t) for t in leaves), "cpu")
    torch.library.opcheck(op.linear_cross_entropy_scaled.default, given)


@pytest.mark.parametrize("options, name", [(ONCE, "scaled"), (AGAIN, "backward")])
def test_second_derivative_is_an_error(options, name):
    tensors, our, _ = example(options)
    leaves = [t.requires_grad_() for t in tensors]
    for function in (one_number(our), lambda *t: one_number(our)(*t).log()):
        for gradient in torch.autograd.grad(function(*leaves), leaves, create_graph=True):
            with pytest.raises(NotImplementedError, match=f"{name}: a second derivative is not implemented"):
                torch.autograd.grad(gradient.sum(), leaves[0], retain_graph=True)


def _summed(function):
    return lambda *given: function(*given).sum()


@EACH
def test_func_transforms(options):
    tensors, *forms = example(options)
    samples = torch.randn(3, *tensors[0].shape)
    found = []
    for function in map(one_number, forms):
        gradient = partial(torch.func.grad, argnums=(0, 1, 2))
        each = partial(torch.vmap, in_dims=(0, None, None))
        found.append([*gradient(function)(*tensors), *each(gradient(function))(samples, *tensors[1:])])
        found[-1] += gradient(_summed(each(function)))(samples, *tensors[1:])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)  # of sums of squares of hundreds


@EACH
def test_export_checkpoint_fake_and_meta(options):
    tensors, our, theirs = example(options)

    class Module(torch.nn.Module):
        def forward(self, *given):
            return our(*given)

    program = torch.export.export(Module(), tuple(tensors))
    assert "lspm.linear_cross_entropy" in str(program.graph)
    torch.testing.assert_close(program.module()(*tensors), our(*tensors))
    oracle.check(lambda *t: checkpoint(our, *t, use_reentrant=False), theirs, tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = our(*map(mode.from_tensor, tensors))
    expected = our(*tensors)
    for fake, real in zip(*(y if isinstance(y, tuple) else (y,) for y in (fakes, expected)), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    target = torch.zeros(18, dtype=torch.int64, device="meta")
    assert lk.linear_cross_entropy(*(t.to("meta") for t in tensors[:2]), target).is_meta


@EACH
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, BF16)])
def test_autocast_is_as_accurate_as_plain_pytorch_under_it(options, dtypes):
    tensors, given = made((40, 16, 70), "bias", dtypes[0], dtypes[1])
    given |= options

    def autocast(function):
        def of(hidden, *others):
            with torch.autocast("cpu", BF16, enabled=hidden.dtype != torch.float64):
                found = function(hidden, *others, **given)
            loss, *lse = found if isinstance(found, tuple) else (found,)
            assert loss.dtype == (torch.float64 if hidden.dtype == torch.float64 else F32)
            return loss if loss.dim() or loss.dtype == torch.float64 else loss.to(BF16), *lse

        return of

    oracle.check(autocast(ours), autocast(plain), tensors)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("wrong", [10, 17, -1, -99, 2**40])
def test_a_class_that_is_none(wrong, backend):
    target = torch.randint(10, (300,))
    target[[110, 299]] = torch.tensor([wrong, 11])  # of several the first is named
    with pytest.raises(ValueError) as error:
        lk.linear_cross_entropy(torch.randn(300, 4), torch.randn(10, 4), target, backend=backend)
    assert str(error.value) == f"linear_cross_entropy: target must be from 0 to 9 or -100, got {wrong}"


H, W, T = torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4, dtype=torch.int64)
BAD = {
    "hidden must be a floating-point tensor (..., D), got list": ([1.0], W, T),
    "hidden must be a floating-point tensor (..., D), got (4, 3) torch.int64": (H.long(), W, T),
    "weight must be a floating-point tensor of two dimensions, got (3,) torch.float32": (H, W[0], T),
    "weight must be (V, 3) with a class or more, got (5, 2)": (H, W[:, 1:], T),
    "weight must be (V, 3) with a class or more, got (0, 3)": (H, W[:0], T),
    "weight must have hidden's dtype torch.float32 or torch.float32, got torch.float16": (H, W.half(), T),
    "target must be classes of shape (4,), got (3,)": (H, W, T[1:]),
    "target must be classes of shape (4,), got list": (H, W, [0]),
    "target must have dtype torch.int64 or torch.int32, got torch.float32": (H, W, H[:, 0]),
    "target must be on hidden's device cpu, got meta": (H, W, T.to("meta")),
}
OPTIONS = {
    "bias must be a tensor of shape (5,), got (4,)": {"bias": H[:, 0]},
    "bias must have hidden's dtype torch.float32 or torch.float32, got torch.bfloat16": {
        "bias": W[:, 0].to(BF16)
    },
    "class_weight must be a tensor of shape (5,), got list": {"class_weight": [1.0]},
    "class_weight must not require a gradient, got requires_grad=True": {
        "class_weight": torch.ones(5, requires_grad=True)
    },
    "label_smoothing must be from 0 to 1, got -0.5": {"label_smoothing": -0.5},
    "label_smoothing must be from 0 to 1, got None": {"label_smoothing": None},
    "ignore_index must be an integer of 64 bits, got None": {"ignore_index": None},
    "z_loss must be finite and at least 0, got -1.0": {"z_loss": -1.0},
    "softcap must be positive and finite, or None, got 0": {"softcap": 0},
    "reduction must be one of none, mean, sum, got 'average'": {"reduction": "average"},
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("message", [*BAD, *OPTIONS])
def test_bad_arguments(message, backend):
    with pytest.raises(ValueError) as error:
        lk.linear_cross_entropy(*BAD.get(message, (H, W, T)), **OPTIONS.get(message, {}), backend=backend)
    assert str(error.value) == f"linear_cross_entropy: {message}"


def test_the_binding_refuses_what_would_touch_other_memory():
    options = {
        "classes": 5,
        "ignore_index": -100,
        "smoothing": 0.0,
        "z_loss": 0.0,
        "softcap": 0.0,
        "threads": 1,
    }
    forward = partial(compiled.cpu.linear_cross_entropy_forward, **options)
    x, kept, losses, weight = torch.ones(4, 2), torch.ones(5, 4), torch.ones(4), torch.ones(5)
    names = ("logits", "target", "weight", "kept", "losses", "first")
    for message, wrong in {
        "logits must have 2 dimensions": (x[0], T, weight, kept, losses, 0),
        "logits must be contiguous": (torch.ones(2, 4).t(), T, weight, kept, losses, 0),
        "target must have another number of elements": (x, T[1:], weight, kept, losses, 0),
        "target must have the dtype": (x, T.int(), weight, kept, losses, 0),
        "weight must have another number of elements": (x, T, weight[1:], kept, losses, 0),
        "kept must have another number of elements": (x, T, weight, kept[1:], losses, 0),
        "losses must have another number of elements": (x, T, weight, kept, losses[1:], 0),
        "first must leave room for a block's classes": (x, T, weight, kept, losses, 4),
    }.items():
        with pytest.raises(ValueError, match=message):
            forward(**dict(zip(names, wrong, strict=True)))


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "triton"]
    with pytest.raises(
        NotImplementedError, match="linear_cross_entropy: triton needs a tensor on cuda, got cpu"
    ):
        lk.linear_cross_entropy(H, W, T, backend="triton")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [288, 1024])  # fewer go by classes in float32, too
def test_memory_beside_the_gradients_is_an_eighth_of_the_logits(dtype, reduction, rows, most_allocated):
    dim, classes = 64, 50257
    hidden, weight = (torch.randn(n, dim).to(dtype).requires_grad_() for n in (rows, classes))
    target = torch.randint(classes, (rows,))

    def step():
        loss = lk.linear_cross_entropy(hidden, weight, target, reduction=reduction)
        return torch.autograd.grad(loss, (hidden, weight), torch.ones_like(loss))

    gradients = hidden.nbytes + weight.nbytes
    assert gradients < most_allocated(step) < gradients + rows * classes * dtype.itemsize / 8
