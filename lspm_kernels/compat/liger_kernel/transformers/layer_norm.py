"""liger_kernel.transformers.layer_norm: liger_layer_norm as a module."""

import torch
from torch import Tensor, nn

from lspm_kernels.compat.liger_kernel.transformers import functional as F
from lspm_kernels.compat.liger_kernel.transformers.rms_norm import initial
from lspm_kernels.compat.refusals import refuse


class LigerLayerNorm(nn.Module):
    """Layer norm: liger_layer_norm with a weight and a bias of its own.

    Args:
        hidden_size: C.
        eps: added to the variance.
        bias: the bias begins as random numbers, else as 0; it is there either way, as Liger's is.
        init_fn: "ones" or "zeros": what the weight begins as.
        impl, mode, backend: only None; lspm_kernels.use_backend chooses among ours.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        bias: bool = False,
        init_fn: str = "ones",
        impl: str | None = None,
        mode: str | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        for name, value in (("impl", impl), ("mode", mode), ("backend", backend)):
            refuse("LigerLayerNorm", name, value, None, "it chooses among Liger's kernels")
        self.hidden_size = hidden_size
        self.eps = self.variance_epsilon = eps
        self.weight = initial("LigerLayerNorm", hidden_size, init_fn)
        self.bias = nn.Parameter(torch.randn(hidden_size) if bias else torch.zeros(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.liger_layer_norm(hidden_states, self.weight, self.bias, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"
