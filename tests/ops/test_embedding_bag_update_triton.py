"""The Triton kernels of embedding_bag_sgd_, _adagrad_ and _adam_, executed on the CPU (tests/cuda_on_cpu).

They are run as the row of the op's table, so what the op hands to its kernels is tested too.
"""

import dataclasses

import pytest
import torch
from ops import test_embedding_bag_update as on_cpu
from ops.bags import BF16, DTYPES, EMPTY, F32, OPTIONS, SHAPES, made
from ops.test_embedding_bag_update import EACH, UPDATES, check, check_an_index_that_is_none, states_of

import lspm_kernels as lk
from lspm_kernels import dispatch
from lspm_kernels.ops import embedding_bag_update as ops

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver

REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
KINDS = pytest.mark.parametrize("kind", OPTIONS)
FEW = SHAPES[1], SHAPES[5]  # less than a tile; several of them, and a row that goes on in a second chunk
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


@pytest.fixture(autouse=True)
def row_on_the_cpu(monkeypatch):
    """The ops run their Triton kernels, on CPU tensors."""
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    row = next(row for row in ops.BACKENDS if row.name == "triton")
    here = dataclasses.replace(row, device="cpu", missing=lambda: None)
    monkeypatch.setattr(ops, "BACKENDS", (here,))


def check_shapes(shapes, optimizer, kind, dtype, integer=torch.int64):
    for rows, dim, lengths in shapes:
        indices, offsets, options = made(rows, lengths, kind, dtype, integer)
        weight, dout = torch.randn(rows, dim).to(dtype), (torch.randn(len(lengths), dim) / 2).to(dtype)
        given = indices, offsets
        decay = 0.1 * (dim % 2)
        check(optimizer, weight, states_of(optimizer, weight), dout, *given, weight_decay=decay, **options)


@on_one_gpu
@EACH
@pytest.mark.parametrize("kind", ["mean with padding", "weighted with padding"])
def test_every_optimizer(driver, optimizer, kind):
    check_shapes(FEW, optimizer, kind, F32)
    assert {"_parts_kernel", "_rows_kernel"} <= set(driver.launches)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(driver, dtype):
    check_shapes(FEW, "adagrad", "weighted", dtype, torch.int32)
    check_shapes(SHAPES[1:2], "adam", "mean", dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@KINDS
@EACH
def test_every_shape(driver, optimizer, kind, dtype):
    check_shapes(SHAPES + EMPTY, optimizer, kind, dtype)


@on_one_gpu
def test_one_element_and_nothing_at_all(driver):
    for optimizer in UPDATES:
        check_shapes([SHAPES[0], *EMPTY], optimizer, "sum", F32)


@on_one_gpu
@EACH
def test_a_row_that_goes_on_over_many_chunks_changes_once(driver, optimizer):
    """More chunks than a tile takes parts; and rows that end where their chunk does."""
    for indices, dim in ((torch.randint(2, (740,)), 70), (torch.arange(192) // 64, 300)):
        weight, offsets = torch.rand(3, dim), torch.tensor([0, 100, 101])
        dout = torch.rand(3, dim) / 64
        check(optimizer, weight, states_of(optimizer, weight), dout, indices, offsets, weight_decay=0.1)


@on_one_gpu
@pytest.mark.parametrize("dim", [513, 1024])
def test_adagrad_takes_a_whole_row(driver, dim):
    weight, dout = torch.randn(3, dim), torch.randn(2, dim)
    indices = torch.tensor([[0] * 40, [2] * 40])
    check("adagrad", weight, states_of("adagrad", weight), dout, indices, None)


@on_one_gpu
@EACH
def test_rows_in_no_bag_and_padding_do_not_change(driver, optimizer):
    on_cpu.test_rows_in_no_bag_and_padding_do_not_change(optimizer)


@on_one_gpu
@EACH
def test_special_values_stay_in_their_rows(driver, optimizer):
    on_cpu.test_special_values_stay_in_their_rows(optimizer)


@on_one_gpu
@EACH
def test_an_index_that_is_none_changes_no_row(driver, optimizer):
    check_an_index_that_is_none(optimizer, 3)


@pytest.mark.parametrize("gpu", [80, 90], ids="sm_{}".format, indirect=True)
@pytest.mark.parametrize("dim", [5, 64, 150])
def test_stochastic_rounding_draws_what_the_cpu_draws(driver, dim):
    """Of sums, weights and steps that are exact, so that what is lost is the same."""
    indices, offsets, _ = made(9, [70, 0, 3], "sum", BF16)
    weight, dout = torch.ones(9, dim).bfloat16(), torch.randint(-3, 4, (3, dim)).bfloat16()
    for seed in (7, 2**62 + 5):
        options = {"lr": 2.0**-11, "stochastic_rounding": True, "seed": seed}
        found = lk.embedding_bag_sgd_(weight.clone(), dout, indices, offsets, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops, "BACKENDS", CPU)
            expected = lk.embedding_bag_sgd_(weight.clone(), dout, indices, offsets, **options, backend="cpu")
        assert torch.equal(found, expected)


CPU = tuple(row for row in ops.BACKENDS if row.name == "cpu")


@on_one_gpu
def test_stochastic_rounding_takes_its_words_of_philox_and_leaves_a_nan(driver):
    on_cpu.test_stochastic_rounding_takes_its_words_of_philox()
    on_cpu.test_stochastic_rounding_leaves_a_nan_whose_bits_are_all_set()


@on_one_gpu
@EACH
def test_same_bits_under_any_schedule(driver, optimizer):
    function, _, settings = UPDATES[optimizer]
    indices, offsets, options = made(4, [90, 0, 40, 7], "weighted", BF16)
    weight, dout = torch.randn(4, 40).bfloat16(), torch.randn(4, 40).bfloat16()
    states, results = states_of(optimizer, weight), []
    options |= {"stochastic_rounding": True, "seed": 5}
    for driver.seed in range(3):
        results.append([t.clone() for t in (weight, *states)])
        function(*results[-1], dout, indices, offsets, **settings, **options)
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


def test_what_the_row_refuses():
    indices = torch.zeros(2**31, 0, dtype=torch.int64)
    for message, weight, dout in (
        ("embedding_bag_adagrad_: triton needs D of at most 1024 for adagrad, got 1025",
         torch.ones(2, 1025), torch.ones(1, 1025)),
        ("embedding_bag_adagrad_: triton needs fewer than 2 ** 31 indices and bags, got 2147483648",
         torch.ones(2, 1), torch.ones(1).expand(2**31, 1)),
    ):  # fmt: skip
        given = weight, torch.zeros(2), dout, indices[: len(dout)]
        with pytest.raises(NotImplementedError) as error:
            lk.embedding_bag_adagrad_(*given, lr=0.1, backend="triton")
        assert str(error.value) == message


@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90, 100], ids="sm_{}".format)
def test_compiles_without_spills(sm):
    with triton_driver.activated(sm, execute=False) as driver:
        for optimizer, (function, _, settings) in UPDATES.items():
            for dtype in DTYPES:
                for dim in (1, 50, 64, 300, 1024):
                    indices, offsets, options = made(9, [70, 0, 30], "weighted", dtype)
                    weight, dout = torch.randn(9, dim).to(dtype), torch.randn(3, dim).to(dtype)
                    given = (weight, *states_of(optimizer, weight), dout, indices, offsets)
                    options |= {"weight_decay": 0.1, "stochastic_rounding": dtype == BF16}
                    function(*given, **settings, **options)
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
