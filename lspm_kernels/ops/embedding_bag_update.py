"""The backward of embedding_bag fused with an optimizer's step, in place: no gradient is ever stored."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, sorted_bags, triton
from lspm_kernels import embedding_bag_checks as bags
from lspm_kernels.dispatch import Backend, Limit
from lspm_kernels.operator import InPlaceOperator
from lspm_kernels.reference import embedding_bag_update as reference

_OP = "embedding_bag_update"
_OPTIMIZERS = {"sgd": 0, "adagrad": 1, "adam": 2}  # as csrc/embedding_bag_update.h numbers them
_BF16 = Limit(
    "bfloat16 for stochastic rounding",
    lambda weight, indices, bags, optimizer, stochastic: not stochastic or weight.dtype == torch.bfloat16,
    lambda weight, *rest: dispatch.dtype_name(weight.dtype),
)
_WHOLE_ROW = Limit(
    "D of at most 1024 for adagrad",
    lambda weight, indices, bags, optimizer, stochastic: optimizer != "adagrad" or weight.shape[1] <= 1024,
    lambda weight, *rest: weight.shape[1],
)
_cuda_update = compiled.cuda_kernel(_OP)


def _sorted_update(
    weight, first, second, dout, indices, offsets, per_sample_weights, padding_idx, mean, *how
):
    """The CUDA kernels', which take places in the order of the table's rows."""
    if indices.numel():
        given = indices, offsets, per_sample_weights, sorted_bags.bags_of(indices, offsets, len(dout))
        sorting = sorted_bags.sorted_places(indices, *dout.shape, mean)
        _cuda_update(weight, first, second, dout, *given, *sorting, padding_idx, mean, *how)


# On a GPU cuda comes first, as it divides a row of many indices among more threads: predicted, not measured.
_ROWS = (
    ("cpu", "cpu", compiled.cpu_kernel(_OP), compiled.nothing_missing, (_BF16,)),
    ("cuda", "cuda", _sorted_update, compiled.cuda_missing, (_BF16, bags.GRID)),
    ("triton", "cuda", triton.kernel(f"{_OP}_update"), triton.missing, (_BF16, bags.GRID, _WHOLE_ROW)),
)
BACKENDS = tuple(
    Backend(name, device, bags.FLOATS, kernel, None, missing, limits)
    for name, device, kernel, missing, limits in _ROWS
)


def _update(row, weight, first, second, dout, indices, offsets, per_sample_weights, seed, *numbers):
    padding_idx, mean, optimizer, lr, eps, beta1, beta2, weight_decay, step = numbers
    row.forward(
        weight, first, second, dout.contiguous(), indices, offsets, per_sample_weights, padding_idx, mean,
        optimizer, (lr, eps, beta1, beta2, weight_decay), step, None if seed is None else int(seed),
    )  # fmt: skip


_step = InPlaceOperator(
    f"{_OP}(Tensor(a!) weight, Tensor(b!)? first, Tensor(c!)? second, Tensor dout, Tensor indices,"
    " Tensor? offsets, Tensor? per_sample_weights, Tensor? seed, int padding_idx, bool mean, int optimizer,"
    " float lr, float eps, float beta1, float beta2, float weight_decay, SymInt step) -> ()",
    BACKENDS,
    _update,
)


def embedding_bag_sgd_(
    weight: Tensor,
    dout: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    stochastic_rounding: bool = False,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of SGD on a table, in place, with the gradient that dout is to embedding_bag's output.

    For each row that stands in a bag, with g the sum over its places p of s[p] * dout[bag of p], where s[p]
    is per_sample_weights[p], 1 without them, or 1 over the number of indices in the bag with mode "mean":

        g += weight_decay * weight[row];  weight[row] -= lr * g

    Each such row changes once however often it stands there, other rows do not change at all, whatever
    weight_decay, and g is never stored: on a CPU memory is 16 bytes an index, 24 with per_sample_weights. The
    terms of g are added up in the order of the indices, on a GPU in parts that depend on the indices alone:
    the same bits on every run and any number of threads.

    Args:
        weight: (N, D), contiguous, float32, bfloat16 or float16; computed with in float32.
        dout: (B, D), weight's dtype.
        indices, offsets, mode, per_sample_weights, padding_idx, include_last_offset: embedding_bag's. On a
            GPU, for which nothing waits, an index outside the table changes no row.
        lr, weight_decay: at least 0 and finite.
        stochastic_rounding: of bfloat16, so that small steps are not lost: up or down, with the exact value
            as the mean. What a row's elements take depends on seed, row and element alone.
        seed: from 0 to 2 ** 63 - 1, another one for every step; None draws one from torch's generator.
        backend: "cpu", "cuda", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        weight.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or records gradients. Nothing has
            changed then.
        NotImplementedError: the backend asked for does not take this call.

    Source: Khudia et al., "FBGEMM" (2021), whose table-batched embeddings have such exact optimizers.
    """
    given = mode, per_sample_weights, padding_idx, include_last_offset, stochastic_rounding, seed, backend
    return _run("sgd", weight, {}, dout, indices, offsets, lr, 0.0, (0.0, 0.0), weight_decay, 1, *given)


