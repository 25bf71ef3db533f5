"""sample: special values, bad arguments, and every part of torch that meets it."""

from functools import partial

import pytest
import torch
from ops.matrices import same_for_any_number_of_threads
from ops.test_sample import BF16, DTYPES, F32, INF, METHODS, MIXES, NAN, check, with_previous
from torch._subclasses.fake_tensor import FakeTensorMode

import lspm_kernels as lk
from lspm_kernels import compiled
from lspm_kernels.ops import sample as ops


@pytest.mark.every_backend
@METHODS
def test_infinite_logits_are_never_drawn(method):
    logits = torch.full((500, 700), -INF)
    logits[:, [3, 650]] = torch.tensor([1.0, 1.0])
    for options in ({}, {"top_k": 600}, {"top_p": 0.99}, {"temperature": 1e30}, {"temperature": 1e-30}):
        assert set(check(logits, method=method, seed=0, **options)[0].tolist()) == {3, 650}
    logits[:, 3] = -INF
    for options in MIXES:
        drawn, logprob = check(logits, method=method, seed=0, **with_previous(options, 500, 700))
        assert (drawn == 650).all() and not logprob.any()


@pytest.mark.every_backend
@METHODS
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_a_distribution_gives_minus_1(method, dtype):
    logits = torch.randn(6, 70).to(dtype)
    logits[0, 69] = logits[1, 0] = NAN
    logits[2, 5] = INF
    logits[3] = -INF
    logits[3, 1:3] = NAN
    logits[4] = -INF
    for options in MIXES:
        drawn, logprob = check(logits, method=method, seed=1, **with_previous(options, 6, 70))
        assert (drawn[:5] == -1).all() and 0 <= drawn[5] < 70
        assert logprob.isnan().tolist() == [True] * 5 + [False]


@pytest.mark.every_backend
@METHODS
def test_huge_logits(method):
    logits = torch.tensor([[-INF, 3e38, -3e38, 3e38]]).repeat(200, 1)
    for options in ({}, {"temperature": 1e-3}, {"temperature": 1e3}, {"top_p": 0.9}, {"top_k": 2}):
        assert set(check(logits, method=method, seed=0, **options)[0].tolist()) == {1, 3}


@pytest.mark.every_backend
@METHODS
def test_greedy_takes_the_first_of_the_largest(method):
    logits = torch.randn(7, 300)
    logits[:, [250, 131, 299]] = 9.0
    drawn, logprob = check(logits, temperature=0, method=method, seed=0, top_p=0.4, top_k=1)
    assert (drawn == 131).all() and not logprob.any()
    zeros = torch.tensor([[-1.0, -0.0, 0.0]])
    assert check(zeros, temperature=0)[0].tolist() == [1]
    assert set(check(zeros.repeat(200, 1), top_k=1, method=method, seed=0)[0].tolist()) == {1, 2}


@pytest.mark.every_backend
def test_a_temperature_for_each_row():
    logits, temperature = (
        torch.randn(4, 2, 50) * 3,
        torch.tensor([[0.0, 0.7], [1.0, 0.0], [3.0, 1e-30]] * 2)[:4],
    )
    drawn, logprob = check(logits, temperature=temperature, seed=8)
    assert torch.equal(drawn[temperature == 0], logits.argmax(-1)[temperature == 0])
    for row in range(8):
        t = temperature.flatten()[row].item()
        alone, its = check(logits, temperature=t, seed=8)
        assert alone.flatten()[row] == drawn.flatten()[row] and its.flatten()[row] == logprob.flatten()[row]


@pytest.mark.every_backend
@METHODS
def test_a_draw_depends_on_the_rows_number_alone(method):
    logits = torch.randn(9, 900)
    options = {"method": method, "seed": 4, "top_p": 0.9}
    drawn = lk.sample(logits, **options)
    other = torch.cat([torch.randn(4, 900) * 9, logits[4:5], torch.full((2, 900), NAN)])
    assert lk.sample(other, **options)[4] == drawn[4]
    assert len(set(lk.sample(logits[:1].expand(64, 900), **options).tolist())) > 32
    assert not torch.equal(lk.sample(logits, **options | {"seed": 5}), drawn)


@METHODS
def test_the_same_bits_for_any_number_of_threads(method):
    logits = torch.randn(20, 9000).to(BF16)
    call = partial(lk.sample, logits, method=method, seed=3, top_p=0.95, top_k=4000)
    assert same_for_any_number_of_threads(call)


