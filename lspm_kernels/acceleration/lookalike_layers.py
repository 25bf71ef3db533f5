"""The forwards of modules that lookalikes.py proves to be an activation, a norm or a linear layer."""

import torch
from torch import Tensor, nn

from lspm_kernels import checks, dispatch, products
from lspm_kernels.acceleration.lookalikes import meaning
from lspm_kernels.acceleration.options import Options
from lspm_kernels.acceleration.swap import OF_EVERY_MODULE, Swap
from lspm_kernels.nn import calls
from lspm_kernels.nn.elementwise import LEAST_OF_SILU
from lspm_kernels.ops import bias_act, layer_norm


class _Proven:
    """A module that was proven what it is, as long as nothing in it is set that it was proven with."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name not in OF_EVERY_MODULE and not isinstance(value, Tensor):
            again = meaning(self)
            self.__dict__["lspm"] = self.lspm if again == self.lspm else None


class Activation(_Proven):
    """An activation of bias_act; SiLU of few numbers stays as it was, which is mostly torch's."""

    def forward(self, *args, **kwargs):
        if (
            self.lspm is not None
            and len(args) == 1
            and not kwargs
            and _takes("bias_act", bias_act.BACKENDS, args[0])
            and (self.lspm.activation != "silu" or args[0].numel() >= LEAST_OF_SILU)
        ):
            return bias_act.bias_act(args[0], None, self.lspm.activation)
        return super().forward(*args, **kwargs)


class Norm(_Proven):
    """A norm over the last dimension, of inputs of its parameters' dtype."""

    def forward(self, *args, **kwargs):
        found = self.lspm
        if found is None or calls.parametrized(self):
            return super().forward(*args, **kwargs)
        weight = getattr(self, found.weight)
        bias = None if found.bias is None else getattr(self, found.bias)
        x = args[0] if len(args) == 1 and not kwargs else None
        if not _takes("rms_norm", layer_norm.BACKENDS, x, weight, bias) or x.shape[-1:] != weight.shape:
            return super().forward(*args, **kwargs)
        weight = weight + found.offset if found.offset else weight
        eps = getattr(self, found.eps)
        if found.kind == "rms_norm":
            return layer_norm.rms_norm(x, weight, eps)
        return layer_norm.layer_norm(x, weight, bias, eps)


class Linear(_Proven):
    """A linear layer in float32, where our product is the faster one."""

    def forward(self, *args, **kwargs):
        x = args[0] if len(args) == 1 and not kwargs else None
        found = self.lspm
        if found is None or type(x) is not Tensor or x.dtype != torch.float32 or not calls.plain(x):
            return super().forward(*args, **kwargs)
        if x.shape[:-1].numel() < products.LEAST or calls.parametrized(self):
            return super().forward(*args, **kwargs)
        weight = getattr(self, found.weight)
        bias = None if found.bias is None else getattr(self, found.bias)
        weight = weight.t() if found.transposed else weight
        if x.shape[-1:] != weight.shape[1:] or checks.autocasts(x.device):
            return super().forward(*args, **kwargs)
        rows = products.flat(x)
        if not products.is_ours(rows, weight.t()) or (bias is not None and bias.dtype != x.dtype):
            return super().forward(*args, **kwargs)
        return products.linear(rows, weight, bias).view(*x.shape[:-1], len(weight))


def rule(model: nn.Module, path: str, module: nn.Module, options: Options) -> Swap | str | None:
    """For modules of any class without children."""
    found = meaning(module)
    if found is None or found.activation == "relu":
        return None
    if found.kind != "activation" and found.weight is None:  # a norm of torch.nn without parameters
        return None
    if found.kind == "activation":
        return Swap(Activation, f"activation {found.activation}", found)
    if found.kind == "linear":
        if not products.faster:
            return "torch's product is as fast on this processor"
        return Swap(Linear, "linear, by our product of float32", found)
    plus = " of 1 + weight" if found.offset else ""
    return Swap(Norm, f"{found.kind}{plus}", found)


def _takes(op, backends, x, *parameters) -> bool:
    """Whether x is a tensor that a kernel takes, with parameters that are as it is."""
    if type(x) is not Tensor or not x.dim() or not dispatch.admitting(op, backends, x):
        return False
    return calls.plain(x, *parameters) and calls.alike(x, *parameters)
