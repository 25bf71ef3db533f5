"""Liger's norms and MLPs: parameters, and the functions of functional.py."""

from typing import Any

import torch
from torch import Tensor, nn

from lspm_kernels.compat.liger import functional as F
from lspm_kernels.compat.refusals import refuse


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
        weight = _initial("LigerRMSNorm", hidden_size, init_fn)
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
        self.weight = _initial("LigerFusedAddRMSNorm", hidden_size, init_fn)
        self.variance_epsilon = eps
        self.offset = offset
        self.casting_mode = casting_mode
        self.in_place = in_place

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(y, sum)."""
        given = self.variance_epsilon, self.offset, self.casting_mode, self.in_place
        return F.liger_fused_add_rms_norm(hidden_states, residual, self.weight, *given)


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
        self.weight = _initial("LigerLayerNorm", hidden_size, init_fn)
        self.bias = nn.Parameter(torch.randn(hidden_size) if bias else torch.zeros(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.liger_layer_norm(hidden_states, self.weight, self.bias, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"


class LigerSwiGLUMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), of a configuration's hidden_size and intermediate_size."""

    def __init__(self, config: Any, intermediate_size: int | None = None):
        super().__init__()
        _check_silu("LigerSwiGLUMLP", config)
        _make_layers(self, config, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.liger_swiglu(self.gate_proj(x), self.up_proj(x)))


class LigerQwen3MoeSwiGLUMLP(LigerSwiGLUMLP):
    """LigerSwiGLUMLP under the name of a mixture's experts."""


class LigerBlockSparseTop2MLP(nn.Module):
    """w2(silu(w1(x)) * w3(x)): LigerSwiGLUMLP with the names of Mixtral's experts."""

    def __init__(self, config: Any):
        super().__init__()
        _check_silu("LigerBlockSparseTop2MLP", config)
        self.hidden_dim, self.ffn_dim = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(self.hidden_dim, self.ffn_dim, bias=False)
        self.w2 = nn.Linear(self.ffn_dim, self.hidden_dim, bias=False)
        self.w3 = nn.Linear(self.hidden_dim, self.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.liger_swiglu(self.w1(x), self.w3(x)))


class LigerPhi3SwiGLUMLP(nn.Module):
    """down_proj(silu(gate) * up), where gate_up_proj(x) is gate and up side by side."""

    def __init__(self, config: Any):
        super().__init__()
        _check_silu("LigerPhi3SwiGLUMLP", config)
        self.config = config
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Linear(self.hidden_size, 2 * self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.liger_swiglu(gate, up))


class LigerGEGLUMLP(nn.Module):
    """down_proj(gelu(gate_proj(x)) * up_proj(x)), GELU by tanh, whatever activation is configured."""

    def __init__(self, config: Any):
        super().__init__()
        _make_layers(self, config, None)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.liger_geglu(self.gate_proj(x), self.up_proj(x)))


def _check_silu(op, config):
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"{op}: config must have hidden_act 'silu' or 'swish', got {config.hidden_act!r}")


def _make_layers(module, config, intermediate_size):
    module.config = config
    module.hidden_size = config.hidden_size
    module.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
    sizes = module.hidden_size, module.intermediate_size
    module.gate_proj = nn.Linear(*sizes, bias=False)
    module.up_proj = nn.Linear(*sizes, bias=False)
    module.down_proj = nn.Linear(*reversed(sizes), bias=False)


def _initial(op, hidden_size, init_fn):
    if init_fn not in ("ones", "zeros"):
        raise ValueError(f"{op}: init_fn must be 'ones' or 'zeros', got {init_fn!r}")
    return nn.Parameter(torch.ones(hidden_size) if init_fn == "ones" else torch.zeros(hidden_size))