@pytest.mark.every_backend
def test_the_penalty_is_for_each_token_once():
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.0]])
    weights = torch.tensor([1.0, -2.0, 0.5, 1.0]).exp()
    previous = torch.tensor([[0, 1, 0, -1, 1, -5]])
    for seed in range(20):
        drawn, logprob = check(logits, repetition_penalty=2.0, previous=previous, seed=seed)
        expected = (weights[drawn] / weights.sum()).log()
        torch.testing.assert_close(logprob, expected)
    assert check(logits, repetition_penalty=5.0, previous=previous, temperature=0)[0].tolist() == [3]
    check(logits, repetition_penalty=2.0, previous=previous[:, :0], seed=0)


@pytest.mark.every_backend
def test_any_leading_shape_and_memory_that_is_not_contiguous():
    wide = torch.randn(3, 2, 200)
    logits = wide[..., ::2]
    drawn, logprob = check(logits, seed=6, top_p=0.9)
    assert drawn.shape == logprob.shape == (3, 2)
    assert torch.equal(drawn.flatten(), lk.sample(logits.reshape(6, 100), seed=6, top_p=0.9))
    assert lk.sample(logits[0, 0], seed=6).shape == ()
    assert check(torch.randn(0, 5), seed=1)[0].shape == (0,)
    assert check(torch.randn(2, 0, 5), seed=1)[0].shape == (2, 0)


@pytest.mark.parametrize("method", ["inverse", pytest.param("gumbel", marks=pytest.mark.long)])
@pytest.mark.parametrize("tokens", [50257, 151936])
def test_vocabularies_of_real_models(method, tokens):
    logits = torch.randn(2, tokens).to(BF16) * 4  # with many ties
    for options in ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": tokens - 1, "top_p": 0.5, "min_p": 1e-4}):
        check(logits, method=method, seed=5, **options)


def test_scores_in_order():
    """Where each passes the best so far, from which the k best are picked again and again."""
    for logits in (torch.arange(3000.0), torch.arange(3000.0).flip(0)):
        for k in (1, 63, 64, 1500, 2999, 3000, 9999):
            check(logits / 300 - 20, top_k=k, seed=0)  # below 0, which lies beyond them


def test_without_a_seed_torchs_default_generator_gives_one():
    logits = torch.zeros(4, 1000)
    torch.manual_seed(3)
    first = lk.sample(logits)
    assert not torch.equal(lk.sample(logits), first)
    torch.manual_seed(3)
    assert torch.equal(lk.sample(logits), first)
    state = torch.get_rng_state()
    lk.sample(logits, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


X, P = torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.int64)
FINITE = "temperature must be finite and at least 0"
BAD = {
    "logits must be a floating-point tensor of one dimension or more, got list": ([1.0], {}),
    "logits must be a floating-point tensor of one dimension or more, got () torch.float32": (X.sum(), {}),
    "logits must be a floating-point tensor of one dimension or more, got (2, 3) torch.int64": (P, {}),
    "logits must be of 1 to 2097151 tokens, got 0": (X[:, :0], {}),
    "logits must be of 1 to 2097151 tokens, got 2097152": (torch.zeros(1).expand(2**21), {}),
    f"{FINITE}, got -0.5": (X, {"temperature": -0.5}),
    f"{FINITE}, got nan": (X, {"temperature": NAN}),
    f"{FINITE}, got -1.0": (X, {"temperature": torch.tensor([1.0, -1.0])}),
    f"{FINITE}, got inf": (X, {"temperature": torch.tensor([INF, -1.0])}),
    "temperature must be a number or a floating-point tensor of shape (2,), got (3,) torch.float32": (
        X, {"temperature": torch.ones(3)},
    ),
    "temperature must be a number or a floating-point tensor of shape (2,), got (2,) torch.int64": (
        X, {"temperature": P[:, 0]},
    ),
    "temperature must be on logits' device cpu, got meta": (X, {"temperature": torch.ones(2, device="meta")}),
    "top_k must be an integer from 1 to 2 ** 63 - 1, got 0": (X, {"top_k": 0}),
    "top_k must be an integer from 1 to 2 ** 63 - 1, got 2.0": (X, {"top_k": 2.0}),
    "top_k must be an integer from 1 to 2 ** 63 - 1, got True": (X, {"top_k": True}),
    "top_p must be in (0, 1], got 0": (X, {"top_p": 0}),
    "top_p must be in (0, 1], got 1.5": (X, {"top_p": 1.5}),
    "top_p must be in (0, 1], got '0.9'": (X, {"top_p": "0.9"}),
    "min_p must be in [0, 1], got '0.1'": (X, {"min_p": "0.1"}),
    "repetition_penalty must be above 0 and finite, got None": (X, {"repetition_penalty": None}),
    "top_p must be in (0, 1], got nan": (X, {"top_p": NAN}),
    "min_p must be in [0, 1], got -0.1": (X, {"min_p": -0.1}),
    "min_p must be in [0, 1], got nan": (X, {"min_p": NAN}),
    "repetition_penalty must be above 0 and finite, got 0": (X, {"repetition_penalty": 0}),
    "repetition_penalty must be above 0 and finite, got nan": (X, {"repetition_penalty": NAN}),
    "method must be one of inverse, gumbel, got 'alias'": (X, {"method": "alias"}),
    "seed must be an integer from 0 to 2 ** 63 - 1, got -1": (X, {"seed": -1}),
    "previous must be a tensor of shape (2, T), got (1, 3)": (X, {"previous": P[:1]}),
    "previous must be a tensor of shape (2, T), got list": (X, {"previous": [1]}),
    "previous must have dtype torch.int64, got torch.int32": (X, {"previous": P.int()}),
    "previous must be on logits' device cpu, got meta": (X, {"previous": P.to("meta")}),
    "previous must be below 5, got 5": (X, {"previous": P + 5, "repetition_penalty": 1.1}),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message, backend):
    logits, options = BAD[message]
    with pytest.raises(ValueError) as error:
        lk.sample(logits, **options, backend=backend)
    assert str(error.value) == f"sample: {message}"


