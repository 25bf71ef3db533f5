"""The items that score best for each query."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, top_k_parts, triton
from lspm_kernels.dispatch import Backend, Limit
from lspm_kernels.operator import Operator
from lspm_kernels.reference import top_k_scores as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)

_ITEMS = Limit(
    "fewer than 2 ** 32 items",
    lambda queries, items, k: len(items) < 2**32,
    lambda queries, items, k: len(items),
)


def _most(k):
    return Limit(f"k of at most {k}", lambda queries, items, wanted: wanted <= k, lambda q, i, wanted: wanted)


_NAME = "top_k_scores_forward"
# On a GPU cuda comes first, as it looks at a score once where Triton merges whole tiles, and divides the
# items among blocks where queries are few: on an H200 it takes 0.36 times as long with 10,000, 0.02 with one.
BACKENDS = tuple(
    Backend(name, device, _FLOATS, kernel, None, missing, limits)
    for name, device, kernel, missing, limits in (
        ("cpu", "cpu", compiled.cpu_kernel(_NAME), compiled.nothing_missing, (_ITEMS,)),
        ("cuda", "cuda", top_k_parts.top_k_scores_forward, compiled.cuda_missing, (_ITEMS, _most(512))),
        ("triton", "cuda", triton.kernel(_NAME), triton.missing, (_ITEMS, _most(64))),
    )
)


def _forward(row, queries, items, item_bias, exclude_indptr, exclude_indices, k, saves=True):
    scores = queries.new_empty(len(queries), k, dtype=torch.float32)
    indices = queries.new_empty(len(queries), k, dtype=torch.int64)
    if row is not None:
        others = item_bias, exclude_indptr, exclude_indices
        others = (t if t is None else t.contiguous() for t in others)
        row.forward(checks.rows(queries), checks.rows(items), *others, scores, indices)
    return scores, indices


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, dscores, _):
    rule = "scores have no gradient: score the indices that it gives by a function that has one"
    raise NotImplementedError(f"top_k_scores: {rule}")


_top = Operator(
    "top_k_scores(Tensor queries, Tensor items, Tensor? item_bias, Tensor? exclude_indptr,"
    " Tensor? exclude_indices, int k) -> (Tensor scores, Tensor indices)",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def top_k_scores(
    queries: Tensor,
    items: Tensor,
    k: int,
    *,
    item_bias: Tensor | None = None,
    exclude_indptr: Tensor | None = None,
    exclude_indices: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k items that score best for each query, without the matrix of all scores.

    score[b, n] = <queries[b], items[n]> + item_bias[n]

    The larger score comes first, a NaN before every number as in torch.topk, and of equal scores the smaller
    index. A score's bits depend on its query, its item and its bias only: not on the other rows, nor on the
    number of threads. Beside the results this takes on a CPU some hundred KiB and 16 * k bytes of each of up
    to 252 queries a thread; on "cuda", where queries are few, at most 1024 * k bytes a multiprocessor.

    Args:
        queries: (B, D), float32, bfloat16 or float16; sums are in float32. A last dimension that is
            contiguous is read where it lies.
        items: (N, D), queries' dtype.
        k: 1 or more; may be larger than N.
        item_bias: (N,), queries' dtype or float32, or None.
        exclude_indptr: (B + 1,), int64 or int32: query b is not given the items
            exclude_indices[exclude_indptr[b] : exclude_indptr[b + 1]]. It need not begin at 0: a slice of it
            serves a batch of queries beside the exclude_indices of all.
        exclude_indices: (E,), int64 or int32, from 0 to N - 1, in any order, with repetitions. One that is
            none is an error on a CPU; on a GPU, for which nothing waits, it excludes nothing.
        backend: "cpu", "cuda" (k of at most 512), "triton" (k of at most 64) or "reference"; None takes the
            first that admits the call.

    Returns:
        scores: (B, k), float32, under autocast too; float64 of float64. -inf where fewer than k are left.
            To ask for their gradient is an error.
        indices: (B, k), int64; -1 where fewer than k are left.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: the backend asked for does not take this call; a gradient is asked for.
    """
    _check(queries, items, k, item_bias, exclude_indptr, exclude_indices)
    row = dispatch.pick("top_k_scores", BACKENDS, backend, queries, items, k)
    if row is None:
        if exclude_indptr is not None:
            _check_exclusions(exclude_indptr, exclude_indices, len(items))
        return reference.top_k_scores(queries, items, k, item_bias, exclude_indptr, exclude_indices)
    if item_bias is not None:
        item_bias = item_bias.to(torch.float32)
    if exclude_indptr is not None:
        exclude_indptr, exclude_indices = exclude_indptr.to(torch.int64), exclude_indices.to(torch.int64)
    return _top(row, queries, items, item_bias, exclude_indptr, exclude_indices, k)


def _check(queries, items, k, item_bias, exclude_indptr, exclude_indices):
    """Checks all but what the exclusions hold."""
    op = "top_k_scores"
    checks.matrix(op, "queries", queries)
    checks.matrix(op, "items", items)
    if items.shape[1] != queries.shape[1]:
        rule = f"have queries' dimension {queries.shape[1]}"
        raise ValueError(f"{op}: items must {rule}, got {tuple(items.shape)}")
    if items.dtype != queries.dtype:
        raise ValueError(f"{op}: items must have queries' dtype {queries.dtype}, got {items.dtype}")
    checks.integer(op, "k", k, 1)
    if item_bias is not None:
        checks.vector(op, "item_bias", item_bias, len(items), (queries.dtype, torch.float32))
    if (exclude_indptr is None) != (exclude_indices is None):
        rule = f"be there exactly where exclude_indptr is, got {checks.shape(exclude_indices)}"
        raise ValueError(f"{op}: exclude_indices must {rule}")
    if exclude_indptr is not None:
        checks.vector(op, "exclude_indptr", exclude_indptr, len(queries) + 1, _INTEGERS)
        checks.vector(op, "exclude_indices", exclude_indices, None, _INTEGERS)
    others = {"exclude_indptr": exclude_indptr, "exclude_indices": exclude_indices}
    checks.beside(op, "queries", queries.device, items=items, item_bias=item_bias, **others)


def _check_exclusions(indptr, indices, items):
    """Checks the exclusions where they can be read here, as the CPU kernel does."""
    if not (checks.readable(indptr) and checks.readable(indices)):
        return
    places = indptr.tolist()
    for before, place in zip([0, *places], places, strict=False):
        if not 0 <= place <= len(indices):
            rule = f"be from 0 to the number of exclude_indices, which is {len(indices)}"
            raise ValueError(f"top_k_scores: exclude_indptr must {rule}, got {place}")
        if place < before:
            got = f"{place} after {before}"
            raise ValueError(f"top_k_scores: exclude_indptr must not decrease, got {got}")
    checks.rows_of("top_k_scores", "exclude_indices", indices[places[0] : places[-1]], items)
