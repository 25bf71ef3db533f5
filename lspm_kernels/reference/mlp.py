"""The MLP of a transformer and its gated form, in plain PyTorch: what the kernels compute."""

import torch.nn.functional as F
from torch import Tensor

from lspm_kernels.reference.bias_act import bias_act
from lspm_kernels.reference.swiglu import swiglu


def mlp(x, weight_in, bias_in, weight_out, bias_out, activation: str = "gelu") -> Tensor:
    """y = activation(x weight_in^T + bias_in) weight_out^T + bias_out."""
    return F.linear(bias_act(F.linear(x, weight_in), bias_in, activation), weight_out, bias_out)


def gated_mlp(x, weight_gate, weight_up, weight_down, activation: str = "silu") -> Tensor:
    """y = (activation(x weight_gate^T) * (x weight_up^T)) weight_down^T."""
    return F.linear(swiglu(F.linear(x, weight_gate), F.linear(x, weight_up), activation), weight_down)