def embedding_bag_adagrad_(
    weight: Tensor,
    state_sum: Tensor,
    dout: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    stochastic_rounding: bool = False,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of row-wise Adagrad on a table, in place: as embedding_bag_sgd_, with one number for each row.

        state_sum[row] += mean(g ** 2);  weight[row] -= lr * g / (sqrt(state_sum[row]) + eps)

    Args:
        state_sum: (N,), float32, contiguous, from 0 on; it changes too.
        eps: at least 0 and finite.
        weight, dout, indices, offsets, lr and the others: embedding_bag_sgd_'s, with its g.

    Returns:
        weight.

    Raises:
        ValueError, NotImplementedError: as embedding_bag_sgd_.

    Source: Duchi, Hazan and Singer, "Adaptive Subgradient Methods" (2011); Gupta et al., "Training
    Recommender Systems at Scale" (2021).
    """
    given = mode, per_sample_weights, padding_idx, include_last_offset, stochastic_rounding, seed, backend
    states = {"state_sum": state_sum}
    return _run(
        "adagrad", weight, states, dout, indices, offsets, lr, eps, (0.0, 0.0), weight_decay, 1, *given
    )


def embedding_bag_adam_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    dout: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    stochastic_rounding: bool = False,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """One step of Adam on a table, in place: as embedding_bag_sgd_; rows in no bag keep their moments too.

        exp_avg[row] += (1 - beta1) * (g - exp_avg[row])
        exp_avg_sq[row] += (1 - beta2) * (g ** 2 - exp_avg_sq[row])
        weight[row] -= lr / (1 - beta1 ** step) * exp_avg[row]
                       / (sqrt(exp_avg_sq[row] / (1 - beta2 ** step)) + eps)

    Args:
        exp_avg, exp_avg_sq: (N, D), float32, contiguous, from 0 on; they change too.
        step: of the whole table, from 1 on.
        betas: each at least 0 and below 1.
        eps: at least 0 and finite.
        weight, dout, indices, offsets, lr and the others: embedding_bag_sgd_'s, with its g.

    Returns:
        weight.

    Raises:
        ValueError, NotImplementedError: as embedding_bag_sgd_.

    Source: Kingma and Ba, "Adam" (2015), algorithm 1, on the rows that have a gradient.
    """
    given = mode, per_sample_weights, padding_idx, include_last_offset, stochastic_rounding, seed, backend
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return _run("adam", weight, states, dout, indices, offsets, lr, eps, betas, weight_decay, step, *given)


def _run(
    optimizer, weight, states, dout, indices, offsets, lr, eps, betas, weight_decay, step, mode,
    per_sample_weights, padding_idx, include_last_offset, stochastic_rounding, seed, backend,
):  # fmt: skip
    op = f"embedding_bag_{optimizer}_"
    bags.table(op, weight)
    tensors, count, mean, padding = bags.bags(
        op, weight, indices, offsets, per_sample_weights, mode, padding_idx, include_last_offset
    )
    bags.step(op, weight, states, dout, count, lr, eps, betas, weight_decay, step)
    of_limits = weight, tensors[0].numel(), count, optimizer, bool(stochastic_rounding)
    row = dispatch.pick(op, BACKENDS, backend, *of_limits)
    if row is not None:
        seed = checks.seed(op, seed) if stochastic_rounding else None
        first, second = (*states.values(), None, None)[:2]
        settings = (float(number) for number in (lr, eps, *betas, weight_decay))
        numbers = padding, mean, _OPTIMIZERS[optimizer], *settings, step
        _step(row, weight, first, second, dout, *tensors, seed, *numbers)
        return weight
    if stochastic_rounding:
        raise NotImplementedError(f"{op}: reference needs stochastic_rounding=False, got True")
    bags.values(op, weight.shape[0], *tensors[:2], count)
    return reference.embedding_bag_update_(
        weight, tuple(states.values()), dout, indices, offsets, optimizer, lr, eps, betas, weight_decay, step,
        mode=mode, per_sample_weights=per_sample_weights, padding_idx=padding_idx,
        include_last_offset=bool(include_last_offset),
    )  # fmt: skip
