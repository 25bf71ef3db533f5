"""Layers as Hugging Face's kernels takes them: modules of nothing but a forward, which a host module borrows.

A forward reads what the host has, as transformers names it. kernels.kernelize(model) puts them in place by
layer name, once a mapping leads there; RMSNorm, SiLU, GeLU, GeluTanh and NewGELU are such names. By hand it
is module.forward = types.MethodType(layers.RMSNorm.forward, module).
"""

from torch import Tensor, nn

from lspm_kernels.compat.rotary_pos_emb import rotary_pos_emb
from lspm_kernels.ops import layer_norm as norms
from lspm_kernels.ops.bias_act import bias_act
from lspm_kernels.ops.linear_cross_entropy import linear_cross_entropy
from lspm_kernels.ops.swiglu import geglu, swiglu


class RMSNorm(nn.Module):
    """y = hidden_states / sqrt(mean(hidden_states ** 2) + variance_epsilon) * weight."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return norms.rms_norm(hidden_states, _beside(hidden_states, self.weight), self.variance_epsilon)


class LayerNorm(nn.Module):
    """Layer norm over the last dimension, for hosts with torch.nn.LayerNorm's weight, bias and eps."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _beside(input, self.weight, self.bias)
        return norms.layer_norm(input, weight, bias, self.eps)


class SiluAndMul(nn.Module):
    """silu(a) * b, of the halves a and b of the last dimension."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return swiglu(input)


class GeluAndMul(nn.Module):
    """gelu(a) * b, of the halves a and b of the last dimension, by erf."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return geglu(input)


class GeluTanhAndMul(nn.Module):
    """gelu(a) * b, of the halves a and b of the last dimension, by tanh."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return geglu(input, approximate="tanh")


class SwiGLUMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), of the host's layers, whatever these are."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class GeGLUMLP(nn.Module):
    """down_proj(gelu(gate_proj(x)) * up_proj(x)), GELU by tanh."""

    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x), approximate="tanh"))


class SiLU(nn.Module):
    """input * sigmoid(input)."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return bias_act(input, None, "silu")


class GeLU(nn.Module):
    """GELU by erf."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return bias_act(input, None, "gelu")


class GeluTanh(nn.Module):
    """GELU by tanh."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return bias_act(input, None, "gelu_tanh")


class NewGELU(nn.Module):
    """GELU by tanh, under the name that transformers has for it in GPT-2."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return bias_act(input, None, "gelu_tanh")


class FastGELU(nn.Module):
    """GELU by tanh, under the name that transformers has for gelu_fast."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return bias_act(input, None, "gelu_tanh")


class LinearCrossEntropy(nn.Module):
    """The mean cross entropy of hidden with classes, by the host's weight, and its bias where it has one."""

    can_torch_compile = True

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, self.weight, target, bias=getattr(self, "bias", None))


class RotaryPosEmb(nn.Module):
    """transformers' apply_rotary_pos_emb: q and k (B, H, T, D), cos and sin (1 or B, T, R) with halves alike.

    With unsqueeze_dim 2 q and k are (B, T, H, D).
    """

    can_torch_compile = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim == 2:
            turned = rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin, cos.shape[-1] // 2)
            return tuple(x.transpose(1, 2) for x in turned)
        return rotary_pos_emb(q, k, cos, sin, cos.shape[-1] // 2)


def _beside(x, weight, *others):
    """Parameters in a dtype that the norms take beside x: its own or float32."""
    kept = all(p is None or p.dtype == x.dtype for p in (weight, *others))
    given = [p if p is None or kept else p.float() for p in (weight, *others)]
    return given if others else given[0]
