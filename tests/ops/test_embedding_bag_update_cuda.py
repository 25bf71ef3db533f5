"""The CUDA kernels of embedding_bag_sgd_, _adagrad_ and _adam_, executed on the CPU (tests/cuda_on_cpu).

They run as a row of the op's table, on copies of the tensors in emulated device memory, so what the op hands
to its kernels is tested too.
"""

import ctypes
import dataclasses

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.library import FLAVOURS, check_messages, fixture, run_tests_under_asan
from ops import test_embedding_bag_update as on_cpu
from ops.bags import BF16, EMPTY, F32, OPTIONS, SHAPES, made
from ops.test_embedding_bag_cuda import DTYPES, INTEGERS
from ops.test_embedding_bag_update import EACH, UPDATES, check, check_an_index_that_is_none, states_of

import lspm_kernels as lk
from lspm_kernels import dispatch
from lspm_kernels.ops import embedding_bag_update as ops

CPU = tuple(row for row in ops.BACKENDS if row.name == "cpu")

library = fixture(
    build.ROOT / "csrc/cuda/embedding_bag_update.cu", build.HERE / "entries/embedding_bag_update.cpp"
)


class Kernels:
    """The kernels of the op's row, and where and how they run."""

    def __init__(self, library):
        self.library, self.misaligned, self.where = library, (), (0, None)

    def pointer(self, entry, *arguments):
        function = getattr(self.library.c, entry)
        function.restype = ctypes.c_void_p
        return ctypes.c_void_p(function(*arguments))

    def update(self, *args):
        names = "weight", "first", "second", "dout", "indices", "offsets", "per_sample_weights", "bag_of"
        given = dict(zip([*names, "rows", "order", "shares", "parts"], args[:12], strict=True))
        padding_idx, mean, optimizer, numbers, step, seed = args[12:]
        on_gpu = {
            name: self.library.empty(t.shape, t.dtype, name in self.misaligned)
            if name in ("shares", "parts")
            else self.library.copy(t, name in self.misaligned)
            for name, t in given.items()
        }
        (bags, dim), offsets, indices = given["dout"].shape, given["offsets"], given["indices"]
        sizes = len(given["weight"]), dim, bags, indices.numel(), padding_idx
        sizes = (ctypes.c_int64 * 6)(*sizes, 0 if offsets is None else offsets.numel())
        codes = DTYPES[given["weight"].dtype], INTEGERS[indices.dtype]
        shape = self.pointer("embedding_bag_shape", sizes, int(mean), *codes)
        last = ctypes.c_int64(step), ctypes.c_int64(-1 if seed is None else seed)
        how = self.pointer("embedding_bag_step", optimizer, (ctypes.c_double * 5)(*numbers), *last)
        self.library.call("embedding_bag_update", *on_gpu.values(), shape, how, *self.where)
        for name in names[:3]:
            if given[name] is not None:
                given[name].copy_(on_gpu[name].tensor())


@pytest.fixture
def kernels(library, monkeypatch):
    """The ops run these kernels, on CPU tensors."""
    kernels = Kernels(library)
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    row = next(row for row in ops.BACKENDS if row.name == "cuda")
    here = dataclasses.replace(row, device="cpu", missing=lambda: None)
    monkeypatch.setattr(ops, "BACKENDS", (here,))
    monkeypatch.setattr(ops, "_cuda_update", kernels.update)
    return kernels


def check_shapes(shapes, optimizer, kind, dtype, integer=torch.int64):
    for rows, dim, lengths in shapes:
        indices, offsets, options = made(rows, lengths, kind, dtype, integer)
        weight, dout = torch.randn(rows, dim).to(dtype), (torch.randn(len(lengths), dim) / 2).to(dtype)
        given = weight, states_of(optimizer, weight), dout, indices, offsets
        check(optimizer, *given, weight_decay=0.1 * (dim % 2), **options)


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(kernels, optimizer, dtype):
    for kind in OPTIONS:
        check_shapes(SHAPES[:5] + EMPTY, optimizer, kind, dtype)
    check_shapes(SHAPES[5:], optimizer, "weighted with padding", dtype)


