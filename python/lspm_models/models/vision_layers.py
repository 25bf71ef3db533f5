"""The layers of vision models: torch's parameters, and one call per convolution and what follows it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv(x) + residual); activation is "relu" or None."""
    return _finish(_convolution(x, weight, bias, stride, padding, dilation, groups), activation, residual)


def conv2d_batch_norm(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    *,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(batch_norm(conv(x)) + residual); in training it moves the running statistics."""
    y = _convolution(x, weight, None, stride, padding, dilation, groups)
    y = F.batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    return _finish(y, activation, residual)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    if stride > 1 and padding == 0 and weight.shape[2:] == (1, 1):
        # The same, of every stride-th pixel: the backward of the strided one writes beyond its memory where
        # fewer than 16 channels are channels_last (seen in torch 2.14.1 on AVX-512).
        x, stride = x[:, :, ::stride, ::stride], 1
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)


def _finish(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    if residual is not None:
        y = y + residual
    return F.relu(y) if activation == "relu" else y


def max_pool2d(x: Tensor, kernel_size: int, stride: int, padding: int = 0) -> Tensor:
    """The largest of each window."""
    return F.max_pool2d(x, kernel_size, stride, padding)


def global_avg_pool(x: Tensor) -> Tensor:
    """(N, C) means over the pixels of x (N, C, H, W)."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def cross_entropy(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = -100
) -> Tensor:
    """The mean cross-entropy of logits (N, C) in nats; targets are classes (N,) or probabilities (N, C)."""
    if targets.is_floating_point():
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing)


def conv_batch_norm(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Applies two modules, whose parameters keep their places in the state_dict, in one call.

    Args:
        x: (N, C, H, W).
        conv: has no bias and zero padding, equal on all sides.
        norm: has affine parameters and running statistics.
        activation: "relu" or None, after the residual is added.
        residual: of the result's shape.
    """
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return conv2d_batch_norm(
        x,
        conv.weight,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        conv.stride[0],
        conv.padding[0],
        conv.dilation[0],
        conv.groups,
        training=norm.training,
        momentum=norm.momentum,
        eps=norm.eps,
        activation=activation,
        residual=residual,
    )


class ConvBatchNorm(nn.Module):
    """A convolution with batch norm and ReLU, as U-Nets and detectors stack them."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return conv_batch_norm(x, self.conv, self.norm, "relu")


class Conv2d(nn.Conv2d):
    """A convolution with a bias; the last layer of a head."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(
            x,
            self.weight,
            self.bias,
            self.stride[0],
            self.padding[0],
            self.dilation[0],
            self.groups,
        )
