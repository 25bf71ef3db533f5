"""The ratings that a matrix factorisation predicts."""

import numbers

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, triton
from lspm_kernels.dispatch import Backend, Limit
from lspm_kernels.operator import Operator
from lspm_kernels.reference import mf as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)

_ROWS = Limit(
    "fewer than 2 ** 31 rows of a table",
    lambda user_factors, item_factors: max(len(user_factors), len(item_factors)) < 2**31,
    lambda user_factors, item_factors: max(len(user_factors), len(item_factors)),
)
_cuda_backward = compiled.cuda_kernel("mf_backward")


def _sorted_backward(dratings, user_factors, item_factors, users, items, *gradients):
    """The CUDA kernel's, which takes one table's gradients at a time and pairs in the order of its rows."""
    duser_factors, ditem_factors, duser_bias, ditem_bias = gradients
    pairs = dratings.view(-1), users.view(-1), items.view(-1)
    for ids, of_table in (
        (users, (duser_factors, None, duser_bias, None)),
        (items, (None, ditem_factors, None, ditem_bias)),
    ):
        if any(g is not None for g in of_table):
            # Stable, so that a row's pairs stay in their order.
            order = ids.view(-1).sort(stable=True).indices
            gradient, *both_ids = (t[order] for t in pairs)
            _cuda_backward(gradient, user_factors, item_factors, *both_ids, *of_table)


def _backward_of(name, kernel):
    return _sorted_backward if name == "cuda" else kernel("mf_backward")


# On a GPU cuda comes first: on an H200 it takes 0.4 to 0.7 times as long, with the gradient 1.15 times.
BACKENDS = tuple(
    Backend(name, device, _FLOATS, kernel("mf_forward"), _backward_of(name, kernel), missing, (_ROWS,))
    for name, device, kernel, missing in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing),
        ("cuda", "cuda", compiled.cuda_kernel, compiled.cuda_missing),
        ("triton", "cuda", triton.kernel, triton.missing),
    )
)


def _forward(row, user_factors, item_factors, user_bias, item_bias, users, items, mean, saves=True):
    ratings = user_factors.new_empty(users.shape)
    if row is not None:
        tensors = user_factors, item_factors, user_bias, item_bias, users, items
        row.forward(*(t if t is None else t.contiguous() for t in tensors), ratings, mean)
    return ratings


def _backward(row, dratings, user_factors, item_factors, users, items, *wanted, saves=True):
    sizes = user_factors.shape, item_factors.shape, user_factors.shape[:1], item_factors.shape[:1]
    gradients = [dratings.new_empty(size if w else 0) for size, w in zip(sizes, wanted, strict=True)]
    if row is not None:
        inputs = dratings, user_factors, item_factors, users, items
        outputs = (g if w else None for g, w in zip(gradients, wanted, strict=True))
        row.backward(*(t.contiguous() for t in inputs), *outputs)
    return tuple(gradients)


_ratings_backward = Operator(
    "mf_backward(Tensor dratings, Tensor user_factors, Tensor item_factors, Tensor users, Tensor items,"
    " bool wants_duser_factors, bool wants_ditem_factors, bool wants_duser_bias, bool wants_ditem_bias)"
    " -> (Tensor duser_factors, Tensor ditem_factors, Tensor duser_bias, Tensor ditem_bias)",
    BACKENDS,
    _backward,
)


def _save(ctx, inputs, output):
    user_factors, item_factors, _, _, users, items, _ = inputs
    ctx.save_for_backward(user_factors, item_factors, users, items)


def _gradient(ctx, dratings):
    wanted = ctx.needs_input_grad[:4]
    gradients = _ratings_backward(ctx.row, dratings, *ctx.saved_tensors, *wanted)
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None


