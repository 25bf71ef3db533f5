"""apex.normalization.fused_layer_norm: layer norm and RMS norm over the last dimensions.

Where autocast is on, inputs and parameters are taken in its dtype, and outputs have it, as apex' do.
"""

import math

import torch
from torch import Tensor, nn

from lspm_kernels import checks
from lspm_kernels.ops.layer_norm import layer_norm, rms_norm

_Shape = int | list[int] | tuple[int, ...] | torch.Size


def fused_layer_norm(
    input: Tensor, normalized_shape: _Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """FusedLayerNorm without a weight and a bias."""
    return _over_last("fused_layer_norm", layer_norm, input, normalized_shape, eps)


def fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: _Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """FusedLayerNorm with these."""
    return _over_last("fused_layer_norm_affine", layer_norm, input, normalized_shape, eps, weight, bias)


def mixed_dtype_fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: _Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """MixedFusedLayerNorm with these."""
    op = "mixed_dtype_fused_layer_norm_affine"
    return _over_last(op, layer_norm, input, normalized_shape, eps, weight, bias, mixed=True)


def fused_rms_norm(
    input: Tensor, normalized_shape: _Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """FusedRMSNorm without a weight."""
    return _over_last("fused_rms_norm", rms_norm, input, normalized_shape, eps)


def fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: _Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """FusedRMSNorm with this."""
    return _over_last("fused_rms_norm_affine", rms_norm, input, normalized_shape, eps, weight)


def mixed_dtype_fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: _Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """MixedFusedRMSNorm with this."""
    op = "mixed_dtype_fused_rms_norm_affine"
    return _over_last(op, rms_norm, input, normalized_shape, eps, weight, mixed=True)


class FusedLayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm of our kernels; its output has the input's dtype.

    Args:
        normalized_shape: the last dimensions, which share a mean and a variance.
        eps: added to the variance.
        elementwise_affine: whether there are a weight and a bias.
        memory_efficient: taken and not needed: the backward reads the input, which is there anyway.
    """

    mixed = False

    def __init__(
        self,
        normalized_shape: _Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine)
        self.memory_efficient = memory_efficient

    def forward(self, input: Tensor) -> Tensor:
        given = input, self.normalized_shape, self.eps, self.weight, self.bias
        return _over_last(type(self).__name__, layer_norm, *given, mixed=self.mixed)


class FusedRMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm of our kernels, without a bias; the rest is as in FusedLayerNorm."""

    mixed = False

    def __init__(
        self,
        normalized_shape: _Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine)
        self.memory_efficient = memory_efficient

    def forward(self, input: Tensor) -> Tensor:
        given = input, self.normalized_shape, self.eps, self.weight
        return _over_last(type(self).__name__, rms_norm, *given, mixed=self.mixed)


class MixedFusedLayerNorm(FusedLayerNorm):
    """FusedLayerNorm whose output has the weight's dtype. elementwise_affine: only True."""

    mixed = True

    def __init__(
        self,
        normalized_shape: _Shape,
        eps: float = 1e-5,
        *,
        memory_efficient: bool = False,
        elementwise_affine: bool = True,
    ):
        _check_affine("MixedFusedLayerNorm", elementwise_affine)
        super().__init__(normalized_shape, eps, True, memory_efficient)


class MixedFusedRMSNorm(FusedRMSNorm):
    """FusedRMSNorm whose output has the weight's dtype. elementwise_affine: only True."""

    mixed = True

    def __init__(
        self,
        normalized_shape: _Shape,
        eps: float = 1e-5,
        *,
        memory_efficient: bool = False,
        elementwise_affine: bool = True,
    ):
        _check_affine("MixedFusedRMSNorm", elementwise_affine)
        super().__init__(normalized_shape, eps, True, memory_efficient)


def _over_last(op, norm, x, shape, eps, *parameters, mixed=False):
    """norm of x with its last dimensions, of this shape, as one; mixed: in the weight's dtype."""
    if isinstance(x, Tensor) and checks.autocasts(x.device):
        x, *parameters = checks.autocast(x, *parameters)
        with torch.autocast(x.device.type, enabled=False):
            return _over_last(op, norm, x, shape, eps, *parameters, mixed=mixed)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if not isinstance(x, Tensor) or not x.is_floating_point() or tuple(x.shape[-len(shape) :]) != shape:
        rule = f"be a floating-point tensor (..., {', '.join(map(str, shape))})"
        raise ValueError(f"{op}: input must {rule}, got {checks.kind(x)}")
    dtype = parameters[0].dtype if mixed else x.dtype
    wide = x.to(torch.promote_types(x.dtype, dtype))
    flat = wide.reshape(*x.shape[: x.dim() - len(shape)], math.prod(shape))
    parameters = [p if p is None else p.flatten() for p in parameters]
    parameters = [p if p is None or p.dtype == wide.dtype else p.float() for p in parameters]
    return norm(flat, *parameters, eps=eps).view(x.shape).to(dtype)


def _check_affine(op, elementwise_affine):
    if not elementwise_affine:
        raise ValueError(f"{op}: elementwise_affine must be True, got {elementwise_affine!r}")
