"""torch.nn.TransformerEncoderLayer over attention, mlp, add_layer_norm and dropout."""

import torch.nn.functional as F
from torch import Tensor, nn

from lspm_kernels import checks
from lspm_kernels.nn import attentions, calls, elementwise, linears, norms
from lspm_kernels.ops.bias_act import bias_act
from lspm_kernels.ops.dropout import dropout
from lspm_kernels.ops.layer_norm import add_layer_norm, layer_norm
from lspm_kernels.ops.mlp import mlp

_FUNCTIONS = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
_NAMES = {
    nn.ReLU: "relu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    elementwise.GELU: "gelu",
    elementwise.SiLU: "silu",
}
# What the layer is made of, if its forward is to know what they compute.
_PARTS = {
    "self_attn": {nn.MultiheadAttention, attentions.MultiheadAttention},
    **{name: {nn.Linear, linears.Linear} for name in ("linear1", "linear2")},
    **{name: {nn.LayerNorm, norms.LayerNorm} for name in ("norm1", "norm2")},
    **{name: {nn.Dropout, elementwise.Dropout} for name in ("dropout", "dropout1", "dropout2")},
}


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: on a CPU by our kernels, as long as it has torch's parts.

    With a part of another class, or one that has hooks, and with an activation that is not ReLU, GELU or
    SiLU, it is torch's.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masks = src_key_padding_mask, src_mask, is_causal
        activation = _activation(self.activation)
        if (
            not attentions.takes(self.self_attn, src, src, src, *masks)
            or activation is None
            or _is_narrow(self, src)
            or not _has_its_parts(self)
            or not _fits(self, src)
        ):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        attn, norm1, norm2 = self.self_attn, self.norm1, self.norm2
        x = src
        if self.norm_first:
            h = layer_norm(x, norm1.weight, norm1.bias, norm1.eps)
            h, x = _add_norm(attentions.attend(attn, h, h, h, *masks), x, self.dropout1, norm2)
            return _add(_feed_forward(self, h, activation), x, self.dropout2)
        x, _ = _add_norm(attentions.attend(attn, x, x, x, *masks), x, self.dropout1, norm1)
        return _add_norm(_feed_forward(self, x, activation), x, self.dropout2, norm2)[0]


def _feed_forward(layer, x, activation) -> Tensor:
    first, second, p = layer.linear1, layer.linear2, _share(layer.dropout)
    if not p:
        return mlp(x, first.weight, first.bias, second.weight, second.bias, activation=activation)
    h = bias_act(linears.project(x, first.weight, None), first.bias, activation)
    return linears.project(dropout(h, p), second.weight, second.bias)


def _add(y, x, module) -> Tensor:
    return dropout(y, p, residual=x) if (p := _share(module)) else x + y


def _add_norm(y, x, module, norm) -> tuple[Tensor, Tensor]:
    """(norm(x + y), x + y), where y is dropped out before."""
    if not _share(module):
        return add_layer_norm(y, x, norm.weight, norm.bias, norm.eps)
    x = _add(y, x, module)
    return layer_norm(x, norm.weight, norm.bias, norm.eps), x


def _is_narrow(layer, x) -> bool:
    """Whether torch's layer may keep its residual sums in autocast's dtype: without a gradient it does."""
    if layer.training or not checks.autocasts(x.device):
        return False
    return not calls.records(x, *layer.parameters())


def _share(module) -> float:
    return module.p if module.training else 0.0


def _activation(function) -> str | None:
    """The name of an activation, a function or a module."""
    if not isinstance(function, nn.Module):
        return _FUNCTIONS.get(function)
    for kind, name in _NAMES.items():
        if calls.known(function, {kind}):
            return "gelu_tanh" if name == "gelu" and function.approximate == "tanh" else name
    return None


def _has_its_parts(layer) -> bool:
    """Whether what the layer calls computes what torch's layer of that name does."""
    modules = layer._modules
    if not all(calls.known(modules[name], kinds) for name, kinds in _PARTS.items()):
        return False
    return all(getattr(modules[name], "activation", None) is None for name in ("linear1", "linear2"))


def _fits(layer, x) -> bool:
    """Whether parameters are plain and of x's dtype, and sizes and shares are the kernels'."""
    parts = layer.linear1, layer.linear2, layer.norm1, layer.norm2
    parameters = [p for part in parts for p in (part.weight, part.bias)]
    if not (calls.plain(x, *parameters) and calls.alike(x, *parameters)):
        return False
    if layer.linear1.weight.shape[1] != x.shape[-1]:
        return False
    return layer.norm1.normalized_shape == layer.norm2.normalized_shape == x.shape[-1:]
