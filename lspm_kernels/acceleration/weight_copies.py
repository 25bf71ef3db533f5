"""Linear layers for inference that read a copy of their weight in fewer bits, made when first needed."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lspm_kernels import checks
from lspm_kernels.acceleration.lookalikes import meaning
from lspm_kernels.acceleration.options import Options
from lspm_kernels.acceleration.swap import Swap
from lspm_kernels.nn import calls
from lspm_kernels.ops import linear


class WeightCopy:
    """A weight in another dtype, made anew when the weight has changed. It is not saved with the model.

    Attributes:
        found: what the module computes; see lookalikes.Meaning.
    """

    def __init__(self, found, dtype: torch.dtype):
        self.found, self.dtype = found, dtype
        self._weight: Callable[[], Tensor | None] = lambda: None
        self._marks: tuple = ()
        self._copy: tuple[Tensor, Tensor | None] = ()

    def of(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The copy (out, in), and of integers its scales."""
        marks = weight._version, weight.data_ptr(), weight.dtype, weight.device
        if self._weight() is not weight or marks != self._marks:
            own = (weight.t() if self.found.transposed else weight).detach().contiguous()
            self._copy = linear.quantize_int8(own) if self.dtype == torch.int8 else (own.to(self.dtype), None)
            self._weight, self._marks = weakref.ref(weight), marks
        return self._copy

    def __reduce__(self):
        return WeightCopy, (self.found, self.dtype)


class Linear:
    """A linear layer that reads its WeightCopy where nothing has a gradient."""

    def forward(self, *args, **kwargs):
        if calls.parametrized(self):
            return super().forward(*args, **kwargs)
        found = self.lspm.found
        x = args[0] if len(args) == 1 and not kwargs else None
        weight = getattr(self, found.weight)
        bias = None if found.bias is None else getattr(self, found.bias)
        if (
            type(x) is not Tensor
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or calls.watched()
            or self.training
            or x.dtype not in linear.FLOATS
            or x.device != weight.device
            or x.device.type == "meta"
            or weight.is_inference()  # without a version, which tells whether it has changed
            or x.shape[-1:] != (weight.shape[:1] if found.transposed else weight.shape[1:])
            or checks.autocasts(x.device)
        ):
            return super().forward(*args, **kwargs)
        copy, scales = self.lspm.of(weight)
        return linear.product(x, copy, bias, scales)


def rule(model: nn.Module, path: str, module: nn.Module, options: Options) -> Swap | str | None:
    """For linear layers, where accelerate was given inference and a dtype."""
    if not options.inference or options.dtype is None:
        return None
    found = meaning(module)
    if found is None or found.kind != "linear":
        return None
    if module._parameters[found.weight].dtype == options.dtype:
        return None
    name = str(options.dtype).removeprefix("torch.")
    return Swap(Linear, f"linear, of a copy of its weight in {name}", WeightCopy(found, options.dtype))
