"""The CUDA kernels of embedding_bag, executed on the CPU (tests/cuda_on_cpu).

They run as a row of the op's table, on copies of the tensors in emulated device memory, so what the op hands
to its kernels is tested too.
"""

import ctypes
import dataclasses

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.library import FLAVOURS, check_messages, fixture, run_tests_under_asan
from ops.bags import BF16, EMPTY, F16, F32, NO_OFFSETS, OPTIONS, SHAPES, check_no_offsets, made
from ops.test_embedding_bag import bound, check

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import embedding_bag as ops

DTYPES = {F32: 0, BF16: 1, F16: 2}
INTEGERS = {torch.int32: 5, torch.int64: 3}
KINDS = pytest.mark.parametrize("kind", OPTIONS)

library = fixture(build.ROOT / "csrc/cuda/embedding_bag.cu", build.HERE / "entries/embedding_bag.cpp")


class Kernels:
    """The kernels of the op's row, and where and how they run."""

    def __init__(self, library):
        self.library, self.misaligned, self.where = library, (), (0, None)

    def copy(self, name, tensor):
        return self.library.copy(tensor, name in self.misaligned)

    def empty(self, name, like):
        if like is not None:
            return self.library.empty(like.shape, like.dtype, name in self.misaligned)

    def shape(self, rows, of_bags, indices, offsets, padding_idx, mean):
        entry = self.library.c.embedding_bag_shape
        entry.restype = ctypes.c_void_p
        bags, dim = of_bags.shape
        sizes = rows, dim, bags, indices.numel(), padding_idx, 0 if offsets is None else offsets.numel()
        codes = DTYPES[of_bags.dtype], INTEGERS[indices.dtype]
        return ctypes.c_void_p(entry((ctypes.c_int64 * 6)(*sizes), int(mean), *codes)), *self.where

    def forward(self, weight, indices, offsets, per_sample_weights, out, padding_idx, mean):
        given = (self.library.copy(t) for t in (indices, offsets, per_sample_weights))
        made = self.empty("out", out)
        shape = self.shape(len(weight), out, indices, offsets, padding_idx, mean)
        self.library.call("embedding_bag_forward", self.copy("weight", weight), *given, made, *shape)
        out.copy_(made.tensor())

    def backward(self, dout, weight, indices, offsets, per_sample_weights, bag_of, *rest):
        rows, order, shares, parts, dweight, dweights, padding_idx, mean = rest
        given = (self.library.copy(t) for t in (indices, offsets, per_sample_weights, bag_of, rows, order))
        tables = self.copy("dout", dout), self.copy("weight", weight), *given
        between = self.empty("", shares), self.empty("parts", parts)
        # Of the table the kernels write some rows, of the other gradient all.
        made = self.copy("dweight", dweight), self.empty("", dweights)
        length = len(dweight if weight is None else weight)
        shape = self.shape(length, dout, indices, offsets, padding_idx, mean)
        self.library.call("embedding_bag_backward", *tables, *between, *made, *shape)
        for to, buffer in zip((dweight, dweights), made, strict=True):
            if to is not None:
                to.copy_(buffer.tensor())


@pytest.fixture
def kernels(library, monkeypatch):
    """The op runs these kernels, on CPU tensors."""
    kernels = Kernels(library)
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    row = next(row for row in ops.BACKENDS if row.name == "cuda")
    here = dataclasses.replace(row, device="cpu", missing=lambda: None, forward=kernels.forward)
    monkeypatch.setattr(ops, "BACKENDS", (here,))
    monkeypatch.setattr(ops, "_cuda_backward", kernels.backward)
    return kernels


def check_shapes(shapes, kind, dtype, integer=torch.int64):
    for rows, dim, lengths in shapes:
        indices, offsets, options = made(rows, lengths, kind, dtype, integer)
        check(torch.randn(rows, dim).to(dtype), indices, offsets, **options)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(kernels, kind, dtype):
    check_shapes(SHAPES + EMPTY, kind, dtype)


@pytest.mark.parametrize("dim", [2, 7, 8, 16, 32, 60, 128, 136, 512])
def test_any_number_of_columns(kernels, dim):
    for dtype in (F32, BF16):
        check_shapes([(9, dim, [3, 0, 40, 1])], "weighted with padding", dtype, torch.int32)


@pytest.mark.parametrize("dim", [5, 64])
def test_bags_of_few_and_of_many_indices(kernels, dim):
    """A warp's up to 512 indices, beyond those of a block; more bags than a block has."""
    lengths = [511, 512, 3, 513, 0, 1, 1300, 2, 4, 700, 1]
    for kind in ("mean with padding", "weighted"):
        check_shapes([(50, dim, lengths)], kind, F32)


@pytest.mark.parametrize("dim", [6, 64, 300])
def test_rows_that_go_on_over_many_chunks(kernels, dim):
    """Of 32 places; more chunks than a block has groups of lanes. Positive terms show what is lost."""
    for lengths, rows in (([300, 0, 200, 240], 1), ([250, 330], 3), ([1200], 1)):
        indices, offsets, _ = made(rows, lengths, "sum", F32)
        check(torch.rand(rows, dim), indices, offsets)
    indices = torch.arange(160) // 32  # a row ends where its chunk does
    check(torch.rand(5, dim), indices, torch.tensor([0, 100]))
    check(torch.rand(5, dim), (indices - 1).clamp(min=0), torch.tensor([0, 100]), padding_idx=0)


