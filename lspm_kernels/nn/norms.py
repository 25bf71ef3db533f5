"""Norms: torch.nn's classes over layer_norm, rms_norm and batch_norm_act."""

import torch
from torch import Tensor, nn

from lspm_kernels import checks
from lspm_kernels.nn import calls
from lspm_kernels.ops.batch_norm_act import batch_norm_act
from lspm_kernels.ops.layer_norm import layer_norm, rms_norm

_F32 = torch.float32
# layer_norm/forward/float32/1x768: 0.5 times as fast as torch's; 43x768 with the backward 0.77, 512x768 1.4.
_LEAST = 2**16
# layer_norm/forward+backward/bfloat16/16384x4096 on an H200: 1.09, but forward alone 0.92.
_LEAST_ON_GPU = 2**20
# batch_norm_act alone, without a gradient, of 2x64x32x32: 0.83; of 4x64x56x56: 1.5.
_LEAST_OF_IMAGES = 2**19


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm: of the last dimension, by lspm_kernels.layer_norm."""

    def forward(self, input: Tensor) -> Tensor:
        if calls.parametrized(self):
            return super().forward(input)
        weight, bias = self.weight, self.bias
        if (
            type(input) is Tensor
            and input.numel() >= (_LEAST if input.is_cpu else _LEAST_ON_GPU)
            and len(self.normalized_shape) == 1
            and calls.plain(input, weight, bias)
            and _fits(input, weight, bias, self.normalized_shape)
        ):
            if input.is_cpu or calls.records(input, weight, bias):
                return layer_norm(input, weight, bias, self.eps)
        return super().forward(input)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm: of the last dimension on a CPU, by lspm_kernels.rms_norm."""

    def forward(self, x: Tensor) -> Tensor:
        if calls.parametrized(self):
            return super().forward(x)
        weight = self.weight
        # No row shows rms_norm beside torch's on a GPU. Of a weight of another dtype torch's gives that.
        if (
            len(self.normalized_shape) == 1
            and calls.plain(x, weight)
            and x.is_cpu
            and calls.alike(x, weight)
            and x.shape[-1:] == self.normalized_shape
        ):
            return rms_norm(x, weight, self.eps)
        return super().forward(x)


class BatchNorm2d(nn.BatchNorm2d):
    """torch.nn.BatchNorm2d: of images in channels_last memory on a CPU, by lspm_kernels.batch_norm_act."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            type(input) is Tensor
            and input.numel() >= _LEAST_OF_IMAGES
            and not calls.parametrized(self)
            and takes_batch_norm(self, input, self.num_features)
            and input.shape[1] == self.num_features
            and calls.channels_last(input)
        ):
            weight, bias = self.weight, self.bias
            # batch_norm_act alone of float32, 4x64x56x56, in training with its backward: 0.96.
            if not (self.training and input.dtype is _F32 and calls.records(input, weight, bias)):
                if self.training:
                    self.num_batches_tracked.add_(1)
                return batch_norm_act(
                    input,
                    weight,
                    bias,
                    self.running_mean,
                    self.running_var,
                    training=self.training,
                    momentum=self.momentum,
                    eps=self.eps,
                )
        return super().forward(input)


def takes_batch_norm(norm: nn.BatchNorm2d, x: Tensor, channels: int) -> bool:
    """Whether a kernel computes the norm of images of so many channels, of x or made of x."""
    parameters = norm.weight, norm.bias, norm.running_mean, norm.running_var
    if not (calls.plain(x, *parameters) and x.is_cpu and x.dim() == 4):
        return False
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return False
    if norm.momentum is None or not norm.track_running_stats or channels != norm.num_features:
        return False
    return all(p is None or (p.dtype in (x.dtype, _F32) and p.is_cpu) for p in parameters)


def _fits(x, weight, bias, shape) -> bool:
    """Whether torch takes these parameters with x, too."""
    if x.shape[-1:] != shape:
        return False
    if weight is None:
        return True
    if weight.device != x.device or (bias is not None and bias.dtype is not weight.dtype):
        return False
    if x.is_cpu:
        return weight.dtype is x.dtype or weight.dtype is _F32
    return x.is_cuda and weight.dtype is (_F32 if checks.autocasts(x.device) else x.dtype)
