"""flash_attn.ops.rms_norm: RMS norm behind dropout and a residual addition."""

import torch
from torch import Tensor, nn

from lspm_kernels.compat.flash_attn.ops.layer_norm import scaled
from lspm_kernels.compat.flash_attn.ops.triton.layer_norm import rms_norm_fn


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """lspm_kernels.rms_norm."""
    return rms_norm_fn(x, weight, None, eps=epsilon)


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """dropout_add_layer_norm with RMS norm; bias is None."""
    return rms_norm_fn(
        scaled(x0, layerscale),
        weight,
        bias,
        residual,
        eps=epsilon,
        dropout_p=dropout_p,
        rowscale=rowscale,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        return_dropout_mask=return_dropout_mask,
    )


class RMSNorm(nn.Module):
    """rms_norm with a weight of its own."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class DropoutAddRMSNorm(RMSNorm):
    """dropout_add_rms_norm with a weight of its own; p is of training mode."""

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(hidden_size, eps, device, dtype)
        self.prenorm = prenorm
        self.p = p
        self.residual_in_fp32 = residual_in_fp32

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """y, or (y, sum) with prenorm."""
        return dropout_add_rms_norm(
            x0,
            residual,
            self.weight,
            None,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )
