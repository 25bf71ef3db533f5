"""linear_cross_entropy: the public function, under every instruction set."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels import linear_cross_entropy_blocks as blocks
from lspm_kernels.reference import linear_cross_entropy as reference

F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 4, 7), (70, 33, 1003), (40, 16, 300)]  # N, D, V
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
# What stands besides: bias, class_weight, return_lse, and numbers.
KINDS = {
    "plain": ("", {}),
    "bias": ("bias", {}),
    "weighted": ("class_weight", {}),
    "smoothed": ("bias", {"label_smoothing": 0.1}),
    "smoothed and weighted": ("class_weight", {"label_smoothing": 0.3}),
    "nothing but smoothing": ("class_weight", {"label_smoothing": 1.0}),
    "z_loss": ("class_weight", {"z_loss": 0.01}),
    "capped": ("", {"softcap": 3.0}),
    "lse": ("", {"return_lse": True}),
    "everything": (
        "bias class_weight",
        {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "return_lse": True},
    ),
}


def made(shape, kind="plain", dtype=F32, weight_dtype=None, scale=1.0):
    """[hidden, weight, bias], and what else an op takes: target, class_weight, options."""
    (rows, dim, classes), (given, options) = shape, KINDS[kind]
    hidden, weight = torch.randn(rows, dim) * scale, torch.randn(classes, dim)
    bias = torch.randn(classes).to(weight_dtype or dtype) if "bias" in given else None
    target = torch.randint(classes, (rows,))
    if rows > 1:
        target[1] = target[-1] = -100
    class_weight = torch.rand(classes) + 0.1 if "class_weight" in given else None
    tensors = [hidden.to(dtype), weight.to(weight_dtype or dtype), bias]
    return tensors, {"target": target, "class_weight": class_weight, **options}


def ours(hidden, weight, bias, target, **options):
    return lk.linear_cross_entropy(hidden, weight, target, bias=bias, **options)


def plain(hidden, weight, bias, target, class_weight=None, return_lse=False, **options):
    if hidden.dtype == torch.float64 and class_weight is not None:
        class_weight = class_weight.double()
    loss, lse = reference.linear_cross_entropy(hidden, weight, target, bias, class_weight, **options)
    return (loss, lse) if return_lse else loss


def in_hiddens_dtype(function, **options):
    """function; a loss that is one number in the products' dtype: plain PyTorch's may err little by luck."""

    def rounded(hidden, *others):
        found = function(hidden, *others, **options)
        loss, *lse = found if isinstance(found, tuple) else (found,)
        assert loss.dtype == torch.promote_types(hidden.dtype, F32)
        return loss if loss.dim() else loss.to(hidden.dtype), *lse

    return rounded


def check(tensors, options, function=ours, gradients=True):
    forms = (in_hiddens_dtype(form, **options) for form in (function, plain))
    oracle.check(*forms, tensors, gradients=gradients)


def check_kind(kind, shape, dtype=F32, reduction="mean", **more):
    tensors, options = made(shape, kind, dtype, **more)
    check(tensors, {"reduction": reduction, **options})


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 rows or classes, and one for what is left over."""
    for name, size in {"_MOST": 1, "_WHOLE": 0, "_LEAST_ROWS": 0}.items():
        monkeypatch.setattr(blocks, name, size)


@pytest.mark.every_backend
@REDUCTIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(kind, dtype, reduction):
    for shape in SHAPES:
        check_kind(kind, shape, dtype, reduction)


