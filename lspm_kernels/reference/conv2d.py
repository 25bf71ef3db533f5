"""Two-dimensional convolution with an epilogue, in plain PyTorch: what the kernels compute."""

import torch.nn.functional as F
from torch import Tensor

from lspm_kernels.reference.batch_norm_act import ACTIVATIONS


def conv2d(
    x: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups: int = 1,
    activation: str | None = None, residual: Tensor | None = None, scale=None, shift=None,
) -> Tensor:  # fmt: skip
    """y = activation((conv(x, weight) + bias) * scale + shift + residual)."""
    beside = bias is not None and bias.dtype != x.dtype  # float32, which F.conv2d does not take
    z = F.conv2d(x, weight, None if beside else bias, stride, padding, dilation, groups)
    if beside:
        z = z + bias.view(-1, 1, 1)
    if scale is not None:
        z = z * scale.view(-1, 1, 1)
    if shift is not None:
        z = z + shift.view(-1, 1, 1)
    if residual is not None:
        z = z + residual
    return ACTIVATIONS[activation](z).to(x.dtype)
