"""flash_attn.ops.fused_dense: linear layers and MLPs, over lspm_kernels.linear and lspm_kernels.mlp."""

import torch
from torch import Tensor, nn

from lspm_kernels.compat.refusals import refuse
from lspm_kernels.ops.linear import linear
from lspm_kernels.ops.mlp import mlp

_ACTIVATIONS = {"gelu_approx": "gelu_tanh", "relu": "relu"}
_ALONE = "rows are not divided among processes"


def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
    process_group: object = None,
    sequence_parallel: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """lspm_kernels.linear, whose docstring says what it takes.

    Args:
        return_residual: return (y, x).
        process_group: only None; sequence_parallel counts beside one alone.
    """
    refuse("fused_dense_func", "process_group", process_group, None, _ALONE)
    y = linear(x, weight, bias)
    return (y, x) if return_residual else y


class FusedDense(nn.Linear):
    """torch.nn.Linear over fused_dense_func; with return_residual it returns (y, x)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor, process_group: object = None) -> Tensor | tuple[Tensor, Tensor]:
        given = self.weight, self.bias
        return fused_dense_func(x, *given, return_residual=self.return_residual, process_group=process_group)


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int | str = 0,
    process_group: object = None,
    sequence_parallel: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """lspm_kernels.mlp, whose docstring says what it takes and keeps.

    Args:
        activation: "gelu_approx" (by tanh) or "relu".
        save_pre_act, heuristic: taken and not needed.
        return_residual: return (y, x).
        checkpoint_lvl: 0 or 1, which are one here: the activation is computed again by the backward.
        process_group: only None; sequence_parallel counts beside one alone.

    Raises:
        NotImplementedError: "sqrelu", checkpoint_lvl 2 or a process_group.
    """
    op = "fused_mlp_func"
    _check(op, activation, checkpoint_lvl)
    refuse(op, "process_group", process_group, None, _ALONE)
    y = mlp(x, weight1, bias1, weight2, bias2, activation=_ACTIVATIONS[activation])
    return (y, x) if return_residual else y


class FusedMLP(nn.Module):
    """fc2(activation(fc1(x))) over fused_mlp_func.

    Args:
        in_features: C.
        hidden_features: 4 C where None; out_features: C where None.
        bias1, bias2: whether the layers have biases.
        activation, return_residual, checkpoint_lvl, heuristic: those of fused_mlp_func.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check("FusedMLP", activation, checkpoint_lvl)
        made = {"device": device, "dtype": dtype}
        hidden_features = hidden_features or in_features * 4
        self.activation = activation
        self.return_residual = return_residual
        self.checkpoint_lvl = checkpoint_lvl
        self.heuristic = heuristic
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, **made)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias2, **made)

    def forward(self, x: Tensor, process_group: object = None) -> Tensor | tuple[Tensor, Tensor]:
        return fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            save_pre_act=self.training,
            return_residual=self.return_residual,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=self.heuristic,
            process_group=process_group,
        )


def _check(op, activation, checkpoint_lvl):
    if activation == "sqrelu":
        raise NotImplementedError(f"{op}: activation must be 'gelu_approx' or 'relu', got 'sqrelu'")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{op}: activation must be 'gelu_approx' or 'relu', got {activation!r}")
    if checkpoint_lvl == 2:
        rule = "0 or 1, as what the activation reads is kept (torch.utils.checkpoint keeps nothing)"
        raise NotImplementedError(f"{op}: checkpoint_lvl must be {rule}, got 2")
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"{op}: checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}")
