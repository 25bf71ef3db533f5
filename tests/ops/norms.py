"""What the kernels of layer norm are tested with: their inputs, and the reference as one function of them."""

import torch

from lspm_kernels.reference import layer_norm as reference

EPS = 1e-5
ALL = ("residual", "weight", "bias")


def tensors(rows, cols, dtype=torch.float32, weight_dtype=None, present=ALL):
    """x, residual, weight, bias; None for those not present."""
    weight_dtype = weight_dtype or dtype
    made = {
        "x": (torch.randn(rows, cols) * 2 + 0.7).to(dtype),
        "residual": torch.randn(rows, cols).to(dtype),
        "weight": (torch.randn(cols) + 1).to(weight_dtype),
        "bias": torch.randn(cols).to(weight_dtype),
    }
    return [made[name] if name in ("x", *present) else None for name in made]


def plain(centered=True):
    """The forms of layer norm, or of RMS norm, as one function of x, residual, weight, bias."""

    def function(x, residual=None, weight=None, bias=None):
        arguments = (weight, bias, EPS) if centered else (weight, EPS)
        if residual is None:
            return (reference.layer_norm if centered else reference.rms_norm)(x, *arguments)
        return (reference.add_layer_norm if centered else reference.add_rms_norm)(x, residual, *arguments)

    return function
