"""The CPU's own products of matrices, and where the ops take them in place of torch's."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled, products
from lspm_kernels.reference import linear as reference

# Rows, depth, columns: within a tile and a panel, at their ends, beyond a block of each.
SIZES = [(1, 1, 1), (3, 0, 5), (0, 3, 5), (14, 256, 32), (5, 7, 33), (130, 300, 70), (115, 20, 530)]
LAYOUTS = list(itertools.product([False, True], repeat=2))


@pytest.fixture
def ours(monkeypatch):
    """The ops take our product, however fast torch's is here."""
    monkeypatch.setattr(products, "faster", True)


def matrix(rows, cols, transposed=False, dtype=torch.float32):
    """One of those that lie in a larger one, by rows or by columns."""
    whole = torch.randn(cols + 2, rows + 3).t() if transposed else torch.randn(rows + 2, cols + 3)
    return whole.to(dtype)[:rows, :cols]


def check(size, layout, kernels=None, dtype=torch.float32, into=torch.float32):
    rows, depth, columns = size
    a, b = matrix(rows, depth, layout[0], dtype), matrix(depth, columns, layout[1], dtype)
    bias = torch.randn(columns)
    for accumulate, beside in ((False, None), (False, bias), (True, None)):
        whole = torch.randn(rows + 1, columns + 2).to(into)
        before, c = whole.clone(), whole[:rows, :columns]
        begin = before[:rows, :columns] if accumulate else torch.zeros(columns) if beside is None else bias
        exact, plain = (begin.to(t) + a.to(t) @ b.to(t) for t in (torch.float64, torch.float32))
        (kernels or compiled.cpu).matmul(a, b, beside, c, accumulate, 2)
        oracle.compare("product", c, exact, plain.to(into))
        beyond = torch.ones_like(whole, dtype=torch.bool)
        beyond[:rows, :columns] = False
        assert torch.equal(whole[beyond], before[beyond])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_against_torch(size, layout):
    check(size, layout)


def test_every_instruction_set(isa):
    for size, layout in itertools.product(SIZES, LAYOUTS):
        check(size, layout)


# Rows and columns that fill tiles and that do not, beyond a block; depths of one part and of several.
TILES = [(1, 1, 1), (3, 0, 5), (0, 3, 5), (32, 64, 32), (47, 70, 33), (530, 96, 1030), (40, 4130, 70)]


