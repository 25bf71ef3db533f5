"""dropout: which elements it drops, what it leaves, its gradients, and what torch makes of it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import dropout as ops
from lspm_kernels.reference import dropout as reference
from lspm_kernels.reference import philox

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16 = torch.bfloat16
SHAPES = [(), (1,), (63,), (64,), (3, 5, 130), (7, 1000), (0, 5)]


def bound(f, p, seed=5):
    return lambda x, residual=None: f(x, p, residual=residual, seed=seed)


def check(tensors, p, seed=5, **options):
    oracle.check(bound(lk.dropout, p, seed), bound(reference.dropout, p, seed), tensors, **options)


def tensors(shape, dtype=torch.float32):
    return [torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)]


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(shape, dtype):
    for p in (0.1, 0.5, 1.0):
        check(tensors(shape, dtype), p)
        check(tensors(shape, dtype)[:1], p)


@pytest.mark.every_backend
@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**63 - 1])
def test_drops_exactly_the_elements_that_philox_says(p, seed):
    x = torch.ones(300, 777)
    kept = philox.kept_of(seed, p, x.shape, x.device)
    y = lk.dropout(x, p, seed=seed)
    assert torch.equal(y != 0, kept if p < 1 else torch.zeros_like(kept))
    share = 1 - kept.double().mean().item()
    assert abs(share - p) <= 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-32
    if p < 1:
        assert torch.equal(y[kept].unique(), torch.tensor([1 / (1 - p)]))


def test_no_word_is_used_twice_and_neighbours_are_independent():
    kept = philox.kept_of(9, 0.5, (2**18,), torch.device("cpu")).double() - 0.5
    for apart in (1, 15, 16, 17, 48, 64, 768):
        assert abs((kept[apart:] * kept[:-apart]).mean()) < 5 * 0.25 / 2**9


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_dropped_is_zero_and_what_is_kept_stays_what_it_is(dtype):
    for value in (float("nan"), float("inf"), -float("inf"), 1e30, 1e-30):
        x = torch.full((200,), value).to(dtype)
        check([x], 0.4)
        assert torch.equal(lk.dropout(x, 0.4, seed=5)[~philox.kept_of(5, 0.4, x.shape, x.device)].unique(),
                           torch.zeros(1, dtype=dtype))  # fmt: skip
        assert torch.equal(lk.dropout(x, 1.0, seed=5), torch.zeros_like(x))


@pytest.mark.every_backend
def test_tensors_that_lie_otherwise_drop_by_their_order_of_rows():
    x, residual = (t.t() for t in tensors((40, 70)))
    y = lk.dropout(x, 0.3, residual=residual, seed=1)
    assert torch.equal(y, lk.dropout(x.contiguous(), 0.3, residual=residual.contiguous(), seed=1))
    flat = torch.randn(4 * 64 + 1)
    assert torch.equal(lk.dropout(flat[1:], 0.3, seed=1), lk.dropout(flat[1:].clone(), 0.3, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    for shape in ((70_001,), (1031, 2048)):  # the second one is streamed
        given, results = tensors(shape, dtype), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(oracle.outputs_and_gradients(bound(lk.dropout, 0.2), given))
        for name, first in results[0].items():
            assert all(torch.equal(first, other[name]) for other in results[1:]), name
        part = [t.flatten()[:10_000] for t in given]
        expected = bound(reference.dropout, 0.2)(*part)
        torch.testing.assert_close(results[0]["output 0"].flatten()[:10_000], expected)


KNOWN = {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_bits(isa, dtype):
    generator = torch.Generator().manual_seed(3)
    for shape, p in itertools.product([(5, 77), (2, 2000)], (0.1, 0.5)):
        given = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
        check(given, p)
        for count in (1, 2):
            y = bound(lk.dropout, p)(*given[:count])
            assert torch.equal(KNOWN.setdefault((dtype, shape, p, count), y), y)


@pytest.mark.every_backend
def test_without_training_or_share_nothing_is_dropped():
    x, residual = tensors((5, 6))
    assert lk.dropout(x, 0.5, training=False) is x
    assert lk.dropout(x, 0.0) is x
    for options in ({"p": 0.5, "training": False}, {"p": 0}):
        assert torch.equal(lk.dropout(x, residual=residual, **options), x + residual)


@pytest.mark.every_backend
def test_a_residual_of_another_dtype_promotes():
    x, residual = tensors((5, 6))
    for a, b in ((x.bfloat16(), residual), (x, residual.bfloat16())):
        y = lk.dropout(a, 0.5, residual=b, seed=1)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, reference.dropout(a.float(), 0.5, residual=b.float(), seed=1))


@pytest.mark.every_backend
def test_seeds_are_drawn_of_torchs_generator():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = lk.dropout(x), lk.dropout(x)
    torch.manual_seed(3)
    assert torch.equal(lk.dropout(x), first)
    assert not torch.equal(first, second)
    y = lk.dropout(x.requires_grad_(), 0.3)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)  # the backward drops the same


def test_only_the_seed_is_kept():
    kept = []
    x = torch.randn(100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        lk.dropout(x, 0.5, residual=x)
    assert kept == [1]


@pytest.mark.every_backend
def test_second_derivatives_are_right():
    x, residual = (t.double().requires_grad_() for t in tensors((3, 30)))

    def ours(x, residual):
        return lk.dropout(x.float(), 0.4, residual=residual.float(), seed=2).double().pow(3)

    def plain(x, residual):
        return reference.dropout(x, 0.4, residual=residual, seed=2).pow(3)

    found = []
    for f in (ours, plain):
        (gradient,) = torch.autograd.grad(f(x, residual).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.pow(2).sum(), (x, residual)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compile(mode):
    torch._dynamo.reset()

    def function(x, residual):
        return lk.dropout(x.sin(), 0.3, residual=residual, seed=4)

    made = torch.compile(function, fullgraph=True, backend=mode)
    for shape in ((6, 8),) if mode == "inductor" else ((6, 8), (9, 8), (3, 2, 8)):
        oracle.check(made, lambda x, r: bound(reference.dropout, 0.3, 4)(x.sin(), r), tensors(shape))


def test_compiled_calls_draw_seeds_of_their_own():
    drawn = torch.compile(lk.dropout, fullgraph=True, backend="aot_eager")
    x = torch.ones(1000, requires_grad=True)
    first, second = drawn(x), drawn(x)
    assert not torch.equal(first, second)
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], first)


def test_every_part_of_torch():
    x, residual = tensors((6, 8))
    seed, ours = torch.tensor(5), bound(lk.dropout, 0.4)
    given = [t.clone().requires_grad_() for t in (x, residual)]
    torch.library.opcheck(torch.ops.lspm.dropout.default, (*given, seed, 0.4, 1 / 0.6, "cpu"))
    expected = ours(x, residual)
    found, truth = (
        torch.func.grad(lambda x, f=f: f(x, residual).pow(3).sum())(x)
        for f in (ours, bound(reference.dropout, 0.4))
    )
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    many = torch.stack((x, 2 * x))
    assert torch.equal(torch.vmap(ours, (0, None))(many, residual)[0], expected)

    class Module(torch.nn.Module):
        def forward(self, x, residual):
            return ours(x, residual)

    program = torch.export.export(Module(), (x, residual))
    assert "lspm.dropout" in str(program.graph)
    assert torch.equal(program.module()(x, residual), expected)
    drawn = torch.ones(500, requires_grad=True)
    y = checkpoint(lambda x: lk.dropout(x).sin(), drawn, use_reentrant=False)
    assert torch.equal(
        torch.autograd.grad(y.sum(), drawn)[0], torch.where(y != 0, 2 * torch.tensor(2.0).cos(), 0)
    )
    with FakeTensorMode() as mode:
        fake = ours(*(mode.from_tensor(t) for t in (x, residual)))
    assert fake.shape == expected.shape
    assert ours(x.to("meta"), residual.to("meta")).is_meta
    with torch.autocast("cpu", BF16):
        assert ours(x, residual).dtype == F.dropout(x).dtype == torch.float32


ONES = torch.ones(2, 4)
BAD = {
    "dropout: x must be a floating-point tensor, got list": lambda: lk.dropout([1.0]),
    "dropout: x must be a floating-point tensor, got (2, 4) torch.int64": lambda: lk.dropout(ONES.long()),
    "dropout: residual must be a tensor of x's shape (2, 4), got (4,)": lambda: lk.dropout(
        ONES, residual=ONES[0]
    ),
    "dropout: residual must be on x's device cpu, got meta": lambda: lk.dropout(
        ONES, residual=ONES.to("meta")
    ),
    "dropout: residual must be a floating-point tensor, got (2, 4) torch.int64": lambda: lk.dropout(
        ONES, residual=ONES.long()
    ),
    "dropout: p must be from 0 to 1, got 1.5": lambda: lk.dropout(ONES, 1.5),
    "dropout: p must be from 0 to 1, got nan": lambda: lk.dropout(ONES, float("nan")),
    "dropout: seed must be an integer from 0 to 2 ** 63 - 1, got -1": lambda: lk.dropout(ONES, seed=-1),
    "dropout: backend must be one of cpu, triton, reference, got 'cuda'": lambda: lk.dropout(
        ONES, backend="cuda"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError) as error:
        BAD[message]()
    assert str(error.value) == message


def test_the_binding_refuses_what_would_touch_other_memory():
    forward, x = compiled.cpu.dropout_forward, torch.ones(2, 70)
    for message, call in {
        "out must have another number of elements": lambda: forward(x, None, x[:1], 0.5, 2.0, 1, 1),
        "residual must have another number of elements": lambda: forward(x, x[:1], x, 0.5, 2.0, 1, 1),
        "x must be contiguous": lambda: forward(x.t(), None, x, 0.5, 2.0, 1, 1),
        "out must have the dtype that the contract names": lambda: forward(x, None, x.half(), 0.5, 2.0, 1, 1),
        "p must be from 0 to 1": lambda: forward(x, None, x, 1.5, 2.0, 1, 1),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "triton"]
    with pytest.raises(NotImplementedError, match="dropout: triton needs a tensor on cuda, got cpu"):
        lk.dropout(ONES, backend="triton")
    with pytest.warns(lk.FallbackWarning, match="dropout: cpu needs dtype float32, bfloat16, float16"):
        lk.dropout(ONES.double())
