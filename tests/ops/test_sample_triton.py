"""The Triton kernels of sample, executed on the CPU as a row of the op's table: the bits of the reference."""

import dataclasses

import pytest
import torch
from ops.test_sample import BF16, DTYPES, F32, INF, MIXES, NAN, check, with_previous

import lspm_kernels as lk
from lspm_kernels import dispatch
from lspm_kernels.ops import sample as ops

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver
from cuda_on_cpu.triton_driver import unwritten

REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
MANY = 2100  # tokens: more than a tile
METHODS = ("inverse", "gumbel")
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


@pytest.fixture(autouse=True)
def row_on_the_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    row = next(row for row in ops.BACKENDS if row.name == "triton")
    forward = unwritten(row.forward, (3, 4))
    here = dataclasses.replace(row, device="cpu", missing=lambda: None, forward=forward)
    monkeypatch.setattr(ops, "BACKENDS", (here,))


def special(tokens, dtype=F32):
    """Rows with and without a distribution, and ties on both sides of every threshold."""
    logits = (torch.randn(7, tokens) * 3).to(dtype)
    logits[1] = logits[1].round()
    logits[2, tokens // 2] = NAN
    logits[3, -1] = INF
    logits[4] = -INF
    logits[5, : tokens - 2] = -INF
    return logits


@on_one_gpu
def test_every_filter_at_once(driver):
    temperature = torch.tensor([0.7, 1.0, 1.0, 1.0, 1.0, 2.0, 0.0])
    options = {"temperature": temperature, "top_k": 50, "top_p": 0.8, "min_p": 0.02}
    options |= {"repetition_penalty": 1.7}
    for driver.seed, tokens in enumerate((MANY, 64)):  # the schedule's, too
        options["previous"] = torch.randint(-2, tokens + 2, (7, 300)).clamp(max=tokens - 1)
        drawn, _ = check(special(tokens), seed=2**62 + 5, **options)
        assert (drawn[2:5] == -1).all()
    assert driver.launches == ["_penalty_kernel", "_forward_kernel"] * 2


@on_one_gpu
def test_the_race(driver):
    for tokens in (MANY, 17):
        check(special(tokens), method="gumbel", seed=3, min_p=1e-3)


@pytest.mark.long
@on_one_gpu
def test_a_previous_token_that_is_none_has_no_effect(driver):
    logits, previous = torch.randn(2, 90), torch.tensor([[5, 90, -1], [2**40, 3, -(2**40)]])
    drawn, logprob = lk.sample(logits, previous=previous, repetition_penalty=3.0, seed=1, return_logprob=True)
    known = previous.where((previous >= 0) & (previous < 90), -1)
    expected = lk.sample(
        logits, previous=known, repetition_penalty=3.0, seed=1, return_logprob=True, backend="reference"
    )
    assert torch.equal(drawn, expected[0])
    assert torch.equal(logprob, expected[1])


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_every_mix(driver, method, dtype):
    for seed, options in enumerate(MIXES):
        for tokens in (MANY, 2048, 1):
            logits = special(tokens, dtype) if tokens > 1 else torch.zeros(7, 1).to(dtype)
            check(logits, method=method, seed=seed, **with_previous(options, 7, tokens))
    for temperature in (1e-30, 1e30):
        check(special(100, dtype), method=method, seed=1, temperature=temperature)


@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90, 100], ids="sm_{}".format)
def test_compiles_without_spills(sm):
    with triton_driver.activated(sm, execute=False) as driver:
        for dtype in (F32, BF16):
            for method in METHODS:
                for options in MIXES:
                    given = with_previous(options, 3, 300)
                    lk.sample(torch.randn(3, 300).to(dtype), method=method, return_logprob=True, **given)
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
