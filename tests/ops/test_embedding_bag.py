"""embedding_bag: the public function, under every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from ops.bags import BF16, DTYPES, EMPTY, F32, OPTIONS, SHAPES, made
from torch._subclasses.fake_tensor import FakeTensorMode

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import embedding_bag as ops
from lspm_kernels.reference import embedding_bag as reference

KINDS = pytest.mark.parametrize("kind", OPTIONS)


def bound(function, indices, offsets, **options):
    """function of a table and, where there are any, weights; in the dtype of the table."""

    def call(weight, per_sample_weights=None):
        if per_sample_weights is not None:
            options["per_sample_weights"] = per_sample_weights
        return function(weight, indices, offsets, **options)

    return call


def check(weight, indices, offsets=None, *, gradients=True, **options):
    tensors = [weight]
    if "per_sample_weights" in options:
        tensors.append(options.pop("per_sample_weights"))
    functions = (lk.embedding_bag, reference.embedding_bag)
    oracle.check(*(bound(f, indices, offsets, **options) for f in functions), tensors, gradients=gradients)


@pytest.mark.every_backend
@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_reference(kind, dtype):
    for rows, dim, lengths in SHAPES + EMPTY:
        indices, offsets, options = made(rows, lengths, kind, dtype)
        check(torch.randn(rows, dim).to(dtype), indices, offsets, **options)


@pytest.mark.every_backend
@KINDS
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_the_reference_and_we_are_torchs_function(kind, integer):
    indices, offsets, options = made(50, [3, 0, 7, 1], kind, F32, integer)
    weight = torch.randn(50, 19)
    theirs = F.embedding_bag(indices, weight, offsets, **({"mode": "sum"} | options))
    for function in (lk.embedding_bag, reference.embedding_bag):
        torch.testing.assert_close(function(weight, indices, offsets, **options), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for rows, dim, lengths in SHAPES[2:]:
        for kind in ("mean with padding", "weighted"):
            indices, offsets, options = made(rows, lengths, kind, dtype)
            check(torch.randn(rows, dim).to(dtype), indices, offsets, **options)


@pytest.mark.every_backend
def test_bags_of_one_length_and_tensors_that_lie_otherwise():
    weight, indices = torch.randn(33, 40).t(), torch.randint(40, (9, 4)).t()
    check(weight, indices)
    check(weight, indices, per_sample_weights=torch.randn(9, 4).t())
    check(weight, indices.reshape(-1), torch.arange(0, 36, 4)[::2], mode="mean")
    check(weight, torch.zeros(3, 0, dtype=torch.int64), mode="mean")


def test_offsets_may_be_of_the_other_integer_type():
    weight, indices = torch.randn(5, 3), torch.tensor([4, 1, 1])
    expected = lk.embedding_bag(weight, indices, torch.tensor([0, 1]))
    assert torch.equal(lk.embedding_bag(weight, indices, torch.tensor([0, 1], dtype=torch.int32)), expected)
    with pytest.raises(ValueError, match="offsets must not exceed the number of indices 3, got 4294967297"):
        lk.embedding_bag(weight, indices.int(), torch.tensor([0, 2**32 + 1]))


@pytest.mark.every_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 1e-40])
def test_special_values_stay_in_their_bag_and_padding_is_not_read(value):
    weight = torch.randn(6, 35)
    weight[2, 17] = value
    check(weight, torch.tensor([[0, 2], [1, 3], [2, 2]]), gradients=False)
    out = lk.embedding_bag(weight, torch.tensor([[0, 2], [2, 2]]), padding_idx=2)
    assert torch.equal(out, torch.stack([weight[0], torch.zeros(35)]))


@KINDS
def test_same_bits_for_any_number_of_threads(kind):
    indices, offsets, options = made(3000, [40] * 2000, kind, BF16)  # work for more than one thread
    weights = options.pop("per_sample_weights", None)
    tensors = [torch.randn(3000, 40).bfloat16(), *([] if weights is None else [weights])]
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        found = oracle.outputs_and_gradients(bound(lk.embedding_bag, indices, offsets, **options), tensors)
        results.append(found)
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name
    plain = oracle.outputs_and_gradients(
        bound(reference.embedding_bag, indices, offsets, **options), [t.double() for t in tensors]
    )
    torch.testing.assert_close(results[0]["gradient 0"].double(), plain["gradient 0"], rtol=2**-7, atol=2e-3)


def test_many_rows_sort_in_more_than_one_pass():
    indices = torch.randint(3_000_000, (4, 50))
    indices[1, ::2] = indices[2, ::2] = indices[0, ::2]
    weight = torch.randn(3_000_000, 1)
    ours, theirs = (
        oracle.outputs_and_gradients(bound(f, indices, None), [weight])
        for f in (lk.embedding_bag, reference.embedding_bag)
    )
    assert all(map(torch.equal, ours.values(), theirs.values()))


@pytest.mark.every_backend
def test_gradients_only_of_what_wants_one():
    weight, weights = torch.randn(5, 3, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    indices = torch.tensor([[1, 4], [4, 0]])
    out = lk.embedding_bag(weight.detach(), indices, per_sample_weights=weights)
    (found,) = torch.autograd.grad(out.sum(), weights)
    torch.testing.assert_close(found, weight.detach()[indices].sum(-1))
    out = lk.embedding_bag(weight, indices, per_sample_weights=weights.detach())
    assert len(out.grad_fn.saved_tensors) == 4 and out.grad_fn.saved_tensors[0] is None
    assert not lk.embedding_bag(weight.detach(), indices).requires_grad


OFFSETS = torch.tensor([0, 2])
GOOD = {"weight": torch.ones(5, 3), "indices": torch.tensor([0, 1, 4]), "offsets": OFFSETS}
BAD = {
    "weight must be a floating-point tensor (N, D), got list": {"weight": [1.0]},
    "weight must be a floating-point tensor (N, D), got (5,) torch.float32": {"weight": torch.ones(5)},
    "weight must be a floating-point tensor (N, D), got (5, 3) torch.int64": {
        "weight": torch.ones(5, 3, dtype=torch.int64)
    },
    "indices must be a tensor (B, L), or (n,) with offsets, got (1, 1, 1)": {
        "indices": torch.zeros(1, 1, 1, dtype=torch.int64)
    },
    "indices must have dtype torch.int32 or torch.int64, got torch.float32": {"indices": torch.zeros(3)},
    "indices must be at least 0 and below 5, got 5": {"indices": torch.tensor([0, 5, -1])},
    "indices must be at least 0 and below 5, got -1": {"indices": torch.tensor([0, -1, 5])},
    "indices must be at least 0 and below 5, got -4294967296": {"indices": torch.tensor([0, -(2**32), 1])},
    "indices must be on weight's device cpu, got meta": {"indices": torch.ones(3, device="meta").long()},
    "indices must be none where there is no bag, got 3": {"offsets": torch.zeros(0, dtype=torch.int64)},
    "offsets must be there beside indices of one dimension and None beside two, got None": {"offsets": None},
    "offsets must be there beside indices of one dimension and None beside two, got (2,)": {
        "indices": torch.zeros(2, 2, dtype=torch.int64)
    },
    "offsets must be a tensor of one dimension, got (1, 2)": {"offsets": OFFSETS[None]},
    "offsets must be a tensor of one dimension, not empty with include_last_offset, got (0,)": {
        "offsets": OFFSETS[:0],
        "include_last_offset": True,
    },
    "offsets must have dtype torch.int32 or torch.int64, got torch.float32": {"offsets": OFFSETS.float()},
    "offsets must begin at 0, got 1": {"offsets": torch.tensor([1, 2])},
    "offsets must not decrease, got 1": {"offsets": torch.tensor([0, 2, 1])},
    "offsets must not exceed the number of indices 3, got 4": {"offsets": torch.tensor([0, 2, 4])},
    "offsets must end at the number of indices 3, got 2": {"include_last_offset": True},
    "mode must be one of sum, mean, got 'max'": {"mode": "max"},
    "mode must be \"sum\" beside per_sample_weights, got 'mean'": {
        "mode": "mean",
        "per_sample_weights": torch.ones(3),
    },
    "per_sample_weights must be a tensor of indices' shape (3,), got (2,)": {
        "per_sample_weights": torch.ones(2)
    },
    "per_sample_weights must have weight's dtype torch.float32, got torch.float64": {
        "per_sample_weights": torch.ones(3).double()
    },
    "padding_idx must be None or at least -5 and below 5, got 5": {"padding_idx": 5},
    "padding_idx must be None or at least -5 and below 5, got 1.0": {"padding_idx": 1.0},
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message, backend):
    with pytest.raises(ValueError) as error:
        lk.embedding_bag(**(GOOD | BAD[message]), backend=backend)
    assert str(error.value) == f"embedding_bag: {message}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_flag_may_be_anything_that_is_true_or_false(backend):
    assert lk.embedding_bag(**GOOD, include_last_offset=None, backend=backend).shape == (2, 3)


def test_the_binding_refuses_what_would_touch_other_memory():
    weight, indices, offsets, out = torch.ones(5, 3), *list(GOOD.values())[1:], torch.empty(2, 3)
    for message, wrong in {
        "weight must have another number of elements": {0: torch.ones(5, 4)},
        "weight must be contiguous": {0: torch.ones(3, 5).t()},
        "indices must be int32 or int64": {1: indices.float()},
        "indices must be as many in each bag": {2: None},
        "offsets must have the dtype": {2: offsets.int()},
        "offsets must be one a bag, or one more": {2: torch.zeros(4, dtype=torch.int64)},
        "per_sample_weights must have another number": {3: torch.ones(2)},
        "out must have 2 dimensions": {4: out[0]},
        "out must be float32, bfloat16 or float16": {4: out.double()},
    }.items():
        args = [weight, indices, offsets, None, out]
        for place, value in wrong.items():
            args[place] = value
        with pytest.raises(ValueError, match=message):
            compiled.cpu.embedding_bag_forward(*args, -1, False, 1)
    with pytest.raises(ValueError, match="weight and per_sample_weights must be there where dweights is"):
        compiled.cpu.embedding_bag_backward(
            out, None, indices, offsets, None, None, torch.empty(3), -1, False, 1
        )
    with pytest.raises(ValueError, match="dweight or dweights must be there"):
        compiled.cpu.embedding_bag_backward(out, None, indices, offsets, None, None, None, -1, False, 1)


def test_nothing_is_written_where_an_index_is_wrong():
    out = torch.full((2, 3), 7.0)
    with pytest.raises(ValueError, match="got 9"):
        compiled.cpu.embedding_bag_forward(
            torch.ones(5, 3), torch.tensor([[0, 1], [1, 9]]), None, None, out, -1, False, 1
        )
    assert (out == 7).all()


def test_only_the_rows_of_the_table_run():
    assert [row.name for row in ops.BACKENDS] == ["cpu", "cuda", "triton"]
    with pytest.raises(
        ValueError, match="embedding_bag: backend must be one of cpu, cuda, triton, reference"
    ):
        lk.embedding_bag(**GOOD, backend="tpu")
    with pytest.warns(lk.FallbackWarning, match="embedding_bag: cpu needs dtype float32, bfloat16, float16"):
        lk.embedding_bag(torch.ones(5, 3).double(), *list(GOOD.values())[1:])


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compile(mode):
    torch._dynamo.reset()
    indices, offsets, _ = made(9, [3, 0, 4], "sum", F32)
    given = [torch.randn(9, 5), torch.randn(7)]
    ours, theirs = (
        lambda w, s, f=f: f(w.sin(), indices, offsets, per_sample_weights=s.sin())
        for f in (lk.embedding_bag, reference.embedding_bag)
    )
    oracle.check(torch.compile(ours, fullgraph=True, backend=mode), theirs, given)
    if mode == "aot_eager":  # with sizes that are symbols
        function = torch.compile(lk.embedding_bag, fullgraph=True, backend=mode, dynamic=True)
        for rows, length in ((9, 3), (20, 4)):
            weight, indices = torch.randn(rows, 5), torch.randint(9, (6, length))
            torch.testing.assert_close(function(weight, indices), reference.embedding_bag(weight, indices))


def test_opcheck():
    op = torch.ops.lspm
    weight, weights = torch.randn(9, 5, requires_grad=True), torch.randn(7, requires_grad=True)
    indices, offsets, _ = made(9, [3, 0, 4], "sum", F32)
    torch.library.opcheck(op.embedding_bag.default, (weight, indices, offsets, weights, 3, -1, False, "cpu"))
    torch.library.opcheck(op.embedding_bag.default, (weight, indices, offsets, None, 3, 2, True, "cpu"))
    dout, weight, weights = torch.randn(3, 5), weight.detach(), weights.detach()
    given = (dout, indices, offsets, weights, 9, -1, False, "cpu")
    torch.library.opcheck(op.embedding_bag_backward.default, given)
    given = (dout, weight, indices, offsets, weights, -1, "cpu")
    torch.library.opcheck(op.embedding_bag_weights_backward.default, given)


def test_transforms_derivatives_and_fakes():
    weight, indices = torch.randn(2, 9, 5), torch.randint(9, (3, 4))
    ours, theirs = (
        torch.vmap(torch.func.grad(lambda w, f=f: f(w, indices).pow(3).sum()))(weight)
        for f in (lk.embedding_bag, reference.embedding_bag)
    )
    torch.testing.assert_close(ours, theirs)
    leaf = weight[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(lk.embedding_bag(leaf, indices).pow(2).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="embedding_bag_backward: a second derivative"):
        torch.autograd.grad(gradient.sum(), leaf)
    with FakeTensorMode() as mode:
        assert lk.embedding_bag(mode.from_tensor(leaf), mode.from_tensor(indices)).shape == (3, 5)
    assert lk.embedding_bag(leaf.to("meta"), indices.to("meta")).shape == (3, 5)
    with torch.autocast("cpu", BF16):
        assert lk.embedding_bag(leaf, indices).dtype == F.embedding_bag(indices, leaf).dtype == F32
