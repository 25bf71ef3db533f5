"""A bias and an activation behind it, in one pass over memory."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, triton
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import bias_act as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_RUNS = {"cpu": 256, "cuda": 1024}  # partial sums of dbias, at most; csrc/bias_act.h says what they are for
_ROWS_A_RUN = 32  # at least, so that a run's own sum is cheap beside its rows
ACTIVATIONS = {"relu": 1, "silu": 3, "gelu": 4, "gelu_tanh": 5}  # as csrc/activation.h numbers them

# No CUDA C++ here, nor for swiglu: each element is read and written once and meets no other, so all that is
# to be had is memory's bandwidth, by 16 bytes at a time, and that is what Triton's compiler makes of it.
BACKENDS = tuple(
    Backend(name, device, _FLOATS, kernel("bias_act_forward"), kernel("bias_act_backward"), missing)
    for name, device, kernel, missing in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing),
        ("triton", "cuda", triton.kernel, triton.missing),
    )
)


def _forward(row, x, bias, activation, saves=True):
    x = x.contiguous()
    y = torch.empty_like(x)
    if row is not None and x.numel():
        row.forward(x, None if bias is None else bias.contiguous(), y, activation)
    return y


def _backward(row, dy, x, bias, activation, wants_dbias, wants_y, spends_dy, saves=True):
    dy, x = dy.contiguous(), x.contiguous()
    dx = dy if spends_dy and not saves else torch.empty_like(x)  # an operator's outputs are new tensors
    y = torch.empty_like(x) if wants_y else None
    new = Tensor.new_empty if row is None or x.numel() else Tensor.new_zeros
    dbias = new(bias, bias.shape) if wants_dbias else None
    if row is not None and x.numel():
        partial = None
        if wants_dbias:
            runs = min(_RUNS[row.device], -(-x.numel() // (x.shape[-1] * _ROWS_A_RUN)))
            partial = x.new_empty(runs, x.shape[-1], dtype=torch.float32)
        bias = None if bias is None else bias.contiguous()
        row.backward(dy, x, bias, dx, dbias, y, partial, activation)
    # An operator's outputs are tensors: an empty one stands for what is not wanted.
    return dx, x.new_empty(0) if dbias is None else dbias, x.new_empty(0) if y is None else y


act_backward = Operator(
    "bias_act_backward(Tensor dy, Tensor x, Tensor? bias, int activation, bool wants_dbias, bool wants_y,"
    " bool spends_dy) -> (Tensor dx, Tensor dbias, Tensor y)",
    BACKENDS,
    _backward,
)


def _save(ctx, inputs, output):
    x, bias, ctx.activation = inputs
    ctx.save_for_backward(x, bias)


def _gradient(ctx, dy):
    wants_dx, wants_dbias = ctx.needs_input_grad[:2]
    dx, dbias, _ = act_backward(ctx.row, dy, *ctx.saved_tensors, ctx.activation, wants_dbias, False, False)
    return dx if wants_dx else None, dbias if wants_dbias else None, None


act = Operator(
    "bias_act(Tensor x, Tensor? bias, int activation) -> Tensor", BACKENDS, _forward, _save, _gradient
)


def bias_act(
    x: Tensor, bias: Tensor | None = None, activation: str = "gelu", *, backend: str | None = None
) -> Tensor:
    """A bias over the last dimension and an activation: y = activation(x + bias).

    The backward reads x again instead of keeping x + bias, and sums dbias in the same pass.

    Args:
        x: (..., C), float32, bfloat16 or float16; without a bias also of no dimension. The sum and its
            activation are computed in float32.
        bias: (C,), x's dtype or float32, or None.
        activation: "gelu" (by erf), "gelu_tanh", "silu" or "relu".
        backend: "cpu", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        y: of x's shape and dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or there is no such activation.
        NotImplementedError: the backend asked for does not take this call.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
    """
    return _call("bias_act", x, bias, activation, backend)


def bias_gelu(
    x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", backend: str | None = None
) -> Tensor:
    """GELU of x + bias, as torch.nn.functional.gelu: approximate is "none" or "tanh". See bias_act."""
    return _call("bias_gelu", x, bias, gelu("bias_gelu", approximate), backend)


def _call(op, x, bias, activation, backend):
    if bias is None and isinstance(x, Tensor) and x.dim() == 0:
        return _call(op, x[None], None, activation, backend)[0]
    checks.floating(op, "x", x)
    if bias is not None:
        checks.parameter(op, "bias", bias, x.shape[-1], x.device, (x.dtype, torch.float32))
    number = activation_number(op, activation)
    row = dispatch.pick(op, BACKENDS, backend, x)
    if row is None:
        return reference.bias_act(x, bias, activation)
    return act(row, x, bias, number)


def gelu(op: str, approximate: str) -> str:
    """The activation that torch's gelu computes."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate must be 'none' or 'tanh', got {approximate!r}")
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def activation_number(op: str, name: str, known: tuple[str, ...] = tuple(ACTIVATIONS)) -> int:
    """The number of an activation; ValueError where it is none of those known."""
    checks.one_of(op, "activation", name, known)
    return ACTIVATIONS[name]
