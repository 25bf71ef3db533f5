"""The CUDA kernels of mf, executed on the CPU (tests/cuda_on_cpu).

They run as a row of the op's table, on copies of the tensors in emulated device memory, so what the op hands
to its kernels is tested too.
"""

import ctypes
import dataclasses

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.library import FLAVOURS, KernelError, check_messages, fixture, run_tests_under_asan
from ops import test_mf as on_cpu
from ops.test_mf import EMPTY, SHAPES, bound, check, pairs, tables

import lspm_kernels as lk
import oracle
from lspm_kernels import dispatch
from lspm_kernels.ops import mf
from lspm_kernels.reference import mf as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {F32: 0, BF16: 1, F16: 2}
FEW_OF_EACH = 4, 6, 5, 40  # users, items, factors, pairs

library = fixture(build.ROOT / "csrc/cuda/mf.cu", build.HERE / "entries/mf.cpp")


class Kernels:
    """The kernels of the op's row, and where and how they run."""

    def __init__(self, library):
        self.library, self.misaligned, self.where = library, (), (0, None)

    def call(self, name, inputs, outputs, numbers, pairs):
        """Fills outputs, or None, by a C entry."""
        given = [self.library.copy(t, at in self.misaligned) for at, t in inputs.items()]
        made = [
            None if t is None else self.library.empty(t.shape, t.dtype, "outputs" in self.misaligned)
            for t in outputs
        ]
        users, items = inputs["user_factors"], inputs["item_factors"]
        shape = self.library.c.mf_shape
        shape.restype = ctypes.c_void_p
        sizes = (ctypes.c_int64 * 4)(pairs, len(users), *items.shape)
        shape = ctypes.c_void_p(shape(sizes, DTYPES[users.dtype]))
        self.library.call(name, *given, *made, *numbers, shape, *self.where)
        for to, buffer in zip(outputs, made, strict=True):
            if to is not None:
                to.copy_(buffer.tensor())

    def forward(self, *args):
        names = "user_factors", "item_factors", "user_bias", "item_bias", "users", "items"
        inputs = dict(zip(names, args[:6], strict=True))
        self.call("mf_forward", inputs, args[6:7], args[7:], args[4].numel())

    def backward(self, *args):
        names = "dratings", "user_factors", "item_factors", "users", "items"
        inputs = dict(zip(names, args[:5], strict=True))
        self.call("mf_backward", inputs, args[5:], (), args[3].numel())


@pytest.fixture
def kernels(library, monkeypatch):
    """The op runs these kernels, on CPU tensors."""
    kernels = Kernels(library)
    monkeypatch.setattr(dispatch, "_admitted", {})  # knows the table as it was
    row = next(row for row in mf.BACKENDS if row.name == "cuda")
    here = dataclasses.replace(row, device="cpu", missing=lambda: None, forward=kernels.forward)
    monkeypatch.setattr(mf, "BACKENDS", (here,))
    monkeypatch.setattr(mf, "_cuda_backward", kernels.backward)
    return kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:2], (60, 4, 50, 33), (3, 30, 64, 500), *EMPTY])
def test_shapes(kernels, shape, dtype):
    check(shape, dtype)
    check(shape, dtype, pairs(shape, torch.int32), biased=False, mean=0)


@pytest.mark.parametrize("factors", [2, 7, 8, 16, 31, 32, 33, 64, 128, 132, 256, 264])
def test_any_number_of_factors(kernels, factors):
    for dtype in (F32, BF16):
        check((3, 5, factors, 9), dtype)


def test_rows_of_few_and_of_many_pairs(kernels):
    """A warp's up to 128 pairs, beyond those of a block; in runs of 32 of each group of lanes."""
    counts = torch.tensor([127, 128, 129, 0, 1, 700, 31, 33])
    users = torch.repeat_interleave(torch.arange(8), counts)[torch.randperm(int(counts.sum()))]
    items = torch.randint(5, users.shape)
    for factors in (3, 130):
        check((8, 5, factors, 0), F32, (users, items))


def test_blocks_of_several_rows(kernels):
    """Of three users each, the last block of fewer, and of one long row among short ones."""
    users = torch.cat([torch.arange(0, 3200, 7), torch.full((150,), 3000)])
    check((3200, 3, 4, 0), F32, (users, torch.randint(3, users.shape)))


def test_long_sums_round_little(kernels):
    if kernels.library.flavour != "fast":
        pytest.skip("the same sums, slowly")
    on_cpu.test_long_sums_round_little(F32)
    on_cpu.test_long_sums_round_little(BF16)


