"""The MLP of a transformer, plain and gated: linear layers around an activation, as one function."""

import torch
from torch import Tensor

from lspm_kernels import checks, dispatch
from lspm_kernels.operator import Operator
from lspm_kernels.ops import bias_act, swiglu
from lspm_kernels.ops.linear import product, reads
from lspm_kernels.products import addmm, flat, linear, matmul
from lspm_kernels.reference import mlp as reference

BACKENDS = bias_act.BACKENDS  # of what lies between the products


# The operators take x as rows, and give rows.
def _mlp(row, x, weight_in, bias_in, weight_out, bias_out, activation, saves=True):
    inner = linear(x, weight_in)  # without its bias, which costs the activation nothing
    hidden = torch.empty_like(inner) if saves else inner
    if row is not None and inner.numel():
        row.forward(inner, None if bias_in is None else bias_in.contiguous(), hidden, activation)
    return linear(hidden, weight_out, bias_out), inner


def _save(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    inner = output[1]
    ctx.save_for_backward(*tensors[:4], inner)
    ctx.mark_non_differentiable(inner)


def _gradient(ctx, dy, _):
    x, weight_in, bias_in, weight_out, inner = ctx.saved_tensors
    wants_dx, wants_in, wants_bias_in, wants_out, wants_bias_out = ctx.needs_input_grad[:5]
    dx = dweight_in = dbias_in = dweight_out = None
    dbias_out = dy.sum(0) if wants_bias_out else None
    if wants_dx or wants_in or wants_bias_in or wants_out:
        dinner, dbias_in, hidden = bias_act.act_backward(
            ctx.row, matmul(dy, weight_out), inner, bias_in, ctx.activation, wants_bias_in, wants_out, True
        )
        dweight_out = matmul(dy.t(), hidden) if wants_out else None
        del hidden  # of inner's size, before the other products' results come
        dweight_in = matmul(dinner.t(), x) if wants_in else None
        dx = matmul(dinner, weight_in) if wants_dx else None
    return dx, dweight_in, dbias_in if wants_bias_in else None, dweight_out, dbias_out, None


_mlp_operator = Operator(
    "mlp(Tensor x, Tensor weight_in, Tensor? bias_in, Tensor weight_out, Tensor? bias_out, int activation)"
    " -> (Tensor y, Tensor inner)",
    BACKENDS,
    _mlp,
    _save,
    _gradient,
)


def _gated(row, x, weight_gate, weight_up, weight_down, activation, saves=True):
    gate, up = linear(x, weight_gate), linear(x, weight_up)
    hidden = torch.empty_like(gate) if saves else gate
    if row is not None and gate.numel():
        row.forward(gate, up, hidden, activation)
    return linear(hidden, weight_down), gate, up


def _gated_save(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    gate, up = output[1:]
    ctx.save_for_backward(*tensors, gate, up)
    ctx.mark_non_differentiable(gate, up)


def _gated_gradient(ctx, dy, *_):
    x, weight_gate, weight_up, weight_down, gate, up = ctx.saved_tensors
    wants_dx, wants_gate, wants_up, wants_down = ctx.needs_input_grad[:4]
    dgate, dup, hidden = swiglu.glu_backward(
        ctx.row, matmul(dy, weight_down), gate, up, ctx.activation, wants_down, True
    )
    dweight_down = matmul(dy.t(), hidden) if wants_down else None
    del hidden  # of gate's size, before the other products' results come
    dx = addmm(matmul(dgate, weight_gate), dup, weight_up) if wants_dx else None
    dweight_gate = matmul(dgate.t(), x) if wants_gate else None
    dweight_up = matmul(dup.t(), x) if wants_up else None
    return dx, dweight_gate, dweight_up, dweight_down, None


_gated_operator = Operator(
    "gated_mlp(Tensor x, Tensor weight_gate, Tensor weight_up, Tensor weight_down, int activation)"
    " -> (Tensor y, Tensor gate, Tensor up)",
    swiglu.BACKENDS,
    _gated,
    _gated_save,
    _gated_gradient,
)


def mlp(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    activation: str = "gelu",
    backend: str | None = None,
) -> Tensor:
    """Two linear layers with an activation between them:

        y = activation(x weight_in^T + bias_in) weight_out^T + bias_out

    For the backward x and the first product are kept; what the second layer read is computed again in the
    pass that gives the gradient before the activation and dbias_in. Of the products torch's may differ with
    the number of threads, see linear.

    Args:
        x: (..., C), float32, bfloat16 or float16; autocast's dtype where that is on, as in torch's linear.
        weight_in: (H, C), x's dtype.
        bias_in: (H,), x's dtype or float32, or None.
        weight_out: (D, H), x's dtype.
        bias_out: (D,), x's dtype or float32, or None.
        activation: "gelu" (by erf), "gelu_tanh", "silu" or "relu".
        backend: "cpu", "triton" or "reference", of the activation; None takes the first that admits the call.

    Returns:
        y: (..., D), x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or there is no such activation.
        NotImplementedError: the backend asked for does not take this call.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 2.
    """
    checks.floating("mlp", "x", x)
    x, weight_in, weight_out = checks.autocast(x, weight_in, weight_out)
    _weight("mlp", "weight_in", weight_in, x, None, x.shape[-1])
    hidden = weight_in.shape[0]
    _weight("mlp", "weight_out", weight_out, x, None, hidden)
    for name, bias, size in (("bias_in", bias_in, hidden), ("bias_out", bias_out, weight_out.shape[0])):
        if bias is not None:
            checks.parameter("mlp", name, bias, size, x.device, (x.dtype, torch.float32))
    number = bias_act.activation_number("mlp", activation)
    bias_out = None if bias_out is None else bias_out.to(x.dtype)
    row = dispatch.pick("mlp", BACKENDS, backend, x)
    if row is not None and reads(x, weight_in, bias_in, weight_out, bias_out):
        hidden = bias_act.act(row, product(x, weight_in, None, None), bias_in, number)
        return product(hidden, weight_out, bias_out, None)
    if row is None:
        return reference.mlp(x, weight_in, bias_in, weight_out, bias_out, activation)
    y, _ = _mlp_operator(row, flat(x), weight_in, bias_in, weight_out, bias_out, number)
    return y.view(*x.shape[:-1], y.shape[-1])


def gated_mlp(
    x: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    weight_down: Tensor,
    *,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """A gated linear unit between linear layers, as in Llama:

        y = (activation(x weight_gate^T) * (x weight_up^T)) weight_down^T

    Args:
        x: (..., C), float32, bfloat16 or float16; autocast's dtype where that is on, as in torch's linear.
        weight_gate, weight_up: (H, C), x's dtype.
        weight_down: (D, H), x's dtype.
        activation: "silu", "gelu" (by erf) or "gelu_tanh".
        backend: as in mlp.

    Returns:
        y: (..., D), x's dtype.

    Raises: as mlp.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 6.
    """
    checks.floating("gated_mlp", "x", x)
    x, weight_gate, weight_up, weight_down = checks.autocast(x, weight_gate, weight_up, weight_down)
    _weight("gated_mlp", "weight_gate", weight_gate, x, None, x.shape[-1])
    hidden = weight_gate.shape[0]
    _weight("gated_mlp", "weight_up", weight_up, x, hidden, x.shape[-1])
    _weight("gated_mlp", "weight_down", weight_down, x, None, hidden)
    number = bias_act.activation_number("gated_mlp", activation, swiglu.ACTIVATIONS)
    row = dispatch.pick("gated_mlp", swiglu.BACKENDS, backend, x)
    if row is not None and reads(x, weight_gate, weight_up, weight_down):
        gate, up = (product(x, weight, None, None) for weight in (weight_gate, weight_up))
        return product(swiglu.glu(row, gate, up, number), weight_down, None, None)
    if row is None:
        return reference.gated_mlp(x, weight_gate, weight_up, weight_down, activation)
    y, *_ = _gated_operator(row, flat(x), weight_gate, weight_up, weight_down, number)
    return y.view(*x.shape[:-1], y.shape[-1])


def _weight(op, name, t, x, rows, cols):
    if not isinstance(t, Tensor) or t.dim() != 2 or t.shape[1] != cols or rows not in (None, t.shape[0]):
        wanted = f"({'*' if rows is None else rows}, {cols})"
        raise ValueError(f"{op}: {name} must be a tensor of shape {wanted}, got {checks.shape(t)}")
    if t.dtype != x.dtype:
        raise ValueError(f"{op}: {name} must have x's dtype {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {t.device}")
