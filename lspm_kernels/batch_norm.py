"""What ops with a batch norm in them share: checks, and statistics over the batches of several ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from lspm_kernels import checks
from lspm_kernels.reference.batch_norm_act import ACTIVATIONS

_RUNS = {"cpu": 256, "cuda": 1024}  # runs of rows, at most; csrc/batch_norm_act.h says what they are for
_ROWS_A_RUN, _ELEMENTS_A_RUN = 64, 4096  # at least, so that what is kept of a run is little beside its rows


def channels_last(t):
    """t itself where it lies so, else a copy."""
    if t is None or t.movedim(1, -1).is_contiguous():
        return t
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def collectives():
    """Those that torch.compile and autograd's traces take, by the names of groups."""
    from torch.distributed import _functional_collectives

    return _functional_collectives


def group_name(op, group):
    """What collectives call a group of several ranks; nothing where there is none."""
    if group is None:
        return ""
    if not isinstance(group, dist.ProcessGroup):
        rule = "be a torch.distributed.ProcessGroup"
        raise ValueError(f"{op}: process_group must {rule}, got {type(group).__name__}")
    return group.group_name if group.size() > 1 else ""


def of_all_ranks(mean, variance, count, group):
    """The mean and variance over the ranks' batches, of whatever sizes, their size and this one's share."""
    own = torch.stack((torch.full_like(mean, count), mean, variance * count))
    functional = collectives()
    # torch 2.14 has a new name for it, and warns at the old one.
    gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
    ranks = gather(own[None], 0, group).double()  # (ranks, 3, C)
    counts, means, squares = ranks[:, 0], ranks[:, 1], ranks[:, 2]
    total = counts.sum(0)
    center = (counts * means).sum(0) / total
    variance = (squares + counts * (means - center).square()).sum(0) / total
    return center.float(), variance.float(), total.float(), (count / total).float()


def arguments(op, x, weight, bias, running_mean, running_var, residual, activation, momentum, eps, norm=""):
    """Checks the arguments, weight and bias by the names that begin with norm; gives x and residual in one
    dtype."""
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be a floating-point tensor (N, C, ...), got {checks.kind(x)}")
    checks.one_of(op, "activation", activation, ACTIVATIONS)
    if not isinstance(momentum, int | float) or not 0 <= momentum <= 1:
        raise ValueError(f"{op}: momentum must be at least 0 and at most 1, got {momentum!r}")
    statistics_and_eps(op, running_mean, running_var, eps)
    if residual is not None:
        x, residual = checks.residual(op, residual, x)
    parameters = {f"{norm}weight": weight, f"{norm}bias": bias}
    for name, t in (parameters | {"running_mean": running_mean, "running_var": running_var}).items():
        if t is not None:
            checks.parameter(op, name, t, x.shape[1], x.device, (x.dtype, torch.float32))
    return x, residual


def statistics_and_eps(op, running_mean, running_var, eps):
    """Raises ValueError unless both statistics or none are given and eps can be added to a variance."""
    checks.number(op, "eps", eps, 0, float("inf"))
    if (running_mean is None) != (running_var is None):
        given = "running_mean" if running_var is None else "running_var"
        raise ValueError(f"{op}: running_mean and running_var must be given together, got {given} alone")


def running_statistics(op, mean, variance):
    """As the CPU kernel does."""
    for name, t, low, rule in (
        ("running_mean", mean, -float("inf"), "finite"),
        ("running_var", variance, 0, "finite and not negative"),
    ):
        bad = ~(t.isfinite() & (t >= low))
        if bad.any():
            c = int(bad.nonzero()[0])
            raise ValueError(f"{op}: {name} must be {rule}, got {t[c]:.6f} in channel {c}")


def partials(x, row):
    """How many runs the rows of x fall into: a number that depends on the shape alone."""
    channels = x.shape[-1]
    rows = x.numel() // channels
    return min(_RUNS[row.device], -(-rows // max(_ROWS_A_RUN, _ELEMENTS_A_RUN // channels)))
