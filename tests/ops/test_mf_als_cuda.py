"""The CUDA kernels of mf_als, executed on the CPU (tests/cuda_on_cpu) as rows of the op's tables."""

import ctypes
import dataclasses

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.library import FLAVOURS, KernelError, fixture, run_tests_under_asan
from ops.matrices import matrix
from ops.test_mf_als import EACH_OBJECTIVE, EACH_SOLVER, EXPLICIT, IMPLICIT, SOLVERS, check, factors

import lspm_kernels as lk
from lspm_kernels import compiled, dispatch
from lspm_kernels.ops import mf_als

SOURCES = [build.ROOT / "csrc/cuda" / name for name in ("mf_als.cu", "mf_als_loss.cu")]
CHOLESKY, CG = SOLVERS
library = fixture(*SOURCES, build.HERE / "entries/mf_als.cpp")


class Options(ctypes.Structure):
    """MfAlsOptions of csrc/mf_als.h."""

    _fields_ = [("reg", ctypes.c_float), ("reg_exponent", ctypes.c_float), ("alpha", ctypes.c_float),
                ("implicit", ctypes.c_bool), ("steps", ctypes.c_int64)]  # fmt: skip


class Entries(ctypes.Structure):
    """Entries of tests/cuda_on_cpu/entries/mf_als.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("indptr", "indices", "values", "weight")]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows", "columns", "count", "wide")]


class Module:
    """What the compiled module has of mf_als, over emulated memory; and where it runs."""

    def __init__(self, library):
        self.library, self.misaligned, self.where = library, (), (0, None)

    def copies(self, factors, other_factors, *entries):
        x, y = (self.library.copy(t, name in self.misaligned)
                for name, t in (("factors", factors), ("other_factors", other_factors)))  # fmt: skip
        wide = int(entries[1].dtype == torch.int64)
        pointers = (t if t is None else self.library.copy(t).pointer for t in entries)
        numbers = len(factors), len(other_factors), len(entries[1]), wide
        return x, y, ctypes.byref(Entries(*pointers, *numbers))

    def mf_als_update(self, *arguments):
        tensors, (_, *options, _, gram) = arguments[:6], arguments[6:]
        given = self.copies(*tensors)
        of = tensors[0].size(1), ctypes.byref(Options(*options))
        self.library.call("mf_als_update", *given, self.library.copy(gram), *of, *self.where)
        tensors[0].copy_(given[0].tensor())

    def mf_als_loss(self, *arguments):
        tensors, (loss, *options, _, grams, scratch) = arguments[:6], arguments[6:]
        out, of = self.library.empty(()), (tensors[0].size(1), ctypes.byref(Options(*options, 0)))
        others = self.library.copy(grams), self.library.copy(scratch), out
        self.library.call("mf_als_loss", *self.copies(*tensors), *others, *of, *self.where)
        loss.copy_(out.tensor())


@pytest.fixture
def module(library, monkeypatch):
    """The op runs these kernels, on CPU tensors."""
    module = Module(library)
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the tables as they were
    monkeypatch.setattr(compiled, "cuda", module)
    for table in ("BACKENDS", "LOSS_BACKENDS"):
        row = next(row for row in getattr(mf_als, table) if row.name == "cuda")
        here = dataclasses.replace(row, device="cpu", missing=lambda: None)
        monkeypatch.setattr(mf_als, table, (here,))
    return module


def counted(counts, columns, wide=False):
    """A matrix with so many random entries in each row."""
    indptr = torch.tensor([0, *counts]).cumsum(0)
    dtype = torch.int64 if wide else torch.int32
    return indptr, torch.randint(columns, (sum(counts),), dtype=dtype), torch.rand(sum(counts))


@EACH_OBJECTIVE
@pytest.mark.parametrize("k", [1, 3, 16, 20, 50, 64, 65])
def test_against_the_reference(module, k, options):
    (x, y), entries = factors(12, 30, k), counted([1, 0, 31, 33, 4, 16, 2, 65, 9, 15, 3, 47], 30, wide=k % 2)
    for chosen in (*SOLVERS, {}):
        check(x, y, *entries, **chosen, **options)


@pytest.mark.long
@EACH_OBJECTIVE
@pytest.mark.parametrize("k", [96, 121, 128, 200, 241, 248])
def test_matrices_that_fill_the_registers(module, k, options):
    check(*factors(3, 300, k), *counted([250, 3, 0], 300), **CHOLESKY, **options)


@EACH_OBJECTIVE
@pytest.mark.parametrize("k", [130, 256, 300, 512])
def test_as_many_factors_as_steps_hold(module, k, options):
    check(*factors(2, 9, k), *counted([5, 135], 9), **CG, **options)


@pytest.mark.parametrize("k", [1000, 1024])
def test_the_loss_of_as_many_factors_as_registers_hold(module, k):
    check(*factors(2, 9, k), *counted([5, 135], 9), **EXPLICIT)


@EACH_OBJECTIVE
@EACH_SOLVER
@pytest.mark.parametrize("k", [3, 16, 70])
def test_rows_of_few_and_of_many_entries(module, k, solver, options):
    """A warp's up to 128 entries, beyond those of a block; Cholesky adds up so many apart."""
    entries = counted([127, 0, 128, 129, 1, 300, 31], 40, wide=k == 70)
    check(*factors(7, 40, k), *entries, **solver, **options)
    check(*factors(7, 40, k), *entries, **options)


