"""A gated linear unit behind its two linear layers, in plain PyTorch: what the kernels compute."""

import torch
from torch import Tensor

from lspm_kernels.reference.bias_act import ACTIVATIONS


def swiglu(gate: Tensor, up: Tensor | None = None, activation: str = "silu") -> Tensor:
    """y = activation(gate) * up, in float32 at least, rounded to gate's dtype; without up, gate is both."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (ACTIVATIONS[activation](gate.to(wide)) * up.to(wide)).to(gate.dtype)
