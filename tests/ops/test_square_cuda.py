"""The CUDA kernels of mf_sgd and bpr, executed on the CPU (tests/cuda_on_cpu).

Each runs as a row of its op's table, on copies of the tensors in emulated device memory.
"""

import ctypes
import dataclasses

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.library import FLAVOURS, KernelError, fixture, run_tests_under_asan
from ops import test_bpr as on_pairs
from ops import test_mf_sgd as on_ratings

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled, dispatch
from lspm_kernels.ops import bpr, mf_sgd

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {F32: 0, BF16: 1}
OPS = {"mf_sgd": mf_sgd, "bpr": bpr}
SOURCES = [
    path for op in OPS for path in (build.ROOT / f"csrc/cuda/{op}.cu", build.HERE / f"entries/{op}.cpp")
]

library = fixture(*SOURCES)


class Kernels:
    """The kernels of the two ops' rows, and where and how they run."""

    def __init__(self, library):
        self.library, self.misaligned, self.where = library, False, (0, None)

    def call(self, name, changed, inputs, outputs, *structures):
        """Changes tensors, or None, and fills outputs, by a C entry."""
        tables = [self.library.copy(t, self.misaligned) for t in changed]
        given = [self.library.copy(t) for t in inputs]
        made = [self.library.empty(t.shape, t.dtype) for t in outputs]
        self.library.call(name, *tables, *given, *made, *structures, *self.where)
        for to, buffer in zip((*changed, *outputs), (*tables, *made), strict=True):
            if to is not None:
                to.copy_(buffer.tensor())

    def structure(self, name, numbers, *flags):
        make = getattr(self.library.c, name)
        make.restype = ctypes.c_void_p
        of = ctypes.c_int64 if name.endswith("shape") else ctypes.c_float
        return ctypes.c_void_p(make((of * len(numbers))(*numbers), *flags))

    def mf_sgd_update(self, *args):
        tables, inputs, loss, (step, nonnegative, logistic, seed) = args[:6], args[6:11], args[11], args[12:]
        grid = round(loss.numel() ** 0.5)
        sizes = *tables[0].shape[:1], *tables[1].shape, inputs[2].numel(), grid
        shape = self.structure("mf_sgd_shape", sizes, DTYPES[tables[0].dtype])
        step = self.structure("mf_sgd_step", step, int(nonnegative), int(logistic), ctypes.c_int64(seed))
        self.call("mf_sgd_update", tables, inputs, [loss], shape, step)

    def bpr_update(self, *args):
        tables, inputs, outputs, (step, seed) = args[:3], args[3:10], args[10:12], args[12:]
        grid, seen = round(outputs[0].numel() ** 0.5), inputs[6]
        sizes = *tables[0].shape[:1], *tables[1].shape, inputs[0].numel(), grid, inputs[3].numel()
        shape = self.structure("bpr_shape", (*sizes, 0 if seen is None else seen.numel()))
        self.call(
            "bpr_update", tables, inputs, outputs, shape,
            self.structure("bpr_step", step, ctypes.c_int64(seed)),
        )  # fmt: skip


@pytest.fixture
def kernels(library, monkeypatch):
    """The ops run these kernels, on CPU tensors."""
    kernels = Kernels(library)
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the tables as they were
    for name, op in OPS.items():
        row = next(row for row in op.BACKENDS if row.name == "cuda")
        forward = getattr(kernels, f"{name}_update")
        here = dataclasses.replace(row, device="cpu", missing=lambda: None, forward=forward)
        monkeypatch.setattr(op, "BACKENDS", (here,))
    return kernels


def square(factors, count, grid, weight=False):
    """Tables of few rows, most of them of several ratings, and the ratings."""
    tables, ratings = on_ratings.problem(factors, users=9, items=7, count=count, weight=weight)
    return tables, lk.rating_blocks(*ratings, num_users=9, num_items=7, grid=grid)


def check_mf_sgd(factors, options, grid=2, count=50):
    options = dict(on_ratings.OPTIONS[options])
    adaptive = options.pop("squares", False)
    tables, blocks = square(factors, count, grid, weight=bool(options))

    def of(function):
        def call(*tables):
            squares = [torch.full_like(b, 0.25) for b in tables[2:]] if adaptive else None
            return function(tables, blocks, squares, **options)

        return call

    ours, theirs = of(on_ratings.ours), of(on_ratings.expected)
    oracle.check(ours, theirs, tables, gradients=False)


