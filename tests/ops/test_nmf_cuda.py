"""The CUDA kernel of nmf, executed on the CPU (tests/cuda_on_cpu) as a row of the op's table."""

import ctypes
import dataclasses

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.library import FLAVOURS, KernelError, fixture, run_tests_under_asan
from ops import test_nmf as on_cpu
from ops.matrices import K_OF_EACH_KIND, matrix
from ops.test_nmf import check

import lspm_kernels as lk
from lspm_kernels import dispatch
from lspm_kernels.ops import nmf

library = fixture(build.ROOT / "csrc/cuda/nmf.cu", build.HERE / "entries/nmf.cpp")


class Kernel:
    """The kernel of the op's row, and where and how it runs."""

    def __init__(self, library):
        self.library, self.misaligned, self.where = library, (), (0, None)

    def update(self, factors, other_factors, indptr, indices, values, failed, reg, eps):
        changed = self.library.copy(factors, "factors" in self.misaligned)
        y = self.library.copy(other_factors, "other_factors" in self.misaligned)
        matrix = self.library.c.nmf_matrix
        matrix.restype = ctypes.c_void_p
        sizes = map(ctypes.c_int64, (len(factors), len(other_factors), len(values)))
        csr = ctypes.c_void_p(matrix(*sizes, int(indices.dtype == torch.int64)))
        given = (self.library.copy(t) for t in (indptr, indices, values))
        self.library.call("nmf_update", changed, y, *given, csr, factors.size(1), reg, eps, *self.where)
        factors.copy_(changed.tensor())


@pytest.fixture
def kernel(library, monkeypatch):
    """The op runs this kernel, on CPU tensors."""
    kernel = Kernel(library)
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    row = next(row for row in nmf.BACKENDS if row.name == "cuda")
    here = dataclasses.replace(row, device="cpu", missing=lambda: None, forward=kernel.update)
    monkeypatch.setattr(nmf, "BACKENDS", (here,))
    return kernel


def counted(counts, columns, wide=False):
    """A matrix with so many random entries in each row."""
    indptr = torch.tensor([0, *counts]).cumsum(0)
    dtype = torch.int64 if wide else torch.int32
    return indptr, torch.randint(columns, (sum(counts),), dtype=dtype), torch.rand(sum(counts))


@pytest.mark.parametrize("k", [*K_OF_EACH_KIND, 32, 33, 132, 256, 300])
def test_against_the_reference(kernel, k):
    for rows, columns, entries in ((1, 1, 1), (5, 30, 60)):
        x, y = torch.rand(rows, k), torch.rand(columns, k)
        for reg in (0.0, 0.06):
            check(x, y, *matrix(rows, columns, entries, wide=k % 2), reg=reg)


@pytest.mark.parametrize("k", [509, 512, 1023, 1024])
def test_as_many_factors_as_registers_hold(kernel, k):
    check(torch.rand(2, k), torch.rand(9, k), *counted([5, 135], 9))


@pytest.mark.parametrize("k", [3, 16, 70, 128])
def test_rows_of_few_and_of_many_entries(kernel, k):
    """A warp's up to 128 entries, beyond those of a block."""
    entries = counted([127, 0, 128, 129, 1, 300, 31, 33], 40, wide=k == 70)
    check(torch.rand(8, k), torch.rand(40, k), *entries)


def test_blocks_of_several_rows(kernel):
    """Of three rows each, the last block of fewer, and of one long row among short ones."""
    counts = [n % 3 for n in range(3200)]
    counts[3000] = 150
    check(torch.rand(3200, 4), torch.rand(20, 4), *counted(counts, 20))


def test_long_sums_round_little(kernel):
    check(torch.rand(2, 5), torch.rand(300, 5), *counted([9000, 500], 300))


@pytest.mark.parametrize("which", ["factors", "other_factors"])
def test_misaligned(kernel, which):
    kernel.misaligned = (which,)
    check(torch.rand(4, 64), torch.rand(9, 64), *counted([5, 0, 140, 20], 9))


def test_zeros_formula_and_memory_as_torch_has_it(kernel):
    on_cpu.test_zeros()
    on_cpu.test_the_formula_entry_by_entry()
    x, y, (indptr, indices, values) = torch.rand(9, 6), torch.rand(20, 6), matrix(9, 20, 200)
    expected = lk.nmf_(x.clone(), y, indptr, indices, values)
    apart = y.new_zeros(20, 12)[:, ::2].copy_(y), indptr, indices.long(), values.repeat_interleave(2)[::2]
    assert torch.equal(lk.nmf_(x.clone(), *apart), expected)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("k", [5, 64])
def test_an_index_that_is_none_is_a_row_of_zeros(kernel, k, wide):
    y, entries = torch.rand(5, k), counted([20, 140], 4, wide)
    y[4] = 0
    found = []
    for none in ([5, -1, 2**31 - 1, -(2**31), 2**40 if wide else 7], [4] * 5):
        indices = entries[1].clone()
        indices[[0, 19, 20, 90, 159]] = torch.tensor(none, dtype=indices.dtype)
        found.append(torch.ones(2, k))
        kernel.update(found[-1], y, entries[0], indices, entries[2], None, 0.1, 1e-12)
    assert torch.equal(*found) and found[0].isfinite().all()


def test_same_bits_under_any_schedule(kernel):
    x, y, entries = torch.rand(4, 20), torch.rand(30, 20), counted([3, 200, 40, 129], 30)
    results = []
    for seed in range(3):
        kernel.library.configure(seed)
        results.append(lk.nmf_(x.clone(), y, *entries, reg=0.1))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_bits_of_a_row_depend_on_its_entries_alone(kernel):
    """Neither on how many other rows there are, nor on how many of them a block has."""
    x, y, counts = torch.rand(2100, 20), torch.rand(30, 20), [3, 200, 40, 129]
    indptr, *entries = counted(counts, 30)
    alone = lk.nmf_(x[:4].clone(), y, indptr, *entries)
    among = lk.nmf_(x.clone(), y, torch.cat([indptr, indptr[-1:].expand(2096)]), *entries)
    assert torch.equal(among[:4], alone) and not among[4:].any()


def test_launches_on_the_given_device_and_stream(kernel):
    kernel.where = 2, ctypes.c_void_p(0x1230)
    lk.nmf_(torch.rand(4, 5), torch.rand(9, 5), *counted([1, 2, 3, 4], 9))
    assert kernel.library.c.emu_last_device() == 2
    assert kernel.library.c.emu_last_stream() == 0x1230
    assert kernel.library.c.emu_current_device() == 0


def test_messages(kernel, monkeypatch):
    entries = counted([1, 2], 3)
    wide = torch.rand(2, 1025), torch.rand(3, 1025)
    with pytest.raises(NotImplementedError, match=r"^nmf_: cuda needs K of at most 1024, got 1025$"):
        lk.nmf_(*wide, *entries, backend="cuda")
    monkeypatch.setattr(nmf, "BACKENDS", (dataclasses.replace(nmf.BACKENDS[0], limits=()),))
    for factors in (1025, 1028):
        with pytest.raises(KernelError, match=rf"^nmf_update: K must be at most 1024, got {factors}$"):
            lk.nmf_(torch.rand(2, factors), torch.rand(3, factors), *entries, backend="cuda")
    kernel.where = 17, None
    with pytest.raises(KernelError, match=r"^cudaSetDevice\(device\) failed at common.cuh:\d+: invalid "):
        lk.nmf_(torch.rand(2, 4), torch.rand(3, 4), *entries)


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    run_tests_under_asan(__file__)
