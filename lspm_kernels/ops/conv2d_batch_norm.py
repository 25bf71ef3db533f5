"""Convolution, batch norm, residual addition and activation: in training and in evaluation."""

import torch
import torch.distributed as dist
from torch import Tensor

from lspm_kernels import batch_norm, checks, conv2d_checks, dispatch
from lspm_kernels.ops import batch_norm_act
from lspm_kernels.ops.conv2d import BACKENDS, convolve
from lspm_kernels.reference import conv2d_batch_norm as reference

_OP = "conv2d_batch_norm"


def conv2d_batch_norm(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolution, batch norm, residual addition and activation:

        y = activation((z - mean) / sqrt(variance + eps) * norm_weight + norm_bias + residual)

    where z = conv(x, weight) + bias. In training the convolution takes the statistics of z while it writes z;
    one further pass gives y. In evaluation, where nothing records a gradient, the batch norm is folded into
    the convolution's own epilogue and z is never written.

    Args:
        x: (N, C, H, W), float32, bfloat16 or float16.
        weight: (K, C / groups, R, S), x's dtype.
        norm_weight, norm_bias, running_mean, running_var, residual, activation, training, momentum, eps,
            process_group: as in batch_norm_act.
        stride, padding, dilation, groups, bias: as in conv2d.
        backend: as in conv2d.

    Returns:
        y: (N, K, H', W'), x's dtype, channels last in memory.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; statistics are to be taken of
            fewer than two values; running statistics that are used on a CPU are not finite.
        NotImplementedError: the backend asked for does not take this call.

    Source: He et al., "Deep Residual Learning for Image Recognition" (2015), figure 2; Ioffe and Szegedy,
    "Batch Normalization" (2015).
    """
    conv2d_checks.image(_OP, x)
    if x.dim() != 4:
        raise ValueError(f"{_OP}: x must have four dimensions, (N, C, H, W), got {tuple(x.shape)}")
    x, weight, residual = checks.autocast(x, weight, residual)
    size, geometry = conv2d_checks.geometry(_OP, x, weight, stride, padding, dilation, groups)
    shape = (x.shape[0], weight.shape[0], *size)
    conv2d_checks.vectors(_OP, x, shape[1], bias=bias)
    conv2d_checks.residual(_OP, residual, x, shape)
    running = running_mean, running_var
    batch_norm.arguments(
        _OP, x.new_empty(()).expand(shape), norm_weight, norm_bias, *running, residual, activation, momentum,
        eps, "norm_",
    )  # fmt: skip
    of_batch = bool(training) or running_mean is None
    group = batch_norm.group_name(_OP, process_group) if of_batch else ""
    if of_batch and shape[0] * size[0] * size[1] < 2 and not group:
        rule = "have more than one value per channel to take statistics of"
        raise ValueError(f"{_OP}: the convolution's output must {rule}, got {shape}")
    if not of_batch and checks.readable(running_mean) and running_mean.is_cpu:
        batch_norm.running_statistics(_OP, *running)
    row = dispatch.pick(_OP, BACKENDS, backend, x)
    if row is None:
        if group:
            raise NotImplementedError(f"{_OP}: reference needs process_group None, got a group")
        return reference.conv2d_batch_norm(
            x, weight, norm_weight, norm_bias, *running, stride, padding, dilation, groups, bias=bias,
            residual=residual, activation=activation, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    bias = None if bias is None else bias.float().contiguous()
    tensors = x, weight, bias, norm_weight, norm_bias, residual
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not (of_batch or records):
        scale, shift = folded(norm_weight, norm_bias, *running, bias, eps)
        code = conv2d_checks.activation(_OP, activation)
        return convolve(row, x, weight, scale, shift, residual, size, geometry, code, False)[0]
    z, found = convolve(row, x, weight, None, bias, None, size, geometry, 0, of_batch)
    norm_row = dispatch.pick(_OP, batch_norm_act.BACKENDS, row.name, z)
    return batch_norm_act.normalise(
        norm_row, z, residual, norm_weight, norm_bias, running, found if of_batch else None, momentum, eps,
        activation, group,
    )  # fmt: skip


def folded(norm_weight, norm_bias, running_mean, running_var, bias, eps):
    """A batch norm with constant statistics as z * scale + shift, float32, of z without its bias."""
    scale = torch.rsqrt(running_var.float() + eps)
    if norm_weight is not None:
        scale = scale * norm_weight.float()
    mean = running_mean.float() if bias is None else running_mean.float() - bias
    shift = -mean * scale
    return scale, shift if norm_bias is None else shift + norm_bias.float()


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The weight and bias of one convolution that is a convolution and its batch norm in evaluation:

        weight' = weight * scale,   bias' = (bias - running_mean) * scale + norm_bias,
        scale = norm_weight / sqrt(running_var + eps)

    Computed in float64 and rounded once. conv2d_batch_norm folds by itself; this is for weights that are to
    be written down, or run elsewhere.

    Args:
        weight: (K, C / groups, R, S).
        bias, norm_weight, norm_bias: (K,), or None.
        running_mean, running_var: (K,).
        eps: added to the variance.

    Returns:
        (weight', bias'), of weight's dtype and shape, and (K,).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or a statistic is not finite.
    """
    op = "fold_batch_norm"
    if not isinstance(weight, Tensor) or weight.dim() != 4 or not weight.is_floating_point():
        raise ValueError(f"{op}: weight must be a tensor (K, C / groups, R, S), got {checks.shape(weight)}")
    conv2d_checks.vectors(
        op, weight, weight.shape[0], bias=bias, norm_weight=norm_weight, norm_bias=norm_bias,
        running_mean=running_mean, running_var=running_var,
    )  # fmt: skip
    batch_norm.statistics_and_eps(op, running_mean, running_var, eps)
    if running_mean is None:
        raise ValueError(f"{op}: running_mean must be a tensor ({weight.shape[0]},), got None")
    batch_norm.running_statistics(op, running_mean, running_var)
    scale = torch.rsqrt(running_var.double() + eps)
    if norm_weight is not None:
        scale = scale * norm_weight.double()
    shift = (0 if bias is None else bias.double()) - running_mean.double()
    shift = shift * scale + (0 if norm_bias is None else norm_bias.double())
    return (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)