@pytest.mark.parametrize("into", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", TILES)
def test_bfloat16_on_tiles(size, layout, into, amx):
    check(size, layout, amx, torch.bfloat16, into)


@pytest.mark.parametrize("size", [(600, 64, 1030), (40, 4130, 70)])
def test_same_bits_on_tiles_for_any_number_of_threads(size, amx):
    rows, depth, columns = size
    a, b, found = torch.randn(rows, depth).bfloat16(), torch.randn(depth, columns).bfloat16(), []
    for threads in (1, 2, 3):
        found.append(torch.ones(rows, columns))
        amx.matmul(a, b, None, found[-1], True, threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_layers_in_bfloat16(amx, monkeypatch):
    """Those of autocast, too, whose weights and gradients are float32."""
    monkeypatch.setattr(compiled, "cpu", amx)
    plain = lambda x, w, bias: reference.linear(x, w, bias, None)  # noqa: E731
    given = layers()
    assert products.is_ours(given[0][0].bfloat16(), given[1].bfloat16().t())
    oracle.check(lk.linear, plain, [t.bfloat16() for t in given])
    with torch.autocast("cpu", torch.bfloat16):
        found = [torch.func.grad(lambda w, f=f: f(*given[:1], w, given[2]).float().sin().sum())(given[1])
                 for f in (lk.linear, F.linear)]  # fmt: skip
    torch.testing.assert_close(*found, rtol=2**-6, atol=2**-4)


def test_bfloat16_takes_amx(monkeypatch):
    x = torch.ones(40, 40).bfloat16()
    try:
        kernels = compiled.load_cpu("avx512_bf16")
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(compiled, "cpu", kernels)
    assert not products.is_ours(x, x)
    with pytest.raises(ValueError, match="a must be float32 where there is no AMX"):
        kernels.matmul(x, x, None, x.clone(), False, 1)


@pytest.mark.parametrize(
    "size", [(70, 600, 900), (900, 40, 70), (127, 300, 33), (55, 300, 33), (33, 300, 127), (15, 64, 15)]
)
def test_same_bits_for_any_number_of_threads(size, isa):
    rows, depth, columns = size
    a, b, found = torch.randn(rows, depth), torch.randn(depth, columns), []
    for threads in (1, 2, 3):
        found.append(torch.ones(rows, columns))
        compiled.cpu.matmul(a, b, None, found[-1], True, threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_binding_refuses_what_would_touch_other_memory():
    x = torch.ones(4, 4)
    for message, (a, b, bias, c, accumulate) in {
        "a must be float32, bfloat16 or float16": (x.long(), x, None, x, False),
        "a must have the dtype": (x.half(), x, None, x, False),
        "b must have 2 dimensions": (x, x[0], None, x, False),
        "a must have a dimension that is contiguous": (torch.ones(8, 8)[::2, ::2], x, None, x, False),
        "b must have a row for each column of a": (x, x[:3], None, x, False),
        "c must have the product's shape": (x, x, None, x[:, :3], False),
        "c must have a contiguous last dimension": (x, x, None, torch.ones(4, 4).t()[:, :4], False),
        "bias must be None where c is added to": (x, x, x[0], x, True),
        "bias must have": (x, x, x[0, :3], x, False),
    }.items():
        with pytest.raises(ValueError, match=message):
            compiled.cpu.matmul(a, b, bias, c, accumulate, 1)


def layers(rows=70, inputs=64, outputs=50):
    return [torch.randn(2, rows // 2, inputs), torch.randn(outputs, inputs) / 8, torch.randn(outputs)]


@pytest.mark.parametrize("transposed", [False, True])
def test_linear_and_its_gradients(transposed, ours):
    def called(function):
        return lambda x, w, *bias: function(x, w.t().contiguous().t() if transposed else w, *bias)

    plain = lambda x, w, bias=None: reference.linear(x, w, bias, None)  # noqa: E731
    for count in (2, 3):
        oracle.check(called(lk.linear), called(plain), layers()[:count])


def test_gradients_that_lie_otherwise(ours):
    given = [t.requires_grad_() for t in layers()]
    for reduced in (lambda y: y.sum(), lambda y: y[..., ::2].sum(), lambda y: y.transpose(0, 2).cos().sum()):
        found = [torch.autograd.grad(reduced(f(*given)), given) for f in (lk.linear, F.linear)]
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_second_derivatives_are_exact(ours):
    given = [t.double().float().requires_grad_() for t in layers()]
    found = []
    for function in (lk.linear, F.linear):
        first = torch.autograd.grad(function(*given).sin().sum(), given[0], create_graph=True)
        found.append(torch.autograd.grad(first[0].square().sum(), given[:2]))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)  # of sums of thousands


def test_what_is_thin_or_of_another_dtype_stays_with_torch(ours):
    for a, b, expected in (
        (torch.ones(32, 40), torch.ones(40, 32), True),
        (torch.ones(31, 40), torch.ones(40, 32), False),
        (torch.ones(32, 31), torch.ones(31, 32), False),
        (torch.ones(32, 40), torch.ones(40, 31), False),
        (torch.ones(32, 40).half(), torch.ones(40, 32).half(), False),
        (torch.ones(32, 40).bfloat16(), torch.ones(40, 32), False),
        (torch.ones(32, 40, device="meta"), torch.ones(40, 32, device="meta"), False),
    ):
        assert products.is_ours(a, b) is expected


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compile(mode, ours):
    torch._dynamo.reset()
    ours, theirs = (lambda x, *rest, f=f: f(x.sin(), *rest) for f in (lk.linear, F.linear))
    oracle.check(torch.compile(ours, fullgraph=True, backend=mode), theirs, layers())


def test_opcheck_func_and_autocast(ours):
    x, w, bias = layers()
    torch.library.opcheck(
        torch.ops.lspm.linear_product.default, (*(t.requires_grad_() for t in (x[0], w, bias)), "cpu")
    )
    gradients = [torch.func.grad(lambda w, f=f: f(x, w, bias).cos().sum())(w) for f in (lk.linear, F.linear)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lk.linear(x, w, bias), F.linear(x, w, bias))


def test_the_reference_stays_plain(ours, monkeypatch):
    given = layers()
    monkeypatch.setattr(products, "linear", None)
    with lk.use_backend("reference"):
        assert torch.equal(lk.linear(*given), F.linear(*given))
