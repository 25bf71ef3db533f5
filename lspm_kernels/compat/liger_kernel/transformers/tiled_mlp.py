"""liger_kernel.transformers.tiled_mlp: gated MLPs of long sequences, a shard of rows at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lspm_kernels.compat.liger_kernel.transformers.geglu import LigerGEGLUMLP
from lspm_kernels.compat.liger_kernel.transformers.swiglu import LigerSwiGLUMLP

_GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")


class LigerTiledSwiGLUMLP(LigerSwiGLUMLP):
    """LigerSwiGLUMLP that keeps its input alone; the backward runs the forward of each shard again.

    Args:
        config: has hidden_size, intermediate_size and hidden_act.
        num_shards: of the rows; None: one for each hidden_size rows of a sequence.
    """

    def __init__(self, config: Any, num_shards: int | None = None):
        super().__init__(config)
        self.num_shards = num_shards

    def forward(self, x: Tensor) -> Tensor:
        return _by_shards(super().forward, x, self.num_shards)


class LigerTiledGEGLUMLP(LigerGEGLUMLP):
    """LigerGEGLUMLP as LigerTiledSwiGLUMLP is LigerSwiGLUMLP."""

    def __init__(self, config: Any, num_shards: int | None = None):
        act = getattr(config, "hidden_act", "gelu")
        if act not in _GELUS:
            rule = f"have hidden_act {', '.join(_GELUS)}"
            raise ValueError(f"LigerTiledGEGLUMLP: config must {rule}, got {act!r}")
        super().__init__(config)
        self.num_shards = num_shards

    def forward(self, x: Tensor) -> Tensor:
        return _by_shards(super().forward, x, self.num_shards)


def _by_shards(forward, x, count):
    shards = x.chunk(count or max(-(-x.shape[-2] // x.shape[-1]), 1), dim=-2)
    return torch.cat([checkpoint(forward, shard, use_reentrant=False) for shard in shards], dim=-2)
