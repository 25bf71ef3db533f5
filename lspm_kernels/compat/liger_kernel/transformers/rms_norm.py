"""liger_kernel.transformers.rms_norm: liger_rms_norm as a module."""

import torch
from torch import Tensor, nn

from lspm_kernels.compat.liger_kernel.transformers import functional as F


class LigerRMSNorm(nn.Module):
    """RMS norm: liger_rms_norm with a weight of its own.

    Args:
        hidden_size: C.
        eps, offset, casting_mode, in_place: those of liger_rms_norm.
        init_fn: "ones" or "zeros": what the weight begins as.
        row_mode: taken and not needed.
        elementwise_affine: whether there is a weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = True,
        row_mode: bool | None = None,
        elementwise_affine: bool = True,
    ):
        super().__init__()
        F.check_casting_mode("LigerRMSNorm", casting_mode)
        self.elementwise_affine = elementwise_affine
        weight = initial("LigerRMSNorm", hidden_size, init_fn)
        self.register_parameter("weight", weight if elementwise_affine else None)
        self.variance_epsilon = eps
        self.offset = offset
        self.casting_mode = casting_mode
        self.in_place = in_place
        self.row_mode = row_mode

    def forward(self, hidden_states: Tensor) -> Tensor:
        given = self.variance_epsilon, self.offset, self.casting_mode, self.in_place
        return F.liger_rms_norm(hidden_states, self.weight, *given)

    def extra_repr(self) -> str:
        shape = None if self.weight is None else tuple(self.weight.shape)
        return f"weight_shape={shape}, eps={self.variance_epsilon}, offset={self.offset}"


def initial(op: str, hidden_size: int, init_fn: str) -> nn.Parameter:
    """What a norm's weight begins as; ValueError unless init_fn is known."""
    if init_fn not in ("ones", "zeros"):
        raise ValueError(f"{op}: init_fn must be 'ones' or 'zeros', got {init_fn!r}")
    return nn.Parameter(torch.ones(hidden_size) if init_fn == "ones" else torch.zeros(hidden_size))
