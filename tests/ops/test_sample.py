"""sample: the public function, under every instruction set."""

import math

import pytest
import torch

import lspm_kernels as lk
from lspm_kernels.ops import sample as ops
from lspm_kernels.reference import sample as reference
from lspm_kernels.reference.philox import words_of
from lspm_kernels.reference.sample_numbers import exp, exponentials

F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")
METHODS = pytest.mark.parametrize("method", ["inverse", "gumbel"])
MIXES = [
    {},
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.95},
    {"top_k": 3},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.01},
    {"top_p": 0.3, "repetition_penalty": 1.7},
    {"temperature": 4.0, "top_p": 0.999},
    {"min_p": 0.2, "temperature": 1.5},
    {"top_k": 700, "temperature": 0.3, "repetition_penalty": 0.6},
]


def previous_of(rows, tokens):
    """With repetitions, and padding in every row."""
    return torch.cat([torch.randint(tokens, (rows, 20)), torch.full((rows, 3), -1)], 1)


def with_previous(options, rows, tokens):
    return options | ({"previous": previous_of(rows, tokens)} if "repetition_penalty" in options else {})


def check(logits, **options):
    """Tokens and the logs of their probabilities have the reference's bits."""
    ours = lk.sample(logits, return_logprob=True, **options)
    theirs = lk.sample(logits, return_logprob=True, **options, backend="reference")
    assert ours[0].dtype == torch.int64 and ours[1].dtype == F32
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=0, equal_nan=True)
    return ours


def check_all(method, dtype, sizes=(1, 2, 15, 64, 511, 513, 3000)):
    for tokens in sizes:
        logits = (torch.randn(5, tokens) * 3).to(dtype)
        for seed, options in enumerate(MIXES):
            check(logits, method=method, seed=seed, **with_previous(options, 5, tokens))


@pytest.mark.every_backend
@METHODS
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_reference(method, dtype):
    check_all(method, dtype)


@METHODS
def test_every_instruction_set(isa, method):
    for dtype in DTYPES:
        check_all(method, dtype, sizes=(1, 40, 1025))
    check(torch.randn(2, 50257) * 3, method=method, seed=1, top_p=0.9)


def processed(logits, previous, options):
    """What transformers' own processors leave of logits, in the order of its generate()."""
    of = pytest.importorskip("transformers.generation.logits_process", reason="transformers is not installed")
    kinds = {
        "repetition_penalty": of.RepetitionPenaltyLogitsProcessor,
        "temperature": of.TemperatureLogitsWarper,
        "top_k": of.TopKLogitsWarper,
        "top_p": of.TopPLogitsWarper,
        "min_p": of.MinPLogitsWarper,
    }
    for name, kind in kinds.items():
        if name in options:
            logits = kind(options[name])(previous, logits)
    return logits


@pytest.mark.parametrize("options", [mix for mix in MIXES if mix.get("temperature") != 0], ids=str)
@pytest.mark.parametrize("tokens", [30, 1000, 50257])
def test_what_stays_is_what_stays_in_transformers(options, tokens):
    logits = torch.randn(6, tokens) * 3
    previous = torch.randint(tokens, (6, 20))
    expected = processed(logits.clone(), previous, options)
    given = {"top_k": ops._MOST, "top_p": 1.0, "min_p": 0.0} | options
    temperature = torch.full((6, 1), given.pop("temperature", 1.0))
    penalty = given.pop("repetition_penalty", 1.0)
    weights = reference.weights(logits, temperature, **given, penalty=penalty, previous=previous)
    far = 27.5  # below the largest, where float32's sums of probabilities hold nothing either
    assert torch.equal(weights > 0, expected >= expected.amax(1, keepdim=True) - far)
    drawn, logprob = lk.sample(logits, previous=previous, seed=3, return_logprob=True, **options)
    torch.testing.assert_close(
        logprob, expected.double().log_softmax(1).gather(1, drawn[:, None])[:, 0].float(), rtol=0, atol=3e-6
    )


def test_all_ties_at_the_top_ks_threshold_stay_as_in_transformers():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0]]).repeat(400, 1)
    drawn = lk.sample(logits, top_k=2, seed=0)
    assert set(drawn.tolist()) == {1, 2, 3, 5}
    assert (processed(logits[:1], None, {"top_k": 2}) > -INF).nonzero()[:, 1].tolist() == [1, 2, 3, 5]


@pytest.mark.every_backend
def test_ties_at_the_top_ps_threshold_stay_or_go_together():
    logits = torch.tensor([[0.5, 0.125, 0.125, 0.25]]).log().repeat(400, 1)
    assert set(lk.sample(logits, top_p=0.76, seed=0).tolist()) == {0, 1, 2, 3}
    assert set(lk.sample(logits, top_p=0.74, seed=0).tolist()) == {0, 3}


def assert_drawn_from(counts, probabilities):
    """Pearson's chi-squared test, which a right sampler fails once in a million seeds; this one is fixed."""
    expected = torch.tensor(probabilities, dtype=torch.float64) * counts.sum()
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert torch.special.gammaincc((possible.sum() - 1).double() / 2, statistic / 2) > 1e-6


@METHODS
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1 / 8, 1 / 2, 1 / 16, 1 / 4, 1 / 16]),
        ({"temperature": 0.5}, [4, 64, 1, 16, 1]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3, 0]),
        ({"top_p": 0.76}, [1 / 7, 4 / 7, 0, 2 / 7, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.84}, [0, 2 / 3, 0, 1 / 3, 0]),  # of 4/7 + 2/7 + 1/7; alone, 0.84 keeps three
        ({"min_p": 0.24}, [1 / 7, 4 / 7, 0, 2 / 7, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e300}, [1] * 5),
    ],
    ids=str,
)
def test_draws_have_the_distribution(method, options, expected):
    expected = [p / sum(expected) for p in expected]
    logits = torch.tensor([1 / 8, 1 / 2, 1 / 16, 1 / 4, 1 / 16]).log()
    by_row = lk.sample(logits.expand(20_000, 5), method=method, seed=1, **options)
    by_seed = [lk.sample(logits, method=method, seed=seed, **options) for seed in range(1500)]
    for drawn in (by_row, torch.stack(by_seed)):
        if max(expected) == 1:
            assert set(drawn.tolist()) == {expected.index(1)}
        else:
            assert_drawn_from(drawn.bincount(minlength=5), expected)


@METHODS
def test_rare_tokens_are_drawn_as_often_as_they_should_be(method):
    """Of 50,000 equal ones and one half: what random numbers of too few bits get wrong."""
    logits = torch.zeros(2000, 50_001)
    logits[:, 777] = math.log(50_000)
    drawn = lk.sample(logits, method=method, seed=2)
    others = drawn[drawn != 777]
    counts = torch.tensor([len(drawn) - len(others), *(others // 12_501).bincount(minlength=4)])
    assert_drawn_from(counts, [1 / 2, *[1 / 8] * 4])
    assert len(others.unique()) > 0.97 * len(others)


@pytest.mark.every_backend
def test_numbers_near_0_decide_a_race_of_many():
    """By this seed the least two of 150,000 numbers differ by less than float32 has bits for beside 1."""
    drawn, _ = check(torch.zeros(1, 150_000), method="gumbel", seed=328)
    assert drawn.tolist() == [122_487]


def philox(seed, counter):
    """Philox4x32-10 in Python's integers."""
    x, keys = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [b >> 32 ^ x[1] ^ keys[0], b & 0xFFFFFFFF, a >> 32 ^ x[3] ^ keys[1], a & 0xFFFFFFFF]
        keys = [keys[0] + 0x9E3779B9 & 0xFFFFFFFF, keys[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return x


def test_philox_gives_the_words_of_its_authors():
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123's kat_vectors
    assert philox(0, [0] * 4) == expected
    assert [int(w) for w in words_of([torch.zeros(1, dtype=torch.int64)] * 4, 0)] == expected


@pytest.mark.every_backend
def test_inverse_transform_by_a_scalar_oracle():
    rows, tokens, seed = 300, 97, 0x123456789ABCDEF
    logits = torch.randn(rows, tokens) * 2
    drawn = lk.sample(logits, temperature=0.8, seed=seed).tolist()
    for row, scores in enumerate(logits.double().tolist()):
        words = philox(seed, [0, row, 0, 0])
        u = ((words[0] >> 1 << 31) + (words[1] >> 1) + 0.5) / 2**62
        weights = [math.exp((s - max(scores)) / 0.8) for s in scores]
        place, token = u * sum(weights), 0
        while place >= weights[token]:
            place -= weights[token]
            token += 1
        assert drawn[row] == token


@pytest.mark.every_backend
def test_gumbels_maximum_by_a_scalar_oracle():
    rows, tokens, seed = 60, 150, 5
    logits = torch.randn(rows, tokens) * 2
    drawn = lk.sample(logits, method="gumbel", seed=seed).tolist()
    for row, scores in enumerate(logits.double().tolist()):
        gumbel = []
        for i, score in enumerate(scores):
            word = philox(seed, [i // 64 * 16 + i % 16, row, 0, 0])[i // 16 % 4]
            gumbel.append(score - math.log(-math.log1p(-((word >> 1) + 0.5) / 2**31)))
        assert drawn[row] == gumbel.index(max(gumbel))


def test_exp_and_the_exponential_numbers_are_as_exact_as_float32():
    x = torch.linspace(0, -27.4, 100_001)
    error = (exp(x).double() / x.double().exp() - 1).abs().max()
    assert error < 2 * torch.finfo(F32).eps and exp(torch.tensor([0.0, -28.0, -INF])).tolist() == [1, 0, 0]
    e = exponentials(torch.tensor(3), 2, 70_000, torch.device("cpu"))
    assert e.min() > 0
    for row, i in ((0, 0), (1, 17), (1, 69_999), divmod(int(e.argmin()), 70_000)):
        v = ((philox(3, [i // 64 * 16 + i % 16, row, 0, 0])[i // 16 % 4] >> 1) + 0.5) / 2**31
        assert math.isclose(e[row, i].item(), -math.log1p(-v), rel_tol=4e-7)
