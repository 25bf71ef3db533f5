"""Matrix factorisation by stochastic gradient descent, in place."""

import math
import numbers

import torch
from torch import Tensor

from lspm_kernels import checks, checks_of_memory, compiled, dispatch, triton
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import InPlaceOperator
from lspm_kernels.rating_blocks import RatingBlocks, parts_on_gpu, sort_ratings
from lspm_kernels.reference import mf_sgd as reference

LOSSES = ("squared", "logistic")
_MOST_FACTORS = 512

# On a GPU triton comes first: on an H200, at MovieLens-1M's size, it takes half as long as cuda.
BACKENDS = tuple(
    Backend(name, device, (torch.float32, torch.bfloat16), kernel("mf_sgd_update"), None, missing)
    for name, device, kernel, missing in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing),
        ("triton", "cuda", triton.kernel, triton.missing),
        ("cuda", "cuda", compiled.cuda_kernel, compiled.cuda_missing),
    )
)


def _update(row, *args):
    row.forward(*args)


_sgd = InPlaceOperator(
    "mf_sgd(Tensor(a!) user_factors, Tensor(b!) item_factors, Tensor(c!)? user_bias, Tensor(d!)? item_bias,"
    " Tensor(e!)? user_squares, Tensor(f!)? item_squares, Tensor users, Tensor items, Tensor ratings,"
    " Tensor? weight, Tensor offsets, Tensor(g!) loss, float[] step, bool nonnegative, bool logistic,"
    " int seed) -> ()",
    BACKENDS,
    _update,
)