@pytest.mark.parametrize("factors", [1, 7, 33, 64, 100, 128, 202, 512])
def test_mf_sgd(kernels, factors):
    check_mf_sgd(factors, "plain")
    check_mf_sgd(factors, "all")


@pytest.mark.parametrize("options", ["groups", "l1", "nonnegative", "squares", "logistic"])
def test_options_of_mf_sgd(kernels, options):
    check_mf_sgd(16, options)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 70])
def test_any_number_of_ratings(kernels, count):
    check_mf_sgd(5, "plain", grid=1, count=count)


def test_several_warps_of_a_block_of_threads(kernels):
    check_mf_sgd(3, "plain", grid=66, count=20)


def test_misaligned_tables(kernels):
    kernels.misaligned = True
    check_mf_sgd(64, "all")
    tables, users, items = on_pairs.problem(64, users=9, items=12, count=40)
    on_pairs.check(tables, lk.rating_blocks(users, items, torch.ones(40), num_users=9, num_items=12, grid=2))


def test_without_biases(kernels):
    tables, blocks = square(20, 40, 2)
    both = [[t.clone() for t in tables] for _ in range(2)]
    for biases, of in (([None, None], both[0]), ([torch.zeros(9), torch.zeros(7)], both[1])):
        lk.mf_sgd_(*of[:2], *biases, blocks, lr=(0.05, 1e-30))
    assert all(map(torch.equal, both[0][:2], both[1][:2]))


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("factors", [7, 64, 256])
def test_bfloat16_is_rounded_as_on_the_cpu(kernels, factors, misaligned):
    """No row comes twice, so sums differ by little: few bfloat16 fall to the other side."""
    kernels.misaligned = misaligned
    tables, _ = on_ratings.problem(factors, users=12, items=12)
    tables = [t.bfloat16() for t in tables[:2]]
    blocks = lk.rating_blocks(torch.randperm(12), torch.randperm(12), torch.rand(12), grid=2)
    results = []
    for update in (kernels.mf_sgd_update, compiled.cpu_kernel("mf_sgd_update")):
        results.append([t.clone() for t in tables])
        of = blocks.users, blocks.items, blocks.ratings, None, blocks.offsets, torch.zeros(4)
        step = [0.1, 0.05, 0.02, 0.1, 0.2, 0.3, 0.4, 0.0, 0.0]
        update(*results[-1], *[None] * 4, *of, step, False, False, 2**40 + 3)
    for found, expected, before in zip(*results, tables, strict=True):
        assert (found != before).float().mean() > 0.3
        assert (found != expected).float().mean() < 0.01
    on_ratings.test_what_is_not_finite_stays_so()


def test_ids_and_offsets_outside_do_nothing(kernels):
    tables, blocks = square(16, 40, 1)
    blocks.users[3], blocks.items[5], blocks.users[6], blocks.items[7] = -1, 7, 9, -(2**31)
    blocks.offsets[:] = torch.tensor([-5, 2**40])
    kept = torch.tensor([n not in (3, 5, 6, 7) for n in range(40)])
    fewer = {name: getattr(blocks, name)[kept] for name in ("users", "items", "ratings")}
    fewer = dataclasses.replace(blocks, **fewer, offsets=torch.tensor([0, 36]))
    results = [on_ratings.ours(tables, of) for of in (blocks, fewer)]
    assert all(map(torch.equal, *results))


def pairs(factors, count=60, grid=2):
    tables, users, items = on_pairs.problem(factors, users=9, items=12, count=count)
    blocks = lk.rating_blocks(users, items, torch.ones(count), num_users=9, num_items=12, grid=grid)
    return tables, blocks, on_pairs.seen_by(users, items, 9)


@pytest.mark.parametrize("with_seen", [False, True])
@pytest.mark.parametrize("factors", [1, 20, 64, 99, 200, 512])
def test_bpr(kernels, factors, with_seen):
    tables, blocks, seen = pairs(factors)
    on_pairs.check(tables, blocks, seen if with_seen else None)
    if factors == 20:
        on_pairs.check(tables[:2], blocks, seen if with_seen else None)


