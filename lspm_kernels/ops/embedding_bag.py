"""Sums and means of the rows of a table by bags of indices."""

import torch
from torch import Tensor

from lspm_kernels import compiled, dispatch, sorted_bags, triton
from lspm_kernels import embedding_bag_checks as checks
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import embedding_bag as reference

_OP = "embedding_bag"
_cuda_backward = compiled.cuda_kernel(f"{_OP}_backward")


def _sorted_backward(
    dout, weight, indices, offsets, per_sample_weights, dweight, dweights, padding_idx, mean
):
    """The CUDA kernels', which add to a table of zeros and take places in the order of its rows."""
    if dweight is not None:
        dweight.zero_()
    if indices.numel():
        bags, dim = dout.shape
        sorting = None, None, None, None
        if dweight is not None:
            sorting = sorted_bags.sorted_places(indices, bags, dim, mean)
        places = indices, offsets, per_sample_weights, sorted_bags.bags_of(indices, offsets, bags), *sorting
        _cuda_backward(dout, weight, *places, dweight, dweights, padding_idx, mean)


def _backward_of(name, kernel):
    return _sorted_backward if name == "cuda" else kernel(f"{_OP}_backward")


# On a GPU cuda comes first: on an H200 it takes 0.4 to 0.6 times as long, and 0.6 times with the gradient.
_ROWS = (
    ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing, ()),
    ("cuda", "cuda", compiled.cuda_kernel, compiled.cuda_missing, (checks.GRID,)),
    ("triton", "cuda", triton.kernel, triton.missing, (checks.GRID,)),
)
BACKENDS = tuple(
    Backend(
        name, device, checks.FLOATS, kernel(f"{_OP}_forward"), _backward_of(name, kernel), missing, limits
    )
    for name, device, kernel, missing, limits in _ROWS
)


def _forward(row, weight, indices, offsets, per_sample_weights, count, padding_idx, mean, saves=True):
    out = weight.new_empty(count, weight.shape[1])
    if row is not None:
        row.forward(weight.contiguous(), indices, offsets, per_sample_weights, out, padding_idx, mean)
    return out


def _backward(row, dout, indices, offsets, per_sample_weights, rows, padding_idx, mean, saves=True):
    dweight = dout.new_empty(rows, dout.shape[1])
    if row is not None:
        bags = indices, offsets, per_sample_weights
        row.backward(dout.contiguous(), None, *bags, dweight, None, padding_idx, mean)
    return dweight


def _backward_weights(row, dout, weight, indices, offsets, per_sample_weights, padding_idx, saves=True):
    dweights = torch.empty_like(per_sample_weights)
    if row is not None:
        bags = indices, offsets, per_sample_weights
        row.backward(dout.contiguous(), weight.contiguous(), *bags, None, dweights, padding_idx, False)
    return dweights


_BAGS = "Tensor indices, Tensor? offsets, Tensor? per_sample_weights"
table_backward = Operator(
    f"embedding_bag_backward(Tensor dout, {_BAGS}, SymInt rows, int padding_idx, bool mean) -> Tensor",
    BACKENDS,
    _backward,
)
_weights_backward = Operator(
    f"embedding_bag_weights_backward(Tensor dout, Tensor weight, {_BAGS}, int padding_idx) -> Tensor",
    BACKENDS,
    _backward_weights,
)


def _save(ctx, inputs, output):
    weight, *bags, _, ctx.padding_idx, ctx.mean = inputs
    ctx.rows = weight.shape[0]
    per_sample_weights = bags[2]
    weighted = per_sample_weights is not None and per_sample_weights.requires_grad
    ctx.save_for_backward(weight if weighted else None, *bags)


def _gradient(ctx, dout):
    weight, *bags = ctx.saved_tensors
    dweight = dweights = None
    if ctx.needs_input_grad[0]:
        dweight = table_backward(ctx.row, dout, *bags, ctx.rows, ctx.padding_idx, ctx.mean)
    if ctx.needs_input_grad[3]:
        dweights = _weights_backward(ctx.row, dout, weight, *bags, ctx.padding_idx)
    return dweight, None, None, dweights, None, None, None


_bags = Operator(
    f"embedding_bag(Tensor weight, {_BAGS}, SymInt count, int padding_idx, bool mean) -> Tensor",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Sums or means of the rows of a table, by bags of indices: torch.nn.functional.embedding_bag.

    out[b] = sum over the indices p of bag b of per_sample_weights[p] * weight[indices[p]], or, with mode
    "mean", that without weights divided by the number of indices in the bag. An empty bag gives 0.

    The gradient of weight is dense, and its rows are added up in the order of the indices, on a GPU in parts
    that depend on the indices alone: the same bits on every run and any number of threads. To train a large
    table without a gradient, see embedding_bag_adagrad_ and FusedEmbeddingBag.

    Args:
        weight: (N, D), float32, bfloat16 or float16; sums are in float32.
        indices: (B, L), bags of L indices each, or (n,) beside offsets; int32 or int64, from 0 to
            N - 1. One outside is an error on a CPU; on a GPU, for which nothing waits, it makes its bag NaN
            and the gradient of its weight, and adds to no row's.
        offsets: (B,), int32 or int64: where each bag begins in indices, from 0 on and never falling; a bag
            ends where the next begins. Others are an error on a CPU; on a GPU the bag where they are wrong
            is NaN, and which bag's gradient its indices get is left open.
        mode: "sum" or "mean".
        per_sample_weights: of indices' shape and weight's dtype, or None; with mode "sum" alone.
        padding_idx: an index that is no part of its bag, nor counted in its mean; below 0 it counts from N.
        include_last_offset: offsets have B + 1 elements, the last of them n.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        out: (B, D), weight's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: the backend asked for does not take this call.

    Source: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation
    Systems" (2019), section 2.1.1.
    """
    checks.table(_OP, weight)
    bags, count, mean, padding = checks.bags(
        _OP, weight, indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset
    )
    row = dispatch.pick(_OP, BACKENDS, backend, weight, bags[0].numel(), count)
    if row is not None:
        return _bags(row, weight, *bags, count, padding, mean)
    checks.values(_OP, weight.shape[0], *bags[:2], count)
    return reference.embedding_bag(
        weight, indices, offsets, mode=mode, per_sample_weights=per_sample_weights, padding_idx=padding_idx,
        include_last_offset=bool(include_last_offset),
    )  # fmt: skip
