"""liger_kernel.transformers.swiglu: MLPs gated by SiLU."""

from typing import Any

from torch import Tensor, nn

from lspm_kernels.compat.liger_kernel.transformers import functional as F


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


def check_silu(op: str, config: Any) -> None:
    """Raises ValueError unless SiLU is configured."""
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"{op}: config must have hidden_act 'silu' or 'swish', got {config.hidden_act!r}")


def make_layers(module: nn.Module, config: Any, intermediate_size: int | None = None) -> None:
    """Gives a module the sizes that are configured and the three layers of a gated MLP, without biases."""
    module.config = config
    module.hidden_size = config.hidden_size
    module.intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
    sizes = module.hidden_size, module.intermediate_size
    module.gate_proj = nn.Linear(*sizes, bias=False)
    module.up_proj = nn.Linear(*sizes, bias=False)
    module.down_proj = nn.Linear(*reversed(sizes), bias=False)
