"""Gated linear units behind their two linear layers: SwiGLU and GEGLU."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, triton
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.ops.bias_act import activation_number, gelu
from lspm_kernels.reference import swiglu as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

# No CUDA C++: ops/bias_act.py says why.
BACKENDS = tuple(
    Backend(name, device, _FLOATS, kernel("swiglu_forward"), kernel("swiglu_backward"), missing)
    for name, device, kernel, missing in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing),
        ("triton", "cuda", triton.kernel, triton.missing),
    )
)


def _rows(t):
    """t with rows that are contiguous and equally far apart: itself wherever they are, as in a half."""
    if t is None or t.is_contiguous():
        return t
    t = checks.rows(t)
    return t.reshape(-1, t.shape[-1])


def _empty(gate, up):
    """Beside gate and up, what they give."""
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _forward(row, gate, up, activation, saves=True):
    y = _empty(gate, up)
    if row is not None and y.numel():
        row.forward(_rows(gate), _rows(up), y, activation)
    return y


def _backward(row, dy, gate, up, activation, wants_y, spends_dy, saves=True):
    # An operator's outputs are new tensors.
    dgate = dy if spends_dy and not saves else gate.new_empty(gate.shape)
    dup = None if up is None else up.new_empty(up.shape)
    y = _empty(gate, up) if wants_y else None
    if row is not None and dy.numel():
        row.backward(dy.contiguous(), _rows(gate), _rows(up), dgate, dup, y, activation)
    # An operator's outputs are tensors: an empty one stands for what is not there.
    return dgate, gate.new_empty(0) if dup is None else dup, gate.new_empty(0) if y is None else y


glu_backward = Operator(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor? up, int activation, bool wants_y, bool spends_dy)"
    " -> (Tensor dgate, Tensor dup, Tensor y)",
    BACKENDS,
    _backward,
)


def _save(ctx, inputs, output):
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gradient(ctx, dy):
    gate, up = ctx.saved_tensors
    dgate, dup, _ = glu_backward(ctx.row, dy, gate, up, ctx.activation, False, False)
    return dgate, None if up is None else dup, None


glu = Operator(
    "swiglu(Tensor gate, Tensor? up, int activation) -> Tensor", BACKENDS, _forward, _save, _gradient
)


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """SiLU of one linear layer's output times another's: y = silu(gate) * up.

    Both are read where they lie as long as rows are contiguous and equally far apart, so the halves of a
    packed projection cost no copy; given packed, its gradient comes in one tensor too. Computed in float32.

    Args:
        gate: (..., H), float32, bfloat16 or float16; without up (..., 2 H), gate and then up.
        up: of gate's shape, or None; of two dtypes, both take the one torch promotes them to.
        backend: "cpu", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        y: (..., H), gate's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        NotImplementedError: the backend asked for does not take this call.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), equation 6.
    """
    return _call("swiglu", gate, up, "silu", backend)


def geglu(
    gate: Tensor, up: Tensor | None = None, *, approximate: str = "none", backend: str | None = None
) -> Tensor:
    """GELU of one linear layer's output times another's: y = gelu(gate) * up.

    approximate is "none" or "tanh", as in torch.nn.functional.gelu; the rest is as in swiglu.
    """
    return _call("geglu", gate, up, gelu("geglu", approximate), backend)


def _call(op, gate, up, activation, backend):
    checks.floating(op, "gate", gate)
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(
                f"{op}: gate must have an even last dimension where up is None, got {gate.shape[-1]}"
            )
    else:
        if not isinstance(up, Tensor) or up.shape != gate.shape or not up.is_floating_point():
            rule = f"be a floating-point tensor of gate's shape {tuple(gate.shape)}"
            raise ValueError(f"{op}: up must {rule}, got {checks.kind(up)}")
        if up.device != gate.device:
            raise ValueError(f"{op}: up must be on gate's device {gate.device}, got {up.device}")
        if up.dtype != gate.dtype:
            dtype = torch.promote_types(gate.dtype, up.dtype)
            gate, up = gate.to(dtype), up.to(dtype)
    row = dispatch.pick(op, BACKENDS, backend, gate)
    if row is None:
        return reference.swiglu(gate, up, activation)
    return glu(row, gate, up, activation_number(op, activation, ACTIVATIONS))
