"""The CUDA kernels of top_k_scores, executed on the CPU (tests/cuda_on_cpu) as a row of the op's table."""

import ctypes
import dataclasses

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.library import FLAVOURS, KernelError, fixture, run_tests_under_asan
from ops import test_top_k_scores as on_cpu
from ops.test_top_k_scores import DTYPES, check_exact, check_scores, exclusions, identical, integers

import lspm_kernels as lk
from lspm_kernels import compiled, dispatch, top_k_parts
from lspm_kernels.ops import top_k_scores

# Queries, items, dimension, k: blocks of 16 queries and of 64, of one piece of columns and of several.
SHAPES = [(1, 1, 1, 1), (3, 20, 7, 30), (17, 300, 64, 10), (20, 130, 72, 65), (70, 130, 16, 3)]
library = fixture(
    build.ROOT / "csrc/cuda/top_k_scores.cu",
    build.HERE / "entries/top_k_scores.cpp",
)


class Shape(ctypes.Structure):
    """TopKScoresShape of csrc/top_k_scores.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("queries", "items", "dim", "k")]
    _fields_ += [("query_stride", ctypes.c_int64), ("item_stride", ctypes.c_int64), ("dtype", ctypes.c_int)]


class Module:
    """What the compiled module has of top_k_scores, over emulated memory; and where it runs."""

    def __init__(self, library):
        self.library, self.misaligned, self.where = library, (), (0, None)

    def rows(self, name, t):
        """The rows of a matrix, with what lies between them."""
        size = (len(t) - 1) * t.stride(0) + t.size(1) if t.numel() else 0
        return self.library.copy(torch.as_strided(t, (size,), (1,)), name in self.misaligned)

    def top_k_scores_forward(self, queries, items, item_bias, indptr, excluded, scores, indices, _, scratch):
        given = self.rows("queries", queries), self.rows("items", items)
        given += tuple(self.library.copy(t) for t in (item_bias, indptr, excluded))
        given += (0 if excluded is None else len(excluded),)
        parts = 1 if scratch is None else len(scratch)
        scratch = None if scratch is None else self.library.empty(scratch.shape, torch.int64)
        out = [self.library.empty(t.shape, t.dtype) for t in (scores, indices)]
        sizes = len(queries), len(items), queries.size(1), scores.size(1), queries.stride(0), items.stride(0)
        shape = ctypes.byref(Shape(*sizes, [*DTYPES, torch.int64].index(queries.dtype)))
        self.library.call("top_k_scores_forward", *given, scratch, parts, *out, shape, *self.where)
        scores.copy_(out[0].tensor())
        indices.copy_(out[1].tensor())


@pytest.fixture
def module(library, monkeypatch):
    """The op runs these kernels, on CPU tensors; one multiprocessor is enough for every block."""
    module = Module(library)
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    monkeypatch.setattr(compiled, "cuda", module)
    monkeypatch.setattr(top_k_parts, "multiprocessors", lambda device: 1)
    row = next(row for row in top_k_scores.BACKENDS if row.name == "cuda")
    here = dataclasses.replace(row, device="cpu", missing=lambda: None)
    monkeypatch.setattr(top_k_scores, "BACKENDS", (here,))
    return module


@pytest.fixture
def in_parts(module, monkeypatch):
    """The items are divided among as many blocks as they have tiles, or some."""

    def divide(most):
        monkeypatch.setattr(top_k_parts, "parts", lambda _, items, *rest: max(1, min(most, -(-items // 64))))

    return divide


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_scores_go_by_index(module, dtype, shape):
    for biased, excluded in ((True, True), (False, False)):
        check_exact(shape, dtype, biased, excluded)


@pytest.mark.parametrize("shape", on_cpu.EMPTY)
def test_empty_tensors_are_none(module, shape):
    check_exact(shape, torch.float32)
    check_exact(shape, torch.bfloat16, biased=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_reference(module, dtype):
    for shape in ((65, 200, 50, 20), (5, 150, 256, 20), (18, 130, 330, 64)):
        check_scores(dtype, shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_round_little(module, dtype):
    check_scores(dtype, (4, 90, 2050, 5))


def test_a_large_k(module):
    for k in (192, 193, 448, 512):
        check_exact((3, 1100, 8, k), torch.float32)


@pytest.mark.parametrize("most", [2, 5, 99])
def test_items_divided_among_blocks(in_parts, most):
    in_parts(most)
    for shape, dtype in (((2, 700, 9, 10), torch.float32), ((17, 650, 16, 100), torch.bfloat16)):
        check_exact(shape, dtype)
    q, i = torch.randn(3, 40), torch.randn(500, 40)
    divided = lk.top_k_scores(q, i, 7)
    in_parts(1)
    identical(divided, lk.top_k_scores(q, i, 7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(module, dtype):
    on_cpu.check_special_values(dtype)
    if dtype is torch.float32:
        on_cpu.test_nan_comes_first_and_infinities_are_scores(dtype)


def test_lists_and_memory_as_torch_has_them(module):
    on_cpu.test_a_row_that_excludes_all_and_a_slice_of_lists()
    on_cpu.test_memory_that_is_not_contiguous_is_read_where_it_lies()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["queries", "items"])
def test_misaligned(module, which, dtype):
    module.misaligned = (which,)
    check_exact((18, 100, 64, 5), dtype)


def test_an_exclusion_that_is_none_excludes_nothing(module):
    """Under torch.compile nothing is checked until the kernel runs, and on a GPU nothing then."""
    q, i = integers((2, 8), torch.float32), integers((70, 8), torch.float32)
    lists = torch.tensor([0, 5, 6]), torch.tensor([3, -1, 70, 2**40, -(2**40), 9])
    found = torch.compile(lambda q: lk.top_k_scores(
        q, i, 70, exclude_indptr=lists[0], exclude_indices=lists[1]), backend="eager")(q)  # fmt: skip
    real = {"exclude_indptr": torch.tensor([0, 1, 2]), "exclude_indices": torch.tensor([3, 9])}
    identical(found, lk.top_k_scores(q, i, 70, **real))
    scores, indices = torch.empty(2, 9), torch.empty(2, 9, dtype=torch.int64)
    nowhere = torch.tensor([-5, 2**40, 6])  # all for the first query, none for the second
    lists = nowhere, torch.arange(6)
    module.top_k_scores_forward(q, i, None, *lists, scores, indices, 0, None)
    assert not (indices[0] < 6).any()
    identical((scores[1], indices[1]), [t[1] for t in lk.top_k_scores(q, i, 9)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_depends_on_its_query_and_item_alone(module, dtype):
    """Not on the rows beside them, nor on where in a block or a tile they stand."""
    q, i = torch.randn(40, 150).to(dtype), torch.randn(150, 150).to(dtype)
    whole = lk.top_k_scores(q, i, 20)
    for first, last in ((0, 1), (17, 18), (9, 33)):
        identical(lk.top_k_scores(q[first:last], i, 20), [t[first:last] for t in whole])
    items, bias = torch.cat([i[:13], i]), torch.cat([torch.full((13,), -1e30), torch.zeros(150)])
    identical(lk.top_k_scores(q, items, 20, item_bias=bias), (whole[0], whole[1] + 13))


def test_same_bits_under_any_schedule(module, in_parts):
    in_parts(3)
    q, i, lists = torch.randn(20, 70), torch.randn(300, 70), exclusions(20, 300, 30)
    results = []
    for seed in range(3):
        module.library.configure(seed)
        results.append(lk.top_k_scores(q, i, 9, exclude_indptr=lists[0], exclude_indices=lists[1]))
    identical(results[0] * 2, results[1] + results[2])


def test_parts_give_every_multiprocessor_work():
    assert top_k_parts.parts(1, 100_000, 10, 132) == 64
    assert top_k_parts.parts(1, 5000, 10, 132) == 4
    assert top_k_parts.parts(1000, 100_000, 10, 132) == 16
    assert top_k_parts.parts(1000, 100_000, 100, 132) == 4
    assert top_k_parts.parts(100_000, 100_000, 10, 132) == 1
    assert top_k_parts.parts(0, 0, 1, 132) == 1


def test_launches_on_the_given_device_and_stream(module):
    module.where = 2, ctypes.c_void_p(0x1230)
    lk.top_k_scores(torch.randn(3, 4), torch.randn(9, 4), 2)
    emulator = module.library.c
    assert (emulator.emu_last_device(), emulator.emu_last_stream()) == (2, 0x1230)
    assert emulator.emu_current_device() == 0


def test_messages(module, monkeypatch):
    given = torch.ones(1, 2), torch.ones(3, 2)
    with pytest.raises(NotImplementedError, match=r"^top_k_scores: cuda needs k of at most 512, got 513$"):
        lk.top_k_scores(*given, 513, backend="cuda")
    row = dataclasses.replace(top_k_scores.BACKENDS[0], limits=())
    monkeypatch.setattr(top_k_scores, "BACKENDS", (row,))
    with pytest.raises(KernelError, match=r"^top_k_scores_forward: k must be at most 512, got 513$"):
        lk.top_k_scores(*given, 513)
    module.where = 17, None
    with pytest.raises(KernelError, match=r"^cudaSetDevice\(device\) failed at common.cuh:\d+: invalid "):
        lk.top_k_scores(*given, 1)
    outs = torch.empty(1, 1), torch.empty(1, 1, dtype=torch.int64)
    integers = [t.long() for t in given]
    with pytest.raises(KernelError, match=r"^top_k_scores_forward: dtype must be bf16 or f16, got 3$"):
        module.top_k_scores_forward(*integers, None, None, None, *outs, 0, None)


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    run_tests_under_asan(__file__)