def test_blocks_of_several_rows(module):
    """Of three rows each, the last block of fewer, and of one long row among short ones."""
    counts = [n % 3 for n in range(3200)]
    counts[3000] = 150
    x, y = factors(3200, 20, 4)
    entries = counted(counts, 20)
    check(x, y, *entries, **CG, **EXPLICIT)
    check(x, y, *entries, **EXPLICIT)


@pytest.mark.long
def test_long_sums_round_little(module):
    for solver in SOLVERS:
        check(*factors(2, 3000, 24), *counted([9000, 500], 3000), **solver, **EXPLICIT)
    check(*factors(2, 3000, 24), *counted([9000, 500], 3000), **EXPLICIT)


@EACH_SOLVER
def test_options(module, solver):
    (x, y), entries = factors(20, 30, 17), matrix(20, 30, 600)
    weight, zeros = torch.rand(600), entries[2] * (torch.rand(600) < 0.5)
    weight[::7] = 0
    for chosen in (solver, {}):
        for weighted_reg in (True, 0.5):
            for options in (EXPLICIT, IMPLICIT):
                check(x, y, *entries, weighted_reg=weighted_reg, **chosen, **options)
        check(x, y, *entries, weight, **chosen, **EXPLICIT)
        check(x, y, *entries[:2], None, **chosen, **IMPLICIT)
        check(x, y, *entries[:2], zeros, **chosen, **IMPLICIT)


@pytest.mark.parametrize("which", ["factors", "other_factors"])
def test_misaligned(module, which):
    module.misaligned = (which,)
    for chosen in (*SOLVERS, {}):
        check(*factors(4, 9, 20), *counted([5, 0, 140, 20], 9), **chosen, **IMPLICIT)


@EACH_OBJECTIVE
@EACH_SOLVER
def test_rows_without_entries_become_0_and_empty_tensors_are_none(module, solver, options):
    x, y = factors(3, 5, 7)
    empty = torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    assert not lk.mf_als_(x.clone(), y, *empty, **solver, **options).any()
    assert lk.mf_als_(x[:0], y, empty[0][:1], *empty[1:], **solver, **options).shape == (0, 7)
    assert not lk.mf_als_(x.clone(), y[:0], *empty, **solver, **options).any()
    check(x, y, *empty, **options)
    check(x[:0], y, empty[0][:1], *empty[1:], **options)
    check(x, y[:0], *empty, weighted_reg=True, **options)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_huge_and_tiny_values(module, scale):
    (x, y), (indptr, indices, values) = factors(9, 20, 5), matrix(9, 20, 200)
    check(x, y, indptr, indices, values * scale, **CHOLESKY, **EXPLICIT)
    check(x * 0, y, indptr, indices, values * scale, solver="cg", cg_steps=2, **EXPLICIT)


@pytest.mark.parametrize("k", [8, 72])
def test_a_matrix_that_is_not_positive_definite_makes_its_row_nan(module, k):
    """Of fewer entries than K, of a smaller rank than K, and of a factor that is not finite."""
    x, y = factors(5, 5 * k, k)
    indices = [torch.arange(2 * k), torch.arange(k - 1), torch.arange(2 * k) % (k - 2), torch.tensor([4 * k])]
    indptr = torch.tensor([0, 2 * k, 0, k - 1, 2 * k, 1]).cumsum(0)
    indices = torch.cat(indices)
    values = torch.rand(len(indices))
    y[4 * k, 0] = float("nan")
    solved = lk.mf_als_(x.clone(), y, indptr, indices, values, reg=0.0)
    assert solved.isnan().all(1).tolist() == [False, False, True, True, True]
    assert solved[:2].isfinite().all() and not solved[1].any()
    regular = lk.mf_als_(x.clone(), y, indptr, indices, values, reg=1e-2)
    assert regular.isnan().all(1).tolist() == [False] * 4 + [True] and regular[:4].isfinite().all()
    steps = lk.mf_als_(x.clone(), y, indptr, indices, values, reg=0.0, **CG)
    assert steps[:4].isfinite().all() and steps[4].isnan().all()


@pytest.mark.parametrize("k", [8, 72])
def test_pivots_that_are_nothing_but_rounding_are_refused(module, k):
    """Of twelve rows whose last pivot ought to be 0, rounding leaves some a positive one."""
    (x, y), entries = factors(12, 300, k), counted([3 * k] * 12, 300)
    y[:, -1] = y[:, 0] + y[:, 1]
    assert lk.mf_als_(x, y, *entries, reg=0.0).isnan().all()


