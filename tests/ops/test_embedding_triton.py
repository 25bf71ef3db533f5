"""The Triton kernels of embedding, as Triton compiles them, executed on the CPU (cuda_on_cpu)."""

import dataclasses

import pytest
import torch
from ops.test_embedding import KINDS, N, P, bound, check, drawn, made

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import dropout, embedding_bag, layer_norm
from lspm_kernels.ops import embedding as ops

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


@pytest.fixture(autouse=True)
def rows_on_the_cpu(monkeypatch):
    """The op and those that give its gradients run their Triton kernels, on CPU tensors."""
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the tables as they were
    monkeypatch.setitem(layer_norm._ROWS_A_RUN, "cpu", 16)
    for op in (ops, dropout, embedding_bag, layer_norm):
        row = next(row for row in op.BACKENDS if row.name == "triton")
        here = dataclasses.replace(row, device="cpu", missing=lambda: None)
        if op is ops:
            here = dataclasses.replace(here, forward=triton_driver.unwritten(here.forward, (8, 9)))
        monkeypatch.setattr(op, "BACKENDS", (here,))


@on_one_gpu
@pytest.mark.parametrize(
    "kind",
    ["gpt", "bert", *(pytest.param(k, marks=pytest.mark.long) for k in KINDS if k not in ("gpt", "bert"))],
)
def test_against_the_reference(driver, kind):
    check(kind, drawn(2, 5), made(kind, 64 if kind == "gpt" else 40), dropout_p=0.3, seed=3, padding_idx=1)
    assert driver.launches[0] == "_forward_kernel"


@pytest.mark.long
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_and_width(driver, kind, dtype):
    for dim in (1, 40, 64, 300):
        for p in (0.0, 0.3):
            check(kind, drawn(2, 5), made(kind, dim, dtype), dropout_p=p, seed=3)


@on_one_gpu
@pytest.mark.parametrize(("dim", "dtype"), [(40, BF16), pytest.param(2112, F32, marks=pytest.mark.long)])
def test_rows_that_share_counters_and_blocks_of_columns(driver, dim, dtype):
    """Rows of 40 elements begin within a counter's 64; 2112 are more than a block."""
    tokens, (weight,) = drawn(2, 3, integer=torch.int32), made("tokens", dim, dtype)
    dropped = lk.embedding(tokens, weight, dropout_p=0.4, seed=8)
    assert torch.equal(dropped, lk.dropout(weight[tokens], 0.4, seed=8))
    assert driver.launches[0] == "_forward_kernel"


@on_one_gpu
def test_ids_that_are_none_read_nothing_and_make_nan(driver):
    weight, table = made("gpt", 8)
    tokens = torch.tensor([[0, N, 1], [-1, 2, 2**40]])
    y = lk.embedding(tokens, weight.requires_grad_())
    assert (
        y.isnan().all(-1).tolist()
        == y.isnan().any(-1).tolist()
        == [[False, True, False], [True, False, True]]
    )
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert grad[:4, 0].tolist() == [1.0, 1.0, 1.0, 0.0]
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    places = torch.tensor([0, P, 1])
    y = lk.embedding(tokens, weight, position_weight=table, positions=places)
    assert y.isnan().all(-1).tolist() == [[False, True, False]]


@on_one_gpu
def test_same_bits_under_any_schedule(driver):
    tokens, tensors, results = drawn(2, 5), made("bert", 40), []
    for driver.seed in range(2):
        call = bound(lk.embedding, "bert", tokens, dropout_p=0.3, seed=1)
        results.append(oracle.outputs_and_gradients(call, tensors))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_what_the_kernel_needs():
    one, weight = torch.zeros(1, dtype=torch.int64), torch.ones(1, 16385)
    for given, rule in (
        ((one.expand(2**31), weight), r"fewer than 2 \*\* 31 tokens, got 2147483648"),
        ((one, weight, weight[0]), "D of at most 16384 beside a norm, got 16385"),
    ):
        with pytest.raises(NotImplementedError, match=f"embedding: triton needs {rule}"):
            lk.embedding(*given[:2], norm_weight=given[2] if len(given) > 2 else None, backend="triton")


@pytest.mark.parametrize("sm", [90, *(pytest.param(sm, marks=pytest.mark.long) for sm in (80, 100))])
def test_compiles_without_spills(sm):
    from lspm_kernels.triton import embedding

    with triton_driver.activated(sm, execute=False) as compiling:
        for dim, p in ((768, 0.1), (300, 0.1), (4096, 0.0), (16384, 0.1)):
            tokens, table = torch.zeros(4, dtype=torch.int64), torch.empty(9, dim, dtype=BF16)
            norm, statistics = torch.empty(dim), torch.empty(2, 4)
            embedding.forward(
                tokens, table, None, table, tokens, table, norm, norm, torch.empty(4, dim, dtype=BF16),
                statistics, 0, 4, 1e-5, p, 1.0, 3,
            )  # fmt: skip
    assert compiling.resources
    assert not [r for r in compiling.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
