"""Layers of images: torch.nn's classes over conv2d, conv2d_batch_norm and max_pool2d.

Kernels read and write channels_last memory. An image in any other is left to torch, as its output must be, so
that `x.view(N, -1)` behind it holds. On an H200 conv2d/forward/bfloat16 is 0.6 to 0.93 times as fast as
torch's and conv2d_batch_norm/forward+backward 0.64 and 0.85, and max_pool2d has no row: a GPU's are torch's.
"""

import torch
from torch import Tensor, nn

from lspm_kernels import conv2d_checks
from lspm_kernels.nn import calls, elementwise
from lspm_kernels.nn.norms import BatchNorm2d, takes_batch_norm
from lspm_kernels.ops.conv2d import conv2d
from lspm_kernels.ops.conv2d_batch_norm import conv2d_batch_norm
from lspm_kernels.ops.max_pool2d import max_pool2d

_F32 = torch.float32
_LEAST = 2**16  # conv2d of 1x16x8x8, 3x3: 0.5 times as fast as torch's
_LEAST_OF_POOLS = 2**19  # max_pool2d of 4x64x32x32: 0.84 to 1.16, of 1x64x112x112 1.2 to 1.8
_VECTOR = 16  # channels: a pool of 4x40x56x56 0.57 to 0.94, before masks took the rest of a row
_LEAST_CHANNELS = 32  # conv2d of 4x3x112x112, 3x3 with stride 2: 0.7; with norm and activation 0.95
# What a pixel of one filter sums: conv2d_batch_norm of 4x512x14x14, 3x3: 0.9, but
# conv2d/forward/float32/B8-256-256-k3-14-s1 1.6; of 4x3x112x112, 3x3: 0.95.
_LEAST_TERMS, _MOST_TERMS = 64, 4096
_ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "gelu": nn.GELU}
_KINDS = {
    "relu": {nn.ReLU},
    "relu6": {nn.ReLU6},
    "silu": {nn.SiLU, elementwise.SiLU},
    "gelu": {nn.GELU, elementwise.GELU},
}


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d: of images in channels_last memory on a CPU, by lspm_kernels.conv2d."""

    def forward(self, input: Tensor) -> Tensor:
        if calls.parametrized(self):
            return super().forward(input)
        weight, bias = self.weight, self.bias
        if _is_faster(self, input, weight, bias) and takes_convolution(self, input, weight, bias):
            return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return super().forward(input)


_CONVOLUTIONS, _NORMS = {nn.Conv2d, Conv2d}, {nn.BatchNorm2d, BatchNorm2d}


class MaxPool2d(nn.MaxPool2d):
    """torch.nn.MaxPool2d: of images in channels_last memory on a CPU, by max_pool2d."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            type(input) is Tensor
            and input.numel() >= _LEAST_OF_POOLS
            and input.is_cpu
            and calls.plain(input)
            and not self.return_indices
            and input.dim() == 4
            and input.shape[1] % _VECTOR == 0
            and calls.channels_last(input)
        ):
            return max_pool2d(
                input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
            )
        return super().forward(input)


class ConvBatchNormAct(nn.Sequential):
    """Convolution, batch norm, a residual addition and an activation, as one where kernels take the call.

    A Sequential of torch.nn's Conv2d, BatchNorm2d and an activation, whose state_dict it has, as has
    torchvision's Conv2dNormActivation: "0.weight", "1.weight", "1.bias", "1.running_mean" and so on.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device,
            dtype: as torch.nn.Conv2d's; bias is False, as the norm has one.
        activation: None, "relu", "relu6", "silu" or "gelu" (by erf).
        eps, momentum: as torch.nn.BatchNorm2d's.

    Raises:
        ValueError: there is no such activation, or as torch.nn.Conv2d.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        activation: str | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        if activation is not None and activation not in _ACTIVATIONS:
            names = ", ".join(map(repr, _ACTIVATIONS))
            raise ValueError(
                f"ConvBatchNormAct: activation must be None or one of {names}, got {activation!r}"
            )
        factory = {"device": device, "dtype": dtype}
        geometry = kernel_size, stride, padding, dilation, groups, bias, padding_mode
        layers = [
            nn.Conv2d(in_channels, out_channels, *geometry, **factory),
            nn.BatchNorm2d(out_channels, eps, momentum, **factory),
        ]
        if activation is not None:
            layers.append(_ACTIVATIONS[activation]())
        super().__init__(*layers)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, out_channels, H', W') of input (N, in_channels, H, W) and a residual of the output's shape."""
        conv, norm, *rest = self
        if (
            calls.known(conv, _CONVOLUTIONS)
            and calls.known(norm, _NORMS)
            and takes_convolution(conv, input, conv.weight, conv.bias)
            and (residual is None or _fits(conv, input, residual))
            and (not rest or _name(rest[0]) is not None)
            and takes_batch_norm(norm, input, conv.out_channels)
        ):
            if norm.training:
                norm.num_batches_tracked.add_(1)
            return conv2d_batch_norm(
                input, conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, conv.stride,
                conv.padding, conv.dilation, conv.groups, bias=conv.bias, residual=residual,
                activation=_name(rest[0]) if rest else None, training=norm.training,
                momentum=norm.momentum, eps=norm.eps,
            )  # fmt: skip
        y = norm(conv(input))
        y = y if residual is None else y + residual
        return rest[0](y) if rest else y


def takes_convolution(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a kernel computes a convolution of x, images, in the memory that torch gives, and fast."""
    if type(x) is not Tensor or x.numel() < _LEAST or not x.is_cpu or conv.padding_mode != "zeros":
        return False
    if not (calls.plain(x, weight, bias) and calls.alike(x, weight, bias)):
        return False
    if x.dim() != 4 or x.shape[1] != conv.in_channels:
        return False
    terms = weight.shape[1:].numel()
    if terms > _MOST_TERMS or (conv.groups == 1 and terms < _LEAST_TERMS):
        return False
    return calls.channels_last(x) or calls.channels_last(weight)


def _is_faster(conv, x, weight, bias) -> bool:
    """Whether the convolution alone is, than torch's."""
    if type(x) is not Tensor or x.numel() < _LEAST:
        return False
    if conv.groups > 1:  # conv2d of 4x128x28x28 in 32 groups, 3x3: 2.7, in bfloat16 2.4; depthwise: 0.9
        return conv.in_channels > conv.groups
    # conv2d of 4x64x56x56 to 256, 1x1, in bfloat16 by one thread: 0.8, and with the backward 0.4.
    if x.dtype is not _F32 or conv.in_channels < _LEAST_CHANNELS:
        return False
    if not calls.records(x, weight, bias):
        return True
    # conv2d/forward+backward/float32/B8-512-128-k1-28-s1: 0.9.
    return conv.kernel_size != (1, 1)


def _fits(conv, x, residual) -> bool:
    """Whether a residual has the dtype, the place and the shape of what is convolved."""
    if not (calls.plain(residual) and calls.alike(x, residual)):
        return False
    window = conv.stride, conv.padding, conv.dilation, conv.groups
    size, _ = conv2d_checks.geometry("ConvBatchNormAct", x, conv.weight, *window)
    return residual.shape == (x.shape[0], conv.out_channels, *size)


def _name(module) -> str | None:
    """What conv2d_batch_norm calls an activation."""
    name = next((name for name, kinds in _KINDS.items() if calls.known(module, kinds)), None)
    return None if name == "gelu" and module.approximate != "none" else name