def test_the_binding_refuses_what_would_touch_other_memory():
    tokens, logprobs = torch.empty(2, dtype=torch.int64), torch.empty(2)
    given = {"logits": X, "temperatures": None, "previous": P, "tokens": tokens, "logprobs": logprobs}
    given |= {"temperature": 1.0, "top_k": 2, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    given |= {"gumbel": False, "seed": 0, "threads": 1}
    for message, wrong in {
        "logits must have 2 dimensions": {"logits": X[0]},
        "logits must be of 1 to 2097151 tokens": {"logits": X[:, :0]},
        "logits must be contiguous": {"logits": torch.zeros(5, 2).t()},
        "top_k must be at least 1, got 0": {"top_k": 0},
        "temperatures must have another number": {"temperatures": torch.ones(3)},
        "previous must have another number": {"previous": torch.zeros(5, dtype=torch.int64)},
        "tokens must have another number": {"tokens": tokens[:1]},
        "logprobs must have another number": {"logprobs": logprobs[:1]},
    }.items():
        with pytest.raises(ValueError, match=message):
            compiled.cpu.sample_forward(**given | wrong)


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "triton"]
    with pytest.raises(NotImplementedError, match="sample: triton needs a tensor on cuda, got cpu"):
        lk.sample(X, backend="triton")
    with pytest.warns(lk.FallbackWarning, match="sample: cpu needs dtype float32, bfloat16, float16"):
        assert torch.equal(lk.sample(X.double(), seed=1), lk.sample(X, seed=1))


def test_a_gradient_is_an_error():
    drawn, logprob = lk.sample(torch.zeros(2, 5, requires_grad=True), return_logprob=True)
    assert not drawn.requires_grad
    with pytest.raises(NotImplementedError, match="sample: a draw has no gradient: take the log-softmax"):
        logprob.sum().backward()


def test_compile_and_opcheck():
    torch._dynamo.reset()
    of_torch = torch.compile(lk.sample, fullgraph=True, backend="aot_eager")
    for rows in (3, 4, 5):
        logits, temperature = torch.randn(rows, 60), torch.rand(rows)
        options = {"top_p": 0.9, "seed": 7, "return_logprob": True}
        options |= {"previous": torch.randint(60, (rows, 4)), "repetition_penalty": 1.3}
        for given in ({}, {"temperature": temperature}):
            ours, plain = (f(logits, **options, **given) for f in (of_torch, lk.sample))
            assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])
    for optional in ((None, None), (temperature, options["previous"])):
        given = logits, *optional, torch.tensor(3), 1.0, 5, 0.9, 0.1, 1.2, False, True, "cpu"
        torch.library.opcheck(torch.ops.lspm.sample.default, given)


def test_fake_and_meta():
    with FakeTensorMode() as mode:
        fake = lk.sample(mode.from_tensor(torch.randn(3, 4, 9)), top_k=2, return_logprob=True)
    meta = lk.sample(torch.empty(3, 4, 9, device="meta"), top_k=2, top_p=0.5, return_logprob=True)
    for drawn, logprob in (fake, meta):
        assert drawn.shape == logprob.shape == (3, 4)
        assert drawn.dtype == torch.int64 and logprob.dtype == F32
    assert meta[0].is_meta
