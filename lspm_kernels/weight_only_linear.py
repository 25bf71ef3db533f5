"""A linear layer for inference: its weight in fewer bits, read once for each few rows."""

import torch
from torch import Tensor, nn

from lspm_kernels import checks
from lspm_kernels.acceleration.swap import original
from lspm_kernels.nn import linears
from lspm_kernels.ops.linear import FLOATS, linear, product, quantize_int8

_DTYPES = (*FLOATS, torch.int8)
_LINEARS = nn.Linear, linears.Linear


class WeightOnlyLinear(nn.Module):
    """torch.nn.Linear whose weight is kept in another dtype, as lspm_kernels.linear takes it.

    It has buffers and no parameters: weight (N, K), scales (N, G) of int8, and bias.

    Args:
        weight: (N, K), float32, bfloat16 or float16; it is kept, not copied, where dtype is its own.
        bias: (N,), or None.
        dtype: of the weight: float32, bfloat16, float16 or int8.
        group_size: columns to a scale of int8, a multiple of 32 that divides K; None gives each row one.

    Raises:
        ValueError: an argument breaks its rule; at a call: as linear.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.int8,
        group_size: int | None = None,
    ):
        super().__init__()
        if dtype not in _DTYPES:
            rule = f"one of {', '.join(map(str, _DTYPES))}"
            raise ValueError(f"WeightOnlyLinear: dtype must be {rule}, got {dtype}")
        if group_size is not None and dtype != torch.int8:
            raise ValueError(f"WeightOnlyLinear: group_size must be None beside {dtype}, got {group_size!r}")
        checks.matrix("WeightOnlyLinear", "weight", weight)
        if bias is not None:
            checks.vector("WeightOnlyLinear", "bias", bias, len(weight), (*FLOATS, weight.dtype))
        weight = weight.detach()
        small, scales = quantize_int8(weight, group_size) if dtype == torch.int8 else (weight.to(dtype), None)
        self.register_buffer("weight", small)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) of x (..., K), in x's dtype."""
        buffers = self._buffers  # a token of a small model takes less time than what looks attributes up
        weight, bias, scales = buffers["weight"], buffers["bias"], buffers["scales"]
        device = weight.device
        if (
            type(x) is not Tensor
            or x.dtype not in FLOATS
            or x.device != device
            or x.shape[-1:] != weight.shape[1:]
            or checks.autocasts(device)
        ):
            return linear(x, weight, bias, scales=scales)
        return product(x, weight, bias, scales)

    def extra_repr(self) -> str:
        """What print() shows of a layer."""
        dtype = str(self.weight.dtype).removeprefix("torch.")
        groups = "" if self.scales is None else f", groups={self.scales.shape[1]}"
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={dtype}{groups}"


def weight_only_(
    model: nn.Module, dtype: torch.dtype = torch.int8, *, group_size: int | None = None
) -> nn.Module:
    """Puts a WeightOnlyLinear in place of each Linear of a model, for inference.

    They are torch.nn's, replaced by accelerate or not, and lspm_kernels.nn's without an activation. Where one
    weight stands in several layers each gets its own; embeddings stay as they are. restore leaves what stands
    in their places.

    Args:
        model: it is changed; a Linear itself is not, but given back as another module.
        dtype, group_size: as WeightOnlyLinear's. A layer whose columns group_size does not divide has a scale
            to a row.

    Returns:
        model.

    Raises:
        TypeError: model is no module.
        ValueError: dtype or group_size breaks its rule.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"weight_only_: model must be a torch.nn.Module, got {type(model).__name__}")
    if group_size is not None:
        checks.integer("weight_only_", "group_size", group_size, 1)
    if original(model) in _LINEARS and getattr(model, "activation", None) is None:
        fits = group_size is not None and model.in_features % group_size == 0
        size = group_size if fits else None
        return WeightOnlyLinear(model.weight, model.bias, dtype=dtype, group_size=size)
    for name, child in model.named_children():
        replaced = weight_only_(child, dtype, group_size=group_size)
        if replaced is not child:
            setattr(model, name, replaced)
            if isinstance(model, nn.TransformerEncoderLayer):
                model.activation_relu_or_gelu = 0  # else torch's fast path reads the weights by itself
    return model
