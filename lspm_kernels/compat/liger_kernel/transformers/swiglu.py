"""liger_kernel.transformers.swiglu: MLPs gated by SiLU, and mixtures of them."""

from typing import Any

import torch
from torch import Tensor, nn

from lspm_kernels.compat.liger_kernel.transformers import functional as F
from lspm_kernels.ops.mlp import gated_mlp


class LigerSwiGLUMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), of a configuration's hidden_size and intermediate_size."""

    def __init__(self, config: Any, intermediate_size: int | None = None):
        super().__init__()
        check_silu("LigerSwiGLUMLP", config)
        make_layers(self, config, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.liger_swiglu(self.gate_proj(x), self.up_proj(x)))


class LigerQwen3MoeSwiGLUMLP(LigerSwiGLUMLP):
    """LigerSwiGLUMLP under the name of a mixture's experts."""


class LigerBlockSparseTop2MLP(nn.Module):
    """w2(silu(w1(x)) * w3(x)): LigerSwiGLUMLP with the names of Mixtral's experts."""

    def __init__(self, config: Any):
        super().__init__()
        check_silu("LigerBlockSparseTop2MLP", config)
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
        check_silu("LigerPhi3SwiGLUMLP", config)
        self.config = config
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Linear(self.hidden_size, 2 * self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.liger_swiglu(gate, up))


class LigerFalconH1SwiGLUMLP(nn.Module):
    """down_proj(silu(a * gate_proj(x)) * up_proj(x)) * b, of a configuration's mlp_multipliers (a, b)."""

    def __init__(self, config: Any):
        super().__init__()
        check_silu(type(self).__name__, config)
        make_layers(self, config, bias=getattr(config, "mlp_bias", False))
        self.gate_multiplier, self.down_multiplier = map(float, config.mlp_multipliers)

    def forward(self, x: Tensor) -> Tensor:
        gated = F.liger_swiglu(self.gate_proj(x) * self.gate_multiplier, self.up_proj(x))
        return self.down_proj(gated) * self.down_multiplier


class LigerExperts(nn.Module):
    """The sum of what a token's experts, each an MLP gated by SiLU, make of it, by the router's weights.

    The experts' parameters are as transformers 5 lays them out: gate_up_proj (E, 2 I, C), the gates first,
    and down_proj (E, C, I). Experts without a token are passed over; to know them waits for a GPU.
    """

    def __init__(self, config: Any):
        super().__init__()
        check_silu("LigerExperts", config)
        names = "num_experts", "num_local_experts", "n_routed_experts"
        self.num_experts = next(getattr(config, name) for name in names if hasattr(config, name))
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        sizes = self.num_experts, self.hidden_dim, self.intermediate_dim
        self.gate_up_proj = nn.Parameter(torch.empty(sizes[0], 2 * sizes[2], sizes[1]))
        self.down_proj = nn.Parameter(torch.empty(sizes))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (..., C), experts' indices and weights (..., K) -> (..., C)."""
        x = hidden_states.reshape(-1, self.hidden_dim)
        index, weights = (t.reshape(len(x), -1) for t in (top_k_index, top_k_weights))
        total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for expert in index.unique().tolist():
            rows, places = (index == expert).nonzero(as_tuple=True)
            made = gated_mlp(x[rows], *self.gate_up_proj[expert].chunk(2), self.down_proj[expert])
            total = total.index_add(0, rows, (made * weights[rows, places, None]).to(total.dtype))
        return total.to(x.dtype).view(hidden_states.shape)


def check_silu(op: str, config: Any) -> None:
    """Raises ValueError unless SiLU is configured."""
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"{op}: config must have hidden_act 'silu' or 'swish', got {config.hidden_act!r}")


def make_layers(
    module: nn.Module, config: Any, intermediate_size: int | None = None, bias: bool = False
) -> None:
    """Gives a module the sizes that are configured and the three layers of a gated MLP."""
    module.config = config
    module.hidden_size = config.hidden_size
    module.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
    sizes = module.hidden_size, module.intermediate_size
    module.gate_proj = nn.Linear(*sizes, bias=bias)
    module.up_proj = nn.Linear(*sizes, bias=bias)
    module.down_proj = nn.Linear(*reversed(sizes), bias=bias)
