"""The Triton kernels of embedding_bag, executed on the CPU (tests/cuda_on_cpu).

They are run as the row of the op's table, so what the op hands to its kernels is tested too.
"""

import dataclasses

import pytest
import torch
from ops.bags import BF16, DTYPES, EMPTY, F32, NO_OFFSETS, OPTIONS, SHAPES, check_no_offsets, made
from ops.test_embedding_bag import bound, check

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import embedding_bag as ops

pytest.importorskip("triton", reason="triton is not installed")

from cuda_on_cpu import triton_driver
from cuda_on_cpu.triton_driver import unwritten

REGISTERS = 65536  # of a multiprocessor: a block that takes more cannot be launched
# The gradient of the table is not among them: torch clears it, and the suite has filled it with NaN.
OUTPUTS = {"forward": (4,), "backward": (6,)}
KINDS = pytest.mark.parametrize("kind", OPTIONS)
FEW = SHAPES[1], SHAPES[5]  # less than a tile; several of them, and a row that goes on in a second chunk
on_one_gpu = pytest.mark.parametrize("gpu", [80], ids=["sm_80"], indirect=True)


@pytest.fixture(autouse=True)
def row_on_the_cpu(monkeypatch):
    """The op runs its Triton kernels, on CPU tensors."""
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    row = next(row for row in ops.BACKENDS if row.name == "triton")
    kernels = {way: unwritten(getattr(row, way), places) for way, places in OUTPUTS.items()}
    here = dataclasses.replace(row, device="cpu", missing=lambda: None, **kernels)
    monkeypatch.setattr(ops, "BACKENDS", (here,))


def check_shapes(shapes, kind, dtype):
    for rows, dim, lengths in shapes:
        indices, offsets, options = made(rows, lengths, kind, dtype)
        check(torch.randn(rows, dim).to(dtype), indices, offsets, **options)


@on_one_gpu
@KINDS
def test_every_option(driver, kind):
    check_shapes(FEW, kind, F32)
    assert {"_forward_kernel", "_parts_kernel", "_rows_kernel"} <= set(driver.launches)
    assert ("_shares_kernel" in driver.launches) == ("mean" in kind)
    assert ("_weights_kernel" in driver.launches) == ("weighted" in kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(driver, dtype):
    check_shapes(SHAPES[5:], "weighted with padding", dtype)
    check_shapes(SHAPES[1:2], "mean with padding", dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@KINDS
def test_every_shape(driver, kind, dtype):
    check_shapes(SHAPES + EMPTY, kind, dtype)


@on_one_gpu
def test_one_element_and_nothing_at_all(driver):
    check_shapes([SHAPES[0], *EMPTY], "mean with padding", F32)
    check_shapes([SHAPES[0], *EMPTY], "weighted", F32)


@on_one_gpu
def test_bags_of_one_length_and_tensors_that_lie_otherwise(driver):
    weight, indices = torch.randn(7, 40).t(), torch.randint(40, (9, 4), dtype=torch.int32).t()
    check(weight, indices, mode="mean", padding_idx=3)
    check(weight, indices, per_sample_weights=torch.randn(9, 4).t())
    check(weight, torch.zeros(3, 0, dtype=torch.int32), mode="mean")


@on_one_gpu
@pytest.mark.parametrize("integers", [(torch.int32, torch.int32), (torch.int32, torch.int64)])
def test_both_types_of_integers(driver, integers):
    weight = torch.randn(7, 3)
    indices, offsets, _ = made(7, [0, 2, 0, 1, 5, 0], "sum", F32)
    expected = lk.embedding_bag(weight, indices, offsets)
    found = lk.embedding_bag(weight, indices.to(integers[0]), offsets.to(integers[1]))
    assert torch.equal(found, expected)
    check(weight, indices.to(integers[0]), offsets.to(integers[1]))


@on_one_gpu
def test_rows_that_go_on_over_many_chunks(driver):
    """More chunks than a tile takes parts; positive terms show what is lost or rounded."""
    for lengths, rows in (([300, 0, 200, 240], 1), ([250, 330], 3)):
        indices, offsets, _ = made(rows, lengths, "sum", F32)
        check(torch.rand(rows, 130), indices, offsets)
    indices = torch.arange(320) // 64  # a row ends where its chunk does
    check(torch.rand(5, 130), indices, torch.tensor([0, 100]))
    check(torch.rand(5, 130), (indices - 1).clamp(min=0), torch.tensor([0, 100]), padding_idx=0)


@on_one_gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 1e-40])
def test_special_values_stay_in_their_bag_and_padding_is_not_read(driver, value):
    weight = torch.randn(6, 3)
    weight[2, 1] = value
    check(weight, torch.tensor([[0, 2], [1, 3], [2, 2]]), gradients=False)
    weights = torch.tensor([[1.0, value], [value, value]], requires_grad=True)
    out = lk.embedding_bag(weight, torch.tensor([[0, 2], [2, 2]]), per_sample_weights=weights, padding_idx=2)
    assert torch.equal(out, torch.stack([weight[0], torch.zeros(3)]))
    (found,) = torch.autograd.grad(out[:, 0].sum(), weights)
    assert torch.equal(found, torch.tensor([[weight[0, 0], 0.0], [0.0, 0.0]]))