def test_steps_stop_where_there_is_nothing_to_gain(module):
    (x, y), entries = factors(4, 20, 5), counted([20, 3, 1, 140], 20)
    y[5:] = 0
    assert lk.mf_als_(x, y, *entries, reg=0.0, solver="cg", cg_steps=9).isfinite().all()
    (x, y), entries = factors(4, 20, 24), (torch.arange(5), torch.arange(4), torch.ones(4))
    lacking = (1 - (x * y[:4]).sum(1)) / y[:4].square().sum(1)
    found = lk.mf_als_(x.clone(), y, *entries, reg=0.0, solver="cg", cg_steps=60)
    assert (found - x - lacking[:, None] * y[:4]).abs().max() <= 0.01 * found.abs().max()


@EACH_SOLVER
@pytest.mark.parametrize("wide", [False, True])
def test_an_index_that_is_none_is_a_row_of_zeros_and_makes_the_loss_nan(module, solver, wide):
    y, entries = torch.rand(5, 6), counted([20, 140], 4, wide)
    y[4] = 0
    found, steps = [], 3 if solver == CG else 0
    for none in ([5, -1, 2**31 - 1, -(2**31), 2**40 if wide else 7], [4] * 5):
        indices = entries[1].clone()
        indices[[0, 19, 20, 90, 159]] = torch.tensor(none, dtype=indices.dtype)
        found.append(torch.ones(2, 6))
        given = y, entries[0], indices, entries[2], None
        mf_als.BACKENDS[0].forward(found[-1], *given, None, 0.1, 1.0, 1.0, False, steps)
        loss = torch.zeros(())
        mf_als.LOSS_BACKENDS[0].forward(torch.ones(2, 6), *given, loss, 0.1, 1.0, 1.0, False)
        assert loss.isnan() == (none[0] == 5)
    assert torch.equal(*found) and found[0].isfinite().all()


def test_same_bits_under_any_schedule(module):
    (x, y), entries = factors(4, 30, 20), counted([3, 200, 40, 129], 30)
    results = []
    for seed in range(3):
        module.library.configure(seed)
        solved = [lk.mf_als_(x.clone(), y, *entries, **solver, **IMPLICIT) for solver in SOLVERS]
        results.append([*solved, lk.mf_als_loss(x, y, *entries, weighted_reg=True, **IMPLICIT)])
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


@EACH_SOLVER
def test_bits_of_a_row_depend_on_its_entries_alone(module, solver):
    """Neither on how many other rows there are, nor on how many of them a block has."""
    rows = 2100 if solver == CG else 9
    (x, y), counts = factors(rows, 30, 20), [3, 200, 40, 129]
    indptr, *entries = counted(counts, 30)
    alone = lk.mf_als_(x[:4].clone(), y, indptr, *entries, **solver, **EXPLICIT)
    longer = torch.cat([indptr, indptr[-1:].expand(rows - 4)])
    among = lk.mf_als_(x.clone(), y, longer, *entries, **solver, **EXPLICIT)
    assert torch.equal(among[:4], alone) and not among[4:].any()


def test_launches_on_the_given_device_and_stream(module):
    module.where = 2, ctypes.c_void_p(0x1230)
    given = *factors(4, 9, 5), *counted([1, 2, 3, 4], 9)
    for function, solver in ((lk.mf_als_, CHOLESKY), (lk.mf_als_, CG), (lk.mf_als_loss, {})):
        function(*given, **solver, **EXPLICIT)
        emulator = module.library.c
        assert (emulator.emu_last_device(), emulator.emu_last_stream()) == (2, 0x1230)
        assert emulator.emu_current_device() == 0


def test_messages(module, monkeypatch):
    entries = counted([1, 2], 3)
    calls = {"K must be at most 248": (249, CHOLESKY), "K must be at most 512": (513, CG)}
    for k, solver in calls.values():
        message = rf'^mf_als_: cuda needs K of at most 248, or 512 with solver="cg", got {k}$'
        with pytest.raises(NotImplementedError, match=message):
            lk.mf_als_(*factors(2, 3, k), *entries, reg=1.0, backend="cuda", **solver)
    with pytest.raises(NotImplementedError, match=r"^mf_als_loss: cuda needs K of at most 1024, got 1025$"):
        lk.mf_als_loss(*factors(2, 3, 1025), *entries, reg=1.0, backend="cuda")
    for table in ("BACKENDS", "LOSS_BACKENDS"):
        limitless = dataclasses.replace(getattr(mf_als, table)[0], limits=())
        monkeypatch.setattr(mf_als, table, (limitless,))
    for message, (k, solver) in calls.items():
        with pytest.raises(KernelError, match=f"^mf_als_update: {message}, got {k}$"):
            lk.mf_als_(*factors(2, 3, k), *entries, reg=1.0, **solver)
    for k in (1025, 1028):
        with pytest.raises(KernelError, match=f"^mf_als_loss: K must be at most 1024, got {k}$"):
            lk.mf_als_loss(*factors(2, 3, k), *entries, reg=1.0)
    module.where = 17, None
    for call in (lk.mf_als_, lk.mf_als_loss):
        with pytest.raises(KernelError, match=r"^cudaSetDevice\(device\) failed at common.cuh:\d+: invalid "):
            call(*factors(2, 3, 4), *entries, reg=1.0)


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    run_tests_under_asan(__file__)
