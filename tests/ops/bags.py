"""Bags of indices that the tests of embedding_bag and its updates share."""

import torch

import lspm_kernels as lk

F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, dims, and how long the bags are: in eights of vectors, and in what these leave over
SHAPES = [
    (1, 1, [1]),
    (7, 3, [0, 2, 0, 1, 5, 0]),
    (50, 64, [20] * 9),
    (90, 33, [1, 40, 0, 3, 17]),
    (40, 150, [3, 0, 2, 9]),
    (5, 300, [70, 1]),
]
# Of three bags of six indices, and which of the bags they spoil; four offsets include the last.
NO_OFFSETS = [
    ([1, 2, 3], [0]),
    ([0, -5, 3], [0, 1]),
    ([0, 4, 2], [1]),
    ([0, 2, 2**40], [1, 2]),
    ([0, 2, 6, 5], [2]),
    ([0, 7, 7, 7], [0, 1, 2]),
]
EMPTY = [(5, 4, []), (5, 4, [0, 0]), (5, 0, [2, 1]), (0, 4, [0])]
OPTIONS = {
    "sum": {},
    "mean": {"mode": "mean"},
    "weighted": {"per_sample_weights": True},
    "padding": {"padding_idx": 0},
    "mean with padding": {"mode": "mean", "padding_idx": -1},
    "weighted with padding": {"per_sample_weights": True, "padding_idx": 0, "include_last_offset": True},
}


def made(rows, lengths, kind, dtype, integer=torch.int64):
    """indices, offsets and options of bags so long; half of the indices are of the first four rows."""
    n, options = sum(lengths), dict(OPTIONS[kind])
    indices = torch.randint(max(rows, 1), (n,))
    indices = torch.where(torch.rand(n) < 0.5, indices, indices % 4).to(integer)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(integer)
    if not options.get("include_last_offset"):
        offsets = offsets[:-1]
    if "per_sample_weights" in options:
        options["per_sample_weights"] = torch.randn(n).to(dtype)
    if rows == 0:
        options.pop("padding_idx", None)
    return indices, offsets, options


def check_no_offsets(dim, offsets, wrong):
    """On a GPU, which reports nothing, a bag of offsets that are none is NaN and the gradient is finite."""
    weight = torch.randn(5, dim, requires_grad=True)
    options = {"mode": "mean", "include_last_offset": len(offsets) == 4}
    out = lk.embedding_bag(weight, torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor(offsets), **options)
    assert [b for b in range(3) if out[b].isnan().any()] == wrong
    assert torch.autograd.grad(out[:, 0].sum(), weight)[0].isfinite().all()
