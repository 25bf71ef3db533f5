"""flash_attn.ops.triton.layer_norm: layer norm and RMS norm behind dropout and a residual addition."""

import torch
from torch import Tensor, nn

from lspm_kernels import checks
from lspm_kernels.compat.refusals import refuse
from lspm_kernels.ops.dropout import dropout
from lspm_kernels.ops.layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The norm of sum = dropout(x * rowscale) + dropout(x1) + residual, of which all but x may be absent.

    The residual addition and the norm are one pass, and so are dropout and the addition of x1.

    Args:
        x: (..., C), float32, bfloat16 or float16.
        weight, bias: (C,), or bias None, as it must be for an RMS norm.
        residual, x1: of x's shape; x1 not beside a rowscale.
        weight1, bias1: of a second norm of the same sum.
        eps: added to the variance.
        dropout_p: the share of elements that is dropped, its seeds drawn from torch's default generator.
        rowscale: x's shape without C.
        prenorm: return the sum behind the outputs.
        residual_in_fp32: that sum is float32, where there is no residual, whose dtype it has otherwise.
        zero_centered_weight: weights count as weight + 1.
        is_rms_norm: RMS norm instead of layer norm.
        out_dtype: of the outputs; None: x's.
        return_dropout_mask, out, residual_out: only False and None.

    Returns:
        y (..., C); where they are asked for (y, y1), (y, sum) or (y, y1, sum).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: an option is asked for that is not carried.

    Source: Dao, the package flash_attn.
    """
    op = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    refuse(op, "return_dropout_mask", return_dropout_mask, False, "masks are drawn again and never stored")
    refuse(op, "out", out, None, "results have memory of their own")
    refuse(op, "residual_out", residual_out, None, "results have memory of their own")
    _check(op, x, residual, x1, rowscale, {"bias": bias, "bias1": bias1}, weight1, is_rms_norm)
    dtype = out_dtype or x.dtype
    if rowscale is not None:
        x = x * rowscale[..., None].to(x.dtype)
    x = dropout(x, dropout_p)
    if x1 is not None:
        x = dropout(x1, dropout_p, residual=x)
    if residual is None:
        total = x.float() if residual_in_fp32 else x
        y = _norm(x, weight, bias, eps, zero_centered_weight, is_rms_norm)
    else:
        wide = torch.promote_types(x.dtype, residual.dtype)
        given = x.to(wide), residual.to(wide), *_parameters(weight, bias, wide, zero_centered_weight)
        y, total = add_rms_norm(*given[:3], eps) if is_rms_norm else add_layer_norm(*given, eps)
        total = total.to(residual.dtype)
    outputs = [y.to(dtype)]
    if weight1 is not None:
        y1 = _norm(total, weight1, bias1, eps, zero_centered_weight, is_rms_norm)
        outputs.append(y1.to(dtype))
    if prenorm:
        outputs.append(total)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """layer_norm_fn with RMS norm; bias and bias1 are None."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, True, return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """RMS norm behind dropout and a residual addition: rms_norm_fn with a weight of its own.

    Args:
        hidden_size: C.
        eps: added to the mean square.
        dropout_p: in training mode.
        zero_centered_weight: the weight begins at 0 and counts as weight + 1.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or (y, sum) with prenorm."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def _check(op, x, residual, x1, rowscale, biases, weight1, is_rms_norm):
    checks.floating(op, "x", x)
    for name, t in (("residual", residual), ("x1", x1)):
        if t is not None:
            checks.like(op, name, t, x)
    for name, t in biases.items():
        if t is not None and is_rms_norm:
            raise ValueError(f"{op}: {name} must be None for an RMS norm, got {checks.shape(t)}")
    if biases["bias1"] is not None and weight1 is None:
        raise ValueError(f"{op}: bias1 must be None where weight1 is, got {checks.shape(biases['bias1'])}")
    if rowscale is not None and x1 is not None:
        raise ValueError(f"{op}: rowscale must be None beside x1, got {checks.shape(rowscale)}")
    if rowscale is not None and (not isinstance(rowscale, Tensor) or rowscale.shape != x.shape[:-1]):
        rule = f"a tensor of shape {tuple(x.shape[:-1])}"
        raise ValueError(f"{op}: rowscale must be {rule}, got {checks.shape(rowscale)}")


def _norm(x, weight, bias, eps, zero_centered, is_rms_norm):
    weight, bias = _parameters(weight, bias, x.dtype, zero_centered)
    return rms_norm(x, weight, eps) if is_rms_norm else layer_norm(x, weight, bias, eps)


def _parameters(weight, bias, dtype, zero_centered):
    """weight and bias as the norms take them beside x of a dtype: both in that or both in float32."""
    if zero_centered:
        weight = weight.float() + 1.0
    kept = weight.dtype == dtype and (bias is None or bias.dtype == dtype)
    return (weight, bias) if kept else (weight.float(), None if bias is None else bias.float())