_ratings = Operator(
    "mf(Tensor user_factors, Tensor item_factors, Tensor? user_bias, Tensor? item_bias, Tensor users,"
    " Tensor items, float mean) -> Tensor",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def mf(
    user_factors: Tensor,
    item_factors: Tensor,
    users: Tensor,
    items: Tensor,
    *,
    user_bias: Tensor | None = None,
    item_bias: Tensor | None = None,
    mean: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The ratings that a matrix factorisation predicts for pairs of a user and an item.

    r = mean + user_bias[u] + item_bias[i] + <user_factors[u], item_factors[i]>

    The gradients of factors and biases are dense. A row's gradient adds up its pairs in their order and is
    written once: the same bits on every run and for any number of threads.

    Args:
        user_factors: (U, K), float32, bfloat16 or float16; sums are in float32.
        item_factors: (I, K), user_factors' dtype.
        users: ids from 0 to U - 1, int64 or int32, of any shape. One that is none is an error on a CPU; on a
            GPU, for which nothing waits, it makes the rating NaN, and the gradient of the pair's other row.
        items: ids from 0 to I - 1, of a shape that broadcasts with users': (n,) rates n pairs, (n, 1) beside
            (n, m) ranks m candidates for each of n users.
        user_bias: (U,), user_factors' dtype, or None.
        item_bias: (I,), user_factors' dtype, or None.
        mean: the rating of all, a number.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        ratings: user_factors' dtype, under autocast too; the shape that users and items broadcast to.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: the backend asked for does not take this call; a second derivative is asked for.

    Source: Koren, Bell and Volinsky, "Matrix Factorization Techniques for Recommender Systems" (2009),
    equation 4.
    """
    users, items = _check(user_factors, item_factors, users, items, user_bias, item_bias, mean)
    row = dispatch.pick("mf", BACKENDS, backend, user_factors, item_factors)
    if row is None:
        checks.rows_of("mf", "users", users, len(user_factors))
        checks.rows_of("mf", "items", items, len(item_factors))
        return reference.mf(user_factors, item_factors, users, items, user_bias, item_bias, mean)
    ids = users.to(torch.int64), items.to(torch.int64)
    return _ratings(row, user_factors, item_factors, user_bias, item_bias, *ids, float(mean))


def _check(user_factors, item_factors, users, items, user_bias, item_bias, mean):
    """Checks all but the values of ids; gives them as they broadcast."""
    checks.matrix("mf", "user_factors", user_factors)
    checks.matrix("mf", "item_factors", item_factors)
    dtype, K = user_factors.dtype, user_factors.shape[1]
    if item_factors.shape[1] != K:
        rule = f"have user_factors' {K} factors in a row"
        raise ValueError(f"mf: item_factors must {rule}, got {tuple(item_factors.shape)}")
    if item_factors.dtype != dtype:
        raise ValueError(f"mf: item_factors must have user_factors' dtype {dtype}, got {item_factors.dtype}")
    if user_bias is not None:
        checks.vector("mf", "user_bias", user_bias, len(user_factors), (dtype,))
    if item_bias is not None:
        checks.vector("mf", "item_bias", item_bias, len(item_factors), (dtype,))
    for name, t in (("users", users), ("items", items)):
        if not isinstance(t, Tensor) or t.dtype not in _INTEGERS:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"mf: {name} must be a tensor of torch.int64 or torch.int32, got {got}")
    others = {"item_factors": item_factors, "user_bias": user_bias, "item_bias": item_bias}
    checks.beside("mf", "user_factors", user_factors.device, **others, users=users, items=items)
    if isinstance(mean, bool) or not isinstance(mean, numbers.Real):
        raise ValueError(f"mf: mean must be a number, got {type(mean).__name__}")
    if users.shape == items.shape:
        return users, items
    try:
        return torch.broadcast_tensors(users, items)
    except RuntimeError:
        rule = f"have a shape that broadcasts with users' {tuple(users.shape)}"
        raise ValueError(f"mf: items must {rule}, got {tuple(items.shape)}") from None
