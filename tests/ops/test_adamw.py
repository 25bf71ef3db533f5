"""adamw_ and adamw_norm, under every instruction set."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lspm_kernels as lk
import oracle
from lspm_kernels.dispatch import FallbackWarning
from lspm_kernels.ops import adamw as ops
from lspm_kernels.reference import adamw as reference
from lspm_kernels.reference import philox

F32, BF16, F16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One element, none, less than a vector, odd, a multiple of all, and more than a chunk of a thread or program.
SHAPES = [(), (0, 3), (5,), (3, 7, 11), (64, 20), (66_001,)]
FEW = SHAPES[:5]
NUMBERS = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
# dtype of parameters, of moments, and whether there are master weights
KINDS = {
    "float32": (F32, F32, False),
    "bfloat16": (BF16, BF16, False),
    "float16": (F16, F16, False),
    "bfloat16, wide state": (BF16, F32, False),
    "bfloat16, master": (BF16, F32, True),
    "float16, master": (F16, F32, True),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def made(kind, shapes=FEW, amsgrad=False, steps=1):
    """Lists of parameters, moments and the like, and of gradients for each step."""
    dtype, state, master = KINDS[kind]
    masters = [torch.randn(s) for s in shapes] if master else []
    params = [m.to(dtype) for m in masters] or [torch.randn(s).to(dtype) for s in shapes]
    moments = [[torch.randn(s).to(state) for s in shapes], [(torch.rand(s) + 0.5).to(state) for s in shapes]]
    most = [(torch.rand(s) + 0.5).to(state) for s in shapes] if amsgrad else []
    grads = [[torch.randn(s).to(dtype) for s in shapes] for _ in range(steps)]
    return [params, *moments, most, masters], grads


def check(kind, shapes=FEW, amsgrad=False, steps=3, scale=None, **options):
    """Holds what some steps make of the tensors to the oracle's rule."""
    lists, grads = made(kind, shapes, amsgrad, steps)
    given = NUMBERS | options
    factor = None if scale is None else torch.tensor(scale)

    def stepped(function, dtype=None):
        changed = [[t.to(dtype or t.dtype, copy=True) for t in tensors] for tensors in lists]
        for i, of_step in enumerate(grads):
            function(changed, [g.to(dtype or g.dtype) for g in of_step], 7 + i)
        return [t for tensors in changed for t in tensors]

    def ours(changed, grads, step):
        params, first, second, most, masters = changed
        options = {"step": step, "scale": factor, "master_params": masters or None, **given}
        assert lk.adamw_(params, grads, first, second, most or None, **options) is params

    def plain(changed, grads, step):
        numbers = given["lr"], *given["betas"], given["eps"], given["weight_decay"]
        maximize = given.get("maximize", False)
        params, *states = changed
        reference.adamw_(params, grads, *states, factor, [step] * len(params), *numbers, maximize)

    truth = stepped(plain, torch.float64)
    for i, results in enumerate(zip(stepped(ours), truth, stepped(plain), strict=True)):
        if results[0].numel():
            oracle.compare(f"{kind}: tensor {i}", *results)


@pytest.mark.every_backend
@EACH
@pytest.mark.parametrize("amsgrad", [False, True])
def test_against_the_reference(kind, amsgrad):
    check(kind, SHAPES, amsgrad)
    check(kind, FEW, amsgrad, scale=0.3, maximize=True, weight_decay=0.0)


def test_every_instruction_set(isa):
    for kind in KINDS:
        check(kind, FEW, amsgrad=True, scale=0.3)
    test_norm()
    test_stochastic_rounding_takes_its_words_of_philox()


@pytest.mark.every_backend
def test_one_tensor_and_steps_of_each():
    params, first, second = ([torch.ones(3) for _ in range(2)] for _ in range(3))
    grads = [torch.full((3,), 2.0)] * 2
    lk.adamw_(params, grads, first, second, step=[1, 5], **NUMBERS)
    for i, step in enumerate((1, 5)):
        one = [torch.ones(3) for _ in range(3)]
        assert lk.adamw_(one[0], grads[i], *one[1:], step=step, **NUMBERS) is one[0]
        assert all(map(torch.equal, one, (params[i], first[i], second[i])))
    assert not torch.equal(*params)
    assert lk.adamw_([], [], [], [], step=1) == []


@pytest.mark.every_backend
def test_norm():
    for dtype in DTYPES:
        grads = [torch.randn(s).to(dtype) for s in SHAPES]
        found, truth = lk.adamw_norm(grads), math.sqrt(sum(g.double().square().sum() for g in grads))
        assert (found.dtype, found.shape) == (F32, ())
        assert found.item() == torch.tensor(truth, dtype=F32).item()
    mixed = [torch.full((4,), 3.0), torch.full((4,), 4.0).bfloat16()]
    assert lk.adamw_norm(mixed).item() == 10
    assert lk.adamw_norm([]).item() == lk.adamw_norm(torch.zeros(0)).item() == 0
    assert lk.adamw_norm(torch.ones(4, 4)[:, ::2]).item() == pytest.approx(math.sqrt(8))


@pytest.mark.every_backend
@pytest.mark.parametrize("value", [1e30, 1e-30, math.inf, -math.inf, math.nan])
def test_norm_of_what_is_large_small_or_not_finite(value):
    found = lk.adamw_norm([torch.ones(3) * value, torch.zeros(70_000)])
    torch.testing.assert_close(found, torch.tensor(abs(value) * 3**0.5), equal_nan=True)


