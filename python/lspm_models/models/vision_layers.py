"""The layers of vision models: torch's parameters, and one call per convolution and what follows it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lspm_kernels import PackedConv2d, conv2d, conv2d_batch_norm


def pack_for_inference(model: nn.Module) -> None:
    """From now on, convolutions of `model` in evaluation read weights that are packed at the first call.

    That takes the memory of the weights once more, of 3x3 convolutions in float32 nearly twice. Weights that
    change later, by training or load_state_dict, are packed again.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.packed = {}


def _packed(conv: nn.Conv2d, activation: str | None, norm: nn.BatchNorm2d | None = None):
    """The packed form of a convolution and what follows it; None where this call is not for it."""
    kept = conv.__dict__.get("packed")
    if kept is None or torch.is_grad_enabled() or (norm is not None and norm.training):
        return None
    norms = (norm.weight, norm.bias, norm.running_mean, norm.running_var) if norm else (None,) * 4
    now = (conv.weight, conv.bias, *norms)
    if activation not in kept or any(a is not b for a, b in zip(kept[activation].tensors, now, strict=True)):
        kept[activation] = PackedConv2d(
            conv.weight, *norms, conv.stride, conv.padding, conv.dilation, conv.groups, bias=conv.bias,
            activation=activation, eps=norm.eps if norm else 0.0,
        )  # fmt: skip
    return kept[activation]


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
        conv: pads with zeros.
        norm: as torch.nn.BatchNorm2d, of any momentum, with or without parameters and running statistics.
        activation: "relu" or None, after the residual is added.
        residual: of the result's shape.
    """
    if packed := _packed(conv, activation, norm):
        return packed(x, residual)
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the average of all batches, as torch.optim.swa_utils.update_bn wants it
            momentum = 1 / int(norm.num_batches_tracked)
    return conv2d_batch_norm(
        x,
        conv.weight,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        bias=conv.bias,
        training=norm.training,
        momentum=0.0 if momentum is None else momentum,
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
        if packed := _packed(self, None):
            return packed(x)
        return conv2d(
            x,
            self.weight,
            self.bias,
            self.stride[0],
            self.padding[0],
            self.dilation[0],
            self.groups,
        )
