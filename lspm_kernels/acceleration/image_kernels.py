"""Convolution, batch norm, residual addition and activation in a traced forward, as one call."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import _has_any_global_hook

from lspm_kernels.acceleration.aliases import unhooked
from lspm_kernels.acceleration.swap import original
from lspm_kernels.acceleration.tracing import Node
from lspm_kernels.nn.calls import watched
from lspm_kernels.ops.batch_norm_act import batch_norm_act
from lspm_kernels.ops.conv2d import conv2d
from lspm_kernels.ops.conv2d_batch_norm import conv2d_batch_norm
from lspm_kernels.packed_conv2d import PackedConv2d

_F32 = torch.float32
_FLOATS = frozenset({_F32, torch.bfloat16, torch.float16})
_ORDINARY = frozenset({Tensor, Parameter, type(None)})
_LEAST = 2**14  # elements of an image below which a call takes longer than its work
_LEAST_PIXELS = 192  # of an output below which a weight is laid out for too little
ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.GELU: "gelu"}


@dataclass(eq=False)
class Chain:
    """What one call does: in one kernel where that takes it, else step by step as the forward did."""

    conv: nn.Conv2d | None = None
    norm: nn.BatchNorm2d | None = None
    add: Callable | None = None
    act: Callable | None = None
    activation: str | None = None
    nodes: list[Node] = field(default_factory=list)
    sum: Node | None = None
    inference: bool = False
    packed: PackedConv2d | None = None

    @property
    def name(self) -> str:
        """Its parts, in order."""
        parts = (self.conv and "conv2d", self.norm and "batch_norm", self.add and "add", self.activation)
        return " + ".join(part for part in parts if part)

    def inputs(self) -> tuple[Node, ...]:
        """What it reads, as the graph is now."""
        if self.sum is None:
            return self.nodes[0].args
        return (*self.nodes[0].args, *(a for a in self.sum.args if a not in self.nodes))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._takes(x, residual):
            return self._steps(x, residual)
        conv, norm = self.conv, self.norm
        if conv is None:
            return self._norm(x, residual)
        if norm is None:
            if self.inference and not _records(x, conv.weight, conv.bias, residual):
                return self._packed()(x, residual)
            return conv2d(
                x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups,
                activation=self.activation, residual=residual,
            )  # fmt: skip
        if norm.training:
            norm.num_batches_tracked.add_(1)
        elif self.inference and not _records(x, conv.weight, conv.bias, residual, norm.weight, norm.bias):
            return self._packed()(x, residual)
        return conv2d_batch_norm(
            x, conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, conv.stride,
            conv.padding, conv.dilation, conv.groups, bias=conv.bias, residual=residual,
            activation=self.activation, training=norm.training, momentum=norm.momentum, eps=norm.eps,
        )  # fmt: skip

    def _norm(self, x, residual):
        norm = self.norm
        if norm.training:
            norm.num_batches_tracked.add_(1)
        return batch_norm_act(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, residual=residual,
            activation=self.activation, training=norm.training, momentum=norm.momentum, eps=norm.eps,
        )  # fmt: skip

    def _steps(self, x, residual):
        for module in (self.conv, self.norm):
            x = x if module is None else module(x)
        x = x if self.add is None else self.add(x, residual)
        return x if self.act is None else self.act(x)

    def _packed(self):
        conv, norm = self.conv, self.norm
        tensors = (conv.weight, conv.bias)
        if norm is not None:
            tensors += (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        window = conv.stride, conv.padding, conv.dilation, conv.groups
        packed, eps = self.packed, norm.eps if norm else 1e-5
        if (
            packed is None
            or (packed.window, packed.eps) != (window, eps)
            or any(a is not b for a, b in zip(packed.tensors, tensors, strict=False))
        ):
            _, bias, *rest = tensors
            self.packed = PackedConv2d(
                conv.weight, *(rest or [None] * 4), *window, bias=bias, activation=self.activation, eps=eps,
            )  # fmt: skip
        return self.packed

    def _takes(self, x, residual) -> bool:  # noqa: PLR0911 -- a reason a line
        """Whether the kernel computes this call, in the memory format that the modules would give."""
        if type(x) not in _ORDINARY or x is None or x.dim() != 4 or x.numel() < _LEAST:
            return False
        if not x.is_cpu or x.dtype not in _FLOATS or not x.is_contiguous(memory_format=torch.channels_last):
            return False
        if is_special() or torch.is_autocast_enabled("cpu"):
            return False
        if isinstance(self.act, nn.Module) and not (unhooked(self.act) and self._act_is_known()):
            return False
        shape = tuple(x.shape)
        if self.conv is not None:
            shape = _takes_conv(self.conv, x)
            if shape is None or not (self.inference or _has_pixels(shape)):
                return False
        if self.norm is not None and not _takes_norm(self.norm, x, shape):
            return False
        return self.add is None or (
            type(residual) in _ORDINARY and residual.dtype is x.dtype and residual.is_cpu
            and tuple(residual.shape) == shape
        )  # fmt: skip

    def _act_is_known(self):
        if ACTIVATIONS.get(original(self.act)) != self.activation:
            return False
        return self.activation != "gelu" or self.act.approximate == "none"


def is_special() -> bool:
    """Whether a call is followed by what kernels take no part in, hooks of all modules among it."""
    return watched() or _has_any_global_hook()


def pays(x: Tensor, inference: bool) -> bool:
    """Whether an image is large enough to change its memory format for what a module does with it.

    One thread, against torch: ResNet-18 in training of 16x3x64x64 0.93, of 8x3x128x128 1.21; in evaluation
    MobileNetV3 of 1x3x224x224 0.89, ResNet-50 of 8x3x224x224 1.65.
    """
    if torch.is_autocast_enabled("cpu"):  # no chain's kernel takes the call
        return False
    numbers = 2**17 if inference else 2**18
    pixels = 2**13 if inference or torch.is_grad_enabled() else 2**15
    return x.dtype in _FLOATS and x.numel() >= numbers and x.numel() // x.shape[1] >= pixels


def _takes_conv(conv, x) -> tuple[int, ...] | None:
    """The shape that a convolution gives, where the kernel is the faster one."""
    weight, bias = conv.weight, conv.bias
    if not unhooked(conv) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    if type(weight) not in _ORDINARY or type(bias) not in _ORDINARY or weight.dtype is not x.dtype:
        return None
    if (
        x.shape[1] != conv.in_channels
        or not weight.is_cpu
        or (bias is not None and bias.dtype is not x.dtype)
    ):
        return None
    window = zip(x.shape[2:], weight.shape[2:], conv.stride, conv.padding, conv.dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in window]
    return (x.shape[0], weight.shape[0], *size) if min(size) > 0 else None


def _has_pixels(shape) -> bool:
    """Whether laying out a weight is little beside what is done with it; in training torch does so, too."""
    return torch.is_grad_enabled() or shape[0] * shape[2] * shape[3] >= _LEAST_PIXELS


def _takes_norm(norm, x, shape) -> bool:
    parameters = norm.weight, norm.bias, norm.running_mean, norm.running_var
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return False
    if norm.momentum is None or not norm.track_running_stats or norm.num_features != shape[1]:
        return False
    if norm.training and shape[0] * shape[2] * shape[3] < 2:
        return False
    return unhooked(norm) and all(
        type(p) in _ORDINARY and (p is None or (p.dtype in (x.dtype, _F32) and p.is_cpu)) for p in parameters
    )


def _records(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