@pytest.mark.parametrize("which", ["weight", "out", "dout", "dweight", "parts"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_misaligned(kernels, dtype, which):
    kernels.misaligned = (which,)
    check_shapes([(5, 64, [70, 1])], "weighted", dtype)


def test_bags_of_one_length_and_tensors_that_lie_otherwise(kernels):
    weight, indices = torch.randn(8, 40).t(), torch.randint(40, (9, 4), dtype=torch.int32).t()
    check(weight, indices, mode="mean", padding_idx=3)
    check(weight, indices, per_sample_weights=torch.randn(9, 4).t())
    check(weight, torch.zeros(3, 0, dtype=torch.int32), mode="mean")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 1e-40])
def test_special_values_stay_in_their_bag_and_padding_is_not_read(kernels, value):
    weight = torch.randn(6, 4)
    weight[2, 1] = value
    check(weight, torch.tensor([[0, 2], [1, 3], [2, 2]]), gradients=False)
    weights = torch.tensor([[1.0, value], [value, value]], requires_grad=True)
    out = lk.embedding_bag(weight, torch.tensor([[0, 2], [2, 2]]), per_sample_weights=weights, padding_idx=2)
    assert torch.equal(out, torch.stack([weight[0], torch.zeros(4)]))
    (found,) = torch.autograd.grad(out[:, 0].sum(), weights)
    assert torch.equal(found, torch.tensor([[weight[0, 0], 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("dim", [3, 8])
def test_an_index_that_is_none_reads_nothing_and_makes_nan(kernels, dim):
    weight, weights = torch.randn(4, dim, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    indices = torch.tensor([[0, 1], [4, 0], [-1, 3], [2**40, 3]])
    out = lk.embedding_bag(weight, indices, per_sample_weights=weights)
    assert out.isnan().all(1).tolist() == out.isnan().any(1).tolist() == [False, True, True, True]
    dweight, dweights = torch.autograd.grad(out, (weight, weights), torch.ones(4, dim))
    assert torch.equal(dweight, torch.tensor([2.0, 1.0, 0.0, 2.0])[:, None].expand(4, dim))
    assert torch.equal(dweights.isnan(), torch.tensor([[False] * 2, *[[True, False]] * 3]))
    mean = lk.embedding_bag(weight, indices, mode="mean", padding_idx=0)
    assert mean.isnan().all(1).tolist() == [False, True, True, True]
    assert torch.equal(mean[0], weight[1])


@pytest.mark.parametrize(("offsets", "wrong"), NO_OFFSETS)
def test_offsets_that_are_none_read_nothing_and_make_nan(kernels, offsets, wrong):
    check_no_offsets(4, offsets, wrong)


def test_indices_but_no_bag_at_all(kernels):
    weight = torch.randn(5, 4, requires_grad=True)
    out = lk.embedding_bag(weight, torch.tensor([0, 3]), torch.zeros(0, dtype=torch.int64), mode="mean")
    assert out.shape == (0, 4) and not torch.autograd.grad(out.sum(), weight)[0].any()


def test_gradients_only_of_what_wants_one(kernels):
    weight, weights = torch.randn(5, 3, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    indices = torch.tensor([[1, 4], [4, 0]])
    out = lk.embedding_bag(weight.detach(), indices, per_sample_weights=weights)
    (found,) = torch.autograd.grad(out.sum(), weights)
    torch.testing.assert_close(found, weight.detach()[indices].sum(-1))
    out = lk.embedding_bag(weight, indices, per_sample_weights=weights.detach())
    expected = torch.zeros(5).index_add(0, indices.flatten(), weights.detach().flatten())
    torch.testing.assert_close(torch.autograd.grad(out.sum(), weight)[0], expected[:, None].expand(5, 3))


@pytest.mark.parametrize("kind", ["mean with padding", "weighted"])
def test_same_bits_under_any_schedule(kernels, kind):
    indices, offsets, options = made(4, [90, 0, 40, 7, 600], kind, BF16)
    tensors = [torch.randn(4, 40).bfloat16()]
    if "per_sample_weights" in options:
        tensors.append(options.pop("per_sample_weights"))
    call, results = bound(lk.embedding_bag, indices, offsets, **options), []
    for seed in range(3):
        kernels.library.configure(seed)
        results.append(list(oracle.outputs_and_gradients(call, tensors).values()))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


def test_launches_on_the_given_device_and_stream(kernels):
    kernels.where = 2, ctypes.c_void_p(0x1230)
    check_shapes([SHAPES[1]], "weighted", F32)
    assert kernels.library.c.emu_last_device() == 2
    assert kernels.library.c.emu_last_stream() == 0x1230
    assert kernels.library.c.emu_current_device() == 0


def test_messages(kernels, monkeypatch):
    weight, indices = torch.randn(5, 3, requires_grad=True), torch.tensor([[1, 4], [4, 0]])
    out = lk.embedding_bag(weight, indices)
    calls = {
        "embedding_bag_forward": lambda: lk.embedding_bag(weight, indices),
        "embedding_bag_backward": lambda: torch.autograd.grad(out.sum(), weight, retain_graph=True),
    }
    check_messages(kernels, monkeypatch, DTYPES, calls, 5)


def test_more_bags_than_a_grid_has_blocks():
    indices = torch.zeros(2**31, 0, dtype=torch.int64, device="meta")
    row = next(row for row in ops.BACKENDS if row.name == "cuda")
    here = dataclasses.replace(row, device="cpu", missing=lambda: None)
    message = "embedding_bag: cuda needs fewer than 2 ** 31 indices and bags, got 2147483648"
    assert here.refusal("embedding_bag", torch.ones(2, 1), indices.numel(), len(indices)) == message


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    run_tests_under_asan(__file__)