@pytest.mark.every_backend
@REDUCTIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_in_blocks(kind, dtype, reduction, small_blocks):
    check_kind(kind, (70, 16, 75), dtype, reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for kind, shape in itertools.product(KINDS, ((7, 5, 10), (40, 32, 1029))):
        check_kind(kind, shape, dtype)


@pytest.mark.every_backend
@pytest.mark.parametrize("kind", ["bias", "everything"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_parameters_of_float32_beside_halves(dtype, kind):
    check_kind(kind, (70, 33, 103), dtype, weight_dtype=F32)


@pytest.mark.every_backend
@pytest.mark.parametrize("kind", ["plain", "smoothed and weighted", "z_loss", "lse"])
@pytest.mark.parametrize("scale", [1e-20, 30.0, 1000.0])
def test_magnitudes(kind, scale, small_blocks):
    check_kind(kind, (40, 16, 110), scale=scale, reduction="sum")


@pytest.mark.every_backend
@REDUCTIONS
def test_a_class_that_is_hidden_by_its_bias(reduction, small_blocks):
    tensors, options = made((9, 4, 50), "bias")
    tensors[2][:20] = -float("inf")  # a block of its own too
    check(tensors, {**options, "target": options["target"].clamp(min=20), "reduction": reduction})


@pytest.mark.every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 49])
def test_special_values(value, where, small_blocks):
    tensors, options = made((9, 4, 50), "bias")
    tensors[2][where] = value
    options |= {"reduction": "none", "return_lse": value != float("inf")}  # torch's lse is not its loss's
    check(tensors, options, gradients=False)


@pytest.mark.every_backend
@REDUCTIONS
def test_torchs_own(reduction):
    (hidden, weight, _), options = made((30, 8, 50), "weighted")
    given = {"linear_bias": torch.randn(50), "weight": options["class_weight"], "reduction": reduction}
    target = options["target"].abs() % 50
    for chunked in (None, torch.nn.LinearCrossEntropyOptions()):
        expected = F.linear_cross_entropy(hidden, weight, target, **given, options=chunked)
        options |= {"target": target.int(), "reduction": reduction}
        torch.testing.assert_close(ours(hidden, weight, given["linear_bias"], **options), expected)


@pytest.mark.every_backend
@REDUCTIONS
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_counts(rows, dtype, reduction):
    (hidden, weight, bias), options = made((rows, 4, 7), "bias", dtype)
    options |= {"target": torch.full((rows,), 4), "ignore_index": 4, "reduction": reduction}
    found, expected = (f(hidden, weight, bias, **options) for f in (ours, plain))
    torch.testing.assert_close(found, expected, equal_nan=True)
    tensors = [t.requires_grad_() for t in (hidden, weight, bias)]
    for gradient in torch.autograd.grad(ours(*tensors, **options).sum(), tensors):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_row_that_is_ignored_is_not_read(dtype):
    tensors, options = made((40, 8, 30), "bias", dtype)
    tensors[0][1] = float("nan")
    tensors = [t.requires_grad_() for t in tensors]
    for reduction in ("mean", "none"):
        loss = ours(*tensors, **options, reduction=reduction)
        gradients = torch.autograd.grad(loss.sum(), tensors)
        assert loss.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
        assert not gradients[0][1].any() and gradients[0][0].any()


VIEWS = {
    "three dimensions": lambda h, w, t: (h.view(5, 2, 8), w, t.view(5, 2)),
    "one row": lambda h, w, t: (h[0], w, t[0]),
    "every other row": lambda h, w, t: (h[::2], w, t[::2]),
    "columns": lambda h, w, t: (h.t().contiguous().t(), w.t().contiguous().t(), t),
    "part of a table": lambda h, w, t: (h, torch.stack([w, w], 1)[:, 0], t),
}


@pytest.mark.every_backend
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_views(name, dtype):
    (hidden, weight, _), options = made((10, 8, 30), dtype=dtype)
    target = options.pop("target")
    forms = (
        in_hiddens_dtype(
            lambda h, w, b, form=form: form(*(v := VIEWS[name](h, w, target))[:2], b, v[2], reduction="none")
        )
        for form in (ours, plain)
    )
    oracle.check(*forms, [hidden, weight, None])


def test_a_table_that_is_tied():
    tensors, options = made((20, 8, 30))
    ids = torch.randint(30, (20,))
    forms = (
        lambda w, form=form: form(F.embedding(ids, w).sin(), w, None, **options) for form in (ours, plain)
    )
    oracle.check(*forms, [tensors[1]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    """Of what our kernels do; torch's products may differ."""
    rows, classes = 103, 1700
    product, target, weight = (
        torch.randn(rows, classes).to(dtype),
        torch.randint(classes, (rows,)),
        torch.rand(classes),
    )
    results = []
    for threads in (1, 2, 3):
        logits, kept, losses, dbias = (
            product.clone(),
            torch.empty(5, rows),
            torch.empty(rows),
            torch.zeros(classes),
        )
        options = 0, classes, -100, 0.1, 0.01, 5.0, threads
        compiled.cpu.linear_cross_entropy_forward(logits, target, weight, kept, losses, *options)
        given = losses, losses, logits, target, weight, kept[:3], dbias
        compiled.cpu.linear_cross_entropy_backward(*given, *options)
        results.append([logits, kept[:3], losses, dbias])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_the_sum_of_losses_has_the_same_bits_for_any_number_of_threads():
    values, sums = torch.randn(100_003), set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sums.add(blocks.total(values).item())
    assert len(sums) == 1
    torch.testing.assert_close(sums.pop(), values.double().sum().item(), rtol=1e-6, atol=0)


def calls(function):
    """The names of torch's operations that function() comes to, and how often each."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key: event.count for event in profile.key_averages()}


@pytest.mark.parametrize("wanted", [*itertools.product([True, False], repeat=3)])
@pytest.mark.parametrize("dtype, reduction", [(F32, "mean"), (F32, "none"), (BF16, "mean"), (F16, "mean")])
def test_only_what_is_wanted_is_computed(dtype, reduction, wanted):
    tensors, options = made((70, 16, 50), "bias", dtype)
    tensors = [t.requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    losses = []
    forward = calls(lambda: losses.append(ours(*tensors, **options, reduction=reduction)))
    once = dtype != F16 and reduction == "mean"
    assert products(forward) == 1 + (sum(wanted[:2]) if once else 0)
    if any(wanted):
        backward = calls(lambda: losses[0].sum().backward())
        assert products(backward) == (0 if once else 1 + sum(wanted[:2]))
        assert [t.grad is not None for t in tensors] == list(wanted)
    with torch.no_grad():
        assert products(calls(lambda: ours(*tensors, **options, reduction=reduction))) == 1


def products(found):
    return sum(found.get(f"aten::{name}", 0) for name in ("mm", "addmm", "addmm_"))


def test_gradients_are_scaled_only_where_that_changes_them():
    tensors, options = made((70, 16, 50), "bias")
    tensors = [t.requires_grad_() for t in tensors]
    for factor, again in itertools.product((1.0, 3.0), (False, True)):
        loss = ours(*tensors, **options)
        found = calls(lambda loss=loss: loss.backward(torch.tensor(factor), retain_graph=again))  # noqa: B023
        scaled = {name for name in found if name in ("aten::mul", "aten::mul_")}
        assert scaled == ({"aten::mul"} if again else set() if factor == 1 else {"aten::mul_"})
        if again:  # another backward finds them as they were
            loss.backward(torch.tensor(factor))
        expected = torch.autograd.grad(plain(*tensors, **options) * factor * (1 + again), tensors)
        for t, gradient in zip(tensors, expected, strict=True):
            torch.testing.assert_close(t.grad, gradient)
            t.grad = None


def test_without_features_all_classes_are_alike():
    hidden, weight = torch.zeros(3, 0), torch.zeros(5, 0)
    loss = lk.linear_cross_entropy(hidden, weight, torch.tensor([0, 4, 2]), backend="cpu")
    torch.testing.assert_close(loss, torch.tensor(5.0).log())