@pytest.mark.every_backend
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30, 1e-40])
def test_special_values_stay_in_their_elements(value):
    for place in range(4):  # parameter, gradient, and either moment
        tensors = [torch.ones(40) for _ in range(5)]
        expected = [torch.ones(40) for _ in range(5)]
        for t in (tensors, expected):
            t[place][17] = value
        lk.adamw_(*tensors, step=2, **NUMBERS)
        lists = [[t] for t in expected]
        reference.adamw_(*lists, [], None, [2], 0.02, 0.8, 0.9, 1e-3, 0.1, False)
        torch.testing.assert_close(tensors, expected, equal_nan=True)
        assert tensors[0][torch.arange(40) != 17].isfinite().all()


def test_amsgrad_keeps_a_nan():
    for place in (3, 4):
        tensors = [torch.ones(40) for _ in range(5)]
        tensors[place][17] = math.nan
        lk.adamw_(*tensors, step=2, **NUMBERS)
        assert tensors[4].isnan().nonzero().tolist() == [[17]]


@pytest.mark.parametrize("kind", ["float32", "bfloat16, wide state", "bfloat16, master"])
def test_same_bits_for_any_number_of_threads(kind):
    shapes = [(300_001,), *[(40,)] * 30, (70_000,), (64, 2048)]
    lists, (grads,) = made(kind, shapes, amsgrad=True)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        params, first, second, most, masters = copies = [[t.clone() for t in tensors] for tensors in lists]
        options = {"stochastic_rounding": True, "seed": 5} if "wide" in kind else {}
        lk.adamw_(params, grads, first, second, most, step=3, master_params=masters or None, **options)
        results.append([*(t for tensors in copies for t in tensors), lk.adamw_norm(grads)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.every_backend
def test_stochastic_rounding_takes_its_words_of_philox():
    """Parameters are 1 and would become 1 + part * 2 ** -7."""
    count, size, seed, part = 3, 70_001, 2**40 + 7, 0.3125
    params = [torch.ones(size).bfloat16() for _ in range(count)]
    grads = [torch.full((size,), -1.0).bfloat16() for _ in range(count)]
    states = [[torch.zeros(size) for _ in range(count)] for _ in range(2)]
    numbers = {"lr": part * 2**-7, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    lk.adamw_(params, grads, *states, step=1, **numbers, stochastic_rounding=True, seed=seed)
    up = philox.kept(seed, 1 - part, range(1), 1, count, size, params[0].device)[0, 0]
    for i, p in enumerate(params):
        assert torch.equal(p.float(), torch.where(up[i], 1 + 2**-7, 1.0))
    assert abs(up.float().mean() - part) < 0.01


@pytest.mark.every_backend
@pytest.mark.parametrize("way", ["master", "random", "nearest"])
def test_small_steps_are_lost_in_bfloat16_alone(way):
    param, grad = torch.ones(4096).bfloat16(), torch.ones(4096).bfloat16()
    first, second, master = torch.ones(4096), torch.ones(4096), torch.ones(4096)
    options = {"master_params": master} if way == "master" else {"stochastic_rounding": way == "random"}
    for step in range(1, 65):
        numbers = {"lr": 2**-12, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
        lk.adamw_(param, grad, first, second, step=step, **numbers, **options)
    expected = 1.0 if way == "nearest" else 1 - 64 * 2**-12
    torch.testing.assert_close(param.float().mean().item(), expected, rtol=0, atol=1e-3)
    if way == "master":
        assert torch.equal(param, master.bfloat16())


@pytest.mark.every_backend
def test_layouts():
    """Of any order of dimensions; a gradient may lie otherwise."""
    size = (4, 6, 5, 3)
    for fmt in (torch.contiguous_format, torch.channels_last):
        param, *states = (torch.rand(size).contiguous(memory_format=torch.channels_last) for _ in range(3))
        grad = torch.randn(size).contiguous(memory_format=fmt)
        plain = [t.contiguous() for t in (param, grad, *states)]
        lk.adamw_(param, grad, *states, step=2)
        lk.adamw_(*plain, step=2)
        assert all(map(torch.equal, (param, grad, *states), plain))
        assert param.is_contiguous(memory_format=torch.channels_last)


def test_gaps_fall_back():
    tensors = [torch.ones(4, 6)[:, ::2] for _ in range(4)]
    plain = [t.contiguous() for t in tensors]
    with pytest.warns(FallbackWarning, match="adamw_: cpu needs tensors without gaps, got one with gaps"):
        lk.adamw_(*tensors, step=2)
    lk.adamw_(*plain, step=2)
    torch.testing.assert_close(tensors, plain)


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compile_opcheck_and_fakes(mode):
    torch._dynamo.reset()

    def call(params, grads, first, second):
        scale = 1 / (lk.adamw_norm(grads) + 1)
        lk.adamw_(params, [g * 2 for g in grads], first, second, step=2, scale=scale)
        return params[0] + 1

    lists = [[torch.rand(5, 3), torch.rand(4)] for _ in range(4)]
    copies = [[t.clone() for t in tensors] for tensors in lists]
    found = torch.compile(call, fullgraph=True, backend=mode)(*copies)
    torch.testing.assert_close([found, *copies], [call(*lists), *lists])
    step, norm = torch.ops.lspm.adamw.default, torch.ops.lspm.adamw_norm.default
    rest = [], [], None, [1, 1], None, 0.1, 0.9, 0.99, 1e-8, 0.1, False, "cpu"
    torch.library.opcheck(step, (*lists, *rest))
    torch.library.opcheck(norm, (lists[0], "cpu"))
    with FakeTensorMode() as fake:
        assert call(*([fake.from_tensor(t) for t in tensors] for tensors in lists)).shape == (5, 3)
    before = lists[2][1]._version
    call(*lists)
    assert lists[2][1]._version > before
    assert [row.name for row in ops.BACKENDS] == [row.name for row in ops.NORM_BACKENDS] == ["cpu", "triton"]