def mf_sgd_(
    user_factors: Tensor,
    item_factors: Tensor,
    user_bias: Tensor | None,
    item_bias: Tensor | None,
    users: Tensor | RatingBlocks,
    items: Tensor | None = None,
    ratings: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    mean: float = 0.0,
    lr: float | tuple[float, float],
    reg: float | tuple[float, float, float, float] = 0.0,
    l1: float | tuple[float, float] = 0.0,
    nonnegative: bool = False,
    loss: str = "squared",
    squares: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> Tensor:
    """One pass of stochastic gradient descent on R = <U, V> + b_u + b_i + mean, in place. Of each rating,

    e = weight * (rating - prediction)
    p_u += lr * (e * q_i - reg * p_u), q_i += lr * (e * p_u - reg * q_i), b += lr * (e - reg * b),

    all from the values before it. L1 then moves factors by lr * l1 towards 0, which they do not cross.

    The tables change as if one thread took the ratings in the order that rating_blocks() gives them: bits
    depend neither on the number of threads nor on the run. Every prediction is computed in float32. bfloat16
    factors are rounded at random, up or down in proportion, without which small steps would be lost.

    Args:
        user_factors, item_factors: (U, K) and (I, K), float32 or bfloat16, K from 1 to 512; contiguous.
        user_bias, item_bias: (U,) and (I,), float32, or None.
        users: (n,) ids of rows, int32 or int64, with `items` and `ratings` (n,) float32; or RatingBlocks,
            which hold them in order: to sort takes about as long as a pass.
        weight: (n,) float32, at least 0; None for 1 each.
        mean: what predictions begin with, as a rule the ratings' mean. It is not learnt.
        lr: the learning rate, or that of factors and that of biases.
        reg: L2, or that of user factors, item factors, user biases and item biases.
        l1: L1, or that of user factors and item factors.
        nonnegative: factors below 0 become 0.
        loss: "squared"; or "logistic", of ratings from 0 to 1, whose prediction is the sigmoid of R.
        squares: (U,) and (I,), float32: Adagrad with one rate for a row: the mean square of the gradient of a
            row's factors is added to its element, by whose root its lr[0] is divided. Biases have lr[1].
        seed: of the rounding of bfloat16; another one for each pass.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        The loss, a float32 on the CPU: the sum over ratings of weight * (rating - prediction) ** 2, or of
        weight * cross-entropy, each before its own update.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, an id is outside its table, or a
            table requires a gradient.
        NotImplementedError: the backend asked for does not take this call.

    Source: Koren, Bell and Volinsky, "Matrix factorization techniques for recommender systems" (2009).
    """
    _check_table("user_factors", user_factors, user_factors, 2)
    _check_table("item_factors", item_factors, user_factors, 2)
    if user_factors.shape[1] != item_factors.shape[1]:
        got = f"{user_factors.shape[1]} and {item_factors.shape[1]}"
        raise ValueError(f"mf_sgd_: user_factors and item_factors must have as many columns, got {got}")
    if not 1 <= user_factors.shape[1] <= _MOST_FACTORS:
        got = user_factors.shape[1]
        raise ValueError(f"mf_sgd_: user_factors must have from 1 to {_MOST_FACTORS} columns, got {got}")
    if squares is not None and (not isinstance(squares, tuple | list) or len(squares) != 2):
        raise ValueError(f"mf_sgd_: squares must be two tensors, got {squares!r}")
    user_squares, item_squares = (None, None) if squares is None else squares
    sizes = user_factors.shape[0], item_factors.shape[0]
    vectors = {
        "user_bias": (user_bias, sizes[0]),
        "item_bias": (item_bias, sizes[1]),
        "squares[0]": (user_squares, sizes[0]),
        "squares[1]": (item_squares, sizes[1]),
    }
    for name, (t, size) in vectors.items():
        if t is not None:
            _check_table(name, t, user_factors, 1)
            if t.shape[0] != size:
                raise ValueError(f"mf_sgd_: {name} must have {size} elements, got {t.shape[0]}")
    tables = {"user_factors": user_factors, "item_factors": item_factors}
    checks_of_memory.apart("mf_sgd_", tables | {name: t for name, (t, _) in vectors.items()})
    step = _numbers(mean, lr, reg, l1)
    checks.one_of("mf_sgd_", "loss", loss, LOSSES)
    checks.integer("mf_sgd_", "seed", seed, 0)
    blocks = _blocks(users, items, ratings, weight, sizes)
    if blocks.ratings.device != user_factors.device:
        got = blocks.ratings.device
        raise ValueError(f"mf_sgd_: ratings must be on user_factors' device {user_factors.device}, got {got}")
    logistic = loss == "logistic"
    if logistic and len(blocks) and not (0 <= blocks.ratings.min() and blocks.ratings.max() <= 1):
        got = [v.item() for v in blocks.ratings.aminmax()]
        raise ValueError(
            f"mf_sgd_: ratings must be from 0 to 1 for a logistic loss, got {got[0]:g} to {got[1]:g}"
        )
    row = dispatch.pick("mf_sgd", BACKENDS, backend, user_factors)
    tables = user_factors, item_factors, user_bias, item_bias, user_squares, item_squares
    of = blocks.users, blocks.items, blocks.ratings, blocks.weight
    if row is None:
        with torch.no_grad():
            return reference.mf_sgd(
                *tables, *of, mean=step[0], lr=step[1:3], reg=step[3:7], l1=step[7:], nonnegative=nonnegative,
                logistic=logistic,
            ).float()  # fmt: skip
    losses = torch.zeros(blocks.offsets.numel() - 1, dtype=torch.float32, device=user_factors.device)
    _sgd(row, *tables, *of, blocks.offsets, losses, step, bool(nonnegative), logistic, seed)
    return losses.to("cpu", torch.float64).sum().float()


def _check_table(name, t, first, dims):
    dtype = torch.float32
    if dims == 2 and isinstance(first, Tensor) and first.is_floating_point():
        dtype = first.dtype
    if not isinstance(t, Tensor) or t.dim() != dims or not t.is_floating_point() or t.dtype != dtype:
        rule = f"of {dims} dimensions" if dims == 2 else "a vector"
        raise ValueError(
            f"mf_sgd_: {name} must be {rule} and {dispatch.dtype_name(dtype)}, got {checks.shape(t)}"
            f"{f' {t.dtype}' if isinstance(t, Tensor) else ''}"
        )
    if t.device != first.device:
        raise ValueError(f"mf_sgd_: {name} must be on user_factors' device {first.device}, got {t.device}")
    if not t.is_contiguous():
        raise ValueError(
            f"mf_sgd_: {name} must be contiguous, as it changes in place, got strides {t.stride()}"
        )


def _numbers(mean, lr, reg, l1):
    """mean, lr of factors and biases, the four L2 and the two L1, in the order of the kernel's step."""
    step = [mean]
    for name, value, count in (("lr", lr, 2), ("reg", reg, 4), ("l1", l1, 2)):
        values = list(value) if isinstance(value, tuple | list) else [value] * count
        if len(values) != count:
            raise ValueError(f"mf_sgd_: {name} must be a number or {count} numbers, got {value!r}")
        for v in values:
            checks.number("mf_sgd_", name, v, 0, math.inf)
        step += values
    if not lr or step[1] <= 0:
        raise ValueError(f"mf_sgd_: lr must be positive, got {lr!r}")
    if not isinstance(mean, numbers.Real) or not math.isfinite(mean):
        raise ValueError(f"mf_sgd_: mean must be finite, got {mean!r}")
    return [float(v) for v in step]


def _blocks(users, items, ratings, weight, sizes):
    if not isinstance(users, RatingBlocks):
        for name, t in (("items", items), ("ratings", ratings)):
            if not isinstance(t, Tensor):
                raise ValueError(f"mf_sgd_: {name} must be a tensor beside users, got {type(t).__name__}")
        on_cpu = (t.cpu() if isinstance(t, Tensor) else t for t in (users, items, ratings, weight))
        grid = parts_on_gpu(*sizes) if ratings.is_cuda else None
        blocks = sort_ratings("mf_sgd_", *on_cpu, *sizes, grid)
        return blocks.to(ratings.device)
    if items is not None or ratings is not None or weight is not None:
        raise ValueError(
            "mf_sgd_: items, ratings and weight must be None beside RatingBlocks, which hold them"
        )
    users.check_rows("mf_sgd_", *sizes)
    return users