@pytest.mark.parametrize("which", ["user_factors", "item_factors", "outputs"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_misaligned(kernels, dtype, which):
    kernels.misaligned = (which,)
    check((5, 7, 64, 40), dtype)


def test_ids_and_memory_as_torch_has_them(kernels):
    on_cpu.test_ids_of_any_shape_that_broadcast(((5, 1), (5, 8)))
    on_cpu.test_ids_of_any_shape_that_broadcast(((), ()))
    on_cpu.test_memory_that_is_not_contiguous()
    on_cpu.test_one_bias_without_the_other()


@pytest.mark.parametrize("wanted", [1, 2, 4, 8, 6, 9, 12])
def test_only_the_gradients_that_are_wanted(kernels, wanted):
    on_cpu.test_only_the_gradients_that_are_wanted(wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_in_their_pairs(kernels, value):
    on_cpu.test_special_values_stay_in_their_pairs(value)


@pytest.mark.parametrize("factors", [6, 64])
def test_an_id_that_is_none_reads_nothing_and_makes_nan(kernels, factors):
    u, i, a, b = (t.requires_grad_() for t in tables((4, 5, factors, 0), F32))
    users, items = torch.tensor([0, 4, 1, -1, 2, 0]), torch.tensor([1, 2, 2**40, 3, 4, 2])
    ratings = lk.mf(u, i, users, items, user_bias=a, item_bias=b)
    assert ratings.isnan().tolist() == [False, True, True, True, False, False]
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])  # a gradient of 0 does not make it a number
    gradients = torch.autograd.grad(ratings, [u, i, a, b], weights)
    assert gradients[0].isnan().all(1).tolist() == [False, True, False, False]
    assert gradients[1].isnan().all(1).tolist() == [False, False, True, True, False]
    for found in gradients[:2]:
        assert torch.equal(found.isnan().any(1), found.isnan().all(1))
    torch.testing.assert_close(gradients[0][0], (i[1] + i[2]).detach())
    assert not gradients[0][3].any() and not gradients[1][0].any()
    assert gradients[2].tolist() == [2, 0, 1, 0] and gradients[3].tolist() == [0, 1, 2, 1, 1]


def test_no_rows_at_all_and_yet_ids(kernels):
    for sizes, which in (((0, 3), 1), ((3, 0), 0)):
        u, i = (t.requires_grad_() for t in tables((*sizes, 8, 0), F32)[:2])
        ratings = lk.mf(u, i, torch.tensor([0, 2]), torch.tensor([2, 0]))
        assert ratings.isnan().all()
        gradient = torch.autograd.grad(ratings.sum(), (u, i))[which]
        assert gradient.isnan().all(1).tolist() == [True, False, True]


def test_same_bits_under_any_schedule(kernels):
    shape = (3, 5, 20, 500)
    ids, tensors = pairs(shape), tables(shape, F32)
    results = []
    for seed in range(3):
        kernels.library.configure(seed)
        results.append(list(oracle.outputs_and_gradients(bound(lk.mf, *ids), tensors).values()))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


def test_bits_of_a_row_depend_on_its_pairs_alone(kernels):
    """Neither on how many other rows there are, nor on how many of them a block has."""
    users, items = torch.randint(4, (600,)), torch.randint(3, (600,))
    tensors = tables((4, 3, 20, 0), F32)
    alone = oracle.outputs_and_gradients(bound(lk.mf, users, items), tensors)
    tensors[0], tensors[2] = torch.cat([tensors[0], torch.randn(2100, 20)]), torch.randn(2104)
    among = oracle.outputs_and_gradients(bound(lk.mf, users, items), tensors)
    for name in ("gradient 0", "gradient 2"):
        assert torch.equal(alone[name], among[name][:4])
        assert not among[name][4:].any()
    assert torch.equal(alone["gradient 1"], among["gradient 1"])


def test_the_kernel_takes_pairs_of_equal_rows_in_their_order(kernels):
    """What the op sorts is in order before it reaches the kernel: the kernel finds rows, no pairs."""
    ids, tensors = pairs((5, 7, 18, 300)), tables((5, 7, 18, 0), F32)
    dratings, found = torch.randn(300), [torch.zeros(7, 18), torch.zeros(7)]
    order = ids[1].sort(stable=True).indices
    of = dratings[order], *tensors[:2], *(t[order] for t in ids)
    kernels.backward(*of, None, found[0], None, found[1])
    leaves = [t.requires_grad_() for t in tensors]
    ratings = reference.mf(*leaves[:2], *ids, *leaves[2:])
    expected = torch.autograd.grad(ratings, [leaves[1], leaves[3]], dratings)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def both_ways(ids, tensors):
    leaves = [t.requires_grad_() for t in tensors]
    bound(lk.mf, *ids)(*leaves).sum().backward()


def test_launches_on_the_given_device_and_stream(kernels):
    kernels.where = 2, ctypes.c_void_p(0x1230)
    both_ways(pairs(FEW_OF_EACH), tables(FEW_OF_EACH, F32))
    assert kernels.library.c.emu_last_device() == 2
    assert kernels.library.c.emu_last_stream() == 0x1230
    assert kernels.library.c.emu_current_device() == 0


def test_messages(kernels, monkeypatch):
    ids, (u, i, a, b) = pairs(FEW_OF_EACH), tables(FEW_OF_EACH, F32)
    with pytest.raises(KernelError, match=r"^mf_backward: gradients must be of one table .*, got both$"):
        kernels.backward(torch.ones(40), u, i, *ids, u.clone(), None, None, b.clone())
    calls = {
        "mf_forward": lambda: lk.mf(u, i, *ids, user_bias=a),
        "mf_backward": lambda: kernels.backward(torch.ones(40), u, i, *ids, u.clone(), None, None, None),
    }
    check_messages(kernels, monkeypatch, DTYPES, calls, 5)


@pytest.mark.long
def test_asan():
    if "asan" in FLAVOURS:
        pytest.skip("this is the run under asan")
    run_tests_under_asan(__file__)
