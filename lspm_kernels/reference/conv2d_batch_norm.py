"""Convolution, batch norm, residual addition and activation, in plain PyTorch: what the kernels compute."""

from torch import Tensor

from lspm_kernels.reference.batch_norm_act import batch_norm_act
from lspm_kernels.reference.conv2d import conv2d


def conv2d_batch_norm(
    x: Tensor, weight: Tensor, norm_weight=None, norm_bias=None, running_mean=None, running_var=None,
    stride=1, padding=0, dilation=1, groups: int = 1, *, bias=None, **norm,
) -> Tensor:  # fmt: skip
    """y = activation(batch_norm(conv(x, weight) + bias) + residual)."""
    z = conv2d(x, weight, bias, stride, padding, dilation, groups)
    return batch_norm_act(z, norm_weight, norm_bias, running_mean, running_var, **norm)