@EACH
@pytest.mark.parametrize("dim", [2, 7, 8, 12, 128, 136, 264, 512])
def test_any_number_of_columns(kernels, optimizer, dim):
    for dtype in (F32, BF16):
        check_shapes([(9, dim, [3, 0, 40, 1])], optimizer, "weighted with padding", dtype, torch.int32)


@EACH
@pytest.mark.parametrize("dim", [6, 64, 300])
def test_a_row_that_goes_on_over_many_chunks_changes_once(kernels, optimizer, dim):
    """More chunks than a block has groups of lanes; and rows that end where their chunk does."""
    for indices in (torch.randint(2, (740,)), torch.arange(96) // 32, torch.zeros(1200, dtype=torch.int64)):
        weight, dout = torch.rand(3, dim), torch.rand(3, dim) / 64
        given = weight, states_of(optimizer, weight), dout, indices, torch.tensor([0, 50, 51])
        check(optimizer, *given, weight_decay=0.1)


@EACH
@pytest.mark.parametrize("which", ["weight", "first", "second", "dout", "parts"])
def test_misaligned(kernels, optimizer, which):
    kernels.misaligned = (which,)
    check_shapes([(5, 64, [70, 1])], optimizer, "weighted", BF16)


@EACH
def test_rows_in_no_bag_and_padding_do_not_change(kernels, optimizer):
    on_cpu.test_rows_in_no_bag_and_padding_do_not_change(optimizer)


@EACH
def test_special_values_stay_in_their_rows(kernels, optimizer):
    on_cpu.test_special_values_stay_in_their_rows(optimizer)


@EACH
def test_an_index_that_is_none_changes_no_row(kernels, optimizer):
    check_an_index_that_is_none(optimizer, 8)


@pytest.mark.parametrize("dim", [5, 64, 136, 264])
def test_stochastic_rounding_draws_what_the_cpu_draws(kernels, monkeypatch, dim):
    """Of sums, weights and steps that are exact, so that what is lost is the same."""
    indices, offsets, _ = made(9, [70, 0, 3], "sum", BF16)
    weight, dout = torch.ones(9, dim).bfloat16(), torch.randint(-3, 4, (3, dim)).bfloat16()
    for seed in (7, 2**62 + 5):
        given = dout, indices, offsets
        options = {"lr": 2.0**-11, "stochastic_rounding": True, "seed": seed}
        found = lk.embedding_bag_sgd_(weight.clone(), *given, **options)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "BACKENDS", CPU)
            assert torch.equal(found, lk.embedding_bag_sgd_(weight.clone(), *given, **options, backend="cpu"))


def test_stochastic_rounding_takes_its_words_of_philox_and_leaves_a_nan(kernels):
    on_cpu.test_stochastic_rounding_takes_its_words_of_philox()
    on_cpu.test_stochastic_rounding_leaves_a_nan_whose_bits_are_all_set()


@EACH
def test_same_bits_under_any_schedule(kernels, optimizer):
    function, _, settings = UPDATES[optimizer]
    indices, offsets, options = made(4, [90, 0, 40, 7], "weighted", BF16)
    weight, dout = torch.randn(4, 40).bfloat16(), torch.randn(4, 40).bfloat16()
    states, results = states_of(optimizer, weight), []
    options |= {"stochastic_rounding": True, "seed": 5}
    for seed in range(3):
        kernels.library.configure(seed)
        results.append([t.clone() for t in (weight, *states)])
        function(*results[-1], dout, indices, offsets, **settings, **options)
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


def test_launches_on_the_given_device_and_stream(kernels):
    kernels.where = 2, ctypes.c_void_p(0x1230)
    check_shapes([SHAPES[1]], "adam", "mean", F32)
    assert kernels.library.c.emu_last_device() == 2
    assert kernels.library.c.emu_last_stream() == 0x1230
    assert kernels.library.c.emu_current_device() == 0


def test_messages(kernels, monkeypatch):
    given = torch.ones(5, 3), torch.ones(1, 3), torch.tensor([[1, 4]])
    calls = {"embedding_bag_update": lambda: lk.embedding_bag_sgd_(*given, lr=0.1)}
    check_messages(kernels, monkeypatch, DTYPES, calls, 5)


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    run_tests_under_asan(__file__)
