"""liger_kernel.transformers.fused_add_rms_norm: liger_fused_add_rms_norm as a module."""

from torch import Tensor, nn

from lspm_kernels.compat.liger_kernel.transformers import functional as F
from lspm_kernels.compat.liger_kernel.transformers.rms_norm import initial


class LigerFusedAddRMSNorm(nn.Module):
    """Residual addition and RMS norm: liger_fused_add_rms_norm with a weight of its own. See LigerRMSNorm."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = False,
    ):
        super().__init__()
        F.check_casting_mode("LigerFusedAddRMSNorm", casting_mode)
        self.weight = initial("LigerFusedAddRMSNorm", hidden_size, init_fn)
        self.variance_epsilon = eps
        self.offset = offset
        self.casting_mode = casting_mode
        self.in_place = in_place

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(y, sum)."""
        given = self.variance_epsilon, self.offset, self.casting_mode, self.in_place
        return F.liger_fused_add_rms_norm(hidden_states, residual, self.weight, *given)