@on_one_gpu
def test_an_index_that_is_none_reads_nothing_and_makes_nan(driver):
    weight, weights = torch.randn(4, 3, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    indices = torch.tensor([[0, 1], [4, 0], [-1, 3], [2**40, 3]])
    out = lk.embedding_bag(weight, indices, per_sample_weights=weights)
    assert out.isnan().all(1).tolist() == out.isnan().any(1).tolist() == [False, True, True, True]
    dweight, dweights = torch.autograd.grad(out, (weight, weights), torch.ones(4, 3))
    assert torch.equal(dweight, torch.tensor([2.0, 1.0, 0.0, 2.0])[:, None].expand(4, 3))
    assert torch.equal(dweights.isnan(), torch.tensor([[False] * 2, *[[True, False]] * 3]))
    mean = lk.embedding_bag(weight, indices, mode="mean", padding_idx=0)
    assert mean.isnan().all(1).tolist() == [False, True, True, True]
    assert torch.equal(mean[0], weight[1])


@on_one_gpu
@pytest.mark.parametrize(("offsets", "wrong"), NO_OFFSETS)
def test_offsets_that_are_none_read_nothing_and_make_nan(driver, offsets, wrong):
    check_no_offsets(3, offsets, wrong)


@on_one_gpu
def test_gradients_only_of_what_wants_one(driver):
    weight, weights = torch.randn(5, 3, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    indices = torch.tensor([[1, 4], [4, 0]])
    out = lk.embedding_bag(weight.detach(), indices, per_sample_weights=weights)
    (found,) = torch.autograd.grad(out.sum(), weights)
    torch.testing.assert_close(found, weight.detach()[indices].sum(-1))
    assert driver.launches == ["_forward_kernel", "_weights_kernel"]
    lk.embedding_bag(weight, indices, per_sample_weights=weights.detach()).sum().backward()
    assert driver.launches[2:] == ["_forward_kernel", "_parts_kernel"]


@on_one_gpu
@pytest.mark.parametrize("kind", ["mean with padding", "weighted"])
def test_same_bits_under_any_schedule(driver, kind):
    indices, offsets, options = made(4, [90, 0, 40, 7], kind, BF16)
    tensors = [torch.randn(4, 40).bfloat16()]
    if "per_sample_weights" in options:
        tensors.append(options.pop("per_sample_weights"))
    call, results = bound(lk.embedding_bag, indices, offsets, **options), []
    for driver.seed in range(3):
        results.append(list(oracle.outputs_and_gradients(call, tensors).values()))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


def test_more_bags_than_a_grid_has_programs():
    indices = torch.zeros(2**31, 0, dtype=torch.int64)
    rule = r"embedding_bag: triton needs fewer than 2 \*\* 31 indices and bags, got 2147483648"
    with pytest.raises(NotImplementedError, match=rule):
        lk.embedding_bag(torch.ones(2, 1), indices, backend="triton")


@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90, 100], ids="sm_{}".format)
def test_compiles_without_spills(sm):
    with triton_driver.activated(sm, execute=False) as driver:
        for dtype in DTYPES:
            for dim in (1, 16, 50, 64, 300, 1024):
                for kind in ("mean with padding", "weighted"):
                    indices, offsets, options = made(9, [70, 0, 30], kind, dtype)
                    if "per_sample_weights" in options:
                        options["per_sample_weights"].requires_grad_()
                    weight = torch.randn(9, dim).to(dtype).requires_grad_()
                    lk.embedding_bag(weight, indices, offsets, **options).sum().backward()
    assert driver.resources
    assert not [r for r in driver.resources if r.stack or r.warps * 32 * r.registers > REGISTERS]