@pytest.mark.parametrize("count", [0, 1, 32, 33, 70])
def test_any_number_of_pairs(kernels, count):
    tables, blocks, _ = pairs(5, count, grid=1)
    on_pairs.check(tables, blocks)


def test_pairs_that_find_no_item_are_counted(kernels):
    tables, blocks, seen = pairs(4)
    results = []
    for update in (kernels.bpr_update, compiled.cpu_kernel("bpr_update")):
        outputs = torch.zeros(4), torch.zeros(4, dtype=torch.int32)
        of = blocks.users, blocks.items, blocks.offsets, blocks.part_items, blocks.part_offsets, *seen
        update(*[t.clone() for t in tables], *of, *outputs, [0.1, 0.0, 0.0, 0.0], 7)
        results.append(outputs[1])
    assert torch.equal(*results) and results[0].sum() > 0
    on_pairs.test_a_user_who_has_seen_all_is_skipped()


def test_what_bpr_reads_is_held_to_what_there_is(kernels):
    tables, blocks, (indptr, seen) = pairs(16, grid=1)
    blocks.users[2], blocks.items[4], blocks.offsets[1] = 9, -1, 2**40
    blocks.part_offsets[:] = torch.tensor([-7, 2**40])
    blocks.part_items[3], blocks.part_items[8] = 12, -1
    indptr[1], indptr[4], indptr[9] = -3, 2**50, -(2**50)
    outputs = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    of = blocks.users, blocks.items, blocks.offsets, blocks.part_items, blocks.part_offsets, indptr, seen
    kernels.bpr_update(*tables, *of, *outputs, [0.1, 0.1, 0.1, 0.1], 0)
    assert all(t.isfinite().all() for t in (*tables, *outputs))


def test_same_bits_under_any_schedule(kernels):
    ratings, pairings, results = square(20, 60, 3), pairs(20, grid=3), []
    for seed in (0, 1, 5):
        kernels.library.configure(seed)
        tables = [t.clone() for t in pairings[0]]
        found = lk.bpr_(*tables, pairings[1], seen=pairings[2], lr=0.1)
        squares = [torch.ones(9), torch.ones(7)]
        results.append([*tables, *found, *on_ratings.ours(*ratings, squares)])
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


def test_launches_on_the_given_device_and_stream(kernels):
    kernels.where = 2, ctypes.c_void_p(0x1230)
    (tables, blocks), (others, pairings, _) = square(4, 10, 2), pairs(4)
    for call in (lambda: lk.mf_sgd_(*tables, blocks, lr=0.1), lambda: lk.bpr_(*others, pairings, lr=0.1)):
        call()
        assert kernels.library.c.emu_last_device() == 2
        assert kernels.library.c.emu_last_stream() == 0x1230
        assert kernels.library.c.emu_current_device() == 0


def test_messages(kernels, monkeypatch):
    (tables, blocks), (others, pairings, _) = square(4, 10, 2), pairs(4)
    kernels.where = 17, None
    for call in (lambda: lk.mf_sgd_(*tables, blocks, lr=0.1), lambda: lk.bpr_(*others, pairings, lr=0.1)):
        with pytest.raises(KernelError, match=r"^cudaSetDevice\(device\) failed at common.cuh:\d+: invalid "):
            call()
    monkeypatch.setitem(DTYPES, F32, 2)
    with pytest.raises(KernelError, match=r"^mf_sgd_update: dtype must be f32 or bf16, got 2$"):
        lk.mf_sgd_(*tables, blocks, lr=0.1)
    wide = torch.ones(9, 513), torch.ones(12, 513), None
    with pytest.raises(NotImplementedError, match=r"^bpr: cuda needs at most 512 factors, got 513$"):
        lk.bpr_(*wide, pairings, lr=0.1, backend="cuda")
    monkeypatch.setattr(bpr, "BACKENDS", (dataclasses.replace(bpr.BACKENDS[0], limits=()),))
    with pytest.raises(KernelError, match=r"^bpr_update: factors must be at most 512, got 513$"):
        lk.bpr_(*wide, pairings, lr=0.1, backend="cuda")


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    run_tests_under_asan(__file__)
