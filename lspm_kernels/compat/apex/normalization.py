"""apex.normalization: layer norm and RMS norm over the last dimensions."""

import math

import torch
from torch import Tensor, nn

from lspm_kernels import checks
from lspm_kernels.ops.layer_norm import layer_norm, rms_norm


class FusedLayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm of our kernels; its output has the input's dtype.

    Args:
        normalized_shape: the last dimensions, which share a mean and a variance.
        eps: added to the variance.
        elementwise_affine: whether there are a weight and a bias.
        memory_efficient: taken and not needed: the backward reads the input, which is there anyway.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine)
        self.memory_efficient = memory_efficient

    def forward(self, input: Tensor) -> Tensor:
        return _over_last(self, layer_norm, input, self.weight, self.bias)


class FusedRMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm of our kernels, without a bias; the rest is as in FusedLayerNorm."""

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine)
        self.memory_efficient = memory_efficient

    def forward(self, input: Tensor) -> Tensor:
        return _over_last(self, rms_norm, input, self.weight)


class MixedFusedLayerNorm(FusedLayerNorm):
    """FusedLayerNorm whose output has the weight's dtype. elementwise_affine: only True."""

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        *,
        memory_efficient: bool = False,
        elementwise_affine: bool = True,
    ):
        _check_affine("MixedFusedLayerNorm", elementwise_affine)
        super().__init__(normalized_shape, eps, True, memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_widened(input, self.weight)).to(self.weight.dtype)


class MixedFusedRMSNorm(FusedRMSNorm):
    """FusedRMSNorm whose output has the weight's dtype. elementwise_affine: only True."""

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        *,
        memory_efficient: bool = False,
        elementwise_affine: bool = True,
    ):
        _check_affine("MixedFusedRMSNorm", elementwise_affine)
        super().__init__(normalized_shape, eps, True, memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_widened(input, self.weight)).to(self.weight.dtype)


def _over_last(module, norm, x, *parameters):
    """norm of x with the module's last dimensions as one."""
    op, shape = type(module).__name__, tuple(module.normalized_shape)
    if not isinstance(x, Tensor) or not x.is_floating_point() or tuple(x.shape[-len(shape) :]) != shape:
        rule = f"be a floating-point tensor (..., {', '.join(map(str, shape))})"
        raise ValueError(f"{op}: input must {rule}, got {checks.kind(x)}")
    flat = x.reshape(*x.shape[: x.dim() - len(shape)], math.prod(shape))
    parameters = [p if p is None else p.flatten() for p in parameters]
    parameters = [p if p is None or p.dtype == x.dtype else p.float() for p in parameters]
    return norm(flat, *parameters, eps=module.eps).view(x.shape)


def _widened(x, weight):
    return x.to(torch.promote_types(x.dtype, weight.dtype)) if isinstance(x, Tensor) else x


def _check_affine(op, elementwise_affine):
    if not elementwise_affine:
        raise ValueError(f"{op}: elementwise_affine must be True, got {elementwise_affine!r}")
